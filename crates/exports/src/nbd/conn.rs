//! One client.
//!
//! ```text
//!   socket ─► reader ─► pending ─► workers ─► replies ─► sender ─► socket
//!              │ parses all that a receive brought     │ one send for all that is ready
//!              └───────── budget (count, bytes) ◄──────┘ given back once sent
//! ```
//!
//! Reader, workers and sender are tasks of one core, so the state needs no lock and a
//! request needs no allocation of its own here: workers are started when the first
//! requests come and then wait for more. The reader stops reading when the budget is
//! used up, so a client that does not read its replies stops itself and nobody else.
//!
//! A connection ends in one of three ways: the client disconnects (what it asked for is
//! finished, unread replies are dropped), the server stops it (no request is read any
//! more, what is under way is finished and answered), or it breaks the protocol or the
//! socket fails (nothing more is sent). Whatever the way, requests under way run to
//! their end first, so that no write goes on behind the back of a closed connection.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dolmen_nbd::{Catalog, Command, Request, RequestStep, ServerHandshake, ServerStep, Session};
use dolmen_rt::{IoVec, Memory, Stream};
use dolmen_types::{Error, ErrorKind, Result};

use super::execute::{CACHE_STEP, Pending, RequestCx, execute};
use super::replies::{Batch, Body, Reply};

/// Requests of one client that run or wait for the socket.
const MAX_REQUESTS: usize = 128;
/// Bytes that they hold. One request of the largest size always fits beside others.
const MAX_BYTES: usize = 64 << 20;
/// How long a connection that ends waits for its client to take the last replies.
const UNREAD_MAX: Duration = Duration::from_secs(5);
/// Bytes of the receive buffer.
const RECEIVE: usize = 128 << 10;

const _: () = assert!(MAX_BYTES >= dolmen_nbd::limits::MAX_PAYLOAD as usize);
const _: () = assert!(RECEIVE >= 2 * Request::SIZE);

/// A client in the transmission phase.
#[derive(Debug)]
pub(crate) struct Conn {
    /// What its requests need.
    request: RequestCx,
    stream: Stream,
    state: RefCell<State>,
    /// No more requests are to be read.
    stop: Cell<bool>,
    /// The socket is useless: nothing more is sent.
    broken: Cell<bool>,
    /// Every request is finished and the replies are out or dropped.
    ended: Cell<bool>,
}

#[derive(Debug, Default)]
struct State {
    pending: VecDeque<Pending>,
    /// For each worker: how to wake it, while it has nothing to do.
    workers: Vec<Option<Waker>>,
    /// The workers that have nothing to do; the one that stopped last is on top.
    idle: Vec<usize>,
    replies: VecDeque<Reply>,
    /// Requests taken and not answered yet, and the bytes they hold.
    requests: usize,
    bytes: usize,
    reader: Option<Waker>,
    sender: Option<Waker>,
    /// Waits for the end.
    closers: Vec<Waker>,
}

/// Received bytes that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Receive {
    memory: Memory,
    start: usize,
    end: usize,
}

impl Receive {
    pub(crate) fn new() -> Receive {
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

    /// Receives more; `false` at the end of the stream. Makes room for `need` bytes.
    async fn more(&mut self, stream: &Stream, need: usize) -> Result<bool> {
        if need > self.memory.len() {
            return Err(Error::new(ErrorKind::Limit, "a message is longer than the receive buffer"));
        }
        if self.start + need > self.memory.len() || self.end == self.memory.len() {
            let (start, end) = (self.start, self.end);
            if let Some(b) = self.memory.bytes_mut() {
                b.copy_within(start..end, 0);
            }
            (self.start, self.end) = (0, end - start);
        }
        let room: IoVec = self.memory.share().slice(self.end, self.memory.len() - self.end).into();
        let n = stream.recv(&room).await?;
        self.end += n;
        Ok(n > 0)
    }
}

const _: () = assert!(RECEIVE >= dolmen_nbd::limits::MAX_HANDSHAKE_INPUT);

/// Negotiates. `None` when the client went away, or was sent away, in an orderly way.
pub(crate) async fn handshake(
    stream: &Stream,
    receive: &mut Receive,
    exports: &dyn Catalog,
) -> Result<Option<Session>> {
    stream.send_bytes(&ServerHandshake::greeting()).await?;
    let mut machine = ServerHandshake::new();
    let mut out = Vec::new();
    loop {
        let step = machine.step(receive.bytes()?, exports, &mut out);
        let (done, need) = match step {
            ServerStep::Need(n) => (None, n),
            ServerStep::Taken(n) => {
                receive.take(n);
                (None, 0)
            }
            ServerStep::Ready { taken, session } => {
                receive.take(taken);
                (Some(Some(*session)), 0)
            }
            ServerStep::Close(_) => (Some(None), 0),
        };
        if !out.is_empty() && (need > 0 || done.is_some()) {
            stream.send_bytes(&out).await?;
            out.clear();
        }
        if let Some(end) = done {
            return Ok(end);
        }
        if need > 0 && !receive.more(stream, need).await? {
            return Ok(None);
        }
    }
}

/// What ended the reading.
enum End {
    /// The client said goodbye or closed its side.
    Gone,
    /// The server wants to.
    Stopped,
    /// It can't be served any longer.
    Broken,
}

impl Conn {
    pub(crate) fn new(request: RequestCx, stream: Stream) -> Rc<Conn> {
        Rc::new(Conn {
            request,
            stream,
            state: RefCell::default(),
            stop: Cell::new(false),
            broken: Cell::new(false),
            ended: Cell::new(false),
        })
    }

