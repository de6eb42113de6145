//! What a graph is made of, in the form that drafts change: nodes, links, users, operations and their claims.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use dolmen_types::{ChildRole, Claim, NodeName, OpId, Value};
use indexmap::IndexMap;

use crate::draft::driver_op;
use crate::notice::Notices;
use crate::{
    ClaimScope, Driver, Node, NodeDef, NodeState, OpClaim, OpInfo, TopoClaim, TopoNode, TopoUser, Topology,
    UserEdge,
};

#[derive(Clone)]
pub(crate) struct DraftChild {
    pub(crate) name: &'static str,
    pub(crate) role: ChildRole,
    pub(crate) node: NodeName,
}

#[derive(Clone)]
pub(crate) struct DraftNode {
    pub(crate) def: NodeDef,
    /// `None` while the driver is being opened.
    pub(crate) driver: Option<Arc<dyn Driver>>,
    /// The leaf could only be opened for reading.
    pub(crate) forced_read_only: bool,
    /// Its options have changed: the driver has to be opened again.
    pub(crate) reopening: bool,
    /// It holds another image from now on, so nothing of the old driver goes on.
    pub(crate) other_image: bool,
    /// What it was told about its parents was said to a driver with other options.
    pub(crate) retell: bool,
    /// Options that follow the parent that it is defined in.
    pub(crate) inherits: Vec<&'static str>,
    pub(crate) children: Vec<DraftChild>,
    pub(crate) state: Arc<NodeState>,
}

impl DraftNode {
    /// Whether a leaf ends on a multiple of its request alignment. Writing the block in
    /// which an unaligned one ends would make it longer. Nodes above a leaf have no
    /// blocks of their own.
    fn is_aligned(&self) -> bool {
        let Some(driver) = self.driver.as_ref().filter(|_| self.children.is_empty()) else { return true };
        let node = Node {
            name: self.def.name.clone(),
            anonymous: self.def.anonymous,
            maps: false,
            driver: driver.clone(),
            children: Box::new([]),
            shown: None,
            hears: false,
            flags: self.def.flags,
            state: self.state.clone(),
            owner: None,
            options: Value::Null,
        };
        node.size().is_multiple_of(driver.limits(&node).request_alignment.max(1).into())
    }
}

#[derive(Clone)]
pub(crate) struct DraftUser {
    pub(crate) op: OpId,
    pub(crate) node: NodeName,
    pub(crate) claim: Claim,
    /// Attached beneath whatever is interposed on the node, on purpose.
    pub(crate) below_filters: bool,
    /// It stays attached while the node is inactive, and can do nothing meanwhile.
    pub(crate) may_be_inactive: bool,
    /// `None` until it has been published.
    pub(crate) edge: Option<Arc<UserEdge>>,
}

/// Nodes in the order in which they were added, and by name. Copies share what has not changed.
#[derive(Clone, Default)]
pub(crate) struct Nodes(IndexMap<NodeName, Arc<DraftNode>>);

impl Nodes {
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &DraftNode> + Clone {
        self.0.values().map(|n| &**n)
    }

    pub(crate) fn shared(&self) -> impl Iterator<Item = (&NodeName, &Arc<DraftNode>)> {
        self.0.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&DraftNode> {
        self.0.get(name).map(|n| &**n)
    }

    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut DraftNode> {
        self.0.get_mut(name).map(Arc::make_mut)
    }

    /// The position of a node, which is its number in the solver's topology.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.0.get_index_of(name)
    }

    pub(crate) fn push(&mut self, node: Arc<DraftNode>) {
        self.0.insert(node.def.name.clone(), node);
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<DraftNode>> {
        self.0.shift_remove(name)
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(&DraftNode) -> bool) {
        self.0.retain(|_, n| keep(n));
    }

    /// Leads all links to `from` to `to`, but for those of the nodes of which `stays` is true. Gives those that had one.
    pub(crate) fn relink(
        &mut self,
        from: &NodeName,
        to: &NodeName,
        stays: impl Fn(&DraftNode) -> bool,
    ) -> Vec<(NodeName, ChildRole)> {
        let mut moved = Vec::new();
        for (name, node) in &mut self.0 {
            if node.children.iter().any(|c| c.node == *from) && !stays(node) {
                for c in Arc::make_mut(node).children.iter_mut().filter(|c| c.node == *from) {
                    c.node = to.clone();
                    moved.push((name.clone(), c.role));
                }
            }
        }
        moved
    }
}

impl Index<usize> for Nodes {
    type Output = DraftNode;

