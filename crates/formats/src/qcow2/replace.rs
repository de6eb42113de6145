//! How a header takes the place of another.
//!
//! A disk writes a sector at once or not at all, so what changes has to be in the first sector;
//! a backing file name that does not fit there is written before, where the old header has nothing.

use std::ops::Range;

use dolmen_types::{Error, ErrorKind, Result, bytes};

use super::header::{
    EXT_FEATURE_NAMES, Header, SECTOR, V2_LENGTH, decode_extensions, first_cluster_len, point_to_name,
};
use super::layout::{be32, be64};

/// The steps that replace a header (see [`Header::replace`]).
#[derive(Debug)]
pub(super) struct Replacement {
    /// What is written first, where in the file, and flushed. Nothing refers to it yet.
    pub ahead: Option<(u64, Vec<u8>)>,
    /// The first sector, which is one atomic write.
    pub sector: [u8; SECTOR],
}

/// What a header refers to within its cluster.
fn used_by(cluster: &[u8]) -> Result<[Range<usize>; 2]> {
    let b = &cluster[..cluster.len().min(first_cluster_len(cluster)?)];
    let (name_at, name_len) = (be64(b, 8) as usize, be32(b, 16) as usize);
    let start = if be32(b, 4) >= 3 { be32(b, 100) as usize } else { V2_LENGTH };
    let limit = if name_at == 0 { b.len() } else { name_at };
    let (_, end) = decode_extensions(b, start, limit)?;
    Ok([0..end, name_at..name_at + name_len])
}

impl Header {
    /// How this header takes the place of the one in `old`, the first cluster of the file, so that
    /// at every instant the disk has the old one or the new one. The table of feature names is
    /// given up where it does not fit into the first sector: it only serves messages.
    ///
    /// # Errors
    /// `NoSpace` when there is no such way: the extensions do not fit into the first sector and
    /// differ behind it, or the cluster has no room for the new name beside the old one.
    pub(super) fn replace(&mut self, old: &[u8]) -> Result<Replacement> {
        let mut brief = self.clone();
        brief.extensions.retain(|e| e.id != EXT_FEATURE_NAMES);
        if let Some(r) = self.in_one_sector() {
            return Ok(r);
        }
        if let Some(r) = brief.in_one_sector() {
            *self = brief;
            return Ok(r);
        }
        if let Some(r) = brief.beside(old)? {
            *self = brief;
            return Ok(r);
        }
        if let Some(r) = self.beside(old)? {
            return Ok(r);
        }
        let name = self.backing_file.as_ref().map_or(0, |n| bytes(n).len());
        Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the first cluster, of {} bytes, has no room for a backing file name of {name} bytes beside what \
                 it holds, and overwriting that could leave a header that is neither the old one nor the new one",
                self.geometry().cluster_len()
            ),
        )
        .remedy("use a shorter backing file name, or convert the image to a larger cluster size"))
    }

    /// All in the first sector, which is written at once.
    fn in_one_sector(&self) -> Option<Replacement> {
        let mut b = self.encode_head();
        if let Some(name) = &self.backing_file {
            let at = b.len();
            let name = point_to_name(&mut b, at, name);
            b.extend_from_slice(&name);
        }
        if b.len() > SECTOR {
            return None;
        }
        b.resize(SECTOR, 0);
        Some(Replacement { ahead: None, sector: b.try_into().expect("a sector") })
    }

    /// The name where the old header has nothing; the first sector points to it.
    fn beside(&self, old: &[u8]) -> Result<Option<Replacement>> {
        let mut b = self.encode_head();
        // What does not fit into the first sector is there already, or can't be replaced in one write.
        if b.len() > SECTOR && old.get(SECTOR..b.len()) != Some(&b[SECTOR..]) {
            return Ok(None);
        }
        let used = used_by(old)?;
        let mut ahead = None;
        if let Some(name) = &self.backing_file {
            let len = bytes(name).len().next_multiple_of(SECTOR);
            let first = b.len().next_multiple_of(SECTOR);
            let last = self.geometry().cluster_len().saturating_sub(len);
            let free = |at: &usize| used.iter().all(|u| at + len <= u.start || u.end <= *at);
            let Some(at) = (first..=last).step_by(SECTOR).find(free) else { return Ok(None) };
            let mut name = point_to_name(&mut b, at, name);
            name.resize(len, 0);
            ahead = Some((at as u64, name));
        }
        b.resize(SECTOR, 0);
        Ok(Some(Replacement { ahead, sector: b.try_into().expect("a sector") }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::header::Extension;
    use super::super::layout::HostOffset;
    use super::*;

    fn apply(disk: &mut [u8], r: &Replacement, old: &Header) {
        if let Some((at, name)) = &r.ahead {
            let at = *at as usize;
            assert_eq!((at % SECTOR, name.len() % SECTOR), (0, 0));
            disk[at..at + name.len()].copy_from_slice(name);
            assert_eq!(&Header::decode(disk).unwrap(), old, "the power fails between the writes");
        }
        disk[..SECTOR].copy_from_slice(&r.sector);
    }

    proptest! {
        /// Names long and short follow each other; the power may fail between any two writes. The
        /// header was written in one piece once, and a crash in it left a name that was cut off.
        #[test]
        fn the_old_header_or_the_new_one(
            bits in 9..17u32,
            version in 2..4u32,
            unknown in 0..600usize,
            names in prop::collection::vec((0..1024usize, any::<bool>(), any::<u8>()), 1..8),
        ) {
            let mut h = Header::decode(&Header::sample(version, bits).encode().unwrap()).unwrap();
            h.extensions.push(Header::feature_names());
            if version == 3 && unknown > 0 {
                h.extensions.push(Extension { id: 0x1234_5678, data: vec![5; unknown] });
            }
            prop_assume!(h.encode().is_ok());
            let mut disk = h.encode().unwrap();
            for (len, format, letter) in names {
                let name = char::from(b'a' + letter % 26).to_string().repeat(len);
                let mut new = h.clone();
                new.l1_table = HostOffset(h.l1_table.0 ^ (1 << 20));
                new.set_backing((len > 0).then_some(&name), format.then_some("qcow2")).unwrap();
                let Ok(r) = new.replace(&disk) else {
                    // What a QEMU image has fits, in clusters from 4 KiB.
                    prop_assert!(bits < 12 || unknown > 300, "refused: {len}");
                    continue;
                };
                apply(&mut disk, &r, &h);
                prop_assert_eq!(&Header::decode(&disk).unwrap(), &new);
                prop_assert!(new.extensions.iter().any(|e| e.id == 0x1234_5678) == (version == 3 && unknown > 0));
                h = new;
            }
        }
    }
}
