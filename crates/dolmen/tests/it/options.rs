//! Options of nodes: each one does what it says, and none is accepted that nothing implements.

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, eventually, serve};
use crate::peer::{Bench, Ran};

/// What a run of commands on a node came to: what was said, and the space that the image takes.
fn run(b: &Bench, tool: &str, image: &str, options: &str, commands: &[&str]) -> (Ran, u64) {
    let mut args: Vec<&str> = vec!["--image-opts"];
    args.extend(commands.iter().flat_map(|c| ["-c", c]));
    args.push(options);
    let ran = b.run(tool, &args);
    let file = std::fs::File::open(b.path(image)).expect("the image");
    file.sync_all().expect("the file system");
    let space = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("the image")) * 512;
    (ran, space)
}

/// An image full of data, in a raw file and in qcow2.
fn full(b: &Bench, name: &str) {
    let format = if name.ends_with("raw") { "raw" } else { "qcow2" };
    b.ok("ours/qemu-img", &["create", "-q", "-f", format, name, "8M"]);
    b.ok("ours/qemu-io", &["-f", format, "-c", "write -q -P 5 0 8M", name]);
}

/// `detect-zeroes` was read, reported by queries, and done by nobody.
#[test]
fn writes_of_zeroes_are_detected_at_every_node() {
    let Some(b) = Bench::with_peers() else { return };
    let write = &["write -q -P 0 0 4M", "read -P 0 0 4M", "read -P 5 4M 4M"][..];
    let raw = "driver=raw,file.driver=file,file.filename=a.raw";
    let qcow2 = "driver=qcow2,file.driver=file,file.filename=a.qcow2";
    // Where it is asked for, and what becomes of the space.
    let rows = [
        ("a.raw", format!("{raw},discard=unmap,file.discard=unmap"), false),
        ("a.raw", format!("{raw},discard=unmap,file.discard=unmap,detect-zeroes=on"), false),
        ("a.raw", format!("{raw},discard=unmap,file.discard=unmap,detect-zeroes=unmap"), true),
        ("a.raw", format!("{raw},file.discard=unmap,file.detect-zeroes=unmap"), true),
        ("a.raw", format!("driver=raw,offset=0,discard=unmap,detect-zeroes=unmap,{}", &raw[11..]), true),
        ("a.qcow2", format!("{qcow2},discard=unmap"), false),
        ("a.qcow2", format!("{qcow2},discard=unmap,detect-zeroes=unmap"), true),
        ("a.qcow2", format!("driver=raw,discard=unmap,detect-zeroes=unmap,{}", under_file(qcow2)), true),
        (
            "a.qcow2",
            format!("driver=copy-on-read,discard=unmap,detect-zeroes=unmap,{}", under_file(qcow2)),
            true,
        ),
        (
            "a.qcow2",
            format!("driver=blkdebug,discard=unmap,detect-zeroes=unmap,{}", under(qcow2, "image")),
            true,
        ),
    ];
    for (image, options, frees) in rows {
        let mut seen = Vec::new();
        for tool in ["qemu-io", "ours/qemu-io"] {
            full(&b, image);
            let (ran, space) = run(&b, tool, image, &options, write);
            assert!(ran.code == 0 && !ran.out.contains("failed"), "{tool} {options}: {ran:?}");
            seen.push(space < 6 << 20);
        }
        assert_eq!(seen, [frees, frees], "{options}: QEMU, ours");
    }
}

/// The same options for a child.
fn under(options: &str, child: &str) -> String {
    options.split(',').map(|o| format!("{child}.{o}")).collect::<Vec<_>>().join(",")
}

fn under_file(options: &str) -> String {
    under(&format!("{options},discard=unmap"), "file")
}

/// With `on`, zeroes are written as zeroes and keep their space; part of a request is not enough.
#[test]
fn zeroes_are_seen_as_they_are() {
    let b = Bench::new();
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", "z.qcow2", "8M"]);
    let options = "driver=qcow2,detect-zeroes=on,file.driver=file,file.filename=z.qcow2";
    let commands = ["write -q -P 0 0 1M", "write -q -P 3 1M 64k", "write -q -P 0 1M 32k", "map"];
    let (ran, _) = run(&b, "ours/qemu-io", "z.qcow2", options, &commands);
    assert_eq!(ran.code, 0, "{ran:?}");
    // Nothing was allocated for the first megabyte.
    let map = b.ok("ours/qemu-img", &["map", "-f", "qcow2", "--output=json", "z.qcow2"]);
    assert!(
        map.contains(
            r#""start": 0, "length": 1048576, "depth": 0, "present": true, "zero": true, "data": false"#
        ),
        "{map}"
    );
    let (ran, _) =
        run(&b, "ours/qemu-io", "z.qcow2", options, &["read -P 0 0 1081344", "read -P 3 1081344 32k"]);
    assert!(!ran.out.contains("failed"), "{ran:?}");
}

