//! Checking an image and repairing it.
//!
//! The references that the metadata hold are counted, then compared with the refcounts. Memory is bounded: counts
//! live in a sparse map of pages, so it grows with the metadata that there really are and not with the offsets that
//! they name, and there is a budget. Every L2 table is read once, however many L1 tables share it.
//!
//! A repair never gives back what a damaged entry may have referred to: as long as there are such entries, leaks stay.
//!
//! Repairing leaks lowers refcounts in place. Repairing anything else builds new refcounts behind the end of the
//! image and switches to them with one write of the header, so a crash in the middle leaves the old state.

use std::collections::BTreeMap;

use dolmen_graph::{Io, Prealloc, Read, Resize, Write};
use dolmen_types::{Error, ErrorKind, Result, WriteFlags};

use super::entry::{
    COMPRESSED, COPIED, L1_RESERVED, L1Entry, L2_RESERVED, L2Entry, REFTABLE_RESERVED, ZERO, refcount_get,
    refcount_set,
};
use super::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::image::{
    load_bitmaps, load_header, load_l1, load_reftable, load_snapshots, read_bytes, read_table,
};
use super::layout::{ClusterIndex, Geometry, HostOffset, MAX_L1_BYTES, MAX_REFTABLE_BYTES, put64};

/// Counts per page of the sparse map.
const PAGE: u64 = 1024;
/// Pages of one map: 512 MiB, enough for 2^27 clusters in use (8 TiB of 64 KiB clusters).
const MAX_PAGES: usize = 1 << 17;
/// Bytes of L1 tables of all snapshots together.
const MAX_ALL_L1_BYTES: u64 = 4 << 30;
/// Problems that are described one by one; the rest is only counted.
const MAX_MESSAGES: usize = 200;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Only clusters that are counted but not used.
    Leaks,
    /// Everything that can be.
    All,
}

/// The result of a check, with the fields that users of image tools know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Errors in the metadata that were found and are still there.
    pub corruptions: u64,
    /// Clusters that are counted but not used, and still are.
    pub leaks: u64,
    /// Parts that could not be checked.
    pub check_errors: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
    /// Guest clusters.
    pub total_clusters: u64,
    /// Guest clusters with data.
    pub allocated_clusters: u64,
    /// Guest clusters whose data do not follow those of the one before.
    pub fragmented_clusters: u64,
    /// Guest clusters with compressed data.
    pub compressed_clusters: u64,
    /// The problems, in words; at most a few hundred.
    pub messages: Vec<String>,
}

impl CheckResult {
    fn corruption(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(format!("ERROR {}", message()));
        }
    }
}

/// Counts of clusters; those that were never touched are 0.
#[derive(Default)]
struct Counts(BTreeMap<u64, Box<[u32]>>);

impl Counts {
    fn add(&mut self, c: u64, n: u64) -> Result<()> {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        if n == 0 {
            return Ok(());
        }
        if self.0.len() == MAX_PAGES && !self.0.contains_key(&(c / PAGE)) {
            return Err(Error::new(ErrorKind::Limit, "the image has too many clusters in use to be checked"));
        }
        let page = self.0.entry(c / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
        let slot = &mut page[(c % PAGE) as usize];
        *slot = slot.saturating_add(n);
        Ok(())
    }

    fn get(&self, c: u64) -> u64 {
        self.0.get(&(c / PAGE)).map_or(0, |p| u64::from(p[(c % PAGE) as usize]))
    }

    fn nonzero(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().flat_map(|(page, counts)| {
            counts
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(move |(i, n)| (page * PAGE + i as u64, u64::from(*n)))
        })
    }

    fn last(&self) -> Option<u64> {
        self.0
            .iter()
            .rev()
            .find_map(|(page, counts)| counts.iter().rposition(|n| *n > 0).map(|i| page * PAGE + i as u64))
    }
}

/// How often an L2 table is referred to, and from where.
#[derive(Clone, Copy, Default)]
struct Use {
    weight: u64,
    active: Option<usize>,
}

struct Checker<'a> {
    io: Io<'a, Read>,
    geo: Geometry,
    header: Header,
    file_clusters: u64,
    result: CheckResult,
    /// What the metadata refer to, without the refcount structures.
    expected: Counts,
    /// The refcount structures.
    structures: Counts,
    actual: Counts,
    l1: Vec<u64>,
    tables: BTreeMap<u64, Use>,
    /// Refcount structures that are damaged.
    rebuild: bool,
    /// L1 and L2 entries that have to be changed: file offset and new value.
    fixes: Vec<(u64, u64)>,
    /// Entries that refer to something that can't be found any more. What they used to refer to may be among
    /// the leaks, so while there are such entries no leak is given back: somebody may still want to salvage it.
    lost: u64,
}

