//! What a job does, as the framework sees it: [`Work`].
//!
//! A work names the changes of the graph that its job needs ([`Work::begin`]), moves data
//! ([`Work::run`]), and names the changes that make the result visible ([`Work::settle`],
//! [`Work::end`]). When it may do which, who waits for whom, what events are raised and what a
//! user may ask is the business of the framework ([`Job`](crate::Job), [`Group`](crate::Group)).

use std::fmt;
use std::sync::Arc;

use dolmen_graph::{Draft, GraphOwner, NodeOpener, UserEdge};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{Error, ErrorKind, OpId, OptionSpec, OptionType, Options, Result, Value};

use crate::JobCx;

/// A kind of job: everything that is said about it apart from its [`Work`]. The row stands below the code; `kinds.rs` lists
/// the rows.
pub struct JobKind {
    /// The word that QMP clients know.
    pub name: &'static str,
    /// The command that starts such a job.
    pub command: &'static str,
    /// One line about that.
    pub help: &'static str,
    /// Whether it works on nodes of the graph: then it is also listed by `query-block-jobs`, knows
    /// the `block-job-` commands and raises their events, and goes by itself when it has ended. One that does not has to
    /// be dismissed.
    pub is_block_job: bool,
    /// Whether it goes on until it is completed or cancelled.
    pub is_completed: bool,
    /// Whether the command can be an action of a transaction.
    pub in_transactions: bool,
    /// The arguments of the command: those of every job of its sort ([`BLOCK_JOB`]), and its own.
    pub options: &'static [&'static [OptionSpec]],
    /// What `block-job-change` can change.
    pub change: &'static [OptionSpec],
    /// What `query-block-jobs` shows beyond what all jobs show: see [`Work::details`].
    pub details: &'static [OptionSpec],
    /// Reads its own arguments.
    pub parse: fn(&mut Options) -> Result<Box<dyn Work>>,
    /// A job that fails with this error, where clients expect a job that fails and no refusal of the command.
    pub failing: Option<fn(Error) -> Box<dyn Work>>,
}

impl fmt::Debug for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for JobKind {
    fn eq(&self, other: &JobKind) -> bool {
        self.name == other.name
    }
}

impl Eq for JobKind {}

/// The arguments of every job that works on nodes.
pub const BLOCK_JOB: &[OptionSpec] = &[
    OptionSpec::optional("job-id", OptionType::Str, "name of the job"),
    OptionSpec::optional("speed", OptionType::Int, "limit in bytes per second (default: 0, none)"),
    OptionSpec::optional(
        "auto-finalize",
        OptionType::Bool,
        "the result becomes visible without job-finalize (default: on)",
    ),
    OptionSpec::optional(
        "auto-dismiss",
        OptionType::Bool,
        "the job goes without job-dismiss when it has ended (default: on)",
    ),
];

/// How a job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its result becomes visible.
    Success,
    /// It failed, was cancelled, or another job of its group was.
    Abort,
}

/// What [`Work::begin`] works with.
pub struct BeginCx<'a> {
    /// The job's operation; it is in the draft already.
    pub op: &'a OpId,
    /// The draft that the job is to be part of.
    pub draft: &'a mut Draft,
    /// Opens nodes into the draft: filters by their options, for example.
    pub opener: &'a NodeOpener<'a>,
    /// The runtime.
    pub rt: &'a Rt,
}

impl fmt::Debug for BeginCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BeginCx({})", self.op)
    }
}

/// What [`Work::settle`] works with. The graph is as it was while the job ran.
pub struct SettleCx<'a> {
    /// The job's operation.
    pub op: &'a OpId,
    /// The owner of the graph.
    pub owner: &'a GraphOwner,
    /// The runtime.
    pub rt: &'a Rt,
}

impl SettleCx<'_> {
    /// An edge of the job, counted in the order in which [`Work::begin`] added them.
    ///
    /// # Errors
    /// `NotFound` when there are not so many.
    pub fn edge(&self, i: usize) -> Result<Arc<UserEdge>> {
        self.owner.edges(self.op).nth(i).ok_or_else(|| no_edge(self.op, i))
    }
}