    fn index(&self, i: usize) -> &DraftNode {
        &self.0[i]
    }
}

impl IndexMut<usize> for Nodes {
    fn index_mut(&mut self, i: usize) -> &mut DraftNode {
        Arc::make_mut(&mut self.0[i])
    }
}

/// What all graphs of one owner share.
#[derive(Default)]
pub(crate) struct Setting {
    /// For names that are made up: drafts that are worked on at the same time must not make up the same.
    pub(crate) next_name: AtomicU32,
    /// Numbers the parts of the graph.
    pub(crate) next_part: AtomicU64,
    pub(crate) notices: Arc<Notices>,
    /// Conflicts are ignored: see [`GraphOwner::unchecked`](crate::GraphOwner::unchecked).
    pub(crate) unchecked: bool,
}

/// A graph or a part of one: nodes, links, users, operations and their claims.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) nodes: Nodes,
    pub(crate) users: Vec<DraftUser>,
    pub(crate) ops: Vec<OpInfo>,
    pub(crate) claims: Vec<OpClaim>,
    /// Overlays that operations keep right while they write what these lie over.
    pub(crate) kept: Vec<(OpId, NodeName)>,
    /// Operations that take data away for good.
    pub(crate) destructive: Vec<OpId>,
    /// Interposed filters by the node they stand on, innermost first.
    pub(crate) over: BTreeMap<NodeName, Vec<NodeName>>,
    /// What each leaf was last told that its parents need and allow.
    pub(crate) told: BTreeMap<NodeName, Claim>,
}

impl State {
    pub(crate) fn node(&self, name: &str) -> Option<&DraftNode> {
        self.nodes.get(name)
    }

    pub(crate) fn index(&self, name: &NodeName) -> usize {
        self.nodes.position(name).expect("links lead to nodes of the same part of the graph")
    }

    pub(crate) fn op(&self, id: &str) -> Option<&OpInfo> {
        self.ops.iter().find(|o| o.id.as_str() == id)
    }

    /// What the solver gets, and the scopes by number.
    pub(crate) fn topology(&self) -> Topology {
        let ops: HashMap<&OpId, u32> = self.ops.iter().zip(0..).map(|(o, i)| (&o.id, i)).collect();
        let op = |id: &OpId| ops[id];
        let number = |n: &NodeName| self.index(n);
        let mut scopes: Vec<&ClaimScope> = Vec::new();
        let claims = self
            .claims
            .iter()
            .map(|c| TopoClaim {
                op: op(&c.op),
                node: number(&c.node),
                claim: c.claim,
                scope: (!c.scope.is_node()).then(|| {
                    scopes.iter().position(|s| **s == c.scope).unwrap_or_else(|| {
                        scopes.push(&c.scope);
                        scopes.len() - 1
                    }) as u32
                }),
            })
            .collect();
        let beneath = |(i, c): (usize, &OpClaim)| (c.scope == ClaimScope::Beneath).then_some(i);
        Topology {
            beneath: self.claims.iter().enumerate().filter_map(beneath).collect(),
            nodes: self
                .nodes
                .iter()
                .map(|n| TopoNode {
                    rule: n.driver.as_ref().filter(|_| !n.reopening).map_or(n.def.rule, |d| d.access_rule()),
                    writable: !n.def.flags.read_only && !n.forced_read_only,
                    active: !n.def.flags.inactive,
                    aligned: n.is_aligned(),
                    // What a driver claims by itself does not exclude what it does itself.
                    owner: n.def.owner.as_ref().map(op).or_else(|| ops.get(&driver_op(&n.def.name)).copied()),
                    children: n.children.iter().map(|c| (c.role, number(&c.node))).collect(),
                })
                .collect(),
            users: self
                .users
                .iter()
                .map(|u| {
                    let node = number(&u.node);
                    let idle = u.may_be_inactive && self.nodes[node].def.flags.inactive;
                    TopoUser { op: op(&u.op), node, claim: if idle { Claim::IDLE } else { u.claim } }
                })
                .collect(),
            claims,
            stances: self.stances(&op),
        }
    }

