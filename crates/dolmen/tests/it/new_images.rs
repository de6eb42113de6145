//! New images: what is refused leaves the files alone, an image is never its own backing file, and headers name what
//! can be opened.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, eventually};
use crate::peer::{Bench, Ran};

/// The files beneath a directory, without sockets and tools.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        if entry.file_type().expect("a type").is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            out.insert(name, std::fs::read(entry.path()).expect("a file"));
        }
    }
    out
}

/// The story: `create` emptied its target, then looked at the options of the format, so a typing error destroyed
/// the image of that name.
#[test]
fn a_refused_create_leaves_the_file_alone() {
    let b = Bench::new();
    let long = format!("backing_file={},backing_fmt=raw", "x".repeat(70_000));
    let bad = [
        "cluster_size=3",
        "refcount_bits=3",
        "compression_type=bogus",
        "compression_type=zstd",
        "compat=9",
        "preallocation=bogus",
        "extended_l2=on",
        "lazy_refcounts=on,compat=0.10",
        "preallocation=full,backing_file=precious,backing_fmt=raw",
        "cluster_size=512,size=1E",
        &long,
    ];
    std::fs::write(b.path("precious"), b"precious").expect("a file");
    std::os::unix::fs::symlink("not-there", b.path("link")).expect("a link");
    let before = files(b.path("").as_path());
    for options in bad {
        for file in ["precious", "new", "link"] {
            let size = if options.contains("size=1E") { &[][..] } else { &["1M"][..] };
            let args = [&["create", "-q", "-u", "-f", "qcow2", "-o", options, file][..], size].concat();
            let ran = b.run("ours/qemu-img", &args);
            assert_eq!(ran.code, 1, "{args:?} {ran:?}");
            assert_eq!(files(b.path("").as_path()), before, "{args:?}");
        }
    }
    for args in
        [&["-f", "raw", "-o", "preallocation=bogus", "precious", "1M"][..], &["-f", "raw", "precious", "8E"]]
    {
        let ran = b.run("ours/qemu-img", &[&["create", "-q"], args].concat());
        assert_eq!(ran.code, 1, "{args:?} {ran:?}");
        assert_eq!(files(b.path("").as_path()), before, "{args:?}");
    }
    // Through a link to nothing the file is made where the link leads.
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "link", "1M"]);
    assert!(b.path("not-there").is_file() && b.path("link").is_symlink());
    // What is longer than the new image, and not zero, does not shine through.
    std::fs::write(b.path("precious"), vec![7; 1 << 20]).expect("a file");
    b.ok("ours/qemu-img", &["create", "-q", "-f", "raw", "precious", "64k"]);
    assert_eq!(files(b.path("").as_path())["precious"], vec![0; 65536]);
}

struct World {
    bench: Bench,
    daemon: Daemon,
    monitor: Monitor,
}

/// `top -> mid -> base`, opened beneath each other, and a file that is nobody's.
fn world() -> Option<World> {
    let bench = Bench::with_peers()?;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_str().expect("plain").to_owned();
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", &at("base"), "1M"]);
    bench.ok("qemu-io", &["-c", "write -P 1 0 1M", &at("base")]);
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &at("mid")]);
    bench.ok("qemu-io", &["-c", "write -P 1 512k 512k", &at("mid")]);
    bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", &at("top")]);
    bench.ok("qemu-io", &["-c", "write -P 2 0 512k", &at("top")]);
    std::fs::write(dir.path().join("precious"), b"precious").expect("a file");
    std::fs::write(dir.path().join("idle"), vec![5; 65536]).expect("a file");
    std::fs::hard_link(dir.path().join("base"), dir.path().join("base-again")).expect("a link");
    let mut daemon = Daemon::start_in(dir, by_established_name, &[]);
    let mut monitor = daemon.monitor();
    let file = |name: &str| json!({"driver": "file", "filename": name});
    for (name, backing) in [("base", Json::Null), ("mid", json!("base")), ("top", json!("mid"))] {
        let node = json!({"driver": "qcow2", "node-name": name, "backing": backing, "file": file(name)});
        monitor.ok("blockdev-add", node);
    }
    monitor.ok("blockdev-add", json!({"driver": "raw", "node-name": "idle", "file": file("idle")}));
    Some(World { bench, daemon, monitor })
}

