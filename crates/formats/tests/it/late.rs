//! Writes that land after their request was given up.

use std::time::Duration;

use dolmen_graph::chain_status;
use dolmen_rt::Rt;
use dolmen_sim::{DiskConfig, Harness, Leaf, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{ErrorKind, OpKind, Options, Span, Value, WriteFlags};
use futures_lite::future;

use crate::support::{EVERYTHING, REGISTRY, create, node, open, own_check};

const CLUSTER: u64 = 4096;
const QUIET: DiskConfig = DiskConfig { latency_ns_max: 50_000, request_alignment: 1, log: false };
/// A second of the simulation.
const LONG: Duration = Duration::from_secs(1);

struct Rig {
    rt: Rt,
    disk: SimDisk,
    h: Harness,
    model: Vec<u8>,
}

impl Rig {
    async fn new(rt: &Rt, size: u64) -> Rig {
        let options = Options::new().with("size", size).with("cluster_size", CLUSTER);
        let made = create(rt, options).await.unwrap();
        let disk = SimDisk::new(made.image(), QUIET);
        let options = node("qcow2", "leaf").with("discard", "unmap").with("backing", Value::Null);
        let leaves = vec![Leaf::new("leaf", disk.clone())];
        let h = Harness::open(rt, REGISTRY, leaves, options, EVERYTHING).await.unwrap();
        Rig { rt: rt.clone(), disk, h, model: vec![0; size as usize] }
    }

    async fn write(&mut self, at: u64, len: u64, byte: u8) {
        self.h.user().write(at, &vec![byte; len as usize], WriteFlags::NONE).await.unwrap();
        self.model[at as usize..(at + len) as usize].fill(byte);
    }

    /// Where a guest cluster lies in the file.
    async fn place(&self, at: u64) -> Option<u64> {
        let s = chain_status(&self.h.top(), &self.rt, Span::new(at, CLUSTER), None).await.unwrap();
        s.place.map(|(_, host)| host)
    }

    /// Begins a write whose data the disk holds back, and gives it up.
    async fn give_up_write(&self, hold: Span, at: u64, byte: u8, flags: WriteFlags) {
        let before = self.disk.held();
        self.disk.hold(hold);
        let user = self.h.user();
        let data = vec![byte; CLUSTER as usize];
        let held = async {
            while self.disk.held() == before {
                self.rt.sleep(Duration::from_nanos(10)).await;
            }
            Ok(())
        };
        future::or(user.write(at, &data, flags), held).await.unwrap();
        self.disk.hold_no_more();
        assert_eq!(self.h.edge.given_up(), 1);
    }

    /// Lets go what is held back, and waits until it has landed.
    async fn land(&self) {
        self.disk.let_go();
        while self.h.edge.given_up() > 0 {
            self.rt.sleep(Duration::from_nanos(10)).await;
        }
    }

    async fn flush_twice(&self) {
        self.h.user().flush().await.unwrap();
        self.h.user().flush().await.unwrap();
    }

    async fn check(&self) {
        assert!(self.h.user().read(0, self.model.len()).await.unwrap() == self.model);
    }

    async fn close(self) {
        let Rig { rt, disk, h, model } = self;
        h.close().await.unwrap();
        let still = MemoryDisk::new(disk.image());
        let check = own_check(&rt, &still).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
        let h = open(&rt, &still, None).await.unwrap();
        assert!(h.user().read(0, model.len()).await.unwrap() == model);
        h.close().await.unwrap();
    }
}

/// The story: a write in place was given up while the kernel still had it. Its lease ended with the future, so the guest could
/// discard the cluster, flush twice, and get the cluster back for other data or as a table; then the old write landed
/// there. Where the lease did not end at once (a write that was planned), it never ended, and nothing was ever
/// reused again.
#[test]
fn a_place_is_reused_after_the_late_write_and_not_before() {
    // One that the plan answers for, and one that the driver has to do.
    for flags in [WriteFlags::NONE, WriteFlags::FUA] {
        // A cluster for data next to it, or one so far away that a table is needed first.
        for far in [false, true] {
            Sim::run(7, move |rt| async move {
                let step = if far { CLUSTER / 8 * CLUSTER } else { CLUSTER };
                let mut rig = Rig::new(&rt, 40 * step).await;
                rig.write(0, CLUSTER, 1).await;
                rig.h.user().flush().await.unwrap();
                let host = rig.place(0).await.unwrap();
                rig.give_up_write(Span::new(host, CLUSTER), 0, 2, flags).await;
                rig.h.user().discard(Span::new(0, CLUSTER)).await.unwrap();
                rig.model[..CLUSTER as usize].fill(0);
                rig.flush_twice().await;
                for i in 1..20 {
                    rig.write(i * step, CLUSTER, 100 + i as u8).await;
                }
                rig.h.user().flush().await.unwrap();
                rig.land().await;
                rig.check().await;
                rig.flush_twice().await;
                // Now it is given to the next who needs one: a table first, where there has to be one.
                rig.write(20 * step, CLUSTER, 200).await;
                rig.h.user().flush().await.unwrap();
                let reused = rig.place(20 * step).await == Some(host);
                assert!(reused || far && rig.disk.image().to_vec()[host as usize..][..8] != [0; 8]);
                rig.check().await;
                rig.close().await;
            });
        }
    }
}

/// The story: a write that needs a new cluster was given up before the cluster was mapped. Its cluster came back only when the
/// node was closed, and was then given back although the write might still be on its way: also when the node was only
/// reopened.
#[test]
fn a_cluster_that_was_never_mapped_comes_back_after_the_late_write() {
    Sim::run(3, |rt| async move {
        let mut rig = Rig::new(&rt, 64 * CLUSTER).await;
        rig.write(0, CLUSTER, 1).await;
        rig.h.user().flush().await.unwrap();
        // Behind the L2 table.
        let next = rig.place(0).await.unwrap() + 2 * CLUSTER;
        rig.give_up_write(Span::new(next, CLUSTER), 5 * CLUSTER, 2, WriteFlags::NONE).await;
        rig.flush_twice().await;
        for i in 6..20 {
            rig.write(i * CLUSTER, CLUSTER, i as u8).await;
        }
        rig.land().await;
        rig.check().await;
        rig.flush_twice().await;
        rig.write(20 * CLUSTER, CLUSTER, 20).await;
        assert_eq!(rig.place(20 * CLUSTER).await, Some(next), "free again");
        rig.close().await;
    });
}

/// What the guest writes after it has given up an older write is newer, whatever the disk does first.
#[test]
fn a_late_write_does_not_replace_newer_data() {
    Sim::run(4, |rt| async move {
        let mut rig = Rig::new(&rt, 64 * CLUSTER).await;
        rig.write(0, 2 * CLUSTER, 1).await;
        let host = rig.place(0).await.unwrap();
        rig.give_up_write(Span::new(host, CLUSTER), 0, 2, WriteFlags::NONE).await;
        // Others are not in its way.
        rig.write(CLUSTER, CLUSTER, 4).await;
        let (disk, later) = (rig.disk.clone(), rt.clone());
        rt.spawn(async move {
            later.sleep(LONG).await;
            disk.let_go();
        });
        rig.write(100, 10, 3).await;
        assert!(rt.now().as_nanos() > LONG.as_nanos() as u64);
        rig.model[..100].fill(2);
        rig.model[110..CLUSTER as usize].fill(2);
        rig.check().await;
        rig.close().await;
    });
}

/// The end of a node waits for what was given up; not for ever, and says for what.
#[test]
fn closing_waits_for_late_writes() {
    for lands in [true, false] {
        Sim::run(5, move |rt| async move {
            let mut rig = Rig::new(&rt, 64 * CLUSTER).await;
            rig.write(0, CLUSTER, 1).await;
            let host = rig.place(0).await.unwrap();
            rig.give_up_write(Span::new(host, CLUSTER), 0, 2, WriteFlags::NONE).await;
            let began = rt.now();
            if lands {
                let (disk, later) = (rig.disk.clone(), rt.clone());
                rt.spawn(async move {
                    later.sleep(LONG).await;
                    disk.let_go();
                });
                rig.model[..CLUSTER as usize].fill(2);
                rig.close().await;
                assert!(rt.now().since(began) > LONG);
                return;
            }
            let e = rig.h.close().await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::TimedOut);
            let said = e.to_string();
            for part in ["'test' with 1 request on node", "1 given up", "node 'leaf' with 1 request given up"]
            {
                assert!(said.contains(part), "{said}");
            }
        });
    }
}

