//! A mirror under load: after its end nothing that was acknowledged is missing, whatever the modes, faults
//! and pauses on the way were.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{AccessRule, NodeDef, NodeFlags, OpInfo, UserEdge};
use dolmen_rt::{Memory, Rt};
use dolmen_sim::{DiskConfig, Fault, FaultAction, Image, Random, SimDisk};
use dolmen_types::{
    Actions, Claim, ErrorKind, NodeName, OpId, OpKind, Options, ReadFlags, Span, Value, WriteFlags,
};

use super::rig::Rig;
use crate::{Job, Mirror, Status};

fn disk(image: Image) -> SimDisk {
    SimDisk::new(image, DiskConfig { log: false, ..DiskConfig::default() })
}

fn patchwork(random: &mut Random, size: u64) -> Image {
    let mut image = Image::new(size);
    let mut at = 0;
    while at < size {
        let len = (random.between(1, 40) * 4096).min(size - at);
        if random.percent(50) {
            image.write(at, &vec![random.between(1, 255) as u8; len as usize]);
        }
        at += len;
    }
    image
}

/// Source `s` and target `t`, and a guest on the source.
struct World {
    rig: Rig,
    source: SimDisk,
    target: SimDisk,
    guest: Arc<UserEdge>,
}

impl World {
    async fn new(mut rig: Rig, source: Image, target: Image) -> World {
        let (source, target) = (disk(source), disk(target));
        let mut draft = rig.owner.draft();
        for (name, disk) in [("s", &source), ("t", &target)] {
            let name = NodeName::internal(name);
            draft
                .add_node(NodeDef {
                    name: name.clone(),
                    anonymous: false,
                    kind: dolmen_graph::Driver::kind(disk),
                    rule: AccessRule::LEAF,
                    flags: NodeFlags { unmap: true, ..NodeFlags::default() },
                    owner: None,
                    monitor: true,
                    options: Value::Null,
                })
                .expect("new");
            draft.set_driver(&name, Arc::new(disk.clone()), false);
        }
        let op = OpId::internal("guest");
        draft
            .add_op(OpInfo {
                id: op.clone(),
                kind: "export".into(),
                detail: "a guest".into(),
                since: None,
                ends_with: None,
                instead_of_writing: None,
            })
            .expect("new");
        let claim = Claim { needs: Actions::D | Actions::V, allows: Actions::EVERY - Actions::S };
        draft.add_user(&op, "s", claim).expect("there");
        rig.owner.commit(draft).await.expect("publishes");
        let guest = rig.owner.edges(&op).next().expect("attached").clone();
        World { rig, source, target, guest }
    }

    async fn start(&mut self, options: Options) -> Rc<Job> {
        let work = Mirror::from_options(&mut options.with("device", "s").with("target", "t")).expect("reads");
        let job = self.rig.job("m", work, |_| {});
        self.rig.start_one(&job).await.expect("starts");
        job
    }

    fn assert_same(&self) {
        assert!(self.source.image().to_vec() == self.target.image().to_vec(), "the copy differs");
    }
}

/// What a guest knows of its own part of the disk; `None` where nothing is promised.
struct Model {
    part: Span,
    bytes: Vec<Option<u8>>,
}

impl Model {
    fn of(image: &Image, part: Span) -> Model {
        let mut bytes = vec![0; part.len() as usize];
        image.read(part.offset(), &mut bytes);
        Model { part, bytes: bytes.into_iter().map(Some).collect() }
    }

    fn set(&mut self, span: Span, to: Option<u8>) {
        let at = (span.offset() - self.part.offset()) as usize;
        self.bytes[at..at + span.len() as usize].fill(to);
    }

    fn check(&self, disk: &[u8], when: &str) {
        let found = &disk[self.part.offset() as usize..self.part.end() as usize];
        let wrong = found.iter().zip(&self.bytes).position(|(f, b)| b.is_some_and(|b| b != *f));
        assert!(wrong.is_none(), "{when}: byte {wrong:?} of {:?} is lost", self.part);
    }
}

async fn whole(rt: &Rt, edge: &Arc<UserEdge>) -> Vec<u8> {
    let token = edge.begin().await.expect("attached");
    let memory = Memory::zeroed(token.size() as usize);
    let span = Span::new(0, token.size());
    token.read(rt).expect("granted").read(span, &memory.iovec(), ReadFlags::NONE).await.expect("reads");
    memory.to_vec()
}

