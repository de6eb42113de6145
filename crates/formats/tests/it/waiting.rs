//! What happens while requests wait: many at once, failing ones; and copy-on-read. Those that are given up are in `late`.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use dolmen_graph::{Cx, Limits};
use dolmen_rt::Rt;
use dolmen_sim::{DiskConfig, Fault, FaultAction, Harness, Image, Leaf, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{ErrorKind, OpKind, Options, ReadFlags, Span, Value, WriteFlags};

use crate::support::{EVERYTHING, Files, REGISTRY, assert_clean, create, guest_view, node, open, own_check};

const QUIET: DiskConfig = DiskConfig { latency_ns_max: 50_000, request_alignment: 1, log: false };

/// An empty image on a disk that takes its time.
async fn slow_image(rt: &Rt, size: u64, cluster: u64) -> SimDisk {
    let options = Options::new().with("size", size).with("cluster_size", cluster);
    let made = create(rt, options).await.unwrap();
    SimDisk::new(made.image(), QUIET)
}

async fn open_slow(rt: &Rt, disk: &SimDisk, base: Option<&MemoryDisk>) -> Harness {
    let mut leaves = vec![Leaf::new("leaf", disk.clone())];
    let mut options = node("qcow2", "leaf").with("discard", "unmap").with("backing", Value::Null);
    if let Some(base) = base {
        leaves.push(Leaf::read_only("base", base.clone()));
        options.set("backing", node("raw", "base").with("read-only", true).into_value());
    }
    Harness::open(rt, REGISTRY, leaves, options, EVERYTHING).await.unwrap()
}

fn still(disk: &SimDisk) -> MemoryDisk {
    MemoryDisk::new(disk.image())
}

#[test]
fn many_requests_at_once() {
    for (seed, cluster) in [(1, 512u64), (2, 4096), (3, 65536), (4, 65536)] {
        Sim::run(seed, |rt| async move {
            const TASKS: u64 = 8;
            let part = cluster * 9 + 512 * 3;
            let disk = slow_image(&rt, part * TASKS, cluster).await;
            let base: Vec<u8> = (0..part * TASKS - 5000).map(|i| (i / 1000) as u8).collect();
            let base = (seed % 2 == 0).then(|| MemoryDisk::new(Image::from_bytes(&base)));
            let h = open_slow(&rt, &disk, base.as_ref()).await;
            let before = h.user().read(0, (part * TASKS) as usize).await.unwrap();
            let model = Rc::new(RefCell::new(before));
            let done = Rc::new(RefCell::new(0));
            // Each task has its own part of the disk, but neighbours share clusters.
            for task in 0..TASKS {
                let (user, model, done) = (h.user(), model.clone(), done.clone());
                rt.spawn(async move {
                    let mut r = Random::new(seed * 100 + task);
                    for _ in 0..60 {
                        let len = 1 + r.below(cluster * 2);
                        let at = task * part + r.below(part - len);
                        let range = at as usize..(at + len) as usize;
                        match r.below(8) {
                            0..=3 => {
                                let byte = 1 + r.below(255) as u8;
                                user.write(at, &vec![byte; len as usize], WriteFlags::NONE).await.unwrap();
                                model.borrow_mut()[range].fill(byte);
                            }
                            4 => {
                                let span = Span::new(at, len);
                                user.write_zeroes(span, WriteFlags::MAY_UNMAP).await.unwrap();
                                model.borrow_mut()[range].fill(0);
                            }
                            5 => user.flush().await.unwrap(),
                            6 => {
                                let got =
                                    user.read_with(at, len as usize, ReadFlags::POPULATE).await.unwrap();
                                assert!(got == model.borrow()[range], "populating read {at}+{len}");
                            }
                            _ => {
                                let got = user.read(at, len as usize).await.unwrap();
                                assert!(got == model.borrow()[range], "read {at}+{len}");
                            }
                        }
                    }
                    *done.borrow_mut() += 1;
                });
            }
            while *done.borrow() < TASKS {
                rt.sleep(Duration::from_millis(1)).await;
            }
            let len = model.borrow().len();
            let all = h.user().read(0, len).await.unwrap();
            assert!(all == *model.borrow());
            h.close().await.unwrap();
            let check = own_check(&rt, &still(&disk)).await;
            assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
            let files = Files::new();
            let path = files.put("x.qcow2", &still(&disk));
            assert_clean(&path);
            if base.is_none() {
                assert!(guest_view(&files, &path) == *model.borrow());
            }
        });
    }
}

#[test]
fn failing_writes_and_flushes_lose_nothing_that_was_acknowledged() {
    for seed in 0..15 {
        Sim::run(seed, |rt| async move {
            let cluster = if seed % 2 == 0 { 512u64 } else { 4096 };
            let size = cluster * 60;
            let disk = slow_image(&rt, size, cluster).await;
            let h = open_slow(&rt, &disk, None).await;
            let mut r = Random::new(seed);
            let mut model = vec![0u8; size as usize];
            let mut failures = 0;
            for _ in 0..200u64 {
                let user = h.user();
                if r.below(4) == 0 {
                    let kind = if r.below(2) == 0 { OpKind::Write } else { OpKind::Flush };
                    let error = if r.below(2) == 0 { ErrorKind::Io } else { ErrorKind::NoSpace };
                    disk.inject(Fault { kind, skip: r.below(4), times: 1, action: FaultAction::Fail(error) });
                }
                let len = 1 + r.below(cluster * 3);
                let at = r.below(size - len);
                let range = at as usize..(at + len) as usize;
                let byte = r.below(256) as u8;
                let result = match r.below(4) {
                    0 => user.flush().await,
                    1 => {
                        let result = user.write_zeroes(Span::new(at, len), WriteFlags::NONE).await;
                        if result.is_ok() {
                            model[range.clone()].fill(0);
                        }
                        result
                    }
                    _ => {
                        let result = user.write(at, &vec![byte; len as usize], WriteFlags::NONE).await;
                        if result.is_ok() {
                            model[range.clone()].fill(byte);
                        }
                        result
                    }
                };
                if result.is_err() {
                    failures += 1;
                    let now = user.read(at, len as usize).await.unwrap();
                    model[range].copy_from_slice(&now);
                }
            }
            disk.heal();
            assert!(failures > 0);
            assert!(h.user().read(0, size as usize).await.unwrap() == model);
            h.user().flush().await.unwrap();
            h.close().await.unwrap();
            let check = own_check(&rt, &still(&disk)).await;
            assert_eq!(check.corruptions, 0, "{:?}", check.messages);
            let h = open(&rt, &still(&disk), None).await.unwrap();
            assert!(h.user().read(0, size as usize).await.unwrap() == model);
            h.close().await.unwrap();
        });
    }
}

#[test]
fn a_full_disk_is_an_error_and_not_the_end() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 64 << 20, 65536).await;
        let h = open_slow(&rt, &disk, None).await;
        let fault = Fault {
            kind: OpKind::Resize,
            skip: 0,
            times: u64::MAX,
            action: FaultAction::Fail(ErrorKind::NoSpace),
        };
        disk.inject(fault);
        let e = h.user().write(0, &[1; 4096], WriteFlags::NONE).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
        assert_eq!(h.user().read(0, 4096).await.unwrap(), [0; 4096]);
        disk.heal();
        h.user().write(0, &[1; 4096], WriteFlags::NONE).await.unwrap();
        h.close().await.unwrap();
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
    });
}

