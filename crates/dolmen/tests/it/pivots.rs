//! What may become the overlay of a node, be the target of a copy of one layer, or take a node's place: clients must
//! see the data that they saw before, now and after a restart.

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, eventually, serve};
use crate::load::Client;
use crate::peer::Bench;

/// A daemon, and images in a directory beside it.
struct World {
    b: Bench,
    d: Daemon,
    m: Monitor,
}

impl World {
    /// `top` over `base`, 4 MiB, with ones in the first MiB of `base` and twos in the first 64 KiB of `top`; nodes of
    /// both, and an export `e` of `top`.
    fn new() -> World {
        let b = Bench::new();
        let mut d = Daemon::start(|_| serve(), &[]);
        let mut m = d.monitor();
        m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
        let mut w = World { b, d, m };
        w.image("base", None, "4M", Some("write -P 1 0 1M"));
        w.image("top", Some("base"), "4M", Some("write -P 2 0 64k"));
        w.add("base", "base", Json::Null, true);
        w.add("top", "top", json!("base"), false);
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "e", "writable": true});
        w.m.ok("block-export-add", export);
        w
    }

    fn image(&self, name: &str, backing: Option<&str>, size: &str, write: Option<&str>) {
        self.b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", name, size]);
        if let Some(write) = write {
            self.b.ok("dolmen", &["io", "-f", "qcow2", "-c", write, name]);
        }
        if let Some(b) = backing {
            self.b.ok("dolmen", &["img", "rebase", "-u", "-f", "qcow2", "-b", b, "-F", "qcow2", name]);
        }
    }

    fn add(&mut self, node: &str, file: &str, backing: Json, read_only: bool) {
        let file = json!({"driver": "file", "filename": self.b.path(file), "read-only": read_only});
        let node = json!({"driver": "qcow2", "node-name": node, "backing": backing, "file": file,
                          "read-only": read_only});
        self.m.ok("blockdev-add", node);
    }

    fn refused(&mut self, name: &str, arguments: Json, why: &str) {
        let reply = self.m.ask(&json!({"execute": name, "arguments": arguments}));
        let desc = reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{name} was accepted: {reply}"));
        assert!(desc.contains(why), "{desc}");
        assert!(reply["error"]["data"]["remedy"].is_string(), "{reply}");
    }

    /// Refused because of what another does.
    fn denied(&mut self, name: &str, arguments: Json, why: &str) {
        let reply = self.m.ask(&json!({"execute": name, "arguments": arguments}));
        let desc = reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{name} was accepted: {reply}"));
        assert!(desc.contains(why), "{desc}");
        assert_eq!(reply["error"]["data"]["kind"], "Conflict", "{reply}");
    }

    fn until(&mut self, id: &str, status: &str) {
        eventually(status, || {
            let jobs = self.m.ok("query-jobs", json!({}));
            let is = |j: &Json| j["id"] == id && j["status"] == status;
            assert!(!jobs.as_array().expect("a list").iter().any(|j| j["error"].is_string()), "{jobs}");
            jobs.as_array().expect("a list").iter().any(is).then_some(())
        });
    }

    /// A mirror that is ready.
    fn mirror(&mut self, target: &str, sync: &str) {
        self.m.ok("blockdev-mirror", mirror(target, sync));
        self.until("m", "ready");
    }

    /// A mirror whose end is refused, and that is then given up with the copy as it is.
    fn is_kept(&mut self, target: &str, sync: &str, why: &str) {
        self.mirror(target, sync);
        self.refused("job-complete", json!({"id": "m"}), why);
        self.m.ok("block-job-cancel", json!({"device": "m"}));
        self.until("m", "concluded");
        self.m.ok("job-dismiss", json!({"id": "m"}));
        self.holds(&[(0, 2), (64, 1), (1024, 0)]);
    }

    /// A mirror that takes its source's place.
    fn pivots(&mut self) {
        self.m.ok("job-complete", json!({"id": "m"}));
        self.until("m", "concluded");
        self.m.ok("job-dismiss", json!({"id": "m"}));
        self.holds(&[(0, 2), (64, 1), (1024, 0)]);
    }

    /// What the client of `e` reads at these KiB.
    fn holds(&self, at: &[(u64, u8)]) {
        let mut client = Client::connect(&self.d.path("n.sock"), "e").expect("connected");
        for (kib, byte) in at {
            assert_eq!(client.read(kib / 4).expect("read"), [*byte; 4096], "at {kib} KiB");
        }
    }
}

