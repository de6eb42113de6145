//! Requests to files, buffered and direct.

use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use dolmen_graph::{Prealloc, Where};
use dolmen_rt::Memory;
use dolmen_types::{Actions, ErrorKind, Options, ReadFlags, Span, WriteFlags};

use crate::world::{World, on_both, token};

const RW: Actions = Actions::D.with(Actions::V).with(Actions::S);

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

/// Random requests against a model in memory: aligned and not, past the end, zeroes, discards, resizes.
#[test]
fn random_requests_match_a_model() {
    for direct in [false, true] {
        on_both(move |mut w| async move {
            // Not in /tmp, which may be a tmpfs without direct I/O.
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = dir.path().join("disk");
            let mut model = pattern(50_000, 1);
            std::fs::write(&path, &model).unwrap();
            let options = Options::new()
                .with("driver", "file")
                .with("node-name", "disk")
                .with("discard", "unmap")
                .with("cache.direct", direct)
                .with("filename", path.to_str().unwrap());
            if let Err(e) = w.open(options).await {
                assert!(direct, "{e}");
                eprintln!("no direct I/O here: {e}");
                return;
            }
            let edge = w.attach("disk", RW, Actions::DATA).await.unwrap();
            let mut seed = 12345u64;
            let mut random = move |n: usize| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) as usize % n
            };
            for step in 0..400 {
                let t = token(&edge).await;
                assert_eq!(t.size(), (model.len() as u64).next_multiple_of(512), "step {step}");
                let mut at = random(60_000);
                let mut len = 1 + random(9_000);
                if random(3) == 0 {
                    (at, len) = (at & !4095, (len | 4095) + 1);
                }
                let span = Span::new(at as u64, len as u64);
                let fua = if random(4) == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
                let grow = |model: &mut Vec<u8>| {
                    if model.len() < at + len {
                        model.resize(at + len, 0);
                    }
                };
                match random(10) {
                    0..3 => {
                        let data = pattern(len, step as u8);
                        // From an odd address, too.
                        let m = Memory::zeroed(len + 1);
                        m.share().copy_from_slice(step & 1, &data);
                        let from = m.iovec().slice(step & 1, len);
                        t.write(&w.rt).unwrap().write(span, &from, fua).await.unwrap();
                        grow(&mut model);
                        model[at..at + len].copy_from_slice(&data);
                    }
                    3 => {
                        t.write(&w.rt).unwrap().write_zeroes(span, fua).await.unwrap();
                        grow(&mut model);
                        model[at..at + len].fill(0);
                    }
                    4 => {
                        t.write(&w.rt)
                            .unwrap()
                            .write_zeroes(span, fua | WriteFlags::MAY_UNMAP)
                            .await
                            .unwrap();
                        grow(&mut model);
                        model[at..at + len].fill(0);
                    }
                    5 => {
                        t.write(&w.rt).unwrap().discard(span, fua).await.unwrap();
                        let end = (at + len).min(model.len());
                        if at < end {
                            // What a discarded range reads as is not said; with holes it is zeroes.
                            let back = Memory::zeroed(end - at);
                            let span = Span::from_range(at as u64, end as u64);
                            t.read(&w.rt).unwrap().read(span, &back.iovec(), ReadFlags::NONE).await.unwrap();
                            model[at..end].copy_from_slice(&back.to_vec());
                        }
                    }
                    6 if step % 8 == 0 => {
                        t.resize(&w.rt).unwrap().resize(at as u64, Prealloc::Off).await.unwrap();
                        model.resize(at, 0);
                    }
                    7 => t.write(&w.rt).unwrap().flush().await.unwrap(),
                    _ => {
                        let m = Memory::zeroed(len + 1);
                        m.share().fill(0xee);
                        let to = m.iovec().slice(step & 1, len);
                        t.read(&w.rt).unwrap().read(span, &to, ReadFlags::NONE).await.unwrap();
                        let mut want = model.get(at..).unwrap_or(&[]).to_vec();
                        want.resize(len.max(want.len()), 0);
                        assert_eq!(to.to_vec(), want[..len], "step {step}: {span}");
                    }
                }
            }
            w.owner.close().await.unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), model);
        });
    }
}

