//! What single mapping entries are worth: pure decisions that the scan reports and the repair carries out.

use super::super::entry::{
    COMPRESSED, COPIED, L1_RESERVED, L1Entry, L2_RESERVED, L2Entry, OFFSET_MASK, ZERO,
};
use super::super::layout::{Geometry, HostOffset};

/// The numbers that entries are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    /// Geometry of the image.
    pub geo: Geometry,
    /// Clusters of the file, the last one perhaps only in part.
    pub file_clusters: u64,
}

/// An L1 entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum L1Judged {
    /// No table.
    Empty,
    /// A table that can be read.
    Table {
        /// Where.
        host: u64,
        /// Bits are set that must not be.
        reserved: bool,
    },
    /// It names a table that can't be found any more, for this reason.
    Lost(&'static str),
}

/// An L2 entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct L2Judged {
    /// What it refers to, once it is repaired.
    pub entry: L2Entry,
    /// The repaired entry; the copied flag of data is the caller's business.
    pub value: u64,
    /// What is wrong with it.
    pub problem: Option<&'static str>,
    /// The data that it named can't be found any more.
    pub lost: bool,
}

impl Judge {
    /// Whether a range lies in the file. The file may end within the last cluster, and data may reach into the next
    /// one by less than a cluster.
    pub(super) fn in_file(self, at: u64, bytes: u64) -> bool {
        if bytes == 0 {
            return true;
        }
        let first = at >> self.geo.cluster_bits;
        let last = (at + bytes - 1) >> self.geo.cluster_bits;
        last < self.file_clusters || (last == self.file_clusters && first < last)
    }

    /// An L1 entry.
    pub(super) fn l1(self, raw: u64) -> L1Judged {
        if raw == 0 {
            return L1Judged::Empty;
        }
        match L1Entry(raw).table(self.geo) {
            Ok(Some(host)) if self.in_file(host.0, self.geo.cluster_size()) => {
                L1Judged::Table { host: host.0, reserved: raw & L1_RESERVED != 0 }
            }
            Ok(Some(_)) => L1Judged::Lost("its L2 table lies beyond the end of the file"),
            Ok(None) => L1Judged::Lost("it has flags and no offset"),
            Err(_) => L1Judged::Lost("its offset is not a multiple of the cluster size"),
        }
    }

    /// An L2 entry.
    pub(super) fn l2(self, raw: u64) -> L2Judged {
        if raw == 0 {
            return L2Judged { entry: L2Entry::Unallocated, value: 0, problem: None, lost: false };
        }
        let entry = match L2Entry::decode(raw, self.geo) {
            Ok(e) => e,
            // What the kept cluster of a zero cluster holds is nobody's data.
            Err(_) if self.geo.version >= 3 && raw & COMPRESSED == 0 && raw & ZERO != 0 => {
                return self.zeroes("a zero cluster keeps a host cluster at an impossible offset", false);
            }
            Err(_) => return self.zeroes("it has no possible offset", true),
        };
        match entry {
            L2Entry::Compressed { host, len } => self.compressed(raw, entry, host, len),
            L2Entry::Unallocated => self.zeroes("it has flags and no offset", true),
            L2Entry::Data { host, .. } if !self.in_file(host.0, self.geo.cluster_size()) => {
                self.zeroes("its data lie beyond the end of the file", true)
            }
            L2Entry::Zero { kept: Some((host, _)) } if !self.in_file(host.0, self.geo.cluster_size()) => {
                self.zeroes("a zero cluster keeps a host cluster beyond the end of the file", false)
            }
            L2Entry::Data { .. } | L2Entry::Zero { .. } => L2Judged {
                entry,
                value: raw & !L2_RESERVED,
                problem: (raw & L2_RESERVED != 0).then_some("it has reserved bits set"),
                lost: false,
            },
        }
    }

    /// The host offset in an L2 entry, whatever it is worth.
    pub(super) fn named(self, raw: u64) -> u64 {
        match raw & COMPRESSED {
            0 => raw & OFFSET_MASK,
            _ => raw & ((1 << (62 - (self.geo.cluster_bits - 8))) - 1),
        }
    }

    fn compressed(self, raw: u64, entry: L2Entry, host: HostOffset, len: u64) -> L2Judged {
        if self.geo.cluster_of(host).0 == 0 {
            // The header can't move out of the way of data, as everything else can.
            return self.zeroes("its compressed data lie in the header", true);
        }
        if !self.in_file(host.0, len) {
            return self.zeroes("its compressed data lie beyond the end of the file", true);
        }
        let problem = (raw & COPIED != 0).then_some("a compressed cluster has the copied flag");
        L2Judged { entry, value: raw & !COPIED, problem, lost: false }
    }

    /// A damaged entry becomes a zero cluster: the backing file's data must not show up. Version 2 has none.
    fn zeroes(self, problem: &'static str, lost: bool) -> L2Judged {
        let (entry, value) = match self.geo.version {
            3.. => (L2Entry::Zero { kept: None }, ZERO),
            _ => (L2Entry::Unallocated, 0),
        };
        L2Judged { entry, value, problem: Some(problem), lost }
    }
}

/// An entry with the copied flag as it has to be.
pub(super) fn flagged(raw: u64, copied: bool) -> u64 {
    if copied { raw | COPIED } else { raw & !COPIED }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUDGE: Judge =
        Judge { geo: Geometry { version: 3, cluster_bits: 16, refcount_order: 4 }, file_clusters: 10 };

    #[test]
    fn ranges() {
        assert!(JUDGE.in_file(9 << 16, 1 << 16));
        assert!(!JUDGE.in_file(10 << 16, 1 << 16) && !JUDGE.in_file(10 << 16, 1));
        assert!(JUDGE.in_file((10 << 16) - 512, 1024), "compressed data may reach beyond the last cluster");
        assert!(!JUDGE.in_file((10 << 16) - 512, 2 << 16));
    }

    #[test]
    fn reserved_bits_do_not_hide_what_an_entry_refers_to() {
        let j = JUDGE.l2(COPIED | 1 << 60 | 5 << 16);
        assert_eq!((j.entry.clusters(JUDGE.geo).map(|c| c.0.0), j.lost), (Some(5), false));
        assert_eq!((j.value, j.problem.is_some()), (COPIED | 5 << 16, true));
        assert_eq!(JUDGE.l1(COPIED | 1 << 60 | 5 << 16), L1Judged::Table { host: 5 << 16, reserved: true });
    }

    #[test]
    fn only_data_are_lost() {
        assert!(!JUDGE.l2(ZERO | 0x50200).lost && !JUDGE.l2(ZERO | 77 << 16).lost);
        assert!(JUDGE.l2(0x50200).lost && JUDGE.l2(77 << 16).lost && JUDGE.l2(COPIED).lost);
        assert!(JUDGE.l2(COMPRESSED | 0x300).lost, "in the header");
        assert_eq!(JUDGE.l2(COPIED | COMPRESSED | 0x50300).value, COMPRESSED | 0x50300);
    }
}
