//! The five sequences with which QEMU's daemon was seen to lose data, and what must keep working.
//!
//! The daemon is the program itself, the images are made by QEMU's tool where it is installed,
//! and what is written comes over NBD from another process. Each sequence is the story of a
//! loss: there, every command was accepted and every job ended without an error, and yet
//!
//! - H1: a mirror of `top` was ready; somebody wrote to `base` below it; the copy was stale.
//! - H2: a mirror was ready; `top` was linked to another backing file; the copy was of the old one.
//! - H3: a mirror was ready; a new export named `top` attached *below* the mirror's filter; what it wrote was
//!   missing in the copy.
//! - H4: the same with an active commit: the client that had read its own write no longer found it.
//! - H5: a backup was at an eighth; `top` was linked to another backing file; the backup was not of one moment.
//!
//! Here each gives the right data, or is refused with the four parts of a refusal.

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, PATIENCE, serve};
use crate::peer::{Bench, in_path};

const SIZE: &str = "8M";

/// A chain and a target in a daemon, an NBD server, and a monitor.
pub(crate) struct Scene {
    pub(crate) bench: Bench,
    pub(crate) daemon: Daemon,
    pub(crate) monitor: Monitor,
}

impl Scene {
    /// `top` has 0x11 in its first MiB, `mid` 0x22 in the second, `base` 0x33 in the third and 0x44 in the last.
    pub(crate) fn new() -> Scene {
        let bench = Bench::new();
        let img = if in_path("qemu-img").is_some() { "qemu-img" } else { "ours/qemu-img" };
        for (name, backing) in [("base", None), ("mid", Some("base")), ("top", Some("mid")), ("t1", None)] {
            let file = format!("{name}.qcow2");
            let mut args = vec!["create".to_owned(), "-q".into(), "-f".into(), "qcow2".into()];
            if let Some(b) = backing {
                args.extend(["-F".into(), "qcow2".into(), "-b".into(), format!("{b}.qcow2")]);
            }
            args.extend([file, SIZE.into()]);
            bench.ok(img, &args);
        }
        for (name, what) in [
            ("base", "write -P 0x33 2M 1M"),
            ("base", "write -P 0x44 7M 1M"),
            ("mid", "write -P 0x22 1M 1M"),
            ("top", "write -P 0x11 0 1M"),
        ] {
            bench.ok("dolmen", &["io", "-f", "qcow2", "-c", what, &format!("{name}.qcow2")]);
        }
        let mut daemon = Daemon::start(|_| serve(), &[]);
        let monitor = daemon.monitor();
        let mut scene = Scene { bench, daemon, monitor };
        let socket = scene.daemon.path("nbd.sock");
        scene.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        for (name, backing) in
            [("base", Json::Null), ("mid", json!("base")), ("top", json!("mid")), ("t1", Json::Null)]
        {
            let file = scene.bench.path(&format!("{name}.qcow2"));
            scene.ok(
                "blockdev-add",
                json!({
                    "driver": "qcow2", "node-name": name, "backing": backing,
                    "file": {"driver": "file", "node-name": format!("{name}-f"), "filename": file},
                }),
            );
        }
        scene
    }

    pub(crate) fn ok(&mut self, command: &str, arguments: Json) -> Json {
        self.monitor.ok(command, arguments)
    }

    pub(crate) fn export(&mut self, id: &str, node: &str, writable: bool) {
        self.ok("block-export-add", export(id, node, writable));
    }

    /// Reads or writes through an export, from another process.
    pub(crate) fn io(&self, export: &str, command: &str) {
        let uri = format!("nbd+unix:///{export}?socket={}", self.daemon.path("nbd.sock").display());
        let mut args = vec!["io", "-f", "raw", "-c", command, &uri];
        if command.starts_with("read") {
            args.insert(1, "-r");
        }
        let out = self.bench.ok("dolmen", &args);
        assert!(!out.contains("verification failed"), "{export}: {command}: {out}");
    }

