//! What can be asked of jobs, and about them. Verbs act on the job itself and never wait for changes under way; only
//! finalizing, which makes a result visible, takes its turn.

use std::rc::Rc;

use dolmen_jobs::{Demand, Job, Status};
use dolmen_qmp::model::{self, BlockJobInfo, JobInfo};
use dolmen_qmp::schema::{Field, ID, JobPart, NOTHING, Reply, Shape, Ty};
use dolmen_qmp::{ErrorClass, QmpError, json};
use dolmen_rt::LocalFuture;
use dolmen_types::{Error, ErrorKind, Options, Result};
use serde_json::json;

use crate::act::{Act, Proposal, Wait};
use crate::guard::Guard;
use crate::jobs;
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

/// Which jobs a command means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Among {
    All,
    /// Those that work on nodes.
    BlockJobs,
}

/// Something that is asked of a job.
struct Ask {
    id: String,
    among: Among,
    demand: Demand,
    /// The kind of job whose options are to be changed.
    kind: Option<String>,
}

impl Ask {
    /// A demand of the job that the argument `by` names.
    fn boxed(among: Among, by: &str, mut o: Options, demand: Demand) -> Result<Box<dyn Act>, QmpError> {
        Ok(Box::new(Ask { id: o.require_str(by)?, among, demand, kind: None }))
    }

    /// The job that is meant, if there is one.
    fn job(&self, world: &World) -> Option<Rc<Job>> {
        world.jobs.get(&self.id).filter(|j| self.among == Among::All || j.kind().is_block_job)
    }

    /// The job, if it can be asked for this now. Nothing changes.
    ///
    /// # Errors
    /// That there is no such job, or why it can't.
    fn check(&self, world: &World) -> Result<Rc<Job>, QmpError> {
        let Some(job) = self.job(world) else {
            return Err(match self.among {
                Among::BlockJobs => QmpError::generic(format!("Block job '{}' not found", self.id))
                    .with_class(ErrorClass::DeviceNotActive),
                Among::All => QmpError::generic("Job not found"),
            });
        };
        match &self.kind {
            Some(kind) if kind != job.kind().name && !job.kind().change.is_empty() => {
                let text = format!("Job '{}' is of type {}, not {kind}", job.id(), job.kind().name);
                return Err(Error::new(ErrorKind::InvalidInput, text)
                    .remedy("query-jobs shows the types")
                    .into());
            }
            _ => job.check(&self.demand)?,
        }
        Ok(job)
    }
}

impl Act for Ask {
    fn wait(&self, world: &World) -> Wait {
        match (&self.demand, self.job(world)) {
            (Demand::Finalize, Some(job)) => Wait::For(jobs::scope(&job)),
            _ => Wait::Nothing,
        }
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { self.check(p.world).map(drop) })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let job = self.check(&world)?;
            match self.demand {
                Demand::Pause => job.pause(),
                Demand::Resume => job.resume(),
                Demand::Cancel { force } => job.cancel(force),
                Demand::Complete => job.complete(),
                Demand::SetSpeed(speed) => job.set_speed(speed),
                Demand::Change(options) => job.change(options),
                Demand::Dismiss => job.dismiss(),
                Demand::Finalize => {
                    jobs::finalize(&world, job).await?;
                    Ok(())
                }
            }?;
            world.jobs.sweep();
            Ok(json!({}))
        })
    }
}

/// `block-job-change`: the rest of the arguments are options of the job.
fn change(mut o: Options) -> Result<Box<dyn Act>, QmpError> {
    let id = o.require_str("id")?;
    let kind = Some(o.require_str("type")?);
    Ok(Box::new(Ask { id, among: Among::BlockJobs, demand: Demand::Change(o), kind }))
}

fn job_info(job: &Job) -> JobInfo {
    let progress = job.progress();
    JobInfo {
        current_progress: progress.current,
        status: job.status().as_str().into(),
        total_progress: progress.total,
        kind: job.kind().name.into(),
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
        kind: job.kind().name.into(),
        details: job.details().into_iter().map(|(name, v)| (name.to_owned(), json::from_value(&v))).collect(),
        error: job.error(),
    }
}

