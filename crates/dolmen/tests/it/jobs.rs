//! Jobs from outside, beside QEMU's daemon: the same commands on copies of the same images have to
//! give the same events in the same order, the same refusals, and images that read the same.

use std::path::Path;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, established, eventually};
use crate::peer::{Bench, in_path};

/// `top -> mid -> base`, 8 MiB each, with data in every layer and holes in all of them.
fn chain() -> Option<Bench> {
    let b = Bench::with_peers()?;
    in_path("qemu-storage-daemon")?;
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 1 0 2M", "-c", "write -P 4 6M 256k", "base"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid"]);
    b.ok("qemu-io", &["-c", "write -P 2 1M 2M", "-c", "write -z 128k 64k", "mid"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    b.ok("qemu-io", &["-c", "write -P 3 2560k 100k", "-c", "write -z 4M 64k", "top"]);
    Some(b)
}

/// Both daemons, each on its own copy of the images, with the chain opened.
struct Pair {
    ours: (Daemon, Monitor),
    theirs: (Daemon, Monitor),
}

const IMAGES: [&str; 3] = ["base", "mid", "top"];

fn open(
    b: &Bench,
    command: impl FnOnce(&Path) -> std::process::Command,
    read_only: bool,
) -> (Daemon, Monitor) {
    let dir = tempfile::tempdir().expect("a directory");
    for name in IMAGES {
        std::fs::copy(b.path(name), dir.path().join(name)).expect("copied");
    }
    let mut d = Daemon::start_in(dir, command, &[]);
    let mut m = d.monitor();
    let file = |name: &str| json!({"driver": "file", "filename": name});
    let base = json!({"driver": "qcow2", "node-name": "base", "file": file("base"), "read-only": true});
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": file("mid"), "backing": "base",
                     "read-only": read_only});
    let top = json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "backing": "mid"});
    for node in [base, mid, top] {
        m.ok("blockdev-add", node);
    }
    (d, m)
}

impl Pair {
    fn new(b: &Bench) -> Option<Pair> {
        let peer = established()?;
        Some(Pair { ours: open(b, by_established_name, false), theirs: open(b, |_| peer, false) })
    }

    /// The same command to both; both succeed or both fail, and ours begins with the same words.
    fn same(&mut self, name: &str, arguments: &Json) -> bool {
        let command = json!({"execute": name, "arguments": arguments});
        let (ours, theirs) = (self.ours.1.ask(&command), self.theirs.1.ask(&command));
        let what = format!("{command}\n  ours: {ours}\n  theirs: {theirs}");
        assert_eq!(ours.get("error").is_some(), theirs.get("error").is_some(), "{what}");
        if let Some(e) = theirs.get("error") {
            assert_eq!(ours["error"]["class"], e["class"], "{what}");
            let (a, b) = (ours["error"]["desc"].as_str(), e["desc"].as_str());
            assert!(a.expect("a text").starts_with(b.expect("a text")), "{what}");
        }
        theirs.get("error").is_none()
    }

    fn until(&mut self, id: &str, status: &str) {
        until(&mut self.ours.1, id, status);
        until(&mut self.theirs.1, id, status);
    }

    /// The events so far are the same.
    fn same_events(&mut self) {
        let (ours, theirs) = (take_events(&mut self.ours.1), take_events(&mut self.theirs.1));
        assert_eq!(ours, theirs);
    }

    /// What `query-jobs` and `query-block-jobs` show is the same, but for what depends on the moment.
    fn same_queries(&mut self) {
        for query in ["query-jobs", "query-block-jobs"] {
            let steady = |mut v: Json| {
                for job in v.as_array_mut().expect("a list") {
                    let job = job.as_object_mut().expect("an object");
                    for member in ["current-progress", "offset", "busy", "estimated-remaining-ms"] {
                        job.remove(member);
                    }
                }
                v
            };
            let ours = steady(self.ours.1.ok(query, json!({})));
            assert_eq!(ours, steady(self.theirs.1.ok(query, json!({}))), "{query}");
        }
    }