/// How long a busy guest rests at most between requests, in nanoseconds.
const NAP: u64 = 200_000;

/// Writes, zeroes, discards, flushes and reads in its own part until told to stop.
async fn guest(
    rt: Rt,
    edge: Arc<UserEdge>,
    model: Rc<RefCell<Model>>,
    mut random: Random,
    stop: Rc<Cell<bool>>,
    nap_ns: u64,
) {
    let part = model.borrow().part;
    while !stop.get() {
        let at = random.below(part.len());
        let len = random.between(1, 70_000).min(part.len() - at);
        let span = Span::new(part.offset() + at, len);
        // Until it is acknowledged it may be there or not.
        let token = edge.begin().await.expect("attached");
        let io = token.write(&rt).expect("granted");
        let fua = if random.percent(20) { WriteFlags::FUA } else { WriteFlags::NONE };
        let byte = random.between(1, 255) as u8;
        let memory = Memory::from_slice(&vec![byte; len as usize]);
        let (done, then) = match random.below(8) {
            0 => {
                model.borrow_mut().set(span, None);
                (io.discard(span, fua).await, None)
            }
            1 => (io.write_zeroes(span, fua | WriteFlags::MAY_UNMAP).await, Some(Some(0))),
            2 => (io.flush().await, None),
            _ => (io.write(span, &memory.iovec(), fua).await, Some(Some(byte))),
        };
        match (done, then) {
            (Ok(()), Some(to)) => model.borrow_mut().set(span, to),
            (Ok(()), None) => {}
            // What the target has left of its faults is the guest's own trouble after the pivot.
            (Err(e), _) => {
                assert_eq!(token.node().name.as_str(), "t", "the source is sound: {e}");
                model.borrow_mut().set(span, None);
            }
        }
        drop(token);
        rt.sleep(Duration::from_nanos(random.below(nap_ns))).await;
    }
}

/// Turns the knobs of a running mirror: modes, pauses, and resumes what an error has stopped.
async fn meddle(rt: Rt, job: Rc<Job>, mut random: Random, switches: u64) {
    for _ in 0..switches {
        rt.sleep(Duration::from_nanos(random.below(3_000_000))).await;
        match random.below(4) {
            0 => drop(job.pause()),
            1 => drop(job.resume()),
            n => {
                let mode = if n == 2 { "background" } else { "write-blocking" };
                drop(job.change(Options::new().with("copy-mode", mode)));
            }
        }
    }
    while job.status() != Status::Null {
        if job.is_pausing() {
            drop(job.resume());
        }
        rt.sleep(Duration::from_millis(1)).await;
    }
}

fn fault(random: &mut Random) -> Fault {
    Fault {
        kind: *random.pick(&[OpKind::Write, OpKind::Write, OpKind::WriteZeroes, OpKind::Flush]),
        skip: random.below(40),
        times: random.between(1, 3),
        action: FaultAction::Fail(*random.pick(&[ErrorKind::Io, ErrorKind::NoSpace])),
    }
}

