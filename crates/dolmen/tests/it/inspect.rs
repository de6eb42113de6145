//! `img info`, `map`, `check`, `compare`, `rebase -u`: the same bytes as the other side.

use crate::peer::{Bench, is_reference};

fn no_change(s: &str) -> String {
    s.to_owned()
}

/// A chain of three images of different length, made by QEMU's tools, with data,
/// zeroes and holes in every layer; and a raw image.
fn chain() -> Option<Bench> {
    let b = Bench::with_peers()?;
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    b.ok("qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -P 1 5M 100k", "a.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 2 64k 64k", "-c", "write -z 2M 1M", "b.qcow2"]);
    std::fs::create_dir(b.path("sub")).expect("sub/");
    b.ok(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "../b.qcow2", "-F", "qcow2", "sub/c.qcow2", "12M"],
    );
    b.ok("qemu-io", &["-c", "write -P 3 11M 4k", "-c", "write -z -u 64k 64k", "sub/c.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "raw", "r.raw", "3M"]);
    b.ok("qemu-io", &["-f", "raw", "-c", "write -P 4 1M 64k", "r.raw"]);
    Some(b)
}

const IMAGES: [&str; 4] = ["a.qcow2", "b.qcow2", "sub/c.qcow2", "r.raw"];

#[test]
fn info() {
    let Some(b) = chain() else { return };
    b.ok("qemu-img", &["snapshot", "-c", "one", "b.qcow2"]);
    if !is_reference(&b, "the text and JSON of img info") {
        return;
    }
    for image in IMAGES {
        for output in ["human", "json"] {
            b.same("qemu-img", &["info", "--output", output, image], no_change);
            b.same("qemu-img", &["info", "-U", &format!("--output={output}"), image], no_change);
            b.same("qemu-img", &["info", "--backing-chain", "--output", output, image], no_change);
        }
    }
    b.same("qemu-img", &["info", "-f", "raw", "a.qcow2"], no_change);
    b.same("qemu-img", &["info", "file:a.qcow2"], no_change);
    b.same("qemu-img", &["info", "--image-opts", "driver=qcow2,file.filename=a.qcow2"], no_change);
    b.same(
        "qemu-img",
        &["info", r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}"#],
        no_change,
    );
}

#[test]
fn map() {
    let Some(b) = chain() else { return };
    if !is_reference(&b, "img map") {
        return;
    }
    for image in IMAGES {
        for output in ["human", "json"] {
            b.same("qemu-img", &["map", "--output", output, image], no_change);
        }
    }
    for output in ["human", "json"] {
        b.same(
            "qemu-img",
            &["map", "--output", output, "--start-offset", "70000", "--max-length", "100000", "sub/c.qcow2"],
            no_change,
        );
    }
}

#[test]
fn check() {
    let Some(b) = chain() else { return };
    for image in &IMAGES[..3] {
        for output in ["human", "json"] {
            b.same("qemu-img", &["check", "--output", output, image], no_change);
        }
        b.same("qemu-img", &["check", "-q", image], no_change);
    }
    b.same("qemu-img", &["check", "r.raw"], no_change);
    b.same("qemu-img", &["check", "-f", "raw", "r.raw"], no_change);
    b.same("qemu-img", &["check", "null-co://"], no_change);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "empty.qcow2", "1M"]);
    b.same("qemu-img", &["check", "empty.qcow2"], no_change);
    b.same("qemu-img", &["check", "-r", "foo", "a.qcow2"], no_change);
}

#[test]
fn compare() {
    let Some(b) = chain() else { return };
    b.ok("qemu-img", &["convert", "-O", "raw", "sub/c.qcow2", "c.raw"]);
    b.ok("qemu-img", &["convert", "-O", "raw", "b.qcow2", "b.raw"]);
    std::fs::copy(b.path("c.raw"), b.path("d.raw")).expect("a copy");
    b.ok("qemu-io", &["-f", "raw", "-c", "write -P 9 8000001 3", "d.raw"]);
    for args in [
        &["c.raw", "sub/c.qcow2"][..],
        &["-s", "c.raw", "sub/c.qcow2"],
        &["-f", "raw", "-F", "qcow2", "b.raw", "b.qcow2"],
        &["a.qcow2", "b.qcow2"],
        &["-s", "a.qcow2", "b.qcow2"],
        &["-q", "a.qcow2", "b.qcow2"],
        &["-p", "r.raw", "r.raw"],
        &["-p", "-q", "r.raw", "r.raw"],
        &["b.qcow2", "sub/c.qcow2"],
        &["sub/c.qcow2", "b.qcow2"],
        &["c.raw", "d.raw"],
        &["d.raw", "sub/c.qcow2"],
        &["r.raw", "r.raw"],
        &["nope", "r.raw"],
        &["-f", "qcow2", "r.raw", "r.raw"],
    ] {
        b.same("qemu-img", &[&["compare"], args].concat(), no_change);
    }
}

