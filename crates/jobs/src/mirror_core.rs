//! What a mirror and an active commit have in common: copying until the target is in step, staying in step,
//! and coming to an end with nothing left behind.
//!
//! ```text
//!   engine <---- dirty ---- filter <---- guest's writes
//!     |
//!     v      nothing dirty: ready           the user completes (or keeps the copy):
//!   target                                  filter to phase final, wait until it is in step
//!                                           settle: once more, flush the target
//!                                           end: filter to phase ending, last check
//! ```
//!
//! In the phase final nothing becomes dirty any more unless the target refuses a write, so being in step once
//! is being in step until the change of the graph.
//!
//! A guest can write faster than a copy in the background can follow. When what is left has
//! hardly shrunk for some seconds, writes block from then on, if the user permits it: then the end is only a
//! matter of copying what is dirty now.

use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;
use std::time::Duration;

use dolmen_copy::{CopyMap, CopyOptions, Engine, Failure, Hooks, Moved, Pass, Route, Tracker};
use dolmen_graph::{AccessRule, Node, UserEdge, chain_status, own_status};
use dolmen_rt::{Instant, LocalFuture, Rt};
use dolmen_types::{Error, ErrorKind, NodeName, Options, Result, Span};
use futures_lite::future::or;

use crate::mirror_filter::{MirrorFilter, Phase};
use crate::{Again, JobCx, OnError, Side, Wish};

/// The most bytes of one part.
const MAX_PART: u64 = 1 << 20;

/// Parts in flight, and bytes of each, unless the user says otherwise. What is read is written while it is still
/// in the processor's cache: with 16 MiB in flight the same copy between files takes nearly twice the CPU time.
pub(crate) const USUAL: (usize, u64) = (4, 512 << 10);

/// The most parts in flight.
const MAX_WORKERS: u64 = 16;

/// How long writes of the guest are gathered before they are copied, once the job is ready.
const GATHER: Duration = Duration::from_millis(10);

/// How long a part that failed, and whose error is to be ignored, is left alone.
pub(crate) const BACK_OFF: Duration = Duration::from_millis(100);

/// How often progress is looked at while parts are copied: adding up what is dirty is not free.
const LOOK: Duration = Duration::from_millis(100);

/// How often it is asked whether the copy converges.
const CONVERGE_EVERY: Duration = Duration::from_secs(1);

/// After how many such times without progress writes block.
const CONVERGE_PATIENCE: u32 = 5;

/// Granularities that can be asked for, in bytes.
const GRANULARITY: std::ops::RangeInclusive<u64> = 512..=64 << 20;

/// What the target gets at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sync {
    /// Everything.
    Full,
    /// What the source's own layer holds.
    Top,
    /// What the layers above this node hold.
    Above(NodeName),
    /// What is written from now on.
    None,
}

/// What can be chosen about the copying; see the module's head.
#[derive(Clone, Debug)]
pub(crate) struct CoreOptions {
    pub(crate) sync: Sync,
    /// Writes go to both sides from the start.
    pub(crate) blocking: bool,
    /// Writes may come to block if the copy does not converge.
    pub(crate) auto_converge: bool,
    /// Bytes of a chunk; chosen by the target if not given.
    pub(crate) granularity: Option<u64>,
    /// Bytes in flight.
    pub(crate) buffers: Option<u64>,
    pub(crate) on_source_error: OnError,
    pub(crate) on_target_error: OnError,
    /// Zeroes may give space back on the target.
    pub(crate) unmap: bool,
}

impl Default for CoreOptions {
    fn default() -> CoreOptions {
        CoreOptions {
            sync: Sync::Full,
            blocking: false,
            auto_converge: true,
            granularity: None,
            buffers: None,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
        }
    }
}

/// A word of `copy-mode`.
fn blocks(word: &str) -> bool {
    word == "write-blocking"
}

/// The words of `copy-mode`.
pub(crate) const COPY_MODES: &[&str] = &["background", "write-blocking"];