    /// The nodes from `from` down, itself included. Each node is looked at once: a graph may have more paths than atoms.
    pub(crate) fn below(&self, from: &NodeName) -> HashSet<&NodeName> {
        let mut seen = HashSet::new();
        let mut todo = vec![from];
        while let Some(name) = todo.pop() {
            if let Some(node) = self.nodes.get(name)
                && seen.insert(&node.def.name)
            {
                todo.extend(node.children.iter().map(|c| &c.node));
            }
        }
        seen
    }

    /// Whether there is a way of more than `most` nodes from a root to a leaf. Cycles have an end here.
    pub(crate) fn is_deeper_than(&self, most: usize) -> bool {
        let n = self.nodes.len();
        if n <= most {
            return false;
        }
        let children = |i: usize| self.nodes[i].children.iter().map(|c| self.index(&c.node));
        let mut parents = vec![0usize; n];
        (0..n).flat_map(children).for_each(|c| parents[c] += 1);
        let mut depth = vec![1usize; n];
        let mut todo: Vec<usize> = (0..n).filter(|&i| parents[i] == 0).collect();
        while let Some(i) = todo.pop() {
            for c in children(i) {
                depth[c] = depth[c].max(depth[i] + 1);
                parents[c] -= 1;
                if parents[c] == 0 {
                    todo.push(c);
                }
            }
        }
        depth.into_iter().any(|d| d > most)
    }

    /// Whether `to` is `from` or below it.
    pub(crate) fn reaches(&self, from: &NodeName, to: &NodeName) -> bool {
        let has_parent = || self.nodes.iter().any(|n| n.children.iter().any(|c| c.node == *to));
        from == to || (has_parent() && self.below(from).contains(to))
    }

    /// Adds another part of the graph.
    pub(crate) fn add(&mut self, part: &State) {
        part.nodes.shared().for_each(|(_, n)| self.nodes.push(n.clone()));
        self.users.extend_from_slice(&part.users);
        self.ops.extend_from_slice(&part.ops);
        self.claims.extend_from_slice(&part.claims);
        self.kept.extend_from_slice(&part.kept);
        self.destructive.extend_from_slice(&part.destructive);
        self.over.extend(part.over.iter().map(|(k, v)| (k.clone(), v.clone())));
        self.told.extend(part.told.iter().map(|(k, v)| (k.clone(), *v)));
    }

    /// Drops the nodes and operations of these names. Whoever calls it names all that hang together.
    pub(crate) fn drop_all(&mut self, names: &BTreeSet<String>) {
        let (node, op) = (|n: &NodeName| names.contains(n.as_str()), |o: &OpId| names.contains(o.as_str()));
        self.users.retain(|u| !op(&u.op));
        self.claims.retain(|c| !op(&c.op));
        self.kept.retain(|(o, _)| !op(o));
        self.destructive.retain(|o| !op(o));
        self.ops.retain(|o| !op(&o.id));
        self.nodes.retain(|n| !node(&n.def.name));
        self.over.retain(|n, _| !node(n));
        self.told.retain(|n, _| !node(n));
    }

    /// The nodes that a parent, a user, a pinning claim or an interposed filter holds.
    pub(crate) fn held(&self) -> BTreeSet<NodeName> {
        let links = self.nodes.iter().flat_map(|n| &n.children).map(|c| &c.node);
        let users = self.users.iter().map(|u| &u.node);
        let pins = self.claims.iter().filter(|c| c.pins).map(|c| &c.node);
        links.chain(users).chain(pins).chain(self.over.keys()).cloned().collect()
    }
}
