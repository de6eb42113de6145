//! Backups of a disk that is being written to, by ours and by QEMU's daemon, judged by `qemu-img`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, established, eventually, serve};
use crate::peer::Bench;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

/// base.qcow2 and top.qcow2 over it, with data in both and nothing in some places; what they read as in
/// before.raw; a target of each name. One chunk of the disk is cut off by its end.
fn images(b: &Bench, targets: &[&str]) {
    let size = (SIZE - 5 * 4096).to_string();
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", &size]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    b.ok(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 1 0 6M",
            "-c",
            "write -P 2 9M 3M",
            "-c",
            "write -P 3 23M 900k",
            "base.qcow2",
        ],
    );
    b.ok(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 4 2M 1M",
            "-c",
            "write -z 10M 1M",
            "-c",
            "write -P 5 15M 300k",
            "top.qcow2",
        ],
    );
    b.ok("qemu-img", &["convert", "-O", "raw", "top.qcow2", "before.raw"]);
    for t in targets {
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", t, &size]);
    }
}

fn node(b: &Bench, name: &str) -> String {
    let file = b.path(&format!("{name}.qcow2"));
    format!("driver=qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={}", file.display())
}

/// The daemon with the chain, nodes for the targets, and a server without exports.
fn daemon(b: &Bench, command: impl FnOnce(&Path) -> Command, targets: &[&str]) -> Daemon {
    let mut args = vec!["--blockdev".to_owned(), node(b, "top")];
    for t in targets {
        args.extend(["--blockdev".to_owned(), node(b, t)]);
    }
    args.extend(["--nbd-server", "addr.type=unix,addr.path=DIR/nbd.sock"].map(str::to_owned));
    Daemon::start(command, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn export(m: &mut Monitor, name: &str, node: &str, writable: bool) {
    m.ok(
        "block-export-add",
        json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable}),
    );
}

fn uri(d: &Daemon, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", d.path("nbd.sock").display())
}

/// A guest that overwrites, zeroes and discards all over the disk.
fn scribble(b: &Bench, uri: &str, seed: u64) {
    let mut commands = Vec::new();
    for i in 0..60u64 {
        let at = (i * 7_654_321 + seed * 999_983) % (SIZE - MIB) / 512 * 512;
        let len = 512 * (1 + (i * 37 + seed) % 300);
        commands.push(match i % 5 {
            0 => format!("write -z {at} {len}"),
            1 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 100 + i),
        });
    }
    let mut args = vec!["-f".to_owned(), "raw".to_owned(), "-d".to_owned(), "unmap".to_owned()];
    args.extend(commands.into_iter().flat_map(|c| ["-c".to_owned(), c]));
    args.push(uri.to_owned());
    b.ok("qemu-io", &args);
}

fn event<'a>(m: &'a Monitor, name: &str) -> Option<&'a Json> {
    m.events.iter().find(|e| e["event"] == name)
}

/// Waits for the end of a job that has to succeed.
fn finish(m: &mut Monitor) {
    eventually("the end of the job", || {
        m.ok("query-jobs", json!({}));
        event(m, "BLOCK_JOB_COMPLETED").is_some().then_some(())
    });
    let end = event(m, "BLOCK_JOB_COMPLETED").expect("seen").clone();
    assert!(end["data"].get("error").is_none(), "{end}");
    assert_eq!(end["data"]["offset"], end["data"]["len"], "{end}");
}

fn quit(mut m: Monitor, mut d: Daemon) {
    m.ok("quit", json!({}));
    assert!(d.wait().success());
}

