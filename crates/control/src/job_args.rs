//! How the arguments of a command become a job.

use dolmen_jobs::{Backup, Commit, Create, JobOptions, Kind, Mirror, Prefetch, Stream, Work};
use dolmen_qmp::QmpError;
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_types::{Error, ErrorKind, OpId, Options, Result};

use crate::jobs::JobStart;

pub(crate) const ON_ERROR: Ty = Ty::Enum(&["report", "ignore", "enospc", "stop", "auto"]);

pub(crate) const COPY_MODE: Ty = Ty::Enum(&["background", "write-blocking"]);

/// Those of all jobs that copy a node; not every job has every mode.
pub(crate) const SYNC: Ty = Ty::Enum(&["top", "full", "none", "incremental", "bitmap"]);

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

/// The job that a command (or an action of a transaction) asks for.
///
/// # Errors
/// When arguments do not make sense.
pub(crate) fn read(command: &str, mut o: Options) -> Result<JobStart, QmpError> {
    let Some((_, read)) = STARTS.iter().find(|(name, _)| *name == command) else {
        return Err(QmpError::generic(format!("'{command}' starts no job")));
    };
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
    Ok(JobStart { work, options })
}

/// How a backup is copied.
pub(crate) static PERF: Shape = Shape::of(&[
    Field::optional("use-copy-range", Ty::Bool),
    Field::optional("max-workers", Ty::Int),
    Field::optional("max-chunk", Ty::Int),
    Field::optional("min-cluster-size", Ty::Int),
]);
