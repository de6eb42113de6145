//! One image, two daemons: `blockdev-set-active` hands it over.

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, established, eventually, serve};
use crate::load::{Client, Load, Model, assert_holds};
use crate::lock_bytes::held;
use crate::peer::{Bench, in_path};

const BLOCKS: u64 = 1024;

fn start(b: &Bench, command: impl FnOnce(&Path) -> Command, active: bool) -> (Daemon, Monitor) {
    let mut d = Daemon::start(command, &[]);
    let mut m = d.monitor();
    let file = |name: &str, node: &str| json!({"driver": "file", "filename": b.path(name), "node-name": node, "active": active});
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "active": active, "file": file("top.qcow2", "tf"),
        "backing": {"driver": "qcow2", "node-name": "base", "active": active, "file": file("base.qcow2", "bf")}}));
    m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
    m.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true, "allow-inactive": true}),
    );
    (d, m)
}

fn set_active(m: &mut Monitor, node: &str, active: bool) -> Result<(), String> {
    let arguments = json!({"node-name": node, "active": active});
    let reply = m.ask(&json!({"execute": "blockdev-set-active", "arguments": arguments}));
    match reply.get("error") {
        None => Ok(()),
        Some(e) => Err(e["desc"].as_str().expect("a text").to_owned()),
    }
}

fn activity(m: &mut Monitor) -> Vec<(String, bool)> {
    let all = m.ok("query-named-block-nodes", json!({"flat": true}));
    let mut out: Vec<_> = all
        .as_array()
        .expect("a list")
        .iter()
        .map(|n| (n["node-name"].as_str().expect("a name").to_owned(), n["active"] == true))
        .collect();
    out.sort();
    out
}

fn images(b: &Bench) {
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 7 0 4M", "base.qcow2"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
}

fn hand_over(second: impl FnOnce(&Path) -> Command) {
    let b = Bench::new();
    images(&b);
    let mut sides = [start(&b, |_| serve(), true), start(&b, second, false)];
    let mut model = Model::new();
    for round in 0..6 {
        let [(a, am), (_, bm)] = &mut sides;
        let client = Client::connect(&a.path("n.sock"), "top").expect("connected");
        let load = Load::start(client, 0..BLOCKS, round + 1, model, true);
        eventually("requests", || (load.requests() > 300 || load.has_ended()).then_some(()));
        set_active(bm, "top", true).expect_err("the other one has it");
        assert!(activity(bm).contains(&("top".to_owned(), false)));
        set_active(am, "top", false).expect("handed over under load");
        assert!(activity(am).iter().all(|n| !n.1), "children go along");
        // The client is told, and nothing that was acknowledged before is lost.
        eventually("end of the load", || load.has_ended().then_some(()));
        let (known, result) = load.end();
        assert_eq!(result.expect_err("not served any more").kind(), ErrorKind::PermissionDenied);
        model = known;
        set_active(bm, "top", true).expect("free now");
        assert!(activity(bm).iter().all(|n| n.1));
        sides.reverse();
    }
    for (mut d, mut m) in sides {
        m.ok("quit", json!({}));
        assert!(d.wait().success());
    }
    let out = b.ok("dolmen", &["img", "check", "top.qcow2"]);
    assert!(out.contains("No errors were found"), "{out}");
    if in_path("qemu-img").is_some() {
        b.ok("qemu-img", &["convert", "-O", "raw", "top.qcow2", "content.raw"]);
        assert_holds(&std::fs::read(b.path("content.raw")).expect("content"), &model, 7);
    }
}

#[test]
fn an_image_goes_back_and_forth_between_two_daemons() {
    hand_over(|_| serve());
}

#[test]
fn an_image_goes_back_and_forth_with_the_established_daemon() {
    if established().is_some() {
        hand_over(|_| established().expect("there"));
    }
}

#[test]
fn an_inactive_node_holds_nothing_and_serves_nobody() {
    let b = Bench::new();
    images(&b);
    let (d, mut m) = start(&b, |_| serve(), true);
    assert!(!held(d.child.id()).is_empty());
    set_active(&mut m, "top", false).expect("nobody minds");
    assert!(held(d.child.id()).is_empty(), "locks of an inactive image");
    let mut client = Client::connect(&d.path("n.sock"), "top").expect("connected");
    for result in [client.read(0).map(drop), client.write(0, 1), client.zero(0)] {
        assert_eq!(result.expect_err("inactive").kind(), ErrorKind::PermissionDenied);
    }
    // Somebody else changes it, its size among other things; whoever holds it is named.
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "truncate 8M", "top.qcow2"]);
    let mut other = b.command("dolmen");
    other.args(["io", "-f", "qcow2", "-c", "write -P 9 5M 4k", "-c", "sleep 60000", "top.qcow2"]);
    let mut other = other.stdout(std::process::Stdio::null()).spawn().expect("starts");
    eventually("its locks", || held(other.id()).contains_key("top.qcow2").then_some(()));
    let e = set_active(&mut m, "top", true).expect_err("locked elsewhere");
    assert!(e.contains(&format!("process '{}'", other.id())), "{e}");
    assert!(activity(&mut m).iter().all(|n| !n.1), "a refusal leaves no trace");
    assert!(held(d.child.id()).is_empty(), "nor locks");
    other.kill().expect("ends");
    other.wait().expect("ends");
    set_active(&mut m, "top", true).expect("free");
    let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
    let top = nodes.as_array().expect("a list").iter().find(|n| n["node-name"] == "top").expect("there");
    assert_eq!(top["image"]["virtual-size"], 8 << 20, "read anew");
    let mut client = Client::connect(&d.path("n.sock"), "top").expect("connected");
    client.write(5 << 8, 3).expect("active again");
}

#[test]
fn who_keeps_a_node_active_is_named() {
    let b = Bench::new();
    images(&b);
    let (_d, mut m) = start(&b, |_| serve(), true);
    m.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "top"}));
    let e = set_active(&mut m, "top", false).expect_err("has a parent");
    assert!(e.starts_with("Node has active parent node") && e.contains("'r'"), "{e}");
    m.ok("block-export-add", json!({"type": "nbd", "id": "x", "node-name": "r"}));
    let e = set_active(&mut m, "r", false).expect_err("is exported");
    assert!(e.starts_with("Failed to inactivate node") && e.contains("export 'x'"), "{e}");
    m.ok("block-export-del", json!({"id": "x"}));
    set_active(&mut m, "r", false).expect("free");
    // An active parent needs active children.
    let e = m.ask(
        &json!({"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r2", "file": "top"}}),
    );
    let text = e["error"]["desc"].as_str().unwrap_or_default().to_owned();
    assert!(text.starts_with("Inactive 'top' can't be a file child of active 'r2'"), "{text}");
    // Who exports a node wants to use it.
    m.ok("block-export-add", json!({"type": "nbd", "id": "x", "node-name": "r"}));
    assert!(activity(&mut m).iter().all(|n| n.1));
    let reply: Json = m.ask(&json!({"execute": "blockdev-set-active", "arguments": {"active": false}}));
    let text = reply["error"]["desc"].as_str().unwrap_or_default();
    assert!(text.starts_with("Failed to inactivate all nodes"), "{text}");
    m.ok("block-export-del", json!({"id": "x"}));
    m.ok("blockdev-set-active", json!({"active": false}));
    assert!(activity(&mut m).iter().all(|n| !n.1));
    m.ok("blockdev-set-active", json!({"active": true}));
    assert!(activity(&mut m).iter().all(|n| n.1));
}