/// A shrink that failed in the middle (no space for a table, a flush that fails) had unmapped what it was to cut off, and
/// left the size as it was: the disk read zeroes there. Now the header comes first, and what an interrupted shrink leaves
/// mapped behind the end does not show up when the image grows again.
#[test]
fn a_shrink_that_fails_takes_nothing_away() {
    let (size, cluster) = (256 << 10, 4096);
    let base = MemoryDisk::new(Image::from_bytes(&vec![7; size]));
    let mut failed = 0;
    for (kind, skip, below) in [OpKind::Write, OpKind::Flush, OpKind::Read]
        .into_iter()
        .flat_map(|k| (0..8).flat_map(move |s| [(k, s, false), (k, s, true)]))
    {
        failed += Sim::run(skip + 1, |rt| {
            let base = base.clone();
            async move {
                let base = below.then_some(&base);
                let disk = slow_image(&rt, size as u64, cluster).await;
                let h = open_slow(&rt, &disk, base).await;
                h.user().write(0, &vec![3; size], WriteFlags::NONE).await.unwrap();
                h.close().await.unwrap();
                // The tables have to be read again.
                let h = open_slow(&rt, &disk, base).await;
                disk.inject(Fault { kind, skip, times: 1, action: FaultAction::Fail(ErrorKind::NoSpace) });
                let half = size / 2 + 512;
                let result = h.user().resize(half as u64).await;
                disk.heal();
                let what = format!("{kind:?} {skip} {below} {result:?}");
                let now = if result.is_ok() { half } else { size };
                assert_eq!(h.user().size(), now as u64, "{what}");
                assert!(h.user().read(0, now).await.unwrap().iter().all(|b| *b == 3), "{what}");
                h.user().resize(half as u64).await.unwrap();
                h.user().resize(size as u64).await.unwrap();
                let bytes = h.user().read(0, size).await.unwrap();
                assert!(bytes[..half].iter().all(|b| *b == 3), "{what}");
                assert!(bytes[half..].iter().all(|b| *b == 0), "{what}");
                h.close().await.unwrap();
                let check = own_check(&rt, &still(&disk)).await;
                // What a refcount is that can't be read stays.
                let leaks = if kind == OpKind::Read { check.leaks } else { 0 };
                assert_eq!((check.corruptions, check.leaks), (0, leaks), "{what}: {:?}", check.messages);
                u32::from(result.is_err())
            }
        });
    }
    assert!(failed > 4, "{failed}");
}

