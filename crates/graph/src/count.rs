//! Counters: what has come to a node, and what a user has asked for.
//!
//! A request is counted where it enters a node, with the size it has there: once, however many pieces its way further
//! down is cut into. Every node that it visits counts it, also those that only pass it on and those that are stepped
//! over ([`RuleTable::transparent`](crate::RuleTable)); that is why counting has to be cheap. Each core adds to words of
//! its own with a plain load and store (see [`Lane`](dolmen_rt::Lane)); a reader adds them up. A reading is therefore not a
//! point in time: a request that is counted while it is made may be seen or not.
//!
//! Requests that failed are counted apart from those that did not. A node learns of a failure of a request that
//! it passed on, because the walk that led past it is walked once more (see `io`); that costs nothing while all is well.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use dolmen_rt::Lane;
use dolmen_types::OpKind;

/// What is counted apart.
const KINDS: usize = 5;

/// The words of a kind.
const fn index(kind: OpKind) -> Option<usize> {
    match kind {
        OpKind::Read => Some(0),
        OpKind::Write => Some(1),
        OpKind::WriteZeroes => Some(2),
        OpKind::Discard => Some(3),
        OpKind::Flush => Some(4),
        // Rare, and changes of the size show in the size.
        OpKind::Resize => None,
    }
}

/// What has happened, of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests, without those that failed.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// How long they took together, failed ones included; zero where nobody measures it (nodes).
    pub time: Duration,
}

/// A reading of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: Tally,
    /// Writes with data.
    pub writes: Tally,
    /// Zero writes.
    pub zeroes: Tally,
    /// Discards.
    pub discards: Tally,
    /// Flushes.
    pub flushes: Tally,
    /// The end of the write or zero write that reached furthest, in bytes from the start.
    pub highest_write: u64,
}

/// The words of one kind on one lane. A failed request is taken out of `requests` and `bytes`, perhaps on another lane
/// than it was counted on: the words may wrap, their sums are right.
#[derive(Debug, Default)]
struct Words {
    requests: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    nanos: AtomicU64,
}

/// The words of one lane, in cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    kinds: [Words; KINDS],
    highest_write: AtomicU64,
}

/// Where a request is counted: worked out once, used at every node on its way.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    lane: usize,
    index: usize,
    writes: bool,
}

impl Place {
    /// `None` for what is not counted.
    pub(crate) fn of(lane: &Lane, kind: OpKind) -> Option<Place> {
        let writes = matches!(kind, OpKind::Write | OpKind::WriteZeroes);
        Some(Place { lane: lane.number().unwrap_or(Lane::COUNT), index: index(kind)?, writes })
    }

    /// Whether the request changes what a node holds, and so may reach further than any before.
    pub(crate) fn writes(self) -> bool {
        self.writes
    }
}

/// Who may write a shard.
#[derive(Clone, Copy)]
enum Hand<'a> {
    /// One core only.
    Own(&'a Shard),
    /// Everybody.
    Shared(&'a Shard),
}

impl Hand<'_> {
    fn shard(&self) -> &Shard {
        match self {
            Hand::Own(s) | Hand::Shared(s) => s,
        }
    }

    fn add(self, word: &AtomicU64, n: u64) {
        match self {
            Hand::Own(_) => word.store(word.load(Relaxed).wrapping_add(n), Relaxed),
            Hand::Shared(_) => {
                word.fetch_add(n, Relaxed);
            }
        }
    }

    fn raise(self, word: &AtomicU64, to: u64) {
        if word.load(Relaxed) >= to {
            return;
        }
        match self {
            Hand::Own(_) => word.store(to, Relaxed),
            Hand::Shared(_) => {
                word.fetch_max(to, Relaxed);
            }
        }
    }
}

/// Counters of a node or of a user.
pub struct Counters {
    /// For each lane that has counted here.
    lanes: [OnceLock<Box<Shard>>; Lane::COUNT],
    /// For runtimes without a lane.
    shared: OnceLock<Box<Shard>>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters { lanes: [const { OnceLock::new() }; Lane::COUNT], shared: OnceLock::new() }
    }
}

