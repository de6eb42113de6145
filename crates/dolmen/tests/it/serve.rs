//! The daemon from outside: command line, monitors, signals, files it leaves.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, by_established_name, established, eventually, read_all, run, serve};

const ONE_EXPORT: &[&str] = &[
    "--blockdev",
    "null-co,node-name=n,size=1048576",
    "--nbd-server",
    "addr.type=unix,addr.path=DIR/nbd.sock",
    "--export",
    "nbd,id=e,node-name=n,writable=on",
    "--pidfile",
    "DIR/pid",
];

#[test]
fn options_are_executed_and_everything_is_cleaned_up() {
    for signal in [Some(Signal::TERM), Some(Signal::INT), None] {
        let mut d = Daemon::start(by_established_name, ONE_EXPORT);
        let mut m = d.monitor();
        let exports = m.ok("query-block-exports", json!({}));
        assert_eq!(exports, json!([{"id": "e", "type": "nbd", "node-name": "n", "shutting-down": false}]));
        let pid = eventually("pid file", || {
            let text = std::fs::read_to_string(d.path("pid")).ok()?;
            text.trim().parse::<u32>().ok()
        });
        assert_eq!(pid, d.child.id());
        assert!(UnixStream::connect(d.path("nbd.sock")).is_ok());
        match signal {
            Some(s) => d.signal(s),
            None => assert_eq!(m.ask(&json!({"execute": "quit", "id": 1})), json!({"return": {}, "id": 1})),
        }
        let status = d.wait();
        assert!(status.success(), "{signal:?}: {status}");
        let last = m.rest();
        assert!(last.iter().any(|v| v["event"] == "BLOCK_EXPORT_DELETED"), "{last:?}");
        for file in ["m.sock", "nbd.sock", "pid"] {
            assert!(!d.path(file).exists(), "{signal:?} leaves {file}");
        }
    }
}

/// Killed, the daemon leaves its sockets; the next one takes their place. A live one is
/// not harmed.
#[test]
fn stale_sockets_are_replaced_and_live_ones_are_not() {
    let mut d = Daemon::start(|_| serve(), ONE_EXPORT);
    d.monitor();
    eventually("pid file", || d.path("pid").exists().then_some(()));
    let at = d.dir.path().display().to_string();
    let chardev = format!("socket,path={at}/m.sock,server=on,wait=off,id=m");
    let (status, _, stderr) = run(serve(), &["--chardev", &chardev]);
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("m.sock"), "{stderr}");
    let server = format!("addr.type=unix,addr.path={at}/nbd.sock");
    let (status, _, stderr) = run(serve(), &["--nbd-server", &server]);
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("nbd.sock"), "{stderr}");
    let (status, _, stderr) = run(serve(), &["--pidfile", &format!("{at}/pid")]);
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains(&format!("process {}", d.child.id())), "{stderr}");
    d.monitor();

    d.signal(Signal::KILL);
    d.wait();
    assert!(d.path("m.sock").exists() && d.path("nbd.sock").exists() && d.path("pid").exists());
    let dir = std::mem::replace(&mut d.dir, tempfile::tempdir().expect("a directory"));
    let mut d = Daemon::start_in(dir, |_| serve(), ONE_EXPORT);
    d.monitor();
    assert!(eventually("server", || UnixStream::connect(d.path("nbd.sock")).ok()).peer_addr().is_ok());
}

