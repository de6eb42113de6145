//! Repairing.
//!
//! Nothing that the image refers to is written where it is. Every table that has to change, and every one that lies
//! in a cluster which is something else too, gets a copy in clusters that nothing uses; so do the tables that name
//! it, up to the header; new refcounts count what the copies refer to. One write of the header's first sector then
//! switches from the old state to the new one. So a crash at any write leaves the old image or the new one, and a
//! guest cluster that could be read before reads the same after: what it was read from was not touched.
//!
//! Rejected: moving the data out of a contested cluster and leaving the metadata. Many entries in many tables may
//! refer to data, compressed data share clusters, and each of these entries would have to change at once.

use std::collections::{BTreeMap, BTreeSet};

use dolmen_graph::{Io, Prealloc, Resize, Write};
use dolmen_types::{Error, ErrorKind, Result, WriteFlags};

use super::super::entry::{L1_RESERVED, L2Entry, REFTABLE_RESERVED, ZERO, refcount_get, refcount_set};
use super::super::header::Header;
use super::super::image::{load_reftable, read_bytes, read_table};
use super::super::layout::{ClusterIndex, HostOffset, MAX_L1_BYTES, MAX_REFTABLE_BYTES, put64};
use super::super::snapshot;
use super::counts::Counts;
use super::entries::{L1Judged, flagged};
use super::scan::{Scan, Snap, Use};
use super::write_header_fields;

/// Clusters that the file grows by at a time, while new tables are written behind its end.
const GROW_CLUSTERS: u64 = 16;

/// Lowers refcounts in place where they are too high. The structures are sound.
pub(super) async fn lower_refcounts(scan: &Scan<'_>, write: Io<'_, Write>) -> Result<()> {
    let geo = scan.geo;
    let table = load_reftable(scan.io, &scan.header).await?;
    let mut block = vec![0u8; geo.cluster_len()];
    for (i, entry) in table.iter().enumerate() {
        let host = entry & !REFTABLE_RESERVED;
        if host == 0 {
            continue;
        }
        let base = i as u64 * geo.refblock_entries();
        read_bytes(scan.io, host, &mut block).await?;
        let mut changed = false;
        for j in 0..geo.refblock_entries() {
            let (have, want) = (refcount_get(&block, geo.refcount_order, j as usize), scan.wanted(base + j));
            if have > want {
                refcount_set(&mut block, geo.refcount_order, j as usize, want);
                changed = true;
            }
        }
        if changed {
            write.write_bytes(host, &block, WriteFlags::NONE).await?;
        }
    }
    write.flush().await
}

/// Writes the image's metadata anew, as far as they have to change, and switches to them.
pub(super) async fn rewrite(scan: &Scan<'_>, write: Io<'_, Write>, resize: Io<'_, Resize>) -> Result<()> {
    let before = resize.size();
    let mut r = Rewrite::new(scan, write, resize);
    let header = match r.run().await {
        Ok(header) => header,
        Err(e) => {
            // Nothing refers to what was written so far. A longer file is as valid.
            if resize.size() > before {
                let _ = resize.resize(before, Prealloc::Off).await;
            }
            return Err(e);
        }
    };
    write.flush().await?;
    write_header_fields(scan.io, write, &header).await
}

/// Finds clusters for new tables.
struct Space {
    next: u64,
    /// Behind this, nothing is in use.
    used: u64,
    /// Only behind everything, because something that can't be found may lie in any unused cluster.
    behind: bool,
}

impl Space {
    fn new(scan: &Scan<'_>) -> Space {
        let used = scan.result.image_end_offset >> scan.geo.cluster_bits;
        // A cluster that seems free may be one that no refcount block counts any more.
        let behind = scan.lost > 0 || !scan.unknown.is_empty() || scan.blocks.is_empty();
        let next = if behind { scan.judge.file_clusters.max(used) } else { 1 };
        Space { next, used, behind }
    }

    /// `n` adjacent clusters that nothing refers to and nothing counts.
    fn take(&mut self, scan: &Scan<'_>, n: u64) -> u64 {
        let used = self.used;
        let free = |c: u64| c >= used || (scan.wanted(c) == 0 && scan.actual.get(c) == 0);
        let mut first = self.next;
        let mut len = 0;
        while len < n {
            let c = first + len;
            if (self.behind || free(c)) && !scan.named_behind.contains(&c) {
                len += 1;
            } else {
                first += len + 1;
                len = 0;
            }
        }
        self.next = first + n;
        first
    }
}