impl Counters {
    #[inline]
    fn hand(&self, at: Place) -> Hand<'_> {
        match self.lanes.get(at.lane) {
            Some(own) => Hand::Own(own.get_or_init(Box::default)),
            None => Hand::Shared(self.shared.get_or_init(Box::default)),
        }
    }

    /// A request for `bytes` bytes up to `end` has come.
    #[inline]
    pub(crate) fn arrived(&self, at: Place, bytes: u64, end: u64) {
        let hand = self.hand(at);
        let words = &hand.shard().kinds[at.index];
        hand.add(&words.requests, 1);
        hand.add(&words.bytes, bytes);
        if at.writes {
            hand.raise(&hand.shard().highest_write, end);
        }
    }

    /// A request that has been counted failed, with `bytes` of it not done.
    pub(crate) fn failed(&self, at: Place, bytes: u64) {
        let hand = self.hand(at);
        let words = &hand.shard().kinds[at.index];
        hand.add(&words.requests, 1u64.wrapping_neg());
        hand.add(&words.bytes, bytes.wrapping_neg());
        hand.add(&words.failed, 1);
    }

    /// A user's request has ended: one of `kind` for `bytes` bytes up to `end`, after `took`.
    pub fn ended(&self, lane: &Lane, kind: OpKind, bytes: u64, end: u64, took: Duration, ok: bool) {
        let Some(at) = Place::of(lane, kind) else { return };
        let hand = self.hand(at);
        let words = &hand.shard().kinds[at.index];
        if ok {
            self.arrived(at, bytes, end);
        } else {
            hand.add(&words.failed, 1);
        }
        hand.add(&words.nanos, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What has been counted so far.
    pub fn read(&self) -> Counts {
        let mut sums = [Tally::default(); KINDS];
        let mut highest_write = 0;
        for shard in self.lanes.iter().chain([&self.shared]).filter_map(OnceLock::get) {
            for (sum, words) in sums.iter_mut().zip(&shard.kinds) {
                sum.requests = sum.requests.wrapping_add(words.requests.load(Relaxed));
                sum.bytes = sum.bytes.wrapping_add(words.bytes.load(Relaxed));
                sum.failed = sum.failed.wrapping_add(words.failed.load(Relaxed));
                sum.time += Duration::from_nanos(words.nanos.load(Relaxed));
            }
            highest_write = highest_write.max(shard.highest_write.load(Relaxed));
        }
        let [reads, writes, zeroes, discards, flushes] = sums;
        Counts { reads, writes, zeroes, discards, flushes, highest_write }
    }
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.read().fmt(f)
    }
}

/// The offset of a node above which a write is announced, once.
#[derive(Debug)]
pub(crate) struct Threshold(AtomicU64);

/// No write ends beyond it.
const NEVER: u64 = u64::MAX;

impl Default for Threshold {
    fn default() -> Self {
        Threshold(AtomicU64::new(NEVER))
    }
}

impl Threshold {
    /// `None` for none. What a write in flight sees is the old or the new one.
    pub(crate) fn set(&self, at: Option<u64>) {
        self.0.store(at.unwrap_or(NEVER), Relaxed);
    }

    pub(crate) fn get(&self) -> Option<u64> {
        Some(self.0.load(Relaxed)).filter(|at| *at != NEVER)
    }

    /// Whether a write up to `end` passes it. The threshold is gone then: of several writes that pass it, one is told.
    pub(crate) fn passed_by(&self, end: u64) -> Option<u64> {
        let at = self.0.load(Relaxed);
        (end > at && self.0.compare_exchange(at, NEVER, Relaxed, Relaxed).is_ok()).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_apart() {
        let c = Counters::default();
        let (a, b) = (Lane::take(), Lane::take());
        let write = Place::of(&a, OpKind::Write).unwrap();
        c.arrived(write, 512, 1024);
        c.arrived(write, 4096, 8192);
        // The failure is noticed on another core.
        c.failed(Place::of(&b, OpKind::Write).unwrap(), 4096);
        c.arrived(Place::of(&b, OpKind::Read).unwrap(), 100, 1 << 40);
        assert!(Place::of(&b, OpKind::Resize).is_none());
        let counts = c.read();
        assert_eq!(counts.writes, Tally { requests: 1, bytes: 512, failed: 1, time: Duration::ZERO });
        assert_eq!(counts.reads, Tally { requests: 1, bytes: 100, ..Tally::default() });
        assert_eq!(counts.highest_write, 8192);
        assert_eq!(counts.flushes, Tally::default());
    }

    #[test]
    fn runtimes_without_a_lane_count_too() {
        let c = Counters::default();
        let lanes: Vec<Lane> = (0..=Lane::COUNT).map(|_| Lane::take()).collect();
        for lane in &lanes {
            c.ended(lane, OpKind::Discard, 10, 0, Duration::from_nanos(3), true);
            c.ended(lane, OpKind::Discard, 10, 0, Duration::from_nanos(4), false);
        }
        let n = lanes.len() as u64;
        let discards = c.read().discards;
        assert_eq!((discards.requests, discards.bytes, discards.failed), (n, 10 * n, n));
        assert_eq!(discards.time, Duration::from_nanos(7 * n));
    }

    #[test]
    fn a_threshold_is_passed_once() {
        let t = Threshold::default();
        assert_eq!((t.get(), t.passed_by(u64::MAX)), (None, None));
        t.set(Some(4096));
        assert_eq!((t.passed_by(4096), t.get()), (None, Some(4096)));
        assert_eq!((t.passed_by(4097), t.get(), t.passed_by(4097)), (Some(4096), None, None));
        t.set(Some(0));
        t.set(None);
        assert_eq!(t.passed_by(1), None);
    }
}
