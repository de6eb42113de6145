//! The bytes that a daemon holds locked in each configuration, row by row of the table that
//! other programs rely on, and the same read from QEMU's daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use crate::daemon::{Daemon, by_established_name, established, eventually};
use crate::peer::Bench;

pub(crate) type Bytes = BTreeMap<String, BTreeSet<u64>>;

/// Locked bytes of a process by file name.
pub(crate) fn held(pid: u32) -> Bytes {
    let mut out = Bytes::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process").flatten() {
        let Ok(target) = std::fs::read_link(fd.path()) else { continue };
        let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_string_lossy());
        let Ok(text) = std::fs::read_to_string(info) else { continue };
        for line in text.lines().filter(|l| l.starts_with("lock:")) {
            // lock: 1: OFDLCK ADVISORY READ -1 fe:00:123 100 101
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., first, last] = words[..] else { continue };
            let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
            let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
            out.entry(name).or_default().extend(first..=last);
        }
    }
    out
}

fn bytes_of(command: impl FnOnce(&Path) -> Command, args: &[String]) -> Bytes {
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    args.extend(["--pidfile", "DIR/pid"]);
    let daemon = Daemon::start(command, &args);
    // The pid file is written once the command line has been carried out.
    eventually("the pid file", || daemon.path("pid").exists().then_some(()));
    held(daemon.child.id())
}

#[test]
fn each_row_of_the_table() {
    let b = Bench::new();
    let at = |name: &str| b.path(name).display().to_string();
    b.ok("dolmen", &["img", "create", "-q", "-f", "raw", "raw.img", "1M"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);

    let file = |name: &str, more: &str| format!("driver=file,node-name=f,filename={}{more}", at(name));
    let top = format!("driver=qcow2,node-name=top,file.driver=file,file.filename={}", at("top.qcow2"));
    let server = "addr.type=unix,addr.path=DIR/n.sock";
    let export = |node: &str, writable: &str| format!("type=nbd,id=e,node-name={node},writable={writable}");
    let (blockdev, nbd, exported) = ("--blockdev", "--nbd-server", "--export");
    let base_ro: (&str, &[u64]) = ("base.qcow2", &[100, 201, 203]);
    let rw: &[u64] = &[100, 101, 103, 201, 203];
    let cor: &[u64] = &[100, 101, 102, 103, 201, 203];
    let over = format!("{blockdev} driver=copy-on-read,node-name=c,file=top");
    type Row<'a> = (&'a str, Vec<String>, Vec<(&'a str, &'a [u64])>);
    let rows: Vec<Row<'_>> = vec![
        ("a file nobody uses", vec![format!("{blockdev} {}", file("raw.img", ""))], vec![]),
        (
            "raw, exported read-only",
            vec![
                format!("{blockdev} {}", file("raw.img", "")),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("f", "off")),
            ],
            vec![("raw.img", &[100, 203])],
        ),
        (
            "raw, exported writable",
            vec![
                format!("{blockdev} {}", file("raw.img", "")),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("f", "on")),
            ],
            vec![("raw.img", &[100, 101, 203])],
        ),
        ("qcow2, nobody uses it", vec![format!("{blockdev} {top}")], vec![("top.qcow2", rw), base_ro]),
        (
            "qcow2, exported writable",
            vec![
                format!("{blockdev} {top}"),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("top", "on")),
            ],
            vec![("top.qcow2", rw), base_ro],
        ),
        (
            "qcow2, exported read-only",
            vec![
                format!("{blockdev} {top}"),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("top", "off")),
            ],
            vec![("top.qcow2", rw), base_ro],
        ),
        (
            "copy-on-read over qcow2",
            vec![format!("{blockdev} {top}"), over],
            vec![("top.qcow2", cor), base_ro],
        ),
        (
            "read-only qcow2, exported read-only",
            vec![
                format!("{blockdev} {top},read-only=on"),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("top", "off")),
            ],
            vec![("top.qcow2", &[100, 201, 203]), base_ro],
        ),
        (
            "shared by force",
            vec![
                format!("{blockdev} {top},read-only=on,force-share=on"),
                format!("{nbd} {server}"),
                format!("{exported} {}", export("top", "off")),
            ],
            vec![("top.qcow2", &[100]), ("base.qcow2", &[100])],
        ),
    ];
    let peer = established().is_some();
    for (what, args, want) in rows {
        let args: Vec<String> = args.iter().flat_map(|a| a.split(' ').map(str::to_owned)).collect();
        let want: Bytes =
            want.into_iter().map(|(n, b)| (n.to_owned(), b.iter().copied().collect())).collect();
        assert_eq!(bytes_of(by_established_name, &args), want, "{what}: ours");
        if peer {
            let theirs = bytes_of(|_| established().expect("there"), &args);
            assert_eq!(theirs, want, "{what}: QEMU's daemon");
        }
    }
}
