//! The owner of the graph: the one place where a snapshot is replaced.
//!
//! Order of a commit: solve, prepare (both may fail and leave no trace), quiesce the
//! users whose paths change (also what they have given up and the storage still works on), settle
//! (flush what is about to be linked elsewhere, and what later flushes of its users won't reach; a
//! failure resumes the old graph), publish, commit what was prepared, resume, retire
//! (close the drivers of nodes that are gone). From "publish" on nothing can fail.
//!
//! The owner is not `Send`: one control task has it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dolmen_rt::Rt;
use dolmen_types::{Actions, ChildRole, Error, ErrorKind, NodeName, OpId, Result, ResultExt};

use crate::draft::State;
use crate::{AccessRule, ChildEdge, Class, Draft, Graph, Node, Notices, OpClaim, OpInfo, UserEdge};

/// How long a drain may take before the command that asked for it fails.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Something that happened while the graph changed and did not stop the change.
#[derive(Debug)]
pub enum GraphEvent {
    /// A node that is gone could not write out what it still held.
    CloseFailed {
        /// Its name.
        node: NodeName,
        /// Why.
        error: Error,
    },
}

/// The owner of the graph.
pub struct GraphOwner {
    state: State,
    current: Arc<Graph>,
    rt: Rt,
    events: Vec<GraphEvent>,
    /// Nodes that have left the graph and are not closed yet, children first.
    retiring: Vec<Arc<Node>>,
}

impl GraphOwner {
    /// An owner of an empty graph.
    pub fn new(rt: Rt) -> GraphOwner {
        GraphOwner {
            state: State::default(),
            current: Arc::new(Graph::empty()),
            rt,
            events: Vec::new(),
            retiring: Vec::new(),
        }
    }

    /// An owner who lets everybody do everything. Whoever uses it loses data: tests show with it
    /// what a refusal prevents.
    #[doc(hidden)]
    pub fn unchecked(rt: Rt) -> GraphOwner {
        let mut owner = GraphOwner::new(rt);
        owner.state.unchecked = true;
        owner
    }

    /// The runtime that the owner's task runs on.
    pub fn rt(&self) -> &Rt {
        &self.rt
    }

