//! What a name leads to: devices, names with a colon or of any bytes, NBD URIs, names beside options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, by_established_name, established, eventually};
use crate::peer::Bench;

/// A loop device over a file of zeroes; goes with this.
struct Loop(String);

impl Loop {
    fn over(file: &std::path::Path, size: u64) -> Option<Loop> {
        std::fs::File::create(file).and_then(|f| f.set_len(size)).expect("a file");
        let out = Command::new("losetup").args(["-f", "--show"]).arg(file).output();
        match out {
            Ok(o) if o.status.success() => {
                Some(Loop(String::from_utf8(o.stdout).expect("text").trim().into()))
            }
            _ => {
                println!("not tested: loop devices can't be set up here");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(Command::new("losetup").args(["-d", &self.0]).status());
    }
}

/// The story: images were made with the driver for regular files, whatever the name led to, so no command could make one
/// on a logical volume.
#[test]
fn images_on_block_devices() {
    let Some(b) = Bench::with_peers() else { return };
    const SIZE: u64 = 16 << 20;
    let Some(l) = Loop::over(&b.path("l.img"), SIZE) else { return };
    let device = l.0.as_str();
    let fill = |pattern: u8| {
        b.ok("qemu-io", &["-f", "raw", "-c", &format!("write -q -P {pattern} 0 16M"), "-c", "flush", device]);
    };
    let whole = |pattern: u8| {
        b.ok("qemu-io", &["-r", "-f", "raw", "-c", &format!("read -P {pattern} 0 16M"), device]);
    };
    fill(7);
    // What does not fit is refused, and the device is as it was.
    for args in [
        &["-f", "raw", device, "32M"][..],
        &["-f", "qcow2", "-o", "cluster_size=512", device, "128G"],
        &["-f", "qcow2", "-o", "preallocation=full", device, "16M"],
        &["-f", "qcow2", "-o", "preallocation=metadata", device, "32M"],
        &["-f", "qcow2", "-o", "cluster_size=3", device, "1M"],
        &["-f", "qcow2", "-u", "-F", "raw", "-b", device, device, "1M"],
    ] {
        let ran = b.run("ours/qemu-img", &[&["create", "-q"], args].concat());
        assert_eq!(ran.code, 1, "{args:?} {ran:?}");
        whole(7);
    }
    b.ok("ours/qemu-img", &["create", "-q", "-f", "raw", device, "1M"]);
    whole(7);
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", device, "64M"]);
    b.ok("qemu-img", &["check", "-q", "-f", "qcow2", device]);
    b.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 0 0 64M", device]);
    // A backing file that is a device.
    fill(5);
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", device, "-F", "raw", "over.q"]);
    b.ok("ours/qemu-io", &["-r", "-c", "read -P 5 0 16M", "over.q"]);

    let mut d = Daemon::start(by_established_name, &[]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", d.path("s.q").to_str().expect("plain"), "4M"]);
    b.ok("qemu-io", &["-c", "write -q -P 9 0 4M", d.path("s.q").to_str().expect("plain")]);
    let mut m = d.monitor();
    m.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "s", "file": {"driver": "file", "filename": "s.q"}}),
    );
    let gone = |m: &mut crate::daemon::Monitor| {
        eventually("the job is gone", || {
            let jobs = m.ok("query-jobs", json!({}));
            jobs.as_array().expect("a list").is_empty().then_some(())
        });
    };
    for (command, format) in [
        ("drive-backup", "qcow2"),
        ("drive-backup", "raw"),
        ("drive-mirror", "qcow2"),
        ("drive-mirror", "raw"),
    ] {
        fill(3);
        let arguments =
            json!({"job-id": "j", "device": "s", "target": device, "sync": "full", "format": format});
        let reply = m.ask(&json!({"execute": command, "arguments": arguments}));
        if format == "raw" {
            // A copy has the size of its source, and a device the one that it has: QEMU says so as well.
            assert!(reply.get("error").is_some() || command == "drive-mirror", "{reply}");
        }
        if reply.get("error").is_none() && command == "drive-mirror" {
            eventually("ready, or failed", || {
                let jobs = m.ok("query-jobs", json!({}));
                let all = jobs.as_array().expect("a list");
                (all.is_empty() || all[0]["status"] == "ready").then_some(())
            });
            drop(m.ask(&json!({"execute": "block-job-cancel", "arguments": {"device": "j"}})));
        }
        gone(&mut m);
        if format == "qcow2" {
            b.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 9 0 4M", device]);
        }
    }
    fill(3);
    // Undone: nothing has happened to it.
    let snapshot =
        json!({"type": "blockdev-snapshot-sync", "data": {"node-name": "s", "snapshot-file": device}});
    let abort = json!({"actions": [snapshot, {"type": "abort", "data": {}}]});
    assert!(m.ask(&json!({"execute": "transaction", "arguments": abort})).get("error").is_some());
    whole(3);
    m.ok(
        "blockdev-snapshot-sync",
        json!({"node-name": "s", "snapshot-file": device, "snapshot-node-name": "n"}),
    );
    let nodes = m.ok("query-named-block-nodes", json!({"flat": true}));
    let leaf = nodes.as_array().expect("a list").iter().find(|n| n["file"] == device && n["drv"] != "qcow2");
    assert_eq!(leaf.expect("the leaf")["drv"], "host_device");
    m.send(&json!({"execute": "quit"}));
    m.rest();
    assert!(d.wait().success());
    b.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 9 0 4M", device]);
    let info: Json =
        serde_json::from_str(&b.ok("qemu-img", &["info", "--output=json", device])).expect("JSON");
    assert_eq!(info["backing-filename"], d.path("s.q").to_str().expect("plain"));
}