/// The story that this is about: a write is acknowledged, its mark gets lost (taken away by a copy that
/// read the old data, by a switch of the mode in between, by an error on the target), and the pivot makes a
/// disk current that lacks it.
#[test]
fn nothing_acknowledged_is_missing_after_the_pivot() {
    let done = Rc::new(Cell::new(0));
    for seed in 0..60 {
        let done = done.clone();
        Rig::run(seed, move |rig| async move {
            let mut random = Random::new(seed);
            let rt = rig.rt.clone();
            let size = random.between(3, 60) * 9216;
            let old = patchwork(&mut random, size);
            let new = patchwork(&mut random, size);
            let mut w = World::new(rig, new.clone(), old).await;
            let stop = Rc::new(Cell::new(false));
            let mut models = Vec::new();
            for i in 0..3 {
                let part = Span::from_range(size / 3 * i, size / 3 * (i + 1));
                let model = Rc::new(RefCell::new(Model::of(&new, part)));
                models.push(model.clone());
                rt.spawn(guest(rt.clone(), w.guest.clone(), model, random.fork(), stop.clone(), NAP));
            }
            rt.sleep(Duration::from_nanos(random.below(1_000_000))).await;
            let faults = random.below(3);
            for _ in 0..faults {
                w.target.inject(fault(&mut random));
            }
            let mode = *random.pick(&["background", "write-blocking"]);
            let policy = *random.pick(&["ignore", "stop"]);
            let granularity = 512u64 << random.below(9);
            let options = Options::new()
                .with("sync", "full")
                .with("copy-mode", mode)
                .with("on-target-error", policy)
                .with("granularity", granularity)
                .with("buf-size", random.between(1, 40) * 8192);
            let job = w.start(options).await;
            rt.spawn(meddle(rt.clone(), job.clone(), random.fork(), random.below(8)));
            // Guests that never rest may keep a copy in the background from ever being ready.
            let (ready, rt2, patience) = (job.clone(), rt.clone(), Duration::from_millis(random.below(300)));
            rt.spawn(async move {
                rt2.sleep(patience).await;
                while !matches!(ready.status(), Status::Ready | Status::Null) {
                    drop(ready.change(Options::new().with("copy-mode", "write-blocking")));
                    rt2.sleep(Duration::from_millis(1)).await;
                }
            });
            w.rig.until(|| matches!(job.status(), Status::Ready | Status::Null)).await;
            rt.sleep(Duration::from_nanos(random.below(2_000_000))).await;
            let pivot = random.percent(70);
            if !pivot {
                // The copy is that of the moment of the end: let it be a quiet one.
                stop.set(true);
            }
            loop {
                let asked = if pivot { job.complete() } else { job.cancel(false) };
                if asked.is_ok() || !matches!(job.status(), Status::Ready | Status::Standby) {
                    break;
                }
                let until = w.rig.rt.now() + Duration::from_millis(1);
                w.rig.until(|| rt.now() >= until).await;
            }
            w.rig.until(|| job.status() == Status::Null).await;
            let moved = w.guest.node().name.as_str() == "t";
            if job.error().is_none() {
                done.set(done.get() + 1);
                assert_eq!(moved, pivot, "{:?}", w.rig.events());
            } else {
                assert!(!moved, "a failed job leaves the guest where it was");
            }
            rt.sleep(Duration::from_nanos(random.below(1_000_000))).await;
            stop.set(true);
            rt.sleep(Duration::from_millis(5)).await;
            let disk = whole(&rt, &w.guest).await;
            for m in &models {
                m.borrow().check(&disk, if moved { "target" } else { "source" });
            }
            if !pivot && job.error().is_none() {
                w.assert_same();
            }
            assert!(w.rig.owner.ops().iter().all(|o| o.id.as_str() == "guest"));
            assert!(w.rig.owner.claims().is_empty());
        });
    }
    assert!(done.get() > 45, "most jobs succeed: {}", done.get());
}

/// A target that refuses writes between the last check and the pivot: the pivot must not happen, and the guest
/// must not see an error.
#[test]
fn a_target_that_fails_at_the_last_moment_is_not_pivoted_to() {
    for seed in 0..40 {
        Rig::run(seed, move |rig| async move {
            let mut random = Random::new(seed);
            let rt = rig.rt.clone();
            let size = 299_520;
            let image = patchwork(&mut random, size);
            let mut w = World::new(rig, image.clone(), Image::new(size)).await;
            let stop = Rc::new(Cell::new(false));
            let model = Rc::new(RefCell::new(Model::of(&image, Span::new(0, size))));
            rt.spawn(guest(rt.clone(), w.guest.clone(), model.clone(), random.fork(), stop.clone(), NAP));
            let options = Options::new().with("sync", "full").with("copy-mode", "write-blocking");
            let job = w.start(options).await;
            w.rig.until(|| job.status() == Status::Ready).await;
            // From some moment of the end on, the target is dead.
            let (target, dying, rt2) = (w.target.clone(), job.clone(), rt.clone());
            let after = random.below(600_000);
            rt.spawn(async move {
                while !matches!(dying.status(), Status::Waiting | Status::Pending | Status::Null) {
                    rt2.sleep(Duration::from_nanos(1_000)).await;
                }
                rt2.sleep(Duration::from_nanos(after)).await;
                let fail = FaultAction::Fail(ErrorKind::Io);
                target.inject(Fault { kind: OpKind::Write, skip: 0, times: u64::MAX, action: fail });
            });
            job.complete().expect("ready");
            w.rig.until(|| job.status() == Status::Null).await;
            let moved = w.guest.node().name.as_str() == "t";
            assert_eq!(moved, job.error().is_none());
            w.target.heal();
            stop.set(true);
            rt.sleep(Duration::from_secs(1)).await;
            let disk = whole(&rt, &w.guest).await;
            model.borrow().check(&disk, if moved { "target" } else { "source" });
        });
    }
}

