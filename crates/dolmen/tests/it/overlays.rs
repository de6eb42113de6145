//! What an overlay shows is its backing file's where it has nothing of its own. So nobody writes or shrinks that
//! file under it, but for who keeps the overlay right; in one process as between two.
//!
//! Each of these was accepted, with a wrong disk as the result:
//!
//! - `block_resize` made `base` smaller under `mid` and `top`, which read zeroes from then on, and for good.
//! - A backup, a commit or a writable export wrote `base`, while a sibling of `mid` ran over it.
//! - A job on a filter over an image refused its own guest: it claimed that nobody writes the image, which
//!   is where what passes its filter arrives.

use serde_json::{Value as Json, json};

use crate::hazards::{Scene, export};

const SIZE: u64 = 8 << 20;

fn qcow2(s: &Scene, name: &str, backing: Json) -> Json {
    let file = s.bench.path(&format!("{name}.qcow2"));
    json!({
        "driver": "qcow2", "node-name": name, "backing": backing,
        "file": {"driver": "file", "node-name": format!("{name}-f"), "filename": file},
    })
}

/// A new image with a node over `backing`, whose file its header names.
fn overlay(s: &mut Scene, name: &str, backing: &str) {
    let file = format!("{name}.qcow2");
    let below = format!("{backing}.qcow2");
    let mut args = vec!["img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k"];
    match backing {
        "" => args.extend([file.as_str(), "8M"]),
        // The backing file is open for writing.
        _ => args.extend(["-u", "-F", "qcow2", "-b", &below, &file, "8M"]),
    }
    s.bench.ok("dolmen", &args);
    let link = if backing.is_empty() { Json::Null } else { backing.into() };
    let node = qcow2(s, name, link);
    s.ok("blockdev-add", node);
}

fn job(id: &str, device: &str, target: &str) -> Json {
    json!({"job-id": id, "device": device, "target": target, "sync": "full"})
}

fn size(s: &mut Scene, node: &str) -> u64 {
    let nodes = s.ok("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("a list");
    let node = nodes.iter().find(|n| n["node-name"] == *node).expect("it is there");
    node["image"]["virtual-size"].as_u64().expect("a size")
}

#[test]
fn a_node_is_not_shrunk_under_its_overlays() {
    let mut s = Scene::new();
    let smaller = |node: &str| json!({"node-name": node, "size": 65536});
    s.refused("block_resize", smaller("base"), "mid", "block_resize", "top");
    s.refused("block_resize", smaller("mid"), "mid", "block_resize", "top");
    // A filter over it hands the new size down.
    s.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "base"}));
    s.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "c", "file": "r"}));
    s.refused("block_resize", smaller("c"), "mid", "block_resize", "top");
    s.refused("block_resize", smaller("base"), "mid", "block_resize", "top");
    s.export("reader", "top", false);
    s.first_data("reader");
    // Nor does it grow while a reader above would see what comes up there.
    s.refused("block_resize", json!({"node-name": "base", "size": 2 * SIZE}), "base", "block_resize", "mid");
    s.ok("block-export-del", json!({"id": "reader", "mode": "hard"}));
    s.ok("block_resize", json!({"node-name": "base", "size": 2 * SIZE}));
    // The way out: nothing lies over it any more.
    for name in ["top", "mid", "c", "r"] {
        s.ok("blockdev-del", json!({"node-name": name}));
    }
    s.ok("block_resize", smaller("base"));
    assert_eq!(size(&mut s, "base"), 65536);
}

/// `block_resize` was refused there, and another window of a raw node, by `blockdev-reopen`, did the same. Found in a user's
/// trial.
#[test]
fn a_node_is_not_reopened_smaller_under_its_overlays() {
    let mut s = Scene::new();
    std::fs::write(s.bench.path("disk"), vec![1; 8 << 20]).expect("a file");
    s.ok("blockdev-add", json!({"driver": "file", "node-name": "disk", "filename": s.bench.path("disk")}));
    s.ok("blockdev-add", json!({"driver": "raw", "node-name": "window", "file": "disk"}));
    overlay(&mut s, "over", "");
    let link = |s: &Scene| {
        let mut node = qcow2(s, "over", json!("window"));
        node["file"] = json!("over-f");
        json!({ "options": [node] })
    };
    let over = link(&s);
    s.ok("blockdev-reopen", over);
    let window = |size: u64| json!({"options": [{"driver": "raw", "node-name": "window", "file": "disk", "size": size}]});
    s.refused("blockdev-reopen", window(1 << 20), "window", "blockdev-reopen", "over");
    assert_eq!(size(&mut s, "window"), 8 << 20);
    s.ok("blockdev-del", json!({"node-name": "over"}));
    s.ok("blockdev-reopen", window(1 << 20));
    assert_eq!(size(&mut s, "window"), 1 << 20);
}

