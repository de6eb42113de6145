//! The simulated disk and its fault model.
//!
//! # Fault model
//!
//! - The unit is the **sector of 512 bytes**. After a power loss a sector holds one whole
//!   value: torn sectors and bit rot are outside of the model.
//! - The disk has a **volatile cache**. A write is *submitted*, at some later time
//!   *applied* (from then on reads see it), and at some later time *completed* (the caller is
//!   told). The seed draws both times, so completions come in any order.
//! - A **flush** makes all writes durable that had *completed before the flush was
//!   submitted*, once the flush itself completes. Nothing else does; in particular
//!   closing the disk does not.
//! - A **power loss** keeps an arbitrary part of everything not yet durable, for each sector
//!   separately and in any order: a sector then holds its durable value or the value that any
//!   one of the unflushed writes to it had left. (Per sector, "any subset" and "any subset
//!   in any order" are the same set of outcomes.) Writes in flight count as unflushed,
//!   applied or not. Two writes that were in flight at the same time have no order among
//!   themselves until both are durable.
//! - A write with **FUA** is durable when it completes, and earlier completed writes to
//!   the same sectors can't come back. It says nothing about other sectors.
//! - **Zero writes** are writes of zeroes. A **discard** either leaves what is there or
//!   writes zeroes; the seed decides for each one.
//! - Requests that do not cover whole sectors change the rest of their first and last
//!   sector to what it was when they were applied, as a page cache does.
//! - **Size changes** are metadata and are treated like a data write: a size change that
//!   is not durable may be lost or kept. Cutting is also a write of zeroes to what is cut off.
//!   Writing past the end grows the disk, and a kept sector past the durable end brings the
//!   growth with it.
//! - A disk may have a **capacity**: then a page of 4096 bytes takes space when something is written to it, also
//!   zeroes unless they may unmap it, and gives it back when it is discarded or cut off. A write that finds too little
//!   space fails; what fitted of it is written, as with a file.
//! - An **injected error** fails a request either before anything happened or after it was
//!   applied; the caller can't tell which. A **swallowed** request is acknowledged
//!   without having any effect: the lie of a broken disk, or a flush that somebody
//!   forgot.
//! - A request whose future is **dropped** goes on: it is applied and completes later,
//!   and a read still writes into the buffer.
//!
//! - A change can be **held back**: it is applied when the test lets it go, however long that takes.
//!
//! The disk logs all of this; [`CrashPoints`](crate::CrashPoints) turns the log into images.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dolmen_graph::Op;
use dolmen_rt::{Guards, Instant, IoVec, Rt};
use dolmen_types::{Error, ErrorKind, OpKind, Result, Span, WriteFlags};
use event_listener::{Event as Signal, EventListener};

use crate::Image;

/// Bytes that change together or not at all.
pub const SECTOR: u64 = 512;

/// How a simulated disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct DiskConfig {
    /// Longest time from submission to application, and from there to completion; the
    /// times are drawn from zero to this. In nanoseconds.
    pub latency_ns_max: u64,
    /// The alignment that the disk asks for.
    pub request_alignment: u32,
    /// Whether the log is kept. Without it there are no crashes, and no memory is used.
    pub log: bool,
}

impl Default for DiskConfig {
    fn default() -> DiskConfig {
        DiskConfig { latency_ns_max: 100_000, request_alignment: 1, log: true }
    }
}

/// What a request does to the disk.
#[derive(Clone, Debug)]
pub enum Change {
    /// These bytes at this offset.
    Write(u64, Arc<[u8]>),
    /// Zeroes.
    Zero(Span),
    /// A new size in bytes.
    Resize(u64),
    /// Nothing (a discard that was not done).
    Nothing,
}

/// One entry of the log. Requests are numbered.
#[derive(Clone, Debug)]
pub enum Event {
    /// A request arrived.
    Submitted {
        /// Its number.
        id: u64,
        /// What it does.
        change: Change,
        /// Durable on completion.
        fua: bool,
    },
    /// Reads see it from now on.
    Applied(u64),
    /// The caller was told of success.
    Completed(u64),
    /// The caller was told of an error, whether or not the request was applied.
    Failed(u64),
    /// A flush arrived.
    FlushSubmitted(u64),
    /// A flush completed, and did its work.
    Flushed(u64),
}

/// What an injected fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// The request fails with an error of this kind.
    Fail(ErrorKind),
    /// The request is acknowledged without effect.
    Swallow,
}