impl World {
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        files(self.daemon.dir.path())
    }

    fn graph(&mut self) -> Json {
        self.monitor.ok("x-debug-query-block-graph", json!({}))
    }

    fn path(&self, name: &str) -> String {
        self.daemon.path(name).to_str().expect("plain").to_owned()
    }

    fn ask(&mut self, command: &str, arguments: Json) -> Json {
        self.monitor.ask(&json!({"execute": command, "arguments": arguments}))
    }

    /// Asks what if, does it, and checks that neither has left a trace.
    fn refused(&mut self, command: &str, arguments: &Json) {
        let before = (self.files(), self.graph());
        let what_if = self.ask("what-if", json!({"command": command, "arguments": arguments}));
        assert_eq!(what_if["return"]["allowed"], false, "{command} {arguments}: {what_if}");
        assert!(before.0 == self.files(), "what-if {command} {arguments} changed files");
        let reply = self.ask(command, arguments.clone());
        assert!(reply.get("error").is_some(), "{command} {arguments} was accepted: {reply}");
        assert!(before.0 == self.files(), "{command} {arguments} changed files: {reply}");
        assert_eq!(before.1, self.graph(), "{command} {arguments}");
    }

    fn accepted(&mut self, command: &str, arguments: &Json) {
        let before = self.files();
        let what_if = self.ask("what-if", json!({"command": command, "arguments": arguments}));
        assert_eq!(what_if["return"]["allowed"], true, "{command} {arguments}: {what_if}");
        assert!(before == self.files(), "what-if {command} {arguments} changed files");
        self.monitor.ok(command, arguments.clone());
    }

    fn conclude(&mut self, id: &str) {
        eventually("the job is gone", || {
            let jobs = self.monitor.ok("query-jobs", json!({}));
            jobs.as_array().expect("a list").iter().all(|j| j["id"] != id).then_some(())
        });
    }

    fn quit(mut self) -> (Bench, Daemon) {
        self.monitor.send(&json!({"execute": "quit"}));
        self.monitor.rest();
        assert!(self.daemon.wait().success());
        (self.bench, self.daemon)
    }
}

/// The story: `drive-backup` beside a commit, `drive-mirror` with a job id that was taken, a snapshot of a backing node,
/// an aborted transaction: each made (or emptied) its file first, and was refused then.
#[test]
fn refused_commands_leave_files_alone() {
    let Some(mut w) = world() else { return };
    let drive = |id: &str, device: &str, target: &str, format: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "format": format, "speed": 1});
    let snapshot = |node: &str, file: &str, format: &str| json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": "n", "format": format});
    // A job under way: its id is taken, and what it relies on is not to be changed.
    w.monitor.ok(
        "block-commit",
        json!({"job-id": "busy", "device": "top", "top-node": "mid", "base-node": "base",
               "auto-finalize": false}),
    );
    eventually("the commit is pending", || {
        let jobs = w.monitor.ok("query-jobs", json!({}));
        jobs.as_array().expect("a list").iter().any(|j| j["status"] == "pending").then_some(())
    });
    for file in ["precious", "new", "idle", "base-again", "nowhere/new"] {
        for format in ["qcow2", "raw"] {
            for command in ["drive-backup", "drive-mirror"] {
                w.refused(command, &drive("busy", "idle", file, format));
                w.refused(command, &drive("j", "base", file, format));
                w.refused(command, &drive("j", "nobody", file, format));
                w.refused(command, &drive("not an id", "idle", file, format));
            }
            let two = |last: Json| {
                json!({"actions": [
                    {"type": "blockdev-snapshot-sync", "data": snapshot("top", file, format)},
                    {"type": "drive-backup", "data": drive("k", "idle", "other", "raw")}, last]})
            };
            w.refused("transaction", &two(json!({"type": "abort", "data": {}})));
            w.refused(
                "transaction",
                &two(json!({"type": "drive-backup", "data": drive("l", "idle", "other", "raw")})),
            );
        }
        w.refused("blockdev-snapshot-sync", &snapshot("mid", file, "qcow2"));
        w.refused("blockdev-snapshot-sync", &snapshot("top", file, "raw"));
        w.refused("blockdev-snapshot-sync", &snapshot("top", file, "nothing"));
    }
    for format in ["blkdebug", "nbd", "copy-on-read"] {
        w.refused("drive-backup", &drive("j", "idle", "precious", format));
    }
    // A node's file is not overwritten beneath it, whatever its name.
    for file in ["idle", "./idle", "base-again"] {
        w.refused("drive-backup", &drive("j", "idle", file, "raw"));
    }
    w.monitor.ok("job-cancel", json!({"id": "busy"}));
    w.conclude("busy");
    w.quit();
}

