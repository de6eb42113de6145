//! Actions, claims, spans, identifiers, options and the error type shared by
//! every Dolmen crate.
//!
//! This crate has no dependencies and no async code: everything here is a value.
#![forbid(unsafe_code)]

mod actions;
mod error;
mod ids;
mod ops;
mod options;
mod os_name;
mod span;
mod value;

pub use actions::{Action, Actions, Claim};
pub use error::{Conflict, Error, ErrorKind, Party, Result, ResultExt};
pub use ids::{ChildRole, NodeName, OpId};
pub use ops::{BlkEvent, OpKind, ReadFlags, WriteFlags};
pub use options::{OptionSpec, OptionType, Options};
pub use os_name::{bytes, lossy, os_name, text_of, text_of_os};
pub use span::Span;
pub use value::Value;
