//! What a draft knows of its nodes: names, links, chains, overlays, and who uses what.

use std::collections::BTreeSet;
use std::sync::Arc;

use dolmen_types::{Actions, ChildRole, NodeName, OpId, Result, Value};

use crate::draft::no_such_node;
use crate::solver::wishes;
use crate::state::{DraftNode, State};
use crate::{Draft, Driver, DriverKind, OpInfo};

impl Draft {
    /// The part of the graph in which a node is, as far as this draft goes.
    pub(crate) fn around(&self, node: &str) -> &State {
        if self.state.node(node).is_none()
            && let Some(part) = self.base.part_of_node(node).filter(|p| !self.taken.contains_key(p))
            && let Some(part) = self.base.part(part)
        {
            return &part.state;
        }
        &self.state
    }

    /// A node of the candidate.
    pub(crate) fn node(&self, name: &str) -> Option<&DraftNode> {
        self.around(name).node(name)
    }

    /// An operation of the candidate.
    pub fn op(&self, id: &str) -> Option<&OpInfo> {
        let untaken = || {
            let part = self.base.part_of_op(id).filter(|p| !self.taken.contains_key(p))?;
            self.base.part(part)?.state.op(id)
        };
        self.state.op(id).or_else(untaken)
    }

    /// The parts of the candidate: what was taken in or is new, and the others.
    fn parts(&self) -> impl Iterator<Item = &State> {
        let others = self.base.parts().filter(|(k, _)| !self.taken.contains_key(k)).map(|(_, p)| &p.state);
        std::iter::once(&*self.state).chain(others)
    }

    /// Whether a node of that name is in the candidate.
    pub fn has_node(&self, name: &str) -> bool {
        self.node(name).is_some()
    }

