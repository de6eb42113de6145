//! From a draft to nodes: what the solver grants, and the nodes of the snapshot that publishing would make.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::Arc;

use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, Result, Value};

use crate::draft::no_such_node;
use crate::solver::solve_unchecked;
use crate::state::State;
use crate::{ChildEdge, Draft, Driver, Grants, Graph, Node, UserEdge, solve};

/// The most nodes from a root down to a leaf: whoever walks a chain may do it by recursion.
const MAX_DEPTH: usize = 4096;

/// What the solver grants for one state of a draft, and the nodes built with that.
pub(crate) struct Solved {
    pub(crate) grants: Rc<Grants>,
    /// Those that have a driver.
    pub(crate) nodes: Rc<BTreeMap<NodeName, Arc<Node>>>,
}

/// The state that a draft works on, with what the solver says of it: until the state is changed.
#[derive(Default)]
pub(crate) struct Working {
    state: State,
    solved: RefCell<Option<Rc<Solved>>>,
}

impl Working {
    fn solved(&self) -> Option<Rc<Solved>> {
        self.solved.borrow().clone()
    }

    fn keep(&self, solved: Rc<Solved>) {
        self.solved.replace(Some(solved));
    }

    /// Forgets what the solver has said: what it asks drivers (the sizes of files) may have changed.
    pub(crate) fn forget_solved(&self) -> Option<Rc<Solved>> {
        self.solved.take()
    }

    /// Notes what a driver was told; that is nothing to the solver.
    pub(crate) fn note_told(&mut self, node: NodeName, told: Claim) {
        self.state.told.insert(node, told);
    }
}

impl Deref for Working {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Working {
    fn deref_mut(&mut self) -> &mut State {
        *self.solved.get_mut() = None;
        &mut self.state
    }
}

/// Nodes by name, while a draft is built.
struct Known<'a> {
    published: BTreeMap<&'a NodeName, &'a Arc<Node>>,
    last: Rc<BTreeMap<NodeName, Arc<Node>>>,
}

impl Draft {
    /// Asks the solver about the candidate, as far as it was taken in: the rest has nothing to do with it, and is as
    /// it was granted.
    ///
    /// # Errors
    /// `Conflict` with both parties, `ReadOnly`, `InvalidInput`.
    pub fn solve(&self) -> Result<Rc<Grants>> {
        Ok(self.solved()?.grants.clone())
    }

    /// What the solver grants, and the nodes built with that. It is found out once for each state of the draft.
    pub(crate) fn solved(&self) -> Result<Rc<Solved>> {
        if let Some(known) = self.state.solved() {
            return Ok(known);
        }
        let grants = Rc::new(self.decide(&self.state)?);
        let nodes = Rc::new(self.build(&grants));
        self.built.replace(nodes.clone());
        let solved = Rc::new(Solved { grants, nodes });
        self.state.keep(solved.clone());
        Ok(solved)
    }

    fn decide(&self, part: &State) -> Result<Grants> {
        if part.is_deeper_than(MAX_DEPTH) {
            let text = format!("nodes would be stacked more than {MAX_DEPTH} high");
            return Err(
                Error::new(ErrorKind::Limit, text).remedy("merge images of the chain first (block-commit)")
            );
        }
        let decide = if self.setting.unchecked { solve_unchecked } else { solve };
        decide(&part.topology()).map_err(|r| crate::explain::explain(part, &self.ops_before, r, self.now))
    }

    /// Builds the nodes that have a driver, reusing those that did not change since they were published or built last: a
    /// draft is built once per step of opening.
    fn build(&self, grants: &Grants) -> BTreeMap<NodeName, Arc<Node>> {
        let known = Known {
            published: self.published.iter().map(|n| (&n.name, n)).collect(),
            last: self.built.borrow().clone(),
        };
        let mut built = BTreeMap::new();
        for i in 0..self.state.nodes.len() {
            self.build_node(i, &known, grants, &mut built);
        }
        built
    }