    /// The current snapshot.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.current
    }

    /// All operations.
    pub fn ops(&self) -> &[OpInfo] {
        &self.state.ops
    }

    /// Gives an operation other words for messages: its state, for example.
    pub fn describe_op(&mut self, op: &OpId, detail: String) {
        if let Some(o) = self.state.ops.iter_mut().find(|o| o.id == *op) {
            o.detail = detail;
        }
    }

    /// All claims.
    pub fn claims(&self) -> &[OpClaim] {
        &self.state.claims
    }

    /// Whether a node stays until it is deleted by name.
    pub fn is_monitor_owned(&self, node: &str) -> bool {
        self.state.node(node).is_some_and(|n| n.def.monitor)
    }

    /// What drivers notice by themselves.
    pub fn notices(&self) -> Arc<Notices> {
        self.state.notices.clone()
    }

    /// What has happened since the last call.
    pub fn take_events(&mut self) -> Vec<GraphEvent> {
        std::mem::take(&mut self.events)
    }

    /// The edges of an operation, in the order in which they were added.
    pub fn edges<'a>(&'a self, op: &'a OpId) -> impl Iterator<Item = &'a Arc<UserEdge>> {
        self.state.users.iter().filter(move |u| u.op == *op).filter_map(|u| u.edge.as_ref())
    }

    /// Starts a change.
    pub fn draft(&self) -> Draft {
        Draft::new(self.state.clone(), self.current.generation, self.current.nodes.to_vec(), self.rt.now())
    }

    /// Publishes a draft. If it fails, the old graph is in place and unchanged, and files that were made for the draft
    /// are gone again.
    ///
    /// # Errors
    /// The solver's; what a driver's preparation says; `TimedOut` when a request did not
    /// finish, naming who has it; what flushing says.
    pub async fn commit(&mut self, mut draft: Draft) -> Result<Arc<Graph>> {
        if draft.generation != self.current.generation {
            return Err(Error::new(ErrorKind::Busy, "the graph was changed by somebody else meanwhile")
                .remedy("try again"));
        }
        // Nodes whose closing was cut short by a caller who lost patience.
        self.retire().await;
        let published = self.publish(&mut draft).await;
        if published.is_err() {
            draft.unmake(&self.rt).await;
        }
        drop(draft);
        published?;
        self.retire().await;
        Ok(self.current.clone())
    }

    async fn publish(&mut self, draft: &mut Draft) -> Result<()> {
        draft.sweep();
        let mut grants = draft.prepare(&self.rt).await?;
        if !draft.new_images.is_empty() {
            // Everything that can be refused has been: from here on files change.
            Box::pin(draft.make_images(&self.rt)).await?;
            grants = draft.prepare(&self.rt).await?;
        }
        let built = draft.build(&grants);
        if let Some(n) = draft.state.nodes.iter().find(|n| !built.contains_key(&n.def.name)) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("node '{}' has no driver, or a child without one", n.def.name),
            ));
        }

        // Users whose path changes, or who are gone.
        let gone: Vec<Arc<UserEdge>> = self
            .state
            .users
            .iter()
            .filter_map(|u| u.edge.clone())
            .filter(|e| !draft.state.users.iter().any(|u| u.edge.as_ref().is_some_and(|d| Arc::ptr_eq(d, e))))
            .collect();
        let moved: Vec<(Arc<UserEdge>, Arc<Node>, dolmen_types::Claim)> = draft
            .state
            .users
            .iter()
            .filter_map(|u| Some((u.edge.clone()?, built[&u.node].clone(), u.claim)))
            .filter(|(e, n, c)| !Arc::ptr_eq(&e.node(), n) || e.claim() != *c)
            .collect();
        let stopped: Vec<Arc<UserEdge>> =
            gone.iter().cloned().chain(moved.iter().map(|m| m.0.clone())).collect();
        let gates = Gates::close(&stopped);
        let left = self.left_behind(&gone, &moved, &built);
        self.quiesce_and_settle(&stopped, &built, &left, &draft.unflushed).await?;

        // Publish. From here on nothing fails.
        let retired: Vec<Arc<Node>> = self
            .current
            .nodes
            .iter()
            .filter(|old| !built.values().any(|n| Arc::ptr_eq(&n.state, &old.state)))
            .cloned()
            .collect();
        for u in &mut draft.state.users {
            if u.edge.is_none() {
                u.edge = Some(UserEdge::new(u.op.clone(), built[&u.node].clone(), u.claim));
            }
        }
        for (edge, node, claim) in &moved {
            edge.rebind(node.clone(), *claim);
        }
        self.current = Arc::new(Graph {
            generation: self.current.generation + 1,
            nodes: children_first(&built),
            users: draft.state.users.iter().filter_map(|u| u.edge.clone()).collect(),
        });
        self.state = std::mem::take(&mut draft.state);
        draft.commit_prepared();
        gone.iter().for_each(|e| e.detach());
        drop(gates);
        self.retiring.extend(retired);
        Ok(())
    }

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
        moved: &[(Arc<UserEdge>, Arc<Node>, dolmen_types::Claim)],
        built: &BTreeMap<NodeName, Arc<Node>>,
    ) -> Vec<Arc<Node>> {
        let writes = |e: &Arc<UserEdge>| e.claim().needs.intersects(Actions::V | Actions::M);
        let mut left: Vec<Arc<Node>> = Vec::new();
        let mut reached: Vec<Arc<Node>> = Vec::new();
        for edge in self.current.users.iter().filter(|e| writes(e)) {
            if gone.iter().any(|g| Arc::ptr_eq(g, edge)) {
                continue;
            }
            match moved.iter().find(|m| Arc::ptr_eq(&m.0, edge)) {
                None => reached.extend(flushed_with(&edge.node())),
                Some((_, new, _)) => {
                    let (old_way, new_way, read) =
                        (flushed_with(&edge.node()), flushed_with(new), new.subtree());
                    left.extend(old_way.into_iter().filter(|n| has(&read, n) && !has(&new_way, n)));
                    reached.extend(new_way);
                }
            }
        }
        let was_below = below_overlays(self.current.nodes.iter());
        let becomes = below_overlays(built.values()).into_iter();
        left.extend(becomes.filter(|n| !has(&was_below, n) && !has(&reached, n)));
        // Parents first, and nothing twice.
        let mut out: Vec<Arc<Node>> = Vec::new();
        let mut done: Vec<Arc<Node>> = Vec::new();
        for node in self.current.nodes.iter().rev().filter(|n| has(&left, n)) {
            if !has(&done, node) && !node.flags.read_only && !node.flags.inactive {
                done.extend(flushed_with(node));
                out.push(node.clone());
            }
        }
        out
    }

    /// Waits for the requests in flight, then flushes what is left behind or about to be linked
    /// elsewhere; all of it within the deadline.
    async fn quiesce_and_settle(
        &self,
        stopped: &[Arc<UserEdge>],
        built: &BTreeMap<NodeName, Arc<Node>>,
        left: &[Arc<Node>],
        unflushed: &[NodeName],
    ) -> Result<()> {
        let flushing: RefCell<Option<NodeName>> = RefCell::new(None);
        let mut unsettled = self.below_changes(built);
        let more: Vec<Arc<Node>> = left.iter().filter(|n| !has(&unsettled, n)).cloned().collect();
        unsettled.extend(more);
        let done = async {
            for e in stopped {
                e.drained().await;
            }
            // What was given up without its user (a filter lost patience with its target) or by a user who is gone.
            for node in &unsettled {
                node.state.no_more_given_up().await;
            }
            for node in left {
                flushing.replace(Some(node.name.clone()));
                crate::io::submit(node, &self.rt, crate::Op::Flush, None).await.context(|| {
                    format!(
                        "node '{}' must be flushed before it becomes a backing file: later flushes end above it",
                        node.name
                    )
                })?;
            }
            // Nodes that existed and whose links or options change write out what they hold,
            // so that every crash point is right in the old graph and in the new one.
            for old in &self.current.nodes {
                let Some(new) = built.get(&old.name) else { continue };
                let relinked = relinked(old, new) && !unflushed.contains(&old.name);
                let reopened = !Arc::ptr_eq(&old.driver, &new.driver);
                if (relinked || reopened) && !old.flags.read_only && !old.flags.inactive {
                    flushing.replace(Some(old.name.clone()));
                    crate::io::submit(old, &self.rt, crate::Op::Flush, None)
                        .await
                        .context(|| format!("node '{}' must be flushed before its links change", old.name))?;
                }
                // The image may not be written any more from here on, or be left: nothing must
                // remain to be given back later.
                let format = old.driver.kind().class == Class::Format;
                if reopened && format && !old.flags.read_only && !old.flags.inactive {
                    crate::io::close(old, &self.rt)
                        .await
                        .context(|| format!("node '{}' can't be reopened", old.name))?;
                }
            }
            Ok(())
        };
        let late = async {
            self.rt.sleep(DRAIN_DEADLINE).await;
            let secs = DRAIN_DEADLINE.as_secs();
            let message = match flushing.take() {
                Some(node) => format!("node '{node}' was not flushed within {secs} s"),
                None => {
                    let users = stopped.iter().filter(|e| e.in_flight() > 0).map(in_flight);
                    let nodes = unsettled.iter().filter(|n| n.state.given_up() > 0).map(given_up);
                    let who: Vec<String> = users.chain(nodes).collect();
                    format!("requests did not finish within {secs} s: {}", who.join(", "))
                }
            };
            Err(Error::new(ErrorKind::TimedOut, message)
                .remedy("look for the storage that does not answer, then try again"))
        };
        futures_lite::future::or(done, late).await
    }

    /// The nodes that lose or change their driver or a link, and all below them: nothing that was given up may still be
    /// under way there when that happens.
    fn below_changes(&self, built: &BTreeMap<NodeName, Arc<Node>>) -> Vec<Arc<Node>> {
        let mut out: Vec<Arc<Node>> = Vec::new();
        for old in &self.current.nodes {
            let changes = built.get(&old.name).is_none_or(|new| {
                !Arc::ptr_eq(&old.state, &new.state)
                    || !Arc::ptr_eq(&old.driver, &new.driver)
                    || relinked(old, new)
            });
            if !changes {
                continue;
            }
            for node in old.subtree() {
                if !out.iter().any(|o| Arc::ptr_eq(&o.state, &node.state)) {
                    out.push(node);
                }
            }
        }
        out
    }

    /// Closes the drivers of nodes that no snapshot reaches any more, parents first.
    ///
    /// A future that is dropped here leaves the rest for the next commit: their data are
    /// not lost.
    async fn retire(&mut self) {
        while let Some(node) = self.retiring.pop() {
            if let Err(error) = crate::io::close(&node, &self.rt).await {
                self.events.push(GraphEvent::CloseFailed { node: node.name.clone(), error });
            }
        }
    }

    /// Ends everything: users are stopped, every node is closed, parents first.
    ///
    /// # Errors
    /// The first failure; the rest is closed all the same.
    pub async fn close(&mut self) -> Result<()> {
        let mut draft = self.draft();
        draft.state.users.clear();
        draft.state.claims.clear();
        draft.state.kept.clear();
        draft.state.robbers.clear();
        draft.state.ops.retain(|_| false);
        draft.state.nodes.clear();
        draft.state.over.clear();
        draft.state.told.clear();
        self.commit(draft).await?;
        match self.take_events().into_iter().next() {
            Some(GraphEvent::CloseFailed { node, error }) => {
                Err(error.context(format!("closing node '{node}'")))
            }
            None => Ok(()),
        }
    }
}