impl CoreOptions {
    /// Takes the options of a mirror out.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub(crate) fn take(o: &mut Options) -> Result<CoreOptions> {
        let sync = match o.take_enum("sync", &["top", "full", "none", "incremental", "bitmap"])? {
            Some("top") => Sync::Top,
            Some("none") => Sync::None,
            Some("full") => Sync::Full,
            Some(word) => {
                return Err(invalid(format!("Sync mode '{word}' not supported"))
                    .remedy("mirrors have the modes full, top and none"));
            }
            None => return Err(invalid("Parameter 'sync' is missing")),
        };
        let granularity = o.take_size("granularity")?.filter(|g| *g != 0);
        if let Some(g) = granularity {
            if !GRANULARITY.contains(&g) {
                return Err(invalid("Parameter 'granularity' expects a value in range [512B, 64MB]"));
            }
            if !g.is_power_of_two() {
                return Err(invalid("Parameter 'granularity' expects a power of 2"));
            }
        }
        let buffers = o.take_size("buf-size").map_err(|_| invalid("Invalid parameter 'buf-size'"))?;
        let buffers = buffers.filter(|b| *b != 0);
        Ok(CoreOptions {
            sync,
            blocking: o.take_enum("copy-mode", COPY_MODES)?.is_some_and(blocks),
            auto_converge: o.take_bool("auto-converge")?.unwrap_or(true),
            granularity,
            buffers,
            on_source_error: OnError::take(o, "on-source-error")?,
            on_target_error: OnError::take(o, "on-target-error")?,
            unmap: o.take_bool("unmap")?.unwrap_or(true),
        })
    }
}

pub(crate) fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) options: CoreOptions,
    /// What the target gets at the start.
    sync: RefCell<Sync>,
    /// Made when the job begins.
    filter: RefCell<Option<Arc<MirrorFilter>>>,
    /// What the user wanted in the end.
    wish: Cell<Wish>,
    /// The job's edge to its filter, once it runs.
    edge: RefCell<Option<Arc<UserEdge>>>,
}

impl Core {
    pub(crate) fn new(options: CoreOptions) -> Core {
        let sync = RefCell::new(options.sync.clone());
        Core {
            options,
            sync,
            filter: RefCell::new(None),
            wish: Cell::new(Wish::Nothing),
            edge: RefCell::new(None),
        }
    }

    /// Makes the filter, for a source of `size` bytes and a target with clusters of `cluster` bytes (0: none).
    pub(crate) fn make_filter(&self, rule: AccessRule, size: u64, cluster: u32) -> Arc<MirrorFilter> {
        let usual = if cluster == 0 { 64 << 10 } else { u64::from(cluster).clamp(4096, 64 << 10) };
        let chunk = self.options.granularity.unwrap_or(usual);
        let tracker = match &*self.sync.borrow() {
            Sync::Full => Tracker::all_dirty(size, chunk),
            Sync::Top | Sync::Above(_) | Sync::None => Tracker::new(CopyMap::new(size, chunk)),
        };
        let filter = MirrorFilter::new(rule, Arc::new(tracker), self.options.blocking);
        *self.filter.borrow_mut() = Some(filter.clone());
        filter
    }

    /// Copies only what the layers above `base` hold.
    pub(crate) fn only_above(&self, base: &NodeName) {
        *self.sync.borrow_mut() = Sync::Above(base.clone());
    }

    /// Copies everything, whatever was asked for.
    pub(crate) fn copy_everything(&self) {
        *self.sync.borrow_mut() = Sync::Full;
    }

