//! What a reader may see: the judge of a simulated workload.
//!
//! The workload tells the oracle when each request begins and when it completes, and
//! which flushes completed. Every written sector carries a tag that names its write, so
//! that what is read can be traced back.
//!
//! For one sector, a write is *out of date* at some moment when another write to it began
//! after the first had completed, and that second write itself counts: for a live read,
//! when it had completed before the read began; after a crash, when it had completed
//! before the beginning of a flush that completed before the crash (or had FUA and completed).
//! A read may return any write that began before the read ended (or the crash) and is not out of
//! date. Nothing else: this is the whole contract of a disk, for any number of concurrent
//! requests. A discard may bring zeroes, and takes nothing out of date.

use std::fmt;

use dolmen_types::{Result as DolmenResult, Span};

use crate::disk::SECTOR;

/// The tag of a sector of zeroes.
pub const ZERO_TAG: u64 = 0;

/// Sectors that say which write they belong to.
#[derive(Debug)]
pub struct TagPattern;

impl TagPattern {
    /// Fills `out` (whole sectors) as the write `tag` at sector `first` would.
    pub fn fill(tag: u64, first: u64, out: &mut [u8]) {
        for (i, sector) in out.chunks_mut(SECTOR as usize).enumerate() {
            if tag == ZERO_TAG {
                sector.fill(0);
                continue;
            }
            for (word, bytes) in sector.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&Self::word(tag, first + i as u64, word as u64).to_le_bytes());
            }
        }
    }

    /// The tag of one sector, or `None` when it is not a whole sector of one write at
    /// this place.
    pub fn tag(sector: u64, bytes: &[u8]) -> Option<u64> {
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
        let tag = word(0);
        let words = bytes.len() / 8;
        let whole = if tag == ZERO_TAG {
            bytes.iter().all(|b| *b == 0)
        } else {
            (1..words).all(|i| word(i) == Self::word(tag, sector, i as u64))
        };
        whole.then_some(tag)
    }

    const fn word(tag: u64, sector: u64, i: u64) -> u64 {
        if i == 0 { tag } else { (tag << 40) ^ (sector << 8) ^ i ^ 0xd01e_0000_0000_0000 }
    }
}

/// A request that the oracle knows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestOp(usize);

/// The beginning of a live read.
#[derive(Clone, Copy, Debug)]
pub struct ReadMark(u64);

/// A moment: the oracle's own count, and the position in the log of the disk.
#[derive(Clone, Copy, Debug)]
struct Moment {
    count: u64,
    position: usize,
}

#[derive(Debug)]
struct Record {
    tag: u64,
    /// Takes what was there out of date. Discards do not.
    strong: bool,
    fua: bool,
    began: Moment,
    done: Option<Moment>,
}

#[derive(Debug)]
struct Flush {
    began: Moment,
    done: Option<Moment>,
}

/// Something that must not be.
#[derive(Debug)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Violation {}

/// The judge; see the module's head.
#[derive(Debug)]
pub struct Oracle {
    /// Tags of the sectors in the beginning; zeroes past the end.
    initial: Vec<u64>,
    records: Vec<Record>,
    /// For each sector, the records that touch it.
    by_sector: Vec<Vec<usize>>,
    /// Records of size changes; their tag is the size in sectors.
    sizes: Vec<usize>,
    flushes: Vec<Flush>,
    count: u64,
    next_tag: u64,
}

impl Oracle {
    /// A disk whose sectors have these tags in the beginning.
    pub fn new(initial: Vec<u64>) -> Oracle {
        let next_tag = initial.iter().max().copied().unwrap_or(0) + 1;
        Oracle {
            by_sector: vec![Vec::new(); initial.len()],
            initial,
            records: Vec::new(),
            sizes: Vec::new(),
            flushes: Vec::new(),
            count: 0,
            next_tag,
        }
    }

