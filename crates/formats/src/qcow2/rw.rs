//! Requests that wait: reading, copying on read, writing.
//!
//! Who may do what at the same time:
//! - Reads and writes in place hold a lease of the node's epochs, so that the host clusters they use are not given
//!   to anybody else meanwhile.
//! - Whoever changes a mapping holds the range lock of its guest clusters, then allocates, moves the data, and
//!   sets the entries in memory last.
//! - A request that is given up leaves at most allocated but unmapped clusters ([`Claimed`]). What it has in flight may
//!   still write there, or in place: it takes the claim and the leases along, so that nothing is reused before it has landed.

use std::sync::Arc;

use dolmen_graph::{Io, Notice, Prealloc, Write};
use dolmen_rt::{Guard, Hold, IoVec, Memory, carry};
use dolmen_types::{BlkEvent, Error, ErrorKind, ReadFlags, Result, ResultExt, Span, WriteFlags};

use super::alloc::Allocated;
use super::driver::Core;
use super::entry::L2Entry;
use super::header::INCOMPAT_CORRUPT;
use super::image::{Env, File, in_file, read_bytes, read_data};
use super::layout::{GuestOffset, HostOffset};
use super::meta::{Freed, Meta, Need, Own, Place, Run, Try};
use super::round::Patch;

/// Most bytes that one copy-on-read or copy-on-write step holds in memory.
const MAX_COPY: u64 = 16 << 20;
/// Zero padding up to this size is written together with the data, more as a zero write of its own.
const MAX_PADDING: u64 = 64 << 10;

/// An allocation that nothing maps yet. The clusters come back with the next round if it stays so; when the request is given
/// up, not before everything that it has in flight has landed.
pub(super) struct Claimed {
    core: Arc<Core>,
    /// `None` once it is mapped, or somebody else's business.
    run: Option<Allocated>,
}

impl Claimed {
    pub(super) fn new(core: &Core, run: Allocated) -> Claimed {
        Claimed { core: core.itself(), run: Some(run) }
    }

    /// It is mapped now.
    pub(super) fn keep(mut self) {
        self.run = None;
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if let Some(a) = self.run {
            self.core.meta().freed.push(Freed { first: a.first, count: a.count });
        }
    }
}

impl Hold for Claimed {
    fn leave(&mut self) -> Guard {
        Arc::new(Claimed { core: self.core.clone(), run: self.run.take() })
    }
}

impl Core {
    /// Asks the metadata, loading tables until they can answer.
    pub(super) async fn with<T>(
        &self,
        file: File<'_>,
        mut ask: impl FnMut(&mut Meta) -> Result<Try<T>>,
    ) -> Result<T> {
        loop {
            let asked = ask(&mut self.meta())?;
            match asked {
                Try::Done(v) => return Ok(v),
                Try::Load(need) => self.load(file, need).await?,
                Try::Reserve(what) => self.reserve_space(file, what).await?,
            }
        }
    }

