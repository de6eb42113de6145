//! The control task of Dolmen.
//!
//! ```text
//!   monitor --+                       +--> GraphOwner (nodes, operations)
//!   monitor --+--> Control --jobs--> task --> exports, NBD server
//!   command line                      |
//!                 queries <-- Published (what the last change left)
//! ```
//!
//! One task owns the graph, the operations and the exports, and applies changes one by
//! one in the order in which they come. Everybody else holds a [`Control`]: it puts
//! changes into the task's queue and answers queries from the last published state, so
//! that a query never waits for a change. What takes time outside the graph
//! (disconnecting clients) runs beside the task and comes back to it as a change.
//!
//! The invariant: an operation that is in the graph has its export in the table, and the
//! other way round, at every point where the task waits for its next change.
#![forbid(unsafe_code)]

mod act;
mod change;
mod commands;
mod export;
mod handle;
mod images;
mod jobs;
mod monitor;
mod names;
mod operations;
mod overlay;
mod query;
mod reopen;
mod socket;
mod stats;
mod task;

pub use change::{Change, ExportAdd, NbdServerStart};
pub use dolmen_graph::node_filename;
pub use handle::{Config, Control, Log};
pub use images::{Drive, SnapshotSync};
pub use jobs::JobStart;
pub use monitor::{MonitorOptions, serve_monitor};
pub use names::image_name;
pub use operations::{OperationBegin, ToolClaim};
pub use query::{block_graph, block_nodes, image_info};
pub use socket::{MonitorSocket, listen_monitor};