/// Every action of a transaction finds its files as the others leave them; the ones that are made hold what they
/// should.
#[test]
fn a_transaction_makes_all_its_images() {
    let Some(mut w) = world() else { return };
    let backup = |id: &str, target: &str, format: &str| {
        json!({"type": "drive-backup", "data": {"job-id": id, "device": "top", "target": target,
               "sync": "full", "format": format}})
    };
    let snapshot = json!({"type": "blockdev-snapshot-sync",
                          "data": {"node-name": "idle", "snapshot-file": "over", "snapshot-node-name": "n"}});
    let actions =
        json!({"actions": [backup("a", "precious", "qcow2"), snapshot, backup("b", "b.raw", "raw")]});
    w.accepted("transaction", &actions);
    w.conclude("a");
    w.conclude("b");
    // A file that was there is overwritten, not replaced by another one.
    let paths = ["precious", "b.raw", "over"].map(|n| w.path(n));
    let (bench, _daemon) = w.quit();
    let reads = |format: &str, pattern: &str, file: &str| {
        bench.ok("qemu-io", &["-r", "-f", format, "-c", &format!("read -P {pattern}"), file]);
    };
    reads("qcow2", "2 0 512k", &paths[0]);
    reads("qcow2", "1 512k 512k", &paths[0]);
    reads("raw", "2 0 512k", &paths[1]);
    reads("raw", "1 512k 512k", &paths[1]);
    reads("qcow2", "5 0 64k", &paths[2]);
    bench.ok("qemu-img", &["check", "-q", &paths[0]]);
}

/// A job that makes an image finds out what is wrong before it touches the file.
#[test]
fn a_create_job_that_fails_leaves_the_file_alone() {
    let Some(mut w) = world() else { return };
    let file = |name: &str| json!({"driver": "file", "filename": name});
    let before = w.files();
    for (i, options) in [
        json!({"driver": "qcow2", "file": file("precious"), "size": 1 << 20, "cluster-size": 3}),
        json!({"driver": "qcow2", "file": file("precious"), "size": 1 << 20, "refcount-bits": 3}),
        json!({"driver": "qcow2", "file": file("nowhere/new"), "size": 1 << 20}),
        json!({"driver": "file", "filename": "nowhere/new", "size": 1 << 20}),
        json!({"driver": "file", "filename": "base", "size": 1 << 20}),
        json!({"driver": "qcow2", "file": "idle", "size": 1 << 20, "backing-file": "idle", "backing-fmt": "raw"}),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("j{i}");
        // The file of `base` is in use by a writer.
        if i == 4 {
            w.monitor.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "n"}}}));
            w.monitor.ok(
                "block-export-add",
                json!({"type": "nbd", "id": "e", "node-name": "top", "name": "d", "writable": true}),
            );
        }
        w.monitor.ok("blockdev-create", json!({"job-id": id, "options": options}));
        let job = eventually("the job concludes", || {
            let jobs = w.monitor.ok("query-jobs", json!({}));
            let is = |j: &&Json| j["id"] == id.as_str() && j["status"] == "concluded";
            jobs.as_array().expect("a list").iter().find(is).cloned()
        });
        assert!(job["error"].is_string(), "{options}: {job}");
        assert!(w.files() == before, "{options}: {job}");
    }
    w.quit();
}

fn refused(ran: &Ran, words: &str) {
    assert!(ran.code != 0 && ran.err.contains(words), "{words}: {ran:?}");
}

