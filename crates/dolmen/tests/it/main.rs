//! Integration tests of the tools and of the daemon, against the established ones where they are installed.

mod daemon;
mod peer;

mod backup;
mod create;
mod damage;
mod inspect;
mod io;
mod lock_bytes;
mod locks;
mod main_job;
mod nbd;
mod repair;
mod serve;
mod stats;
mod trust;
