//! What a daemon weighs: bounded by what it has, and nearly nothing when that is gone.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::daemon::Daemon;
use crate::qmp::{PATIENCE, Reply};
use crate::steps::Command;
use crate::storm::Storm;

/// Descriptors that come and go: connections of clients that are being closed, directories under way.
const SPARE: usize = 6;

/// Memory and descriptors of a daemon.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weight {
    pub(crate) mib: u64,
    pub(crate) files: usize,
}

impl Storm<'_> {
    /// What it may weigh with the nodes, exports and clients that there are now.
    fn bound(&self) -> Weight {
        let nodes = self.world.graph.nodes.len();
        let clients: usize = self.workers.values().map(Vec::len).sum();
        Weight {
            // Tables of the formats, and buffers of the requests in flight.
            mib: self.empty.mib + 40 + 4 * nodes as u64 + 16 * clients as u64,
            // A node has a file, or a connection; one that is being replaced has both.
            files: self.empty.files + SPARE + 2 * nodes + clients,
        }
    }

    /// Looks whether it weighs more than that.
    pub(crate) fn weigh(&mut self) {
        let (bound, Some(now)) = (self.bound(), self.daemon.as_ref().map(Daemon::weight)) else { return };
        if now.mib > bound.mib || now.files > bound.files {
            let nodes = self.world.graph.nodes.len();
            self.found("leak", format!("the daemon has {now:?} with {nodes} nodes, more than {bound:?}"));
        }
    }

    /// Ends and removes everything that there is, and looks whether all of it has been given back.
    pub(crate) fn clear_away(&mut self) {
        if let Some(b) = &self.back {
            b.signal(Signal::SIGCONT);
            self.back_stopped = false;
        }
        if self.world.server {
            self.ask(&Command::new("nbd-server-stop", json!({})), false);
        }
        for id in self.world.operations.clone() {
            self.ask(&Command::new("operation-end", json!({ "id": id })), false);
        }
        let until = Instant::now() + PATIENCE;
        let mut refusals = Vec::new();
        while self.findings.is_empty() && !self.world.graph.nodes.is_empty() {
            if Instant::now() > until {
                self.found("leak", format!("nodes that can't be removed: {}", refusals.join("; ")));
                return;
            }
            for (id, job) in self.world.jobs.clone() {
                // One that was told to complete has no time to copy what is left at a byte a second.
                self.ask(&Command::new("block-job-set-speed", json!({"device": id, "speed": 0})), false);
                let verb = match job.status.as_str() {
                    "concluded" => "job-dismiss",
                    _ if job.told.is_none() => "job-cancel",
                    "pending" => "job-finalize",
                    "paused" | "standby" => "job-resume",
                    _ => continue,
                };
                self.ask(&Command::new(verb, json!({ "id": id })), false);
            }
            refusals.clear();
            for n in self.world.graph.nodes.keys() {
                let Some(m) = self.monitors.first_mut() else { return };
                match m.ask("blockdev-del", &json!({ "node-name": n })) {
                    Reply::Done(_) => {}
                    Reply::Refused(text) => refusals.push(text),
                    Reply::Gone | Reply::Hangs => return self.gone("while nodes are removed"),
                }
            }
            self.observe();
        }
        self.is_empty();
    }

    /// Whether it weighs what it did before there was anything.
    fn is_empty(&mut self) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let Some(now) = self.daemon.as_ref().map(Daemon::weight) else { return };
            if !self.findings.is_empty() || now.files <= self.empty.files && now.mib <= self.empty.mib + 64 {
                return;
            }
            if Instant::now() > until {
                let open = self.daemon.as_ref().map(Daemon::open_files).unwrap_or_default();
                let was = self.empty;
                return self.found(
                    "leak",
                    format!("without any node the daemon has {now:?}, not {was:?}: {open:?}"),
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
