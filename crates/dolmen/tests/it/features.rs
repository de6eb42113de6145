//! Autoclear features: what nobody may trust any more once Dolmen has changed an image.

use std::os::unix::fs::FileExt;
use std::process::Stdio;

use serde_json::json;

use crate::daemon::{Daemon, read_all, serve};
use crate::peer::Bench;

/// Bytes 88 to 95 of the header: a feature that nobody knows, and bitmaps.
const UNKNOWN: u8 = 0x80;

fn bits(b: &Bench, name: &str) -> [u8; 8] {
    let mut bits = [0; 8];
    std::fs::File::open(b.path(name)).expect("the image").read_exact_at(&mut bits, 88).expect("read");
    bits
}

fn patch(b: &Bench, name: &str, at: u64, bytes: &[u8]) {
    let image = std::fs::File::options().write(true).open(b.path(name)).expect("the image");
    image.write_all_at(bytes, at).expect("written");
}

/// An image that says of itself that it has an unknown autoclear feature.
fn image(b: &Bench) {
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "x", "4M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", "write -q -P 1 0 256k", "x"]);
    patch(b, "x", 88, &[UNKNOWN]);
}

/// The story: `check -r` and `rebase -u` changed an image and left the bit of a feature set that they did not know.
/// Whoever does know it then takes what belongs to it for up to date. The first guest write did clear it; nobody had
/// gone through the other ways to change an image.
#[test]
fn unknown_features_go_with_every_change() {
    let b = Bench::new();
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base", "4M"]);
    let leak: &dyn Fn() = &|| patch(&b, "x", (2 << 16) + 2 * 100, &[0, 1]);
    let leak_in_file: &dyn Fn() = &|| patch(&b, "x", 2 << 16, &[0, 2]);
    let low: &dyn Fn() = &|| patch(&b, "x", (2 << 16) + 2 * 5, &[0, 0]);
    let dirty: &dyn Fn() = &|| patch(&b, "x", 79, &[1]);
    let corrupt: &dyn Fn() = &|| patch(&b, "x", 79, &[2]);
    let nothing: &dyn Fn() = &|| {};
    type Case<'a> = (&'a str, &'a dyn Fn(), &'a [&'a str]);
    let check = ["img", "check", "-f", "qcow2", "-r", "all", "x"];
    let changes: &[Case<'_>] = &[
        ("leaks", leak_in_file, &["img", "check", "-f", "qcow2", "-r", "leaks", "x"]),
        ("all, leaks only", leak_in_file, &check),
        ("all", low, &check),
        ("the dirty bit", dirty, &check),
        ("the corrupt bit", corrupt, &check),
        ("opening a dirty image", dirty, &["io", "-f", "qcow2", "-c", "flush", "x"]),
        ("rebase", nothing, &["img", "rebase", "-f", "qcow2", "-u", "-b", "base", "-F", "qcow2", "x"]),
        ("write in place", nothing, &["io", "-f", "qcow2", "-c", "write -q 0 4k", "x"]),
        ("write", nothing, &["io", "-f", "qcow2", "-c", "write -q 1M 4k", "x"]),
        ("zero write", nothing, &["io", "-f", "qcow2", "-c", "write -q -z 0 64k", "x"]),
        ("discard", nothing, &["io", "-f", "qcow2", "-d", "unmap", "-c", "discard -q 0 64k", "x"]),
        ("resize", nothing, &["io", "-f", "qcow2", "-c", "truncate 8M", "x"]),
    ];
    for (what, damage, args) in changes {
        image(&b);
        damage();
        b.ok("dolmen", args);
        assert_eq!(bits(&b, "x"), [0; 8], "{what}");
    }
    let not_changes: &[Case<'_>] = &[
        ("a check", low, &["img", "check", "x"]),
        ("a repair of what is sound", nothing, &check),
        ("a count of nothing", leak, &check),
        ("a flush", nothing, &["io", "-f", "qcow2", "-c", "flush", "x"]),
        ("a read", nothing, &["io", "-f", "qcow2", "-c", "read -q 0 64k", "x"]),
    ];
    for (what, damage, args) in not_changes {
        image(&b);
        damage();
        let before = std::fs::read(b.path("x")).expect("the image");
        b.run("dolmen", args);
        assert!(std::fs::read(b.path("x")).expect("the image") == before, "{what} changes nothing");
    }
}

/// The same for what a daemon does to an image: its header alone, or its size.
#[test]
fn unknown_features_go_with_commands() {
    let b = Bench::new();
    for (what, command, arguments) in [
        (
            "change-backing-file",
            "change-backing-file",
            json!({"device": "top", "image-node-name": "top", "backing-file": "./base"}),
        ),
        ("block_resize", "block_resize", json!({"node-name": "top", "size": 8 << 20})),
    ] {
        b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base", "4M"]);
        let create = ["img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x"];
        b.ok("dolmen", &create);
        patch(&b, "x", 88, &[UNKNOWN]);
        let at =
            |n: &str| format!("qcow2,node-name={n},file.driver=file,file.filename={}", b.path(n).display());
        let base = at("base").replace("node-name=base", "node-name=b");
        let top = format!("{},backing=b", at("x").replace("node-name=x", "node-name=top"));
        let mut daemon = Daemon::start(|_| serve(), &["--blockdev", &base, "--blockdev", &top]);
        let mut m = daemon.monitor();
        m.ok(command, arguments);
        assert_eq!(bits(&b, "x"), [0; 8], "{what}");
        m.ok("quit", json!({}));
        assert!(daemon.wait().success());
    }
}

/// Bitmaps describe guest data: they stay valid while only metadata change.
#[test]
fn bitmaps_stay_as_long_as_guest_data_do() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base", "4M"]);
    image(&b);
    patch(&b, "x", 88, &[0]);
    b.ok("qemu-img", &["bitmap", "--add", "x", "b0"]);
    patch(&b, "x", 88, &[UNKNOWN]);
    b.ok("dolmen", &["img", "rebase", "-f", "qcow2", "-u", "-b", "base", "-F", "qcow2", "x"]);
    assert_eq!(bits(&b, "x"), [0, 0, 0, 0, 0, 0, 0, 1]);
    // A count that is too low: the repair moves tables and leaves the bitmaps.
    patch(&b, "x", 88, &[UNKNOWN]);
    patch(&b, "x", (2 << 16) + 2 * 5, &[0, 0]);
    b.ok("dolmen", &["img", "check", "-f", "qcow2", "-r", "all", "x"]);
    assert_eq!(bits(&b, "x"), [0, 0, 0, 0, 0, 0, 0, 1]);
    b.ok("qemu-img", &["check", "x"]);
    let info = b.ok("qemu-img", &["info", "-f", "qcow2", "x"]);
    assert!(info.contains("b0"), "{info}");
}

