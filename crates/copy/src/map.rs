//! Which chunks of a node have to be copied, are being copied, and are done.
//!
//! ```text
//!            take()               complete()
//!   dirty ------------> in flight -----------> clean
//!     ^                   |  |                   |
//!     |      fail()       |  | mark()            |
//!     +-------------------+  v                   |
//!     |              in flight, dirty            |
//!     |  complete(), fail()  |                   |
//!     +----------------------+                   |
//!     |                 mark()                   |
//!     +------------------------------------------+
//! ```
//!
//! The invariant: a chunk that was written to after its copy was taken is copied again.
//! A chunk that is in flight is never handed out a second time, so two copies of one chunk
//! can't overtake each other.

use std::collections::BTreeMap;

use dolmen_types::Span;

/// A part to be copied, handed out by [`CopyMap::take`]. It goes back to
/// [`CopyMap::complete`] or [`CopyMap::fail`]: while it is out, its chunks are in flight.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a part that is not handed back stays in flight for ever"]
pub struct Work {
    span: Span,
}

impl Work {
    /// What to copy, in bytes; ends at a multiple of the chunk or at the end of the node.
    pub fn span(&self) -> Span {
        self.span
    }
}

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkState {
    /// Need not be copied.
    Clean,
    /// Has to be copied.
    Dirty,
    /// Somebody is copying it, whether or not it is dirty again.
    InFlight,
}

/// The state of a copy by chunks; see the module's head.
#[derive(Clone, Debug)]
pub struct CopyMap {
    /// Size of the node in bytes.
    size: u64,
    /// Size of a chunk in bytes.
    chunk: u64,
    /// Dirty chunks as ranges of numbers, start to end; neither overlapping nor touching.
    dirty: BTreeMap<u64, u64>,
    /// Chunks in flight, in the same form but for touching: one entry per [`Work`].
    in_flight: BTreeMap<u64, u64>,
    /// How many chunks are dirty.
    dirty_chunks: u64,
    /// Where the next search begins, so that writes behind do not keep it from going on.
    cursor: u64,
}

impl CopyMap {
    /// Nothing to be copied, of a node with `size` bytes in chunks of `chunk` bytes.
    ///
    /// # Panics
    /// When `chunk` is zero.
    pub fn new(size: u64, chunk: u64) -> CopyMap {
        assert!(chunk > 0, "chunks have bytes");
        CopyMap {
            size,
            chunk,
            dirty: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            dirty_chunks: 0,
            cursor: 0,
        }
    }

    /// The chunks that `span` touches have to be copied (again). What lies past the end is
    /// ignored.
    pub fn mark(&mut self, span: Span) {
        if let Some((start, end)) = self.chunks(span) {
            self.insert(start, end);
        }
    }

    /// The chunks that lie wholly in `span` need not be copied: they were discarded, or
    /// are known to be the same.
    pub fn unmark(&mut self, span: Span) {
        let start = span.offset().div_ceil(self.chunk);
        let end = if span.end() >= self.size { self.len() } else { span.end() / self.chunk };
        self.remove(start, end);
    }

    /// Hands out the next part: dirty chunks that are not in flight, at most `max` bytes (but at
    /// least a chunk), going round. `None` when there is nothing to hand out now.
    pub fn take(&mut self, max: u64) -> Option<Work> {
        let run = self.peek()?;
        self.take_at(run.offset(), max)
    }

    /// The run of chunks that would be handed out next: dirty and not in flight.
    pub fn peek(&self) -> Option<Span> {
        let (start, end) =
            self.find(self.cursor, self.len()).or_else(|| self.find(0, self.cursor.min(self.len())))?;
        Some(self.span(start, end))
    }

    /// Hands out the part that begins with the chunk at `offset`, at most `max` bytes (but at least
    /// a chunk). `None` when that chunk is not dirty, or in flight. The search for the next part goes
    /// on behind it.
    pub fn take_at(&mut self, offset: u64, max: u64) -> Option<Work> {
        let at = offset / self.chunk;
        self.find(at, at.saturating_add(1).min(self.len()))?;
        let (start, end) = self.find(at, self.len())?;
        self.cursor = end.min(start.saturating_add((max / self.chunk).max(1)));
        Some(self.fly(start, self.cursor))
    }