fn mirror(target: &str, sync: &str) -> Json {
    json!({"job-id": "m", "device": "top", "target": target, "sync": sync, "auto-dismiss": false})
}

/// `blockdev-snapshot` took any image without a backing node for an overlay: one with data of its own, which hid the
/// node's; a smaller one, which cut off the disk's end; one whose header named another image, so that a
/// restarted host showed that one.
#[test]
fn an_overlay_shows_what_it_lies_over() {
    let mut w = World::new();
    w.image("dirty", Some("top"), "4M", Some("write -P 9 2M 64k"));
    w.image("zeroed", Some("top"), "4M", Some("write -z 2M 64k"));
    w.image("small", Some("top"), "3M", None);
    w.image("elsewhere", Some("base"), "4M", None);
    w.image("nameless", None, "4M", None);
    w.b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-u", "-b", "top", "-F", "raw", "asraw", "4M"]);
    for (name, why) in [
        ("dirty", "holds data of its own (at byte 2097152)"),
        ("zeroed", "holds data of its own (at byte 2097152)"),
        ("small", "has 3145728 bytes, and node 'top' has 4194304"),
        ("elsewhere", "names 'base' as its backing file (format qcow2)"),
        ("nameless", "names no backing file"),
        ("asraw", "names 'top' as its backing file (format raw)"),
    ] {
        w.add(name, name, Json::Null, false);
        w.refused("blockdev-snapshot", json!({"node": "top", "overlay": name}), why);
        let data = json!({"node": "top", "overlay": name});
        let actions = json!([{"type": "blockdev-snapshot", "data": data}]);
        w.refused("transaction", json!({ "actions": actions }), why);
    }
    // The same image by another spelling is the same image.
    std::os::unix::fs::symlink("top", w.b.path("link")).expect("a link");
    let absolute = w.b.path("top").display().to_string();
    let as_json = format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{absolute}"}}}}"#);
    let dotted = format!(r#"json:{{"driver":"qcow2","file.driver":"file","file.filename":"{absolute}"}}"#);
    let file = format!("file:{absolute}");
    let mut node = "top".to_owned();
    for (i, name) in ["./link", &absolute, &as_json, &dotted, &file].into_iter().enumerate() {
        let aimed = if i == 0 { name.to_owned() } else { name.replace("/top", &format!("/{node}")) };
        let overlay = format!("ov{i}");
        w.image(&overlay, Some(&aimed), "4M", None);
        w.add(&overlay, &overlay, Json::Null, false);
        w.m.ok("blockdev-snapshot", json!({"node": node, "overlay": overlay}));
        w.holds(&[(0, 2), (64, 1), (1024, 0)]);
        node = overlay;
    }
}

/// The refusal of an overlay of another size under an export named the overlay as the one that refuses, with advice
/// that leads nowhere.
#[test]
fn an_overlay_of_another_size_is_refused_for_the_export() {
    let mut w = World::new();
    w.image("large", Some("top"), "8M", None);
    w.add("large", "large", Json::Null, false);
    let over = json!({"node": "top", "overlay": "large"});
    let reply = w.m.ask(&json!({"execute": "blockdev-snapshot", "arguments": over}));
    let desc = reply["error"]["desc"].as_str().expect("refused");
    assert!(desc.contains("export 'e' (nbd, writable"), "{desc}");
    assert!(
        desc.ends_with("Use an overlay of 4194304 bytes, or remove the export (block-export-del 'e')."),
        "{desc}"
    );
    w.m.ok("block-export-del", json!({"id": "e"}));
    w.m.ok("blockdev-snapshot", over);
}

/// A mirror of one layer took its source's place over whatever images its target lay: the client saw another disk.
#[test]
fn a_mirror_of_one_layer_pivots_over_the_same_images_only() {
    let mut w = World::new();
    w.image("other", None, "4M", Some("write -P 5 0 2M"));
    w.add("other", "other", Json::Null, true);
    for (name, backing) in [("t1", "other"), ("t2", "base"), ("t3", "base"), ("t4", "top")] {
        w.image(name, Some(backing), "4M", None);
    }
    w.add("t1", "t1", json!("other"), false);
    w.is_kept("t1", "top", "lies over other images than 'top' does");
    w.add("t4", "t4", Json::Null, false);
    w.is_kept("t4", "none", "has no backing file");
    w.add("t3", "t3", json!("base"), false);
    w.is_kept("t3", "none", "does not lie over 'top'");
    // Another node of the same file is the same image.
    w.add("base2", "./base", Json::Null, true);
    w.add("t2", "t2", json!("base2"), false);
    w.mirror("t2", "top");
    w.pivots();
}

/// `drive-mirror` with sync=none made an image that names the source, and opened it without: its end could only be
/// refused, and no way of linking the source helped.
#[test]
fn a_mirror_of_new_writes_alone_pivots_over_its_source() {
    let mut w = World::new();
    let target = w.b.path("new");
    let at_once = json!({"job-id": "m", "device": "top", "target": target, "format": "qcow2", "sync": "none",
                         "auto-dismiss": false, "node-name": "new"});
    w.m.ok("drive-mirror", at_once);
    w.until("m", "ready");
    Client::connect(&w.d.path("n.sock"), "e").expect("connected").write(20, 7).expect("written");
    w.pivots();
    w.holds(&[(80, 7), (84, 1)]);
    Client::connect(&w.d.path("n.sock"), "e").expect("connected").write(21, 8).expect("written");
    w.holds(&[(0, 2), (80, 7), (84, 8), (88, 1)]);
    w.m.ok("quit", json!({}));
    w.d.wait();
    let said = w.b.ok("dolmen", &["img", "info", "-f", "qcow2", "new"]);
    assert!(said.contains("backing file: ") && said.contains("top"), "{said}");
    // Made for an absolute name, it names its backing file by one.
    for read in ["read -P 7 80k 4k", "read -P 8 84k 4k", "read -P 2 0 64k", "read -P 1 88k 512k"] {
        w.b.ok("dolmen", &["io", "--allow-backing=anything", "-r", "-f", "qcow2", "-c", read, "new"]);
    }
    w.b.ok("dolmen", &["io", "-r", "-f", "qcow2", "-c", "read -P 1 84k 4k", "top"]);
}

/// A target with data of its own showed them where the source has none.
#[test]
fn old_data_of_a_target_never_show() {
    let mut w = World::new();
    w.image("dirty", Some("base"), "4M", Some("write -P 9 2M 64k"));
    w.add("dirty", "dirty", json!("base"), false);
    w.refused("blockdev-mirror", mirror("dirty", "top"), "holds data of its own (at byte 2097152)");
    let backup = json!({"job-id": "b", "device": "top", "target": "dirty", "sync": "top"});
    w.refused("blockdev-backup", backup, "holds data of its own (at byte 2097152)");
    w.image("other", None, "4M", Some("write -P 5 0 2M"));
    w.add("other", "other", Json::Null, true);
    w.image("over", Some("other"), "4M", None);
    w.add("over", "over", json!("other"), false);
    let backup = json!({"job-id": "b", "device": "top", "target": "over", "sync": "top"});
    w.refused("blockdev-backup", backup, "lies over other images");
    // Found by the storm: an overlay that had been used before, as the place of a point in time.
    w.image("used", Some("top"), "4M", Some("write -P 9 2M 64k"));
    w.add("used", "used", json!("top"), false);
    let backup = json!({"job-id": "b", "device": "top", "target": "used", "sync": "none"});
    w.refused("blockdev-backup", backup.clone(), "holds data of its own (at byte 2097152)");
    let actions = json!([{"type": "blockdev-backup", "data": backup}]);
    w.refused("transaction", json!({ "actions": actions }), "holds data of its own (at byte 2097152)");
    // Of a source without a backing file, everything is copied.
    w.image("alone", None, "4M", Some("write -P 2 0 64k"));
    w.add("alone", "alone", Json::Null, false);
    w.image("junk", None, "4M", Some("write -P 9 0 4M"));
    w.add("junk", "junk", Json::Null, false);
    w.m.ok("block-export-del", json!({"id": "e"}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "alone", "name": "e", "writable": true});
    w.m.ok("block-export-add", export);
    let mut o = mirror("junk", "top");
    o["device"] = json!("alone");
    w.m.ok("blockdev-mirror", o);
    w.until("m", "ready");
    w.m.ok("job-complete", json!({"id": "m"}));
    w.until("m", "concluded");
    w.holds(&[(0, 2), (64, 0), (2048, 0)]);
}

/// A target that gets its backing file when the copy is there: what reads as zeroes in the source's own layer must be
/// zeroes in the target, although nothing showed through from below while they were copied.
#[test]
fn zeroes_of_a_layer_hide_a_backing_file_that_is_linked_later() {
    let mut w = World::new();
    let mut client = Client::connect(&w.d.path("n.sock"), "e").expect("connected");
    for block in 32..48 {
        client.zero(block).expect("zeroed");
    }
    w.image("t", Some("base"), "4M", None);
    w.add("t", "t", Json::Null, false);
    w.mirror("t", "top");
    for block in 48..64 {
        client.zero(block).expect("zeroed");
    }
    w.add("base2", "base", Json::Null, true);
    w.m.ok("blockdev-snapshot", json!({"node": "base2", "overlay": "t"}));
    w.pivots();
    w.holds(&[(124, 1), (128, 0), (188, 0), (192, 0), (252, 0), (256, 1)]);
}

/// The active commit of a small image into a larger one put the larger one in its place, and new clients saw what lay
/// behind the end of their disk.
#[test]
fn an_export_keeps_its_size() {
    let b = Bench::new();
    for (name, backing, size) in
        [("base", None, "16M"), ("mid", Some("base"), "4M"), ("top", Some("mid"), "8M")]
    {
        let mut args = vec!["img", "create", "-q", "-f", "qcow2"];
        if let Some(backing) = backing {
            args.extend(["-b", backing, "-F", "qcow2"]);
        }
        args.extend([name, size]);
        b.ok("dolmen", &args);
    }
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -P 1 0 16M", "base"]);
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let mut below = Json::Null;
    for name in ["base", "mid", "top"] {
        let file = json!({"driver": "file", "filename": b.path(name)});
        m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "backing": below, "file": file}));
        below = json!(name);
    }
    m.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": d.path("n.sock")}}}));
    let export = |id: &str, node: &str| json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": id == "e"});
    m.ok("block-export-add", export("e", "top"));
    let mut before = Client::connect(&d.path("n.sock"), "e").expect("connected");
    let job = json!({"job-id": "j", "device": "top", "base-node": "base", "auto-dismiss": false});
    m.ok("block-commit", job);
    let mut w = World { b, d, m };
    w.until("j", "ready");
    w.m.ok("job-complete", json!({"id": "j"}));
    w.until("j", "concluded");
    w.m.ok("block-export-add", export("late", "base"));
    let mut after = Client::connect(&w.d.path("n.sock"), "e").expect("connected");
    for (client, size) in [(&mut before, 8), (&mut after, 8)] {
        assert_eq!(client.read(1023).expect("read"), [1; 4096], "the end of mid");
        assert_eq!(client.read(1024).expect("read"), [0; 4096], "mid ended here");
        assert_eq!(client.read(size * 256 - 1).expect("read"), [0; 4096]);
        client.read(size * 256).expect_err("beyond the end of the disk");
        client.write(size * 256, 9).expect_err("beyond the end of the disk");
    }
    assert_eq!(after.size, 8 << 20);
    // Whoever comes to the base itself sees all of it.
    let mut late = Client::connect(&w.d.path("n.sock"), "late").expect("connected");
    assert_eq!(late.size, 16 << 20);
    assert_eq!(late.read(8 * 256).expect("read"), [1; 4096]);
}