/// A flush whose future is gone goes on in a task of its own: it is in flight until it has written its tables.
#[test]
fn closing_waits_for_a_flush_that_was_given_up() {
    Sim::run(6, |rt| async move {
        let mut rig = Rig::new(&rt, 64 * CLUSTER).await;
        rig.write(0, CLUSTER, 1).await;
        rig.disk.hold(Span::new(0, 1 << 30));
        let user = rig.h.user();
        let held = async {
            while rig.disk.held() == 0 {
                rt.sleep(Duration::from_nanos(10)).await;
            }
            Ok(())
        };
        future::or(user.flush(), held).await.unwrap();
        rig.disk.hold_no_more();
        assert_eq!(rig.h.edge.given_up(), 1);
        let (disk, later, began) = (rig.disk.clone(), rt.clone(), rt.now());
        rt.spawn(async move {
            later.sleep(LONG).await;
            disk.let_go();
        });
        rig.close().await;
        assert!(rt.now().since(began) > LONG);
    });
}

/// Requests that are given up at any moment, some with their writes held back for long, between others. The model says what each
/// byte may be.
#[test]
fn requests_that_are_given_up_harm_nobody() {
    for seed in 0..40 {
        Sim::run(seed, |rt| async move {
            let size = CLUSTER * 40;
            let mut rig = Rig::new(&rt, size).await;
            let mut r = Random::new(seed);
            // Besides the value of the model, what was given up may have left these.
            let mut maybe: Vec<Vec<u8>> = vec![Vec::new(); size as usize];
            for step in 0..200u64 {
                let len = 1 + r.below(CLUSTER * 3);
                let at = r.below(size - len);
                let range = at as usize..(at + len) as usize;
                let byte = step as u8 | 1;
                let user = rig.h.user();
                let bytes = vec![byte; len as usize];
                if r.percent(5) {
                    // Whatever is held back for too long would be waited for by the next write to that place.
                    rig.disk.let_go();
                }
                if !r.percent(40) {
                    rig.disk.let_go();
                    let zero = match r.below(4) {
                        0 => {
                            user.write_zeroes(Span::new(at, len), WriteFlags::MAY_UNMAP).await.map(|()| true)
                        }
                        1 => {
                            user.flush().await.unwrap();
                            continue;
                        }
                        _ => user.write(at, &bytes, WriteFlags::NONE).await.map(|()| false),
                    };
                    rig.model[range.clone()].fill(if zero.unwrap() { 0 } else { byte });
                    maybe[range].iter_mut().for_each(Vec::clear);
                    continue;
                }
                if r.percent(30) {
                    rig.disk.hold(Span::new(0, 1 << 30));
                }
                let patience = Duration::from_nanos(r.below(400_000));
                let what = r.below(4);
                let request = async {
                    match what {
                        0 => user.write_zeroes(Span::new(at, len), WriteFlags::NONE).await,
                        1 => user.flush().await,
                        _ => user.write(at, &bytes, WriteFlags::NONE).await,
                    }
                    .map(|()| true)
                };
                let timer = async {
                    rt.sleep(patience).await;
                    Ok(false)
                };
                let done = future::or(request, timer).await.unwrap();
                rig.disk.hold_no_more();
                let value = match what {
                    0 => 0,
                    1 => continue,
                    _ => byte,
                };
                if done {
                    rig.model[range.clone()].fill(value);
                    maybe[range].iter_mut().for_each(Vec::clear);
                } else {
                    maybe[range].iter_mut().for_each(|m| m.push(value));
                }
            }
            rig.land().await;
            let now = rig.h.user().read(0, size as usize).await.unwrap();
            for (i, byte) in now.iter().enumerate() {
                assert!(*byte == rig.model[i] || maybe[i].contains(byte), "seed {seed}: {byte} at {i}");
            }
            rig.model = now;
            rig.flush_twice().await;
            assert!(rig.disk.count(OpKind::Write) > 0);
            rig.close().await;
        });
    }
}

