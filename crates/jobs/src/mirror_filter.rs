//! The filter of a mirror and of an active commit: sees everything that is written to the source.
//!
//! ```text
//!   guest --write--> [filter] --1--> source
//!                       |  \---2---> target      only while writes block
//!                       `--> Tracker: dirty      else, after 1 has ended
//! ```
//!
//! The invariant: what has been acknowledged is on the target, or its chunk is dirty (or owed by
//! somebody who has it in flight). So a copy that ends when nothing is dirty has missed nothing.
//!
//! - A write is marked when it has *ended*, well or not; one that is given up, when it has landed: a mark from
//!   before that could be taken away by a copy that still sees the old data.
//! - While writes block, a request has its chunks in flight for itself: the engine and overlapping
//!   requests wait for it, so both sides get overlapping writes in the same order. What the target does
//!   not take becomes dirty, and the job hears of the error; the guest is not bothered. It is done on both sides also
//!   when the guest gives it up.
//! - What a range reads as after a discard is the source's business, so a discard is never repeated on
//!   the target: its chunks become dirty. In the final phase (and when a copy does not converge), where nothing may become dirty any more,
//!   discards (which promise nothing) are acknowledged and not done.
//! - Writes that change nothing for readers pass and mark nothing.
//!
//! Phases only move down this list, but for the first two, between which the user may switch:
//!
//! | phase | writes | flushes |
//! |---|---|---|
//! | background | source, then dirty | source |
//! | blocking | source and target | source |
//! | final | source and target | source and target |
//! | ending | the same; one that the target refuses waits | the same |
//! | off | source | source |
//!
//! In the phase *ending* the last check has been made and the change of the graph waits for the requests
//! in flight. A request that the target refuses now can neither be acknowledged, since the target may become
//! the guest's disk, nor fail, since the source has it. It waits: the change of the graph gives up, the
//! job fails, the filter goes off, and the request is acknowledged.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use dolmen_copy::Tracker;
use dolmen_graph::{
    AccessRule, ChildEdge, Class, Common, CreateCx, Cx, Driver, DriverKind, Node, Op, Parsed, Plan, Request,
};
use dolmen_rt::{Guard, Hold, IoVec, LocalFuture, Rt, carry};
use dolmen_types::{Error, ErrorKind, Options, Result, Span, WriteFlags};
use event_listener::{Event, EventListener};

/// Registry row of the filter. It is made by jobs, never from options, so that it is not in the registry.
pub(crate) static MIRROR_TOP: DriverKind = DriverKind::new(
    "mirror_top",
    Class::Filter,
    "the filter of a mirror or an active commit",
    &[],
    not_from_options,
);

pub(crate) fn not_from_options(_: &mut Options, _: &Common) -> Result<Parsed> {
    Err(Error::new(ErrorKind::InvalidInput, "this filter belongs to a job and can't be made from options"))
}

/// Index of the source among the filter's children.
const SOURCE: usize = 0;
/// Index of the target.
const TARGET: usize = 1;

/// The most bytes of zeroes that are held at a time: a range is held only when no part of it is being
/// copied, which would come late for a range of the size of the disk.
const MAX_HELD_ZEROES: u64 = 16 << 20;

/// What the filter does with writes; see the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Background,
    Blocking,
    Final,
    Ending,
    Off,
}

impl Phase {
    fn from_u8(n: u8) -> Phase {
        match n {
            0 => Phase::Background,
            1 => Phase::Blocking,
            2 => Phase::Final,
            3 => Phase::Ending,
            _ => Phase::Off,
        }
    }

    fn writes_both(self) -> bool {
        matches!(self, Phase::Blocking | Phase::Final | Phase::Ending)
    }

    fn is_last(self) -> bool {
        matches!(self, Phase::Final | Phase::Ending)
    }
}

