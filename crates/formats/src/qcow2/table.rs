//! A bounded cache of one-cluster tables (L2 tables or refcount blocks) with dirty tracking.
//!
//! Tables are kept in their on-disk byte order, so that writing one out is a copy. A table can be dropped only
//! while the file has the same content: not when it is dirty, not while a flush round is writing it, and not when
//! it is *fresh* (allocated, but nothing on disk points to it yet). Therefore the bound is soft: the driver starts
//! a round early when too many tables can't be dropped ([`TableCache::crowded`]).
//!
//! Replacement is second chance over a ring of slots: no order depends on addresses or hashes.

use super::layout::{HostOffset, be64, put64};

const ABSENT: u32 = u32::MAX;

/// Bytes that are tracked and written together: a page, or the whole table when that is smaller. Any byte range
/// of a copied table is valid to write, so a larger unit than a sector costs nothing in safety.
const GRANULE: usize = 4096;

/// Which parts of a range of bytes have to be written.
#[derive(Clone, Debug, Default)]
pub(super) struct Dirty {
    bits: Vec<u64>,
    any: bool,
}

impl Dirty {
    /// Nothing dirty among `bytes`.
    pub(super) fn new(bytes: usize) -> Dirty {
        Dirty { bits: vec![0; bytes.div_ceil(GRANULE).div_ceil(64)], any: false }
    }

    /// Whether anything is dirty.
    pub(super) fn any(&self) -> bool {
        self.any
    }

    /// Marks the granule of a byte.
    pub(super) fn mark(&mut self, byte: usize) {
        let g = byte / GRANULE;
        self.bits[g / 64] |= 1 << (g % 64);
        self.any = true;
    }

    /// Marks everything among `bytes`.
    pub(super) fn mark_all(&mut self, bytes: usize) {
        for at in (0..bytes).step_by(GRANULE) {
            self.mark(at);
        }
    }

    /// Takes the dirty byte ranges out, merged, clipped to `bytes`.
    pub(super) fn take(&mut self, bytes: usize) -> Vec<(usize, usize)> {
        let mut out: Vec<(usize, usize)> = Vec::new();
        if !self.any {
            return out;
        }
        for at in (0..bytes).step_by(GRANULE) {
            let g = at / GRANULE;
            if self.bits[g / 64] & (1 << (g % 64)) != 0 {
                let end = (at + GRANULE).min(bytes);
                match out.last_mut() {
                    Some(last) if last.1 == at => last.1 = end,
                    _ => out.push((at, end)),
                }
            }
        }
        self.bits.fill(0);
        self.any = false;
        out
    }
}

/// A cached table.
#[derive(Debug)]
pub(super) struct Slot {
    /// Which one: index in the L1 or refcount table.
    pub key: usize,
    /// Where it lives.
    pub host: HostOffset,
    /// Its content as on disk.
    pub data: Box<[u8]>,
    /// What differs from the disk.
    pub dirty: Dirty,
    /// Nothing on disk points to it: it may be written without any order.
    pub fresh: bool,
    /// A round is writing a copy of it.
    pub writing: bool,
    /// The file has space for all of it. Nothing may be changed before.
    pub spaced: bool,
    used: bool,
}

impl Slot {
    /// Entry `i` as a 64-bit number.
    pub(super) fn get(&self, i: usize) -> u64 {
        be64(&self.data, i * 8)
    }

    /// Sets entry `i`.
    pub(super) fn set(&mut self, i: usize, v: u64) {
        put64(&mut self.data, i * 8, v);
        self.dirty.mark(i * 8);
    }

    /// It has a new place, with space, that nothing on disk points to.
    pub(super) fn make_fresh(&mut self) {
        self.fresh = true;
        self.spaced = true;
    }

    fn droppable(&self) -> bool {
        !self.dirty.any() && !self.fresh && !self.writing
    }
}

/// The cache.
#[derive(Debug)]
pub(super) struct TableCache {
    slots: Vec<Slot>,
    /// Slot of each key.
    index: Vec<u32>,
    hand: usize,
    capacity: usize,
}

