//! Allocation of host clusters, from memory.
//!
//! First fit from a hint, in runs as long as asked for. A missing refcount block is placed at the very cluster
//! that the search came to, so it describes itself; when the refcount table is too short, new blocks and the
//! longer table are placed together behind it. None of that is on disk before the next round, which writes blocks
//! before the table and the table before the header; but the space for it is (see [`super::space`]).

use dolmen_types::{Error, ErrorKind, Result};

use super::entry::{refcount_byte, refcount_get, refcount_set};
use super::layout::{ClusterIndex, HostOffset, MAX_REFTABLE_BYTES, corrupt};
use super::meta::{Freed, Meta, Need, Try, done};
use super::space::{Space, part_of};
use super::table::Dirty;

/// Newly allocated, adjacent host clusters with refcount 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allocated {
    /// The first one.
    pub first: ClusterIndex,
    /// How many.
    pub count: u64,
    /// They have never been written and read as zeroes.
    pub fresh: bool,
}

impl Meta {
    /// Allocates between 1 and `want` adjacent clusters.
    pub(super) fn allocate(&mut self, want: u64) -> Result<Try<Allocated>> {
        let mut c = self.hint;
        loop {
            // Whatever was looked at and found full stays behind the hint: a search over more blocks than the
            // cache holds must not begin again after each one that it loads.
            let first = done!(self.find_free(c, true)?);
            let (block, index) = self.geo.refcount_position(first);
            if !self.may_count(block) {
                return Ok(Try::Reserve(Space::Refblock(block)));
            }
            let mut limit = want.min(self.geo.refblock_entries() - index as u64);
            if first.0 < self.high {
                // A run is fresh as a whole or not at all.
                limit = limit.min(self.high - first.0);
            }
            let count = self.free_run(block, index, limit);
            if count == 0 {
                c = first.0;
                continue;
            }
            let fresh = first.0 >= self.high;
            self.take(first, count)?;
            return Ok(Try::Done(Allocated { first, count, fresh }));
        }
    }