    pub(super) async fn load(&self, file: File<'_>, need: Need) -> Result<()> {
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
        let what = match need {
            Need::L2(_) => "an L2 table",
            Need::Refblock(_) => "a refcount block",
        };
        in_file(what, host.0, len as u64, io.size())?;
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
    pub(super) async fn note_damage(&self, env: Env<'_>, e: Error) -> Error {
        if e.kind() != ErrorKind::Corrupt || !self.writable() {
            return e;
        }
        {
            let mut m = self.meta();
            if m.broken.is_some() {
                return e;
            }
            m.broken = Some(e.to_string());
            env.state().notice(Notice::Corrupted { message: e.to_string() });
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
        let _ = self.write_header(env, patch).await;
        e
    }

    pub(super) async fn flush_file(&self, file: File<'_>) -> Result<()> {
        file.read()?.flush().await
    }

    pub(super) async fn write_patches(&self, file: File<'_>, patches: &[Patch]) -> Result<()> {
        let io = file.write()?;
        for p in patches {
            // Some have no event of their own.
            if p.event != BlkEvent::None {
                io.event(p.event)?;
            }
            self.reserve(file, p.at + p.bytes.len() as u64, Prealloc::Off).await?;
            io.write_bytes(p.at, &p.bytes, WriteFlags::NONE).await?;
        }
        Ok(())
    }

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

    pub(super) async fn read_plain(
        &self,
        env: Env<'_>,
        span: Span,
        to: &IoVec,
        flags: ReadFlags,
    ) -> Result<()> {
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
                    read_data(io, host.0, &part)
                        .await
                        .context(|| format!("guest offset {:#x}", piece.offset()))?;
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
    pub(super) async fn read_backing(
        &self,
        env: Env<'_>,
        span: Span,
        to: &IoVec,
        flags: ReadFlags,
    ) -> Result<()> {
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
    pub(super) async fn unpack(
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
        // The stream may end before the length that the table says, and the file with it.
        in_file("a compressed cluster", host.0, 1, io.size()).context(|| format!("guest offset {at:#x}"))?;
        let mut packed = vec![0u8; len.min(io.size() - host.0) as usize];
        read_bytes(io, host.0, &mut packed).await?;
        // Some hundred microseconds for a cluster: the core has other requests to serve meanwhile.
        let cluster_len = geo.cluster_len();
        let data = env
            .file
            .rt()
            .compute(move || super::compress::unpack(compression, &packed, cluster_len))
            .await
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
    pub(super) async fn populate(
        &self,
        env: Env<'_>,
        around: Span,
        piece: Span,
        to: Option<&IoVec>,
    ) -> Result<()> {
        self.begin_change(env).await?;
        let _range = self.ranges.lock(around).await;
        let zero_entries = self.meta().geo.version >= 3;
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
            let mut rest = part;
            while !rest.is_empty() {
                let step = rest.prefix(self.copies.size() as u64);
                self.copy_up(env, step, piece, to, zero_entries).await?;
                rest = rest.skip(step.len());
            }
        }
        Ok(())
    }

    /// Copies whole clusters that are unallocated from the backing chain, and what `piece` has of them to `to`.
    async fn copy_up(
        &self,
        env: Env<'_>,
        part: Span,
        piece: Span,
        to: Option<&IoVec>,
        zero_entries: bool,
    ) -> Result<()> {
        let cluster = self.geo.cluster_size();
        // A private buffer: the caller's memory may be changed by a guest between the two steps.
        let buffer = self.copies.get();
        let copy = buffer.iovec(part.len() as usize);
        let visible = part.intersect(Span::new(0, self.size()));
        if let Some(visible) = visible {
            self.read_backing(env, visible, &slice(&copy, part, visible), ReadFlags::NONE).await?;
        }
        let seen = visible.map_or(0, |v| v.len());
        copy.slice(seen as usize, (part.len() - seen) as usize).fill(0);
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
        if let (Some(wanted), Some(to)) = (part.intersect(piece), to) {
            slice(to, piece, wanted).copy_from(&slice(&copy, part, wanted));
        }
        Ok(())
    }

    /// What every change begins with: the image is usable, others can see that it is being changed, and memory
    /// for metadata is not used up.
    pub(super) async fn begin_change(&self, env: Env<'_>) -> Result<()> {
        let crowded = {
            let m = self.meta();
            m.check_usable()?;
            m.crowded()
        };
        self.give_up_features(env).await?;
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
            if let Some(own) = self.find_own(env, rest).await?
                && !own.any_zero
            {
                let piece = rest.prefix(own.len);
                carry(self.write_in_place(env, own.host, &slice(from, span, piece)), lease).await?;
                rest = rest.skip(piece.len());
                continue;
            }
            drop(lease);
            let piece = self.table_part(rest).prefix_to(MAX_COPY, self.geo.cluster_size());
            let _range = self.ranges.lock(piece.align_out(self.geo.cluster_size())).await;
            self.write_mapping(env, piece, &slice(from, span, piece)).await?;
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// The first part of a span that one L2 table maps.
    pub(super) fn table_part(&self, span: Span) -> Span {
        let reach = self.geo.l2_coverage();
        span.prefix(reach - span.offset() % reach)
    }

    pub(super) async fn write_in_place(&self, env: Env<'_>, host: HostOffset, from: &IoVec) -> Result<()> {
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
    pub(super) async fn write_mapping(&self, env: Env<'_>, span: Span, from: &IoVec) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let lease = env.lease();
            if let Some(own) = self.find_own(env, rest).await? {
                let piece = rest.prefix(own.len);
                carry(self.write_own(env, own, piece, &slice(from, span, piece)), lease).await?;
                rest = rest.skip(piece.len());
                continue;
            }
            let run = self.find(env, rest.offset(), self.table_part(rest).len()).await?;
            let done =
                self.write_allocating(env, run, rest.prefix(run.len), |p| slice(from, span, p)).await?;
            rest = rest.skip(done);
        }
        Ok(())
    }

    /// The clusters of this image's own that hold the start of a span, if there are any.
    async fn find_own(&self, env: Env<'_>, span: Span) -> Result<Option<Own>> {
        match self.with(env.file, |m| m.own_run(span.offset(), span.len())).await {
            Ok(own) => Ok(own),
            Err(e) => Err(self.note_damage(env, e).await),
        }
    }

    /// Writes to adjacent clusters of this image's own in one request. Those that read as zeroes so far become data;
    /// the caller then holds the range lock.
    async fn write_own(&self, env: Env<'_>, own: Own, piece: Span, from: &IoVec) -> Result<()> {
        if !own.any_zero {
            return self.write_in_place(env, own.host, from).await;
        }
        let around = piece.align_out(self.geo.cluster_size());
        let head = if own.head_zero { piece.offset() - around.offset() } else { 0 };
        let tail = if own.tail_zero { around.end() - piece.end() } else { 0 };
        let start = HostOffset(own.host.0 - head);
        let len = head + piece.len() + tail;
        let checked = self.meta().check_overlap(start, len);
        if let Err(e) = checked {
            return Err(self.note_damage(env, e).await);
        }
        self.reserve(env.file, start.0 + len, Prealloc::Off).await?;
        let io = env.file.write()?;
        let (at, all) = pad(io, own.host.0, head, from, tail).await?;
        io.event(BlkEvent::WriteAio)?;
        io.write(Span::new(at, all.len() as u64), &all, WriteFlags::NONE).await?;
        self.set_range(env, around, |_, old| match old {
            L2Entry::Zero { kept: Some((host, true)) } => L2Entry::Data { host, copied: true },
            L2Entry::Unallocated
            | L2Entry::Zero { .. }
            | L2Entry::Data { .. }
            | L2Entry::Compressed { .. } => old,
        })
        .await
    }

    /// Allocates clusters for the start of `piece` and fills them. Returns how many bytes of it are written.
    pub(super) async fn write_allocating(
        &self,
        env: Env<'_>,
        run: Run,
        piece: Span,
        data: impl Fn(Span) -> IoVec,
    ) -> Result<u64> {
        let cluster = self.geo.cluster_size();
        let want = piece.align_out(cluster).len() / cluster;
        let a = self.claim(env, want).await?;
        let mut claimed = Claimed::new(self, a);
        let covered = (piece.offset() / cluster + a.count) * cluster - piece.offset();
        let part = piece.prefix(covered);
        let host = self.meta().host(a);
        let data = data(part);
        // On an error all writes have ended, but it does not say whether they happened: the clusters come back with the
        // next round, after a flush.
        carry(self.fill_clusters(env, run, part, &data, host, a.fresh), &mut claimed).await?;
        claimed.keep();
        Ok(part.len())
    }

    pub(super) async fn claim(&self, env: Env<'_>, want: u64) -> Result<Allocated> {
        let io = env.file.read()?;
        io.event(BlkEvent::ClusterAlloc)?;
        io.event(BlkEvent::RefblockAlloc)?;
        match self.with(env.file, |m| m.allocate(want)).await {
            Ok(a) => Ok(a),
            Err(e) => Err(self.note_damage(env, e).await),
        }
    }

    /// Writes `from` to `piece`'s place in the clusters from `host` on and what the guest sees around it to the
    /// rest of them, then maps them. `run` is where `piece` lived so far.
    pub(super) async fn fill_clusters(
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
        let (mut at, mut all) = (host.0 + head.len(), from.clone());
        if padding > 0 && !zero {
            io.event(BlkEvent::CowRead)?;
            all = self.guest_data(env, head).await?;
            from.segments().iter().for_each(|s| all.push(s.clone()));
            self.guest_data(env, tail).await?.segments().iter().for_each(|s| all.push(s.clone()));
            io.event(BlkEvent::CowWrite)?;
            at = host.0;
        } else if !fresh {
            (at, all) = pad(io, at, head.len(), from, tail.len()).await?;
        }
        io.event(BlkEvent::WriteAio)?;
        io.write(Span::new(at, all.len() as u64), &all, WriteFlags::NONE).await?;
        self.set_range(env, around, |i, _| L2Entry::Data {
            host: HostOffset(host.0 + i * cluster),
            copied: true,
        })
        .await
    }

    /// What the guest sees in a range, as a private copy; zeroes beyond the end of the disk.
    pub(super) async fn guest_data(&self, env: Env<'_>, span: Span) -> Result<IoVec> {
        let copy = Memory::zeroed(span.len() as usize).iovec();
        if let Some(visible) = span.intersect(Span::new(0, self.size())) {
            self.read_plain(env, visible, &slice(&copy, span, visible), ReadFlags::NONE).await?;
        }
        Ok(copy)
    }

    /// Sets the entries of whole clusters; `entry` gets the number of the cluster in the span and the old entry.
    pub(super) async fn set_range(
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
}

/// What has to be written where, so that `from` lands at `at` with so many zeroes before and behind it. Many zeroes are
/// written here.
async fn pad(io: Io<'_, Write>, at: u64, head: u64, from: &IoVec, tail: u64) -> Result<(u64, IoVec)> {
    let padding = head + tail;
    if padding == 0 {
        return Ok((at, from.clone()));
    }
    if padding <= MAX_PADDING {
        let mut all = Memory::zeroed(head as usize).iovec();
        from.segments().iter().for_each(|s| all.push(s.clone()));
        all.push(Memory::zeroed(tail as usize).share());
        return Ok((at - head, all));
    }
    io.event(BlkEvent::ClusterAllocSpace)?;
    for s in [Span::new(at - head, head), Span::new(at + from.len() as u64, tail)] {
        if !s.is_empty() {
            io.write_zeroes(s, WriteFlags::NONE).await?;
        }
    }
    Ok((at, from.clone()))
}

/// The part of a buffer for `whole` that belongs to `part`.
fn slice(buffer: &IoVec, whole: Span, part: Span) -> IoVec {
    buffer.slice((part.offset() - whole.offset()) as usize, part.len() as usize)
}