/// A fault to inject into requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which requests.
    pub kind: OpKind,
    /// How many of them to let pass first.
    pub skip: u64,
    /// How many to hit then.
    pub times: u64,
    /// What happens to them.
    pub action: FaultAction,
}

pub(crate) struct State {
    /// What reads see.
    pub(crate) image: Image,
    log: Vec<Event>,
    next_id: u64,
    faults: Vec<Fault>,
    /// Changes that begin there are held back.
    hold: Option<Span>,
    /// How many are.
    held: usize,
    /// Bytes of space that the content may take.
    capacity: Option<u64>,
    /// Requests by kind, in the order of [`OpKind`]'s variants.
    counts: [u64; 6],
}

/// The order of events in the logs of several disks, which lose power together.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// For each event, the number of its disk.
    order: Arc<Mutex<Vec<usize>>>,
}

impl Journal {
    /// How many events there were: a moment in the life of all the disks.
    pub fn position(&self) -> usize {
        self.events().len()
    }

    /// How long the logs of `disks` disks were at a moment.
    pub fn positions(&self, moment: usize, disks: usize) -> Vec<usize> {
        let mut out = vec![0; disks];
        self.events()[..moment].iter().for_each(|disk| out[*disk] += 1);
        out
    }

    /// Held for single steps only, never across an await.
    fn events(&self) -> MutexGuard<'_, Vec<usize>> {
        self.order.lock().expect("journal")
    }
}

pub(crate) struct Shared {
    config: DiskConfig,
    /// Where events are noted besides the log, and as which disk's.
    journal: Option<(Journal, usize)>,
    initial: Image,
    /// Held for single steps only, never across an await.
    state: Mutex<State>,
    let_go: Signal,
}

/// A disk with a volatile cache; see the module's head. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    shared: Arc<Shared>,
}

impl SimDisk {
    /// A disk with this durable content.
    pub fn new(image: Image, config: DiskConfig) -> SimDisk {
        let state = State {
            image: image.clone(),
            log: Vec::new(),
            next_id: 0,
            faults: Vec::new(),
            hold: None,
            held: 0,
            capacity: None,
            counts: [0; 6],
        };
        SimDisk {
            shared: Arc::new(Shared {
                config,
                journal: None,
                initial: image,
                state: Mutex::new(state),
                let_go: Signal::new(),
            }),
        }
    }

    /// The same; its events are also noted in a journal, as those of disk `number`.
    pub fn in_journal(image: Image, config: DiskConfig, journal: &Journal, number: usize) -> SimDisk {
        let mut disk = SimDisk::new(image, config);
        let shared = Arc::get_mut(&mut disk.shared).expect("nobody else knows it yet");
        shared.journal = Some((journal.clone(), number));
        disk
    }

    /// The content as reads see it now.
    pub fn image(&self) -> Image {
        self.state().image.clone()
    }

    /// Size in bytes as it is now.
    pub fn size(&self) -> u64 {
        self.state().image.size()
    }

    /// The configuration.
    pub fn config(&self) -> DiskConfig {
        self.shared.config
    }

    /// The length of the log: a moment in the life of the disk.
    pub fn position(&self) -> usize {
        self.state().log.len()
    }

    /// Injects a fault.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Takes back all injected faults.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Holds back changes within `span` that are submitted from now on, until [`SimDisk::let_go`].
    pub fn hold(&self, span: Span) {
        self.state().hold = Some(span);
    }

    /// How many changes are held back now.
    pub fn held(&self) -> usize {
        self.state().held
    }

    /// Changes that are submitted from now on are not held back; those that are stay so until [`SimDisk::let_go`].
    pub fn hold_no_more(&self) {
        self.state().hold = None;
    }

    /// Lets all changes go that are held back, and holds back no more.
    pub fn let_go(&self) {
        let mut state = self.state();
        (state.hold, state.held) = (None, 0);
        drop(state);
        self.shared.let_go.notify(usize::MAX);
    }

    /// From now on the disk has so many bytes of space, less than it uses already being as good as nothing left; or
    /// as much as it wants.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// How many requests of this kind have arrived.
    pub fn count(&self, kind: OpKind) -> u64 {
        self.state().counts[index(kind)]
    }

    /// Makes everything durable that has completed, at once and past all faults: what a
    /// test does in place of a flush that it has swallowed on purpose.
    pub fn flush_now(&self) {
        let mut state = self.state();
        let id = state.number();
        if self.shared.config.log {
            state.log.extend([Event::FlushSubmitted(id), Event::Flushed(id)]);
            if let Some((journal, number)) = &self.shared.journal {
                journal.events().extend([*number; 2]);
            }
        }
    }

