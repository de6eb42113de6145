//! Requests to a file.
//!
//! Buffered files take any offset and length. With direct I/O everything must be aligned: what is not goes through a
//! bounce buffer, and an unaligned write reads the blocks at its ends first. Such writes, and all writes and zeroings of a
//! direct file, exclude each other where their *blocks* overlap, so that no half of a block is lost. An unaligned write is
//! a task of its own: if the request is cancelled, a write that the kernel still has must not bring back old bytes of
//! its neighbours after they were written anew.
//!
//! The size is the one that this node knows: files do not shrink below their users. Reads past it give zeroes, writes
//! past it make the file grow.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use dolmen_graph::{
    AccessRule, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node, NodeChange, Op, Plan,
    Prealloc, Prepared, RangeGuard, RangeLock, Request, SELF, Where,
};
use dolmen_rt::sys::{self, FileFacts, FileKind};
use dolmen_rt::{Cached, CoreIo, Fallocate, File, Guard, Hold, IoVec, LocalFuture, Memory, Rt, Seek, carry};
use dolmen_types::{Actions, BlkEvent, Error, ErrorKind, Result, ResultExt, Span, Value, WriteFlags};

use super::lock::{Locks, Stance};
use super::shared::{EINVAL, no_files};

/// Zeroes are written in buffers of this size where the file system can't zero by itself.
const ZERO_CHUNK: u64 = 1 << 20;
/// Alignment of direct I/O where the kernel does not tell: right for every disk.
const DIRECT_ALIGN: u32 = 4096;

/// A file that was opened.
pub(super) struct Made {
    pub(super) file: File,
    pub(super) facts: FileFacts,
    pub(super) direct: bool,
    pub(super) writable: bool,
    pub(super) locking: bool,
}

/// A node's file.
pub(super) struct FileDriver {
    me: Weak<FileDriver>,
    kind: &'static DriverKind,
    filename: String,
    file: File,
    is_device: bool,
    /// It was to be writable, but could only be opened for reading.
    read_only: bool,
    /// Shared with the driver that this one takes over from, so that the two never differ.
    size: Arc<AtomicU64>,
    /// Opened for writing.
    writable: bool,
    /// The file belongs to another process for now.
    inactive: bool,
    /// Offsets and lengths of requests to the kernel are multiples of this; 1 when buffered.
    align: u32,
    memory_align: u32,
    locks: Arc<Locks>,
    /// Blocks that are written; used by direct files only.
    blocks: RangeLock,
    /// The file system has answered that it can't.
    no_zero_range: AtomicBool,
    no_punch: AtomicBool,
    no_seek: AtomicBool,
    /// Written since the last flush.
    dirty: AtomicBool,
    /// The errno of a flush of a buffered file that failed; 0 for none. The kernel reports a lost page once and forgets
    /// it: a later flush would succeed although data are missing. So all later flushes fail, too.
    lost: AtomicI32,
    status: Arc<StatusCache>,
    space: Arc<Space>,
}

/// The disk space that a file takes.
#[derive(Default)]
struct Space {
    bytes: AtomicU64,
    /// The answer has not come yet. A server that is gone is asked once.
    asking: AtomicBool,
}

impl FileDriver {
    pub(super) fn new(
        kind: &'static DriverKind,
        filename: String,
        made: Made,
        read_only: bool,
        inactive: bool,
        old: Option<&FileDriver>,
    ) -> Arc<FileDriver> {
        let Made { file, facts, direct, writable, locking } = made;
        let known = |align: u32| if align == 0 { DIRECT_ALIGN } else { align };
        let (align, memory_align) = if direct {
            (known(facts.direct_offset_align), known(facts.direct_memory_align))
        } else {
            (1, 1)
        };
        Arc::new_cyclic(|me| FileDriver {
            me: me.clone(),
            kind,
            locks: match old {
                // One node's locks are one set.
                Some(old) => old.locks.clone(),
                None => Arc::new(Locks::new(file.clone(), facts.id, filename.clone(), locking)),
            },
            filename,
            file,
            is_device: facts.kind == FileKind::Block,
            read_only,
            size: match old {
                // Nobody but this node changes its size.
                Some(old) if old.writable && !old.inactive => old.size.clone(),
                _ => Arc::new(AtomicU64::new(facts.size)),
            },
            writable,
            inactive,
            align,
            memory_align,
            blocks: RangeLock::new(),
            no_zero_range: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_seek: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            lost: AtomicI32::new(0),
            status: Arc::default(),
            space: Arc::new(Space { bytes: AtomicU64::new(facts.allocated), asking: AtomicBool::new(false) }),
        })
    }