impl fmt::Debug for SettleCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SettleCx({})", self.op)
    }
}

pub(crate) fn no_edge(op: &OpId, i: usize) -> Error {
    Error::new(ErrorKind::NotFound, format!("job '{op}' has no edge {i}"))
}

/// What a job shows of itself beyond what all jobs show: the members that its kind's row names.
pub type Details = Vec<(&'static str, Value)>;

/// Something that has been found possible, and happens when this is called.
pub type Effect<'a> = Box<dyn FnOnce() + 'a>;

/// What a job does. There are no default methods: whoever adds a method has to think about
/// every job.
pub trait Work: fmt::Debug + std::any::Any {
    /// What kind of job it is.
    fn kind(&self) -> &'static JobKind;

    /// What it does to what, for messages: "stream of 'top'". The framework adds the state.
    fn detail(&self) -> String;

    /// Puts the job's filters, edges and claims into the draft, in the name of its operation.
    ///
    /// Nothing outside of the draft may change: the draft may be shared with other changes, and it
    /// may be dropped, because one of them is refused or because nobody wanted more than to know.
    ///
    /// # Errors
    /// Why the job can't be; the draft is then of no more use.
    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>>;

    /// The work itself, once the draft has been published. It ends early, with `Cancelled`, when
    /// [`JobCx::checkpoint`] says so.
    ///
    /// # Errors
    /// Why the job fails.
    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>>;

    /// Before a successful end: what takes I/O and may fail (flushing, the name of the backing file in a
    /// header). It must do no harm if the job aborts after all, since another of its group fails.
    ///
    /// # Errors
    /// Why the job, and its group, fail.
    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>>;

    /// Puts the end into a draft: the pivot or the links of the result, the properties that nodes had
    /// before. Afterwards the framework removes the operation from the draft, with its claims, edges
    /// and the filters that are still there. Jobs of a group share the draft.
    ///
    /// # Errors
    /// Why the job, and its group, fail. An aborted job must not fail.
    fn end(&self, op: &OpId, draft: &mut Draft, ending: Ending) -> Result<()>;

    /// Whether a ready job may be completed as things are. Answers from memory.
    ///
    /// # Errors
    /// Why its result would be wrong; the job stays ready.
    fn may_complete(&self) -> Result<()>;

    /// What changing options while the job runs will do; it changes nothing until that is called.
    ///
    /// # Errors
    /// `Unsupported` when the job has none that can be changed.
    fn change(&self, options: Options) -> Result<Effect<'_>>;

    /// What queries show beyond what all jobs show.
    fn details(&self) -> Details;
}

/// What is left of a work when its job has ended: what queries show of it.
#[derive(Debug)]
pub(crate) struct Ended {
    kind: &'static JobKind,
    detail: String,
    details: Details,
}

impl Ended {
    pub(crate) fn new(work: &dyn Work) -> Ended {
        Ended { kind: work.kind(), detail: work.detail(), details: work.details() }
    }
}

fn has_ended() -> Error {
    Error::new(ErrorKind::InvalidInput, "the job has ended").remedy("start a new one")
}

impl Work for Ended {
    fn kind(&self) -> &'static JobKind {
        self.kind
    }

    fn detail(&self) -> String {
        self.detail.clone()
    }

    fn begin<'a>(&'a self, _: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Err(has_ended()) })
    }

    fn run<'a>(&'a self, _: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Err(has_ended()) })
    }

    fn settle<'a>(&'a self, _: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Err(has_ended()) })
    }

    fn end(&self, _: &OpId, _: &mut Draft, _: Ending) -> Result<()> {
        Err(has_ended())
    }

    fn may_complete(&self) -> Result<()> {
        Err(has_ended())
    }

    fn change(&self, _: Options) -> Result<Effect<'_>> {
        Err(has_ended())
    }

    fn details(&self) -> Details {
        self.details.clone()
    }
}

/// The answer of jobs that have nothing to change.
#[cold]
pub fn nothing_to_change() -> Error {
    Error::new(ErrorKind::Unsupported, "Job type does not support change")
        .remedy("cancel the job and start it with other options")
}
