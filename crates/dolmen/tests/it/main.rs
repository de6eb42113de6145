//! Integration tests of the tools and of the daemon, against the established ones where they are installed.

mod daemon;
mod load;
mod peer;

mod backup;
mod clients;
mod create;
mod cut_off;
mod damage;
mod durable;
mod events;
mod features;
mod full_disk;
mod graph_changes;
mod handover;
mod hang;
mod hazards;
mod inspect;
mod io;
mod jobs;
mod lock_bytes;
mod locks;
mod main_job;
mod mirror;
mod monitor;
mod names;
mod nbd;
mod new_images;
mod options;
mod overlays;
mod pivots;
mod reopen;
mod repair;
mod serve;
mod stats;
mod trust;
