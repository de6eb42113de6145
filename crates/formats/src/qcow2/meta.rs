//! The metadata of an open image in memory, and the decisions made on them.
//!
//! Everything here is synchronous: values in, values out. Where a table is not in memory the answer is
//! [`Try::Load`]; the driver loads it outside of the lock and asks again. One mutex in the driver guards a
//! [`Meta`]; it is never held across an await.
//!
//! Invariant: whatever the in-memory tables map is counted in the in-memory refcounts. A host cluster that loses
//! its mapping stays counted (in `freed`, then `unmapped`) until the change is on disk and no request can still
//! be using it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use dolmen_graph::Stamp;
use dolmen_types::{Error, ErrorKind, Result};

use super::entry::{BadEntry, COPIED, L1Entry, L2Entry};
use super::header::Header;
use super::layout::{ClusterIndex, Geometry, GuestOffset, HostOffset, corrupt};
use super::snapshot::Snapshot;
use super::space::{Space, part_of};
use super::table::{Dirty, TableCache};

/// Memory for L2 tables: the default of QEMU.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// Memory for refcount blocks; allocation walks over them in order, so few are needed.
const REFBLOCK_CACHE_BYTES: u64 = 4 << 20;
/// Most cached tables of each kind, however small they are.
const MAX_CACHED_TABLES: u64 = 4096;
/// Freed runs after which a round is started early, so that the list stays small.
const MAX_FREED: usize = 16384;

/// A table that has to be loaded before the question can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// The L2 table of this L1 index.
    L2(usize),
    /// The refcount block of this refcount table index.
    Refblock(usize),
}

/// An answer, or what is missing for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Try<T> {
    /// The answer.
    Done(T),
    /// Load this, then ask again.
    Load(Need),
    /// Nothing has changed, and nothing may before this has space on disk; then ask again.
    Reserve(Space),
}

/// Unwraps a [`Try`] or returns the need.
macro_rules! done {
    ($e:expr) => {
        match $e {
            $crate::qcow2::meta::Try::Done(v) => v,
            $crate::qcow2::meta::Try::Load(n) => return Ok($crate::qcow2::meta::Try::Load(n)),
            $crate::qcow2::meta::Try::Reserve(s) => return Ok($crate::qcow2::meta::Try::Reserve(s)),
        }
    };
}
pub(super) use done;

/// Where a byte of the disk lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere in this image.
    Unallocated,
    /// Zeroes, perhaps with a kept host cluster (the offset is that of the byte).
    Zero {
        /// Offset of the byte in the kept cluster, and whether it may be written in place.
        kept: Option<(HostOffset, bool)>,
    },
    /// At this offset of the file.
    Data {
        /// Offset of the byte.
        host: HostOffset,
        /// Whether it may be written in place.
        copied: bool,
    },
    /// In compressed data.
    Compressed {
        /// Start of the compressed data.
        host: HostOffset,
        /// Bytes to read.
        len: u64,
        /// The raw entry, which identifies the data.
        raw: u64,
    },
}

/// A place that holds for a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where the first byte lives; the others follow it.
    pub place: Place,
    /// How many bytes.
    pub len: u64,
}

/// Adjacent clusters of this image's own that hold the bytes of a range: they may be written where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Own {
    /// Where the first byte lives; the others follow it.
    pub host: HostOffset,
    /// How many bytes.
    pub len: u64,
    /// The cluster of the first byte reads as zeroes: it has to hold zeroes around what is written.
    pub head_zero: bool,
    /// The same of the last byte.
    pub tail_zero: bool,
    /// Some cluster reads as zeroes: its entry has to change.
    pub any_zero: bool,
}

/// Host clusters that lost one reference each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The first one.
    pub first: ClusterIndex,
    /// How many.
    pub count: u64,
}

