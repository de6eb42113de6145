//! Requests that wait: moving data, changing mappings, flushing, resizing.
//!
//! Who may do what at the same time:
//! - Reads and writes in place hold a lease of the node's epochs, so that the host clusters they use are not given
//!   to anybody else meanwhile.
//! - Whoever changes a mapping holds the range lock of its guest clusters, then allocates, moves the data, and
//!   sets the entries in memory last.
//! - A cancelled request leaves at most allocated but unmapped clusters ([`Claimed`]); late writes of its may still
//!   reach them, so they come back only when the node is closed.
//! - A round runs in a task of its own: if it could be cancelled half-way, an old copy of a table might reach the
//!   disk after a newer one.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use dolmen_graph::{ChildEdge, NodeState, Prealloc, RangeGuard};
use dolmen_rt::{IoVec, Memory, Rt};
use dolmen_types::{BlkEvent, Error, ErrorKind, ReadFlags, Result, ResultExt, Span, WriteFlags};

use super::alloc::Allocated;
use super::driver::Core;
use super::entry::L2Entry;
use super::header::INCOMPAT_CORRUPT;
use super::image::{Env, File, read_bytes, read_into};
use super::layout::{ClusterIndex, GuestOffset, HostOffset, MAX_L1_BYTES};
use super::meta::{Freed, Meta, Need, Place, Run, Try};
use super::round::{Patch, Reached, Round};

/// Most bytes that one copy-on-read or copy-on-write step holds in memory.
const MAX_COPY: u64 = 16 << 20;
/// The file grows in steps of this, so that growing is rare; closing cuts what is not used.
const GROW_STEP: u64 = 8 << 20;
/// Zero padding up to this size is written together with the data, more as a zero write of its own.
const MAX_PADDING: u64 = 64 << 10;
/// Largest buffer of zeroes, where zeroes have to be written as data.
const MAX_ZERO_BUFFER: u64 = 1 << 20;

/// An allocation that nothing maps yet.
struct Claimed<'a> {
    core: &'a Core,
    run: Option<Allocated>,
}

impl Claimed<'_> {
    /// It is mapped now.
    fn keep(mut self) {
        self.run = None;
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if let Some(a) = self.run {
            self.core.meta().orphans.push(Freed { first: a.first, count: a.count });
        }
    }
}

/// A round under way, with everything that it needs to outlive its caller.
struct RoundTask {
    core: Arc<Core>,
    edge: ChildEdge,
    rt: Rt,
    state: Arc<NodeState>,
}

impl RoundTask {
    /// Writes a round and draws the conclusion.
    async fn run(&self, round: Round) -> Result<()> {
        let mut reached = Reached::Nothing;
        let result = self.core.write_round(File::new(&self.edge, &self.rt), &round, &mut reached).await;
        self.core.meta().end_round(round, reached, self.state.epochs.stamp());
        result
    }
}

impl Core {
    /// Asks the metadata, loading tables until they can answer.
    async fn with<T>(&self, file: File<'_>, mut ask: impl FnMut(&mut Meta) -> Result<Try<T>>) -> Result<T> {
        loop {
            let need = match ask(&mut self.meta())? {
                Try::Done(v) => return Ok(v),
                Try::Load(need) => need,
            };
            self.load(file, need).await?;
        }
    }

    async fn load(&self, file: File<'_>, need: Need) -> Result<()> {
        let host = self.meta().table_offset(need)?;
        let _loading = self.loads.lock(Span::new(host.0, 1)).await;
        let len = {
            let m = self.meta();
            if m.has(need) {
                return Ok(());
            }
            m.geo.cluster_len()
        };
        let io = file.read()?;
        io.event(match need {
            Need::L2(_) => BlkEvent::L2Load,
            Need::Refblock(_) => BlkEvent::RefblockLoad,
        })?;
        let mut table = vec![0u8; len].into_boxed_slice();
        read_bytes(io, host.0, &mut table).await?;
        self.meta().loaded(need, host, table);
        Ok(())
    }

    /// Where guest bytes live. Finding metadata damaged marks a writable image.
    pub(super) async fn find(&self, env: Env<'_>, at: u64, max: u64) -> Result<Run> {
        match self.with(env.file, |m| m.lookup(at, max)).await {
            Ok(run) => Ok(run),
            Err(e) => Err(self.note_damage(env, e).await),
        }
    }

    /// Marks the image corrupt when the error says so, and returns the error.
    async fn note_damage(&self, env: Env<'_>, e: Error) -> Error {
        if e.kind() != ErrorKind::Corrupt || !self.writable {
            return e;
        }
        {
            let mut m = self.meta();
            if m.broken.is_some() {
                return e;
            }
            m.broken = Some(e.to_string());
            if m.header.version < 3 {
                return e;
            }
        }
        let _header = self.turn().await;
        let patch = {
            let mut m = self.meta();
            m.header.incompatible |= INCOMPAT_CORRUPT;
            m.header_patch(BlkEvent::None)
        };
        // The error that is reported is the damage; failing to mark it changes nothing about it.
        let _ = self.write_patches(env.file, &[patch]).await;
        let _ = self.flush_file(env.file).await;
        e
    }