/// Wrong command lines end with code 1 and, after the program's name, the same words as
/// QEMU's daemon's.
#[test]
fn mistakes_in_the_words_of_the_established_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let lines: &[&[&str]] = &[
        &["--bogus"],
        &["extra"],
        &["--blockdev"],
        &["--blockdev", ""],
        &["--blockdev", "null-co,node-name=a,zork=1"],
        &["--blockdev", "null-co,node-name"],
        &["--blockdev", "null-co,=3"],
        &["--blockdev", "null-co,node-name=a,read-only=maybe"],
        &["--blockdev", "nonsense,node-name=a"],
        &["--blockdev", "{\"driver\":\"null-co\",\"node-name\":\"a\",\"size\":\"5\"}"],
        &["--blockdev", "{\"driver\":\"null-co\""],
        &["--blockdev", "null-co,size=512"],
        &["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
        &["--export", "nbd,id=e"],
        &["--export", "e"],
        &["--export", "nbd,id=e,node-name=nothing"],
        &["--blockdev", "null-co,node-name=a", "--export", "nbd,id=e,node-name=a"],
        &["--nbd-server", "path=x"],
        &["--nbd-server", "addr.type=unix,addr.data.path=x"],
        &["--nbd-server", "addr.type=inet,addr.host=127.0.0.1"],
        &["--chardev", "socket,path=DIR/q.sock,server=on,wait=off,id=m", "--monitor", "chardev=n"],
        &["--chardev", "socket,path=DIR/q.sock,server=on,wait=off"],
        &["--chardev", "nonsense,id=m"],
        &["--monitor", "pretty=on"],
        &["--pidfile", "/nonexistent/pid"],
    ];
    let at = dir.path().display().to_string();
    for line in lines {
        let line: Vec<String> = line.iter().map(|a| a.replace("DIR", &at)).collect();
        let (status, _, ours) = run(by_established_name(dir.path()), &line);
        assert_eq!(status.code(), Some(1), "{line:?}: {ours}");
        let Some(peer) = established() else { return };
        let (status, _, theirs) = run(peer, &line);
        assert_eq!(status.code(), Some(1), "{line:?}: {theirs}");
        // Ours may go on with a remedy in parentheses.
        let theirs = theirs.trim_end();
        assert!(ours.starts_with(theirs), "{line:?}\n  ours: {ours}  theirs: {theirs}");
    }
}

