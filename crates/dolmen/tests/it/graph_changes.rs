//! Snapshots, resizing, transactions, `what-if` and visible operations, from outside: a guest writes through an
//! export meanwhile, and QEMU's tool judges the images afterwards.

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, eventually};
use crate::peer::Bench;

struct World {
    bench: Bench,
    daemon: Daemon,
    monitor: Option<Monitor>,
}

const NBD: &str = "nbd.sock";

/// `top -> base` with data in both, an empty overlay `ov`, two targets, and a writable export of `top`.
fn world() -> Option<World> {
    let bench = Bench::with_peers()?;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_str().expect("plain").to_owned();
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", &at("base"), "4M"]);
    bench.ok("qemu-io", &["-c", "write -P 1 0 3M", &at("base")]);
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &at("top")]);
    bench.ok("qemu-io", &["-c", "write -P 2 1M 1M", &at("top")]);
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", &at("ov")]);
    for name in ["t", "u"] {
        bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", &at(name), "4M"]);
    }
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &at("v")]);
    let mut daemon = Daemon::start_in(dir, by_established_name, &[]);
    let mut monitor = daemon.monitor();
    let node = |name: &str, backing: Json| {
        json!({"driver": "qcow2", "node-name": name, "backing": backing,
               "file": {"driver": "file", "filename": name}})
    };
    monitor.ok("blockdev-add", node("base", Json::Null));
    monitor.ok("blockdev-add", node("top", json!("base")));
    for name in ["ov", "t", "u", "v"] {
        monitor.ok("blockdev-add", node(name, Json::Null));
    }
    monitor.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": NBD}}}));
    monitor.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "guest", "node-name": "top", "name": "d", "writable": true}),
    );
    Some(World { bench, daemon, monitor: Some(monitor) })
}

impl World {
    fn monitor(&mut self) -> &mut Monitor {
        self.monitor.as_mut().expect("it has not ended")
    }

    fn ok(&mut self, name: &str, arguments: Json) -> Json {
        self.monitor().ok(name, arguments)
    }

    fn refused(&mut self, name: &str, arguments: Json) -> Json {
        let reply = self.monitor().ask(&json!({"execute": name, "arguments": arguments}));
        assert!(reply.get("error").is_some(), "{name} was accepted: {reply}");
        reply["error"].clone()
    }

    fn path(&self, name: &str) -> String {
        self.daemon.path(name).to_str().expect("plain").to_owned()
    }

    /// A guest's command.
    fn guest(&self, command: &str) {
        let url = format!("nbd+unix:///d?socket={}", self.path(NBD));
        self.bench.ok("qemu-io", &["-f", "raw", "-c", command, &url]);
    }

    fn end(&mut self) {
        let mut monitor = self.monitor.take().expect("it ends once");
        monitor.send(&json!({"execute": "quit"}));
        monitor.rest();
        assert!(self.daemon.wait().success());
    }

    /// What QEMU's tool reads in an image.
    fn reads(&self, image: &str, pattern: u8, at: &str, len: &str) {
        self.bench.ok("qemu-io", &["-r", "-c", &format!("read -P {pattern} {at} {len}"), &self.path(image)]);
        self.bench.ok("qemu-img", &["check", "-q", &self.path(image)]);
    }

    fn until(&mut self, id: &str, status: &str) {
        eventually(status, || {
            let jobs = self.ok("query-jobs", json!({}));
            let is = |j: &Json| j["id"] == id && j["status"] == status;
            jobs.as_array().expect("a list").iter().any(is).then_some(())
        });
    }

    fn conclude(&mut self, id: &str) {
        eventually("the job is gone", || {
            let jobs = self.ok("query-jobs", json!({}));
            jobs.as_array().expect("a list").iter().all(|j| j["id"] != id).then_some(())
        });
    }
}

