//! The solver against a brute-force oracle, exhaustively over small graphs.
//!
//! The oracle is written from the text of ARCHITECTURE.md's access rules in another style
//! than the solver: one table of characters per edge rule, booleans per action, a naive
//! fixpoint over all edges instead of an order, and all pairs of parties at the end. It
//! shares no code with [`AccessRule`].
//!
//! What is complete, and what is not:
//! - `AccessRule::TRANSPARENT` is a filter to the solver: see [`transparent_is_a_filter`].
//! - [`edge_rules`]: every rule, role, set of facts and claim of one parent: complete.
//! - [`two_parties`]: every kind of pair that can meet at a node, with every claim of each
//!   over D, V, M and S, and over every pair of actions: complete.
//! - [`three_nodes`]: every graph of up to three nodes with every rule and role; users and
//!   claims from an alphabet that holds each kind of party once.
//! - [`four_nodes`]: every graph of four nodes, over a reduced alphabet of rules and roles.
//!
//! Graphs are canonical: a node's children have higher numbers. Every acyclic graph is one
//! of these up to names, and [`names_do_not_matter`] shuffles the names.

use dolmen_types::{Actions, ChildRole, Claim};

use super::*;
use crate::{RoleRule, RuleTable};

const RULES: [AccessRule; 15] = [
    AccessRule::LEAF,
    AccessRule::FILTER,
    AccessRule::WINDOW,
    AccessRule::POPULATES,
    AccessRule::FORMAT,
    AccessRule::FORMAT_OVER_CHANGING,
    QUORUM,
    REWRITING_QUORUM,
    AccessRule::SAVES_OLD_DATA,
    AccessRule::POINT_IN_TIME,
    AccessRule::COPIES_WRITES,
    AccessRule::SAVES_OLD_DATA_FOR_JOB,
    AccessRule::COPIES_WRITES_DOWN,
    AccessRule::LETS_CHANGE,
    AccessRule {
        take: Actions::D.with(Actions::V),
        unshare: Actions::V.with(Actions::S),
        ..AccessRule::FILTER
    },
];

/// Rules that a driver could bring with it: nothing but the solver's arithmetic knows them.
const QUORUM: AccessRule = AccessRule::of(&RuleTable::one(QUORUM_CHILD));
const REWRITING_QUORUM: AccessRule =
    AccessRule::of(&RuleTable::one(RoleRule { needs_add: Actions::V, ..QUORUM_CHILD }));
const QUORUM_CHILD: RoleRule =
    RoleRule { allows_pass: Actions::NONE, allows_add: Actions::D.with(Actions::M), ..RoleRule::THROUGH };

const ROLES: [ChildRole; 5] =
    [ChildRole::Filtered, ChildRole::Metadata, ChildRole::Data, ChildRole::Backing, ChildRole::Target];

/// Columns D, V, M, S.
type Row = [bool; 4];

/// An edge of the oracle: where it goes, what the tables say.
#[derive(Clone, Copy, Debug, PartialEq)]
struct OracleEdge {
    needs: Row,
    allows: Row,
}