    /// A tag that no write has had.
    pub fn fresh_tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag - 1
    }

    /// A write (or with [`ZERO_TAG`] a zero write) begins. `sectors` counts in sectors;
    /// `position` is the disk's.
    pub fn write(&mut self, sectors: Span, tag: u64, fua: bool, position: usize) -> GuestOp {
        self.begin(sectors, tag, true, fua, position)
    }

    /// A discard begins.
    pub fn discard(&mut self, sectors: Span, position: usize) -> GuestOp {
        self.begin(sectors, ZERO_TAG, false, false, position)
    }

    /// The disk is about to grow to `size` sectors.
    pub fn grow(&mut self, size: u64, position: usize) -> GuestOp {
        let op = self.begin(Span::new(0, 0), size, true, false, position);
        self.sizes.push(op.0);
        let len = usize::try_from(size).expect("a small disk");
        if self.by_sector.len() < len {
            self.by_sector.resize(len, Vec::new());
        }
        op
    }

    /// A request has completed: with success it counts, with an error it may have
    /// happened or not.
    pub fn complete(&mut self, op: GuestOp, result: &DolmenResult<()>, position: usize) {
        if result.is_ok() {
            self.records[op.0].done = Some(self.moment(position));
        }
    }

    /// A flush begins.
    pub fn flush(&mut self, position: usize) -> GuestOp {
        let began = self.moment(position);
        self.flushes.push(Flush { began, done: None });
        GuestOp(self.flushes.len() - 1)
    }

    /// A flush has completed.
    pub fn flushed(&mut self, op: GuestOp, result: &DolmenResult<()>, position: usize) {
        if result.is_ok() {
            self.flushes[op.0].done = Some(self.moment(position));
        }
    }

    /// A live read begins.
    pub fn read(&mut self) -> ReadMark {
        ReadMark(self.moment(0).count)
    }

    /// Judges what a live read has returned, starting at sector `first`.
    ///
    /// # Errors
    /// The first sector that can't be right.
    pub fn check_read(&mut self, mark: ReadMark, first: u64, bytes: &[u8]) -> Result<(), Violation> {
        self.check("a read", first, bytes, |r| r.done.is_some_and(|d| d.count < mark.0), |_| true)
    }

    /// Judges the whole content once everything that completed has to be there.
    ///
    /// # Errors
    /// The first sector that can't be right.
    pub fn check_end(&self, bytes: &[u8]) -> Result<(), Violation> {
        self.check("the end", 0, bytes, |r| r.done.is_some(), |_| true)
    }

    /// Judges a copy of what the disk held at some moment between two marks.
    ///
    /// # Errors
    /// The first sector that can't be right.
    pub fn check_copy(&self, from: ReadMark, to: ReadMark, bytes: &[u8]) -> Result<(), Violation> {
        let before = |r: &Record| r.done.is_some_and(|d| d.count < from.0);
        self.check("a copy", 0, bytes, before, |r| r.began.count < to.0)
    }

    /// Whether a crash at `position` comes after a flush: whether it could lose anything that
    /// it must not.
    pub fn has_flushed(&self, position: usize) -> bool {
        self.flushes.iter().any(|f| f.done.is_some_and(|d| d.position <= position))
    }

    /// Judges the whole content after a crash at `position`.
    ///
    /// # Errors
    /// The first sector that can't be right, or the size.
    pub fn check_crash(&self, position: usize, bytes: &[u8]) -> Result<(), Violation> {
        // What began before the last flush that the crash came after.
        let flushed = self
            .flushes
            .iter()
            .filter(|f| f.done.is_some_and(|d| d.position <= position))
            .map(|f| f.began.count)
            .max();
        let durable = |r: &Record| {
            r.done.is_some_and(|d| {
                d.position <= position && (r.fua || flushed.is_some_and(|flush| d.count < flush))
            })
        };
        let before = |r: &Record| r.began.position <= position;
        let size = bytes.len() as u64 / SECTOR;
        let sizes = self.allowed(self.initial.len() as u64, &self.sizes, &durable, &before);
        if !sizes.contains(&size) {
            return Err(Violation(format!(
                "after a crash at {position} the disk has {size} sectors; allowed: {sizes:?}"
            )));
        }
        self.check(&format!("a crash at {position}"), 0, bytes, durable, before)
    }

    fn begin(&mut self, sectors: Span, tag: u64, strong: bool, fua: bool, position: usize) -> GuestOp {
        let began = self.moment(position);
        let number = self.records.len();
        self.records.push(Record { tag, strong, fua, began, done: None });
        for sector in sectors.offset()..sectors.end() {
            self.by_sector[usize::try_from(sector).expect("a small disk")].push(number);
        }
        GuestOp(number)
    }

    fn moment(&mut self, position: usize) -> Moment {
        self.count += 1;
        Moment { count: self.count, position }
    }

    fn check(
        &self,
        what: &str,
        first: u64,
        bytes: &[u8],
        counts: impl Fn(&Record) -> bool,
        began: impl Fn(&Record) -> bool,
    ) -> Result<(), Violation> {
        for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let number = first + i as u64;
            let at = number as usize;
            let initial = self.initial.get(at).copied().unwrap_or(ZERO_TAG);
            let records = self.by_sector.get(at).map_or(&[][..], Vec::as_slice);
            let found = TagPattern::tag(number, sector);
            if records.is_empty() && found == Some(initial) {
                continue;
            }
            let allowed = self.allowed(initial, records, &counts, &began);
            if found.is_none_or(|tag| !allowed.contains(&tag)) {
                let found = match found {
                    Some(tag) => format!("write {tag}"),
                    None => format!("no whole sector of any write, it begins with {:02x?}", &sector[..16]),
                };
                return Err(Violation(format!(
                    "{what}: sector {number} holds {found}; allowed: {allowed:?} (0 is zeroes)"
                )));
            }
        }
        Ok(())
    }

    /// The tags that a sector may have.
    fn allowed(
        &self,
        initial: u64,
        records: &[usize],
        counts: &impl Fn(&Record) -> bool,
        began: &impl Fn(&Record) -> bool,
    ) -> Vec<u64> {
        let records = records.iter().map(|i| &self.records[*i]);
        // Everything that completed before this began is out of date.
        let latest = records.clone().filter(|r| r.strong && counts(r)).map(|r| r.began.count).max();
        let current = |done: Option<u64>| latest.is_none_or(|l| done.is_none_or(|d| d > l));
        let mut allowed = Vec::new();
        if current(Some(0)) {
            allowed.push(initial);
        }
        allowed.extend(records.filter(|r| began(r) && current(r.done.map(|d| d.count))).map(|r| r.tag));
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(tag: u64, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        TagPattern::fill(tag, number, &mut bytes);
        bytes
    }

    #[test]
    fn torn_and_misplaced_sectors_have_no_tag() {
        let mut bytes = sector(7, 3);
        assert_eq!(TagPattern::tag(3, &bytes), Some(7));
        assert_eq!(TagPattern::tag(4, &bytes), None);
        bytes[300] ^= 1;
        assert_eq!(TagPattern::tag(3, &bytes), None);
        assert_eq!(TagPattern::tag(9, &sector(ZERO_TAG, 9)), Some(ZERO_TAG));
    }

    #[test]
    fn live_reads() {
        let mut o = Oracle::new(vec![1]);
        let a = o.fresh_tag();
        let w = o.write(Span::new(0, 1), a, false, 0);
        let during = o.read();
        o.check_read(during, 0, &sector(1, 0)).unwrap();
        o.check_read(during, 0, &sector(a, 0)).unwrap();
        o.complete(w, &Ok(()), 0);
        let after = o.read();
        o.check_read(after, 0, &sector(a, 0)).unwrap();
        o.check_read(after, 0, &sector(1, 0)).unwrap_err();
        o.check_read(during, 0, &sector(1, 0)).unwrap();
    }

    #[test]
    fn crashes() {
        let mut o = Oracle::new(vec![1]);
        let (a, b) = (o.fresh_tag(), o.fresh_tag());
        let w = o.write(Span::new(0, 1), a, false, 0);
        o.complete(w, &Ok(()), 10);
        for old_or_new in [1, a] {
            o.check_crash(15, &sector(old_or_new, 0)).unwrap();
        }
        let f = o.flush(20);
        let w = o.write(Span::new(0, 1), b, false, 22);
        o.complete(w, &Ok(()), 25);
        o.flushed(f, &Ok(()), 30);
        o.check_crash(29, &sector(1, 0)).unwrap();
        o.check_crash(30, &sector(1, 0)).unwrap_err();
        o.check_crash(30, &sector(a, 0)).unwrap();
        o.check_crash(30, &sector(b, 0)).unwrap();
        let f = o.flush(40);
        o.flushed(f, &Ok(()), 41);
        o.check_crash(41, &sector(a, 0)).unwrap_err();
        o.check_crash(40, &sector(a, 0)).unwrap();
        // Discards bring zeroes, and forbid nothing.
        let d = o.discard(Span::new(0, 1), 50);
        o.complete(d, &Ok(()), 51);
        let f = o.flush(52);
        o.flushed(f, &Ok(()), 53);
        o.check_crash(60, &sector(b, 0)).unwrap();
        o.check_crash(60, &sector(ZERO_TAG, 0)).unwrap();
        o.check_crash(60, &sector(a, 0)).unwrap_err();
    }

    #[test]
    fn sizes_after_a_crash() {
        let mut o = Oracle::new(vec![1]);
        let g = o.grow(2, 5);
        o.complete(g, &Ok(()), 9);
        let two = [sector(1, 0), sector(ZERO_TAG, 1)].concat();
        o.check_crash(4, &two).unwrap_err();
        o.check_crash(10, &two).unwrap();
        o.check_crash(10, &two[..512]).unwrap();
        let f = o.flush(11);
        o.flushed(f, &Ok(()), 12);
        o.check_crash(12, &two[..512]).unwrap_err();
        o.check_crash(12, &[sector(1, 0), sector(1, 1)].concat()).unwrap_err();
    }
}
