//! Sans-I/O codec of the Network Block Device protocol.
//!
//! Bytes in, decisions out: nothing here opens a socket, waits or allocates more than
//! the named limits in [`limits`]. The NBD server (exports) and the NBD client (a
//! driver) share it, so each side is tested against the other in memory.
//!
//! ```text
//!            handshake                              transmission
//!   server   ServerHandshake::step(bytes)  ──────►  Request::decode, Session::check,
//!            Need / Taken / Ready / Close           reply::put_*
//!   client   ClientHandshake::step(bytes)  ──────►  Request::encode, ReplyHead::decode,
//!            Need / Taken / Ready / Close           ReplyState (what a reply may say)
//! ```
//!
//! Specification: `doc/proto.md` of the NetworkBlockDevice project; section names in
//! the comments are those of that page. Spoken: fixed newstyle negotiation (a client
//! also falls back to plain newstyle), simple and structured replies, `base:allocation`.
//! Not spoken, and declined in the way the specification asks for: TLS, extended
//! headers, resize. Extended headers have their place in [`HeaderStyle`]: the session
//! says which style was agreed, and [`Request`] and [`ReplyHead`] are the only two
//! places that know how many bytes a header has.
//!
//! Invariant: no input makes a function here panic, loop without consuming, or ask for
//! more look-ahead than [`limits::MAX_HANDSHAKE_INPUT`] in the handshake and a chunk header
//! with [`limits::MAX_STATUS_PAYLOAD`] afterwards.
#![forbid(unsafe_code)]

pub mod client;
pub mod consts;
pub mod limits;
pub mod reply;
pub mod request;
pub mod server;
mod wire;

pub use client::{ClientHandshake, ClientStep, Goal, ListedExport};
pub use consts::{CommandFlags, Errno, TransmissionFlags};
pub use reply::{Chunk, ChunkAction, Extent, ReplyHead, ReplyState};
pub use request::{Command, Request, RequestStep};
pub use server::{Catalog, CloseReason, ExportInfo, HeaderStyle, ServerHandshake, ServerStep, Session};

#[cfg(test)]
mod conversation;