#[test]
fn a_snapshot_freezes_what_lies_below() {
    let Some(mut w) = world() else { return };
    w.guest("write -P 7 0 64k");
    w.ok("blockdev-snapshot", json!({"node": "top", "overlay": "ov"}));
    w.guest("write -P 8 64k 64k");
    w.guest("read -P 7 0 64k");
    let again = w.refused("blockdev-snapshot", json!({"node": "t", "overlay": "ov"}));
    assert!(again["desc"].as_str().expect("a text").starts_with("The overlay"), "{again}");
    w.ok(
        "blockdev-snapshot-sync",
        json!({"node-name": "ov", "snapshot-file": "new", "snapshot-node-name": "n", "format": "qcow2"}),
    );
    w.guest("write -P 9 128k 64k");
    w.end();
    w.reads("top", 7, "0", "64k");
    w.reads("top", 1, "64k", "128k");
    w.reads("ov", 8, "64k", "64k");
    w.reads("ov", 1, "128k", "64k");
    w.reads("new", 9, "128k", "64k");
    w.reads("new", 8, "64k", "64k");
    w.reads("new", 2, "1M", "1M");
}

#[test]
fn a_transaction_is_one_instant() {
    let Some(mut w) = world() else { return };
    w.guest("write -P 7 0 64k");
    let backup = |id: &str, target: &str| {
        json!({"type": "blockdev-backup",
               "data": {"job-id": id, "device": "top", "target": target, "sync": "full", "speed": 1 << 20}})
    };
    // The second target does not exist: nothing of it happens.
    let before = w.ok("x-debug-query-block-graph", json!({}));
    w.refused("transaction", json!({"actions": [backup("a", "t"), backup("b", "nothing")]}));
    let made = json!({"type": "blockdev-snapshot-sync",
                      "data": {"node-name": "top", "snapshot-file": "never", "snapshot-node-name": "n"}});
    w.refused("transaction", json!({"actions": [made, {"type": "abort", "data": {}}]}));
    assert!(!w.daemon.path("never").exists(), "the overlay of a transaction that failed is gone");
    assert_eq!(w.ok("x-debug-query-block-graph", json!({})), before);
    assert_eq!(w.ok("query-jobs", json!({})), json!([]));

    let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": "top", "overlay": "ov"}});
    w.ok(
        "transaction",
        json!({"actions": [backup("a", "t"), snapshot], "properties": {"completion-mode": "grouped"}}),
    );
    w.guest("write -P 9 0 64k");
    w.ok("block-job-set-speed", json!({"device": "a", "speed": 0}));
    w.conclude("a");
    w.guest("read -P 9 0 64k");
    w.end();
    w.reads("t", 7, "0", "64k");
    w.reads("top", 7, "0", "64k");
    w.reads("ov", 9, "0", "64k");
}

#[test]
fn grouped_jobs_end_together_or_not_at_all() {
    let Some(mut w) = world() else { return };
    let backup = |id: &str, device: &str, target: &str, speed: u32| {
        json!({"type": "blockdev-backup", "data": {"job-id": id, "device": device, "target": target,
               "sync": "full", "speed": speed, "auto-dismiss": false}})
    };
    let actions = json!([backup("fast", "ov", "t", 0), backup("slow", "base", "u", 1)]);
    w.ok("transaction", json!({"actions": actions, "properties": {"completion-mode": "grouped"}}));
    w.until("fast", "waiting");
    w.ok("job-cancel", json!({"id": "slow"}));
    w.until("fast", "concluded");
    w.until("slow", "concluded");
    w.ok("job-dismiss", json!({"id": "fast"}));
    w.ok("job-dismiss", json!({"id": "slow"}));
    w.end();
}

#[test]
fn a_node_is_resized_unless_somebody_relies_on_its_size() {
    let Some(mut w) = world() else { return };
    let grow = json!({"node-name": "top", "size": 8 << 20});
    let refusal = w.refused("block_resize", grow.clone());
    let parties = &refusal["data"]["conflict"];
    assert_eq!(parties["denies"]["id"], "guest", "{refusal}");
    assert_eq!(parties["actions"], json!(["resize"]), "{refusal}");
    assert!(refusal["desc"].as_str().expect("a text").contains("block-export-del 'guest'"), "{refusal}");
    let what = w.ok("what-if", json!({"command": "block_resize", "arguments": grow}));
    assert_eq!(
        (&what["allowed"], &what["error"]["data"]["conflict"]["node"]),
        (&json!(false), &json!("top"))
    );
    w.ok("block-export-del", json!({"id": "guest"}));
    w.ok("block_resize", grow);
    w.ok("block_resize", json!({"node-name": "base", "size": 6 << 20}));
    w.end();
    w.reads("top", 0, "4M", "4M");
    w.reads("top", 1, "2M", "1M");
}