/// The story: `create -b X X` emptied X and made an image whose backing file was itself.
#[test]
fn no_image_is_its_own_backing_file() {
    let b = Bench::new();
    let at = |name: &str| b.path(name).to_str().expect("plain").to_owned();
    std::fs::write(b.path("raw"), vec![7; 65536]).expect("a file");
    std::fs::hard_link(b.path("raw"), b.path("hard")).expect("a link");
    std::os::unix::fs::symlink("raw", b.path("soft")).expect("a link");
    for (image, below, format) in [("mid", "raw", "raw"), ("top", "mid", "qcow2")] {
        b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, image]);
    }
    let before = files(b.path("").as_path());
    let json_of =
        |name: &str| format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{name}"}}}}"#);
    let cor = format!(
        r#"json:{{"driver":"copy-on-read","file":{{"driver":"qcow2","file.driver":"file","file.filename":"{}"}}}}"#,
        at("top")
    );
    for (backing, format, image) in [
        ("raw", "raw", "raw"),
        ("./raw", "raw", "raw"),
        (&at("raw"), "raw", "raw"),
        ("hard", "raw", "raw"),
        ("raw", "raw", "soft"),
        ("soft", "raw", "hard"),
        ("file:raw", "raw", "file:raw"),
        (&json_of("raw"), "raw", "raw"),
        ("mid", "qcow2", "raw"),
        ("top", "qcow2", "raw"),
        ("top", "qcow2", "mid"),
        ("top", "qcow2", "top"),
        (&cor, "qcow2", "mid"),
    ] {
        for unsafe_too in [&[][..], &["-u"]] {
            let args = [
                &["create", "-q", "-f", "qcow2", "-b", backing, "-F", format][..],
                unsafe_too,
                &[image, "1M"],
            ]
            .concat();
            let ran = b.run("ours/qemu-img", &args);
            assert_eq!(ran.code, 1, "{args:?} {ran:?}");
            assert!(files(b.path("").as_path()) == before, "{args:?}");
        }
    }
    let create = |args: &[&str]| b.run("ours/qemu-img", &[&["create", "-q", "-f", "qcow2"], args].concat());
    refused(&create(&["-u", "-b", "raw", "-F", "raw", "raw", "1M"]), "can't be the backing file of");
    // Files that are not there yet, or not any more, make loops as well.
    refused(&create(&["-u", "-b", "new", "-F", "qcow2", "new", "1M"]), "can't be the backing file of");
    refused(&create(&["-u", "-b", "./new", "-F", "qcow2", "new", "1M"]), "can't be the backing file of");
    std::fs::remove_file(b.path("mid")).expect("it is there");
    refused(&create(&["-u", "-b", "top", "-F", "qcow2", "mid", "1M"]), "can't be the backing file of");
    std::fs::write(b.path("mid"), &before["mid"]).expect("written");
    let rebase = |backing: &str, format: &str, image: &str| {
        b.run("ours/qemu-img", &["rebase", "-u", "-b", backing, "-F", format, image])
    };
    for (backing, image) in [("top", "top"), ("./mid", "mid"), ("top", "mid")] {
        refused(&rebase(backing, "qcow2", image), "can't be the backing file of");
        assert!(files(b.path("").as_path()) == before, "{backing} {image}");
    }
    // What is no loop is no business of this rule.
    assert_eq!(rebase("raw", "raw", "top").code, 0);
    assert_eq!(rebase("nobody", "raw", "top").code, 0);
    assert_eq!(rebase("mid", "qcow2", "top").code, 0);
    b.ok("ours/qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", "nobody", "-F", "raw", "new", "1M"]);
}

/// The same through the monitor.
#[test]
fn no_node_names_itself() {
    let Some(mut w) = world() else { return };
    let change =
        |image: &str, file: &str| json!({"device": "top", "image-node-name": image, "backing-file": file});
    for (image, file) in [("mid", "mid"), ("mid", "top"), ("mid", "./top"), ("top", "top")] {
        w.refused("change-backing-file", &change(image, file));
    }
    let stream = json!({"job-id": "j", "device": "top", "base-node": "base", "backing-file": "./top"});
    w.refused("block-stream", &stream);
    let commit = json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "backing-file": "top"});
    w.refused("block-commit", &commit);
    w.accepted("change-backing-file", &change("mid", "base-again"));
    w.quit();
}

/// The backing file that a header names, as the other side sees it, and that it opens.
fn backing(bench: &Bench, path: &str) -> (String, String) {
    let text = bench.ok("qemu-img", &["info", "--backing-chain", "--output=json", path]);
    let chain: Json = serde_json::from_str(&text).expect("JSON");
    let word = |k: &str| chain[0][k].as_str().unwrap_or_default().to_owned();
    bench.ok("qemu-io", &["-r", "-c", "read 0 64k", path]);
    bench.ok("ours/qemu-io", &["-r", "-c", "read 0 64k", path]);
    (word("backing-filename"), word("backing-filename-format"))
}