/// How it is shown that an option does something.
enum Shown {
    /// Commands on a node with these options come to something else than with those.
    Differs { with: &'static str, without: &'static str, commands: &'static [&'static str] },
    /// By a test of that name in a file.
    By(&'static str, &'static str),
}

use Shown::{By, Differs};

/// A file under a qcow2 image over another one, in which all is 7.
const OVERLAY: &str = "driver=qcow2,file.driver=file,file.filename=o.qcow2";
const RAW: &str = "driver=raw,file.driver=file,file.filename=a.raw";
/// A filter over a disk whose second sector can't be read, and which can't be flushed.
const DAMAGED: &str = "image.driver=blkdebug,image.image.driver=null-co,image.image.read-zeroes=on,\
    image.inject-error.0.event=none,image.inject-error.0.iotype=read,image.inject-error.0.sector=1,\
    image.inject-error.1.event=none,image.inject-error.1.iotype=flush";

const FILTER_TESTS: &str = "crates/filters/src/tests/blkdebug.rs";
const PREALLOCATE_TESTS: &str = "crates/filters/src/tests/preallocate.rs";
const CBW_TESTS: &str = "crates/copy/src/tests/cbw.rs";
const FILE_TESTS: &str = "crates/protocols/tests/it/file.rs";
const NBD_TESTS: &str = "crates/protocols/tests/it/nbd.rs";

