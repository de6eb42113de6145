//! Exports of Dolmen: how clients outside the process reach nodes of the graph.
//!
//! An export is a user of the graph: it holds an edge and takes a token for every
//! request. The control task makes the edge, hands it to an export here, and takes the
//! export away before it takes the edge away.
//!
//! A type of exports is a row of [`KINDS`] and a module. There is the NBD server; vhost-user-blk, FUSE and ublk have
//! their place beside it.

#![forbid(unsafe_code)]

mod export;
mod nbd;

pub use export::{Common, Drained, Export, ExportCx, ExportKind, Proposal, Server, Servers, StopMode};
pub use nbd::{NBD, NbdExport, NbdServer, NbdServerConfig};

/// The types of exports that there are.
pub static KINDS: &[&ExportKind] = &[&NBD];