    /// Makes sure that a node keeps its name when it is reopened.
    pub(super) fn check_name(&self, filename: &str) -> Result<()> {
        if self.filename == filename {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidInput, "Cannot change the option 'filename'")
            .remedy("add a node for the other file, and link that instead"))
    }

    /// Makes sure that this is the same file, locked in the same way.
    pub(super) fn check_same(&self, filename: &str, made: &Made) -> Result<()> {
        if self.locks.between_processes() != made.locking {
            return Err(Error::new(ErrorKind::InvalidInput, "Cannot change the option 'locking'")
                .remedy("remove the node, and add it with the other option"));
        }
        if self.locks.file_id() != made.facts.id {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("'{filename}' is another file now than the one that the node has open"),
            )
            .remedy("add a node for the new file, and link that instead"));
        }
        Ok(())
    }

    /// What has to happen when this driver takes the place of `old`.
    pub(super) fn takes_over(self: &Arc<Self>, old: &FileDriver) -> Option<Box<dyn Prepared>> {
        let old = old.me.upgrade()?;
        Some(Box::new(TakeOver { new: self.clone(), old }))
    }

    fn size_now(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_aligned(&self, span: Span, iov: &IoVec) -> bool {
        self.align == 1
            || (span.is_aligned(self.align.into())
                && iov.segments().iter().all(|s| s.is_aligned(self.memory_align as usize)))
    }

    async fn read(&self, io: &CoreIo, span: Span, to: &IoVec, cached: Cached) -> Result<()> {
        if self.is_aligned(span, to) {
            let n = io.read_full_after(cached, &self.file, to, span.offset()).await?;
            if n < to.len() {
                self.check_end(span.offset() + n as u64)?;
                to.slice(n, to.len() - n).fill(0);
            }
            return Ok(());
        }
        let outer = span.align_out(self.align.into());
        let bounce = Memory::zeroed(outer.len() as usize).iovec();
        let n = io.read_full_at(&self.file, &bounce, outer.offset()).await?;
        if n < bounce.len() && outer.offset() + (n as u64) < span.end() {
            self.check_end(outer.offset() + n as u64)?;
        }
        to.copy_from(&bounce.slice((span.offset() - outer.offset()) as usize, to.len()));
        io.note_copied(to.len());
        Ok(())
    }

    /// A file that ends before its size was cut off by somebody else, and what is missing must not be taken for zeroes.
    fn check_end(&self, end: u64) -> Result<()> {
        let size = self.size_now();
        if end >= size {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Io,
            format!(
                "{} ends at byte {end} now, and had {size} bytes: something else has cut it off",
                self.name()
            ),
        )
        .remedy("restore the file; copies made since it was cut off are not complete"))
    }

    async fn write(&self, rt: &Rt, io: &CoreIo, span: Span, from: &IoVec, dsync: bool) -> Result<()> {
        if !self.is_aligned(span, from) {
            let me = self.me.upgrade().expect("a driver that runs a request is alive");
            let (io, from) = (io.clone(), from.clone());
            return rt.shielded(async move { me.write_unaligned(&io, span, &from, dsync).await }).await;
        }
        let mut changing = self.status.change(span, true);
        self.dirty.store(true, Ordering::Relaxed);
        let _blocks = self.lock_blocks(span).await;
        carry(io.write_all_at(&self.file, from, span.offset(), dsync), &mut changing).await?;
        self.size.fetch_max(span.end(), Ordering::AcqRel);
        changing.done();
        Ok(())
    }

    /// Writes whole blocks, with what the file has at both ends.
    async fn write_unaligned(&self, io: &CoreIo, span: Span, from: &IoVec, dsync: bool) -> Result<()> {
        let changing = self.status.change(span, true);
        self.dirty.store(true, Ordering::Relaxed);
        let _blocks = self.lock_blocks(span).await;
        let align = u64::from(self.align);
        let outer = span.align_out(align);
        let memory = Memory::zeroed(outer.len() as usize);
        let bounce = memory.iovec();
        let block = align as usize;
        if outer.offset() < span.offset() || outer.len() == align {
            io.read_full_at(&self.file, &bounce.slice(0, block), outer.offset()).await?;
        }
        if outer.end() > span.end() && outer.len() > align {
            let last = outer.len() as usize - block;
            io.read_full_at(&self.file, &bounce.slice(last, block), outer.end() - align).await?;
        }
        bounce.slice((span.offset() - outer.offset()) as usize, from.len()).copy_from(from);
        io.note_copied(from.len());
        io.write_all_at(&self.file, &bounce, outer.offset(), dsync).await?;
        // The padding must not make the file longer than its content.
        let end = self.size_now().max(span.end());
        if outer.end() > end && !self.is_device {
            io.truncate(&self.file, end).await?;
        }
        self.size.fetch_max(span.end(), Ordering::AcqRel);
        changing.done();
        Ok(())
    }

    async fn lock_blocks(&self, span: Span) -> Option<RangeGuard<'_>> {
        if self.align == 1 {
            return None;
        }
        Some(self.blocks.lock(span.align_out(self.align.into())).await)
    }

    async fn write_zeroes(
        &self,
        cx: Cx<'_>,
        io: &CoreIo,
        span: Span,
        flags: WriteFlags,
        fua: bool,
    ) -> Result<()> {
        let unmap = flags.has(WriteFlags::MAY_UNMAP) && cx.node.flags.unmap;
        {
            let mut changing = self.status.change(span, false);
            self.dirty.store(true, Ordering::Relaxed);
            let _blocks = self.lock_blocks(span).await;
            let zeroed = carry(self.zero_by_kernel(io, span, unmap), &mut changing).await?;
            changing.done();
            if zeroed {
                self.size.fetch_max(span.end(), Ordering::AcqRel);
                return if fua { self.flush(io).await } else { Ok(()) };
            }
        }
        if flags.has(WriteFlags::NO_FALLBACK) {
            return Err(Error::new(ErrorKind::Unsupported, "the file system cannot zero a range by itself"));
        }
        let zeroes = Memory::zeroed(span.len().min(ZERO_CHUNK) as usize).iovec();
        for piece in span.blocks(ZERO_CHUNK) {
            self.write(cx.rt, io, piece, &zeroes.slice(0, piece.len() as usize), fua).await?;
        }
        Ok(())
    }

    /// Lets the file system zero the range. False when it can't.
    async fn zero_by_kernel(&self, io: &CoreIo, span: Span, unmap: bool) -> Result<bool> {
        let size = self.size_now();
        let inside = span.prefix(size.saturating_sub(span.offset()));
        let beyond = span.skip(inside.len());
        if !inside.is_empty() {
            // A hole, filled up again unless it may stay one, is as good as a zeroed range.
            let zeroed = (unmap && self.punch(io, inside).await?)
                || self.zero_range(io, inside).await?
                || (self.punch(io, inside).await? && (unmap || self.allocate(io, inside).await?));
            if !zeroed {
                return Ok(false);
            }
        }
        if !beyond.is_empty() {
            if self.is_device {
                return Err(Error::new(
                    ErrorKind::OutOfBounds,
                    "the range lies beyond the end of the device",
                ));
            }
            // Growing gives zeroes.
            if unmap || !self.allocate(io, Span::from_range(size.max(beyond.offset()), beyond.end())).await? {
                io.truncate(&self.file, beyond.end()).await?;
            }
        }
        Ok(true)
    }

    async fn punch(&self, io: &CoreIo, span: Span) -> Result<bool> {
        self.try_fallocate(io, &self.no_punch, Fallocate::PunchHole, span).await
    }

    async fn zero_range(&self, io: &CoreIo, span: Span) -> Result<bool> {
        self.try_fallocate(io, &self.no_zero_range, Fallocate::ZeroRange, span).await
    }

    async fn allocate(&self, io: &CoreIo, span: Span) -> Result<bool> {
        if self.is_device {
            return Ok(true);
        }
        can(io.fallocate(&self.file, Fallocate::Allocate, span.offset(), span.len()).await)
    }

    async fn try_fallocate(
        &self,
        io: &CoreIo,
        never: &AtomicBool,
        what: Fallocate,
        span: Span,
    ) -> Result<bool> {
        if never.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let result = io.fallocate(&self.file, what, span.offset(), span.len()).await;
        // A device refuses unaligned ranges with EINVAL: that says nothing about other ranges.
        if self.is_device && result.as_ref().is_err_and(|e| e.errno() == EINVAL) {
            return Ok(false);
        }
        let done = can(result)?;
        if !done {
            never.store(true, Ordering::Relaxed);
        }
        Ok(done)
    }

    async fn discard(&self, io: &CoreIo, span: Span, fua: bool) -> Result<()> {
        let span = span.prefix(self.size_now().saturating_sub(span.offset()));
        if span.is_empty() {
            return Ok(());
        }
        let mut changing = self.status.change(span, false);
        self.dirty.store(true, Ordering::Relaxed);
        let _blocks = self.lock_blocks(span).await;
        // A file system that can't punch holes keeps the space: allowed for a discard.
        carry(self.punch(io, span), &mut changing).await?;
        changing.done();
        if fua { self.flush(io).await } else { Ok(()) }
    }

    async fn flush(&self, io: &CoreIo) -> Result<()> {
        let lost = self.lost.load(Ordering::Acquire);
        if lost != 0 {
            return Err(Error::from_errno(
                lost,
                "an earlier flush failed, so data that were written may be lost",
            )
            .remedy("check the storage, then open the image anew"));
        }
        // Cleared first: what is written meanwhile makes it dirty again.
        self.dirty.store(false, Ordering::Release);
        let result = io.sync_data(&self.file).await;
        if let Err(e) = &result {
            self.dirty.store(true, Ordering::Release);
            if self.align == 1 {
                self.lost.store(e.errno(), Ordering::Release);
            }
        }
        result
    }

    /// Devices have the size that they have; a part of one will do.
    fn check_size(&self, size: u64) -> Result<()> {
        match self.is_device && size > self.size_now() {
            true => Err(Error::new(ErrorKind::Unsupported, "Cannot grow device files")),
            false => Ok(()),
        }
    }

    async fn resize(&self, io: &CoreIo, size: u64, prealloc: Prealloc) -> Result<()> {
        let old = self.size_now();
        self.check_size(size)?;
        if self.is_device {
            return Ok(());
        }
        if size < old && prealloc != Prealloc::Off {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Preallocation can't be used for shrinking files",
            ));
        }
        let (from, to) = (old.min(size), old.max(size));
        let mut changing = self.status.change(Span::from_range(from, to), false);
        let _blocks = self.lock_blocks(Span::from_range(from, to)).await;
        self.dirty.store(true, Ordering::Relaxed);
        carry(grow(io, &self.file, old, size, prealloc), &mut changing).await?;
        self.size.store(size, Ordering::Release);
        changing.done();
        Ok(())
    }

    async fn extent(&self, io: &CoreIo, node: &Node, span: Span) -> Result<Extent> {
        let at = span.offset();
        let size = self.size_now();
        if at >= size {
            return Ok(Extent { len: span.len(), place: Where::Zero { at: Some((SELF, at)) } });
        }
        let here = |len: u64, data: bool| {
            let place = if data {
                Where::Data { child: SELF, at: Some(at), compressed: false }
            } else {
                Where::Zero { at: Some((SELF, at)) }
            };
            Extent { len: len.min(span.len()).min(size - at), place }
        };
        if let Some((known, data)) = self.status.get(at) {
            return Ok(here(known.end() - at, data));
        }
        if self.no_seek.load(Ordering::Relaxed) {
            return Ok(here(span.len(), true));
        }
        let began = self.status.epoch();
        let (end, data) = match io.seek(&self.file, Seek::Data, at).await {
            Ok(None) => match io.seek(&self.file, Seek::End, 0).await?.unwrap_or(0) {
                // Missing, so reading it is an error.
                end if end <= at => (size, true),
                end => (end.min(size), false),
            },
            Ok(Some(data)) if data > at => (data, false),
            Ok(Some(_)) => (io.seek(&self.file, Seek::Hole, at).await?.unwrap_or(size), true),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                self.no_seek.store(true, Ordering::Relaxed);
                (size, true)
            }
            Err(e) => return Err(e),
        };
        // Somebody else may have made the file shorter or longer.
        let end = if end > at { end.min(size) } else { size };
        if data || self.alone(node) {
            self.status.put(Span::from_range(at, end), data, began);
        }
        Ok(here(end - at, data))
    }

    /// Nobody else writes the file: what was found out about holes stays true.
    fn alone(&self, node: &Node) -> bool {
        node.flags.read_only || self.locks.denies(Actions::V)
    }

    /// Bytes of disk space: as they are, or as the server said when it was asked last.
    fn space(&self) -> u64 {
        if !self.space.asking.swap(true, Ordering::AcqRel) {
            let (space, file) = (self.space.clone(), self.file.clone());
            self.file.storage().soon(move || {
                if let Ok(bytes) = sys::allocated(&file) {
                    space.bytes.store(bytes, Ordering::Release);
                }
                space.asking.store(false, Ordering::Release);
            });
        }
        self.space.bytes.load(Ordering::Acquire)
    }

    fn name(&self) -> String {
        format!("'{}'", self.filename)
    }
}

