//! Block jobs.
//!
//! ```text
//!   commands --verbs--> Job <--JobCx-- Work::run     what moves the data
//!                        |
//!   owner of the graph --+--> Group::advance         who waits for whom, settle, end, events
//! ```
//!
//! - [`Status`] and [`Verb`]: the states of a job and what a user may ask in which, as tables.
//! - [`Job`]: a job as queries and verbs see it; [`JobCx`]: as its work sees it.
//! - [`Work`]: what a kind of job does, and [`JobKind`]: its row. Nothing else differs between jobs; none of them decides on its own
//!   what `job-cancel` means while it is paused.
//! - [`prepare`], [`launch`], [`Group`]: how jobs begin and end, alone or several in one commit.
//!
//! Everything runs on the control task's core, and as well in the simulation: no clock, thread or random
//! number but those of the runtime handle.
#![forbid(unsafe_code)]

mod backup;
mod claims;
mod commit;
mod commit_filter;
mod create;
mod cx;
mod fill;
mod gone;
mod job;
mod kinds;
mod life;
mod mirror;
mod mirror_core;
mod mirror_filter;
mod pivot;
mod policy;
mod prefetch;
mod rate;
mod status;
mod stream;
#[cfg(test)]
mod tests;
mod work;

pub use backup::{BACKUP, Backup, PERF};
pub use commit::Commit;
pub use create::Create;
pub use cx::JobCx;
pub use job::{Attention, Demand, Emit, IoStatus, Job, JobEvent, JobOptions, Progress, Wish};
pub use kinds::{KINDS, OF_QEMU_ONLY};
pub use life::{Group, JobTable, launch, prepare};
pub use mirror::{MIRROR, Mirror};
pub use policy::{Action, Again, OnError, Side};
pub use prefetch::{PREFETCH, Prefetch};
pub use status::{Status, Verb};
pub use stream::Stream;
pub use work::{BLOCK_JOB, BeginCx, Details, Effect, Ending, JobKind, SettleCx, Work, nothing_to_change};
