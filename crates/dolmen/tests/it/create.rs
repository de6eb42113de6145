//! `img create`: lines, exit codes, and that the other side finds the images sound.

use crate::peer::{Bench, is_reference};

/// The line that is printed, and what the image then says about itself.
#[test]
fn lines_and_images_are_the_same() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    let exact = is_reference(&b, "the line 'Formatting ...'");
    for args in [
        &["-f", "qcow2", "x", "1M"][..],
        &["-f", "qcow2", "x", "1.5G"],
        &["-f", "qcow2", "x", "1000"],
        &["-f", "qcow2", "-o", "cluster_size=512", "x", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts=off", "x", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=4k", "-o", "cluster_size=2M", "x", "1M"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "x"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "x", "5M"],
        &["-f", "qcow2", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "x"],
        &["-f", "qcow2", "-u", "-b", "nope", "-F", "raw", "x", "5M"],
        &["-f", "qcow2", "-o", "size=2M", "x"],
        &["-f", "qcow2", "-q", "x", "1M"],
        &["-f", "raw", "x", "1M"],
        &["x", "513"],
    ] {
        let args = [&["create"], args].concat();
        let theirs = b.run("qemu-img", &args);
        let info = |b: &Bench| {
            let text = b.ok("qemu-img", &["info", "--output", "json", "x"]);
            let mut v: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            for k in ["actual-size", "children"] {
                v.as_object_mut().expect("an object").remove(k);
            }
            v
        };
        let expected = info(&b);
        std::fs::remove_file(b.path("x")).expect("x was made");
        let ours = b.run("ours/qemu-img", &args);
        assert_eq!((ours.code, &ours.err), (theirs.code, &theirs.err), "{args:?}");
        if exact {
            assert_eq!(ours.out, theirs.out, "{args:?}");
        }
        assert_eq!(info(&b), expected, "{args:?}");
        if args.contains(&"qcow2") && !args.contains(&"nope") {
            b.ok("qemu-img", &["check", "-f", "qcow2", "x"]);
        }
        std::fs::remove_file(b.path("x")).expect("x was made");
    }
}

#[test]
fn mistakes_have_the_same_exit_codes() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    let exact = is_reference(&b, "messages of mistakes");
    for args in [
        &["create"][..],
        &["create", "-f", "raw"],
        &["create", "-f", "raw", "x.raw"],
        &["create", "-f", "qcow2", "x.qcow2"],
        &["create", "-f", "foo", "x", "1M"],
        &["create", "-f", "qcow2", "-o", "foo=bar", "x", "1M"],
        &["create", "-f", "qcow2", "x", "abc"],
        &["create", "-f", "qcow2", "x", "6Z"],
        &["create", "-f", "qcow2", "x", "8E"],
        &["create", "-f", "qcow2", "-b", "nope.qcow2", "-F", "qcow2", "x"],
        &["create", "-f", "raw", "-b", "base.qcow2", "-F", "qcow2", "x"],
        &["create", "-f", "qcow2", "-o", "size=5M", "x", "6M"],
    ] {
        let theirs = b.run("qemu-img", args);
        let ours = b.run("ours/qemu-img", args);
        assert_eq!(ours.code, theirs.code, "{args:?} {ours:?} {theirs:?}");
        if exact {
            let first = |s: &str| s.lines().next().unwrap_or_default().to_owned();
            assert_eq!(first(&ours.err), first(&theirs.err), "{args:?}");
        }
    }
    for args in [
        &["create", "-f", "qcow2", "-b", "base.qcow2", "x"][..],
        &["create", "--foo"],
        &["create", "-f", "qcow2", "x", "1M", "extra"],
        &["create", "-f", "qcow2", "-o", "cluster_size=3k", "x", "1M"],
        &["create", "-f", "qcow2", "/nonexistent/x", "1M"],
        &["foo"],
        &[],
    ] {
        let theirs = b.run("qemu-img", args);
        let ours = b.run("ours/qemu-img", args);
        assert_eq!(ours.code, theirs.code, "{args:?} {ours:?} {theirs:?}");
        assert!(!ours.err.is_empty());
    }
}

#[test]
fn the_list_of_options_is_printed() {
    let b = Bench::new();
    let out = b.ok("ours/qemu-img", &["create", "-f", "qcow2", "-o", "help"]);
    assert!(out.starts_with("Supported qcow2 options:\n"), "{out}");
    for option in ["cluster_size=<size>", "backing_file=<str>", "lazy_refcounts=<bool (on/off)>"] {
        assert!(out.contains(option), "{option} in {out}");
    }
    assert!(!b.path("help").exists());
}
