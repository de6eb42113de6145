//! `img check` of damaged images: exit codes, counts, and repairs that the other side
//! finds sound.

use crate::peer::Bench;

/// The file offset of the first L2 table.
fn l2(data: &[u8]) -> usize {
    let be = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().expect("8 bytes"));
    (be(be(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize
}

/// An image with data, changed by `damage`.
fn damaged(b: &Bench, name: &str, damage: impl Fn(&mut Vec<u8>)) {
    b.ok("ours/qemu-img", &["create", "-q", "-f", "qcow2", name, "10M"]);
    b.ok("ours/qemu-io", &["-c", "write -q -P 7 0 1M", name]);
    let mut data = std::fs::read(b.path(name)).expect("the image");
    damage(&mut data);
    std::fs::write(b.path(name), data).expect("the image");
}

/// The exit code and the counts.
fn verdict(b: &Bench, tool: &str, args: &[&str]) -> (i32, [u64; 4]) {
    let r = b.run(tool, &[&["check", "--output", "json"], args].concat());
    let v: serde_json::Value = serde_json::from_str(&r.out).unwrap_or_else(|e| panic!("{e}: {r:?}"));
    let n = |k: &str| v.get(k).and_then(serde_json::Value::as_u64).unwrap_or(0);
    (r.code, [n("corruptions"), n("leaks"), n("corruptions-fixed"), n("leaks-fixed")])
}

#[test]
fn leaks() {
    let b = Bench::new();
    damaged(&b, "x", |d| {
        let at = l2(d);
        d[at + 8..at + 24].fill(0);
    });
    assert_eq!(verdict(&b, "ours/qemu-img", &["x"]), (3, [0, 2, 0, 0]));
    if let Some(p) = Bench::with_peers() {
        drop(p);
        assert_eq!(verdict(&b, "qemu-img", &["x"]), (3, [0, 2, 0, 0]));
    }
    assert_eq!(verdict(&b, "ours/qemu-img", &["-r", "leaks", "x"]), (0, [0, 0, 0, 2]));
    assert_eq!(verdict(&b, "ours/qemu-img", &["x"]), (0, [0; 4]));
    if Bench::with_peers().is_some() {
        b.ok("qemu-img", &["check", "x"]);
    }
    b.ok("ours/qemu-io", &["-c", "read -P 0 64k 128k", "-c", "read -P 7 192k 64k", "x"]);
}

#[test]
fn corruption() {
    let b = Bench::new();
    // Two guest clusters with one host cluster: a refcount that is too low.
    damaged(&b, "x", |d| {
        let at = l2(d);
        d.copy_within(at..at + 8, at + 8);
    });
    let ours = verdict(&b, "ours/qemu-img", &["x"]);
    assert_eq!(ours.0, 2);
    assert!(ours.1[0] > 0);
    if Bench::with_peers().is_some() {
        assert_eq!(verdict(&b, "qemu-img", &["x"]).0, 2);
    }
    assert_eq!(verdict(&b, "ours/qemu-img", &["-r", "all", "x"]).0, 0);
    if Bench::with_peers().is_some() {
        b.ok("qemu-img", &["check", "x"]);
    }
    // Writing one of them leaves the other alone.
    b.ok("ours/qemu-io", &["-c", "write -q -P 9 0 64k", "-c", "read -P 7 64k 64k", "x"]);
}

#[test]
fn no_image_at_all() {
    let b = Bench::new();
    std::fs::write(b.path("x"), b"QFI\xfb\0\0\0\x03").expect("a file");
    let r = b.run("ours/qemu-img", &["check", "x"]);
    assert_eq!(r.code, 1, "{r:?}");
    assert!(r.err.contains("Could not open 'x'"), "{r:?}");
}
