//! Protocol (leaf) drivers of Dolmen: file, null, NBD client.
#![forbid(unsafe_code)]

mod file;
mod nbd;
mod null;

use dolmen_graph::DriverKind;

pub use file::{FILE, HOST_CDROM, HOST_DEVICE};
pub use nbd::NBD;
pub use null::{NULL_AIO, NULL_CO};

/// The registry rows of this crate.
pub static DRIVERS: &[&DriverKind] = &[&FILE, &HOST_DEVICE, &HOST_CDROM, &NULL_CO, &NULL_AIO, &NBD];