/// Whether the file system could do it.
fn can(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::Unsupported || e.errno() == EINVAL => Ok(false),
        Err(e) => Err(e),
    }
}

/// Changes the size of a file from `old` to `size`; the new part gets space as told.
pub(super) async fn grow(io: &CoreIo, file: &File, old: u64, size: u64, prealloc: Prealloc) -> Result<()> {
    if size <= old {
        return io.truncate(file, size).await;
    }
    let done = match prealloc {
        Prealloc::Off => return io.truncate(file, size).await,
        Prealloc::Metadata => {
            return Err(Error::new(ErrorKind::Unsupported, "Unsupported preallocation mode: metadata"));
        }
        Prealloc::Falloc => io.fallocate(file, Fallocate::Allocate, old, size - old).await,
        Prealloc::Full => {
            let zeroes = Memory::zeroed((size - old).min(ZERO_CHUNK) as usize).iovec();
            let mut done = Ok(());
            for piece in Span::from_range(old, size).blocks(ZERO_CHUNK) {
                done = io
                    .write_all_at(file, &zeroes.slice(0, piece.len() as usize), piece.offset(), false)
                    .await;
                if done.is_err() {
                    break;
                }
            }
            match done {
                Ok(()) => io.sync_data(file).await,
                Err(e) => Err(e),
            }
        }
    };
    if let Err(e) = done {
        // The old size holds again; the first error is the one that matters.
        let _ = io.truncate(file, old).await;
        return Err(e);
    }
    Ok(())
}

