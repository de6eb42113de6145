//! Jobs in the control task: how they are put into drafts, and seen to their end.
//!
//! ```text
//!   block-stream ...  --> Started::in_draft --> commit --> Started::launch     in the task
//!   a job's work ends --> attention --> attend: Group::advance                 in the task
//! ```
//!
//! Starting is in two steps, so that several changes (of a transaction) go into one draft and are
//! published in one commit; dropping the draft and what was [`Started`] leaves nothing behind.
//! The end of a group comes back to the task by a channel, and is one commit as well.

use std::rc::Rc;
use std::time::Duration;

use dolmen_graph::Draft;
use dolmen_jobs::{Emit, Job, JobEvent, JobKind, JobOptions, Work, launch, prepare};
use dolmen_qmp::schema::jobs::STATUS;
use dolmen_qmp::schema::{EventRow, Field, Shape, Ty};
use dolmen_qmp::{ErrorClass, QmpError};
use dolmen_types::{Error, ErrorKind, OpId, Options, Result};
use serde_json::{Value as Json, json};

use crate::turns::Scope;
use crate::world::{Done, World};

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

impl JobStart {
    /// Reads the arguments of the command that starts a job of this kind.
    ///
    /// # Errors
    /// When arguments do not make sense.
    pub(crate) fn read(kind: &JobKind, mut o: Options) -> Result<JobStart> {
        let work = (kind.parse)(&mut o)?;
        let id = o.take_str("job-id")?.unwrap_or_default();
        let id = OpId::parse(&id).map_err(|_| {
            Error::new(ErrorKind::InvalidInput, format!("Invalid job ID '{id}'"))
                .remedy("use a letter first, then letters, digits, '-', '.' or '_'")
        })?;
        let mut options = JobOptions::new(id);
        options.speed = o.take_size("speed")?.unwrap_or(0);
        options.auto_finalize = o.take_bool("auto-finalize")?.unwrap_or(true);
        options.auto_dismiss = o.take_bool("auto-dismiss")?.unwrap_or(kind.is_block_job);
        o.finish(kind.command)?;
        Ok(JobStart { work, options })
    }
}

/// A job that is in a draft. Once the draft has been published, [`Started::launch`] sets it to work;
/// until then it can be dropped with the draft.
#[derive(Debug)]
pub(crate) struct Started {
    job: Rc<Job>,
    /// It is known by now that it will fail.
    pub(crate) fails: Option<QmpError>,
}

/// When it is the job itself that is refused, `refusal` says why.
async fn begin(
    world: &Rc<World>,
    draft: &mut Draft,
    start: JobStart,
    refusal: &mut Option<Error>,
) -> std::result::Result<Started, QmpError> {
    let id = &start.options.id;
    if world.jobs.contains(id) {
        return Err(Error::new(ErrorKind::AlreadyExists, format!("Job ID '{id}' already in use"))
            .remedy("choose another id, or dismiss that job if it has ended (job-dismiss)")
            .into());
    }
    let rt = &world.rt;
    let attention = world.attention.clone();
    let job = Job::new(
        start.options,
        start.work,
        rt,
        emitter(world),
        // The task ends only with the program.
        Rc::new(move |job| drop(attention.try_send(job))),
    );
    let opener = world.opener();
    // Opening a node may wait for storage that never answers.
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
    world.patiently(prepared).await?;
    Ok(Started { job, fails: None })
}

impl Started {
    /// Puts a job into a draft: its operation, filters, edges and claims. Raises no event.
    ///
    /// # Errors
    /// Why the job can't be; the draft is then of no more use.
    pub(crate) async fn in_draft(
        world: &Rc<World>,
        draft: &mut Draft,
        start: JobStart,
    ) -> std::result::Result<Started, QmpError> {
        let (kind, options) = (start.work.kind(), start.options.clone());
        let mut refusal = None;
        let begun = begin(world, draft, start, &mut refusal).await;
        match (begun, refusal, kind.failing) {
            // QEMU's clients wait for such a job to fail when its file can't be used. It is never part of a transaction,
            // so the draft is its own.
            (Err(_), Some(e), Some(failing)) if e.kind() != ErrorKind::Unsupported => {
                *draft = world.owner.draft();
                let fails = Some(QmpError::from(&e));
                let work = failing(e);
                let started = begin(world, draft, JobStart { work, options }, &mut None).await?;
                Ok(Started { fails, ..started })
            }
            (begun, ..) => begun,
        }
    }