#[test]
fn what_if_changes_nothing_and_tells_what_would() {
    let Some(mut w) = world() else { return };
    let before = w.ok("x-debug-query-block-graph", json!({}));
    let ask = |w: &mut World, command: &str, arguments: Json| {
        w.ok("what-if", json!({"command": command, "arguments": arguments}))
    };
    let seen = ask(&mut w, "blockdev-snapshot", json!({"node": "top", "overlay": "ov"}));
    assert_eq!(seen["allowed"], true);
    assert_ne!(seen["graph"], before);
    let mirror = json!({"job-id": "m", "device": "top", "target": "t", "sync": "full"});
    assert_eq!(ask(&mut w, "blockdev-mirror", mirror.clone())["allowed"], true);
    assert_eq!(ask(&mut w, "query-jobs", json!({}))["graph"], before);
    let e = ask(&mut w, "blockdev-del", json!({"node-name": "base"}));
    assert!(e["error"]["desc"].as_str().expect("a text").contains("'top'"), "{e}");
    w.refused("what-if", json!({"command": "what-if", "arguments": {"command": "quit"}}));
    w.refused("what-if", json!({"command": "no-such-command"}));
    assert_eq!(w.ok("x-debug-query-block-graph", json!({})), before);
    // What was seen is what happens.
    w.ok("blockdev-snapshot", json!({"node": "top", "overlay": "ov"}));
    assert_eq!(w.ok("x-debug-query-block-graph", json!({}))["edges"], seen["graph"]["edges"]);
    w.end();
}

