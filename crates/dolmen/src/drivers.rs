//! The drivers that Dolmen has: the one list that everything else derives from.

use dolmen_copy::{COPY_BEFORE_WRITE, SNAPSHOT_ACCESS};
use dolmen_filters::{BLKDEBUG, BLKVERIFY, COPY_ON_READ, PREALLOCATE};
use dolmen_formats::{QCOW2, RAW};
use dolmen_graph::{DriverKind, Registry};
use dolmen_protocols::{FILE, HOST_CDROM, HOST_DEVICE, NBD, NULL_AIO, NULL_CO};

static DRIVERS: &[&DriverKind] = &[
    &FILE,
    &HOST_DEVICE,
    &HOST_CDROM,
    &NBD,
    &NULL_CO,
    &NULL_AIO,
    &RAW,
    &QCOW2,
    &COPY_ON_READ,
    &COPY_BEFORE_WRITE,
    &SNAPSHOT_ACCESS,
    &BLKDEBUG,
    &BLKVERIFY,
    &PREALLOCATE,
];

/// All drivers.
pub fn registry() -> Registry {
    Registry::new(DRIVERS).recognising(dolmen_formats::foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_protocol() {
        let text = |name: &str| registry().protocol_name(name).map(|o| o.into_value().to_string());
        for (name, expected) in [
            ("file:a:b", r#"{"driver": "file", "filename": "a:b"}"#),
            (
                "blkdebug:c.conf:/x",
                r#"{"driver": "blkdebug", "image": {"driver": "file", "filename": "/x"}, "config": "c.conf"}"#,
            ),
            ("null-co://", r#"{"driver": "null-co"}"#),
            ("null-aio://", r#"{"driver": "null-aio"}"#),
        ] {
            assert_eq!(text(name).expect("a name"), expected, "{name}");
        }
        for bad in ["blkdebug:x", "null-co:", "null-co://x", "gopher://x", "qcow2:x"] {
            assert!(text(bad).is_err(), "{bad}");
        }
    }
}
