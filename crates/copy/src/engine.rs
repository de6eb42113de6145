//! The engine: brings everything that is dirty in a [`Tracker`] from a source to a target.
//!
//! ```text
//!   for each of N workers, again and again
//!     |  next()   one worker at a time
//!     |    peek at the map: a run of dirty chunks
//!     |    what is it?  data / zeroes / absent      from the source's block status; one answer
//!     |                                             serves many parts
//!     |    throttle     no token, nothing taken
//!     |    tokens, then take_at                     the part is in flight from here
//!     v  transfer()     all workers at the same time
//!        read and write, or write zeroes, or nothing
//!        done -> clean; failed -> dirty again
//! ```
//!
//! Rules that others rely on:
//! - A token is held for one part only, and never while waiting for anything but I/O of that part.
//!   So whoever changes the graph can drain between parts.
//! - A part is taken only when its tokens are there: a guest's write that waits for a part in flight
//!   holds a token itself, and must not wait for somebody who waits for the gate.
//! - A part that fails goes back into the map before anybody is asked what to do about it.
//! - [`Engine::run`] may be dropped at any time; parts that were out are dirty again. Writes that
//!   were submitted may still arrive: let it drain ([`Hooks::attention`]) where that would matter.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use dolmen_graph::{Cx, Driver, Io, Node, Read, Token, UserEdge, Write};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{ChildRole, Error, ErrorKind, Result, Span, WriteFlags};
use event_listener::Event;
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::tracker::Taken;
use crate::transfer::{Content, How, content, transfer};
use crate::{Buffers, Failure, Moved, Side, Tracker};

/// The most bytes that one part of zeroes has: long enough that a part costs nothing, short
/// enough that a target that has to write them does not keep a quiesce waiting.
const MAX_ZEROES: u64 = 256 << 20;

/// The largest buffer, in bytes: chunks that are larger are moved in pieces.
const MAX_BUFFER: u64 = 4 << 20;

/// How far ahead the source's status is asked for, in bytes.
const MAX_STATUS: u64 = 1 << 30;

/// How a copy is done.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// Parts that are copied at the same time; at least 1.
    pub workers: usize,
    /// The most bytes of data in one part; rounded down to chunks, but at least one.
    pub max_chunk: u64,
    /// Bytes of data that are moved at the same time; a single part may have more. Many small parts keep a
    /// distant target busy, while a few large ones are enough for a local file, whose writers would
    /// only stand in each other's way (and in the processor's cache).
    pub max_in_flight: u64,
    /// Zero writes may give space back on the target.
    pub unmap: bool,
    /// Data that happen to be zeroes are written as zeroes.
    pub detect_zeroes: bool,
    /// What has been copied is discarded on the source, which needs the right to write it.
    pub discard_source: bool,
    /// Flags of the writes.
    pub write_flags: WriteFlags,
}

impl Default for CopyOptions {
    /// 16 parts of up to 1 MiB, 4 MiB together.
    fn default() -> CopyOptions {
        CopyOptions {
            workers: 16,
            max_chunk: 1 << 20,
            max_in_flight: 4 << 20,
            unmap: true,
            detect_zeroes: false,
            discard_source: false,
            write_flags: WriteFlags::NONE,
        }
    }
}

/// Where the data come from and go to.
#[derive(Clone, Debug)]
pub enum Route {
    /// From one user's edge to another's.
    Edges {
        /// Read.
        source: Arc<UserEdge>,
        /// Written.
        target: Arc<UserEdge>,
    },
    /// Both are children of one filter, which a user's edge leads to, perhaps through other filters.
    Filter {
        /// The edge.
        edge: Arc<UserEdge>,
        /// The driver of the filter.
        driver: Arc<dyn Driver>,
    },
}

/// The tokens for one part.
enum Tokens {
    Edges(Token, Token),
    Filter { _token: Token, filter: Arc<Node> },
}

impl Route {
    /// Tokens for both sides. Never waits for one while it holds the other: a quiesce of both would
    /// wait for the first.
    async fn begin(&self) -> Result<Tokens> {
        match self {
            Route::Edges { source, target } => loop {
                let from = source.begin().await?;
                if let Some(to) = target.try_begin()? {
                    return Ok(Tokens::Edges(from, to));
                }
                drop(from);
                drop(target.begin().await?);
            },
            Route::Filter { edge, driver } => {
                let token = edge.begin().await?;
                let filter = std::iter::successors(Some(token.node()), |n| n.filtered())
                    .find(|n| Arc::ptr_eq(&n.driver, driver))
                    .cloned();
                let filter = filter.ok_or_else(|| {
                    Error::new(ErrorKind::Disconnected, "the filter of the copy is not in the graph any more")
                })?;
                Ok(Tokens::Filter { _token: token, filter })
            }
        }
    }
}