    /// Everything reads as the chain was made.
    pub(crate) fn first_data(&self, export: &str) {
        for (pattern, at) in [("0x11", "512k"), ("0x22", "1M"), ("0x33", "2M"), ("0x44", "7M")] {
            self.io(export, &format!("read -P {pattern} {at} 512k"));
        }
        self.io(export, "read -P 0 3M 4M");
    }

    /// The same, except for the MiB at 4 MiB.
    pub(crate) fn first_data_but_4m(&self, export: &str) {
        for (pattern, at) in [("0x11", "0"), ("0x22", "1M"), ("0x33", "2M"), ("0x44", "7M"), ("0", "3M")] {
            self.io(export, &format!("read -P {pattern} {at} 1M"));
        }
    }

    /// The next event of a job; others are dropped.
    pub(crate) fn job_event(&mut self, names: &[&str]) -> Json {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            let event = match self.monitor.events.is_empty() {
                true => self.monitor.receive().expect("the daemon goes on"),
                false => self.monitor.events.remove(0),
            };
            if names.iter().any(|n| event["event"] == **n) {
                return event;
            }
            assert!(std::time::Instant::now() < end, "none of {names:?} came");
        }
    }

    pub(crate) fn ready(&mut self) {
        self.job_event(&["BLOCK_JOB_READY"]);
    }

    /// Waits for the end of the job, which is a good one.
    pub(crate) fn over(&mut self) {
        let event = self.job_event(&["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"]);
        assert_eq!(event["event"], "BLOCK_JOB_COMPLETED", "{event}");
        assert!(event["data"].get("error").is_none(), "{event}");
    }

    pub(crate) fn mirror(&mut self) {
        self.ok("blockdev-mirror", json!({"job-id": "job", "device": "top", "target": "t1", "sync": "full"}));
    }

    pub(crate) fn complete(&mut self) {
        self.ok("job-complete", json!({"id": "job"}));
        self.over();
    }

    /// A command that must be refused, in all four parts.
    pub(crate) fn refused(&mut self, command: &str, arguments: Json, node: &str, asks: &str, denies: &str) {
        let reply = self.monitor.ask(&json!({"execute": command, "arguments": arguments}));
        let error = &reply["error"];
        let conflict = &error["data"]["conflict"];
        let text = error["desc"].as_str().unwrap_or_default();
        assert_eq!(error["class"], "GenericError", "{reply}");
        assert_eq!(conflict["node"], node, "{reply}");
        assert!(conflict["actions"].as_array().is_some_and(|a| !a.is_empty()), "{reply}");
        for (party, id) in [("asks", asks), ("denies", denies)] {
            assert_eq!(conflict[party]["id"], id, "{reply}");
            assert!(text.contains(&format!("'{id}'")), "{reply}");
        }
        let why = conflict["why"].as_str().unwrap_or_default();
        assert!(!why.is_empty() && text.contains(why), "{reply}");
        let remedies = conflict["remedies"].as_array().cloned().unwrap_or_default();
        assert!(!remedies.is_empty(), "{reply}");
        for r in remedies {
            let r = r.as_str().unwrap_or_default().to_lowercase();
            assert!(text.to_lowercase().contains(&r), "{r} is not in {text}");
        }
    }

    /// Ends the daemon; then the image, opened anew, must be intact and hold this.
    pub(crate) fn image(mut self, name: &str, commands: &[&str]) {
        self.ok("quit", json!({}));
        assert!(self.daemon.wait().success());
        let file = format!("{name}.qcow2");
        let img = if in_path("qemu-img").is_some() { "qemu-img" } else { "ours/qemu-img" };
        self.bench.ok(img, &["check", "-q", "-f", "qcow2", &file]);
        for c in commands {
            let out = self.bench.ok("ours/qemu-io", &["-r", "-f", "qcow2", "-c", c, &file]);
            assert!(!out.contains("verification failed"), "{file}: {c}: {out}");
        }
    }
}

pub(crate) fn export(id: &str, node: &str, writable: bool) -> Json {
    json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable})
}

fn top_over_base() -> Json {
    json!({"options": [{"driver": "qcow2", "node-name": "top", "file": "top-f", "backing": "base"}]})
}

