//! The published graph: an immutable value in parts that have nothing to do with one another.
//!
//! A part is what hangs together by links, users, claims and filters. A change looks only at the parts that it names
//! ([`Draft`](crate::Draft)), and publishing replaces those: what a change costs grows with its own part of the graph,
//! not with the number of disks that a daemon serves. All indexes are persistent maps, so that the next graph shares
//! with the one before all that has not changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

use dolmen_types::{NodeName, OpId};
use indexmap::IndexMap;
use rpds::{HashTrieMapSync, RedBlackTreeMapSync};

use crate::draft::driver_op;
use crate::state::{Setting, State};
use crate::{FileId, Node, OpInfo, UserEdge};

/// Nodes and operations that are linked in any way, and nothing else.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) state: State,
    /// Its nodes as requests see them, children before parents.
    pub(crate) nodes: IndexMap<NodeName, Arc<Node>>,
    /// The files that its leaves have open; found out when it is asked for.
    files: OnceLock<Vec<(FileId, NodeName)>>,
}

impl Part {
    fn files(&self) -> &[(FileId, NodeName)] {
        self.files.get_or_init(|| {
            let leaves = self.nodes.values().filter(|n| n.children.is_empty());
            leaves.filter_map(|n| Some((n.driver.describe(n).file?, n.name.clone()))).collect()
        })
    }
}

/// An immutable snapshot of all nodes and users.
#[derive(Clone)]
pub struct Graph {
    /// Counts the published snapshots.
    pub generation: u64,
    parts: RedBlackTreeMapSync<u64, Arc<Part>>,
    /// The part of each node.
    nodes: HashTrieMapSync<NodeName, u64>,
    /// The part of each operation.
    ops: HashTrieMapSync<OpId, u64>,
}

impl Graph {
    /// The graph with nothing in it.
    pub fn empty() -> Graph {
        Graph {
            generation: 0,
            parts: RedBlackTreeMapSync::new_sync(),
            nodes: HashTrieMapSync::new_sync(),
            ops: HashTrieMapSync::new_sync(),
        }
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.part(self.part_of_node(name)?)?.nodes.get(name)
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.size()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All nodes, in no order that means anything.
    pub fn each_node(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.parts.values().flat_map(|p| p.nodes.values())
    }

    /// The nodes that are linked to this one in any way, itself included; children before parents.
    pub fn around(&self, node: &str) -> impl Iterator<Item = &Arc<Node>> + use<'_> {
        let part = self.part_of_node(node).and_then(|p| self.part(p));
        part.into_iter().flat_map(|p| p.nodes.values())
    }

