//! Full disks, and ends that fail: nothing acknowledged is lost, and nobody is told that all is well when it is not.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::daemon::{Daemon, serve};

fn io(args: &[String]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
    c.arg("io").args(args).stdin(Stdio::null()).output().expect("runs")
}

fn must(tool: &str, args: &[&str]) {
    let out = Command::new(tool).args(args).stdin(Stdio::null()).output().expect("runs");
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A small file system of its own, while this lives.
struct Mounted {
    at: PathBuf,
    dir: tempfile::TempDir,
}

impl Mounted {
    /// 8 MiB of tmpfs, or of ext4 on a loop device; `None` where that is not permitted.
    fn new(kind: &str) -> Option<Mounted> {
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).expect("a mount point");
        let mut c = Command::new("mount");
        if kind == "tmpfs" {
            c.args(["-t", "tmpfs", "-o", "size=8m", "none"]);
        } else {
            let file = dir.path().join("disk");
            std::fs::File::create(&file).and_then(|f| f.set_len(8 << 20)).expect("a file");
            must("mkfs.ext4", &["-q", "-O", "^has_journal", &file.display().to_string()]);
            c.args(["-o", "loop"]).arg(&file);
        }
        match c.arg(&at).stderr(Stdio::null()).status() {
            Ok(s) if s.success() => Some(Mounted { at, dir }),
            _ => {
                eprintln!("a {kind} may not be mounted here: not compared");
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.at).status();
        // The directory must not be removed while something is mounted in it.
        assert!(unmounted.is_ok_and(|s| s.success()), "{} is still mounted", self.dir.path().display());
    }
}

/// Writes until the disk is full and some more, without a flush, and ends cleanly. Returns which were acknowledged.
fn fill(image: &Path) -> Vec<u64> {
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
    let at = |i: u64| (i * 97 % 256) << 16;
    for i in 0..200 {
        args.extend(["-c".to_owned(), format!("write -P {} {} 64k", i % 255 + 1, at(i))]);
    }
    args.push(image.display().to_string());
    let out = io(&args);
    let text = String::from_utf8_lossy(&out.stdout);
    let done: Vec<u64> = (0..200).filter(|i| text.contains(&format!("at offset {}\n", at(*i)))).collect();
    assert!(
        String::from_utf8_lossy(&out.stderr).contains("No space left") || text.contains("No space left"),
        "{text}"
    );
    // Reading back what was acknowledged, in one go.
    let mut args = vec!["-r".to_owned(), "-f".to_owned(), "qcow2".to_owned()];
    for i in &done {
        args.extend(["-c".to_owned(), format!("read -q -P {} {} 64k", i % 255 + 1, at(*i))]);
    }
    args.push(image.display().to_string());
    let read = io(&args);
    let said = format!("{}{}", String::from_utf8_lossy(&read.stdout), String::from_utf8_lossy(&read.stderr));
    assert!(read.status.success() && !said.contains("failed"), "{said}");
    done
}

/// The story: on a tmpfs of 8 MiB more than 120 writes were acknowledged, and after a clean end none was there.
#[test]
fn a_full_file_system_keeps_every_acknowledged_write() {
    for kind in ["tmpfs", "ext4"] {
        let Some(disk) = Mounted::new(kind) else { continue };
        for (name, options) in
            [("a.q", "cluster_size=64k"), ("b.q", "cluster_size=4k"), ("c.q", "cluster_size=512")]
        {
            let image = disk.at.join(name);
            let path = image.display().to_string();
            must(
                env!("CARGO_BIN_EXE_dolmen"),
                &["img", "create", "-q", "-f", "qcow2", "-o", options, &path, "16M"],
            );
            let done = fill(&image);
            assert!(done.len() > 80, "{kind}, {options}: only {} writes were accepted", done.len());
            must("qemu-img", &["check", "-q", &path]);
            std::fs::remove_file(image).expect("removed");
        }
    }
}

/// The story: `create` over a file emptied it first, and found out then that there was no space for the new image.
#[test]
fn an_image_that_does_not_fit_leaves_what_was_there() {
    let create = |args: &[&str], path: &Path| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
        c.args(["img", "create", "-q"]).args(args).arg(path).stderr(Stdio::null());
        c
    };
    for kind in ["tmpfs", "ext4"] {
        let Some(disk) = Mounted::new(kind) else { continue };
        let image = disk.at.join("t");
        let kept = |mut c: Command, size: &str| {
            std::fs::write(&image, "precious").expect("a file");
            let out = c.arg(size).output().expect("runs");
            let now = std::fs::read(&image).expect("a file");
            assert!(!out.status.success(), "{kind}: {c:?}");
            assert!(now == b"precious", "{kind}: {c:?} left {} bytes", now.len());
        };
        for mode in ["full", "falloc"] {
            let option = format!("preallocation={mode}");
            kept(create(&["-f", "raw", "-o", &option], &image), "16M");
            kept(create(&["-f", "qcow2", "-o", &option], &image), "16M");
        }
        if kind == "ext4" {
            kept(create(&["-f", "raw"], &image), "17T");
        }
        kept(create(&["-f", "qcow2", "-o", "preallocation=metadata"], &image), "64G");
        // Hardly anything is left.
        let all = disk.at.join("all");
        let mut file = std::fs::File::create(&all).expect("a file");
        while std::io::Write::write_all(&mut file, &[1; 16 << 10]).is_ok() {}
        kept(create(&["-f", "qcow2"], &image), "1M");
        drop(file);
        std::fs::remove_file(&all).expect("removed");
        must(env!("CARGO_BIN_EXE_dolmen"), &["img", "create", "-qfraw", &image.display().to_string(), "4M"]);
        assert_eq!(std::fs::read(&image).expect("a file"), vec![0; 4 << 20]);
    }
}

/// The story: the same daemon said nothing, and its exit code was 0.
#[test]
fn a_daemon_that_could_not_write_everything_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("a.q").display().to_string();
    for fails in [false, true] {
        must(env!("CARGO_BIN_EXE_dolmen"), &["img", "create", "-q", "-f", "qcow2", &image, "16M"]);
        let mut node = format!("driver=blkdebug,node-name=f,image.driver=file,image.filename={image}");
        if fails {
            node += ",inject-error.0.event=flush_to_disk,inject-error.0.iotype=flush,inject-error.0.errno=5";
        }
        let args = [
            "--blockdev",
            &node,
            "--blockdev",
            "driver=qcow2,node-name=q,file=f",
            "--nbd-server",
            "addr.type=unix,addr.path=DIR/nbd",
            "--export",
            "nbd,id=e,node-name=q,name=q,writable=on",
        ];
        let mut daemon = Daemon::start(|_| serve(), &args);
        let uri = format!("nbd+unix:///q?socket={}/nbd", daemon.dir.path().display());
        let _monitor = daemon.monitor();
        let write = ["-f", "raw", "-c", "write -q -P 7 0 64k", &uri].map(str::to_owned);
        let wrote = io(&write);
        let said = format!("{wrote:?}");
        assert_eq!(wrote.status.success(), !fails, "the client flushes at its end: {said}");
        must("kill", &[&daemon.child.id().to_string()]);
        assert_eq!(daemon.wait().code(), Some(i32::from(fails)));
    }
}