/// A process that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The story: an overlay of an image that somebody writes could not be made, since its backing file was opened with locks
/// to find out its size; and an export with a blank in its name could not be reached.
#[test]
fn an_overlay_of_a_running_image() {
    let Some(b) = Bench::with_peers() else { return };
    let daemons = [Some(by_established_name(b.path("ours").as_path())), established()];
    for (i, mut daemon) in daemons.into_iter().flatten().enumerate() {
        let (base, over, socket) = (format!("b{i}.q"), format!("o{i}.q"), format!("n {i}"));
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", &base, "1M"]);
        let blockdev = format!("qcow2,node-name=q,file.driver=file,file.filename={base}");
        let server = format!("addr.type=unix,addr.path={socket}");
        let args = [
            "--blockdev",
            &blockdev,
            "--nbd-server",
            &server,
            "--export",
            "nbd,id=e,node-name=q,name=a b/%,writable=on",
        ];
        let child = daemon.args(args).current_dir(b.path("")).stdin(Stdio::null()).spawn().expect("starts");
        let _running = Running(child);
        let path = b.path(&socket);
        eventually("the server listens", || std::os::unix::net::UnixStream::connect(&path).ok());
        b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &over]);
        let info: Json =
            serde_json::from_str(&b.ok("qemu-img", &["info", "-U", "--output=json", &over])).expect("JSON");
        assert_eq!(info["virtual-size"], 1 << 20);
        // QEMU decodes the socket's path twice, so a '%' in it can't be tried.
        let escaped = socket.replace(' ', "%20");
        let uri = format!("nbd+unix:///a%20b%2F%25?socket={}/{escaped}", b.path("").display());
        b.ok("ours/qemu-io", &["-f", "raw", "-c", "write -P 6 0 64k", &uri]);
        // A header names it so that it is found again, by both.
        let over = format!("nbd{i}.q");
        b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", &over]);
        for io in ["ours/qemu-io", "qemu-io"] {
            b.ok(io, &["-r", "-c", "read -P 6 0 64k", &over]);
        }
    }
}