    /// Sets jobs to work whose draft has been published. They end together: all of them successfully, or
    /// none. Jobs that are to end one by one come here one by one.
    pub(crate) fn launch(jobs: Vec<Started>, world: &World) {
        let jobs: Vec<_> = jobs.into_iter().map(|s| s.job).collect();
        let group = launch(jobs.clone(), &world.owner);
        world.jobs.insert(&jobs, group);
    }
}

/// Makes the results of a job, and of its group, visible.
pub(crate) async fn finalize(world: &World, job: Rc<Job>) -> Done {
    if let Some(group) = job.group() {
        let mut owner = world.owner.clone();
        // What makes a result visible is given up late only.
        let finalized = async { Ok(group.finalize(&mut owner).await?) };
        let ended = world.unless_closing(finalized).await;
        if ended.is_err() {
            // Its jobs are still aborting.
            try_again(world, job);
        }
        ended?;
    }
    world.jobs.sweep();
    Ok(())
}

/// What the end of a job has to do with: its whole group.
pub(crate) fn scope(job: &Rc<Job>) -> Scope {
    let members = job.group().map(|g| g.members()).unwrap_or_default();
    Scope::names(members.iter().map(|j| j.id().clone()).chain([job.id().clone()]))
}

/// A job's work has ended, or it is to end: moves its group on.
pub(crate) async fn attend(world: &World, job: Rc<Job>) {
    world.describe_jobs();
    if let Some(group) = job.group()
        && let Err(e) = group.advance(&mut world.owner.clone()).await
    {
        world.log(&e.context(format!("job '{}' can't end yet", job.id())).to_string());
        try_again(world, job);
    }
    world.jobs.sweep();
    world.report_events();
}

/// Has a job's end published later.
fn try_again(world: &World, job: Rc<Job>) {
    let (attention, rt) = (world.attention.clone(), world.rt.clone());
    world.rt.spawn(async move {
        rt.sleep(RETRY).await;
        // The task ends only with the program.
        let _ = attention.send(job).await;
    });
}

/// Makes messages of a job's events.
fn emitter(world: &Rc<World>) -> Emit {
    // A job that outlives the program raises nothing.
    let world = Rc::downgrade(world);
    Rc::new(move |job, event| {
        let Some(world) = world.upgrade() else { return };
        if let Some((name, data)) = message(job, event) {
            world.event(name, data);
        }
    })
}

/// Every job reports its state; the other events are those of jobs that work on nodes.
fn message(job: &Job, event: JobEvent) -> Option<(&'static str, Json)> {
    let (id, kind) = (job.id().as_str(), job.kind().name);
    if !job.kind().is_block_job && !matches!(event, JobEvent::Status(_)) {
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

/// What most events of block jobs carry.
const ABOUT: [Field; 5] = [
    Field::required("type", Ty::JobName),
    Field::required("device", Ty::Str),
    Field::required("len", Ty::Int),
    Field::required("offset", Ty::Int),
    Field::required("speed", Ty::Int),
];

static ENDED: Shape = Shape::of(&ABOUT);

/// Every event of jobs.
pub(crate) const EVENTS: &[EventRow] = &[
    EventRow {
        name: "JOB_STATUS_CHANGE",
        data: &Shape::of(&[Field::required("id", Ty::Str), Field::required("status", Ty::Enum(STATUS))]),
        help: "A job has come to another state.",
    },
    EventRow { name: "BLOCK_JOB_READY", data: &ENDED, help: "A job can be completed from now on." },
    EventRow {
        name: "BLOCK_JOB_PENDING",
        data: &Shape::of(&[Field::required("type", Ty::JobName), Field::required("id", Ty::Str)]),
        help: "A job waits for job-finalize.",
    },
    EventRow {
        name: "BLOCK_JOB_COMPLETED",
        data: &Shape::of(&[
            ABOUT[0],
            ABOUT[1],
            ABOUT[2],
            ABOUT[3],
            ABOUT[4],
            Field::optional("error", Ty::Str),
        ]),
        help: "A job has ended; with its error if it failed.",
    },
    EventRow { name: "BLOCK_JOB_CANCELLED", data: &ENDED, help: "A job was cancelled." },
    EventRow {
        name: "BLOCK_JOB_ERROR",
        data: &Shape::of(&[
            Field::required("device", Ty::Str),
            Field::required("operation", Ty::Enum(&["read", "write"])),
            Field::required("action", Ty::Enum(&["ignore", "report", "stop"])),
        ]),
        help: "A request of a job failed; what the job does about it.",
    },
];
