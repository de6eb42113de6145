//! A full disk loses nothing that was acknowledged.
//!
//! The story: on a tmpfs of 8 MiB, 124 writes of 64 KiB were acknowledged. The data took all the space, and the tables
//! that map them were to be written at the flush: it failed as a whole, and after a clean end not one write was there.

use dolmen_rt::Rt;
use dolmen_sim::{CrashPoints, DiskConfig, Harness, Image, Leaf, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{ErrorKind, Options, Result, Span, Value, WriteFlags};

use crate::support::{EVERYTHING, REGISTRY, create, node, open, own_check};

/// What the disk counts space in.
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug)]
struct Case {
    seed: u64,
    cluster: u64,
    version: &'static str,
    refcount_bits: u64,
    /// The image was copied with holes for zeroes.
    sparse: bool,
    /// Bytes of space beyond what the image takes at first.
    room: u64,
}

struct World {
    case: Case,
    disk: SimDisk,
    /// What the disk shows: what was acknowledged, and what failing requests made of their ranges.
    model: Vec<u8>,
    /// Which bytes a request has touched since this was cleared.
    touched: Vec<bool>,
    refused: u64,
}

impl World {
    async fn new(rt: &Rt, case: Case, log: bool) -> World {
        // Guest offsets spread over many L2 tables.
        let size = (case.cluster * case.cluster / 8 * 12).min(6 << 20);
        let options = Options::new()
            .with("size", size)
            .with("cluster_size", case.cluster)
            .with("compat", case.version)
            .with("refcount_bits", case.refcount_bits);
        let mut image = create(rt, options).await.unwrap().image();
        if case.sparse {
            image = image.sparse();
        }
        let disk = SimDisk::new(image, DiskConfig { latency_ns_max: 20_000, request_alignment: 1, log });
        disk.set_capacity(Some(disk.image().space() + case.room));
        World { case, disk, model: vec![0; size as usize], touched: vec![false; size as usize], refused: 0 }
    }

    async fn open(&self, rt: &Rt) -> Harness {
        let leaves = vec![Leaf::new("leaf", self.disk.clone())];
        let options = node("qcow2", "leaf").with("discard", "unmap").with("backing", Value::Null);
        Harness::open(rt, REGISTRY, leaves, options, EVERYTHING).await.unwrap()
    }

    async fn settle(&mut self, h: &Harness, span: Span, byte: u8, done: Result<()>) {
        let range = span.offset() as usize..span.end() as usize;
        match done {
            Ok(()) => self.model[range].fill(byte),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::NoSpace, "{:?}: {e}", self.case);
                self.refused += 1;
                let now = h.user().read(span.offset(), span.len() as usize).await.unwrap();
                self.model[range].copy_from_slice(&now);
            }
        }
    }

    async fn work(&mut self, h: &Harness, r: &mut Random, steps: u64) {
        let size = self.model.len() as u64;
        for _ in 0..steps {
            let len = (1 + r.below(self.case.cluster * 2)).min(size);
            let span = Span::new(r.below(size - len + 1), len);
            let byte = 1 + r.below(255) as u8;
            self.touched[span.offset() as usize..span.end() as usize].fill(true);
            match r.below(12) {
                0 => {
                    let done = h.user().write_zeroes(span, WriteFlags::MAY_UNMAP).await;
                    self.settle(h, span, 0, done).await;
                }
                1 => {
                    let done = h.user().write_zeroes(span, WriteFlags::NONE).await;
                    self.settle(h, span, 0, done).await;
                }
                2 => self.flush(h).await,
                3 if r.below(4) == 0 => {
                    let done = h.user().discard(span).await;
                    let now = h.user().read(span.offset(), span.len() as usize).await.unwrap();
                    self.model[span.offset() as usize..span.end() as usize].copy_from_slice(&now);
                    let full = done.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace);
                    assert!(done.is_ok() || full, "{:?}: {done:?}", self.case);
                }
                _ => {
                    let done =
                        h.user().write(span.offset(), &vec![byte; len as usize], WriteFlags::NONE).await;
                    self.settle(h, span, byte, done).await;
                }
            }
        }
    }

    /// A flush needs no space that it does not have.
    async fn flush(&self, h: &Harness) {
        let flushed = h.user().flush().await;
        assert!(flushed.is_ok(), "{:?}: {flushed:?}", self.case);
    }

    /// The image on its own, with all the space it wants.
    async fn verify(&self, rt: &Rt, image: Image) {
        let disk = MemoryDisk::new(image);
        let check = own_check(rt, &disk).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}: {:?}", self.case, check.messages);
        let h = open(rt, &disk, None).await.unwrap();
        assert!(h.user().read(0, self.model.len()).await.unwrap() == self.model, "{:?}", self.case);
        h.close().await.unwrap();
    }
}

