//! The solver: the only thing that decides who may use a node beside whom.
//!
//! A pure function over values: no I/O, no locks, no driver calls. Input is a topology
//! with the drivers' edge rules and all claims; output is what every edge is granted, or
//! the first conflict with both parties. Commands call it on the candidate graph before
//! anything is published; "what if" is the same call without publishing.
//!
//! Two things meet at a node: *edges* into it, from parents and users, whose needs and
//! allows propagate down by [`AccessRule`]; and *claims* on it, which never propagate.
//! Two different parties without a common owner conflict when one needs an action that
//! the other does not allow. Cost: linear in the edges for the propagation, quadratic in
//! the parties that meet at one node.
//!
//! A claim does not propagate, so an operation that works through filters (a job whose target is a copy-on-read
//! node, say) claims what lies beneath, too. Its own edges arrive there by way of the filters, as nobody's: such a
//! claim *means* what edges would not need without the operation.
//!
//! While somebody reads an overlay, nobody writes its backing child, but for an operation
//! that keeps the overlay right; and nobody shrinks it even if nobody reads the overlay
//! now. Both are a [`Stance`] of the operation: what it asks for is compared with what
//! edges would allow if the overlays were as the stance says.

use std::rc::Rc;

use dolmen_types::{Actions, ChildRole, Claim};

use crate::{AccessRule, NodeFacts};

/// A candidate graph as values. Nodes are indices; operations are numbers, newer ones
/// larger (which matters only for the choice between several conflicts).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// The nodes.
    pub nodes: Vec<TopoNode>,
    /// Edges of users into the graph.
    pub users: Vec<TopoUser>,
    /// Claims of operations and drivers.
    pub claims: Vec<TopoClaim>,
    /// Claims that mean what their operation does itself, through filters that are nobody's: indices.
    pub beneath: Vec<usize>,
    /// How operations stand to the overlays of what they write; one of each at most.
    pub stances: Vec<Stance>,
}

/// How an operation stands to the overlays of what it writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Stance {
    /// The operation.
    pub op: u32,
    /// What it says about overlays.
    pub overlays: Overlays,
}

/// What an operation says about the overlays of what it writes.
#[derive(Clone, Debug, PartialEq)]
pub enum Overlays {
    /// It writes so that these overlays go on showing the same: a commit of one, or
    /// copy-before-write that saves to one. They allow it everything on their backing child.
    Kept(Vec<usize>),
    /// It takes data away for good: all overlays are asked as if somebody read them.
    All,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct TopoNode {
    /// The driver's edge rule.
    pub rule: AccessRule,
    /// It is, or can become, writable.
    pub writable: bool,
    /// It takes part (not handed to another process).
    pub active: bool,
    /// Its size is a multiple of its request alignment.
    pub aligned: bool,
    /// The operation that interposed it: owner of its outgoing edges.
    pub owner: Option<u32>,
    /// Role and index of each child.
    pub children: Vec<(ChildRole, usize)>,
}

/// A user's edge. Owned by its operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopoUser {
    /// The operation.
    pub op: u32,
    /// The node it is attached to.
    pub node: usize,
    /// What it needs and allows.
    pub claim: Claim,
}

/// A claim. Owned by its operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopoClaim {
    /// The operation, or a number of its own for a driver.
    pub op: u32,
    /// The node.
    pub node: usize,
    /// What it needs and allows.
    pub claim: Claim,
    /// The bitmap, snapshot or key slot that it is about; `None` for the node itself.
    /// Claims of different scopes never meet.
    pub scope: Option<u32>,
}

/// One of the parties that meet at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeRef {
    /// `users[i]`.
    User(usize),
    /// The edge of `nodes[parent]` to its child number `child`.
    Child {
        /// Index of the parent node.
        parent: usize,
        /// Position among its children.
        child: usize,
    },
    /// `claims[i]`.
    Claim(usize),
}

/// What the solver grants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grants {
    /// For each node, for each child: needs and allows of the edge.
    pub children: Vec<Vec<Claim>>,
    /// For each node: everything that its parents' edges and users need together, and
    /// what all of them allow. This is what a leaf locks.
    pub total: Vec<Claim>,
}