/// The story: the first write made an image's bitmaps invalid without a word, and the next incremental backup
/// found none.
#[test]
fn who_writes_over_bitmaps_is_told_once() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "x", "4M"]);
    b.ok("qemu-img", &["bitmap", "--add", "x", "b0"]);
    b.ok("qemu-img", &["bitmap", "--add", "x", "b1"]);
    std::fs::copy(b.path("x"), b.path("y")).expect("a copy");

    let word = "(b0, b1) are not valid any more";
    let r = b.run("dolmen", &["io", "-f", "qcow2", "-c", "read -q 0 4k", "x"]);
    assert_eq!((r.code, r.err.as_str()), (0, ""));
    let r = b.run("dolmen", &["io", "-f", "qcow2", "-c", "write -q 0 4k", "-c", "write -q 1M 4k", "x"]);
    assert_eq!((r.code, r.err.matches(word).count()), (0, 1), "{r:?}");
    assert!(r.err.contains("'x'") || r.err.contains("/x'"), "it names the image: {r:?}");
    let r = b.run("dolmen", &["io", "-f", "qcow2", "-c", "write -q 0 4k", "x"]);
    assert_eq!((r.code, r.err.as_str()), (0, ""), "said once, not at each opening");
    assert!(!b.ok("dolmen", &["img", "info", "x"]).contains("b0"));

    let disk = format!("qcow2,node-name=disk,file.driver=file,file.filename={}", b.path("y").display());
    let mut daemon = Daemon::start(
        |_| {
            let mut c = serve();
            c.stderr(Stdio::piped());
            c
        },
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
    b.ok("dolmen", &["io", "-f", "raw", "-c", "write -q 0 4k", "-c", "write -q 2M 4k", &uri]);
    m.ok("quit", json!({}));
    assert!(daemon.wait().success());
    let mut events = std::mem::take(&mut m.events);
    events.extend(m.rest());
    let told: Vec<_> = events.iter().filter(|e| e["event"] == "BLOCK_BITMAPS_INVALIDATED").collect();
    assert_eq!(told.len(), 1, "{events:?}");
    assert_eq!(told[0]["data"], json!({"node-name": "disk", "bitmaps": ["b0", "b1"]}));
    let log = read_all(daemon.child.stderr.take().expect("piped"));
    assert_eq!(log.matches(word).count(), 1, "{log}");
}