/// The driver; see the module's head.
#[derive(Debug)]
pub(crate) struct MirrorFilter {
    /// Itself, for what outlives a request.
    me: Weak<MirrorFilter>,
    rule: AccessRule,
    tracker: Arc<Tracker>,
    /// A [`Phase`].
    phase: AtomicU8,
    /// The target is as large as it has to be. Writes do not go there before, whatever the phase.
    target_ready: AtomicBool,
    /// Discards are not done: the copy does not converge otherwise.
    no_discards: AtomicBool,
    /// Requests under way that will be marked when they end.
    marking: AtomicUsize,
    /// Why the target refused a request, until the job takes notice. Never held across an await.
    failure: Mutex<Option<Error>>,
    /// The phase has changed, a marking request has ended, or the target has refused one.
    changed: Event,
}

impl MirrorFilter {
    pub(crate) fn new(rule: AccessRule, tracker: Arc<Tracker>, blocking: bool) -> Arc<MirrorFilter> {
        let phase = if blocking { Phase::Blocking } else { Phase::Background };
        Arc::new_cyclic(|me| MirrorFilter {
            me: me.clone(),
            rule,
            tracker,
            phase: AtomicU8::new(phase as u8),
            target_ready: AtomicBool::new(false),
            no_discards: AtomicBool::new(false),
            marking: AtomicUsize::new(0),
            failure: Mutex::new(None),
            changed: Event::new(),
        })
    }