/// The story: with a filter in the chain (a job's with a name, or a user's), the headers of new images named
/// `json:{"driver": "copy-before-write"}`, which nobody can open.
#[test]
fn headers_name_images_only() {
    let Some(mut w) = world() else { return };
    let m = &mut w.monitor;
    // A user's filter over `top`, and one beneath it.
    m.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "cor", "file": "top"}));
    m.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "low", "file": "base"}));
    m.ok(
        "blockdev-reopen",
        json!({"options": [{"driver": "qcow2", "node-name": "mid", "backing": "low", "read-only": true,
                            "file": {"driver": "file", "filename": "mid"}}]}),
    );
    let snapshot = |node: &str, file: &str, name: &str| json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": name});
    let backup = |id: &str, device: &str, target: &str, sync: &str| json!({"job-id": id, "device": device, "target": target, "sync": sync, "format": "qcow2"});
    for (id, device, sync) in [("none", "cor", "none"), ("top", "mid", "top")] {
        m.ok("drive-backup", backup(id, device, &format!("backup-{id}"), sync));
    }
    m.ok("drive-mirror", backup("mirror", "mid", "mirror", "top"));
    m.ok("block-job-cancel", json!({"device": "none"}));
    w.conclude("none");
    w.conclude("top");
    let m = &mut w.monitor;
    std::fs::create_dir(w.daemon.path("sub")).expect("a directory");
    let named = json!({"job-id": "b", "device": "idle", "target": "b.raw", "sync": "none", "format": "raw",
                       "filter-node-name": "filter"});
    m.ok("drive-backup", named);
    // Over the filters: what they show is the image.
    m.ok("blockdev-snapshot-sync", snapshot("filter", "over-filter", "s1"));
    m.ok("blockdev-snapshot-sync", snapshot("cor", "sub/over-cor", "s2"));
    w.quit_and_check();
}

impl World {
    fn quit_and_check(self) {
        let paths =
            ["backup-none", "backup-top", "mirror", "over-filter", "sub/over-cor"].map(|n| (n, self.path(n)));
        let top = self.path("top");
        let (bench, _daemon) = self.quit();
        let expected =
            [("top", "qcow2"), ("base", "qcow2"), ("base", "qcow2"), ("idle", "raw"), (&top, "qcow2")];
        for ((name, path), (file, format)) in paths.iter().zip(expected) {
            assert_eq!(backing(&bench, path), (file.to_owned(), format.to_owned()), "{name}");
        }
    }
}

/// The story: a disk that nobody put a format over was named `{"driver": "file", ...}` as a backing file in `json:`, which
/// QEMU refuses to open; and a name that is absolute in the header and relative at the node made such a text in the first
/// place.
#[test]
fn headers_name_backing_disks_without_a_format() {
    let Some(mut w) = world() else { return };
    w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", &w.path("bare"), "64k"]);
    let (idle, named) = (w.path("idle"), w.path("named"));
    w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &idle, "-F", "raw", &named]);
    w.monitor.ok("blockdev-del", json!({"node-name": "idle"}));
    w.monitor.ok("blockdev-add", json!({"driver": "file", "node-name": "disk", "filename": "idle"}));
    for image in ["bare", "named"] {
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "qcow2", "node-name": image, "backing": "disk", "file": file});
        w.monitor.ok("blockdev-add", node);
        let over = format!("over-{image}");
        w.monitor.ok("blockdev-snapshot-sync", json!({"node-name": image, "snapshot-file": over}));
    }
    let paths = ["over-bare", "over-named"].map(|p| w.path(p));
    let (bench, _daemon) = w.quit();
    assert_eq!(backing(&bench, &paths[1]), ("named".to_owned(), "qcow2".to_owned()));
    for path in &paths {
        bench.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 5 0 64k", path]);
    }
}

