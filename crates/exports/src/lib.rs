//! Exports of Dolmen: how clients outside the process reach nodes of the graph.
//!
//! An export is a user of the graph: it holds an edge and takes a token for every
//! request. The control task makes the edge, hands it to an export here, and takes the
//! export away before it takes the edge away.
//!
//! There is the NBD server; vhost-user-blk, FUSE and ublk have their place beside it.

#![forbid(unsafe_code)]

mod nbd;

pub use nbd::{NbdExport, NbdServer, NbdServerConfig};
