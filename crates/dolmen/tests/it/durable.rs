//! What a flush promises, when the graph changes between the write and the flush: the daemon is killed, and the
//! images are looked at.

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, serve};
use crate::load::Client;
use crate::peer::Bench;

const BLOCKS: u64 = 8;

/// A daemon with `top`, an empty `ov` that names `below`, and an export of what `over` makes of `top`.
fn scene(b: &Bench, below: &str, over: Option<&str>) -> (Daemon, Monitor, Client) {
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "top", "4M"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", "ov", "4M"]);
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    for name in ["top", "ov"] {
        let file = json!({"driver": "file", "filename": b.path(name)});
        m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "backing": null, "file": file}));
    }
    if let Some(driver) = over {
        m.ok("blockdev-add", json!({"driver": driver, "node-name": "over", "file": "top"}));
    }
    m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
    let node = over.map_or("top", |_| "over");
    m.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": true}),
    );
    let client = Client::connect(&d.path("n.sock"), "e").expect("connected");
    (d, m, client)
}

/// A client's write was acknowledged, a snapshot was made, the client's flush was acknowledged, the daemon was killed,
/// and the write was gone, because the flush reached the overlay only, and the tables of the image below were still
/// in memory.
#[test]
fn a_flush_covers_what_was_written_before_a_snapshot() {
    let b = Bench::new();
    let snapshot = json!({"node": "top", "overlay": "ov"});
    let sync = |b: &Bench| json!({"node-name": "top", "snapshot-file": b.path("new"), "format": "qcow2"});
    type Step = Box<dyn Fn(&Bench, &mut Monitor)>;
    let plain = snapshot.clone();
    let steps: Vec<(&str, Option<&str>, &str, Step)> = vec![
        ("plain", None, "ov", Box::new(move |_, m| drop(m.ok("blockdev-snapshot", plain.clone())))),
        ("raw", Some("raw"), "ov", {
            let s = snapshot.clone();
            Box::new(move |_, m| drop(m.ok("blockdev-snapshot", s.clone())))
        }),
        ("copy-on-read", Some("copy-on-read"), "ov", {
            let s = snapshot.clone();
            Box::new(move |_, m| drop(m.ok("blockdev-snapshot", s.clone())))
        }),
        ("sync", None, "new", Box::new(move |b, m| drop(m.ok("blockdev-snapshot-sync", sync(b))))),
        ("transaction", None, "new", {
            Box::new(move |b, m| {
                let data = json!({"node-name": "ov", "snapshot-file": b.path("new"), "format": "qcow2"});
                let actions = json!([
                    {"type": "blockdev-snapshot", "data": snapshot},
                    {"type": "blockdev-snapshot-sync", "data": data},
                ]);
                m.ok("transaction", json!({"actions": actions}));
            })
        }),
    ];
    for (what, over, root, step) in steps {
        let _ = std::fs::remove_file(b.path("new"));
        let (mut d, mut m, mut client) = scene(&b, "top", over);
        for block in 0..BLOCKS {
            client.write(block, 0x41 + block as u8).expect("written");
        }
        step(&b, &mut m);
        client.write(BLOCKS, 0x71).expect("written");
        client.flush().expect("flushed");
        d.signal(Signal::KILL);
        d.wait();
        for block in 0..BLOCKS {
            let command = format!("read -P {} {} 4k", 0x41 + block, block * 4096);
            let out = b
                .ok("dolmen", &["io", "-r", "--allow-backing=anything", "-f", "qcow2", "-c", &command, root]);
            assert!(!out.contains("failed"), "{what}, block {block}: {out}");
        }
        let command = format!("read -P 113 {} 4k", BLOCKS * 4096);
        b.ok("dolmen", &["io", "-r", "--allow-backing=anything", "-f", "qcow2", "-c", &command, root]);
    }
}

/// `s` had been made and linked by `blockdev-snapshot-sync`, so its definition names no backing file. When the
/// overlay above was reopened with other flags, `s` followed it, and lost its link: the guest read zeroes.
#[test]
fn a_node_that_a_reopen_does_not_name_keeps_its_backing_file() {
    let b = Bench::new();
    for filter in [None, Some("raw"), Some("copy-on-read")] {
        let _ = std::fs::remove_file(b.path("s"));
        let (_d, mut m, mut client) = scene(&b, "s", None);
        client.write(0, 0x41).expect("written");
        m.ok(
            "blockdev-snapshot-sync",
            json!({"node-name": "top", "snapshot-file": b.path("s"), "snapshot-node-name": "s", "format": "qcow2"}),
        );
        m.ok("blockdev-snapshot", json!({"node": "s", "overlay": "ov"}));
        let mut o = json!({"driver": "qcow2", "node-name": "ov", "read-only": false,
            "file": {"driver": "file", "filename": b.path("ov")}});
        let file = graph_child(&mut m, "ov", "file");
        o["file"] = json!(file);
        o["backing"] = match filter {
            None => json!("s"),
            Some(driver) => {
                m.ok(
                    "blockdev-add",
                    json!({"driver": driver, "node-name": "f", "file": "s", "read-only": true}),
                );
                json!("f")
            }
        };
        o["cache"] = json!({"direct": false, "no-flush": false});
        for discard in ["unmap", "ignore", "unmap"] {
            o["discard"] = json!(discard);
            m.ok("blockdev-reopen", json!({"options": [o]}));
            assert_eq!(graph_child(&mut m, "s", "backing"), "top", "{filter:?}");
            assert_eq!(client.read(0).expect("read"), [0x41; 4096], "{filter:?}");
        }
    }
}

/// The node that a child of a node is.
fn graph_child(m: &mut Monitor, node: &str, child: &str) -> String {
    let graph = m.ok("x-debug-query-block-graph", json!({}));
    let list = |what: &str| graph[what].as_array().expect("a list").clone();
    let nodes = list("nodes");
    let id = |name: &str| {
        let found = nodes.iter().find(|n| n["name"] == name);
        found.unwrap_or_else(|| panic!("no node {name}"))["id"].clone()
    };
    let parent = id(node);
    let edges = list("edges");
    let edge = edges.iter().find(|e| e["parent"] == parent && e["name"] == child);
    let to: Json = edge.unwrap_or_else(|| panic!("{node} has no {child}"))["child"].clone();
    let found = nodes.iter().find(|n| n["id"] == to).expect("edges lead to nodes");
    found["name"].as_str().expect("a name").to_owned()
}
