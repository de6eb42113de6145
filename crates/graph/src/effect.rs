//! What publishing a draft does to what is there: whom it stops, and what has to be durable before.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, Result};

use crate::{ChildEdge, Draft, Node, NodeState, UserEdge, content};

/// What publishing a draft does to what is there.
pub(crate) struct Effect {
    pub(crate) built: Rc<BTreeMap<NodeName, Arc<Node>>>,
    /// Users who are gone.
    pub(crate) gone: Vec<Arc<UserEdge>>,
    /// Users whose path changes.
    pub(crate) moved: Vec<(Arc<UserEdge>, Arc<Node>, Claim)>,
    /// Nodes that existed and that show something else by their links, or whose options change; true for those whose
    /// driver was opened again.
    pub(crate) settled: Vec<(Arc<Node>, bool)>,
    /// Nodes that later flushes do not reach.
    pub(crate) left: Vec<Arc<Node>>,
    /// Nodes where nothing that was given up may still be under way.
    pub(crate) unsettled: Vec<Arc<Node>>,
}

impl Effect {
    pub(crate) fn of(draft: &Draft) -> Result<Effect> {
        draft.check_complete()?;
        let built = draft.solved()?.nodes.clone();
        let users = &draft.state.users;
        let stay: HashSet<_> = users.iter().filter_map(|u| u.edge.as_ref()).map(Arc::as_ptr).collect();
        let stays = |e: &Arc<UserEdge>| stay.contains(&Arc::as_ptr(e));
        let before = draft.taken.values().flat_map(|p| &p.state.users);
        let users_before: Vec<_> = before.filter_map(|u| u.edge.clone()).collect();
        let gone: Vec<_> = users_before.iter().filter(|e| !stays(e)).cloned().collect();
        let moved: Vec<_> = users
            .iter()
            .filter_map(|u| Some((u.edge.clone()?, built[&u.node].clone(), u.claim)))
            .filter(|(e, n, c)| !Arc::ptr_eq(&e.node(), n) || e.claim() != *c)
            .collect();
        let mut settled = Vec::new();
        for old in &draft.published {
            let Some(new) = built.get(&old.name) else { continue };
            let reopened = !Arc::ptr_eq(&old.driver, &new.driver);
            let relinked = shows_else(old, new) && !draft.unflushed.contains(&old.name);
            if (relinked || reopened) && !old.flags.read_only && !old.flags.inactive {
                settled.push((old.clone(), reopened));
            }
        }
        let before = Before { nodes: &draft.published, users: &users_before };
        let left = before.left_behind(&gone, &moved, &built);
        let mut unsettled = before.below_changes(&built);
        unsettled.add(left.iter().cloned());
        let unsettled = unsettled.nodes;
        Ok(Effect { built, gone, moved, settled, left, unsettled })
    }

    /// The users who may have no request in flight when it is published.
    pub(crate) fn stopped(&self) -> Vec<Arc<UserEdge>> {
        self.gone.iter().chain(self.moved.iter().map(|m| &m.0)).cloned().collect()
    }

    /// Whether everything that has to be waited for was waited for when `other` was.
    pub(crate) fn is_within(&self, other: &Effect) -> bool {
        let stopped = other.stopped();
        let (left, unsettled) = (Set::of(other.left.clone()), Set::of(other.unsettled.clone()));
        let same =
            |a: &(Arc<Node>, bool), b: &(Arc<Node>, bool)| Arc::ptr_eq(&a.0.state, &b.0.state) && a.1 == b.1;
        self.stopped().iter().all(|e| stopped.iter().any(|s| Arc::ptr_eq(s, e)))
            && self.settled.iter().all(|n| other.settled.iter().any(|s| same(n, s)))
            && self.left.iter().all(|n| left.has(n))
            && self.unsettled.iter().all(|n| unsettled.has(n))
    }
}

impl Draft {
    /// Makes sure that every node can be built.
    pub(crate) fn check_complete(&self) -> Result<()> {
        let built = self.solved()?.nodes.clone();
        let Some(n) = self.state.nodes.iter().find(|n| !built.contains_key(&n.def.name)) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("node '{}' has no driver, or a child without one", n.def.name),
        ))
    }
}

/// The graph that a draft was copied from.
struct Before<'a> {
    nodes: &'a [Arc<Node>],
    users: &'a [Arc<UserEdge>],
}