    /// The name of a node that is in the candidate.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, name: &str) -> Result<NodeName> {
        self.node(name).map(|n| n.def.name.clone()).ok_or_else(|| no_such_node(name))
    }

    /// How many nodes the candidate has.
    pub(crate) fn node_count(&self) -> usize {
        let taken: usize = self.taken.values().map(|p| p.state.nodes.len()).sum();
        self.base.len() - taken + self.state.nodes.len()
    }

    /// The names of all nodes of the candidate.
    pub fn node_names(&self) -> impl Iterator<Item = &NodeName> {
        self.parts().flat_map(|s| s.nodes.iter()).map(|n| &n.def.name)
    }

    /// Driver of a node that has been opened.
    pub fn driver(&self, name: &str) -> Option<&Arc<dyn Driver>> {
        self.node(name)?.driver.as_ref()
    }

    /// Registry row of a node.
    pub fn kind(&self, name: &str) -> Option<&'static DriverKind> {
        self.node(name).map(|n| n.def.kind)
    }

    /// The options that a node was opened with.
    pub(crate) fn options_of(&self, name: &NodeName) -> Value {
        self.node(name).map_or(Value::Null, |n| n.def.options.clone())
    }

    /// A child of a node by the option's name.
    pub fn child(&self, name: &str, child: &str) -> Option<&NodeName> {
        self.node(name)?.children.iter().find(|c| c.name == child).map(|c| &c.node)
    }

    /// Where something new that names `node` attaches: to the outermost filter that an
    /// operation has interposed on it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resolve(&self, node: &str) -> Result<NodeName> {
        let mut name = self.find(node)?;
        let around = self.around(node);
        while let Some(outer) = around.over.get(&name).and_then(|o| o.last()) {
            name = outer.clone();
        }
        Ok(name)
    }

    /// Who uses a node, in words; `None` if nobody does.
    pub fn used_by(&self, node: &NodeName) -> Option<String> {
        let s = self.around(node);
        let by = |op: &OpId| {
            let info = s.ops.iter().find(|o| o.id == *op);
            match info {
                Some(o) => format!("{} '{}' ({})", o.kind, o.id, o.detail),
                None => format!("'{op}'"),
            }
        };
        if let Some(p) = s.nodes.iter().find(|n| n.children.iter().any(|c| c.node == *node)) {
            // A filter without a name says nothing to anybody, whose it is does.
            if let Some(op) = p.def.owner.as_ref().filter(|_| p.def.anonymous) {
                return Some(by(op));
            }
            let role = p.children.iter().find(|c| c.node == *node).map_or("child", |c| c.name);
            return Some(format!("it is the '{role}' child of node '{}'", p.def.name));
        }
        if let Some(u) = s.users.iter().find(|u| u.node == *node) {
            return Some(by(&u.op));
        }
        if let Some(c) = s.claims.iter().find(|c| c.node == *node && c.pins) {
            return Some(format!("{} {}", by(&c.op), c.why));
        }
        s.over.get(node).and_then(|o| o.first()).map(|f| format!("filter '{f}' stands on it"))
    }

    /// The operations of the candidate.
    pub fn ops(&self) -> impl Iterator<Item = &OpInfo> {
        self.parts().flat_map(|s| &s.ops)
    }

    /// The node that shows the same data as `node` and is not a filter.
    pub fn content(&self, node: &NodeName) -> NodeName {
        let mut at = node.clone();
        while let Some(next) =
            self.node(&at).and_then(|n| n.children.iter().find(|c| c.role == ChildRole::Filtered))
        {
            at = next.node.clone();
        }
        at
    }

    /// The nodes that `node` only shows: those below it down to [`Draft::content`], none if it is no filter.
    pub fn shown_by(&self, node: &NodeName) -> Vec<NodeName> {
        let filtered = |name: &NodeName| {
            let child = self.node(name)?.children.iter().find(|c| c.role == ChildRole::Filtered)?;
            Some(child.node.clone())
        };
        std::iter::successors(filtered(node), filtered).collect()
    }

    /// The nodes from `node` down through filters and backing links, itself first.
    pub fn chain(&self, node: &str) -> Vec<NodeName> {
        let mut out = Vec::new();
        let mut at = self.node(node).map(|n| n.def.name.clone());
        while let Some(name) = at {
            let next = self.node(&name).and_then(|n| {
                n.children.iter().find(|c| matches!(c.role, ChildRole::Filtered | ChildRole::Backing))
            });
            at = next.map(|c| c.node.clone());
            out.push(name);
        }
        out
    }

    /// The images of the chain of `node`, filters left out.
    pub fn images(&self, node: &str) -> Vec<NodeName> {
        let is_image = |n: &NodeName| self.content(n) == *n;
        self.chain(node).into_iter().filter(is_image).collect()
    }

    /// The nodes that have `node` as their backing file, directly or through filters.
    pub fn overlays(&self, node: &NodeName) -> Vec<NodeName> {
        let content = self.content(node);
        let over = |n: &&DraftNode| {
            n.children.iter().any(|c| c.role == ChildRole::Backing && self.content(&c.node) == content)
        };
        self.around(node).nodes.iter().filter(over).map(|n| n.def.name.clone()).collect()
    }

    /// The nodes that have `node` as a child, and what it is to them.
    pub fn parents(&self, node: &str) -> Vec<(NodeName, ChildRole)> {
        let around = self.around(node).nodes.iter();
        let links = around.flat_map(|n| n.children.iter().map(move |c| (n, c)));
        links.filter(|(_, c)| c.node.as_str() == node).map(|(n, c)| (n.def.name.clone(), c.role)).collect()
    }

    /// Whether the node may be written as far as its own options go.
    pub fn is_read_only(&self, node: &str) -> bool {
        self.node(node).is_some_and(|n| n.def.flags.read_only || n.forced_read_only)
    }

    /// The filters that operations have interposed on `node`, innermost first.
    pub fn interposed(&self, node: &NodeName) -> Vec<NodeName> {
        self.around(node).over.get(node).cloned().unwrap_or_default()
    }

    /// The nodes above `node` whose data change when its data do, itself included.
    pub fn readers(&self, node: &NodeName) -> Vec<NodeName> {
        let around = self.around(node);
        let mut out = vec![node.clone()];
        let mut next = 0;
        while let Some(at) = out.get(next).cloned() {
            next += 1;
            for n in around.nodes.iter() {
                let reads = n.children.iter().any(|c| c.node == at && c.role != ChildRole::Target);
                if reads && !out.contains(&n.def.name) {
                    out.push(n.def.name.clone());
                }
            }
        }
        out
    }

    /// Whether a node takes part.
    pub fn is_active(&self, node: &str) -> bool {
        self.node(node).is_some_and(|n| !n.def.flags.inactive)
    }

    /// The operation that has put a node into the graph and takes it out again.
    pub fn owner_of(&self, node: &NodeName) -> Option<&OpId> {
        self.node(node).and_then(|n| n.def.owner.as_ref())
    }

    /// Whether somebody else than `op` reads the node.
    pub fn is_read_without(&self, op: &OpId, node: &NodeName) -> bool {
        let mut then = State::clone(self.around(node));
        then.users.retain(|u| u.op != *op);
        let i = then.index(node);
        wishes(&then.topology()).is_some_and(|w| w.total[i].needs.contains(Actions::D))
    }

    /// The names of everything that a change of one of these may have to do with: nodes and operations
    /// that are linked to them in any way, and the names themselves. Changes whose names have nothing
    /// in common are independent.
    pub fn connected<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        let mut out = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for name in names {
            out.insert(name.to_owned());
            for part in self.base.parts_of(name) {
                if seen.insert(part)
                    && let Some(part) = self.base.part(part)
                {
                    out.extend(crate::published::names(&part.state));
                }
            }
        }
        out
    }
}