    /// The log so far as text, an event a line: what a failure of a test is explained with.
    pub fn log_text(&self) -> String {
        let state = self.state();
        let lines = state.log.iter().enumerate().map(|(i, e)| match e {
            Event::Submitted { id, change: Change::Write(at, data), fua } => {
                format!("{i}: {id} write {at:#x} {} bytes fua={fua}\n", data.len())
            }
            other => format!("{i}: {other:?}\n"),
        });
        lines.collect()
    }

    /// The content before the log, and the log so far.
    pub(crate) fn history(&self) -> (Image, Vec<Event>) {
        (self.shared.initial.clone(), self.state().log.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("simulated disk")
    }

    fn note(&self, event: Event) {
        if self.shared.config.log {
            self.state().log.push(event);
            if let Some((journal, number)) = &self.shared.journal {
                journal.events().push(*number);
            }
        }
    }

    /// How many bytes of a write there is space for, if not for all.
    fn short_of(&self, offset: u64, len: u64) -> Option<u64> {
        let state = self.state();
        let left = state.capacity?.saturating_sub(state.image.space());
        Some(state.image.fits(offset, len, left)).filter(|fits| *fits < len)
    }

    /// Writes what there was space for of a write that fails.
    fn write_part(&self, offset: u64, data: &[u8]) {
        let change = Change::Write(offset, data.into());
        let id = self.state().number();
        self.note(Event::Submitted { id, change: change.clone(), fua: false });
        change.apply(&mut self.state().image);
        self.note(Event::Applied(id));
        self.note(Event::Failed(id));
    }

    fn later(&self, rt: &Rt, from: Instant) -> Instant {
        let max = self.shared.config.latency_ns_max;
        if max == 0 { from } else { from + Duration::from_nanos(rt.random() % (max + 1)) }
    }

    /// Does a request, in simulated time.
    pub(crate) async fn run(&self, rt: &Rt, op: Op<'_>) -> Result<()> {
        let fault = self.state().arrive(op.kind());
        let held = self.holds_back(op);
        let work = if fault == Some(FaultAction::Swallow) { Work::Nothing } else { self.submit(rt, op) };
        let fail = match fault {
            Some(FaultAction::Fail(kind)) => Some((kind, op.kind(), rt.random().is_multiple_of(2))),
            Some(FaultAction::Swallow) | None => None,
        };
        let apply_at = self.later(rt, rt.now());
        let complete_at = self.later(rt, apply_at);
        let steps = Steps { disk: self.clone(), apply_at, complete_at, applied: false, held, fail, work };
        let mut request = InFlight { steps: Some(steps), rt: rt.clone() };
        let result = request.steps.as_mut().expect("just set").go(&request.rt).await;
        request.steps = None;
        result
    }

    /// Decides whether a change is held back; what waits for it until it is let go.
    fn holds_back(&self, op: Op<'_>) -> Option<EventListener> {
        let span = match op {
            Op::Write { span, .. } | Op::WriteZeroes { span, .. } | Op::Discard { span, .. } => span,
            Op::Resize { size, .. } => Span::new(size, 0),
            Op::Read { .. } | Op::Flush => return None,
        };
        let mut state = self.state();
        let within = |hold: Span| hold.offset() <= span.offset() && span.end() <= hold.end();
        if !state.hold.is_some_and(within) {
            return None;
        }
        state.held += 1;
        Some(self.shared.let_go.listen())
    }

    fn submit(&self, rt: &Rt, op: Op<'_>) -> Work {
        let (change, flags) = match op {
            Op::Read { span, to, flags: _ } => return Work::Read(span, to.clone()),
            Op::Flush => {
                let id = self.state().number();
                self.note(Event::FlushSubmitted(id));
                return Work::Flush(id);
            }
            Op::Write { span, from, flags } => (Change::Write(span.offset(), from.to_vec().into()), flags),
            Op::WriteZeroes { span, flags }
                if self.state().capacity.is_some() && !flags.has(WriteFlags::MAY_UNMAP) =>
            {
                // Takes space like data.
                let zeroes = vec![0; usize::try_from(span.len()).expect("fits memory")];
                (Change::Write(span.offset(), zeroes.into()), flags)
            }
            Op::WriteZeroes { span, flags } => (Change::Zero(span), flags),
            Op::Discard { span, flags } => {
                let span = span.intersect(Span::new(0, self.size())).unwrap_or(Span::new(0, 0));
                let kept = rt.random().is_multiple_of(2);
                (if kept { Change::Nothing } else { Change::Zero(span) }, flags)
            }
            Op::Resize { size, prealloc: _ } => (Change::Resize(size), WriteFlags::NONE),
        };
        let id = self.state().number();
        let fua = flags.has(WriteFlags::FUA);
        self.note(Event::Submitted { id, change: change.clone(), fua });
        Work::Change(id, change)
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn arrive(&mut self, kind: OpKind) -> Option<FaultAction> {
        self.counts[index(kind)] += 1;
        let mut hit = None;
        for f in self.faults.iter_mut().filter(|f| f.kind == kind) {
            if f.skip > 0 {
                f.skip -= 1;
            } else if f.times > 0 && hit.is_none() {
                f.times -= 1;
                hit = Some(f.action);
            }
        }
        hit
    }
}

impl Change {
    pub(crate) fn apply(&self, image: &mut Image) {
        match self {
            Change::Write(offset, data) => image.write(*offset, data),
            Change::Zero(span) if span.is_empty() => {}
            Change::Zero(span) => image.zero(span.offset(), span.len()),
            Change::Resize(size) => image.resize(*size),
            Change::Nothing => {}
        }
    }
}

const fn index(kind: OpKind) -> usize {
    match kind {
        OpKind::Read => 0,
        OpKind::Write => 1,
        OpKind::WriteZeroes => 2,
        OpKind::Discard => 3,
        OpKind::Flush => 4,
        OpKind::Resize => 5,
    }
}

enum Work {
    Read(Span, IoVec),
    Change(u64, Change),
    Flush(u64),
    Nothing,
}

/// A request on its way through the disk.
struct Steps {
    disk: SimDisk,
    apply_at: Instant,
    complete_at: Instant,
    applied: bool,
    /// Held back until then.
    held: Option<EventListener>,
    /// Kind of the error, kind of the request, whether it is applied all the same.
    fail: Option<(ErrorKind, OpKind, bool)>,
    work: Work,
}

impl Steps {
    async fn go(&mut self, rt: &Rt) -> Result<()> {
        if !self.applied {
            if let Some(let_go) = &mut self.held {
                let_go.await;
                self.held = None;
            }
            rt.sleep_until(self.apply_at).await;
            self.applied = true;
            if self.fail.is_none_or(|(_, _, applied)| applied) && !self.apply() {
                self.fail = Some((ErrorKind::NoSpace, OpKind::Write, false));
            }
        }
        rt.sleep_until(self.complete_at).await;
        if let Some((kind, what, _)) = self.fail {
            if let Work::Change(id, _) = self.work {
                self.disk.note(Event::Failed(id));
            }
            let why = if kind == ErrorKind::NoSpace { "no space for" } else { "injected error in" };
            return Err(Error::new(kind, format!("{why} a {what:?}")));
        }
        match self.work {
            Work::Change(id, _) => self.disk.note(Event::Completed(id)),
            Work::Flush(id) => self.disk.note(Event::Flushed(id)),
            Work::Read(..) | Work::Nothing => {}
        }
        Ok(())
    }

    /// Whether there was space for it.
    fn apply(&mut self) -> bool {
        match &self.work {
            Work::Read(span, to) => {
                let mut bytes = vec![0; to.len()];
                self.disk.state().image.read(span.offset(), &mut bytes);
                to.copy_from_slice(0, &bytes);
            }
            Work::Change(id, change) => {
                if let Change::Write(offset, data) = change
                    && let Some(fits) = self.disk.short_of(*offset, data.len() as u64)
                {
                    self.disk.write_part(*offset, &data[..fits as usize]);
                    return false;
                }
                change.apply(&mut self.disk.state().image);
                self.disk.note(Event::Applied(*id));
            }
            Work::Flush(_) | Work::Nothing => {}
        }
        true
    }
}

/// Lets a request go on when nobody waits for it any more.
struct InFlight {
    steps: Option<Steps>,
    rt: Rt,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(mut steps) = self.steps.take() {
            let rt = self.rt.clone();
            let guards = match steps.work {
                Work::Change(..) => Guards::of_given_up(),
                Work::Read(..) | Work::Flush(_) | Work::Nothing => Guards::default(),
            };
            self.rt.spawn(async move {
                let _until_it_has_landed = guards;
                // The caller has gone: nobody is interested in an error.
                let _ = steps.go(&rt).await;
            });
        }
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "SimDisk({:?}, {} events)", state.image, state.log.len())
    }
}
