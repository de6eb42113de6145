//! Looking at an image: what its metadata refer to, how often, and what its refcounts say.

use std::collections::{BTreeMap, BTreeSet};

use dolmen_graph::{CheckResult, Io, Read};
use dolmen_types::{Error, ErrorKind, Result};

use super::super::entry::{L1Entry, L2Entry, OFFSET_MASK, REFTABLE_RESERVED, refcount_get};
use super::super::header::Header;
use super::super::image::{load_bitmaps, load_header, load_l1, load_reftable, read_bytes, read_table};
use super::super::layout::{Geometry, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOTS};
use super::super::snapshot::{self, Snapshot, Step};
use super::MAX_ALL_L1_BYTES;
use super::counts::Counts;
use super::entries::{Judge, L1Judged};

/// Clusters behind the end of the file that are kept in mind.
const MAX_NAMED_BEHIND: usize = 128;

/// How often an L2 table is referred to, and whether by the active L1 table.
#[derive(Clone, Copy, Default)]
pub(super) struct Use {
    /// L1 entries that name it.
    pub weight: u64,
    /// One of them is in the active table.
    pub active: bool,
    seen: bool,
}

/// An internal snapshot, as far as it can be found.
pub(super) struct Snap {
    /// Its entry of the snapshot table.
    pub raw: Vec<u8>,
    /// The same, decoded.
    pub entry: Snapshot,
    /// Entries that its L1 table must have: more than it has when the table is cut off.
    pub l1_needed: u32,
}

/// What is known of an image.
pub(super) struct Scan<'a> {
    pub io: Io<'a, Read>,
    pub geo: Geometry,
    pub judge: Judge,
    pub header: Header,
    pub result: CheckResult,
    /// References from everything but the refcount structures.
    pub expected: Counts,
    /// Those of them that are to metadata.
    pub tables_expected: Counts,
    /// The refcount structures.
    pub structures: Counts,
    /// How many different pieces of metadata have a cluster, refcount structures included: more than one, or one
    /// and data, is a cluster that is *contested*.
    pub owners: Counts,
    /// What the refcounts say.
    pub actual: Counts,
    /// Refcount blocks whose content can be read: where they are, and which ones they are.
    pub blocks: BTreeMap<u64, u64>,
    /// Refcount blocks, by their number, that can't be read or relied on.
    pub unknown: BTreeSet<u64>,
    /// A refcount structure must not be written where it is.
    pub structures_damaged: bool,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// All L2 tables, by host offset.
    pub tables: BTreeMap<u64, Use>,
    /// Snapshots that are there.
    pub snapshots: Vec<Snap>,
    /// Bytes of the snapshot table.
    pub snapshot_bytes: u64,
    /// The snapshot table has to be written anew.
    pub snapshots_damaged: bool,
    /// Clusters of the bitmaps and their tables.
    pub bitmaps: Counts,
    /// The bitmaps can't be relied on.
    pub bitmaps_damaged: bool,
    /// L1 entries that lead to nothing.
    pub lost_tables: u64,
    /// Everything that refers to something that can't be found any more. What it used to refer to may be among the
    /// leaks, so while there is such a thing no leak is given back: somebody may still want to salvage it.
    pub lost: u64,
    /// What a repair can't bring back, in words.
    pub losses: Vec<String>,
    /// Clusters behind the end of the file that damaged entries name. New tables don't go there: after a crash in
    /// the middle of a repair, these entries would seem to be whole.
    pub named_behind: BTreeSet<u64>,
}

/// Counts of guest clusters on the way through the active tables.
#[derive(Default)]
struct Walk {
    next: Option<u64>,
}