/// The metadata of an open image.
#[derive(Debug)]
pub(super) struct Meta {
    /// Numbers that never change.
    pub geo: Geometry,
    /// The header as it is on disk, or will be after the round that moves a table.
    pub header: Header,
    /// The first 512 bytes of the file, into which changed header fields are patched.
    pub sector: [u8; 512],
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// Which parts of it the disk does not have.
    pub l1_dirty: Dirty,
    /// L2 tables of the active L1 table.
    pub l2: TableCache,
    /// The refcount table; empty when the image is open read-only.
    pub reftable: Vec<u64>,
    /// Which parts of it the disk does not have.
    pub reftable_dirty: Dirty,
    /// It lives in a new place that the header on disk does not name yet.
    pub reftable_moved: bool,
    /// Refcount blocks.
    pub refblocks: TableCache,
    /// Host clusters with metadata in use: never written as data, never allocated.
    pub owned: BTreeSet<u64>,
    /// No free cluster lies below.
    pub hint: u64,
    /// No cluster at or above has ever been written: it reads as zeroes.
    pub high: u64,
    /// Lost their mapping since the last round began.
    pub freed: Vec<Freed>,
    /// Lost their mapping on disk; a request that looked before the stamp may still use them.
    pub unmapped: VecDeque<(Stamp, Vec<Freed>)>,
    /// Clusters with space on disk and a reference, for new L2 tables.
    pub spare: Vec<ClusterIndex>,
    /// The first of some adjacent clusters that nothing counts, and how many: they have space on disk, for the next
    /// refcount block.
    pub space: Option<(u64, u64)>,
    /// The parts of the L1 table that certainly have space on disk.
    pub l1_spaced: BTreeSet<usize>,
    /// The same of the refcount table.
    pub reftable_spaced: BTreeSet<usize>,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Why the image can't be written any more.
    pub broken: Option<String>,
    /// The last decompressed cluster: its entry and its data.
    pub unpacked: Option<(u64, Arc<Vec<u8>>)>,
    /// The disk has an older header, or that is not known: the next round writes it before any mapping.
    pub header_dirty: bool,
    /// The next header names another L1 table.
    pub l1_moved: bool,
    /// A round or a write of the header is under way.
    pub busy: bool,
    /// Rounds begun so far.
    pub rounds_begun: u64,
    /// Number of the last round that ended, well or not.
    pub(super) rounds_ended: u64,
    /// Number of the last round that succeeded.
    pub rounds_done: u64,
}

impl Meta {
    /// The state of an image that has just been read. `reftable` is empty for read-only use; `file_size` is the
    /// size of the file in bytes.
    pub(super) fn new(
        header: Header,
        sector: [u8; 512],
        l1: Vec<u64>,
        reftable: Vec<u64>,
        file_size: u64,
    ) -> Meta {
        let geo = header.geometry();
        let tables = |bytes: u64| (bytes / geo.cluster_size()).clamp(4, MAX_CACHED_TABLES) as usize;
        let mut m = Meta {
            geo,
            sector,
            l1_dirty: Dirty::new(l1.len() * 8),
            l2: TableCache::new(l1.len(), tables(L2_CACHE_BYTES)),
            reftable_dirty: Dirty::new(reftable.len() * 8),
            reftable_moved: false,
            refblocks: TableCache::new(reftable.len(), tables(REFBLOCK_CACHE_BYTES)),
            owned: BTreeSet::new(),
            hint: 0,
            high: geo.clusters_for(file_size),
            freed: Vec::new(),
            unmapped: VecDeque::new(),
            spare: Vec::new(),
            space: None,
            l1_spaced: BTreeSet::new(),
            reftable_spaced: BTreeSet::new(),
            snapshots: Vec::new(),
            broken: None,
            unpacked: None,
            header_dirty: false,
            l1_moved: false,
            busy: false,
            rounds_begun: 0,
            rounds_ended: 0,
            rounds_done: 0,
            header,
            l1,
            reftable,
        };
        if !m.reftable.is_empty() {
            m.collect_owned();
        }
        m
    }

    fn collect_owned(&mut self) {
        let geo = self.geo;
        let cluster = |h: HostOffset| geo.cluster_of(h).0;
        self.owned.insert(0);
        let l1_first = cluster(self.header.l1_table);
        self.owned.extend(l1_first..l1_first + geo.clusters_for(u64::from(self.header.l1_entries) * 8));
        let rt_first = cluster(self.header.reftable);
        self.owned.extend(rt_first..rt_first + u64::from(self.header.reftable_clusters));
        self.owned.extend(self.l1.iter().filter_map(|e| L1Entry(*e).table(geo).ok()?).map(cluster));
        self.owned
            .extend(self.reftable.iter().map(|e| HostOffset(e & !511)).filter(|h| h.0 != 0).map(cluster));
    }

