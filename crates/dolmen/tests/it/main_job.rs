//! The main job, with QEMU's tools on both ends: a real ext4 file system in a
//! qcow2 image made by `qemu-img`, an overlay made by Dolmen, copy-on-read over it, an NBD
//! export of that, and clients that are not ours.

use rustix::process::Signal;

use crate::daemon::{Daemon, serve};
use crate::peer::{Bench, in_path};

/// Blocks in which two images are compared and copied, in bytes.
const BLOCK: usize = 4096;

/// A file system with files in it, as a raw image.
fn file_system(b: &Bench, name: &str) {
    let tree = b.path("tree");
    std::fs::create_dir_all(tree.join("deep/er")).expect("directories");
    for i in 0..40u32 {
        let text: Vec<u8> = (0..(i as usize + 1) * 3000).map(|k| (k as u32 * 7 + i * 131) as u8).collect();
        std::fs::write(tree.join(format!("deep/file-{i}")), text).expect("a file");
    }
    std::fs::write(tree.join("deep/er/last"), "the last file\n").expect("a file");
    let image = std::fs::File::create(b.path(name)).expect("an image");
    image.set_len(64 << 20).expect("a size");
    b.ok("mke2fs", &["-q", "-F", "-t", "ext4", "-d", "tree", name]);
}

/// The blocks in which two images differ, as (offset, length) runs.
fn differences(a: &[u8], b: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, (x, y)) in a.chunks(BLOCK).zip(b.chunks(BLOCK)).enumerate() {
        if x == y {
            continue;
        }
        let at = i * BLOCK;
        match runs.last_mut() {
            Some((start, len)) if *start + *len == at => *len += y.len(),
            _ => runs.push((at, y.len())),
        }
    }
    runs
}

/// The daemon with copy-on-read over the overlay, and the URI of its export.
fn serve_overlay(b: &Bench) -> (Daemon, String) {
    let overlay = format!(
        "qcow2,node-name=overlay,file.driver=file,file.filename={}",
        b.path("overlay.qcow2").display()
    );
    let mut daemon = Daemon::start(
        |_| serve(),
        &[
            "--blockdev",
            &overlay,
            "--blockdev",
            "copy-on-read,node-name=cor,file=overlay",
            "--nbd-server",
            "addr.type=unix,addr.path=DIR/nbd.sock",
            "--export",
            "nbd,id=exp0,node-name=cor,name=disk,writable=on",
        ],
    );
    daemon.monitor();
    let uri = format!("nbd+unix:///disk?socket={}", daemon.path("nbd.sock").display());
    (daemon, uri)
}

/// Ends a daemon as a service manager does.
fn terminate(mut daemon: Daemon) {
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success(), "a daemon that is told to end does so in order");
    assert!(!daemon.path("nbd.sock").exists(), "its socket is gone");
}

#[test]
fn a_real_file_system_is_served_live_through_copy_on_read() {
    let Some(b) = Bench::with_peers() else { return };
    if let Some(missing) = ["mke2fs", "debugfs", "fsck.ext4"].iter().find(|t| in_path(t).is_none()) {
        println!("not compared: {missing} is not installed");
        return;
    }
    file_system(&b, "fs.raw");
    b.ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "fs.raw", "base.qcow2"]);
    b.ok("dolmen", &["img", "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"]);

    // What the disk has to be in the end: a file was added.
    std::fs::copy(b.path("fs.raw"), b.path("want.raw")).expect("a copy");
    std::fs::write(b.path("added"), vec![0x5a; 700_000]).expect("a file");
    b.ok("debugfs", &["-w", "-R", "write added added", "want.raw"]);
    let before = std::fs::read(b.path("fs.raw")).expect("the image");
    let want = std::fs::read(b.path("want.raw")).expect("the image");
    let changed = differences(&before, &want);
    assert!(!changed.is_empty(), "adding a file changes the disk");

    // A first client touches some ranges, a second one writes the added file.
    let touched = [(0usize, 1usize << 20), (9 << 20, 123_456), (33 << 20, 65_536)];
    let (daemon, uri) = serve_overlay(&b);
    for (offset, len) in touched {
        let command = format!("read {offset} {len}");
        b.ok("qemu-io", &["-r", "-f", "raw", "-c", &command, &uri]);
    }
    for (i, (offset, len)) in changed.iter().enumerate() {
        let part = format!("part-{i}");
        std::fs::write(b.path(&part), &want[*offset..*offset + *len]).expect("a part");
        let command = format!("write -s {part} {offset} {len}");
        b.ok("qemu-io", &["-f", "raw", "-c", &command, &uri]);
    }
    terminate(daemon);
    b.ok("qemu-img", &["check", "-f", "qcow2", "overlay.qcow2"]);

    // The base is taken away: what was touched or written is in the overlay.
    let alone =
        r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"overlay.qcow2"}}"#;
    std::fs::rename(b.path("base.qcow2"), b.path("away")).expect("moved");
    b.ok("qemu-img", &["convert", "-O", "raw", alone, "alone.raw"]);
    std::fs::rename(b.path("away"), b.path("base.qcow2")).expect("moved back");
    let overlay = std::fs::read(b.path("alone.raw")).expect("the image");
    for (offset, len) in touched.iter().chain(&changed) {
        let range = *offset..*offset + *len;
        assert!(overlay[range.clone()] == want[range], "{offset}+{len} is not in the overlay");
    }
    assert!(overlay != want, "what nobody touched was not copied");

    // A second life of the daemon; the whole disk is copied out by yet another client.
    let (daemon, uri) = serve_overlay(&b);
    if in_path("nbdcopy").is_some() {
        b.ok("nbdcopy", &[&uri, "exported.raw"]);
    } else {
        println!("not compared with nbdcopy: it is not installed");
        b.ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, "exported.raw"]);
    }
    terminate(daemon);
    let exported = std::fs::read(b.path("exported.raw")).expect("the image");
    assert!(exported == want, "the exported disk differs: {:?}", differences(&exported, &want).first());
    b.ok("fsck.ext4", &["-f", "-n", "exported.raw"]);
    b.ok("qemu-img", &["check", "-f", "qcow2", "overlay.qcow2"]);
    b.ok("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "overlay.qcow2", "want.raw"]);
}
