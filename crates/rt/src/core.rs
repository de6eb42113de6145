//! One core: its tasks, its timers, its operations in flight, and the loop that drives them.
//!
//! Invariants:
//! - An operation's memory and file live in its slot until the kernel has completed it, whether or not somebody
//!   still waits: dropping a future marks its slot as an orphan and frees nothing. An orphan that changes a file also keeps
//!   what its request held ([`Guards`]).
//! - Nothing recurses: completions are collected by the engine, then applied by the loop; waking a task only puts
//!   it into the run queue.
//! - A turn of the loop runs tasks, then reads mail, fires timers, and enters the kernel once for everything
//!   that was submitted meanwhile.
//! - No `RefCell` borrow is held while a task, a waker or a destructor of the user's runs.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use async_task::{Runnable, Task};
use slab::Slab;

use crate::engine::{Completions, Engine, Wait};
use crate::mailbox::{Bell, Mailbox};
use crate::op::Op;
use crate::stats::{Stats, bump};
use crate::timers::{TimerKey, Timers};
use crate::{Guards, Instant, LocalFuture, workers};

/// Tasks polled before the loop looks at the kernel again.
const POLLS_PER_TURN: u32 = 128;
/// Operations that may complete at once, without the ring, before the loop gets a turn: a task whose data are all
/// in the page cache must not starve the others.
const INLINE_PER_TURN: u32 = 64;

/// What other threads send to a core.
pub(crate) enum Mail {
    /// A task of this core that was woken elsewhere.
    Run(Runnable),
    /// A new task, made on this core.
    Start(Box<dyn FnOnce(crate::Rt) -> LocalFuture<'static, ()> + Send>),
    /// A pool thread finished the operation in this slot.
    Done(usize, i64),
}

/// Wakes a core that sleeps in the kernel.
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn new() -> std::io::Result<EventFd> {
        // SAFETY: a plain call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Takes the count, so that the descriptor is no longer readable.
    pub(crate) fn clear(&self) {
        let mut count = 0u64;
        // SAFETY: 8 bytes at `count`. Non-blocking; an empty counter is no error here.
        unsafe { libc::read(self.raw(), (&raw mut count).cast(), 8) };
    }
}

impl Bell for EventFd {
    fn ring(&self) {
        let one = 1u64;
        // SAFETY: 8 bytes at `one`. It can only fail when the counter is full, and then the core is awake.
        unsafe { libc::write(self.raw(), (&raw const one).cast(), 8) };
    }
}

/// The part of a core that other threads may touch.
pub(crate) struct Shared {
    /// Never 0, never used twice.
    id: u64,
    pub(crate) mailbox: Mailbox<Mail, EventFd>,
}

impl Shared {
    /// Puts a runnable task into the run queue, from whatever thread.
    fn schedule(&self, runnable: Runnable) {
        let remote = LOCAL.try_with(|l| {
            if l.id.get() == self.id {
                l.queue.borrow_mut().push_back(runnable);
                None
            } else {
                Some(runnable)
            }
        });
        if let Ok(Some(runnable)) = remote {
            // A core that is gone has dropped all its futures, so there is nothing left to run.
            let _ = self.mailbox.push(Mail::Run(runnable));
        }
    }
}

/// The run queue of the core that runs on this thread. It is here and not in [`Core`] because wakers are `Send`
/// and must find out cheaply whether they are at home.
struct Local {
    id: Cell<u64>,
    queue: RefCell<VecDeque<Runnable>>,
}

thread_local! {
    static LOCAL: Local = const { Local { id: Cell::new(0), queue: RefCell::new(VecDeque::new()) } };
}

fn pop_local() -> Option<Runnable> {
    LOCAL.with(|l| l.queue.borrow_mut().pop_front())
}

fn local_is_empty() -> bool {
    LOCAL.with(|l| l.queue.borrow().is_empty())
}

enum SlotState {
    Pending(Option<Waker>),
    /// The future is gone; the slot is freed when the kernel is done with it.
    Orphan,
    Done(i64),
}

/// An operation in flight.
pub(crate) struct Slot {
    /// `None` once it is done, or while a pool thread has it.
    pub(crate) op: Option<Op>,
    /// Memory for the engine's use that has to stay in place.
    pub(crate) vecs: Option<Box<crate::op::Vecs>>,
    state: SlotState,
    /// What the request of an orphan held; dropped when the kernel is done.
    guards: Guards,
    is_accept: bool,
    waits_for_peer: bool,
    changes_file: bool,
}

/// The engine that runs, and a note for the user why it is this one.
struct Chosen {
    engine: RefCell<Engine>,
    kind: crate::EngineKind,
    note: String,
}

pub(crate) struct Core {
    pub(crate) shared: Arc<Shared>,
    config: crate::Config,
    /// Empty until it is needed ([`crate::Config::for_tool`]).
    engine: OnceCell<Chosen>,
    pub(crate) slots: RefCell<Slab<Slot>>,
    timers: RefCell<Timers>,
    /// Every task that has not ended, so that they can be cancelled when the runtime ends.
    tasks: RefCell<Slab<Option<Task<()>>>>,
    pub(crate) stats: Stats,
    start: std::time::Instant,
    random: Cell<u64>,
    inline_left: Cell<u32>,
    /// The root task has ended: do not sleep any more.
    finished: Cell<bool>,
    completions: RefCell<Completions>,
    mail: RefCell<Vec<Mail>>,
    lane: crate::Lane,
}

impl Core {
    pub(crate) fn new(config: &crate::Config) -> crate::Result<Rc<Core>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let bell = EventFd::new()?;
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let core = Core {
            shared: Arc::new(Shared { id, mailbox: Mailbox::new(bell) }),
            config: config.clone(),
            engine: OnceCell::new(),
            slots: RefCell::default(),
            timers: RefCell::default(),
            tasks: RefCell::default(),
            stats: Stats::default(),
            start: std::time::Instant::now(),
            random: Cell::new(seed()),
            inline_left: Cell::new(INLINE_PER_TURN),
            finished: Cell::new(false),
            completions: RefCell::default(),
            mail: RefCell::default(),
            lane: crate::Lane::take(),
        };
        // One that was asked for by name is looked for at once.
        if !config.tool || config.engine.is_some() {
            core.choose()?;
        }
        Ok(Rc::new(core))
    }