    async fn flush_file(&self, file: File<'_>) -> Result<()> {
        let io = file.read()?;
        io.event(BlkEvent::FlushToDisk)?;
        io.flush().await
    }

    async fn write_patches(&self, file: File<'_>, patches: &[Patch]) -> Result<()> {
        let io = file.write()?;
        for p in patches {
            io.event(p.event)?;
            self.reserve(file, p.at + p.bytes.len() as u64, Prealloc::Off).await?;
            io.write_bytes(p.at, &p.bytes, WriteFlags::NONE).await?;
        }
        Ok(())
    }

    /// Makes the file long enough.
    async fn reserve(&self, file: File<'_>, end: u64, prealloc: Prealloc) -> Result<()> {
        if file.size() >= end {
            return Ok(());
        }
        let _growing = self.growing.lock(Span::new(0, 1)).await;
        if file.size() >= end {
            return Ok(());
        }
        let target = if prealloc == Prealloc::Off { end.next_multiple_of(GROW_STEP) } else { end };
        self.grown.store(true, SeqCst);
        let io = file.resize()?;
        match io.resize(target, prealloc).await {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                Err(Error::new(ErrorKind::NoSpace, "the image file can't grow").source(e.to_string()))
            }
            Err(e) if target > end => {
                // The step may be too much where the exact size is not.
                io.resize(end, prealloc).await.map_err(|_| e)
            }
            Err(e) => Err(e),
        }
    }

    // ---- reading ----------------------------------------------------------------------------------------

    /// A read request.
    pub(super) async fn read(&self, env: Env<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        if !flags.has(ReadFlags::POPULATE) {
            return self.read_plain(env, span, to, flags).await;
        }
        let wanted = !flags.has(ReadFlags::PREFETCH);
        let cluster = self.geo.cluster_size();
        let mut rest = span;
        while !rest.is_empty() {
            let run = self.find(env, rest.offset(), rest.len()).await?;
            let mut piece = rest.prefix(run.len);
            if run.place == Place::Unallocated {
                // Clusters are copied whole, at most 16 MiB of them at once.
                let around = piece.align_out(cluster).prefix(MAX_COPY.max(cluster));
                piece = piece.prefix(around.end() - piece.offset());
                let part = wanted.then(|| slice(to, span, piece));
                self.populate(env, around, piece, part.as_ref()).await?;
            } else if wanted {
                self.read_plain(env, piece, &slice(to, span, piece), ReadFlags::NONE).await?;
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    async fn read_plain(&self, env: Env<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let _lease = env.lease();
            let run = self.find(env, rest.offset(), rest.len()).await?;
            let piece = rest.prefix(run.len);
            let part = slice(to, span, piece);
            match run.place {
                Place::Unallocated => self.read_backing(env, piece, &part, flags).await?,
                Place::Zero { .. } => part.fill(0),
                Place::Data { host, .. } => {
                    let io = env.file.read()?;
                    io.event(BlkEvent::ReadAio)?;
                    read_into(io, host.0, &part).await?;
                }
                Place::Compressed { host, len, raw } => {
                    let within = piece.offset() % self.geo.cluster_size();
                    let data = self.unpack(env, piece.offset(), host, len, raw).await?;
                    part.copy_from_slice(0, &data[within as usize..][..piece.len() as usize]);
                }
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// Reads from the backing node; zeroes where it ends or where there is none.
    async fn read_backing(&self, env: Env<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        let have = env.backing_size().saturating_sub(span.offset()).min(span.len());
        let beyond = (span.len() - have) as usize;
        to.slice(have as usize, beyond).fill(0);
        match env.read_backing()? {
            Some(io) if have > 0 => {
                env.file.read()?.event(BlkEvent::ReadBackingAio)?;
                io.read(span.prefix(have), &to.slice(0, have as usize), flags).await
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The data of a compressed cluster.
    async fn unpack(
        &self,
        env: Env<'_>,
        at: u64,
        host: HostOffset,
        len: u64,
        raw: u64,
    ) -> Result<Arc<Vec<u8>>> {
        let (geo, compression) = {
            let m = self.meta();
            match &m.unpacked {
                Some((r, data)) if *r == raw => return Ok(data.clone()),
                _ => (m.geo, m.header.compression),
            }
        };
        let io = env.file.read()?;
        io.event(BlkEvent::ReadCompressed)?;
        let mut packed = vec![0u8; len as usize];
        read_bytes(io, host.0, &mut packed).await?;
        let data = super::compress::unpack(compression, &packed, geo.cluster_len())
            .context(|| format!("compressed cluster at {host} (guest offset {at:#x})"))?;
        let data = Arc::new(data);
        let mut m = self.meta();
        // Only while the entry still names these data: freed space may hold others soon.
        if let Ok(Try::Done(Run { place: Place::Compressed { raw: now, .. }, .. })) = m.lookup(at, 1)
            && now == raw
        {
            m.unpacked = Some((raw, data.clone()));
        }
        Ok(data)
    }

    /// Copies what is unallocated in `around` (whole clusters) from the backing chain into this image, and the
    /// data of `piece` to `to`.
    async fn populate(&self, env: Env<'_>, around: Span, piece: Span, to: Option<&IoVec>) -> Result<()> {
        self.begin_change(env).await?;
        let _range = self.ranges.lock(around).await;
        let (cluster, zero_entries) = {
            let m = self.meta();
            (m.geo.cluster_size(), m.geo.version >= 3)
        };
        let mut rest = around;
        while !rest.is_empty() {
            let run = self.find(env, rest.offset(), rest.len()).await?;
            let part = rest.prefix(run.len);
            rest = rest.skip(run.len);
            let wanted = part.intersect(piece);
            if run.place != Place::Unallocated {
                // Somebody else was first. What is allocated is never written again.
                if let (Some(w), Some(to)) = (wanted, to) {
                    self.read_plain(env, w, &slice(to, piece, w), ReadFlags::NONE).await?;
                }
                continue;
            }
            // A private buffer: the caller's memory may be changed by a guest between the two steps.
            let copy = Memory::zeroed(part.len() as usize).iovec();
            if let Some(visible) = part.intersect(Span::new(0, self.size())) {
                self.read_backing(env, visible, &slice(&copy, part, visible), ReadFlags::NONE).await?;
            }
            env.file.read()?.event(BlkEvent::CorWrite)?;
            // Zero clusters stay zero clusters, one by one, so that a copied image is as sparse as its source.
            let mut at = part;
            while !at.is_empty() {
                let is_zero = |s: Span| zero_entries && slice(&copy, part, s).is_zero();
                let zero = is_zero(at.prefix(cluster));
                let mut len = cluster;
                while len < at.len() && is_zero(at.skip(len).prefix(cluster)) == zero {
                    len += cluster;
                }
                let run = at.prefix(len);
                if zero {
                    self.set_range(env, run, |_, _| L2Entry::Zero { kept: None }).await?;
                } else {
                    self.write_mapping(env, run, &slice(&copy, part, run)).await?;
                }
                at = at.skip(run.len());
            }
            if let (Some(w), Some(to)) = (wanted, to) {
                slice(to, piece, w).copy_from(&slice(&copy, part, w));
            }
        }
        Ok(())
    }

    // ---- writing ----------------------------------------------------------------------------------------

    /// What every change begins with: the image is usable, others can see that it is being changed, and memory
    /// for metadata is not used up.
    async fn begin_change(&self, env: Env<'_>) -> Result<()> {
        let crowded = {
            let m = self.meta();
            m.check_usable()?;
            m.crowded()
        };
        if !self.write_ready.load(SeqCst) {
            let _header = self.turn().await;
            if !self.write_ready.load(SeqCst) {
                let patch = {
                    let mut m = self.meta();
                    m.header.autoclear = 0;
                    m.header_patch(BlkEvent::None)
                };
                self.write_patches(env.file, &[patch]).await?;
                self.flush_file(env.file).await?;
                self.write_ready.store(true, SeqCst);
            }
        }
        if crowded {
            self.round(env).await?;
        }
        Ok(())
    }

    /// What every change ends with.
    pub(super) async fn after_write(&self, env: Env<'_>, flags: WriteFlags) -> Result<()> {
        if flags.has(WriteFlags::FUA) { self.round(env).await } else { Ok(()) }
    }

    /// A write request.
    pub(super) async fn write(&self, env: Env<'_>, span: Span, from: &IoVec) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            self.begin_change(env).await?;
            let lease = env.lease();
            let run = self.find(env, rest.offset(), rest.len()).await?;
            if let Place::Data { host, copied: true } = run.place {
                let piece = rest.prefix(run.len);
                self.write_in_place(env, host, &slice(from, span, piece)).await?;
                rest = rest.skip(piece.len());
                continue;
            }
            drop(lease);
            let piece = self.table_part(rest).prefix(MAX_COPY);
            let _range = self.ranges.lock(piece.align_out(self.geo.cluster_size())).await;
            self.write_mapping(env, piece, &slice(from, span, piece)).await?;
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// The first part of a span that one L2 table maps.
    fn table_part(&self, span: Span) -> Span {
        let reach = self.geo.l2_coverage();
        span.prefix(reach - span.offset() % reach)
    }

    async fn write_in_place(&self, env: Env<'_>, host: HostOffset, from: &IoVec) -> Result<()> {
        let len = from.len() as u64;
        let checked = self.meta().check_overlap(host, len);
        if let Err(e) = checked {
            return Err(self.note_damage(env, e).await);
        }
        self.reserve(env.file, host.0 + len, Prealloc::Off).await?;
        let io = env.file.write()?;
        io.event(BlkEvent::WriteAio)?;
        io.write(Span::new(host.0, len), from, WriteFlags::NONE).await
    }

    /// Writes data, allocating where they can't go in place. The caller holds the range lock of the clusters.
    async fn write_mapping(&self, env: Env<'_>, span: Span, from: &IoVec) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let _lease = env.lease();
            let run = self.find(env, rest.offset(), self.table_part(rest).len()).await?;
            let piece = rest.prefix(run.len);
            let done = match run.place {
                Place::Data { host, copied: true } => {
                    self.write_in_place(env, host, &slice(from, span, piece)).await?;
                    piece.len()
                }
                Place::Zero { kept: Some((host, true)) } => {
                    let within = piece.offset() % self.geo.cluster_size();
                    let start = HostOffset(host.0 - within);
                    self.fill_clusters(env, run, piece, &slice(from, span, piece), start, false).await?;
                    piece.len()
                }
                Place::Unallocated | Place::Zero { .. } | Place::Data { .. } | Place::Compressed { .. } => {
                    self.write_allocating(env, run, piece, |p| slice(from, span, p)).await?
                }
            };
            rest = rest.skip(done);
        }
        Ok(())
    }

    /// Allocates clusters for the start of `piece` and fills them. Returns how many bytes of it are written.
    async fn write_allocating(
        &self,
        env: Env<'_>,
        run: Run,
        piece: Span,
        data: impl Fn(Span) -> IoVec,
    ) -> Result<u64> {
        let cluster = self.geo.cluster_size();
        let want = piece.align_out(cluster).len() / cluster;
        let a = self.claim(env, want).await?;
        let claimed = Claimed { core: self, run: Some(a) };
        let covered = (piece.offset() / cluster + a.count) * cluster - piece.offset();
        let part = piece.prefix(covered);
        let host = self.meta().host(a);
        match self.fill_clusters(env, run, part, &data(part), host, a.fresh).await {
            Ok(()) => {
                claimed.keep();
                Ok(part.len())
            }
            Err(e) => {
                // All writes have ended, but an error does not say whether they happened: the clusters come back
                // with the next round, after a flush.
                claimed.keep();
                self.meta().freed.push(Freed { first: a.first, count: a.count });
                Err(e)
            }
        }
    }

    async fn claim(&self, env: Env<'_>, want: u64) -> Result<Allocated> {
        env.file.read()?.event(BlkEvent::ClusterAlloc)?;
        match self.with(env.file, |m| m.allocate(want)).await {
            Ok(a) => Ok(a),
            Err(e) => Err(self.note_damage(env, e).await),
        }
    }

    /// Writes `from` to `piece`'s place in the clusters from `host` on and what the guest sees around it to the
    /// rest of them, then maps them. `run` is where `piece` lived so far.
    async fn fill_clusters(
        &self,
        env: Env<'_>,
        run: Run,
        piece: Span,
        from: &IoVec,
        host: HostOffset,
        fresh: bool,
    ) -> Result<()> {
        let cluster = self.geo.cluster_size();
        let around = piece.align_out(cluster);
        let head = Span::from_range(around.offset(), piece.offset());
        let tail = Span::from_range(piece.end(), around.end());
        let checked = self.meta().check_overlap(host, around.len());
        if let Err(e) = checked {
            return Err(self.note_damage(env, e).await);
        }
        self.reserve(env.file, host.0 + around.len(), Prealloc::Off).await?;
        let io = env.file.write()?;
        let zero = match run.place {
            Place::Zero { .. } => true,
            Place::Unallocated => around.offset() >= env.backing_size(),
            Place::Data { .. } | Place::Compressed { .. } => false,
        };
        let padding = head.len() + tail.len();
        let mut first = piece;
        let mut all = from.clone();
        if padding > 0 && !zero {
            io.event(BlkEvent::L2AllocCowRead)?;
            all = self.guest_data(env, head).await?;
            from.segments().iter().for_each(|s| all.push(s.clone()));
            self.guest_data(env, tail).await?.segments().iter().for_each(|s| all.push(s.clone()));
            first = around;
        } else if padding > 0 && !fresh && padding <= MAX_PADDING {
            all = Memory::zeroed(head.len() as usize).iovec();
            from.segments().iter().for_each(|s| all.push(s.clone()));
            all.push(Memory::zeroed(tail.len() as usize).share());
            first = around;
        } else if padding > 0 && !fresh {
            for s in [head, tail].into_iter().filter(|s| !s.is_empty()) {
                let at = host.0 + (s.offset() - around.offset());
                io.write_zeroes(Span::new(at, s.len()), WriteFlags::NONE).await?;
            }
        }
        io.event(BlkEvent::WriteAio)?;
        let at = host.0 + (first.offset() - around.offset());
        io.write(Span::new(at, first.len()), &all, WriteFlags::NONE).await?;
        self.set_range(env, around, |i, _| L2Entry::Data {
            host: HostOffset(host.0 + i * cluster),
            copied: true,
        })
        .await
    }

    /// What the guest sees in a range, as a private copy; zeroes beyond the end of the disk.
    async fn guest_data(&self, env: Env<'_>, span: Span) -> Result<IoVec> {
        let copy = Memory::zeroed(span.len() as usize).iovec();
        if let Some(visible) = span.intersect(Span::new(0, self.size())) {
            self.read_plain(env, visible, &slice(&copy, span, visible), ReadFlags::NONE).await?;
        }
        Ok(copy)
    }

    /// Sets the entries of whole clusters; `entry` gets the number of the cluster in the span and the old entry.
    async fn set_range(
        &self,
        env: Env<'_>,
        span: Span,
        entry: impl Fn(u64, L2Entry) -> L2Entry,
    ) -> Result<()> {
        let cluster = self.geo.cluster_size();
        let mut rest = span;
        while !rest.is_empty() {
            let part = self.table_part(rest);
            let skipped = (part.offset() - span.offset()) / cluster;
            let (at, count) = (GuestOffset(part.offset()), part.len() / cluster);
            let set = self.with(env.file, |m| {
                m.check_usable()?;
                m.set_entries(at, count, |i, old| entry(skipped + i, old))
            });
            if let Err(e) = set.await {
                return Err(self.note_damage(env, e).await);
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    // ---- zeroes and discards ----------------------------------------------------------------------------

    /// The whole clusters of a span; the last one of the disk counts as whole although the disk ends in it.
    fn whole_clusters(&self, span: Span) -> Span {
        let cluster = self.geo.cluster_size();
        let start = span.offset().next_multiple_of(cluster);
        let end = if span.end() >= self.size() { span.end().next_multiple_of(cluster) } else { span.end() };
        let end = end / cluster * cluster;
        Span::from_range(start, end.max(start))
    }

    /// A zero write request.
    pub(super) async fn write_zeroes(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let whole = self.whole_clusters(span);
        if whole.is_empty() {
            // Within one cluster, or the ends of two.
            for part in span.blocks(self.geo.cluster_size()) {
                self.zero_part(env, part, flags).await?;
            }
            return Ok(());
        }
        if span.offset() < whole.offset() {
            self.zero_part(env, Span::from_range(span.offset(), whole.offset()), flags).await?;
        }
        let mut rest = whole;
        while !rest.is_empty() {
            self.begin_change(env).await?;
            let part = self.table_part(rest);
            let _range = self.ranges.lock(part).await;
            if self.geo.version >= 3 {
                self.zero_entries(env, part, flags.has(WriteFlags::MAY_UNMAP)).await?;
            } else {
                self.zero_without_entries(env, part, flags).await?;
            }
            rest = rest.skip(part.len());
        }
        if span.end() > whole.end() {
            self.zero_part(env, Span::from_range(whole.end(), span.end()), flags).await?;
        }
        Ok(())
    }

    async fn zero_entries(&self, env: Env<'_>, span: Span, unmap: bool) -> Result<()> {
        self.set_range(env, span, |_, old| match old {
            L2Entry::Data { host, copied: true } if !unmap => L2Entry::Zero { kept: Some((host, true)) },
            L2Entry::Zero { kept: Some((_, true)) } if !unmap => old,
            L2Entry::Unallocated
            | L2Entry::Zero { .. }
            | L2Entry::Data { .. }
            | L2Entry::Compressed { .. } => L2Entry::Zero { kept: None },
        })
        .await
    }

    /// Version 2 has no zero clusters: unmap where nothing shines through, else write zeroes.
    async fn zero_without_entries(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        // Whole clusters, as entries are changed.
        let step = MAX_ZERO_BUFFER.max(self.geo.cluster_size());
        let mut rest = span;
        while !rest.is_empty() {
            let run = self.find(env, rest.offset(), rest.len().min(step)).await?;
            let part = rest.prefix(run.len);
            let nothing_below = part.offset() >= env.backing_size();
            match run.place {
                Place::Unallocated if nothing_below => {}
                Place::Data { copied: true, .. } if !flags.has(WriteFlags::MAY_UNMAP) || !nothing_below => {
                    self.zero_locked(env, part, flags).await?;
                }
                Place::Data { .. } | Place::Compressed { .. } if nothing_below => {
                    self.set_range(env, part, |_, _| L2Entry::Unallocated).await?;
                }
                Place::Unallocated | Place::Zero { .. } | Place::Data { .. } | Place::Compressed { .. } => {
                    self.zero_locked(env, part, flags).await?;
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Zeroes a part of one cluster.
    async fn zero_part(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        self.begin_change(env).await?;
        let cluster = span.align_out(self.geo.cluster_size());
        let _range = self.ranges.lock(cluster).await;
        if self.geo.version >= 3 {
            let run = self.find(env, cluster.offset(), 1).await?;
            if run.place == Place::Unallocated && cluster.offset() >= env.backing_size() {
                return self.set_range(env, cluster, |_, _| L2Entry::Zero { kept: None }).await;
            }
        }
        self.zero_locked(env, span, flags).await
    }

    /// Zeroes a range without zero clusters: nothing where it reads as zeroes, in place where that is possible,
    /// as data otherwise. The caller holds the range lock.
    async fn zero_locked(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let _lease = env.lease();
            let run = self.find(env, rest.offset(), rest.len().min(MAX_ZERO_BUFFER)).await?;
            let part = rest.prefix(run.len);
            match run.place {
                Place::Zero { .. } => {}
                Place::Unallocated if part.offset() >= env.backing_size() => {}
                Place::Data { host, copied: true } => {
                    let checked = self.meta().check_overlap(host, part.len());
                    if let Err(e) = checked {
                        return Err(self.note_damage(env, e).await);
                    }
                    self.reserve(env.file, host.0 + part.len(), Prealloc::Off).await?;
                    let io = env.file.write()?;
                    let keep = flags.without(WriteFlags::FUA | WriteFlags::UNCHANGED);
                    io.write_zeroes(Span::new(host.0, part.len()), keep).await?;
                }
                Place::Unallocated | Place::Data { .. } | Place::Compressed { .. } => {
                    if flags.has(WriteFlags::NO_FALLBACK) {
                        return Err(Error::new(
                            ErrorKind::Unsupported,
                            "zeroes would have to be written as data here",
                        ));
                    }
                    for piece in part.blocks(self.geo.l2_coverage()) {
                        let zeroes = Memory::zeroed(piece.len() as usize).iovec();
                        self.write_mapping(env, piece, &zeroes).await?;
                    }
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// A discard request. Parts of clusters are left alone, and so is everything that a version 2 image could
    /// only uncover its backing file for.
    pub(super) async fn discard(&self, env: Env<'_>, span: Span) -> Result<()> {
        let whole = self.whole_clusters(span);
        let backed = env.backing.is_some();
        let zero_entries = self.geo.version >= 3;
        if backed && !zero_entries {
            return Ok(());
        }
        let mut rest = whole;
        while !rest.is_empty() {
            self.begin_change(env).await?;
            let part = self.table_part(rest);
            let _range = self.ranges.lock(part).await;
            // No table is made just to say that nothing is there.
            let run = self.find(env, part.offset(), part.len()).await?;
            if run.len < part.len() || run.place != Place::Unallocated || backed {
                self.set_range(env, part, |_, old| match old {
                    L2Entry::Unallocated if !backed => old,
                    L2Entry::Zero { kept: None } => old,
                    L2Entry::Unallocated
                    | L2Entry::Zero { .. }
                    | L2Entry::Data { .. }
                    | L2Entry::Compressed { .. } => {
                        if zero_entries {
                            L2Entry::Zero { kept: None }
                        } else {
                            L2Entry::Unallocated
                        }
                    }
                })
                .await?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    // ---- flushing ---------------------------------------------------------------------------------------

    /// A flush request.
    pub(super) async fn flush(&self, env: Env<'_>) -> Result<()> {
        if self.writable { self.round(env).await } else { self.flush_file(env.file).await }
    }

    /// Makes everything that has been acknowledged so far durable. Requests that come while a round is under way
    /// share the next one.
    pub(super) async fn round(&self, env: Env<'_>) -> Result<()> {
        let need = self.meta().rounds_begun + 1;
        let _turn = self.turn().await;
        {
            let m = self.meta();
            if m.rounds_done >= need {
                return Ok(());
            }
            m.check_usable()?;
        }
        self.reap(env).await?;
        let round = self.meta().begin_round();
        let task = RoundTask {
            core: self.me.upgrade().expect("a method of it is running"),
            edge: env.file.edge().clone(),
            rt: env.file.rt().clone(),
            state: env.state().clone(),
        };
        let outcome: Rc<RefCell<Option<Result<()>>>> = Rc::default();
        let slot = outcome.clone();
        env.file.rt().spawn(async move {
            let result = task.run(round).await;
            *slot.borrow_mut() = Some(result);
            task.core.round_ended.notify(usize::MAX);
        });
        loop {
            let ended = self.round_ended.listen();
            if let Some(result) = outcome.borrow_mut().take() {
                return result;
            }
            ended.await;
        }
    }

    /// Waits for the right to write the header and to begin a round. A round that lost its caller still goes on,
    /// so the lock alone does not say that there is none.
    async fn turn(&self) -> RangeGuard<'_> {
        let guard = self.rounds.lock(Span::new(0, 1)).await;
        loop {
            let ended = self.round_ended.listen();
            if !self.meta().in_round {
                return guard;
            }
            ended.await;
        }
    }

    async fn write_round(&self, file: File<'_>, r: &Round, reached: &mut Reached) -> Result<()> {
        if r.is_empty() {
            self.flush_file(file).await?;
            *reached = Reached::C;
            return Ok(());
        }
        self.write_patches(file, &r.unreachable).await?;
        self.flush_file(file).await?;
        *reached = Reached::A;
        if !r.reftable.is_empty() || r.header.is_some() {
            self.write_patches(file, &r.reftable).await?;
            self.flush_file(file).await?;
            if let Some(header) = &r.header {
                self.write_patches(file, std::slice::from_ref(header)).await?;
                self.flush_file(file).await?;
            }
        }
        *reached = Reached::B;
        if !r.mappings.is_empty() {
            self.write_patches(file, &r.mappings).await?;
            self.flush_file(file).await?;
        }
        *reached = Reached::C;
        Ok(())
    }

    /// Gives back clusters whose mapping is gone from the disk and that no request can still be using.
    async fn reap(&self, env: Env<'_>) -> Result<()> {
        loop {
            let batch = {
                let mut m = self.meta();
                match m.unmapped.front() {
                    Some((stamp, _)) if env.over(*stamp) => m.unmapped.pop_front().map(|(_, b)| b),
                    _ => None,
                }
            };
            let Some(batch) = batch else { return Ok(()) };
            for f in batch {
                self.give_back(env, f).await?;
            }
        }
    }

    async fn give_back(&self, env: Env<'_>, f: Freed) -> Result<()> {
        let mut at = 0;
        while at < f.count {
            let first = f.first.plus(at);
            // How many of them have this as their last reference: those may be discarded in the file, while they
            // still count as used so that nobody takes them meanwhile.
            let mut last = 0;
            while last < f.count - at
                && self.with(env.file, |m| m.refcount(first.plus(last))).await? == 1
                && (last == 0 || self.geo.refcount_position(first.plus(last)).1 != 0)
            {
                last += 1;
            }
            if last > 0 && self.pass_discard {
                let bits = self.geo.cluster_bits;
                let span = Span::new(first.0 << bits, last << bits);
                let inside = span.intersect(Span::new(0, env.file.size()));
                if let (Some(span), Ok(io)) = (inside, env.file.write()) {
                    // Giving space back is a favour, not a duty.
                    let _ = io.discard(span, WriteFlags::NONE).await;
                }
            }
            let count = last.max(1);
            for i in 0..count {
                self.with(env.file, |m| m.decrement(first.plus(i))).await?;
            }
            at += count;
        }
        Ok(())
    }

    /// Writes out everything and leaves nothing behind.
    pub(super) async fn close(&self, env: Env<'_>) -> Result<()> {
        if !self.writable || self.meta().broken.is_some() {
            return Ok(());
        }
        let orphans = std::mem::take(&mut self.meta().orphans);
        for f in orphans {
            self.give_back(env, f).await?;
        }
        while self.meta().any_dirty() || !self.meta().unmapped.is_empty() {
            self.round(env).await?;
            let waiting = self.meta().unmapped.front().is_some_and(|(stamp, _)| !env.over(*stamp));
            if waiting && !self.meta().any_dirty() {
                break;
            }
        }
        let end = {
            let m = self.meta();
            m.high << m.geo.cluster_bits
        };
        if self.grown.load(SeqCst)
            && env.file.size() > end
            && let Ok(io) = env.file.resize()
        {
            // A longer file is as valid.
            let _ = io.resize(end, Prealloc::Off).await;
        }
        Ok(())
    }

    // ---- resizing ---------------------------------------------------------------------------------------

    /// A resize request. Growing keeps all data; the new bytes read as zeroes whatever lies below. Shrinking is the
    /// caller's word that nothing uses the tail.
    pub(super) async fn resize(&self, env: Env<'_>, size: u64, prealloc: Prealloc) -> Result<()> {
        self.begin_change(env).await?;
        let old = self.size();
        let (geo, snapshots) = {
            let m = self.meta();
            (m.geo, m.header.snapshots)
        };
        if size == old {
            return Ok(());
        }
        if snapshots > 0 && geo.version < 3 {
            return Err(Error::new(ErrorKind::Unsupported, "Can't resize a v2 image which has snapshots")
                .remedy("delete the snapshots, or amend the image to compat=1.1"));
        }
        if !size.is_multiple_of(512) {
            // Other programs count in sectors and would not see the rest.
            return Err(Error::new(ErrorKind::InvalidInput, "The new size must be a multiple of 512"));
        }
        if size > geo.max_size() {
            return Err(Error::new(ErrorKind::Limit, format!("the image can't grow to {size} bytes"))
                .remedy("use a larger cluster size"));
        }
        let _range = self.ranges.lock(Span::new(0, Span::MAX_END)).await;
        if size < old {
            if prealloc != Prealloc::Off {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "Preallocation can't be used for shrinking an image",
                ));
            }
            let cluster = geo.cluster_size();
            let gone = Span::from_range(size.next_multiple_of(cluster), old.next_multiple_of(cluster));
            self.unmap_allocated(env, gone).await?;
            return self.set_size(env, size).await;
        }
        self.grow_l1(env, geo.l1_entries_for(size)).await?;
        // Nothing old may show up behind the old end: neither the rest of its last cluster nor a longer backing
        // node. Both are cleared before the header says that they are there.
        let cluster_end = old.next_multiple_of(geo.cluster_size()).min(size);
        if cluster_end > old {
            self.zero_locked(env, Span::from_range(old, cluster_end), WriteFlags::NONE).await?;
        }
        let shining = env.backing_size().min(size);
        if shining > cluster_end {
            let whole = Span::from_range(cluster_end, shining).align_out(geo.cluster_size());
            if geo.version >= 3 {
                self.zero_entries(env, whole, true).await?;
            } else {
                self.zero_without_entries(env, whole, WriteFlags::NONE).await?;
            }
        }
        if prealloc != Prealloc::Off {
            self.preallocate(env, Span::from_range(old, size), prealloc).await?;
        }
        self.set_size(env, size).await
    }

    async fn unmap_allocated(&self, env: Env<'_>, span: Span) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let run = self.find(env, rest.offset(), rest.len()).await?;
            let part = rest.prefix(run.len);
            if run.place != Place::Unallocated {
                self.set_range(env, part, |_, _| L2Entry::Unallocated).await?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    async fn set_size(&self, env: Env<'_>, size: u64) -> Result<()> {
        self.round(env).await?;
        let _header = self.turn().await;
        let patch = {
            let mut m = self.meta();
            m.header.size = size;
            m.header_patch(BlkEvent::None)
        };
        let written = self.write_patches(env.file, &[patch]).await;
        if let Err(e) = written {
            self.meta().header.size = self.size();
            return Err(e);
        }
        self.size.store(size, SeqCst);
        self.flush_file(env.file).await
    }

    /// Moves the L1 table to a place where it has at least `entries`. The caller holds the whole range.
    async fn grow_l1(&self, env: Env<'_>, entries: u64) -> Result<()> {
        let old_entries = self.meta().l1.len() as u64;
        if entries <= old_entries {
            return Ok(());
        }
        let geo = self.geo;
        let entries = entries.max(old_entries + old_entries / 2).min(MAX_L1_BYTES / 8);
        let io = env.file.read()?;
        io.event(BlkEvent::L1GrowAllocTable)?;
        let clusters = geo.clusters_for(entries * 8);
        let a = self.with(env.file, |m| m.allocate_table(clusters)).await?;
        let claimed = Claimed { core: self, run: Some(a) };
        // Everything dirty reaches the old table first; the range lock keeps it clean from here on.
        self.round(env).await?;
        let _header = self.turn().await;
        let host = self.meta().host(a);
        let mut bytes: Vec<u8> = self.meta().l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters << geo.cluster_bits) as usize, 0);
        self.write_patches(env.file, &[Patch { at: host.0, bytes, event: BlkEvent::L1GrowWriteTable }])
            .await?;
        self.flush_file(env.file).await?;
        let (patch, old) = {
            let mut m = self.meta();
            let old = (m.header.l1_table, m.header.l1_entries);
            m.header.l1_table = host;
            m.header.l1_entries = u32::try_from(entries).expect("below the limit");
            (m.header_patch(BlkEvent::L1GrowActivateTable), old)
        };
        let mut switched = self.write_patches(env.file, &[patch]).await;
        if switched.is_ok() {
            switched = self.flush_file(env.file).await;
        }
        if let Err(e) = switched {
            // Which table the disk names is not known. Both have the same entries, so go on with the old one
            // and never give the new one back (`claimed` keeps it until the node is closed).
            let mut m = self.meta();
            (m.header.l1_table, m.header.l1_entries) = old;
            m.broken = Some(format!("switching to a larger L1 table failed: {e}"));
            return Err(e);
        }
        claimed.keep();
        let stamp = env.stamp();
        let mut m = self.meta();
        m.l1.resize(entries as usize, 0);
        m.l1_dirty = super::table::Dirty::new(entries as usize * 8);
        m.l2.grow_keys(entries as usize);
        m.own(host, entries * 8);
        let first: ClusterIndex = geo.cluster_of(old.0);
        let count = geo.clusters_for(u64::from(old.1) * 8);
        for c in first.0..first.0 + count {
            m.owned.remove(&c);
        }
        m.unmapped.push_back((stamp, vec![Freed { first, count }]));
        Ok(())
    }

    /// Allocates clusters for everything that has none in a range, so that later writes need no allocation.
    pub(super) async fn preallocate(&self, env: Env<'_>, span: Span, prealloc: Prealloc) -> Result<()> {
        let geo = self.geo;
        let cluster = geo.cluster_size();
        let mut rest = span.align_out(cluster);
        while !rest.is_empty() {
            if self.meta().crowded() {
                self.round(env).await?;
            }
            let run = self.find(env, rest.offset(), self.table_part(rest).len()).await?;
            let mut part = rest.prefix(run.len);
            if matches!(run.place, Place::Unallocated | Place::Zero { kept: None }) {
                let a = self.claim(env, part.len() / cluster).await?;
                let claimed = Claimed { core: self, run: Some(a) };
                part = part.prefix(a.count * cluster);
                let host = self.meta().host(a);
                let space = if prealloc == Prealloc::Metadata { Prealloc::Off } else { prealloc };
                self.reserve(env.file, host.0 + part.len(), space).await?;
                if !a.fresh {
                    env.file.write()?.write_zeroes(Span::new(host.0, part.len()), WriteFlags::NONE).await?;
                }
                self.set_range(env, part, |i, _| L2Entry::Data {
                    host: HostOffset(host.0 + i * cluster),
                    copied: true,
                })
                .await?;
                claimed.keep();
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }
}

/// The part of a buffer for `whole` that belongs to `part`.
fn slice(buffer: &IoVec, whole: Span, part: Span) -> IoVec {
    buffer.slice((part.offset() - whole.offset()) as usize, part.len() as usize)
}