    /// Serves until the end, which is when nothing of this client is under way any more.
    pub(crate) async fn serve(self: &Rc<Conn>, receive: Receive) {
        self.request.rt.spawn(send_replies(self.clone()));
        match self.read_requests(receive).await {
            End::Gone | End::Stopped => {}
            End::Broken => self.break_off(),
        }
        // Nothing new comes: wait until what is under way is answered. A client that does
        // not take its answers can't hold this up.
        let mut patience = self.request.rt.sleep(UNREAD_MAX);
        poll_fn(|cx| {
            if self.state.borrow().requests == 0 {
                return Poll::Ready(());
            }
            if !self.broken.get() && patience.as_mut().poll(cx).is_ready() {
                self.break_off();
            }
            self.wait_as_reader(cx);
            Poll::Pending
        })
        .await;
        self.stream.shutdown();
        self.ended.set(true);
        let mut s = self.state.borrow_mut();
        s.workers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
        s.sender.take().into_iter().for_each(Waker::wake);
        s.closers.drain(..).for_each(Waker::wake);
    }

    /// Ends the connection in an orderly way: requests under way are answered.
    pub(crate) fn stop(&self) {
        self.stop.set(true);
        self.state.borrow_mut().reader.take().into_iter().for_each(Waker::wake);
    }

    /// Completes once nothing of this client is under way any more.
    pub(crate) async fn ended(&self) {
        poll_fn(|cx| {
            if self.ended.get() {
                return Poll::Ready(());
            }
            self.state.borrow_mut().closers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn break_off(&self) {
        self.broken.set(true);
        self.stream.shutdown();
        self.state.borrow_mut().sender.take().into_iter().for_each(Waker::wake);
    }

    /// Runs `work` unless the connection is to stop first.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if self.stop.get() || self.broken.get() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(v) = work.as_mut().poll(cx) {
                return Poll::Ready(Some(v));
            }
            self.wait_as_reader(cx);
            Poll::Pending
        })
        .await
    }