/// A table that is longer than what one refcount block counts found no room: each missing block was put into the first of
/// the clusters that it counts, in the middle of the run that was looked for, and the file grew until the disk was full.
#[test]
fn long_tables_find_room_among_small_clusters() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 1 << 20, 512).await;
        let h = open_slow(&rt, &disk, None).await;
        for size in [520u64 << 20, 2 << 30, 5 << 30] {
            h.user().resize(size).await.unwrap();
            h.user().write(size - 512, &[4; 512], WriteFlags::NONE).await.unwrap();
            assert_eq!(h.user().size(), size);
        }
        h.close().await.unwrap();
        assert!(disk.image().to_vec().len() < 4 << 20);
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
    });
}

/// After a shrink the file is cut when the image is closed. When that failed, what lay behind the used end was taken for
/// zeroes all the same by a driver that went on (a node that is reopened): part of a new cluster showed old data.
#[test]
fn an_end_that_could_not_be_cut_off_is_not_taken_for_zeroes() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 8 << 20, 65536).await;
        let h = open_slow(&rt, &disk, None).await;
        h.user().write(4 << 20, &vec![7; 4 << 20], WriteFlags::NONE).await.unwrap();
        h.user().resize(4 << 20).await.unwrap();
        let fails = FaultAction::Fail(ErrorKind::NoSpace);
        disk.inject(Fault { kind: OpKind::Resize, skip: 0, times: u64::MAX, action: fails });
        let node = h.top();
        node.driver.close(Cx { node: &node, rt: &rt }).await.unwrap();
        disk.heal();
        h.user().write(0, &[1; 512], WriteFlags::NONE).await.unwrap();
        assert!(h.user().read(512, 65024).await.unwrap().iter().all(|b| *b == 0));
        h.close().await.unwrap();
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
    });
}

// ---- copy-on-read -----------------------------------------------------------------------------------------

#[test]
fn a_populating_read_copies_whole_clusters_once() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 40 << 20, 65536).await;
        let data: Vec<u8> =
            (0..40u64 << 20).map(|i| if i >> 20 == 3 { 0 } else { (i >> 12) as u8 | 1 }).collect();
        let base = MemoryDisk::new(Image::from_bytes(&data));
        let h = open_slow(&rt, &disk, Some(&base)).await;
        let limits: Limits = h.top().driver.limits(&h.top());
        assert_eq!(limits.cluster_size, 65536);
        let user = h.user();
        assert!(user.read_with(70_000, 4096, ReadFlags::POPULATE).await.unwrap() == data[70_000..74_096]);
        assert!(user.read_with(0, 0, ReadFlags::POPULATE).await.unwrap().is_empty());
        let writes = disk.count(OpKind::Write);
        assert!(user.read_with(65536, 65536, ReadFlags::POPULATE).await.unwrap() == data[65536..131_072]);
        assert_eq!(disk.count(OpKind::Write), writes, "allocated data are not written again");
        // Longer than one step, with a megabyte of zeroes in it, over what is there already.
        assert!(
            user.read_with(1000, 39 << 20, ReadFlags::POPULATE).await.unwrap()
                == data[1000..1000 + (39 << 20)]
        );
        drop(user);
        h.close().await.unwrap();
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
        assert_eq!(check.allocated_clusters, 39 * 16 + 1 - 16, "zeroes became zero clusters");
        // Without the base, what was touched is still there.
        let alone = open(&rt, &still(&disk), None).await.unwrap();
        assert!(alone.user().read(1000, 39 << 20).await.unwrap() == data[1000..1000 + (39 << 20)]);
        alone.close().await.unwrap();
    });
}