    pub(crate) fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(SeqCst))
    }

    /// The job copies from now on.
    pub(crate) fn target_is_ready(&self) {
        self.target_ready.store(true, SeqCst);
    }

    /// Moves on. A move back is ignored, except from blocking to background, and except that off
    /// is final.
    pub(crate) fn set_phase(&self, to: Phase) {
        let moved = self.phase.fetch_update(SeqCst, SeqCst, |now| {
            let now = Phase::from_u8(now);
            (to > now || (now == Phase::Blocking && to == Phase::Background)).then_some(to as u8)
        });
        if moved.is_ok() {
            self.changed.notify(usize::MAX);
        }
    }

    /// Lets nothing become dirty any more unless the target refuses it, though the end has not been asked
    /// for.
    pub(crate) fn converge(&self) {
        self.no_discards.store(true, SeqCst);
        self.set_phase(Phase::Blocking);
    }

    /// A change of the graph that was to be the last one was not published: what waits goes on.
    pub(crate) fn back_to_final(&self) {
        if self.phase.compare_exchange(Phase::Ending as u8, Phase::Final as u8, SeqCst, SeqCst).is_ok() {
            self.changed.notify(usize::MAX);
        }
    }

    /// Whether the target has everything that was acknowledged. In the phases final and ending this stays
    /// true until the target refuses something.
    pub(crate) fn in_step(&self) -> bool {
        self.marking.load(SeqCst) == 0 && self.tracker.in_step()
    }

    /// Why the target refused a request lately; asking forgets it.
    pub(crate) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().expect("failure").take()
    }

    pub(crate) fn has_failure(&self) -> bool {
        self.failure.lock().expect("failure").is_some()
    }

    /// Wakes up at the next change of phase, failure, or end of a marking request.
    pub(crate) fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// Where a request goes, by the phase as it is now.
    fn way(&self, span: Span, discard: bool) -> Way {
        // Count first, then look at the phase: whoever changes the phase looks at the count afterwards,
        // so one of the two sees the other.
        self.marking.fetch_add(1, SeqCst);
        let phase = match self.phase() {
            Phase::Blocking if !self.target_ready.load(SeqCst) => Phase::Background,
            phase => phase,
        };
        let way = match (phase, discard) {
            (Phase::Blocking, true) if self.no_discards.load(SeqCst) => Way::Nowhere,
            (Phase::Background, _) | (Phase::Blocking, true) => {
                let filter = self.me.upgrade().expect("a driver that runs a request is alive");
                return Way::Mark(Marking { filter, span: Some(span) });
            }
            (Phase::Blocking, false) => Way::Both,
            (Phase::Final | Phase::Ending, false) => Way::Both,
            (Phase::Final | Phase::Ending, true) => Way::Nowhere,
            (Phase::Off, _) => Way::Pass,
        };
        self.unmarking();
        way
    }

    /// The target has not taken something that is marked by now.
    async fn refused(&self, error: Error) {
        self.failure.lock().expect("failure").get_or_insert(error);
        loop {
            let listener = self.changed.listen();
            // After the mark: who sets the phase looks for marks afterwards.
            if self.phase() != Phase::Ending {
                self.changed.notify(usize::MAX);
                return;
            }
            listener.await;
        }
    }

    /// A request for both sides. It is a task of its own: given up half-way, it would leave them different, and in the last
    /// phases nobody copies any more.
    async fn both(&self, cx: Cx<'_>, span: Span, what: Change) -> Result<()> {
        let request = Both {
            filter: self.me.upgrade().expect("a driver that runs a request is alive"),
            source: cx.node.children[SOURCE].clone(),
            target: cx.node.children[TARGET].clone(),
            rt: cx.rt.clone(),
        };
        cx.rt.shielded(async move { request.run(span, &what).await }).await
    }

    async fn write(&self, cx: Cx<'_>, span: Span, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let source = cx.forward(SOURCE, Op::Write { span, from, flags });
        match self.way(span, false) {
            Way::Mark(until_it_ends) => carry(source, until_it_ends).await,
            Way::Both => self.both(cx, span, Change::Write(from.clone(), flags)).await,
            Way::Nowhere => Ok(()),
            Way::Pass => source.await,
        }
    }

    async fn zero(&self, cx: Cx<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let piece = if self.phase().writes_both() {
                rest.prefix_to(MAX_HELD_ZEROES, Span::LARGEST_UNIT)
            } else {
                rest
            };
            let source = cx.forward(SOURCE, Op::WriteZeroes { span: piece, flags });
            match self.way(piece, false) {
                Way::Mark(until_it_ends) => carry(source, until_it_ends).await?,
                Way::Both => self.both(cx, piece, Change::Zeroes(flags)).await?,
                Way::Nowhere => {}
                Way::Pass => source.await?,
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    async fn discard(&self, cx: Cx<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let source = cx.forward(SOURCE, Op::Discard { span, flags });
        match self.way(span, true) {
            Way::Mark(until_it_ends) => carry(source, until_it_ends).await,
            Way::Nowhere => Ok(()),
            Way::Both | Way::Pass => source.await,
        }
    }

    async fn flush(&self, cx: Cx<'_>) -> Result<()> {
        cx.forward(SOURCE, Op::Flush).await?;
        if !self.phase().is_last() {
            return Ok(());
        }
        let flushed = async { cx.write(TARGET)?.flush().await };
        if let Err(e) = flushed.await {
            // Nobody knows what of it the target has lost.
            self.tracker.mark(Span::new(0, self.tracker.with(dolmen_copy::CopyMap::size)));
            self.refused(e).await;
        }
        Ok(())
    }
}

/// The target's flags of a write: it may have to write zeroes as data where the source need not, and
/// stores data in its own way.
fn target_flags(flags: WriteFlags) -> WriteFlags {
    flags.without(WriteFlags::NO_FALLBACK).without(WriteFlags::COMPRESSED)
}

/// Where a request goes.
enum Way {
    /// To the source, and is marked when it has ended.
    Mark(Marking),
    /// To both sides.
    Both,
    /// Nowhere: it promises nothing.
    Nowhere,
    /// To the source, and that is all.
    Pass,
}

/// Marks what a request to the source has changed when it ends, however it does; if it is given up, when what it has in flight
/// has ended.
struct Marking {
    filter: Arc<MirrorFilter>,
    /// `None` when it is somebody else's business.
    span: Option<Span>,
}

impl MirrorFilter {
    fn unmarking(&self) {
        // Who waits for the last one has set the phase before.
        if self.marking.fetch_sub(1, SeqCst) == 1 && self.phase().is_last() {
            self.changed.notify(usize::MAX);
        }
    }
}

impl Drop for Marking {
    fn drop(&mut self) {
        if let Some(span) = self.span {
            self.filter.tracker.mark(span);
            self.filter.unmarking();
        }
    }
}

impl Hold for Marking {
    fn leave(&mut self) -> Guard {
        Arc::new(Marking { filter: self.filter.clone(), span: self.span.take() })
    }
}

/// What is done on both sides.
enum Change {
    Write(IoVec, WriteFlags),
    Zeroes(WriteFlags),
}

/// What a request for both sides needs to go on without its caller.
struct Both {
    filter: Arc<MirrorFilter>,
    source: ChildEdge,
    target: ChildEdge,
    rt: Rt,
}

impl Both {
    async fn run(self, span: Span, what: &Change) -> Result<()> {
        let filter = &self.filter;
        let Some(held) = filter.tracker.hold(span).await else {
            return self.change(&self.source, span, what, |f| f).await;
        };
        let owed = Owed { filter, span, armed: true };
        self.change(&self.source, span, what, |f| f).await?;
        match self.change(&self.target, span, what, target_flags).await {
            Ok(()) => {
                owed.settle();
                held.done(span);
                Ok(())
            }
            Err(e) => {
                drop(owed);
                drop(held);
                filter.refused(e).await;
                Ok(())
            }
        }
    }

    async fn change(
        &self,
        side: &ChildEdge,
        span: Span,
        what: &Change,
        flags: impl Fn(WriteFlags) -> WriteFlags,
    ) -> Result<()> {
        let io = CreateCx { file: Some(side), fixed: false, rt: &self.rt }.write()?;
        match what {
            Change::Write(from, f) => io.write(span, from, flags(*f)).await,
            Change::Zeroes(f) => io.write_zeroes(span, flags(*f)).await,
        }
    }
}

/// Marks what has changed on one side only, unless both sides have it in the end.
struct Owed<'a> {
    filter: &'a MirrorFilter,
    span: Span,
    armed: bool,
}

