//! Mirrors and commits of a chain whose top is being written to, judged by `qemu-img` and compared with
//! QEMU's daemon.

use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, established, eventually, serve};
use crate::load::{BLOCK, Client, Load, Model};
use crate::peer::Bench;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// Reads as the chain did before anybody wrote to it.
fn images(b: &Bench) -> Vec<u8> {
    let size = SIZE.to_string();
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", &size]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "t1.qcow2", &size]);
    let write = |image: &str, commands: &[&str]| {
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|c| ["-c", c]));
        args.push(image);
        b.ok("qemu-io", &args);
    };
    write("base.qcow2", &["write -P 1 0 8M", "write -P 2 20M 4M"]);
    write("mid.qcow2", &["write -P 3 4M 2M", "write -z 21M 1M", "write -P 4 30M 1M"]);
    write("top.qcow2", &["write -P 5 5M 300k", "write -z 2M 1M", "write -P 6 12M 64k"]);
    content(b, "top.qcow2")
}

fn content(b: &Bench, image: &str) -> Vec<u8> {
    b.ok("qemu-img", &["convert", "-O", "raw", image, "content.raw"]);
    std::fs::read(b.path("content.raw")).expect("content")
}

/// What was there before, and on top of it what was written.
fn with(before: &[u8], models: &[Model]) -> Vec<u8> {
    let mut all = before.to_vec();
    for (block, value) in models.iter().flatten() {
        let at = (block * BLOCK) as usize;
        all[at..at + BLOCK as usize].fill(*value);
    }
    all
}

fn assert_same(found: &[u8], want: &[u8]) {
    let wrong = found.iter().zip(want).position(|(f, w)| f != w);
    assert!(wrong.is_none() && found.len() == want.len(), "byte {wrong:?} of {} is wrong", found.len());
}

/// The daemon in the bench's directory, with the chain, a target `t1` and a server.
fn daemon(b: &Bench, command: impl FnOnce(&Path) -> Command) -> (Daemon, Monitor) {
    let node = |name: &str, rest: &str| {
        let file = b.path(&format!("{name}.qcow2"));
        let file = file.display();
        format!("driver=qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={file}{rest}")
    };
    let args = [
        "--blockdev".to_owned(),
        node("base", ",read-only=on"),
        "--blockdev".to_owned(),
        node("mid", ",read-only=on,backing=base"),
        "--blockdev".to_owned(),
        node("top", ",backing=mid"),
        "--blockdev".to_owned(),
        node("t1", ""),
        "--nbd-server".to_owned(),
        "addr.type=unix,addr.path=DIR/nbd.sock".to_owned(),
    ];
    let mut d = Daemon::start(command, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let m = d.monitor();
    eventually("the server", || d.path("nbd.sock").exists().then_some(()));
    (d, m)
}

fn export(m: &mut Monitor, id: &str, node: &str, writable: bool) -> Json {
    let arguments = json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable});
    m.ask(&json!({"execute": "block-export-add", "arguments": arguments}))
}

/// Two clients that write to different halves of the disk.
fn loads(d: &Daemon, models: [Model; 2]) -> Vec<Load> {
    let half = SIZE / BLOCK / 2;
    let parts = [0..half, half..2 * half];
    parts
        .into_iter()
        .zip(models)
        .zip(1..)
        .map(|((part, model), seed)| {
            let client = Client::connect(&d.path("nbd.sock"), "disk").expect("connected");
            Load::start(client, part, seed, model, true)
        })
        .collect()
}

/// Lets the clients get some requests through.
fn some(loads: &[Load]) {
    for l in loads {
        let until = l.requests() + 30;
        eventually("requests of the client", || (l.requests() >= until || l.has_ended()).then_some(()));
        assert!(!l.has_ended(), "the client has met an error");
    }
}

fn end(loads: Vec<Load>) -> [Model; 2] {
    let models: Vec<Model> = loads
        .into_iter()
        .map(|l| {
            let (model, result) = l.end();
            result.expect("no error");
            model
        })
        .collect();
    models.try_into().expect("two")
}