struct Rewrite<'s, 'a> {
    scan: &'s Scan<'a>,
    write: Io<'s, Write>,
    resize: Io<'s, Resize>,
    space: Space,
    /// The refcounts of the new state.
    after: Counts,
    /// L2 tables that have a new place.
    moved: BTreeMap<u64, u64>,
    /// A table of zero clusters, and how many more L1 entries may name it.
    zeroes: Option<(u64, u64)>,
    /// L1 entries that will need one.
    zero_tables_left: u64,
    header: Header,
}

impl<'s, 'a> Rewrite<'s, 'a> {
    fn new(scan: &'s Scan<'a>, write: Io<'s, Write>, resize: Io<'s, Resize>) -> Rewrite<'s, 'a> {
        Rewrite {
            scan,
            write,
            resize,
            space: Space::new(scan),
            after: Counts::default(),
            moved: BTreeMap::new(),
            zeroes: None,
            zero_tables_left: scan.lost_tables,
            header: scan.header.clone(),
        }
    }

    async fn run(&mut self) -> Result<Header> {
        self.after.add(0, 1)?;
        for (at, u) in &self.scan.tables {
            self.table(*at, *u).await?;
        }
        self.active_l1().await?;
        self.snapshots().await?;
        self.header.clear_unknown();
        if self.scan.bitmaps_damaged {
            self.header.autoclear = 0;
        } else {
            for (c, n) in self.scan.bitmaps.nonzero() {
                self.after.add(c, n)?;
            }
        }
        if self.scan.lost > 0 {
            self.keep_leaks()?;
        }
        self.refcounts().await?;
        Ok(self.header.clone())
    }

    /// Writes new clusters; nothing refers to them yet.
    async fn put(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let scan = self.scan;
        let at = first << scan.geo.cluster_bits;
        let end = at + (bytes.len() as u64).next_multiple_of(scan.geo.cluster_size());
        if self.resize.size() < end {
            let grown =
                self.resize.resize(end + GROW_CLUSTERS * scan.geo.cluster_size(), Prealloc::Off).await;
            if grown.is_err() {
                self.resize.resize(end, Prealloc::Off).await.map_err(|e| {
                    e.remedy("the repair writes new tables behind the end of the image: make room for them")
                })?;
            }
        }
        self.write.write_bytes(at, bytes, WriteFlags::NONE).await
    }

    /// Takes clusters, counts them, and writes a table of 64-bit numbers to them.
    async fn put_table(&mut self, entries: &[u64]) -> Result<u64> {
        let size = self.scan.geo.cluster_size();
        let n = (entries.len() as u64 * 8).div_ceil(size);
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((n * size) as usize, 0);
        self.put_new(&bytes).await
    }

    /// The same for whole clusters of bytes.
    async fn put_new(&mut self, bytes: &[u8]) -> Result<u64> {
        let n = bytes.len() as u64 / self.scan.geo.cluster_size();
        let first = self.space.take(self.scan, n);
        for c in first..first + n {
            self.after.add(c, 1)?;
        }
        self.put(first, bytes).await?;
        Ok(first << self.scan.geo.cluster_bits)
    }

    /// One L2 table: counts what it refers to, and moves it if it must.
    async fn table(&mut self, at: u64, u: Use) -> Result<()> {
        let scan = self.scan;
        let geo = scan.geo;
        let mut data = vec![0u8; geo.cluster_len()];
        read_bytes(scan.io, at, &mut data).await?;
        let mut changed = scan.contested(at, geo.cluster_size());
        for e in data.chunks_exact_mut(8) {
            let raw = u64::from_be_bytes((&*e).try_into().expect("eight bytes"));
            if raw == 0 {
                continue;
            }
            let judged = scan.judge.l2(raw);
            let mut value = judged.value;
            if let Some((first, count)) = judged.entry.clusters(geo) {
                for c in first.0..first.0 + count {
                    self.after.add(c, u.weight)?;
                }
                // The flag counts in active tables only.
                if u.active && !matches!(judged.entry, L2Entry::Compressed { .. }) {
                    value = flagged(value, scan.data(first.0) == 1);
                }
            }
            if value != raw {
                changed = true;
                e.copy_from_slice(&value.to_be_bytes());
            }
        }
        let mut place = at;
        if changed {
            let first = self.space.take(scan, 1);
            self.put(first, &data).await?;
            place = first << geo.cluster_bits;
            self.moved.insert(at, place);
        }
        self.after.add(place >> geo.cluster_bits, u.weight)
    }

