//! Options of nodes: each one does what it says, and none is accepted that nothing implements.

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
