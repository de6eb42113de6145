//! How jobs begin and end together.
//!
//! ```text
//!   prepare: add_op, Work::begin, solve      (a draft; several jobs may share it)
//!   commit of the draft, by the caller
//!   launch: announce all, start all
//!        ...the work runs...
//!   advance: waiting until all of the group wait -> pending until finalized
//!            -> settle all -> end all in one draft -> one commit -> concluded -> null
//!            one fails or is cancelled: the others are cancelled, and all abort in one commit
//! ```
//!
//! A job that was started alone is a group of one. The end of a group is one commit, so either
//! all results are visible or none.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use dolmen_graph::{Draft, GraphOwner, NodeOpener, OpInfo};
use dolmen_types::{Error, ErrorKind, Result};

use crate::{BeginCx, Ending, Job, JobEvent, SettleCx, Status};

/// Puts a job's operation and everything that it needs into a draft. Publishes nothing, and tells
/// nobody.
///
/// # Errors
/// `AlreadyExists` for the id, what the work says, or the refusal of the access control. The draft is
/// then of no more use.
pub async fn prepare(job: &Rc<Job>, draft: &mut Draft, opener: &NodeOpener<'_>) -> Result<()> {
    let op = job.id();
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "job".into(),
        detail: job.detail(),
        since: None,
        ends_with: Some(match job.kind().is_completed {
            true => format!("finish the job (job-complete or job-cancel '{op}')"),
            false => format!("wait for the job to end, or end it (job-cancel '{op}')"),
        }),
        instead_of_writing: None,
    })?;
    let work = job.work();
    work.begin(BeginCx { op, draft: &mut *draft, opener, rt: &job.rt }).await?;
    // Refusals are worded for a newcomer; from here on it has a start time.
    draft.solve()?;
    draft.mark_started(op);
    Ok(())
}

/// Starts jobs whose draft has been published, as one group.
pub fn launch(jobs: Vec<Rc<Job>>, owner: &GraphOwner) -> Rc<Group> {
    let group = Rc::new(Group {
        members: RefCell::new(Vec::new()),
        finalize: Cell::new(false),
        aborting: Cell::new(false),
        concluded: Cell::new(false),
    });
    jobs.iter().for_each(|j| j.announce());
    for job in &jobs {
        *job.group.borrow_mut() = Rc::downgrade(&group);
        job.start(owner.edges(job.id()).collect());
    }
    *group.members.borrow_mut() = jobs;
    group
}

/// Jobs that end together. It holds its members until they have ended.
#[derive(Debug)]
pub struct Group {
    members: RefCell<Vec<Rc<Job>>>,
    /// Somebody has asked for the end.
    finalize: Cell<bool>,
    /// One has failed: none succeeds.
    aborting: Cell<bool>,
    concluded: Cell<bool>,
}

impl Group {
    /// Its jobs, until they have ended.
    pub fn members(&self) -> Vec<Rc<Job>> {
        self.members.borrow().clone()
    }

    /// Whether all its jobs have ended.
    pub fn is_concluded(&self) -> bool {
        self.concluded.get()
    }

    /// Makes the results of pending jobs visible.
    ///
    /// # Errors
    /// As [`Group::advance`].
    pub async fn finalize(&self, owner: &mut GraphOwner) -> Result<()> {
        self.finalize.set(true);
        self.advance(owner).await
    }

    /// Moves the jobs on as far as they can go now. To be called by the owner of the graph whenever one
    /// of them asks for attention; calling it more often is harmless.
    ///
    /// # Errors
    /// When the end of aborted jobs could not be published (a request that did not
    /// finish in time, for example): the jobs are still aborting, and it is to be tried again. Why jobs
    /// fail is not an error here; they carry it themselves.
    pub async fn advance(&self, owner: &mut GraphOwner) -> Result<()> {
        if self.concluded.get() {
            return Ok(());
        }
        let mut members = self.members.borrow().clone();
        // Clients know it so: the youngest ends first.
        members.reverse();
        for job in members.iter().filter(|j| j.has_run()) {
            self.look_at(job);
        }
        if self.aborting.get() {
            return self.abort(&members, owner).await;
        }
        if !members.iter().all(|j| matches!(j.status(), Status::Waiting | Status::Pending)) {
            return Ok(());
        }
        for job in members.iter().filter(|j| j.status() == Status::Waiting) {
            job.become_(Status::Pending);
            if !job.auto_finalize() {
                job.emit(JobEvent::Pending);
            }
        }
        if !self.finalize.get() && !members.iter().all(|j| j.auto_finalize()) {
            return Ok(());
        }
        match publish_success(&members, owner).await {
            Ok(()) => {
                self.conclude(&members, Ending::Success);
                Ok(())
            }
            Err((culprit, e)) => {
                let victims = members.iter().filter(|j| culprit.as_ref().is_none_or(|c| Rc::ptr_eq(c, j)));
                victims.for_each(|j| *j.error.borrow_mut() = Some(e.duplicate()));
                self.aborting.set(true);
                self.abort(&members, owner).await
            }
        }
    }

