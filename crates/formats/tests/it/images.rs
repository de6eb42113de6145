//! Features of images that other programs make: compression, snapshots, bitmaps, damage.

use dolmen_graph::RepairWhat;
use dolmen_sim::{Random, Sim};
use dolmen_types::{ErrorKind, Options, ReadFlags, Span, WriteFlags};

use crate::support::{
    EVERYTHING, Files, REGISTRY, assert_clean, create, guest_view, must, node, open, own_check, own_repair,
    run,
};

/// A pattern that compresses, but not to nothing.
fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| b"a stone upon a stone upon a stone "[i % 34] ^ (i / 5000) as u8).collect()
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    for cluster in ["512", "4096", "65536", "2M"] {
        let files = Files::new();
        let (raw, path) = (files.path("x.raw"), files.path("x.qcow2"));
        let mut model = text(3 << 20);
        std::fs::write(&raw, &model).unwrap();
        let o = format!("cluster_size={cluster}");
        must("qemu-img", &[&"convert", &"-c", &"-f", &"raw", &"-O", &"qcow2", &"-o", &o, &raw, &path]);
        let disk = files.get("x.qcow2");
        Sim::run(7, |rt| async move {
            let before = own_check(&rt, &disk).await;
            assert_eq!((before.corruptions, before.leaks), (0, 0), "{:?}", before.messages);
            assert!(before.compressed_clusters > 0);
            let h = open(&rt, &disk, None).await.unwrap();
            let user = h.user();
            assert!(user.read(0, model.len()).await.unwrap() == model);
            for (i, at) in [5usize, 65530, 1 << 20, (3 << 20) - 700].into_iter().enumerate() {
                user.write(at as u64, &[i as u8 + 1; 600], Default::default()).await.unwrap();
                model[at..at + 600].fill(i as u8 + 1);
            }
            assert!(user.read(0, model.len()).await.unwrap() == model);
            drop(user);
            h.close().await.unwrap();
            let path = files.put("x.qcow2", &disk);
            assert_clean(&path);
            assert!(guest_view(&files, &path) == model);
        });
    }
}

#[test]
fn damaged_compressed_data_are_an_error_not_a_crash() {
    let files = Files::new();
    let (raw, path) = (files.path("x.raw"), files.path("x.qcow2"));
    std::fs::write(&raw, text(1 << 20)).unwrap();
    must("qemu-img", &[&"convert", &"-c", &"-f", &"raw", &"-O", &"qcow2", &raw, &path]);
    let mut bytes = std::fs::read(&path).unwrap();
    // The data begin behind the tables; make rubbish of the rest of the file.
    for (i, b) in bytes.iter_mut().enumerate().skip(5 << 16) {
        *b = (i * 7) as u8 | 1;
    }
    std::fs::write(&path, bytes).unwrap();
    let disk = files.get("x.qcow2");
    Sim::run(7, |rt| async move {
        let h = open(&rt, &disk, None).await.unwrap();
        let e = h.user().read(0, 1 << 20).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        h.close().await.unwrap();
    });
}

#[test]
fn internal_snapshots_stay_as_they_are() {
    for (compat, cluster) in [("0.10", "65536"), ("1.1", "512"), ("1.1", "65536")] {
        let files = Files::new();
        let path = files.path("x.qcow2");
        let o = format!("compat={compat},cluster_size={cluster}");
        must("qemu-img", &[&"create", &"-f", &"qcow2", &"-o", &o, &path, &"4M"]);
        must("qemu-io", &[&"-f", &"qcow2", &"-c", &"write -P 33 0 1M", &"-c", &"write -P 34 2M 1M", &path]);
        must("qemu-img", &[&"snapshot", &"-c", &"before", &path]);
        let old = guest_view(&files, &path);
        let disk = files.get("x.qcow2");
        Sim::run(3, |rt| async move {
            let h = open(&rt, &disk, None).await.unwrap();
            let user = h.user();
            assert_eq!(h.top().driver.describe(&h.top()).snapshots[0].name, "before");
            let mut model = old.clone();
            user.write(1000, &[1; 3000], Default::default()).await.unwrap();
            model[1000..4000].fill(1);
            user.flush().await.unwrap();
            user.write(1000, &[2; 100], Default::default()).await.unwrap();
            model[1000..1100].fill(2);
            user.write_zeroes(dolmen_types::Span::new(2 << 20, 300_000), Default::default()).await.unwrap();
            model[2 << 20..(2 << 20) + 300_000].fill(0);
            user.write((2 << 20) + 10, &[9; 10], Default::default()).await.unwrap();
            model[(2 << 20) + 10..(2 << 20) + 20].fill(9);
            assert!(user.read(0, 4 << 20).await.unwrap() == model);
            drop(user);
            h.close().await.unwrap();
            let check = own_check(&rt, &disk).await;
            assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
            let path = files.put("x.qcow2", &disk);
            assert_clean(&path);
            assert!(guest_view(&files, &path) == model);
            must("qemu-img", &[&"snapshot", &"-a", &"before", &path]);
            assert_clean(&path);
            assert!(guest_view(&files, &path) == old);
        });
    }
}

