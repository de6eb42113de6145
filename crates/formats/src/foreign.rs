//! Formats that are recognised and not opened.
//!
//! An image of one of them that is taken for a raw disk has silently wrong content, and a write would destroy it.
//! Recognised by their first bytes, as their specifications give them.

/// Offset, bytes, name.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"conectix", "vpc (VHD)"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (0, b"LUKS\xba\xbe", "luks"),
];

/// The format that these first bytes of a file belong to, if it is one that is not opened here.
pub fn foreign(header: &[u8]) -> Option<&'static str> {
    MAGICS
        .iter()
        .find(|(at, magic, _)| header.get(*at..at + magic.len()) == Some(*magic))
        .map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognised() {
        assert_eq!(foreign(b"conectix\0\0\0\x02"), Some("vpc (VHD)"));
        assert_eq!(foreign(b"conecti"), None);
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(foreign(&vdi), Some("vdi"));
        assert_eq!(foreign(&[0; 512]), None);
        assert_eq!(foreign(&[]), None);
    }
}