    /// Allocates exactly `count` adjacent clusters, behind everything that is in use.
    pub(super) fn allocate_table(&mut self, count: u64) -> Result<Try<Allocated>> {
        let mut start = self.high.max(self.hint);
        'retry: loop {
            let mut at = start;
            while at < start + count {
                if at > start && self.lacks_refblocks(at, 1) {
                    // One block after the other would each take the first cluster that it counts, in the middle of the
                    // run: a table that is longer than what one block counts would never find room.
                    let blocks = self.refblocks_for(at, count);
                    if self.lacks_refblocks(at, blocks) {
                        done!(self.add_refblocks(at, blocks)?);
                        start = at + blocks;
                        continue 'retry;
                    }
                }
                let free = done!(self.find_free(at, false)?);
                if free.0 != at {
                    start = free.0;
                    continue 'retry;
                }
                let (block, index) = self.geo.refcount_position(free);
                if !self.may_count(block) {
                    return Ok(Try::Reserve(Space::Refblock(block)));
                }
                let limit = (start + count - at).min(self.geo.refblock_entries() - index as u64);
                at += self.free_run(block, index, limit);
            }
            break;
        }
        // Everything needed is in memory: no way to stop in the middle.
        let hint = self.hint;
        let fresh = start >= self.high;
        let mut at = start;
        while at < start + count {
            let (_, index) = self.geo.refcount_position(ClusterIndex(at));
            let n = (start + count - at).min(self.geo.refblock_entries() - index as u64);
            self.take(ClusterIndex(at), n)?;
            at += n;
        }
        self.hint = hint;
        Ok(Try::Done(Allocated { first: ClusterIndex(start), count, fresh }))
    }

    /// The first free cluster from `c` on, with its refcount block in memory. `advance` moves the hint over full
    /// blocks; `c` must then be the hint.
    fn find_free(&mut self, mut c: u64, advance: bool) -> Result<Try<ClusterIndex>> {
        loop {
            if advance {
                self.hint = self.hint.max(c);
            }
            if c >= self.geo.cluster_limit().0 {
                return Err(Error::new(ErrorKind::NoSpace, "the image has reached the largest host offset"));
            }
            let (block, index) = self.geo.refcount_position(ClusterIndex(c));
            if self.reftable.get(block).is_none_or(|e| e & !511 == 0) {
                if block < self.reftable.len() {
                    done!(self.add_refblock(c)?);
                } else {
                    done!(self.grow_reftable(c)?);
                }
                continue;
            }
            let order = self.geo.refcount_order;
            let entries = self.geo.refblock_entries() as usize;
            let Some(slot) = self.refblocks.get(block) else { return Ok(Try::Load(Need::Refblock(block))) };
            match (index..entries).find(|i| refcount_get(&slot.data, order, *i) == 0) {
                Some(i) => return Ok(Try::Done(ClusterIndex(c + (i - index) as u64))),
                None => c += (entries - index) as u64,
            }
        }
    }

    /// How many clusters are free from `index` of a cached block on, at most `limit`.
    fn free_run(&mut self, block: usize, index: usize, limit: u64) -> u64 {
        let order = self.geo.refcount_order;
        let Some(slot) = self.refblocks.get(block) else { return 0 };
        (index..index + limit as usize).take_while(|i| refcount_get(&slot.data, order, *i) == 0).count()
            as u64
    }

    /// Whether counts in a cached block may become larger. They may always become smaller: what was counted on disk
    /// has space there.
    fn may_count(&mut self, block: usize) -> bool {
        self.refblocks.get(block).is_some_and(|s| s.spaced)
    }

    /// Counts free clusters of one cached block as used.
    fn take(&mut self, first: ClusterIndex, count: u64) -> Result<()> {
        if let Some(c) = self.owned.range(first.0..first.0 + count).next() {
            return Err(corrupt(format!(
                "Preventing invalid allocation of {} at offset {:#x}: its refcount is 0",
                self.name_of(*c),
                c << self.geo.cluster_bits
            )));
        }
        for i in 0..count {
            self.put_refcount(first.plus(i), 1);
        }
        self.hint = first.0 + count;
        self.high = self.high.max(first.0 + count);
        Ok(())
    }

    /// Sets a refcount in a block that is in memory.
    fn put_refcount(&mut self, c: ClusterIndex, value: u64) {
        let (block, index) = self.geo.refcount_position(c);
        let order = self.geo.refcount_order;
        let slot = self.refblocks.get(block).expect("the caller looked at the block under the same lock");
        refcount_set(&mut slot.data, order, index, value);
        slot.dirty.mark(refcount_byte(order, index));
    }

    /// A block for the clusters around `c`, which no block counts: it takes `c` itself.
    fn add_refblock(&mut self, c: u64) -> Result<Try<()>> {
        if self.owned.contains(&c) {
            return Err(corrupt(format!("no refcount block counts the {} at cluster {c}", self.name_of(c))));
        }
        self.add_refblocks(c, 1)
    }

    /// Blocks for the clusters from `c` on, which no blocks count: they take the first of these.
    fn add_refblocks(&mut self, c: u64, blocks: u64) -> Result<Try<()>> {
        let (first, _) = self.geo.refcount_position(ClusterIndex(c));
        for block in first..first + blocks as usize {
            if !self.reftable_spaced.contains(&part_of(block * 8)) {
                return Ok(Try::Reserve(Space::Reftable(block * 8)));
            }
        }
        if !self.take_space(c, blocks) {
            return Ok(Try::Reserve(Space::Counts { first: ClusterIndex(c), count: blocks }));
        }
        for i in 0..blocks {
            self.insert_block(first + i as usize, ClusterIndex(c + i));
        }
        for i in 0..blocks {
            self.put_refcount(ClusterIndex(c + i), 1);
        }
        self.high = self.high.max(c + blocks);
        Ok(Try::Done(()))
    }

    /// How many blocks count `count` clusters behind these blocks, which lie from `c` on.
    fn refblocks_for(&self, c: u64, count: u64) -> u64 {
        let block = |c: u64| self.geo.refcount_position(ClusterIndex(c)).0 as u64;
        let mut blocks = 1;
        while block(c + blocks + count - 1) + 1 - block(c) > blocks {
            blocks = block(c + blocks + count - 1) + 1 - block(c);
        }
        blocks
    }

    /// Whether the refcount table has room for so many blocks from the one that counts `c` on, and there is none of them,
    /// nor anything where they would lie.
    fn lacks_refblocks(&self, c: u64, blocks: u64) -> bool {
        let (first, _) = self.geo.refcount_position(ClusterIndex(c));
        let entries = self.reftable.get(first..first + blocks as usize);
        entries.is_some_and(|e| e.iter().all(|e| e & !511 == 0))
            && self.owned.range(c..c + blocks).next().is_none()
    }

    fn insert_block(&mut self, block: usize, at: ClusterIndex) {
        let host = self.geo.host_of(at);
        let zeroes = vec![0u8; self.geo.cluster_len()].into_boxed_slice();
        self.refblocks.insert(block, host, zeroes).make_fresh();
        self.reftable[block] = host.0;
        self.reftable_dirty.mark(block * 8);
        self.owned.insert(at.0);
    }

    /// A longer refcount table for an image that has outgrown it. Everything from `c` on is uncounted, so free.
    fn grow_reftable(&mut self, c: u64) -> Result<Try<()>> {
        let geo = self.geo;
        let per_cluster = geo.cluster_size() / 8;
        let old_clusters = u64::from(self.header.reftable_clusters);
        if let Some(used) = self.owned.range(c..).next() {
            return Err(corrupt(format!("the refcount table ends before the {}", self.name_of(*used))));
        }
        let first_block = geo.refcount_position(ClusterIndex(c)).0 as u64;
        let max = MAX_REFTABLE_BYTES / geo.cluster_size();
        // Half as long again, so that growing is rare; the sizes depend on each other, so step until they fit.
        let mut table = (old_clusters + old_clusters / 2 + 1).min(max);
        let mut blocks = 1;
        loop {
            let end = c + blocks + table;
            let last_block = geo.refcount_position(ClusterIndex(end - 1)).0 as u64;
            if last_block + 1 - first_block > blocks {
                blocks = last_block + 1 - first_block;
            } else if (last_block + 1) > table * per_cluster {
                table = (last_block + 1).div_ceil(per_cluster);
                if table > max {
                    return Err(Error::new(
                        ErrorKind::NoSpace,
                        "the refcount table has reached its largest size",
                    )
                    .remedy("use a larger cluster size"));
                }
            } else {
                break;
            }
        }
        if !self.take_space(c, blocks + table) {
            return Ok(Try::Reserve(Space::Counts { first: ClusterIndex(c), count: blocks + table }));
        }
        let old_at = geo.cluster_of(self.header.reftable);
        let entries = (table * per_cluster) as usize;
        self.reftable.resize(entries, 0);
        self.reftable_dirty = Dirty::new(entries * 8);
        self.reftable_spaced = (0..=part_of(entries * 8)).collect();
        self.refblocks.grow_keys(entries);
        for b in 0..blocks {
            self.insert_block((first_block + b) as usize, ClusterIndex(c + b));
        }
        let at = ClusterIndex(c + blocks);
        for i in 0..blocks + table {
            self.put_refcount(ClusterIndex(c + i), 1);
        }
        self.owned.extend(at.0..at.0 + table);
        self.header.reftable = geo.host_of(at);
        self.header.reftable_clusters = u32::try_from(table).expect("below the limit");
        self.reftable_dirty.mark_all(entries * 8);
        self.reftable_moved = true;
        self.freed.push(Freed { first: old_at, count: old_clusters });
        self.high = self.high.max(c + blocks + table);
        Ok(Try::Done(()))
    }

    /// The refcount of a cluster.
    pub(super) fn refcount(&mut self, c: ClusterIndex) -> Result<Try<u64>> {
        let (block, index) = self.geo.refcount_position(c);
        if self.reftable.get(block).is_none_or(|e| e & !511 == 0) {
            return Ok(Try::Done(0));
        }
        let order = self.geo.refcount_order;
        match self.refblocks.get(block) {
            None => Ok(Try::Load(Need::Refblock(block))),
            Some(slot) => Ok(Try::Done(refcount_get(&slot.data, order, index))),
        }
    }

    /// Takes one reference away; the cluster becomes free with the last one. A count that is 0 already is left
    /// alone: the image was damaged before, and `check` says so.
    pub(super) fn decrement(&mut self, c: ClusterIndex) -> Result<Try<()>> {
        let n = done!(self.refcount(c)?);
        if n > 0 {
            self.put_refcount(c, n - 1);
        }
        if n == 1 {
            self.hint = self.hint.min(c.0);
            self.owned.remove(&c.0);
        }
        Ok(Try::Done(()))
    }

    /// Host offset of an allocation.
    pub(super) fn host(&self, a: Allocated) -> HostOffset {
        self.geo.host_of(a.first)
    }
}
