//! The owner of the graph: the one place where a snapshot is replaced.
//!
//! Order of a commit: solve, prepare (both may fail and leave no trace: [`GraphOwner::rehearse`] stops here), make and
//! repair images, quiesce the
//! users whose paths change (also what they have given up and the storage still works on), settle
//! (flush what is about to be linked elsewhere, and what later flushes of its users won't reach; a
//! failure resumes the old graph), publish, commit what was prepared, resume, retire
//! (close the drivers of nodes that are gone). From "publish" on nothing can fail.
//!
//! Everything up to there may wait, and other commits go on meanwhile: when it is a draft's turn to be published, what
//! was published since it was copied is merged into it ([`crate::merge`]), and the solver decides again.
//! Publishing itself waits for nothing.
//!
//! The owner is not `Send`: its handles belong to one core.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use dolmen_rt::{LocalFuture, PutOff, Rt, put_off};
use dolmen_types::{Error, ErrorKind, NodeName, OpId, Result, ResultExt};
use event_listener::Event;
use futures_lite::FutureExt;

use crate::effect::{Effect, given_up, in_flight};
use crate::state::Setting;
use crate::{Draft, Grants, Graph, Node, Notices, OpClaim, OpInfo, UserEdge};

/// How long a drain may take before the command that asked for it fails.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// How long a part that can't be closed may take to be flushed.
const LAST_FLUSH: Duration = Duration::from_secs(5);

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

/// A handle of the owner of the graph. Handles are equal: several tasks may change the graph at the
/// same time.
#[derive(Clone)]
pub struct GraphOwner {
    shared: Rc<Shared>,
    rt: Rt,
    patience: Patience,
}

/// How long somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For everything that has to happen before a draft can be published; then it is not.
    pub publish: Duration,
    /// For nodes that have left the graph to be closed; then they are closed without anybody waiting.
    pub close: Option<Duration>,
}

impl Default for Patience {
    /// For programs that have nothing else to do: closing takes as long as it takes.
    fn default() -> Patience {
        Patience { publish: DRAIN_DEADLINE, close: None }
    }
}

/// What all handles share. Nothing is borrowed while anybody waits.
struct Shared {
    setting: Arc<Setting>,
    current: RefCell<Arc<Graph>>,
    events: RefCell<Vec<GraphEvent>>,
    /// How many [`Closing`]s are not done yet.
    closing: Cell<usize>,
    closed: Event,
}

impl GraphOwner {
    /// An owner of an empty graph.
    pub fn new(rt: Rt) -> GraphOwner {
        GraphOwner::of(Setting::default(), rt)
    }

    /// An owner who lets everybody do everything. Whoever uses it loses data: tests show with it
    /// what a refusal prevents.
    #[doc(hidden)]
    pub fn unchecked(rt: Rt) -> GraphOwner {
        GraphOwner::of(Setting { unchecked: true, ..Setting::default() }, rt)
    }

    fn of(setting: Setting, rt: Rt) -> GraphOwner {
        let shared = Shared {
            setting: Arc::new(setting),
            current: RefCell::new(Arc::new(Graph::empty())),
            events: RefCell::default(),
            closing: Cell::new(0),
            closed: Event::new(),
        };
        GraphOwner { shared: Rc::new(shared), rt, patience: Patience::default() }
    }

    /// The same owner, for somebody who waits only so long.
    pub fn with_patience(&self, patience: Patience) -> GraphOwner {
        GraphOwner { patience, ..self.clone() }
    }

    /// The runtime that the owner's task runs on.
    pub fn rt(&self) -> &Rt {
        &self.rt
    }

    /// The current snapshot.
    pub fn graph(&self) -> Arc<Graph> {
        self.shared.current.borrow().clone()
    }

    /// All operations, the oldest first.
    pub fn ops(&self) -> Vec<OpInfo> {
        let mut ops: Vec<OpInfo> = self.graph().parts().flat_map(|(_, p)| p.state.ops.clone()).collect();
        ops.sort_by_key(|o| o.since);
        ops
    }

    /// Gives an operation other words for messages: its state, for example.
    pub fn describe_op(&mut self, op: &OpId, detail: &str) {
        let mut graph = self.shared.current.borrow_mut();
        if let Some(other) = graph.describe_op(op, detail) {
            *graph = Arc::new(other);
        }
    }

    /// All claims.
    pub fn claims(&self) -> Vec<OpClaim> {
        self.graph().parts().flat_map(|(_, p)| p.state.claims.clone()).collect()
    }