/// Why a candidate is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `asks` needs `actions` on `node`, which `denies` does not allow.
    Conflict {
        /// Where they meet.
        node: usize,
        /// What is needed and not allowed.
        actions: Actions,
        /// Who needs it.
        asks: EdgeRef,
        /// Who does not allow it.
        denies: EdgeRef,
    },
    /// `asks` needs to write a node that can't be written.
    ReadOnly {
        /// The node.
        node: usize,
        /// Who needs it.
        asks: EdgeRef,
    },
    /// `asks` writes but does not resize, and the node ends in the middle of a block.
    Unaligned {
        /// The node.
        node: usize,
        /// Who needs it.
        asks: EdgeRef,
    },
    /// `asks` is attached to a node that is not active, but is itself.
    Inactive {
        /// The node.
        node: usize,
        /// Who is attached to it.
        asks: EdgeRef,
    },
    /// The node reaches itself.
    Cycle {
        /// A node on the cycle.
        node: usize,
    },
}

/// A party at a node, with what identifies its owner.
#[derive(Clone, Copy)]
struct Party {
    owner: Option<u32>,
    at: EdgeRef,
    claim: Claim,
}

/// Decides whether everybody can have what they need.
///
/// # Errors
/// A conflict at the first node that has one, in the order from the roots down; for the
/// same topology always the same one.
pub fn solve(t: &Topology) -> Result<Grants, Refusal> {
    decide(t, Conflicts::Refused)
}

/// What the edges would be granted if conflicts were nobody's business: for tests that show what
/// a refusal prevents.
///
/// # Errors
/// Everything but conflicts.
pub(crate) fn solve_unchecked(t: &Topology) -> Result<Grants, Refusal> {
    decide(t, Conflicts::Ignored)
}

#[derive(Clone, Copy, PartialEq)]
enum Conflicts {
    Refused,
    Ignored,
}

fn decide(t: &Topology, conflicts: Conflicts) -> Result<Grants, Refusal> {
    let order = roots_first(t)?;
    let (grants, into) = propagate(t, &order, &Sight::PLAIN);
    for &n in &order {
        let node = &t.nodes[n];
        if !node.active {
            let active = |p: &&Party| match p.at {
                EdgeRef::Child { parent, .. } => t.nodes[parent].active,
                EdgeRef::User(_) | EdgeRef::Claim(_) => !p.claim.needs.is_empty(),
            };
            if let Some(p) = into[n].iter().find(active) {
                return Err(Refusal::Inactive { node: n, asks: p.at });
            }
        }
        let writes = |p: &&Party| p.claim.needs.intersects(Actions::V | Actions::M);
        if let Some(p) = into[n].iter().find(writes) {
            if !node.writable {
                return Err(Refusal::ReadOnly { node: n, asks: p.at });
            }
            if !node.aligned && !grants.total[n].needs.contains(Actions::S) {
                return Err(Refusal::Unaligned { node: n, asks: p.at });
            }
        }
    }
    if conflicts == Conflicts::Ignored {
        return Ok(grants);
    }
    let views: Vec<View> = t.stances.iter().map(|s| View::of(t, &order, s)).collect();
    let beneath = Beneath::of(t, &order);
    let mut claims_on: Vec<Vec<usize>> = vec![Vec::new(); t.nodes.len()];
    t.claims.iter().enumerate().for_each(|(i, c)| claims_on[c.node].push(i));
    for &n in &order {
        let claims = claims_on[n].iter().map(|&i| (i, &t.claims[i]));
        let mut scopes: Vec<Option<u32>> = claims.clone().map(|(_, c)| c.scope).collect();
        scopes.push(None);
        scopes.sort_unstable();
        scopes.dedup();
        for scope in scopes {
            let mut parties = if scope.is_none() { into[n].clone() } else { Vec::new() };
            parties.extend(claims.clone().filter(|(_, c)| c.scope == scope).map(|(i, c)| Party {
                owner: Some(c.op),
                at: EdgeRef::Claim(i),
                claim: c.claim,
            }));
            meet(n, &parties, &views, &beneath)?;
        }
    }
    Ok(grants)
}