/// A guest that is faster than the copy: writes come to block, and the job gets ready; unless the
/// user forbids it.
#[test]
fn a_mirror_that_does_not_converge_blocks_writes() {
    for permit in [true, false] {
        Rig::run(7, move |rig| async move {
            let mut random = Random::new(7);
            let rt = rig.rt.clone();
            let size = 1 << 20;
            let image = patchwork(&mut random, size);
            let mut w = World::new(rig, image.clone(), Image::new(size)).await;
            let stop = Rc::new(Cell::new(false));
            for i in 0..4 {
                let part = Span::from_range(size / 4 * i, size / 4 * (i + 1));
                let model = Rc::new(RefCell::new(Model::of(&image, part)));
                rt.spawn(guest(rt.clone(), w.guest.clone(), model, random.fork(), stop.clone(), 8_000_000));
            }
            let options = Options::new()
                .with("sync", "full")
                .with("granularity", 65536u64)
                .with("auto-converge", permit);
            let job = w.start(options).await;
            job.set_speed(1 << 20).expect("runs");
            let end = rt.now() + Duration::from_secs(30);
            w.rig.until(|| job.status() == Status::Ready || rt.now() > end).await;
            assert_eq!(job.status() == Status::Ready, permit);
            assert_eq!(job.details(), [("actively-synced", dolmen_types::Value::Bool(permit))]);
            stop.set(true);
            job.cancel(true).expect("possible");
            w.rig.until(|| job.status() == Status::Null).await;
        });
    }
}

#[test]
fn writes_that_change_nothing_are_not_copied_and_flags_travel() {
    Rig::run(3, |rig| async move {
        let rt = rig.rt.clone();
        let mut w = World::new(rig, Image::new(1 << 20), Image::new(1 << 20)).await;
        let options = Options::new().with("sync", "none").with("copy-mode", "write-blocking");
        let job = w.start(options).await;
        w.rig.until(|| job.status() == Status::Ready).await;
        assert_eq!(w.rig.events(), "m:created m:running m:ready m:READY");
        let memory = Memory::from_slice(&[7; 4096]);
        let token = w.guest.begin().await.expect("attached");
        let io = token.write(&rt).expect("granted");
        let before = w.target.count(OpKind::Write);
        io.write(Span::new(0, 4096), &memory.iovec(), WriteFlags::UNCHANGED).await.expect("writes");
        assert_eq!(w.target.count(OpKind::Write), before);
        assert_eq!(job.details(), [("actively-synced", dolmen_types::Value::Bool(true))]);
        io.write(Span::new(8192, 4096), &memory.iovec(), WriteFlags::FUA).await.expect("writes");
        assert_eq!(w.target.count(OpKind::Write), before + 1);
        let mut at = [0; 4096];
        w.target.image().read(8192, &mut at);
        assert_eq!(at, [7; 4096]);
        drop(token);
        job.cancel(false).expect("ready");
        w.rig.until(|| job.status() == Status::Null).await;
        assert_eq!(w.rig.events(), "m:waiting m:pending m:COMPLETED m:concluded m:null");
        assert_eq!(w.guest.node().name.as_str(), "s", "the copy is kept, the guest stays");
    });
}

#[test]
fn sizes_that_differ_fail_the_job() {
    Rig::run(3, |rig| async move {
        let mut w = World::new(rig, Image::new(1 << 20), Image::new(1 << 19)).await;
        let job = w.start(Options::new().with("sync", "full")).await;
        w.rig.until(|| job.status() == Status::Null).await;
        let events = "m:created m:running m:aborting \
                      m:FAILED(Source and target image have different sizes) m:concluded m:null";
        assert_eq!(w.rig.events(), events);
    });
}
