//! Deterministic simulation for Dolmen's tests.
//!
//! Two seams connect Dolmen with the world: the runtime handle and the leaf driver.
//! This crate has a simulated one of each, and what is needed to judge the result:
//!
//! - [`Sim`]: a virtual clock that jumps to the next timer when nothing is runnable, a
//!   seeded choice of the next runnable task, seeded randomness. One seed, one run.
//! - [`SimDisk`]: a disk with a volatile cache that can lose power at any moment. It keeps
//!   a log of what was submitted, applied, completed and flushed, so that one run of a
//!   workload gives any number of crashes ([`CrashPoints`]). The head of its module states
//!   the fault model.
//! - [`Oracle`]: what a reader may see, live and after a crash, sector by sector.
//! - [`MemoryDisk`]: a plain disk in memory, for tests that are not about crashes.
//! - [`stand_in`]: the claims and edges of exports, jobs and commands on a small chain.
//!
//! A development dependency only: nothing of it is in the product.
#![forbid(unsafe_code)]

mod crash;
mod disk;
mod drivers;
mod harness;
mod image;
mod oracle;
mod random;
mod runtime;
pub mod stand_in;
#[cfg(test)]
mod tests;

pub use crash::CrashPoints;
pub use disk::{Change, DiskConfig, Event, Fault, FaultAction, Journal, SECTOR, SimDisk};
pub use drivers::{MEMORY, MemoryDisk, SIM_DISK};
pub use harness::{Harness, Leaf, User, create};
pub use image::Image;
pub use oracle::{GuestOp, Oracle, ReadMark, TagPattern, Violation, ZERO_TAG};
pub use random::Random;
pub use runtime::Sim;
