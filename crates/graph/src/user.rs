//! Users of the graph: an edge handle per export, job or tool, and a token per request.
//!
//! A request takes a [`Token`]: it proves the grant, counts the request in flight, pins
//! the snapshot the grant was checked against, and goes back before the reply is sent.
//! Quiescing closes the gate (new tokens wait) and waits until no token is out and nothing is
//! in flight of requests that were given up; a request never waits for the control task in any other way.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use dolmen_rt::{Instant, Rt};
use dolmen_types::{Actions, Claim, Error, ErrorKind, OpId, OpKind, Result, Span};
use event_listener::Event;

use crate::{Counters, Io, Node, Read, Resize, Write, WriteUnchanged};

/// What a user's edge leads to in one snapshot.
pub(crate) struct Binding {
    pub(crate) node: Arc<Node>,
    pub(crate) claim: Claim,
    /// The size that the user relies on, where it is not to see any other (see [`UserEdge::size`]).
    pub(crate) size: Option<u64>,
}

/// Sees what a user has answered, beside the counters: what only some users want to know.
pub trait Observer: Any + Send + Sync {
    /// A request of this kind has ended after this time. Called on any core, for each request: it must not wait.
    fn ended(&self, kind: OpKind, took: Duration);
}

/// A user's edge into the graph, shared by the owner of the graph and the user.
pub struct UserEdge {
    op: OpId,
    binding: ArcSwap<Binding>,
    /// Requests that hold a token, and those that were given up and have not ended.
    in_flight: AtomicUsize,
    /// How many of them were given up.
    given_up: AtomicUsize,
    /// How many changes keep the gate shut.
    closed: AtomicUsize,
    /// The edge is gone: tokens are refused.
    detached: AtomicBool,
    opened: Event,
    drained: Event,
    /// What the user says that it was asked for.
    counters: Counters,
    /// When the last of that ended, in nanoseconds of the runtime's clock; 0 before.
    last_ended: AtomicU64,
    /// Whether there is an observer: all that a request pays where there is none.
    observed: AtomicBool,
    observer: ArcSwapOption<Box<dyn Observer>>,
}

impl UserEdge {
    pub(crate) fn new(op: OpId, node: Arc<Node>, claim: Claim) -> Arc<UserEdge> {
        Arc::new(UserEdge {
            op,
            binding: ArcSwap::from_pointee(Binding { node, claim, size: None }),
            in_flight: AtomicUsize::new(0),
            given_up: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
            detached: AtomicBool::new(false),
            opened: Event::new(),
            drained: Event::new(),
            counters: Counters::default(),
            last_ended: AtomicU64::new(0),
            observed: AtomicBool::new(false),
            observer: ArcSwapOption::empty(),
        })
    }

    /// The operation that the edge belongs to.
    pub fn op(&self) -> &OpId {
        &self.op
    }

    /// The node it leads to now.
    pub fn node(&self) -> Arc<Node> {
        self.binding.load().node.clone()
    }

    /// What was granted.
    pub fn claim(&self) -> Claim {
        self.binding.load().claim
    }

    /// How large the disk is for this user, in bytes. A user who does not allow others to resize its node goes on
    /// seeing the size that it had when it comes to a node of another size: an image that a job has put in place of
    /// the one before may be longer, and what lies there was never on this user's disk.
    pub fn size(&self) -> u64 {
        let binding = self.binding.load();
        binding.size.unwrap_or_else(|| binding.node.size())
    }

    /// Requests that hold a token now, or were given up while the storage still works on them.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// How many of the requests in flight were given up: nobody waits for them, but their data may still land.
    pub fn given_up(&self) -> usize {
        self.given_up.load(SeqCst)
    }

    /// A request that holds a token is given up, and stays in flight.
    pub(crate) fn gave_up(&self) {
        self.in_flight.fetch_add(1, SeqCst);
        self.given_up.fetch_add(1, SeqCst);
    }

    /// Such a request has ended.
    pub(crate) fn landed(&self) {
        self.given_up.fetch_sub(1, SeqCst);
        self.put_back();
    }

    /// Counts a request of the user's client that began at `began` and has ended now. An export does it once for each
    /// request that it answers, however many requests to the graph it took.
    pub fn ended(&self, rt: &Rt, kind: OpKind, span: Span, began: Instant, ok: bool) {
        let now = rt.now();
        let took = now.since(began);
        self.counters.ended(rt.lane(), kind, span.len(), span.end(), took, ok);
        self.last_ended.store(now.as_nanos(), Relaxed);
        if self.observed.load(Relaxed)
            && let Some(observer) = &*self.observer.load()
        {
            observer.ended(kind, took);
        }
    }

    /// Has what is answered from now on be seen by `observer`, or by none.
    pub fn observe(&self, observer: Option<Box<dyn Observer>>) {
        self.observed.store(observer.is_some(), Relaxed);
        self.observer.store(observer.map(Arc::new));
    }

