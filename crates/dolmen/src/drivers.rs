//! The drivers that Dolmen has: the one list that everything else derives from.

use dolmen_copy::{COPY_BEFORE_WRITE, SNAPSHOT_ACCESS};
use dolmen_filters::{BLKDEBUG, COPY_ON_READ};
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
];

/// All drivers.
pub fn registry() -> Registry {
    Registry::new(DRIVERS).recognising(dolmen_formats::foreign)
}