/// Counts of guest clusters on the way through the active tables.
#[derive(Default)]
struct Walk {
    next: Option<u64>,
}

impl<'a> Checker<'a> {
    async fn new(io: Io<'a, Read>) -> Result<Checker<'a>> {
        let (header, _) = load_header(io).await?;
        header.check_supported()?;
        let geo = header.geometry();
        let l1 = load_l1(io, &header).await?;
        Ok(Checker {
            io,
            geo,
            file_clusters: geo.clusters_for(io.size()),
            result: CheckResult { total_clusters: geo.clusters_for(header.size), ..CheckResult::default() },
            header,
            expected: Counts::default(),
            structures: Counts::default(),
            actual: Counts::default(),
            l1,
            tables: BTreeMap::new(),
            rebuild: false,
            fixes: Vec::new(),
            lost: 0,
        })
    }

    async fn run(&mut self) -> Result<()> {
        self.read_refcounts().await?;
        let geo = self.geo;
        let h = self.header.clone();
        self.refer(0, geo.cluster_size(), 1, "header")?;
        self.refer(h.l1_table.0, u64::from(h.l1_entries) * 8, 1, "active L1 table")?;
        let (l1_at, l1) = (h.l1_table.0, std::mem::take(&mut self.l1));
        self.collect_tables(&l1, Some(l1_at))?;
        let mut l1_bytes = l1.len() as u64 * 8;
        let (snapshots, table_bytes) = load_snapshots(self.io, &h).await?;
        self.refer(h.snapshot_table.0, table_bytes, 1, "snapshot table")?;
        for s in &snapshots {
            let bytes = u64::from(s.l1_entries) * 8;
            l1_bytes += bytes;
            if l1_bytes > MAX_ALL_L1_BYTES {
                return Err(Error::new(ErrorKind::Limit, "the L1 tables of all snapshots are too large"));
            }
            self.refer(s.l1_table.0, bytes, 1, "snapshot L1 table")?;
            if bytes > MAX_L1_BYTES {
                continue;
            }
            let table = read_table(self.io, s.l1_table.0, s.l1_entries as usize).await?;
            self.collect_tables(&table, None)?;
        }
        self.check_tables(&l1).await?;
        self.check_bitmaps().await?;
        self.check_copied_l1(&l1, l1_at);
        self.l1 = l1;
        self.compare();
        Ok(())
    }

    /// Counts a reference to a range. Ranges that exceed the file by a cluster or more are damage and count
    /// nothing.
    fn refer(&mut self, at: u64, bytes: u64, weight: u64, what: &str) -> Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        let first = at >> self.geo.cluster_bits;
        let last = (at + bytes - 1) >> self.geo.cluster_bits;
        if last > self.file_clusters || (last == self.file_clusters && first == last && bytes > 0) {
            self.result.corruption(|| format!("{what} at {at:#x} lies beyond the end of the file"));
            return Ok(false);
        }
        for c in first..=last {
            self.expected.add(c, weight)?;
        }
        Ok(true)
    }

    async fn read_refcounts(&mut self) -> Result<()> {
        let geo = self.geo;
        let h = &self.header;
        let table = load_reftable(self.io, h).await?;
        let first = geo.cluster_of(h.reftable).0;
        let clusters = u64::from(h.reftable_clusters);
        if first + clusters > self.file_clusters {
            self.result.corruption(|| "refcount table lies beyond the end of the file".into());
            self.rebuild = true;
        }
        for c in first..(first + clusters).min(self.file_clusters) {
            self.structures.add(c, 1)?;
        }
        let mut block = vec![0u8; geo.cluster_len()];
        for (i, entry) in table.iter().enumerate() {
            let host = entry & !REFTABLE_RESERVED;
            if *entry == 0 {
                continue;
            }
            let c = host >> geo.cluster_bits;
            if geo.in_cluster(host) != 0 || entry & REFTABLE_RESERVED != 0 || c >= self.file_clusters {
                self.result.corruption(|| format!("refcount block {i} has the bad offset {entry:#x}"));
                self.rebuild = true;
                continue;
            }
            if self.structures.get(c) > 0 {
                self.result.corruption(|| format!("refcount block {i} is used twice"));
                self.rebuild = true;
                continue;
            }
            self.structures.add(c, 1)?;
            read_bytes(self.io, host, &mut block).await?;
            let base = i as u64 * geo.refblock_entries();
            for j in 0..geo.refblock_entries() {
                self.actual.add(base + j, refcount_get(&block, geo.refcount_order, j as usize))?;
            }
        }
        Ok(())
    }

