//! The block-copy engine, and the state that a job shares with its filter.
//!
//! What exists so far is the bookkeeping: [`CopyMap`] knows which parts of a node still
//! have to be copied, and hands them out to workers. It is a value without I/O; the
//! engines that move the data will be built on it.
#![forbid(unsafe_code)]

mod map;

pub use map::{CopyMap, Work};
