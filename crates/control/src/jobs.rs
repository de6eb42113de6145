//! Jobs in the control task: how commands start them, ask things of them, and see them end.
//!
//! ```text
//!   block-stream ...  --> start_in_draft --> commit --> Started::after_commit     in the task
//!   job-pause ...     --> Ask::check, then at once on the job: never waits        beside the task
//!   a job's work ends --> attention --> Task::attend: Group::advance              in the task
//! ```
//!
//! Starting is in two steps, so that several changes (of a transaction) go into one draft and are
//! published in one commit; dropping the draft and what was [`Started`] leaves nothing behind.
//! The end of a group comes back to the task by a channel, and is one commit as well.

use std::rc::Rc;
use std::time::Duration;

use dolmen_graph::{Draft, NodeOpener};
use dolmen_jobs::{
    Backup, Commit, Create, Demand, Emit, Job, JobEvent, JobOptions, JobTable, Kind, Mirror, Prefetch,
    Status, Stream, Work, launch, prepare,
};
use dolmen_qmp::model::{self, BlockJobInfo, JobInfo};
use dolmen_qmp::{ErrorClass, QmpError, Request};
use dolmen_types::{Error, ErrorKind, OpId, Options, Result};
use serde_json::{Value as Json, json};

use crate::handle::Shared;
use crate::task::Task;
use crate::turns::Scope;

/// How long after a failed attempt to publish the end of jobs it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A job that a command asks for.
#[derive(Debug)]
pub struct JobStart {
    /// What it is to do.
    pub work: Box<dyn Work>,
    /// What all jobs can be asked for.
    pub options: JobOptions,
}

/// Reads the arguments of a kind of job that are not those of every job.
type Read = fn(&mut Options) -> Result<Box<dyn Work>>;

/// The commands that start a job.
const STARTS: &[(&str, Read)] = &[
    ("block-stream", |o| Ok(Box::new(Stream::from_options(o)?))),
    ("blockdev-backup", |o| Ok(Box::new(Backup::from_options(o)?))),
    ("blockdev-create", |o| Ok(Box::new(Create::from_options(o)?))),
    ("blockdev-prefetch", |o| Ok(Box::new(Prefetch::from_options(o)?))),
    ("block-commit", |o| Ok(Box::new(Commit::from_options(o)?))),
    ("blockdev-mirror", |o| Ok(Box::new(Mirror::from_options(o)?))),
];

impl JobStart {
    /// The job that a command (or an action of a transaction) asks for; `None` for other commands.
    ///
    /// # Errors
    /// When arguments do not make sense.
    pub fn from_options(command: &str, mut o: Options) -> Result<Option<JobStart>> {
        let Some((_, read)) = STARTS.iter().find(|(name, _)| *name == command) else { return Ok(None) };
        let work = read(&mut o)?;
        let id = o.take_str("job-id")?.unwrap_or_default();
        let id = OpId::parse(&id).map_err(|_| {
            Error::new(ErrorKind::InvalidInput, format!("Invalid job ID '{id}'"))
                .remedy("use a letter first, then letters, digits, '-', '.' or '_'")
        })?;
        let mut options = JobOptions::new(id);
        if work.kind() == Kind::Create {
            // Whoever asks wants to know how it ended.
            options.auto_dismiss = false;
        }
        options.speed = o.take_size("speed")?.unwrap_or(0);
        options.auto_finalize = o.take_bool("auto-finalize")?.unwrap_or(true);
        options.auto_dismiss = o.take_bool("auto-dismiss")?.unwrap_or(options.auto_dismiss);
        o.finish(command)?;
        Ok(Some(JobStart { work, options }))
    }
}

/// A job that is in a draft. Once the draft has been published, [`Started::after_commit`] sets it to work;
/// until then it can be dropped with the draft.
#[derive(Debug)]
pub(crate) struct Started {
    job: Rc<Job>,
    /// It is known by now that it will fail.
    pub(crate) fails: Option<QmpError>,
}

