//! Space on disk for metadata, before anybody relies on it.
//!
//! Metadata reach the disk with a flush, long after the writes that made them were acknowledged. If the disk is full
//! by then, all those writes are lost. So nothing in memory may change that could not be written: a new table takes a
//! cluster that already has space in the file ([`Meta::spare`], [`Meta::space`]), and a table that was read from the
//! file gets its holes filled before it is changed for the first time (an image that was copied sparsely has its empty
//! tables in holes). A request that finds no space fails before it has changed anything, and what was acknowledged
//! before can still be flushed.
//!
//! A request that needs no new table and meets no table for the first time does nothing of this. What it can't do:
//! promise space on file systems that write elsewhere what is overwritten (snapshots, reflinks).
//!
//! Each step runs in a task of its own: a zero write of a request that was cancelled must not land on a table that
//! was put there meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use dolmen_graph::{ChildEdge, Prealloc, chain_status};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{Error, ErrorKind, Result, ResultExt, Span, WriteFlags};

use super::alloc::Allocated;
use super::driver::Core;
use super::image::File;
use super::layout::{ClusterIndex, HostOffset};
use super::meta::{Freed, Meta};

/// File systems give space in blocks of this size or more, so smaller clusters are reserved together.
const BLOCK: u64 = 4096;
/// The file grows in steps of this, so that growing is rare; closing cuts what is not used.
const GROW_STEP: u64 = 8 << 20;

/// What has to have space before memory may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// A cluster for a new L2 table.
    Table,
    /// Adjacent clusters that no refcount block counts yet, for such blocks and a refcount table.
    Counts {
        /// The first one.
        first: ClusterIndex,
        /// How many.
        count: u64,
    },
    /// The L2 table of this L1 index, which is in memory.
    L2(usize),
    /// The refcount block of this index, which is in memory.
    Refblock(usize),
    /// The part of the active L1 table around this byte of it.
    L1(usize),
    /// The part of the refcount table around this byte of it.
    Reftable(usize),
}

/// The number of the part of an L1 or refcount table that a byte of it lies in.
pub(super) const fn part_of(byte: usize) -> usize {
    byte / BLOCK as usize
}

impl Meta {
    /// Takes the clusters that were reserved for refcounts, if they are these.
    pub(super) fn take_space(&mut self, first: u64, count: u64) -> bool {
        let found = self.space == Some((first, count));
        if found {
            self.space = None;
        }
        found
    }

    /// Where something lies that has no space yet as far as is known.
    fn unreserved(&mut self, what: Space) -> Option<Span> {
        let cluster = self.geo.cluster_size();
        let table = |base: HostOffset, byte: usize, bytes: u64| {
            let from = (part_of(byte) as u64) * BLOCK;
            Span::new(base.0 + from, BLOCK.min(bytes.saturating_sub(from)))
        };
        match what {
            Space::Table | Space::Counts { .. } => None,
            Space::L2(i) => self.l2.get(i).filter(|s| !s.spaced).map(|s| Span::new(s.host.0, cluster)),
            Space::Refblock(i) => {
                self.refblocks.get(i).filter(|s| !s.spaced).map(|s| Span::new(s.host.0, cluster))
            }
            Space::L1(byte) if self.l1_spaced.contains(&part_of(byte)) => None,
            Space::L1(byte) => Some(table(self.header.l1_table, byte, self.l1.len() as u64 * 8)),
            Space::Reftable(byte) if self.reftable_spaced.contains(&part_of(byte)) => None,
            Space::Reftable(byte) => Some(table(self.header.reftable, byte, self.reftable.len() as u64 * 8)),
        }
    }

    /// It has space now, if it still lies there.
    fn reserved(&mut self, what: Space, at: Span) {
        if self.unreserved(what) != Some(at) {
            return;
        }
        match what {
            Space::Table | Space::Counts { .. } => {}
            Space::L2(i) => self.l2.get(i).expect("just found").spaced = true,
            Space::Refblock(i) => self.refblocks.get(i).expect("just found").spaced = true,
            Space::L1(byte) => _ = self.l1_spaced.insert(part_of(byte)),
            Space::Reftable(byte) => _ = self.reftable_spaced.insert(part_of(byte)),
        }
    }
}

impl Core {
    /// Makes the file long enough.
    pub(super) async fn reserve(&self, file: File<'_>, end: u64, prealloc: Prealloc) -> Result<()> {
        if file.size() >= end {
            return Ok(());
        }
        let work: LocalFuture<'static, Result<()>> = Box::pin(Step::new(self, file).grow(end, prealloc));
        file.rt().shielded(work).await
    }

    /// Gives something its space, or fails as the file does.
    pub(super) async fn reserve_space(&self, file: File<'_>, what: Space) -> Result<()> {
        let step = Step::new(self, file);
        let work: LocalFuture<'static, Result<()>> = Box::pin(step.run(what));
        file.rt().shielded(work).await.context(|| "no space for the metadata of a write")
    }
}

