//! The block-copy engine, and the state that a job shares with its filter.
//!
//! - [`CopyMap`] knows which chunks of a node have to be copied, and hands them out: a value.
//! - [`Tracker`] shares one between the engine, filters and waiting requests.
//! - [`Engine`] brings what is dirty from a source to a target: in parallel, in large parts, zeroes as
//!   zeroes.
//! - [`PointInTime`] is a node as it was at some time; [`CopyBeforeWrite`] keeps it, [`SnapshotAccess`] shows it.
#![forbid(unsafe_code)]

mod cbw;
mod engine;
mod map;
mod point;
mod snapshot;
#[cfg(test)]
mod tests;
mod tracker;
mod transfer;

pub use cbw::{COPY_BEFORE_WRITE, CopyBeforeWrite, OnCbwError, chunk_size};
pub use dolmen_rt::{Buffer, Buffers};
pub use engine::{CopyOptions, Engine, Hooks, Pass, Route};
pub use map::{ChunkState, CopyMap, Work};
pub use point::PointInTime;
pub use snapshot::{SNAPSHOT_ACCESS, SnapshotAccess};
pub use tracker::{Held, Taken, Tracker};
pub use transfer::{Failure, Moved, Side};