    fn choose(&self) -> crate::Result<&Chosen> {
        let (engine, note) = Engine::new(&self.config, self.shared.mailbox.bell())?;
        let kind = engine.kind();
        Ok(self.engine.get_or_init(|| Chosen { engine: RefCell::new(engine), kind, note }))
    }

    fn chosen(&self) -> &Chosen {
        match self.engine.get() {
            Some(chosen) => chosen,
            None => self.choose().unwrap_or_else(|e| panic!("cannot start the runtime: {e}")),
        }
    }

    fn engine(&self) -> RefMut<'_, Engine> {
        self.chosen().engine.borrow_mut()
    }

    pub(crate) fn engine_kind(&self) -> crate::EngineKind {
        self.chosen().kind
    }

    pub(crate) fn engine_note(&self) -> &str {
        &self.chosen().note
    }

    /// Whether this is a program that does one thing and ends.
    pub(crate) fn is_tool(&self) -> bool {
        self.config.tool
    }

    pub(crate) fn now(&self) -> Instant {
        Instant::from_nanos(self.start.elapsed().as_nanos() as u64)
    }

    /// Where this core counts.
    pub(crate) fn lane(&self) -> &crate::Lane {
        &self.lane
    }

    /// xorshift64*: fast, good enough for jitter and test choices.
    pub(crate) fn random(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.random.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Starts a task.
    pub(crate) fn spawn(self: &Rc<Core>, future: impl Future<Output = ()> + 'static) {
        let key = self.tasks.borrow_mut().insert(None);
        let guard = TaskGuard { core: Rc::downgrade(self), key };
        let shared = self.shared.clone();
        let (runnable, task) = async_task::spawn_local(
            async move {
                let _guard = guard;
                future.await;
            },
            move |r| shared.schedule(r),
        );
        if let Some(entry) = self.tasks.borrow_mut().get_mut(key) {
            *entry = Some(task);
        }
        runnable.schedule();
    }

    /// May an operation complete right now without the ring? Counts against the turn.
    pub(crate) fn take_inline(&self) -> bool {
        let left = self.inline_left.get();
        self.inline_left.set(left.saturating_sub(1));
        left > 0
    }

    /// One turn of the loop; sleeps when there is nothing to do.
    fn turn(self: &Rc<Core>) {
        self.inline_left.set(INLINE_PER_TURN);
        for _ in 0..POLLS_PER_TURN {
            let Some(runnable) = pop_local() else { break };
            bump(&self.stats.polls);
            runnable.run();
            if self.inline_left.get() == 0 {
                break;
            }
        }
        if self.shared.mailbox.notified() {
            self.read_mail();
        }
        let next = self.timers.borrow().next();
        let mut deadline = None;
        if let Some(at) = next {
            if at <= self.now() {
                self.fire_timers();
            } else {
                deadline = Some(at);
            }
        }
        let wait = if local_is_empty() && !self.finished.get() {
            Wait::Until(deadline.map(|d| self.start + std::time::Duration::from_nanos(d.as_nanos())))
        } else {
            Wait::No
        };
        self.enter(wait);
    }

    /// Lets the engine talk to the kernel, then applies what completed.
    fn enter(&self, wait: Wait) {
        if matches!(wait, Wait::No) && self.engine.get().is_none() {
            return;
        }
        let mut done = self.completions.take();
        self.engine().turn(self, wait, &mut done);
        for (key, result) in done.drain(..) {
            self.complete(key, result);
        }
        self.completions.replace(done);
    }

    fn fire_timers(&self) {
        let now = self.now();
        loop {
            let due = self.timers.borrow_mut().pop_due(now);
            let Some(waker) = due else { return };
            waker.wake();
        }
    }

    fn read_mail(self: &Rc<Core>) {
        bump(&self.stats.wakeups);
        let mut mail = self.mail.take();
        self.shared.mailbox.drain(&mut mail);
        for m in mail.drain(..) {
            match m {
                Mail::Run(r) => LOCAL.with(|l| l.queue.borrow_mut().push_back(r)),
                Mail::Start(f) => {
                    let future = f(crate::executor::handle(self));
                    self.spawn(future);
                }
                Mail::Done(key, result) => self.complete(key, result),
            }
        }
        self.mail.replace(mail);
    }

    /// Applies a completion: frees the memory first, then wakes.
    fn complete(&self, key: usize, result: i64) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key];
        let op = slot.op.take();
        let vecs = slot.vecs.take();
        let (waker, orphan) = match std::mem::replace(&mut slot.state, SlotState::Done(result)) {
            SlotState::Pending(waker) => (waker, None),
            SlotState::Orphan => {
                let slot = slots.remove(key);
                Op::discard_result(slot.is_accept, result);
                (None, Some(slot))
            }
            SlotState::Done(_) => unreachable!("an operation completes once"),
        };
        drop(slots);
        drop(op);
        // Now that its effect is there, and its file is let go.
        drop(orphan);
        if let Some(vecs) = vecs {
            self.engine().recycle(vecs);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Puts an operation into a slot and hands it to the engine.
    fn start(&self, op: Op, waker: &Waker) -> usize {
        let slot = Slot {
            is_accept: matches!(op, Op::Accept { .. }),
            waits_for_peer: op.waits_for_peer(),
            changes_file: op.changes_file(),
            guards: Guards::default(),
            op: Some(op),
            vecs: None,
            state: SlotState::Pending(Some(waker.clone())),
        };
        let key = self.slots.borrow_mut().insert(slot);
        self.engine().submit(self, key);
        key
    }

    /// Sends the operation of a slot to the pool.
    pub(crate) fn to_pool(&self, key: usize) {
        let Some(op) = self.slots.borrow_mut()[key].op.take() else {
            unreachable!("a new slot has its operation")
        };
        bump(&self.stats.pool_jobs);
        let shared = self.shared.clone();
        workers::submit(
            op.waits_for(),
            Box::new(move || {
                let result = op.run_blocking();
                // A core waits for its slots before it goes, so somebody reads this.
                let _ = shared.mailbox.push(Mail::Done(key, result));
            }),
        );
    }

    /// The result of the operation, if it is there; else remembers who wants it.
    fn poll_slot(&self, key: usize, cx: &mut Context<'_>) -> Poll<i64> {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key];
        match &mut slot.state {
            SlotState::Done(result) => {
                let result = *result;
                slots.remove(key);
                Poll::Ready(result)
            }
            SlotState::Pending(Some(w)) if w.will_wake(cx.waker()) => Poll::Pending,
            SlotState::Pending(w) => {
                *w = Some(cx.waker().clone());
                Poll::Pending
            }
            SlotState::Orphan => unreachable!("an orphan has no future"),
        }
    }

    /// Nobody wants the result any more.
    fn abandon(&self, key: usize) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key];
        match std::mem::replace(&mut slot.state, SlotState::Orphan) {
            SlotState::Done(result) => {
                let slot = slots.remove(key);
                drop(slots);
                Op::discard_result(slot.is_accept, result);
            }
            SlotState::Pending(waker) => {
                let cancel = slot.waits_for_peer;
                if slot.changes_file {
                    slot.guards = Guards::of_given_up();
                }
                drop(slots);
                drop(waker);
                if cancel {
                    self.engine().cancel(self, key);
                }
            }
            SlotState::Orphan => unreachable!("abandoned twice"),
        }
    }

    /// Runs until `root` has completed, then ends every other task and waits for the kernel to let go of the memory.
    pub(crate) fn run<T: 'static>(self: &Rc<Core>, root: impl Future<Output = T> + 'static) -> T {
        let _here = Here::enter(self);
        let out = Rc::new(Cell::new(None));
        let (result, core) = (out.clone(), Rc::downgrade(self));
        self.finished.set(false);
        self.spawn(async move {
            result.set(Some(root.await));
            if let Some(core) = core.upgrade() {
                core.finished.set(true);
            }
        });
        loop {
            if let Some(value) = out.take() {
                return value;
            }
            self.turn();
        }
    }

    /// Cancels all tasks. Their destructors may start new ones; these are cancelled as well.
    fn cancel_tasks(&self) {
        loop {
            let tasks: Vec<_> = self.tasks.take().into_iter().collect();
            if tasks.is_empty() && local_is_empty() {
                return;
            }
            // Dropping a task schedules it; running it then only drops its future.
            drop(tasks);
            while let Some(r) = pop_local() {
                drop(r);
            }
        }
    }

    /// Waits until no operation is in flight any more. Those that wait for a peer are cancelled.
    fn drain(self: &Rc<Core>) {
        let waiting: Vec<_> = {
            let slots = self.slots.borrow();
            slots.iter().filter(|(_, s)| s.waits_for_peer && s.op.is_some()).map(|(k, _)| k).collect()
        };
        for key in waiting {
            self.engine().cancel(self, key);
        }
        let in_flight = || self.slots.borrow().iter().any(|(_, s)| !matches!(s.state, SlotState::Done(_)));
        while in_flight() {
            if self.shared.mailbox.notified() {
                self.read_mail();
            }
            if in_flight() {
                self.enter(Wait::Until(None));
            }
        }
    }
}