/// Puts a job into a draft: its operation, filters, edges and claims. Tells nobody.
///
/// # Errors
/// Why the job can't be; the draft is then of no more use.
pub(crate) async fn start_in_draft(
    task: &Task,
    draft: &mut Draft,
    start: JobStart,
) -> Result<Started, QmpError> {
    let (kind, options) = (start.work.kind(), start.options.clone());
    let mut refusal = None;
    match (begin(task, draft, start, &mut refusal).await, refusal) {
        // Established clients wait for the job to fail when its file can't be used. It is never part of a transaction,
        // so the draft is its own.
        (Err(_), Some(e)) if kind == Kind::Create && e.kind() != ErrorKind::Unsupported => {
            *draft = task.owner.draft();
            let fails = Some(QmpError::from(&e));
            let work = Box::new(Create::failing(e));
            let started = begin(task, draft, JobStart { work, options }, &mut None).await?;
            Ok(Started { fails, ..started })
        }
        (begun, _) => begun,
    }
}

/// When it is the job itself that is refused, `refusal` says why.
async fn begin(
    task: &Task,
    draft: &mut Draft,
    start: JobStart,
    refusal: &mut Option<Error>,
) -> Result<Started, QmpError> {
    let id = &start.options.id;
    if task.shared.jobs.contains(id) {
        return Err(Error::new(ErrorKind::AlreadyExists, format!("Job ID '{id}' already in use"))
            .remedy("choose another id, or dismiss that job if it has ended (job-dismiss)")
            .into());
    }
    let rt = &task.shared.rt;
    let attention = task.attention.clone();
    let job = Job::new(
        start.options,
        start.work,
        rt,
        emitter(&task.shared),
        // The task ends only with the program.
        Rc::new(move |job| drop(attention.try_send(job))),
    );
    let opener = NodeOpener {
        registry: task.config.registry,
        policy: task.config.policy,
        names: crate::image_name,
        rt,
    };
    // Opening a node may wait for somebody who never answers.
    let prepared = async {
        prepare(&job, draft, &opener).await.map_err(|e| {
            let shown = QmpError::from(&e);
            // Some commands have another word for a node that is not there.
            let no_device = e.kind() == ErrorKind::NotFound && e.to_string().starts_with("Device '");
            let shown = if no_device { shown.with_class(ErrorClass::DeviceNotFound) } else { shown };
            *refusal = Some(e);
            shown
        })
    };
    task.shared.patiently(prepared).await?;
    Ok(Started { job, fails: None })
}

impl Started {
    /// Sets jobs to work whose draft has been published. They end together: all of them successfully, or
    /// none. Jobs that are to end one by one come here one by one.
    pub(crate) fn after_commit(jobs: Vec<Started>, task: &Task) {
        let jobs: Vec<_> = jobs.into_iter().map(|s| s.job).collect();
        let group = launch(jobs.clone(), &task.owner);
        task.shared.jobs.insert(&jobs, group);
    }
}

/// Something that a command asks of a job.
#[derive(Debug)]
pub struct Ask {
    id: String,
    /// Only a job that works on nodes is meant.
    block: bool,
    demand: Demand,
    /// The kind of job whose options are to be changed.
    kind: Option<String>,
}

impl Ask {
    /// What a command asks; `None` for other commands.
    ///
    /// # Errors
    /// When arguments do not make sense.
    pub fn from_options(command: &str, o: &mut Options) -> Result<Option<Ask>> {
        let (block, name) = match command.strip_prefix("block-job-") {
            Some(name) => (true, name),
            None => (false, command.strip_prefix("job-").unwrap_or_default()),
        };
        let by = match name {
            "finalize" | "dismiss" | "change" => "id",
            _ if block => "device",
            _ => "id",
        };
        let is_verb = ["pause", "resume", "cancel", "complete", "finalize", "dismiss"].contains(&name)
            || (block && ["set-speed", "change"].contains(&name));
        if !is_verb {
            return Ok(None);
        }
        let id = o.require_str(by)?;
        let mut kind = None;
        let demand = match name {
            "pause" => Demand::Pause,
            "resume" => Demand::Resume,
            "cancel" => Demand::Cancel { force: !block || o.take_bool("force")?.unwrap_or(false) },
            "complete" => Demand::Complete,
            "finalize" => Demand::Finalize,
            "set-speed" => Demand::SetSpeed(o.take_size("speed")?.unwrap_or(0)),
            "change" => {
                kind = Some(o.require_str("type")?);
                Demand::Change(o.clone())
            }
            _ => Demand::Dismiss,
        };
        Ok(Some(Ask { id, block, demand, kind }))
    }

