//! Entries of the L1, L2 and refcount tables.

use super::layout::{ClusterIndex, Geometry, HostOffset, MAX_HOST_OFFSET};

/// Bit 63 of an L1 or standard L2 entry: the refcount of the cluster is exactly one, so that it may be written
/// in place. Only meaningful in the active tables.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3): the cluster reads as zeroes, whatever the host cluster holds.
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset.
pub(super) const OFFSET_MASK: u64 = (MAX_HOST_OFFSET - 1) & !511;
/// Bits of an L1 entry that must be zero.
pub(super) const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
/// Bits of a standard L2 entry that must be zero (without extended L2 entries).
pub(super) const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);
/// Bits of a refcount table entry that must be zero.
pub(super) const REFTABLE_RESERVED: u64 = 511;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// The host offset is not a multiple of the cluster size.
    Unaligned(HostOffset),
    /// The zero flag in a version 2 image, which does not have it.
    ZeroInVersion2,
    /// Compressed data that start beyond the largest host offset.
    BeyondEnd(HostOffset),
}

/// An L1 table entry (section "L1 table entry"): 0-8 reserved, 9-55 offset of the L2 table (0: all clusters of
/// the table are unallocated), 56-62 reserved, 63 the L2 table has refcount 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// The L2 table; `None` when there is none.
    pub fn table(self, geo: Geometry) -> Result<Option<HostOffset>, BadEntry> {
        let host = HostOffset(self.0 & OFFSET_MASK);
        match host.0 {
            0 => Ok(None),
            o if geo.in_cluster(o) != 0 => Err(BadEntry::Unaligned(host)),
            _ => Ok(Some(host)),
        }
    }

    /// Whether the table may be changed in place.
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// An entry for a table with refcount 1.
    pub const fn own(table: HostOffset) -> L1Entry {
        L1Entry(table.0 | COPIED)
    }
}

/// A decoded L2 table entry (section "L2 table entry").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Read from the backing file, or zeroes where there is none.
    Unallocated,
    /// Reads as zeroes. A host cluster may be kept for later writes.
    Zero {
        /// The kept cluster and whether its refcount is one.
        kept: Option<(HostOffset, bool)>,
    },
    /// Data in a host cluster.
    Data {
        /// Start of the host cluster.
        host: HostOffset,
        /// Whether its refcount is one.
        copied: bool,
    },
    /// Compressed data.
    Compressed {
        /// First byte; not aligned to anything.
        host: HostOffset,
        /// Bytes up to the end of the last sector that the data touch; the stream may end earlier.
        len: u64,
    },
}

impl L2Entry {
    /// Decodes an entry. Reserved bits are ignored, as `check` reports them.
    pub fn decode(raw: u64, geo: Geometry) -> Result<L2Entry, BadEntry> {
        if raw & COMPRESSED != 0 {
            // Compressed clusters descriptor: x = 62 - (cluster_bits - 8); bits 0..x are the host offset,
            // x..61 the number of additional 512-byte sectors.
            let x = 62 - (geo.cluster_bits - 8);
            let host = raw & ((1 << x) - 1);
            if host >= MAX_HOST_OFFSET {
                return Err(BadEntry::BeyondEnd(HostOffset(host)));
            }
            let more = (raw >> x) & ((1 << (geo.cluster_bits - 8)) - 1);
            let len = (more + 1) * 512 - host % 512;
            return Ok(L2Entry::Compressed { host: HostOffset(host), len });
        }
        let host = HostOffset(raw & OFFSET_MASK);
        let copied = raw & COPIED != 0;
        let zero = raw & ZERO != 0;
        if zero && geo.version < 3 {
            return Err(BadEntry::ZeroInVersion2);
        }
        if geo.in_cluster(host.0) != 0 {
            return Err(BadEntry::Unaligned(host));
        }
        Ok(match (host.0, zero) {
            (0, false) => L2Entry::Unallocated,
            (0, true) => L2Entry::Zero { kept: None },
            (_, true) => L2Entry::Zero { kept: Some((host, copied)) },
            (_, false) => L2Entry::Data { host, copied },
        })
    }

    /// The raw entry.
    pub fn encode(self, geo: Geometry) -> u64 {
        let flag = |copied: bool| if copied { COPIED } else { 0 };
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Zero { kept: None } => ZERO,
            L2Entry::Zero { kept: Some((host, copied)) } => host.0 | ZERO | flag(copied),
            L2Entry::Data { host, copied } => host.0 | flag(copied),
            L2Entry::Compressed { host, len } => {
                let x = 62 - (geo.cluster_bits - 8);
                let sectors = (host.0 % 512 + len).div_ceil(512);
                COMPRESSED | ((sectors - 1) << x) | host.0
            }
        }
    }

    /// The host clusters that the entry refers to, as first index and number. Each counts one reference.
    pub fn clusters(self, geo: Geometry) -> Option<(ClusterIndex, u64)> {
        match self {
            L2Entry::Unallocated | L2Entry::Zero { kept: None } => None,
            L2Entry::Zero { kept: Some((host, _)) } | L2Entry::Data { host, .. } => {
                Some((geo.cluster_of(host), 1))
            }
            L2Entry::Compressed { host, len } => {
                let first = geo.cluster_of(host);
                let last = geo.cluster_of(HostOffset(host.0 + len - 1));
                Some((first, last.0 - first.0 + 1))
            }
        }
    }
}