fn child_of(filter: &Node, role: ChildRole) -> Result<usize> {
    filter.children.iter().position(|c| c.role == role).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("node '{}' has no child of the kind {role:?}", filter.name),
        )
    })
}

impl Tokens {
    fn source_node(&self) -> Result<&Arc<Node>> {
        match self {
            Tokens::Edges(from, _) => Ok(from.node()),
            Tokens::Filter { filter, .. } => {
                Ok(&filter.children[child_of(filter, ChildRole::Filtered)?].node)
            }
        }
    }

    fn target_node(&self) -> Result<&Arc<Node>> {
        match self {
            Tokens::Edges(_, to) => Ok(to.node()),
            Tokens::Filter { filter, .. } => Ok(&filter.children[child_of(filter, ChildRole::Target)?].node),
        }
    }

    fn from<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Read>> {
        match self {
            Tokens::Edges(from, _) => from.read(rt),
            Tokens::Filter { filter, .. } => {
                Cx { node: filter, rt }.read(child_of(filter, ChildRole::Filtered)?)
            }
        }
    }

    fn to<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Write>> {
        match self {
            Tokens::Edges(_, to) => to.write(rt),
            Tokens::Filter { filter, .. } => {
                Cx { node: filter, rt }.write(child_of(filter, ChildRole::Target)?)
            }
        }
    }

    fn source_writer<'a>(&'a self, rt: &'a Rt) -> Result<Io<'a, Write>> {
        match self {
            Tokens::Edges(from, _) => from.write(rt),
            Tokens::Filter { filter, .. } => {
                Cx { node: filter, rt }.write(child_of(filter, ChildRole::Filtered)?)
            }
        }
    }
}

/// What a copy tells, and asks, whoever started it.
pub trait Hooks {
    /// About to copy `bytes` of data: completes when the speed limit lets them through, or when
    /// [`Hooks::attention`] becomes true.
    fn throttle(&self, bytes: u64) -> LocalFuture<'_, ()>;
    /// `span` has been brought to the target.
    fn moved(&self, span: Span, what: Moved);
    /// A part failed and is dirty again. `Ok` to go on (it is tried again later), an error to end
    /// the copy with. May wait as long as it likes: no token is held.
    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>>;
    /// Whether the engine should stop taking parts, let what is in flight end, and return.
    fn attention(&self) -> bool;
}

/// Why [`Engine::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Nothing is dirty. Others may still have chunks in flight ([`Tracker::is_done`]).
    Clean,
    /// [`Hooks::attention`], or something became dirty when the last worker had gone: call it again when there is
    /// nothing else to do. Nothing of the engine is in flight.
    Attention,
}

/// What is known of the source from some point on; see the tracker's watch.
#[derive(Clone, Copy, Debug)]
struct Known {
    span: Span,
    content: Content,
}

/// A part on its way.
struct Part<'a> {
    taken: Taken<'a>,
    tokens: Tokens,
    content: Content,
    _load: Load<'a>,
}

/// Bytes of data in flight, as long as it lives.
struct Load<'a> {
    engine: &'a Engine,
    bytes: u64,
}

impl<'a> Load<'a> {
    fn new(engine: &'a Engine, bytes: u64) -> Load<'a> {
        engine.flying.set(engine.flying.get() + bytes);
        Load { engine, bytes }
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.engine.flying.set(self.engine.flying.get() - self.bytes);
        self.engine.landed.notify(usize::MAX);
    }
}

/// A copy; see the module's head.
pub struct Engine {
    rt: Rt,
    route: Route,
    tracker: Arc<Tracker>,
    options: CopyOptions,
    /// Only what lies above this node is copied.
    base: Option<Arc<Node>>,
    buffers: Buffers,
    /// Serialises [`Engine::next`]. Held across awaits.
    next: async_lock::Mutex<()>,
    known: Cell<Option<Known>>,
    busy: Cell<usize>,
    /// Bytes of data in flight, and whoever waits for fewer.
    flying: Cell<u64>,
    landed: Event,
    stop: Cell<bool>,
    error: RefCell<Option<Error>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({:?}, {} left)", self.route, self.tracker.remaining())
    }
}