/// The table of the edge rules. In the columns D, V, M, S: `0` no, `1` yes, `p` as the
/// parents. `v` if the parents allow V; `c` if they do and don't need D; `w` if the node is writable or a parent needs V or
/// M; `x` V or M of the parents; `y` x or S;
/// `d` D or V of the parents; `r` V allowed by the parents, as long as there are none.
fn table(rule: AccessRule, role: ChildRole) -> [&'static str; 2] {
    // What the node was told to take and not to share comes on top, see below.
    let rule = AccessRule::of(rule.table);
    match (rule, role) {
        (AccessRule::COPIES_WRITES_DOWN, ChildRole::Target) => ["p100", "1110"],
        (_, ChildRole::Target) => ["0100", "1110"],
        (AccessRule::LEAF | AccessRule::FILTER | AccessRule::TRANSPARENT, _) => ["pppp", "pppp"],
        (AccessRule::WINDOW, _) => ["pppp", "ppp0"],
        (AccessRule::POPULATES, _) => ["pp1p", "pp1p"],
        (AccessRule::FORMAT, ChildRole::Backing) => ["p000", "1c1c"],
        (AccessRule::FORMAT_OVER_CHANGING, ChildRole::Backing) => ["p000", "1v1v"],
        (AccessRule::FORMAT | AccessRule::FORMAT_OVER_CHANGING, ChildRole::Data) => ["pxpy", "ppp0"],
        (AccessRule::FORMAT | AccessRule::FORMAT_OVER_CHANGING, _) => ["1wpu", "p0p0"],
        (QUORUM, _) => ["pppp", "1010"],
        (REWRITING_QUORUM, _) => ["p1pp", "1010"],
        (AccessRule::SAVES_OLD_DATA, _) => ["dppp", "prpp"],
        (AccessRule::POINT_IN_TIME, _) => ["p000", "1111"],
        (AccessRule::COPIES_WRITES, _) => ["pppp", "p0pp"],
        (AccessRule::SAVES_OLD_DATA_FOR_JOB, _) => ["dppp", "p0pp"],
        (AccessRule::COPIES_WRITES_DOWN, _) => ["0ppp", "p1pp"],
        (AccessRule::LETS_CHANGE, _) => ["p000", "1111"],
        (other, _) => panic!("no row for {other:?}"),
    }
}

fn look_up(
    rule: AccessRule,
    role: ChildRole,
    node: &TopoNode,
    needs: Row,
    allows: Row,
    parents: usize,
) -> OracleEdge {
    if !node.active {
        // It has handed its image over and does not care who does what below it.
        return OracleEdge { needs: [false; 4], allows: [true; 4] };
    }
    let [_, v, m, s] = needs;
    let cell = |text: &str, column: usize, own: Row| match text.as_bytes()[column] {
        b'0' => false,
        b'1' => true,
        b'p' => own[column],
        b'v' => allows[1],
        b'c' => allows[1] && !needs[0],
        b'w' => node.writable || v || m,
        b'u' => node.writable || v || m || s,
        b'x' => v || m,
        b'y' => v || m || s,
        b'd' => needs[0] || v,
        b'r' => allows[1] && parents == 0,
        other => panic!("no such cell: {}", other as char),
    };
    let [n, a] = table(rule, role);
    let (take, unshare) = match (rule, role) {
        (_, ChildRole::Target) => ([false; 4], [false; 4]),
        _ => (row(rule.take), row(rule.unshare)),
    };
    OracleEdge {
        needs: std::array::from_fn(|c| cell(n, c, needs) || take[c]),
        allows: std::array::from_fn(|c| cell(a, c, allows) && !unshare[c]),
    }
}

fn row(a: Actions) -> Row {
    [Actions::D, Actions::V, Actions::M, Actions::S].map(|x| a.contains(x))
}

/// What the oracle finds: the edges, and everybody who is in somebody's way.
struct Verdict {
    edges: Vec<Vec<OracleEdge>>,
    conflicts: Vec<(usize, EdgeRef, EdgeRef, Actions)>,
    read_only: Vec<(usize, EdgeRef)>,
    unaligned: Vec<(usize, EdgeRef)>,
    /// Somebody active on a node that is not.
    inactive: Vec<(usize, EdgeRef)>,
}

impl Verdict {
    fn refused(&self) -> bool {
        !(self.conflicts.is_empty()
            && self.read_only.is_empty()
            && self.unaligned.is_empty()
            && self.inactive.is_empty())
    }
}

/// Everybody at a node: owner, who, seven needs, seven allows, scope.
type At = (Option<u32>, EdgeRef, [bool; 7], [bool; 7], Option<u32>);

