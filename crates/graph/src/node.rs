//! The snapshot: nodes and the edges between them, immutable.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use dolmen_types::{ChildRole, Claim, NodeName, OpId, Span, Value, WriteFlags};

use crate::count::{Place, Threshold};
use crate::late::Late;
use crate::notice::NoticeSink;
use crate::{Counters, Driver, Epochs, Lease, Notice};

/// Common properties of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeFlags {
    /// Opened without the right to write.
    pub read_only: bool,
    /// `cache.direct`: bypasses the host page cache.
    pub direct: bool,
    /// `cache.no-flush`: flushes are ignored.
    pub no_flush: bool,
    /// Opened although others hold locks.
    pub force_share: bool,
    /// `discard=unmap`: discards are passed on.
    pub unmap: bool,
    /// `active=off`: the image has been handed to another process, or has not been taken
    /// over from it yet. The node holds no locks and serves no requests.
    pub inactive: bool,
    /// `detect-zeroes`: what becomes of writes whose data are zeroes.
    pub detect_zeroes: DetectZeroes,
}

/// What becomes of writes whose data are zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are writes like all others.
    #[default]
    Off,
    /// They become zero writes.
    On,
    /// They become zero writes that may unmap.
    Unmap,
}

impl DetectZeroes {
    /// The option's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }

    /// The zero write that a write of zeroes with these flags becomes; `None` if it stays a write.
    pub(crate) fn zero_write(self, flags: WriteFlags) -> Option<WriteFlags> {
        match self {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(flags),
            DetectZeroes::Unmap => Some(flags | WriteFlags::MAY_UNMAP),
        }
    }
}

/// What a node keeps while snapshots come and go.
#[derive(Debug, Default)]
pub struct NodeState {
    /// Leases of plans handed out by the node's driver.
    pub epochs: Epochs,
    /// Requests to the driver that were given up and have not ended.
    pub(crate) late: Late,
    /// Requests that have come to the node.
    pub counters: Counters,
    threshold: Threshold,
    /// Where the driver's notices go; nowhere for a node outside of a graph.
    sink: Option<NoticeSink>,
}

impl NodeState {
    pub(crate) fn of(sink: NoticeSink) -> NodeState {
        NodeState { sink: Some(sink), ..NodeState::default() }
    }

    /// Keeps the places that the node's driver tells of from being reused. Must be taken *before* the driver is asked.
    pub fn lease(self: &Arc<Self>) -> Lease<'_> {
        Lease::new(self)
    }

    /// Requests that were given up, and that the storage still works on.
    pub fn given_up(&self) -> usize {
        self.late.count()
    }

    /// Waits until there are no such requests.
    pub(crate) async fn no_more_given_up(&self) {
        self.late.ended().await;
    }

    /// Tells whoever manages the graph about something that no request can tell.
    pub fn notice(&self, notice: Notice) {
        if let Some(sink) = &self.sink {
            sink.notices.raise(&sink.node, notice);
        }
    }

    /// Announces the first write or zero write that ends beyond `at` bytes ([`Notice::WriteThreshold`]); `None` for
    /// none.
    pub fn set_write_threshold(&self, at: Option<u64>) {
        self.threshold.set(at);
    }

    /// The threshold that no write has passed yet.
    pub fn write_threshold(&self) -> Option<u64> {
        self.threshold.get()
    }

    /// A request has come to the node.
    #[inline]
    pub(crate) fn arrived(&self, at: Place, span: Span) {
        self.counters.arrived(at, span.len(), span.end());
        if at.writes()
            && let Some(threshold) = self.threshold.passed_by(span.end())
        {
            self.notice(Notice::WriteThreshold { threshold, exceeded: span.end() - threshold });
        }
    }
}

/// An edge to a child, as granted by the solver.
#[derive(Clone)]
pub struct ChildEdge {
    /// The option's name: `file`, `backing`, ...
    pub name: &'static str,
    /// What the child is to the parent.
    pub role: ChildRole,
    /// The child.
    pub node: Arc<Node>,
    /// What the solver granted on this edge.
    pub claim: Claim,
}

/// A node in one snapshot. When a child link or a grant changes, the node and all nodes
/// above it are made anew; driver and state stay the same.
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// The name was made up by the program.
    pub anonymous: bool,
    /// The driver.
    pub driver: Arc<dyn Driver>,
    /// Children, in the driver's order.
    pub children: Box<[ChildEdge]>,
    /// Common properties.
    pub flags: NodeFlags,
    /// What stays over snapshots.
    pub state: Arc<NodeState>,
    /// The operation that interposed the node, if one did.
    pub owner: Option<OpId>,
    /// The options it was opened with, for `json:` names and saving.
    pub options: Value,
    /// Whether [`Driver::plan`] answers are leases (cached from the registry row).
    pub(crate) maps: bool,
    /// See [`Node::hears_events`].
    pub(crate) hears: bool,
    /// Of a transparent node: what shows through it.
    pub(crate) shown: Option<Shown>,
}