/// Runs a backup of `top` under load: the job stands nearly still while the guest overwrites half of the
/// disk, then both go on at once.
fn under_load(b: &Bench, mut arguments: Json, targets: &[&str]) {
    let mut d = daemon(b, |_| serve(), targets);
    let mut m = d.monitor();
    eventually("the server", || d.path("nbd.sock").exists().then_some(()));
    export(&mut m, "disk", "top", true);
    let disk = uri(&d, "disk");
    for (key, value) in [("job-id", json!("b")), ("device", json!("top")), ("speed", json!(1000))] {
        arguments[key] = value;
    }
    m.ok("blockdev-backup", arguments);
    scribble(b, &disk, 1);
    m.ok("block-job-set-speed", json!({"device": "b", "speed": 0}));
    scribble(b, &disk, 2);
    finish(&mut m);
    scribble(b, &disk, 3);
    quit(m, d);
}

#[test]
fn a_full_backup_is_the_disk_as_it_was() {
    let Some(b) = Bench::with_peers() else { return };
    images(&b, &["t.qcow2"]);
    under_load(&b, json!({"target": "t", "sync": "full"}), &["t"]);
    b.ok("qemu-img", &["compare", "before.raw", "t.qcow2"]);
    b.ok("qemu-img", &["check", "t.qcow2"]);
    b.ok("qemu-img", &["check", "top.qcow2"]);
    // Zeroes are not stored.
    let map: Json =
        serde_json::from_str(&b.ok("qemu-img", &["map", "--output=json", "t.qcow2"])).expect("JSON");
    let stored = |e: &&Json| e["data"] == true;
    let data: u64 =
        map.as_array().expect("a list").iter().filter(stored).filter_map(|e| e["length"].as_u64()).sum();
    assert!(data < 14 * MIB, "{data} bytes of about 10 MiB");
}

#[test]
fn a_fleecing_backup_is_the_disk_as_it_was() {
    let Some(b) = Bench::with_peers() else { return };
    images(&b, &["t.qcow2", "f.qcow2"]);
    under_load(&b, json!({"target": "t", "sync": "full", "fleecing": "f"}), &["t", "f"]);
    b.ok("qemu-img", &["compare", "before.raw", "t.qcow2"]);
    b.ok("qemu-img", &["check", "t.qcow2"]);
    // What has been copied is not kept.
    let map: Json =
        serde_json::from_str(&b.ok("qemu-img", &["map", "--output=json", "f.qcow2"])).expect("JSON");
    assert!(map.as_array().expect("a list").iter().all(|e| e["data"] == false), "{map}");
}

/// The target has the same backing file; only what the topmost image held is in it.
#[test]
fn a_top_backup_takes_the_topmost_image() {
    let Some(b) = Bench::with_peers() else { return };
    images(&b, &[]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "t.qcow2"]);
    under_load(&b, json!({"target": "t", "sync": "top"}), &["t"]);
    b.ok("qemu-img", &["compare", "before.raw", "t.qcow2"]);
    let map: Json =
        serde_json::from_str(&b.ok("qemu-img", &["map", "--output=json", "t.qcow2"])).expect("JSON");
    let own = |e: &&Json| e["depth"] == 0;
    let bytes: u64 =
        map.as_array().expect("a list").iter().filter(own).filter_map(|e| e["length"].as_u64()).sum();
    assert!((2 * MIB..4 * MIB).contains(&bytes), "{bytes} bytes of 2.3 MiB: {map}");
}

/// Fleecing by hand.
#[test]
fn a_snapshot_can_be_read_while_the_disk_changes() {
    let Some(b) = Bench::with_peers() else { return };
    images(&b, &["f.qcow2"]);
    let mut d = daemon(&b, |_| serve(), &["f"]);
    let mut m = d.monitor();
    eventually("the server", || d.path("nbd.sock").exists().then_some(()));
    m.ok(
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "top", "target": "f"}),
    );
    m.ok(
        "blockdev-add",
        json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw", "discard": "unmap"}),
    );
    export(&mut m, "disk", "cbw", true);
    export(&mut m, "snap", "snap", true);
    let (disk, snap) = (uri(&d, "disk"), uri(&d, "snap"));
    for seed in 0..3 {
        scribble(&b, &disk, seed);
        let same = b.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "before.raw", &snap]);
        assert_eq!(same.code, 0, "after {seed}: {same:?}");
    }
    // A writer past the filter would spoil it.
    let past = json!({"type": "nbd", "id": "x", "node-name": "top", "name": "x", "writable": true});
    let refused = m.ask(&json!({"execute": "block-export-add", "arguments": past}));
    assert!(refused["error"]["desc"].is_string(), "{refused}");
    // The view can't be written; what is discarded there can't be read any more.
    let io = |c: &str| b.run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", c, &snap]).code;
    assert_ne!(io("write 0 64k"), 0);
    assert_eq!(io("discard 1M 1M"), 0);
    assert_ne!(io("read 1M 64k"), 0);
    assert_eq!(io("read -P 4 2M 64k"), 0);
    quit(m, d);
}