/// Names of files are bytes. What a tool prints for people has them as they are; JSON can't.
#[test]
fn names_of_any_bytes() {
    let Some(b) = Bench::with_peers() else { return };
    let odd = OsStr::from_bytes(b"b\xff\xe9se.q");
    let over = OsStr::from_bytes(b"over\xfe.q");
    let args = |words: &[&str], names: &[&OsStr]| -> Vec<OsString> {
        words.iter().map(|w| OsString::from(*w)).chain(names.iter().map(|n| (*n).to_owned())).collect()
    };
    for tool in ["ours/qemu-img", "qemu-img"] {
        b.ok(tool, &args(&["create", "-q", "-f", "qcow2", "-o", "size=1M"], &[odd]));
        let below = args(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[odd, over]);
        b.ok(tool, &below);
        b.ok("ours/qemu-io", &args(&["-c", "write -P 4 0 64k"], &[odd]));
        for io in ["ours/qemu-io", "qemu-io"] {
            b.ok(io, &args(&["-r", "-c", "read -P 4 0 64k"], &[over]));
        }
        let raw = |program: &str, words: &[&str]| {
            let out = b.command(program).args(args(words, &[over])).output().expect("it runs");
            assert!(out.status.success(), "{out:?}");
            out.stdout
        };
        let lines = |program: &str| -> Vec<Vec<u8>> {
            let text = raw(program, &["info"]);
            let named = |l: &&[u8]| l.starts_with(b"image: ") || l.starts_with(b"backing file: ");
            text.split(|b| *b == b'\n').filter(named).map(<[u8]>::to_vec).collect()
        };
        assert_eq!(lines("ours/qemu-img"), lines("qemu-img"));
        let text = raw("ours/qemu-img", &["info", "--output=json", "--backing-chain"]);
        let chain: Json = serde_json::from_slice(&text).expect("JSON");
        assert_eq!(chain[0]["backing-filename"], "b\u{fffd}\u{fffd}se.q");
        for name in [odd, over] {
            std::fs::remove_file(b.path("").join(name)).expect("it was made");
        }
    }
    let ran = b.command("ours/qemu-img").args(args(&["info"], &[odd])).output().expect("it runs");
    assert!(ran.stderr.windows(odd.len()).any(|w| w == odd.as_bytes()), "{ran:?}");
}

#[test]
fn names_with_a_colon() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "file:a:b.q", "1M"]);
    for img in ["ours/qemu-img", "qemu-img"] {
        for name in ["file:a:b.q", "./a:b.q"] {
            b.ok(img, &["info", name]);
        }
        assert_eq!(b.run(img, &["info", "a:b.q"]).code, 1);
    }
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", "file:a:b.q", "-F", "qcow2", "file:c:d.q"]);
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", "./a:b.q", "-F", "qcow2", "./e:f.q"]);
    for name in ["./c:d.q", "./e:f.q"] {
        b.ok("ours/qemu-img", &["info", "--backing-chain", name]);
    }
    // A node's file: the header of its overlay leads there.
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::copy(b.path("a:b.q"), dir.path().join("a:b.q")).expect("a copy");
    let mut d = Daemon::start_in(dir, by_established_name, &[]);
    let mut m = d.monitor();
    m.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "a:b.q"}}),
    );
    m.ok("blockdev-snapshot-sync", json!({"node-name": "n", "snapshot-file": "file:over:it"}));
    m.send(&json!({"execute": "quit"}));
    m.rest();
    assert!(d.wait().success());
    for img in ["ours/qemu-img", "qemu-img"] {
        b.ok(img, &["info", "--backing-chain", d.path("over:it").to_str().expect("plain")]);
    }
}

/// `open -o OPTIONS NAME`: the name goes to the first node that takes one.
#[test]
fn a_name_beside_options() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "raw", "b.raw", "1M"]);
    b.ok("qemu-io", &["-f", "raw", "-c", "write -q -P 8 0 1M", "b.raw"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "o.q", "2M"]);
    for options in [
        "driver=file",
        "driver=raw",
        "driver=qcow2",
        "driver=blkdebug",
        "driver=blkdebug,image.driver=file",
        "driver=blkdebug,image.driver=qcow2",
        "driver=blkdebug,image.driver=qcow2,image.file.driver=file",
        "driver=raw,file.driver=blkdebug",
        "driver=raw,file.driver=file",
        "driver=qcow2,file.driver=blkdebug,file.image.driver=file",
        "driver=copy-on-read",
        "driver=copy-on-read,file.driver=qcow2",
        "driver=raw,file.driver=qcow2,file.file.driver=file",
        "driver=qcow2,backing.driver=raw",
        "backing.driver=raw",
        "driver=qcow2,backing.driver=raw,backing.file.filename=b.raw",
        "driver=qcow2,backing.driver=qcow2",
        "driver=qcow2,file.filename=o.q",
        "driver=null-co",
        "driver=host_device",
        "driver=nbd",
    ] {
        let args = ["-c", &format!("open -r -o {options} o.q"), "-c", "length", "-c", "read -P 8 0 64k"];
        let words = |program: &str| -> Vec<String> {
            let ran = b.run(program, &args);
            let kept = |l: &&str| !l.contains("ops;") && !l.contains("bytes at offset");
            ran.out.lines().filter(kept).map(str::to_owned).collect()
        };
        let ours = words("ours/qemu-io");
        assert_eq!(ours, words("qemu-io"), "{options}");
    }
}

