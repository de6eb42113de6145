//! The block-copy engine, and the state that a job shares with its filter.
//!
//! - [`CopyMap`] knows which chunks of a node have to be copied, and hands them out: a value.
//! - [`Tracker`] shares one between the engine, filters and waiting requests.
//! - [`Engine`] brings what is dirty from a source to a target: in parallel, in large parts, zeroes as
//!   zeroes.
#![forbid(unsafe_code)]

mod buffers;
mod engine;
mod map;
#[cfg(test)]
mod tests;
mod tracker;
mod transfer;

pub use buffers::{Buffer, Buffers};
pub use engine::{CopyOptions, Engine, Hooks, Pass, Route};
pub use map::{ChunkState, CopyMap, Work};
pub use tracker::{Held, Taken, Tracker};
pub use transfer::{Failure, Moved, Side};
