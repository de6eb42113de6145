//! Tests of the control task through its monitors: real sockets, nodes in memory.

mod commands;
mod monitors;
mod rig;
