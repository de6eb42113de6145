//! A job: where it is in its life, what a user may ask of it, and what it tells.
//!
//! A [`Job`] is shared by three parties on one core: whoever executes commands (the verbs; they
//! never wait), the job's own task (a [`JobCx`](crate::JobCx)), and the control task, which makes
//! its end visible (a [`Group`](crate::Group)). The tables of [`Status`] decide
//! what is possible; nothing here looks at what a job copies.
//!
//! The invariant: the status changes in one function, which raises the event, so
//! that clients see every step of the table and no other.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::UserEdge;
use dolmen_rt::{Instant, Rt};
use dolmen_types::{Error, ErrorKind, OpId, Options, Result};
use event_listener::Event;

use crate::cx::JobCx;
use crate::rate::Limit;
use crate::work::Ended;
use crate::{Action, Details, Group, JobKind, Side, Status, Verb, Work};

/// What all jobs can be asked for when they are made.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Unique among all operations.
    pub id: OpId,
    /// Bytes per second; 0 for no limit.
    pub speed: u64,
    /// Whether the result becomes visible without being asked for.
    pub auto_finalize: bool,
    /// Whether the job is forgotten when it has ended.
    pub auto_dismiss: bool,
}

impl JobOptions {
    /// No limit; finalized and dismissed without being asked.
    pub fn new(id: OpId) -> JobOptions {
        JobOptions { id, speed: 0, auto_finalize: true, auto_dismiss: true }
    }
}

/// What a user wants of a job that is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// To go on.
    #[default]
    Nothing,
    /// To end, and its result to take effect (a mirror: the pivot).
    Complete,
    /// To end and leave everything where it is (a mirror: source and copy).
    Keep,
}

/// How its input and output went lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// Well.
    #[default]
    Ok,
    /// It stopped since something failed.
    Failed,
    /// It stopped since there was no space left.
    NoSpace,
}

impl IoStatus {
    /// The word that QMP clients know.
    pub const fn as_str(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

/// How far a job has come, in bytes (or in what the job counts).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub current: u64,
    /// Done and still to be done, as far as is known now.
    pub total: u64,
}

/// What a user asks of a job.
#[derive(Clone, Debug)]
pub enum Demand {
    /// See [`Job::pause`].
    Pause,
    /// See [`Job::resume`].
    Resume,
    /// See [`Job::cancel`].
    Cancel {
        /// Without what it has.
        force: bool,
    },
    /// See [`Job::complete`].
    Complete,
    /// See [`Job::set_speed`].
    SetSpeed(u64),
    /// See [`Job::change`].
    Change(Options),
    /// See [`Group::finalize`].
    Finalize,
    /// See [`Job::dismiss`].
    Dismiss,
}

/// Something that clients are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// It has come to another state.
    Status(Status),
    /// Source and target are in step; [`Verb::Complete`] is possible.
    Ready,
    /// It waits for [`Verb::Finalize`].
    Pending,
    /// It has ended; with the error if it failed.
    Completed(Option<String>),
    /// It was cancelled.
    Cancelled,
    /// A request failed.
    Error {
        /// Where.
        side: Side,
        /// What the job does about it.
        action: Action,
    },
}

/// Receives events, at the moment at which they happen.
pub type Emit = Rc<dyn Fn(&Job, JobEvent)>;

/// Receives jobs whose group has to be looked at: see [`Group::advance`].
pub type Attention = Rc<dyn Fn(Rc<Job>)>;

/// How long the pace of a job is measured before it is believed.
const PACE: Duration = Duration::from_millis(500);

/// How fast a job has been lately.
#[derive(Clone, Copy, Debug)]
struct Pace {
    since: Instant,
    done: u64,
    bytes_per_sec: Option<f64>,
}

