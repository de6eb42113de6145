//! A point in time of a node, kept while its guest goes on writing.
//!
//! ```text
//!             dirty                       in flight                     clean
//!      old data are in `file`  --save-->  being copied  ---------->  old data are in `target`
//!        |                                                             |
//!        +------- forget: nobody wants them any more ------------------+--> clean, not wanted
//! ```
//!
//! [`PointInTime`] is what a copy-before-write filter, the job that stands on it and a snapshot-access
//! node share. The order that makes it right:
//!
//! - A guest's write waits until every chunk that it touches is clean, and then until nobody reads the
//!   old data of these chunks from `file`. A clean chunk never becomes dirty again, so after that nothing
//!   can come in between.
//! - A reader of the point in time looks at the state of a chunk and registers itself in one step (under
//!   the lock of the readers). If it saw "dirty" or "in flight", the writer sees it; otherwise it reads from
//!   `target`.
//! - When the old data could not be saved and the guest was let through all the same
//!   (`break-snapshot`), the point is broken *before* the guest writes; a reader looks again after it has
//!   read.

use std::sync::{Arc, Mutex, MutexGuard};

use dolmen_graph::{Cx, Node};
use dolmen_types::{Error, ErrorKind, ReadFlags, Result, Span, WriteFlags};
use event_listener::Event;

use crate::transfer::{Content, How, content, transfer};
use crate::{Buffers, ChunkState, CopyMap, Tracker};

/// Index of the child whose point in time is kept.
pub(crate) const FILE: usize = 0;
/// Index of the child that old data are saved in.
pub(crate) const TARGET: usize = 1;

/// The most bytes that are saved in one step before a guest's write.
const MAX_SAVE: u64 = 1 << 20;

/// Buffers that stay allocated.
const KEEP_BUFFERS: usize = 4;

#[derive(Debug)]
struct Inner {
    /// Why old data are missing, if some are.
    broken: Option<Error>,
    /// Chunks that somebody may still want, as the dirty ones of a map.
    wanted: CopyMap,
    /// Ranges of `file` that are being read as they were, with a number each.
    readers: Vec<(u64, Span)>,
    next_reader: u64,
}

/// See the module's head.
#[derive(Debug)]
pub struct PointInTime {
    /// Dirty: to be saved (or copied by the job) before it may be overwritten.
    tracker: Arc<Tracker>,
    /// Never held across an await. Taken before the tracker's own lock.
    inner: Mutex<Inner>,
    readers_gone: Event,
    buffers: Buffers,
    /// Only what lies above this node is saved.
    base: Option<Arc<Node>>,
}

impl PointInTime {
    /// The point in time at which a node of `size` bytes is now, in chunks of `chunk` bytes. Nothing may be
    /// written to the node between this call and the first request through the filter.
    pub fn new(size: u64, chunk: u64) -> PointInTime {
        let tracker = Arc::new(Tracker::all_dirty(size, chunk));
        let mut wanted = CopyMap::new(size, chunk);
        wanted.mark(Span::new(0, size));
        let inner = Inner { broken: None, wanted, readers: Vec::new(), next_reader: 0 };
        PointInTime {
            tracker,
            inner: Mutex::new(inner),
            readers_gone: Event::new(),
            buffers: Buffers::new(MAX_SAVE as usize, KEEP_BUFFERS),
            base: None,
        }
    }

    /// Saves only what the layers above `base` hold: the target has the rest from its own backing file, and
    /// nobody may write to `base`. Such a point can't be read as a whole.
    #[must_use]
    pub fn above(mut self, base: Option<Arc<Node>>) -> PointInTime {
        self.base = base;
        self
    }

    /// Which chunks have not been saved yet.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Size at that time, in bytes.
    pub fn size(&self) -> u64 {
        self.tracker.with(CopyMap::size)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("point in time")
    }

    /// Why it can't be read any more, if so.
    pub fn broken(&self) -> Option<Error> {
        self.lock().broken.as_ref().map(Error::duplicate)
    }

    /// Old data are missing from now on.
    pub(crate) fn break_it(&self, why: &Error) {
        self.lock().broken.get_or_insert_with(|| why.duplicate());
        self.tracker.poke();
        self.readers_gone.notify(usize::MAX);
    }

    /// Whether a write to `span` may go ahead at once: all is clean, and nobody reads the old data.
    pub(crate) fn is_free(&self, span: Span) -> bool {
        let inner = self.lock();
        if inner.broken.is_some() {
            return true;
        }
        // Readers read whole chunks or less; a write to the other end of the chunk does not disturb them.
        if inner.readers.iter().any(|(_, r)| r.overlaps(span)) {
            return false;
        }
        let (state, piece) = self.tracker.state(span);
        state == ChunkState::Clean && piece == span
    }