/// The target of a job was guarded at its own node only: given a filter over an image, another writer of that image was
/// accepted, before the job and beside it, and the copy was silently wrong. Likewise a new size of a source beneath
/// its filter. Found by the storm (seed 1139).
#[test]
fn a_target_is_guarded_beneath_its_filters() {
    let mut w = World::new();
    w.image("t", None, "4M", None);
    w.add("t", "t", Json::Null, false);
    w.image("src", None, "4M", None);
    w.add("src", "src", Json::Null, false);
    w.m.ok("blockdev-add", json!({"driver": "raw", "node-name": "low", "file": "t"}));
    w.m.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "f", "file": "low"}));
    w.m.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "over", "file": "src"}));
    let export = json!({"type": "nbd", "id": "w", "node-name": "t", "name": "w", "writable": true});
    let job = |device: &str| json!({"job-id": "j", "device": device, "target": "f", "sync": "full"});
    let saving = json!({"driver": "copy-before-write", "node-name": "saving", "file": "top", "target": "f"});
    // First the writer, then the job, and the other way round.
    w.m.ok("block-export-add", export.clone());
    for verb in ["blockdev-backup", "blockdev-mirror"] {
        w.denied(verb, job("top"), "export 'w'");
    }
    w.denied("blockdev-add", saving.clone(), "export 'w'");
    w.m.ok("block-export-del", json!({"id": "w"}));
    w.m.ok("blockdev-add", saving);
    w.denied("block-export-add", export.clone(), "saves in it what is overwritten elsewhere");
    w.m.ok("blockdev-del", json!({"node-name": "saving"}));
    let mut sync_none = job("over");
    sync_none["sync"] = json!("none");
    for (verb, job) in [("blockdev-mirror", job("over")), ("blockdev-backup", sync_none)] {
        w.m.ok(verb, job);
        w.denied("block-export-add", export.clone(), "writes its copy to it");
        w.denied("block_resize", json!({"node-name": "t", "size": 8 << 20}), "writes its copy to it");
        w.denied("block_resize", json!({"node-name": "src", "size": 8 << 20}), "needs to resize");
        if verb == "blockdev-mirror" {
            w.until("j", "ready");
        }
        w.m.ok("block-job-cancel", json!({"device": "j"}));
        eventually("the end of the job", || {
            let jobs = w.m.ok("query-jobs", json!({}));
            jobs.as_array().is_some_and(Vec::is_empty).then_some(())
        });
    }
    // What the job does itself arrives by way of the filters.
    let mut last = job("top");
    last["auto-dismiss"] = json!(false);
    w.m.ok("blockdev-mirror", last);
    w.until("j", "ready");
    w.m.ok("job-complete", json!({"id": "j"}));
    w.until("j", "concluded");
}

