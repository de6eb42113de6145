//! The request path: typed access to a node, and the walk down the chain.
//!
//! A request is planned from node to node synchronously, from memory; the only await is
//! at the node that has to do real work. The cost of a pass-through layer is one virtual
//! call.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use dolmen_rt::{IoVec, Lane, Rt, carry};
use dolmen_types::{
    Actions, BlkEvent, ChildRole, Claim, Error, ErrorKind, ReadFlags, Result, Span, WriteFlags,
};

use crate::count::Place;
use crate::late::{Leases, NOTHING, UnderWay, changes};
use crate::{ChildEdge, DetectZeroes, Extent, Node, Op, Plan, Prealloc, Request, UserEdge};

/// What a driver gets to work with: its node in the request's snapshot, and the runtime.
#[derive(Clone, Copy, Debug)]
pub struct Cx<'a> {
    /// The driver's own node.
    pub node: &'a Node,
    /// The runtime of this core.
    pub rt: &'a Rt,
}

impl<'a> Cx<'a> {
    /// Read access to a child.
    ///
    /// # Errors
    /// `PermissionDenied` when the edge was not granted it.
    pub fn read(&self, child: usize) -> Result<Io<'a, Read>> {
        Io::on_edge(self.edge(child)?, self.rt)
    }

    /// Write access to a child.
    ///
    /// # Errors
    /// As [`Cx::read`].
    pub fn write(&self, child: usize) -> Result<Io<'a, Write>> {
        Io::on_edge(self.edge(child)?, self.rt)
    }

    /// Read access to a backing child, for copy on write. An overlay may always read what
    /// it lies over: a user that only writes (the target of a copy) needs no consistent
    /// data from below, but the part of a cluster that it does not write still has to
    /// come from there.
    ///
    /// # Errors
    /// `InvalidInput` when the child is not a backing child.
    pub fn read_backing(&self, child: usize) -> Result<Io<'a, Read>> {
        let edge = self.edge(child)?;
        if edge.role != ChildRole::Backing {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("child '{}' of node '{}' is not its backing child", edge.name, self.node.name),
            ));
        }
        Ok(Io { node: &edge.node, rt: self.rt, user: None, access: PhantomData })
    }

    /// Read access to a target child, for a filter that gives back what it has saved there. The
    /// edge rule grants V on a target and no D; but nobody who does not allow D on a node allows V
    /// (it would be stale or half-way), so an edge with V is never in the way of a reader.
    ///
    /// # Errors
    /// `InvalidInput` when the child is not a target; `PermissionDenied` when the edge may not write it.
    pub fn read_saved(&self, child: usize) -> Result<Io<'a, Read>> {
        let edge = self.edge(child)?;
        if edge.role != ChildRole::Target {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("child '{}' of node '{}' is not its target", edge.name, self.node.name),
            ));
        }
        let _may_write: Io<'a, Write> = Io::on_edge(edge, self.rt)?;
        Ok(Io { node: &edge.node, rt: self.rt, user: None, access: PhantomData })
    }

    /// Access for writes that readers can't see.
    ///
    /// # Errors
    /// As [`Cx::read`].
    pub fn write_unchanged(&self, child: usize) -> Result<Io<'a, WriteUnchanged>> {
        Io::on_edge(self.edge(child)?, self.rt)
    }

    /// Access for changing a child's size (and writing it).
    ///
    /// # Errors
    /// As [`Cx::read`].
    pub fn resize(&self, child: usize) -> Result<Io<'a, Resize>> {
        Io::on_edge(self.edge(child)?, self.rt)
    }

    /// Passes an operation on to a child as it is; the edge must be granted what it needs.
    ///
    /// # Errors
    /// `PermissionDenied`, or what the child says.
    pub async fn forward(&self, child: usize, op: Op<'a>) -> Result<()> {
        let edge = self.edge(child)?;
        let needs = op_needs(op.request());
        if !edge.claim.needs.contains(needs) {
            return Err(not_granted(&edge.node, needs));
        }
        submit(&edge.node, self.rt, op, None).await
    }

    fn edge(&self, child: usize) -> Result<&'a ChildEdge> {
        self.node.children.get(child).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("node '{}' has no child {child}", self.node.name))
        })
    }
}

/// What an operation needs of the node it is sent to. A flush needs nothing: it changes
/// nothing and reads nothing.
fn op_needs(request: Request) -> Actions {
    match request {
        Request::Read(f) if f.has(ReadFlags::POPULATE) => Actions::D | Actions::M,
        Request::Read(_) => Actions::D,
        Request::Write(f) | Request::WriteZeroes(f) | Request::Discard(f) => {
            if f.has(WriteFlags::UNCHANGED) {
                Actions::M
            } else {
                Actions::V
            }
        }
        Request::Flush => Actions::NONE,
        Request::Resize => Actions::S,
    }
}