    fn collect_tables(&mut self, l1: &[u64], active_at: Option<u64>) -> Result<()> {
        for (i, raw) in l1.iter().enumerate() {
            let table = match L1Entry(*raw).table(self.geo) {
                Ok(None) if *raw == 0 => continue,
                Ok(Some(h)) => h,
                Ok(None) | Err(_) => {
                    self.result.corruption(|| format!("L1 entry {i} has no possible offset: {raw:#x}"));
                    self.lost += 1;
                    self.fixes.extend(active_at.map(|at| (at + i as u64 * 8, 0)));
                    continue;
                }
            };
            if raw & L1_RESERVED != 0 {
                self.result.corruption(|| format!("L1 entry {i} has reserved bits set: {raw:#x}"));
                self.fixes.extend(active_at.map(|at| (at + i as u64 * 8, raw & !L1_RESERVED)));
            }
            if !self.refer(table.0, self.geo.cluster_size(), 1, "L2 table")? {
                self.lost += 1;
                self.fixes.extend(active_at.map(|at| (at + i as u64 * 8, 0)));
                continue;
            }
            let known = self.tables.entry(table.0).or_default();
            known.weight += 1;
            if active_at.is_some() {
                if known.active.is_some() {
                    self.result
                        .corruption(|| format!("L2 table at {table} is used twice by the active L1 table"));
                }
                known.active = Some(i);
            }
        }
        Ok(())
    }

    async fn check_tables(&mut self, l1: &[u64]) -> Result<()> {
        let mut walk = Walk::default();
        let mut data = vec![0u8; self.geo.cluster_len()];
        // The active tables in guest order, for the statistics; then those that only snapshots have.
        for raw in l1 {
            let Ok(Some(host)) = L1Entry(*raw).table(self.geo) else { continue };
            if let Some(u) = self.tables.remove(&host.0) {
                read_bytes(self.io, host.0, &mut data).await?;
                self.check_table(host, &data, u, Some(&mut walk))?;
            }
        }
        for (at, u) in std::mem::take(&mut self.tables) {
            read_bytes(self.io, at, &mut data).await?;
            self.check_table(HostOffset(at), &data, u, None)?;
        }
        Ok(())
    }