/// Closed gates; they open again when this is dropped, however the commit ends. An edge
/// that has been detached meanwhile stays shut.
struct Gates<'a>(&'a [Arc<UserEdge>]);

impl<'a> Gates<'a> {
    fn close(edges: &'a [Arc<UserEdge>]) -> Gates<'a> {
        edges.iter().for_each(|e| e.close_gate());
        Gates(edges)
    }
}

impl Drop for Gates<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|e| e.open_gate());
    }
}

/// The nodes that a flush of `node` makes durable: those that hold what is written to it. It ends at backing
/// files, which nobody writes through an overlay, and at targets, whose durability is the business of who copies.
fn flushed_with(node: &Arc<Node>) -> Vec<Arc<Node>> {
    let mut out: Vec<Arc<Node>> = Vec::new();
    let mut todo = vec![node.clone()];
    while let Some(n) = todo.pop() {
        if !has(&out, &n) {
            // A flush of a view of the past does nothing.
            let ends = n.driver.access_rule() == AccessRule::SnapshotAccess;
            let holds = |c: &&ChildEdge| !ends && !matches!(c.role, ChildRole::Backing | ChildRole::Target);
            todo.extend(n.children.iter().filter(holds).map(|c| c.node.clone()));
            out.push(n);
        }
    }
    out
}