#[test]
fn h1_a_writer_below_a_mirror_is_refused() {
    let mut s = Scene::new();
    s.mirror();
    s.ready();
    s.refused("block-export-add", export("late", "base", true), "base", "late", "job");
    // The way out that it names works.
    s.export("reader", "base", false);
    s.io("reader", "read -P 0x33 2M 1M");
    s.complete();
    s.export("after", "t1", false);
    s.first_data("after");
    s.image("t1", &["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x33 2M 1M", "read -P 0x44 7M 1M"]);
}

#[test]
fn h2_other_data_below_a_mirror_are_refused() {
    let mut s = Scene::new();
    s.mirror();
    s.ready();
    s.refused("blockdev-reopen", top_over_base(), "top", "blockdev-reopen", "job");
    s.complete();
    s.export("after", "t1", false);
    s.first_data("after");
}

#[test]
fn h3_a_late_export_of_a_mirrored_node_is_copied() {
    let mut s = Scene::new();
    s.mirror();
    s.ready();
    s.export("late", "top", true);
    s.io("late", "write -P 0x77 4M 64k");
    s.complete();
    s.io("late", "read -P 0x77 4M 64k");
    s.export("after", "t1", false);
    s.io("after", "read -P 0x77 4M 64k");
    s.io("late", "write -P 0x78 5M 64k");
    s.image("t1", &["read -P 0x77 4M 64k", "read -P 0x78 5M 64k", "read -P 0x11 0 1M", "read -P 0x44 7M 1M"]);
}

#[test]
fn h4_a_late_export_of_a_committed_node_keeps_what_it_wrote() {
    let mut s = Scene::new();
    s.ok("block-commit", json!({"job-id": "job", "device": "top", "base-node": "mid"}));
    s.ready();
    s.export("late", "top", true);
    s.io("late", "write -P 0x77 4M 64k");
    s.io("late", "read -P 0x77 4M 64k");
    s.complete();
    s.io("late", "read -P 0x77 4M 64k");
    s.first_data_but_4m("late");
    s.image("mid", &["read -P 0x77 4M 64k", "read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x33 2M 1M"]);
}

#[test]
fn h5_other_data_below_a_backup_are_refused() {
    let mut s = Scene::new();
    s.ok(
        "blockdev-backup",
        json!({"job-id": "job", "device": "top", "target": "t1", "sync": "full", "speed": 1 << 20}),
    );
    s.refused("blockdev-reopen", top_over_base(), "top", "blockdev-reopen", "job");
    s.ok("block-job-set-speed", json!({"device": "job", "speed": 0}));
    s.over();
    s.image("t1", &["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x33 2M 1M", "read -P 0 3M 4M"]);
}

/// A client that was there before the job is copied, whatever the job is.
#[test]
fn an_export_from_before_the_mirror_is_copied() {
    for mode in ["background", "write-blocking"] {
        let mut s = Scene::new();
        s.export("guest", "top", true);
        s.io("guest", "write -P 0x55 4M 64k");
        s.ok(
            "blockdev-mirror",
            json!({"job-id": "job", "device": "top", "target": "t1", "sync": "full", "copy-mode": mode}),
        );
        s.io("guest", "write -P 0x56 4608k 64k");
        s.ready();
        s.io("guest", "write -P 0x57 5M 64k");
        s.complete();
        s.io("guest", "write -P 0x58 6M 64k");
        for at in [("0x55", "4M"), ("0x56", "4608k"), ("0x57", "5M"), ("0x58", "6M")] {
            s.io("guest", &format!("read -P {} {} 64k", at.0, at.1));
        }
        s.image(
            "t1",
            &["read -P 0x55 4M 64k", "read -P 0x56 4608k 64k", "read -P 0x57 5M 64k", "read -P 0x58 6M 64k"],
        );
    }
}