impl<'a> Scan<'a> {
    /// Looks at everything.
    pub(super) async fn of(io: Io<'a, Read>) -> Result<Scan<'a>> {
        let (header, _) = load_header(io).await?;
        header.check_supported()?;
        let geo = header.geometry();
        let l1 = load_l1(io, &header).await?;
        let result = CheckResult { total_clusters: geo.clusters_for(header.size), ..CheckResult::default() };
        let mut scan = Scan {
            io,
            geo,
            judge: Judge { geo, file_clusters: geo.clusters_for(io.size()) },
            header,
            result,
            expected: Counts::default(),
            tables_expected: Counts::default(),
            structures: Counts::default(),
            owners: Counts::default(),
            actual: Counts::default(),
            blocks: BTreeMap::new(),
            unknown: BTreeSet::new(),
            structures_damaged: false,
            l1,
            tables: BTreeMap::new(),
            snapshots: Vec::new(),
            snapshot_bytes: 0,
            snapshots_damaged: false,
            bitmaps: Counts::default(),
            bitmaps_damaged: false,
            lost_tables: 0,
            lost: 0,
            losses: Vec::new(),
            named_behind: BTreeSet::new(),
        };
        scan.run().await?;
        Ok(scan)
    }

    async fn run(&mut self) -> Result<()> {
        self.read_refcounts().await?;
        self.own(0, self.geo.cluster_size())?;
        let (at, bytes) = (self.header.l1_table.0, u64::from(self.header.l1_entries) * 8);
        if !self.own(at, bytes)? {
            self.lose(|| format!("active L1 table at {at:#x} lies beyond the end of the file"));
        }
        let l1 = std::mem::take(&mut self.l1);
        self.collect_tables(&l1, "active", true)?;
        self.read_snapshots().await?;
        let mut l1_bytes = bytes;
        for i in 0..self.snapshots.len() {
            let s = &self.snapshots[i].entry;
            let (at, entries, name) = (s.l1_table.0, s.l1_entries, s.name.clone());
            l1_bytes += u64::from(entries) * 8;
            if l1_bytes > MAX_ALL_L1_BYTES {
                return Err(Error::new(ErrorKind::Limit, "the L1 tables of all snapshots are too large"));
            }
            self.own(at, u64::from(entries) * 8)?;
            let table = read_table(self.io, at, entries as usize).await?;
            self.collect_tables(&table, &format!("snapshot '{name}'"), false)?;
        }
        self.check_tables(&l1).await?;
        self.check_bitmaps().await?;
        self.check_copied_l1(&l1);
        self.l1 = l1;
        self.find_contested();
        self.compare();
        Ok(())
    }

    /// Counts references to a range, and says whether it lies in the file.
    fn refer(&mut self, at: u64, bytes: u64, weight: u64) -> Result<bool> {
        if !self.judge.in_file(at, bytes) {
            return Ok(false);
        }
        for c in self.clusters(at, bytes) {
            self.expected.add(c, weight)?;
        }
        Ok(true)
    }

    /// The same for a piece of metadata that nothing else has.
    fn own(&mut self, at: u64, bytes: u64) -> Result<bool> {
        if !self.refer(at, bytes, 1)? {
            return Ok(false);
        }
        for c in self.clusters(at, bytes) {
            self.tables_expected.add(c, 1)?;
            self.owners.add(c, 1)?;
        }
        Ok(true)
    }

    /// The clusters of a range.
    pub(super) fn clusters(&self, at: u64, bytes: u64) -> std::ops::Range<u64> {
        let bits = self.geo.cluster_bits;
        if bytes == 0 { 0..0 } else { at >> bits..((at + bytes - 1) >> bits) + 1 }
    }

    /// Whether any cluster of a range is not only what the range is.
    pub(super) fn contested(&self, at: u64, bytes: u64) -> bool {
        self.clusters(at, bytes).any(|c| self.owners.get(c) > 1 || self.data(c) > 0)
    }

    /// References to a cluster as data.
    pub(super) fn data(&self, c: u64) -> u64 {
        self.expected.get(c).saturating_sub(self.tables_expected.get(c))
    }

    /// What the refcount of a cluster should be.
    pub(super) fn wanted(&self, c: u64) -> u64 {
        self.expected.get(c) + self.structures.get(c)
    }

    /// Notes that something leads to nothing.
    fn lose(&mut self, message: impl FnOnce() -> String) {
        self.lost += 1;
        self.result.corruption(message);
    }

    /// Keeps new tables away from what a damaged entry names behind the end of the file. More than a few such
    /// entries are garbage, which is all over the place.
    fn avoid(&mut self, host: u64) {
        let c = host >> self.geo.cluster_bits;
        if c >= self.judge.file_clusters && self.named_behind.len() < MAX_NAMED_BEHIND {
            self.named_behind.extend([c, c + 1]);
        }
    }

    async fn read_refcounts(&mut self) -> Result<()> {
        let geo = self.geo;
        let file_clusters = self.judge.file_clusters;
        if let Err(e) = self.header.check_reftable() {
            self.result.corruption(|| e.to_string());
            self.structures_damaged = true;
            return Ok(());
        }
        let table = load_reftable(self.io, &self.header).await?;
        let first = geo.cluster_of(self.header.reftable).0;
        let clusters = u64::from(self.header.reftable_clusters);
        if first + clusters > file_clusters {
            self.result.corruption(|| "refcount table lies beyond the end of the file".into());
            self.structures_damaged = true;
        }
        for c in first..(first + clusters).min(file_clusters) {
            self.structures.add(c, 1)?;
            self.owners.add(c, 1)?;
        }
        let mut block = vec![0u8; geo.cluster_len()];
        for (i, entry) in table.iter().enumerate().filter(|(_, e)| **e != 0) {
            let host = entry & !REFTABLE_RESERVED;
            let c = host >> geo.cluster_bits;
            let bad = geo.in_cluster(host) != 0 || entry & REFTABLE_RESERVED != 0 || c >= file_clusters;
            if bad || c == 0 || self.structures.get(c) > 0 {
                self.result.corruption(|| match bad {
                    true => format!("refcount block {i} has the bad offset {entry:#x}"),
                    false => format!("refcount block {i} is used twice"),
                });
                self.unknown.insert(i as u64);
                self.structures_damaged = true;
                continue;
            }
            self.structures.add(c, 1)?;
            self.owners.add(c, 1)?;
            self.blocks.insert(c, i as u64);
            read_bytes(self.io, host, &mut block).await?;
            let base = i as u64 * geo.refblock_entries();
            for j in 0..geo.refblock_entries() {
                self.actual.add(base + j, refcount_get(&block, geo.refcount_order, j as usize))?;
            }
        }
        Ok(())
    }

    /// Counts the L2 tables that an L1 table names.
    fn collect_tables(&mut self, l1: &[u64], whose: &str, active: bool) -> Result<()> {
        for (i, raw) in l1.iter().enumerate() {
            let host = match self.judge.l1(*raw) {
                L1Judged::Empty => continue,
                L1Judged::Lost(why) => {
                    self.lost_tables += 1;
                    self.avoid(raw & OFFSET_MASK);
                    self.lose(|| format!("{whose} L1 entry {i} is bad: {why}: {raw:#x}"));
                    continue;
                }
                L1Judged::Table { host, reserved } => {
                    if reserved {
                        self.result
                            .corruption(|| format!("{whose} L1 entry {i} has reserved bits set: {raw:#x}"));
                    }
                    host
                }
            };
            self.refer(host, self.geo.cluster_size(), 1)?;
            let c = host >> self.geo.cluster_bits;
            self.tables_expected.add(c, 1)?;
            let known = self.tables.entry(host).or_default();
            known.weight += 1;
            known.active |= active;
            if known.weight == 1 {
                self.owners.add(c, 1)?;
            }
        }
        Ok(())
    }

    /// Reads the snapshot table as far as it can be read. A snapshot whose L1 table can't be found is no snapshot
    /// any more.
    async fn read_snapshots(&mut self) -> Result<()> {
        if let Err(e) = self.header.check_snapshot_table() {
            self.result.corruption(|| e.to_string());
            self.snapshots_damaged = true;
            if self.header.check_snapshot_offset().is_err() {
                self.lost += 1;
                self.losses.push("the snapshot table can't be found: all snapshots are removed".into());
                return Ok(());
            }
        }
        let count = self.header.snapshots.min(MAX_SNAPSHOTS);
        let mut at = 0u64;
        for i in 0..count {
            let Some((raw, entry)) = self.read_snapshot(at).await? else {
                self.snapshots_damaged = true;
                self.lose(|| format!("snapshot table entry {i} can't be read"));
                self.losses.push(format!(
                    "snapshot table entry {i} of {} can't be read: it and all behind it are removed",
                    self.header.snapshots
                ));
                break;
            };
            at += raw.len() as u64;
            self.add_snapshot(i, raw, entry);
        }
        self.snapshot_bytes = at;
        if !self.own(self.header.snapshot_table.0, at)? {
            // Entries that lie there were not read.
            self.snapshots_damaged = true;
        }
        Ok(())
    }

    /// One entry of the snapshot table, padding included.
    async fn read_snapshot(&self, at: u64) -> Result<Option<(Vec<u8>, Snapshot)>> {
        let at = self.header.snapshot_table.0 + at;
        let mut want = 64 + MAX_SNAPSHOT_EXTRA as usize;
        loop {
            let mut b = vec![0u8; want];
            read_bytes(self.io, at, &mut b).await?;
            if b.iter().take(40).all(|x| *x == 0) {
                return Ok(None);
            }
            match snapshot::parse_entry(&b) {
                Ok(Step::NeedBytes(n)) => want = n,
                Ok(Step::Entry(s, used)) => {
                    b.resize(used, 0);
                    let bytes = at + used as u64 - self.header.snapshot_table.0;
                    let fits =
                        snapshot::check_table_len(bytes).is_ok() && self.judge.in_file(at, used as u64);
                    return Ok(fits.then_some((b, *s)));
                }
                Err(_) => return Ok(None),
            }
        }
    }

    fn add_snapshot(&mut self, i: u32, raw: Vec<u8>, entry: Snapshot) {
        let (at, bytes) = (entry.l1_table.0, u64::from(entry.l1_entries) * 8);
        let size = entry.disk_size.unwrap_or(self.header.size).min(self.geo.max_size());
        let needed = self.geo.l1_entries_for(size);
        let readable = entry.check_l1(self.geo).is_ok() && self.judge.in_file(at, bytes);
        if !readable || (needed > 0 && (at == 0 || entry.l1_entries == 0)) {
            self.snapshots_damaged = true;
            self.lose(|| format!("snapshot table entry {i} has no possible L1 table at {at:#x}"));
            self.losses.push(format!(
                "snapshot '{}' (id '{}') is removed: its L1 table can't be found",
                entry.name, entry.id
            ));
            return;
        }
        if !snapshot::is_complete(&raw, self.geo) {
            self.snapshots_damaged = true;
            self.result.corruption(|| format!("snapshot table entry {i} is incomplete"));
        }
        let l1_needed = entry.l1_entries.max(u32::try_from(needed).unwrap_or(u32::MAX));
        if l1_needed > entry.l1_entries {
            self.lose(|| format!("the L1 table of snapshot table entry {i} is too short"));
        }
        self.snapshots.push(Snap { raw, entry, l1_needed });
    }

    async fn check_tables(&mut self, l1: &[u64]) -> Result<()> {
        let mut walk = Walk::default();
        let mut data = vec![0u8; self.geo.cluster_len()];
        // The active tables in guest order, for the statistics; then those that only snapshots have.
        for raw in l1 {
            let L1Judged::Table { host, .. } = self.judge.l1(*raw) else { continue };
            let u = self.tables.get_mut(&host).expect("collected");
            if !std::mem::replace(&mut u.seen, true) {
                let u = *u;
                read_bytes(self.io, host, &mut data).await?;
                self.check_table(host, &data, u, Some(&mut walk))?;
            }
        }
        let others: Vec<(u64, Use)> =
            self.tables.iter().filter(|(_, u)| !u.seen).map(|(at, u)| (*at, *u)).collect();
        for (at, u) in others {
            read_bytes(self.io, at, &mut data).await?;
            self.check_table(at, &data, u, None)?;
        }
        Ok(())
    }

    fn check_table(&mut self, table: u64, data: &[u8], u: Use, mut walk: Option<&mut Walk>) -> Result<()> {
        let geo = self.geo;
        for (i, raw) in data.chunks_exact(8).enumerate() {
            let raw = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
            if raw == 0 {
                continue;
            }
            let judged = self.judge.l2(raw);
            if let Some(problem) = judged.problem {
                let at = table + i as u64 * 8;
                self.result.corruption(|| format!("L2 entry {raw:#x} at {at:#x} is bad: {problem}"));
                if judged.lost {
                    self.lost += 1;
                    self.avoid(self.judge.named(raw));
                }
            }
            let Some((first, count)) = judged.entry.clusters(geo) else { continue };
            for c in first.0..first.0 + count {
                self.expected.add(c, u.weight)?;
            }
            let Some(walk) = walk.as_deref_mut() else { continue };
            self.count(walk, judged.entry);
            if let L2Entry::Data { copied, .. } | L2Entry::Zero { kept: Some((_, copied)) } = judged.entry {
                let refcount = self.actual.get(first.0);
                if copied != (refcount == 1) {
                    self.result.corruption(|| {
                        format!("OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}")
                    });
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, walk: &mut Walk, entry: L2Entry) {
        let r = &mut self.result;
        match entry {
            L2Entry::Compressed { .. } => {
                r.allocated_clusters += 1;
                r.compressed_clusters += 1;
                // Never adjacent in a way that helps anybody.
                r.fragmented_clusters += 1;
            }
            L2Entry::Data { host, .. } | L2Entry::Zero { kept: Some((host, _)) } => {
                r.allocated_clusters += 1;
                if walk.next.is_some_and(|n| n != host.0) {
                    r.fragmented_clusters += 1;
                }
                walk.next = Some(host.0 + self.geo.cluster_size());
            }
            L2Entry::Unallocated | L2Entry::Zero { kept: None } => {}
        }
    }

    async fn check_bitmaps(&mut self) -> Result<()> {
        let ext = match self.header.bitmaps() {
            Ok(None) => return Ok(()),
            Ok(Some(ext)) => ext,
            Err(e) => {
                self.damaged_bitmaps(&e.to_string());
                return Ok(());
            }
        };
        if !self.own_bitmap(ext.directory.0, ext.directory_bytes)? {
            return Ok(());
        }
        let header = self.header.clone();
        let list = match load_bitmaps(self.io, &header).await {
            Ok(list) => list,
            Err(e) => {
                self.damaged_bitmaps(&e.to_string());
                return Ok(());
            }
        };
        for b in list {
            let bits = self.header.size.div_ceil(1 << b.granularity_bits);
            let needed = bits.div_ceil(8).div_ceil(self.geo.cluster_size());
            if u64::from(b.table_entries) != needed {
                self.damaged_bitmaps(&format!("'{}' has a table for a disk of another size", b.name));
            }
            if !self.own_bitmap(b.table.0, u64::from(b.table_entries) * 8)? {
                continue;
            }
            for raw in read_table(self.io, b.table.0, b.table_entries as usize).await? {
                let host = raw & OFFSET_MASK;
                if self.geo.in_cluster(host) != 0 {
                    self.damaged_bitmaps(&format!("data at the bad offset {host:#x}"));
                } else if host != 0 {
                    self.own_bitmap(host, self.geo.cluster_size())?;
                }
            }
        }
        Ok(())
    }

    fn damaged_bitmaps(&mut self, why: &str) {
        self.bitmaps_damaged = true;
        self.result.corruption(|| format!("bitmaps: {why}"));
    }

    fn own_bitmap(&mut self, at: u64, bytes: u64) -> Result<bool> {
        if !self.own(at, bytes)? {
            self.damaged_bitmaps(&format!("{at:#x} lies beyond the end of the file"));
            return Ok(false);
        }
        for c in self.clusters(at, bytes) {
            self.bitmaps.add(c, 1)?;
        }
        Ok(true)
    }

    fn check_copied_l1(&mut self, l1: &[u64]) {
        for (i, raw) in l1.iter().enumerate() {
            let L1Judged::Table { host, .. } = self.judge.l1(*raw) else { continue };
            let refcount = self.actual.get(host >> self.geo.cluster_bits);
            if L1Entry(*raw).copied() != (refcount == 1) {
                self.result.corruption(|| {
                    format!("OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={raw:x} refcount={refcount}")
                });
            }
        }
    }

    /// Finds clusters that are several things at once. Whatever is written to one of those things destroys the
    /// others, so all metadata have to leave such a cluster.
    fn find_contested(&mut self) {
        let size = self.geo.cluster_size();
        let bits = self.geo.cluster_bits;
        let all: Vec<u64> =
            self.owners.nonzero().map(|(c, _)| c).filter(|c| self.contested(c << bits, size)).collect();
        for c in all {
            if self.structures.get(c) > 0 {
                self.structures_damaged = true;
                self.unknown.extend(self.blocks.get(&c));
            }
            if self.bitmaps.get(c) > 0 {
                self.bitmaps_damaged = true;
            }
            // Where the refcount is too low as well, that is reported.
            if self.actual.get(c) >= self.wanted(c) {
                self.result
                    .corruption(|| format!("cluster {c} holds metadata and is used for something else too"));
            }
        }
    }

    fn compare(&mut self) {
        let mut wrong: Vec<(u64, u64, u64)> = Vec::new();
        let mut note = |c: u64, have: u64, want: u64, r: &mut CheckResult| {
            if wrong.len() < CheckResult::MAX_MESSAGES {
                wrong.push((c, have, want));
            }
            if have > want { r.leaks += 1 } else { r.corruptions += 1 }
        };
        let mut result = std::mem::take(&mut self.result);
        for (c, have) in self.actual.nonzero() {
            let want = self.wanted(c);
            // A count past the end of the file keeps no space from anybody: a crash can leave one behind when the
            // file had not grown yet.
            let of_nothing = want == 0 && c >= self.judge.file_clusters;
            if have != want && !of_nothing {
                note(c, have, want, &mut result);
            }
        }
        for counts in [&self.expected, &self.structures] {
            for (c, _) in counts.nonzero() {
                let second = std::ptr::eq(counts, &self.structures) && self.expected.get(c) > 0;
                if self.actual.get(c) == 0 && !second {
                    note(c, 0, self.wanted(c), &mut result);
                }
            }
        }
        for (c, have, want) in wrong {
            let what = if have > want { "Leaked" } else { "ERROR" };
            result.say(format!("{what} cluster {c} refcount={have} reference={want}"));
        }
        let counted = self.actual.nonzero().map(|(c, _)| c).filter(|c| *c < self.judge.file_clusters).max();
        let last = [counted, self.expected.last(), self.structures.last()].into_iter().flatten().max();
        result.image_end_offset = last.map_or(0, |c| (c + 1) << self.geo.cluster_bits);
        self.result = result;
    }
}