/// Each option that may be left out, with the driver that has it ("" for all).
const SHOWN: &[(&str, &str, Shown)] = &[
    (
        "",
        "node-name",
        Differs {
            with: "driver=raw,node-name=n,file.driver=null-co,file.node-name=n",
            without: "driver=raw,node-name=n,file.driver=null-co",
            commands: &["length"],
        },
    ),
    (
        "",
        "discard",
        Differs { with: "discard=unmap,RAW", without: "discard=ignore,RAW", commands: &["discard 0 4M"] },
    ),
    (
        "",
        "cache",
        Differs {
            with: "driver=blkdebug,cache.no-flush=on,DAMAGED",
            without: "driver=blkdebug,DAMAGED",
            commands: &["flush"],
        },
    ),
    ("", "read-only", Differs { with: "read-only=on,RAW", without: "RAW", commands: &["write 0 512"] }),
    ("", "auto-read-only", By(NBD_TESTS, "what_can_not_be_opened_says_why")),
    ("", "active", Differs { with: "active=off,RAW", without: "RAW", commands: &["read -P 5 0 512"] }),
    ("", "force-share", By("crates/protocols/tests/it/locks.rs", "force_share_and_locking_off")),
    (
        "",
        "detect-zeroes",
        Differs {
            with: "discard=unmap,detect-zeroes=unmap,RAW",
            without: "discard=unmap,RAW",
            commands: &["write -q -P 0 0 4M"],
        },
    ),
    ("raw", "offset", Differs { with: "offset=1M,RAW", without: "RAW", commands: &["length"] }),
    ("raw", "size", Differs { with: "size=1M,RAW", without: "RAW", commands: &["length"] }),
    (
        "qcow2",
        "backing",
        Differs { with: "backing=,OVERLAY", without: "OVERLAY", commands: &["read -P 7 0 512"] },
    ),
    (
        "qcow2",
        "pass-discard-request",
        Differs {
            with: "discard=unmap,pass-discard-request=off,OVERLAY",
            without: "discard=unmap,OVERLAY",
            commands: &["write -q 0 4M", "discard 0 4M", "flush"],
        },
    ),
    (
        "qcow2",
        "x-backing-may-change",
        By("crates/dolmen/tests/it/overlays.rs", "an_overlay_may_say_that_its_backing_node_may_change"),
    ),
    ("file", "locking", By("crates/protocols/tests/it/locks.rs", "force_share_and_locking_off")),
    ("file", "x-beneath", By(FILE_TESTS, "what_cannot_be_opened")),
    ("host_device", "locking", By("crates/protocols/tests/it/locks.rs", "force_share_and_locking_off")),
    ("host_device", "x-beneath", By(FILE_TESTS, "what_cannot_be_opened")),
    ("host_cdrom", "locking", By("crates/protocols/tests/it/locks.rs", "force_share_and_locking_off")),
    ("host_cdrom", "x-beneath", By(FILE_TESTS, "what_cannot_be_opened")),
    (
        "null-co",
        "size",
        Differs { with: "driver=null-co,size=1M", without: "driver=null-co", commands: &["length"] },
    ),
    ("null-co", "latency-ns", By(FILE_TESTS, "null_answers_from_memory")),
    (
        "null-co",
        "read-zeroes",
        Differs {
            with: "driver=null-co,read-zeroes=on",
            without: "driver=null-co",
            commands: &["read -P 0 0 512"],
        },
    ),
    (
        "null-aio",
        "size",
        Differs { with: "driver=null-aio,size=1M", without: "driver=null-aio", commands: &["length"] },
    ),
    ("null-aio", "latency-ns", By(FILE_TESTS, "null_answers_from_memory")),
    (
        "null-aio",
        "read-zeroes",
        Differs {
            with: "driver=null-aio,read-zeroes=on",
            without: "driver=null-aio",
            commands: &["read -P 0 0 512"],
        },
    ),
    ("nbd", "export", By(NBD_TESTS, "what_can_not_be_opened_says_why")),
    ("nbd", "reconnect-delay", By(NBD_TESTS, "a_lost_server_is_reported_and_found_again")),
    ("nbd", "open-timeout", By(NBD_TESTS, "open_timeout_is_not_early")),
    ("copy-on-read", "bottom", By("crates/control/tests/it/copy_on_read.rs", "stacked_with_raw")),
    (
        "blkdebug",
        "config",
        Differs {
            with: "driver=blkdebug,config=rules,image.driver=null-co",
            without: "driver=blkdebug,image.driver=null-co",
            commands: &["read 0 512"],
        },
    ),
    (
        "blkdebug",
        "align",
        Differs {
            with: "driver=blkdebug,align=1024,DAMAGED",
            without: "driver=blkdebug,DAMAGED",
            commands: &["read -P 0 0 512"],
        },
    ),
    ("blkdebug", "max-transfer", By(FILTER_TESTS, "alignment_and_limits_shape_what_the_child_sees")),
    ("blkdebug", "opt-write-zero", By(FILTER_TESTS, "alignment_and_limits_shape_what_the_child_sees")),
    ("blkdebug", "max-write-zero", By(FILTER_TESTS, "alignment_and_limits_shape_what_the_child_sees")),
    ("blkdebug", "opt-discard", By(FILTER_TESTS, "alignment_and_limits_shape_what_the_child_sees")),
    ("blkdebug", "max-discard", By(FILTER_TESTS, "alignment_and_limits_shape_what_the_child_sees")),
    (
        "blkdebug",
        "inject-error",
        Differs {
            with: "driver=blkdebug,inject-error.0.event=none,image.driver=null-co",
            without: "driver=blkdebug,image.driver=null-co",
            commands: &["read 0 512"],
        },
    ),
    ("blkdebug", "set-state", By("crates/control/tests/it/blkdebug.rs", "set-state")),
    ("blkdebug", "take-child-perms", By(FILTER_TESTS, "permissions_are_taken_and_kept_from_others")),
    ("blkdebug", "unshare-child-perms", By(FILTER_TESTS, "permissions_are_taken_and_kept_from_others")),
    (
        "copy-before-write",
        "on-cbw-error",
        By(CBW_TESTS, "a_snapshot_breaks_instead_of_the_guest_if_so_wished"),
    ),
    ("copy-before-write", "cbw-timeout", By(CBW_TESTS, "a_slow_target_is_given_up")),
    ("copy-before-write", "min-cluster-size", By(CBW_TESTS, "min-cluster-size")),
    (
        "preallocate",
        "prealloc-align",
        By(PREALLOCATE_TESTS, "a_growing_file_gets_more_than_it_was_asked_for_and_gives_it_back"),
    ),
    (
        "preallocate",
        "prealloc-size",
        By(PREALLOCATE_TESTS, "a_growing_file_gets_more_than_it_was_asked_for_and_gives_it_back"),
    ),
];