/// Everybody who has an edge into a node: owner, who, needs, allows.
fn into(t: &Topology, edges: &[Vec<OracleEdge>], node: usize) -> Vec<(Option<u32>, EdgeRef, Row, Row)> {
    let mut list: Vec<(Option<u32>, EdgeRef, Row, Row)> = Vec::new();
    for (i, u) in t.users.iter().enumerate() {
        if u.node == node {
            list.push((Some(u.op), EdgeRef::User(i), row(u.claim.needs), row(u.claim.allows)));
        }
    }
    for (p, n) in t.nodes.iter().enumerate() {
        for (k, (_, c)) in n.children.iter().enumerate() {
            if *c == node {
                let e = edges[p][k];
                list.push((n.owner, EdgeRef::Child { parent: p, child: k }, e.needs, e.allows));
            }
        }
    }
    list
}

/// What all edges come to. `kept`: overlays that have let go of their backing child; `all_read`:
/// every overlay has a reader more; `silent`: an operation whose edges need nothing.
fn settled(t: &Topology, kept: &[usize], all_read: bool, silent: Option<u32>) -> Vec<Vec<OracleEdge>> {
    let idle = OracleEdge { needs: [false; 4], allows: [true; 4] };
    let quiet = |owner: Option<u32>| owner.is_some() && owner == silent;
    let mut edges: Vec<Vec<OracleEdge>> = t.nodes.iter().map(|n| vec![idle; n.children.len()]).collect();
    loop {
        let mut changed = false;
        for (p, n) in t.nodes.iter().enumerate() {
            let parents = into(t, &edges, p);
            let needs: Row = std::array::from_fn(|c| parents.iter().any(|e| e.2[c] && !quiet(e.0)));
            let allows: Row = std::array::from_fn(|c| parents.iter().all(|e| e.3[c]));
            for (k, (role, _)) in n.children.iter().enumerate() {
                let backing = *role == ChildRole::Backing;
                let read: Row = std::array::from_fn(|c| needs[c] || c == 0 && all_read && backing);
                let mut new = look_up(n.rule, *role, n, read, allows, parents.len());
                if backing && kept.contains(&p) {
                    new = idle;
                }
                if quiet(n.owner) {
                    new.needs = [false; 4];
                }
                changed |= edges[p][k] != new;
                edges[p][k] = new;
            }
        }
        if !changed {
            return edges;
        }
    }
}

/// What the oracle knows of a stance.
struct Seen {
    op: u32,
    robs: bool,
    /// All edges when the operation asks for nothing.
    without: Vec<Vec<OracleEdge>>,
    /// All edges as the operation finds them.
    found: Vec<Vec<OracleEdge>>,
}

impl Seen {
    fn of(t: &Topology, s: &Stance) -> Seen {
        let (kept, robs) = match &s.overlays {
            Overlays::Kept(k) => (&k[..], false),
            Overlays::All => (&[][..], true),
        };
        let (without, found) = (settled(t, &[], false, Some(s.op)), settled(t, kept, robs, None));
        Seen { op: s.op, robs, without, found }
    }
}

/// For each action that `a` needs, whether `b` is in its way.
fn in_the_way(seen: &[Seen], a: &At, b: &At) -> [bool; 7] {
    let edge = |who: EdgeRef, edges: &[Vec<OracleEdge>]| match who {
        EdgeRef::Child { parent, child } => Some(edges[parent][child]),
        EdgeRef::User(_) | EdgeRef::Claim(_) => None,
    };
    std::array::from_fn(|x| {
        if !a.2[x] {
            return false;
        }
        let mut verdict = !b.3[x];
        for s in seen {
            // It is the operation that asks if nobody asks when it asks for nothing.
            let asks = a.0 == Some(s.op) || x < 4 && edge(a.1, &s.without).is_some_and(|e| !e.needs[x]);
            let (true, Some(found)) = (asks, edge(b.1, &s.found)) else { continue };
            match (s.robs, x >= 4 || found.allows[x]) {
                (true, false) => verdict = true,
                (false, true) => verdict = false,
                _ => {}
            }
        }
        verdict
    })
}