impl Driver for FileDriver {
    fn kind(&self) -> &'static DriverKind {
        self.kind
    }

    fn size(&self, _: &Node) -> u64 {
        self.size_now()
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits {
            request_alignment: self.align,
            fast_zeroes: !self.no_zero_range.load(Ordering::Relaxed)
                || !self.no_punch.load(Ordering::Relaxed),
            discards: !self.no_punch.load(Ordering::Relaxed),
            ..Limits::BYTES
        }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Read(_) if span.offset() >= self.size_now() => Plan::Zeroes { len: span.len() },
            Request::Discard(_) if !node.flags.unmap => Plan::Done { len: span.len() },
            Request::Flush if node.flags.no_flush => Plan::Done { len: span.len() },
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Flush
            | Request::Resize => Plan::Slow,
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        let Some(io) = cx.rt.io() else { return Box::pin(async { Err(no_files()) }) };
        let flags = cx.node.flags;
        let fua = move |f: WriteFlags| f.has(WriteFlags::FUA) && !flags.no_flush;
        // A box for each kind: a small read should not pay for the largest of them.
        match op {
            Op::Read { span, to, flags: _ } => {
                // What is in memory is read before there is a future that would have to carry it. Direct I/O never is.
                match io.read_cached(&self.file, to, span.offset()) {
                    Cached::All => Box::pin(std::future::ready(Ok(()))),
                    cached => {
                        Box::pin(async move { self.read(io, span, to, cached).await.context(|| self.name()) })
                    }
                }
            }
            Op::Write { span, from, flags: f } => {
                Box::pin(
                    async move { self.write(cx.rt, io, span, from, fua(f)).await.context(|| self.name()) },
                )
            }
            Op::WriteZeroes { span, flags: f } => {
                Box::pin(
                    async move { self.write_zeroes(cx, io, span, f, fua(f)).await.context(|| self.name()) },
                )
            }
            Op::Discard { span, flags: f } => {
                Box::pin(async move { self.discard(io, span, fua(f)).await.context(|| self.name()) })
            }
            Op::Flush => Box::pin(async move { self.flush(io).await.context(|| self.name()) }),
            Op::Resize { size, prealloc } => {
                // A size that is set late would cut off what was written behind it meanwhile.
                let me = self.me.upgrade().expect("a driver that runs a request is alive");
                let io = io.clone();
                let work = async move { me.resize(&io, size, prealloc).await };
                Box::pin(async move { cx.rt.shielded(work).await.context(|| self.name()) })
            }
        }
    }

    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            let io = cx.rt.io().ok_or_else(no_files)?;
            self.extent(io, cx.node, span).await.context(|| self.name())
        })
    }

    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            match *change {
                NodeChange::Access { needs, allows } => {
                    let stance = Stance::of(needs, allows, cx.node.flags.force_share);
                    self.locks.prepare(cx.rt, cx.node.name.as_str(), stance).await
                }
                NodeChange::Resize { size } => {
                    self.check_size(size).context(|| self.name())?;
                    Ok(Box::new(()) as Box<dyn Prepared>)
                }
                NodeChange::Backing(_) => dolmen_graph::prepare_nothing(cx, change).await,
            }
        })
    }

    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if self.dirty.load(Ordering::Acquire) && !cx.node.flags.no_flush {
                let io = cx.rt.io().ok_or_else(no_files)?;
                self.flush(io).await.context(|| self.name())?;
            }
            Ok(())
        })
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        Description {
            filename: Some(self.filename.clone()),
            file: Some(self.locks.file_id()),
            read_only: self.read_only,
            actual_size: Some(self.space()),
            // Nothing to tell, but clients look for the object.
            format_specific: Some(Value::Map(vec![
                ("type".into(), "file".into()),
                ("data".into(), Value::Map(Vec::new())),
            ])),
            ..Description::default()
        }
    }
}