    /// Shows the observer to `look`, if there is one of this type.
    pub fn observed_by<T: Observer, R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        let observer = self.observer.load();
        let any: &dyn Any = &***observer.as_ref()?;
        any.downcast_ref().map(look)
    }

    /// What [`UserEdge::ended`] has counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// When the last request that was counted ended.
    pub fn last_ended(&self) -> Option<Instant> {
        Some(self.last_ended.load(Relaxed)).filter(|n| *n != 0).map(Instant::from_nanos)
    }

    /// Takes a token for one request, without waiting if the edge is open.
    ///
    /// # Errors
    /// `Disconnected` when the edge has been taken away.
    pub async fn begin(self: &Arc<Self>) -> Result<Token> {
        loop {
            if let Some(token) = self.try_begin()? {
                return Ok(token);
            }
            let listener = self.opened.listen();
            if self.is_shut() && !self.detached.load(SeqCst) {
                listener.await;
            }
        }
    }

    /// Takes a token, or `None` while the edge is quiesced.
    ///
    /// # Errors
    /// As [`UserEdge::begin`].
    pub fn try_begin(self: &Arc<Self>) -> Result<Option<Token>> {
        // Count first, then look at the gate: `quiesce` closes the gate first, then
        // looks at the count, so one of the two sees the other.
        self.in_flight.fetch_add(1, SeqCst);
        if self.is_shut() {
            self.put_back();
            if self.detached.load(SeqCst) {
                return Err(Error::new(
                    ErrorKind::Disconnected,
                    format!("'{}' has been taken off its node", self.op),
                ));
            }
            return Ok(None);
        }
        Ok(Some(Token { binding: self.binding.load_full(), edge: self.clone() }))
    }

    fn put_back(&self) {
        if self.in_flight.fetch_sub(1, SeqCst) == 1 && self.is_shut() {
            self.drained.notify(usize::MAX);
        }
    }

    pub(crate) fn close_gate(&self) {
        self.closed.fetch_add(1, SeqCst);
    }

    fn is_shut(&self) -> bool {
        self.closed.load(SeqCst) != 0
    }

    pub(crate) async fn drained(&self) {
        while self.in_flight.load(SeqCst) != 0 {
            let listener = self.drained.listen();
            if self.in_flight.load(SeqCst) == 0 {
                return;
            }
            listener.await;
        }
    }

    pub(crate) fn rebind(&self, node: Arc<Node>, claim: Claim) {
        let size = {
            let now = self.binding.load();
            // A node that was inactive has been another process's, which may have resized it.
            let keeps =
                !claim.allows.contains(Actions::S) && !now.node.flags.inactive && !node.flags.inactive;
            keeps.then(|| now.size.unwrap_or_else(|| now.node.size())).filter(|s| *s != node.size())
        };
        self.binding.store(Arc::new(Binding { node, claim, size }));
    }

    /// Takes back one [`UserEdge::close_gate`].
    pub(crate) fn open_gate(&self) {
        self.closed.fetch_sub(1, SeqCst);
        self.opened.notify(usize::MAX);
    }

    /// Shuts the gate for ever.
    pub(crate) fn detach(&self) {
        self.detached.store(true, SeqCst);
        self.close_gate();
        self.opened.notify(usize::MAX);
    }
}

impl fmt::Debug for UserEdge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserEdge({} -> {})", self.op, self.binding.load().node.name)
    }
}

/// The right to one request, on the snapshot that it was granted on.
#[must_use = "a token that is dropped at once counts a request that never was"]
pub struct Token {
    binding: Arc<Binding>,
    edge: Arc<UserEdge>,
}

impl Token {
    /// The node the request goes to.
    pub fn node(&self) -> &Arc<Node> {
        &self.binding.node
    }

    /// Size of the disk in bytes: see [`UserEdge::size`].
    pub fn size(&self) -> u64 {
        self.binding.size.unwrap_or_else(|| self.binding.node.size())
    }

    /// Checks that a range lies within the node.
    ///
    /// # Errors
    /// `OutOfBounds`.
    pub fn check(&self, offset: u64, len: u64) -> Result<Span> {
        // Asked once: the question goes down to a leaf.
        let there = self.binding.node.size();
        let size = self.binding.size.map_or(there, |s| s.min(there));
        match Span::checked(offset, len) {
            Some(span) if span.end() <= size => Ok(span),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "offset {offset} with {len} bytes lies beyond the end of node '{}' ({} bytes)",
                    self.binding.node.name,
                    self.size()
                ),
            )),
        }
    }

    /// The node, if it takes part. Nodes above an inactive one are inactive, too, so it is
    /// enough to look where requests come in.
    fn active(&self) -> Result<&Arc<Node>> {
        let node = &self.binding.node;
        if node.flags.inactive {
            return Err(inactive(node));
        }
        Ok(node)
    }

    /// Read access.
    ///
    /// # Errors
    /// `PermissionDenied` when the edge was not granted it, or the node is inactive.
    pub fn read<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Read>> {
        Ok(Io::granted(self.active()?, self.binding.claim, rt)?.of_user(&self.edge))
    }

    /// Write access.
    ///
    /// # Errors
    /// As [`Token::read`].
    pub fn write<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Write>> {
        Ok(Io::granted(self.active()?, self.binding.claim, rt)?.of_user(&self.edge))
    }

    /// Access for writes that readers can't see.
    ///
    /// # Errors
    /// As [`Token::read`].
    pub fn write_unchanged<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, WriteUnchanged>> {
        Ok(Io::granted(self.active()?, self.binding.claim, rt)?.of_user(&self.edge))
    }

    /// Access for resizing.
    ///
    /// # Errors
    /// As [`Token::read`].
    pub fn resize<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Resize>> {
        Ok(Io::granted(self.active()?, self.binding.claim, rt)?.of_user(&self.edge))
    }
}

#[cold]
fn inactive(node: &Node) -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        format!("node '{}' is inactive: another process may be using its image", node.name),
    )
    .remedy("activate it first (blockdev-set-active)")
}

impl Drop for Token {
    fn drop(&mut self) {
        self.edge.put_back();
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({} on {})", self.edge.op, self.binding.node.name)
    }
}