fn oracle(t: &Topology) -> Verdict {
    let edges = settled(t, &[], false, None);
    let seen: Vec<Seen> = t.stances.iter().map(|s| Seen::of(t, s)).collect();
    let mut verdict = Verdict {
        edges,
        conflicts: Vec::new(),
        read_only: Vec::new(),
        unaligned: Vec::new(),
        inactive: Vec::new(),
    };
    for (number, n) in t.nodes.iter().enumerate() {
        let edges = into(t, &verdict.edges, number);
        let resizes = edges.iter().any(|e| e.2[3]);
        for (_, who, needs, _) in &edges {
            let takes_part = match who {
                EdgeRef::Child { parent, .. } => t.nodes[*parent].active,
                _ => needs.contains(&true),
            };
            if takes_part && !n.active {
                verdict.inactive.push((number, *who));
            }
            if needs[1] || needs[2] {
                if !n.writable {
                    verdict.read_only.push((number, *who));
                }
                if !n.aligned && !resizes {
                    verdict.unaligned.push((number, *who));
                }
            }
        }
        let wide = |r: Row, rest: bool| [r[0], r[1], r[2], r[3], rest, rest, rest];
        let mut all: Vec<At> =
            edges.iter().map(|(o, w, n, a)| (*o, *w, wide(*n, false), wide(*a, true), None)).collect();
        for (i, c) in t.claims.iter().enumerate().filter(|(_, c)| c.node == number) {
            let seven = |a: Actions| std::array::from_fn(|b| a.bits() & (1 << b) != 0);
            all.push((Some(c.op), EdgeRef::Claim(i), seven(c.claim.needs), seven(c.claim.allows), c.scope));
        }
        for a in &all {
            for b in &all {
                let apart = a.1 != b.1 && (a.0.is_none() || a.0 != b.0) && a.4 == b.4;
                if !apart {
                    continue;
                }
                let bad = in_the_way(&seen, a, b);
                let bits = (0..7).filter(|&x| bad[x]).fold(0, |bits, x| bits | 1 << x);
                if bits != 0 {
                    verdict.conflicts.push((number, a.1, b.1, Actions::from_bits(bits)));
                }
            }
        }
    }
    verdict
}

/// One comparison. Returns whether it was granted.
fn compare(t: &Topology) -> bool {
    let want = oracle(t);
    match solve(t) {
        Ok(grants) => {
            assert!(!want.refused(), "the solver grants what the oracle refuses: {t:#?}");
            for (n, node) in t.nodes.iter().enumerate() {
                for k in 0..node.children.len() {
                    let got = grants.children[n][k];
                    let got = OracleEdge { needs: row(got.needs), allows: row(got.allows) };
                    assert_eq!(got, want.edges[n][k], "edge {k} of node {n} in {t:#?}");
                }
                let parents = || {
                    let users = t
                        .users
                        .iter()
                        .filter(|u| u.node == n)
                        .map(|u| OracleEdge { needs: row(u.claim.needs), allows: row(u.claim.allows) });
                    let edges = t
                        .nodes
                        .iter()
                        .enumerate()
                        .flat_map(|(p, x)| x.children.iter().enumerate().map(move |(k, c)| (p, k, c.1)));
                    let edges = edges.filter(|e| e.2 == n).map(|(p, k, _)| want.edges[p][k]);
                    users.chain(edges).collect::<Vec<_>>()
                };
                let sum = OracleEdge {
                    needs: std::array::from_fn(|c| parents().iter().any(|e| e.needs[c])),
                    allows: std::array::from_fn(|c| parents().iter().all(|e| e.allows[c])),
                };
                let total = grants.total[n];
                assert_eq!(
                    OracleEdge { needs: row(total.needs), allows: row(total.allows) },
                    sum,
                    "total of node {n} in {t:#?}"
                );
            }
            true
        }
        Err(refusal) => {
            let true_reason = match refusal {
                Refusal::Conflict { node, actions, asks, denies } => {
                    want.conflicts.contains(&(node, asks, denies, actions))
                }
                Refusal::ReadOnly { node, asks } => want.read_only.contains(&(node, asks)),
                Refusal::Unaligned { node, asks } => want.unaligned.contains(&(node, asks)),
                Refusal::Inactive { node, asks } => want.inactive.contains(&(node, asks)),
                Refusal::Cycle { .. } => false,
            };
            assert!(true_reason, "{refusal:?} is not so in {t:#?}");
            assert_eq!(solve(t), Err(refusal), "the same topology is refused in the same way");
            false
        }
    }
}

