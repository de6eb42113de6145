//! The snapshot table (section "Snapshots").

use dolmen_types::Result;

use super::layout::{
    Geometry, HostOffset, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, be16, be32, be64,
    check_table, corrupt, over_limit,
};

/// Bytes of a table entry before the extra data.
const FIXED: usize = 40;

/// An internal snapshot.
///
/// On disk: 0 L1 offset, 8 L1 entries, 12 length of the id, 14 length of the name, 16 seconds, 20 nanoseconds, 24
/// guest clock in nanoseconds, 32 VM state size, 36 size of the extra data, 40 extra data (0 VM state size as 64
/// bits, 8 disk size, 16 instruction count), then id and name, padded to 8 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its unique id: text, usually a number.
    pub id: String,
    /// Its name, not unique.
    pub name: String,
    /// Time of creation: seconds since 1970.
    pub date_secs: u32,
    /// Time of creation: nanoseconds of the second.
    pub date_nanos: u32,
    /// Time that the guest had been running, in nanoseconds.
    pub vm_clock_nanos: u64,
    /// Bytes of the VM state; 0 when there is none.
    pub vm_state_bytes: u64,
    /// Size of the disk when it was taken; `None` in old images: the same as now.
    pub disk_size: Option<u64>,
    /// Instruction count; `None` when it was not recorded.
    pub icount: Option<u64>,
}

/// Where reading a table stopped.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// The entry, and the bytes that it took.
    Entry(Box<Snapshot>, usize),
    /// More bytes are needed: at least this many from the start of the entry.
    NeedBytes(usize),
}

impl Snapshot {
    /// Fails when its L1 table can't be where it is said to be.
    pub(super) fn check_l1(&self, geo: Geometry) -> Result<()> {
        let bytes = u64::from(self.l1_entries) * 8;
        check_table(geo, "Snapshot L1 table", self.l1_table.0, bytes, MAX_L1_BYTES)
    }
}

/// Decodes one entry from the start of `b`, and checks it. Reading more when asked for it never needs more than a
/// few KiB at once, so a table is read in bounded memory.
pub fn decode_entry(b: &[u8], geo: Geometry) -> Result<Step> {
    let step = parse_entry(b)?;
    if let Step::Entry(s, _) = &step {
        s.check_l1(geo)?;
    }
    Ok(step)
}

/// Decodes one entry, wherever its L1 table may be.
pub(super) fn parse_entry(b: &[u8]) -> Result<Step> {
    if b.len() < FIXED {
        return Ok(Step::NeedBytes(FIXED));
    }
    let extra = be32(b, 36);
    if extra > MAX_SNAPSHOT_EXTRA {
        return Err(over_limit(format!(
            "snapshot has {extra} bytes of extra data, at most {MAX_SNAPSHOT_EXTRA} are supported"
        )));
    }
    let (id_len, name_len) = (usize::from(be16(b, 12)), usize::from(be16(b, 14)));
    let id_at = FIXED + extra as usize;
    let end = id_at + id_len + name_len;
    if b.len() < end {
        return Ok(Step::NeedBytes(end));
    }
    let mut s = Snapshot {
        l1_table: HostOffset(be64(b, 0)),
        l1_entries: be32(b, 8),
        id: String::from_utf8_lossy(&b[id_at..id_at + id_len]).into_owned(),
        name: String::from_utf8_lossy(&b[id_at + id_len..end]).into_owned(),
        date_secs: be32(b, 16),
        date_nanos: be32(b, 20),
        vm_clock_nanos: be64(b, 24),
        vm_state_bytes: u64::from(be32(b, 32)),
        disk_size: None,
        icount: None,
    };
    if extra >= 8 {
        s.vm_state_bytes = be64(b, FIXED);
    }
    if extra >= 16 {
        s.disk_size = Some(be64(b, FIXED + 8));
    }
    if extra >= 24 {
        s.icount = Some(be64(b, FIXED + 16)).filter(|n| *n != u64::MAX);
    }
    Ok(Step::Entry(Box::new(s), end.next_multiple_of(8)))
}

/// Fails when a table has grown beyond its limit.
pub(super) fn check_table_len(bytes: u64) -> Result<()> {
    if bytes > MAX_SNAPSHOT_TABLE_BYTES {
        return Err(over_limit(format!("Snapshot table is larger than {MAX_SNAPSHOT_TABLE_BYTES} bytes")));
    }
    Ok(())
}