    /// Both daemons end; the images read as `expected` does, in both directions, and are in order.
    fn same_images(self, b: &Bench, names: &[&str], expected: &str) {
        for (mut d, mut m) in [self.ours, self.theirs] {
            m.send(&json!({"execute": "quit"}));
            m.rest();
            assert!(d.wait().success());
            let expected = b.path(expected);
            for name in names {
                let path = d.path(name);
                b.ok(
                    "qemu-img",
                    &["compare".as_ref(), "-q".as_ref(), path.as_os_str(), expected.as_os_str()],
                );
                b.ok("qemu-img", &["check".as_ref(), "-q".as_ref(), path.as_os_str()]);
            }
        }
    }
}

fn until(m: &mut Monitor, id: &str, status: &str) {
    eventually(&format!("{id} is {status}"), || {
        m.ok("query-version", json!({}));
        let seen = |e: &Json| {
            e["event"] == "JOB_STATUS_CHANGE" && e["data"]["id"] == id && e["data"]["status"] == status
        };
        m.events.iter().any(seen).then_some(())
    });
}

fn take_events(m: &mut Monitor) -> Vec<(Json, Json)> {
    m.ok("query-version", json!({}));
    let moment = |mut data: Json| {
        if let Some(o) = data.as_object_mut()
            && o.get("offset").is_some_and(|v| o.get("len") != Some(v))
        {
            o.remove("offset");
        }
        data
    };
    m.events.drain(..).map(|mut e| (e["event"].take(), moment(e["data"].take()))).collect()
}

/// The backing file that a header names, and its format.
fn backing(b: &Bench, path: &Path) -> (Json, Json) {
    let info =
        b.ok("qemu-img", &["info".as_ref(), "-U".as_ref(), "--output=json".as_ref(), path.as_os_str()]);
    let mut info: Json = serde_json::from_str(&info).expect("JSON");
    (info["backing-filename"].take(), info["backing-filename-format"].take())
}

#[test]
fn streams_end_as_theirs() {
    let Some(b) = chain() else { return };
    for (arguments, changed) in [
        (json!({"device": "top"}), "top"),
        (json!({"device": "top", "base-node": "base"}), "top"),
        (json!({"device": "top", "base": "base"}), "top"),
        (json!({"device": "top", "bottom": "mid"}), "top"),
        (json!({"device": "top", "base-node": "mid"}), "top"),
        (json!({"device": "top", "base-node": "base", "backing-file": "./base"}), "top"),
        (json!({"device": "mid"}), "mid"),
        (json!({"device": "mid", "filter-node-name": "f", "speed": 1 << 30}), "mid"),
        (json!({"device": "base"}), "base"),
    ] {
        let Some(mut p) = Pair::new(&b) else { return };
        let mut arguments = arguments.clone();
        arguments["job-id"] = "j".into();
        assert!(p.same("block-stream", &arguments));
        p.until("j", "null");
        p.same_events();
        let names = |m: &mut Monitor| {
            let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
            let of = |n: &Json| n["node-name"].as_str().filter(|n| !n.starts_with('#')).map(str::to_owned);
            let mut names: Vec<String> = nodes.as_array().expect("a list").iter().filter_map(of).collect();
            names.sort();
            names
        };
        assert_eq!(names(&mut p.ours.1), names(&mut p.theirs.1), "{arguments}");
        assert_eq!(
            backing(&b, &p.ours.0.path(changed)),
            backing(&b, &p.theirs.0.path(changed)),
            "{arguments}"
        );
        p.same_images(&b, &[changed], changed);
    }
}