/// Waits until the job is in this state, or has ended in another way.
fn until(m: &mut Monitor, status: &str) {
    eventually(status, || {
        m.ok("query-jobs", json!({}));
        let at = m.events.iter().any(|e| {
            e["event"] == "JOB_STATUS_CHANGE" && [status, "null"].iter().any(|s| e["data"]["status"] == **s)
        });
        at.then_some(())
    });
}

fn assert_succeeded(m: &Monitor) {
    let done = m.events.iter().find(|e| e["event"] == "BLOCK_JOB_COMPLETED");
    assert!(done.is_some_and(|e| e["data"].get("error").is_none()), "{:?}", m.events);
}

fn quit(mut m: Monitor, mut d: Daemon) {
    m.ok("quit", json!({}));
    assert!(d.wait().success());
}

fn ok(reply: &Json) {
    assert!(reply.get("return").is_some(), "{reply}");
}

#[test]
fn a_mirror_under_load_takes_the_place_of_its_source() {
    let Some(b) = Bench::with_peers() else { return };
    for modes in [["background", "write-blocking"], ["write-blocking", "background"]] {
        let before = images(&b);
        let (d, mut m) = daemon(&b, |_| serve());
        ok(&export(&mut m, "disk", "top", true));
        let guests = loads(&d, Default::default());
        some(&guests);
        let arguments = json!({"job-id": "j", "device": "top", "target": "t1", "sync": "full", "speed": 8 * MIB,
                   "copy-mode": modes[0]});
        m.ok("blockdev-mirror", arguments);
        some(&guests);
        m.ok("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": modes[1]}));
        some(&guests);
        m.ok("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"}));
        m.ok("block-job-set-speed", json!({"device": "j", "speed": 0}));
        until(&mut m, "ready");
        some(&guests);
        m.ok("job-complete", json!({"id": "j"}));
        until(&mut m, "null");
        assert_succeeded(&m);
        some(&guests);
        let models = end(guests);
        quit(m, d);
        assert_same(&content(&b, "t1.qcow2"), &with(&before, &models));
        b.ok("qemu-img", &["check", "-q", "t1.qcow2"]);
    }
}

#[test]
fn a_mirror_that_is_kept_is_the_disk_as_it_was_at_the_end() {
    let Some(b) = Bench::with_peers() else { return };
    let before = images(&b);
    let (d, mut m) = daemon(&b, |_| serve());
    ok(&export(&mut m, "disk", "top", true));
    let guests = loads(&d, Default::default());
    m.ok("blockdev-mirror", json!({"job-id": "j", "device": "top", "target": "t1", "sync": "full"}));
    some(&guests);
    m.ok("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"}));
    until(&mut m, "ready");
    some(&guests);
    let models = end(guests);
    m.ok("block-job-cancel", json!({"device": "j"}));
    until(&mut m, "null");
    assert_succeeded(&m);
    let later = loads(&d, models.clone());
    some(&later);
    let later = end(later);
    quit(m, d);
    assert_same(&content(&b, "t1.qcow2"), &with(&before, &models));
    assert_same(&content(&b, "top.qcow2"), &with(&before, &later));
}

#[test]
fn an_active_commit_under_load_over_one_and_two_levels() {
    let Some(b) = Bench::with_peers() else { return };
    for base in ["mid", "base"] {
        let before = images(&b);
        let (d, mut m) = daemon(&b, |_| serve());
        ok(&export(&mut m, "disk", "top", true));
        let guests = loads(&d, Default::default());
        some(&guests);
        m.ok("block-commit", json!({"job-id": "j", "device": "top", "base-node": base}));
        some(&guests);
        until(&mut m, "ready");
        some(&guests);
        m.ok("job-complete", json!({"id": "j"}));
        until(&mut m, "null");
        assert_succeeded(&m);
        some(&guests);
        let models = end(guests);
        quit(m, d);
        let image = format!("{base}.qcow2");
        assert_same(&content(&b, &image), &with(&before, &models));
        b.ok("qemu-img", &["check", "-q", &image]);
    }
}