/// How many were granted and refused: a test in which one of them is rare tests little.
#[derive(Default)]
struct Tally {
    granted: u64,
    refused: u64,
}

impl Tally {
    fn compare(&mut self, t: &Topology) {
        if compare(t) {
            self.granted += 1;
        } else {
            self.refused += 1;
        }
    }

    fn check(&self, at_least: u64) {
        assert!(
            self.granted >= at_least && self.refused >= at_least,
            "{} granted and {} refused",
            self.granted,
            self.refused
        );
    }
}

fn node(rule: AccessRule) -> TopoNode {
    TopoNode { rule, writable: true, active: true, aligned: true, owner: None, children: Vec::new() }
}

/// Claims over D, V, M, S: 256.
fn data_claims() -> impl Iterator<Item = Claim> + Clone {
    (0..=255u8).map(|b| Claim {
        needs: Actions::from_bits(b & 15),
        allows: Actions::from_bits(b >> 4) | (Actions::EVERY - Actions::DATA),
    })
}

fn claim(needs: Actions, denies: Actions) -> Claim {
    Claim { needs, allows: Actions::EVERY - denies }
}

/// So the other tests need not try both.
#[test]
fn transparent_is_a_filter() {
    let facts = NodeFacts { writable: true, has_parents: true };
    for role in ROLES {
        for (needs, allows) in (0..=u8::MAX).map(|n| (n & 15, n >> 4)) {
            let parents = claim(Actions::from_bits(needs), Actions::from_bits(allows));
            assert_eq!(
                AccessRule::TRANSPARENT.child_claim(role, parents, facts),
                AccessRule::FILTER.child_claim(role, parents, facts)
            );
        }
    }
}

#[test]
fn edge_rules() {
    let mut tally = Tally::default();
    // Every set that a test filter can take, and every set that it can keep from others.
    let debug = data_claims().map(|c| AccessRule {
        take: c.needs,
        unshare: c.allows & Actions::DATA,
        ..AccessRule::FILTER
    });
    let rules = RULES.into_iter().map(|r| (r, &ROLES[..], 0..8)).chain(debug.map(|r| (r, &ROLES[..1], 7..8)));
    for (rule, roles, all_facts) in rules {
        for role in roles.iter().copied() {
            for facts in all_facts.clone() {
                let mut parent = node(rule);
                parent.writable = facts & 1 != 0;
                parent.active = facts & 2 != 0;
                parent.aligned = facts & 4 != 0;
                parent.children.push((role, 1));
                let mut t = Topology { nodes: vec![parent, node(AccessRule::LEAF)], ..Topology::default() };
                tally.compare(&t);
                for claim in data_claims() {
                    t.users = vec![TopoUser { op: 0, node: 0, claim }];
                    tally.compare(&t);
                }
            }
        }
    }
    tally.check(10_000);
}

fn chain_of_rules(rules: &[AccessRule]) -> Topology {
    let mut nodes: Vec<TopoNode> = rules.iter().map(|r| node(*r)).collect();
    for (i, n) in nodes.iter_mut().enumerate() {
        n.children.push((ChildRole::Filtered, i + 1));
    }
    nodes.push(node(AccessRule::LEAF));
    Topology { nodes, ..Topology::default() }
}