/// The other way out: the user of the overlay says that it may change.
#[test]
fn an_overlay_may_say_that_its_backing_node_may_change() {
    let mut s = Scene::new();
    overlay(&mut s, "x", "base");
    s.ok("blockdev-del", json!({"node-name": "x"}));
    let mut node = qcow2(&s, "x", json!("base"));
    node["x-backing-may-change"] = true.into();
    s.ok("blockdev-add", node.clone());
    s.export("sibling", "x", true);
    s.export("writer", "base", true);
    s.io("writer", "write -P 0x55 3M 64k");
    s.io("sibling", "read -P 0x55 3M 64k");
    // By reopening, it is taken back.
    node["x-backing-may-change"] = false.into();
    node["file"] = "x-f".into();
    let reply =
        s.monitor.ask(&json!({"execute": "blockdev-reopen", "arguments": {"options": [node.clone()]}}));
    assert!(reply["error"]["desc"].as_str().is_some_and(|d| d.contains("'writer'")), "{reply}");
    s.ok("block-export-del", json!({"id": "writer", "mode": "hard"}));
    s.ok("blockdev-reopen", json!({"options": [node]}));
    s.refused("block-export-add", export("writer", "base", true), "base", "writer", "x");
    // What can't be said of a node without a backing file is refused.
    let reply = s.monitor.ask(&json!({"execute": "blockdev-add", "arguments":
        {"driver": "raw", "node-name": "n", "file": "t1", "x-backing-may-change": true}}));
    assert!(reply.get("error").is_some(), "{reply}");
}

#[test]
fn a_sibling_that_runs_keeps_others_from_writing_what_it_shows() {
    let mut s = Scene::new();
    overlay(&mut s, "x", "base");
    s.export("sibling", "x", true);
    s.refused("block-export-add", export("writer", "base", true), "base", "writer", "x");
    s.refused("blockdev-backup", job("job", "t1", "base"), "base", "job", "x");
    s.refused("blockdev-mirror", job("job", "t1", "base"), "base", "job", "x");
    let commit = |node: &str, top: &str| json!({"job-id": "job", "device": node, "top-node": top, "base-node": "base"});
    s.refused("block-commit", commit("top", "mid"), "base", "job", "x");
    s.refused("block-commit", commit("top", "top"), "base", "job", "x");
    s.io("sibling", "write -P 0x66 4M 64k");
    s.io("sibling", "read -P 0x33 2M 1M");
    // The other order: the commit runs, and the sibling may not be read until it is over.
    s.ok("block-export-del", json!({"id": "sibling", "mode": "hard"}));
    s.export("guest", "top", true);
    let mut slow = commit("top", "mid");
    slow["speed"] = 1.into();
    s.ok("block-commit", slow);
    s.refused("block-export-add", export("sibling", "x", false), "base", "job", "x");
    s.io("guest", "write -P 0x77 4M 64k");
    s.ok("block-job-set-speed", json!({"device": "job", "speed": 0}));
    s.over();
    s.first_data_but_4m("guest");
    s.export("sibling", "x", false);
    // The chain's own commit has changed what the sibling shows: it was read by nobody.
    s.io("sibling", "read -P 0x22 1M 1M");
    s.io("sibling", "read -P 0x66 4M 64k");
}