    /// The entries of an L1 table as they have to be, and whether that is a change.
    async fn l1_entries(&mut self, old: &[u64], active: bool) -> Result<(Vec<u64>, bool)> {
        let mut new = Vec::with_capacity(old.len());
        for raw in old {
            new.push(match self.scan.judge.l1(*raw) {
                L1Judged::Empty => 0,
                L1Judged::Lost(_) => self.zero_table(active).await?,
                L1Judged::Table { host, .. } => {
                    let place = self.moved.get(&host).copied().unwrap_or(host);
                    let flags = raw & !L1_RESERVED & !super::super::entry::OFFSET_MASK;
                    let entry = place | flags;
                    if active { flagged(entry, self.scan.tables[&host].weight == 1) } else { entry }
                }
            });
        }
        let changed = new != old;
        Ok((new, changed))
    }

    /// What an L1 entry that leads to nothing becomes: nothing, or zero clusters where a backing file would show.
    async fn zero_table(&mut self, active: bool) -> Result<u64> {
        let geo = self.scan.geo;
        if self.header.backing_file.is_none() || geo.version < 3 {
            return Ok(0);
        }
        let (at, uses, left) = match self.zeroes {
            Some((at, left)) if left > 0 => (at, 2, left),
            Some(_) | None => {
                let uses = self.zero_tables_left.min(geo.refcount_max()).max(1);
                let first = self.space.take(self.scan, 1);
                let table: Vec<u8> = (0..geo.l2_entries()).flat_map(|_| ZERO.to_be_bytes()).collect();
                self.put(first, &table).await?;
                self.after.add(first, uses)?;
                (first << geo.cluster_bits, uses, uses)
            }
        };
        self.zero_tables_left -= 1;
        self.zeroes = Some((at, left - 1));
        Ok(flagged(at, active && uses == 1))
    }

    async fn active_l1(&mut self) -> Result<()> {
        let scan = self.scan;
        let (at, bytes) = (scan.header.l1_table.0, u64::from(scan.header.l1_entries) * 8);
        let (entries, changed) = self.l1_entries(&scan.l1, true).await?;
        if changed || !scan.judge.in_file(at, bytes) || scan.contested(at, bytes) {
            self.header.l1_table = HostOffset(self.put_table(&entries).await?);
            return Ok(());
        }
        self.keep(at, bytes)
    }

    /// Counts a table that stays where it is.
    fn keep(&mut self, at: u64, bytes: u64) -> Result<()> {
        self.scan.clusters(at, bytes).try_for_each(|c| self.after.add(c, 1))
    }

    async fn snapshots(&mut self) -> Result<()> {
        let scan = self.scan;
        let (at, bytes) = (scan.header.snapshot_table.0, scan.snapshot_bytes);
        let mut changed = scan.snapshots_damaged || scan.contested(at, bytes);
        let mut table = Vec::new();
        for s in &scan.snapshots {
            let entry = self.snapshot(s).await?;
            changed |= entry != s.raw;
            table.extend_from_slice(&entry);
        }
        if !changed {
            return self.keep(at, bytes);
        }
        self.header.snapshots = u32::try_from(scan.snapshots.len()).expect("below the limit");
        self.header.snapshot_table = HostOffset(0);
        if !table.is_empty() {
            table.resize(table.len().next_multiple_of(scan.geo.cluster_len()), 0);
            self.header.snapshot_table = HostOffset(self.put_new(&table).await?);
        }
        Ok(())
    }