/// The core runs on this thread for as long as this lives.
struct Here<'a>(&'a Rc<Core>);

impl<'a> Here<'a> {
    fn enter(core: &'a Rc<Core>) -> Here<'a> {
        LOCAL.with(|l| {
            assert_eq!(l.id.get(), 0, "a runtime is running on this thread already");
            l.id.set(core.shared.id);
        });
        Here(core)
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.0.cancel_tasks();
        self.0.drain();
        // Nobody may add tasks from here on; what came last is dropped on this thread, where it belongs.
        for mail in self.0.shared.mailbox.close() {
            drop(mail);
        }
        self.0.cancel_tasks();
        LOCAL.with(|l| l.id.set(0));
    }
}

struct TaskGuard {
    core: Weak<Core>,
    key: usize,
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        let Some(core) = self.core.upgrade() else { return };
        let task = core.tasks.borrow_mut().try_remove(self.key).flatten();
        if let Some(task) = task {
            task.detach();
        }
    }
}

/// A future for one operation. It is submitted when first polled. Dropping it before that does nothing; dropping
/// it later lets the operation run on, except that waiting for a peer is cancelled.
#[must_use = "an operation starts when it is awaited"]
pub(crate) struct Submit {
    core: Rc<Core>,
    state: State,
}

enum State {
    New(Op),
    InFlight(usize),
    Finished,
}