    /// Hands out the first part of the chunks that `span` touches, at most `max` bytes (but at least
    /// a chunk). The search for the next part is not moved.
    pub fn take_in(&mut self, span: Span, max: u64) -> Option<Work> {
        let (from, to) = self.chunks(span)?;
        let (start, end) = self.find(from, to)?;
        Some(self.fly(start, end.min(start.saturating_add((max / self.chunk).max(1)))))
    }

    /// Puts the chunks that `span` touches in flight, dirty or not, for somebody who writes to source
    /// and target himself; and says which parts of them were dirty, in bytes. They are not any more: who
    /// does not bring them to the target marks them again. `None` when a chunk is in flight already,
    /// or the span lies behind the end.
    pub fn hold(&mut self, span: Span) -> Option<(Work, Vec<Span>)> {
        let (start, end) = self.chunks(span)?;
        if self.is_in_flight(span) {
            return None;
        }
        let mut dirty = Vec::new();
        let mut at = start;
        while let Some((s, e)) = self.dirty_from(at).filter(|(s, _)| *s < end) {
            dirty.push(self.span(s.max(start), e.min(end)));
            at = e;
        }
        Some((self.fly(start, end), dirty))
    }

    fn fly(&mut self, start: u64, end: u64) -> Work {
        self.remove(start, end);
        self.in_flight.insert(start, end);
        Work { span: self.span(start, end) }
    }

    /// The part has been copied. Chunks of it that were marked meanwhile stay dirty.
    pub fn complete(&mut self, work: Work) {
        self.in_flight.remove(&(work.span.offset() / self.chunk));
    }

    /// The part could not be copied: it is dirty again.
    pub fn fail(&mut self, work: Work) {
        let span = work.span;
        self.complete(work);
        self.mark(span);
    }

    /// Whether any chunk that `span` touches is dirty.
    pub fn is_dirty(&self, span: Span) -> bool {
        self.chunks(span).is_some_and(|(start, end)| self.dirty_from(start).is_some_and(|(s, _)| s < end))
    }

    /// The first piece of `span` in which all bytes are in chunks of the same state.
    pub fn state(&self, span: Span) -> (ChunkState, Span) {
        let Some((at, end)) = self.chunks(span) else { return (ChunkState::Clean, span) };
        let dirty = self.dirty_from(at);
        let flying = self.flying(at);
        let (state, until) = match (flying, dirty) {
            (Some((s, e)), _) if s <= at => (ChunkState::InFlight, e),
            (f, Some((s, e))) if s <= at => (ChunkState::Dirty, f.map_or(e, |(f, _)| f.min(e))),
            (f, d) => (ChunkState::Clean, [f, d].into_iter().flatten().map(|(s, _)| s).min().unwrap_or(end)),
        };
        // What lies past the end is clean.
        let stop = if until.min(end) >= self.len() { self.size } else { until.min(end) * self.chunk };
        (state, span.prefix(stop - span.offset()))
    }

    /// Size of the node in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of a chunk in bytes.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }

    /// Whether nothing is dirty and nothing in flight.
    pub fn is_done(&self) -> bool {
        self.dirty.is_empty() && self.in_flight.is_empty()
    }

    /// Bytes that are dirty or in flight.
    pub fn remaining(&self) -> u64 {
        let flying = self.in_flight.iter().map(|(s, e)| {
            // What is dirty as well counts once.
            self.bytes(*s, *e) - self.overlap(*s, *e)
        });
        // As often as there is progress: so not by adding everything up. Only the last chunk may be short.
        let last = self.dirty.last_key_value().is_some_and(|(_, end)| *end == self.len());
        let missing = if last { self.len() * self.chunk - self.size } else { 0 };
        self.dirty_chunks * self.chunk - missing + flying.sum::<u64>()
    }

