//! Files that somebody cuts off while they are used, or before.

use serde_json::json;

use crate::daemon::{Daemon, by_established_name, eventually};
use crate::peer::Bench;

/// The story: a backup of an image whose file had been truncated under the daemon succeeded. The missing end was a hole
/// to the file driver, and read as zeroes.
#[test]
fn a_copy_of_a_file_that_was_cut_off_fails() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "q", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 5 0 8M", "q"]);
    std::fs::write(b.path("r"), vec![5; 8 << 20]).expect("a file");
    // All but the end is a hole.
    std::fs::write(b.path("s"), vec![5; 64 << 10]).expect("a file");
    let sparse = std::fs::File::options().write(true).open(b.path("s")).expect("opened");
    sparse.set_len(8 << 20).expect("a hole");
    for (file, driver) in [("q", "qcow2"), ("r", "raw"), ("s", "raw")] {
        for direct in [false, true] {
            let dir = tempfile::tempdir().expect("a directory");
            std::fs::copy(b.path(file), dir.path().join("image")).expect("copied");
            let mut d = Daemon::start_in(dir, by_established_name, &[]);
            let mut m = d.monitor();
            let below = json!({"driver": "file", "filename": "image", "cache": {"direct": direct}});
            m.ok("blockdev-add", json!({"driver": driver, "node-name": "n", "file": below}));
            let cut = std::fs::File::options().write(true).open(d.path("image")).expect("opened");
            cut.set_len((3 << 20) + 100).expect("cut off");
            m.ok(
                "drive-backup",
                json!({"device": "n", "job-id": "j", "target": "copy", "format": "raw",
                                        "sync": "full", "auto-dismiss": false}),
            );
            let job = eventually("the end of the job", || {
                let jobs = m.ok("query-jobs", json!({}));
                jobs.as_array()?.iter().find(|j| j["id"] == "j" && j["status"] == "concluded").cloned()
            });
            let why = job["error"].as_str().unwrap_or_else(|| panic!("{file}: the copy succeeded: {job}"));
            assert!(why.contains("cut"), "{file}: {why}");
        }
    }
}

/// The same where the file was cut off before: the image says so itself, if it is not only its last bytes that are
/// missing. QEMU's tools read zeroes.
#[test]
fn an_image_that_was_cut_off_is_not_written() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "q", "8M"]);
    b.ok("qemu-io", &["-c", "write -P 5 0 8M", "q"]);
    let file = std::fs::File::options().write(true).open(b.path("q")).expect("opened");
    file.set_len((3 << 20) + 100).expect("cut off");
    b.ok("ours/qemu-io", &["-r", "-c", "read -P 5 0 1M", "q"]);
    // QEMU's tool prints what the errno says when a request fails, and the reason when it does not open.
    for (args, words) in [
        (["-r", "-c", "read 7M 64k"], "read failed: Input/output error"),
        (["-fqcow2", "-c", "write 0 64k"], "the file has been cut off"),
    ] {
        let ran = b.command("ours/qemu-io").args(args).arg("q").output().expect("it runs");
        let said =
            format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(!ran.status.success() && said.contains(words), "{args:?}: {said}");
    }
    let ran = b.command("ours/qemu-img").args(["check", "q"]).output().expect("it runs");
    assert_eq!(ran.status.code(), Some(2), "{ran:?}");
}