    fn check_table(
        &mut self,
        table: HostOffset,
        data: &[u8],
        u: Use,
        mut walk: Option<&mut Walk>,
    ) -> Result<()> {
        let geo = self.geo;
        for (i, raw) in data.chunks_exact(8).enumerate() {
            let raw = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
            if raw == 0 {
                continue;
            }
            let at = table.0 + i as u64 * 8;
            // A damaged entry becomes a zero cluster: its data are lost, and the backing file's must not show up.
            let lost = if geo.version >= 3 { ZERO } else { 0 };
            let entry = match L2Entry::decode(raw, geo) {
                Ok(e) => e,
                Err(bad) => {
                    self.result.corruption(|| format!("L2 entry at {at:#x} is bad: {bad:?}"));
                    self.lost += 1;
                    self.fixes.push((at, lost));
                    continue;
                }
            };
            if raw & COMPRESSED == 0 && raw & L2_RESERVED != 0 {
                self.result.corruption(|| format!("L2 entry at {at:#x} has reserved bits set: {raw:#x}"));
                self.fixes.push((at, raw & !L2_RESERVED));
                continue;
            }
            if entry == L2Entry::Unallocated {
                self.result.corruption(|| format!("L2 entry at {at:#x} has flags and no offset: {raw:#x}"));
                self.lost += 1;
                self.fixes.push((at, lost));
                continue;
            }
            let Some((first, count)) = entry.clusters(geo) else { continue };
            let bytes = match entry {
                L2Entry::Compressed { len, .. } => len,
                _ => geo.cluster_size(),
            };
            let start = match entry {
                L2Entry::Compressed { host, .. } => host.0,
                _ => first.0 << geo.cluster_bits,
            };
            if !self.refer(start, bytes, u.weight, "data cluster")? {
                self.lost += 1;
                self.fixes.push((at, lost));
                continue;
            }
            debug_assert!(count > 0);
            let copied = match entry {
                L2Entry::Data { copied, .. } | L2Entry::Zero { kept: Some((_, copied)) } => copied,
                _ => {
                    if raw & COPIED != 0 {
                        self.result
                            .corruption(|| format!("compressed L2 entry at {at:#x} has the copied flag"));
                        self.fixes.push((at, raw & !COPIED));
                    }
                    false
                }
            };
            if let Some(walk) = walk.as_deref_mut() {
                self.count(walk, entry);
                let refcount = self.actual.get(first.0);
                if !matches!(entry, L2Entry::Compressed { .. }) && copied != (refcount == 1) {
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
        let Some(ext) = self.header.bitmaps()? else { return Ok(()) };
        self.refer(ext.directory.0, ext.directory_bytes, 1, "bitmap directory")?;
        let header = self.header.clone();
        let list = match load_bitmaps(self.io, &header).await {
            Ok(list) => list,
            Err(e) => {
                self.result.corruption(|| format!("bitmap directory: {e}"));
                return Ok(());
            }
        };
        for b in list {
            self.refer(b.table.0, u64::from(b.table_entries) * 8, 1, "bitmap table")?;
            for raw in read_table(self.io, b.table.0, b.table_entries as usize).await? {
                let host = raw & super::entry::OFFSET_MASK;
                if host != 0 {
                    self.refer(host, self.geo.cluster_size(), 1, "bitmap data")?;
                }
            }
        }
        Ok(())
    }

    fn check_copied_l1(&mut self, l1: &[u64], _at: u64) {
        for (i, raw) in l1.iter().enumerate() {
            let Ok(Some(host)) = L1Entry(*raw).table(self.geo) else { continue };
            let refcount = self.actual.get(self.geo.cluster_of(host).0);
            if L1Entry(*raw).copied() != (refcount == 1) {
                self.result.corruption(|| {
                    format!("OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={raw:x} refcount={refcount}")
                });
            }
        }
    }

    fn wanted(&self, c: u64) -> u64 {
        self.expected.get(c) + self.structures.get(c)
    }

    fn compare(&mut self) {
        let mut wrong: Vec<(u64, u64, u64)> = Vec::new();
        let mut more = 0u64;
        let mut note = |c: u64, have: u64, want: u64, r: &mut CheckResult| {
            if wrong.len() < MAX_MESSAGES {
                wrong.push((c, have, want));
            } else {
                more += 1;
            }
            if have > want { r.leaks += 1 } else { r.corruptions += 1 }
        };
        let mut result = std::mem::take(&mut self.result);
        let mut counted_low = false;
        for (c, have) in self.actual.nonzero() {
            let want = self.wanted(c);
            // A count past the end of the file keeps no space from anybody: a crash can
            // leave one behind when the file had not grown yet.
            let of_nothing = want == 0 && c >= self.file_clusters;
            if have != want && !of_nothing {
                note(c, have, want, &mut result);
                counted_low |= have < want;
            }
        }
        for counts in [&self.expected, &self.structures] {
            for (c, _) in counts.nonzero() {
                let second = std::ptr::eq(counts, &self.structures) && self.expected.get(c) > 0;
                if self.actual.get(c) == 0 && !second {
                    note(c, 0, self.wanted(c), &mut result);
                    counted_low = true;
                }
            }
        }
        for (c, have, want) in wrong {
            let text = format!("cluster {c} refcount={have} reference={want}");
            if result.messages.len() < MAX_MESSAGES {
                result.messages.push(if have > want {
                    format!("Leaked {text}")
                } else {
                    format!("ERROR {text}")
                });
            }
        }
        let counted = self.actual.nonzero().map(|(c, _)| c).filter(|c| *c < self.file_clusters).max();
        let last = [counted, self.expected.last(), self.structures.last()].into_iter().flatten().max();
        result.image_end_offset = last.map_or(0, |c| (c + 1) << self.geo.cluster_bits);
        self.result = result;
        self.rebuild |= counted_low;
    }

    /// Lowers refcounts in place where they are too high.
    async fn lower_refcounts(&self, write: Io<'_, Write>) -> Result<()> {
        let geo = self.geo;
        let table = load_reftable(self.io, &self.header).await?;
        let mut block = vec![0u8; geo.cluster_len()];
        for (i, entry) in table.iter().enumerate() {
            let host = entry & !REFTABLE_RESERVED;
            if host == 0 || geo.in_cluster(host) != 0 {
                continue;
            }
            let base = i as u64 * geo.refblock_entries();
            let wrong = |j: u64| self.actual.get(base + j) > self.wanted(base + j);
            if !(0..geo.refblock_entries()).any(wrong) {
                continue;
            }
            read_bytes(self.io, host, &mut block).await?;
            for j in (0..geo.refblock_entries()).filter(|j| wrong(*j)) {
                refcount_set(&mut block, geo.refcount_order, j as usize, self.wanted(base + j));
            }
            write.write_bytes(host, &block, WriteFlags::NONE).await?;
        }
        write.flush().await
    }

    /// Counts what nothing refers to as used all the same.
    fn keep_leaks(&mut self) -> Result<()> {
        let leaks: Vec<(u64, u64)> =
            self.actual.nonzero().filter(|(c, _)| *c < self.file_clusters && self.wanted(*c) == 0).collect();
        leaks.into_iter().try_for_each(|(c, n)| self.expected.add(c, n))
    }

    /// Writes new refcounts behind everything that is in use and switches to them.
    async fn rebuild(&mut self, write: Io<'_, Write>, resize: Io<'_, Resize>) -> Result<()> {
        let geo = self.geo;
        let used = self.expected.last().map_or(1, |c| c + 1).max(self.file_clusters);
        let per_block = geo.refblock_entries();
        // Blocks for what is in use, and for the new structures themselves.
        let mut blocks: std::collections::BTreeSet<u64> =
            self.expected.nonzero().map(|(c, _)| c / per_block).collect();
        let table_clusters = |last_block: u64| ((last_block + 1) * 8).div_ceil(geo.cluster_size());
        let mut table;
        loop {
            let last = blocks.last().copied().unwrap_or(0).max(used / per_block);
            table = table_clusters(last);
            let end = used + table + blocks.len() as u64;
            let before = blocks.len();
            blocks.extend(used / per_block..=(end - 1) / per_block);
            if blocks.len() == before && table_clusters(*blocks.last().expect("not empty")) == table {
                break;
            }
        }
        if table * geo.cluster_size() > MAX_REFTABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the new refcount table would be too large"));
        }
        let table_at = used;
        let first_block = used + table;
        let end = first_block + blocks.len() as u64;
        for c in used..end {
            self.expected.add(c, 1)?;
        }
        if resize.size() < end << geo.cluster_bits {
            resize.resize(end << geo.cluster_bits, Prealloc::Off).await?;
        }
        let mut entries = vec![0u8; (table << geo.cluster_bits) as usize];
        for (i, b) in blocks.iter().enumerate() {
            let at = (first_block + i as u64) << geo.cluster_bits;
            put64(&mut entries, *b as usize * 8, at);
            let mut data = vec![0u8; geo.cluster_len()];
            for j in 0..per_block {
                let n = self.expected.get(b * per_block + j);
                if n > geo.refcount_max() {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("cluster {} needs the refcount {n}, which does not fit", b * per_block + j),
                    ));
                }
                refcount_set(&mut data, geo.refcount_order, j as usize, n);
            }
            write.write_bytes(at, &data, WriteFlags::NONE).await?;
        }
        write.write_bytes(table_at << geo.cluster_bits, &entries, WriteFlags::NONE).await?;
        write.flush().await?;
        self.header.reftable = geo.host_of(ClusterIndex(table_at));
        self.header.reftable_clusters = u32::try_from(table).expect("below the limit");
        write_header_fields(self.io, write, &self.header).await
    }