/// The story: a backing node that was a raw disk over an image was named `{"driver": "raw", "file": {"driver": "qcow2", ...}}`, which
/// QEMU refuses to open below an image that names another backing file. It shows that image, and is named like it.
#[test]
fn headers_name_the_image_below_a_raw_disk() {
    let Some(mut w) = world() else { return };
    let (idle, inner, outer) = (w.path("idle"), w.path("inner"), w.path("outer"));
    w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", &inner, "64k"]);
    w.bench.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 64k", &inner]);
    w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &idle, "-F", "raw", &outer]);
    let file = |name: &str| json!({"driver": "file", "filename": name});
    w.monitor.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "inner", "file": file("inner")}));
    w.monitor.ok("blockdev-add", json!({"driver": "raw", "node-name": "disk", "file": "inner"}));
    let outer = json!({"driver": "qcow2", "node-name": "outer", "backing": "disk", "file": file("outer")});
    w.monitor.ok("blockdev-add", outer);
    w.monitor.ok("blockdev-snapshot-sync", json!({"node-name": "outer", "snapshot-file": "over-outer"}));
    w.monitor.ok("blockdev-snapshot-sync", json!({"node-name": "disk", "snapshot-file": "over-disk"}));
    let paths = ["over-outer", "over-disk"].map(|p| w.path(p));
    let (bench, _daemon) = w.quit();
    assert_eq!(backing(&bench, &paths[1]), ("inner".to_owned(), "qcow2".to_owned()));
    for path in &paths {
        bench.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 9 0 64k", path]);
    }
}

/// The story: a version 2 image was reopened with `lazy-refcounts`, and the next snapshot named it
/// `json:{..., "lazy-refcounts": true}`, which QEMU's tools refuse to open. How an image is used is not what it is.
#[test]
fn headers_name_images_without_how_they_are_used() {
    let Some(mut w) = world() else { return };
    let uses = [
        json!({"lazy-refcounts": true}),
        json!({"overlap-check": "all", "l2-cache-size": 1 << 20, "refcount-cache-size": 1 << 20}),
        json!({"pass-discard-request": true, "cache-size": 1 << 20, "l2-cache-entry-size": 4096}),
        json!({"pass-discard-snapshot": false, "pass-discard-other": true, "cache-clean-interval": 60}),
        json!({"file": {"driver": "file", "filename": "old4", "locking": "on", "aio": "threads"}}),
    ];
    for (i, more) in uses.iter().enumerate() {
        let (old, over) = (format!("old{i}"), format!("over{i}"));
        let path = w.path(&old);
        let lazy = more["lazy-refcounts"] == true;
        let version = if lazy { "compat=1.1" } else { "compat=0.10" };
        w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", version, &path, "1M"]);
        let file = json!({"driver": "file", "filename": old});
        let mut node = json!({"driver": "qcow2", "node-name": old, "file": file});
        node.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        let m = &mut w.monitor;
        m.ok("blockdev-add", node);
        let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
        let shown = nodes.as_array().expect("a list").iter().find(|n| n["node-name"] == *old).expect("it");
        assert_eq!(shown["file"], *old, "{more}");
        m.ok("blockdev-snapshot-sync", json!({"node-name": old, "snapshot-file": over}));
    }
    let paths: Vec<String> = (0..uses.len()).map(|i| w.path(&format!("over{i}"))).collect();
    let (bench, _daemon) = w.quit();
    for (i, path) in paths.iter().enumerate() {
        assert_eq!(backing(&bench, path), (format!("old{i}"), "qcow2".to_owned()), "{}", uses[i]);
    }
}

/// The story: `lazy-refcounts` of a version 2 image was accepted, at opening and by a reopen. QEMU refuses it, as such an
/// image can't say that its refcounts are behind.
#[test]
fn lazy_refcounts_need_version_3() {
    let Some(mut w) = world() else { return };
    let path = w.path("v2");
    w.bench.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &path, "1M"]);
    let node = |lazy: bool| json!({"driver": "qcow2", "node-name": "v2", "lazy-refcounts": lazy, "file": {"driver": "file", "filename": "v2"}});
    w.refused("blockdev-add", &node(true));
    let said = w.ask("blockdev-add", node(true))["error"]["desc"].to_string();
    assert!(said.contains("Lazy refcounts require a qcow2 image with at least qemu 1.1"), "{said}");
    w.monitor.ok("blockdev-add", node(false));
    w.refused("blockdev-reopen", &json!({"options": [node(true)]}));
    w.monitor.ok("blockdev-reopen", json!({"options": [node(false)]}));
}

