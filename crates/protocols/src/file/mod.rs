//! `file`, `host_device` and `host_cdrom`: images in files and on block devices of this host.
//!
//! - `row`: options and opening; `create`: making new files.
//! - `lock`: image locks between processes and between nodes.
//! - `driver`: requests.

mod create;
mod driver;
mod lock;
mod row;
mod shared;

pub(crate) use lock::{Entry, Identity, Stance, TableGuard, enter_table};
pub use row::{FILE, HOST_CDROM, HOST_DEVICE};