#[test]
fn an_external_tool_is_respected_until_it_ends() {
    let Some(mut w) = world() else { return };
    let claims = json!([{"node-name": "base", "needs": ["consistent-read"], "denies": ["write", "resize"],
                         "why": "reads the file directly"}]);
    w.ok("operation-begin", json!({"id": "reader", "detail": "file-level backup", "claims": claims}));
    let commit = json!({"job-id": "c", "device": "top"});
    let refusal = w.refused("block-commit", commit.clone());
    let text = refusal["desc"].as_str().expect("a text");
    for part in ["node 'base'", "'c'", "tool 'reader'", "reads the file directly", "operation-end 'reader'"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    let ops = w.ok("query-operations", json!({}));
    let ids: Vec<&Json> = ops.as_array().expect("a list").iter().map(|o| &o["id"]).collect();
    assert_eq!(ids, ["guest", "reader"]);
    w.refused("operation-end", json!({"id": "guest"}));
    w.ok("operation-end", json!({"id": "reader"}));
    w.ok("block-commit", commit);
    w.end();
}

#[test]
fn an_image_names_another_backing_file_while_it_is_in_use() {
    let Some(mut w) = world() else { return };
    w.refused("change-backing-file", json!({"device": "top", "image-node-name": "t", "backing-file": "x"}));
    let rename = json!({"device": "top", "image-node-name": "top", "backing-file": "./base"});
    w.ok("change-backing-file", rename);
    w.guest("read -P 1 0 1M");
    w.end();
    w.reads("top", 1, "0", "1M");
    let info = w.bench.ok("qemu-img", &["info", &w.path("top")]);
    assert!(info.contains("backing file: ./base"), "{info}");
}

#[test]
fn drive_jobs_make_their_targets() {
    let Some(mut w) = world() else { return };
    w.ok("drive-backup", json!({"job-id": "b", "device": "top", "target": "copy", "sync": "full"}));
    w.conclude("b");
    w.ok(
        "drive-mirror",
        json!({"job-id": "m", "device": "top", "target": "moved", "sync": "top", "node-name": "n"}),
    );
    w.until("m", "ready");
    w.guest("write -P 6 3M 64k");
    w.ok("job-complete", json!({"id": "m"}));
    w.conclude("m");
    w.guest("write -P 5 0 64k");
    w.end();
    w.reads("copy", 2, "1M", "1M");
    w.reads("copy", 0, "3M", "1M");
    w.reads("moved", 5, "0", "64k");
    w.reads("moved", 6, "3M", "64k");
    w.reads("moved", 2, "1M", "1M");
    w.reads("moved", 1, "2M", "1M");
    // After the pivot the source is left alone.
    w.reads("top", 1, "0", "64k");
}

/// The client would read zeroes where the target has got nothing.
#[test]
fn a_mirror_of_the_top_layer_does_not_pivot_onto_nothing() {
    let Some(mut w) = world() else { return };
    let mirror = |target: &str| {
        json!({"job-id": "m", "device": "top", "target": target, "sync": "top",
                                       "auto-dismiss": false})
    };
    w.ok("blockdev-mirror", mirror("t"));
    w.until("m", "ready");
    let refused = w.refused("job-complete", json!({"id": "m"}));
    assert!(refused["desc"].as_str().expect("a text").contains("has no backing file"), "{refused}");
    w.until("m", "ready");
    // The copy is kept as it is.
    w.ok("block-job-cancel", json!({"device": "m"}));
    w.until("m", "concluded");
    w.ok("job-dismiss", json!({"id": "m"}));
    w.guest("read -P 1 0 1M");
    // A copy of what the source lies over is another image, for all that is known.
    let node = |name: &str, file: &str| {
        json!({"driver": "qcow2", "node-name": name, "read-only": true, "backing": null,
               "file": {"driver": "file", "filename": file, "read-only": true}})
    };
    std::fs::copy(w.path("base"), w.path("base2")).expect("copied");
    w.ok("blockdev-add", node("copy", "base2"));
    w.ok("blockdev-mirror", mirror("v"));
    w.until("m", "ready");
    let refused = w.refused("blockdev-snapshot", json!({"node": "copy", "overlay": "v"}));
    assert!(
        refused["desc"].as_str().expect("a text").contains("names 'base' as its backing file"),
        "{refused}"
    );
    // The same image, opened once more, is what it has to be.
    w.ok(
        "blockdev-reopen",
        json!({"options": [{"driver": "qcow2", "node-name": "base", "backing": null,
        "read-only": true, "file": {"driver": "file", "filename": "base", "read-only": true}}]}),
    );
    w.ok("blockdev-add", node("again", "./base"));
    w.ok("blockdev-snapshot", json!({"node": "again", "overlay": "v"}));
    w.ok("job-complete", json!({"id": "m"}));
    w.until("m", "concluded");
    assert_eq!(w.ok("query-jobs", json!({}))[0].get("error"), None);
    w.guest("read -P 1 0 1M");
    w.guest("read -P 2 1M 1M");
    w.end();
}

/// The overlay that `blockdev-snapshot-sync` put over a node that nobody used belonged to nobody: it could not be removed,
/// nor could anything below it, until the daemon ended. Found by the storm.
#[test]
fn an_overlay_that_nobody_holds_can_be_removed() {
    let Some(mut w) = world() else { return };
    let over = |node: &str, name: &str| json!({"node-name": node, "snapshot-file": format!("{name}.img"), "snapshot-node-name": name});
    w.ok("blockdev-snapshot-sync", over("t", "n"));
    let two = json!({"actions": [{"type": "blockdev-snapshot-sync", "data": over("u", "o")},
                                 {"type": "blockdev-snapshot-sync", "data": over("o", "p")}]});
    w.ok("transaction", two);
    // Who has used it before does not make it go.
    w.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e"}));
    w.ok("block-export-del", json!({"id": "e"}));
    for node in ["n", "t", "p", "o", "u"] {
        w.ok("blockdev-del", json!({"node-name": node}));
    }
    // One that somebody uses goes with its last user, as ever.
    w.ok("blockdev-snapshot-sync", over("top", "q"));
    let refused = w.refused("blockdev-del", json!({"node-name": "q"}));
    assert_eq!(refused["desc"], "Node q is not owned by the monitor");
    w.end();
}

/// A mirror that had ended kept the files of its source and its target open, with their locks, until `job-dismiss`, even
/// when the nodes had been removed: nobody else could open the images. Found by the storm.
#[test]
fn a_job_that_has_ended_lets_go_of_its_images() {
    let Some(mut w) = world() else { return };
    w.ok("block-export-del", json!({"id": "guest", "mode": "hard"}));
    let job = |id: &str, more: Json| {
        let mut a = json!({"job-id": id, "auto-dismiss": false});
        a.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        a
    };
    let copy = |id: &str, target: &str| job(id, json!({"device": "t", "target": target, "sync": "full"}));
    w.ok("drive-mirror", copy("m", "moved"));
    w.until("m", "ready");
    w.ok("job-cancel", json!({"id": "m"}));
    w.until("m", "concluded");
    w.ok("drive-backup", copy("b", "copied"));
    w.until("b", "concluded");
    w.ok("blockdev-mirror", copy("m2", "u"));
    w.until("m2", "ready");
    w.ok("job-complete", json!({"id": "m2"}));
    w.until("m2", "concluded");
    w.ok("block-stream", job("s", json!({"device": "top"})));
    w.until("s", "concluded");
    w.ok(
        "blockdev-snapshot-sync",
        json!({"node-name": "u", "snapshot-file": "over", "snapshot-node-name": "n"}),
    );
    w.ok("block-commit", job("c", json!({"device": "n"})));
    w.until("c", "ready");
    w.ok("job-complete", json!({"id": "c"}));
    w.until("c", "concluded");
    for node in ["n", "top", "base", "t", "u"] {
        w.ok("blockdev-del", json!({"node-name": node}));
    }
    assert_eq!(w.ok("query-jobs", json!({})).as_array().map(Vec::len), Some(5));
    for image in ["moved", "copied", "t", "u", "over", "top", "base"] {
        w.bench.ok("qemu-io", &["-c", "write -P 1 0 64k", &w.path(image)]);
    }
    for id in ["m", "b", "m2", "s", "c"] {
        w.ok("job-dismiss", json!({"id": id}));
    }
    w.end();
}

/// While a backup's target is still read when the backup ends, it lies over a node of the daemon's own that answers with
/// errors. `block-stream` with that node as its base, `change-backing-file` and a snapshot wrote that node's driver into headers:
/// QEMU could not open those images any more. Found by the storm.
#[test]
fn no_header_names_a_point_in_time_that_has_ended() {
    let Some(mut w) = world() else { return };
    w.ok("blockdev-del", json!({"node-name": "v"}));
    w.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "v", "backing": "base", "file": {"driver": "file", "filename": "v"}}),
    );
    w.ok("block-export-add", json!({"type": "nbd", "id": "r", "node-name": "v", "name": "r"}));
    w.ok("blockdev-backup", json!({"job-id": "b", "device": "base", "target": "v", "sync": "full"}));
    w.conclude("b");
    let nodes = w.ok("query-named-block-nodes", json!({"flat": true}));
    let gone = nodes.as_array().expect("a list").iter().find(|n| n["drv"] == "point-in-time-gone");
    let gone = gone.expect("it lies below 'v'")["node-name"].clone();
    w.ok("block-export-del", json!({"id": "r", "mode": "hard"}));
    w.refused("change-backing-file", json!({"device": "v", "image-node-name": "v", "backing-file": "base"}));
    for node in [json!("v"), gone.clone()] {
        w.refused(
            "blockdev-snapshot-sync",
            json!({"node-name": node, "snapshot-file": "over", "snapshot-node-name": "over"}),
        );
    }
    assert!(!w.daemon.path("over").exists());
    w.refused(
        "drive-mirror",
        json!({"job-id": "m", "device": "v", "target": "over", "sync": "top", "node-name": "n"}),
    );
    w.ok("block-stream", json!({"job-id": "s", "device": "v", "base-node": gone, "auto-dismiss": false}));
    w.until("s", "concluded");
    let jobs = w.ok("query-jobs", json!({}));
    assert!(jobs[0]["error"].as_str().is_some_and(|e| e.contains("point in time")), "{jobs}");
    w.ok("blockdev-del", json!({"node-name": "v"}));
    let info = w.bench.ok("qemu-img", &["info", &w.path("v")]);
    assert!(info.contains("backing file: base"), "{info}");
    w.end();
}

