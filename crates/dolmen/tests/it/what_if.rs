//! What a question, and a command that is refused, must not do to an image that has to be repaired before it is written.
//!
//! The answers themselves are compared with the commands in every state of the pair table: see tests/pairs/what_if.rs.

use std::path::Path;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name};
use crate::peer::Bench;

fn be64(b: &[u8], at: usize) -> usize {
    u64::from_be_bytes(b[at..at + 8].try_into().expect("eight bytes")) as usize
}

/// Marks an image as one that was not closed, and lets its last cluster be free for whoever believes the refcounts.
fn spoil(image: &Path) {
    let mut b = std::fs::read(image).expect("an image");
    b[79] |= 1;
    let block = be64(&b, be64(&b, 48));
    let last = (b.len() - 1) / 65536;
    assert_eq!(b[block + last * 2..][..2], [0, 1], "it is in use");
    b[block + last * 2 + 1] = 0;
    std::fs::write(image, b).expect("written");
}

struct World {
    bench: Bench,
    daemon: Daemon,
    monitor: Monitor,
    before: Vec<u8>,
}

fn world() -> World {
    let bench = Bench::new();
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("d");
    let name = image.to_str().expect("plain");
    bench.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"]);
    bench.ok("ours/qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 1M", name]);
    spoil(&image);
    let mut daemon = Daemon::start_in(dir, by_established_name, &[]);
    let monitor = daemon.monitor();
    World { bench, daemon, monitor, before: std::fs::read(image).expect("an image") }
}

impl World {
    fn node(&self, read_only: bool) -> Json {
        json!({"driver": "qcow2", "node-name": "d", "read-only": read_only,
               "file": {"driver": "file", "filename": self.daemon.path("d")}})
    }

    fn is_untouched(&self) -> bool {
        std::fs::read(self.daemon.path("d")).expect("an image") == self.before
    }

    /// It is possible, and the question has not touched the image.
    fn possible(&mut self, command: &str, arguments: &Json) {
        let said = self.monitor.ok("what-if", json!({"command": command, "arguments": arguments}));
        assert_eq!(said["allowed"], true, "{command} {arguments}: {said}");
        assert!(self.is_untouched(), "what-if {command} {arguments} has changed the image");
    }

    /// It is not, and neither the question nor the command has touched the image.
    fn impossible(&mut self, command: &str, arguments: &Json) {
        let said = self.monitor.ok("what-if", json!({"command": command, "arguments": arguments}));
        let reply = self.monitor.ask(&json!({"execute": command, "arguments": arguments}));
        assert_eq!(said["allowed"], false, "{command} {arguments}: {said} {reply}");
        assert_eq!(said["error"]["desc"], reply["error"]["desc"], "{command} {arguments}");
        assert!(self.is_untouched(), "{command} {arguments} has changed the image");
    }

    /// It is repaired, and so is what is written to it.
    fn check_repaired(mut self) {
        let d = std::fs::read(self.daemon.path("d")).expect("an image");
        assert_eq!(d[79] & 1, 0, "it is marked clean");
        let export = json!({"type": "nbd", "id": "e", "node-name": "d", "writable": true});
        let socket = self.daemon.path("n.sock");
        let at = json!({"addr": {"type": "unix", "data": {"path": socket}}});
        self.monitor.ok("nbd-server-start", at);
        self.monitor.ok("block-export-add", export);
        let uri = format!("nbd+unix:///d?socket={}", socket.display());
        self.bench.ok("ours/qemu-io", &["-f", "raw", "-c", "write -P 4 1M 1M", "-c", "read -P 3 0 1M", &uri]);
        self.monitor.ok("quit", json!({}));
        assert!(self.daemon.wait().success());
        let name = self.daemon.path("d");
        let name = name.to_str().expect("plain");
        self.bench.ok("ours/qemu-img", &["check", "-q", name]);
        self.bench.ok(
            "ours/qemu-io",
            &["-f", "qcow2", "-r", "-c", "read -P 3 0 1M", "-c", "read -P 4 1M 1M", name],
        );
    }
}

/// The story: an image that was not closed properly was repaired while it was opened, and what-if opened it. So did
/// a command that was refused after that.
#[test]
fn an_image_is_repaired_by_who_gets_to_write_it_and_by_nobody_else() {
    let mut w = world();
    w.possible("blockdev-add", &w.node(false));
    // The configuration is looked for when the image is open.
    let refused = json!({"driver": "blkdebug", "node-name": "n", "config": "/none", "image": w.node(false)});
    w.impossible("blockdev-add", &refused);
    w.monitor.ok("blockdev-add", json!({"driver": "null-co", "node-name": "source", "size": 4 << 20}));
    let into_it = json!({"type": "drive-backup", "data": {"job-id": "j", "device": "source", "format": "qcow2",
        "sync": "full", "mode": "existing", "target": w.daemon.path("d")}});
    w.impossible("transaction", &json!({"actions": [into_it, {"type": "abort", "data": {}}]}));
    w.possible("transaction", &json!({ "actions": [into_it] }));
    let node = w.node(false);
    w.monitor.ok("blockdev-add", node);
    w.check_repaired();
}

/// The same by way of a node that becomes writable later.
#[test]
fn a_read_only_image_is_repaired_when_it_becomes_writable() {
    let mut w = world();
    let node = w.node(true);
    w.monitor.ok("blockdev-add", node);
    assert!(w.is_untouched());
    let reopen = json!({"options": [w.node(false)]});
    w.possible("blockdev-reopen", &reopen);
    let node = w.node(false);
    w.impossible("blockdev-reopen", &json!({"options": [node, {"driver": "raw", "node-name": "d"}]}));
    w.monitor.ok("blockdev-reopen", reopen);
    w.check_repaired();
}

/// And when it is taken over from another process.
#[test]
fn an_inactive_image_is_repaired_when_it_becomes_active() {
    let mut w = world();
    let mut node = w.node(false);
    node["active"] = false.into();
    w.monitor.ok("blockdev-add", node);
    w.possible("blockdev-set-active", &json!({"node-name": "d", "active": true}));
    w.monitor.ok("blockdev-set-active", json!({"node-name": "d", "active": true}));
    w.check_repaired();
}
