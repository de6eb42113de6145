//! A draft: a candidate for the next snapshot, and what has been prepared for it.
//!
//! A draft starts as a copy of what is published. Changes to it touch nothing outside;
//! [`Draft::solve`] asks the solver; [`Draft::prepare`] lets leaf drivers take the locks
//! that the candidate needs. Publishing is [`GraphOwner::commit`](crate::GraphOwner::commit).
//! Dropping a draft undoes everything, in reverse order.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use dolmen_rt::{Instant, Rt};
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Result, Value};

use crate::create::Pending;
use crate::notice::NoticeSink;
use crate::place::FileId;
use crate::solver::solve_unchecked;
use crate::state::{DraftChild, DraftNode, DraftUser, State};
use crate::{
    AccessRule, ChildEdge, Cx, Driver, DriverKind, Grants, Graph, Node, NodeChange, NodeFlags, NodeState,
    Prepared, Repair, UserEdge, solve,
};

/// Who an operation is, for messages and queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpInfo {
    /// Unique among all operations.
    pub id: OpId,
    /// "export", "job", "command", "tool", "node" (a driver's own claims).
    pub kind: String,
    /// "nbd, writable", "mirror of 'top', ready", ...
    pub detail: String,
    /// When it started; `None` for an instant command.
    pub since: Option<Instant>,
    /// How a user ends it: "remove it (block-export-del 'exp0')".
    pub ends_with: Option<String>,
    /// What it could do instead of writing: "export 'base' read-only".
    pub instead_of_writing: Option<String>,
}

/// What a claim is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClaimScope {
    /// The node itself.
    Node,
    /// The same, of a node beneath filters through which the operation works: what arrives by its own edges is meant.
    Beneath,
    /// One bitmap of the node.
    Bitmap(String),
    /// One internal snapshot.
    Snapshot(String),
    /// One key slot of an encrypted image.
    KeySlot(u8),
}

impl ClaimScope {
    /// Whether it is about the node as a whole.
    pub(crate) fn is_node(&self) -> bool {
        matches!(self, ClaimScope::Node | ClaimScope::Beneath)
    }
}

/// A claim of an operation on a node. Does not propagate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpClaim {
    /// The operation.
    pub op: OpId,
    /// The node.
    pub node: NodeName,
    /// What it needs and allows.
    pub claim: Claim,
    /// What it is about.
    pub scope: ClaimScope,
    /// Why it does not allow the rest: "reads it as part of its source".
    pub why: String,
    /// The node must not go away while the claim stands.
    pub pins: bool,
}

/// A node to be added to a draft.
#[derive(Clone, Debug)]
pub struct NodeDef {
    /// Its name.
    pub name: NodeName,
    /// The name was made up.
    pub anonymous: bool,
    /// Registry row.
    pub kind: &'static DriverKind,
    /// Edge rule.
    pub rule: AccessRule,
    /// Common properties.
    pub flags: NodeFlags,
    /// The operation that interposes it, if one does.
    pub owner: Option<OpId>,
    /// It stays until it is deleted by name; otherwise it goes with its last parent.
    pub monitor: bool,
    /// Options it was opened with.
    pub options: Value,
}

/// A candidate for the next snapshot.
pub struct Draft {
    pub(crate) state: State,
    /// What it was copied from.
    pub(crate) base: Arc<State>,
    /// The generation of that.
    pub(crate) generation: u64,
    /// Published nodes, to be reused where nothing changed.
    pub(crate) published: Vec<Arc<Node>>,
    /// What was built last, for the same reason: a draft is built once per step of opening.
    built: RefCell<BTreeMap<NodeName, Arc<Node>>>,
    /// Nodes that were held by something when the draft was begun.
    held_before: BTreeSet<NodeName>,
    /// The operations that there were then; others are just being tried.
    ops_before: BTreeSet<OpId>,
    pub(crate) prepared: Vec<Box<dyn Prepared>>,
    /// Images that are repaired when the draft is published.
    pub(crate) repairs: Vec<(NodeName, Box<dyn Repair>)>,
    /// Images that are made when the draft is published; until then stand-ins are in their places.
    pub(crate) new_images: Vec<Pending>,
    /// Files that have been made for it.
    pub(crate) made: Vec<(PathBuf, FileId)>,
    /// Nodes that get another link without being flushed first.
    pub(crate) unflushed: Vec<NodeName>,
    now: Instant,
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Later preparations may build on earlier ones.
        while let Some(p) = self.prepared.pop() {
            drop(p);
        }
        // Only of a commit that was cut short: one that fails removes them where nobody has to wait for it.
        while let Some((path, id)) = self.made.pop() {
            crate::place::remove(&path, id);
        }
    }
}

