//! `io`: whole transcripts, the same as the other side's except for times.

use std::io::Write;
use std::process::Stdio;

use crate::peer::{Bench, is_reference, ran};

/// Lines with durations become "N bytes, done".
fn without_times(s: &str) -> String {
    s.lines()
        .map(|l| match l.split_once(" ops; ") {
            Some((before, _)) => format!("{before} ops"),
            None if l.split(',').count() == 5 => l.split(',').take(2).collect::<Vec<_>>().join(","),
            None => l.to_owned(),
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// Runs the commands with both tools, each on its own copy of the image.
fn transcript(b: &Bench, options: &[&str], commands: &[&str], image: &str) {
    let before = std::fs::read(b.path(image)).expect("the image");
    let mut args: Vec<&str> = options.to_vec();
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(image);
    let theirs = b.run("qemu-io", &args);
    std::fs::write(b.path(image), before).expect("the image");
    let ours = b.run("ours/qemu-io", &args);
    assert_eq!(
        without_times(&ours.out),
        without_times(&theirs.out),
        "{args:?}\nours: {}\ntheirs: {}",
        ours.err,
        theirs.err
    );
    assert_eq!(ours.code, theirs.code, "{args:?} {ours:?} {theirs:?}");
}

fn images() -> Option<Bench> {
    let b = Bench::with_peers()?;
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    b.ok("qemu-io", &["-c", "write -P 0x61 0 128k", "a.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "raw", "r.raw", "4M"]);
    Some(b)
}

#[test]
fn requests() {
    let Some(b) = images() else { return };
    std::fs::write(b.path("pattern"), b"ab 1~_-Z\xff").expect("a file");
    for (options, image) in [(&[][..], "a.qcow2"), (&["-f", "raw"], "r.raw"), (&[], "b.qcow2")] {
        for commands in [
            &["write -P 0xab 0 4k", "read -P 0xab 0 4k", "read -P 0 0 4k", "length"][..],
            &["write 64k 1500", "read -v 65530 20", "read -P 0xcd 64k 1500"],
            &["write -s pattern 0 64", "read -v 0 64"],
            &["write -z 0 64k", "read -P 0 0 64k", "write -z -u 64k 64k", "map"],
            &["writev -P 3 0 4k 4k 8k", "readv -P 3 0 4k 4k 8k", "readv -v 0 16 16"],
            &["aio_write -P 4 0 4k", "aio_flush", "read -P 4 0 4k"],
            &["aio_read -P 9 0 4k", "aio_flush"],
            &["write -q 0 64k", "read -q -P 0xcd 0 64k", "read -C 0 4k", "write -C 0 1M"],
            &["discard 0 64k", "discard -q 64k 64k", "discard -C 0 4k", "flush"],
            &["read -P 0xcd -s 512 -l 512 0 4k", "write -f -P 7 100 1000", "read -P 7 100 1000"],
            &["map", "alloc 0", "alloc 0 1M", "alloc 64k 1M", "alloc 10M", "alloc 0 10M"],
            &["truncate 8M", "length", "read -P 0 4M 4M", "alloc 0 8M"],
            &["write 0 0", "read 0 0"],
            &["quit", "length"],
        ] {
            transcript(&b, options, commands, image);
        }
    }
}

#[test]
fn mistakes() {
    let Some(b) = images() else { return };
    if !is_reference(&b, "messages of mistakes in io commands") {
        return;
    }
    let commands = [
        "write -P 300 0 4k",
        "write -P -1 0 4k",
        "read -P 1 -l 5120 -s 512 0 4k",
        "read 4M 4k",
        "read 5M 4k",
        "read 0 3G",
        "read abc 4k",
        "read 0",
        "read",
        "discard 0 8M",
        "discard",
        "truncate",
        "truncate abc",
        "sleep",
        "sleep x",
        "sleep 1",
        "sigraise",
        "sigraise x",
        "sigraise 0",
        "write -u 0 64k",
        "write -n 0 64k",
        "write -z -P 3 0 64k",
        "foo",
        "length",
        "",
    ];
    transcript(&b, &[], &commands, "a.qcow2");
    for c in commands {
        transcript(&b, &[], &[c], "a.qcow2");
    }
    // The words of the usage line are ours; that there is one is not.
    for c in ["read -x 0 4k", "read -l 512 0 4k", "read 0 4k 5", "write 0 4k 5"] {
        let r = b.run("ours/qemu-io", &["-c", c, "a.qcow2"]);
        assert_eq!(r.code, 1, "{c} {r:?}");
        assert!(r.out.contains(" off len -- "), "{c} {r:?}");
    }
    transcript(&b, &["-r"], &["write 0 512", "length"], "a.qcow2");
}

#[test]
fn opening() {
    let Some(b) = images() else { return };
    let same = |args: &[&str]| b.same("qemu-io", args, without_times);
    same(&["-c", "length", "nope"]);
    same(&["-c", "length"]);
    same(&["-c", "open nope", "-c", "length"]);
    same(&["-f", "raw", "-c", "length", "a.qcow2"]);
    same(&["-f", "foo", "-c", "length", "a.qcow2"]);
    same(&["--image-opts", "-c", "length", "driver=qcow2,file.driver=file,file.filename=a.qcow2"]);
    same(&[
        "--image-opts",
        "-f",
        "raw",
        "-c",
        "length",
        "driver=qcow2,file.driver=file,file.filename=a.qcow2",
    ]);
    same(&["-c", "open -o driver=qcow2,file.filename=a.qcow2", "-c", "length"]);
    same(&["-c", "open -r a.qcow2", "-c", "length", "-c", "write 0 4k", "-c", "close", "-c", "length"]);
    same(&["-c", "open a.qcow2", "-c", "open a.qcow2"]);
    same(&["-c", "reopen -r", "-c", "write 0 4k", "-c", "reopen -w", "-c", "write -q 0 4k", "a.qcow2"]);
    same(&["-r", "-C", "-c", "length", "b.qcow2"]);
    same(&["-U", "-c", "length", "a.qcow2"]);
    same(&["-r", "-U", "-c", "length", "a.qcow2"]);
    for mode in ["none", "writeback", "writethrough", "directsync", "unsafe", "foo"] {
        same(&["-t", mode, "-c", "write 0 4k", "-c", "read -P 0xcd 0 4k", "a.qcow2"]);
    }
}

/// Modes that do not exist are refused; aio=native is for files without a page cache.
#[test]
fn modes() {
    let Some(b) = images() else { return };
    if !is_reference(&b, "messages of wrong modes") {
        return;
    }
    for options in [
        &["-i", "foo"][..],
        &["-t", "foo"],
        &["-d", "foo"],
        &["-i", "native"],
        &["-k"],
        &["-i", "threads"],
        &["-n", "-i", "native"],
        &["-c", "open -i foo a.qcow2"],
        &["-f", "raw", "-c", "read 0 0", "null-co:"],
    ] {
        b.same_words(
            "qemu-io",
            &[options, &["-c", "length", "a.qcow2"][..if options.contains(&"null-co:") { 0 } else { 3 }]]
                .concat(),
        );
    }
    b.same("qemu-io", &["-f", "raw", "-c", "read -q 0 4k", "-c", "length", "null-co://"], without_times);
    let r = b.run("ours/qemu-io", &["-U", "-c", "length", "a.qcow2"]);
    assert!(r.code == 1 && !r.err.contains("read-only=on"), "{r:?}");
    let r = b.run("ours/qemu-io", &["--foo", "a.qcow2"]);
    assert!(r.code == 1 && r.err.starts_with("qemu-io: unrecognized option '--foo'\n"), "{r:?}");
}

/// What can't be done is refused, not done in another way.
#[test]
fn refusals() {
    let Some(b) = images() else { return };
    transcript(&b, &["-f", "raw"], &["write -c 0 64k", "read -P 0 0 64k"], "r.raw");
    let r = b.run("ours/qemu-io", &["-c", "write -c 0 64k", "-c", "read -q -P 0x61 0 64k", "a.qcow2"]);
    assert_eq!((r.code, r.out.as_str()), (1, "write failed: Operation not supported\n"), "{r:?}");
    let r = b.run("ours/qemu-io", &["-s", "-c", "write 0 64k", "a.qcow2"]);
    assert!(r.code == 1 && r.err.contains("-s: "), "{r:?}");
}

/// Commands with which tests make the program crash.
#[test]
fn crashes() {
    use std::os::unix::process::ExitStatusExt;
    let Some(b) = images() else { return };
    for (command, signal) in [("abort", 6), ("sigraise 9", 9), ("sigraise 15", 15)] {
        for program in ["ours/qemu-io", "qemu-io"] {
            let args = ["-c", "read -q 0 4k", "-c", command, "-c", "sleep 10000", "a.qcow2"];
            let out = b.command(program).args(args).output().expect("the program starts");
            assert_eq!(out.status.signal(), Some(signal), "{program} {command}");
        }
    }
}

/// Reading through copy-on-read fills the overlay, as far as the other side's does.
#[test]
fn copy_on_read() {
    let Some(b) = images() else { return };
    transcript(&b, &["-C"], &["read -P 0x61 4k 4k", "map", "read -P 0 1M 4k", "map"], "b.qcow2");
    transcript(
        &b,
        &["-C"],
        &["read -P 0x61 64k 4k", "discard 64k 64k", "map", "read -P 0 64k 4k"],
        "b.qcow2",
    );
    for refused in [
        &["-C", "-r", "-c", "read 0 4k", "b.qcow2"][..],
        &["-C", "--image-opts", "driver=qcow2,file.filename=b.qcow2,read-only=on", "-c", "read 0 4k"],
    ] {
        b.same("qemu-io", refused, without_times);
    }
    b.ok("ours/qemu-io", &["-C", "-c", "read -P 0x61 4k 4k", "b.qcow2"]);
    b.ok("qemu-img", &["check", "b.qcow2"]);
    b.ok("qemu-img", &["rebase", "-u", "-b", "", "b.qcow2"]);
    b.ok("qemu-io", &["-c", "read -P 0x61 0 64k", "-c", "read -P 0 64k 64k", "b.qcow2"]);
}

/// Commands from the standard input, with the prompt of the name that we go by.
#[test]
fn interactive() {
    let Some(b) = images() else { return };
    let text = "length\n\nfoo\nread -P 0x61 0 4k\nclose\nlength\nopen -o driver=qcow2 a.qcow2\nlength\nquit\nlength\n";
    let talk = |program: &str| {
        let mut child = b
            .command(program)
            .arg("a.qcow2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
        ran(child.wait_with_output().expect("it ends"))
    };
    let (ours, theirs) = (talk("ours/qemu-io"), talk("qemu-io"));
    assert_eq!(without_times(&ours.out), without_times(&theirs.out));
    assert_eq!(ours.code, theirs.code);
}

/// Errors are injected by a configuration file, named in the image's name or in options.
#[test]
fn injected_errors() {
    let Some(b) = images() else { return };
    std::fs::write(
        b.path("debug.conf"),
        "[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\nonce = \"on\"\n",
    )
    .expect("a file");
    let commands = ["-c", "write 1M 4k", "-c", "write 1M 4k", "-c", "read -P 0xcd 1M 4k"];
    b.same("qemu-io", &[&commands[..], &["blkdebug:debug.conf:a.qcow2"]].concat(), without_times);
    let options = "driver=qcow2,file.driver=blkdebug,file.config=debug.conf,file.image.filename=a.qcow2";
    b.same("qemu-io", &[&commands[..], &["--image-opts", options]].concat(), without_times);
    b.ok("qemu-img", &["check", "a.qcow2"]);
}

/// The story: `discard 1 40M` through a node that discards 15 MiB at once left the clusters at 15 and at 30 MiB, of which
/// each piece covered a part only. Zero writes allocated data there. Behind a window clusters begin elsewhere.
#[test]
fn requests_are_split_between_clusters() {
    let Some(b) = images() else { return };
    for (limits, window) in [
        ("max-discard=15M,max-write-zero=15M", 0),
        ("align=512,max-discard=15M,opt-discard=15M,max-write-zero=15M,opt-write-zero=15M", 0),
        ("max-discard=1000000,max-write-zero=1000000", 0),
        ("max-discard=15M,max-write-zero=15M", 512 * 7),
    ] {
        for command in ["discard", "write -z -u"] {
            b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "split.q", "48M"]);
            b.ok("qemu-io", &["-f", "qcow2", "-c", "write -q -P 9 0 48M", "split.q"]);
            let chain = format!(
                "driver=blkdebug,{limits},image.driver=raw,image.offset={window},image.file.driver=qcow2,\
                 image.file.discard=unmap,discard=unmap,image.discard=unmap,\
                 image.file.file.driver=file,image.file.file.filename=split.q"
            );
            let done = format!("{command} 1 40M");
            b.ok("ours/qemu-io", &["--image-opts", "-d", "unmap", "-c", &done, &chain]);
            let (first, end) = (1 + window, (40 << 20) + 1 + window);
            let (first, end) = ((first as u64).next_multiple_of(65536), end as u64 / 65536 * 65536);
            let map = b.ok("qemu-img", &["map", "-f", "qcow2", "--output=json", "split.q"]);
            let extents: serde_json::Value = serde_json::from_str(&map).expect("JSON");
            let left: u64 = extents
                .as_array()
                .expect("a list")
                .iter()
                .filter(|e| e["data"] == true)
                .map(|e| {
                    let start = e["start"].as_u64().expect("a number");
                    let to = (start + e["length"].as_u64().expect("a number")).min(end);
                    to.saturating_sub(start.max(first))
                })
                .sum();
            assert_eq!(left, 0, "{command} with {limits} behind {window}: {map}");
        }
    }
}
