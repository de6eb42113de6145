//! The control task of Dolmen.
//!
//! ```text
//!   monitor --+                       +--> a task for each change --> GraphOwner (nodes, operations)
//!   monitor --+--> Control --jobs--> task                        --> exports, NBD server
//!   command line   |
//!                  +-- queries: the state of things as it is now
//! ```
//!
//! One task gives every change its turn: changes that have to do with each other go one after the
//! other, in the order in which they come, others side by side. It waits for nothing else, so storage that does not
//! answer holds up only what depends on it. Everybody else holds a [`Control`]: it puts changes into the task's queue and
//! answers queries at once. What takes time outside the graph (disconnecting clients) comes back as a change.
//!
//! The invariant: an operation that is in the graph has its export in the table, and the
//! other way round, at every point where no change about it is under way.
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
mod owed;
mod query;
mod reopen;
mod socket;
mod stats;
mod task;
mod turns;

pub use change::{Change, ExportAdd, NbdServerStart};
pub use dolmen_graph::node_filename;
pub use handle::{Config, Control, Log};
pub use images::{Drive, SnapshotSync};
pub use jobs::{Ask, JobStart};
pub use monitor::{MonitorOptions, serve_monitor};
pub use names::image_name;
pub use operations::{OperationBegin, ToolClaim};
pub use query::{block_graph, block_nodes, image_info};
pub use socket::{MonitorSocket, listen_monitor};