impl Engine {
    /// A copy of what is dirty in `tracker`.
    pub fn new(rt: &Rt, route: Route, tracker: Arc<Tracker>, options: CopyOptions) -> Engine {
        let chunk = tracker.with(crate::CopyMap::chunk);
        let size = (options.max_chunk / chunk).max(1) * chunk;
        // Chunks may be larger than what is sensibly read at once.
        let buffer = size.min(MAX_BUFFER);
        Engine {
            rt: rt.clone(),
            route,
            tracker,
            options: CopyOptions { workers: options.workers.max(1), max_chunk: size, ..options },
            base: None,
            buffers: Buffers::new(buffer as usize, options.workers.max(1)),
            next: async_lock::Mutex::new(()),
            known: Cell::new(None),
            busy: Cell::new(0),
            flying: Cell::new(0),
            landed: Event::new(),
            stop: Cell::new(false),
            error: RefCell::new(None),
        }
    }

    /// Copies only what the layers above `base` hold (without `base`). The node must stay in the chain
    /// below the source as long as the engine runs.
    #[must_use]
    pub fn above(mut self, base: Option<Arc<Node>>) -> Engine {
        self.base = base;
        self
    }

    /// The shared state.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Copies until nothing is dirty, or `hooks` want attention. May be called again.
    ///
    /// # Errors
    /// What [`Hooks::failed`] made of a failure, or `Disconnected` when an edge was taken away. Nothing
    /// of the engine is in flight then.
    pub async fn run(&self, hooks: &dyn Hooks) -> Result<Pass> {
        self.stop.set(false);
        self.busy.set(self.options.workers);
        let mut workers: FuturesUnordered<_> = (0..self.options.workers).map(|_| self.work(hooks)).collect();
        while workers.next().await.is_some() {}
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        Ok(if self.tracker.peek().is_none() { Pass::Clean } else { Pass::Attention })
    }

    /// Makes what has been copied durable on the target.
    ///
    /// # Errors
    /// What the target says; earlier parts may then be lost.
    pub async fn flush(&self) -> Result<()> {
        let tokens = self.route.begin().await?;
        tokens.to(&self.rt)?.flush().await
    }

    fn end(&self, error: Error) {
        self.error.borrow_mut().get_or_insert(error);
        self.stop.set(true);
    }

    fn stopping(&self, hooks: &dyn Hooks) -> bool {
        self.stop.get() || hooks.attention()
    }

    /// One worker. It counts as busy unless it waits for something to become dirty.
    async fn work(&self, hooks: &dyn Hooks) {
        loop {
            // Storage that never makes anybody wait would have the core to itself.
            self.rt.yield_now().await;
            // Before the map is looked at, or a change is missed.
            let listener = self.tracker.listen();
            match self.next(hooks).await {
                Ok(Some(part)) => self.copy(part, hooks).await,
                Ok(None) if self.stopping(hooks) => break,
                Ok(None) => {
                    // Nothing to do now. What others have in flight may come back.
                    self.busy.set(self.busy.get() - 1);
                    if self.busy.get() == 0 {
                        self.stop.set(true);
                        self.tracker.poke();
                        return;
                    }
                    listener.await;
                    if self.stop.get() {
                        return;
                    }
                    self.busy.set(self.busy.get() + 1);
                }
                Err(error) => {
                    self.end(error);
                    break;
                }
            }
        }
        self.busy.set(self.busy.get() - 1);
        self.tracker.poke();
    }