/// The story: a loop device over an image's own file was accepted as the target of a copy of it, which destroyed the image,
/// and as its backing file. It is the same file by another name.
#[test]
fn a_loop_device_is_the_file_that_it_shows() {
    let Some(b) = Bench::with_peers() else { return };
    let image = b.path("x");
    let Some(l) = Loop::over(&image, 16 << 20) else { return };
    let device = l.0.as_str();
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "x", "16M"]);
    b.ok("qemu-io", &["-c", "write -q -P 5 0 1M", "x"]);
    let ran = b.run("ours/qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", device, "-F", "raw", "x"]);
    assert!(ran.code == 1 && ran.err.contains("it is the same file"), "{ran:?}");
    let mut d = Daemon::start(by_established_name, &[]);
    let mut m = d.monitor();
    let file = json!({"driver": "file", "filename": image});
    m.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "x", "file": file}));
    let refused = |reply: Json| {
        let desc = reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("accepted: {reply}")).to_owned();
        assert!(desc.contains("the same file"), "{desc}");
    };
    for command in ["drive-mirror", "drive-backup"] {
        let copy = json!({"device": "x", "job-id": "j", "target": device, "sync": "full", "format": "raw", "mode": "existing"});
        refused(m.ask(&json!({"execute": command, "arguments": copy})));
    }
    m.ok("quit", json!({}));
    d.wait();
    b.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "x"]);
}

/// The stories: a backing file that a header names `blkdebug:CONFIG:FILE` was opened as a raw disk, whatever its format, so that
/// its metadata showed as the guest's data; and an image could become its own backing file by way of that name, or of
/// `json:` with a raw node over a format. Found in a user's trial.
#[test]
fn backing_files_named_through_filters() {
    let Some(b) = Bench::with_peers() else { return };
    let at = |name: &str| b.path(name).to_str().expect("plain").to_owned();
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base", "1M"]);
    b.ok("qemu-io", &["-c", "write -q -P 5 0 1M", "base"]);
    let debug = format!("blkdebug::{}", at("base"));
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &debug, "-F", "qcow2", "over"]);
    for tool in ["qemu-io", "ours/qemu-io"] {
        b.ok(tool, &["-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "over"]);
    }
    // Loops.
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]);
    let top = json!({"driver": "file", "filename": at("top")});
    let loops = [
        (format!("blkdebug::{}", at("top")), "qcow2"),
        (format!("json:{}", json!({"driver": "raw", "file": {"driver": "qcow2", "file": top}})), "raw"),
        (
            format!("json:{}", json!({"driver": "copy-on-read", "file": {"driver": "qcow2", "file": top}})),
            "raw",
        ),
        (
            format!("json:{}", json!({"driver": "qcow2", "file": {"driver": "blkdebug", "image": top}})),
            "qcow2",
        ),
    ];
    for (name, format) in &loops {
        for args in [
            &["rebase", "-u", "-f", "qcow2", "-b", name, "-F", format, "base"][..],
            &["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", format, "base", "1M"],
            &["create", "-q", "-f", "qcow2", "-b", name, "-F", format, "base"],
        ] {
            let ran = b.run("ours/qemu-img", args);
            assert_eq!(ran.code, 1, "{args:?} {ran:?}");
        }
    }
    b.ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "top"]);
}