impl Draft {
    pub(crate) fn new(base: Arc<State>, generation: u64, published: Vec<Arc<Node>>, now: Instant) -> Draft {
        let state = State::clone(&base);
        let held_before = state.held();
        let ops_before = state.ops.iter().map(|o| o.id.clone()).collect();
        Draft {
            state,
            base,
            generation,
            published,
            built: RefCell::default(),
            held_before,
            ops_before,
            prepared: Vec::new(),
            repairs: Vec::new(),
            new_images: Vec::new(),
            made: Vec::new(),
            unflushed: Vec::new(),
            now,
        }
    }

    /// Makes up a name that users can't type.
    pub fn fresh_name(&mut self) -> NodeName {
        loop {
            let name = format!("#block{:03}", self.state.next_name.fetch_add(1, Relaxed));
            if self.state.node(&name).is_none() {
                return NodeName::internal(name);
            }
        }
    }

    /// Whether a node of that name is in the candidate.
    pub fn has_node(&self, name: &str) -> bool {
        self.state.node(name).is_some()
    }

    /// The names of all nodes of the candidate.
    pub fn node_names(&self) -> impl Iterator<Item = &NodeName> {
        self.state.nodes.iter().map(|n| &n.def.name)
    }

    /// Driver of a node that has been opened.
    pub fn driver(&self, name: &str) -> Option<&Arc<dyn Driver>> {
        self.state.node(name)?.driver.as_ref()
    }