#[test]
fn rebase_unsafe() {
    let Some(b) = chain() else { return };
    let backing = |b: &Bench| {
        let text = b.ok("qemu-img", &["info", "--output", "json", "b.qcow2"]);
        let v: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        (v.get("backing-filename").cloned(), v.get("backing-filename-format").cloned())
    };
    let long = "x".repeat(2000);
    for args in [
        &["-b", "r.raw", "-F", "raw"][..],
        &["-b", "nope.qcow2", "-F", "qcow2"],
        &["-b", "sub/../a.qcow2", "-F", "qcow2"],
        &["-b", "a.qcow2", "-F", "foo"],
        &["-b", long.as_str(), "-F", "qcow2"],
        &["-b", ""],
        &[],
    ] {
        let args = [&["rebase", "-u"], args, &["b.qcow2"]].concat();
        let before = std::fs::read(b.path("b.qcow2")).expect("b.qcow2");
        let theirs = b.run("qemu-img", &args);
        let expected = backing(&b);
        std::fs::write(b.path("b.qcow2"), before).expect("b.qcow2");
        let ours = b.run("ours/qemu-img", &args);
        assert_eq!((ours.code, &ours.out), (theirs.code, &theirs.out), "{args:?} {ours:?} {theirs:?}");
        assert_eq!(backing(&b), expected, "{args:?}");
    }
    b.ok("qemu-img", &["check", "b.qcow2"]);
}

/// What an NBD server serves, by both notations of its address.
#[test]
fn over_nbd() {
    let Some(b) = chain() else { return };
    let exact = is_reference(&b, "the text and JSON of images over NBD");
    let socket = b.path("nbd.sock");
    let socket = socket.to_str().expect("a path");
    let server = b
        .command("qemu-nbd")
        .args(["-t", "-e", "8", "-f", "qcow2", "-x", "exp", "-k", socket, "a.qcow2"])
        .spawn();
    let Ok(mut server) = server else {
        println!("not compared: qemu-nbd is not installed");
        return;
    };
    crate::daemon::eventually("qemu-nbd", || std::os::unix::net::UnixStream::connect(socket).ok());
    for name in [format!("nbd+unix:///exp?socket={socket}"), format!("nbd:unix:{socket}:exportname=exp")] {
        if exact {
            for output in ["human", "json"] {
                b.same("qemu-img", &["info", "--output", output, &name], no_change);
                b.same("qemu-img", &["map", "--output", output, &name], no_change);
            }
        }
        b.same("qemu-img", &["compare", "-f", "raw", "-F", "raw", &name, &name], no_change);
        let c = b.run("ours/qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &name, "-U", "a.qcow2"]);
        assert_eq!(c.code, 0, "{c:?}");
        b.ok("ours/qemu-io", &["-f", "raw", "-c", "write -P 6 8k 4k", "-c", "read -P 6 8k 4k", &name]);
        b.ok("qemu-io", &["-f", "raw", "-c", "read -P 6 8k 4k", "-c", "read -P 1 12k 4k", &name]);
    }
    server.kill().expect("it runs");
    server.wait().expect("it ends");
    let r = b.run("ours/qemu-img", &["info", &format!("nbd:unix:{socket}.gone")]);
    assert_eq!(r.code, 1, "{r:?}");
}

/// Mistakes on the command line, and images that can't be opened, in the same words and
/// with the same exit code: scripts try whether an option exists, and tell a file that is
/// not there from a format without checks.
#[test]
fn mistakes() {
    let Some(b) = chain() else { return };
    if !is_reference(&b, "messages of mistakes on the command line") {
        return;
    }
    for verb in ["info", "map", "check", "compare", "rebase", "bench"] {
        for args in
            [&[][..], &["--foo"], &["--foo=3", "a.qcow2"], &["-9"], &["-U9"], &["-f"], &["a", "b", "c"]]
        {
            // Every one of these has -U but bench and rebase, whose options before it count too.
            b.same_words("qemu-img", &[&[verb], args].concat());
        }
    }
    for args in [
        &[][..],
        &["foo"],
        &["--foo"],
        &["-x"],
        &["-T"],
        &["info", "--output"],
        &["info", "--output=foo", "a.qcow2"],
        &["check", "--quiet=3"],
        &["create"],
        &["create", "-f"],
        &["create", "--foo"],
        &["create", "a", "1M", "c", "d"],
        &["check", "-f", "raw", "nope"],
        &["check", "-f", "foo", "nope"],
        &["check", "-f", "qcow2", "r.raw"],
        &["check", "-r", "foo", "nope"],
        &["check", "--image-opts", "driver=raw,file.filename=nope"],
        &["rebase", "a.qcow2"],
        &["rebase", "-u", "-F", "bar", "nope"],
        &["rebase", "-f", "qcow2", "-u", "-F", "bar", "nope"],
        &["rebase", "-u", "-F", "bar", "b.qcow2"],
        &["rebase", "-u", "-b", "a.qcow2", "a.qcow2"],
        &["rebase", "-u", "-t", "foo", "nope"],
        &["rebase", "-u", "-T", "foo", "nope"],
        &["rebase", "-f", "raw", "-u", "-b", "y", "r.raw"],
        &["rebase", "-f", "raw", "-u", "-b", "y", "-F", "raw", "r.raw"],
        &["info", "null-co:"],
        &["info", "nbd+unix:///?socket=nope"],
    ] {
        b.same_words("qemu-img", args);
    }
    // The native name explains more.
    let r = b.run("dolmen", &["img", "info"]);
    assert!(r.err.ends_with("Try 'dolmen img info --help' for more info\n"), "{r:?}");
}

/// Names that stand for more than a file.
#[test]
fn names() {
    let Some(b) = chain() else { return };
    if !is_reference(&b, "img info of names with a protocol") {
        return;
    }
    for output in ["human", "json"] {
        b.same("qemu-img", &["info", "--output", output, "-f", "raw", "null-co://"], no_change);
        for driver in ["driver=null-co", "driver=null-aio"] {
            b.same("qemu-img", &["info", "--output", output, "--image-opts", driver], no_change);
        }
        b.same(
            "qemu-img",
            &["info", "--output", output, "--image-opts", "driver=null-co,size=1M"],
            no_change,
        );
    }
    b.same("qemu-img", &["check", "blkdebug::a.qcow2"], no_change);
    let r = b.run("ours/qemu-img", &["info", "foo:bar"]);
    assert!(r.code == 1 && r.err.contains("Unknown protocol 'foo'") && !r.err.contains("backing"), "{r:?}");
}

/// Space that was mapped in advance and never written reads as zeroes, and `map` says so.
#[test]
fn holes_of_the_file_below_a_format() {
    let Some(b) = Bench::with_peers() else { return };
    if !is_reference(&b, "map of preallocated images") {
        return;
    }
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "a.qcow2", "1M"]);
    b.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 192k 128k", "a.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
    for image in ["a.qcow2", "top.qcow2"] {
        b.same("qemu-img", &["map", "--output=json", image], str::to_owned);
        b.same("qemu-img", &["map", image], str::to_owned);
    }
}

