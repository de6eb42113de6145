//! Storage that does not answer: a server that was stopped while a read was under way holds up what depends on it, and
//! nobody else.
//!
//! It held up the whole monitor: the control task waited inside one change for requests that never ended, and
//! took no other command meanwhile, `quit` and signals included.

use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, eventually, serve};
use crate::fuse::Mount;
use crate::load::Client;
use crate::monitor::tool;
use crate::peer::in_path;

/// What an answer may take. It takes some milliseconds; but then the machine may be busy.
const SOON: Duration = Duration::from_secs(5);

/// What the end may take: clients and nodes that do not come to an end are waited for for some seconds each.
const END: Duration = Duration::from_secs(45);

/// Storage that stops answering.
enum Far {
    /// A server, stopped.
    Server { origin: Daemon, address: String },
    /// A dead file system.
    Files(Mount),
}

impl Far {
    /// Our own server.
    fn ours() -> Far {
        let mut origin = Daemon::start(
            |dir| {
                for name in ["far", "target"] {
                    std::fs::write(dir.join(name), vec![5; 1 << 20]).expect("written");
                }
                serve()
            },
            &[
                "--blockdev",
                "file,node-name=target,filename=target",
                "--blockdev",
                "file,node-name=far,filename=far",
                "--nbd-server",
                "addr.type=unix,addr.path=n",
                "--export",
                "nbd,id=e,node-name=far,name=far",
                "--export",
                "nbd,id=t,node-name=target,name=target,writable=on",
            ],
        );
        origin.monitor();
        let address = origin.path("n").display().to_string();
        Far::Server { origin, address }
    }

    /// QEMU's, which ends requests on its own terms; `None` where it is not installed.
    fn theirs() -> Option<Far> {
        let program = in_path("qemu-nbd")?;
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("far"), vec![5; 1 << 20]).expect("written");
        let mut c = Command::new(program);
        c.args(["-t", "-f", "raw", "-x", "far", "-k"]).arg(dir.path().join("n")).arg("far");
        let origin = Daemon::other(dir, c);
        let address = origin.path("n").display().to_string();
        eventually("a server", || std::os::unix::net::UnixStream::connect(&address).ok());
        Some(Far::Server { origin, address })
    }

    /// `None` where none may be mounted.
    fn files() -> Option<Far> {
        let mut image = tempfile::NamedTempFile::new().expect("a file");
        let name = image.path().display().to_string();
        tool("img", &["create", "-q", "-f", "qcow2", &name, "1M"], Path::new("/"));
        let mut another = Vec::new();
        std::io::Read::read_to_end(image.as_file_mut(), &mut another).expect("read");
        let blank = || vec![5; 1 << 20];
        Mount::new(&[("far", blank()), ("target", blank()), ("another", another)]).map(Far::Files)
    }

    fn node(&self) -> String {
        match self {
            Far::Server { address, .. } => {
                format!("nbd,node-name=far,read-only=on,export=far,server.type=unix,server.path={address}")
            }
            Far::Files(mount) => {
                format!("file,node-name=far,read-only=on,filename={}", mount.path("far").display())
            }
        }
    }

    /// A node of raw data that can be written.
    fn target(&self) -> Json {
        match self {
            Far::Server { address, .. } => json!({"driver": "nbd", "node-name": "target", "export": "target",
                "server": {"type": "unix", "path": address}}),
            Far::Files(mount) => {
                json!({"driver": "file", "node-name": "target", "filename": mount.path("target")})
            }
        }
    }

    /// The options of a node on something else there.
    fn another(&self, name: &str) -> Json {
        match self {
            Far::Server { address, .. } => json!({"driver": "nbd", "node-name": name, "export": "far",
                "server": {"type": "unix", "path": address}}),
            Far::Files(mount) => json!({"driver": "qcow2", "node-name": name,
                "file": {"driver": "file", "filename": mount.path("another")}}),
        }
    }

    fn stop(&self) {
        match self {
            Far::Server { origin, .. } => origin.signal(Signal::STOP),
            Far::Files(mount) => mount.die(),
        }
    }

    fn go_on(self) {
        match self {
            Far::Server { origin, .. } => origin.signal(Signal::CONT),
            Far::Files(mount) => drop(mount),
        }
    }
}

