//! Nodes get other options and other children while clients use them.

use std::path::Path;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, established, eventually, serve};
use crate::load::{BLOCK, Client, Load, Model, assert_holds};
use crate::lock_bytes::held;
use crate::peer::{Bench, in_path};

const BLOCKS: u64 = 1024;

/// An image over a base that is full of sevens.
fn images(b: &Bench) {
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 7 0 4M", "base.qcow2"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
}

/// A daemon in whose graph `top` lies over `base`; leaves `tf` and `bf`.
fn daemon(b: &Bench) -> (Daemon, Monitor) {
    images(b);
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    add_images(b, &mut m);
    m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
    (d, m)
}

fn add_images(b: &Bench, m: &mut Monitor) {
    let file =
        |name: &str, node: &str| json!({"driver": "file", "filename": b.path(name), "node-name": node});
    m.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "base", "read-only": true,
        "file": file("base.qcow2", "bf")}),
    );
    m.ok("blockdev-add", file("top.qcow2", "tf"));
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": "base"}));
}

fn reopen(m: &mut Monitor, nodes: Json) -> Result<(), String> {
    let reply = m.ask(&json!({"execute": "blockdev-reopen", "arguments": {"options": nodes}}));
    match reply.get("error") {
        None => Ok(()),
        Some(e) => Err(e["desc"].as_str().expect("a text").to_owned()),
    }
}

/// A definition with more options.
fn with(base: &Json, more: Json) -> Json {
    let mut out = base.clone();
    for (k, v) in more.as_object().expect("options") {
        out[k] = v.clone();
    }
    out
}

fn nodes(m: &mut Monitor) -> Json {
    m.ok("query-named-block-nodes", json!({"flat": true}))
}

fn node(m: &mut Monitor, name: &str) -> Json {
    let all = nodes(m);
    let all = all.as_array().expect("a list");
    all.iter().find(|n| n["node-name"] == name).unwrap_or_else(|| panic!("no node {name}")).clone()
}

fn export(m: &mut Monitor, id: &str, node: &str, writable: bool) {
    m.ok(
        "block-export-add",
        json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable}),
    );
}

fn content(b: &Bench, image: &str) -> Vec<u8> {
    b.ok("qemu-img", &["convert", "-O", "raw", image, "content.raw"]);
    std::fs::read(b.path("content.raw")).expect("content")
}

fn check(b: &Bench, image: &str) {
    let out = b.ok("dolmen", &["img", "check", "-U", image]);
    assert!(out.contains("No errors were found"), "{out}");
}

/// Locked bytes of a file.
fn bytes(d: &Daemon, file: &str) -> Vec<u64> {
    held(d.child.id()).remove(file).unwrap_or_default().into_iter().collect()
}

