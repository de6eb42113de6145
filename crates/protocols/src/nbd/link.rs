//! One connection to an NBD server.
//!
//! Two tasks belong to it: the writer sends whatever requests are waiting, many at once;
//! the reader takes replies in any order, receives data straight into the buffer of the
//! request, and wakes it. They are tasks and not the business of whichever request comes
//! first, because a request may be cancelled at any time, and half a message in either
//! direction would cost all others their connection. They end with the link.
//!
//! A cancelled request that was sent keeps its place, its buffer, and what its request held
//! (see `dolmen_rt::carry`) until the reply is there or the connection is dead. The mutex guards the table and is never held across an await.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dolmen_nbd::consts::cmd;
use dolmen_nbd::reply::{SIMPLE_SIZE, extents};
use dolmen_nbd::{
    ChunkAction, ClientHandshake, ClientStep, CommandFlags, Extent, Goal, ReplyHead, ReplyState, Request,
    Session, TransmissionFlags,
};
use dolmen_rt::{Guards, IoVec, Memory, Rt, Stream};
use dolmen_types::{Error, ErrorKind, Result, Span};
use slab::Slab;

use super::address::Address;

/// Requests in flight over one connection; more wait. Servers bound theirs at 16 to
/// some hundreds, so more would only wait on the other side.
const MAX_IN_FLIGHT: usize = 256;
/// First size of the receive buffer; it grows for a block status reply of full length.
const RECEIVE: usize = 128 << 10;
/// Segments and bytes that one send takes.
const MAX_SEGMENTS: usize = 512;
const MAX_BYTES: usize = 4 << 20;
/// How long a goodbye may take.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// A request to be sent.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// Tells requests that are sent again from others of the same range; 0 for those that change nothing.
    change: u64,
    flags: CommandFlags,
    cmd: u16,
    offset: u64,
    len: u32,
    payload: Option<IoVec>,
    to: Option<IoVec>,
}

impl Ask {
    /// Reads at most 32 MiB.
    pub(super) fn read(span: Span, to: IoVec) -> Ask {
        Ask { to: Some(to), ..Ask::range(cmd::READ, span, CommandFlags(0)) }
    }

    /// Writes at most 32 MiB.
    pub(super) fn write(span: Span, from: IoVec, flags: CommandFlags) -> Ask {
        Ask { payload: Some(from), ..Ask::range(cmd::WRITE, span, flags) }
    }

    /// Asks for the status of the start of a range.
    pub(super) fn status(span: Span) -> Ask {
        Ask::range(cmd::BLOCK_STATUS, span, CommandFlags::REQ_ONE)
    }

    /// A request without data; the range is shorter than 4 GiB.
    pub(super) fn range(cmd: u16, span: Span, flags: CommandFlags) -> Ask {
        let len = u32::try_from(span.len()).expect("the driver cuts ranges");
        Ask { change: 0, flags, cmd, offset: span.offset(), len, payload: None, to: None }
    }

    /// The range that the request changes, if it changes one.
    pub(super) fn changes(&self) -> Option<Span> {
        matches!(self.cmd, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM)
            .then(|| Span::new(self.offset, u64::from(self.len)))
    }

    /// Whether a reply says that the change is on stable storage.
    pub(super) fn is_durable(&self) -> bool {
        self.flags.has(CommandFlags::FUA)
    }

    /// The same request under the number of a change.
    pub(super) fn numbered(self, change: u64) -> Ask {
        Ask { change, ..self }
    }
}

/// A change that the server may have received, but has not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unanswered {
    /// The number of the change.
    pub(super) change: u64,
    /// What it changes.
    pub(super) span: Span,
}

/// A request on its way.
#[derive(Debug)]
struct Pending {
    /// Part of the cookie, so that a late or invented reply finds nobody.
    generation: u32,
    reply: ReplyState,
    /// What it changes, if it changes something.
    change: Option<Unanswered>,
    to: Option<IoVec>,
    extent: Option<Extent>,
    waker: Option<Waker>,
    done: Option<Result<()>>,
    sent: bool,
    /// Nobody waits any more.
    abandoned: bool,
    /// What the request held that was given up, if it changes something. Dropped without the lock.
    guards: Guards,
    changes: bool,
}