#[test]
fn help_and_version() {
    for flag in ["--help", "-h"] {
        let (status, out, _) = run(serve(), &[flag]);
        assert!(status.success());
        assert!(out.contains("--blockdev") && out.contains("--daemonize"), "{out}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (status, out, _) = run(by_established_name(dir.path()), &["--version"]);
    assert!(status.success());
    assert!(out.starts_with("qemu-storage-daemon version 10.0.2"), "{out}");
    let (status, _, err) = run(serve(), &["--object", "secret,id=s,data=x"]);
    assert_eq!(status.code(), Some(1));
    assert!(err.contains("object type 'secret' is not supported"), "{err}");
}

#[test]
fn a_monitor_on_standard_input_and_output() {
    let mut child = serve()
        .args(["--chardev", "stdio,id=s", "--monitor", "chardev=s,pretty=on"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit','id':7}\n").expect("sent");
    let text = read_all(child.stdout.take().expect("a pipe"));
    assert!(child.wait().expect("a child").success());
    assert!(text.contains("\"id\": 7"), "{text}");
    assert!(text.contains("{\n    \"return\""), "not pretty: {text}");
}

/// With `wait=on` nothing after the chardev happens before the first client is there.
#[test]
fn waiting_for_the_first_client() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = dir.path().display().to_string();
    let mut child = serve()
        .args(["--chardev", &format!("socket,id=m,path={at}/m.sock,server=on"), "--monitor", "m"])
        .args(["--pidfile", &format!("{at}/pid")])
        .stdin(Stdio::null())
        .spawn()
        .expect("starts");
    let stream = eventually("socket", || UnixStream::connect(dir.path().join("m.sock")).ok());
    eventually("pid file", || dir.path().join("pid").exists().then_some(()));
    (&stream).write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").expect("sent");
    let text = read_all(&stream);
    assert_eq!(text.matches("{\"return\": {}}").count(), 2, "{text}");
    assert!(child.wait().expect("a child").success());
}

/// The daemon is a client of somebody else's socket.
#[test]
fn a_monitor_that_connects() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("m.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let mut child = serve()
        .args(["--chardev", &format!("socket,id=m,path={}", path.display()), "--monitor", "m"])
        .stdin(Stdio::null())
        .spawn()
        .expect("starts");
    let (stream, _) = listener.accept().expect("a connection");
    (&stream).write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").expect("sent");
    assert!(read_all(&stream).contains("QMP"));
    assert!(child.wait().expect("a child").success());
    assert!(path.exists(), "somebody else's socket was removed");
}

#[test]
fn in_the_background() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = dir.path().display().to_string();
    let (pid_file, socket) = (format!("{at}/pid"), format!("{at}/m.sock"));
    let chardev = format!("socket,id=m,path={socket},server=on,wait=off");
    let args = ["--daemonize", "--chardev", &chardev, "--monitor", "m", "--pidfile", &pid_file];
    let (status, out, err) = run(serve(), &args);
    assert!(status.success(), "{out}{err}");
    // Ready means ready: no waiting from here on.
    let pid: i32 = std::fs::read_to_string(&pid_file).expect("a pid file").trim().parse().expect("a pid");
    let pid = Pid::from_raw(pid).expect("a pid");
    assert!(UnixStream::connect(&socket).is_ok());
    kill_process(pid, Signal::TERM).expect("alive");
    eventually("end", || test_kill_process(pid).is_err().then_some(()));
    assert!(!std::path::Path::new(&socket).exists());

    let (status, _, err) = run(serve(), &["--daemonize", "--blockdev", "nonsense,node-name=a"]);
    assert_eq!(status.code(), Some(1));
    assert!(err.contains("--blockdev nonsense,node-name=a: Parameter 'driver'"), "{err}");
}

/// Two daemons want to write one image: the second is told by whom it is held, in words and
/// as data, and can have it once the first has let go.
#[test]
fn a_refusal_names_the_process_that_holds_the_image() {
    let mut first = Daemon::start(|_| serve(), &[]);
    let disk = first.path("disk.qcow2");
    let (status, _, text) = run(
        Command::new(env!("CARGO_BIN_EXE_dolmen")),
        &[
            OsStr::new("img"),
            "create".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            disk.as_ref(),
            "1M".as_ref(),
        ],
    );
    assert!(status.success(), "{text}");
    let add = json!({"execute": "blockdev-add", "arguments":
        {"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": disk}}});
    let mut a = first.monitor();
    assert_eq!(a.ask(&add), json!({"return": {}}));

    let mut second = Daemon::start(|_| serve(), &[]);
    let mut b = second.monitor();
    let reply = b.ask(&add);
    let pid = first.child.id().to_string();
    let desc = reply["error"]["desc"].as_str().expect("a refusal");
    assert!(desc.contains(&pid) && desc.contains("disk.qcow2"), "{desc}");
    let conflict = &reply["error"]["data"]["conflict"];
    assert_eq!(reply["error"]["data"]["kind"], "Locked");
    assert!(conflict["denies"].to_string().contains(&pid), "{conflict}");
    assert!(conflict["remedies"].as_array().is_some_and(|r| !r.is_empty()), "{conflict}");
    assert_eq!(b.ok("query-named-block-nodes", json!({})), json!([]));

    a.ok("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(b.ask(&add), json!({"return": {}}));
}

/// A writer past a format is refused in four parts: node and action, both sides, why,
/// and what would work.
#[test]
fn a_conflict_is_told_as_data() {
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
    c.current_dir(d.dir.path());
    assert!(run(c, &["img", "create", "-f", "qcow2", "disk.qcow2", "1M"]).0.success());
    m.ok("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": d.path("disk.qcow2")}));
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": "f"}));
    let addr = json!({"type": "unix", "data": {"path": d.path("nbd.sock")}});
    m.ok("nbd-server-start", json!({ "addr": addr }));
    let export = |id: &str, node: &str, writable: bool| {
        json!({"execute": "block-export-add", "arguments":
            {"type": "nbd", "id": id, "node-name": node, "writable": writable}})
    };
    assert_eq!(m.ask(&export("guest", "disk", true)), json!({"return": {}}));
    let reply = m.ask(&export("intruder", "f", true));
    let error = &reply["error"];
    let conflict = &error["data"]["conflict"];
    assert_eq!(conflict["node"], "f", "{reply}");
    assert_eq!(conflict["actions"], json!(["write"]));
    assert_eq!(conflict["asks"]["id"], "intruder");
    assert_eq!(conflict["asks"].get("since-seconds"), None);
    assert_eq!(conflict["denies"]["id"], "disk");
    let desc = error["desc"].as_str().expect("a text");
    for part in ["node 'f'", "export 'intruder'", "write data", "node 'disk'", "Export 'f' read-only"] {
        assert!(desc.contains(part), "{desc} has no {part}");
    }
    // The refusal leaves no trace: the same id can be used for something else.
    let exports = m.ok("query-block-exports", json!({}));
    assert_eq!(exports.as_array().map(Vec::len), Some(1));
    assert_eq!(
        m.ask(&export("intruder", "disk", false))["error"]["desc"],
        "NBD server already has export named 'disk'"
    );
}