#[test]
fn status_and_space() {
    on_both(async |mut w| {
        const MIB: u64 = 1 << 20;
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; 4 << 20]).unwrap();
        let options = Options::new()
            .with("driver", "file")
            .with("node-name", "disk")
            .with("discard", "unmap")
            .with("filename", path.to_str().unwrap());
        w.open(options).await.unwrap();
        let edge = w.attach("disk", RW, Actions::D).await.unwrap();
        let t = token(&edge).await;
        let io = t.write(&w.rt).unwrap();
        let jobs = |w: &crate::world::World| w.io().counters().pool_jobs;

        io.discard(Span::new(MIB, MIB), WriteFlags::NONE).await.unwrap();
        let hole = io.status(Span::new(MIB, 3 * MIB)).await.unwrap();
        assert_eq!(hole.len, MIB);
        assert!(matches!(hole.place, Where::Zero { at: Some((_, MIB)) }));
        let before = jobs(&w);
        for i in 0..100 {
            let e = io.status(Span::new(MIB + i * 4096, 4096)).await.unwrap();
            assert!(matches!(e.place, Where::Zero { .. }));
        }
        assert_eq!(jobs(&w), before, "the answer is remembered");
        let m = Memory::from_slice(&[2; 4096]);
        io.write(Span::new(MIB + 8192, 4096), &m.iovec(), WriteFlags::NONE).await.unwrap();
        let e = io.status(Span::new(MIB + 8192, 4096)).await.unwrap();
        assert!(matches!(e.place, Where::Data { .. }), "{e:?}");
        let past = io.status(Span::new(4 * MIB, 4096)).await.unwrap();
        assert!(matches!(past.place, Where::Zero { .. }));

        // Zeroes that stay allocated, and zeroes that do not.
        let space = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let full = space();
        io.write_zeroes(Span::new(2 * MIB, MIB), WriteFlags::NONE).await.unwrap();
        assert_eq!(space(), full);
        io.write_zeroes(Span::new(2 * MIB, MIB), WriteFlags::MAY_UNMAP).await.unwrap();
        assert!(space() < full, "{} {full}", space());
        drop(t);

        let t = token(&edge).await;
        t.resize(&w.rt).unwrap().resize(6 * MIB, Prealloc::Falloc).await.unwrap();
        assert!(space() >= full);
        let e = t.resize(&w.rt).unwrap().resize(7 * MIB, Prealloc::Metadata).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        let e = t.resize(&w.rt).unwrap().resize(MIB, Prealloc::Full).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        t.resize(&w.rt).unwrap().resize(7 * MIB, Prealloc::Full).await.unwrap();
        assert_eq!(t.size(), 7 * MIB);
    });
}

/// Without `discard=unmap`, discards and unmapping zeroes keep the space.
#[test]
fn discards_are_ignored_unless_asked_for() {
    on_both(async |mut w| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let space = std::fs::metadata(&path).unwrap().blocks();
        let options = Options::new()
            .with("driver", "file")
            .with("node-name", "disk")
            .with("filename", path.to_str().unwrap());
        w.open(options).await.unwrap();
        let edge = w.attach("disk", RW, Actions::DATA).await.unwrap();
        let t = token(&edge).await;
        t.write(&w.rt).unwrap().discard(Span::new(0, 1 << 20), WriteFlags::NONE).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 1 << 20]);
        t.write(&w.rt).unwrap().write_zeroes(Span::new(0, 1 << 20), WriteFlags::MAY_UNMAP).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), space);
    });
}

#[test]
fn what_cannot_be_opened() {
    on_both(async |mut w| {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let file = |name: &str| Options::new().with("driver", "file").with("filename", at(name).as_str());
        let e = w.open(file("none")).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert_eq!(e.to_string(), format!("Could not open '{}': No such file or directory", at("none")));
        let e = w.open(file(".").with("read-only", true)).await.unwrap_err();
        assert!(e.to_string().contains("'file' driver requires a regular file"), "{e}");
        std::fs::write(at("f"), b"x").unwrap();
        let e = w.open(file("f").with("driver", "host_device")).await.unwrap_err();
        assert!(e.to_string().contains("requires a block device"), "{e}");
        std::fs::create_dir(at("in")).unwrap();
        std::os::unix::fs::symlink("../f", at("in/out")).unwrap();
        let e = w.open(file("in/out").with("x-beneath", at("in").as_str())).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
        std::os::unix::fs::symlink("in/out", at("to")).unwrap();
        w.open(file("to").with("x-beneath", at(".").as_str())).await.unwrap();
    });
}

#[test]
fn null_answers_from_memory() {
    on_both(async |mut w| {
        for name in ["null-co", "null-aio"] {
            null(&mut w, name).await;
        }
    });
}

async fn null(w: &mut World, driver: &str) {
    let options = Options::new()
        .with("driver", driver)
        .with("node-name", driver)
        .with("read-zeroes", true)
        .with("latency-ns", 1000)
        .with("size", "1M");
    w.open(options).await.unwrap();
    let edge = w.attach(driver, RW, Actions::DATA).await.unwrap();
    assert_eq!(edge.node().driver.kind().name, driver);
    let t = token(&edge).await;
    assert_eq!(t.size(), 1 << 20);
    let m = Memory::from_slice(&[3; 4096]);
    t.write(&w.rt).unwrap().write(Span::new(0, 4096), &m.iovec(), WriteFlags::NONE).await.unwrap();
    t.read(&w.rt).unwrap().read(Span::new(0, 4096), &m.iovec(), ReadFlags::NONE).await.unwrap();
    assert!(m.iovec().is_zero());
    t.resize(&w.rt).unwrap().resize(2 << 20, Prealloc::Off).await.unwrap();
    assert_eq!(t.size(), 2 << 20);
}