    /// A job whose work has ended: is it waiting, or the end of the group?
    fn look_at(&self, job: &Rc<Job>) {
        let failed = match &*job.outcome.borrow() {
            Some(Err(e)) => Some(e.duplicate()),
            Some(Ok(())) | None => None,
        };
        match job.status() {
            Status::Running | Status::Ready if failed.is_none() && !job.cancelled.get() => {
                job.become_(Status::Waiting);
            }
            Status::Running | Status::Ready | Status::Waiting | Status::Pending => {
                if failed.is_some() || job.cancelled.get() {
                    let error = if job.cancelled.get() { None } else { failed };
                    job.error.borrow_mut().get_or_insert_with(|| error.unwrap_or_else(cancelled));
                    self.aborting.set(true);
                    job.become_(Status::Aborting);
                }
            }
            Status::Undefined
            | Status::Created
            | Status::Paused
            | Status::Standby
            | Status::Aborting
            | Status::Concluded
            | Status::Null => {}
        }
    }

    async fn abort(&self, members: &[Rc<Job>], owner: &mut GraphOwner) -> Result<()> {
        for job in members {
            if job.has_run() {
                if matches!(job.status(), Status::Running | Status::Ready | Status::Waiting | Status::Pending)
                {
                    job.error.borrow_mut().get_or_insert_with(cancelled);
                    job.become_(Status::Aborting);
                }
            } else if !job.cancelled.get() {
                job.force_cancel();
            }
        }
        if !members.iter().all(|j| j.status() == Status::Aborting) {
            // The others come here when they have noticed.
            return Ok(());
        }
        let mut draft = owner.draft();
        for job in members {
            // A work has nothing to say about an abort; and if it had, its operation would go all the same.
            let _ = job.work().end(job.id(), &mut draft, Ending::Abort);
            draft.remove_op(job.id());
        }
        owner.commit(draft).await?;
        self.conclude(members, Ending::Abort);
        Ok(())
    }

    /// The end is published: tells everybody.
    fn conclude(&self, members: &[Rc<Job>], ending: Ending) {
        self.concluded.set(true);
        for job in members {
            let cancelled = job.error.borrow().as_ref().is_some_and(|e| e.kind() == ErrorKind::Cancelled);
            job.emit(match ending {
                Ending::Abort if cancelled => JobEvent::Cancelled,
                Ending::Abort => JobEvent::Completed(job.error()),
                Ending::Success => JobEvent::Completed(None),
            });
            job.let_go();
            job.become_(Status::Concluded);
            if job.auto_dismiss() {
                job.become_(Status::Null);
            }
        }
        self.members.borrow_mut().clear();
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the job was cancelled")
}

/// Settles all, then publishes all ends at once. The job that failed comes with the error, if it
/// was one of them.
async fn publish_success(
    members: &[Rc<Job>],
    owner: &mut GraphOwner,
) -> Result<(), (Option<Rc<Job>>, Error)> {
    for job in members {
        let cx = SettleCx { op: job.id(), owner, rt: &job.rt };
        job.work().settle(cx).await.map_err(|e| (Some(job.clone()), e))?;
    }
    let mut draft = owner.draft();
    for job in members {
        job.work().end(job.id(), &mut draft, Ending::Success).map_err(|e| (Some(job.clone()), e))?;
        draft.remove_op(job.id());
    }
    owner.commit(draft).await.map_err(|e| (None, e))?;
    Ok(())
}

/// Live jobs by id.
#[derive(Debug, Default)]
pub struct JobTable {
    jobs: RefCell<Vec<Rc<Job>>>,
    /// Groups are held by their jobs weakly, and until they have concluded by this.
    groups: RefCell<Vec<Rc<Group>>>,
}

impl JobTable {
    /// Adds jobs that were launched.
    pub fn insert(&self, jobs: &[Rc<Job>], group: Rc<Group>) {
        self.jobs.borrow_mut().extend(jobs.iter().cloned());
        self.groups.borrow_mut().push(group);
    }

    /// All jobs, oldest first.
    pub fn all(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().clone()
    }

    /// A job by id.
    pub fn get(&self, id: &str) -> Option<Rc<Job>> {
        self.jobs.borrow().iter().find(|j| j.id().as_str() == id).cloned()
    }

    /// Whether a job of this id is known.
    pub fn contains(&self, id: &str) -> bool {
        self.get(id).is_some()
    }

    /// Drops jobs that are gone and groups that have concluded.
    pub fn sweep(&self) {
        self.jobs.borrow_mut().retain(|j| j.status() != Status::Null);
        self.groups.borrow_mut().retain(|g| !g.is_concluded());
    }
}