/// A commit into a raw image went on with the file node and not with the node of the image: the next snapshot of the image left
/// its user behind, who went on writing what the snapshot was to keep. While the commit ran, such a snapshot was accepted, too.
/// Headers of overlays named the format "file". Found by the storm.
#[test]
fn a_commit_into_a_raw_image_goes_on_at_its_node() {
    let Some(mut w) = world() else { return };
    let path = |name: &str| w.path(name);
    w.bench.ok("qemu-img", &["create", "-q", "-f", "raw", &path("rb"), "4M"]);
    for name in ["rm", "rt", "ru"] {
        w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "rb", "-F", "raw", &path(name)]);
    }
    let file = |name: &str| json!({"driver": "file", "filename": name});
    w.ok("blockdev-add", json!({"driver": "raw", "node-name": "rb", "read-only": true, "file": file("rb")}));
    for (name, below) in [("rm", "rb"), ("rt", "rm"), ("ru", "rt")] {
        w.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "backing": below, "file": file(name)}),
        );
    }
    w.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "ru", "name": "e", "writable": true}),
    );
    // From the middle of the chain: the overlay's header names the format.
    w.ok("block-stream", json!({"job-id": "s", "device": "rt", "base-node": "rb"}));
    w.conclude("s");
    w.ok("block-commit", json!({"job-id": "c", "device": "ru", "top-node": "rt", "base-node": "rb"}));
    w.conclude("c");
    for image in ["rt", "ru"] {
        let info = w.bench.ok("qemu-img", &["info", "-U", &w.path(image)]);
        assert!(info.contains("backing file format: raw"), "{info}");
    }
    let snapshot = json!({"node-name": "rb", "snapshot-file": "rs", "snapshot-node-name": "rs"});
    w.ok("block-commit", json!({"job-id": "c", "device": "ru"}));
    w.until("c", "ready");
    w.refused("blockdev-snapshot-sync", snapshot.clone());
    w.ok("job-complete", json!({"id": "c"}));
    w.conclude("c");
    let exports = w.ok("query-block-exports", json!({}));
    let e = exports.as_array().expect("a list").iter().find(|e| e["id"] == "e").expect("an export");
    assert_eq!(e["node-name"], "rb", "{exports}");
    w.ok("blockdev-snapshot-sync", snapshot);
    let url = format!("nbd+unix:///e?socket={}", w.path(NBD));
    w.bench.ok("qemu-io", &["-f", "raw", "-c", "write -P 5 0 64k", "-c", "flush", &url]);
    w.end();
    w.bench.ok("qemu-io", &["-f", "raw", "-r", "-c", "read -P 0 0 4M", &w.path("rb")]);
    w.bench.ok("qemu-io", &["-r", "-c", "read -P 5 0 64k", &w.path("rs")]);
}