/// What a reservation needs to go on without its caller.
struct Step {
    core: Arc<Core>,
    edge: ChildEdge,
    rt: Rt,
}

impl Step {
    fn new(core: &Core, file: File<'_>) -> Step {
        Step { core: core.itself(), edge: file.edge().clone(), rt: file.rt().clone() }
    }

    /// A size is absolute: one that is set late, or for somebody who did not see what was there, cuts off what others
    /// have written behind it. So the next one is set when this one is done, and none is below what the file has.
    async fn grow(self, end: u64, prealloc: Prealloc) -> Result<()> {
        let file = self.file();
        let _growing = self.core.growing.lock(Span::new(0, 1)).await;
        if file.size() >= end {
            return Ok(());
        }
        let target = if prealloc == Prealloc::Off { end.next_multiple_of(GROW_STEP) } else { end };
        self.core.grown.store(true, SeqCst);
        let io = file.resize()?;
        match io.resize(target, prealloc).await {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                Err(Error::new(ErrorKind::NoSpace, "the image file can't grow").source(e.to_string()))
            }
            // It may have grown all the same, and others may use that already.
            Err(_) if file.size() >= end && prealloc == Prealloc::Off => Ok(()),
            // The step may be too much where the exact size is not.
            Err(e) if target > end && file.size() < end => io.resize(end, prealloc).await.map_err(|_| e),
            Err(e) => Err(e),
        }
    }

    fn file(&self) -> File<'_> {
        File::new(&self.edge, &self.rt)
    }

    async fn run(self, what: Space) -> Result<()> {
        match what {
            Space::Table => {
                let several = (BLOCK / self.core.geo.cluster_size()).max(1);
                match self.table(several).await {
                    Err(e) if e.kind() == ErrorKind::NoSpace && several > 1 => self.table(1).await,
                    done => done,
                }
            }
            Space::Counts { first, count } => self.counts(first, count).await,
            Space::L2(_) | Space::Refblock(_) | Space::L1(_) | Space::Reftable(_) => {
                self.fill_holes(what).await
            }
        }
    }

    /// Up to so many clusters for L2 tables.
    async fn table(&self, several: u64) -> Result<()> {
        let a: Allocated = self.core.with(self.file(), |m| m.allocate(several)).await?;
        let zeroed = self.zero(a.first, a.count).await;
        let mut m = self.core.meta();
        match zeroed {
            Ok(()) => m.spare.extend((0..a.count).rev().map(|i| a.first.plus(i))),
            Err(_) => m.freed.push(Freed { first: a.first, count: a.count }),
        }
        zeroed
    }

    /// Clusters that nothing counts. While they are being zeroed nobody may put a refcount block anywhere: the clusters
    /// would count as free and be given away. So what somebody else has reserved is withdrawn first.
    async fn counts(&self, first: ClusterIndex, count: u64) -> Result<()> {
        let _one_at_a_time = self.core.counting.lock(Span::new(0, 1)).await;
        {
            let mut m = self.core.meta();
            let (block, _) = m.geo.refcount_position(first);
            let counted = m.reftable.get(block).is_some_and(|e| e & !511 != 0);
            if counted || m.space == Some((first.0, count)) {
                return Ok(());
            }
            m.space = None;
        }
        self.zero(first, count).await?;
        self.core.meta().space = Some((first.0, count));
        Ok(())
    }

    async fn zero(&self, first: ClusterIndex, count: u64) -> Result<()> {
        let bits = self.core.geo.cluster_bits;
        let span = Span::new(first.0 << bits, count << bits);
        self.core.reserve(self.file(), span.end(), Prealloc::Off).await?;
        self.file().write()?.write_zeroes(span, WriteFlags::NONE).await
    }

    /// Fills the holes of a table that the file has. They read as zeroes before and after.
    async fn fill_holes(&self, what: Space) -> Result<()> {
        let unreserved = || self.core.meta().unreserved(what);
        let Some(at) = unreserved() else { return Ok(()) };
        let _one_at_a_time = self.core.loads.lock(Span::new(at.offset(), 1)).await;
        if unreserved() != Some(at) {
            return Ok(());
        }
        let file = self.file();
        self.core.reserve(file, at.end(), Prealloc::Off).await?;
        let mut rest = at;
        while !rest.is_empty() {
            // Where the file can't tell, it can't have holes that anybody knows of.
            let Ok(s) = chain_status(&self.edge.node, &self.rt, rest, None).await else { break };
            if s.zero {
                file.write()?.write_zeroes(rest.prefix(s.len), WriteFlags::NONE).await?;
            }
            rest = rest.skip(s.len);
        }
        self.core.meta().reserved(what, at);
        Ok(())
    }
}