/// The story: `drive-backup` with sync=top and format=raw copied the topmost image into a file that lies over nothing, so the
/// copy read as zeroes where the images below hold data. QEMU refuses it. Found by the storm (seed 1649).
#[test]
fn a_copy_of_the_topmost_image_needs_a_backing_file() {
    let Some(mut w) = world() else { return };
    for verb in ["drive-backup", "drive-mirror"] {
        let a = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "top", "format": "raw"});
        w.refused(verb, &a);
        let reply = w.ask(verb, a.clone());
        let desc = reply["error"]["desc"].as_str().expect("a text");
        assert!(desc.starts_with("Backing file not supported for file format 'raw'"), "{desc}");
    }
    // After a snapshot in the same transaction the topmost image is the new one.
    let snapshot = json!({"node-name": "idle", "snapshot-file": "over", "snapshot-node-name": "over"});
    let copy = json!({"job-id": "j", "device": "over", "target": "copy", "sync": "top", "format": "raw"});
    let actions =
        json!([{"type": "blockdev-snapshot-sync", "data": snapshot}, {"type": "drive-backup", "data": copy}]);
    w.refused("transaction", &json!({ "actions": actions }));
    w.quit();
}

/// A window of a raw image is other content than its file: it stays in the header.
#[test]
fn a_header_keeps_a_window() {
    let Some(mut w) = world() else { return };
    std::fs::write(w.daemon.path("plain"), vec![3; 65536]).expect("a file");
    let window = json!({"driver": "raw", "node-name": "window", "offset": 4096, "size": 8192, "read-only": true,
                        "file": {"driver": "file", "filename": "plain", "read-only": true}});
    w.monitor.ok("blockdev-add", window);
    w.monitor.ok("blockdev-snapshot-sync", json!({"node-name": "window", "snapshot-file": "over"}));
    let path = w.path("over");
    let (bench, _daemon) = w.quit();
    let text = bench.ok("qemu-img", &["info", "--output=json", &path]);
    let info: Json = serde_json::from_str(&text).expect("JSON");
    let name = info["backing-filename"].as_str().expect("a name");
    let definition: Json = serde_json::from_str(name.strip_prefix("json:").expect("JSON")).expect("JSON");
    assert_eq!((&definition["offset"], &definition["size"]), (&json!(4096), &json!(8192)), "{name}");
    assert_eq!(info["virtual-size"], 8192);
    // From anywhere.
    let ran = bench.command("ours/qemu-io").current_dir("/").args(["-r", "-c", "read 0 8k", &path]).output();
    assert!(ran.expect("it runs").status.success());
}

/// The story: a snapshot was taken of the file node of an image, and then of the image. The name of
/// the new header led to the inner image, which opens as well and shows something else.
#[test]
fn a_header_names_an_image_in_an_image() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "b", "1M"]);
    b.ok("qemu-io", &["-c", "write -P 7 0 64k", "b"]);
    // The image lies in a raw image, in a raw image with a window, and in an image of its own.
    for between in [json!({"driver": "raw"}), json!({"driver": "raw", "offset": 0}), json!(null)] {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::copy(b.path("b"), dir.path().join("b")).expect("copied");
        let mut d = Daemon::start_in(dir, by_established_name, &[]);
        let mut m = d.monitor();
        m.ok("blockdev-add", json!({"driver": "file", "filename": "b", "node-name": "bf"}));
        let mut file = json!("bf");
        if between.is_object() {
            let mut raw = between.clone();
            raw["file"] = json!("bf");
            raw["node-name"] = json!("r");
            m.ok("blockdev-add", raw);
            file = json!("r");
        }
        m.ok("blockdev-add", json!({"driver": "qcow2", "file": file, "node-name": "b"}));
        let snapshot = |node: &str, name: &str| json!({"node-name": node, "snapshot-file": name, "snapshot-node-name": name, "format": "qcow2"});
        if between.is_null() {
            m.ok("blockdev-snapshot-sync", snapshot("bf", "b1"));
        }
        m.ok("blockdev-snapshot-sync", snapshot("b", "b2"));
        m.ok("quit", json!({}));
        assert!(d.wait().success());
        let over = d.path("b2");
        for io in ["ours/qemu-io", "qemu-io"] {
            let read = ["-r", "-c", "read -P 7 0 64k"].map(std::ffi::OsStr::new);
            b.ok(io, &[read[0], read[1], read[2], over.as_os_str()]);
        }
    }
}

