//! Counters and write thresholds from outside, with a real NBD client, beside QEMU's daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, established, eventually};

const CHAIN: &[&str] = &[
    "--blockdev",
    "file,node-name=bf,filename=DIR/base.qcow2",
    "--blockdev",
    "qcow2,node-name=base,file=bf",
    "--blockdev",
    "file,node-name=tf,filename=DIR/top.qcow2",
    "--blockdev",
    "qcow2,node-name=top,file=tf,backing=base",
    "--blockdev",
    "raw,node-name=r,file=top",
    "--nbd-server",
    "addr.type=unix,addr.path=DIR/nbd.sock",
    "--export",
    "nbd,id=exp0,node-name=r,writable=on,name=x",
];

/// A daemon with a chain of two images under `raw`; `None` where the tools are not installed.
fn chain(command: impl FnOnce(&Path) -> Command) -> Option<Daemon> {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, backing) in
        [("base.qcow2", None), ("top.qcow2", Some(["-b", "base.qcow2", "-F", "qcow2"].as_slice()))]
    {
        let mut c = Command::new("qemu-img");
        c.current_dir(dir.path()).args(["create", "-q", "-f", "qcow2"]).args(backing.unwrap_or_default());
        match c.arg(name).arg("16M").status() {
            Ok(s) => assert!(s.success()),
            Err(_) => {
                eprintln!("qemu-img is not installed: nothing to compare with");
                return None;
            }
        }
    }
    Some(Daemon::start_in(dir, command, CHAIN))
}

/// Sends requests through the export.
fn requests(d: &Daemon, commands: &[&str]) {
    eventually("NBD server", || d.path("nbd.sock").exists().then_some(()));
    let mut c = Command::new("qemu-io");
    // Flushes only where they are asked for.
    c.args(["-f", "raw", "-t", "writeback", "-d", "unmap"]);
    for command in commands {
        c.arg("-c").arg(command);
    }
    let out = c.arg(format!("nbd+unix:///x?socket={}", d.path("nbd.sock").display())).output().expect("runs");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && !text.contains("failed"), "{text}");
}

fn entry<'a>(list: &'a Json, name: &str) -> &'a Json {
    list.as_array()
        .and_then(|l| l.iter().find(|e| e["node-name"] == name))
        .unwrap_or_else(|| panic!("no {name} in {list}"))
}

/// The names of all members, with those of what is inside.
fn members(of: &Json, path: &str, out: &mut BTreeSet<String>) {
    match of {
        Json::Object(m) => m.iter().for_each(|(k, v)| {
            out.insert(format!("{path}.{k}"));
            members(v, &format!("{path}.{k}"), out);
        }),
        Json::Array(l) => l.iter().enumerate().for_each(|(i, v)| members(v, &format!("{path}[{i}]"), out)),
        _ => {}
    }
}