    /// Whether a node stays until it is deleted by name.
    pub fn is_monitor_owned(&self, node: &str) -> bool {
        self.draft().node(node).is_some_and(|n| n.def.monitor)
    }

    /// What drivers notice by themselves.
    pub fn notices(&self) -> Arc<Notices> {
        self.shared.setting.notices.clone()
    }

    /// What has happened since the last call.
    pub fn take_events(&mut self) -> Vec<GraphEvent> {
        self.shared.events.take()
    }

    /// The edges of an operation, in the order in which they were added.
    pub fn edges(&self, op: &OpId) -> impl Iterator<Item = Arc<UserEdge>> + use<> {
        let edges: Vec<_> = self.graph().edges(op).cloned().collect();
        edges.into_iter()
    }

    /// Starts a change.
    pub fn draft(&self) -> Draft {
        Draft::new(self.graph(), self.shared.setting.clone(), self.rt.now())
    }

    /// Publishes a draft, and waits until the nodes that have left the graph are closed. If it fails, the old
    /// graph is in place and unchanged.
    ///
    /// # Errors
    /// As [`GraphOwner::publish`].
    pub async fn commit(&mut self, draft: Draft) -> Result<Arc<Graph>> {
        let closing = self.publish(draft).await?;
        let graph = self.graph();
        closing.ended().await;
        Ok(graph)
    }

    /// Publishes a draft. If it fails, the old graph is in place and unchanged, and files that were made for the draft
    /// are gone again. When this returns, the
    /// new one is there; nodes that have left it are closed while the result is awaited, or later if it is dropped.
    ///
    /// # Errors
    /// The solver's; what a driver's preparation says; `TimedOut` when a request did not
    /// finish, naming who has it; what flushing says; `Busy` when somebody else has changed
    /// the same part of the graph meanwhile.
    pub async fn publish(&mut self, mut draft: Draft) -> Result<Closing> {
        let published = self.try_to_publish(&mut draft).await;
        if published.is_err() {
            // Where they are may not answer any more; they stay there then, empty or new.
            let _ = self.rt.timeout(self.patience.publish, draft.unmake(&self.rt)).await;
        }
        drop(draft);
        let (retired, put_off) = published?;
        Ok(self.retire(retired, put_off))
    }

    /// Publishes a draft; gives the nodes that are gone, and what drivers have put off.
    async fn try_to_publish(&self, draft: &mut Draft) -> Result<(Vec<Arc<Node>>, PutOff)> {
        self.make_ready(draft).await?;
        // Everything that can be refused has been: from here on files change. How long that takes depends on what
        // is asked for.
        if !draft.new_images.is_empty() {
            Box::pin(draft.make_images(&self.rt)).await?;
        }
        if !draft.repairs.is_empty() {
            Box::pin(draft.repair_images(&self.rt)).await?;
        }
        self.prepare(draft).await?;
        let effect = Effect::of(draft)?;
        let gates = Gates::close(effect.stopped());
        self.quiesce_and_settle(&effect).await?;
        let effect = self.as_it_is_now(draft, effect)?;

        // Publish. From here on nothing fails, and nothing waits.
        let Effect { built, gone, moved, .. } = effect;
        let before = self.graph();
        let stay: HashSet<_> = built.values().map(|n| Arc::as_ptr(&n.state)).collect();
        let retired: Vec<Arc<Node>> =
            draft.published.iter().filter(|old| !stay.contains(&Arc::as_ptr(&old.state))).cloned().collect();
        for u in &mut draft.state.users {
            if u.edge.is_none() {
                u.edge = Some(UserEdge::new(u.op.clone(), built[&u.node].clone(), u.claim));
            }
        }
        for (edge, node, claim) in &moved {
            edge.rebind(node.clone(), *claim);
        }
        let next = before.with(draft.taken.keys().copied(), &draft.state, &built, &self.shared.setting);
        self.shared.current.replace(Arc::new(next));
        let ((), put_off) = put_off(|| draft.commit_prepared());
        gone.iter().for_each(|e| e.detach());
        drop(gates);
        Ok((retired, put_off))
    }

    pub(crate) async fn prepare(&self, draft: &mut Draft) -> Result<Rc<Grants>> {
        // What drivers say of themselves may have changed while the draft was worked on.
        draft.state.forget_solved();
        let secs = self.patience.publish.as_secs();
        let late = || format!("what the change needs was not opened and locked within {secs} s");
        self.in_time(draft.prepare(&self.rt), late).await
    }

    /// Brings a draft up to what is published now.
    pub(crate) fn catch_up(&self, draft: &mut Draft) -> Result<()> {
        draft.catch_up(self.graph())
    }

