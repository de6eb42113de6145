//! While somebody uses an image, the tools refuse it and say who it is.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

use crate::peer::Bench;

/// An `io` process that has the image open, until it is dropped.
struct Holder {
    child: Child,
    pid: u32,
}

impl Holder {
    fn start(b: &Bench, program: &str, args: &[&str]) -> Holder {
        let mut child = b
            .command(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        // It has opened the image once it answers.
        child.stdin.as_mut().expect("a pipe").write_all(b"length\n").expect("written");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("an answer");
        assert!(line.contains("MiB"), "{line}");
        let pid = child.id();
        Holder { child, pid }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_used_image_is_refused_by_name() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let holder = Holder::start(&b, "qemu-io", &["a.qcow2"]);
    let before = std::fs::read(b.path("a.qcow2")).expect("the image");
    for args in [
        &["info", "a.qcow2"][..],
        &["check", "a.qcow2"],
        &["map", "a.qcow2"],
        &["create", "-f", "qcow2", "a.qcow2", "1M"],
        &["rebase", "-u", "-b", "", "a.qcow2"],
        &["resize", "-f", "qcow2", "a.qcow2", "8M"],
    ] {
        let theirs = b.run("qemu-img", args);
        let ours = b.run("ours/qemu-img", args);
        assert_eq!(ours.code, theirs.code, "{args:?} {ours:?} {theirs:?}");
        assert_ne!(ours.code, 0, "{args:?}");
        assert!(ours.err.contains(&holder.pid.to_string()), "{args:?} names the holder: {ours:?}");
        // Scripts look for these words.
        let first = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(first(&ours.err), first(&theirs.err), "{args:?}");
        assert!(!ours.err.contains('#'), "{args:?}: {ours:?}");
    }
    for args in [&["info", "-U", "a.qcow2"][..], &["map", "-U", "a.qcow2"]] {
        b.ok("ours/qemu-img", args);
    }
    assert_eq!(std::fs::read(b.path("a.qcow2")).expect("the image"), before, "a refusal changes nothing");
    drop(holder);
    b.ok("ours/qemu-img", &["info", "a.qcow2"]);
}

#[test]
fn the_other_side_refuses_what_we_hold() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let holder = Holder::start(&b, "ours/qemu-io", &["a.qcow2"]);
    for args in [&["info", "a.qcow2"][..], &["check", "a.qcow2"]] {
        let theirs = b.run("qemu-img", args);
        assert_eq!(theirs.code, 1, "{args:?} {theirs:?}");
        assert!(theirs.err.contains("lock"), "{theirs:?}");
    }
    b.ok("qemu-img", &["info", "-U", "a.qcow2"]);
    drop(holder);
    b.ok("qemu-img", &["check", "a.qcow2"]);
    // Readers share.
    let holder = Holder::start(&b, "ours/qemu-io", &["-r", "a.qcow2"]);
    b.ok("qemu-img", &["info", "a.qcow2"]);
    b.ok("ours/qemu-img", &["info", "a.qcow2"]);
    drop(holder);
}

/// `create -b` only looks at the size of the backing image: that is no reason to refuse one that a guest writes.
#[test]
fn an_overlay_of_an_image_in_use_can_be_made() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    for holder in ["qemu-io", "ours/qemu-io"] {
        let _holder = Holder::start(&b, holder, &["a.qcow2"]);
        b.same_words("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "o.qcow2"]);
    }
}