    /// Marks a range of the file as metadata.
    pub(super) fn own(&mut self, at: HostOffset, bytes: u64) {
        let first = self.geo.cluster_of(at).0;
        self.owned.extend(first..first + self.geo.clusters_for(bytes));
    }

    /// Fails when the image may not be written any more.
    pub(super) fn check_usable(&self) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Corrupt, format!("the image is marked corrupt: {why}"))
                .remedy("close it and repair it with 'img check -r all'")),
        }
    }

    /// Fails when a write to the file would hit metadata, or lie beyond everything that was ever allocated.
    pub(super) fn check_overlap(&self, host: HostOffset, len: u64) -> Result<()> {
        let first = self.geo.cluster_of(host).0;
        let last = self.geo.cluster_of(HostOffset(host.0 + len.max(1) - 1)).0;
        match self.owned.range(first..=last).next() {
            None if last >= self.high => {
                Err(corrupt(format!("Cluster allocation offset {host} lies beyond the end of the file")))
            }
            None => Ok(()),
            Some(c) => Err(corrupt(format!(
                "Preventing invalid write on metadata (overlaps with {}) at {:#x}",
                self.name_of(*c),
                host.0
            ))),
        }
    }

    /// What metadata live in a cluster.
    pub(super) fn name_of(&self, cluster: u64) -> &'static str {
        let host = HostOffset(cluster << self.geo.cluster_bits);
        let inside = |at: HostOffset, bytes: u64| host.0 >= at.0 && host.0 < at.0 + bytes;
        if cluster == 0 {
            "qcow2_header"
        } else if inside(self.header.l1_table, u64::from(self.header.l1_entries) * 8) {
            "active L1 table"
        } else if inside(
            self.header.reftable,
            u64::from(self.header.reftable_clusters) << self.geo.cluster_bits,
        ) {
            "refcount table"
        } else if self.reftable.iter().any(|e| e & !511 == host.0) {
            "refcount block"
        } else if self.l1.iter().any(|e| L1Entry(*e).table(self.geo) == Ok(Some(host))) {
            "active L2 table"
        } else {
            "snapshot or bitmap tables"
        }
    }

    /// Where the bytes from guest offset `at` live, at most `max` of them, at least one cluster's rest.
    pub(super) fn lookup(&mut self, at: u64, max: u64) -> Result<Try<Run>> {
        let geo = self.geo;
        let mut run: Option<Run> = None;
        let mut pos = at;
        let end = at + max;
        while pos < end {
            let g = GuestOffset(pos);
            let l1_index = geo.l1_index(g);
            let Some(l1) = self.l1.get(l1_index) else {
                return Err(corrupt(format!("guest offset {g} lies beyond the L1 table")));
            };
            let table = L1Entry(*l1).table(geo).map_err(|_| {
                corrupt(format!("L2 table offset {l1:#x} is not aligned (L1 index {l1_index})"))
            });
            let (place, len) = match table {
                Err(e) if run.is_none() => return Err(e),
                Err(_) => break,
                Ok(None) => (Place::Unallocated, geo.l2_coverage() - (pos & (geo.l2_coverage() - 1))),
                Ok(Some(_)) => {
                    let Some(slot) = self.l2.get(l1_index) else {
                        match run {
                            None => return Ok(Try::Load(Need::L2(l1_index))),
                            Some(_) => break,
                        }
                    };
                    let raw = slot.get(geo.l2_index(g));
                    let within = geo.in_cluster(pos);
                    match L2Entry::decode(raw, geo) {
                        Err(bad) if run.is_none() => return Err(bad_entry(bad, g, slot.host)),
                        Err(_) => break,
                        Ok(e) => (place_of(e, raw, within), geo.cluster_size() - within),
                    }
                }
            };
            match &mut run {
                None => run = Some(Run { place, len }),
                Some(r) if follows(r, place) => r.len += len,
                Some(_) => break,
            }
            pos += len;
            if matches!(place, Place::Compressed { .. }) {
                break;
            }
        }
        let mut run = run.expect("the range is not empty");
        run.len = run.len.min(max);
        Ok(Try::Done(run))
    }

    /// The clusters of this image's own that hold the bytes from `at` on, data and kept zero clusters alike, as far as
    /// they are adjacent, at most `max` bytes; `None` when the first byte has none.
    pub(super) fn own_run(&mut self, at: u64, max: u64) -> Result<Try<Option<Own>>> {
        let mut own: Option<Own> = None;
        loop {
            let done = own.map_or(0, |o| o.len);
            if done == max {
                break;
            }
            let run = match self.lookup(at + done, max - done) {
                Ok(Try::Done(run)) => run,
                Ok(Try::Load(need)) if own.is_none() => return Ok(Try::Load(need)),
                Ok(Try::Reserve(what)) if own.is_none() => return Ok(Try::Reserve(what)),
                Err(e) if own.is_none() => return Err(e),
                Ok(Try::Load(_) | Try::Reserve(_)) | Err(_) => break,
            };
            let (host, zero) = match run.place {
                Place::Data { host, copied: true } => (host, false),
                Place::Zero { kept: Some((host, true)) } => (host, true),
                Place::Unallocated | Place::Zero { .. } | Place::Data { .. } | Place::Compressed { .. } => {
                    break;
                }
            };
            match &mut own {
                None => {
                    own = Some(Own { host, len: run.len, head_zero: zero, tail_zero: zero, any_zero: zero });
                }
                Some(o) if o.host.0 + o.len == host.0 => {
                    o.len += run.len;
                    o.tail_zero = zero;
                    o.any_zero |= zero;
                }
                Some(_) => break,
            }
        }
        Ok(Try::Done(own))
    }

    /// Makes sure that the L2 table for a guest offset exists, is in memory and may be changed: allocates it, or
    /// copies it when it is shared with a snapshot.
    pub(super) fn prepare_l2(&mut self, l1_index: usize) -> Result<Try<()>> {
        let geo = self.geo;
        let Some(raw) = self.l1.get(l1_index).copied() else {
            return Err(corrupt(format!("L1 index {l1_index} lies beyond the L1 table")));
        };
        let old = L1Entry(raw)
            .table(geo)
            .map_err(|_| corrupt(format!("L2 table offset {raw:#x} is not aligned")))?;
        if old.is_some() && !self.l2.has(l1_index) {
            return Ok(Try::Load(Need::L2(l1_index)));
        }
        if old.is_some() && L1Entry(raw).copied() {
            let slot = self.l2.get(l1_index).expect("checked above");
            return Ok(if slot.spaced { Try::Done(()) } else { Try::Reserve(Space::L2(l1_index)) });
        }
        if !self.l1_spaced.contains(&part_of(l1_index * 8)) {
            return Ok(Try::Reserve(Space::L1(l1_index * 8)));
        }
        let Some(new) = self.spare.pop() else { return Ok(Try::Reserve(Space::Table)) };
        let new = geo.host_of(new);
        match old {
            None => {
                let zeroes = vec![0u8; geo.cluster_len()].into_boxed_slice();
                self.l2.insert(l1_index, new, zeroes).make_fresh();
            }
            Some(old) => {
                let slot = self.l2.get(l1_index).expect("checked above");
                slot.host = new;
                slot.make_fresh();
                self.freed.push(Freed { first: geo.cluster_of(old), count: 1 });
            }
        }
        self.owned.insert(geo.cluster_of(new).0);
        self.l1[l1_index] = L1Entry::own(new).0;
        self.l1_dirty.mark(l1_index * 8);
        Ok(Try::Done(()))
    }

    /// Sets the entries of `count` guest clusters from `at` on (all in one table) to what `entry` says of each,
    /// given its number and its old value. What the old ones referred to and the new ones do not is freed.
    pub(super) fn set_entries(
        &mut self,
        at: GuestOffset,
        count: u64,
        entry: impl Fn(u64, L2Entry) -> L2Entry,
    ) -> Result<Try<()>> {
        let geo = self.geo;
        let l1_index = geo.l1_index(at);
        done!(self.prepare_l2(l1_index)?);
        let slot = self.l2.get(l1_index).expect("just prepared");
        let first = geo.l2_index(at);
        let mut freed: Vec<Freed> = Vec::new();
        for i in 0..count {
            let index = first + i as usize;
            let raw = slot.get(index);
            let old = L2Entry::decode(raw, geo).map_err(|b| bad_entry(b, at, slot.host))?;
            let new = entry(i, old);
            if new == old {
                continue;
            }
            if let Some((cluster, n)) = old.clusters(geo).filter(|old| new.clusters(geo) != Some(*old)) {
                match freed.last_mut() {
                    Some(f) if f.first.0 + f.count == cluster.0 => f.count += n,
                    _ => freed.push(Freed { first: cluster, count: n }),
                }
                if matches!(old, L2Entry::Compressed { .. }) {
                    self.unpacked = None;
                }
            }
            slot.set(index, new.encode(geo));
        }
        self.freed.append(&mut freed);
        Ok(Try::Done(()))
    }

    /// The file offset to load a table from.
    pub(super) fn table_offset(&self, need: Need) -> Result<HostOffset> {
        let geo = self.geo;
        let (what, number, found) = match need {
            Need::L2(i) => ("L2 table", i, L1Entry(self.l1[i]).table(geo).ok().flatten()),
            Need::Refblock(i) => {
                let h = HostOffset(self.reftable[i] & !511);
                ("refcount block", i, (h.0 != 0 && geo.in_cluster(h.0) == 0).then_some(h))
            }
        };
        // Tables are written back where they are: one far behind the end would grow the file to there.
        found.filter(|h| geo.cluster_of(*h).0 < self.high).ok_or_else(|| {
            corrupt(format!("{what} {number} has a bad offset, or lies beyond the end of the file"))
        })
    }

    /// Whether a table is in memory.
    pub(super) fn has(&self, need: Need) -> bool {
        match need {
            Need::L2(i) => self.l2.has(i),
            Need::Refblock(i) => self.refblocks.has(i),
        }
    }

    /// Puts a loaded table in, unless it is there already or has moved.
    pub(super) fn loaded(&mut self, need: Need, host: HostOffset, data: Box<[u8]>) {
        if self.has(need) || self.table_offset(need).ok() != Some(host) {
            return;
        }
        match need {
            Need::L2(i) => self.l2.insert(i, host, data),
            Need::Refblock(i) => self.refblocks.insert(i, host, data),
        };
    }

    /// Whether the disk lacks anything that memory has.
    pub(super) fn any_dirty(&self) -> bool {
        self.l1_dirty.any()
            || self.reftable_dirty.any()
            || self.reftable_moved
            || self.header_dirty
            || !self.freed.is_empty()
            || self.l2.any_dirty()
            || self.refblocks.any_dirty()
    }

    /// Whether a round should run before more work is taken in.
    pub(super) fn crowded(&self) -> bool {
        self.freed.len() > MAX_FREED || self.l2.crowded() || self.refblocks.crowded()
    }
}

