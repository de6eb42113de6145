//! Images from strangers: what the native commands refuse, and what permits it.

use crate::peer::Bench;

fn overlay(b: &Bench, image: &str, backing: &str, format: &str) {
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, image, "1M"]);
}

#[test]
fn formats_are_not_guessed() {
    let b = Bench::new();
    b.ok("dolmen", &["img", "create", "-q", "-f", "qcow2", "a", "1M"]);
    for args in [&["img", "map", "a"][..], &["img", "compare", "a", "a"], &["io", "-c", "length", "a"]] {
        let r = b.run("dolmen", args);
        assert_ne!(r.code, 0, "{args:?}");
        assert!(r.err.contains("-f auto"), "the way out is named: {args:?} {r:?}");
    }
    b.ok("dolmen", &["img", "map", "-f", "qcow2", "a"]);
    b.ok("dolmen", &["img", "map", "-f", "auto", "a"]);
    b.ok("dolmen", &["io", "-f", "auto", "-c", "length", "a"]);
    // Reading the header, and opening nothing that it names, is harmless.
    assert!(b.ok("dolmen", &["img", "info", "a"]).contains("file format: qcow2"));
    b.ok("dolmen", &["img", "check", "a"]);
    // Writing to what only looks like an image is not.
    for args in [&["img", "check", "-r", "all", "a"][..], &["img", "rebase", "-u", "-b", "", "a"]] {
        let r = b.run("dolmen", args);
        assert_eq!(r.code, 1, "{args:?} {r:?}");
        assert!(r.err.contains("-f auto"), "{args:?} {r:?}");
    }
    b.ok("dolmen", &["img", "check", "-f", "qcow2", "-r", "all", "a"]);
    // QEMU's names guess.
    b.ok("ours/qemu-img", &["map", "a"]);
}

#[test]
fn only_neighbours_are_opened() {
    let b = Bench::new();
    std::fs::create_dir(b.path("vm")).expect("vm/");
    std::fs::write(b.path("secret"), vec![0x42; 1 << 20]).expect("a file");
    std::fs::write(b.path("vm/base"), vec![0x43; 1 << 20]).expect("a file");
    std::os::unix::fs::symlink("../secret", b.path("vm/link")).expect("a link");
    overlay(&b, "vm/good", "base", "raw");
    b.ok("dolmen", &["io", "-f", "qcow2", "-r", "-c", "read -P 0x43 0 1M", "vm/good"]);

    let absolute = b.path("secret").to_string_lossy().into_owned();
    let json = format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{absolute}"}}}}"#);
    for (i, backing) in
        ["../secret", absolute.as_str(), json.as_str(), "nbd://localhost:1/x", "link"].iter().enumerate()
    {
        let image = format!("vm/bad{i}");
        overlay(&b, &image, backing, "raw");
        let r = b.run("dolmen", &["io", "-f", "qcow2", "-r", "-c", "read -v 0 16", &image]);
        assert_eq!(r.code, 1, "{backing}: {r:?}");
        assert!(!r.out.contains("42 42"), "{backing}: {r:?}");
        if *backing != "link" {
            assert!(r.err.contains("--allow-backing=anything"), "the way out is named: {backing}: {r:?}");
        }
        // info shows the name and opens nothing.
        assert!(b.ok("dolmen", &["img", "info", &image]).contains("backing file: "), "{backing}");
    }
    for image in ["vm/bad0", "vm/bad1", "vm/bad2"] {
        b.ok(
            "dolmen",
            &["io", "-f", "qcow2", "-r", "--allow-backing=anything", "-c", "read -P 0x42 0 1M", image],
        );
        b.ok("ours/qemu-io", &["-r", "-c", "read -P 0x42 0 1M", image]);
    }
    let r = b.run("dolmen", &["io", "-f", "qcow2", "-r", "--allow-backing=none", "-c", "length", "vm/good"]);
    assert_eq!(r.code, 1, "{r:?}");
}

/// A guest that writes a header into its raw disk does not get another file of the host.
#[test]
fn a_raw_disk_stays_raw() {
    let b = Bench::new();
    std::fs::write(b.path("secret"), vec![0x42; 1 << 20]).expect("a file");
    overlay(&b, "evil", "secret", "raw");
    std::fs::copy(b.path("evil"), b.path("disk.raw")).expect("the guest's disk");
    let r = b.run("dolmen", &["io", "-r", "-c", "read -v 0 4", "disk.raw"]);
    assert_eq!(r.code, 1, "{r:?}");
    let out = b.ok("dolmen", &["io", "-f", "raw", "-r", "-c", "read -v 0 4", "disk.raw"]);
    assert!(out.contains("51 46 49 fb"), "{out}");
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    let b = Bench::new();
    overlay(&b, "a", "b", "qcow2");
    // No command makes a loop, but files can be renamed.
    overlay(&b, "c", "a", "qcow2");
    std::fs::rename(b.path("c"), b.path("b")).expect("renamed");
    for program in ["dolmen", "ours/qemu-img"] {
        let args = ["img", "info", "-f", "qcow2", "--backing-chain", "a"];
        let args = if program == "dolmen" { &args[..] } else { &args[1..] };
        let r = b.run(program, args);
        assert_eq!(r.code, 1, "{r:?}");
    }
}
