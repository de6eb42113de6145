//! Requests that were given up while their storage still works on them.
//!
//! The future is gone, but the kernel (or a server) has the request, and it lands when it lands. Until then it is in
//! flight: it counts on the edge of the user who made it and on every node that was working for it, it keeps the leases
//! that it had and the driver of its leaf open and locked. All that is a [`Guard`] that the runtime drops with the
//! operation ([`dolmen_rt::carry`]).
//!
//! What comes to the same place of a leaf afterwards waits for it, or old data could replace newer ones.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

use dolmen_rt::{Guard, Hold};
use dolmen_types::{OpKind, Span};
use event_listener::Event;
use smallvec::SmallVec;

use crate::epoch::KeptLease;
use crate::{Driver, Lease, Node, NodeState, UserEdge};

/// The requests of a node that were given up and have not ended.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// How many; the length of `spans`.
    count: AtomicUsize,
    /// What each of them may change here. Never held across an await.
    spans: Mutex<Spans>,
    ended: Event,
}

#[derive(Debug, Default)]
struct Spans {
    next: u64,
    list: Vec<(u64, Span)>,
}

impl Late {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count.load(SeqCst)
    }

    /// Waits until there is none.
    pub(crate) async fn ended(&self) {
        self.wait(|s| s.list.is_empty()).await;
    }

    /// Waits until none of them can change anything in `span`.
    #[cold]
    async fn landed(&self, span: Span) {
        self.wait(|s| !s.list.iter().any(|(_, late)| late.overlaps(span))).await;
    }

    async fn wait(&self, free: impl Fn(&Spans) -> bool) {
        while !free(&self.spans()) {
            let listener = self.ended.listen();
            if free(&self.spans()) {
                return;
            }
            listener.await;
        }
    }

    fn spans(&self) -> MutexGuard<'_, Spans> {
        self.spans.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn begin(&self, span: Span) -> u64 {
        let mut s = self.spans();
        let ticket = s.next;
        s.next += 1;
        s.list.push((ticket, span));
        self.count.store(s.list.len(), SeqCst);
        ticket
    }

    fn end(&self, ticket: u64) {
        let mut s = self.spans();
        s.list.retain(|(t, _)| *t != ticket);
        self.count.store(s.list.len(), SeqCst);
        drop(s);
        self.ended.notify(usize::MAX);
    }
}

/// Leases of the mapping nodes on the path of one piece of a request. Few chains map more than four times before they
/// reach a leaf.
pub(crate) type Leases<'g> = SmallVec<[Lease<'g>; 4]>;

/// What a request holds while a node works for it.
pub(crate) struct UnderWay<'g> {
    /// Of the nodes on the way down to the working one.
    pub(crate) leases: Leases<'g>,
    /// The user, if it is one who asks this node.
    pub(crate) user: Option<&'g Arc<UserEdge>>,
    /// The node that does the work.
    pub(crate) node: &'g Node,
    /// What may change there.
    pub(crate) changes: Span,
}

impl UnderWay<'_> {
    /// Whether there are older requests that have been given up, which may be in the way of what this one changes.
    #[inline]
    pub(crate) fn must_wait(&self) -> bool {
        !self.changes.is_empty() && self.node.state.late.count() > 0
    }

    /// Waits until they are done with it.
    pub(crate) async fn begin(&self) {
        self.node.state.late.landed(self.changed_blocks()).await;
    }

    /// A leaf may have to write the whole blocks of its storage.
    fn changed_blocks(&self) -> Span {
        if self.changes.is_empty() {
            return self.changes;
        }
        let block = u64::from(self.node.driver.limits(self.node).request_alignment.max(1));
        let (from, to) = (self.changes.offset(), self.changes.end());
        Span::from_range(from / block * block, to.next_multiple_of(block).min(Span::MAX_END))
    }
}

/// No place at all.
pub(crate) const NOTHING: Span = Span::new(0, 0);

/// What a request changes at the node that works for it. Only at a leaf is it a place; above, it is the node's own business
/// what goes where.
pub(crate) fn changes(node: &Node, kind: OpKind, span: Span) -> Span {
    if !node.children.is_empty() {
        return NOTHING;
    }
    match kind {
        OpKind::Read | OpKind::Flush => NOTHING,
        OpKind::Write | OpKind::Discard => span,
        // A leaf may grow by setting its size, which would cut off what came later beyond that.
        OpKind::WriteZeroes if span.end() > node.size() => Span::from_range(span.offset(), Span::MAX_END),
        OpKind::WriteZeroes => span,
        // From the lower of both sizes on.
        OpKind::Resize => Span::from_range(span.end().min(node.size()), Span::MAX_END),
    }
}

impl Hold for UnderWay<'_> {
    fn leave(&mut self) -> Guard {
        let state = self.node.state.clone();
        let ticket = state.late.begin(self.changed_blocks());
        if let Some(user) = self.user {
            user.gave_up();
        }
        Arc::new(Left {
            ticket,
            state,
            driver: self.node.driver.clone(),
            leases: self.leases.drain(..).map(Lease::keep).collect(),
            user: self.user.cloned(),
        })
    }
}

/// What a request that was given up leaves to its operations.
struct Left {
    ticket: u64,
    state: Arc<NodeState>,
    #[expect(dead_code, reason = "its file stays open and locked")]
    driver: Arc<dyn Driver>,
    #[expect(dead_code, reason = "held for their Drop")]
    leases: Vec<KeptLease>,
    user: Option<Arc<UserEdge>>,
}

impl Drop for Left {
    fn drop(&mut self) {
        self.state.late.end(self.ticket);
        if let Some(user) = &self.user {
            user.landed();
        }
    }
}