impl TableCache {
    /// For `keys` possible tables, keeping about `capacity` of them.
    pub(super) fn new(keys: usize, capacity: usize) -> TableCache {
        TableCache { slots: Vec::new(), index: vec![ABSENT; keys], hand: 0, capacity: capacity.max(2) }
    }

    /// Makes room for more keys.
    pub(super) fn grow_keys(&mut self, keys: usize) {
        if keys > self.index.len() {
            self.index.resize(keys, ABSENT);
        }
    }

    /// The table if it is cached.
    pub(super) fn get(&mut self, key: usize) -> Option<&mut Slot> {
        let i = *self.index.get(key)?;
        if i == ABSENT {
            return None;
        }
        let s = &mut self.slots[i as usize];
        s.used = true;
        Some(s)
    }

    /// Whether the table is cached.
    pub(super) fn has(&self, key: usize) -> bool {
        self.index.get(key).is_some_and(|i| *i != ABSENT)
    }

    /// Adds a table that is not cached; drops another one when full.
    pub(super) fn insert(&mut self, key: usize, host: HostOffset, data: Box<[u8]>) -> &mut Slot {
        debug_assert!(!self.has(key), "a table is cached once");
        let dirty = Dirty::new(data.len());
        let slot = Slot { key, host, data, dirty, fresh: false, writing: false, spaced: false, used: true };
        let i = match self.victim() {
            Some(i) => {
                self.index[self.slots[i].key] = ABSENT;
                self.slots[i] = slot;
                i
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.index[key] = u32::try_from(i).expect("fewer slots than keys");
        &mut self.slots[i]
    }

    /// All cached tables.
    pub(super) fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut()
    }

    /// Whether anything has to be written.
    pub(super) fn any_dirty(&self) -> bool {
        self.slots.iter().any(|s| s.dirty.any() || s.fresh)
    }

    /// Whether so many tables can't be dropped that a round should run before more work is taken in.
    pub(super) fn crowded(&self) -> bool {
        self.slots.len() >= self.capacity
            && self.slots.iter().filter(|s| !s.droppable()).count() * 2 > self.capacity
    }

    /// A slot that may be reused, if the cache is full.
    fn victim(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            let i = self.hand % self.slots.len();
            self.hand = (self.hand + 1) % self.slots.len();
            let s = &mut self.slots[i];
            if !s.droppable() {
                continue;
            }
            if std::mem::take(&mut s.used) {
                continue;
            }
            return Some(i);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(byte: u8) -> Box<[u8]> {
        vec![byte; 8192].into()
    }

    #[test]
    fn dirty_ranges_merge_and_clip() {
        let mut d = Dirty::new(10_000);
        d.mark(0);
        d.mark(5000);
        d.mark(9999);
        assert_eq!(d.take(10_000), [(0, 10_000)]);
        assert!(!d.any());
        d.mark(4096);
        assert_eq!(d.take(10_000), [(4096, 8192)]);
        let mut small = Dirty::new(512);
        small.mark(511);
        assert_eq!(small.take(512), [(0, 512)]);
    }

    #[test]
    fn only_clean_tables_are_dropped() {
        let mut c = TableCache::new(10, 2);
        c.insert(0, HostOffset(0x10000), table(0)).set(3, 7);
        c.insert(1, HostOffset(0x20000), table(1)).fresh = true;
        c.insert(2, HostOffset(0x30000), table(2)).writing = true;
        c.insert(3, HostOffset(0x40000), table(3));
        assert!((0..4).all(|k| c.has(k)), "nothing could be dropped");
        assert!(c.crowded());
        c.insert(4, HostOffset(0x50000), table(4));
        assert!(!c.has(3) && c.has(4));
        assert_eq!(c.get(0).unwrap().get(3), 7);
        assert!(c.has(0) && c.has(2));
        assert_eq!(c.get(2).unwrap().host, HostOffset(0x30000));
    }
}