    /// All nodes, children before parents; of several orders that one which goes by names.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        let by_name: BTreeMap<&NodeName, &Arc<Node>> = self.each_node().map(|n| (&n.name, n)).collect();
        children_first(by_name.into_values()).into_values().collect()
    }

    /// The edges of all users; those of one operation are in the order in which they were added.
    pub fn users(&self) -> impl Iterator<Item = &Arc<UserEdge>> {
        self.parts.values().flat_map(|p| &p.state.users).filter_map(|u| u.edge.as_ref())
    }

    /// The edges of an operation, in the order in which they were added.
    pub fn edges<'a>(&'a self, op: &'a str) -> impl Iterator<Item = &'a Arc<UserEdge>> + use<'a> {
        let part = self.part_of_op(op).and_then(|p| self.part(p));
        let users = part.into_iter().flat_map(|p| &p.state.users);
        users.filter(move |u| u.op.as_str() == op).filter_map(|u| u.edge.as_ref())
    }

    /// An operation.
    pub fn op(&self, id: &str) -> Option<&OpInfo> {
        self.part(self.part_of_op(id)?)?.state.op(id)
    }

    /// The node that has a file open, in the parts of which `except` is not true.
    pub(crate) fn holder_of(&self, file: FileId, except: impl Fn(u64) -> bool) -> Option<&NodeName> {
        let files = self.parts().filter(|(k, _)| !except(*k)).flat_map(|(_, p)| p.files());
        files.into_iter().find(|(f, _)| *f == file).map(|(_, name)| name)
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = (u64, &Arc<Part>)> {
        self.parts.iter().map(|(k, p)| (*k, p))
    }

    pub(crate) fn part(&self, number: u64) -> Option<&Arc<Part>> {
        self.parts.get(&number)
    }

    pub(crate) fn part_of_node(&self, name: &str) -> Option<u64> {
        self.nodes.get(name).copied()
    }

    pub(crate) fn part_of_op(&self, id: &str) -> Option<u64> {
        self.ops.get(id).copied()
    }

    /// The parts that a name leads to: that of a node, and that of an operation, if it is another.
    pub(crate) fn parts_of(&self, name: &str) -> impl Iterator<Item = u64> + use<> {
        let (node, op) = (self.part_of_node(name), self.part_of_op(name));
        node.into_iter().chain(op.filter(|_| op != node))
    }

    /// The graph with `state` in the place of the parts `taken`.
    pub(crate) fn with(
        &self,
        taken: impl IntoIterator<Item = u64>,
        state: &State,
        built: &BTreeMap<NodeName, Arc<Node>>,
        setting: &Setting,
    ) -> Graph {
        let mut next = self.clone();
        next.generation += 1;
        for number in taken {
            let Some(part) = self.part(number) else { continue };
            for n in part.state.nodes.iter() {
                next.nodes.remove_mut(&n.def.name);
            }
            for o in &part.state.ops {
                next.ops.remove_mut(&o.id);
            }
            next.parts.remove_mut(&number);
        }
        for state in apart(state) {
            let nodes = children_first(state.nodes.iter().filter_map(|n| built.get(&n.def.name)));
            next.put(setting.next_part.fetch_add(1, Relaxed), Part { state, nodes, files: OnceLock::new() });
        }
        next
    }

    fn put(&mut self, number: u64, part: Part) {
        for n in part.state.nodes.iter() {
            self.nodes.insert_mut(n.def.name.clone(), number);
        }
        for o in &part.state.ops {
            self.ops.insert_mut(o.id.clone(), number);
        }
        self.parts.insert_mut(number, Arc::new(part));
    }

    /// The graph with other words for an operation; `None` if it has them already, or is not there.
    pub(crate) fn describe_op(&self, op: &OpId, detail: &str) -> Option<Graph> {
        let number = self.part_of_op(op)?;
        let part = self.part(number)?;
        part.state.op(op).filter(|o| o.detail != detail)?;
        let mut part = Part::clone(part);
        part.state.ops.iter_mut().filter(|o| o.id == *op).for_each(|o| detail.clone_into(&mut o.detail));
        Some(Graph { parts: self.parts.insert(number, Arc::new(part)), ..self.clone() })
    }
}

/// The given nodes and all below them, each once, children before parents.
pub(crate) fn children_first<'a>(
    nodes: impl IntoIterator<Item = &'a Arc<Node>>,
) -> IndexMap<NodeName, Arc<Node>> {
    fn visit(n: &Arc<Node>, seen: &mut HashSet<*const Node>, out: &mut IndexMap<NodeName, Arc<Node>>) {
        if seen.insert(Arc::as_ptr(n)) {
            n.children.iter().for_each(|c| visit(&c.node, seen, out));
            out.insert(n.name.clone(), n.clone());
        }
    }
    let (mut seen, mut out) = (HashSet::new(), IndexMap::new());
    nodes.into_iter().for_each(|n| visit(n, &mut seen, &mut out));
    out
}