const BY_ID: Ty = Ty::Object(&ID);
static DEVICE: Shape = Shape::of(&[Field::required("device", Ty::Str)]);
const BY_DEVICE: Ty = Ty::Object(&DEVICE);
static CANCEL: Shape = Shape::of(&[Field::required("device", Ty::Str), Field::optional("force", Ty::Bool)]);
static SET_SPEED: Shape = Shape::of(&[Field::required("device", Ty::Str), Field::required("speed", Ty::Int)]);
const BLOCK_JOB: Ty = Ty::OfJob(BlockJobInfo::ty, JobPart::Details);
static CHANGE: Shape = Shape::of(&[Field::required("id", Ty::Str)]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::query(
        "query-jobs",
        NOTHING,
        Ty::ArrayOf(JobInfo::ty),
        |world, _| Ok(world.jobs.all().iter().rev().map(|j| model::to_json(&job_info(j))).collect()),
        "Every job, with its state and progress.",
    ),
    CommandRow::query(
        "query-block-jobs",
        NOTHING,
        Ty::Array(&BLOCK_JOB),
        |world, _| {
            let jobs = world.jobs.all();
            let shown = jobs.iter().rev().filter(|j| j.kind().is_block_job);
            Ok(shown.map(|j| model::to_json(&block_job_info(j))).collect())
        },
        "Every job that works on nodes, in detail.",
    ),
    CommandRow::verb(
        "job-pause",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Pause),
        "Stops a job for now; what is in flight finishes.",
    ),
    CommandRow::verb(
        "job-resume",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Resume),
        "Lets a paused job go on.",
    ),
    CommandRow::verb(
        "job-cancel",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Cancel { force: true }),
        "Ends a job without a result.",
    ),
    CommandRow::verb(
        "job-complete",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Complete),
        "Ends a ready job with its result.",
    ),
    CommandRow::change(
        "job-finalize",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Finalize),
        "Makes the result of a pending job visible.",
    ),
    CommandRow::verb(
        "job-dismiss",
        BY_ID,
        |_, o| Ask::boxed(Among::All, "id", o, Demand::Dismiss),
        "Forgets a job that has ended.",
    ),
    CommandRow::verb(
        "block-job-pause",
        BY_DEVICE,
        |_, o| Ask::boxed(Among::BlockJobs, "device", o, Demand::Pause),
        "The same as job-pause.",
    ),
    CommandRow::verb(
        "block-job-resume",
        BY_DEVICE,
        |_, o| Ask::boxed(Among::BlockJobs, "device", o, Demand::Resume),
        "The same as job-resume.",
    ),
    CommandRow::verb(
        "block-job-complete",
        BY_DEVICE,
        |_, o| Ask::boxed(Among::BlockJobs, "device", o, Demand::Complete),
        "The same as job-complete.",
    ),
    CommandRow::change(
        "block-job-finalize",
        BY_ID,
        |_, o| Ask::boxed(Among::BlockJobs, "id", o, Demand::Finalize),
        "The same as job-finalize.",
    ),
    CommandRow::verb(
        "block-job-dismiss",
        BY_ID,
        |_, o| Ask::boxed(Among::BlockJobs, "id", o, Demand::Dismiss),
        "The same as job-dismiss.",
    ),
    CommandRow::verb(
        "block-job-cancel",
        Ty::Object(&CANCEL),
        |_, mut o| {
            let force = o.take_bool("force")?.unwrap_or(false);
            Ask::boxed(Among::BlockJobs, "device", o, Demand::Cancel { force })
        },
        "Ends a job; a ready one that is not forced keeps what it has copied.",
    ),
    CommandRow::verb(
        "block-job-set-speed",
        Ty::Object(&SET_SPEED),
        |_, mut o| {
            let speed = o.take_size("speed")?.unwrap_or(0);
            Ask::boxed(Among::BlockJobs, "device", o, Demand::SetSpeed(speed))
        },
        "Limits the speed of a job, in bytes per second; 0 for no limit.",
    ),
    CommandRow::verb(
        "block-job-change",
        Ty::OfJob(|| Ty::Object(&CHANGE), JobPart::Change),
        |_, o| change(o),
        "Changes options of a job while it runs.",
    ),
];