fn not_granted(node: &Node, needs: Actions) -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        format!("this user of node '{}' was not granted to {}", node.name, describe(needs)),
    )
}

fn describe(needs: Actions) -> String {
    needs.iter().map(|a| a.phrase()).collect::<Vec<_>>().join(" and ")
}

mod sealed {
    pub trait Sealed {}
}

/// A kind of access, carried in the type of [`Io`].
pub trait Access: sealed::Sealed {
    /// Any one of these sets of actions is enough to get it.
    const ANY_OF: &'static [Actions];
}

macro_rules! access {
    ($($(#[$doc:meta])* $name:ident: $any:expr;)*) => { $(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name {}
        impl sealed::Sealed for $name {}
        impl Access for $name { const ANY_OF: &'static [Actions] = $any; }
    )* };
}

access! {
    /// Reading (D).
    Read: &[Actions::D];
    /// Writing (V).
    Write: &[Actions::V];
    /// Writing without changing what readers see (M, or V which includes it).
    WriteUnchanged: &[Actions::M, Actions::V];
    /// Resizing (S).
    Resize: &[Actions::S];
}

/// Access to a node, proven by a granted edge. There is no other way to issue a request.
pub struct Io<'g, A> {
    node: &'g Node,
    rt: &'g Rt,
    /// Whose requests they are, where they enter the graph.
    user: Option<&'g Arc<UserEdge>>,
    access: PhantomData<fn() -> A>,
}

impl<A> Clone for Io<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for Io<'_, A> {}

impl<A> fmt::Debug for Io<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Io({})", self.node.name)
    }
}

impl<'g, A: Access> Io<'g, A> {
    pub(crate) fn on_edge(edge: &'g ChildEdge, rt: &'g Rt) -> Result<Self> {
        Io::granted(&edge.node, edge.claim, rt)
    }

    pub(crate) fn granted(node: &'g Node, claim: Claim, rt: &'g Rt) -> Result<Self> {
        if A::ANY_OF.iter().any(|a| claim.needs.contains(*a)) {
            Ok(Io { node, rt, user: None, access: PhantomData })
        } else {
            Err(not_granted(node, A::ANY_OF[0]))
        }
    }

    /// The same for requests of a user: they count on the edge as long as anything of them is in flight.
    pub(crate) fn of_user(self, user: &'g Arc<UserEdge>) -> Self {
        Io { user: Some(user), ..self }
    }
}

impl<'g> Io<'g, Read> {
    /// For finding out the format of a file that nobody is attached to yet.
    pub(crate) fn for_probing(node: &'g Node, rt: &'g Rt) -> Self {
        Io { node, rt, user: None, access: PhantomData }
    }
}

impl<'g, A> Io<'g, A> {
    /// The node.
    pub fn node(&self) -> &'g Node {
        self.node
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.node.size()
    }

    /// The runtime.
    pub fn rt(&self) -> &'g Rt {
        self.rt
    }

    /// Makes everything acknowledged so far durable.
    ///
    /// # Errors
    /// What the storage says. After an error, earlier writes may or may not be durable.
    pub async fn flush(&self) -> Result<()> {
        submit(self.node, self.rt, Op::Flush, self.user).await
    }

    /// Where the start of `span` lives, from the view of the node alone.
    ///
    /// # Errors
    /// What reading the node's metadata says.
    pub async fn status(&self, span: Span) -> Result<Extent> {
        status(self.node, self.rt, span).await
    }

    /// Tells the node (a `blkdebug` below, if there is one) that its parent has come
    /// to `event`.
    ///
    /// # Errors
    /// An injected error.
    pub fn event(&self, event: BlkEvent) -> Result<()> {
        self.node.driver.event(self.node, event)
    }
}

impl Io<'_, Read> {
    /// Fills `to` with the data of `span`.
    ///
    /// # Errors
    /// What the storage says; the content of `to` is then unspecified.
    ///
    /// # Panics
    /// When `to` is not as long as the span.
    pub async fn read(&self, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        assert_eq!(span.len(), to.len() as u64, "buffer and span differ");
        submit(self.node, self.rt, Op::Read { span, to, flags }, self.user).await
    }

    /// Reads into a slice, for metadata.
    ///
    /// # Errors
    /// As [`Io::read`].
    pub async fn read_bytes(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let memory = dolmen_rt::Memory::zeroed(out.len());
        let to = memory.iovec();
        self.read(Span::new(offset, out.len() as u64), &to, ReadFlags::NONE).await?;
        to.copy_to_slice(0, out);
        Ok(())
    }
}