impl Before<'_> {
    /// The nodes that hold what has been written and that later flushes do not reach, because a
    /// flush ends at a backing file. What a flush of a user promises covers everything that the
    /// user has written before, wherever it lies; so these nodes have to be durable before the
    /// graph is published.
    ///
    /// They are those that lay on the way of a user's writes and are only read by it from now
    /// on, and those that become a backing file and may hold writes of a user who is gone. A node
    /// that its user does not even read any more is not among them: what was written to it lies
    /// elsewhere now, and who brought it there (a job that replaces a node) has made it durable.
    fn left_behind(
        &self,
        gone: &[Arc<UserEdge>],
        moved: &[(Arc<UserEdge>, Arc<Node>, Claim)],
        built: &BTreeMap<NodeName, Arc<Node>>,
    ) -> Vec<Arc<Node>> {
        let writes = |e: &Arc<UserEdge>| e.claim().needs.intersects(Actions::V | Actions::M);
        let (mut left, mut reached) = (Set::default(), Set::default());
        for edge in self.users.iter().filter(|e| writes(e)) {
            if gone.iter().any(|g| Arc::ptr_eq(g, edge)) {
                continue;
            }
            match moved.iter().find(|m| Arc::ptr_eq(&m.0, edge)) {
                None => reached.add(flushed_with(&edge.node()).nodes),
                Some((_, new, _)) => {
                    let (old_way, new_way) = (flushed_with(&edge.node()), flushed_with(new));
                    let read = Set::of(new.subtree());
                    left.add(old_way.nodes.into_iter().filter(|n| read.has(n) && !new_way.has(n)));
                    reached.add(new_way.nodes);
                }
            }
        }
        let was_below = below_overlays(self.nodes.iter());
        let becomes = below_overlays(built.values()).nodes.into_iter();
        left.add(becomes.filter(|n| !was_below.has(n) && !reached.has(n)));
        // Parents first, and nothing twice.
        let mut out: Vec<Arc<Node>> = Vec::new();
        let mut done = Set::default();
        for node in self.nodes.iter().rev().filter(|n| left.has(n)) {
            if !done.has(node) && !node.flags.read_only && !node.flags.inactive {
                done.add(flushed_with(node).nodes);
                out.push(node.clone());
            }
        }
        out
    }

    /// The nodes that lose or change their driver or a link, and all below them: nothing that was given up may still be
    /// under way there when that happens.
    fn below_changes(&self, built: &BTreeMap<NodeName, Arc<Node>>) -> Set {
        let mut out = Set::default();
        for old in self.nodes {
            let changes = built.get(&old.name).is_none_or(|new| {
                !Arc::ptr_eq(&old.state, &new.state)
                    || !Arc::ptr_eq(&old.driver, &new.driver)
                    || relinked(old, new)
            });
            if !changes {
                continue;
            }
            // What is in the set came with all that is below it.
            if !out.has(old) {
                out.add(old.subtree());
            }
        }
        out
    }
}

/// The nodes that a flush of `node` makes durable: those that hold what is written to it. It ends at backing
/// files, which nobody writes through an overlay, and at targets, whose durability is the business of who copies.
fn flushed_with(node: &Arc<Node>) -> Set {
    let mut out = Set::default();
    let mut todo = vec![node.clone()];
    while let Some(n) = todo.pop() {
        if !out.has(&n) {
            // A flush of a view of the past does nothing.
            let ends = n.driver.access_rule().table.ends_flushes;
            let holds = |c: &&ChildEdge| !ends && !matches!(c.role, ChildRole::Backing | ChildRole::Target);
            todo.extend(n.children.iter().filter(holds).map(|c| c.node.clone()));
            out.add([n]);
        }
    }
    out
}

/// The nodes that hold the data of backing files.
fn below_overlays<'a>(nodes: impl Iterator<Item = &'a Arc<Node>>) -> Set {
    let mut out = Set::default();
    nodes.filter_map(|n| n.backing()).for_each(|b| out.add(flushed_with(b).nodes));
    out
}

/// Nodes in the order in which they were added, each once, whatever its links were then.
#[derive(Default)]
struct Set {
    nodes: Vec<Arc<Node>>,
    states: HashSet<*const NodeState>,
}

impl Set {
    fn of(nodes: Vec<Arc<Node>>) -> Set {
        let mut out = Set::default();
        out.add(nodes);
        out
    }

    fn has(&self, node: &Node) -> bool {
        self.states.contains(&Arc::as_ptr(&node.state))
    }

    fn add(&mut self, nodes: impl IntoIterator<Item = Arc<Node>>) {
        for n in nodes {
            if self.states.insert(Arc::as_ptr(&n.state)) {
                self.nodes.push(n);
            }
        }
    }
}

pub(crate) fn in_flight(edge: &Arc<UserEdge>) -> String {
    let (n, given_up) = (edge.in_flight(), edge.given_up());
    let plural = if n == 1 { "" } else { "s" };
    let mut text = format!("'{}' with {n} request{plural} on node '{}'", edge.op(), edge.node().name);
    if given_up > 0 {
        text.push_str(&format!(" ({given_up} given up, but the storage still works on it)"));
    }
    text
}

pub(crate) fn given_up(node: &Arc<Node>) -> String {
    let n = node.state.given_up();
    let plural = if n == 1 { "" } else { "s" };
    format!("node '{}' with {n} request{plural} given up that the storage still works on", node.name)
}

/// Whether a link of a node that stays leads to other data. A filter more or less on the way is none: what the node
/// has written lies where it lay, and later flushes reach it. So a disk that fails flushes keeps no job from ending.
fn shows_else(old: &Node, new: &Node) -> bool {
    let same = |a: &Arc<Node>, b: &Arc<Node>| Arc::ptr_eq(&a.state, &b.state);
    let other = |(a, b): (&ChildEdge, &ChildEdge)| {
        !same(&a.node, &b.node) && !same(content(&a.node), content(&b.node))
    };
    Arc::ptr_eq(&old.state, &new.state)
        && (old.children.len() != new.children.len() || old.children.iter().zip(&new.children).any(other))
}

/// Whether a node that stays has other children.
fn relinked(old: &Node, new: &Node) -> bool {
    let other = |(a, b): (&ChildEdge, &ChildEdge)| !Arc::ptr_eq(&a.node.state, &b.node.state);
    Arc::ptr_eq(&old.state, &new.state)
        && (old.children.len() != new.children.len() || old.children.iter().zip(&new.children).any(other))
}
