//! NBD at both ends: a daemon that serves an image, and one that serves it on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::json;

use crate::daemon::{Daemon, eventually, run, serve};

const SIZE: u64 = 16 << 20;

/// Waits until the daemon has done what its options say: its monitor comes before its exports.
fn serving(mut d: Daemon) -> Daemon {
    let mut m = d.monitor();
    eventually("export", || {
        m.ok("query-block-exports", json!({})).as_array().is_some_and(|e| e.len() == 1).then_some(())
    });
    d
}

/// Starts the daemon that has the image.
fn origin(dir: &Path, image: &Path) -> Daemon {
    let listens = format!("addr.type=unix,addr.path={}", dir.join("origin.sock").display());
    let file = format!("driver=file,node-name=f,filename={},discard=unmap", image.display());
    let args = [
        "--blockdev",
        &file,
        "--nbd-server",
        &listens,
        "--export",
        "nbd,id=e,node-name=f,name=disk,writable=on",
    ];
    serving(Daemon::start(|_| serve(), &args))
}

/// Starts a daemon that reaches the image over NBD, through a filter, and serves it on.
fn relay(dir: &Path) -> Daemon {
    let there = format!(
        "driver=nbd,node-name=n,server.type=unix,server.path={},export=disk,discard=unmap",
        dir.join("origin.sock").display()
    );
    let args = [
        "--blockdev",
        &there,
        "--blockdev",
        "driver=copy-on-read,node-name=c,file=n,discard=unmap",
        "--nbd-server",
        "addr.type=unix,addr.path=DIR/relay.sock",
        "--export",
        "nbd,id=e,node-name=c,name=relayed,writable=on",
    ];
    serving(Daemon::start(|_| serve(), &args))
}

fn dolmen(args: &[&str]) -> (bool, String) {
    let (status, out, err) = run(Command::new(env!("CARGO_BIN_EXE_dolmen")), args);
    (status.success(), out + &err)
}

fn ok(args: &[&str]) -> String {
    let (success, text) = dolmen(args);
    assert!(success, "{args:?}: {text}");
    text
}

#[test]
fn our_client_and_our_server_understand_each_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    let f = File::create(&image).expect("created");
    f.set_len(SIZE).expect("sized");
    f.write_all_at(&[0x51; 1 << 20], 4 << 20).expect("written");
    let _origin = origin(dir.path(), &image);
    let relay = relay(dir.path());
    let uri = format!("nbd+unix:///relayed?socket={}", relay.path("relay.sock").display());
    ok(&[
        "io",
        "-f",
        "raw",
        &uri,
        "-c",
        "read -P 0x51 4M 1M",
        "-c",
        "read -P 0 0 4M",
        "-c",
        "write -P 0x52 12345 678901",
        "-c",
        "write -z 4M 64k",
        "-c",
        "discard 4864k 256k",
        "-c",
        "flush",
        "-c",
        "read -P 0x52 12345 678901",
        "-c",
        "read -P 0 4M 64k",
    ]);
    let back = std::fs::read(&image).expect("read");
    let mut model = vec![0; SIZE as usize];
    model[4 << 20..5 << 20].fill(0x51);
    model[12345..12345 + 678_901].fill(0x52);
    model[4 << 20..][..64 << 10].fill(0);
    model[4864 << 10..][..256 << 10].fill(0);
    assert!(back == model, "what was written through two daemons is in the file");
    // Both sides of the relay agree about data and holes, to the byte.
    let direct = format!("nbd+unix:///disk?socket={}", dir.path().join("origin.sock").display());
    let map = |uri: &str| ok(&["img", "map", "-f", "raw", "--output=json", uri]);
    assert_eq!(map(&uri), map(&direct));
    assert!(map(&uri).contains("\"zero\": true"));
    let (success, text) = dolmen(&["img", "info", &uri.replace("relayed", "nobody")]);
    assert!(!success && text.contains("there is no export named 'nobody'"), "{text}");
}

/// The origin dies: clients of the relay get errors, not a dead relay. It comes back: so
/// does the disk.
#[test]
fn a_dead_origin_is_an_error_and_not_an_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0x53; SIZE as usize]).expect("written");
    let mut first = origin(dir.path(), &image);
    let mut relay = relay(dir.path());
    let uri = format!("nbd+unix:///relayed?socket={}", relay.path("relay.sock").display());
    let read = ["io", "-f", "raw", "-r", &uri, "-c", "read -P 0x53 1M 64k"];
    ok(&read);
    first.signal(Signal::KILL);
    first.wait();
    let (_, text) = dolmen(&read);
    assert!(text.contains("Input/output error"), "{text}");
    relay.monitor();
    let _second = origin(dir.path(), &image);
    eventually("the disk", || dolmen(&read).0.then_some(()));
}

/// One export through two nodes is one disk. An NBD server has no locks, so two images were opened in it for writing, and gave
/// the same clusters to both; and a mirror of an image could write its copy over the image itself.
#[test]
fn one_export_is_one_disk_by_whatever_way() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    ok(&["img", "create", "-q", "-f", "qcow2", &image.display().to_string(), "8M"]);
    let before = std::fs::read(&image).expect("the image");
    let _origin = origin(dir.path(), &image);
    std::os::unix::fs::symlink("origin.sock", dir.path().join("link.sock")).expect("a link");
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let path = |socket: &str| dir.path().join(socket).display().to_string();
    let nbd = |node: &str, socket: &str, read_only: bool| {
        json!({"driver": "nbd", "node-name": node, "server": {"type": "unix", "path": path(socket)},
               "export": "disk", "read-only": read_only})
    };
    m.ok("blockdev-add", nbd("n1", "origin.sock", false));
    m.ok("blockdev-add", nbd("n2", "link.sock", false));
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "a", "file": "n1"}));
    let uri = format!("nbd+unix:///disk?socket={}", path("link.sock"));
    for (command, arguments) in [
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "b", "file": "n2"})),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "b", "file": nbd("n3", "link.sock", false)})),
        (
            "drive-mirror",
            json!({"job-id": "m", "device": "a", "target": uri, "format": "raw", "mode": "existing", "sync": "full"}),
        ),
    ] {
        let reply = m.ask(&json!({"execute": command, "arguments": arguments}));
        let desc =
            reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command} was accepted: {reply}"));
        assert!(desc.contains("'n1' (the same export) does not allow it"), "{desc}");
    }
    assert_eq!(std::fs::read(&image).expect("the image"), before);
    // Whoever does not get in the way is let in: also another option of the node, and its successor.
    m.ok(
        "blockdev-reopen",
        json!({"options": [nbd("n1", "origin.sock", true), {
        "driver": "qcow2", "node-name": "a", "file": "n1", "read-only": true}]}),
    );
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "b", "file": "n2", "read-only": true}));
    m.ok("blockdev-del", json!({"node-name": "b"}));
    m.ok("blockdev-del", json!({"node-name": "a"}));
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "b", "file": "n2"}));
}
