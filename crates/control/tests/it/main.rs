//! Tests of the control task through its monitors: real sockets, nodes in memory. And of
//! formats and filters together, which do not know each other.

mod blkdebug;
mod commands;
mod copy_on_read;
mod guard;
mod monitors;
mod qmp;

mod rig;
