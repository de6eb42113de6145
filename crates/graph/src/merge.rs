//! Changes that are under way at the same time.
//!
//! Publishing may take long: requests have to finish, images have to be flushed. Meanwhile other
//! changes go on, and a draft is published onto a graph that is newer than the one it was copied
//! from. That is right if the two changes are *independent*: no node and no operation is touched by
//! both. Then what the draft touched is taken from the draft, everything else from what is published now, and the
//! solver decides on the result. Otherwise the later one is refused.
//!
//! Who wants changes to wait for each other rather than be refused lets those wait that lie in the same
//! part of the graph: [`Draft::connected`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use dolmen_types::{Error, ErrorKind, NodeName, OpId, Result};

use crate::OpInfo;
use crate::state::{DraftNode, DraftUser, State};

/// What a change has touched.
#[derive(Default)]
struct Touched {
    nodes: BTreeSet<NodeName>,
    ops: BTreeSet<OpId>,
}

impl Touched {
    fn between(from: &State, to: &State) -> Touched {
        let mut out = Touched::default();
        out.nodes_and_links(from, to);
        out.users(from, to);
        let ops = |s: &State| -> BTreeMap<OpId, OpInfo> {
            s.ops.iter().map(|o| (o.id.clone(), OpInfo { detail: String::new(), ..o.clone() })).collect()
        };
        out.ops.extend(changed(&ops(from), &ops(to), |a, b| a == b));
        for c in differ(&from.claims, &to.claims) {
            out.nodes.insert(c.node);
            out.ops.insert(c.op);
        }
        for (op, node) in differ(&from.kept, &to.kept) {
            out.nodes.insert(node);
            out.ops.insert(op);
        }
        out.ops.extend(differ(&from.destructive, &to.destructive));
        for on in changed(&from.over, &to.over, |a, b| a == b) {
            let filters = |s: &State| s.over.get(&on).cloned().unwrap_or_default();
            out.nodes.extend(filters(from).into_iter().chain(filters(to)));
            out.nodes.insert(on);
        }
        out.nodes.extend(changed(&from.told, &to.told, |a, b| a == b));
        out
    }

    /// Nodes, and the children that they had or have.
    fn nodes_and_links(&mut self, from: &State, to: &State) {
        let nodes = |s: &State| -> BTreeMap<NodeName, Arc<DraftNode>> {
            s.nodes.shared().map(|(name, n)| (name.clone(), n.clone())).collect()
        };
        let (from, to) = (nodes(from), nodes(to));
        for name in changed(&from, &to, |a, b| Arc::ptr_eq(a, b) || same_node(a, b)) {
            let both = || [from.get(&name), to.get(&name)].into_iter().flatten();
            self.nodes.extend(both().flat_map(|n| n.children.iter().map(|c| c.node.clone())));
            self.ops.extend(both().filter_map(|n| n.def.owner.clone()));
            self.nodes.insert(name);
        }
    }

    fn users(&mut self, from: &State, to: &State) {
        let mut touch = |u: &DraftUser| {
            self.nodes.insert(u.node.clone());
            self.ops.insert(u.op.clone());
        };
        for old in &from.users {
            match to.users.iter().find(|u| same_edge(u, old)) {
                Some(new) if same_user(new, old) => {}
                Some(new) => [new, old].into_iter().for_each(&mut touch),
                None => touch(old),
            }
        }
        to.users.iter().filter(|u| !from.users.iter().any(|o| same_edge(o, u))).for_each(touch);
    }
}

/// What is in one of the lists only.
fn differ<T: Clone + PartialEq>(from: &[T], to: &[T]) -> Vec<T> {
    let only = |a: &[T], b: &[T]| -> Vec<T> { a.iter().filter(|x| !b.contains(x)).cloned().collect() };
    [only(from, to), only(to, from)].concat()
}

/// The keys whose values differ.
fn changed<K: Ord + Clone, V>(
    from: &BTreeMap<K, V>,
    to: &BTreeMap<K, V>,
    same: impl Fn(&V, &V) -> bool,
) -> Vec<K> {
    let keys: BTreeSet<&K> = from.keys().chain(to.keys()).collect();
    keys.into_iter()
        .filter(|k| match (from.get(k), to.get(k)) {
            (Some(a), Some(b)) => !same(a, b),
            _ => true,
        })
        .cloned()
        .collect()
}

fn same_node(a: &DraftNode, b: &DraftNode) -> bool {
    let same_driver = match (&a.driver, &b.driver) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    let same_children = a.children.len() == b.children.len()
        && a.children
            .iter()
            .zip(&b.children)
            .all(|(a, b)| (a.name, a.role, &a.node) == (b.name, b.role, &b.node));
    let (x, y) = (&a.def, &b.def);
    same_driver
        && same_children
        && Arc::ptr_eq(&a.state, &b.state)
        && (a.forced_read_only, a.reopening, a.other_image, a.retell)
            == (b.forced_read_only, b.reopening, b.other_image, b.retell)
        && a.inherits == b.inherits
        && (x.anonymous, x.rule, x.flags, &x.owner, x.monitor)
            == (y.anonymous, y.rule, y.flags, &y.owner, y.monitor)
        && x.options == y.options
}

