//! The node graph: the heart of Dolmen.
//!
//! ```text
//!   export      job          users: hold an edge (UserEdge), take a Token per request
//!      \        /
//!       copy-on-read         filter nodes
//!           |
//!         qcow2 ----- qcow2  format nodes (file, backing children)
//!           |           |
//!          file        file  leaf (protocol) nodes
//! ```
//!
//! - The graph is a value: [`Graph`] is an immutable snapshot that readers hold. A change
//!   is made on a [`Draft`], which the pure solver ([`solve`]) accepts or refuses; then
//!   drivers prepare, and [`GraphOwner`] publishes at one point that cannot fail.
//!   Dropping a draft *is* the abort.
//! - There is one access-control mechanism, for edges, operations and other processes:
//!   needs and allows of edges ([`AccessRule`]) and claims of operations, all given to
//!   [`solve`]. I/O needs an [`Io`], which only a granted edge can mint.
//! - Requests are planned synchronously down the chain ([`Driver::plan`]) and wait once,
//!   at the node that has to do real work.
#![forbid(unsafe_code)]

mod access;
mod draft;
mod driver;
mod epoch;
mod explain;
mod io;
mod node;
mod open;
mod owner;
mod range_lock;
mod registry;
mod solver;
mod status;
mod user;

pub use access::{AccessRule, NodeFacts};
pub use draft::{ClaimScope, Draft, NodeDef, OpClaim, OpInfo};
pub use driver::{
    Class, Description, Driver, Extent, Limits, NodeChange, Op, Plan, Prealloc, Prepared, Request, SELF,
    SnapshotInfo, Where,
};
pub use epoch::{Epochs, Lease, Stamp};
pub use io::{Access, Cx, Io, Read, Resize, Write, WriteUnchanged};
pub use node::{ChildEdge, Graph, Node, NodeFlags, NodeState};
pub use open::{
    Implicit, MAX_CHAIN, MAX_NODES, OpenPolicy, Opener as NodeOpener, PROBE_BYTES, has_protocol, join,
    protocol_name,
};
pub use owner::{GraphEvent, GraphOwner};
pub use range_lock::{RangeGuard, RangeLock};
pub use registry::{
    ChildDef, ChildSpec, Common, CreateCx, CreateFn, DriverKind, ImplicitChild, OpenCx, Opened, Opener,
    Parsed, Registry, common_options,
};
pub use solver::{EdgeRef, Grants, Refusal, TopoClaim, TopoNode, TopoUser, Topology, solve};
pub use status::{ChainStatus, chain_status, own_status};
pub use user::{Token, UserEdge};