/// An export with clients goes only when it is said to be hard, and so does its server.
#[test]
fn exports_with_clients() {
    let mut server = Daemon::start(|_| serve(), ONE_EXPORT);
    let mut m = server.monitor();
    // The export is there before the pid file is.
    eventually("pid file", || server.path("pid").exists().then_some(()));
    let mut client = Daemon::start(|_| serve(), &[]);
    let mut c = client.monitor();
    let connect = |c: &mut crate::daemon::Monitor, name: &str| {
        let at = json!({"type": "unix", "path": server.path("nbd.sock")});
        c.ok("blockdev-add", json!({"driver": "nbd", "node-name": name, "server": at, "export": "n"}));
    };
    connect(&mut c, "r");
    let del = |mode: &str| json!({"execute": "block-export-del", "arguments": {"id": "e", "mode": mode}});
    let refused = m.ask(&del("safe"));
    let desc = refused["error"]["desc"].as_str().expect("a refusal");
    assert!(desc.starts_with("export 'e' still in use"), "{desc}");
    assert_eq!(m.ok("query-block-exports", json!({}))[0]["shutting-down"], false);
    assert_eq!(m.ask(&del("hard")), json!({"return": {}}));
    assert_eq!(m.events[0]["data"], json!({"id": "e"}));
    assert_eq!(m.ok("query-block-exports", json!({})), json!([]));

    m.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true}));
    connect(&mut c, "again");
    m.ok("nbd-server-stop", json!({}));
    assert_eq!(m.events.len(), 2);
    assert!(!server.path("nbd.sock").exists());
    m.ok("blockdev-del", json!({"node-name": "n"}));
    for name in ["r", "again"] {
        // What can't be flushed any more is told; the node is gone in any case.
        c.ask(&json!({"execute": "blockdev-del", "arguments": {"node-name": name}}));
    }
    assert_eq!(c.ok("query-named-block-nodes", json!({})), json!([]));
}

/// A command that waits for somebody who does not answer holds up neither queries nor the
/// end of the program.
#[test]
fn a_server_that_does_not_answer() {
    let mut d = Daemon::start(|_| serve(), &[]);
    let silent = UnixListener::bind(d.path("silent.sock")).expect("bound");
    let (mut a, mut b) = (d.monitor(), d.monitor());
    let at = json!({"type": "unix", "path": d.path("silent.sock")});
    a.send(&json!({"execute": "blockdev-add", "id": "stuck",
        "arguments": {"driver": "nbd", "node-name": "r", "server": at}}));
    // It has connected and waits for the greeting.
    let (_connection, _) = silent.accept().expect("a connection");
    assert_eq!(b.ok("query-named-block-nodes", json!({})), json!([]));
    d.signal(Signal::TERM);
    let replies = a.rest();
    assert_eq!(replies.len(), 1, "{replies:?}");
    assert_eq!(replies[0]["id"], "stuck");
    assert_eq!(replies[0]["error"]["desc"], "The daemon is shutting down");
    assert!(d.wait().success());
}