/// The numbers of the installed tool's check.
fn tool_check(path: &std::path::Path) -> [u64; 7] {
    let out = run("qemu-img", &[&"check", &"--output=json", &"-f", &"qcow2", &path]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let number = |name: &str| {
        let at = text.find(&format!("\"{name}\": "));
        at.map_or(0, |at| {
            let rest = &text[at + name.len() + 4..];
            rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
        })
    };
    [
        "corruptions",
        "leaks",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ]
    .map(number)
}

fn numbers(r: &dolmen_graph::CheckResult) -> [u64; 7] {
    [
        r.corruptions,
        r.leaks,
        r.image_end_offset,
        r.total_clusters,
        r.allocated_clusters,
        r.fragmented_clusters,
        r.compressed_clusters,
    ]
}

#[test]
fn checking_agrees_with_the_installed_tool_and_repairs_what_it_finds() {
    let files = Files::new();
    let path = files.path("x.qcow2");
    must("qemu-img", &[&"create", &"-f", &"qcow2", &path, &"64M"]);
    must(
        "qemu-io",
        &[
            &"-f",
            &"qcow2",
            &"-c",
            &"write -P 1 1M 200k",
            &"-c",
            &"write -P 2 0 300k",
            &"-c",
            &"write -z 1M 64k",
            &"-c",
            &"write -c -P 3 30M 64k",
            &"-c",
            &"write -P 4 40M 1M",
            &path,
        ],
    );
    let clean = files.get("x.qcow2");
    let want = tool_check(&path);
    let guest = guest_view(&files, &path);
    Sim::run(1, |rt| async move {
        assert_eq!(numbers(&own_check(&rt, &clean).await), want);
        // The first refcount block: cluster 2 of a new image. Some counts too high, too low, gone.
        let block = 2 << 16;
        for (what, at, value) in [
            ("count behind the end", block + 40 * 2, 1u16),
            ("too high", block + 6 * 2, 2),
            ("too low", block + 7 * 2, 0),
            ("L1 table not counted", block + 3 * 2, 0),
        ] {
            let disk = dolmen_sim::MemoryDisk::new({
                let mut image = clean.image();
                image.write(at, &value.to_be_bytes());
                image
            });
            let path = files.put("bad.qcow2", &disk);
            let tool = tool_check(&path);
            let ours = own_check(&rt, &disk).await;
            assert_eq!(numbers(&ours)[..2], tool[..2], "{what}: {:?}", ours.messages);
            // A count behind the end of the file keeps no space from anybody.
            assert_eq!(ours.corruptions + ours.leaks > 0, what != "count behind the end", "{what}");
            if ours.corruptions == 0 {
                let r = own_repair(&rt, &disk, RepairWhat::Leaks).await;
                assert_eq!((r.leaks_fixed, r.leaks), (ours.leaks, 0), "{what}");
            } else {
                let r = own_repair(&rt, &disk, RepairWhat::All).await;
                assert_eq!((r.corruptions, r.leaks), (0, 0), "{what}: {:?}", r.messages);
                assert_eq!(r.corruptions_fixed, ours.corruptions, "{what}");
            }
            let path = files.put("bad.qcow2", &disk);
            assert_clean(&path);
            assert!(guest_view(&files, &path) == guest, "{what}");
        }
    });
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let files = Files::new();
    let path = files.path("x.qcow2");
    must("qemu-img", &[&"create", &"-f", &"qcow2", &"-o", &"lazy_refcounts=on", &path, &"8M"]);
    // The tool kills itself, with refcounts not written.
    let out = run(
        "qemu-io",
        &[&"-f", &"qcow2", &"-c", &"write -P 7 0 2M", &"-c", &"flush", &"-c", &"abort", &path],
    );
    assert!(!out.status.success());
    let disk = files.get("x.qcow2");
    Sim::run(1, |rt| async move {
        assert!(own_check(&rt, &disk).await.corruptions > 0, "the image is dirty");
        let h = open(&rt, &disk, None).await.unwrap();
        assert!(!h.top().driver.describe(&h.top()).dirty);
        let user = h.user();
        assert!(user.read(0, 2 << 20).await.unwrap().iter().all(|b| *b == 7));
        user.write(3 << 20, &[8; 4096], Default::default()).await.unwrap();
        drop(user);
        h.close().await.unwrap();
        let path = files.put("x.qcow2", &disk);
        assert_clean(&path);
    });
}

#[test]
fn a_corrupt_image_is_not_written() {
    Sim::run(1, |rt| async move {
        let disk = create(&rt, Options::new().with("size", "1M")).await.unwrap();
        let mut image = disk.image();
        image.write(79, &[2]);
        let disk = dolmen_sim::MemoryDisk::new(image);
        let e = open(&rt, &disk, None).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(e.to_string().contains("cannot be opened read/write"), "{e}");
        let leaves = vec![dolmen_sim::Leaf::read_only("leaf", disk.clone())];
        let options = node("qcow2", "leaf").with("read-only", true);
        let needs = dolmen_types::Actions::D;
        let h = dolmen_sim::Harness::open(&rt, REGISTRY, leaves, options, needs).await.unwrap();
        assert_eq!(h.user().read(0, 512).await.unwrap(), [0; 512]);
        h.close().await.unwrap();
        let r = own_repair(&rt, &disk, RepairWhat::All).await;
        assert_eq!(r.corruptions, 0);
        open(&rt, &disk, None).await.unwrap().close().await.unwrap();
    });
}

#[test]
fn overlaps_are_refused_and_mark_the_image() {
    Sim::run(1, |rt| async move {
        let disk = create(&rt, Options::new().with("size", "1M")).await.unwrap();
        let h = open(&rt, &disk, None).await.unwrap();
        h.user().write(0, &[1; 65536], Default::default()).await.unwrap();
        h.close().await.unwrap();
        // The first data cluster is said to be where the L1 table is.
        let mut image = disk.image();
        let (mut l1, mut l2) = ([0u8; 8], [0u8; 8]);
        image.read(3 << 16, &mut l1);
        let table = u64::from_be_bytes(l1) & 0x00ff_ffff_ffff_fe00;
        image.read(table, &mut l2);
        image.write(table, &((1u64 << 63) | (3 << 16)).to_be_bytes());
        let disk = dolmen_sim::MemoryDisk::new(image);
        let h = open(&rt, &disk, None).await.unwrap();
        let e = h.user().write(0, &[2; 512], Default::default()).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(e.to_string().contains("overlaps with active L1 table"), "{e}");
        let e = h.user().write(65536, &[2; 512], Default::default()).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "the node can't be written any more: {e}");
        h.close().await.unwrap();
        let mut flags = [0u8; 8];
        disk.image().read(72, &mut flags);
        assert_eq!(flags, [0, 0, 0, 0, 0, 0, 0, 2], "the corrupt bit is set");
    });
}

