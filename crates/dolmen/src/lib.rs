//! Dolmen: a block layer, storage daemon, image tool and library.
//!
//! This is the facade: the crates that make up Dolmen under one name, the list of
//! drivers ([`registry`]) and [`Session`], the shortest way from an image's name to its
//! data:
//!
//! ```no_run
//! # fn main() -> dolmen::types::Result<()> {
//! dolmen::session::run(|rt| async move {
//!     let mut session = dolmen::Session::new(&rt, dolmen::registry(), dolmen::session::beneath());
//!     let options = session.named("disk.qcow2", Some("qcow2"))?;
//!     let image = session.open(options, dolmen::session::READ).await?;
//!     let buffer = dolmen::rt::Memory::zeroed(4096);
//!     image.read(0, &buffer.iovec(), Default::default()).await?;
//!     session.close_image(image).await?;
//!     session.close().await
//! })
//! # }
//! ```
#![forbid(unsafe_code)]

mod drivers;
pub mod session;
pub mod spec;

pub use dolmen_control as control;
pub use dolmen_exports as exports;
pub use dolmen_formats as formats;
pub use dolmen_graph as graph;
pub use dolmen_nbd as nbd;
pub use dolmen_qmp as qmp;
pub use dolmen_rt as rt;
pub use dolmen_types as types;

pub use drivers::registry;
pub use session::{Image, Session};
