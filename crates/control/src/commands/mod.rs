//! The commands, a family a file: their code, and their rows below it. They depend on what is around them
//! ([`World`](crate::world::World), [`Act`](crate::act::Act), rows) and not on each other.

pub(crate) mod backing;
pub(crate) mod drives;
pub(crate) mod exports;
pub(crate) mod job_starts;
pub(crate) mod job_verbs;
pub(crate) mod latency;
pub(crate) mod nodes;
pub(crate) mod operations;
pub(crate) mod resize;
pub(crate) mod server;
pub(crate) mod session;
pub(crate) mod snapshots;
pub(crate) mod stats;
pub(crate) mod transaction;
pub(crate) mod what_if;