    /// The next part, taken.
    async fn next(&self, hooks: &dyn Hooks) -> Result<Option<Part<'_>>> {
        let _one = self.next.lock().await;
        loop {
            if self.stopping(hooks) {
                return Ok(None);
            }
            let Some(run) = self.tracker.peek() else { return Ok(None) };
            let (content, span) = self.look(run).await?;
            if content == Content::Data {
                while self.flying.get() > 0 && self.flying.get() + span.len() > self.options.max_in_flight {
                    self.landed.listen().await;
                }
                hooks.throttle(span.len()).await;
                if self.stopping(hooks) {
                    return Ok(None);
                }
            }
            let tokens = self.route.begin().await?;
            // Somebody else may have taken it meanwhile, or a part of it.
            let Some(taken) = self.tracker.take_at(span.offset(), span.len()) else { continue };
            let holds =
                content == Content::Data || self.tracker.watched().is_some_and(|w| w.contains(taken.span()));
            let content = if holds { content } else { Content::Data };
            let load = Load::new(self, if content == Content::Data { taken.span().len() } else { 0 });
            return Ok(Some(Part { taken, tokens, content, _load: load }));
        }
    }

    /// What the run begins with, in whole chunks, and how much of it makes a part.
    async fn look(&self, run: Span) -> Result<(Content, Span)> {
        let chunk = self.tracker.with(crate::CopyMap::chunk);
        let mut found: Option<Content> = None;
        let mut end = run.offset();
        loop {
            let most = match found {
                Some(Content::Data) => self.options.max_chunk,
                Some(Content::Zero | Content::Absent) => MAX_ZEROES.max(chunk),
                None => u64::MAX,
            };
            let limit = run.end().min(run.offset().saturating_add(most));
            if end >= limit {
                return Ok((found.unwrap_or(Content::Data), Span::from_range(run.offset(), limit)));
            }
            let (content, upto) = self.chunks(run.offset(), Span::from_range(end, run.end()), chunk).await?;
            if found.is_some_and(|f| f != content) {
                return Ok((found.unwrap_or(Content::Data), Span::from_range(run.offset(), end)));
            }
            found = Some(content);
            end = upto;
        }
    }

    /// What the first chunk of `span` is, and where the chunks that are the same end. A chunk with
    /// parts of both kinds is data. The part to be begins at `start`.
    async fn chunks(&self, start: u64, span: Span, chunk: u64) -> Result<(Content, u64)> {
        let first = (span.offset() + chunk).min(span.end());
        let known = self.known(start, span).await?;
        let end = known.span.end();
        if end >= span.end() {
            return Ok((known.content, span.end()));
        }
        if end >= first {
            return Ok((known.content, end / chunk * chunk));
        }
        let mut at = end;
        let mut content = known.content;
        while at < first {
            let more = self.known(start, Span::from_range(at, span.end())).await?;
            if more.content != content {
                content = Content::Data;
            }
            at = more.span.end();
        }
        Ok((content, first))
    }

    /// What the start of `span` is: as remembered, or asked for. The part to be begins at `start`.
    async fn known(&self, start: u64, span: Span) -> Result<Known> {
        let at = span.prefix(1);
        let watched = self.tracker.watched();
        if let Some(known) = self.known.get()
            && known.span.contains(at)
            && (known.content == Content::Data || watched.is_some_and(|w| w.contains(at)))
        {
            return Ok(known);
        }
        let tokens = self.route.begin().await?;
        let source = tokens.source_node()?;
        let ask = span.prefix(MAX_STATUS);
        // After the wait: what was watched before it may have changed meanwhile.
        self.tracker.watch_on(start, ask);
        let (content, len) = content(source, &self.rt, ask, self.base.as_deref()).await;
        let known = Known { span: ask.prefix(len), content };
        self.known.set(Some(known));
        Ok(known)
    }

    /// Copies a part and tells how it went.
    async fn copy(&self, part: Part<'_>, hooks: &dyn Hooks) {
        let span = part.taken.span();
        match self.try_copy(&part).await {
            Ok(moved) => {
                part.taken.done();
                drop(part.tokens);
                hooks.moved(span, moved);
            }
            Err(failure) => {
                drop(part);
                if let Err(error) = hooks.failed(failure).await {
                    self.end(error);
                }
            }
        }
    }

    async fn try_copy(&self, part: &Part<'_>) -> Result<Moved, Failure> {
        let span = part.taken.span();
        let fail = |side| move |error| Failure { side, span, error };
        let from = part.tokens.from(&self.rt).map_err(fail(Side::Source))?;
        let to = part.tokens.to(&self.rt).map_err(fail(Side::Target))?;
        let target = part.tokens.target_node().map_err(fail(Side::Target))?;
        let how = How {
            unmap: self.options.unmap,
            detect_zeroes: self.options.detect_zeroes,
            flags: self.options.write_flags,
        };
        let moved = transfer(from, to, target, span, part.content, how, &self.buffers).await?;
        if self.options.discard_source {
            let source = part.tokens.source_writer(&self.rt).map_err(fail(Side::Source))?;
            source.discard(span, WriteFlags::NONE).await.map_err(fail(Side::Source))?;
        }
        Ok(moved)
    }
}