#[test]
fn two_parties() {
    let mut tally = Tally::default();
    // Two users, a user and a claim, two claims with equal and with different scopes; of
    // one operation and of two.
    for kinds in 0..5 {
        for second_op in [0, 1] {
            for a in data_claims() {
                for b in data_claims() {
                    let mut t = Topology { nodes: vec![node(AccessRule::LEAF)], ..Topology::default() };
                    let user = |op, claim| TopoUser { op, node: 0, claim };
                    let held = |op, claim, scope| TopoClaim { op, node: 0, claim, scope };
                    match kinds {
                        0 => t.users = vec![user(0, a), user(second_op, b)],
                        1 => {
                            t.users = vec![user(0, a)];
                            t.claims = vec![held(second_op, b, None)];
                        }
                        2 => t.claims = vec![held(0, a, None), held(second_op, b, None)],
                        3 => t.claims = vec![held(0, a, Some(1)), held(second_op, b, Some(1))],
                        _ => t.claims = vec![held(0, a, Some(1)), held(second_op, b, None)],
                    }
                    tally.compare(&t);
                }
            }
        }
    }
    // Every pair of actions, those that only claims speak of among them.
    for x in 0..7 {
        for y in 0..7 {
            for pattern in 0..256u32 {
                let set = |shift: u32| {
                    let bits = (pattern >> shift) & 3;
                    let one = |bit: u32, a: u8| if bits & bit != 0 { 1u8 << a } else { 0 };
                    Actions::from_bits(one(1, x) | one(2, y))
                };
                let t = Topology {
                    nodes: vec![node(AccessRule::LEAF)],
                    users: Vec::new(),
                    beneath: Vec::new(),
                    stances: Vec::new(),
                    claims: vec![
                        TopoClaim { op: 0, node: 0, claim: claim(set(0), set(2)), scope: None },
                        TopoClaim { op: 1, node: 0, claim: claim(set(4), set(6)), scope: None },
                    ],
                };
                tally.compare(&t);
            }
        }
    }
    tally.check(100_000);
}

/// Every set of children with higher numbers, in every combination of `roles`.
fn graphs(n: usize, roles: &[ChildRole], mut each: impl FnMut(&[Vec<(ChildRole, usize)>])) {
    let pairs: Vec<(usize, usize)> = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b))).collect();
    let choices = roles.len() + 1;
    let all = choices.pow(pairs.len() as u32);
    for number in 0..all {
        let mut children = vec![Vec::new(); n];
        let mut rest = number;
        for &(a, b) in &pairs {
            let choice = rest % choices;
            rest /= choices;
            if choice > 0 {
                children[a].push((roles[choice - 1], b));
            }
        }
        each(&children);
    }
}

/// Every assignment of `rules` to the nodes that have children; a leaf's rule does nothing.
fn ruled(children: &[Vec<(ChildRole, usize)>], rules: &[AccessRule], mut each: impl FnMut(&[TopoNode])) {
    let inner: Vec<usize> = (0..children.len()).filter(|&n| !children[n].is_empty()).collect();
    for number in 0..rules.len().pow(inner.len() as u32) {
        let mut rest = number;
        let mut nodes: Vec<TopoNode> =
            children.iter().map(|c| TopoNode { children: c.clone(), ..node(AccessRule::LEAF) }).collect();
        for &n in &inner {
            nodes[n].rule = rules[rest % rules.len()];
            rest /= rules.len();
        }
        each(&nodes);
    }
}