macro_rules! writes {
    ($access:ty, $flag:expr) => {
        impl Io<'_, $access> {
            /// Stores `from` at `span`.
            ///
            /// # Errors
            /// What the storage says; each sector then holds the old or the new data.
            ///
            /// # Panics
            /// When `from` is not as long as the span.
            pub async fn write(&self, span: Span, from: &IoVec, flags: WriteFlags) -> Result<()> {
                assert_eq!(span.len(), from.len() as u64, "buffer and span differ");
                submit(self.node, self.rt, Op::Write { span, from, flags: flags | $flag }, self.user).await
            }

            /// Stores bytes, for metadata.
            ///
            /// # Errors
            /// As [`Io::write`].
            pub async fn write_bytes(&self, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<()> {
                let memory = dolmen_rt::Memory::from_slice(bytes);
                self.write(Span::new(offset, bytes.len() as u64), &memory.iovec(), flags).await
            }

            /// Makes `span` read as zeroes.
            ///
            /// # Errors
            /// What the storage says; `Unsupported` with `NO_FALLBACK` when zeroes would
            /// have to be written as data.
            pub async fn write_zeroes(&self, span: Span, flags: WriteFlags) -> Result<()> {
                submit(self.node, self.rt, Op::WriteZeroes { span, flags: flags | $flag }, self.user).await
            }

            /// Gives the space of `span` back, as far as that is possible.
            ///
            /// # Errors
            /// What the storage says.
            pub async fn discard(&self, span: Span, flags: WriteFlags) -> Result<()> {
                submit(self.node, self.rt, Op::Discard { span, flags: flags | $flag }, self.user).await
            }
        }
    };
}
writes!(Write, WriteFlags::NONE);
writes!(WriteUnchanged, WriteFlags::UNCHANGED);

impl Io<'_, Resize> {
    /// Changes the size to `size` bytes; new bytes read as zeroes.
    ///
    /// # Errors
    /// What the storage says; the old size then still holds.
    pub async fn resize(&self, size: u64, prealloc: Prealloc) -> Result<()> {
        submit(self.node, self.rt, Op::Resize { size, prealloc }, self.user).await
    }
}

/// What the walk came to for the first `len` bytes of the span it was given.
enum Step<'g> {
    Zeroes { len: u64 },
    Done { len: u64 },
    Run { node: &'g Node, at: u64, len: u64, request: Request },
}

/// What a walk counts.
///
/// A request that is done in pieces is walked once for each. Nodes that were given more than the piece have counted the
/// request already and only get the rest of it; those further down get a request of their own each time.
struct Visits {
    /// `None` for what is not counted.
    at: Option<Place>,
    /// So many nodes from the start on have counted it.
    known: usize,
}

/// What is left to be written of a request.
#[derive(Clone, Copy)]
struct Payload<'a> {
    whole: &'a IoVec,
    /// So many bytes of it are written already.
    done: usize,
}

impl Payload<'_> {
    /// Whether the next `len` bytes are zeroes.
    fn is_zero(&self, len: u64) -> bool {
        self.whole.slice(self.done, len as usize).is_zero()
    }
}

/// Walks down from `node` as long as drivers answer from memory. `data` is the payload of a write.
fn walk<'g>(
    mut node: &'g Node,
    mut request: Request,
    mut span: Span,
    data: Option<Payload<'_>>,
    leases: &mut Leases<'g>,
    visits: &mut Visits,
) -> Step<'g> {
    let known = std::mem::take(&mut visits.known);
    let mut depth = 0;
    loop {
        if let Some(at) = visits.at
            && depth >= known
        {
            node.visited(|state| state.arrived(at, span));
        }
        depth += 1;
        node = node.answering();
        // The lease must be taken before the plan is made.
        let lease = node.maps.then(|| node.state.lease());
        let mut plan = node.driver.plan(node, request, span);
        if plan.covers(span) < span.len() {
            visits.known = depth;
        }
        if node.flags.detect_zeroes != DetectZeroes::Off
            && let (Some(data), Request::Write(flags)) = (data, request)
            && let Some(flags) = node.flags.detect_zeroes.zero_write(flags)
        {
            // Only what one plan covers is looked at, so that a request in many pieces is looked at once.
            let piece = span.prefix(plan.covers(span));
            if data.is_zero(piece.len()) {
                (span, request) = (piece, Request::WriteZeroes(flags));
                plan = node.driver.plan(node, request, span);
            }
        }
        match plan {
            Plan::Forward { child, at, len, request: next } => {
                debug_assert_eq!(next.kind(), request.kind(), "a plan keeps the kind");
                if let Some(l) = lease {
                    leases.push(l);
                }
                span = Span::new(at, len.min(span.len()));
                request = next;
                node = &node.children[child as usize].node;
            }
            Plan::Zeroes { len } => return Step::Zeroes { len: len.min(span.len()) },
            Plan::Done { len } => return Step::Done { len: len.min(span.len()) },
            // The node that does the work itself holds no lease of its own, or it would
            // wait for itself when it has to reuse space.
            Plan::Slow => return Step::Run { node, at: span.offset(), len: span.len(), request },
        }
    }
}