impl Owed<'_> {
    fn settle(mut self) {
        self.armed = false;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.filter.tracker.mark(self.span);
        }
    }
}

impl Driver for MirrorFilter {
    fn kind(&self) -> &'static DriverKind {
        &MIRROR_TOP
    }

    dolmen_graph::pass_through! { SOURCE: size, limits, status, event, prepare, close, image, describe }

    fn access_rule(&self) -> AccessRule {
        self.rule
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Read(_) | Request::Resize => Plan::pass(request, span),
            Request::Write(f) | Request::WriteZeroes(f) | Request::Discard(f)
                if f.has(WriteFlags::UNCHANGED) =>
            {
                Plan::pass(request, span)
            }
            Request::Write(_) | Request::WriteZeroes(_) | Request::Discard(_) => match self.phase() {
                Phase::Off => Plan::pass(request, span),
                Phase::Background | Phase::Blocking | Phase::Final | Phase::Ending => Plan::Slow,
            },
            Request::Flush if self.phase().is_last() => Plan::Slow,
            Request::Flush => Plan::pass(request, span),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        match op {
            Op::Write { span, from, flags } if !flags.has(WriteFlags::UNCHANGED) => {
                Box::pin(self.write(cx, span, from, flags))
            }
            Op::WriteZeroes { span, flags } if !flags.has(WriteFlags::UNCHANGED) => {
                Box::pin(self.zero(cx, span, flags))
            }
            Op::Discard { span, flags } if !flags.has(WriteFlags::UNCHANGED) => {
                Box::pin(self.discard(cx, span, flags))
            }
            Op::Flush => Box::pin(self.flush(cx)),
            Op::Read { .. }
            | Op::Resize { .. }
            | Op::Write { .. }
            | Op::WriteZeroes { .. }
            | Op::Discard { .. } => Box::pin(async move { cx.forward(SOURCE, op).await }),
        }
    }
}