/// `detect-zeroes` was a row that nobody read. Every option of every driver is shown to do something, or says in its
/// help that it has no effect, and asks for nothing that could be missed.
#[test]
fn every_option_of_every_driver_does_something() {
    let b = Bench::new();
    std::fs::write(
        b.path("rules"),
        "[inject-error]\nevent = \"read_aio\"\n[inject-error]\nevent = \"none\"\n",
    )
    .expect("a file");
    b.ok("ours/qemu-img", &["create", "-q", "-f", "raw", "base.raw", "8M"]);
    b.ok("ours/qemu-io", &["-f", "raw", "-c", "write -q -P 7 0 1M", "base.raw"]);
    let mut missing = Vec::new();
    for (driver, options) in dolmen::registry()
        .rows()
        .iter()
        .map(|row| (row.name, row.options))
        .chain([("", dolmen_graph::common_options())])
    {
        for option in options {
            let name = option.name;
            if option.hint {
                assert!(option.help.starts_with("no effect: "), "{driver} {name}: {}", option.help);
                continue;
            }
            match SHOWN.iter().find(|(d, o, _)| (*d, *o) == (driver, name)) {
                _ if option.required => {}
                None => missing.push(format!("{driver} {name}")),
                Some((_, _, By(file, test))) => is_there(file, test),
                Some((_, _, Differs { with, without, commands })) => {
                    let outcome = |options: &str| {
                        full(&b, "a.raw");
                        let create =
                            ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "o.qcow2"];
                        b.ok("ours/qemu-img", &create);
                        let options = options
                            .replace("RAW", RAW)
                            .replace("OVERLAY", OVERLAY)
                            .replace("DAMAGED", DAMAGED);
                        let image = if options.contains("o.qcow2") { "o.qcow2" } else { "a.raw" };
                        let (ran, space) = run(&b, "ours/qemu-io", image, &options, commands);
                        let said = |s: &str| {
                            s.lines()
                                .filter(|l| !l.contains("ops;") && !l.contains(" bytes, "))
                                .collect::<String>()
                        };
                        (ran.code, said(&ran.out), said(&ran.err), space)
                    };
                    assert_ne!(outcome(with), outcome(without), "{driver} {name}");
                }
            }
        }
    }
    assert!(missing.is_empty(), "nothing shows that these options do something: {missing:?}");
}

/// The test is there.
fn is_there(file: &str, test: &str) {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    assert!(text.contains(test), "{file} has no test '{test}'");
}

/// Sizes from 2^63 on, and some below, were accepted and ended the process as soon as a range was rounded out
/// there: by `block_resize`, by `null-co`, by a file that was that long.
#[test]
fn no_node_is_too_large_for_its_ranges() {
    const LARGEST: u64 = (1 << 63) - (2 << 20);
    let too_large = |reply: &Json| {
        let desc = reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("accepted: {reply}"));
        assert!(desc.contains("larger than any image may be") || desc.contains("can't have"), "{desc}");
    };
    let mut d = Daemon::start(|_| serve(), &[]);
    let mut m = d.monitor();
    let null = |name: &str, size: u64| json!({"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": name, "size": size}});
    let resize = |name: &str, size: u64| json!({"execute": "block_resize", "arguments": {"node-name": name, "size": size}});
    for (name, size) in [("n", 1 << 20), ("large", LARGEST), ("target", LARGEST)] {
        assert_eq!(m.ask(&null(name, size))["return"], json!({}));
    }
    m.ok("blockdev-add", json!({"driver": "raw", "node-name": "window", "file": "n", "offset": 512}));
    for size in [LARGEST + 1, (1 << 63) - 512, (1 << 63) - 1, 1 << 63, u64::MAX] {
        too_large(&m.ask(&null("x", size)));
        for node in ["n", "window", "large"] {
            too_large(&m.ask(&resize(node, size)));
        }
    }
    // What lies over the largest node, and copies of it, have ranges that are rounded out to their own units.
    for (driver, file) in [("raw", "large"), ("copy-on-read", "large")] {
        m.ok("blockdev-add", json!({"driver": driver, "node-name": driver, "file": file}));
    }
    for command in ["blockdev-mirror", "blockdev-backup"] {
        m.ok(command, json!({"job-id": "j", "device": "raw", "target": "target", "sync": "full"}));
        m.ok("job-cancel", json!({"id": "j"}));
        eventually("the end of the job", || (m.ok("query-jobs", json!({})) == json!([])).then_some(()));
    }
}