/// The same words for the same mistakes.
#[test]
fn mistakes_are_refused_in_the_established_words() {
    let Some(b) = Bench::with_peers() else { return };
    let Some(theirs) = established() else { return };
    let mut said: Vec<Vec<Json>> = Vec::new();
    for command in [serve(), theirs] {
        images(&b, &["t.qcow2"]);
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "small.qcow2", "1M"]);
        let mut d = daemon(&b, |_| command, &["t", "small"]);
        let mut m = d.monitor();
        eventually("the server", || d.path("nbd.sock").exists().then_some(()));
        let mut backup = |change: Json| {
            let mut arguments = json!({"job-id": "b", "device": "top", "target": "t", "sync": "full"});
            for (key, value) in change.as_object().expect("an object") {
                arguments[key] = value.clone();
            }
            m.ask(&json!({"execute": "blockdev-backup", "arguments": arguments}))["error"]["desc"].clone()
        };
        let replies = [
            json!({"target": "small"}),
            json!({"target": "top"}),
            json!({"device": "nobody"}),
            json!({"target": "nobody"}),
            json!({"x-perf": {"max-workers": 0}}),
            json!({"x-perf": {"max-chunk": 1000}}),
            json!({"sync": "half"}),
        ]
        .map(&mut backup);
        said.push(replies.to_vec());
        quit(m, d);
    }
    for (ours, theirs) in said[0].iter().zip(&said[1]) {
        let (ours, theirs) = (ours.as_str().expect("refused"), theirs.as_str().expect("refused"));
        // Ours may go on, with the way out.
        assert!(ours == theirs || ours.starts_with(&format!("{theirs} (")), "{ours} / {theirs}");
    }
}

/// To a file name: a new image in the source's format, and one that is there.
#[test]
fn a_backup_to_a_file_name_makes_the_image() {
    let Some(b) = Bench::with_peers() else { return };
    images(&b, &["there.qcow2"]);
    for (target, sync, more) in [
        ("new.qcow2", "full", json!({})),
        ("new-top.qcow2", "top", json!({})),
        ("new.raw", "full", json!({"format": "raw"})),
        ("there.qcow2", "full", json!({"format": "qcow2", "mode": "existing"})),
    ] {
        let mut d = daemon(&b, |_| serve(), &[]);
        let mut m = d.monitor();
        let file = b.path(target);
        let mut arguments = json!({"job-id": "b", "device": "top", "target": file, "sync": sync});
        for (key, value) in more.as_object().expect("an object") {
            arguments[key] = value.clone();
        }
        m.ok("drive-backup", arguments);
        finish(&mut m);
        let nodes = m.ok("query-named-block-nodes", json!({}));
        let names = nodes.to_string();
        assert!(!names.contains(target), "the target is closed: {names}");
        quit(m, d);
        b.ok("qemu-img", &["compare", "before.raw", target]);
    }
    let info = b.ok("qemu-img", &["info", "--output=json", "new-top.qcow2"]);
    let info: Json = serde_json::from_str(&info).expect("JSON");
    assert!(info["backing-filename"].as_str().is_some_and(|f| f.ends_with("base.qcow2")), "{info}");
}