    /// Repairs entries: the damaged ones, and the copied flags, which follow from the refcounts.
    async fn repair_entries(&self, write: Io<'_, Write>) -> Result<()> {
        let geo = self.geo;
        for (at, value) in &self.fixes {
            write.write_bytes(*at, &value.to_be_bytes(), WriteFlags::NONE).await?;
        }
        write.flush().await?;
        let l1 = load_l1(self.io, &self.header).await?;
        let mut data = vec![0u8; geo.cluster_len()];
        for (i, raw) in l1.iter().enumerate() {
            let Ok(Some(host)) = L1Entry(*raw).table(geo) else { continue };
            let right = flagged(*raw, self.expected.get(geo.cluster_of(host).0) == 1);
            if right != *raw {
                let at = self.header.l1_table.0 + i as u64 * 8;
                write.write_bytes(at, &right.to_be_bytes(), WriteFlags::NONE).await?;
            }
            read_bytes(self.io, host.0, &mut data).await?;
            let mut changed = false;
            for e in data.chunks_exact_mut(8) {
                let raw = u64::from_be_bytes((&*e).try_into().expect("eight bytes"));
                let right = match L2Entry::decode(raw, geo) {
                    Ok(L2Entry::Data { host, .. } | L2Entry::Zero { kept: Some((host, _)) }) => {
                        flagged(raw, self.expected.get(geo.cluster_of(host).0) == 1)
                    }
                    Ok(L2Entry::Compressed { .. }) => flagged(raw, false),
                    Ok(L2Entry::Unallocated | L2Entry::Zero { kept: None }) | Err(_) => raw,
                };
                changed |= right != raw;
                e.copy_from_slice(&right.to_be_bytes());
            }
            if changed {
                write.write_bytes(host.0, &data, WriteFlags::NONE).await?;
            }
        }
        write.flush().await
    }
}