struct World {
    daemon: Daemon,
    far: Far,
    _reader: JoinHandle<()>,
}

/// `top` lies over `far`, which does not answer any more, and a read of `top` has not come back from there. Beside it
/// the nodes `other` (exported as `o`, over `base`), `spare` and `third`.
fn world(far: Far, engine: &str) -> World {
    world_with(far, engine, |_, _, _| ())
}

/// The same after `prelude`.
fn world_with(far: Far, engine: &str, prelude: impl FnOnce(&Daemon, &mut Monitor, &Far)) -> World {
    let dir = tempfile::tempdir().expect("a directory");
    for image in ["top", "base", "spare", "third"] {
        tool("img", &["create", "-f", "qcow2", image, "1M"], dir.path());
    }
    tool("img", &["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "other"], dir.path());
    let qcow2 = |name: &str, more: &str| {
        format!("qcow2,node-name={name},file.driver=file,file.filename={name}{more}")
    };
    let nodes = [
        far.node(),
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
    let start = |_: &Path| {
        let mut c = serve();
        c.env("DOLMEN_IO", engine);
        c
    };
    let mut daemon = Daemon::start_in(dir, start, &args);
    let mut m = daemon.monitor();
    // Acknowledged and not flushed: the end has to bring both home.
    for export in ["e", "o"] {
        connect(&daemon, export).write(8, 7).expect("written");
    }
    let before = reads_of_far(&mut m);
    prelude(&daemon, &mut m, &far);
    far.stop();
    let mut client = connect(&daemon, "e");
    let reader = std::thread::spawn(move || drop(client.read(100)));
    eventually("a read under way", || (reads_of_far(&mut m) > before).then_some(()));
    World { daemon, far, _reader: reader }
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
    w.far.go_on();
    nothing_lost(w.daemon.dir.path());
}

fn holds_up_nobody_else(mut w: World) {
    let mut m = w.daemon.monitor();
    commands_of_others(&mut m);
    // The same while commands wait for what does not answer.
    let mut waiting = vec![
        waiting(&mut w.daemon, "blockdev-snapshot-sync", snapshot_of_top()),
        waiting(
            &mut w.daemon,
            "blockdev-reopen",
            json!({"options": [{"driver": "raw", "node-name": "rf", "file": "far", "read-only": true}]}),
        ),
        waiting(&mut w.daemon, "blockdev-add", w.far.another("new")),
    ];
    works(
        &mut m,
        "blockdev-snapshot-sync",
        json!({"node-name": "spare", "snapshot-file": "x", "format": "qcow2"}),
    );
    works(&mut m, "block-stream", json!({"job-id": "k", "device": "s", "speed": 1}));
    // It may have ended already.
    timed(&mut m, "job-cancel", &json!({"id": "k"}));
    works(&mut m, "query-jobs", json!({}));
    works(&mut m, "query-named-block-nodes", json!({}));
    // Its client has a request that does not end; what is known is said.
    works(&mut m, "block-export-del", json!({"id": "e", "mode": "hard"}));
    let begun = Instant::now();
    works(&mut m, "quit", json!({}));
    for waiting in &mut waiting {
        let reply = std::iter::from_fn(|| waiting.receive()).find(|l| l.get("event").is_none());
        let reply = reply.expect("a reply");
        assert!(reply["error"]["desc"].to_string().contains("shutting down"), "{reply}");
    }
    ends(w, begun);
}

#[test]
fn a_stopped_server_holds_up_nobody_else() {
    holds_up_nobody_else(world(Far::ours(), "auto"));
}

#[test]
fn a_stopped_server_of_qemu_holds_up_nobody_else() {
    if let Some(far) = Far::theirs() {
        holds_up_nobody_else(world(far, "threads"));
    }
}

#[test]
fn a_dead_file_system_holds_up_nobody_else() {
    if let Some(far) = Far::files() {
        holds_up_nobody_else(world(far, "auto"));
    }
}

#[test]
fn a_dead_file_system_holds_up_no_other_files() {
    for engine in ["auto", "threads"] {
        let Some(far) = Far::files() else { return };
        let mut w = world(far, engine);
        // More than there are threads for one file system.
        let readers: Vec<_> = (0..60)
            .map(|i| {
                let mut client = connect(&w.daemon, "e");
                std::thread::spawn(move || drop(client.read(101 + i)))
            })
            .collect();
        let mut m = w.daemon.monitor();
        eventually("reads that hang", || (reads_of_far(&mut m) > readers.len() as u64).then_some(()));
        let mut client = connect(&w.daemon, "o");
        let begun = Instant::now();
        for block in 16..24 {
            client.write(block, 9).expect("written");
            client.flush().expect("flushed");
            assert_eq!(client.read(block).expect("read")[0], 9);
        }
        let took = begun.elapsed();
        eprintln!("{took:?} with {engine}");
        assert!(took < SOON, "{took:?} with {engine}");
        drop(w);
        readers.into_iter().for_each(|r| r.join().expect("it has ended"));
    }
}

/// A job whose target does not answer: it is cancelled at once as far as anybody sees, and what has nothing to do with it
/// goes on.
#[test]
fn a_job_that_writes_there_holds_up_nobody_else() {
    for far in [Some(Far::ours()), Far::files()].into_iter().flatten() {
        let mut w = world_with(far, "auto", |_, m, far| {
            m.ok("blockdev-add", far.target());
            m.ok(
                "blockdev-mirror",
                json!({"job-id": "j", "device": "other", "target": "target", "sync": "full"}),
            );
            let is_ready = |m: &mut Monitor| m.ok("query-jobs", json!({}))[0]["status"] == "ready";
            eventually("a ready mirror", || is_ready(m).then_some(()));
        });
        let mut m = w.daemon.monitor();
        // To be copied to where nothing is answered.
        connect(&w.daemon, "o").write(8, 7).expect("written");
        for command in ["query-jobs", "query-block-jobs", "query-named-block-nodes", "query-blockstats"] {
            works(&mut m, command, json!({}));
        }
        works(&mut m, "block-job-cancel", json!({"device": "j", "force": true}));
        works(&mut m, "query-jobs", json!({}));
        works(&mut m, "block_resize", json!({"node-name": "spare", "size": 2 << 20}));
        works(&mut m, "blockdev-del", json!({"node-name": "third"}));
        // It may wait until the image is written out; nobody else waits for it.
        let _waits = waiting(&mut w.daemon, "blockdev-del", json!({"node-name": "target"}));
        works(&mut m, "query-named-block-nodes", json!({}));
        // The end waits for the close of an image much longer than this test.
        works(&mut m, "quit", json!({}));
    }
}

/// `quit` behind a command of the same monitor is heard.
#[test]
fn quit_does_not_wait_for_the_command_before_it() {
    let mut w = world(Far::ours(), "auto");
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
    for far in [Some(Far::ours()), Far::files()].into_iter().flatten() {
        let mut w = world(far, "auto");
        let _waits = waiting(&mut w.daemon, "blockdev-snapshot-sync", snapshot_of_top());
        let begun = Instant::now();
        w.daemon.signal(Signal::TERM);
        ends(w, begun);
    }
}

/// A job between nodes that never make it wait had the executor to itself: copies of `null-co`, or a stream of an image over
/// it, and the command that started it was answered when the job was done.
#[test]
fn a_job_that_never_waits_leaves_others_their_turn() {
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    for name in ["from", "to"] {
        m.ok("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": 1_u64 << 60}));
    }
    for command in ["blockdev-mirror", "blockdev-backup"] {
        works(&mut m, command, json!({"job-id": "j", "device": "from", "target": "to", "sync": "full"}));
        works(&mut m, "query-version", json!({}));
        works(&mut m, "job-cancel", json!({"id": "j"}));
        eventually("the end of the job", || (m.ok("query-jobs", json!({})) == json!([])).then_some(()));
    }
}