    fn build_node(
        &self,
        i: usize,
        known: &Known<'_>,
        grants: &Grants,
        built: &mut BTreeMap<NodeName, Arc<Node>>,
    ) -> Option<Arc<Node>> {
        let d = &self.state.nodes[i];
        if let Some(n) = built.get(&d.def.name) {
            return Some(n.clone());
        }
        let driver = d.driver.clone()?;
        let mut children = Vec::with_capacity(d.children.len());
        for (k, c) in d.children.iter().enumerate() {
            let node = self.build_node(self.state.index(&c.node), known, grants, built)?;
            children.push(ChildEdge { name: c.name, role: c.role, node, claim: grants.children[i][k] });
        }
        let same = |old: &&Arc<Node>| {
            Arc::ptr_eq(&old.state, &d.state)
                && Arc::ptr_eq(&old.driver, &driver)
                && old.flags == d.def.flags
                && old.children.len() == children.len()
                && old
                    .children
                    .iter()
                    .zip(&children)
                    .all(|(a, b)| a.name == b.name && a.claim == b.claim && Arc::ptr_eq(&a.node, &b.node))
        };
        let earlier = [known.published.get(&d.def.name).copied(), known.last.get(&d.def.name)];
        let node = match earlier.into_iter().flatten().find(same) {
            Some(old) => old.clone(),
            None => Arc::new(Node {
                name: d.def.name.clone(),
                anonymous: d.def.anonymous,
                maps: d.def.kind.maps,
                hears: Node::hears_through(&*driver, &children),
                shown: Node::shown_through(&*driver, &d.state, d.def.flags, &children),
                driver,
                children: children.into(),
                flags: d.def.flags,
                state: d.state.clone(),
                owner: d.def.owner.clone(),
                options: d.def.options.clone(),
            }),
        };
        built.insert(d.def.name.clone(), node.clone());
        Some(node)
    }

    /// The edges to the children of a node that are there, with what the solver grants.
    pub(crate) fn edges_of(&self, name: &NodeName) -> Result<Vec<ChildEdge>> {
        let solved = self.solved()?;
        let (grants, built) = (&solved.grants, &solved.nodes);
        let i = self.state.index(name);
        Ok(self.state.nodes[i]
            .children
            .iter()
            .enumerate()
            .filter_map(|(k, c)| {
                Some(ChildEdge {
                    name: c.name,
                    role: c.role,
                    node: built.get(&c.node)?.clone(),
                    claim: grants.children[i][k],
                })
            })
            .collect())
    }

    /// The same for opening the node. An inactive one holds nothing on its children, but its
    /// driver may look at the image while it is opened.
    pub(crate) fn edges_for_opening(&self, name: &NodeName) -> Result<Vec<ChildEdge>> {
        let mut edges = self.edges_of(name)?;
        if self.state.nodes[self.state.index(name)].def.flags.inactive {
            edges.iter_mut().for_each(|e| e.claim.needs |= Actions::D);
        }
        Ok(edges)
    }

    /// The snapshot that publishing the draft would make: to be looked at, not to be used.
    ///
    /// # Errors
    /// The solver's.
    pub fn preview(&self) -> Result<Graph> {
        let built = self.solved()?.nodes.clone();
        let mut state = State::clone(&self.state);
        for u in state.users.iter_mut() {
            u.edge = built.get(&u.node).map(|n| UserEdge::new(u.op.clone(), n.clone(), u.claim));
        }
        Ok(self.base.with(self.taken.keys().copied(), &state, &built, &self.setting))
    }

    /// The node as it is in the candidate, to look at its size and limits.
    ///
    /// # Errors
    /// The solver's; `NotFound` also for a node that has no driver yet.
    pub fn built_node(&self, name: &NodeName) -> Result<Arc<Node>> {
        if self.state.node(name).is_none() {
            let shown = self.node(name).and_then(|_| self.base.node(name));
            return shown.cloned().ok_or_else(|| no_such_node(name));
        }
        self.solved()?.nodes.get(name).cloned().ok_or_else(|| no_such_node(name))
    }

    /// What the parents and users of a node need together, and what all of them allow.
    ///
    /// # Errors
    /// The solver's; `NotFound`.
    pub fn total(&self, name: &str) -> Result<Claim> {
        let around = self.around(name);
        let i = around.nodes.position(name).ok_or_else(|| no_such_node(name))?;
        if std::ptr::eq(around, &*self.state) {
            return Ok(self.solved()?.grants.total[i]);
        }
        Ok(self.decide(around)?.total[i])
    }

    /// A node value for asking a driver that has just been opened.
    pub(crate) fn probe_node(&self, name: &NodeName, driver: Arc<dyn Driver>, edges: &[ChildEdge]) -> Node {
        let d = &self.state.nodes[self.state.index(name)];
        Node {
            name: name.clone(),
            anonymous: d.def.anonymous,
            maps: false,
            shown: None,
            hears: false,
            driver,
            children: edges.into(),
            flags: d.def.flags,
            state: d.state.clone(),
            owner: None,
            options: Value::Null,
        }
    }

    /// A text that opens the image of a node again: see [`node_filename`](crate::node_filename).
    pub fn filename(&self, name: &NodeName) -> Option<String> {
        self.built_node(name).ok().map(|n| crate::node_filename(&n))
    }

    /// The file name of the image that a format node keeps its metadata in.
    pub fn image_filename(&self, name: &NodeName) -> Option<String> {
        let file = self.child(name, "file")?;
        let node = self.built_node(file).ok()?;
        let mut at = &node;
        while let Some(next) = at.filtered() {
            at = next;
        }
        at.driver.describe(at).filename
    }
}