#[derive(Debug)]
struct Outgoing {
    cookie: u64,
    head: [u8; Request::SIZE],
    payload: Option<IoVec>,
}

#[derive(Debug, Default)]
struct State {
    pending: Slab<Pending>,
    generation: u32,
    outgoing: VecDeque<Outgoing>,
    writer: Option<Waker>,
    /// Requests that wait for a place.
    queue: Vec<Waker>,
    broken: Option<Error>,
    /// Changes that were sent and not answered when the connection broke.
    unanswered: Vec<Unanswered>,
    closing: bool,
    /// Everything was sent after the goodbye.
    goodbye_sent: bool,
    closers: Vec<Waker>,
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) session: Session,
    state: Mutex<State>,
}

fn cookie_of(generation: u32, index: usize) -> u64 {
    u64::from(generation) << 32 | index as u64
}

impl Link {
    /// Connects, negotiates, and starts the two tasks on this core.
    pub(super) async fn open(rt: &Rt, address: &Address, export: &str) -> Result<Arc<Link>> {
        let Some(io) = rt.io() else {
            return Err(Error::new(ErrorKind::Unsupported, "the simulation has no sockets"));
        };
        let stream = io.connect(&address.addr()).await?;
        let mut receive = Receive::new();
        let goal = Goal::Use { export: export.to_owned(), structured: true, status: true };
        let mut machine = ClientHandshake::new(goal);
        let mut out = Vec::new();
        let session = loop {
            let (need, end) = match machine.step(receive.bytes()?, &mut out) {
                ClientStep::Need(n) => (n, None),
                ClientStep::Taken(n) => {
                    receive.take(n);
                    (0, None)
                }
                ClientStep::Ready { taken, session } => {
                    receive.take(taken);
                    (0, Some(Ok(session)))
                }
                ClientStep::Failed(e) => (0, Some(Err(e))),
                ClientStep::Listed(_) => unreachable!("the goal is to use an export"),
            };
            if !out.is_empty() {
                let sent = stream.send_bytes(&out).await;
                // The reason for which a negotiation failed matters more than this.
                if end.is_none() {
                    sent?;
                }
                out.clear();
            }
            match end {
                Some(session) => break *session?,
                None if need > 0 && !receive.more(&stream, need).await? => {
                    return Err(Error::new(
                        ErrorKind::Disconnected,
                        "the NBD server closed the connection during the negotiation",
                    ));
                }
                None => {}
            }
        };
        let link = Arc::new(Link { session, state: Mutex::default() });
        rt.spawn(write_requests(link.clone(), stream.clone()));
        rt.spawn(read_replies(link.clone(), stream, receive));
        Ok(link)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the table as it was between two of its steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server offers something.
    pub(super) fn offers(&self, flag: TransmissionFlags) -> bool {
        self.session.export.flags.has(flag)
    }

    /// Why the connection is of no more use.
    pub(super) fn broken(&self) -> Option<Error> {
        self.lock().broken.as_ref().map(Error::duplicate)
    }

    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Changes whose end nobody knows, once the connection is broken: the server may execute them at any later time.
    pub(super) fn unanswered(&self) -> Vec<Unanswered> {
        self.lock().unanswered.clone()
    }

    /// Sends a request and waits for its reply; block status gives the first extent.
    pub(super) async fn request(&self, ask: Ask) -> Result<Option<Extent>> {
        let index = self.enqueue(ask).await?;
        Reply { link: self, index: Some(index) }.await
    }

    async fn enqueue(&self, ask: Ask) -> Result<usize> {
        let mut ask = Some(ask);
        poll_fn(|cx| {
            let mut s = self.lock();
            if let Some(e) = &s.broken {
                return Poll::Ready(Err(e.duplicate()));
            }
            if s.closing {
                return Poll::Ready(Err(lost("it was closed")));
            }
            if s.pending.len() >= MAX_IN_FLIGHT {
                s.queue.push(cx.waker().clone());
                return Poll::Pending;
            }
            let ask = ask.take().expect("completed futures are not polled");
            Poll::Ready(Ok(self.insert(s, ask)))
        })
        .await
    }

    fn insert(&self, mut s: MutexGuard<'_, State>, ask: Ask) -> usize {
        let change = ask.changes().map(|span| Unanswered { change: ask.change, span });
        let Ask { change: _, flags, cmd, offset, len, payload, to } = ask;
        s.generation = s.generation.wrapping_add(1);
        let generation = s.generation;
        let reply = match (cmd, self.session.base_allocation) {
            (cmd::READ, _) => ReplyState::read(self.session.structured, offset, len),
            (cmd::BLOCK_STATUS, Some(context)) => ReplyState::status(context, offset, len),
            _ => ReplyState::plain(),
        };
        let index = s.pending.insert(Pending {
            generation,
            reply,
            change,
            to,
            extent: None,
            waker: None,
            done: None,
            sent: false,
            abandoned: false,
            guards: Guards::default(),
            changes: matches!(cmd, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM),
        });
        let cookie = cookie_of(generation, index);
        let head = Request { flags, cmd, cookie, offset, len }.encode();
        s.outgoing.push_back(Outgoing { cookie, head, payload });
        wake(s.writer.take());
        index
    }

    /// Everything that waits fails; the tasks end: the writer shuts the socket down, which
    /// the reader sees as the end of the stream.
    fn break_off(&self, why: Error) {
        let mut s = self.lock();
        if s.broken.is_some() {
            return;
        }
        s.outgoing.clear();
        let mut wakers: Vec<Waker> = std::mem::take(&mut s.queue);
        wakers.extend(s.writer.take());
        wakers.append(&mut s.closers);
        let state = &mut *s;
        for (_, p) in &mut state.pending {
            if p.done.is_none() {
                state.unanswered.extend(p.change.filter(|_| p.sent));
                p.done = Some(Err(why.duplicate()));
                wakers.extend(p.waker.take());
            }
        }
        let mut guards = Vec::new();
        s.pending.retain(|_, p| {
            guards.push(std::mem::take(&mut p.guards));
            !p.abandoned
        });
        s.broken = Some(why);
        drop(s);
        drop(guards);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends the connection at once.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.break_off(lost("it was closed"));
    }

    /// Tells the server, after everything that was asked before, and ends the connection.
    pub(super) async fn say_goodbye(&self, rt: &Rt) {
        {
            let mut s = self.lock();
            s.closing = true;
            let r = Request { flags: CommandFlags(0), cmd: cmd::DISC, cookie: 0, offset: 0, len: 0 };
            s.outgoing.push_back(Outgoing { cookie: u64::MAX, head: r.encode(), payload: None });
            wake(s.writer.take());
        }
        let sent = poll_fn(|cx| {
            let mut s = self.lock();
            if s.goodbye_sent || s.broken.is_some() {
                return Poll::Ready(());
            }
            s.closers.push(cx.waker().clone());
            Poll::Pending
        });
        rt.timeout(GOODBYE_MAX, sent).await;
        self.close();
    }

    /// Finds the request of a reply.
    fn find(s: &mut State, cookie: u64) -> Result<&mut Pending> {
        let (generation, index) = ((cookie >> 32) as u32, (cookie & 0xffff_ffff) as usize);
        s.pending
            .get_mut(index)
            .filter(|p| p.generation == generation && p.sent && p.done.is_none())
            .ok_or_else(|| violation("answered a request that nobody made"))
    }

    /// Takes a reply, or a chunk of one, from the front of the input; what is left to
    /// receive goes into the buffer that it returns. Nothing was there: asks for more.
    fn take_head(&self, receive: &mut Receive) -> Result<Next> {
        let head = ReplyHead::decode(receive.bytes()?)?;
        let mut s = self.lock();
        let (cookie, taken, done) = match head {
            ReplyHead::Need(n) => return Ok(Next::Need(n)),
            ReplyHead::Simple { cookie, .. } => (cookie, SIMPLE_SIZE, true),
            ReplyHead::Chunk { cookie, done, taken, .. } => (cookie, taken, done),
        };
        let p = Link::find(&mut s, cookie)?;
        let action = match head {
            ReplyHead::Simple { errno, .. } => p.reply.simple(errno)?,
            ReplyHead::Chunk { chunk, .. } => p.reply.chunk(chunk)?,
            ReplyHead::Need(_) => unreachable!("returned above"),
        };
        let part =
            |p: &Pending, at: u32, len: u32| p.to.as_ref().map(|to| to.slice(at as usize, len as usize));
        let mut data = None;
        match action {
            ChunkAction::Nothing => {}
            ChunkAction::Receive { at, len } => data = part(p, at, len),
            ChunkAction::Zero { at, len } => {
                if let Some(hole) = part(p, at, len) {
                    hole.fill(0);
                }
            }
            ChunkAction::Extents(encoded) => p.extent = extents(encoded).next(),
        }
        drop(s);
        receive.take(taken);
        Ok(Next::Head { cookie, data, done })
    }

    /// A reply is complete.
    fn complete(&self, cookie: u64) -> Result<()> {
        let mut s = self.lock();
        let p = Link::find(&mut s, cookie)?;
        let outcome = p.reply.finish()?;
        p.done = Some(outcome);
        p.to = None;
        let waker = p.waker.take();
        let mut gone = None;
        if p.abandoned {
            gone = Some(s.pending.remove((cookie & 0xffff_ffff) as usize));
            wake(s.queue.pop());
        }
        drop(s);
        drop(gone);
        wake(waker);
        Ok(())
    }
}

enum Next {
    Need(usize),
    Head { cookie: u64, data: Option<IoVec>, done: bool },
}

fn wake(waker: Option<Waker>) {
    if let Some(w) = waker {
        w.wake();
    }
}

fn lost(why: &str) -> Error {
    Error::new(ErrorKind::Disconnected, format!("the connection to the NBD server is lost: {why}"))
}

fn violation(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the NBD server {what}"))
}

/// Waits for a reply; dropping it abandons the request.
struct Reply<'a> {
    link: &'a Link,
    index: Option<usize>,
}

