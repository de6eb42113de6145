//! Puts a refusal of the solver into words: node and action, both operations, why, and
//! the remedies that would work.

use std::collections::BTreeSet;

use dolmen_rt::Instant;
use dolmen_types::{Actions, ChildRole, Claim, Conflict, Error, ErrorKind, OpId, Party};

use crate::solver::wishes;
use crate::state::State;
use crate::{EdgeRef, Grants, OpInfo, Refusal, Topology};

/// The error for a refusal on this candidate.
#[cold]
pub(crate) fn explain(state: &State, known: &BTreeSet<OpId>, refusal: Refusal, now: Instant) -> Error {
    let topology = state.topology();
    let wishes = wishes(&topology);
    let scene = Scene { state, known, topology, wishes, now };
    let name = |n: usize| state.nodes[n].def.name.as_str();
    match refusal {
        Refusal::Cycle { node } => {
            Error::new(ErrorKind::InvalidInput, format!("node '{}' would be its own child", name(node)))
        }
        Refusal::ReadOnly { node, asks } => {
            let (party, op) = scene.party(asks, Side::Asks, Actions::V | Actions::M);
            let forced = state.nodes[node].forced_read_only;
            if state.nodes[node].reopening && !forced {
                let e = Error::new(
                    ErrorKind::ReadOnly,
                    format!(
                        "Read-only block node '{}' cannot support read-write users: {party} needs to write it",
                        name(node)
                    ),
                );
                return match op.filter(|o| scene.since(o).is_some()).and_then(|o| o.ends_with.clone()) {
                    Some(remedy) => e.remedy(remedy),
                    None => e.remedy("leave it writable, or make what needs that read-only, too"),
                };
            }
            let e = Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "Block node is read-only: node '{}' cannot be written, which {party} needs",
                    name(node)
                ),
            );
            if forced {
                e.remedy("the file could only be opened for reading: check its permissions")
            } else {
                e.remedy("open the node with read-only=off, or use it read-only")
            }
        }
        Refusal::Inactive { node, asks } => {
            let (party, op) = scene.party(asks, Side::Asks, Actions::DATA);
            let inactive = name(node);
            match asks {
                EdgeRef::Child { parent, child } => {
                    let (above, role) = (name(parent), state.nodes[parent].children[child].name);
                    Error::new(
                        ErrorKind::Busy,
                        format!("Inactive '{inactive}' can't be a {role} child of active '{above}'"),
                    )
                    .remedy(format!("activate '{inactive}', or make '{above}' inactive, too"))
                }
                EdgeRef::User(_) | EdgeRef::Claim(_) => {
                    let e = Error::new(
                        ErrorKind::Busy,
                        format!("node '{inactive}' can't be inactive while {party} uses it"),
                    );
                    match op.filter(|o| scene.since(o).is_some()).and_then(|o| o.ends_with.clone()) {
                        Some(remedy) => e.remedy(remedy),
                        None => e.remedy(format!("activate '{inactive}' first (blockdev-set-active)")),
                    }
                }
            }
        }
        Refusal::Unaligned { node, asks } => {
            let (party, _) = scene.party(asks, Side::Asks, Actions::V | Actions::M);
            Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "node '{}' ends in the middle of a block and cannot be written by {party}",
                    name(node)
                ),
            )
            .remedy("resize it to a multiple of its block size, or use it without cache.direct")
        }
        Refusal::Conflict { node, actions, asks, denies } => {
            let (ask_party, ask_op) = scene.party(asks, Side::Asks, actions);
            let (deny_party, deny_op) = scene.party(denies, Side::Denies, actions);
            let mut remedies = Vec::new();
            // Who takes data away for good asks the images above, not those who read them now.
            let destroys = ask_op.is_some_and(|o| state.destructive.contains(&o.id));
            let over = scene.overlay(denies).filter(|_| actions.intersects(Actions::V | Actions::S));
            // The one that is there already can be ended; the newcomer can ask for less.
            for info in [deny_op.filter(|_| !destroys || over.is_none()), ask_op].into_iter().flatten() {
                if let Some(text) = &info.ends_with
                    && scene.since(info).is_some()
                    && !remedies.contains(text)
                {
                    remedies.push(text.clone());
                }
            }
            if actions.intersects(Actions::V | Actions::M)
                && let Some(text) = ask_op.and_then(|o| o.instead_of_writing.clone())
            {
                remedies.push(text);
            }
            if let EdgeRef::Child { parent, .. } = denies
                && scene.sees_all_writes(denies)
            {
                remedies.push(format!("use node '{}' instead", name(parent)));
            }
            if let Some(overlay) = over {
                if destroys || deny_op.is_none() {
                    remedies.push(format!("remove node '{overlay}' first (blockdev-del)"));
                }
                remedies.push(format!(
                    "open '{overlay}' with x-backing-may-change=on if what it shows may change"
                ));
            }
            if remedies.is_empty() {
                remedies.push(end_of(&deny_party));
            }
            Error::refused(Conflict {
                node: scene.shown(node).into(),
                actions,
                why: scene.why(denies),
                asks: ask_party,
                denies: deny_party,
                remedies,
            })
        }
    }
}