/// A snapshot of the base of an intermediate commit took the job along: what was still to be copied went to the new overlay, and the
/// chain was linked to the base without it, with the job a success. Found by the storm.
#[test]
fn the_base_of_a_commit_gets_no_overlay() {
    let Some(mut w) = world() else { return };
    w.ok(
        "blockdev-snapshot-sync",
        json!({"node-name": "top", "snapshot-file": "over", "snapshot-node-name": "over"}),
    );
    let commit = json!({"job-id": "c", "device": "over", "top-node": "top", "base-node": "base", "speed": 1});
    w.ok("block-commit", commit);
    let snapshot = json!({"node-name": "base", "snapshot-file": "no", "snapshot-node-name": "no"});
    let refused = w.refused("blockdev-snapshot-sync", snapshot);
    assert!(refused["desc"].as_str().expect("a text").contains("commits into it"), "{refused}");
    assert!(!w.daemon.path("no").exists());
    w.ok("block-job-set-speed", json!({"device": "c", "speed": 0}));
    w.conclude("c");
    w.guest("read -P 1 0 1M");
    w.guest("read -P 2 1M 1M");
    w.end();
    w.reads("base", 2, "1M", "1M");
}

/// A snapshot of the target of a running mirror took the job along: the rest of the copy went to the new overlay, and the pivot to the
/// target below it, so that the guest read old data. Found by the storm.
#[test]
fn the_target_of_a_mirror_gets_no_overlay() {
    let Some(mut w) = world() else { return };
    w.ok("blockdev-del", json!({"node-name": "v"}));
    w.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "v", "backing": "base", "file": {"driver": "file", "filename": "v"}}),
    );
    w.ok(
        "blockdev-mirror",
        json!({"job-id": "m", "device": "top", "target": "v", "sync": "top", "speed": 1}),
    );
    let snapshot = json!({"node-name": "v", "snapshot-file": "no", "snapshot-node-name": "no"});
    let refused = w.refused("blockdev-snapshot-sync", snapshot);
    assert!(refused["desc"].as_str().expect("a text").contains("writes its copy to it"), "{refused}");
    assert!(!w.daemon.path("no").exists());
    w.ok("block-job-set-speed", json!({"device": "m", "speed": 0}));
    w.until("m", "ready");
    w.ok("job-complete", json!({"id": "m"}));
    w.conclude("m");
    w.guest("read -P 1 0 1M");
    w.guest("read -P 2 1M 1M");
    w.end();
}