#[test]
fn nodes_and_exports_have_true_counters() {
    let Some(mut d) = chain(by_established_name) else { return };
    let mut m = d.monitor();
    requests(
        &d,
        &[
            "write 0 64k",
            "write 64k 64k",
            "read 0 4k",
            "read 1M 8k",
            "write -z 1M 64k",
            "discard 0 64k",
            "flush",
        ],
    );
    let stats = m.ok("query-blockstats", json!({}));
    let export = &stats[0];
    assert_eq!((&export["device"], &export["node-name"]), (&json!("exp0"), &json!("r")));
    assert_eq!(export["parent"]["node-name"], "top");
    assert_eq!(export["parent"]["parent"]["node-name"], "tf");
    assert_eq!(export["parent"]["backing"]["parent"]["node-name"], "bf");
    let nodes = m.ok("query-blockstats", json!({"query-nodes": true}));
    for of in [export, entry(&nodes, "r"), entry(&nodes, "top")] {
        let s = &of["stats"];
        // Clients may read a little more, to find out what they have, and flush once more at the end.
        let at_least = |member: &str, n: u64| {
            assert!(s[member].as_u64().is_some_and(|got| got >= n), "{member} of {of}");
        };
        at_least("rd_operations", 2);
        at_least("rd_bytes", 12 << 10);
        at_least("flush_operations", 1);
        for (member, n) in [
            ("wr_operations", 3),
            ("wr_bytes", 192 << 10),
            ("unmap_operations", 1),
            ("unmap_bytes", 64 << 10),
            ("wr_highest_offset", (1 << 20) + (64 << 10)),
            ("failed_wr_operations", 0),
        ] {
            assert_eq!(s[member], n, "{member} of {of}");
        }
    }
    let s = &export["stats"];
    for member in ["rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns", "idle_time_ns"] {
        assert!(s[member].as_u64().is_some_and(|n| n > 0), "{member} of {s}");
    }
    // What was never written is read from below.
    let base = &entry(&nodes, "base")["stats"];
    assert!(base["rd_bytes"].as_u64().is_some_and(|n| n >= 8 << 10), "{base}");
    assert_eq!(base["wr_operations"], 0);
    let file = entry(&nodes, "tf");
    assert!(file["stats"]["wr_bytes"].as_u64().is_some_and(|n| n >= 128 << 10), "{file}");
    assert_eq!(file["driver-specific"]["driver"], "file");

    let devices = m.ok("query-block", json!({}));
    assert_eq!(devices[0]["device"], "exp0");
    assert_eq!(devices[0]["inserted"]["node-name"], "r");
    m.ok("block-export-del", json!({"id": "exp0"}));
    assert_eq!(m.ok("query-block", json!({})), json!([]));
    assert_eq!(m.ok("query-blockstats", json!({})), json!([]));
    // The node's counters stay.
    let nodes = m.ok("query-blockstats", json!({"query-nodes": true}));
    assert_eq!(entry(&nodes, "r")["stats"]["wr_operations"], 3);
}

/// The same nodes in the same order with the same members; QEMU's daemon counts nothing on nodes but how
/// far was written.
#[test]
fn the_list_of_nodes_is_that_of_the_established_daemon() {
    let Some(theirs) = established() else { return };
    let work = &["write 0 64k", "write -z 1M 64k", "read 0 4k", "flush"];
    let list = |mut d: Daemon| {
        let mut m = d.monitor();
        requests(&d, work);
        m.ok("query-blockstats", json!({"query-nodes": true}))
    };
    let (Some(a), Some(b)) = (chain(by_established_name), chain(|_| theirs)) else { return };
    let (ours, theirs) = (list(a), list(b));
    let shape = |of: &Json| {
        let mut out = BTreeSet::new();
        members(of, "", &mut out);
        out
    };
    assert_eq!(shape(&ours), shape(&theirs));
    let names = |of: &Json| -> Vec<String> {
        of.as_array().expect("a list").iter().map(|e| e["node-name"].to_string()).collect()
    };
    assert_eq!(names(&ours), names(&theirs));
    for node in ["base", "bf", "top"] {
        let highest = |of: &Json| entry(of, node)["stats"]["wr_highest_offset"].clone();
        assert_eq!(highest(&ours), highest(&theirs), "{node}");
    }
}