#[test]
fn a_writable_export_during_a_stream_is_safe() {
    let mut s = Scene::new();
    s.ok("block-stream", json!({"job-id": "job", "device": "top", "speed": 1 << 20}));
    s.export("late", "top", true);
    s.io("late", "write -P 0x77 2M 64k");
    s.refused("block-export-add", export("below", "mid", true), "mid", "below", "job");
    s.ok("block-job-set-speed", json!({"device": "job", "speed": 0}));
    s.over();
    s.io("late", "read -P 0x77 2M 64k");
    s.io("late", "read -P 0x33 2112k 512k");
    s.image(
        "top",
        &["read -P 0x77 2M 64k", "read -P 0x33 2112k 512k", "read -P 0x22 1M 1M", "read -P 0x44 7M 1M"],
    );
}

/// An active commit over two levels under a writable client works; a reader of the level between does not.
#[test]
fn an_active_commit_over_two_levels() {
    let mut s = Scene::new();
    s.export("guest", "top", true);
    s.ok("block-commit", json!({"job-id": "job", "device": "top", "base-node": "base"}));
    s.ready();
    s.refused("block-export-add", export("between", "mid", false), "mid", "between", "job");
    s.refused("block-export-add", export("second", "base", true), "base", "second", "job");
    s.io("guest", "write -P 0x77 4M 64k");
    s.complete();
    s.io("guest", "read -P 0x77 4M 64k");
    s.image(
        "base",
        &["read -P 0x77 4M 64k", "read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x44 7M 1M"],
    );
}

/// An intermediate commit under a writable client works, also with a reader of the middle.
#[test]
fn an_intermediate_commit_under_a_writer() {
    let mut s = Scene::new();
    s.export("guest", "top", true);
    s.export("reader", "mid", false);
    s.ok(
        "block-commit",
        json!({"job-id": "job", "device": "top", "top-node": "mid", "base-node": "base", "speed": 1}),
    );
    s.refused("block-export-add", export("writer", "mid", true), "mid", "writer", "job");
    s.io("guest", "write -P 0x77 4M 64k");
    // There is not much to do: it may be over already.
    s.monitor.ask(&json!({"execute": "block-job-set-speed", "arguments": {"device": "job", "speed": 0}}));
    s.over();
    s.io("guest", "read -P 0x77 4M 64k");
    s.first_data_but_4m("guest");
    s.io("reader", "read -P 0x22 1M 1M");
    s.image("top", &["read -P 0x77 4M 64k", "read -P 0x22 1M 1M", "read -P 0x33 2M 1M"]);
}

/// Fleecing: the target shows the past while the guest writes, and may be exported.
#[test]
fn a_fleecing_target_shows_the_past() {
    let mut s = Scene::new();
    let file = s.bench.path("f.qcow2");
    s.bench.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "f.qcow2", SIZE]);
    s.export("guest", "top", true);
    s.ok(
        "blockdev-add",
        json!({
            "driver": "qcow2", "node-name": "f", "backing": "top",
            "file": {"driver": "file", "filename": file},
        }),
    );
    s.ok("blockdev-backup", json!({"job-id": "job", "device": "top", "target": "f", "sync": "none"}));
    s.export("past", "f", false);
    s.io("guest", "write -P 0x77 0 3M");
    s.first_data("past");
    s.io("guest", "read -P 0x77 0 3M");
    s.ok("job-cancel", json!({"id": "job"}));
    s.job_event(&["BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"]);
    s.io("guest", "read -P 0x77 0 3M");
    // The point in time has ended while somebody still reads it. What was saved is there; of the rest an
    // error is better than what the guest writes now.
    s.io("guest", "write -P 0x78 7M 64k");
    s.io("past", "read -P 0x22 1M 1M");
    let uri = format!("nbd+unix:///past?socket={}", s.daemon.path("nbd.sock").display());
    let out = s.bench.run("dolmen", &["io", "-r", "-f", "raw", "-c", "read 7M 64k", &uri]);
    assert_ne!(out.code, 0, "what nobody saved is not shown");
    s.ok("block-export-del", json!({"id": "past", "mode": "hard"}));
    s.ok("blockdev-del", json!({"node-name": "f"}));
    s.io("guest", "read -P 0x78 7M 64k");
}
