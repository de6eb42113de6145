//! The runtime of Dolmen.
//!
//! Everything that Dolmen needs of the outside world besides disks goes through the
//! handle [`Rt`]: time, randomness and tasks. In production the handle stands for one
//! per-core executor on io_uring (or on a thread pool where io_uring is forbidden);
//! in the simulation for a virtual clock and a seeded scheduler. Code above this crate
//! cannot tell the difference. Disks are the other seam: leaf drivers.
//!
//! Real files and sockets exist only in production; leaf drivers and exports get at
//! them through [`Rt::io`].

mod buf;
mod handle;
mod io;

pub use buf::{Buf, IoVec, Memory};
pub use handle::{Instant, LocalFuture, Rt, Runtime};
pub use io::CoreIo;