/// A read-only node is writable as long as it is filled.
#[test]
fn a_read_only_node_is_streamed_and_read_only_again() {
    let Some(b) = chain() else { return };
    let (mut d, mut m) = open(&b, by_established_name, true);
    let read_only = |m: &mut Monitor| {
        let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
        let mid = nodes.as_array().expect("a list").iter().find(|n| n["node-name"] == "mid");
        mid.expect("mid is there")["ro"].clone()
    };
    assert_eq!(read_only(&mut m), true);
    m.ok("block-stream", json!({"job-id": "j", "device": "mid", "speed": 1 << 16}));
    assert_eq!(read_only(&mut m), false);
    m.ok("job-cancel", json!({"id": "j"}));
    until(&mut m, "j", "null");
    assert_eq!(read_only(&mut m), true);
    m.events.clear();
    m.ok("block-stream", json!({"job-id": "j", "device": "mid"}));
    until(&mut m, "j", "null");
    assert_eq!(read_only(&mut m), true);
    m.send(&json!({"execute": "quit"}));
    m.rest();
    assert!(d.wait().success());
    let (ours, was) = (d.path("top"), b.path("top"));
    b.ok("qemu-img", &["compare".as_ref(), "-q".as_ref(), ours.as_os_str(), was.as_os_str()]);
    assert_eq!(backing(&b, &d.path("mid")), (Json::Null, Json::Null));
}

#[test]
fn verbs_in_each_state() {
    let Some(b) = chain() else { return };
    let Some(mut p) = Pair::new(&b) else { return };
    let verbs = |p: &mut Pair| {
        for verb in ["job-complete", "job-finalize", "job-dismiss"] {
            p.same(verb, &json!({"id": "j"}));
        }
        p.same("block-job-complete", &json!({"device": "j"}));
        p.same("block-job-finalize", &json!({"id": "j"}));
        p.same("block-job-dismiss", &json!({"id": "j"}));
        p.same("block-job-change", &json!({"id": "j", "type": "mirror", "copy-mode": "background"}));
        p.same_queries();
    };
    // Nothing there.
    verbs(&mut p);
    for verb in ["job-pause", "job-resume", "job-cancel"] {
        assert!(!p.same(verb, &json!({"id": "j"})));
        assert!(!p.same(&format!("block-{verb}"), &json!({"device": "j"})));
    }
    // Running, slowly.
    let slow = json!({"job-id": "j", "device": "top", "speed": 1 << 16, "auto-dismiss": false,
                      "auto-finalize": false});
    assert!(p.same("block-stream", &slow));
    p.until("j", "running");
    verbs(&mut p);
    assert!(!p.same("job-resume", &json!({"id": "j"})));
    // Paused.
    assert!(p.same("job-pause", &json!({"id": "j"})));
    p.until("j", "paused");
    assert!(!p.same("job-pause", &json!({"id": "j"})));
    assert!(!p.same("block-job-pause", &json!({"device": "j"})));
    assert!(!p.same("block-job-cancel", &json!({"device": "j"})), "paused and not forced");
    assert!(p.same("block-job-set-speed", &json!({"device": "j", "speed": 0})));
    verbs(&mut p);
    // On to pending, where it can't be paused any more.
    assert!(p.same("block-job-resume", &json!({"device": "j"})));
    p.until("j", "pending");
    for verb in ["job-pause", "job-resume", "job-complete", "job-dismiss"] {
        assert!(!p.same(verb, &json!({"id": "j"})));
    }
    assert!(!p.same("block-job-set-speed", &json!({"device": "j", "speed": 1})));
    p.same_queries();
    // Cancelled there: the chain stays.
    assert!(p.same("job-cancel", &json!({"id": "j"})));
    p.until("j", "concluded");
    for verb in ["job-pause", "job-cancel", "job-complete", "job-finalize"] {
        assert!(!p.same(verb, &json!({"id": "j"})));
    }
    p.same_queries();
    assert!(p.same("job-dismiss", &json!({"id": "j"})));
    p.same_events();
    // Once more, cancelled while running.
    assert!(p.same("block-stream", &json!({"job-id": "k", "device": "mid", "speed": 1 << 16})));
    assert!(p.same("block-job-cancel", &json!({"device": "k"})));
    p.until("k", "null");
    p.same_events();
    p.same_images(&b, &["top"], "top");
}