    /// Whether any chunk that `span` touches is in flight: a write there has to wait, or to
    /// [`mark`](CopyMap::mark) it.
    pub fn is_in_flight(&self, span: Span) -> bool {
        self.chunks(span).is_some_and(|(start, end)| self.flying(start).is_some_and(|(s, _)| s < end))
    }

    fn len(&self) -> u64 {
        self.size.div_ceil(self.chunk)
    }

    fn span(&self, start: u64, end: u64) -> Span {
        Span::from_range(start * self.chunk, (end * self.chunk).min(self.size))
    }

    fn bytes(&self, start: u64, end: u64) -> u64 {
        (end * self.chunk).min(self.size) - start * self.chunk
    }

    fn chunks(&self, span: Span) -> Option<(u64, u64)> {
        let span = span.intersect(Span::new(0, self.size))?;
        Some((span.offset() / self.chunk, span.end().div_ceil(self.chunk)))
    }

    /// The first entry in flight that ends after `from`.
    fn flying(&self, from: u64) -> Option<(u64, u64)> {
        let before = self.in_flight.range(..=from).next_back().filter(|(_, end)| **end > from);
        before.or_else(|| self.in_flight.range(from..).next()).map(|(s, e)| (*s, *e))
    }

    /// The first dirty entry that ends after `from`.
    fn dirty_from(&self, from: u64) -> Option<(u64, u64)> {
        let before = self.dirty.range(..=from).next_back().filter(|(_, end)| **end > from);
        before.or_else(|| self.dirty.range(from..).next()).map(|(s, e)| (*s, *e))
    }

    /// The first run of chunks in `from..to` that are dirty and not in flight.
    fn find(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        if from >= to {
            return None;
        }
        let first = self.dirty.range(..=from).next_back().filter(|(_, end)| **end > from);
        let rest = self.dirty.range(from + 1..to);
        for (start, end) in first.into_iter().chain(rest) {
            let (mut start, end) = ((*start).max(from), (*end).min(to));
            while start < end {
                match self.flying(start) {
                    Some((busy, after)) if busy <= start => start = after,
                    Some((busy, _)) if busy < end => return Some((start, busy)),
                    _ => return Some((start, end)),
                }
            }
        }
        None
    }

    /// Bytes of the chunks `start..end` that are dirty.
    fn overlap(&self, start: u64, end: u64) -> u64 {
        self.dirty
            .range(..end)
            .rev()
            .take_while(|(_, e)| **e > start)
            .map(|(s, e)| self.bytes((*s).max(start), (*e).min(end)))
            .sum()
    }