impl Submit {
    pub(crate) fn new(core: &Rc<Core>, op: Op) -> Submit {
        Submit { core: core.clone(), state: State::New(op) }
    }
}

impl Future for Submit {
    type Output = i64;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i64> {
        // The usual case first, without moving the operation about.
        if let State::InFlight(key) = self.state {
            let out = self.core.poll_slot(key, cx);
            if out.is_ready() {
                self.state = State::Finished;
            }
            return out;
        }
        match std::mem::replace(&mut self.state, State::Finished) {
            State::New(op) => {
                let key = self.core.start(op, cx.waker());
                self.state = State::InFlight(key);
                Poll::Pending
            }
            State::InFlight(_) | State::Finished => unreachable!("polled after completion"),
        }
    }
}

impl Drop for Submit {
    fn drop(&mut self) {
        if let State::InFlight(key) = self.state {
            self.core.abandon(key);
        }
    }
}

/// A future that completes at its deadline.
pub(crate) struct Sleep {
    pub(crate) core: Rc<Core>,
    pub(crate) deadline: Instant,
    pub(crate) key: Option<TimerKey>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.deadline {
            return Poll::Ready(());
        }
        match self.key {
            Some(key) => self.core.timers.borrow_mut().update(key, cx.waker()),
            None => {
                let key = self.core.timers.borrow_mut().insert(self.deadline, cx.waker().clone());
                self.key = Some(key);
            }
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.core.timers.borrow_mut().remove(key);
        }
    }
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's random hash keys.
    std::collections::hash_map::RandomState::new().build_hasher().finish() | 1
}