#[test]
fn a_populating_read_covers_the_last_cluster_and_what_nobody_has() {
    Sim::run(1, |rt| async move {
        // 1024 bytes, no backing file: one zero cluster appears.
        let disk = slow_image(&rt, 1024, 65536).await;
        let h = open_slow(&rt, &disk, None).await;
        assert_eq!(h.user().read_with(0, 1024, ReadFlags::POPULATE).await.unwrap(), [0; 1024]);
        let own = dolmen_graph::own_status(&h.top(), &rt, Span::new(0, 1024)).await.unwrap();
        assert_eq!(own, (true, 1024));
        h.close().await.unwrap();
        // A partial last cluster, over a longer base: nothing of the base behind the end may be kept.
        let disk = slow_image(&rt, 65536 + 1024, 65536).await;
        let base = MemoryDisk::new(Image::from_bytes(&[7; 3 * 65536]));
        let h = open_slow(&rt, &disk, Some(&base)).await;
        assert_eq!(h.user().read_with(65536, 1024, ReadFlags::POPULATE).await.unwrap(), [7; 1024]);
        h.user().resize(3 * 65536).await.unwrap();
        let all = h.user().read(0, 3 * 65536).await.unwrap();
        assert!(all[..65536 + 1024].iter().all(|b| *b == 7) && all[65536 + 1024..].iter().all(|b| *b == 0));
        h.close().await.unwrap();
    });
}

#[test]
fn prefetching_copies_without_returning() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 1 << 20, 65536).await;
        let base = MemoryDisk::new(Image::from_bytes(&[7; 1 << 20]));
        let h = open_slow(&rt, &disk, Some(&base)).await;
        h.user().read_with(0, 1 << 20, ReadFlags::POPULATE | ReadFlags::PREFETCH).await.unwrap();
        h.close().await.unwrap();
        assert_eq!(own_check(&rt, &still(&disk)).await.allocated_clusters, 16);
    });
}

#[test]
fn a_failing_copy_fails_the_read() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 1 << 20, 65536).await;
        let base = MemoryDisk::new(Image::from_bytes(&[7; 1 << 20]));
        let h = open_slow(&rt, &disk, Some(&base)).await;
        let fault =
            Fault { kind: OpKind::Write, skip: 0, times: 1, action: FaultAction::Fail(ErrorKind::NoSpace) };
        disk.inject(fault);
        let e = h.user().read_with(0, 512, ReadFlags::POPULATE).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace);
        assert_eq!(h.user().read_with(0, 512, ReadFlags::POPULATE).await.unwrap(), [7; 512]);
        h.close().await.unwrap();
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks, check.allocated_clusters), (0, 0, 1));
    });
}

// ---- space ------------------------------------------------------------------------------------------------

#[test]
fn discarded_space_is_used_again_after_one_flush() {
    Sim::run(1, |rt| async move {
        let disk = slow_image(&rt, 64 << 20, 65536).await;
        let h = open_slow(&rt, &disk, None).await;
        let user = h.user();
        user.write(0, &[1; 4 << 20], WriteFlags::NONE).await.unwrap();
        user.flush().await.unwrap();
        user.discard(Span::new(0, 4 << 20)).await.unwrap();
        let discards = disk.count(OpKind::Discard);
        // Not before the change is on disk: a power loss could bring the old mapping back.
        user.write(8 << 20, &[2; 1 << 20], WriteFlags::NONE).await.unwrap();
        assert_eq!(disk.count(OpKind::Discard), discards);
        user.flush().await.unwrap();
        assert!(disk.count(OpKind::Discard) > discards, "the file got its space back");
        user.write(16 << 20, &[3; 4 << 20], WriteFlags::NONE).await.unwrap();
        drop(user);
        h.close().await.unwrap();
        let check = own_check(&rt, &still(&disk)).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
        // Header and tables, 4 MiB, 1 MiB; the last 4 MiB are where the first were.
        assert_eq!(check.image_end_offset, (5 << 20) + 5 * 65536);
    });
}