/// A size is absolute: one that is set for a write that was given up must not come after a larger one. (What did happen was the
/// same without anybody giving up: growing failed after it had been done, the second attempt asked for less, and another
/// request had written behind that. Seeds of the crash explorer show it.)
#[test]
fn a_size_that_is_set_late_cuts_nothing_off() {
    Sim::run(7, |rt| async move {
        const STEP: u64 = 8 << 20;
        let mut rig = Rig::new(&rt, 4 * STEP).await;
        let mut at = 0;
        // Until the next cluster makes the file longer.
        loop {
            rig.write(at, CLUSTER, 3).await;
            at += CLUSTER;
            if rig.place(at - CLUSTER).await.unwrap() + CLUSTER >= STEP {
                break;
            }
        }
        assert_eq!(rig.disk.image().size(), STEP);
        // The second size, and nothing else, is held back.
        rig.give_up_write(Span::new(2 * STEP, 0), at, 1, WriteFlags::NONE).await;
        let (later, disk) = (rt.clone(), rig.disk.clone());
        rt.spawn(async move {
            later.sleep(LONG).await;
            disk.let_go();
        });
        rig.write(at + CLUSTER, 2 * STEP, 2).await;
        rig.land().await;
        rig.check().await;
        rig.flush_twice().await;
        rig.close().await;
    });
}