#[test]
fn a_write_threshold_is_announced_as_by_the_established_daemon() {
    let story = |d: Option<Daemon>| -> Option<Vec<Json>> {
        let mut d = d?;
        let mut m = d.monitor();
        let mut said = Vec::new();
        let set = |node: &str, at: u64| {
            json!({"execute": "block-set-write-threshold",
            "arguments": {"node-name": node, "write-threshold": at}})
        };
        let shown = |m: &mut Monitor| {
            let nodes = m.ok("query-named-block-nodes", json!({}));
            entry(&nodes, "top")["write_threshold"].clone()
        };
        said.push(m.ask(&set("nothing", 1)));
        said.push(m.ask(&set("top", 65536)));
        said.push(shown(&mut m));
        requests(&d, &["write 0 64k", "discard 1M 64k"]);
        said.push(shown(&mut m));
        requests(&d, &["write 4k 64k", "write 0 1M"]);
        said.push(shown(&mut m));
        said.push(m.ask(&set("top", 1)));
        requests(&d, &["write -z 0 64k"]);
        said.push(m.ask(&set("top", 1)));
        said.push(m.ask(&set("top", 0)));
        requests(&d, &["write 0 4k"]);
        said.push(shown(&mut m));
        m.send(&json!({"execute": "quit"}));
        let events = m.rest();
        said.extend(
            events.into_iter().filter(|e| e["event"] == "BLOCK_WRITE_THRESHOLD").map(|e| e["data"].clone()),
        );
        Some(said)
    };
    let Some(ours) = story(chain(by_established_name)) else { return };
    assert_eq!(
        ours[ours.len() - 2..],
        [
            json!({"node-name": "top", "amount-exceeded": 4096, "write-threshold": 65536}),
            json!({"node-name": "top", "amount-exceeded": 65535, "write-threshold": 1}),
        ]
    );
    let Some(command) = established() else { return };
    let Some(theirs) = story(chain(|_| command)) else { return };
    // A refusal may say more.
    assert_eq!(ours[1..], theirs[1..]);
    assert_eq!(ours[0]["error"]["desc"], theirs[0]["error"]["desc"]);
}

/// What a job puts under an export without a name is not seen, and what the export shows stays where it was.
#[test]
fn nodes_of_a_job_are_hidden() {
    let Some(mut d) = chain(by_established_name) else { return };
    let mut m = d.monitor();
    requests(&d, &["write 0 1M"]);
    let names = |m: &mut Monitor, query: &str, arguments: Json| -> Vec<String> {
        let list = m.ok(query, arguments);
        let mut names: Vec<_> =
            list.as_array().expect("a list").iter().map(|e| e["node-name"].to_string()).collect();
        // The order is that of the links.
        names.sort();
        names
    };
    let lists = |m: &mut Monitor| {
        [
            names(m, "query-named-block-nodes", json!({"flat": true})),
            names(m, "query-blockstats", json!({"query-nodes": true})),
            names(m, "query-blockstats", json!({})),
        ]
    };
    let before = lists(&mut m);
    let all_before = m.ok("x-debug-query-block-graph", json!({}));
    m.ok("block-stream", json!({"job-id": "j", "device": "r", "speed": 1, "auto-dismiss": true}));
    let all = m.ok("x-debug-query-block-graph", json!({}));
    let count = |of: &Json| {
        let nodes = of["nodes"].as_array().expect("a list");
        nodes.iter().filter(|n| n["type"] == "block-driver").count()
    };
    assert!(count(&all) > count(&all_before), "the job has a node of its own: {all}");
    assert_eq!(lists(&mut m), before);
    assert_eq!(m.ok("query-block", json!({}))[0]["inserted"]["node-name"], "r");
}

/// A filter that is put between two nodes of a running export counts and injects from then on; nobody else's counters
/// begin anew, and the node above is stepped over again when the filter is gone.
#[test]
fn counters_go_on_while_the_graph_changes() {
    let Some(mut d) = chain(by_established_name) else { return };
    let mut m = d.monitor();
    let read = |d: &Daemon| {
        let uri = format!("nbd+unix:///x?socket={}", d.path("nbd.sock").display());
        let out =
            Command::new("qemu-io").args(["-f", "raw", "-c", "read 1M 4k", &uri]).output().expect("runs");
        !String::from_utf8_lossy(&out.stdout).contains("failed")
    };
    let reopen = |m: &mut Monitor, node: Json| m.ok("blockdev-reopen", json!({ "options": [node] }));
    eventually("NBD server", || d.path("nbd.sock").exists().then_some(()));
    assert!(read(&d));
    let debug = json!({"driver": "blkdebug", "node-name": "d", "image": "top"});
    m.ok("blockdev-add", debug.clone());
    reopen(&mut m, json!({"driver": "raw", "node-name": "r", "file": "d"}));
    assert!(read(&d));
    let mut failing = debug;
    failing["inject-error"] = json!([{"event": "read_aio", "sector": 2048, "errno": 28}]);
    reopen(&mut m, failing);
    assert!(!read(&d));
    reopen(&mut m, json!({"driver": "raw", "node-name": "r", "file": "top"}));
    assert!(read(&d));
    let nodes = m.ok("query-blockstats", json!({"query-nodes": true}));
    let export = m.ok("query-blockstats", json!({}))[0].clone();
    for (of, ok, failed) in [
        (&export, 3, 1),
        (entry(&nodes, "r"), 3, 1),
        (entry(&nodes, "d"), 1, 1),
        (entry(&nodes, "top"), 3, 0),
    ] {
        let s = &of["stats"];
        assert_eq!((&s["rd_operations"], &s["failed_rd_operations"]), (&json!(ok), &json!(failed)), "{of}");
        assert_eq!(s["rd_bytes"], ok * 4096, "{of}");
    }
}

