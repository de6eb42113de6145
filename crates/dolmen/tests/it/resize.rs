//! `img resize`: lines, exit codes and contents as with QEMU's tool, in both directions.

use crate::peer::{Bench, is_reference};

const MIB: u64 = 1 << 20;

fn size_of(b: &Bench, name: &str) -> u64 {
    let text = b.ok("qemu-img", &["info", "--output", "json", name]);
    let v: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    v["virtual-size"].as_u64().expect("a size")
}

/// What the images are before each case.
fn images(b: &Bench) {
    for made in [
        &["-f", "qcow2", "q", "4M"][..],
        &["-f", "raw", "r", "4M"],
        &["-f", "qcow2", "s", "4M"],
        &["-f", "qcow2", "-o", "compat=0.10", "o", "4M"],
    ] {
        b.ok("qemu-img", &[&["create", "-q"], made].concat());
    }
    for name in ["q", "r", "s", "o"] {
        let format = if name == "r" { "raw" } else { "qcow2" };
        b.ok("qemu-io", &["-f", format, "-c", "write -P 7 0 4M", name]);
    }
    b.ok("qemu-img", &["snapshot", "-c", "one", "s"]);
    b.ok("qemu-img", &["snapshot", "-c", "one", "o"]);
}

#[test]
fn lines_codes_and_sizes_are_the_same() {
    let Some(b) = Bench::with_peers() else { return };
    let exact = is_reference(&b, "the lines of 'resize'");
    let q = &["-f", "qcow2", "q"][..];
    let r = &["-f", "raw", "r"][..];
    for (image, more) in [
        (q, &["8M"][..]),
        (q, &["+1M"]),
        (q, &["4M"]),
        (q, &["10.5M"]),
        (q, &["2M"]),
        (q, &["-1k"]),
        (q, &["--shrink", "2M"]),
        (q, &["-1k", "--shrink"]),
        (q, &["7000001"]),
        (q, &["0"]),
        (q, &["9E"]),
        (q, &["+"]),
        (q, &["-q", "8M"]),
        (q, &["--preallocation=metadata", "8M"]),
        (q, &["--preallocation=falloc", "8M"]),
        (q, &["--preallocation=full", "8M"]),
        (q, &["--preallocation=off", "8M"]),
        (q, &["--preallocation=full", "--shrink", "2M"]),
        (q, &["--preallocation=full", "4M"]),
        (r, &["8M"]),
        (r, &["+1000"]),
        (r, &["1M"]),
        (r, &["--shrink", "1M"]),
        (r, &["--shrink", "--", "-1M"]),
        (r, &["--shrink", "--", "-5M"]),
        (r, &["--preallocation=falloc", "8M"]),
        (r, &["--preallocation=full", "8M"]),
        (r, &["10x"]),
        (r, &[]),
        (r, &["1M", "more"]),
        (&["-f", "qcow2", "s"], &["8M"]),
        (&["-f", "qcow2", "s"], &["--shrink", "2M"]),
        (&["--image-opts", "driver=qcow2,file.filename=q"], &["9M"]),
        (&["--image-opts", "-f", "raw", "driver=qcow2,file.filename=q"], &["9M"]),
        (&["-f", "qcow2", "nope"], &["1M"]),
        (&["-f", "what", "q"], &["1M"]),
        (&["q"], &["8M"]),
        (&["--bogus", "q"], &["8M"]),
    ] {
        let args = [&["resize"], image, more].concat();
        let name = image.last().expect("an image").split('=').next_back().expect("its name");
        let after = |program: &str| {
            images(&b);
            let ran = b.run(program, &args);
            let size = b.path(name).exists().then(|| size_of(&b, name));
            if ["q", "s", "o"].contains(&name) {
                b.ok("qemu-img", &["check", "-f", "qcow2", name]);
            }
            (ran, size)
        };
        let ((theirs, their_size), (ours, our_size)) = (after("qemu-img"), after("ours/qemu-img"));
        assert_eq!((ours.code, our_size), (theirs.code, their_size), "{args:?}: {ours:?} {theirs:?}");
        if exact {
            // Theirs points at the help of the path that it was called by.
            let their_words = theirs.err.replace("/usr/bin/", "");
            assert_eq!((&ours.out, &ours.err), (&theirs.out, &their_words), "{args:?}");
        }
    }
    // Ours says one line more.
    images(&b);
    for args in [
        &["resize", "-f", "qcow2", "o", "8M"][..],
        &["resize", "--preallocation=what", "-f", "raw", "r", "8M"],
    ] {
        let (theirs, ours) = (b.run("qemu-img", args), b.run("ours/qemu-img", args));
        assert_eq!(
            (ours.code, ours.err.lines().next()),
            (theirs.code, theirs.err.lines().next()),
            "{args:?}"
        );
        assert_eq!(ours.err.lines().count(), 2, "{ours:?}");
    }
}

/// What is kept, what is new and what is given back, whichever of the two did it.
#[test]
fn contents_and_space() {
    let Some(b) = Bench::with_peers() else { return };
    let space = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        let m = std::fs::metadata(b.path(name)).expect("it is there");
        (m.len(), m.blocks() * 512)
    };
    for program in ["qemu-img", "ours/qemu-img"] {
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "q", "64M"]);
        // The end of the disk lies before its start in the file: what is cut off leaves a hole there.
        b.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 48M 16M", "-c", "write -P 2 0 48M", "q"]);
        b.ok(program, &["resize", "-f", "qcow2", "--shrink", "q", "48M"]);
        assert!(space("q").1 < 50 * MIB, "{program}: {:?}", space("q"));
        b.ok(program, &["resize", "-f", "qcow2", "--shrink", "q", "16M"]);
        let (len, used) = space("q");
        assert!(used < 18 * MIB && len < 34 * MIB, "{program}: {len} bytes, {used} of them used");
        b.ok(program, &["resize", "-f", "qcow2", "q", "+48M"]);
        for other in ["qemu-io", "ours/qemu-io"] {
            let read = b.ok(other, &["-f", "qcow2", "-c", "read -P 2 0 16M", "-c", "read -P 0 16M 48M", "q"]);
            assert!(!read.contains("verification failed"), "{program} {other}: {read}");
        }
        for other in ["qemu-img", "ours/qemu-img"] {
            b.ok(other, &["check", "-f", "qcow2", "q"]);
        }
    }
    // A longer overlay does not expose what its base has beyond the old end.
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base", "4M"]);
    b.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 4M", "base"]);
    for mode in ["off", "metadata", "falloc", "full"] {
        let images: Vec<_> = ["qemu-img", "ours/qemu-img"]
            .map(|program| {
                let create = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "over", "2M"];
                b.ok("qemu-img", &create);
                let mode = format!("--preallocation={mode}");
                b.ok(program, &["resize", "-q", "-f", "qcow2", &mode, "over", "4M"]);
                b.ok("qemu-img", &["check", "-f", "qcow2", "over"]);
                b.ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "over", "content"]);
                std::fs::read(b.path("content")).expect("the content")
            })
            .into();
        assert!(images[0] == images[1], "{mode}");
        assert!(images[1][..2 << 20].iter().all(|b| *b == 9) && images[1][2 << 20..].iter().all(|b| *b == 0));
    }
}