/// Images of all kinds, each on disks that fill at every point; at every `step`th for the slower tests.
fn sweep(step: usize, each: impl Fn(Case)) {
    for (cluster, version, refcount_bits, rooms) in [
        (512, "v3", 16, 30),
        (512, "v3", 64, 30),
        (1024, "v2", 16, 30),
        (4096, "v3", 16, 40),
        (4096, "v3", 1, 20),
        (65536, "v3", 16, 60),
    ] {
        for (room, sparse) in (0..rooms).flat_map(|room| [(room, false), (room, true)]).step_by(step) {
            let seed = room * 7 + cluster;
            each(Case { seed, cluster, version, refcount_bits, sparse, room: room * PAGE });
        }
    }
}

#[test]
fn everything_acknowledged_is_kept_wherever_the_disk_fills() {
    sweep(3, |case| {
        Sim::run(case.seed, |rt| async move {
            let mut w = World::new(&rt, case, false).await;
            let mut r = Random::new(case.seed);
            for _ in 0..2 {
                let h = w.open(&rt).await;
                w.work(&h, &mut r, 60).await;
                h.close().await.unwrap_or_else(|e| panic!("{case:?}: a clean end: {e}"));
                w.verify(&rt, w.disk.image()).await;
            }
            assert!(w.refused > 0 || case.room > 15 * PAGE, "{case:?}: the disk was never full");
            // With space again, everything goes on.
            w.disk.set_capacity(None);
            let (h, refused) = (w.open(&rt).await, w.refused);
            w.work(&h, &mut r, 30).await;
            assert_eq!(w.refused, refused, "{case:?}");
            h.close().await.unwrap();
            w.verify(&rt, w.disk.image()).await;
        });
    });
}

#[test]
fn space_that_comes_back_is_used_while_the_image_is_open() {
    sweep(17, |case| {
        Sim::run(case.seed, |rt| async move {
            let mut w = World::new(&rt, case, false).await;
            let mut r = Random::new(case.seed);
            let h = w.open(&rt).await;
            w.work(&h, &mut r, 60).await;
            w.disk.set_capacity(None);
            let refused = w.refused;
            w.work(&h, &mut r, 60).await;
            assert_eq!(w.refused, refused, "{case:?}");
            h.close().await.unwrap();
            w.verify(&rt, w.disk.image()).await;
        });
    });
}

#[test]
fn a_power_loss_on_a_full_disk_keeps_what_was_flushed() {
    sweep(31, |case| {
        Sim::run(case.seed, |rt| async move {
            let mut w = World::new(&rt, case, true).await;
            let mut r = Random::new(case.seed);
            let h = w.open(&rt).await;
            w.work(&h, &mut r, 50).await;
            w.flush(&h).await;
            let (from, flushed) = (w.disk.position(), w.model.clone());
            w.touched.fill(false);
            w.work(&h, &mut r, 10).await;
            let to = w.disk.position();
            let mut crashes = CrashPoints::of(&w.disk);
            for position in (from..=to).step_by(((to - from) / 6).max(1)) {
                crashes.advance(position);
                let disk = MemoryDisk::new(crashes.crash(case.seed + position as u64));
                let check = own_check(&rt, &disk).await;
                assert_eq!(check.corruptions, 0, "{case:?} at {position}: {:?}", check.messages);
                let after = open(&rt, &disk, None).await.unwrap();
                let seen = after.user().read(0, flushed.len()).await.unwrap();
                let lost = (0..seen.len()).find(|i| !w.touched[*i] && seen[*i] != flushed[*i]);
                assert_eq!(lost, None, "{case:?} at {position}");
                after.close().await.unwrap();
            }
            h.close().await.unwrap();
        });
    });
}
