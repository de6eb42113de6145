//! Which events `blkdebug` hears for which request: the same as in QEMU.
//!
//! A configuration makes the state of `blkdebug` a set of bits: each of a few events sets its own. At the end comes a
//! request of which one event is known; its error number tells the state. So a run of the tool says for all these events
//! at once whether they happened, and nothing fails on the way.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, established};
use crate::peer::{Bench, is_reference};

/// Events told apart in one run: the number of rules doubles with each.
const AT_ONCE: usize = 7;
/// Error numbers from here on have no name, so that tools print them.
const ERRORS: usize = 1000;

/// The last request, its event and its type.
struct Last(&'static str, &'static str, &'static str);

const READ: Last = Last("read 1114112 4k", "read_aio", "read");
const WRITE: Last = Last("write 1114112 4k", "pwritev", "write");
const ZEROES: Last = Last("write -z 1114112 4k", "pwritev_zero", "write-zeroes");

fn rules(events: &[&str], last: &Last) -> String {
    let mut out = String::new();
    for set in 0..1usize << events.len() {
        for (bit, event) in events.iter().enumerate().filter(|(bit, _)| set & (1 << bit) == 0) {
            let (from, to) = (set + 1, (set | 1 << bit) + 1);
            writeln!(out, "[set-state]\nevent = \"{event}\"\nstate = \"{from}\"\nnew_state = \"{to}\"")
                .expect("text");
        }
        let Last(_, event, kind) = last;
        let (state, errno) = (set + 1, ERRORS + set);
        writeln!(
            out,
            "[inject-error]\nevent = \"{event}\"\niotype = \"{kind}\"\nstate = \"{state}\"\nerrno = \"{errno}\"\nonce = \"on\""
        )
        .expect("text");
    }
    out
}

/// The events of `all` that happen.
fn heard(
    b: &Bench,
    tool: &str,
    image: &str,
    stack: &dyn Fn(Json) -> Json,
    commands: &[&str],
    last: &Last,
    all: &[&'static str],
) -> BTreeSet<&'static str> {
    let mut out = BTreeSet::new();
    for events in all.chunks(AT_ONCE) {
        std::fs::copy(b.path(image), b.path("work.img")).expect("a copy");
        std::fs::write(b.path("rules.cfg"), rules(events, last)).expect("a file");
        let name = format!("json:{}", stack(json!({"driver": "blkdebug", "config": "rules.cfg"})));
        let mut args = vec!["-t", "writeback", "-d", "unmap"];
        commands.iter().chain([&last.0]).for_each(|c| args.extend(["-c", c]));
        args.push(&name);
        let ran = b.run(tool, &args);
        let text = format!("{}{}", ran.out, ran.err);
        let errno = text.split("Unknown error ").nth(1).map(|t| t.chars().take_while(char::is_ascii_digit));
        let errno = errno.and_then(|digits| digits.collect::<String>().parse::<usize>().ok());
        let set = errno.unwrap_or_else(|| panic!("{tool} {commands:?}: {text}")) - ERRORS;
        out.extend(events.iter().enumerate().filter(|(bit, _)| set & (1 << bit) != 0).map(|(_, e)| *e));
    }
    out
}

fn over(driver: &str, debug: Json) -> Json {
    json!({"driver": driver, "file": debug})
}

fn on(mut debug: Json, image: Json) -> Json {
    debug["image"] = image;
    debug
}

fn file() -> Json {
    json!({"driver": "file", "filename": "work.img"})
}

fn bench() -> Option<Bench> {
    let b = Bench::with_peers()?;
    is_reference(&b, "the events of blkdebug").then_some(())?;
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 1 0 4M", "base.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    b.ok("qemu-io", &["-c", "write -P 2 1M 128k", "top.qcow2"]);
    b.ok("qemu-img", &["create", "-q", "-f", "raw", "a.raw", "8M"]);
    let small = "cluster_size=512,refcount_bits=64";
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", small, "small.qcow2", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 2 1M 128k", "small.qcow2"]);
    Some(b)
}