/// A file that was opened anew for the same node.
struct TakeOver {
    new: Arc<FileDriver>,
    old: Arc<FileDriver>,
}

impl Prepared for TakeOver {
    fn commit(self: Box<Self>) {
        let TakeOver { new, old } = *self;
        new.locks.hand_over(new.file.clone());
        if old.inactive {
            // What another process has written meanwhile is its own business.
            return;
        }
        new.lost.store(old.lost.load(Ordering::Acquire), Ordering::Release);
        new.dirty.store(old.dirty.load(Ordering::Acquire), Ordering::Release);
    }
}

impl fmt::Debug for FileDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileDriver({}, {} bytes, align {})", self.filename, self.size_now(), self.align)
    }
}

/// The extent that was found last: walking along a file asks for the same one over and over, and each answer of the
/// file system costs a thread switch.
///
/// An entry is forgotten when a write or a zeroing might change it, and an answer is kept only when nothing changed
/// while the file system was asked. A change that was given up goes on until the kernel is done with it.
#[derive(Default)]
struct StatusCache {
    /// Changes in progress.
    changing: AtomicUsize,
    /// Counts the beginnings and ends of changes.
    epoch: AtomicU64,
    /// Never held across an await.
    last: Mutex<Option<(Span, bool)>>,
}