/// What shows through a transparent node.
pub(crate) struct Shown {
    /// The nearest node below that is not transparent.
    node: Arc<Node>,
    /// The nodes that are stepped over on the way there: the transparent one itself, then those below it.
    over: Box<[Arc<NodeState>]>,
}

/// Sizes of nodes are multiples of this, as guests see disks in sectors: the last part of a sector reads as zeroes.
const SECTOR: u64 = 512;

impl Node {
    /// Size in bytes: that of the driver, rounded up to a sector of 512 bytes. One rule for all nodes, so that an image has
    /// one size, whoever asks. Drivers get requests for the rest of their last sector: it reads as zeroes.
    pub fn size(&self) -> u64 {
        let n = self.answering();
        let size = n.driver.size(n);
        size.min(Span::MAX_SIZE).next_multiple_of(SECTOR)
    }

    /// The node that requests to this one reach first: itself, or what shows through it.
    pub(crate) fn answering(&self) -> &Node {
        self.shown.as_ref().map_or(self, |s| &s.node)
    }

    /// Calls `each` with the states of the nodes that a request to this one visits before it is planned: those that
    /// are stepped over, and the answering one.
    #[inline]
    pub(crate) fn visited(&self, each: impl Fn(&NodeState)) {
        match &self.shown {
            None => each(&self.state),
            Some(shown) => {
                shown.over.iter().for_each(|s| each(s));
                each(&shown.node.state);
            }
        }
    }

    /// What [`Node::shown`] has to be for a node with this driver, state, flags and children.
    pub(crate) fn shown_through(
        driver: &dyn Driver,
        state: &Arc<NodeState>,
        flags: NodeFlags,
        children: &[ChildEdge],
    ) -> Option<Shown> {
        let (true, [only]) = (driver.access_rule().table.transparent, children) else { return None };
        // A node that looks at what is written must be asked.
        if only.node.hears || flags.detect_zeroes != DetectZeroes::Off {
            return None;
        }
        let below = only.node.shown.as_ref();
        let over = std::iter::once(state).chain(below.iter().flat_map(|s| s.over.iter()));
        Some(Shown {
            node: below.map_or_else(|| only.node.clone(), |s| s.node.clone()),
            over: over.cloned().collect(),
        })
    }

    /// Whether somebody listens to the events that a parent of this node comes to: then the parent has to raise
    /// them, which it can't do in a plan (a plan may be made without the request being sent).
    pub fn hears_events(&self) -> bool {
        self.hears
    }

    /// What [`Node::hears_events`] has to be for a driver with these children. Filters pass events on.
    pub(crate) fn hears_through(driver: &dyn Driver, children: &[ChildEdge]) -> bool {
        let rule = driver.access_rule();
        rule.table.receives_events || children.iter().any(|c| c.node.hears && rule.role(c.role).events)
    }

    /// A child by the option's name.
    pub fn child(&self, name: &str) -> Option<&ChildEdge> {
        self.children.iter().find(|c| c.name == name)
    }

    /// The index of a child by the option's name.
    pub fn child_index(&self, name: &str) -> Option<usize> {
        self.children.iter().position(|c| c.name == name)
    }

    /// The backing node, if there is one.
    pub fn backing(&self) -> Option<&Arc<Node>> {
        self.children.iter().find(|c| c.role == ChildRole::Backing).map(|c| &c.node)
    }

    /// The next node that shows the same data (through a filter).
    pub fn filtered(&self) -> Option<&Arc<Node>> {
        self.children.iter().find(|c| c.role == ChildRole::Filtered).map(|c| &c.node)
    }

    /// The nodes below and including this one, each once, parents before children.
    pub fn subtree(self: &Arc<Node>) -> Vec<Arc<Node>> {
        let (mut out, mut seen) = (Vec::new(), HashSet::new());
        let mut todo = vec![self.clone()];
        while let Some(n) = todo.pop() {
            if seen.insert(Arc::as_ptr(&n)) {
                todo.extend(n.children.iter().rev().map(|c| c.node.clone()));
                out.push(n);
            }
        }
        out
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {}", self.name, self.driver.kind().name)?;
        for c in &self.children {
            write!(f, " {}={}", c.name, c.node.name)?;
        }
        write!(f, ")")
    }
}