#[test]
fn options_and_links_change_under_load_and_nothing_is_lost() {
    let b = Bench::new();
    let (mut d, mut m) = daemon(&b);
    m.ok("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "top"}));
    m.ok("blockdev-add", json!({"driver": "raw", "node-name": "over-base", "file": "base"}));
    export(&mut m, "e", "r", true);
    let connect = || Client::connect(&d.path("n.sock"), "e").expect("connected");
    let loads = [
        Load::start(connect(), 0..BLOCKS / 2, 1, Model::new(), true),
        Load::start(connect(), BLOCKS / 2..BLOCKS, 2, Model::new(), true),
    ];
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": "base"});
    let tf = json!({"driver": "file", "node-name": "tf", "filename": b.path("top.qcow2")});
    let r = json!({"driver": "raw", "node-name": "r", "file": "top"});
    let direct = with(&tf, json!({"cache": {"direct": true}}));
    let filtered = with(&top, json!({"backing": "over-base"}));
    let steps = [
        json!([with(&top, json!({"discard": "unmap", "pass-discard-request": true}))]),
        json!([direct]),
        json!([with(&tf, json!({"discard": "unmap"}))]),
        json!([filtered]),
        json!([with(&top, json!({"detect-zeroes": "on"}))]),
        // Several in one step, in either order.
        json!([filtered, direct]),
        json!([tf, top]),
        // Filters between the format and its file, and between the export and the node.
        json!([with(&top, json!({"file": {"driver": "raw", "node-name": "below", "file": "tf"}}))]),
        json!([top]),
        json!([with(&r, json!({"file": {"driver": "raw", "node-name": "above", "file": "top"}}))]),
        json!([with(&r, json!({"file": {"driver": "copy-on-read", "node-name": "copying", "file": "top"}}))]),
        json!([r]),
    ];
    let locked = bytes(&d, "top.qcow2");
    for _ in 0..4 {
        for step in &steps {
            // Some requests go through each graph.
            let before: Vec<u64> = loads.iter().map(Load::requests).collect();
            reopen(&mut m, step.clone()).unwrap_or_else(|e| panic!("{step}: {e}"));
            eventually("requests", || {
                let ended = loads.iter().any(Load::has_ended);
                let ran = loads.iter().zip(&before).all(|(l, n)| l.requests() > n + 5);
                (ended || ran).then_some(())
            });
        }
        // What fails half-way leaves no trace: neither options nor links nor locks.
        let state = nodes(&mut m);
        for bad in [
            json!([direct, with(&top, json!({"read-only": true}))]),
            json!([with(&top, json!({"backing": null})), {"driver": "file", "node-name": "bf", "filename": "/other"}]),
            json!([direct, {"driver": "qcow2", "node-name": "nobody", "file": "tf"}]),
            json!([with(&top, json!({"file": "bf"}))]),
        ] {
            reopen(&mut m, bad.clone()).expect_err(&bad.to_string());
        }
        let now = nodes(&mut m);
        let graph = |s: &Json| -> Vec<Json> {
            let all = s.as_array().expect("a list").iter();
            all.map(|n| json!([n["node-name"], n["cache"], n["ro"], n["backing_file"], n["file"]])).collect()
        };
        assert_eq!(graph(&now), graph(&state));
        assert_eq!(bytes(&d, "top.qcow2"), locked);
    }
    let mut model = Model::new();
    for load in loads {
        let (blocks, result) = load.end();
        result.expect("no request failed");
        model.extend(blocks);
    }
    assert!(model.len() > 50, "too little was written: {}", model.len());
    m.ok("quit", json!({}));
    assert!(d.wait().success());
    check(&b, "top.qcow2");
    if in_path("qemu-img").is_some() {
        assert_holds(&content(&b, "top.qcow2"), &model, 7);
    }
}

#[test]
fn read_only_and_back_with_the_right_locks() {
    let b = Bench::new();
    let (mut d, mut m) = daemon(&b);
    let top =
        json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": "base", "discard": "unmap"});
    let read_only = with(&top, json!({"read-only": true}));
    let mut model = Model::new();
    for round in 0..4 {
        export(&mut m, "w", "top", true);
        let client = Client::connect(&d.path("n.sock"), "w").expect("connected");
        let load = Load::start(client, 0..BLOCKS, round + 1, model, true);
        eventually("requests", || (load.requests() > 200 || load.has_ended()).then_some(()));
        // Not while somebody writes.
        let e = reopen(&mut m, json!([read_only])).expect_err("has a writer");
        assert!(
            e.starts_with("Read-only block node 'top' cannot support read-write users: export 'w'"),
            "{e}"
        );
        assert!(e.contains("block-export-del 'w'"), "{e}");
        let (known, result) = load.end();
        result.expect("no request failed");
        model = known;
        m.ok("block-export-del", json!({"id": "w", "mode": "hard"}));

        export(&mut m, "r", "top", false);
        let client = Client::connect(&d.path("n.sock"), "r").expect("connected");
        let load = Load::start(client, 0..BLOCKS, round + 1, model, false);
        reopen(&mut m, json!([read_only])).expect("nobody writes");
        assert_eq!(node(&mut m, "top")["ro"], true);
        assert_eq!(bytes(&d, "top.qcow2"), [100, 201, 203]);
        // All that was written is in the image, and nothing is left over.
        check(&b, "top.qcow2");
        // Another process may read it now, and while it does, it keeps us from writing.
        let mut reader = b.command("dolmen");
        reader.args(["io", "-r", "-f", "qcow2", "-c", "read 0 4k", "-c", "sleep 60000", "top.qcow2"]);
        let mut reader = reader.stdout(std::process::Stdio::null()).spawn().expect("starts");
        eventually("locks of the reader", || held(reader.id()).contains_key("top.qcow2").then_some(()));
        let e = reopen(&mut m, json!([top])).expect_err("a reader elsewhere");
        assert!(e.contains(&format!("process '{}'", reader.id())), "{e}");
        assert_eq!(node(&mut m, "top")["ro"], true);
        assert_eq!(bytes(&d, "top.qcow2"), [100, 201, 203]);
        reader.kill().expect("ends");
        reader.wait().expect("ends");
        reopen(&mut m, json!([top])).expect("alone again");
        assert_eq!(bytes(&d, "top.qcow2"), [100, 101, 103, 201, 203]);
        let seen = load.requests();
        eventually("requests", || (load.requests() > seen + 20 || load.has_ended()).then_some(()));
        let (known, result) = load.end();
        result.expect("no request failed");
        model = known;
        m.ok("block-export-del", json!({"id": "r", "mode": "hard"}));
    }
    m.ok("quit", json!({}));
    assert!(d.wait().success());
    if in_path("qemu-img").is_some() {
        assert_holds(&content(&b, "top.qcow2"), &model, 7);
    }
}

#[test]
fn a_child_defined_inside_follows_its_parent() {
    let b = Bench::new();
    images(&b);
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let file = json!({"driver": "file", "node-name": "tf", "filename": b.path("top.qcow2")});
    let top = json!({"driver": "qcow2", "node-name": "top", "backing": null});
    m.ok("blockdev-add", with(&top, json!({"read-only": true, "file": file})));
    assert_eq!(node(&mut m, "tf")["ro"], true);
    reopen(&mut m, json!([with(&top, json!({"file": "tf", "cache": {"direct": true}}))])).expect("follows");
    let tf = node(&mut m, "tf");
    assert_eq!((&tf["ro"], &tf["cache"]["direct"]), (&json!(false), &json!(true)));
    // What its own definition says stays.
    reopen(&mut m, json!([with(&top, json!({"file": with(&file, json!({"cache": {"direct": false}}))}))]))
        .expect("reopened in turn");
    reopen(&mut m, json!([with(&top, json!({"file": "tf", "cache": {"direct": true}}))])).expect("stays");
    assert_eq!(node(&mut m, "tf")["cache"]["direct"], false);
}

/// A file that was replaced under its name has other data.
#[test]
fn a_replaced_file_is_not_taken_for_the_old_one() {
    let b = Bench::new();
    let (_d, mut m) = daemon(&b);
    std::fs::rename(b.path("top.qcow2"), b.path("old.qcow2")).expect("renamed");
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "top.qcow2", "4M"]);
    let tf = json!({"driver": "file", "node-name": "tf", "filename": b.path("top.qcow2"), "cache": {"direct": true}});
    let e = reopen(&mut m, json!([tf])).expect_err("another file");
    assert!(e.contains("another file now"), "{e}");
    std::fs::rename(b.path("old.qcow2"), b.path("top.qcow2")).expect("renamed");
    reopen(&mut m, json!([tf])).expect("the same file");
}

