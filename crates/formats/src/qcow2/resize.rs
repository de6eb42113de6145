//! Resizing and preallocating.
//!
//! Each step leaves a valid image: the longer L1 table is complete before the header names it, and what could show up
//! behind the old end is cleared before the header says that it is there. What is cut off is unmapped only when the
//! header does not speak of it any more: a shrink that fails has taken nothing away. If that is interrupted, clusters stay
//! mapped behind the end until the image grows again here; another program that grows it shows what they hold.

use dolmen_graph::Prealloc;
use dolmen_rt::carry;
use dolmen_types::{BlkEvent, Error, ErrorKind, Result, Span, WriteFlags};
use std::sync::atomic::Ordering::SeqCst;

use super::driver::Core;
use super::entry::L2Entry;
use super::image::Env;
use super::layout::{ClusterIndex, HostOffset, MAX_L1_BYTES};
use super::meta::{Freed, Place};
use super::round::Patch;
use super::rw::Claimed;
use super::space::part_of;
use super::table::Dirty;

impl Core {
    /// A resize request. Growing keeps all data; the new bytes read as zeroes whatever lies below. Shrinking is the
    /// caller's word that nothing uses the tail.
    pub(super) async fn resize(&self, env: Env<'_>, size: u64, prealloc: Prealloc) -> Result<()> {
        self.check_size(size)?;
        self.begin_change(env).await?;
        let (old, geo) = (self.size(), self.geo);
        if size == old {
            return Ok(());
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
            self.set_size(env, size).await?;
            self.shrunk.store(true, SeqCst);
            // The image has its new size, whatever becomes of this: what is not unmapped now keeps its space.
            if self.unmap_allocated(env, gone).await.is_ok() {
                let _ = self.round(env).await;
            }
            return Ok(());
        }
        // Behind what the L1 table maps there is nothing to clear.
        let mapped = self.meta().l1.len() as u64 * geo.l2_coverage();
        self.grow_l1(env, geo.l1_entries_for(size)).await?;
        let [from, to] = [old, size].map(|s| s.next_multiple_of(geo.cluster_size()));
        // A shrink that was interrupted has left clusters there.
        self.unmap_allocated(env, Span::from_range(from, to.min(mapped).max(from))).await?;
        self.clear_behind(env, old, size).await?;
        if prealloc != Prealloc::Off {
            self.preallocate(env, Span::from_range(old, size), prealloc).await?;
        }
        self.set_size(env, size).await
    }

    /// What can be said against a size before anything changes.
    pub(super) fn check_size(&self, size: u64) -> Result<()> {
        let (geo, snapshots) = {
            let m = self.meta();
            m.check_usable()?;
            (m.geo, m.header.snapshots)
        };
        if size == self.size() {
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
        Ok(())
    }

    /// Nothing old may show up behind the old end: neither the rest of its last cluster, nor what a backing file has
    /// there or gets there later. It is cleared before the header says that it is there.
    async fn clear_behind(&self, env: Env<'_>, old: u64, size: u64) -> Result<()> {
        let cluster = self.geo.cluster_size();
        let cluster_end = old.next_multiple_of(cluster).min(size);
        let rest = Span::from_range(old, cluster_end);
        if self.nothing_below(env) {
            return self.zero_locked(env, rest, WriteFlags::NONE).await;
        }
        if !rest.is_empty() {
            self.zero_part_locked(env, rest, WriteFlags::NONE).await?;
        }
        let mut whole = Span::from_range(cluster_end, size).align_out(cluster);
        while !whole.is_empty() {
            if self.meta().crowded() {
                self.round(env).await?;
            }
            let part = self.table_part(whole);
            if self.geo.version >= 3 {
                self.zero_entries(env, part, true).await?;
            } else {
                // Without zero clusters: clusters that were never written take no space where the file has holes.
                self.preallocate(env, part, Prealloc::Metadata).await?;
            }
            whole = whole.skip(part.len());
        }
        Ok(())
    }

    pub(super) async fn unmap_allocated(&self, env: Env<'_>, span: Span) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            if self.meta().crowded() {
                self.round(env).await?;
            }
            let run = self.find(env, rest.offset(), rest.len()).await?;
            let part = rest.prefix(run.len);
            if run.place != Place::Unallocated {
                self.set_range(env, part, |_, _| L2Entry::Unallocated).await?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Changes the size after everything that goes before it is on disk. When that fails it is not known which size
    /// the disk has; both are valid, and the next round writes the old one again.
    pub(super) async fn set_size(&self, env: Env<'_>, size: u64) -> Result<()> {
        self.round(env).await?;
        let old = self.size.load(SeqCst);
        let set = |size: u64| {
            let mut m = self.meta();
            m.header.size = size;
            m.header_dirty = true;
            self.size.store(size, SeqCst);
        };
        set(size);
        let written = self.round(env).await;
        if written.is_err() {
            set(old);
        }
        written
    }

    /// Moves the L1 table to a place where it has at least `entries`. The caller holds the whole range.
    pub(super) async fn grow_l1(&self, env: Env<'_>, entries: u64) -> Result<()> {
        let old_entries = self.meta().l1.len() as u64;
        if entries <= old_entries {
            return Ok(());
        }
        let geo = self.geo;
        let entries = entries.max(old_entries + old_entries / 2).min(MAX_L1_BYTES / 8);
        let io = env.file.read()?;
        io.event(BlkEvent::L1GrowAllocTable)?;
        io.event(BlkEvent::ClusterAlloc)?;
        io.event(BlkEvent::RefblockAlloc)?;
        let clusters = geo.clusters_for(entries * 8);
        let a = self.with(env.file, |m| m.allocate_table(clusters)).await?;
        let mut claimed = Claimed::new(self, a);
        // Everything dirty reaches the old table first; the range lock keeps it clean from here on.
        self.round(env).await?;
        let host = self.meta().host(a);
        let mut bytes: Vec<u8> = self.meta().l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters << geo.cluster_bits) as usize, 0);
        let table = [Patch { at: host.0, bytes, event: BlkEvent::L1GrowWriteTable }];
        carry(self.write_patches(env.file, &table), &mut claimed).await?;
        self.flush_file(env.file).await?;
        claimed.keep();
        {
            // From here on the new table is the table. No round writes anything to it before the header names it,
            // and the old one is not given back before that.
            let mut m = self.meta();
            let first: ClusterIndex = geo.cluster_of(m.header.l1_table);
            let count = geo.clusters_for(u64::from(m.header.l1_entries) * 8);
            m.header.l1_table = host;
            m.header.l1_entries = u32::try_from(entries).expect("below the limit");
            m.header_dirty = true;
            m.l1_moved = true;
            m.l1.resize(entries as usize, 0);
            m.l1_dirty = Dirty::new(entries as usize * 8);
            // All of it was just written.
            m.l1_spaced = (0..=part_of(entries as usize * 8)).collect();
            m.l2.grow_keys(entries as usize);
            m.own(host, entries * 8);
            for c in first.0..first.0 + count {
                m.owned.remove(&c);
            }
            m.freed.push(Freed { first, count });
        }
        self.round(env).await
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
                let mut claimed = Claimed::new(self, a);
                part = part.prefix(a.count * cluster);
                let host = self.meta().host(a);
                let space = if prealloc == Prealloc::Metadata { Prealloc::Off } else { prealloc };
                self.reserve(env.file, host.0 + part.len(), space).await?;
                if !a.fresh {
                    let io = env.file.write()?;
                    let zeroes = io.write_zeroes(Span::new(host.0, part.len()), WriteFlags::NONE);
                    carry(zeroes, &mut claimed).await?;
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