/// The header of an overlay of the source was made to name the mirror's target, which was a filter over that very overlay: the image
/// named itself, and nobody could open it any more. Found by the storm.
#[test]
fn a_pivot_to_what_lies_over_the_source_makes_no_loop() {
    for (filter, link) in [("blkdebug", "image"), ("raw", "file")] {
        let mut w = World::new();
        w.m.ok("block-export-del", json!({"id": "e"}));
        w.image("over", Some("top"), "4M", None);
        w.add("over", "over", json!("top"), false);
        w.m.ok("blockdev-add", json!({"driver": filter, "node-name": "f", link: "over"}));
        w.mirror("f", "none");
        w.m.ok("job-complete", json!({"id": "m"}));
        w.until("m", "concluded");
        w.m.ok("quit", json!({}));
        assert!(w.d.wait().success());
        let info = w.b.ok("dolmen", &["img", "info", "-f", "qcow2", "over"]);
        assert!(info.contains("backing file: top"), "{filter}: {info}");
        let read = ["-c", "read -P 2 0 64k", "-c", "read -P 1 64k 64k"];
        w.b.ok("dolmen", &[&["io", "-r", "-f", "qcow2"], &read[..], &["over"]].concat());
    }
}

/// A mirror, or a commit, of the file of an image that was in use copied as much as the file had in the beginning. What the image wrote
/// behind that went on to the source only, so that all of it was lost when the target took the file's place. Found by the storm.
#[test]
fn the_file_of_an_image_that_grows_is_not_replaced() {
    let mut w = World::new();
    w.m.ok("block-export-del", json!({"id": "e"}));
    w.m.ok("blockdev-del", json!({"node-name": "top"}));
    let (file, over, to) = (w.b.path("top"), w.b.path("over"), w.b.path("to"));
    w.m.ok("blockdev-add", json!({"driver": "file", "node-name": "file", "filename": file}));
    w.m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "backing": "base", "file": "file"}));
    let size = std::fs::metadata(w.b.path("top")).expect("a file").len().to_string();
    w.image("to", None, &size, None);
    w.m.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "to", "file": {"driver": "file", "filename": to}}),
    );
    let job = |id: &str, more: Json| {
        let mut all = json!({"job-id": id});
        all.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        all
    };
    let mirror = job("m", json!({"device": "file", "target": "to", "sync": "full"}));
    w.denied("blockdev-mirror", mirror, "needs to resize");
    w.m.ok(
        "blockdev-snapshot-sync",
        json!({"node-name": "file", "snapshot-file": over, "snapshot-node-name": "over", "format": "qcow2"}),
    );
    let commit = job("c", json!({"device": "over", "base-node": "file"}));
    w.denied("block-commit", commit.clone(), "needs to resize");
    // Nothing grows while nobody may write.
    w.m.ok("blockdev-del", json!({"node-name": "top"}));
    w.add("over", "over", json!("file"), false);
    w.m.ok("block-commit", commit);
    w.until("c", "ready");
    let user = json!({"driver": "qcow2", "node-name": "top", "backing": "base", "file": "over"});
    w.denied("blockdev-add", user, "needs to resize");
}
