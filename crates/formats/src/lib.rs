//! Image formats of Dolmen: raw and qcow2.
//!
//! A format receives edges to its children and never knows what they are. One folder a format: codec and decisions
//! are values in, values out; the driver on top waits and moves data.
#![forbid(unsafe_code)]

mod foreign;
pub mod qcow2;
mod raw;

use dolmen_graph::DriverKind;

pub use foreign::foreign;
pub use qcow2::QCOW2;
pub use raw::RAW;

/// The registry rows of all formats.
pub const DRIVERS: &[&DriverKind] = &[&RAW, &QCOW2];
