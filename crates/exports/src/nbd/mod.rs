//! The NBD server: listens, negotiates, and serves exports from the graph.
//!
//! Owns sockets and connections; the protocol itself is the sans-I/O crate `dolmen-nbd`,
//! and every request goes through a token of the export's edge. A server lives on one
//! core. Its parts, each above those that it uses:
//!
//! - `kind`: the row of the type;
//! - `server`: the listening socket and the exports;
//! - `offer`: what is offered under a name, and what is true about it;
//! - `conn`: one client: reader, workers, sender, budget;
//! - `execute`: a permitted command becomes graph requests and a reply;
//! - `replies`: many replies become one send;
//! - `pool`: buffers of a connection.
//!
//! A client that misbehaves loses its own connection and nothing else: every limit is
//! per connection, and the number of connections is limited as well.

mod conn;
mod execute;
mod kind;
mod offer;
mod pool;
mod replies;
mod server;

pub use kind::NBD;
pub use offer::NbdExport;
pub use server::{NbdServer, NbdServerConfig};