impl Future for Reply<'_> {
    type Output = Result<Option<Extent>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let index = self.index.expect("completed futures are not polled");
        let mut s = self.link.lock();
        let p = &mut s.pending[index];
        if p.done.is_none() {
            match &mut p.waker {
                Some(w) => w.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let p = s.pending.remove(index);
        wake(s.queue.pop());
        drop(s);
        self.index = None;
        Poll::Ready(p.done.unwrap_or(Ok(())).map(|()| p.extent))
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        let mut s = self.link.lock();
        let p = &mut s.pending[index];
        if p.sent && p.done.is_none() {
            // The server has it: the place is free once its reply is there.
            p.abandoned = true;
            p.waker = None;
            if p.changes {
                p.guards = Guards::of_given_up();
            }
            return;
        }
        let cookie = cookie_of(p.generation, index);
        s.pending.remove(index);
        s.outgoing.retain(|o| o.cookie != cookie);
        wake(s.queue.pop());
    }
}

/// The writer.
async fn write_requests(link: Arc<Link>, stream: Stream) {
    write_on(&link, &stream).await;
    stream.shutdown();
}

async fn write_on(link: &Link, stream: &Stream) {
    let mut heads = Vec::new();
    let mut memory = Memory::zeroed(4096);
    loop {
        heads.clear();
        let mut parts: Vec<(usize, Option<IoVec>)> = Vec::new();
        let go_on = poll_fn(|cx| {
            let mut s = link.lock();
            if s.broken.is_some() {
                return Poll::Ready(false);
            }
            let mut bytes = 0;
            let mut segments = 0;
            while bytes < MAX_BYTES && segments < MAX_SEGMENTS {
                let Some(o) = s.outgoing.pop_front() else { break };
                if let Some(p) =
                    s.pending.get_mut((o.cookie & 0xffff_ffff) as usize).filter(|_| o.cookie != u64::MAX)
                {
                    p.sent = true;
                }
                heads.extend_from_slice(&o.head);
                bytes += o.payload.as_ref().map_or(0, IoVec::len);
                segments += 1 + o.payload.as_ref().map_or(0, |p| p.segments().len());
                parts.push((heads.len(), o.payload));
            }
            if !parts.is_empty() {
                return Poll::Ready(true);
            }
            s.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        if !go_on {
            return;
        }
        if memory.len() < heads.len() {
            memory = Memory::zeroed(heads.len().next_power_of_two());
        }
        memory.share().copy_from_slice(0, &heads);
        let shared = memory.share();
        let mut iov = IoVec::new();
        let mut from = 0;
        for (i, (end, payload)) in parts.iter().enumerate() {
            // Heads without data between them are one segment.
            if payload.is_some() || i + 1 == parts.len() {
                iov.push(shared.slice(from, end - from));
                from = *end;
            }
            for segment in payload.iter().flat_map(|p| p.segments()) {
                iov.push(segment.clone());
            }
        }
        drop(parts);
        let mut sending = pin!(stream.send_all(&iov));
        let sent = poll_fn(|cx| {
            let mut s = link.lock();
            if s.broken.is_some() {
                return Poll::Ready(None);
            }
            s.writer = Some(cx.waker().clone());
            drop(s);
            sending.as_mut().poll(cx).map(Some)
        });
        match sent.await {
            Some(Ok(())) => {}
            Some(Err(e)) => return link.break_off(lost(&e.to_string())),
            // A server that does not read can't keep this task from its end.
            None => return,
        }
        let mut s = link.lock();
        if s.closing && s.outgoing.is_empty() {
            s.goodbye_sent = true;
            let closers = std::mem::take(&mut s.closers);
            drop(s);
            closers.into_iter().for_each(Waker::wake);
        }
    }
}

/// The reader.
async fn read_replies(link: Arc<Link>, stream: Stream, mut receive: Receive) {
    let e = match read_on(&link, &stream, &mut receive).await {
        Ok(()) => lost("the server closed it"),
        // A server that breaks the rules costs us the connection, and says why.
        Err(e) => lost(&e.to_string()),
    };
    link.break_off(e);
}

async fn read_on(link: &Link, stream: &Stream, receive: &mut Receive) -> Result<()> {
    loop {
        match link.take_head(receive)? {
            Next::Need(n) => {
                if !receive.more(stream, n).await? {
                    return Ok(());
                }
            }
            Next::Head { cookie, data, done } => {
                if let Some(to) = data
                    && !receive.data(stream, to).await?
                {
                    return Ok(());
                }
                if done {
                    link.complete(cookie)?;
                }
            }
        }
    }
}

/// Received bytes that nobody has taken yet.
#[derive(Debug)]
struct Receive {
    memory: Memory,
    start: usize,
    end: usize,
}

impl Receive {
    fn new() -> Receive {
        Receive { memory: Memory::zeroed(RECEIVE), start: 0, end: 0 }
    }

    fn bytes(&mut self) -> Result<&[u8]> {
        let (start, end) = (self.start, self.end);
        match self.memory.bytes() {
            Some(b) => Ok(&b[start..end]),
            None => Err(Error::new(ErrorKind::Cancelled, "a receive was abandoned")),
        }
    }

    fn take(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives more, so that `need` bytes may be there later; `false` at the end of
    /// the stream. The codec bounds `need`.
    async fn more(&mut self, stream: &Stream, need: usize) -> Result<bool> {
        if self.start + need > self.memory.len() || self.end == self.memory.len() {
            let left = self.bytes()?.to_vec();
            if need > self.memory.len() {
                self.memory = Memory::zeroed(need.next_power_of_two());
            }
            self.memory.share().copy_from_slice(0, &left);
            (self.start, self.end) = (0, left.len());
        }
        let room = self.memory.share().slice(self.end, self.memory.len() - self.end);
        let n = stream.recv_buf(&room).await?;
        self.end += n;
        Ok(n > 0)
    }

    /// Fills `to`: from what is there, the rest straight from the socket.
    async fn data(&mut self, stream: &Stream, to: IoVec) -> Result<bool> {
        let input = self.bytes()?;
        let here = input.len().min(to.len());
        to.copy_from_slice(0, &input[..here]);
        self.take(here);
        let mut at = here;
        while at < to.len() {
            let n = stream.recv(&to.slice(at, to.len() - at)).await?;
            if n == 0 {
                return Ok(false);
            }
            at += n;
        }
        Ok(true)
    }
}
