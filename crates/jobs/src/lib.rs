//! Block jobs.
//!
//! What exists so far is the life of a job as data: its [`Status`], the transitions
//! between them, and which [`Verb`]s of the user are legal in which. The jobs themselves
//! (stream, commit, mirror, backup, ...) will be built on it; none of them decides on its own what
//! `job-cancel` means while it is paused.
#![forbid(unsafe_code)]

mod status;

pub use status::{Status, Verb};