/// Whether the two are the same edge of a user, at two times.
fn same_edge(a: &DraftUser, b: &DraftUser) -> bool {
    matches!((&a.edge, &b.edge), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
}

fn same_user(a: &DraftUser, b: &DraftUser) -> bool {
    (&a.op, &a.node, a.claim, a.below_filters, a.may_be_inactive)
        == (&b.op, &b.node, b.claim, b.below_filters, b.may_be_inactive)
}

/// What `mine` made of `base`, made of `now` as well.
///
/// # Errors
/// `Busy` when what has become of `base` meanwhile is not independent of it.
pub(crate) fn merge(base: &State, mine: &State, now: &State) -> Result<State> {
    let (ours, theirs) = (Touched::between(base, mine), Touched::between(base, now));
    if let Some(node) = ours.nodes.intersection(&theirs.nodes).next() {
        return Err(conflict(&format!("node '{node}'")));
    }
    if let Some(op) = ours.ops.intersection(&theirs.ops).next() {
        return Err(conflict(&format!("operation '{op}'")));
    }
    let mut out = now.clone();
    // Everything stays in its place: the order of a user's edges means something.
    let (nodes, ops) =
        (|n: &DraftNode| ours.nodes.contains(&n.def.name), |o: &OpInfo| ours.ops.contains(&o.id));
    out.nodes.retain(|n| !nodes(n) || mine.node(&n.def.name).is_some());
    for (_, node) in mine.nodes.shared().filter(|(_, n)| nodes(n)) {
        out.nodes.push(node.clone());
    }
    put(&mut out.ops, &mine.ops, ops, |a, b| a.id == b.id);
    // A user may be touched by way of its node or of its operation, where it was or where it is.
    let at = |u: &DraftUser| ours.nodes.contains(&u.node) || ours.ops.contains(&u.op);
    let users = |u: &DraftUser| at(u) || base.users.iter().any(|b| same_edge(b, u) && at(b));
    put(&mut out.users, &mine.users, users, same_edge);
    list(&mut out.claims, &base.claims, &mine.claims);
    list(&mut out.kept, &base.kept, &mine.kept);
    list(&mut out.destructive, &base.destructive, &mine.destructive);
    for node in &ours.nodes {
        replace(&mut out.over, node, mine.over.get(node));
        replace(&mut out.told, node, mine.told.get(node));
    }
    whole(&out)?;
    Ok(out)
}

/// Takes those that are touched from `mine`: in the places of the old ones, new ones at the end.
fn put<T: Clone>(all: &mut Vec<T>, mine: &[T], touched: impl Fn(&T) -> bool, same: impl Fn(&T, &T) -> bool) {
    let mut new: Vec<T> = mine.iter().filter(|m| touched(m)).cloned().collect();
    let old = std::mem::take(all);
    for o in old {
        match new.iter().position(|n| same(n, &o)) {
            Some(i) => all.push(new.remove(i)),
            None if touched(&o) => {}
            None => all.push(o),
        }
    }
    all.extend(new);
}

/// Makes the same change of a list as from `base` to `mine`.
fn list<T: Clone + PartialEq>(all: &mut Vec<T>, base: &[T], mine: &[T]) {
    all.retain(|x| !base.contains(x) || mine.contains(x));
    all.extend(mine.iter().filter(|x| !base.contains(x)).cloned());
}

fn replace<V: Clone>(map: &mut BTreeMap<NodeName, V>, key: &NodeName, value: Option<&V>) {
    match value {
        Some(v) => drop(map.insert(key.clone(), v.clone())),
        None => drop(map.remove(key)),
    }
}

fn conflict(what: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("{what} was changed by somebody else meanwhile")).remedy("try again")
}

/// Two independent changes can still make something together that neither made alone: a cycle, or a link
/// to what the other removed.
fn whole(s: &State) -> Result<()> {
    let broken = || conflict("what the graph is made of");
    let ops: BTreeSet<&OpId> = s.ops.iter().map(|o| &o.id).collect();
    let nodes: HashMap<&NodeName, &DraftNode> = s.nodes.iter().map(|n| (&n.def.name, n)).collect();
    let named = s
        .nodes
        .iter()
        .flat_map(|n| n.children.iter().map(|c| &c.node))
        .chain(s.users.iter().map(|u| &u.node))
        .chain(s.claims.iter().map(|c| &c.node))
        .chain(s.kept.iter().map(|(_, n)| n))
        .chain(s.over.iter().flat_map(|(n, filters)| filters.iter().chain([n])));
    let by = s.users.iter().map(|u| &u.op).chain(s.claims.iter().map(|c| &c.op));
    let by = by.chain(s.kept.iter().map(|(o, _)| o)).chain(&s.destructive);
    let owners = s.nodes.iter().filter_map(|n| n.def.owner.as_ref());
    if named.into_iter().any(|n| !nodes.contains_key(n)) || by.chain(owners).any(|o| !ops.contains(o)) {
        return Err(broken());
    }
    // Leaves first, as long as there are any: what is left then goes round.
    let mut waiting: BTreeMap<&NodeName, BTreeSet<&NodeName>> =
        s.nodes.iter().map(|n| (&n.def.name, n.children.iter().map(|c| &c.node).collect())).collect();
    loop {
        let done: Vec<&NodeName> = waiting.iter().filter(|(_, c)| c.is_empty()).map(|(n, _)| *n).collect();
        if done.is_empty() {
            return if waiting.is_empty() { Ok(()) } else { Err(broken()) };
        }
        done.iter().for_each(|n| drop(waiting.remove(n)));
        waiting.values_mut().for_each(|c| c.retain(|n| !done.contains(n)));
    }
}