/// What is assumed while needs and allows are propagated.
struct Sight<'a> {
    /// These overlays need nothing of their backing child and allow everything there.
    kept: &'a [usize],
    /// Every overlay is read.
    all_read: bool,
    /// The edges of this operation need nothing.
    silent: Option<u32>,
}

impl Sight<'_> {
    const PLAIN: Sight<'static> = Sight { kept: &[], all_read: false, silent: None };

    fn edge(&self, t: &Topology, n: usize, role: ChildRole, mut parents: Claim, facts: NodeFacts) -> Claim {
        let node = &t.nodes[n];
        if !node.active || (role == ChildRole::Backing && self.kept.contains(&n)) {
            // An inactive node has let go of everything below.
            return Claim::IDLE;
        }
        if self.all_read && role == ChildRole::Backing {
            parents.needs |= Actions::D;
        }
        let mut claim = node.rule.child_claim(role, parents, facts);
        if node.owner.is_some() && node.owner == self.silent {
            claim.needs = Actions::NONE;
        }
        claim
    }
}

/// The graph as an operation with a [`Stance`] finds it.
struct View {
    op: u32,
    robs: bool,
    /// What edges allow the operation.
    allowed: Grants,
    /// What edges need without it: the rest comes from the operation alone, through its
    /// edges, and so is asked by it.
    without: Grants,
}

impl View {
    fn of(t: &Topology, order: &[usize], stance: &Stance) -> View {
        let (kept, robs): (&[usize], bool) = match &stance.overlays {
            Overlays::Kept(nodes) => (nodes, false),
            Overlays::All => (&[], true),
        };
        let toward = Sight { kept, all_read: robs, silent: None };
        let without = Sight { silent: Some(stance.op), ..Sight::PLAIN };
        View {
            op: stance.op,
            robs,
            allowed: propagate(t, order, &toward).0,
            without: propagate(t, order, &without).0,
        }
    }

    /// The part of what a party needs that the operation asks for.
    fn asked(&self, party: &Party) -> Actions {
        match party.at {
            _ if party.owner == Some(self.op) => party.claim.needs,
            EdgeRef::Child { parent, child } => {
                party.claim.needs - self.without.children[parent][child].needs
            }
            EdgeRef::User(_) | EdgeRef::Claim(_) => Actions::NONE,
        }
    }
}

/// The claims that mean what their operation does itself: for each, what edges need without that operation.
struct Beneath(Vec<(usize, Rc<Grants>)>);

impl Beneath {
    fn of(t: &Topology, order: &[usize]) -> Beneath {
        let mut by_op: Vec<(u32, Rc<Grants>)> = Vec::new();
        let of = t.beneath.iter().map(|&i| {
            let op = t.claims[i].op;
            let known = by_op.iter().find(|k| k.0 == op).map(|k| k.1.clone());
            let without = known.unwrap_or_else(|| {
                let sight = Sight { silent: Some(op), ..Sight::PLAIN };
                let grants = Rc::new(propagate(t, order, &sight).0);
                by_op.push((op, grants.clone()));
                grants
            });
            (i, without)
        });
        Beneath(of.collect())
    }

    /// The part of what `asks` needs that the operation of the claim `denies` has asked for.
    fn meant(&self, asks: &Party, denies: &Party) -> Actions {
        let (EdgeRef::Claim(i), EdgeRef::Child { parent, child }) = (denies.at, asks.at) else {
            return Actions::NONE;
        };
        let without = self.0.iter().find(|b| b.0 == i).map(|b| b.1.children[parent][child].needs);
        without.map_or(Actions::NONE, |w| asks.claim.needs - w)
    }
}

/// What `asks` needs and `denies` does not allow.
fn denied(asks: &Party, denies: &Party, views: &[View]) -> Actions {
    let mut out = asks.claim.denied_by(denies.claim);
    let EdgeRef::Child { parent, child } = denies.at else { return out };
    for view in views {
        let allowed = view.allowed.children[parent][child].allows;
        if view.robs {
            out |= view.asked(asks) - allowed;
        } else if !out.is_empty() {
            out = out - (view.asked(asks) & allowed);
        }
    }
    out
}