/// Tells the nodes on the way of a request that it failed at `failed`, with `span` of it not done. The way is what drivers
/// plan now; should it lead elsewhere by now, only the nodes that were certainly on it are told.
#[cold]
fn blame(mut node: &Node, mut request: Request, mut span: Span, failed: &Node, lane: &Lane) {
    let Some(at) = Place::of(lane, request.kind()) else { return };
    loop {
        node.visited(|state| state.counters.failed(at, span.len()));
        node = node.answering();
        if std::ptr::eq(node, failed) {
            return;
        }
        let Plan::Forward { child, at: offset, len, request: next } = node.driver.plan(node, request, span)
        else {
            return failed.state.counters.failed(at, span.len());
        };
        span = Span::new(offset, len.min(span.len()));
        request = next;
        node = &node.children[child as usize].node;
    }
}

/// How a request would go, without doing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peek {
    Ready { len: u64 },
    Slow,
}

impl Node {
    /// How many bytes from the start of `span` the node can answer for from memory,
    /// down to a leaf; 0 if it would have to work first. For filters whose plan depends
    /// on their child's.
    pub fn ready(&self, request: Request, span: Span) -> u64 {
        match self.peek(request, span) {
            Peek::Ready { len } => len,
            Peek::Slow => 0,
        }
    }

    fn peek(&self, mut request: Request, mut span: Span) -> Peek {
        let mut node = self.answering();
        loop {
            match node.driver.plan(node, request, span) {
                Plan::Forward { child, at, len, request: next } => {
                    span = Span::new(at, len.min(span.len()));
                    request = next;
                    node = node.children[child as usize].node.answering();
                }
                Plan::Zeroes { len } | Plan::Done { len } => return Peek::Ready { len: len.min(span.len()) },
                Plan::Slow if node.children.is_empty() => return Peek::Ready { len: span.len() },
                Plan::Slow => return Peek::Slow,
            }
        }
    }
}

/// Sends an operation to a node. Spans longer than one plan covers are done piece by
/// piece; pieces are a property of the mapping, so a request that maps to one place
/// waits exactly once.
pub(crate) async fn submit(node: &Node, rt: &Rt, op: Op<'_>, user: Option<&Arc<UserEdge>>) -> Result<()> {
    let Some(span) = op.span() else { return whole(node, rt, user, op).await };
    in_bounds(node, span)?;
    let request = op.request();
    let mut rest = span;
    let mut visits = Visits { at: Place::of(rt.lane(), request.kind()), known: 0 };
    while !rest.is_empty() {
        let mut held = UnderWay { leases: Leases::new(), user, node, changes: NOTHING };
        let done = (span.len() - rest.len()) as usize;
        let data = if let Op::Write { from, .. } = op { Some(Payload { whole: from, done }) } else { None };
        let len = match walk(node, request, rest, data, &mut held.leases, &mut visits) {
            Step::Done { len } => len,
            Step::Zeroes { len } => {
                if let Op::Read { to, .. } = op {
                    bytes(to, done, len, &mut None).fill(0);
                }
                len
            }
            Step::Run { node: slow, at, len, request: asked } => {
                let piece = Span::new(at, len);
                (held.node, held.changes) = (slow, changes(slow, asked.kind(), piece));
                if held.must_wait() {
                    held.begin().await;
                }
                let mut part = None;
                let op = op.piece(asked, piece, done, &mut part);
                let ran = carry(slow.driver.run(Cx { node: slow, rt }, op), &mut held).await;
                if ran.is_err() {
                    blame(node, request, rest, slow, rt.lane());
                }
                ran?;
                len
            }
        };
        if len == 0 {
            return Err(broken_contract(node, "planned to do nothing for a request"));
        }
        rest = rest.skip(len);
    }
    Ok(())
}