/// The last way out. A driver's own claim ends with its node.
fn end_of(party: &Party) -> String {
    match party.kind.as_str() {
        "node" => format!("remove node '{}' first (blockdev-del)", party.id),
        kind => format!("end {kind} '{}' first", party.id),
    }
}

/// Which side of a refusal a party is on.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Asks,
    Denies,
}

/// A refused candidate, and what its edges wish for.
struct Scene<'a> {
    state: &'a State,
    /// The published operations; others are just being tried.
    known: &'a BTreeSet<OpId>,
    topology: Topology,
    /// `None` if it has a cycle; then nobody is asked who they are.
    wishes: Option<Grants>,
    now: Instant,
}

impl<'a> Scene<'a> {
    fn op(&self, id: &OpId) -> Option<&'a OpInfo> {
        self.state.ops.iter().find(|o| o.id == *id)
    }

    /// Since when an operation runs, in seconds; `None` if it is just being tried.
    fn since(&self, op: &OpInfo) -> Option<u64> {
        op.since.filter(|_| self.known.contains(&op.id)).map(|t| self.now.since(t).as_secs())
    }

    /// Whether an edge denies because its parent is the one place to write through.
    fn sees_all_writes(&self, at: EdgeRef) -> bool {
        let EdgeRef::Child { parent, child } = at else { return false };
        let node = &self.state.nodes[parent];
        node.def.rule.role(node.children[child].role).sees_all_writes
    }

    /// The overlay whose backing child an edge leads to.
    fn overlay(&self, at: EdgeRef) -> Option<&'a str> {
        let EdgeRef::Child { parent, child } = at else { return None };
        let node = &self.state.nodes[parent];
        (node.children[child].role == ChildRole::Backing).then(|| node.def.name.as_str())
    }

    /// Who an edge or a claim belongs to; for an edge that belongs to nobody, the
    /// operation above it that makes it need or deny `actions`.
    fn party(&self, at: EdgeRef, side: Side, actions: Actions) -> (Party, Option<&'a OpInfo>) {
        let of_op = |id: &OpId, claim: Claim| {
            let info = self.op(id);
            let party = Party {
                // A driver's claims are known by the node's name, a command's by the command.
                id: id
                    .strip_prefix("driver:")
                    .or_else(|| id.strip_prefix("command:")?.split(':').next())
                    .unwrap_or(id)
                    .to_owned(),
                kind: info.map_or("operation".into(), |o| o.kind.clone()),
                detail: info.map_or(String::new(), |o| o.detail.clone()),
                since_secs: info.and_then(|o| self.since(o)),
                needs: claim.needs,
                allows: claim.allows,
            };
            (party, info)
        };
        match at {
            EdgeRef::User(i) => of_op(&self.state.users[i].op, self.state.users[i].claim),
            EdgeRef::Claim(i) => of_op(&self.state.claims[i].op, self.state.claims[i].claim),
            EdgeRef::Child { parent, child } => {
                let node = &self.state.nodes[parent];
                let edge = &node.children[child];
                let claim = self.wishes.as_ref().map_or(Claim::IDLE, |w| w.children[parent][child]);
                if let Some(owner) = &node.def.owner {
                    return of_op(owner, claim);
                }
                // An overlay lets its backing file be written unless somebody reads it.
                let behind = match edge.role {
                    ChildRole::Backing if side == Side::Denies => self
                        .behind(parent, side, actions)
                        .or_else(|| self.behind(parent, Side::Asks, Actions::D)),
                    _ => self.behind(parent, side, actions),
                };
                let mut detail =
                    format!("{}, {} child '{}'", node.def.kind.name, edge.role.as_str(), edge.name);
                if let Some(op) = behind {
                    detail += &format!(", for {} '{}' ({})", op.kind, op.id, op.detail);
                }
                let party = Party {
                    id: node.def.name.to_string(),
                    kind: "node".into(),
                    detail,
                    since_secs: behind.and_then(|o| self.since(o)),
                    needs: claim.needs,
                    // An overlay that nobody reads does not allow everything to everybody.
                    allows: if side == Side::Denies { claim.allows - actions } else { claim.allows },
                };
                (party, behind)
            }
        }
    }

    /// The operation at or above `node` because of which its edges need or deny `actions`;
    /// `None` if the node's own rule is the reason.
    fn behind(&self, node: usize, side: Side, actions: Actions) -> Option<&'a OpInfo> {
        // A format writes and resizes its file for a parent that only writes.
        let asked = if actions.intersects(Actions::V | Actions::S) {
            actions | Actions::V | Actions::M
        } else {
            actions
        };
        let matters = |c: Claim| match side {
            Side::Asks => c.needs.intersects(asked),
            Side::Denies => !c.allows.contains(actions),
        };
        let mut seen = vec![false; self.topology.nodes.len()];
        let mut todo = vec![node];
        while let Some(n) = todo.pop() {
            if std::mem::replace(&mut seen[n], true) {
                continue;
            }
            if let Some(i) = self.topology.users.iter().position(|u| u.node == n && matters(u.claim)) {
                return self.op(&self.state.users[i].op);
            }
            for (p, parent) in self.topology.nodes.iter().enumerate() {
                let wish = |k: usize| self.wishes.as_ref().is_some_and(|w| matters(w.children[p][k]));
                if parent.children.iter().enumerate().any(|(k, c)| c.1 == n && wish(k)) {
                    if let Some(owner) = &self.state.nodes[p].def.owner {
                        return self.op(owner);
                    }
                    todo.push(p);
                }
            }
        }
        None
    }

    /// The name under which a user knows the node: an operation's filter without a name of its own
    /// stands for what it was put on.
    fn shown(&self, mut node: usize) -> &str {
        loop {
            let n = &self.state.nodes[node];
            let below = self.topology.nodes[node].children.iter().find(|c| c.0 == ChildRole::Filtered);
            match below {
                Some(&(_, child)) if n.def.anonymous && n.def.owner.is_some() => node = child,
                _ => return n.def.name.as_str(),
            }
        }
    }

    /// Why a party does not allow others more.
    fn why(&self, at: EdgeRef) -> String {
        match at {
            EdgeRef::Claim(i) => self.state.claims[i].why.clone(),
            EdgeRef::User(i) => {
                let denied = !self.state.users[i].claim.allows & Actions::DATA;
                let words: Vec<_> = denied.iter().map(|a| a.phrase()).collect();
                format!("does not let others {} it", words.join(" or "))
            }
            EdgeRef::Child { parent, child } => {
                let node = &self.state.nodes[parent];
                node.def.rule.role(node.children[child].role).why.into()
            }
        }
    }
}