/// What was asked for is counted from then on, by what the client was told, each request in one interval.
#[test]
fn latency_histograms() {
    let Some(mut d) = chain(by_established_name) else { return };
    let mut m = d.monitor();
    let set = |more: Json| {
        let mut arguments = json!({"id": "exp0"});
        arguments.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("an object"));
        json!({"execute": "block-latency-histogram-set", "arguments": arguments})
    };
    let histogram = |m: &mut Monitor, kind: &str| -> Json {
        let stats = m.ok("query-blockstats", json!({}));
        stats[0]["stats"].get(format!("{kind}_latency_histogram")).cloned().unwrap_or(Json::Null)
    };
    let total = |h: &Json| -> u64 {
        h["bins"].as_array().expect("bins").iter().map(|n| n.as_u64().expect("a number")).sum()
    };
    assert_eq!(histogram(&mut m, "rd"), Json::Null);

    // No request takes as long as 2^63 ns, and none is done in less than one.
    let far = 1u64 << 63;
    assert_eq!(m.ask(&set(json!({"boundaries": [1, far], "boundaries-flush": [far]})))["return"], json!({}));
    requests(&d, &["write 0 64k", "write -z 1M 64k", "discard 0 64k", "flush"]);
    let writes = histogram(&mut m, "wr");
    assert_eq!(writes, json!({"boundaries": [1, far], "bins": [0, 2, 0]}));
    let flushes = histogram(&mut m, "flush");
    assert_eq!((&flushes["boundaries"], &flushes["bins"][1]), (&json!([far]), &json!(0)));
    assert!(total(&flushes) >= 1, "{flushes}");
    assert_eq!(histogram(&mut m, "zone_append")["bins"], json!([0, 0, 0]));

    // One kind begins anew, the others go on.
    assert_eq!(m.ask(&set(json!({"boundaries-write": [far]})))["return"], json!({}));
    requests(&d, &["write 0 64k"]);
    assert_eq!(histogram(&mut m, "wr"), json!({"boundaries": [far], "bins": [1, 0]}));
    assert!(total(&histogram(&mut m, "flush")) >= total(&flushes));

    // A refusal leaves them alone, and says what to do.
    for (wrong, text) in [
        (json!({"boundaries": [10, 10]}), "each greater than the one before"),
        (json!({"boundaries-read": [0]}), "each greater than the one before"),
        (json!({"boundaries-zap": []}), "name between 1 and"),
    ] {
        let e = m.ask(&set(wrong.clone()));
        assert!(e["error"]["desc"].as_str().is_some_and(|d| d.contains(text)), "{wrong}: {e}");
    }
    assert_eq!(histogram(&mut m, "wr")["bins"], json!([1, 0]));
    let mut nobody = set(json!({}));
    nobody["arguments"]["id"] = "nobody".into();
    assert_eq!(m.ask(&nobody)["error"]["class"], "DeviceNotFound");

    assert_eq!(m.ask(&set(json!({})))["return"], json!({}));
    for kind in ["rd", "wr", "flush", "zone_append"] {
        assert_eq!(histogram(&mut m, kind), Json::Null);
    }
}
