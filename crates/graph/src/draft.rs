//! A draft: a candidate for the next snapshot, and what has been prepared for it.
//!
//! A draft shows what is published. It takes in a copy of the parts that are changed ([`Draft::take_in`]); everything
//! else it only shows, so that a change costs as much as its own part of the graph. Changes to it touch nothing outside;
//! [`Draft::solve`] asks the solver; [`Draft::prepare`] lets leaf drivers take the locks
//! that the candidate needs. Publishing is [`GraphOwner::commit`](crate::GraphOwner::commit).
//! Dropping a draft undoes everything, in reverse order.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use dolmen_rt::{Instant, Rt};
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Result, Value};

use crate::build::{Solved, Working};
use crate::create::Pending;
use crate::notice::NoticeSink;
use crate::place::FileId;
use crate::published::Part;
use crate::state::{DraftChild, DraftNode, DraftUser, Setting};
use crate::{
    AccessRule, Cx, Driver, DriverKind, Grants, Graph, Node, NodeChange, NodeFlags, NodeState, Prepared,
    Repair,
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
    /// The parts of the graph that were taken in, as they are to be, and what is new.
    pub(crate) state: Working,
    /// What it was begun from.
    pub(crate) base: Arc<Graph>,
    /// The parts of it that were taken in, by number.
    pub(crate) taken: BTreeMap<u64, Arc<Part>>,
    pub(crate) setting: Arc<Setting>,
    /// The published nodes of these parts, to be reused where nothing changed; children before parents.
    pub(crate) published: Vec<Arc<Node>>,
    /// What was built last, for the same reason.
    pub(crate) built: RefCell<Rc<BTreeMap<NodeName, Arc<Node>>>>,
    /// Nodes that were held by something when they were taken in.
    held_before: BTreeSet<NodeName>,
    /// The operations that there were then; others are just being tried.
    pub(crate) ops_before: BTreeSet<OpId>,
    pub(crate) prepared: Vec<Box<dyn Prepared>>,
    /// Images that are repaired when the draft is published.
    pub(crate) repairs: Vec<(NodeName, Box<dyn Repair>)>,
    /// Images that are made when the draft is published; until then stand-ins are in their places.
    pub(crate) new_images: Vec<Pending>,
    /// Files that have been made for it.
    pub(crate) made: Vec<(PathBuf, FileId)>,
    /// Nodes that get another link without being flushed first.
    pub(crate) unflushed: Vec<NodeName>,
    pub(crate) now: Instant,
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
    pub(crate) fn new(base: Arc<Graph>, setting: Arc<Setting>, now: Instant) -> Draft {
        Draft {
            state: Working::default(),
            base,
            taken: BTreeMap::new(),
            setting,
            published: Vec::new(),
            built: RefCell::default(),
            held_before: BTreeSet::new(),
            ops_before: BTreeSet::new(),
            prepared: Vec::new(),
            repairs: Vec::new(),
            new_images: Vec::new(),
            made: Vec::new(),
            unflushed: Vec::new(),
            now,
        }
    }

    /// Takes in the parts of the graph that these are in, nodes or operations. Whatever changes something calls it
    /// first; what is there already or not at all is passed over.
    pub(crate) fn take_in<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        for name in names {
            let parts: Vec<u64> = self.base.parts_of(name).filter(|p| !self.taken.contains_key(p)).collect();
            parts.into_iter().for_each(|p| self.take_in_part(p));
        }
    }

    /// Takes in everything.
    pub(crate) fn take_in_all(&mut self) {
        let parts: Vec<u64> =
            self.base.parts().map(|p| p.0).filter(|p| !self.taken.contains_key(p)).collect();
        parts.into_iter().for_each(|p| self.take_in_part(p));
    }

    fn take_in_part(&mut self, number: u64) {
        let Some(part) = self.base.part(number).cloned() else { return };
        self.note_before(&part);
        // Operations are in the order of their age, and those that are being tried are the youngest: of several
        // conflicts the solver reports the one in which the younger one asks.
        let tried = self.state.ops.iter().position(|o| !self.ops_before.contains(&o.id));
        let tried = tried.unwrap_or(self.state.ops.len());
        let tried = self.state.ops.split_off(tried);
        self.state.add(&part.state);
        self.state.ops.sort_by_key(|o| o.since);
        self.state.ops.extend(tried);
        self.taken.insert(number, part);
    }

    /// What a part was like before it was changed.
    pub(crate) fn note_before(&mut self, part: &Part) {
        self.held_before.extend(part.state.held());
        self.ops_before.extend(part.state.ops.iter().map(|o| o.id.clone()));
        self.published.extend(part.nodes.values().cloned());
    }

    /// Makes up a name that users can't type.
    pub fn fresh_name(&mut self) -> NodeName {
        loop {
            let name = format!("#block{:03}", self.setting.next_name.fetch_add(1, Relaxed));
            if !self.has_node(&name) {
                return NodeName::internal(name);
            }
        }
    }

    /// Registers an operation.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is taken.
    pub fn add_op(&mut self, op: OpInfo) -> Result<()> {
        if self.op(&op.id).is_some() {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("id '{}' is already in use", op.id)));
        }
        self.state.ops.push(op);
        Ok(())
    }

    /// Registers the operation of an instant command, known by the command's name. Several of
    /// one name may stand in a draft.
    pub fn add_command(&mut self, command: &str, detail: String) -> OpId {
        let mut id = command.to_owned();
        let mut n = 1;
        while self.op(&id).is_some() {
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
        self.take_in([op.as_str()]);
        if let Some(o) = self.state.ops.iter_mut().find(|o| o.id == *op) {
            o.since = Some(now);
        }
    }

    /// Ends an operation: its edges and claims go, and filters that it interposed and has
    /// not taken out yet are taken out.
    pub fn remove_op(&mut self, op: &OpId) {
        self.take_in([op.as_str()]);
        self.state.users.retain(|u| u.op != *op);
        self.state.claims.retain(|c| c.op != *op);
        self.state.kept.retain(|(o, _)| o != op);
        self.state.destructive.retain(|o| o != op);
        let owned = |d: &Draft| {
            d.state.nodes.iter().find(|n| n.def.owner.as_ref() == Some(op)).map(|n| n.def.name.clone())
        };
        while let Some(filter) = owned(self) {
            self.take_out(&filter);
        }
        self.state.ops.retain(|o| o.id != *op);
    }

    /// Takes in an operation that must be there.
    pub(crate) fn known(&mut self, op: &OpId) -> Result<()> {
        self.take_in([op.as_str()]);
        if self.state.op(op).is_some() {
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
        let node = self.find(node)?;
        self.attach(op, node, claim, true)
    }

    fn attach(&mut self, op: &OpId, node: NodeName, claim: Claim, below_filters: bool) -> Result<()> {
        self.known(op)?;
        self.take_in([node.as_str()]);
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
        self.take_in([op.as_str()]);
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
        self.take_in([claim.node.as_str()]);
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
        let sink = NoticeSink { node: def.name.clone(), notices: self.setting.notices.clone() };
        self.state.nodes.push(Arc::new(DraftNode {
            def,
            driver: None,
            forced_read_only: false,
            reopening: false,
            other_image: false,
            retell: false,
            inherits: Vec::new(),
            children: Vec::new(),
            state: Arc::new(NodeState::of(sink)),
        }));
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
        self.take_in([parent.as_str(), child.as_str()]);
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
        self.take_in([parent.as_str()]);
        if let Some(n) = self.state.nodes.get_mut(parent) {
            n.children.retain(|c| c.name != name);
        }
    }

    /// Sets the driver of a node that is now open.
    ///
    /// # Panics
    /// When the node is not in the draft.
    pub fn set_driver(&mut self, node: &NodeName, driver: Arc<dyn Driver>, forced_read_only: bool) {
        self.take_in([node.as_str()]);
        let i = self.state.index(node);
        let node = &mut self.state.nodes[i];
        (node.driver, node.forced_read_only) = (Some(driver), forced_read_only);
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
        self.take_in([on.as_str(), filter.as_str()]);
        if self.state.reaches(&on, filter) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Interposing '{filter}' on '{on}' would create a cycle"),
            ));
        }
        let owner = self.state.node(filter).and_then(|n| n.def.owner.clone());
        let below: BTreeSet<NodeName> = self.state.below(filter).into_iter().cloned().collect();
        self.state.nodes.relink(&on, filter, |n| below.contains(&n.def.name));
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
        self.take_in([filter.as_str()]);
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
        self.state.nodes.relink(filter, &below, |_| false);
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
        self.take_in([name]);
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

    fn drop_node(&mut self, name: &NodeName) {
        let Some(node) = self.state.nodes.remove(name) else { return };
        // What the driver itself claimed goes with it, and claims that did not pin it.
        let own = driver_op(name);
        self.remove_op(&own);
        self.state.claims.retain(|c| c.node != *name);
        self.state.kept.retain(|(_, n)| n != name);
        self.state.told.remove(name);
        self.state.over.remove(name);
        for c in &node.children {
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
        self.take_in([node.as_str(), bottom.as_str()]);
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

    /// Opens again the drivers of nodes whose options have changed, then solves and lets every driver prepare whose parents' needs and allows differ from
    /// what it was told last (leaf drivers take locks). May be called several times while
    /// a draft grows.
    ///
    /// # Errors
    /// The solver's, or `Locked` when another process holds the image. What was prepared
    /// before stays prepared until the draft is dropped.
    pub async fn prepare(&mut self, rt: &Rt) -> Result<Rc<Grants>> {
        self.reopen_drivers(rt).await?;
        Ok(self.tell(rt).await?.grants.clone())
    }

    /// Tells drivers what their parents need and allow, where that has changed.
    pub(crate) async fn tell(&mut self, rt: &Rt) -> Result<Rc<Solved>> {
        let solved = self.solved()?;
        let grants = &solved.grants;
        for i in 0..self.state.nodes.len() {
            let name = self.state.nodes[i].def.name.clone();
            let total = grants.total[i];
            let Some(node) = solved.nodes.get(&name) else { continue };
            let retell = self.state.nodes[i].retell;
            if !retell && self.state.told.get(&name).copied().unwrap_or(Claim::IDLE) == total {
                continue;
            }
            let change = NodeChange::Access { needs: total.needs, allows: total.allows };
            let prepared = node.driver.prepare(Cx { node, rt }, &change).await?;
            self.prepared.push(prepared);
            self.state.note_told(name, total);
            if retell {
                self.state.nodes[i].retell = false;
            }
        }
        Ok(solved)
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
        write!(f, "Draft({} nodes, {} users taken in)", self.state.nodes.len(), self.state.users.len())
    }
}