    fn wait_as_reader(&self, cx: &Context<'_>) {
        let mut s = self.state.borrow_mut();
        match &mut s.reader {
            Some(w) => w.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    async fn read_requests(self: &Rc<Conn>, mut receive: Receive) -> End {
        loop {
            let Ok(input) = receive.bytes() else { return End::Broken };
            let need = match Request::decode(input) {
                RequestStep::Need(n) => n,
                RequestStep::Got(request, payload) => {
                    receive.take(Request::SIZE);
                    match self.take_request(request, payload as usize, &mut receive).await {
                        Ok(()) => continue,
                        Err(end) => return end,
                    }
                }
                RequestStep::Close(_) => return End::Broken,
            };
            match self.unless_stopped(receive.more(&self.stream, need)).await {
                None => return End::Stopped,
                Some(Ok(true)) => {}
                // What a client left half-said is of no interest.
                Some(Ok(false)) => return End::Gone,
                Some(Err(_)) => return End::Broken,
            }
        }
    }

    async fn take_request(
        self: &Rc<Conn>,
        r: Request,
        payload: usize,
        receive: &mut Receive,
    ) -> Result<(), End> {
        let verdict = self.request.session.check(&r);
        if verdict == Ok(Command::Disconnect) {
            return Err(End::Gone);
        }
        let charge = match verdict {
            Ok(Command::Read { .. }) => r.len as usize,
            Ok(Command::Cache) => r.len.min(CACHE_STEP as u32) as usize,
            _ => payload,
        };
        self.reserve(charge).await?;
        let mut memory = None;
        if payload > 0 {
            match self.receive_payload(payload, receive).await {
                Ok(m) => memory = Some(m),
                Err(end) => {
                    let mut s = self.state.borrow_mut();
                    s.requests -= 1;
                    s.bytes -= charge;
                    return Err(end);
                }
            }
        }
        match verdict {
            Ok(command) => self.start(Pending {
                cookie: r.cookie,
                command,
                offset: r.offset,
                len: r.len,
                payload: memory,
                charge,
            }),
            Err((errno, text)) => {
                self.finish(Reply {
                    cookie: r.cookie,
                    body: Body::Failed(errno, text.into()),
                    memory,
                    charge,
                });
            }
        }
        Ok(())
    }

    /// Waits until the budget has room for one more request of `charge` bytes.
    async fn reserve(&self, charge: usize) -> Result<(), End> {
        poll_fn(|cx| {
            if self.stop.get() {
                return Poll::Ready(Err(End::Stopped));
            }
            if self.broken.get() {
                return Poll::Ready(Err(End::Broken));
            }
            let mut s = self.state.borrow_mut();
            if s.requests < MAX_REQUESTS && s.bytes + charge <= MAX_BYTES {
                s.requests += 1;
                s.bytes += charge;
                return Poll::Ready(Ok(()));
            }
            drop(s);
            self.wait_as_reader(cx);
            Poll::Pending
        })
        .await
    }

    /// The payload of a write, in a buffer of its own: what is there already is copied,
    /// the rest is received in place.
    async fn receive_payload(&self, len: usize, receive: &mut Receive) -> Result<Memory, End> {
        let memory = self.request.buffers.take(len);
        let Ok(input) = receive.bytes() else { return Err(End::Broken) };
        let here = input.len().min(len);
        memory.share().copy_from_slice(0, &input[..here]);
        receive.take(here);
        let mut at = here;
        while at < len {
            let room: IoVec = memory.share().slice(at, len - at).into();
            match self.unless_stopped(self.stream.recv(&room)).await {
                None => return Err(End::Stopped),
                Some(Ok(0)) => return Err(End::Gone),
                Some(Ok(n)) => at += n,
                Some(Err(_)) => return Err(End::Broken),
            }
        }
        Ok(memory)
    }

    fn start(self: &Rc<Conn>, request: Pending) {
        let mut s = self.state.borrow_mut();
        s.pending.push_back(request);
        let idle = s.idle.pop();
        if let Some(waker) = idle.and_then(|worker| s.workers[worker].take()) {
            drop(s);
            waker.wake();
        } else if s.workers.len() < MAX_REQUESTS {
            let worker = s.workers.len();
            s.workers.push(None);
            drop(s);
            self.request.rt.spawn(work(self.clone(), worker));
        }
    }

    fn finish(&self, reply: Reply) {
        let mut s = self.state.borrow_mut();
        s.replies.push_back(reply);
        if let Some(waker) = s.sender.take() {
            drop(s);
            waker.wake();
        }
    }

    /// A reply is out, or dropped.
    fn settle(&self, replies: &mut Vec<Reply>) {
        let mut s = self.state.borrow_mut();
        for reply in replies.drain(..) {
            s.requests -= 1;
            s.bytes -= reply.charge;
            if let Some(m) = reply.memory {
                self.request.buffers.put(m);
            }
        }
        if let Some(waker) = s.reader.take() {
            drop(s);
            waker.wake();
        }
    }
}

/// A worker: takes one request after the other until the connection has ended.
async fn work(conn: Rc<Conn>, me: usize) {
    loop {
        let request = poll_fn(|cx| {
            let mut s = conn.state.borrow_mut();
            if let Some(request) = s.pending.pop_front() {
                return Poll::Ready(Some(request));
            }
            if conn.ended.get() {
                return Poll::Ready(None);
            }
            // It may be polled again although nobody called it: it is on the list once.
            if s.workers[me].replace(cx.waker().clone()).is_none() {
                s.idle.push(me);
            }
            Poll::Pending
        })
        .await;
        let Some(request) = request else { return };
        let reply = execute(&conn.request, request).await;
        conn.finish(reply);
    }
}

/// The sender: sends whatever is ready, as much as possible at once.
async fn send_replies(conn: Rc<Conn>) {
    let mut batch = Batch::default();
    loop {
        let more = poll_fn(|cx| {
            let mut s = conn.state.borrow_mut();
            if !s.replies.is_empty() {
                return Poll::Ready(true);
            }
            if conn.ended.get() {
                return Poll::Ready(false);
            }
            s.sender = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        if !more {
            return;
        }
        batch.fill(&mut conn.state.borrow_mut().replies, &conn.request.session);
        if !conn.broken.get() {
            let iov = batch.iovec();
            if conn.stream.send_all(&iov).await.is_err() {
                // Requests under way still run to their end; the reader ends.
                conn.break_off();
                let reader = conn.state.borrow_mut().reader.take();
                reader.into_iter().for_each(Waker::wake);
            }
        }
        conn.settle(&mut batch.replies);
    }
}