    /// Whether it is done at once, on the job itself: everything that makes no result visible.
    pub(crate) fn is_instant(&self) -> bool {
        !matches!(self.demand, Demand::Finalize)
    }

    /// The job that is meant, if there is one.
    pub(crate) fn job(&self, jobs: &JobTable) -> Option<Rc<Job>> {
        jobs.get(&self.id).filter(|j| !self.block || j.kind().is_block_job())
    }

    /// The job, if it can be asked for this now. Nothing changes.
    ///
    /// # Errors
    /// That there is no such job, or why it can't.
    pub(crate) fn check(&self, jobs: &JobTable) -> Result<Rc<Job>, QmpError> {
        let Some(job) = self.job(jobs) else {
            return Err(match self.block {
                true => QmpError::generic(format!("Block job '{}' not found", self.id))
                    .with_class(ErrorClass::DeviceNotActive),
                false => QmpError::generic("Job not found"),
            });
        };
        match &self.kind {
            Some(kind) if kind != job.kind().as_str() && job.kind() == Kind::Mirror => {
                let text = format!("Job '{}' is of type {}, not {kind}", job.id(), job.kind().as_str());
                return Err(Error::new(ErrorKind::InvalidInput, text)
                    .remedy("query-jobs shows the types")
                    .into());
            }
            _ => job.check(&self.demand)?,
        }
        Ok(job)
    }

    /// Asks the job, which never waits for changes under way.
    ///
    /// # Errors
    /// As [`Ask::check`].
    pub(crate) fn carry_out(self, shared: &Shared) -> Result<Json, QmpError> {
        let job = self.check(&shared.jobs)?;
        match self.demand {
            Demand::Pause => job.pause(),
            Demand::Resume => job.resume(),
            Demand::Cancel { force } => job.cancel(force),
            Demand::Complete => job.complete(),
            Demand::SetSpeed(speed) => job.set_speed(speed),
            Demand::Change(options) => job.change(options),
            Demand::Dismiss => job.dismiss(),
            // It changes the graph: see [`finalize`].
            Demand::Finalize => Ok(()),
        }?;
        shared.jobs.sweep();
        Ok(json!({}))
    }
}

/// Makes results visible, and answers when they are.
pub(crate) async fn finalize(task: &Task, ask: &Ask) -> Result<(), QmpError> {
    let job = ask.check(&task.shared.jobs)?;
    if let Some(group) = job.group() {
        let mut owner = task.owner.clone();
        // What makes a result visible is given up late only.
        let finalized = async { Ok(group.finalize(&mut owner).await?) };
        let ended = task.shared.unless_closing(finalized).await;
        if ended.is_err() {
            // Its jobs are still aborting.
            task.try_again(job);
        }
        ended?;
    }
    task.shared.jobs.sweep();
    Ok(())
}

/// What the end of a job has to do with: its whole group.
pub(crate) fn scope(job: &Rc<Job>) -> Scope {
    let members = job.group().map(|g| g.members()).unwrap_or_default();
    Scope::names(members.iter().map(|j| j.id().clone()).chain([job.id().clone()]))
}

impl Task {
    /// A job's work has ended, or it is to end: moves its group on.
    pub(crate) async fn attend(&self, job: Rc<Job>) {
        self.describe_jobs();
        if let Some(group) = job.group()
            && let Err(e) = group.advance(&mut self.owner.clone()).await
        {
            (self.shared.log)(&e.context(format!("job '{}' can't end yet", job.id())).to_string());
            self.try_again(job);
        }
        self.shared.jobs.sweep();
        self.report_events();
    }