#[test]
fn bitmaps_of_others_are_given_up_when_the_image_is_written() {
    let files = Files::new();
    let path = files.path("x.qcow2");
    must("qemu-img", &[&"create", &"-f", &"qcow2", &path, &"8M"]);
    must("qemu-img", &[&"bitmap", &"--add", &path, &"b0"]);
    let disk = files.get("x.qcow2");
    Sim::run(1, |rt| async move {
        let check = own_check(&rt, &disk).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
        let h = open(&rt, &disk, None).await.unwrap();
        let about = h.top().driver.describe(&h.top());
        assert!(about.format_specific.unwrap().to_string().contains("\"b0\""));
        h.close().await.unwrap();
        let mut bits = [0u8; 8];
        disk.image().read(88, &mut bits);
        assert_eq!(bits[7], 1, "opening alone changes nothing");
        let h = open(&rt, &disk, None).await.unwrap();
        h.user().write(0, &[1; 512], Default::default()).await.unwrap();
        disk.image().read(88, &mut bits);
        assert_eq!(bits[7], 0, "cleared before the write was acknowledged");
        h.close().await.unwrap();
    });
}

#[test]
fn features_that_are_missing_are_refused_by_name() {
    let files = Files::new();
    for (o, name) in [("extended_l2=on", "extended L2 entries"), ("data_file=d.raw", "external data file")] {
        let path = files.path("x.qcow2");
        let o = o.replace("d.raw", &files.path("d.raw").to_string_lossy());
        must("qemu-img", &[&"create", &"-f", &"qcow2", &"-o", &o, &path, &"1M"]);
        let disk = files.get("x.qcow2");
        let e = Sim::run(1, |rt| async move { open(&rt, &disk, None).await.unwrap_err() });
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains(name), "{e}");
    }
}

