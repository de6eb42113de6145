//! Clients that others have written: the public Python client and the crate `qapi`, whose types come
//! from QEMU's schema, so that every reply and event has to fit them.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qapi::qmp::{self, Event};
use qapi::{Command as Typed, Qmp};
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, PATIENCE, serve};
use crate::peer::Bench;

/// Python with the public client, installed once into a directory under `target`.
pub(crate) fn python() -> PathBuf {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu-qmp-0.0.6");
    let python = venv.join("bin/python3");
    if !venv.join("ready").exists() {
        // Two test runs may do this at the same time; both end with the same files.
        let step = |mut c: Command| {
            let out = c.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{c:?}: {e}"));
            assert!(out.status.success(), "{c:?}: {}", String::from_utf8_lossy(&out.stderr));
        };
        let mut c = Command::new("python3");
        c.args(["-m", "venv"]).arg(&venv);
        step(c);
        let mut c = Command::new(&python);
        c.args(["-m", "pip", "install", "--quiet", "qemu.qmp==0.0.6"]);
        step(c);
        std::fs::write(venv.join("ready"), "").expect("written");
    }
    python
}

/// Runs a script of this directory, which ends the daemon.
fn script(name: &str, daemon: &mut Daemon, argument: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it").join(name);
    let out =
        Command::new(python()).arg(script).arg(daemon.path("m.sock")).arg(argument).output().expect("runs");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(text(&out.stdout).trim(), "all is well");
    assert!(daemon.wait().success());
}

/// A directory with `base.qcow2 <- top.qcow2` and an empty `t1.qcow2`.
fn chain() -> Bench {
    let b = Bench::new();
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "t1.qcow2", "4M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 0x11 1M 1M", "base.qcow2"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 0x22 2M 1M", "top.qcow2"]);
    b
}

#[test]
fn the_public_python_client() {
    let mut d = Daemon::start(|_| serve(), &[]);
    d.monitor();
    let nbd = d.path("nbd.sock");
    script("client.py", &mut d, &nbd);
}

#[test]
fn the_public_python_client_runs_jobs() {
    let b = chain();
    let mut d = Daemon::start(|_| serve(), &[]);
    d.monitor();
    script("jobs.py", &mut d, &b.path(""));
    let out = b.ok("dolmen", &["io", "-r", "-f", "qcow2", "-c", "read -P 0x11 1M 1M", "t1.qcow2"]);
    assert!(!out.contains("verification failed"), "{out}");
}

/// A connection of the crate `qapi`.
struct Connection<'a> {
    qmp: Qmp<qapi::Stream<std::io::BufReader<&'a UnixStream>, &'a UnixStream>>,
    events: Vec<Event>,
}

impl Connection<'_> {
    /// Executes a command by its type. Its arguments are given as JSON, so that they fit it is part of the test.
    fn run<C: Typed + serde::de::DeserializeOwned>(&mut self, arguments: Json) -> C::Ok {
        let command: C = serde_json::from_value(arguments).unwrap_or_else(|e| panic!("{}: {e}", C::NAME));
        let reply = self.qmp.execute(&command).unwrap_or_else(|e| panic!("{}: {e}", C::NAME));
        self.events.extend(self.qmp.events());
        reply
    }

    /// Asks until an event has come that is what is waited for.
    fn until(&mut self, what: &str, mut wanted: impl FnMut(&Event) -> bool) {
        let end = std::time::Instant::now() + PATIENCE;
        while !self.events.iter().any(&mut wanted) {
            assert!(std::time::Instant::now() < end, "waited too long for {what}: {:?}", self.events);
            self.run::<qmp::query_version>(json!({}));
        }
        self.events.clear();
    }
}

#[test]
fn the_rust_crate_qapi() {
    let b = chain();
    let mut d = Daemon::start(|_| serve(), &[]);
    d.monitor();
    let stream = UnixStream::connect(d.path("m.sock")).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut qmp = Qmp::from_stream(&stream);
    qmp.handshake().expect("negotiated");
    let mut c = Connection { qmp, events: Vec::new() };
    assert_eq!(c.run::<qmp::query_version>(json!({})).qemu.major, 10);

    for (name, backing) in [("base", Json::Null), ("top", json!("base")), ("t1", Json::Null)] {
        c.run::<qmp::blockdev_add>(json!({
            "driver": "qcow2", "node-name": name, "backing": backing,
            "file": {"driver": "file", "node-name": format!("{name}-f"), "filename": b.path(&format!("{name}.qcow2"))},
        }));
    }
    let nodes = c.run::<qmp::query_named_block_nodes>(json!({"flat": true}));
    assert_eq!(nodes.len(), 6);
    c.run::<qmp::query_block>(json!({}));
    c.run::<qmp::query_blockstats>(json!({"query-nodes": true}));
    c.run::<qmp::nbd_server_start>(json!({"addr": {"type": "unix", "data": {"path": d.path("nbd.sock")}}}));
    c.run::<qmp::block_export_add>(json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}));
    assert_eq!(c.run::<qmp::query_block_exports>(json!({})).len(), 1);

    c.run::<qmp::blockdev_mirror>(json!({"job-id": "m", "device": "top", "target": "t1", "sync": "full"}));
    c.until("the mirror to be ready", |e| matches!(e, Event::BLOCK_JOB_READY { .. }));
    assert_eq!(c.run::<qmp::query_block_jobs>(json!({})).len(), 1);
    assert_eq!(c.run::<qmp::query_jobs>(json!({})).len(), 1);
    // The export holds its size.
    let refused =
        c.qmp.execute(&qmp::block_resize { device: None, node_name: Some("top".into()), size: 8 << 20 });
    assert!(refused.is_err());
    c.run::<qmp::job_complete>(json!({"id": "m"}));
    c.until("the end of the mirror", |e| matches!(e, Event::BLOCK_JOB_COMPLETED { .. }));

    c.run::<qmp::block_export_del>(json!({"id": "e"}));
    c.until("the export to be gone", |e| matches!(e, Event::BLOCK_EXPORT_DELETED { .. }));
    c.run::<qmp::block_stream>(json!({"job-id": "s", "device": "top"}));
    c.until("the end of the stream", |e| matches!(e, Event::BLOCK_JOB_COMPLETED { .. }));
    c.run::<qmp::quit>(json!({}));
    assert!(d.wait().success());
}