/// A loop device, until it is dropped.
struct Loop(String);

impl Loop {
    /// `None` where we may not make one.
    fn over(path: &std::path::Path) -> Option<Loop> {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        let name = String::from_utf8(out.stdout).ok()?;
        (out.status.success()).then(|| Loop(name.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_devices() {
    for direct in [false, true] {
        on_both(move |mut w| async move {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = dir.path().join("disk");
            let mut model = pattern(1 << 20, 1);
            std::fs::write(&path, &model).unwrap();
            let Some(device) = Loop::over(&path) else {
                eprintln!("skipped: no loop device can be made here");
                return;
            };
            let options = Options::new()
                .with("driver", "host_device")
                .with("node-name", "disk")
                .with("discard", "unmap")
                .with("cache.direct", direct)
                .with("filename", device.0.as_str());
            w.open(options).await.unwrap();
            let edge = w.attach("disk", RW, Actions::DATA).await.unwrap();
            let t = token(&edge).await;
            assert_eq!(t.size(), 1 << 20);
            let io = t.write(&w.rt).unwrap();
            for (at, len) in [(0, 4096), (4096, 512), (100, 1000), (70_000, 40_001), ((1 << 20) - 3, 3)] {
                let span = Span::new(at as u64, len as u64);
                let data = pattern(len, 7);
                io.write(span, &Memory::from_slice(&data).iovec(), WriteFlags::FUA).await.unwrap();
                model[at..at + len].copy_from_slice(&data);
            }
            for (at, len) in [(8192, 8192), (200_000, 1001), (300_000, 8192)] {
                io.write_zeroes(Span::new(at as u64, len as u64), WriteFlags::NONE).await.unwrap();
                model[at..at + len].fill(0);
            }
            io.discard(Span::new(65536, 1001), WriteFlags::NONE).await.unwrap();
            io.flush().await.unwrap();
            let back = Memory::zeroed(model.len());
            t.read(&w.rt).unwrap().read(Span::new(0, 1 << 20), &back.iovec(), ReadFlags::NONE).await.unwrap();
            let back = back.to_vec();
            // What a discarded range reads as is not said.
            model[65536..65536 + 1001].copy_from_slice(&back[65536..65536 + 1001]);
            assert!(back == model);
            t.resize(&w.rt).unwrap().resize(1 << 20, Prealloc::Off).await.unwrap();
            let e = t.resize(&w.rt).unwrap().resize(2 << 20, Prealloc::Off).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            drop(t);
            w.owner.close().await.unwrap();
        });
    }
}

/// A cancelled write of a part of a block, and then a write of another part of it. If the first one's blocks went to the
/// kernel after the second one had read them, it would bring back the old bytes of the second part, which was
/// acknowledged.
#[test]
fn a_cancelled_write_spares_its_neighbours() {
    on_both(async |mut w| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let options = Options::new()
            .with("driver", "file")
            .with("node-name", "disk")
            .with("cache.direct", true)
            .with("filename", path.to_str().unwrap());
        if w.open(options).await.is_err() {
            eprintln!("no direct I/O here");
            return;
        }
        let edge = w.attach("disk", RW, Actions::DATA).await.unwrap();
        for round in 1..=50u8 {
            let t = token(&edge).await;
            let io = t.write(&w.rt).unwrap();
            let data = Memory::from_slice(&[round; 100]).iovec();
            {
                let mut first = std::pin::pin!(io.write(Span::new(0, 100), &data, WriteFlags::NONE));
                let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(first.as_mut().poll(cx))).await;
                assert!(polled.is_pending());
                // Dropped at different points of its life.
                for _ in 0..round % 5 {
                    w.rt.yield_now().await;
                }
            }
            io.write(Span::new(200, 100), &data, WriteFlags::NONE).await.unwrap();
            let back = Memory::zeroed(300);
            t.read(&w.rt).unwrap().read(Span::new(0, 300), &back.iovec(), ReadFlags::NONE).await.unwrap();
            assert_eq!(back.to_vec()[200..], [round; 100]);
        }
        w.owner.close().await.unwrap();
        let end = std::fs::read(&path).unwrap();
        assert_eq!((&end[..100], &end[200..300]), (&[50; 100][..], &[50; 100][..]));
    });
}