/// Reads refcount `index` of a block (section "Refcount block entry"): widths below 8 bits are packed from the
/// least significant bit of each byte, wider ones are big-endian.
pub fn refcount_get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let width = 1 << order;
            let shift = (index % per_byte) * width;
            u64::from(block[index / per_byte] >> shift) & ((1 << width) - 1)
        }
        3 => u64::from(block[index]),
        4 => u64::from(super::layout::be16(block, index * 2)),
        5 => u64::from(super::layout::be32(block, index * 4)),
        _ => super::layout::be64(block, index * 8),
    }
}

/// Sets refcount `index` of a block. `value` must fit the width.
pub fn refcount_set(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let width = 1 << order;
            let shift = (index % per_byte) * width;
            let mask = (((1u32 << width) - 1) as u8) << shift;
            let byte = &mut block[index / per_byte];
            *byte = (*byte & !mask) | (((value as u8) << shift) & mask);
        }
        3 => block[index] = value as u8,
        4 => block[index * 2..][..2].copy_from_slice(&(value as u16).to_be_bytes()),
        5 => block[index * 4..][..4].copy_from_slice(&(value as u32).to_be_bytes()),
        _ => block[index * 8..][..8].copy_from_slice(&value.to_be_bytes()),
    }
}

/// Byte of the block that holds refcount `index`, for dirty tracking.
pub(super) const fn refcount_byte(order: u32, index: usize) -> usize {
    (index << order) / 8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geo(version: u32, cluster_bits: u32) -> Geometry {
        Geometry { version, cluster_bits, refcount_order: 4 }
    }

    #[test]
    fn known_entries() {
        let g = geo(3, 16);
        let d = |raw| L2Entry::decode(raw, g);
        assert_eq!(d(0), Ok(L2Entry::Unallocated));
        assert_eq!(d(1), Ok(L2Entry::Zero { kept: None }));
        assert_eq!(d(COPIED | 0x50000), Ok(L2Entry::Data { host: HostOffset(0x50000), copied: true }));
        assert_eq!(d(0x50001), Ok(L2Entry::Zero { kept: Some((HostOffset(0x50000), false)) }));
        assert_eq!(d(0x50200), Err(BadEntry::Unaligned(HostOffset(0x50200))));
        assert_eq!(L2Entry::decode(1, geo(2, 16)), Err(BadEntry::ZeroInVersion2));
        // 64 KiB clusters: x = 54, so one additional sector is 1 << 54.
        assert_eq!(
            d(COMPRESSED | (1 << 54) | 0x50010),
            Ok(L2Entry::Compressed { host: HostOffset(0x50010), len: 1024 - 0x10 })
        );
    }

    #[test]
    fn compressed_data_may_span_host_clusters() {
        let g = geo(3, 9);
        let e = L2Entry::decode(COMPRESSED | (1 << 61) | 0x3f0, g).unwrap();
        assert_eq!(e, L2Entry::Compressed { host: HostOffset(0x3f0), len: 0x210 });
        assert_eq!(e.clusters(g), Some((ClusterIndex(1), 2)));
    }

    proptest! {
        #[test]
        fn any_entry_decodes_without_panic_and_canonical_ones_round_trip(raw: u64, bits in 9u32..=21, version in 2u32..=3) {
            let g = geo(version, bits);
            if let Ok(e) = L2Entry::decode(raw, g) {
                let again = L2Entry::decode(e.encode(g), g);
                prop_assert_eq!(again, Ok(e));
                if let Some((first, n)) = e.clusters(g) {
                    prop_assert!(first.0 + n <= g.cluster_limit().0 + 1 + (1 << 13));
                }
            }
        }

        #[test]
        fn refcounts_of_every_width(order in 0u32..=6, values in prop::collection::vec(any::<u64>(), 64)) {
            let mut block = vec![0xa5u8; 512];
            let mask = if order == 6 { u64::MAX } else { (1 << (1u64 << order)) - 1 };
            for (i, v) in values.iter().enumerate() {
                refcount_set(&mut block, order, i, v & mask);
            }
            for (i, v) in values.iter().enumerate() {
                prop_assert_eq!(refcount_get(&block, order, i), v & mask);
                prop_assert!(refcount_byte(order, i) < 512);
            }
        }
    }
}