/// A header named the image beneath a raw node in the format "raw" (`block-stream` and `block-commit` worked the format out by themselves):
/// opened anew, the disk showed the tables of its backing file as its data. Found by the storm. Every command that names a backing
/// file, over a raw node of an image and over one with a window.
#[test]
fn a_header_names_a_raw_node_over_an_image() {
    for window in [false, true] {
        let Some(b) = Bench::with_peers() else { return };
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).to_str().expect("plain").to_owned();
        for name in ["base", "target"] {
            b.ok("qemu-img", &["create", "-q", "-f", "qcow2", &at(name), "1M"]);
        }
        b.ok("qemu-io", &["-c", "write -P 7 0 64k", &at("base")]);
        let chains = ["change", "stream", "commit", "backup", "mirror", "pivot"];
        for name in chains {
            let (mid, top) = (at(&format!("{name}-mid")), at(&format!("{name}-top")));
            b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &mid]);
            b.ok("qemu-io", &["-c", "write -P 8 64k 64k", &mid]);
            b.ok(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-b", &format!("{name}-mid"), "-F", "qcow2", &top],
            );
        }
        let mut d = Daemon::start_in(dir, by_established_name, &[]);
        let mut m = d.monitor();
        let file = |name: &str| json!({"driver": "file", "filename": name});
        for (name, raw) in [("base", "f"), ("target", "ft")] {
            m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "file": file(name)}));
            let mut over = json!({"driver": "raw", "node-name": raw, "file": name});
            if window {
                over["size"] = json!(1 << 20);
            }
            m.ok("blockdev-add", over);
        }
        for name in chains {
            let (mid, top) = (format!("{name}-mid"), format!("{name}-top"));
            m.ok(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": mid, "file": file(&mid), "backing": "f", "read-only": true}),
            );
            m.ok(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": top, "file": file(&top), "backing": mid, "read-only": name != "pivot"}),
            );
        }
        m.ok(
            "blockdev-snapshot-sync",
            json!({"node-name": "f", "snapshot-file": "over", "snapshot-node-name": "over"}),
        );
        if !window {
            // With a window, no plain name is right.
            let change =
                json!({"device": "change-mid", "image-node-name": "change-mid", "backing-file": "base"});
            m.ok("change-backing-file", change);
        }
        let job = |id: &str, more: Json| {
            let mut all = json!({"job-id": id, "auto-dismiss": true});
            all.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
            all
        };
        m.ok("block-stream", job("j1", json!({"device": "stream-top", "base-node": "f"})));
        let copy = |file: &str, device: &str| json!({"device": device, "target": file, "sync": "top", "format": "qcow2"});
        m.ok("drive-backup", job("j2", copy("backup", "backup-mid")));
        m.ok("drive-mirror", job("j3", copy("mirror", "mirror-mid")));
        m.ok("blockdev-mirror", job("j4", json!({"device": "pivot-mid", "target": "ft", "sync": "full"})));
        let gone = |m: &mut Monitor, id: &str| {
            eventually("the job is gone", || {
                let jobs = m.ok("query-jobs", json!({}));
                jobs.as_array().expect("a list").iter().all(|j| j["id"] != id).then_some(())
            });
        };
        for id in ["j3", "j4"] {
            eventually("ready", || {
                let jobs = m.ok("query-jobs", json!({}));
                let ready = |j: &Json| j["id"] == id && j["status"] == "ready";
                jobs.as_array().expect("a list").iter().any(ready).then_some(())
            });
            m.ok("job-complete", json!({"id": id}));
        }
        for id in ["j1", "j2", "j3", "j4"] {
            gone(&mut m, id);
        }
        // Nothing else may read the base while this goes on.
        for name in [
            "over",
            "change-top",
            "change-mid",
            "stream-top",
            "stream-mid",
            "backup-top",
            "backup-mid",
            "mirror-top",
            "mirror-mid",
            "backup",
            "mirror",
        ] {
            drop(m.ask(&json!({"execute": "blockdev-del", "arguments": {"node-name": name}})));
        }
        m.ok(
            "block-commit",
            job("j5", json!({"device": "commit-top", "top-node": "commit-mid", "base-node": "f"})),
        );
        gone(&mut m, "j5");
        m.ok("quit", json!({}));
        assert!(d.wait().success());
        for image in ["over", "change-top", "stream-top", "commit-top", "backup", "mirror", "pivot-top"] {
            let read =
                ["-r", "-c", "read -P 7 0 64k", d.path(image).to_str().expect("plain")].map(str::to_owned);
            for io in ["ours/qemu-io", "qemu-io"] {
                let ran = b.run(io, &read.each_ref().map(String::as_str));
                assert!(ran.code == 0, "window {window}, {image}, {io}: {ran:?}");
            }
        }
    }
}
