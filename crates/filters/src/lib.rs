//! Filter drivers: nodes that show their child's data, and do something on the way.
//!
//! One file (or folder) each, with its documentation at the head and its tests at the
//! end. A filter answers [`Driver::plan`](dolmen_graph::Driver::plan) with a forward
//! whenever it can, so that it costs one virtual call per request.
#![forbid(unsafe_code)]

mod blkdebug;
mod blkverify;
mod copy_on_read;
mod preallocate;
#[cfg(test)]
mod tests;

pub use blkdebug::BLKDEBUG;
pub use blkverify::BLKVERIFY;
pub use copy_on_read::COPY_ON_READ;
pub use preallocate::PREALLOCATE;
