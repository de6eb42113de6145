//! Address spaces, geometry and limits of a qcow2 image.
//!
//! Three address spaces meet in this format and all are 64-bit numbers, so each has a type of its own:
//! [`GuestOffset`] (what the reader of the disk sees), [`HostOffset`] (bytes of the image file) and
//! [`ClusterIndex`] (host clusters, which is what refcounts count).

use std::fmt;

use dolmen_types::{Error, ErrorKind, Result};

/// Smallest cluster: 512 bytes (the specification's lower bound).
pub(super) const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB, the limit of every known implementation. It bounds how much memory one table takes.
pub(super) const MAX_CLUSTER_BITS: u32 = 21;
/// Largest active or snapshot L1 table in bytes.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table in bytes.
pub(super) const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// Largest extra data of one snapshot in bytes; more is unknown data that could not be kept.
pub(super) const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// Host offsets have 56 bits.
pub(super) const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Most persistent bitmaps.
pub(super) const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes: every bitmap with the longest name.
pub(super) const MAX_BITMAP_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * (24 + 1024);
/// Largest table of one bitmap in bytes. 32 MiB of entries cover 2^31 bits of granularity many times over.
pub(super) const MAX_BITMAP_TABLE_BYTES: u64 = 32 << 20;
/// Most header extensions that are looked at; the specification knows five.
pub(super) const MAX_EXTENSIONS: usize = 256;

/// A byte of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte of the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// A cluster of the image file: host offset divided by the cluster size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterIndex(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl ClusterIndex {
    /// The cluster `n` further on.
    #[must_use]
    pub const fn plus(self, n: u64) -> ClusterIndex {
        ClusterIndex(self.0 + n)
    }
}

/// The numbers of an image that never change while it is open, and the arithmetic on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Header version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
}

impl Geometry {
    /// Cluster size in bytes.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Cluster size in bytes, for indexing memory.
    pub const fn cluster_len(self) -> usize {
        1 << self.cluster_bits
    }

    /// Entries of one L2 table (section "Cluster mapping"): it fills one cluster, 8 bytes each.
    pub const fn l2_entries(self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// Guest bytes that one L2 table maps.
    pub const fn l2_coverage(self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// Refcounts of one refcount block.
    pub const fn refblock_entries(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Largest refcount that fits.
    pub const fn refcount_max(self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << (1u64 << self.refcount_order)) - 1 }
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub const fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Index into the L1 table.
    pub const fn l1_index(self, g: GuestOffset) -> usize {
        (g.0 >> (2 * self.cluster_bits - 3)) as usize
    }

    /// Index into the L2 table.
    pub const fn l2_index(self, g: GuestOffset) -> usize {
        ((g.0 >> self.cluster_bits) & (self.l2_entries() - 1)) as usize
    }

    /// Distance from the start of the cluster.
    pub const fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The start of the cluster.
    pub const fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The host cluster that holds a byte.
    pub const fn cluster_of(self, h: HostOffset) -> ClusterIndex {
        ClusterIndex(h.0 >> self.cluster_bits)
    }

    /// The first byte of a host cluster.
    pub const fn host_of(self, c: ClusterIndex) -> HostOffset {
        HostOffset(c.0 << self.cluster_bits)
    }

    /// The first host cluster beyond [`MAX_HOST_OFFSET`].
    pub const fn cluster_limit(self) -> ClusterIndex {
        ClusterIndex(MAX_HOST_OFFSET >> self.cluster_bits)
    }

    /// Host clusters that `bytes` fill.
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Largest virtual size in bytes: as far as the largest L1 table reaches, below 2^63.
    pub const fn max_size(self) -> u64 {
        let reach = (MAX_L1_BYTES / 8) as u128 * self.l2_coverage() as u128;
        let limit = (i64::MAX as u128) / 512 * 512;
        if reach < limit { reach as u64 } else { limit as u64 }
    }

    /// Index of the refcount block and of the refcount in it.
    pub const fn refcount_position(self, c: ClusterIndex) -> (usize, usize) {
        let shift = self.cluster_bits + 3 - self.refcount_order;
        ((c.0 >> shift) as usize, (c.0 & (self.refblock_entries() - 1)) as usize)
    }
}

/// An error that says that the image breaks the specification.
#[cold]
pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// An error that says that a protective limit was met.
#[cold]
pub(crate) fn over_limit(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Limit, message)
}

/// Checks that a table lies aligned inside the 56-bit host address space.
pub(crate) fn check_table(geo: Geometry, what: &str, offset: u64, bytes: u64, max: u64) -> Result<()> {
    if bytes > max {
        return Err(over_limit(format!("{what} is too large: {bytes} bytes, at most {max} are supported")));
    }
    if geo.in_cluster(offset) != 0 {
        return Err(corrupt(format!("{what} offset {offset:#x} is not a multiple of the cluster size")));
    }
    if offset >= MAX_HOST_OFFSET || bytes > MAX_HOST_OFFSET - offset {
        return Err(corrupt(format!("{what} at {offset:#x} lies beyond the largest host offset")));
    }
    Ok(())
}

/// The big-endian number at `at`.
pub(crate) fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(b[at..at + 2].try_into().expect("two bytes"))
}

/// The big-endian number at `at`.
pub(crate) fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

/// The big-endian number at `at`.
pub(crate) fn be64(b: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

/// Stores a big-endian number at `at`.
pub(crate) fn put64(b: &mut [u8], at: usize, v: u64) {
    b[at..at + 8].copy_from_slice(&v.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_of_the_default_geometry() {
        let g = Geometry { version: 3, cluster_bits: 16, refcount_order: 4 };
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_coverage(), 512 << 20);
        assert_eq!(g.refblock_entries(), 32768);
        assert_eq!(g.refcount_max(), 65535);
        assert_eq!(g.l1_entries_for(1 << 30), 2);
        assert_eq!(g.l1_entries_for((1 << 30) + 1), 3);
        assert_eq!(g.refcount_position(ClusterIndex(32769)), (1, 1));
        assert_eq!(Geometry { refcount_order: 6, ..g }.refcount_max(), u64::MAX);
        assert_eq!(Geometry { refcount_order: 0, ..g }.refcount_max(), 1);
    }

    #[test]
    fn the_largest_disk_is_bounded_by_the_l1_table() {
        let g = Geometry { version: 3, cluster_bits: 9, refcount_order: 4 };
        assert_eq!(g.max_size(), (MAX_L1_BYTES / 8) * 64 * 512);
        let g = Geometry { version: 3, cluster_bits: 21, refcount_order: 4 };
        assert!(g.max_size() <= i64::MAX as u64);
    }
}