#[test]
fn refusals_in_the_same_words() {
    let Some(b) = chain() else { return };
    let Some(mut p) = Pair::new(&b) else { return };
    for arguments in [
        json!({"device": "top"}),
        json!({"job-id": "0x", "device": "top"}),
        json!({"job-id": "j", "device": "nothing"}),
        json!({"job-id": "j", "device": "top", "base": "nothing"}),
        json!({"job-id": "j", "device": "top", "base-node": "nothing"}),
        json!({"job-id": "j", "device": "top", "base-node": "top"}),
        json!({"job-id": "j", "device": "base", "base-node": "top"}),
        json!({"job-id": "j", "device": "top", "bottom": "nothing"}),
        json!({"job-id": "j", "device": "mid", "bottom": "top"}),
        json!({"job-id": "j", "device": "top", "base": "base", "base-node": "mid"}),
        json!({"job-id": "j", "device": "top", "base": "base", "bottom": "mid"}),
        json!({"job-id": "j", "device": "top", "base-node": "base", "bottom": "mid"}),
        json!({"job-id": "j", "device": "top", "backing-file": "x"}),
        json!({"job-id": "j", "device": "top", "on-error": "nothing"}),
        json!({"job-id": "j", "device": "top", "filter-node-name": "mid"}),
    ] {
        assert!(!p.same("block-stream", &arguments), "{arguments}");
    }
    for options in [
        json!({"driver": "raw"}),
        json!({"driver": "nbd"}),
        json!({"driver": "qcow2", "size": 1 << 20}),
        json!({"driver": "file", "size": 512}),
        json!({"driver": "nothing"}),
    ] {
        assert!(!p.same("blockdev-create", &json!({"job-id": "j", "options": options})), "{options}");
    }
    p.same_queries();
    p.same_events();
}

#[test]
fn images_are_made_as_theirs() {
    let Some(b) = chain() else { return };
    let Some(mut p) = Pair::new(&b) else { return };
    let file = |name: &str| json!({"driver": "file", "filename": name});
    for options in [
        json!({"driver": "file", "filename": "new", "size": 0}),
        json!({"driver": "file", "filename": "none/x", "size": 0}),
        json!({"driver": "qcow2", "file": "nothing", "size": 1 << 20}),
        json!({"driver": "qcow2", "file": file("nothing"), "size": 1 << 20}),
        json!({"driver": "qcow2", "file": file("new"), "size": 1 << 20, "cluster-size": 77}),
        json!({"driver": "qcow2", "file": file("new"), "size": 8 << 20, "cluster-size": 4096,
               "backing-file": "base", "backing-fmt": "qcow2", "refcount-bits": 8}),
    ] {
        assert!(p.same("blockdev-create", &json!({"job-id": "j", "options": options})), "{options}");
        p.until("j", "concluded");
        p.same_queries();
        assert!(p.same("job-dismiss", &json!({"id": "j"})));
        p.same_events();
    }
    // Its data are those of its backing file.
    p.same_images(&b, &["new"], "base");
}

