//! Images that are not what they seem.

use std::os::unix::fs::FileExt;

use crate::peer::Bench;

fn patch(b: &Bench, name: &str, at: u64, bytes: &[u8]) {
    let image = std::fs::File::options().write(true).open(b.path(name)).expect("the image");
    image.write_all_at(bytes, at).expect("written");
}

fn word(b: &Bench, name: &str, at: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(b.path(name)).expect("the image").read_exact_at(&mut bytes, at).expect("read");
    u64::from_be_bytes(bytes)
}

/// The story: a qcow2 image of a version to come was not recognised, so it was taken for
/// a raw disk, whose content is then silently wrong, and which may be written.
#[test]
fn an_image_of_an_unknown_version_is_not_a_raw_disk() {
    let b = Bench::new();
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "x", "1M"]);
    patch(&b, "x", 7, &[4]);
    let runs: [&[&str]; 4] = [&["info", "x"], &["map", "x"], &["check", "x"], &["compare", "x", "x"]];
    for args in runs {
        let r = b.run("ours/qemu-img", args);
        assert_ne!(r.code, 0, "{args:?}: {r:?}");
        assert!(r.err.contains("Unsupported qcow2 version 4"), "{args:?}: {r:?}");
    }
}

/// Counts past the end of the file keep no space from anybody; both sides pass over them.
#[test]
fn refcounts_past_the_end_of_the_file() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "x", "1M"]);
    let refblock = word(&b, "x", word(&b, "x", 48));
    patch(&b, "x", refblock + 2 * 1000, &[0, 1]);
    for tool in ["qemu-img", "ours/qemu-img"] {
        let r = b.run(tool, &["check", "--output=json", "x"]);
        assert_eq!(r.code, 0, "{tool}: {r:?}");
        assert!(!r.out.contains("leaks"), "{tool}: {r:?}");
    }
}

/// Scripts give the defaults explicitly.
#[test]
fn defaults_of_what_cannot_be_made_are_accepted() {
    let b = Bench::new();
    let defaults = "compression_type=zlib,extended_l2=off,data_file_raw=off,encryption=off";
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-o", defaults, "x", "1M"]);
    for more in ["extended_l2=on", "compression_type=zstd", "encryption=on"] {
        let r = b.run("dolmen", &["img", "create", "-q", "-f", "qcow2", "-o", more, "y", "1M"]);
        assert_eq!(r.code, 1, "{r:?}");
        assert!(r.err.contains("can't be created here"), "{r:?}");
    }
}

/// The story: one damaged L1 entry hid an L2 table, so everything it maps looked leaked, and
/// repairing the "leaks" gave all of it back. The data were gone and the image was called clean.
#[test]
fn leaks_beside_a_damaged_mapping_are_not_given_back() {
    let b = Bench::new();
    let pattern = "write -P 5 0 1M";
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "good", "1M"]);
    b.ok("dolmen", &["io", "-f", "qcow2", "-c", pattern, "good"]);
    let l1 = word(&b, "good", 40);
    let entry = word(&b, "good", l1);
    // Flags and no offset; one bit that leads behind the end of the file.
    for damaged in [1u64 << 63, entry | 1 << 40] {
        std::fs::copy(b.path("good"), b.path("x")).expect("a copy");
        patch(&b, "x", l1, &damaged.to_be_bytes());
        let r = b.run("dolmen", &["img", "check", "x"]);
        assert_eq!(r.code, 2, "damage, not only leaks: {r:?}");
        let r = b.run("dolmen", &["img", "check", "-f", "qcow2", "-r", "leaks", "x"]);
        assert_eq!(r.code, 2, "{r:?}");
        // Whoever knows what the entry was gets everything back.
        patch(&b, "x", l1, &entry.to_be_bytes());
        b.ok("dolmen", &["img", "check", "x"]);
        b.ok("dolmen", &["io", "-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "x"]);

        // The whole repair makes the image usable and still gives nothing back by itself.
        patch(&b, "x", l1, &damaged.to_be_bytes());
        let r = b.run("dolmen", &["img", "check", "-f", "qcow2", "-r", "all", "x"]);
        assert_eq!(r.code, 3, "leaks are left: {r:?}");
        assert!(r.out.contains("are kept") || r.err.contains("are kept"), "{r:?}");
        // The repaired table is a copy.
        let l1 = word(&b, "x", 40);
        patch(&b, "x", l1, &entry.to_be_bytes());
        b.ok("dolmen", &["io", "-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "x"]);
        // Asked once more, it does.
        patch(&b, "x", l1, &[0; 8]);
        b.ok("dolmen", &["img", "check", "-f", "qcow2", "-r", "leaks", "x"]);
        b.ok("dolmen", &["img", "check", "x"]);
    }
}

/// The story: whatever a table was said to be was written to, the guest's data too. A count of the first data cluster
/// became the repair's idea of a count, and for compressed data and snapshots the answer was that all is well.
#[test]
fn data_that_a_table_is_said_to_be_survive_the_repair() {
    let Some(b) = Bench::with_peers() else { return };
    b.ok("qemu-img", &["create", "-q", "-f", "qcow2", "good", "4M"]);
    b.ok("qemu-io", &["-c", "write -q -c -P 3 1M 64k", "-c", "write -q -P 1 0 256k", "good"]);
    b.ok("qemu-img", &["snapshot", "-c", "s", "good"]);
    b.ok("qemu-io", &["-c", "write -q -P 2 0 64k", "good"]);
    let offset = |v: u64| v & 0x00ff_ffff_ffff_0000;
    let l2 = offset(word(&b, "good", word(&b, "good", 40)));
    let old = offset(word(&b, "good", word(&b, "good", word(&b, "good", 64))));
    let data = [word(&b, "good", l2), word(&b, "good", old), word(&b, "good", l2 + 16 * 8)];
    for (i, entry) in data.into_iter().enumerate() {
        std::fs::copy(b.path("good"), b.path("x")).expect("a copy");
        patch(&b, "x", word(&b, "x", 48), &offset(entry).to_be_bytes());
        let r = b.run("ours/qemu-img", &["check", "x"]);
        assert_eq!(r.code, 2, "{i}: {r:?}");
        b.ok("ours/qemu-img", &["check", "-r", "all", "x"]);
        b.ok("qemu-img", &["check", "x"]);
        b.ok(
            "qemu-io",
            &["-c", "read -P 2 0 64k", "-c", "read -P 1 64k 192k", "-c", "read -P 3 1M 64k", "x"],
        );
        b.ok("qemu-img", &["snapshot", "-a", "s", "x"]);
        b.ok("qemu-io", &["-c", "read -P 1 0 256k", "-c", "read -P 3 1M 64k", "x"]);
    }
}

/// Images of formats that are not there yet are refused, not taken for raw disks.
#[test]
fn foreign_images_are_not_raw_disks() {
    let b = Bench::new();
    for magic in [&b"conectix"[..], b"vhdxfile", b"KDMV", b"WithoutFreeSpace"] {
        let mut image = magic.to_vec();
        image.resize(64 << 10, 0);
        std::fs::write(b.path("x"), &image).expect("an image");
        let r = b.run("ours/qemu-img", &["info", "x"]);
        assert_eq!(r.code, 1, "{r:?}");
        assert!(r.err.contains("can't be opened here"), "{r:?}");
        let r = b.run("ours/qemu-io", &["-c", "write 4k 4k", "x"]);
        assert_ne!(r.code, 0, "{r:?}");
        assert_eq!(std::fs::read(b.path("x")).expect("the image"), image, "untouched");
        b.ok("ours/qemu-img", &["info", "-f", "raw", "x"]);
    }
}