/// What an image names is opened as far as the image is trusted.
#[test]
fn images_are_not_trusted() {
    let mut d = Daemon::start(|_| serve(), &[]);
    let img = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
        c.current_dir(d.dir.path()).arg("img");
        let (status, out, err) = run(c, args);
        assert!(status.success(), "{out}{err}");
    };
    let base = d.path("base.qcow2").display().to_string();
    img(&["create", "-f", "qcow2", "base.qcow2", "1M"]);
    img(&["create", "-f", "qcow2", "-u", "-b", "base.qcow2", "-F", "qcow2", "beside.qcow2", "1M"]);
    img(&["create", "-f", "qcow2", "-u", "-b", &base, "-F", "qcow2", "elsewhere.qcow2", "1M"]);
    let add = |name: &str| {
        let file = json!({"driver": "file", "filename": d.path(&format!("{name}.qcow2"))});
        json!({"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": name, "file": file}})
    };
    let (beside, elsewhere) = (add("beside"), add("elsewhere"));
    let mut m = d.monitor();
    assert_eq!(m.ask(&beside), json!({"return": {}}));
    let refused = m.ask(&elsewhere);
    let desc = refused["error"]["desc"].as_str().expect("a refusal");
    assert!(desc.contains(&base) && desc.contains("--allow-backing=anything"), "{desc}");
    m.ok("quit", json!({}));
    d.wait();

    let trusting: [fn(&std::path::Path) -> Command; 2] = [by_established_name, |_| {
        let mut c = serve();
        c.args(["--allow-backing", "anything"]);
        c
    }];
    for command in trusting {
        let mut d = Daemon::start(command, &[]);
        assert_eq!(d.monitor().ask(&elsewhere), json!({"return": {}}));
    }
}

/// A signal in the middle of writing: what was acknowledged before is there, and the image
/// is whole.
#[test]
fn a_signal_under_load() {
    let dir = tempfile::tempdir().expect("a directory");
    let dolmen = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
        c.current_dir(dir.path());
        run(c, args)
    };
    assert!(dolmen(&["img", "create", "-f", "qcow2", "disk.qcow2", "256M"]).0.success());
    let image = dir.path().join("disk.qcow2").display().to_string();
    let mut d = Daemon::start(
        |_| serve(),
        &[
            "--blockdev",
            &format!("qcow2,node-name=d,file.driver=file,file.filename={image}"),
            "--nbd-server",
            "addr.type=unix,addr.path=DIR/nbd.sock",
            "--export",
            "nbd,id=e,node-name=d,writable=on",
            "--pidfile",
            "DIR/pid",
        ],
    );
    eventually("pid file", || d.path("pid").exists().then_some(()));
    let uri = format!("nbd+unix:///d?socket={}", d.path("nbd.sock").display());
    let (status, out, err) = dolmen(&["io", "-f", "raw", "-c", "write -P 7 0 4M", &uri]);
    assert!(status.success(), "{out}{err}");
    let mut load = match Command::new("qemu-img")
        .args(["bench", "-w", "-f", "raw", "-c", "10000000", "-d", "16", "-s", "64k", "-S", "192k"])
        .args(["-o", "8M", "--pattern", "9", &uri])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
    {
        Ok(child) => child,
        Err(_) => {
            eprintln!("qemu-img is not installed: no load");
            return;
        }
    };
    // Enough to be in the middle of allocating: the image grows.
    let at_first = std::fs::metadata(&image).expect("the image").len();
    eventually("load", || (std::fs::metadata(&image).ok()?.len() > at_first + (16 << 20)).then_some(()));
    d.signal(Signal::TERM);
    let status = d.wait();
    let _ = load.kill();
    let _ = load.wait();
    assert!(status.success(), "{status}");
    let (status, out, err) = dolmen(&["img", "check", "-f", "qcow2", "disk.qcow2"]);
    assert!(status.success(), "{out}{err}");
    if let Ok(o) = Command::new("qemu-img").args(["check", "-f", "qcow2", &image]).output() {
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stdout));
    }
    let (status, out, err) = dolmen(&["io", "-f", "qcow2", "-c", "read -P 7 0 4M", "disk.qcow2"]);
    assert!(status.success() && !out.contains("failed"), "{out}{err}");
}