#[test]
fn three_nodes() {
    use Actions as A;
    let reader = claim(A::D, A::NONE);
    let steady = claim(A::D, A::V | A::S);
    let writer = claim(A::D | A::V, A::S);
    let mut tally = Tally::default();
    for n in 1..=3 {
        graphs(n, &ROLES, |children| {
            ruled(children, &RULES, |nodes| {
                let mut t = Topology { nodes: nodes.to_vec(), ..Topology::default() };
                let user = |op, node, claim| TopoUser { op, node, claim };
                for first in [reader, writer, claim(A::M | A::S, A::D)] {
                    t.users = vec![user(0, 0, first)];
                    tally.compare(&t);
                    for at in 0..n {
                        t.users.truncate(1);
                        t.users.push(user(1, at, if first == writer { steady } else { writer }));
                        tally.compare(&t);
                        // The first one's operation interposed the topmost node: its edges
                        // and its claims are one party.
                        t.nodes[0].owner = Some(0);
                        t.claims = vec![TopoClaim {
                            op: 0,
                            node: n - 1,
                            claim: claim(A::D | A::P, A::V | A::P),
                            scope: None,
                        }];
                        tally.compare(&t);
                        t.claims.clear();
                        t.nodes[0].owner = None;
                    }
                }
                // What cannot be written, is unaligned or takes no part.
                t.users = vec![user(0, 0, writer)];
                for odd in 0..n {
                    t.nodes[odd].writable = false;
                    tally.compare(&t);
                    t.nodes[odd].writable = true;
                    t.nodes[odd].aligned = false;
                    tally.compare(&t);
                    t.nodes[odd].aligned = true;
                    t.nodes[odd].active = false;
                    tally.compare(&t);
                    t.nodes[odd].active = true;
                }
            });
        });
    }
    tally.check(100_000);
}

#[test]
fn four_nodes() {
    use Actions as A;
    const SOME_RULES: [AccessRule; 5] = [
        AccessRule::FILTER,
        AccessRule::POPULATES,
        AccessRule::FORMAT,
        AccessRule::COPIES_WRITES,
        AccessRule::COPIES_WRITES_DOWN,
    ];
    let mut tally = Tally::default();
    graphs(4, &[ChildRole::Metadata, ChildRole::Backing], |children| {
        ruled(children, &SOME_RULES, |nodes| {
            let mut t = Topology { nodes: nodes.to_vec(), ..Topology::default() };
            t.users = vec![
                TopoUser { op: 0, node: 0, claim: claim(A::D | A::V, A::S) },
                TopoUser { op: 1, node: 1, claim: claim(A::D, A::NONE) },
            ];
            tally.compare(&t);
            // A job that interposed node 1 and depends on node 2.
            t.nodes[1].owner = Some(1);
            t.claims = vec![TopoClaim { op: 1, node: 2, claim: claim(A::D, A::V), scope: None }];
            tally.compare(&t);
        });
    });
    tally.check(30_000);
}

/// An operation that keeps overlays right, and one that takes data away, over every graph of up to
/// four nodes of the rules that matter to it: it writes through a filter of its own or beside it,
/// others read.
#[test]
fn stances() {
    use Actions as A;
    const SOME_RULES: [AccessRule; 4] = [
        AccessRule::FILTER,
        AccessRule::FORMAT,
        AccessRule::SAVES_OLD_DATA_FOR_JOB,
        AccessRule::FORMAT_OVER_CHANGING,
    ];
    let rules = |n: usize| if n < 4 { &SOME_RULES[..] } else { &SOME_RULES[..3] };
    let mut tally = Tally::default();
    let (mut opened, mut closed) = (0, 0);
    for n in 2..=4 {
        graphs(n, &[ChildRole::Filtered, ChildRole::Backing], |children| {
            ruled(children, rules(n), |nodes| {
                let mut t = Topology { nodes: nodes.to_vec(), ..Topology::default() };
                t.nodes[0].owner = Some(0);
                let reader = TopoUser { op: 2, node: 1, claim: claim(A::D, A::NONE) };
                for writer in [
                    TopoUser { op: 1, node: 0, claim: claim(A::D | A::V, A::S) },
                    TopoUser { op: 0, node: n - 1, claim: claim(A::V | A::S, A::NONE) },
                ] {
                    t.users = vec![writer, reader];
                    t.stances.clear();
                    let plain = compare(&t);
                    for kept in [vec![0], vec![1]] {
                        t.stances = vec![Stance { op: 0, overlays: Overlays::Kept(kept) }];
                        tally.compare(&t);
                        opened += u32::from(!plain && solve(&t).is_ok());
                    }
                    t.users.pop();
                    t.stances.clear();
                    let plain = compare(&t);
                    t.stances = vec![Stance { op: 0, overlays: Overlays::All }];
                    tally.compare(&t);
                    closed += u32::from(plain && solve(&t).is_err());
                }
            });
        });
    }
    tally.check(1_000);
    assert!(opened > 100 && closed > 100, "what is tested makes a difference: {opened} and {closed}");
}