    fn insert(&mut self, mut start: u64, mut end: u64) {
        while let Some((s, e)) = self.dirty.range(..=end).next_back().map(|(s, e)| (*s, *e)) {
            if e < start {
                break;
            }
            self.dirty.remove(&s);
            self.dirty_chunks -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.dirty_chunks += end - start;
        self.dirty.insert(start, end);
    }

    fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        while let Some((s, e)) = self.dirty.range(..end).next_back().map(|(s, e)| (*s, *e)) {
            if e <= start {
                break;
            }
            self.dirty.remove(&s);
            self.dirty_chunks -= e.min(end) - s.max(start);
            if e > end {
                self.dirty.insert(end, e);
            }
            if s < start {
                self.dirty.insert(s, start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_chunk_is_cut_off() {
        let mut map = CopyMap::new(10_000, 4096);
        map.mark(Span::new(0, u64::from(u32::MAX)));
        assert_eq!(map.remaining(), 10_000);
        let work = map.take(u64::MAX).unwrap();
        assert_eq!(work.span(), Span::new(0, 10_000));
        assert!(map.take(1).is_none() && !map.is_done());
        map.complete(work);
        assert!(map.is_done());
    }

    #[test]
    fn a_chunk_written_in_flight_is_copied_again_but_not_twice_at_once() {
        let mut map = CopyMap::new(8192, 4096);
        map.mark(Span::new(0, 1));
        let work = map.take(4096).unwrap();
        assert!(map.is_in_flight(Span::new(4095, 1)) && !map.is_in_flight(Span::new(4096, 1)));
        map.mark(Span::new(100, 1));
        assert!(map.take(4096).is_none());
        map.complete(work);
        let again = map.take(4096).unwrap();
        assert_eq!(again.span(), Span::new(0, 4096));
        map.complete(again);
        assert!(map.is_done());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mark(u64, u64),
        Unmark(u64, u64),
        Take(u64),
        TakeIn(u64, u64, u64),
        TakeAt(u64, u64),
        Hold(u64, u64),
        Complete(usize),
        Fail(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..400u64, 0..80u64).prop_map(|(a, l)| Step::Mark(a, l)),
            (0..400u64, 0..150u64).prop_map(|(a, l)| Step::Unmark(a, l)),
            (0..90u64).prop_map(Step::Take),
            (0..400u64, 1..80u64, 0..90u64).prop_map(|(a, l, m)| Step::TakeIn(a, l, m)),
            (0..400u64, 0..90u64).prop_map(|(a, m)| Step::TakeAt(a, m)),
            (0..400u64, 1..80u64).prop_map(|(a, l)| Step::Hold(a, l)),
            (0..8usize).prop_map(Step::Complete),
            (0..8usize).prop_map(Step::Fail),
        ]
    }

    /// The naive oracle: two flags per chunk.
    struct Model {
        size: u64,
        chunk: u64,
        dirty: Vec<bool>,
        flying: Vec<bool>,
    }

    impl Model {
        fn span(&self, i: usize) -> Span {
            let start = i as u64 * self.chunk;
            Span::from_range(start, (start + self.chunk).min(self.size))
        }

        fn check(&self, map: &CopyMap) {
            let ranges = |flags: &[bool]| -> Vec<u64> {
                (0..flags.len() as u64).filter(|i| flags[*i as usize]).collect()
            };
            let of = |m: &BTreeMap<u64, u64>| -> Vec<u64> { m.iter().flat_map(|(s, e)| *s..*e).collect() };
            assert_eq!(of(&map.dirty), ranges(&self.dirty));
            assert_eq!(of(&map.in_flight), ranges(&self.flying));
            assert!(map.dirty.iter().zip(map.dirty.iter().skip(1)).all(|(a, b)| a.1 < b.0), "merged");
            let state = |i: usize| match (self.flying[i], self.dirty[i]) {
                (true, _) => ChunkState::InFlight,
                (false, true) => ChunkState::Dirty,
                (false, false) => ChunkState::Clean,
            };
            let mut rest = Span::new(0, self.size);
            while !rest.is_empty() {
                let (found, piece) = map.state(rest);
                let first = (piece.offset() / self.chunk) as usize;
                let last = ((piece.end() - 1) / self.chunk) as usize;
                assert!((first..=last).all(|i| state(i) == found), "{piece} is not {found:?}");
                // Parts in flight stay apart.
                let longest = piece.end() == self.size || state(last + 1) != found;
                assert!(longest || found == ChunkState::InFlight, "{piece} could be longer");
                assert_eq!(map.is_dirty(piece), (first..=last).any(|i| self.dirty[i]));
                rest = rest.skip(piece.len());
            }
            let free = (0..self.dirty.len()).any(|i| state(i) == ChunkState::Dirty);
            assert_eq!(map.peek().is_some(), free);
            let left = (0..self.dirty.len()).filter(|i| self.dirty[*i] || self.flying[*i]);
            assert_eq!(map.remaining(), left.map(|i| self.span(i).len()).sum::<u64>());
        }
    }

    proptest! {
        #[test]
        fn agrees_with_flags_per_chunk(
            size in 1..400u64,
            chunk in 1..40u64,
            steps in prop::collection::vec(step(), 1..80),
        ) {
            let chunks = size.div_ceil(chunk) as usize;
            let mut map = CopyMap::new(size, chunk);
            let mut model = Model { size, chunk, dirty: vec![false; chunks], flying: vec![false; chunks] };
            let mut out: Vec<Work> = Vec::new();
            for step in steps {
                match step {
                    Step::Mark(at, len) => {
                        map.mark(Span::new(at, len));
                        for i in 0..chunks {
                            if model.span(i).intersect(Span::new(at, len)).is_some() {
                                model.dirty[i] = true;
                            }
                        }
                    }
                    Step::Unmark(at, len) => {
                        map.unmark(Span::new(at, len));
                        for i in 0..chunks {
                            if Span::new(at, len).contains(model.span(i)) {
                                model.dirty[i] = false;
                            }
                        }
                    }
                    Step::Take(max) => match map.take(max) {
                        Some(work) => {
                            let first = (work.span().offset() / chunk) as usize;
                            let n = work.span().len().div_ceil(chunk) as usize;
                            prop_assert!(n as u64 <= (max / chunk).max(1));
                            for i in first..first + n {
                                prop_assert!(model.dirty[i] && !model.flying[i]);
                                model.dirty[i] = false;
                                model.flying[i] = true;
                            }
                            out.push(work);
                        }
                        None => {
                            prop_assert!((0..chunks).all(|i| !model.dirty[i] || model.flying[i]));
                        }
                    },
                    Step::TakeIn(..) | Step::TakeAt(..) => {
                        let free = |model: &Model, i: usize| model.dirty[i] && !model.flying[i];
                        let (work, max, first) = match step {
                            Step::TakeIn(at, len, max) => {
                                let span = Span::new(at, len);
                                let wanted = |i: &usize| {
                                    free(&model, *i) && model.span(*i).intersect(span).is_some()
                                };
                                (map.take_in(span, max), max, (0..chunks).find(wanted))
                            }
                            Step::TakeAt(at, max) => {
                                let i = (at / chunk) as usize;
                                (map.take_at(at, max), max, (i < chunks && free(&model, i)).then_some(i))
                            }
                            _ => unreachable!("matched above"),
                        };
                        let got = work.as_ref().map(|w| (w.span().offset() / chunk) as usize);
                        prop_assert_eq!(got, first);
                        if let Some(work) = work {
                            let n = work.span().len().div_ceil(chunk) as usize;
                            prop_assert!(n as u64 <= (max / chunk).max(1));
                            for i in got.into_iter().flat_map(|f| f..f + n) {
                                prop_assert!(free(&model, i));
                                model.dirty[i] = false;
                                model.flying[i] = true;
                            }
                            out.push(work);
                        }
                    }
                    Step::Hold(at, len) => {
                        let span = Span::new(at, len);
                        let touched: Vec<usize> =
                            (0..chunks).filter(|i| model.span(*i).intersect(span).is_some()).collect();
                        let can = !touched.is_empty() && !touched.iter().any(|i| model.flying[*i]);
                        let held = map.hold(span);
                        prop_assert_eq!(held.is_some(), can);
                        if let Some((work, dirty)) = held {
                            let were: u64 =
                                touched.iter().filter(|i| model.dirty[**i]).map(|i| model.span(*i).len()).sum();
                            prop_assert_eq!(dirty.iter().map(|s| s.len()).sum::<u64>(), were);
                            for i in touched {
                                model.dirty[i] = false;
                                model.flying[i] = true;
                            }
                            out.push(work);
                        }
                    }
                    Step::Complete(i) | Step::Fail(i) if i < out.len() => {
                        let work = out.swap_remove(i);
                        let first = (work.span().offset() / chunk) as usize;
                        let n = work.span().len().div_ceil(chunk) as usize;
                        let failed = matches!(step, Step::Fail(_));
                        if failed { map.fail(work) } else { map.complete(work) }
                        for i in first..first + n {
                            model.flying[i] = false;
                            model.dirty[i] |= failed;
                        }
                    }
                    Step::Complete(_) | Step::Fail(_) => {}
                }
                model.check(&map);
            }
        }
    }
}
