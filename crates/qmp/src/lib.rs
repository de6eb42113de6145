//! The QMP wire layer of Dolmen: values in, values out, no sockets.
//!
//! ```text
//!   bytes --> Framer --> Session --> Request (name, checked arguments, id)
//!                           |
//!                           +------> reply bytes (negotiation, errors)
//!
//!   command rows + driver option rows --> Schema --> argument checks
//!                                              +---> query-commands
//!                                              +---> query-qmp-schema
//! ```
//!
//! The invariant: what the introspection says and what the argument check accepts
//! come from the same [`Schema`], which is built from the command rows in this
//! crate and from the option rows of the drivers and export types that the program
//! really has. So `query-qmp-schema` can't claim what is not there.
//!
//! The texts and classes of errors follow QEMU's daemon, because
//! management software and its tests look at them.
#![forbid(unsafe_code)]

mod address;
mod framer;
pub mod json;
pub mod keyval;
pub mod model;
pub mod schema;
mod wire;

pub use address::SocketAddress;
pub use framer::{FrameError, Framer, MAX_MESSAGE_BYTES, MAX_NESTING_DEPTH};
pub use schema::{Schema, Source};
pub use wire::{
    ErrorClass, Event, QmpError, Request, Session, Step, Timestamp, Version, already_negotiated, reply_error,
    reply_ok,
};