/// `len` bytes of `whole` from `at` on. `part` is where they are kept if that is not all of it.
fn bytes<'a>(whole: &'a IoVec, at: usize, len: u64, part: &'a mut Option<IoVec>) -> &'a IoVec {
    if len == whole.len() as u64 { whole } else { part.insert(whole.slice(at, len as usize)) }
}

impl<'a> Op<'a> {
    /// The part of it that is `asked` of the node that does the work: `piece` there, with the bytes from `at` on.
    fn piece(self, asked: Request, piece: Span, at: usize, part: &'a mut Option<IoVec>) -> Op<'a> {
        match (self, asked) {
            (Op::Read { to, .. }, Request::Read(flags)) => {
                Op::Read { span: piece, to: bytes(to, at, piece.len(), part), flags }
            }
            (Op::Write { from, .. }, Request::Write(flags)) => {
                Op::Write { span: piece, from: bytes(from, at, piece.len(), part), flags }
            }
            // Perhaps a write of zeroes, detected on the way.
            (_, Request::WriteZeroes(flags)) => Op::WriteZeroes { span: piece, flags },
            (_, Request::Discard(flags)) => Op::Discard { span: piece, flags },
            _ => unreachable!("the walk keeps the kind"),
        }
    }
}

/// Closes a driver. What it leaves in flight, should the future be dropped, counts on its node.
pub(crate) async fn close(node: &Node, rt: &Rt) -> Result<()> {
    let held = UnderWay { leases: Leases::new(), user: None, node, changes: NOTHING };
    carry(node.driver.close(Cx { node, rt }), held).await
}

/// Refuses sizes that no node may have: ranges in it could not be rounded out to whole units.
pub(crate) fn check_size(size: u64) -> Result<()> {
    match size > Span::MAX_SIZE {
        false => Ok(()),
        true => Err(Error::new(
            ErrorKind::Limit,
            format!("a size of {size} bytes is larger than any image may be ({} bytes)", Span::MAX_SIZE),
        )),
    }
}

/// An operation without a span.
async fn whole(node: &Node, rt: &Rt, user: Option<&Arc<UserEdge>>, op: Op<'_>) -> Result<()> {
    if let Op::Resize { size, .. } = op {
        check_size(size)?;
    }
    let mut leases = Leases::new();
    let mut visits = Visits { at: Place::of(rt.lane(), op.kind()), known: 0 };
    match walk(node, op.request(), Span::new(0, 0), None, &mut leases, &mut visits) {
        Step::Zeroes { .. } | Step::Done { .. } => Ok(()),
        Step::Run { node: slow, .. } => {
            let size = if let Op::Resize { size, .. } = op { size } else { 0 };
            let changes = changes(slow, op.kind(), Span::new(0, size.min(Span::MAX_END)));
            let held = UnderWay { leases, user, node: slow, changes };
            if held.must_wait() {
                held.begin().await;
            }
            let ran = carry(slow.driver.run(Cx { node: slow, rt }, op), held).await;
            if ran.is_err() {
                blame(node, op.request(), Span::new(0, 0), slow, rt.lane());
            }
            ran
        }
    }
}

/// A driver on the way of a request to `node` answered what it must not. Going on would be an endless loop.
#[cold]
fn broken_contract(node: &Node, what: &str) -> Error {
    let driver = node.driver.kind().name;
    Error::new(ErrorKind::Io, format!("driver '{driver}' of node '{}', or one below it, {what}", node.name))
        .remedy("this is a mistake in Dolmen: please report it")
}

/// What a driver says about the start of a span; never more than was asked for, and something if it was.
///
/// # Errors
/// What the driver says; `OutOfBounds` when there is no such range.
pub(crate) async fn status(node: &Node, rt: &Rt, span: Span) -> Result<Extent> {
    in_bounds(node, span)?;
    let mut e = node.driver.status(Cx { node, rt }, span).await?;
    if e.len == 0 && !span.is_empty() {
        return Err(broken_contract(node, "knows nothing about a range that was asked for"));
    }
    e.len = e.len.min(span.len());
    Ok(e)
}

/// Makes sure that a request stays within its node. Leaves judge for themselves: they may grow.
#[inline]
fn in_bounds(node: &Node, span: Span) -> Result<()> {
    let answering = node.answering();
    if answering.children.is_empty() || span.end() <= node.size() || span.is_empty() {
        return Ok(());
    }
    Err(out_of_bounds(node, span))
}

#[cold]
pub(crate) fn out_of_bounds(node: &Node, span: Span) -> Error {
    Error::new(
        ErrorKind::OutOfBounds,
        format!(
            "offset {} with {} bytes lies beyond the end of node '{}' ({} bytes)",
            span.offset(),
            span.len(),
            node.name,
            node.size()
        ),
    )
}