/// The same commands give the same replies as in QEMU's daemon.
#[test]
fn the_same_replies() {
    let Some(_) = established() else { return };
    let mut ours = Daemon::start(by_established_name, &[]);
    let mut theirs = Daemon::start(|_| established().expect("was there"), &[]);
    for d in [&ours, &theirs] {
        std::fs::write(d.path("disk.img"), [7; 65536]).expect("written");
    }
    let (mut a, mut b) = (ours.monitor(), theirs.monitor());
    let add = |arguments: Json| json!({"execute": "blockdev-add", "arguments": arguments});
    let export = |arguments: Json| json!({"execute": "block-export-add", "arguments": arguments});
    let start = json!({"execute": "nbd-server-start",
        "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}});
    let commands = [
        add(json!({"driver": "null-co", "size": 1_048_576})),
        add(json!({"driver": "null-co", "node-name": "1st"})),
        add(json!({"driver": "null-co", "node-name": "n", "size": 1_048_576})),
        add(json!({"driver": "null-co", "node-name": "n"})),
        add(json!({"driver": "copy-on-read", "node-name": "r", "file": "nothing"})),
        add(json!({"driver": "copy-on-read", "node-name": "r", "file": "n"})),
        add(json!({"driver": "copy-on-read", "node-name": "ro", "file": "n", "read-only": true})),
        json!({"execute": "x-debug-query-block-graph"}),
        json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}}),
        json!({"execute": "query-named-block-nodes"}),
        add(json!({"driver": "file", "node-name": "f", "filename": "nothing.img"})),
        add(json!({"driver": "file", "node-name": "f", "filename": "disk.img", "locking": "on",
            "cache": {"direct": false, "no-flush": true}})),
        add(json!({"driver": "file", "node-name": "f-ro", "filename": "disk.img", "read-only": true})),
        json!({"execute": "x-debug-query-block-graph"}),
        json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "f-ro"}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "f"}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "nothing"}}),
        json!({"execute": "query-block-exports"}),
        export(json!({"type": "nbd", "id": "e0", "node-name": "r"})),
        json!({"execute": "nbd-server-stop"}),
        start.clone(),
        start,
        export(json!({"type": "nbd", "id": "e0", "node-name": "nothing"})),
        export(json!({"type": "nbd", "id": "1st", "node-name": "r"})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "ro", "writable": true})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "r", "writable": true})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "r", "name": "x"})),
        export(json!({"type": "nbd", "id": "e1", "node-name": "r"})),
        export(json!({"type": "nbd", "id": "e1", "node-name": "r", "name": "x"})),
        json!({"execute": "query-block-exports"}),
        json!({"execute": "x-debug-query-block-graph"}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "r"}}),
        json!({"execute": "block-export-del", "arguments": {"id": "nothing"}}),
        json!({"execute": "block-export-del", "arguments": {"id": "e1"}}),
        json!({"execute": "nbd-server-stop"}),
        json!({"execute": "query-block-exports"}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "ro"}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "r"}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "n"}}),
        json!({"execute": "query-named-block-nodes"}),
    ];
    for command in &commands {
        let (x, y) = (a.ask(command), b.ask(command));
        same(command, &normal(x), &normal(y));
    }
    let events = |m: &crate::daemon::Monitor| -> Vec<Json> {
        m.events.iter().map(|e| json!([e["event"], e["data"]])).collect()
    };
    assert_eq!(events(&a), events(&b));
}