/// What every edge needs and allows, from the roots down, and who meets at each node;
/// without asking whether that is granted.
fn propagate(t: &Topology, order: &[usize], sight: &Sight<'_>) -> (Grants, Vec<Vec<Party>>) {
    let mut into: Vec<Vec<Party>> = vec![Vec::new(); t.nodes.len()];
    for (i, u) in t.users.iter().enumerate() {
        // An edge has nothing to say about G, P and I: it allows them.
        let mut claim = Claim { needs: u.claim.needs & Actions::DATA, allows: u.claim.allows | NOT_DATA };
        if sight.silent == Some(u.op) {
            claim.needs = Actions::NONE;
        }
        into[u.node].push(Party { owner: Some(u.op), at: EdgeRef::User(i), claim });
    }
    let mut grants = Grants {
        children: t.nodes.iter().map(|n| vec![Claim::IDLE; n.children.len()]).collect(),
        total: vec![Claim::IDLE; t.nodes.len()],
    };
    for &n in order {
        let node = &t.nodes[n];
        let parents = &into[n];
        let total = parents.iter().fold(Claim::IDLE, |sum, p| Claim {
            needs: sum.needs | p.claim.needs,
            allows: sum.allows & p.claim.allows,
        });
        let facts = NodeFacts { writable: node.writable, has_parents: !parents.is_empty() };
        for (i, &(role, child)) in node.children.iter().enumerate() {
            let mut claim = sight.edge(t, n, role, total, facts);
            claim.allows |= NOT_DATA;
            grants.children[n][i] = claim;
            into[child].push(Party { owner: node.owner, at: EdgeRef::Child { parent: n, child: i }, claim });
        }
        grants.total[n] = total;
    }
    (grants, into)
}

const NOT_DATA: Actions = Actions::EVERY.without(Actions::DATA);

/// Of several conflicts at a node, the one that tells the user most: the newer operation
/// asks (it is what was just tried), and a claim denies (it says why). The first of equals.
fn meet(node: usize, parties: &[Party], views: &[View], beneath: &Beneath) -> Result<(), Refusal> {
    let mut best: Option<((bool, bool), Refusal)> = None;
    for (i, asks) in parties.iter().enumerate() {
        for (j, denies) in parties.iter().enumerate() {
            let same_owner = asks.owner.is_some() && asks.owner == denies.owner;
            if i == j || same_owner {
                continue;
            }
            let actions = denied(asks, denies, views) - beneath.meant(asks, denies);
            if actions.is_empty() {
                continue;
            }
            let rank = (asks.owner > denies.owner, matches!(denies.at, EdgeRef::Claim(_)));
            if best.is_none_or(|(r, _)| rank > r) {
                best = Some((rank, Refusal::Conflict { node, actions, asks: asks.at, denies: denies.at }));
            }
        }
    }
    best.map_or(Ok(()), |(_, refusal)| Err(refusal))
}

/// All nodes, every node before its children.
fn roots_first(t: &Topology) -> Result<Vec<usize>, Refusal> {
    let mut waiting = vec![0usize; t.nodes.len()];
    for &(_, c) in t.nodes.iter().flat_map(|n| &n.children) {
        waiting[c] += 1;
    }
    let mut ready: Vec<usize> = (0..t.nodes.len()).filter(|&n| waiting[n] == 0).collect();
    let mut order = Vec::with_capacity(t.nodes.len());
    while let Some(n) = ready.pop() {
        order.push(n);
        for &(_, c) in &t.nodes[n].children {
            waiting[c] -= 1;
            if waiting[c] == 0 {
                ready.push(c);
            }
        }
    }
    match waiting.iter().position(|&w| w > 0) {
        None => Ok(order),
        Some(node) => Err(Refusal::Cycle { node }),
    }
}

/// What all edges need and allow, without asking whether that is granted: for messages
/// about a refused topology. `None` if it has a cycle.
pub(crate) fn wishes(t: &Topology) -> Option<Grants> {
    let order = roots_first(t).ok()?;
    Some(propagate(t, &order, &Sight::PLAIN).0)
}

#[cfg(test)]
mod tests;