/// Numbers are names: any other numbering of the nodes gets the same verdict.
#[test]
fn names_do_not_matter() {
    use Actions as A;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut tally = Tally::default();
    for _ in 0..20_000 {
        let n = 2 + random(6);
        let mut t = Topology::default();
        for a in 0..n {
            let mut x = node(RULES[random(RULES.len())]);
            x.writable = random(8) > 0;
            x.owner = (random(4) == 0).then_some(0);
            for b in a + 1..n {
                if random(3) == 0 {
                    x.children.push((ROLES[random(ROLES.len())], b));
                }
            }
            t.nodes.push(x);
        }
        for op in 0..random(4) as u32 {
            let needs = Actions::from_bits(random(16) as u8) & Actions::from_bits(random(16) as u8);
            let denies = Actions::from_bits(random(16) as u8) & Actions::from_bits(random(16) as u8);
            t.users.push(TopoUser { op, node: random(n), claim: claim(needs, denies) });
        }
        if random(2) == 0 {
            t.claims.push(TopoClaim { op: 0, node: random(n), claim: claim(A::D, A::V | A::G), scope: None });
        }
        if random(3) == 0 {
            let kept = (0..n).filter(|_| random(3) == 0).collect();
            let overlays = if random(4) == 0 { Overlays::All } else { Overlays::Kept(kept) };
            t.stances.push(Stance { op: 0, overlays });
        }
        let verdict = compare(&t);
        if verdict {
            tally.granted += 1;
        } else {
            tally.refused += 1;
        }
        // A rotation of the numbers.
        let turn = 1 + random(n - 1);
        let to = |i: usize| (i + turn) % n;
        let mut moved = t.clone();
        for (i, x) in t.nodes.iter().enumerate() {
            let mut x = x.clone();
            x.children.iter_mut().for_each(|c| c.1 = to(c.1));
            moved.nodes[to(i)] = x;
        }
        moved.users.iter_mut().for_each(|u| u.node = to(u.node));
        moved.claims.iter_mut().for_each(|c| c.node = to(c.node));
        for s in &mut moved.stances {
            if let Overlays::Kept(kept) = &mut s.overlays {
                kept.iter_mut().for_each(|n| *n = to(*n));
            }
        }
        assert_eq!(compare(&moved), verdict, "{t:#?}");
    }
    tally.check(2_000);
}

#[test]
fn cycles_are_refused() {
    let mut t = chain_of_rules(&[AccessRule::FILTER, AccessRule::FORMAT]);
    t.nodes[2].children.push((ChildRole::Backing, 1));
    assert!(matches!(solve(&t), Err(Refusal::Cycle { node: 1 | 2 })));
    t.nodes[2].children[0].1 = 2;
    assert_eq!(solve(&t), Err(Refusal::Cycle { node: 2 }));
}

/// An operation that works through a filter that is nobody's: its claim beneath means others only.
#[test]
fn a_claim_beneath_filters_means_what_its_operation_does() {
    use Actions as A;
    let mut t = chain_of_rules(&[AccessRule::FILTER]);
    let writer = |op, node| TopoUser { op, node, claim: claim(A::V, A::NONE) };
    t.users = vec![writer(1, 0)];
    t.claims = vec![TopoClaim { op: 1, node: 1, claim: claim(A::NONE, A::V), scope: None }];
    assert!(solve(&t).is_err(), "through the filter it arrives as somebody else");
    t.beneath = vec![0];
    assert!(solve(&t).is_ok());
    // Another one by the same way, or past the filter.
    for node in [0, 1] {
        let mut beside = t.clone();
        beside.users.push(writer(2, node));
        assert!(matches!(solve(&beside), Err(Refusal::Conflict { node: 1, .. })), "{node}");
    }
}
