//! What a job's work does its work with: [`JobCx`].
//!
//! A work that copies looks like this:
//!
//! ```text
//! loop {
//!     cx.checkpoint().await?;              // nothing of it is in flight here
//!     while more to do and not cx.wants_attention() {
//!         start a piece:  cx.throttle(bytes).await?;
//!                         let token = cx.edge(0).begin().await?;   // for this piece only
//!                         read, write;  on an error: cx.failed(..).await?
//!                         cx.progress_add(bytes);
//!     }
//!     wait for the pieces in flight
//! }
//! ```
//!
//! A token is never held over a wait for the user, for time, or for another piece: whoever changes
//! the graph waits for tokens.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::UserEdge;
use dolmen_rt::{Instant, Rt};
use dolmen_types::{Error, ErrorKind, OpId, Result};
use event_listener::EventListener;

use crate::work::no_edge;
use crate::{Action, Again, IoStatus, Job, JobEvent, OnError, Progress, Side, Status, Wish};

/// A running job, from the view of its work.
pub struct JobCx {
    job: Rc<Job>,
    edges: Vec<Arc<UserEdge>>,
}

impl JobCx {
    pub(crate) fn new(job: Rc<Job>, edges: Vec<Arc<UserEdge>>) -> JobCx {
        JobCx { job, edges }
    }

    /// The job's id.
    pub fn id(&self) -> &OpId {
        self.job.id()
    }

    /// The runtime.
    pub fn rt(&self) -> &Rt {
        &self.job.rt
    }

    /// An edge of the job, counted in the order in which [`Work::begin`](crate::Work::begin) added them.
    ///
    /// # Panics
    /// When there are not so many: a mistake in the work.
    pub fn edge(&self, i: usize) -> &Arc<UserEdge> {
        match self.edges.get(i) {
            Some(e) => e,
            None => panic!("{}", no_edge(self.id(), i)),
        }
    }

    /// Whether [`JobCx::checkpoint`] would wait or fail: then let what is in flight finish, start nothing
    /// new, and call it.
    pub fn wants_attention(&self) -> bool {
        self.job.pause.get() || self.job.cancelled.get()
    }

    /// Waits while the job is paused, and lets others on the core have a turn. To be called with
    /// nothing of the job in flight, or by a piece that starts nothing.
    ///
    /// # Errors
    /// `Cancelled`: the work is to end.
    pub async fn checkpoint(&self) -> Result<()> {
        futures_lite::future::yield_now().await;
        loop {
            let listener = self.job.changed.listen();
            if self.job.cancelled.get() {
                self.job.wake_up();
                return Err(cancelled());
            }
            if !self.job.pause.get() {
                self.job.wake_up();
                return Ok(());
            }
            match self.job.status() {
                Status::Running => self.job.become_(Status::Paused),
                Status::Ready => self.job.become_(Status::Standby),
                _ => {}
            }
            let _rest = Rest::new(&self.job);
            listener.await;
        }
    }

    /// Waits until a piece of this many bytes may start under the speed limit, and while the job is
    /// paused. To be called before a piece takes a token.
    ///
    /// # Errors
    /// `Cancelled`.
    pub async fn throttle(&self, bytes: u64) -> Result<()> {
        loop {
            let listener = self.job.changed.listen();
            if self.job.cancelled.get() {
                return Err(cancelled());
            }
            let (mut limit, now) = (self.job.limit.get(), self.job.rt.now());
            let opens_at = limit.opens_at(now);
            if self.job.pause.get() {
                self.checkpoint().await?;
                continue;
            }
            if opens_at <= now {
                limit.admit(bytes, now);
                self.job.limit.set(limit);
                return Ok(());
            }
            self.rest_until(opens_at, listener).await;
        }
    }

    /// The limit in bytes per second; 0 for none. It may change at any time.
    pub fn speed(&self) -> u64 {
        self.job.speed()
    }

    /// Waits for a point in time, or less if the user asks for something.
    ///
    /// # Errors
    /// `Cancelled`.
    pub async fn sleep_until(&self, deadline: Instant) -> Result<()> {
        let listener = self.job.changed.listen();
        if !self.job.cancelled.get() {
            self.rest_until(deadline, listener).await;
        }
        if self.job.cancelled.get() { Err(cancelled()) } else { Ok(()) }
    }

    /// Waits for something that is not the job's own work: it counts as idle meanwhile.
    pub(crate) async fn resting(&self, wait: impl Future<Output = ()>) {
        let _rest = Rest::new(&self.job);
        wait.await;
    }

    async fn rest_until(&self, deadline: Instant, listener: EventListener) {
        let _rest = Rest::new(&self.job);
        futures_lite::future::or(self.job.rt.sleep_until(deadline), listener).await;
    }

    /// What the user wants of the job, once it is ready.
    pub fn wish(&self) -> Wish {
        self.job.wish.get()
    }

    /// Completes when the user asks for something after this call: pause, resume, cancel, complete, another speed,
    /// other options. Get it first, then look at [`JobCx::wish`] and [`JobCx::wants_attention`], then wait.
    pub fn changed(&self) -> EventListener {
        self.job.changed.listen()
    }

    /// Source and target are in step: from now on the job can be completed.
    pub fn ready(&self) {
        match self.job.status() {
            Status::Running => self.job.become_ready(),
            Status::Paused => self.job.ready_later.set(true),
            _ => {}
        }
    }

    /// More is done.
    pub fn progress_add(&self, done: u64) {
        let Progress { current, total } = self.job.progress();
        let current = current.saturating_add(done);
        self.job.set_progress(Progress { current, total: total.max(current) });
    }

    /// So much is still to be done, as far as is known now.
    pub fn set_remaining(&self, remaining: u64) {
        let Progress { current, .. } = self.job.progress();
        self.job.set_progress(Progress { current, total: current.saturating_add(remaining) });
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.job.progress()
    }

    /// A request has failed: tells clients, and does what the policy says. With [`Again::Retry`] the user has
    /// resumed the job meanwhile.
    ///
    /// # Errors
    /// The same error when it ends the job; `Cancelled` when the job was cancelled while it had stopped.
    pub async fn failed(&self, side: Side, policy: OnError, error: Error) -> Result<Again> {
        if error.kind() == ErrorKind::Cancelled {
            return Err(error);
        }
        let action = policy.action(&error);
        self.job.emit(JobEvent::Error { side, action });
        match action {
            Action::Report => Err(error),
            Action::Ignore => Ok(Again::Skip),
            Action::Stop => {
                let full = error.kind() == ErrorKind::NoSpace;
                self.job.set_io_status(if full { IoStatus::NoSpace } else { IoStatus::Failed });
                self.job.pause.set(true);
                self.job.changed();
                self.checkpoint().await?;
                Ok(Again::Retry)
            }
        }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the job was cancelled")
}

/// Counts a future of the job that waits for time or for the user.
struct Rest<'a>(&'a Cell<u32>);

impl<'a> Rest<'a> {
    fn new(job: &'a Job) -> Rest<'a> {
        job.resting.set(job.resting.get() + 1);
        Rest(&job.resting)
    }
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl fmt::Debug for JobCx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobCx({:?})", self.job)
    }
}
