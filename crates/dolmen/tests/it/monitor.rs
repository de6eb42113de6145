//! Monitors from outside: what the last words are, what is named, and who waits for whom.

use std::io::Write;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, eventually, run, serve};

/// Runs a tool of ours that has to succeed.
pub(crate) fn tool(name: &str, args: &[&str], dir: &std::path::Path) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
    c.arg(name).current_dir(dir);
    let (status, out, err) = run(c, args);
    assert!(status.success(), "{name} {args:?}: {out}{err}");
}

/// A directory with `base` (data) and the overlay `top`.
fn chain() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    tool("img", &["create", "-f", "qcow2", "base", "8M"], dir.path());
    tool("io", &["-f", "qcow2", "-c", "write -P 5 0 8M", "base"], dir.path());
    tool("img", &["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"], dir.path());
    dir
}

const TOP: [&str; 2] = ["--blockdev", "qcow2,node-name=top,file.driver=file,file.filename=top"];
const SLOW_STREAM: &str =
    r#"{"execute":"block-stream","arguments":{"device":"top","job-id":"j","speed":65536}}"#;

/// The last events of a job that a program's end cancels.
fn has_last_words(lines: &[Json]) {
    let about = |name: &str, member: &str, value: &str| {
        lines.iter().any(|l| l["event"] == name && l["data"][member] == value)
    };
    assert!(about("BLOCK_JOB_CANCELLED", "device", "j"), "{lines:?}");
    assert!(about("JOB_STATUS_CHANGE", "status", "null"), "{lines:?}");
}

/// A script wrote its commands, `quit` last, to the daemon and closed its end. It got the answer to
/// `quit` and nothing more: the connection was closed before the job's end had been told.
#[test]
fn last_events_reach_a_client_that_has_said_all() {
    let dir = chain();
    let mut c = serve();
    c.args(TOP).args(["--chardev", "stdio,id=m", "--monitor", "m"]).current_dir(dir.path());
    let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let script = format!("{{'execute':'qmp_capabilities'}}{SLOW_STREAM}{{'execute':'quit'}}");
    stdin.write_all(script.as_bytes()).expect("written");
    drop(stdin);
    let out = child.wait_with_output().expect("ends");
    let text = String::from_utf8(out.stdout).expect("text");
    has_last_words(&text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect::<Vec<_>>());
    assert!(out.status.success());
}

/// The same for a signal, and for clients who are still there.
#[test]
fn last_events_reach_everybody_after_a_signal() {
    let mut d = Daemon::start_in(chain(), |_| serve(), &TOP);
    let (mut first, second) = (d.monitor(), d.monitor());
    first.send(&serde_json::from_str(SLOW_STREAM).expect("JSON"));
    while first.receive().expect("a line").get("return").is_none() {}
    d.signal(Signal::TERM);
    has_last_words(&first.rest());
    has_last_words(&second.rest());
    assert!(d.wait().success());
}

/// A client that was cut off left half a command on a shared line, and everything after it was taken for its
/// rest. Byte 0xFF starts afresh.
#[test]
fn byte_ff_ends_half_a_command() {
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    m.send_bytes(b"{\"execute\":\"query-vers\xff{\"execute\":\"query-jobs\"}");
    assert!(m.receive().expect("a reply")["error"].is_object());
    assert_eq!(m.receive().expect("a reply"), json!({"return": []}));
    m.send_bytes(&[&b"[".repeat(100_000)[..], b"\xff{\"execute\":\"query-jobs\"}"].concat());
    assert!(m.receive().expect("a reply")["error"]["desc"].to_string().contains("depth"));
    assert!(m.receive().expect("a reply")["error"].is_object());
    assert_eq!(m.receive().expect("a reply"), json!({"return": []}));
}

fn exported(m: &mut Monitor) -> Json {
    m.ok("query-block-exports", json!({}))[0]["node-name"].clone()
}

/// `query-block-exports` went on naming the node that was named first, when the export served another one
/// since a snapshot, a pivot or a commit.
#[test]
fn the_node_that_is_served_is_named() {
    let nodes = [
        "--blockdev",
        "qcow2,node-name=base,file.driver=file,file.filename=base",
        "--blockdev",
        "qcow2,node-name=top,file.driver=file,file.filename=top,backing=base",
    ];
    let nbd = ["--nbd-server", "addr.type=unix,addr.path=DIR/n"];
    let args = [&nodes[..], &nbd, &["--export", "nbd,id=e,node-name=top,writable=on"]].concat();
    let mut d = Daemon::start_in(chain(), |_| serve(), &args);
    let mut m = d.monitor();
    assert_eq!(exported(&mut m), "top");
    let snapshot =
        json!({"node-name": "top", "snapshot-file": "s", "snapshot-node-name": "s", "format": "qcow2"});
    m.ok("blockdev-snapshot-sync", snapshot);
    assert_eq!(exported(&mut m), "s");
    m.ok("block-commit", json!({"device": "s", "job-id": "c", "filter-node-name": "f"}));
    assert_eq!(exported(&mut m), "f");
    let ready = |m: &mut Monitor, id: &str| {
        eventually("ready", || (m.ok("query-jobs", json!({}))[0]["status"] == "ready").then_some(()));
        m.ok("job-complete", json!({"id": id}));
        eventually("the end", || (m.ok("query-jobs", json!({})) == json!([])).then_some(()));
    };
    ready(&mut m, "c");
    assert_eq!(exported(&mut m), "base");
    tool("img", &["create", "-f", "qcow2", "t", "8M"], d.dir.path());
    let file = json!({"driver": "file", "filename": "t"});
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": file}));
    m.ok("blockdev-mirror", json!({"device": "base", "job-id": "m", "target": "t", "sync": "full"}));
    ready(&mut m, "m");
    assert_eq!(exported(&mut m), "t");
}

/// A command took its operation out in a second change. When that failed, because the image could not be flushed,
/// the operation stayed for ever: the same command, and others, were refused from then on.
#[test]
fn a_command_that_fails_leaves_no_operation() {
    let mut d = Daemon::start_in(chain(), |_| serve(), &[]);
    let mut m = d.monitor();
    let file = |name: &str| json!({"driver": "file", "filename": name});
    let base = json!({"driver": "qcow2", "read-only": true, "file": file("base")});
    let failing = json!([{"event": "none", "iotype": "flush", "errno": 5}]);
    let below = json!({"driver": "blkdebug", "image": file("top"), "inject-error": failing});
    let top =
        json!({"driver": "qcow2", "node-name": "top", "read-only": true, "backing": base, "file": below});
    m.ok("blockdev-add", top);
    let change = json!({"device": "top", "image-node-name": "top", "backing-file": "base"});
    for _ in 0..2 {
        let reply = m.ask(&json!({"execute": "change-backing-file", "arguments": change}));
        assert!(reply["error"]["desc"].to_string().contains("injected"), "{reply}");
        assert_eq!(m.ok("query-operations", json!({})), json!([]));
    }
}
