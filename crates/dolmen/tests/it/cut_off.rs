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

/// The story: of an image whose file had been cut off before it was opened for reading, reads of the missing end failed, but
/// its block status called that end zeroes. So whoever asks before reading took it for a hole: backup, mirror and stream made
/// copies with zeroes and ended well, a stream even let go of the backing file. Found in a user's trial.
#[test]
fn a_copy_of_an_image_that_was_cut_off_before_fails() {
    let Some(b) = Bench::with_peers() else { return };
    for (compat, keep) in [("1.1", 1 << 20), ("1.1", (2 << 20) + 100), ("0.10", (1 << 20) + (32 << 10))] {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("image").to_str().expect("plain").to_owned();
        let over = dir.path().join("over").to_str().expect("plain").to_owned();
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &format!("compat={compat}"), &image, "4M"]);
        b.ok("qemu-io", &["-c", "write -P 5 0 4M", &image]);
        std::fs::File::options().write(true).open(&image).and_then(|f| f.set_len(keep)).expect("cut off");
        b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", &over]);
        let ran =
            b.command("ours/qemu-img").args(["map", "--output=json", &image]).output().expect("it runs");
        let map: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
        let zero = |e: &serde_json::Value| e["zero"] == true;
        assert!(!map.as_array().expect("a list").iter().any(zero), "{compat} {keep}: {map}");
        let mut d = Daemon::start_in(dir, by_established_name, &[]);
        let mut m = d.monitor();
        let file = |name: &str| json!({"driver": "file", "filename": name});
        m.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "n", "read-only": true, "file": file("image")}),
        );
        m.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "over", "backing": "n", "file": file("over")}),
        );
        let copy = |job: &str| json!({"device": "n", "job-id": job, "target": job, "format": "qcow2", "sync": "full", "auto-dismiss": false});
        for (job, arguments) in [
            ("drive-backup", copy("drive-backup")),
            ("drive-mirror", copy("drive-mirror")),
            ("block-stream", json!({"device": "over", "job-id": "block-stream", "auto-dismiss": false})),
        ] {
            m.ok(job, arguments);
            let ended = eventually(job, || {
                let jobs = m.ok("query-jobs", json!({}));
                let ended = |j: &&serde_json::Value| {
                    j["id"] == job && (j["status"] == "concluded" || j["status"] == "ready")
                };
                jobs.as_array()?.iter().find(ended).cloned()
            });
            let why = ended["error"].as_str().unwrap_or_else(|| panic!("{compat} {keep} {job}: {ended}"));
            assert!(why.contains("cut off"), "{compat} {keep} {job}: {why}");
            m.ok("job-dismiss", json!({"id": job}));
        }
    }
}