/// The nodes that hold the data of backing files.
fn below_overlays<'a>(nodes: impl Iterator<Item = &'a Arc<Node>>) -> Vec<Arc<Node>> {
    nodes.filter_map(|n| n.backing()).flat_map(flushed_with).collect()
}

/// Whether the node is among these, whatever its links were then.
fn has(nodes: &[Arc<Node>], node: &Node) -> bool {
    nodes.iter().any(|n| Arc::ptr_eq(&n.state, &node.state))
}

fn in_flight(edge: &Arc<UserEdge>) -> String {
    let (n, given_up) = (edge.in_flight(), edge.given_up());
    let plural = if n == 1 { "" } else { "s" };
    let mut text = format!("'{}' with {n} request{plural} on node '{}'", edge.op(), edge.node().name);
    if given_up > 0 {
        text.push_str(&format!(" ({given_up} given up, but the storage still works on it)"));
    }
    text
}

fn given_up(node: &Arc<Node>) -> String {
    let n = node.state.given_up();
    let plural = if n == 1 { "" } else { "s" };
    format!("node '{}' with {n} request{plural} given up that the storage still works on", node.name)
}

/// Whether a node that stays has other children.
fn relinked(old: &Node, new: &Node) -> bool {
    let other = |(a, b): (&ChildEdge, &ChildEdge)| !Arc::ptr_eq(&a.node.state, &b.node.state);
    Arc::ptr_eq(&old.state, &new.state)
        && (old.children.len() != new.children.len() || old.children.iter().zip(&new.children).any(other))
}

pub(crate) fn children_first(built: &BTreeMap<NodeName, Arc<Node>>) -> Box<[Arc<Node>]> {
    fn visit(n: &Arc<Node>, out: &mut Vec<Arc<Node>>) {
        if out.iter().any(|o| Arc::ptr_eq(o, n)) {
            return;
        }
        n.children.iter().for_each(|c| visit(&c.node, out));
        out.push(n.clone());
    }
    let mut out = Vec::with_capacity(built.len());
    built.values().for_each(|n| visit(n, &mut out));
    out.into()
}

impl std::fmt::Debug for GraphOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GraphOwner(generation {}, {} nodes)", self.current.generation, self.current.nodes.len())
    }
}