    /// What is to be published, after everything that it does was waited for: on top of what others
    /// have published meanwhile.
    fn as_it_is_now(&self, draft: &mut Draft, waited_for: Effect) -> Result<Effect> {
        if draft.base.generation == self.graph().generation {
            return Ok(waited_for);
        }
        self.catch_up(draft)?;
        let grants = draft.solve()?;
        let effect = Effect::of(draft)?;
        if draft.all_told(&grants) && effect.is_within(&waited_for) {
            return Ok(effect);
        }
        Err(Error::new(ErrorKind::Busy, "what this depends on was changed by somebody else meanwhile")
            .remedy("try again"))
    }

    /// Waits for the requests in flight, then flushes what is left behind or about to be linked
    /// elsewhere; all of it within the deadline.
    async fn quiesce_and_settle(&self, effect: &Effect) -> Result<()> {
        let stopped = effect.stopped();
        let flushing: RefCell<Option<NodeName>> = RefCell::new(None);
        let done = async {
            for e in &stopped {
                e.drained().await;
            }
            // What was given up without its user (a filter lost patience with its target) or by a user who is gone.
            for node in &effect.unsettled {
                node.state.no_more_given_up().await;
            }
            for node in &effect.left {
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
            for (old, reopened) in &effect.settled {
                flushing.replace(Some(old.name.clone()));
                crate::io::submit(old, &self.rt, crate::Op::Flush, None)
                    .await
                    .context(|| format!("node '{}' must be flushed before its links change", old.name))?;
                // The image may not be written any more from here on, or be left: nothing must
                // remain to be given back later.
                if *reopened && old.driver.kind().closes_before_reopen {
                    crate::io::close(old, &self.rt)
                        .await
                        .context(|| format!("node '{}' can't be reopened", old.name))?;
                }
            }
            Ok(())
        };
        let secs = self.patience.publish.as_secs();
        let late = || match flushing.take() {
            Some(node) => format!("node '{node}' was not flushed within {secs} s"),
            None => {
                let users = stopped.iter().filter(|e| e.in_flight() > 0).map(in_flight);
                let nodes = effect.unsettled.iter().filter(|n| n.state.given_up() > 0).map(given_up);
                let who: Vec<String> = users.chain(nodes).collect();
                format!("requests did not finish within {secs} s: {}", who.join(", "))
            }
        };
        self.in_time(done, late).await
    }

    /// Does something within the deadline; `late` says what was not done by then.
    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T>>,
        late: impl FnOnce() -> String,
    ) -> Result<T> {
        let deadline = async {
            self.rt.sleep(self.patience.publish).await;
            None
        };
        match futures_lite::future::or(async { Some(work.await) }, deadline).await {
            Some(done) => done,
            None => Err(Error::new(ErrorKind::TimedOut, late())
                .remedy("look for the storage that does not answer, then try again")),
        }
    }

    /// Closes the drivers of nodes that no snapshot reaches any more, parents first.
    fn retire(&self, mut nodes: Vec<Arc<Node>>, late: PutOff) -> Closing {
        let at = Rc::new(RefCell::new(None));
        if nodes.is_empty() && late.is_empty() {
            return Closing { work: None, at, owner: self.clone() };
        }
        let (shared, rt, now) = (self.shared.clone(), self.rt.clone(), at.clone());
        shared.closing.set(shared.closing.get() + 1);
        let work = async move {
            late.done().await;
            while let Some(node) = nodes.pop() {
                now.replace(Some(node.name.clone()));
                if let Err(error) = crate::io::close(&node, &rt).await {
                    shared
                        .events
                        .borrow_mut()
                        .push(GraphEvent::CloseFailed { node: node.name.clone(), error });
                }
                put_off(|| drop(node)).1.done().await;
            }
            shared.closing.set(shared.closing.get() - 1);
            shared.closed.notify(usize::MAX);
        };
        Closing { work: Some(Box::pin(work)), at, owner: self.clone() }
    }

    /// Ends everything: users are stopped, every node is closed, parents first. A part of the graph that
    /// can't be closed does not keep the others from being closed; what it holds is at least flushed.
    ///
    /// # Errors
    /// The first failure; the rest is closed all the same.
    pub async fn close(&mut self) -> Result<()> {
        let mut parts = Vec::new();
        for (_, part) in self.graph().parts() {
            let part = crate::published::names(&part.state);
            let mut owner = self.clone();
            parts.push(Box::pin(async move { owner.close_part(&part).await }));
        }
        let closed = all(parts).await.into_iter().collect::<Result<()>>();
        let all_closed = async {
            while self.shared.closing.get() > 0 {
                let listener = self.shared.closed.listen();
                if self.shared.closing.get() > 0 {
                    listener.await;
                }
            }
        };
        self.while_patient(all_closed).await;
        let failed = self.take_events().into_iter().next();
        closed?;
        match failed {
            Some(GraphEvent::CloseFailed { node, error }) => {
                Err(error.context(format!("closing node '{node}'")))
            }
            None => Ok(()),
        }
    }