/// A file of 1000 bytes had 1024 in `info` and 1000 everywhere else, so that it was never equal to its own copy.
#[test]
fn a_disk_has_one_size_where_it_is_no_multiple_of_a_sector() {
    let Some(b) = Bench::with_peers() else { return };
    for (name, size) in [("a.raw", 1000u32), ("b.raw", 65537), ("c.raw", 1)] {
        let data: Vec<u8> = (0..size).map(|i| (i % 251) as u8 + 1).collect();
        std::fs::write(b.path(name), &data).expect("a file");
        let overlay = format!("{name}.qcow2");
        b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", &overlay]);
        let as_it_is = |s: &str| s.to_owned();
        b.same("qemu-img", &["map", "-f", "raw", "--output=json", name], as_it_is);
        b.same("qemu-img", &["map", "-f", "qcow2", "--output=json", &overlay], as_it_is);
        b.same("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", name, &overlay], as_it_is);
        let end = u64::from(size).next_multiple_of(512);
        let last = end - 512;
        let commands = [
            "length".to_owned(),
            format!("read -q -v {last} 512"),
            format!("read -q 0 {end}"),
            "map".to_owned(),
        ];
        let mut args = vec!["-r", "-f", "raw"];
        args.extend(commands.iter().flat_map(|c| ["-c", c.as_str()]));
        args.push(name);
        b.same("qemu-io", &args, |s| s.lines().filter(|l| !l.contains(" ops; ")).collect());
        // Writing the rest of the sector makes the file longer, with both.
        for tool in ["qemu-io", "ours/qemu-io"] {
            std::fs::write(b.path(name), &data).expect("a file");
            b.ok(tool, &["-f", "raw", "-c", &format!("write -q -P 9 {last} 512"), name]);
            assert_eq!(std::fs::metadata(b.path(name)).expect("the file").len(), end, "{tool}");
        }
    }
}

/// Through blkdebug the image had a json: name, and the actual path of its backing file was not beside it.
#[test]
fn info_through_blkdebug() {
    let Some(b) = Bench::with_peers() else { return };
    std::fs::create_dir(b.path("d")).expect("a directory");
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "d/base.q", "4M"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.q", "-F", "qcow2", "d/top.q"]);
    std::fs::write(b.path("rules"), "").expect("a file");
    // How much space is taken is something that QEMU does not know there.
    let same =
        |s: &str| s.lines().filter(|l| !l.contains("disk size") && !l.contains("actual-size")).collect();
    for image in ["blkdebug::d/top.q", "blkdebug:rules:d/top.q"] {
        b.same("qemu-img", &["info", image], same);
    }
    let aligned = "driver=qcow2,file.driver=blkdebug,file.align=4096,file.image.driver=file,file.image.filename=d/top.q";
    for tool in ["qemu-img", "ours/qemu-img"] {
        let text = b.ok(tool, &["info", "--image-opts", aligned]);
        assert!(text.contains("backing file: base.q (actual path: d/base.q)"), "{tool}: {text}");
    }
}