/// A job. See the module's head.
pub struct Job {
    options: JobOptions,
    work: RefCell<Rc<dyn Work>>,
    pub(crate) rt: Rt,
    emit: Emit,
    attention: Attention,
    status: Cell<Status>,
    pub(crate) limit: Cell<Limit>,
    progress: Cell<Progress>,
    pace: Cell<Pace>,
    /// The user, or an error that stops the job, wants it to pause.
    pub(crate) pause: Cell<bool>,
    /// It is to end without a result.
    pub(crate) cancelled: Cell<bool>,
    /// It became ready while it was paused.
    pub(crate) ready_later: Cell<bool>,
    pub(crate) wish: Cell<Wish>,
    io_status: Cell<IoStatus>,
    /// How many of its futures wait for time or for the user.
    pub(crate) resting: Cell<u32>,
    /// What its work came to, once it has ended.
    pub(crate) outcome: RefCell<Option<Result<()>>>,
    /// Why it failed; set while it is aborting.
    pub(crate) error: RefCell<Option<Error>>,
    pub(crate) group: RefCell<Weak<Group>>,
    /// Raised by every verb.
    pub(crate) changed: Event,
}

impl Job {
    /// A job that nobody knows of yet. `emit` gets its events; `attention` is called when its
    /// group has to be looked at by the owner of the graph.
    pub fn new(
        options: JobOptions,
        work: Box<dyn Work>,
        rt: &Rt,
        emit: Emit,
        attention: Attention,
    ) -> Rc<Job> {
        let limit = Cell::new(Limit::new(options.speed));
        let now = rt.now();
        Rc::new(Job {
            options,
            work: RefCell::new(work.into()),
            rt: rt.clone(),
            emit,
            attention,
            status: Cell::new(Status::Undefined),
            limit,
            progress: Cell::default(),
            pace: Cell::new(Pace { since: now, done: 0, bytes_per_sec: None }),
            pause: Cell::new(false),
            cancelled: Cell::new(false),
            ready_later: Cell::new(false),
            wish: Cell::default(),
            io_status: Cell::default(),
            resting: Cell::new(0),
            outcome: RefCell::new(None),
            error: RefCell::new(None),
            group: RefCell::new(Weak::new()),
            changed: Event::new(),
        })
    }

    /// Its id, which is the id of its operation.
    pub fn id(&self) -> &OpId {
        &self.options.id
    }

    /// What it does.
    pub(crate) fn work(&self) -> Rc<dyn Work> {
        self.work.borrow().clone()
    }

    /// Lets go of everything that its work holds. A job that has ended may wait for `job-dismiss` for as long as it
    /// likes; its nodes, and with them files and their locks, must not wait with it.
    pub(crate) fn let_go(&self) {
        let ended = Ended::new(&*self.work());
        *self.work.borrow_mut() = Rc::new(ended);
    }