/// Errors while reading the backing file, with every policy.
#[test]
fn errors_by_policy() {
    let Some(b) = chain() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "raw", "flat", "8M"]);
    for (policy, errno) in [("report", 5), ("ignore", 5), ("stop", 5), ("enospc", 5), ("enospc", 28)] {
        let Some(mut p) = Pair::new(&b) else { return };
        for (d, m) in [&mut p.ours, &mut p.theirs] {
            std::fs::write(d.path("flat"), vec![7; 8 << 20]).expect("a file");
            b.ok(
                "qemu-img",
                &[
                    "create".as_ref(),
                    "-qufqcow2".as_ref(),
                    "-bflat".as_ref(),
                    "-Fraw".as_ref(),
                    d.path("over").as_os_str(),
                    "8M".as_ref(),
                ],
            );
            let rule =
                json!({"event": "none", "iotype": "read", "errno": errno, "once": true, "sector": 12288});
            let image = json!({"driver": "file", "filename": "flat"});
            m.ok(
                "blockdev-add",
                json!({"driver": "raw", "node-name": "flat", "read-only": true,
                       "file": {"driver": "blkdebug", "image": image, "inject-error": [rule]}}),
            );
            m.ok(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "over", "backing": "flat",
                       "file": {"driver": "file", "filename": "over"}}),
            );
        }
        let stops = policy == "stop" || errno == 28;
        assert!(p.same(
            "block-stream",
            &json!({"job-id": "j", "device": "over", "on-error": policy, "auto-dismiss": false})
        ));
        if stops {
            p.until("j", "paused");
            p.same_queries();
            assert!(p.same("job-resume", &json!({"id": "j"})));
        }
        p.until("j", "concluded");
        // Ours says more about the error, behind the same words.
        for (name, arguments) in [("query-jobs", json!({})), ("query-block-jobs", json!({}))] {
            let (ours, theirs) = (p.ours.1.ok(name, arguments.clone()), p.theirs.1.ok(name, arguments));
            let error = |v: &Json| v[0]["error"].as_str().map(str::to_owned);
            match (error(&ours), error(&theirs)) {
                (Some(a), Some(b)) => assert!(a.starts_with(&b), "{a} {b}"),
                (a, b) => assert_eq!(a, b, "{policy} {errno}"),
            }
        }
        let names = |m: &mut Monitor| -> Vec<Json> {
            take_events(m).into_iter().map(|(e, d)| json!([e, d["status"], d["action"]])).collect()
        };
        assert_eq!(names(&mut p.ours.1), names(&mut p.theirs.1), "{policy} {errno}");
    }
}

/// Ranges are filled, and only those; nothing is relinked.
#[test]
fn prefetch() {
    let Some(b) = chain() else { return };
    for (own, extra) in [(false, json!({})), (true, json!({"priority": "low", "speed": 1 << 30}))] {
        let (mut d, mut m) = open(&b, by_established_name, true);
        if own {
            m.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "c", "file": "top"}));
        }
        let ranges = json!([{"offset": 0, "length": 1 << 20}, {"offset": 7 << 20, "length": 1 << 30}]);
        let mut arguments = json!({"job-id": "j", "node": "top", "ranges": ranges});
        for (k, v) in extra.as_object().expect("an object") {
            arguments[k] = v.clone();
        }
        m.ok("blockdev-prefetch", arguments);
        until(&mut m, "j", "null");
        let ended = m.events.iter().find(|e| e["event"] == "BLOCK_JOB_COMPLETED").expect("completed");
        assert_eq!(ended["data"]["len"], 2 << 20);
        assert_eq!(ended["data"]["type"], "prefetch");
        m.send(&json!({"execute": "quit"}));
        m.rest();
        assert!(d.wait().success());
        let top = d.path("top");
        let map = b.ok("qemu-io", &["-r".as_ref(), "-c".as_ref(), "alloc 0 1M".as_ref(), top.as_os_str()]);
        assert!(map.starts_with("1048576/1048576 bytes allocated"), "{map}");
        for part in ["alloc 1M 1M", "alloc 6M 256k", "alloc 7M 1M"] {
            let map = b.ok("qemu-io", &["-r".as_ref(), "-c".as_ref(), part.as_ref(), top.as_os_str()]);
            assert!(map.starts_with("0/"), "{part}: {map}");
        }
        let was = b.path("top");
        b.ok("qemu-img", &["compare".as_ref(), "-q".as_ref(), top.as_os_str(), was.as_os_str()]);
        b.ok("qemu-img", &["check".as_ref(), "-q".as_ref(), top.as_os_str()]);
    }
}
