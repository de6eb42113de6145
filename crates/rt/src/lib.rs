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
mod buffers;
mod core;
mod engine;
mod epoll;
mod executor;
mod file;
mod flight;
mod handle;
mod io;
mod lane;
mod late;
mod mailbox;
mod net;
mod op;
mod ring;
mod shared_memory;
mod signal;
mod stats;
pub mod sys;
mod timers;
mod workers;

pub use buf::{Buf, IoVec, Memory};
pub use buffers::{Buffer, Buffers};
pub use dolmen_types::Result;
pub use engine::{Config, EngineKind};
pub use executor::{CoreHandle, Pool, block_on, block_on_with};
pub use file::File;
pub use flight::{Carry, Guard, Guards, Hold, carry};
pub use handle::{Instant, LocalFuture, Rt, Runtime};
pub use io::{Cached, CoreIo, Fallocate, Seek};
pub use lane::Lane;
pub use late::{PutOff, put_off};
pub use net::{Addr, Listener, Socket, Stream};
pub use signal::{Signal, Signals, block_signals};
pub use stats::Counters;
pub use workers::WaitsFor;