    /// Saves one piece of what `span` touches and is not saved yet. `false` when nothing is left to save.
    ///
    /// # Errors
    /// Why it could not be saved; it is still to be saved.
    pub(crate) async fn save_one(&self, cx: Cx<'_>, span: Span) -> Result<bool> {
        let Some(taken) = self.tracker.take_in(span, MAX_SAVE) else {
            if !self.tracker.with(|m| m.is_in_flight(span)) {
                return Ok(false);
            }
            // Somebody else saves it.
            let listener = self.tracker.listen();
            if self.tracker.with(|m| m.is_in_flight(span)) && !self.is_broken() {
                listener.await;
            }
            return Ok(true);
        };
        let (source, target) = (&cx.node.children[FILE].node, &cx.node.children[TARGET].node);
        let (from, to) = (cx.read(FILE)?, cx.write(TARGET)?);
        let how = How { unmap: true, detect_zeroes: false, flags: WriteFlags::NONE };
        let mut rest = taken.span();
        while !rest.is_empty() {
            let (what, len) = content(source, cx.rt, rest, self.base.as_deref()).await;
            let part = rest.prefix(len);
            transfer(from, to, target, part, what, how, &self.buffers).await.map_err(|f| f.error)?;
            rest = rest.skip(len);
        }
        taken.done();
        Ok(true)
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// Whether somebody reads old data of `span` from the file, and must not be disturbed.
    fn is_read(&self, span: Span) -> bool {
        let inner = self.lock();
        inner.broken.is_none() && inner.readers.iter().any(|(_, r)| r.overlaps(span))
    }

    /// Waits until nobody reads old data of `span` from the file.
    pub(crate) async fn readers_gone(&self, span: Span) {
        loop {
            let listener = self.readers_gone.listen();
            if !self.is_read(span) {
                return;
            }
            listener.await;
        }
    }

    /// Looks where the start of `span` is, and registers a reader if it is still in the file.
    fn locate(&self, span: Span) -> Result<(Place<'_>, Span)> {
        let mut inner = self.lock();
        if let Some(why) = &inner.broken {
            return Err(broken(why));
        }
        let (wanted, piece) = inner.wanted.state(span);
        if wanted != ChunkState::Dirty {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("the old data of {piece} were discarded, and are gone"),
            ));
        }
        let (state, piece) = self.tracker.state(piece);
        if state == ChunkState::Clean {
            return Ok((Place::Saved, piece));
        }
        let ticket = inner.next_reader;
        inner.next_reader += 1;
        inner.readers.push((ticket, piece));
        Ok((Place::File(Reader { point: self, ticket }), piece))
    }

    /// Reads the data as they were. `cx` is of the filter's node. What lies past the size at that time is
    /// the caller's mistake.
    ///
    /// # Errors
    /// `PermissionDenied` when the data were discarded, or the point is broken; or what the nodes say.
    pub(crate) async fn read(&self, cx: Cx<'_>, span: Span, to: &dolmen_rt::IoVec) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let (place, piece) = self.locate(rest)?;
            let part;
            let data = if piece == span {
                to
            } else {
                part = to.slice((piece.offset() - span.offset()) as usize, piece.len() as usize);
                &part
            };
            match place {
                Place::Saved => cx.read_saved(TARGET)?.read(piece, data, ReadFlags::NONE).await?,
                Place::File(reader) => {
                    cx.read(FILE)?.read(piece, data, ReadFlags::NONE).await?;
                    drop(reader);
                    if let Some(why) = &self.lock().broken {
                        return Err(broken(why));
                    }
                }
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// Whether the start of `span` read as zeroes at that time, and for how many bytes that holds.
    ///
    /// # Errors
    /// What the nodes say.
    pub(crate) async fn is_zero(&self, cx: Cx<'_>, span: Span) -> Result<(bool, u64)> {
        let (place, piece) = match self.locate(span) {
            Ok(found) => found,
            // Reading tells why it is not there.
            Err(_) => return Ok((false, span.len())),
        };
        let (child, reader) = match place {
            Place::Saved => (TARGET, None),
            Place::File(reader) => (FILE, Some(reader)),
        };
        let (what, len) = content(&cx.node.children[child].node, cx.rt, piece, None).await;
        drop(reader);
        Ok((what != Content::Data && !self.is_broken(), len))
    }

    /// Nobody wants the data of `span` any more: whole chunks of it need not be saved, and if they have
    /// been, the target gets its space back. `cx` is of the filter's node.
    ///
    /// # Errors
    /// What the target says.
    pub(crate) async fn forget(&self, cx: Cx<'_>, span: Span) -> Result<()> {
        let (chunk, size) = self.tracker.with(|m| (m.chunk(), m.size()));
        let start = span.offset().next_multiple_of(chunk);
        let end = if span.end() >= size { size } else { span.end() / chunk * chunk };
        if start >= end {
            return Ok(());
        }
        let mut rest = Span::from_range(start, end);
        self.lock().wanted.unmark(rest);
        while !rest.is_empty() {
            // What is being saved right now can't be discarded before it has been.
            self.tracker.settled(rest.prefix(chunk)).await;
            let (state, piece) = self.tracker.state(rest);
            match state {
                ChunkState::InFlight => continue,
                ChunkState::Dirty => self.tracker.unmark(piece),
                ChunkState::Clean => cx.write(TARGET)?.discard(piece, WriteFlags::NONE).await?,
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }
}

fn broken(why: &Error) -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        format!("the snapshot is broken: old data could not be saved before a write ({why})"),
    )
}

/// Where old data are.
enum Place<'a> {
    /// In the target.
    Saved,
    /// In the file, where they stay as long as the reader does.
    File(Reader<'a>),
}

/// A registered reader of old data.
struct Reader<'a> {
    point: &'a PointInTime,
    ticket: u64,
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.point.lock().readers.retain(|(t, _)| *t != self.ticket);
        self.point.readers_gone.notify(usize::MAX);
    }
}