    /// Registry row of a node.
    pub fn kind(&self, name: &str) -> Option<&'static DriverKind> {
        self.state.node(name).map(|n| n.def.kind)
    }

    /// The options that a node was opened with.
    pub(crate) fn options_of(&self, name: &NodeName) -> Value {
        self.state.node(name).map_or(Value::Null, |n| n.def.options.clone())
    }

    /// A child of a node by the option's name.
    pub fn child(&self, name: &str, child: &str) -> Option<&NodeName> {
        self.state.node(name)?.children.iter().find(|c| c.name == child).map(|c| &c.node)
    }

    /// Where something new that names `node` attaches: to the outermost filter that an
    /// operation has interposed on it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resolve(&self, node: &str) -> Result<NodeName> {
        let mut name = self.state.node(node).map(|n| n.def.name.clone()).ok_or_else(|| no_such_node(node))?;
        while let Some(outer) = self.state.over.get(&name).and_then(|o| o.last()) {
            name = outer.clone();
        }
        Ok(name)
    }

    /// Registers an operation.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is taken.
    pub fn add_op(&mut self, op: OpInfo) -> Result<()> {
        if self.state.ops.iter().any(|o| o.id == op.id) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("id '{}' is already in use", op.id)));
        }
        self.state.ops.push(op);
        Ok(())
    }

    /// Registers the operation of an instant command, known by the command's name. Several of
    /// one name may stand in a draft.
    pub fn add_command(&mut self, command: &str, detail: String) -> OpId {
        let taken = |id: &str| self.state.ops.iter().any(|o| o.id.as_str() == id);
        let mut id = command.to_owned();
        let mut n = 1;
        while taken(&id) {
            n += 1;
            id = format!("{command}#{n}");
        }
        let id = OpId::internal(id);
        self.state.ops.push(OpInfo {
            id: id.clone(),
            kind: "command".into(),
            detail,
            since: None,
            ends_with: None,
            instead_of_writing: None,
        });
        id
    }

    /// Gives an operation its start time: until then it is worded as one that is being tried.
    pub fn mark_started(&mut self, op: &OpId) {
        let now = self.now;
        if let Some(o) = self.state.ops.iter_mut().find(|o| o.id == *op) {
            o.since = Some(now);
        }
    }

    /// Ends an operation: its edges and claims go, and filters that it interposed and has
    /// not taken out yet are taken out.
    pub fn remove_op(&mut self, op: &OpId) {
        self.state.users.retain(|u| u.op != *op);
        self.state.claims.retain(|c| c.op != *op);
        self.state.kept.retain(|(o, _)| o != op);
        self.state.destructive.retain(|o| o != op);
        while let Some(filter) = self.state.nodes.iter().find(|n| n.def.owner.as_ref() == Some(op)) {
            let filter = filter.def.name.clone();
            self.take_out(&filter);
        }
        self.state.ops.retain(|o| o.id != *op);
    }

    pub(crate) fn known(&self, op: &OpId) -> Result<()> {
        if self.state.ops.iter().any(|o| o.id == *op) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, format!("operation '{op}' is not registered")))
    }

    /// Attaches an operation to a node (or to the outermost filter interposed on it).
    ///
    /// # Errors
    /// `NotFound`, for the node or the operation.
    pub fn add_user(&mut self, op: &OpId, node: &str, claim: Claim) -> Result<()> {
        let node = self.resolve(node)?;
        self.attach(op, node, claim, false)
    }

    /// Attaches an operation to exactly this node, below whatever is interposed on it:
    /// for what a job does beneath or by way of its own filter, which stays there when another node takes
    /// the place of the one that the filter stands on. Everybody else must use
    /// [`Draft::add_user`].
    ///
    /// # Errors
    /// As [`Draft::add_user`].
    pub fn add_user_below_filters(&mut self, op: &OpId, node: &str, claim: Claim) -> Result<()> {
        let node = self.state.node(node).ok_or_else(|| no_such_node(node))?.def.name.clone();
        self.attach(op, node, claim, true)
    }

    fn attach(&mut self, op: &OpId, node: NodeName, claim: Claim, below_filters: bool) -> Result<()> {
        self.known(op)?;
        self.state.users.push(DraftUser {
            op: op.clone(),
            node,
            claim,
            below_filters,
            may_be_inactive: false,
            edge: None,
        });
        Ok(())
    }

    /// Lets the edges of an operation stay on nodes that are inactive; it can do nothing with
    /// them until they are active. All other users keep a node from being inactive.
    pub fn allow_inactive(&mut self, op: &OpId) {
        self.state.users.iter_mut().filter(|u| u.op == *op).for_each(|u| u.may_be_inactive = true);
    }

    pub(crate) fn set_inherited(&mut self, node: &NodeName, options: Vec<&'static str>) {
        let i = self.state.index(node);
        self.state.nodes[i].inherits = options;
    }

    /// Adds a claim; it lands on the named node itself.
    ///
    /// # Errors
    /// `NotFound`, for the node or the operation.
    pub fn add_claim(&mut self, claim: OpClaim) -> Result<()> {
        if !self.has_node(&claim.node) {
            return Err(no_such_node(&claim.node));
        }
        self.known(&claim.op)?;
        self.state.claims.push(claim);
        Ok(())
    }

    /// Adds a node without children, whose driver will be set later.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken, `NotFound` when the owner is no operation.
    pub fn add_node(&mut self, def: NodeDef) -> Result<()> {
        if self.has_node(&def.name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Duplicate nodes with node-name='{}'", def.name),
            )
            .remedy("choose another node-name, or remove the node first (blockdev-del)"));
        }
        if let Some(owner) = &def.owner {
            self.known(owner)?;
        }
        let sink = NoticeSink { node: def.name.clone(), notices: self.state.notices.clone() };
        self.state.nodes.push(DraftNode {
            def,
            driver: None,
            forced_read_only: false,
            reopening: false,
            other_image: false,
            retell: false,
            inherits: Vec::new(),
            children: Vec::new(),
            state: Arc::new(NodeState::of(sink)),
        });
        Ok(())
    }

    /// Links a child that an existing node is (or the outermost filter interposed on it).
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` when the link would close a cycle.
    pub fn link(
        &mut self,
        parent: &NodeName,
        name: &'static str,
        role: ChildRole,
        child: &str,
    ) -> Result<()> {
        let child = self.resolve(child)?;
        self.link_exactly(parent, name, role, child)
    }

    /// [`Draft::link`] to exactly this node, whatever is interposed on it: for a link that was found out
    /// before, and may lead below a filter on purpose.
    pub(crate) fn link_exactly(
        &mut self,
        parent: &NodeName,
        name: &'static str,
        role: ChildRole,
        child: NodeName,
    ) -> Result<()> {
        if !self.has_node(parent) {
            return Err(no_such_node(parent));
        }
        if self.state.reaches(&child, parent) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Making '{child}' a {name} child of '{parent}' would create a cycle"),
            ));
        }
        let i = self.state.index(parent);
        let children = &mut self.state.nodes[i].children;
        match children.iter_mut().find(|c| c.name == name) {
            Some(c) => c.node = child,
            None => children.push(DraftChild { name, role, node: child }),
        }
        Ok(())
    }

    /// Removes a link, if it is there. The child stays in the draft; what nobody holds
    /// any more goes when the draft is published.
    pub fn unlink(&mut self, parent: &NodeName, name: &str) {
        if let Some(n) = self.state.nodes.iter_mut().find(|n| n.def.name == *parent) {
            n.children.retain(|c| c.name != name);
        }
    }

    /// Sets the driver of a node that is now open.
    ///
    /// # Panics
    /// When the node is not in the draft.
    pub fn set_driver(&mut self, node: &NodeName, driver: Arc<dyn Driver>, forced_read_only: bool) {
        let i = self.state.index(node);
        self.state.nodes[i].driver = Some(driver);
        self.state.nodes[i].forced_read_only = forced_read_only;
    }

    /// Makes the filter `filter` (a node of the draft with an owner, whose `file` child
    /// is not linked yet) the place where every parent of `on` is attached, except
    /// nodes that the filter itself reaches.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` when the filter would be its own child.
    pub fn interpose(&mut self, filter: &NodeName, child: &'static str, on: &str) -> Result<()> {
        let on = self.resolve(on)?;
        if !self.has_node(filter) {
            return Err(no_such_node(filter));
        }
        if self.state.reaches(&on, filter) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Interposing '{filter}' on '{on}' would create a cycle"),
            ));
        }
        let owner = self.state.node(filter).and_then(|n| n.def.owner.clone());
        let spared: Vec<NodeName> = self
            .state
            .nodes
            .iter()
            .map(|n| n.def.name.clone())
            .filter(|n| *n != *filter && self.state.reaches(filter, n))
            .collect();
        for node in &mut self.state.nodes {
            if node.def.name != *filter && !spared.contains(&node.def.name) {
                for c in node.children.iter_mut().filter(|c| c.node == on) {
                    c.node = filter.clone();
                }
            }
        }
        let moves = |u: &&mut DraftUser| u.node == on && !u.below_filters && Some(&u.op) != owner.as_ref();
        for user in self.state.users.iter_mut().filter(moves) {
            user.node = filter.clone();
        }
        let i = self.state.index(filter);
        self.state.nodes[i]
            .children
            .insert(0, DraftChild { name: child, role: ChildRole::Filtered, node: on.clone() });
        self.state.over.entry(on).or_default().push(filter.clone());
        Ok(())
    }

    /// [`Draft::interpose`] for a filter that was opened on `on` by its options, so that its child is
    /// linked already.
    ///
    /// # Errors
    /// As [`Draft::interpose`].
    pub fn interpose_opened(&mut self, filter: &NodeName, child: &'static str, on: &str) -> Result<()> {
        self.unlink(filter, child);
        self.interpose(filter, child, on)
    }

    /// Takes an interposed filter out: its parents, its users and the filters that stand on
    /// it go to the node it stands on.
    pub fn take_out(&mut self, filter: &NodeName) {
        let Some(below) = self
            .state
            .node(filter)
            .and_then(|n| n.children.iter().find(|c| c.role == ChildRole::Filtered))
            .map(|c| c.node.clone())
        else {
            // It was never interposed.
            if self.has_node(filter) {
                self.drop_node(filter);
            }
            return;
        };
        for c in self.state.nodes.iter_mut().flat_map(|n| &mut n.children).filter(|c| c.node == *filter) {
            c.node = below.clone();
        }
        for u in self.state.users.iter_mut().filter(|u| u.node == *filter) {
            u.node = below.clone();
        }
        // What others claim on it is about what passes it, which goes on below.
        let owner = self.state.node(filter).and_then(|n| n.def.owner.clone());
        for c in self.state.claims.iter_mut().filter(|c| c.node == *filter && Some(&c.op) != owner.as_ref()) {
            c.node = below.clone();
        }
        // What stands on it stands on the node below from now on, or names of that node
        // would lead past it.
        let above = self.state.over.remove(filter).unwrap_or_default();
        if let Some(filters) = self.state.over.get_mut(&below) {
            filters.retain(|f| f != filter);
            filters.extend(above);
            if filters.is_empty() {
                self.state.over.remove(&below);
            }
        }
        self.drop_node(filter);
    }

    /// Deletes a node by name, with the children that nobody else holds.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when somebody uses it, saying who.
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        let node = self.state.node(name).ok_or_else(|| no_such_node(name))?;
        if let Some(owner) = &node.def.owner {
            return Err(Error::new(ErrorKind::Busy, format!("Node {name} belongs to operation '{owner}'"))
                .remedy("it goes when the operation ends"));
        }
        let node = node.def.name.clone();
        if let Some(user) = self.used_by(&node) {
            return Err(Error::new(ErrorKind::Busy, format!("Node {node} is in use: {user}"))
                .remedy("remove what uses it first"));
        }
        self.drop_node(&node);
        Ok(())
    }

    /// Who uses a node, in words; `None` if nobody does.
    pub fn used_by(&self, node: &NodeName) -> Option<String> {
        let s = &self.state;
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

    fn drop_node(&mut self, name: &NodeName) {
        let i = self.state.index(name);
        let node = self.state.nodes.remove(i);
        // What the driver itself claimed goes with it, and claims that did not pin it.
        let own = driver_op(name);
        self.remove_op(&own);
        self.state.claims.retain(|c| c.node != *name);
        self.state.kept.retain(|(_, n)| n != name);
        self.state.told.remove(name);
        self.state.over.remove(name);
        for c in node.children {
            let alone =
                self.state.node(&c.node).is_some_and(|n| !n.def.monitor) && self.used_by(&c.node).is_none();
            if alone {
                self.drop_node(&c.node);
            }
        }
    }

    /// Drops the nodes that have lost the last thing that held them since the draft was
    /// begun, unless they stay until they are deleted by name. Publishing does it; call it
    /// before [`Draft::solve`] to ask "what if" about links or operations that go.
    pub fn sweep(&mut self) {
        loop {
            let held = self.state.held();
            let orphan = self.state.nodes.iter().find(|n| {
                let name = &n.def.name;
                !n.def.monitor
                    && n.def.owner.is_none()
                    && self.held_before.contains(name)
                    && !held.contains(name)
            });
            let Some(orphan) = orphan else { return };
            let name = orphan.def.name.clone();
            self.drop_node(&name);
        }
    }

    pub(crate) fn add_driver_op(&mut self, node: &NodeName) -> Result<OpId> {
        let op = driver_op(node);
        self.add_op(OpInfo {
            id: op.clone(),
            kind: "node".into(),
            detail: format!("driver {}", self.kind(node).map_or("", |k| k.name)),
            since: Some(self.now),
            ends_with: Some(format!("remove the node first (blockdev-del '{node}')")),
            instead_of_writing: None,
        })?;
        Ok(op)
    }

    /// Claims that nobody relinks or replaces the nodes from the first child of `node`
    /// down to, but without, `bottom`; `bottom` itself is pinned.
    ///
    /// # Errors
    /// `NotFound` when `bottom` is not below the node.
    pub fn rely_down_to(&mut self, node: &NodeName, bottom: &NodeName) -> Result<()> {
        let op = self.add_driver_op(node)?;
        let mut at = self.state.node(node).and_then(|n| n.children.first()).map(|c| c.node.clone());
        while let Some(name) = at {
            let last = name == *bottom;
            // What lies below the bottom is nobody's business here, but the bottom must stay in its place.
            let denies = if last { Actions::P } else { Actions::G | Actions::P };
            let allows = Actions::EVERY - denies;
            self.add_claim(OpClaim {
                op: op.clone(),
                node: name.clone(),
                claim: Claim { needs: Actions::NONE, allows },
                scope: ClaimScope::Node,
                why: format!("relies on the chain down to its bottom node '{bottom}'"),
                pins: true,
            })?;
            if last {
                return Ok(());
            }
            at = self
                .state
                .node(&name)
                .and_then(|n| {
                    n.children.iter().find(|c| matches!(c.role, ChildRole::Filtered | ChildRole::Backing))
                })
                .map(|c| c.node.clone());
        }
        Err(Error::new(ErrorKind::NotFound, format!("Bottom node '{bottom}' is not below node '{node}'")))
    }

    /// Asks the solver about the candidate.
    ///
    /// # Errors
    /// `Conflict` with both parties, `ReadOnly`, `InvalidInput`.
    pub fn solve(&self) -> Result<Grants> {
        let decide = if self.state.unchecked { solve_unchecked } else { solve };
        decide(&self.state.topology())
            .map_err(|r| crate::explain::explain(&self.state, &self.ops_before, r, self.now))
    }

    /// Builds the nodes that have a driver, reusing published ones that did not change.
    pub(crate) fn build(&self, grants: &Grants) -> BTreeMap<NodeName, Arc<Node>> {
        let mut built = BTreeMap::new();
        let known = Known {
            numbers: self.state.numbers(),
            published: self.published.iter().map(|n| (&n.name, n)).collect(),
            last: self.built.take(),
        };
        for i in 0..self.state.nodes.len() {
            self.build_node(i, &known, grants, &mut built);
        }
        self.built.replace(built.clone());
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
            let node = self.build_node(known.numbers[&c.node], known, grants, built)?;
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
        let grants = self.solve()?;
        let built = self.build(&grants);
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
        let grants = self.solve()?;
        let built = self.build(&grants);
        let user = |u: &DraftUser| {
            let node = built.get(&u.node)?.clone();
            Some(UserEdge::new(u.op.clone(), node, u.claim))
        };
        Ok(Graph {
            generation: self.generation + 1,
            nodes: crate::owner::children_first(&built),
            users: self.state.users.iter().filter_map(user).collect(),
        })
    }

    /// The operations of the candidate.
    pub fn ops(&self) -> &[OpInfo] {
        &self.state.ops
    }

    /// The node as it is in the candidate, to look at its size and limits.
    ///
    /// # Errors
    /// The solver's; `NotFound` also for a node that has no driver yet.
    pub fn built_node(&self, name: &NodeName) -> Result<Arc<Node>> {
        let grants = self.solve()?;
        self.build(&grants).remove(name).ok_or_else(|| no_such_node(name))
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

    /// Opens again the drivers of nodes whose options have changed, then solves and lets every driver prepare whose parents' needs and allows differ from
    /// what it was told last (leaf drivers take locks). May be called several times while
    /// a draft grows.
    ///
    /// # Errors
    /// The solver's, or `Locked` when another process holds the image. What was prepared
    /// before stays prepared until the draft is dropped.
    pub async fn prepare(&mut self, rt: &Rt) -> Result<Grants> {
        self.reopen_drivers(rt).await?;
        self.tell(rt).await
    }

    /// Tells drivers what their parents need and allow, where that has changed.
    pub(crate) async fn tell(&mut self, rt: &Rt) -> Result<Grants> {
        let grants = self.solve()?;
        let built = self.build(&grants);
        for i in 0..self.state.nodes.len() {
            let name = self.state.nodes[i].def.name.clone();
            let total = grants.total[i];
            let Some(node) = built.get(&name) else { continue };
            let retell = self.state.nodes[i].retell;
            if !retell && self.state.told.get(&name).copied().unwrap_or(Claim::IDLE) == total {
                continue;
            }
            let change = NodeChange::Access { needs: total.needs, allows: total.allows };
            let prepared = node.driver.prepare(Cx { node, rt }, &change).await?;
            self.prepared.push(prepared);
            self.state.told.insert(name, total);
            self.state.nodes[i].retell = false;
        }
        Ok(grants)
    }

    /// Makes what was prepared effective, and lets go of nodes that may be gone. Cannot
    /// fail.
    pub(crate) fn commit_prepared(&mut self) {
        self.published.clear();
        self.built.take();
        self.made.clear();
        for p in self.prepared.drain(..) {
            p.commit();
        }
    }
}

/// Nodes by name, while a draft is built.
struct Known<'a> {
    numbers: HashMap<&'a NodeName, usize>,
    published: HashMap<&'a NodeName, &'a Arc<Node>>,
    last: BTreeMap<NodeName, Arc<Node>>,
}

/// The operation id under which a node's driver holds claims.
pub(crate) fn driver_op(node: &NodeName) -> OpId {
    OpId::internal(format!("driver:{node}"))
}

pub(crate) fn no_such_node(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'"))
        .remedy("query-named-block-nodes lists the nodes there are")
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Draft({} nodes, {} users)", self.state.nodes.len(), self.state.users.len())
    }
}