/// Encodes an entry as version 3 images have it, with 24 bytes of extra data.
pub fn encode_entry(s: &Snapshot) -> Result<Vec<u8>> {
    let (Ok(id_len), Ok(name_len)) = (u16::try_from(s.id.len()), u16::try_from(s.name.len())) else {
        return Err(corrupt("snapshot id or name is longer than 65535 bytes"));
    };
    let mut b = vec![0u8; FIXED + 24];
    b[0..8].copy_from_slice(&s.l1_table.0.to_be_bytes());
    b[8..12].copy_from_slice(&s.l1_entries.to_be_bytes());
    b[12..14].copy_from_slice(&id_len.to_be_bytes());
    b[14..16].copy_from_slice(&name_len.to_be_bytes());
    b[16..20].copy_from_slice(&s.date_secs.to_be_bytes());
    b[20..24].copy_from_slice(&s.date_nanos.to_be_bytes());
    b[24..32].copy_from_slice(&s.vm_clock_nanos.to_be_bytes());
    let short = u32::try_from(s.vm_state_bytes).unwrap_or(0);
    b[32..36].copy_from_slice(&short.to_be_bytes());
    b[36..40].copy_from_slice(&24u32.to_be_bytes());
    b[40..48].copy_from_slice(&s.vm_state_bytes.to_be_bytes());
    b[48..56].copy_from_slice(&s.disk_size.unwrap_or(0).to_be_bytes());
    b[56..64].copy_from_slice(&s.icount.unwrap_or(u64::MAX).to_be_bytes());
    b.extend_from_slice(s.id.as_bytes());
    b.extend_from_slice(s.name.as_bytes());
    b.resize(b.len().next_multiple_of(8), 0);
    Ok(b)
}

/// An entry as it is on disk with another L1 table. Whatever else it holds stays, names that are not UTF-8
/// included.
pub(super) fn move_l1(raw: &mut [u8], l1_table: HostOffset, l1_entries: u32) {
    raw[0..8].copy_from_slice(&l1_table.0.to_be_bytes());
    raw[8..12].copy_from_slice(&l1_entries.to_be_bytes());
}

/// Whether an entry has the extra data that version 3 demands.
pub(super) fn is_complete(raw: &[u8], geo: Geometry) -> bool {
    geo.version < 3 || be32(raw, 36) >= 16
}

/// An entry as it is on disk with the extra data that version 3 demands; `disk_size` is what it does not know.
pub(super) fn complete(raw: &[u8], s: &Snapshot, disk_size: u64) -> Vec<u8> {
    let names = FIXED + be32(raw, 36) as usize;
    let end = names + usize::from(be16(raw, 12)) + usize::from(be16(raw, 14));
    let mut b = raw[..FIXED].to_vec();
    b[36..40].copy_from_slice(&24u32.to_be_bytes());
    b.extend_from_slice(&s.vm_state_bytes.to_be_bytes());
    b.extend_from_slice(&s.disk_size.unwrap_or(disk_size).to_be_bytes());
    b.extend_from_slice(&s.icount.unwrap_or(u64::MAX).to_be_bytes());
    b.extend_from_slice(&raw[names..end]);
    b.resize(b.len().next_multiple_of(8), 0);
    b
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GEO: Geometry = Geometry { version: 3, cluster_bits: 16, refcount_order: 4 };

    #[test]
    fn round_trip() {
        let s = Snapshot {
            l1_table: HostOffset(0x70000),
            l1_entries: 2,
            id: "1".into(),
            name: "before the update".into(),
            date_secs: 1_700_000_000,
            date_nanos: 5,
            vm_clock_nanos: 9,
            vm_state_bytes: 1 << 33,
            disk_size: Some(1 << 30),
            icount: None,
        };
        let b = encode_entry(&s).unwrap();
        assert_eq!(decode_entry(&b, GEO).unwrap(), Step::Entry(Box::new(s), b.len()));
        assert_eq!(decode_entry(&b[..20], GEO).unwrap(), Step::NeedBytes(40));
        assert!(matches!(decode_entry(&b[..70], GEO).unwrap(), Step::NeedBytes(n) if n > 70));
    }

    #[test]
    fn an_old_entry_becomes_complete() {
        let mut raw = vec![0u8; 48];
        raw[..8].copy_from_slice(&0x70000u64.to_be_bytes());
        raw[13] = 1;
        raw[15] = 2;
        raw[40..43].copy_from_slice(b"1\xff\xfe");
        let Ok(Step::Entry(s, 48)) = parse_entry(&raw) else { panic!("an entry of 48 bytes") };
        assert!(!is_complete(&raw, GEO));
        let b = complete(&raw, &s, 5 << 20);
        assert!(is_complete(&b, GEO));
        let Ok(Step::Entry(again, used)) = parse_entry(&b) else { panic!("an entry") };
        assert_eq!((again.disk_size, used), (Some(5 << 20), b.len()));
        assert_eq!(*again, Snapshot { disk_size: again.disk_size, ..*s });
        assert_eq!(&b[64..67], b"1\xff\xfe", "the names stay, byte for byte");
    }

    proptest! {
        #[test]
        fn any_bytes(b in prop::collection::vec(any::<u8>(), 0..4096)) {
            if let Ok(Step::Entry(_, used)) = decode_entry(&b, GEO) {
                prop_assert!(used <= b.len() + 8);
            }
        }
    }
}