/// The parts of a graph that have nothing to do with one another, everything in its order.
fn apart(state: &State) -> Vec<State> {
    let mut groups = Groups::of(state);
    let mut out: Vec<State> = Vec::new();
    let mut number: HashMap<usize, usize> = HashMap::new();
    let mut part = |out: &mut Vec<State>, group: usize| {
        *number.entry(group).or_insert_with(|| {
            out.push(State::default());
            out.len() - 1
        })
    };
    for (name, node) in state.nodes.shared() {
        let at = part(&mut out, groups.of_node(name));
        out[at].nodes.push(node.clone());
    }
    for o in &state.ops {
        let at = part(&mut out, groups.of_op(&o.id));
        out[at].ops.push(o.clone());
    }
    for u in &state.users {
        let at = part(&mut out, groups.of_node(&u.node));
        out[at].users.push(u.clone());
    }
    for c in &state.claims {
        let at = part(&mut out, groups.of_node(&c.node));
        out[at].claims.push(c.clone());
    }
    for (op, node) in &state.kept {
        let at = part(&mut out, groups.of_op(op));
        out[at].kept.push((op.clone(), node.clone()));
    }
    for op in &state.destructive {
        let at = part(&mut out, groups.of_op(op));
        out[at].destructive.push(op.clone());
    }
    for (on, filters) in &state.over {
        let at = part(&mut out, groups.of_node(on));
        out[at].over.insert(on.clone(), filters.clone());
    }
    for (node, told) in state.told.iter().filter(|(n, _)| state.nodes.get(n).is_some()) {
        let at = part(&mut out, groups.of_node(node));
        out[at].told.insert(node.clone(), *told);
    }
    out
}

/// Which nodes and operations hang together: disjoint sets.
struct Groups<'a> {
    nodes: &'a State,
    ops: HashMap<&'a OpId, usize>,
    parent: Vec<usize>,
}

impl<'a> Groups<'a> {
    fn of(state: &'a State) -> Groups<'a> {
        let n = state.nodes.len();
        let ops: HashMap<&OpId, usize> = state.ops.iter().zip(n..).map(|(o, i)| (&o.id, i)).collect();
        let parent = (0..n + ops.len()).collect();
        let mut groups = Groups { nodes: state, ops, parent };
        for node in state.nodes.iter() {
            let at = groups.node(&node.def.name);
            for c in &node.children {
                groups.join(at, Some(groups.node(&c.node)));
            }
            let owner = node.def.owner.as_ref().and_then(|o| groups.ops.get(o).copied());
            groups.join(at, owner);
            let own = groups.ops.get(&driver_op(&node.def.name)).copied();
            groups.join(at, own);
        }
        let users = state.users.iter().map(|u| (&u.op, &u.node));
        let claims = state.claims.iter().map(|c| (&c.op, &c.node));
        for (op, node) in users.chain(claims).chain(state.kept.iter().map(|(o, n)| (o, n))) {
            let op = groups.ops.get(op).copied();
            groups.join(groups.node(node), op);
        }
        for (on, filters) in &state.over {
            for f in filters {
                groups.join(groups.node(on), Some(groups.node(f)));
            }
        }
        groups
    }

    fn node(&self, name: &NodeName) -> usize {
        self.nodes.index(name)
    }

    fn root(&mut self, mut at: usize) -> usize {
        while self.parent[at] != at {
            self.parent[at] = self.parent[self.parent[at]];
            at = self.parent[at];
        }
        at
    }

    fn join(&mut self, a: usize, b: Option<usize>) {
        if let Some(b) = b {
            let (a, b) = (self.root(a), self.root(b));
            self.parent[a.max(b)] = a.min(b);
        }
    }

    fn of_node(&mut self, name: &NodeName) -> usize {
        let at = self.node(name);
        self.root(at)
    }

    fn of_op(&mut self, op: &OpId) -> usize {
        let at = self.ops[op];
        self.root(at)
    }
}

/// The names of all nodes and operations of a part.
pub(crate) fn names(part: &State) -> BTreeSet<String> {
    let nodes = part.nodes.iter().map(|n| n.def.name.to_string());
    nodes.chain(part.ops.iter().map(|o| o.id.to_string())).collect()
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.nodes();
        let users: Vec<_> = self.users().collect();
        f.debug_struct("Graph")
            .field("generation", &self.generation)
            .field("nodes", &nodes)
            .field("users", &users)
            .finish()
    }
}