/// Every job, with filters over its source, under a guest that writes through the outermost one.
#[test]
fn jobs_on_filters_over_an_image() {
    let filter = |kind: &str, name: &str, child: &str| match kind {
        "blkdebug" => json!({"driver": kind, "node-name": name, "image": child}),
        "copy-before-write" => json!({"driver": kind, "node-name": name, "file": child, "target": "saved"}),
        _ => json!({"driver": kind, "node-name": name, "file": child}),
    };
    let stacks: [&[&str]; 6] = [
        &["raw"],
        &["copy-on-read"],
        &["copy-before-write"],
        &["blkdebug"],
        &["raw", "copy-on-read"],
        &["copy-before-write", "raw"],
    ];
    for stack in stacks {
        for work in ["mirror", "write-blocking", "backup", "commit", "stream"] {
            let mut s = Scene::new();
            overlay(&mut s, "saved", "");
            let mut source = "top".to_owned();
            for (i, kind) in stack.iter().enumerate() {
                let name = format!("filter{i}");
                s.ok("blockdev-add", filter(kind, &name, &source));
                source = name;
            }
            s.export("guest", &source, true);
            s.io("guest", "write -P 0x71 4M 64k");
            let mut o = match work {
                "commit" => json!({"job-id": "job", "device": source, "base-node": "base"}),
                "stream" => json!({"job-id": "job", "device": source}),
                _ => job("job", &source, "t1"),
            };
            if work == "write-blocking" {
                o["copy-mode"] = work.into();
            }
            let command = match work {
                "backup" => "blockdev-backup",
                "commit" => "block-commit",
                "stream" => "block-stream",
                _ => "blockdev-mirror",
            };
            s.ok(command, o);
            s.io("guest", "write -P 0x72 5M 64k");
            s.export("late", &source, true);
            s.io("late", "write -P 0x73 6M 64k");
            if matches!(work, "backup" | "stream") {
                s.over();
            } else {
                s.ready();
                s.io("late", "write -P 0x74 4M 64k");
                s.complete();
            }
            for (pattern, at) in [("0x11", "0"), ("0x22", "1M"), ("0x33", "2M"), ("0x44", "7M")] {
                s.io("guest", &format!("read -P {pattern} {at} 1M"));
            }
            s.io("late", "read -P 0x72 5M 64k");
            s.io("guest", "read -P 0x73 6M 64k");
            if work == "backup" {
                s.export("copy", "t1", false);
                s.io("copy", "read -P 0x71 4M 64k");
                s.io("copy", "read -P 0 5M 2M");
                s.io("copy", "read -P 0x44 7M 1M");
            }
            if work == "mirror" {
                s.image("t1", &["read -P 0x74 4M 64k", "read -P 0x73 6M 64k", "read -P 0x22 1M 1M"]);
            }
        }
    }
}

/// Most refusals of a long random test were these: a mirror's pivot renames what overlays name, a snapshot
/// has no need to.
#[test]
fn a_node_with_overlays_gets_a_snapshot() {
    let mut s = Scene::new();
    for name in ["t1", "mid", "top"] {
        // Only `base` is wanted here.
        let reply = s.monitor.ask(&json!({"execute": "blockdev-del", "arguments": {"node-name": name}}));
        assert!(reply.get("error").is_none() || name == "mid", "{reply}");
    }
    s.ok("blockdev-del", json!({"node-name": "mid"}));
    overlay(&mut s, "x", "base");
    overlay(&mut s, "new", "base");
    let mut unlinked = qcow2(&s, "new", Json::Null);
    unlinked["file"] = "new-f".into();
    s.ok("blockdev-reopen", json!({"options": [unlinked]}));
    s.export("guest", "base", true);
    s.io("guest", "write -P 0x55 3M 64k");
    s.refused("block-export-add", export("sibling", "x", false), "base", "guest", "x");
    s.ok("blockdev-snapshot", json!({"node": "base", "overlay": "new"}));
    // The guest writes to the new overlay; what the sibling lies over does not change any more.
    s.export("sibling", "x", true);
    s.io("guest", "write -P 0x56 3M 32k");
    s.io("sibling", "read -P 0x55 3M 64k");
    s.io("sibling", "write -P 0x57 2M 64k");
    s.io("guest", "read -P 0x33 2M 1M");
    s.io("guest", "read -P 0x56 3M 32k");
    s.io("guest", "read -P 0x55 3104k 32k");
    // By its header, too.
    s.image("x", &["read -P 0x55 3M 64k", "read -P 0x57 2M 64k", "read -P 0x44 7M 1M"]);
}