#[test]
fn an_nbd_node_keeps_its_connection() {
    let b = Bench::new();
    let (d, mut m) = daemon(&b);
    export(&mut m, "e", "top", true);
    let server = json!({"type": "unix", "path": d.path("n.sock")});
    let mut relay = Daemon::start(|_| serve(), &[]);
    let mut r = relay.monitor();
    let n = json!({"driver": "nbd", "node-name": "n", "server": server, "export": "e"});
    r.ok("blockdev-add", n.clone());
    r.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": relay.path("r.sock")}}}));
    export(&mut r, "x", "n", true);
    let client = Client::connect(&relay.path("r.sock"), "x").expect("connected");
    let load = Load::start(client, 0..BLOCKS, 5, Model::new(), true);
    for more in
        [json!({"reconnect-delay": 5}), json!({"discard": "unmap"}), json!({"open-timeout": 2}), json!({})]
    {
        let seen = load.requests();
        reopen(&mut r, json!([with(&n, more)])).expect("reopened");
        eventually("requests", || (load.requests() > seen + 20 || load.has_ended()).then_some(()));
    }
    for (option, value) in
        [("export", json!("other")), ("server", json!({"type": "unix", "path": "/elsewhere"}))]
    {
        let e = reopen(&mut r, json!([with(&n, json!({option: value}))])).expect_err("another disk");
        assert!(e.contains(&format!("Cannot change the option '{option}'")), "{e}");
    }
    let (model, result) = load.end();
    result.expect("no request failed");
    // Still the connection it began with: a new one would have been refused.
    m.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    let mut direct = {
        export(&mut m, "f", "top", false);
        Client::connect(&d.path("n.sock"), "f").expect("connected")
    };
    for (block, value) in &model {
        assert_eq!(direct.read(*block).expect("read"), vec![*value; BLOCK as usize], "block {block}");
    }
}