/// A change in progress; counts once more when it ends.
struct Changing<'a> {
    cache: &'a Arc<StatusCache>,
    /// It is over for this request: done, or left to what is in flight of it.
    over: bool,
}

impl Changing<'_> {
    fn done(mut self) {
        self.over = true;
        self.cache.changed(true);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.cache.changed(false);
        }
    }
}

impl Hold for Changing<'_> {
    fn leave(&mut self) -> Guard {
        self.over = true;
        Arc::new(LateChange(self.cache.clone()))
    }
}

/// A change that was given up.
struct LateChange(Arc<StatusCache>);

impl Drop for LateChange {
    fn drop(&mut self) {
        self.0.changed(false);
    }
}

impl StatusCache {
    /// The range is about to become data, or not data.
    fn change(self: &Arc<Self>, span: Span, to_data: bool) -> Changing<'_> {
        self.changing.fetch_add(1, Ordering::AcqRel);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if last.is_some_and(|(s, data)| data != to_data && s.overlaps(span)) {
            *last = None;
        }
        Changing { cache: self, over: false }
    }

    /// The end of a change. Unless all of it was done, nobody knows how far it came.
    fn changed(&self, done: bool) {
        if !done {
            *self.last.lock().unwrap_or_else(|e| e.into_inner()) = None;
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.changing.fetch_sub(1, Ordering::AcqRel);
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn get(&self, at: u64) -> Option<(Span, bool)> {
        let last = *self.last.lock().unwrap_or_else(|e| e.into_inner());
        last.filter(|(s, _)| s.offset() <= at && at < s.end())
    }

    fn put(&self, span: Span, data: bool, began: u64) {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if self.epoch() == began && self.changing.load(Ordering::Acquire) == 0 {
            *last = Some((span, data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_cache_forgets_what_changes() {
        let c = Arc::new(StatusCache::default());
        c.put(Span::new(0, 100), false, c.epoch());
        assert!(c.get(99).is_some() && c.get(100).is_none());
        c.change(Span::new(200, 10), true).done();
        assert!(c.get(5).is_some());
        // Zeroing a hole leaves it one.
        c.change(Span::new(0, 10), false).done();
        assert!(c.get(5).is_some());
        c.change(Span::new(99, 10), true).done();
        assert!(c.get(5).is_none());
        // An answer that a write overtook is not kept.
        let began = c.epoch();
        let writing = c.change(Span::new(0, 1), true);
        c.put(Span::new(0, 100), false, began);
        let began = c.epoch();
        writing.done();
        c.put(Span::new(0, 100), false, began);
        assert!(c.get(5).is_none());
        c.put(Span::new(0, 100), false, c.epoch());
        assert!(c.get(5).is_some());
        // A change that was given up may still happen, until the kernel is done with it.
        let late = c.change(Span::new(200, 1), true).leave();
        c.put(Span::new(0, 100), false, c.epoch());
        assert!(c.get(5).is_some(), "what was known before still holds elsewhere");
        let began = c.epoch();
        drop(late);
        assert!(c.get(5).is_none());
        c.put(Span::new(0, 100), false, began);
        assert!(c.get(5).is_none());
        // One that failed is over.
        drop(c.change(Span::new(0, 1), true));
        c.put(Span::new(0, 100), false, c.epoch());
        assert!(c.get(5).is_some());
    }
}
