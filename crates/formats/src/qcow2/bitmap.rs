//! The bitmap directory (section "Bitmaps"), as far as checking an image and reporting on it need it.

use dolmen_types::Result;

use super::layout::{Geometry, HostOffset, MAX_BITMAP_TABLE_BYTES, be16, be32, be64, check_table, corrupt};

/// Bytes of a directory entry before the extra data.
const FIXED: usize = 24;

/// A persistent bitmap.
///
/// On disk: 0 offset of its table, 8 table entries, 12 flags, 16 type, 17 granularity bits, 18 length of the name,
/// 20 size of the extra data, then extra data and name, padded to 8 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where its table is.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// Flags: 1 in use (not saved properly), 2 auto (enabled), 4 the extra data may be ignored.
    pub flags: u32,
    /// log2 of the bytes per bit.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
}

impl BitmapEntry {
    /// Words for reports, as users know them.
    pub fn flag_words(&self) -> Vec<&'static str> {
        [(1, "in-use"), (2, "auto")]
            .into_iter()
            .filter(|(bit, _)| self.flags & bit != 0)
            .map(|(_, w)| w)
            .collect()
    }
}

/// Decodes a whole directory.
pub fn decode_directory(b: &[u8], count: u32, geo: Geometry) -> Result<Vec<BitmapEntry>> {
    let mut out = Vec::new();
    let mut at = 0;
    for i in 0..count {
        let cut_off = || corrupt(format!("bitmap directory entry {i} is cut off"));
        if b.len() - at < FIXED {
            return Err(cut_off());
        }
        let e = &b[at..];
        let (name_len, extra) = (usize::from(be16(e, 18)), be32(e, 20) as usize);
        let end = (FIXED + name_len).checked_add(extra).ok_or_else(cut_off)?.next_multiple_of(8);
        if end > e.len() {
            return Err(cut_off());
        }
        let name_at = FIXED + extra;
        let entry = BitmapEntry {
            table: HostOffset(be64(e, 0)),
            table_entries: be32(e, 8),
            flags: be32(e, 12),
            granularity_bits: e[17],
            name: String::from_utf8_lossy(&e[name_at..name_at + name_len]).into_owned(),
        };
        if !(9..=31).contains(&entry.granularity_bits) || name_len == 0 || name_len > 1023 {
            return Err(corrupt(format!("bitmap directory entry {i} has a bad granularity or name")));
        }
        if e[16] != 1 || entry.flags & !7 != 0 || entry.table.0 == 0 {
            return Err(corrupt(format!("bitmap directory entry {i} has a bad type, flags or table")));
        }
        let bytes = u64::from(entry.table_entries) * 8;
        check_table(geo, "Bitmap table", entry.table.0, bytes, MAX_BITMAP_TABLE_BYTES)?;
        out.push(entry);
        at += end;
    }
    if at != b.len() {
        return Err(corrupt("the bitmap directory is longer than its entries"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GEO: Geometry = Geometry { version: 3, cluster_bits: 16, refcount_order: 4 };

    #[test]
    fn one_entry() {
        let mut b = vec![0u8; 32];
        b[0..8].copy_from_slice(&0x50000u64.to_be_bytes());
        b[8..12].copy_from_slice(&1u32.to_be_bytes());
        b[15] = 2;
        b[16] = 1;
        b[17] = 16;
        b[19] = 2;
        b[24..26].copy_from_slice(b"b0");
        let d = decode_directory(&b, 1, GEO).unwrap();
        assert_eq!(d[0].name, "b0");
        assert_eq!(d[0].flag_words(), ["auto"]);
        assert!(decode_directory(&b, 2, GEO).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes(b in prop::collection::vec(any::<u8>(), 0..512), count in 0u32..5) {
            let _ = decode_directory(&b, count, GEO);
        }
    }
}
