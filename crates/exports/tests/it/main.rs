//! The NBD server from outside: against the clients that people use, and against clients
//! that nobody should be.
//!
//! The node under the exports is a driver in memory that can be told to fail and to wait
//! (`memory`); tools are run on the thread pool, so that a test is one runtime.

mod hostile;
mod lifecycle;
mod memory;
mod rig;
mod tools;
mod wire;
