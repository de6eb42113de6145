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
//!
//! A disk in memory gets a writer; a second user that needs a steady size beside somebody
//! who resizes is refused, and told why:
//!
//! ```
//! use dolmen_graph::{AccessRule, Draft, GraphOwner, NodeDef, NodeFlags, OpInfo};
//! use dolmen_rt::Memory;
//! use dolmen_sim::{Image, MEMORY, MemoryDisk, Sim};
//! use dolmen_types::{Actions, Claim, NodeName, OpId, ReadFlags, Result, Span, Value, WriteFlags};
//!
//! fn attach(draft: &mut Draft, id: &str, needs: Actions, denies: Actions) -> Result<OpId> {
//!     let op = OpId::internal(id);
//!     draft.add_op(OpInfo {
//!         id: op.clone(),
//!         kind: "tool".into(),
//!         detail: "an example".into(),
//!         since: None,
//!         ends_with: None,
//!         instead_of_writing: None,
//!     })?;
//!     draft.add_user(&op, "disk", Claim { needs, allows: Actions::EVERY - denies })?;
//!     Ok(op)
//! }
//!
//! # fn main() -> Result<()> {
//! Sim::run(1, |rt| async move {
//!     let mut owner = GraphOwner::new(rt.clone());
//!     let name = NodeName::parse("disk")?;
//!
//!     // A draft touches nothing that is published.
//!     let mut draft = owner.draft();
//!     draft.add_node(NodeDef {
//!         name: name.clone(),
//!         anonymous: false,
//!         kind: &MEMORY,
//!         rule: AccessRule::LEAF,
//!         flags: NodeFlags::default(),
//!         owner: None,
//!         monitor: true,
//!         options: Value::Null,
//!     })?;
//!     draft.set_driver(&name, std::sync::Arc::new(MemoryDisk::new(Image::new(4096))), false);
//!     let writer = attach(&mut draft, "writer", Actions::D | Actions::V, Actions::S)?;
//!     owner.commit(draft).await?;
//!
//!     // A token for each request; it proves what was granted.
//!     let edge = owner.edges(&writer).next().expect("attached");
//!     let token = edge.begin().await?;
//!     let data = Memory::from_slice(b"stones");
//!     token.write(&rt)?.write(Span::new(0, 6), &data.iovec(), WriteFlags::NONE).await?;
//!     let back = Memory::zeroed(6);
//!     token.read(&rt)?.read(Span::new(0, 6), &back.iovec(), ReadFlags::NONE).await?;
//!     assert_eq!(back.to_vec(), b"stones");
//!     assert!(token.resize(&rt).is_err(), "nobody granted that");
//!
//!     // "What if": nothing is published, nothing has to be undone.
//!     let mut draft = owner.draft();
//!     attach(&mut draft, "grower", Actions::S, Actions::NONE)?;
//!     let refusal = draft.solve().unwrap_err();
//!     assert_eq!(
//!         refusal.to_string(),
//!         "node 'disk': tool 'grower' (an example) needs to resize, but tool 'writer' (an example) \
//!          does not let others resize it. End tool 'writer' first."
//!     );
//!     drop(token);
//!     owner.close().await
//! })
//! # }
//! ```
#![forbid(unsafe_code)]

mod access;
mod build;
mod check;
mod count;
mod create;
mod draft;
mod driver;
mod effect;
mod epoch;
mod explain;
mod filename;
mod io;
mod late;
mod loops;
mod merge;
mod names;
mod node;
mod notice;
mod open;
pub mod option;
mod overlays;
mod owner;
mod place;
mod published;
mod query;
mod range_lock;
mod ready;
mod registry;
mod reopen;
mod same;
mod solver;
mod stand_in;
mod state;
mod status;
mod user;

pub use access::{AccessRule, NodeFacts, RoleRule, RuleTable};
pub use check::{CheckResult, RepairWhat, Repairing};
pub use count::{Counters, Counts, Tally};
pub use create::{ImageMaker, NewImage, check_room, create_image};
pub use draft::{ClaimScope, Draft, NodeDef, OpClaim, OpInfo};
pub use driver::{
    BackingName, Class, Description, Driver, Extent, ImageOps, Limits, NodeChange, Op, Plan, Prealloc,
    Prepared, Request, SELF, SnapshotInfo, Where, prepare_child, prepare_nothing, set_backing,
};
pub use epoch::{Epochs, Lease, Stamp};
pub use filename::{Filenames, header_name, header_name_given, is_use, node_filename, own_file};
pub use io::{Access, Cx, Io, Read, Resize, Write, WriteUnchanged};
pub use names::encode_uri;
pub use node::{ChildEdge, DetectZeroes, Node, NodeFlags, NodeState};
pub use notice::{Notice, Notices};
pub use open::{
    Implicit, MAX_CHAIN, MAX_NODES, OpenPolicy, Opener as NodeOpener, PROBE_BYTES, has_protocol, join,
};
pub use owner::{Closing, GraphEvent, GraphOwner, Patience};
pub use place::{FileId, id_of};
pub use published::Graph;
pub use range_lock::{RangeGuard, RangeLock};
pub use registry::{
    ChangeBackingFn, CheckFn, ChildDef, ChildSpec, Common, CreateCx, CreateFn, Creation, DriverKind, Duty,
    Foreign, ImplicitChild, NameFn, OpenCx, Opened, Opener, Parsed, PathFn, ProtocolName, RAW_FORMAT,
    Registry, Repair, common_options,
};
pub use same::{content, same_chain, same_image};
pub use solver::{
    EdgeRef, Grants, Overlays, Refusal, Stance, TopoClaim, TopoNode, TopoUser, Topology, solve,
};
pub use status::{ChainStatus, chain_status, first_allocated, own_status};
pub use user::{Observer, Token, UserEdge};

/// What macros of this crate name.
#[doc(hidden)]
pub mod types {
    pub use dolmen_rt::LocalFuture;
    pub use dolmen_types::{BlkEvent, OptionSpec, Options, Result, Span};
}