/// The same with images: a chain built by hand, one opened as the image says, and raw
/// nodes.
#[test]
fn the_same_replies_about_images() {
    let Some(_) = established() else { return };
    let mut ours = Daemon::start(by_established_name, &[]);
    let mut theirs = Daemon::start(|_| established().expect("was there"), &[]);
    for d in [&ours, &theirs] {
        let create = |args: &[&str]| {
            let mut c = Command::new("qemu-img");
            c.current_dir(d.dir.path()).args(["create", "-q", "-f", "qcow2"]).args(args);
            assert!(c.status().expect("qemu-img runs").success());
        };
        create(&["base.qcow2", "64M"]);
        create(&["-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        create(&["-o", "compat=v2", "old.qcow2", "1M"]);
        std::fs::write(d.path("disk.img"), [7; 65536]).expect("written");
    }
    let (mut a, mut b) = (ours.monitor(), theirs.monitor());
    let add = |arguments: Json| json!({"execute": "blockdev-add", "arguments": arguments});
    let del = |name: &str| json!({"execute": "blockdev-del", "arguments": {"node-name": name}});
    let file = |name: &str| json!({"driver": "file", "filename": name});
    let graph = json!({"execute": "x-debug-query-block-graph"});
    let nodes = json!({"execute": "query-named-block-nodes"});
    let flat = json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}});
    let commands = [
        add(json!({"driver": "file", "node-name": "basef", "filename": "base.qcow2", "read-only": true})),
        add(json!({"driver": "qcow2", "node-name": "base", "file": "basef", "read-only": true})),
        add(json!({"driver": "copy-on-read", "node-name": "cor", "file":
            {"driver": "qcow2", "node-name": "top", "file": file("top.qcow2"), "backing": "base"}})),
        graph.clone(),
        nodes.clone(),
        flat.clone(),
        del("base"),
        del("top"),
        json!({"execute": "nbd-server-start",
            "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}),
        json!({"execute": "block-export-add",
            "arguments": {"type": "nbd", "id": "e", "node-name": "cor", "writable": true}}),
        graph.clone(),
        json!({"execute": "block-export-del", "arguments": {"id": "e"}}),
        del("cor"),
        del("base"),
        del("basef"),
        nodes.clone(),
        // The backing file as the image says.
        add(json!({"driver": "qcow2", "node-name": "chain", "file": file("top.qcow2")})),
        graph.clone(),
        nodes.clone(),
        flat,
        del("chain"),
        add(json!({"driver": "qcow2", "node-name": "alone", "file": file("top.qcow2"), "backing": null})),
        add(json!({"driver": "qcow2", "node-name": "old", "file": file("old.qcow2")})),
        graph.clone(),
        nodes.clone(),
        del("alone"),
        del("old"),
        add(json!({"driver": "raw", "node-name": "raw", "file": file("disk.img")})),
        add(
            json!({"driver": "raw", "node-name": "part", "offset": 4096, "size": 8192, "file": file("disk.img")}),
        ),
        graph.clone(),
        nodes,
        del("part"),
        del("raw"),
        add(json!({"driver": "qcow2", "node-name": "not", "file": file("disk.img")})),
        graph,
    ];
    for command in &commands {
        let (x, y) = (a.ask(command), b.ask(command));
        same(command, &normal(x), &normal(y));
    }
}

/// Replies without what may differ: our errors have more to say, our users have names,
/// and the numbers of graph points are arbitrary.
fn normal(mut reply: Json) -> Json {
    if let Some(e) = reply.get_mut("error").and_then(Json::as_object_mut) {
        e.shift_remove("data");
    }
    if reply["return"].get("edges").is_some() {
        let graph = reply["return"].clone();
        let name = |id: &Json| {
            let nodes = graph["nodes"].as_array().expect("nodes");
            let n = nodes.iter().find(|n| n["id"] == *id).expect("edges lead to nodes");
            match n["type"] == "block-driver" {
                true if n["name"].as_str().is_some_and(|n| n.starts_with('#')) => json!("made up"),
                true => n["name"].clone(),
                false => n["type"].clone(),
            }
        };
        let edges = graph["edges"].as_array().expect("edges").iter();
        let mut edges: Vec<_> = edges
            .map(|e| {
                let mut shared = e["shared-perm"].clone();
                // QEMU lets others write what an overlay shows while it is read.
                if e["name"] == "backing"
                    && let Some(list) = shared.as_array_mut()
                {
                    list.retain(|p| *p != "write" && *p != "resize");
                }
                json!([name(&e["parent"]), e["name"], name(&e["child"]), e["perm"], shared]).to_string()
            })
            .collect();
        edges.sort();
        return json!(edges);
    }
    spell_out(&mut reply);
    // Nodes come in no particular order, apart from parents before children.
    if let Some(nodes) = reply["return"].as_array_mut() {
        for n in nodes.iter_mut().filter(|n| n["node-name"].as_str().is_some_and(|n| n.starts_with('#'))) {
            n["node-name"] = json!("made up");
        }
        nodes.sort_by_key(|n| (n["node-name"].to_string(), n["file"].to_string()));
    }
    reply
}

/// Replaces `json:` names by what they say: the order of their keys means nothing.
fn spell_out(v: &mut Json) {
    match v {
        Json::String(s) => {
            if let Some(text) = s.strip_prefix("json:") {
                *v = serde_json::from_str(text).expect("JSON");
            }
        }
        Json::Array(l) => l.iter_mut().for_each(spell_out),
        Json::Object(m) => m.values_mut().for_each(spell_out),
        _ => {}
    }
}

fn same(command: &Json, ours: &Json, theirs: &Json) {
    match (ours["error"]["desc"].as_str(), theirs["error"]["desc"].as_str()) {
        (Some(a), Some(b)) => {
            assert_eq!(ours["error"]["class"], theirs["error"]["class"], "{command}");
            assert!(a.starts_with(b), "{command}\n  ours: {a}\n  theirs: {b}");
        }
        _ => assert_eq!(ours, theirs, "{command}"),
    }
}

/// A damaged L2 entry is met by a client's read: the client gets an error, everybody else
/// an event, the image is marked, and the next writer is refused.
#[test]
fn damage_is_announced() {
    use std::os::unix::fs::FileExt;

    let b = crate::peer::Bench::new();
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 7 0 128k", "disk.qcow2"]);
    // L1 table -> L2 table -> its second entry, which gets an offset inside a cluster.
    let image =
        std::fs::File::options().read(true).write(true).open(b.path("disk.qcow2")).expect("the image");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        image.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    let l1 = word(40);
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    image.write_all_at(&(word(l2 + 8) | 0x400).to_be_bytes(), l2 + 8).expect("written");

    let disk =
        format!("qcow2,node-name=disk,file.driver=file,file.filename={}", b.path("disk.qcow2").display());
    let mut daemon = Daemon::start(
        |_| serve(),
        &[
            "--blockdev",
            &disk,
            "--nbd-server",
            "addr.type=unix,addr.path=DIR/nbd.sock",
            "--export",
            "nbd,id=e,node-name=disk,name=d,writable=on",
        ],
    );
    let mut m = daemon.monitor();
    let uri = format!("nbd+unix:///d?socket={}", daemon.path("nbd.sock").display());
    b.ok("dolmen", &["io", "-r", "-f", "raw", "-c", "read -P 7 0 64k", &uri]);
    let read = b.run("dolmen", &["io", "-r", "-f", "raw", "-c", "read 64k 64k", &uri]);
    assert!(read.out.contains("failed") || read.err.contains("failed"), "{read:?}");
    let event = m.receive().expect("an event");
    assert_eq!(event["event"], "BLOCK_IMAGE_CORRUPTED", "{event}");
    assert_eq!(event["data"]["node-name"], "disk");
    assert_eq!(event["data"]["fatal"], true);
    assert!(event["data"]["msg"].as_str().is_some_and(|t| t.contains("unaligned")), "{event}");
    m.ok("quit", json!({}));
    assert!(daemon.wait().success());

    let write = b.run("dolmen", &["io", "-f", "qcow2", "-c", "write 0 64k", "disk.qcow2"]);
    assert_ne!(write.code, 0, "{write:?}");
    assert!(write.err.contains("corrupt"), "{write:?}");
}