/// Compares both tools.
#[track_caller]
fn same(
    b: &Bench,
    image: &str,
    stack: &dyn Fn(Json) -> Json,
    commands: &[&str],
    last: &Last,
    all: &[&'static str],
) {
    let ours = heard(b, "ours/qemu-io", image, stack, commands, last, all);
    let theirs = heard(b, "qemu-io", image, stack, commands, last, all);
    assert_eq!(ours, theirs, "{} with {commands:?}", stack(json!({})));
}

const OF_BLOCKS: &[&str] = &[
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "flush_to_os",
    "flush_to_disk",
    "write_aio",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "read_aio",
    "cor_write",
];

#[test]
fn of_raw_and_of_blkdebug_itself() {
    let Some(b) = bench() else { return };
    let raw = |d: Json| over("raw", on(d, file()));
    for commands in [
        &["write 1M 4k"][..],
        &["write 1M 4k", "flush"],
        &["flush"],
        &["discard 1M 64k"],
        &["write -z 1M 64k"],
        &[],
    ] {
        same(&b, "a.raw", &raw, commands, &READ, OF_BLOCKS);
    }
    let picky = |mut d: Json| {
        d["align"] = 4096.into();
        d["max-transfer"] = 8192.into();
        over("raw", on(d, file()))
    };
    for command in ["write 1048577 4095", "write 1M 100", "write 1048577 100", "write 1048577 16k"] {
        same(&b, "a.raw", &picky, &[command], &READ, OF_BLOCKS);
    }
    for command in ["write -z 1048577 100", "write -z 1048577 16k", "write -z 1M 5000"] {
        same(&b, "a.raw", &picky, &[command], &READ, OF_BLOCKS);
    }
    let bare = |d: Json| on(d, file());
    same(&b, "a.raw", &bare, &["write 1M 4k"], &ZEROES, OF_BLOCKS);
    same(&b, "a.raw", &bare, &["read 1M 4k"], &WRITE, OF_BLOCKS);
    same(&b, "a.raw", &bare, &["write -z 1M 4k"], &WRITE, OF_BLOCKS);
}

#[test]
fn of_copy_on_read() {
    let Some(b) = bench() else { return };
    let above = |d: Json| over("copy-on-read", on(d, json!({"driver": "qcow2", "file": file()})));
    let below = |d: Json| over("copy-on-read", json!({"driver": "qcow2", "file": on(d, file())}));
    for command in ["read 0 4k", "read 1M 4k", "read 1M 1M"] {
        same(&b, "top.qcow2", &above, &[command], &WRITE, OF_BLOCKS);
    }
    same(&b, "top.qcow2", &above, &["write 0 4k", "flush"], &ZEROES, OF_BLOCKS);
    // The copy is an ordinary write below the format.
    same(
        &b,
        "top.qcow2",
        &below,
        &["read 0 4k"],
        &READ,
        &["cor_write", "write_aio", "pwritev", "cluster_alloc"],
    );
}

const OF_QCOW2: &[&str] = &[
    "reftable_load",
    "l2_load",
    "l2_update",
    "l1_update",
    "l2_alloc_write",
    "read_backing_aio",
    "write_aio",
    "cow_read",
    "cow_write",
    "refblock_load",
    "refblock_alloc",
    "cluster_alloc",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev",
    "pwritev_done",
    "l2_alloc_cow_read",
    "read_compressed",
    "l1_grow_activate_table",
];

#[test]
fn of_qcow2() {
    let Some(b) = bench() else { return };
    let image = |d: Json| over("qcow2", on(d, file()));
    for commands in [
        &["read 0 4k"][..],
        &["write 1M 64k", "flush"],
        &["write 0 4k", "flush"],
        &["write 0 64k", "flush"],
        &["write -z 1M 64k", "flush"],
        &["write -z 0 4k", "flush"],
        &["discard 1M 64k", "flush"],
        &["flush"],
    ] {
        same(&b, "top.qcow2", &image, commands, &READ, OF_QCOW2);
    }
}

/// Tables that are new are written once here; so `l2_update` and `refblock_alloc_hookup` are not compared, nor
/// the flushes that come between.
#[test]
fn of_tables_that_grow() {
    let Some(b) = bench() else { return };
    let image = |d: Json| over("qcow2", on(d, file()));
    let new = ["l1_update", "l2_alloc_write", "refblock_alloc_write", "refblock_alloc_write_blocks"];
    let tables = [
        "reftable_grow",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "cluster_free",
    ];
    let all: Vec<&str> = new.into_iter().chain(tables).collect();
    for commands in [&["write 4M 512", "flush"][..], &["write 0 64k", "flush"]] {
        same(&b, "small.qcow2", &image, commands, &READ, &all);
    }
    let grown = ["write 0 1M", "write 2M 4M", "flush"];
    let without = |skip: &str| all.iter().copied().filter(|e| *e != skip).collect::<Vec<_>>();
    // Here the blocks of a table that grows are all written with it.
    same(&b, "small.qcow2", &image, &grown, &READ, &without("refblock_alloc_write"));
    same(&b, "small.qcow2", &image, &["truncate 64M"], &READ, &all);
}

/// What `blkdebug` holds on its image, with nobody above and with a writer; and whom that keeps out.
#[test]
fn permissions_of_the_image() {
    let story = |command: &dyn Fn(&std::path::Path) -> std::process::Command, held: &Json| -> Vec<Json> {
        let mut d = Daemon::start(command, &["--nbd-server", "addr.type=unix,addr.path=DIR/nbd.sock"]);
        let mut m = d.monitor();
        let mut said = Vec::new();
        m.ok("blockdev-add", json!({"driver": "null-aio", "node-name": "n", "size": 1 << 20}));
        let mut debug = json!({"driver": "blkdebug", "node-name": "d", "image": "n"});
        debug.as_object_mut().expect("an object").extend(held.as_object().cloned().expect("an object"));
        m.ok("blockdev-add", debug);
        let image = |m: &mut Monitor| {
            let graph = m.ok("x-debug-query-block-graph", json!({}));
            let edges = graph["edges"].as_array().expect("edges");
            let edge = edges.iter().find(|e| e["name"] == "image").expect("blkdebug's").clone();
            json!([edge["perm"], edge["shared-perm"]])
        };
        said.push(image(&mut m));
        for (id, node, writable) in [("r", "n", false), ("w", "n", true), ("a", "d", true)] {
            let reply = m.ask(&json!({"execute": "block-export-add", "arguments":
                {"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable}}));
            said.push(json!([id, reply.get("error").is_none(), image(&mut m)]));
            if reply.get("error").is_none() {
                m.ok("block-export-del", json!({"id": id}));
            }
        }
        said
    };
    if established().is_none() {
        return;
    }
    for held in [
        json!({}),
        json!({"take-child-perms": ["write"]}),
        json!({"take-child-perms": ["write", "consistent-read", "resize", "write-unchanged", "write"]}),
        json!({"unshare-child-perms": ["write"]}),
        json!({"unshare-child-perms": ["write", "consistent-read", "write-unchanged", "resize"]}),
        json!({"unshare-child-perms": ["consistent-read"], "take-child-perms": ["write-unchanged"]}),
    ] {
        let theirs = story(&|_| established().expect("installed"), &held);
        assert_eq!(story(&by_established_name, &held), theirs, "{held}");
    }
}