    /// The table entry of a snapshot, whose L1 table is moved if it must.
    async fn snapshot(&mut self, s: &Snap) -> Result<Vec<u8>> {
        let scan = self.scan;
        let (at, bytes) = (s.entry.l1_table.0, u64::from(s.entry.l1_entries) * 8);
        let mut raw = s.raw.clone();
        if !snapshot::is_complete(&raw, scan.geo) {
            raw = snapshot::complete(&raw, &s.entry, scan.header.size);
        }
        let old = read_table(scan.io, at, s.entry.l1_entries as usize).await?;
        let (mut entries, changed) = self.l1_entries(&old, false).await?;
        let needed = (s.l1_needed as usize).min((MAX_L1_BYTES / 8) as usize);
        if changed || needed > entries.len() || scan.contested(at, bytes) {
            entries.resize(needed.max(entries.len()), 0);
            let place = self.put_table(&entries).await?;
            let n = u32::try_from(entries.len()).expect("below the limit");
            snapshot::move_l1(&mut raw, HostOffset(place), n);
        } else {
            self.keep(at, bytes)?;
        }
        Ok(raw)
    }

    /// Counts what the new state does not use as used all the same: whatever was counted before, and everything where
    /// that is not known. The old places of tables are among it: what a damaged entry calls a table may be data.
    fn keep_leaks(&mut self) -> Result<()> {
        let scan = self.scan;
        let file = scan.judge.file_clusters;
        let counted: BTreeSet<u64> = scan.blocks.values().copied().collect();
        let per_block = scan.geo.refblock_entries();
        for (c, n) in scan.actual.nonzero() {
            if c < file && self.after.get(c) == 0 && !scan.unknown.contains(&(c / per_block)) {
                self.after.add(c, n)?;
            }
        }
        for b in 0..file.div_ceil(per_block) {
            let known = counted.contains(&b) && !scan.unknown.contains(&b);
            if known || (!scan.unknown.contains(&b) && !scan.expected.any(b * per_block, per_block)) {
                continue;
            }
            for c in (b * per_block..(b + 1) * per_block).take_while(|c| *c < file) {
                if self.after.get(c) == 0 {
                    self.after.add(c, 1)?;
                }
            }
        }
        Ok(())
    }

    /// Writes new refcounts.
    async fn refcounts(&mut self) -> Result<()> {
        let geo = self.scan.geo;
        let per_block = geo.refblock_entries();
        let per_cluster = geo.cluster_size() / 8;
        let mut missing: BTreeSet<u64> = self.after.nonzero().map(|(c, _)| c / per_block).collect();
        // No cluster that is taken below lies behind this many, so the table is long enough.
        // Each cluster that is avoided costs at most a run in front of it.
        let avoided = self.scan.named_behind.len() as u64;
        let mut table = 1;
        loop {
            let start = self.space.next.max(self.space.used) + avoided;
            let end = start + (1 + avoided) * table + missing.len() as u64 + 1;
            let end = end + end.div_ceil(per_block);
            let last = missing.last().copied().unwrap_or(0).max(end / per_block);
            let want = (last + 1).div_ceil(per_cluster);
            if want <= table {
                break;
            }
            table = want;
        }
        if table * geo.cluster_size() > MAX_REFTABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the new refcount table would be too large"));
        }
        let table_at = self.space.take(self.scan, table);
        for c in table_at..table_at + table {
            self.after.add(c, 1)?;
            missing.insert(c / per_block);
        }
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        while let Some(b) = missing.pop_first() {
            let at = self.space.take(self.scan, 1);
            self.after.add(at, 1)?;
            blocks.insert(b, at);
            if !blocks.contains_key(&(at / per_block)) {
                missing.insert(at / per_block);
            }
        }
        self.check_counts()?;
        let mut entries = vec![0u8; (table << geo.cluster_bits) as usize];
        let mut data = vec![0u8; geo.cluster_len()];
        for (b, at) in &blocks {
            put64(&mut entries, *b as usize * 8, at << geo.cluster_bits);
            for j in 0..per_block {
                refcount_set(&mut data, geo.refcount_order, j as usize, self.after.get(b * per_block + j));
            }
            self.put(*at, &data).await?;
        }
        self.put(table_at, &entries).await?;
        self.header.reftable = geo.host_of(ClusterIndex(table_at));
        self.header.reftable_clusters = u32::try_from(table).expect("below the limit");
        Ok(())
    }

    fn check_counts(&self) -> Result<()> {
        let max = self.scan.geo.refcount_max().min(u64::from(u32::MAX) - 1);
        match self.after.nonzero().find(|(_, n)| *n > max) {
            None => Ok(()),
            Some((c, n)) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("cluster {c} is referred to {n} times, and refcounts of this image end at {max}"),
            )
            .remedy("nothing was changed: copy the guest's data to a new image")),
        }
    }
}