/// Commands that both daemons refuse, and the words that QEMU's has for it.
#[test]
fn refusals_begin_with_the_same_words() {
    let b = Bench::new();
    let Some(theirs) = established() else { return };
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": "base"});
    let tf = |more: Json| {
        with(&json!({"driver": "file", "node-name": "tf", "filename": b.path("top.qcow2")}), more)
    };
    let without = |name: &str| {
        let mut o = top.clone();
        o.as_object_mut().expect("options").remove(name);
        o
    };
    let cases = [
        json!([with(&top, json!({"node-name": "nobody"}))]),
        json!([without("node-name")]),
        json!([without("backing")]),
        json!([without("file")]),
        json!([tf(json!({"filename": "/elsewhere"}))]),
        json!([with(&top, json!({"backing": "top"}))]),
        json!([with(&top, json!({"cluster-size": 1}))]),
        json!([with(&top, json!({"read-only": true}))]),
        json!([tf(json!({"read-only": true}))]),
        json!([tf(json!({"locking": "off"}))]),
    ];
    let words = |start: Box<dyn FnOnce(&Path) -> std::process::Command>| -> Vec<String> {
        images(&b);
        let mut d = Daemon::start(start, &[]);
        let mut m = d.monitor();
        add_images(&b, &mut m);
        m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
        export(&mut m, "e", "top", true);
        cases.iter().map(|c| reopen(&mut m, c.clone()).expect_err(&c.to_string())).collect()
    };
    let ours = words(Box::new(|_| serve()));
    for ((case, ours), theirs) in cases.iter().zip(ours).zip(words(Box::new(|_| theirs))) {
        assert!(ours.contains(&theirs), "{case}\nours: {ours}\ntheirs: {theirs}");
    }
}

/// Jobs copy what a chain reads as: nobody may make it read as something else meanwhile.
#[test]
fn other_data_under_a_job_are_refused_and_who_minds_is_named() {
    let b = Bench::new();
    let (d, mut m) = daemon(&b);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "target.qcow2", "4M"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "other.qcow2", "4M"]);
    let image = |name: &str| {
        let file = json!({"driver": "file", "filename": b.path(&format!("{name}.qcow2"))});
        json!({"driver": "qcow2", "node-name": name, "file": file})
    };
    m.ok("blockdev-add", image("target"));
    m.ok("blockdev-add", with(&image("other"), json!({"read-only": true})));
    m.ok("blockdev-add", json!({"driver": "raw", "node-name": "over-base", "file": "base"}));
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": "base"});
    for job in ["blockdev-backup", "blockdev-mirror"] {
        let start =
            json!({"job-id": "j", "device": "top", "target": "target", "sync": "full", "speed": 65536});
        m.ok(job, start);
        let nodes_then = nodes(&mut m).as_array().expect("a list").len();
        for change in [json!({"backing": "other"}), json!({"backing": null})] {
            let options = json!([with(&top, change)]);
            let reply = m.ask(&json!({"execute": "blockdev-reopen", "arguments": {"options": options}}));
            let conflict = &reply["error"]["data"]["conflict"];
            let party = |who: &str| (conflict[who]["kind"].clone(), conflict[who]["id"].clone());
            assert_eq!(party("denies"), (json!("job"), json!("j")), "{job}: {reply}");
            assert_eq!(party("asks"), (json!("command"), json!("blockdev-reopen")), "{job}: {reply}");
            assert!(conflict["why"].as_str().is_some_and(|w| !w.is_empty()), "{job}: {reply}");
            let remedies = conflict["remedies"].to_string();
            assert!(remedies.contains("job-cancel"), "{job}: {reply}");
        }
        assert_eq!(nodes(&mut m).as_array().expect("a list").len(), nodes_then, "no trace");
        // What leaves the data as they are is nobody's business.
        reopen(&mut m, json!([with(&top, json!({"discard": "unmap"}))])).expect("options");
        reopen(&mut m, json!([with(&top, json!({"backing": "over-base"}))])).expect("a filter in");
        reopen(&mut m, json!([top])).expect("and out");
        m.ok("block-job-cancel", json!({"device": "j", "force": true}));
        eventually("end of the job", || {
            m.ok("query-jobs", json!({})).as_array().expect("a list").is_empty().then_some(())
        });
        reopen(&mut m, json!([with(&top, json!({"backing": "other"}))])).expect("nobody minds now");
        reopen(&mut m, json!([top])).expect("back");
    }
    drop(d);
}