/// The same with the target of a backup: the node that was named held only a part of the copy, and the job ended well.
#[test]
fn the_target_of_a_backup_gets_no_overlay() {
    let Some(mut w) = world() else { return };
    w.ok(
        "blockdev-backup",
        json!({"job-id": "b", "device": "top", "target": "t", "sync": "full", "speed": 1}),
    );
    let snapshot = json!({"node-name": "t", "snapshot-file": "no", "snapshot-node-name": "no"});
    let refused = w.refused("blockdev-snapshot-sync", snapshot);
    assert!(refused["desc"].as_str().expect("a text").contains("writes its copy to it"), "{refused}");
    assert!(!w.daemon.path("no").exists());
    w.ok("block-job-set-speed", json!({"device": "b", "speed": 0}));
    w.conclude("b");
    w.end();
    w.reads("t", 2, "1M", "1M");
}

/// A mirror of another mirror's filter stayed with the old source when that mirror pivoted: what the guest wrote from then on was missing
/// in its copy, and its own pivot moved nobody. Found by the storm.
#[test]
fn the_filter_of_a_job_is_not_mirrored() {
    let Some(mut w) = world() else { return };
    let mirror = |id: &str, device: &str, target: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "filter-node-name": format!("{id}-filter")});
    w.ok("blockdev-mirror", mirror("a", "top", "t"));
    w.until("a", "ready");
    let refused = w.refused("blockdev-mirror", mirror("b", "a-filter", "u"));
    assert!(refused["desc"].as_str().expect("a text").contains("belongs to operation 'a'"), "{refused}");
    w.ok("job-complete", json!({"id": "a"}));
    w.conclude("a");
    w.guest("write -P 6 0 64k");
    w.end();
    w.reads("t", 6, "0", "64k");
}

/// An overlay that a job was writing its copy to was accepted for a disk with a reader (a writer was refused): the reader saw the copy
/// instead of its disk. Found by the storm.
#[test]
fn a_disk_with_readers_gets_no_overlay_that_is_written() {
    let Some(mut w) = world() else { return };
    let backup = json!({"job-id": "b", "device": "t", "target": "ov", "sync": "full", "speed": 1});
    let snapshot = json!({"node": "top", "overlay": "ov"});
    w.ok("block-export-del", json!({"id": "guest"}));
    w.ok("block-export-add", json!({"type": "nbd", "id": "r", "node-name": "top", "name": "r"}));
    let actions =
        json!([{"type": "blockdev-backup", "data": backup}, {"type": "blockdev-snapshot", "data": snapshot}]);
    let refused = w.refused("transaction", json!({"actions": actions.clone()}));
    assert!(
        refused["desc"].as_str().expect("a text").starts_with("The overlay is already in use"),
        "{refused}"
    );
    // Once the copy has begun, too, if only for what it holds.
    w.ok("blockdev-backup", actions[0]["data"].clone());
    w.refused("blockdev-snapshot", actions[1]["data"].clone());
    w.ok("job-cancel", json!({"id": "b"}));
    w.conclude("b");
    w.end();
}