    async fn close_part(&mut self, part: &BTreeSet<String>) -> Result<()> {
        let mut draft = self.draft();
        draft.take_in(part.iter().map(String::as_str));
        draft.state.drop_all(part);
        let Err(e) = self.commit(draft).await else { return Ok(()) };
        // Somebody still waits for storage that does not answer. What the others hold in memory must not be lost with
        // it; a flush is always permitted.
        let graph = self.graph();
        let writable =
            |n: &&Arc<Node>| !n.flags.read_only && !n.flags.inactive && part.contains(n.name.as_str());
        let flushes = graph.each_node().filter(writable).map(|n| {
            Box::pin(async { crate::io::submit(n, &self.rt, crate::Op::Flush, None).await.map(drop) })
        });
        let flushes = flushes.collect();
        let flushed = async { Some(all(flushes).await.into_iter().collect::<Result<()>>()) };
        let late = async {
            self.rt.sleep(LAST_FLUSH).await;
            None
        };
        match flushed.or(late).await {
            Some(Ok(())) => Err(e.context("everything was flushed, but not closed")),
            Some(Err(_)) | None => Err(e.context("not everything was flushed")),
        }
    }

    /// Does something for as long as this handle has patience; true if it was done by then.
    async fn while_patient(&self, work: impl Future<Output = ()>) -> bool {
        let late = async {
            match self.patience.close {
                Some(limit) => self.rt.sleep(limit).await,
                None => std::future::pending().await,
            }
            false
        };
        let done = async {
            work.await;
            true
        };
        futures_lite::future::or(done, late).await
    }
}

/// Runs all to their ends.
async fn all<F: Future + Unpin>(work: Vec<F>) -> Vec<F::Output> {
    let mut out: Vec<Option<F::Output>> = work.iter().map(|_| None).collect();
    let mut work: Vec<Option<F>> = work.into_iter().map(Some).collect();
    std::future::poll_fn(|cx| {
        for (w, out) in work.iter_mut().zip(&mut out) {
            if let Some(Poll::Ready(v)) = w.as_mut().map(|w| Pin::new(w).poll(cx)) {
                (*w, *out) = (None, Some(v));
            }
        }
        if work.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    out.into_iter().flatten().collect()
}

/// Nodes that have left the graph, to be closed. Dropping it lets them be closed without anybody waiting.
#[must_use = "the nodes are closed while somebody waits for it, or when it is dropped"]
pub struct Closing {
    work: Option<LocalFuture<'static, ()>>,
    /// The one that is being closed.
    at: Rc<RefCell<Option<NodeName>>>,
    owner: GraphOwner,
}

impl Closing {
    /// Waits until they are closed, as long as the owner's handle has patience. What went
    /// wrong is in [`GraphOwner::take_events`].
    pub async fn ended(mut self) {
        let Some(work) = self.work.as_mut() else { return };
        if self.owner.while_patient(work).await {
            self.work = None;
        } else if let Some(node) = self.at.borrow().clone() {
            let error =
                Error::new(ErrorKind::TimedOut, "it does not end in time; it goes on in the background")
                    .remedy("look for the storage that does not answer");
            self.owner.shared.events.borrow_mut().push(GraphEvent::CloseFailed { node, error });
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.owner.rt.spawn(work);
        }
    }
}

impl std::fmt::Debug for Closing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Closing({:?})", self.at.borrow())
    }
}

/// Closed gates; they open again when this is dropped, however the commit ends. An edge
/// that has been detached meanwhile stays shut.
struct Gates(Vec<Arc<UserEdge>>);

impl Gates {
    fn close(edges: Vec<Arc<UserEdge>>) -> Gates {
        edges.iter().for_each(|e| e.close_gate());
        Gates(edges)
    }
}

impl Drop for Gates {
    fn drop(&mut self) {
        self.0.iter().for_each(|e| e.open_gate());
    }
}

impl std::fmt::Debug for GraphOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let graph = self.graph();
        write!(f, "GraphOwner(generation {}, {} nodes)", graph.generation, graph.len())
    }
}