/// `discard` and `pass-discard-request` do what they say from the next request on.
#[test]
fn discards_follow_the_options() {
    let b = Bench::new();
    let (d, mut m) = daemon(&b);
    export(&mut m, "e", "top", true);
    let mut client = Client::connect(&d.path("n.sock"), "e").expect("connected");
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "tf", "backing": null});
    let tf =
        json!({"driver": "file", "node-name": "tf", "filename": b.path("top.qcow2"), "discard": "unmap"});
    // Bytes of the disk that a MiB takes after it has been written and discarded.
    let mut left = |m: &mut Monitor, options: Json| {
        reopen(m, json!([with(&top, options), tf])).expect("reopened");
        let empty = node(m, "tf")["image"]["actual-size"].as_u64().expect("a size");
        for block in 0..256 {
            client.write(block, 5).expect("written");
        }
        client.flush().expect("flushed");
        client.discard(0, 256).expect("discarded");
        // Space is given back by the flush that follows the one that unmaps it.
        client.flush().expect("flushed");
        client.flush().expect("flushed");
        let reads = client.read(0).expect("read")[0];
        let full = node(m, "tf")["image"]["actual-size"].as_u64().expect("a size");
        (reads, full.saturating_sub(empty) >= 512 << 10)
    };
    assert_eq!(left(&mut m, json!({"discard": "unmap", "pass-discard-request": true})), (0, false));
    assert_eq!(left(&mut m, json!({"discard": "ignore"})), (5, true));
    assert_eq!(left(&mut m, json!({"discard": "unmap"})), (0, false));
}

/// The story: the size of a `preallocate` or `blkverify` node could not be changed. The claim of `block_resize` went
/// through the node to its files, whose end the node keeps to itself.
#[test]
fn filters_that_keep_the_end_of_their_files_are_resized_and_cut_them_when_reopened() {
    const M: u64 = 1 << 20;
    let b = Bench::new();
    for name in ["grows.raw", "test.raw", "raw.raw"] {
        b.ok("dolmen", &["img", "create", "-q", "-f", "raw", name, "1M"]);
    }
    let size = |name: &str| std::fs::metadata(b.path(name)).expect("a file").len();
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let file = |name: &str| json!({"driver": "file", "filename": b.path(name)});
    m.ok("blockdev-add", with(&file("grows.raw"), json!({"node-name": "f"})));
    let p = json!({"driver": "preallocate", "node-name": "p", "file": "f", "prealloc-size": 8 * M});
    m.ok("blockdev-add", p.clone());
    m.ok("block_resize", json!({"node-name": "p", "size": 3 * M}));
    assert_eq!(size("grows.raw"), 11 * M);
    assert_eq!(node(&mut m, "p")["image"]["virtual-size"], json!(3 * M));

    reopen(&mut m, json!([with(&p, json!({"read-only": true}))])).expect("reopened");
    assert_eq!(size("grows.raw"), 3 * M, "a node that is only read keeps nothing in reserve");
    reopen(&mut m, json!([p])).expect("reopened");
    m.ok("block_resize", json!({"node-name": "p", "size": 4 * M}));
    reopen(&mut m, json!([with(&p, json!({"prealloc-size": 0}))])).expect("reopened");
    assert_eq!(size("grows.raw"), 4 * M);

    // Over another file it took the end of the old one for its own, and cut the new one there.
    b.ok("dolmen", &["img", "create", "-q", "-f", "raw", "other.raw", "30M"]);
    m.ok("blockdev-add", with(&file("other.raw"), json!({"node-name": "o"})));
    reopen(&mut m, json!([with(&p, json!({"file": "o"}))])).expect("reopened");
    assert_eq!(node(&mut m, "p")["image"]["virtual-size"], json!(30 * M));
    m.ok("block_resize", json!({"node-name": "p", "size": 31 * M}));
    assert_eq!((size("grows.raw"), size("other.raw")), (4 * M, 39 * M));

    let v =
        json!({"driver": "blkverify", "node-name": "v", "test": file("test.raw"), "raw": file("raw.raw")});
    m.ok("blockdev-add", v);
    m.ok("block_resize", json!({"node-name": "v", "size": 2 * M}));
    assert_eq!((size("test.raw"), size("raw.raw")), (2 * M, 2 * M));
    m.ok("blockdev-del", json!({"node-name": "p"}));
    m.ok("quit", json!({}));
}