    /// What kind of job it is.
    pub fn kind(&self) -> &'static JobKind {
        self.work().kind()
    }

    /// What it does to what, and its state: "mirror of 'top', ready".
    pub fn detail(&self) -> String {
        match self.status() {
            Status::Undefined | Status::Created => self.work().detail(),
            status => format!("{}, {}", self.work().detail(), status.as_str()),
        }
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.status.get()
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.progress.get()
    }

    /// Its limit in bytes per second; 0 for none.
    pub fn speed(&self) -> u64 {
        self.limit.get().speed()
    }

    /// How its input and output went lately.
    pub fn io_status(&self) -> IoStatus {
        self.io_status.get()
    }

    /// Why it failed, once it has.
    pub fn error(&self) -> Option<String> {
        self.error.borrow().as_ref().map(error_text)
    }

    /// Whether the user or an error wants it to pause.
    pub fn is_pausing(&self) -> bool {
        self.pause.get()
    }

    /// Whether it does something right now, rather than wait for time or for the user.
    pub fn is_busy(&self) -> bool {
        matches!(self.status(), Status::Running | Status::Ready)
            && self.resting.get() == 0
            && self.outcome.borrow().is_none()
    }

    /// Whether its result becomes visible without being asked for.
    pub fn auto_finalize(&self) -> bool {
        self.options.auto_finalize
    }

    /// Whether it is forgotten when it has ended.
    pub fn auto_dismiss(&self) -> bool {
        self.options.auto_dismiss
    }

    /// What its kind tells beyond that.
    pub fn details(&self) -> Details {
        self.work().details()
    }

    /// How long it will take from now on, at its present pace; `None` while that is not known.
    pub fn estimated_remaining(&self) -> Option<Duration> {
        let Progress { current, total } = self.progress();
        let pace = self.pace.get().bytes_per_sec.filter(|p| *p > 0.0)?;
        if self.status() != Status::Running {
            return None;
        }
        Duration::try_from_secs_f64(total.saturating_sub(current) as f64 / pace).ok()
    }

    pub(crate) fn emit(&self, event: JobEvent) {
        (self.emit)(self, event);
    }

    /// The one place where the status changes.
    pub(crate) fn become_(&self, to: Status) {
        self.status.set(self.status.get().step(to));
        self.emit(JobEvent::Status(to));
    }

    pub(crate) fn needs_attention(self: &Rc<Job>) {
        (self.attention)(self.clone());
    }

    pub(crate) fn set_progress(&self, progress: Progress) {
        self.progress.set(progress);
        let (mut pace, now) = (self.pace.get(), self.rt.now());
        let time = now.since(pace.since);
        if time >= PACE {
            let lately = progress.current.saturating_sub(pace.done) as f64 / time.as_secs_f64();
            // Half of what it was: a job that slows down is noticed within seconds.
            let mixed = pace.bytes_per_sec.map_or(lately, |before| (before + lately) / 2.0);
            pace = Pace { since: now, done: progress.current, bytes_per_sec: Some(mixed) };
            self.pace.set(pace);
        }
    }

    pub(crate) fn set_io_status(&self, status: IoStatus) {
        self.io_status.set(status);
    }

    pub(crate) fn changed(&self) {
        self.changed.notify(usize::MAX);
    }

    /// Whether its work has ended.
    pub(crate) fn has_run(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    /// Shows the job to clients: undefined to created.
    pub fn announce(&self) {
        self.become_(Status::Created);
    }

    /// Starts the work of a job that has been announced and whose operation has been published with
    /// these edges.
    pub fn start(self: &Rc<Job>, edges: Vec<Arc<UserEdge>>) {
        self.become_(Status::Running);
        let job = self.clone();
        self.pace.set(Pace { since: self.rt.now(), done: 0, bytes_per_sec: None });
        self.rt.spawn(async move {
            let cx = JobCx::new(job.clone(), edges);
            let work = job.work();
            let mut outcome = work.run(&cx).await;
            if outcome.is_ok() {
                // A pause that was asked for at the last moment holds, and so does the end.
                outcome = cx.checkpoint().await;
            }
            drop((cx, work));
            job.wake_up();
            *job.outcome.borrow_mut() = Some(outcome);
            job.needs_attention();
        });
    }

    /// From paused to running, from standby to ready; nothing in other states.
    pub(crate) fn wake_up(&self) {
        match self.status() {
            Status::Paused => self.become_(Status::Running),
            Status::Standby => self.become_(Status::Ready),
            _ => {}
        }
        if self.ready_later.take() && self.status() == Status::Running {
            self.become_ready();
        }
    }

    pub(crate) fn become_ready(&self) {
        self.become_(Status::Ready);
        self.emit(JobEvent::Ready);
    }

    fn may(&self, verb: Verb) -> Result<()> {
        verb.check(self.id(), self.status())
    }

    /// Whether it can be asked for this now. Nothing changes; each demand is checked here before it is met.
    ///
    /// # Errors
    /// `InvalidInput` when its state does not permit it; what the work says.
    pub fn check(&self, demand: &Demand) -> Result<()> {
        match demand {
            Demand::Pause => {
                self.may(Verb::Pause)?;
                if self.pause.get() {
                    return Err(refused("Job is already paused"));
                }
            }
            Demand::Resume => {
                if !self.pause.get() {
                    return Err(refused("Can't resume a job that was not paused"));
                }
                self.may(Verb::Resume)?;
            }
            Demand::Cancel { force } => {
                self.may(Verb::Cancel)?;
                if !force && self.pause.get() {
                    let text = format!("The block job for device '{}' is currently paused", self.id());
                    return Err(refused(text).remedy("resume it first, or cancel it with force"));
                }
            }
            Demand::Complete => {
                self.may(Verb::Complete)?;
                if self.cancelled.get() || self.wish.get() == Wish::Keep {
                    return Err(refused(format!("The active block job '{}' cannot be completed", self.id())));
                }
                self.work().may_complete()?;
            }
            Demand::SetSpeed(_) => self.may(Verb::SetSpeed)?,
            Demand::Change(options) => {
                self.may(Verb::Change)?;
                drop(self.work().change(options.clone())?);
            }
            Demand::Finalize => self.may(Verb::Finalize)?,
            Demand::Dismiss => self.may(Verb::Dismiss)?,
        }
        Ok(())
    }

    /// Asks it to stop for now. It is paused when what is in flight has finished.
    ///
    /// # Errors
    /// `InvalidInput` when its state does not permit it, or it is paused already.
    pub fn pause(&self) -> Result<()> {
        self.check(&Demand::Pause)?;
        self.pause.set(true);
        self.changed();
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// As [`Job::pause`], when it is not paused.
    pub fn resume(&self) -> Result<()> {
        self.check(&Demand::Resume)?;
        self.pause.set(false);
        self.io_status.set(IoStatus::Ok);
        self.changed();
        Ok(())
    }

    /// Ends it without a result. A job that is ready and is not forced ends with what
    /// it has: [`Wish::Keep`].
    ///
    /// # Errors
    /// As [`Job::pause`]; also when it is paused and not forced.
    pub fn cancel(self: &Rc<Job>, force: bool) -> Result<()> {
        self.check(&Demand::Cancel { force })?;
        if !force && self.status() == Status::Ready && !self.has_run() {
            self.wish.set(Wish::Keep);
        } else {
            self.force_cancel();
        }
        self.changed();
        Ok(())
    }

    /// Cancels whatever state it is in before its end.
    pub(crate) fn force_cancel(self: &Rc<Job>) {
        self.cancelled.set(true);
        self.pause.set(false);
        self.changed();
        if self.has_run() {
            self.needs_attention();
        }
    }

    /// Ends a ready job with its result; one that is paused, when it is resumed.
    ///
    /// # Errors
    /// As [`Job::pause`]; also when it ends already.
    pub fn complete(&self) -> Result<()> {
        self.check(&Demand::Complete)?;
        self.wish.set(Wish::Complete);
        self.changed();
        Ok(())
    }

    /// Limits its speed, in bytes per second; 0 for no limit.
    ///
    /// # Errors
    /// As [`Job::pause`].
    pub fn set_speed(&self, speed: u64) -> Result<()> {
        self.check(&Demand::SetSpeed(speed))?;
        let mut limit = self.limit.get();
        limit.set_speed(speed, self.rt.now());
        self.limit.set(limit);
        self.changed();
        Ok(())
    }

    /// Changes options of its work.
    ///
    /// # Errors
    /// As [`Job::pause`], and what the work says.
    pub fn change(&self, options: Options) -> Result<()> {
        self.may(Verb::Change)?;
        self.work().change(options)?();
        self.changed();
        Ok(())
    }

    /// Forgets it; it is then to be dropped.
    ///
    /// # Errors
    /// As [`Job::pause`].
    pub fn dismiss(&self) -> Result<()> {
        self.check(&Demand::Dismiss)?;
        self.become_(Status::Null);
        Ok(())
    }

    /// Cancels it because the program ends; harmless in any state.
    pub fn give_up(self: &Rc<Job>) {
        if self.may(Verb::Cancel).is_ok() {
            self.force_cancel();
        }
    }

    /// The group that it ends with, once it has one.
    pub fn group(&self) -> Option<Rc<Group>> {
        self.group.borrow().upgrade()
    }
}

fn refused(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

/// An error as clients see it: the words of the operating system first, since these are what
/// programs look for.
fn error_text(error: &Error) -> String {
    if error.kind() == ErrorKind::Cancelled {
        return "Operation canceled".into();
    }
    let text = error.to_string();
    if !matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace) {
        return text;
    }
    let system = std::io::Error::from_raw_os_error(error.errno()).to_string();
    let words = without_number(&system);
    let rest = without_number(&text);
    match rest.strip_suffix(words).map(|r| r.trim_end_matches([':', ' '])) {
        Some("") => words.to_owned(),
        Some(rest) => format!("{words}: {rest}"),
        None => format!("{words}: {rest}"),
    }
}

fn without_number(text: &str) -> &str {
    text.rsplit_once(" (os error").map_or(text, |(words, _)| words)
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({} {}, {})", self.kind().name, self.id(), self.status().as_str())
    }
}