#[test]
fn an_intermediate_commit_under_load_leaves_the_same_chain_as_theirs() {
    let Some(b) = Bench::with_peers() else { return };
    let before = images(&b);
    let (d, mut m) = daemon(&b, |_| serve());
    ok(&export(&mut m, "disk", "top", true));
    let guests = loads(&d, Default::default());
    some(&guests);
    m.ok("block-commit", json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"}));
    until(&mut m, "null");
    assert_succeeded(&m);
    some(&guests);
    let models = end(guests);
    let base = m.ok("query-named-block-nodes", json!({"flat": true}));
    let base = base.as_array().expect("a list").iter().find(|n| n["node-name"] == "base").expect("there");
    assert_eq!(base["ro"], true, "read-only again");
    quit(m, d);
    assert_same(&content(&b, "top.qcow2"), &with(&before, &models));
    for image in ["top.qcow2", "base.qcow2"] {
        b.ok("qemu-img", &["check", "-q", image]);
    }
    let backing = |b: &Bench| {
        let info: Json =
            serde_json::from_str(&b.ok("qemu-img", &["info", "--output=json", "top.qcow2"])).expect("JSON");
        (info["backing-filename"].clone(), info["backing-filename-format"].clone())
    };
    let ours = backing(&b);
    assert_eq!(ours, (json!(b.path("base.qcow2")), json!("qcow2")));
    let Some(theirs) = established() else { return };
    images(&b);
    let (d, mut m) = daemon(&b, |_| theirs);
    m.ok("block-commit", json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"}));
    until(&mut m, "null");
    quit(m, d);
    assert_eq!(backing(&b), ours);
}

/// Story: the overlay is larger than what is committed, and the base is as large as the overlay. What the
/// base holds behind the end of the committed image was never seen through it; it must not be seen
/// when the image is gone.
#[test]
fn a_commit_of_a_shorter_image_does_not_uncover_what_lies_behind_its_end() {
    let Some(b) = Bench::with_peers() else { return };
    let size = SIZE.to_string();
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", &size]);
    b.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 32M", "base.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "10M"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", &size]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "t1.qcow2", &size]);
    let before = content(&b, "top.qcow2");
    assert_eq!((before[0], before[11 << 20]), (1, 0));
    let (d, mut m) = daemon(&b, |_| serve());
    m.ok("block-commit", json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"}));
    until(&mut m, "null");
    assert_succeeded(&m);
    quit(m, d);
    assert_same(&content(&b, "top.qcow2"), &before);
}

/// Writers that come after the job: one that names the source is copied, one past the job is refused.
#[test]
fn late_writers_are_copied_or_refused() {
    let Some(b) = Bench::with_peers() else { return };
    let starts = [
        ("blockdev-mirror", json!({"device": "top", "target": "t1", "sync": "full"}), "t1.qcow2"),
        ("block-commit", json!({"device": "top", "base-node": "base"}), "base.qcow2"),
    ];
    for (command, mut arguments, result) in starts {
        let before = images(&b);
        let (d, mut m) = daemon(&b, |_| serve());
        arguments["job-id"] = "j".into();
        m.ok(command, arguments);
        until(&mut m, "ready");
        for node in ["mid", "base", "t1"] {
            if node == "t1" && command == "block-commit" {
                continue;
            }
            let refused = export(&mut m, "late", node, true);
            let text = refused["error"]["desc"].as_str().unwrap_or_default().to_owned();
            assert!(
                text.contains("'j'") || text == "Cannot export read-only node as writable",
                "{command} {node}: {refused}"
            );
        }
        ok(&export(&mut m, "disk", "top", true));
        let guests = loads(&d, Default::default());
        some(&guests);
        m.ok("job-complete", json!({"id": "j"}));
        until(&mut m, "null");
        assert_succeeded(&m);
        // They still read what they have written.
        some(&guests);
        let models = end(guests);
        quit(m, d);
        assert_same(&content(&b, result), &with(&before, &models));
    }
}

/// The events of a job and its ends, in the words of both daemons.
#[test]
fn events_come_in_the_established_order() {
    let Some(b) = Bench::with_peers() else { return };
    if established().is_none() {
        return;
    }
    let mirror = json!({"device": "top", "target": "t1", "sync": "full"});
    let top = json!({"device": "top", "target": "t1", "sync": "top", "copy-mode": "write-blocking"});
    let none = json!({"device": "top", "target": "t1", "sync": "none"});
    let manual = json!({"device": "top", "target": "t1", "sync": "full", "auto-finalize": false,
                        "auto-dismiss": false});
    let active = json!({"device": "top"});
    let middle = json!({"device": "top", "top-node": "mid"});
    let complete = ("job-complete", json!({"id": "j"}));
    let cancel = ("job-cancel", json!({"id": "j"}));
    let keep = ("block-job-cancel", json!({"device": "j"}));
    type Case<'a> = (&'a str, &'a Json, Option<&'a (&'a str, Json)>);
    let cases: [Case<'_>; 9] = [
        ("blockdev-mirror", &mirror, Some(&complete)),
        ("blockdev-mirror", &mirror, Some(&cancel)),
        ("blockdev-mirror", &mirror, Some(&keep)),
        // Completed, this one loses what lies below: refused here.
        ("blockdev-mirror", &top, Some(&keep)),
        ("blockdev-mirror", &none, Some(&keep)),
        ("blockdev-mirror", &manual, Some(&complete)),
        ("block-commit", &active, Some(&complete)),
        ("block-commit", &active, Some(&keep)),
        ("block-commit", &middle, None),
    ];
    for (command, arguments, ending) in cases {
        let run = |program: Command| {
            images(&b);
            let (d, mut m) = daemon(&b, |_| program);
            let mut arguments = arguments.clone();
            arguments["job-id"] = "j".into();
            m.ok(command, arguments.clone());
            if let Some((verb, about)) = ending {
                until(&mut m, "ready");
                m.ok(verb, about.clone());
            }
            if arguments.get("auto-finalize").is_some() {
                until(&mut m, "pending");
                m.ok("job-finalize", json!({"id": "j"}));
                until(&mut m, "concluded");
                m.ok("job-dismiss", json!({"id": "j"}));
            }
            until(&mut m, "null");
            let words = |e: &Json| {
                let mut data = e["data"].clone();
                // How much they say a mirror has to copy depends on what they know of the target.
                if data["type"] == "mirror" && data.get("len").is_some() {
                    assert_eq!(data["len"], data["offset"], "{e}");
                    data["len"] = Json::Null;
                    data["offset"] = Json::Null;
                }
                json!([e["event"], data]).to_string()
            };
            let events: Vec<_> = m.events.iter().map(words).collect();
            quit(m, d);
            events
        };
        let theirs = run(established().expect("it was there a moment ago"));
        assert_eq!(run(serve()), theirs, "{command} {arguments} {ending:?}");
    }
}

#[test]
fn a_mirror_to_a_file_makes_the_file() {
    let Some(b) = Bench::with_peers() else { return };
    let before = images(&b);
    for (sync, format, name) in [("full", "qcow2", "a"), ("full", "raw", "b"), ("top", "qcow2", "c")] {
        let (d, mut m) = daemon(&b, |_| serve());
        let file = b.path(&format!("{name}.{format}"));
        let start = |m: &mut Monitor, device: &str, mode: &str| {
            let arguments = json!({"job-id": "j", "device": device, "target": file, "sync": sync, "mode": mode,
                                   "format": format, "node-name": "copy"});
            m.ask(&json!({"execute": "drive-mirror", "arguments": arguments}))
        };
        assert!(start(&mut m, "nobody", "absolute-paths").get("error").is_some());
        let missing = start(&mut m, "top", "existing");
        assert!(missing.get("error").is_some(), "{missing}");
        assert!(!file.exists(), "{}", file.display());
        ok(&start(&mut m, "top", "absolute-paths"));
        until(&mut m, "ready");
        m.ok("block-job-cancel", json!({"device": "j"}));
        until(&mut m, "null");
        assert_succeeded(&m);
        let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
        assert!(nodes.as_array().expect("a list").iter().all(|n| n["node-name"] != "copy"), "{nodes}");
        quit(m, d);
        let file = file.to_str().expect("text");
        assert_same(&content(&b, file), &before);
        let info: Json =
            serde_json::from_str(&b.ok("qemu-img", &["info", "-f", format, "--output=json", file]))
                .expect("JSON");
        let backing = if sync == "top" { json!(b.path("mid.qcow2")) } else { Json::Null };
        assert_eq!(info["backing-filename"], backing);
    }
}