    /// Has a job's end published later.
    fn try_again(&self, job: Rc<Job>) {
        let (attention, rt) = (self.attention.clone(), self.shared.rt.clone());
        self.shared.rt.spawn(async move {
            rt.sleep(RETRY).await;
            // The task ends only with the program.
            let _ = attention.send(job).await;
        });
    }

    /// Tells the graph what state jobs are in, for messages.
    pub(crate) fn describe_jobs(&self) {
        let mut owner = self.owner.clone();
        for job in self.shared.jobs.all() {
            owner.describe_op(job.id(), job.detail());
        }
    }
}

/// Makes messages of a job's events.
fn emitter(shared: &Rc<Shared>) -> Emit {
    // A job that outlives the program has nobody to tell.
    let shared = Rc::downgrade(shared);
    Rc::new(move |job, event| {
        let Some(shared) = shared.upgrade() else { return };
        if let Some((name, data)) = message(job, event) {
            shared.event(name, data);
        }
    })
}

/// Every job tells its state; the other events are those of jobs that work on nodes.
fn message(job: &Job, event: JobEvent) -> Option<(&'static str, Json)> {
    let (id, kind) = (job.id().as_str(), job.kind().as_str());
    if !job.kind().is_block_job() && !matches!(event, JobEvent::Status(_)) {
        return None;
    }
    let progress = job.progress();
    let mut about = json!({
        "device": id, "len": progress.total, "offset": progress.current, "speed": job.speed(), "type": kind
    });
    Some(match event {
        JobEvent::Status(status) => ("JOB_STATUS_CHANGE", json!({"status": status.as_str(), "id": id})),
        JobEvent::Ready => ("BLOCK_JOB_READY", about),
        JobEvent::Cancelled => ("BLOCK_JOB_CANCELLED", about),
        JobEvent::Completed(error) => {
            if let Some(e) = error {
                about["error"] = e.into();
            }
            ("BLOCK_JOB_COMPLETED", about)
        }
        JobEvent::Pending => ("BLOCK_JOB_PENDING", json!({"type": kind, "id": id})),
        JobEvent::Error { side, action } => {
            let data = json!({"device": id, "operation": side.operation(), "action": action.as_str()});
            ("BLOCK_JOB_ERROR", data)
        }
    })
}

/// Executes a query about jobs, which never waits for changes under way; `None` for other commands.
pub(crate) fn at_once(shared: &Shared, request: &Request) -> Option<Result<Json, QmpError>> {
    let jobs = &shared.jobs;
    Some(match request.name {
        "query-jobs" => Ok(jobs.all().iter().rev().map(|j| model::to_json(&job_info(j))).collect()),
        "query-block-jobs" => Ok(jobs
            .all()
            .iter()
            .rev()
            .filter(|j| j.kind().is_block_job())
            .map(|j| model::to_json(&block_job_info(j)))
            .collect()),
        _ => return None,
    })
}

fn job_info(job: &Job) -> JobInfo {
    let progress = job.progress();
    JobInfo {
        current_progress: progress.current,
        status: job.status().as_str().into(),
        total_progress: progress.total,
        kind: job.kind().as_str().into(),
        id: job.id().to_string(),
        estimated_remaining_ms: job
            .estimated_remaining()
            .and_then(|d| u64::try_from(d.as_millis()).ok())
            // JSON numbers of many clients end there.
            .filter(|ms| *ms < 1 << 53),
        error: job.error(),
    }
}

fn block_job_info(job: &Job) -> BlockJobInfo {
    let progress = job.progress();
    let status = job.status();
    BlockJobInfo {
        auto_finalize: job.auto_finalize(),
        io_status: job.io_status().as_str().into(),
        device: job.id().to_string(),
        auto_dismiss: job.auto_dismiss(),
        busy: job.is_busy(),
        len: progress.total,
        offset: progress.current,
        status: status.as_str().into(),
        paused: job.is_pausing(),
        speed: job.speed(),
        ready: matches!(status, Status::Ready | Status::Standby),
        kind: job.kind().as_str().into(),
        actively_synced: job.details().actively_synced,
        error: job.error(),
    }
}
