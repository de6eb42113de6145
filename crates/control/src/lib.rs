//! The control task of Dolmen.
//!
//! ```text
//!   monitor --+                         +--> a task for each change --> GraphOwner (nodes, operations)
//!   monitor --+--> Control --orders--> task                        --> exports, NBD server
//!   command line   |
//!                  +-- queries and verbs: the world as it is now
//! ```
//!
//! Modules, from the bottom: `world` (what commands work on; knows no command), `act` (what a command is once its arguments
//! are read, and the three things that can be done with it), `row` (name, arguments, result, help), `commands` (a family
//! a file), `table` (the list), `task` (the loop), `handle` (the channel), `monitor` (a connection).
//!
//! One task gives every change its turn: changes that have to do with each other go one after the
//! other, in the order in which they come, others side by side. It waits for nothing else, so storage that does not
//! answer holds up only what depends on it. Everybody else holds a [`Control`]: it puts changes into the task's queue and
//! answers queries, and what changes no graph, at once. What takes time outside the graph (disconnecting clients) comes back as a change.
//!
//! The invariant: an operation that is in the graph has its export in the table, and the
//! other way round, at every point where no change about it is under way.
#![forbid(unsafe_code)]

mod act;
mod commands;
mod counter;
mod drafting;
mod export;
mod guard;
mod handle;
mod jobs;
mod monitor;
mod names;
mod notices;
mod outgoing;
mod overlay;
mod query;
mod row;
mod socket;
mod table;
mod task;
mod turns;
mod world;

pub use dolmen_graph::node_filename;
pub use handle::Control;
pub use jobs::JobStart;
pub use monitor::serve_monitor;
pub use names::image_name;
pub use outgoing::MonitorOptions;
pub use query::{block_graph, block_nodes, image_info};
pub use socket::{MonitorSocket, listen_monitor};
pub use table::schema;
pub use world::{Config, Log};