fn place_of(e: L2Entry, raw: u64, within: u64) -> Place {
    let inside = |h: HostOffset| HostOffset(h.0 + within);
    match e {
        L2Entry::Unallocated => Place::Unallocated,
        L2Entry::Zero { kept } => Place::Zero { kept: kept.map(|(h, copied)| (inside(h), copied)) },
        L2Entry::Data { host, copied } => Place::Data { host: inside(host), copied },
        L2Entry::Compressed { host, len } => Place::Compressed { host, len, raw: raw & !COPIED },
    }
}

/// Whether `next` continues a run.
fn follows(run: &Run, next: Place) -> bool {
    match (run.place, next) {
        (Place::Unallocated, Place::Unallocated) => true,
        (Place::Zero { kept: None }, Place::Zero { kept: None }) => true,
        (Place::Zero { kept: Some((a, ca)) }, Place::Zero { kept: Some((b, cb)) }) => {
            a.0 + run.len == b.0 && ca == cb
        }
        (Place::Data { host: a, copied: ca }, Place::Data { host: b, copied: cb }) => {
            a.0 + run.len == b.0 && ca == cb
        }
        (Place::Unallocated | Place::Zero { .. } | Place::Data { .. } | Place::Compressed { .. }, _) => false,
    }
}

/// The error for a bad L2 entry.
#[cold]
pub(super) fn bad_entry(bad: BadEntry, at: GuestOffset, table: HostOffset) -> Error {
    let what = match bad {
        BadEntry::Unaligned(h) => format!("Cluster allocation offset {h} unaligned"),
        BadEntry::ZeroInVersion2 => "Zero cluster entry found in pre-v3 image".to_owned(),
        BadEntry::BeyondEnd(h) => format!("Compressed data at {h} lie beyond the largest host offset"),
    };
    corrupt(format!("{what} (L2 table at {table}, guest offset {at})"))
}