fn flagged(raw: u64, copied: bool) -> u64 {
    if copied { raw | COPIED } else { raw & !COPIED }
}

async fn write_header_fields(io: Io<'_, Read>, write: Io<'_, Write>, h: &Header) -> Result<()> {
    let mut sector = [0u8; 512];
    read_bytes(io, 0, &mut sector).await?;
    h.patch(&mut sector);
    write.write_bytes(0, &sector, WriteFlags::NONE).await?;
    write.flush().await
}

/// Checks an image. Nobody may be writing it.
///
/// # Errors
/// `InvalidInput` when it is not a qcow2 image, `Limit` when it is too large to be checked, or what reading says.
/// Damage is no error but a result.
pub async fn check(read: Io<'_, Read>) -> Result<CheckResult> {
    let mut c = Checker::new(read).await?;
    c.run().await?;
    Ok(c.result)
}

/// Checks an image and repairs what is asked for. Nobody else may be using it.
///
/// # Errors
/// As [`check`], and what writing says; the image is then in one of the states between.
pub async fn check_and_repair(
    read: Io<'_, Read>,
    write: Io<'_, Write>,
    resize: Io<'_, Resize>,
    repair: Repair,
) -> Result<CheckResult> {
    let mut c = Checker::new(read).await?;
    c.run().await?;
    let before = c.result.clone();
    let unclean = c.header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT) != 0;
    if before.corruptions == 0 && before.leaks == 0 && !unclean {
        return Ok(before);
    }
    match repair {
        Repair::Leaks if c.lost > 0 => {}
        Repair::Leaks => c.lower_refcounts(write).await?,
        Repair::All => {
            if c.lost > 0 {
                c.keep_leaks()?;
            }
            if c.rebuild {
                c.rebuild(write, resize).await?;
            } else {
                // Without the structures: only what data refer to decides about the copied flags.
                c.lower_refcounts(write).await?;
            }
            c.repair_entries(write).await?;
            // Entries that were taken away leave leaks behind.
            let mut again = Checker::new(read).await?;
            again.run().await?;
            if again.result.leaks > 0 && c.lost == 0 {
                again.lower_refcounts(write).await?;
            }
        }
    }
    let mut after = Checker::new(read).await?;
    after.run().await?;
    if after.result.corruptions == 0 && unclean {
        after.header.incompatible &= !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
        write_header_fields(read, write, &after.header).await?;
    }
    let mut result = after.result;
    result.corruptions_fixed = before.corruptions.saturating_sub(result.corruptions);
    result.leaks_fixed = before.leaks.saturating_sub(result.leaks);
    result.messages = before.messages;
    if c.lost > 0 && result.leaks > 0 {
        result.messages.push(format!(
            "{} leaked clusters are kept: {} entries refer to something that can't be found, and it may be among \
             them. To give them back all the same, repair with 'all', then with 'leaks'",
            result.leaks, c.lost
        ));
    }
    Ok(result)
}
