//! Storage that does not answer: a server that was stopped while a read was under way holds up what depends on it, and
//! nobody else.
//!
//! It held up the whole monitor: the control task waited inside one change for requests that never ended, and
//! took no other command meanwhile, `quit` and signals included.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, eventually, serve};
use crate::load::Client;
use crate::monitor::tool;

/// What an answer may take. It takes some milliseconds; but then the machine may be busy.
const SOON: Duration = Duration::from_secs(5);

/// What the end may take: clients and nodes that do not come to an end are waited for for some seconds each.
const END: Duration = Duration::from_secs(45);

struct World {
    daemon: Daemon,
    /// The server, stopped.
    origin: Daemon,
    _reader: JoinHandle<()>,
}

/// `top` lies over `far`, which a stopped server holds, and a read of `top` has not come back from there. Beside it
/// the nodes `other` (exported as `o`, over `base`), `spare` and `third`.
fn world() -> World {
    let mut origin = Daemon::start(
        |dir| {
            std::fs::write(dir.join("far"), vec![5; 1 << 20]).expect("written");
            serve()
        },
        &[
            "--blockdev",
            "file,node-name=far,filename=far",
            "--nbd-server",
            "addr.type=unix,addr.path=n",
            "--export",
            "nbd,id=e,node-name=far,name=far",
        ],
    );
    origin.monitor();
    let dir = tempfile::tempdir().expect("a directory");
    for image in ["top", "base", "spare", "third"] {
        tool("img", &["create", "-f", "qcow2", image, "1M"], dir.path());
    }
    tool("img", &["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "other"], dir.path());
    let qcow2 = |name: &str, more: &str| {
        format!("qcow2,node-name={name},file.driver=file,file.filename={name}{more}")
    };
    let far = format!(
        "nbd,node-name=far,read-only=on,export=far,server.type=unix,server.path={}",
        origin.path("n").display()
    );
    let nodes = [
        far,
        "raw,node-name=rf,file=far,read-only=on".into(),
        qcow2("top", ",backing=rf"),
        qcow2("base", ""),
        qcow2("other", ",backing=base"),
        qcow2("spare", ""),
        qcow2("third", ""),
    ];
    let mut args: Vec<&str> = nodes.iter().flat_map(|n| ["--blockdev", n]).collect();
    args.extend(["--nbd-server", "addr.type=unix,addr.path=DIR/n"]);
    args.extend(["--export", "nbd,id=e,node-name=top,name=e,writable=on"]);
    args.extend(["--export", "nbd,id=o,node-name=other,name=o,writable=on"]);
    let mut daemon = Daemon::start_in(dir, |_| serve(), &args);
    let mut m = daemon.monitor();
    // Acknowledged and not flushed: the end has to bring both home.
    for export in ["e", "o"] {
        connect(&daemon, export).write(8, 7).expect("written");
    }
    let before = reads_of_far(&mut m);
    origin.signal(Signal::STOP);
    let mut client = connect(&daemon, "e");
    let reader = std::thread::spawn(move || drop(client.read(100)));
    eventually("a read under way", || (reads_of_far(&mut m) > before).then_some(()));
    World { daemon, origin, _reader: reader }
}

fn connect(d: &Daemon, export: &str) -> Client {
    Client::connect(&d.path("n"), export).expect("connected")
}

fn reads_of_far(m: &mut Monitor) -> u64 {
    let stats = m.ok("query-blockstats", json!({"query-nodes": true}));
    let of = |s: &&Json| s["node-name"] == "far";
    stats.as_array().expect("a list").iter().find(of).expect("far")["stats"]["rd_operations"]
        .as_u64()
        .expect("a number")
}

/// The command is answered soon, whatever the answer.
fn timed(m: &mut Monitor, name: &str, arguments: &Json) -> Json {
    let begun = Instant::now();
    let reply = m.ask(&json!({"execute": name, "arguments": arguments}));
    let took = begun.elapsed();
    eprintln!("{took:?} {name}");
    assert!(took < SOON, "{name} took {took:?}: {reply}");
    reply
}

fn works(m: &mut Monitor, name: &str, arguments: Json) {
    let reply = timed(m, name, &arguments);
    assert!(reply.get("error").is_none(), "{name} {arguments}: {reply}");
}

/// Commands that have nothing to do with `top`, and those that never wait.
fn commands_of_others(m: &mut Monitor) {
    for query in [
        "query-named-block-nodes",
        "query-block",
        "query-blockstats",
        "query-jobs",
        "query-block-jobs",
        "query-block-exports",
        "query-operations",
        "x-debug-query-block-graph",
    ] {
        works(m, query, json!({}));
    }
    let file = json!({"driver": "file", "filename": "third"});
    works(m, "blockdev-del", json!({"node-name": "third"}));
    works(m, "blockdev-add", json!({"driver": "qcow2", "node-name": "third", "file": file}));
    works(
        m,
        "blockdev-reopen",
        json!({"options": [{"driver": "qcow2", "node-name": "third", "file": file, "read-only": true}]}),
    );
    works(m, "what-if", json!({"command": "blockdev-del", "arguments": {"node-name": "third"}}));
    works(m, "block_resize", json!({"node-name": "spare", "size": 2 << 20}));
    works(m, "block-set-write-threshold", json!({"node-name": "spare", "write-threshold": 65536}));
    works(m, "block-export-add", json!({"type": "nbd", "id": "s", "node-name": "spare", "name": "s"}));
    works(m, "block-export-del", json!({"id": "s", "mode": "hard"}));
    works(
        m,
        "change-backing-file",
        json!({"device": "other", "image-node-name": "other", "backing-file": "base"}),
    );
    let snapshot =
        json!({"node-name": "other", "snapshot-file": "s", "snapshot-node-name": "s", "format": "qcow2"});
    works(m, "blockdev-snapshot-sync", snapshot);
    works(
        m,
        "operation-begin",
        json!({"id": "op", "claims": [{"node-name": "spare", "needs": [], "denies": []}]}),
    );
    works(m, "operation-end", json!({"id": "op"}));
    works(m, "block-stream", json!({"job-id": "j", "device": "s", "speed": 1}));
    timed(m, "job-cancel", &json!({"id": "j"}));
    eventually("the end of a job", || (m.ok("query-jobs", json!({})) == json!([])).then_some(()));
}

/// Sends a command that has to wait for `top`.
fn waiting(d: &mut Daemon, name: &str, arguments: Json) -> Monitor {
    let mut m = d.monitor();
    m.send(&json!({"execute": name, "arguments": arguments}));
    m
}

fn snapshot_of_top() -> Json {
    json!({"node-name": "top", "snapshot-file": "st", "snapshot-node-name": "st", "format": "qcow2"})
}

/// Everything that was acknowledged is in the images.
fn nothing_lost(dir: &Path) {
    for image in ["top", "other"] {
        let options = format!("driver=qcow2,backing=,file.driver=file,file.filename={image}");
        tool("io", &["--image-opts", "-c", "read -P 7 32k 4k", &options], dir);
        tool("img", &["check", "-f", "qcow2", image], dir);
    }
}

fn ends(mut w: World, begun: Instant) {
    assert_eq!(w.daemon.wait().code(), Some(1), "not everything could be closed");
    let took = begun.elapsed();
    eprintln!("the end took {took:?}");
    assert!(took < END, "{took:?}");
    w.origin.signal(Signal::CONT);
    nothing_lost(w.daemon.dir.path());
}

#[test]
fn storage_that_does_not_answer_holds_up_nobody_else() {
    let mut w = world();
    let mut m = w.daemon.monitor();
    commands_of_others(&mut m);
    // The same while commands wait for the stopped server.
    let mut first = waiting(&mut w.daemon, "blockdev-snapshot-sync", snapshot_of_top());
    let mut second = waiting(
        &mut w.daemon,
        "blockdev-reopen",
        json!({"options": [{"driver": "raw", "node-name": "rf", "file": "far", "read-only": true}]}),
    );
    works(
        &mut m,
        "blockdev-snapshot-sync",
        json!({"node-name": "spare", "snapshot-file": "x", "format": "qcow2"}),
    );
    works(&mut m, "block-stream", json!({"job-id": "k", "device": "s", "speed": 1}));
    // It may have ended already.
    timed(&mut m, "job-cancel", &json!({"id": "k"}));
    works(&mut m, "query-jobs", json!({}));
    // Its client has a request that does not end; what is known is said.
    works(&mut m, "block-export-del", json!({"id": "e", "mode": "hard"}));
    let begun = Instant::now();
    works(&mut m, "quit", json!({}));
    for waiting in [&mut first, &mut second] {
        let reply = std::iter::from_fn(|| waiting.receive()).find(|l| l.get("event").is_none());
        assert!(reply.expect("a reply")["error"]["desc"].to_string().contains("shutting down"));
    }
    ends(w, begun);
}

/// `quit` behind a command of the same monitor is heard.
#[test]
fn quit_does_not_wait_for_the_command_before_it() {
    let mut w = world();
    let mut m = waiting(&mut w.daemon, "blockdev-snapshot-sync", snapshot_of_top());
    let begun = Instant::now();
    let reply = m.ask(&json!({"execute": "quit"}));
    assert!(reply["error"]["desc"].to_string().contains("shutting down"), "{reply}");
    assert_eq!(m.receive().expect("a reply"), json!({"return": {}}));
    assert!(begun.elapsed() < 3 * SOON);
    ends(w, begun);
}

#[test]
fn a_signal_ends_it_all_the_same() {
    let mut w = world();
    let _waits = waiting(&mut w.daemon, "blockdev-snapshot-sync", snapshot_of_top());
    let begun = Instant::now();
    w.daemon.signal(Signal::TERM);
    ends(w, begun);
}