#[test]
fn hostile_changes_never_panic_and_never_take_much() {
    Sim::run(1, |rt| async move {
        let disk = create(&rt, Options::new().with("size", "2M").with("cluster_size", 512u64)).await.unwrap();
        let h = open(&rt, &disk, None).await.unwrap();
        for i in 0..40u64 {
            h.user().write(i * 50_000, &[i as u8 + 1; 3000], Default::default()).await.unwrap();
        }
        h.close().await.unwrap();
        let good = disk.image();
        let mut r = Random::new(11);
        for round in 0..400u64 {
            let mut image = good.clone();
            for _ in 0..1 + r.below(6) {
                // Mostly the header, and everywhere.
                let at = if r.below(2) == 0 { r.below(112) } else { r.below(good.size() - 8) };
                let bytes = match r.below(3) {
                    0 => vec![r.below(256) as u8],
                    1 => vec![0xff; 8],
                    _ => (r.below(1 << 40) << 9).to_be_bytes().to_vec(),
                };
                image.write(at, &bytes);
            }
            let disk = dolmen_sim::MemoryDisk::new(image);
            let leaves = vec![dolmen_sim::Leaf::new("leaf", disk.clone())];
            let options = node("qcow2", "leaf").with("backing", dolmen_types::Value::Null);
            let Ok(h) = dolmen_sim::Harness::open(&rt, REGISTRY, leaves, options, EVERYTHING).await else {
                continue;
            };
            let user = h.user();
            let size = user.size().min(2 << 20);
            for at in (0..size.saturating_sub(4096)).step_by(30_011) {
                let flags = if round % 2 == 0 { ReadFlags::NONE } else { ReadFlags::POPULATE };
                let _ = user.read_with(at, 4096, flags).await;
                let _ = user.write(at, &[1; 100], Default::default()).await;
            }
            let _ = user.flush().await;
            drop(user);
            let _ = h.close().await;
            let (h, edge) = crate::support::edge_to(&rt, &disk).await;
            let cx = dolmen_graph::CreateCx { file: Some(&edge), fixed: false, rt: &rt };
            let io = (cx.read().unwrap(), cx.write().unwrap(), cx.resize().unwrap());
            let repaired = dolmen_formats::qcow2::check_and_repair(io.0, io.1, io.2, RepairWhat::All).await;
            if let Ok(first) = repaired {
                // Repairing is done in one go.
                let again = dolmen_formats::qcow2::check(cx.read().unwrap()).await.unwrap();
                assert_eq!((again.corruptions, again.leaks), (first.corruptions, first.leaks), "{round}");
            }
            drop(edge);
            h.close().await.unwrap();
        }
    });
}

/// The story: a write far beyond the end of the disk reached the driver, which took the missing entry of its L1 table for damage and
/// marked a good image corrupt.
#[test]
fn a_request_beyond_the_end_is_no_damage() {
    Sim::run(1, |rt| async move {
        let disk = create(&rt, Options::new().with("size", 1u64 << 20)).await.unwrap();
        let h = open(&rt, &disk, None).await.unwrap();
        let token = h.edge.begin().await.unwrap();
        let memory = dolmen_rt::Memory::zeroed(4096);
        let v = memory.iovec();
        for at in [(1 << 20) - 512, 1 << 20, 1 << 40] {
            let span = Span::new(at, 4096);
            let write = token.write(&rt).unwrap();
            let answers = [
                write.write(span, &v, WriteFlags::NONE).await,
                write.write_zeroes(span, WriteFlags::NONE).await,
                write.discard(span, WriteFlags::NONE).await,
                token.read(&rt).unwrap().read(span, &v, ReadFlags::NONE).await,
                token.read(&rt).unwrap().status(span).await.map(drop),
            ];
            for a in answers {
                assert_eq!(a.unwrap_err().kind(), ErrorKind::OutOfBounds);
            }
        }
        drop(token);
        h.user().write(0, &[1; 512], WriteFlags::NONE).await.unwrap();
        h.close().await.unwrap();
        assert_eq!(own_check(&rt, &disk).await.corruptions, 0);
    });
}