#[test]
fn a_filter_below_an_overlay_stays_at_a_snapshot() {
    let mut s = Scene::new();
    overlay(&mut s, "new", "top");
    let mut unlinked = qcow2(&s, "new", Json::Null);
    unlinked["file"] = "new-f".into();
    s.ok("blockdev-reopen", json!({"options": [unlinked]}));
    s.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "top"}));
    overlay(&mut s, "x", "top");
    s.ok(
        "blockdev-reopen",
        json!({"options": [
            {"driver": "qcow2", "node-name": "x", "file": "x-f", "backing": "r"}
        ]}),
    );
    s.export("reader", "r", false);
    let snapshot = json!({"execute": "blockdev-snapshot", "arguments": {"node": "top", "overlay": "new"}});
    let reply = s.monitor.ask(&snapshot);
    let text = reply["error"]["desc"].as_str().unwrap_or_default().to_owned();
    assert!(text.contains("'r'") && text.contains("'x'") && text.contains("'reader'"), "{reply}");
    s.ok("block-export-del", json!({"id": "reader", "mode": "hard"}));
}

/// Two points in time of one disk, and a mirror beside a backup in both orders.
#[test]
fn two_jobs_that_copy_one_node() {
    for first in ["blockdev-backup", "blockdev-mirror"] {
        let mut s = Scene::new();
        overlay(&mut s, "t2", "");
        s.export("guest", "top", true);
        let slow = |id: &str, target: &str| {
            let mut o = job(id, "top", target);
            o["speed"] = 1.into();
            o
        };
        match first {
            "blockdev-mirror" => {
                s.ok(first, job("first", "top", "t1"));
                s.ready();
            }
            _ => drop(s.ok(first, slow("first", "t1"))),
        }
        s.io("guest", "write -P 0x71 4M 64k");
        s.ok("blockdev-backup", slow("second", "t2"));
        s.io("guest", "write -P 0x72 4M 1M");
        s.io("guest", "write -P 0x73 0 64k");
        // The first one ends under the second one.
        match first {
            "blockdev-mirror" => drop(s.ok("job-complete", json!({"id": "first"}))),
            _ => drop(s.ok("block-job-set-speed", json!({"device": "first", "speed": 0}))),
        }
        s.over();
        s.io("guest", "write -P 0x74 2M 64k");
        s.io("guest", "read -P 0x72 4M 1M");
        s.ok("block-job-set-speed", json!({"device": "second", "speed": 0}));
        s.over();
        s.export("copy", "t2", false);
        s.io("copy", "read -P 0x71 4M 64k");
        s.io("copy", "read -P 0 4160k 64k");
        s.io("copy", "read -P 0x11 0 1M");
        s.io("copy", "read -P 0x33 2M 1M");
        if first == "blockdev-backup" {
            s.export("other", "t1", false);
            s.first_data("other");
        } else {
            s.image("t1", &["read -P 0x72 4M 1M", "read -P 0x74 2M 64k", "read -P 0x44 7M 1M"]);
        }
    }
}

/// A random schedule found it: the end of a fleecing job changed what its target lies over, which waited for a
/// flush of the target; on a broken disk the job did not end any more.
#[test]
fn a_fleecing_job_ends_though_its_target_can_not_be_flushed() {
    let mut s = Scene::new();
    overlay(&mut s, "f", "top");
    s.ok("blockdev-del", json!({"node-name": "f"}));
    let mut node = qcow2(&s, "f", json!("top"));
    node["file"] = json!({
        "driver": "blkdebug", "image": {"driver": "file", "filename": s.bench.path("f.qcow2")},
        "inject-error": [{"event": "flush_to_disk", "errno": 5, "iotype": "flush", "once": false}],
    });
    s.ok("blockdev-add", node);
    s.export("guest", "top", true);
    s.ok("blockdev-backup", json!({"job-id": "job", "device": "top", "target": "f", "sync": "none"}));
    s.export("past", "f", false);
    s.io("guest", "write -P 0x77 0 1M");
    s.io("past", "read -P 0x11 0 1M");
    s.ok("job-cancel", json!({"id": "job"}));
    s.job_event(&["BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"]);
    s.io("guest", "write -P 0x78 1M 64k");
    s.io("past", "read -P 0x11 0 1M");
}