    /// What the target gets at the start.
    pub(crate) fn sync(&self) -> Ref<'_, Sync> {
        self.sync.borrow()
    }

    /// The job runs, and this is its edge to the filter.
    pub(crate) fn begin_with(&self, edge: &Arc<UserEdge>) {
        *self.edge.borrow_mut() = Some(edge.clone());
    }

    /// The job's edge to the filter.
    pub(crate) fn edge(&self) -> Option<Arc<UserEdge>> {
        self.edge.borrow().clone()
    }

    pub(crate) fn filter(&self) -> Result<Arc<MirrorFilter>> {
        self.filter.borrow().clone().ok_or_else(|| invalid("the job has not begun"))
    }

    fn engine(&self, rt: &Rt, route: Route, filter: &MirrorFilter) -> Engine {
        let (workers, max_chunk) = match self.options.buffers {
            None => USUAL,
            Some(bytes) => {
                let part = MAX_PART.min(bytes);
                ((bytes / part.max(1)).clamp(1, MAX_WORKERS) as usize, part)
            }
        };
        let options = CopyOptions { workers, max_chunk, unmap: self.options.unmap, ..CopyOptions::default() };
        Engine::new(rt, route, filter.tracker().clone(), options)
    }

    /// Copies until the user wants to end it and the target has everything.
    ///
    /// # Errors
    /// `Cancelled`, or the error that ends the job.
    pub(crate) async fn run(&self, cx: &JobCx, route: Route) -> Result<()> {
        let filter = self.filter()?;
        filter.target_is_ready();
        let tracker = filter.tracker();
        let sync = self.sync.borrow().clone();
        match sync {
            Sync::Top => self.find_allocated(cx, tracker, None).await?,
            Sync::Above(base) => self.find_allocated(cx, tracker, Some(&base)).await?,
            Sync::Full | Sync::None => {}
        }
        cx.set_remaining(tracker.remaining());
        let engine = self.engine(cx.rt(), route, &filter);
        let hooks = Copying::new(cx, self, &filter);
        let mut ready = false;
        loop {
            cx.checkpoint().await?;
            if let Some(error) = filter.take_failure() {
                hooks.policy(Side::Target, error).await?;
                continue;
            }
            if cx.wish() != Wish::Nothing {
                filter.set_phase(Phase::Final);
            }
            hooks.again.set(false);
            if engine.run(&hooks).await? == Pass::Attention {
                continue;
            }
            hooks.look();
            if !ready && filter.in_step() {
                ready = true;
                hooks.ready.set(true);
                cx.ready();
            }
            if filter.phase() == Phase::Final && filter.in_step() {
                self.wish.set(cx.wish());
                return Ok(());
            }
            self.wait(cx, &filter, ready).await;
            if ready && cx.wish() == Wish::Nothing && filter.phase() == Phase::Background {
                cx.sleep_until(cx.rt().now() + GATHER).await?;
            }
        }
    }

    /// Waits until there is something to do.
    async fn wait(&self, cx: &JobCx, filter: &MirrorFilter, ready: bool) {
        loop {
            let (user, map, writes) = (cx.changed(), filter.tracker().listen(), filter.listen());
            let last = filter.phase() == Phase::Final;
            if cx.wants_attention()
                || filter.has_failure()
                || (cx.wish() != Wish::Nothing && !last)
                || filter.tracker().peek().is_some()
                || ((last || !ready) && filter.in_step())
            {
                return;
            }
            cx.resting(or(user, or(map, writes))).await;
        }
    }

    /// Marks what the source's own layer, or those above `base`, hold. What is written meanwhile is marked
    /// by the filter.
    async fn find_allocated(&self, cx: &JobCx, tracker: &Tracker, base: Option<&NodeName>) -> Result<()> {
        let size = tracker.with(CopyMap::size);
        let mut rest = Span::new(0, size);
        while !rest.is_empty() {
            cx.checkpoint().await?;
            let found = async {
                let token = cx.edge(0).begin().await?;
                match base {
                    None => own_status(token.node(), cx.rt(), rest).await,
                    Some(base) => {
                        let base = backing_link(token.node(), base);
                        let s = chain_status(token.node(), cx.rt(), rest, base.as_deref()).await?;
                        Ok((s.present, s.len))
                    }
                }
            };
            match found.await {
                Ok((allocated, len)) => {
                    let part = rest.prefix(len.max(1));
                    if allocated {
                        tracker.mark(part);
                    }
                    rest = rest.skip(part.len());
                }
                Err(e) => {
                    if cx.failed(Side::Source, self.options.on_source_error, e).await? == Again::Skip {
                        // Unknown is as good as allocated: reading it will tell.
                        tracker.mark(rest);
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Brings over what has become dirty since [`Core::run`], because the target refused it; then makes
    /// the target durable.
    ///
    /// # Errors
    /// What the target says.
    pub(crate) async fn settle(&self, rt: &Rt, route: Route) -> Result<()> {
        let filter = self.filter()?;
        let engine = self.engine(rt, route, &filter);
        loop {
            engine.run(&Quiet).await?;
            let (map, writes) = (filter.tracker().listen(), filter.listen());
            if filter.in_step() {
                break;
            }
            if filter.tracker().peek().is_none() {
                or(map, writes).await;
            }
        }
        engine.flush().await
    }

    /// The last check before a successful end; says whether the target takes the source's place.
    ///
    /// # Errors
    /// `Io` when the target lacks something.
    pub(crate) fn end(&self) -> Result<bool> {
        let filter = self.filter()?;
        filter.set_phase(Phase::Ending);
        if filter.in_step() {
            return Ok(self.wish.get() == Wish::Complete);
        }
        filter.back_to_final();
        let why = filter.take_failure();
        Err(why.unwrap_or_else(|| Error::new(ErrorKind::Io, "the target has not taken the last writes")))
    }

    /// Whether the end, if it comes now, replaces the source.
    pub(crate) fn pivots(&self) -> bool {
        self.wish.get() == Wish::Complete
    }

    /// The job has no result: the filter only passes from now on.
    pub(crate) fn abort(&self) {
        if let Ok(filter) = self.filter() {
            filter.set_phase(Phase::Off);
        }
    }

    /// Switches the copy mode of a job of type `kind`.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub(crate) fn change(&self, mut o: Options) -> Result<crate::Effect<'_>> {
        let Some(mode) = o.take_enum("copy-mode", COPY_MODES)? else {
            return Err(invalid("Parameter 'copy-mode' is missing"));
        };
        let filter = self.filter()?;
        let phase = if blocks(mode) { Phase::Blocking } else { Phase::Background };
        Ok(Box::new(move || filter.set_phase(phase)))
    }

    /// Whether every write goes to both sides, which are the same.
    pub(crate) fn actively_synced(&self) -> bool {
        self.filter().is_ok_and(|f| f.phase() != Phase::Background && f.in_step())
    }
}

/// The backing child that leads to `base`: the node itself, or the outermost filter on it.
pub(crate) fn backing_link(top: &Arc<Node>, base: &NodeName) -> Option<Arc<Node>> {
    let mut at = Some(top);
    while let Some(node) = at {
        if let Some(backing) = node.backing() {
            let mut through = std::iter::successors(Some(backing), |n| n.filtered());
            if through.any(|n| n.name == *base) {
                return Some(backing.clone());
            }
        }
        at = node.filtered().or_else(|| node.backing());
    }
    None
}

/// The engine's way to the job.
struct Copying<'a> {
    cx: &'a JobCx,
    core: &'a Core,
    filter: &'a MirrorFilter,
    /// The job was stopped by an error and resumed: all workers begin anew.
    again: Cell<bool>,
    ready: Cell<bool>,
    looked: Cell<Instant>,
    converging: Cell<Converging>,
}

/// Whether what is left gets less.
#[derive(Clone, Copy, Debug)]
struct Converging {
    since: Instant,
    /// Bytes that are to be moved before anything is judged.
    first_pass: u64,
    least: u64,
    patience: u32,
}

impl Converging {
    /// Looks at what is left at `now`; says whether it does not converge.
    fn judge(&mut self, now: Instant, left: u64) -> bool {
        if now.since(self.since) < CONVERGE_EVERY {
            return false;
        }
        self.since = now;
        if left < self.least / 10 * 9 {
            self.least = left;
            self.patience = CONVERGE_PATIENCE;
        } else {
            self.patience = self.patience.saturating_sub(1);
        }
        self.patience == 0
    }
}

impl<'a> Copying<'a> {
    fn new(cx: &'a JobCx, core: &'a Core, filter: &'a MirrorFilter) -> Copying<'a> {
        let (now, left) = (cx.rt().now(), filter.tracker().remaining());
        Copying {
            cx,
            core,
            filter,
            again: Cell::new(false),
            ready: Cell::new(false),
            looked: Cell::new(now),
            converging: Cell::new(Converging {
                since: now,
                first_pass: left,
                least: u64::MAX,
                patience: CONVERGE_PATIENCE,
            }),
        }
    }

    /// Looks at what is left.
    fn look(&self) {
        let now = self.cx.rt().now();
        self.looked.set(now);
        let left = self.filter.tracker().remaining();
        self.cx.set_remaining(left);
        let mut c = self.converging.get();
        let waits = self.filter.phase() == Phase::Background && !self.ready.get() && c.first_pass == 0;
        if waits && c.judge(now, left) && self.core.options.auto_converge {
            self.filter.converge();
        }
        self.converging.set(c);
    }

    /// Does what the user wants done about an error.
    async fn policy(&self, side: Side, error: Error) -> Result<()> {
        let policy = match side {
            Side::Source => self.core.options.on_source_error,
            Side::Target => self.core.options.on_target_error,
        };
        match self.cx.failed(side, policy, error).await? {
            Again::Retry => self.again.set(true),
            Again::Skip => self.cx.sleep_until(self.cx.rt().now() + BACK_OFF).await?,
        }
        Ok(())
    }
}

impl Hooks for Copying<'_> {
    fn throttle(&self, bytes: u64) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            // A cancelled job is noticed as attention.
            let _ = self.cx.throttle(bytes).await;
        })
    }

    fn moved(&self, span: Span, _: Moved) {
        self.cx.progress_add(span.len());
        let mut c = self.converging.get();
        c.first_pass = c.first_pass.saturating_sub(span.len());
        self.converging.set(c);
        if self.cx.rt().now().since(self.looked.get()) >= LOOK {
            self.look();
        }
    }

    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>> {
        let side = match failure.side {
            dolmen_copy::Side::Source => Side::Source,
            dolmen_copy::Side::Target => Side::Target,
        };
        Box::pin(self.policy(side, failure.error))
    }

    fn attention(&self) -> bool {
        self.cx.wants_attention()
            || self.again.get()
            || self.filter.has_failure()
            || (self.cx.wish() != Wish::Nothing && self.filter.phase() < Phase::Final)
    }
}

/// The engine without a job: at its end.
struct Quiet;

impl Hooks for Quiet {
    fn throttle(&self, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn moved(&self, _: Span, _: Moved) {}

    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { Err(failure.error) })
    }

    fn attention(&self) -> bool {
        false
    }
}
