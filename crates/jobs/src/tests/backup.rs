//! Backup jobs: the copy is what was there at the start, whatever happens meanwhile.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{
    AccessRule, Draft, Driver, GraphOwner, Implicit, NodeDef, NodeFlags, NodeOpener, OpInfo, OpenPolicy,
    Registry, UserEdge,
};
use dolmen_rt::{Memory, Rt};
use dolmen_sim::{DiskConfig, Fault, FaultAction, Image, Random, Sim, SimDisk, stand_in};
use dolmen_types::{
    Actions, Claim, ErrorKind, NodeName, OpId, OpKind, Options, Result, Span, Value, WriteFlags,
};

use super::rig::Rig;
use crate::{Backup, Job, JobOptions, Status, prepare};

fn options(target: &str) -> Options {
    Options::new().with("device", "s").with("target", target).with("sync", "full")
}

fn add(draft: &mut Draft, name: &str, driver: impl Driver) {
    let name = NodeName::internal(name);
    draft
        .add_node(NodeDef {
            name: name.clone(),
            anonymous: false,
            kind: driver.kind(),
            rule: AccessRule::LEAF,
            flags: NodeFlags { unmap: true, ..NodeFlags::default() },
            owner: None,
            monitor: true,
            options: Value::Null,
        })
        .unwrap();
    draft.set_driver(&name, Arc::new(driver), false);
}

fn disk(image: Image, latency_ns_max: u64) -> SimDisk {
    SimDisk::new(image, DiskConfig { log: false, latency_ns_max, ..DiskConfig::default() })
}

fn patchwork(random: &mut Random, size: u64) -> Image {
    let mut image = Image::new(size);
    let mut at = 0;
    while at < size {
        let len = (random.between(1, 30) * 8192).min(size - at);
        if random.percent(60) {
            image.write(at, &vec![random.between(1, 255) as u8; len as usize]);
        }
        at += len;
    }
    image
}

/// Source `s`, target `t`, fleecing node `f`, and a guest on the source.
struct World {
    source: SimDisk,
    target: SimDisk,
    fleece: SimDisk,
    guest: Arc<UserEdge>,
    before: Vec<u8>,
}

impl World {
    async fn new(rig: &mut Rig, random: &mut Random, size: u64, slow: u64) -> World {
        let (a, b) = (patchwork(random, size), patchwork(random, size));
        let before = a.to_vec();
        let (source, target, fleece) = (disk(a, 100_000), disk(b, slow), disk(Image::new(size), 1000));
        let mut draft = rig.owner.draft();
        add(&mut draft, "s", source.clone());
        add(&mut draft, "t", target.clone());
        add(&mut draft, "f", fleece.clone());
        let op = OpId::internal("guest");
        draft
            .add_op(OpInfo {
                id: op.clone(),
                kind: "tool".into(),
                detail: "a guest".into(),
                since: None,
                ends_with: None,
                instead_of_writing: None,
            })
            .unwrap();
        draft.add_user(&op, "s", Claim { needs: Actions::D | Actions::V, allows: Actions::EVERY }).unwrap();
        rig.owner.commit(draft).await.unwrap();
        let guest = rig.owner.edges(&op).next().unwrap().clone();
        World { source, target, fleece, guest, before }
    }

    fn assert_copied(&self, seed: u64) {
        assert!(self.target.image().to_vec() == self.before, "seed {seed}: the copy differs");
    }
}

/// Writes, zeroes and discards all over the disk.
async fn scribble(rt: &Rt, guest: &Arc<UserEdge>, random: &mut Random, size: u64) -> Result<()> {
    let at = random.below(size);
    let span = Span::new(at, random.between(1, 100_000).min(size - at));
    let token = guest.begin().await?;
    let io = token.write(rt)?;
    match random.below(4) {
        0 => io.write_zeroes(span, WriteFlags::NONE).await,
        1 => io.discard(span, WriteFlags::NONE).await,
        _ => {
            let data = Memory::from_slice(&vec![random.between(1, 255) as u8; span.len() as usize]);
            io.write(span, &data.iovec(), WriteFlags::NONE).await
        }
    }
}

fn load(rt: &Rt, w: &World, random: &mut Random, size: u64, writes: u64) -> Rc<Cell<u32>> {
    let left = Rc::new(Cell::new(2));
    for _ in 0..2 {
        let (rt, mut random, guest, left) = (rt.clone(), random.fork(), w.guest.clone(), left.clone());
        rt.clone().spawn(async move {
            for _ in 0..writes {
                // A write that could not save the old data has changed nothing.
                let _ = scribble(&rt, &guest, &mut random, size).await;
                rt.sleep(Duration::from_nanos(random.below(400_000))).await;
            }
            left.set(left.get() - 1);
        });
    }
    left
}

fn backup(rig: &Rig, id: &str, mut options: Options, change: impl FnOnce(&mut JobOptions)) -> Rc<Job> {
    rig.job(id, Backup::from_options(&mut options).unwrap(), change)
}

/// With pauses, a limit, errors that are ignored or stop the job, with and without a fleecing node.
#[test]
fn the_copy_is_what_was_there_at_the_start() {
    for seed in 0..60 {
        Rig::run(seed, move |mut rig| async move {
            let mut random = Random::new(seed);
            let size = random.between(1, 30) * 50_176;
            let w = World::new(&mut rig, &mut random, size, 500_000).await;
            let nodes = rig.owner.graph().len();
            let mut o = options("t").with("on-target-error", *random.pick(&["ignore", "stop"]));
            if random.percent(50) {
                o.set("fleecing", "f");
            }
            let speed = if random.percent(30) { 20 << 20 } else { 0 };
            w.target.inject(Fault {
                kind: OpKind::Write,
                skip: random.below(6),
                times: 1,
                action: FaultAction::Fail(ErrorKind::NoSpace),
            });
            let job = backup(&rig, "b", o, |o| {
                o.speed = speed;
                o.auto_dismiss = false;
            });
            let before = load(&rig.rt, &w, &mut random, size, 0);
            rig.start_one(&job).await.unwrap();
            let writing = load(&rig.rt, &w, &mut random, size, 40);
            // A user who pauses and resumes; an error that stops the job is resumed as well.
            let (rt, job2) = (rig.rt.clone(), job.clone());
            rig.rt.spawn(async move {
                loop {
                    rt.sleep(Duration::from_micros(random.between(100, 3000))).await;
                    if job2.status() == Status::Concluded {
                        return;
                    }
                    let _ = if random.percent(30) { job2.pause() } else { job2.resume() };
                }
            });
            let job2 = job.clone();
            rig.until(move || job2.status() == Status::Concluded && before.get() == 0).await;
            assert_eq!(job.error(), None, "seed {seed}");
            w.assert_copied(seed);
            let progress = job.progress();
            assert_eq!((progress.current, progress.total), (size, size), "seed {seed}");
            assert_eq!(rig.owner.graph().len(), nodes, "the filters are gone");
            assert!(rig.owner.claims().is_empty());
            while writing.get() > 0 {
                rig.rt.sleep(Duration::from_millis(1)).await;
            }
            w.assert_copied(seed);
        });
    }
}

/// The target takes seconds; the fleecing node does not, so the guest's writes don't either. Without it they do.
#[test]
fn fleecing_keeps_the_guest_going() {
    for (fleecing, slow) in [(true, false), (false, true)] {
        Rig::run(9, move |mut rig| async move {
            let mut random = Random::new(9);
            let size = 1 << 20;
            let w = World::new(&mut rig, &mut random, size, 4_000_000_000).await;
            let o = options("t");
            let job = backup(&rig, "b", if fleecing { o.with("fleecing", "f") } else { o }, |_| {});
            rig.start_one(&job).await.unwrap();
            let start = rig.rt.now();
            for _ in 0..20 {
                scribble(&rig.rt, &w.guest, &mut random, size).await.unwrap();
            }
            assert_eq!(rig.rt.now().since(start) > Duration::from_secs(1), slow);
            let job2 = job.clone();
            rig.until(move || job2.status() == Status::Null).await;
            w.assert_copied(9);
            if fleecing {
                assert!(w.fleece.count(OpKind::Discard) > 0, "what has been copied is given back");
                assert!(w.fleece.count(OpKind::Write) > 0);
            }
        });
    }
}

/// Nothing is copied but what the guest overwrites; a cancel takes the filter away.
#[test]
fn sync_none_saves_what_is_overwritten() {
    Rig::run(5, |mut rig| async move {
        let mut random = Random::new(5);
        let size = 40 << 16;
        let w = World::new(&mut rig, &mut random, size, 1000).await;
        let job = backup(&rig, "b", options("t").with("sync", "none"), |_| {});
        rig.start_one(&job).await.unwrap();
        let junk = w.target.image().to_vec();
        let token = w.guest.begin().await.unwrap();
        let data = Memory::from_slice(&[9; 100]);
        let at = Span::new(5 << 16, 100);
        token.write(&rig.rt).unwrap().write(at, &data.iovec(), WriteFlags::NONE).await.unwrap();
        drop(token);
        let chunk = 5 << 16..6 << 16;
        let mut expected = junk;
        expected[chunk.clone()].copy_from_slice(&w.before[chunk]);
        assert!(w.target.image().to_vec() == expected, "one chunk and no more");
        assert_eq!(job.status(), Status::Running);
        job.cancel(true).unwrap();
        let job2 = job.clone();
        rig.until(move || job2.status() == Status::Null).await;
        assert!(rig.owner.claims().is_empty());
    });
}

/// The guest is let through, so there is no copy; the job says so.
#[test]
fn a_broken_snapshot_fails_the_job() {
    for fleecing in [false, true] {
        Rig::run(6, move |mut rig| async move {
            let mut random = Random::new(6);
            let size = 30 << 16;
            let w = World::new(&mut rig, &mut random, size, 100_000).await;
            let mut o = options("t").with("on-cbw-error", "break-snapshot").with("on-target-error", "ignore");
            if fleecing {
                o.set("fleecing", "f");
            }
            let job = backup(&rig, "b", o, |o| {
                o.speed = 1;
                o.auto_dismiss = false;
            });
            rig.start_one(&job).await.unwrap();
            let broken = if fleecing { &w.fleece } else { &w.target };
            for kind in [OpKind::Write, OpKind::WriteZeroes] {
                broken.inject(Fault {
                    kind,
                    skip: 0,
                    times: 100,
                    action: FaultAction::Fail(ErrorKind::NoSpace),
                });
            }
            for _ in 0..20 {
                scribble(&rig.rt, &w.guest, &mut random, size).await.unwrap();
            }
            let job2 = job.clone();
            rig.until(move || job2.status() == Status::Concluded).await;
            let error = job.error().expect("fails");
            assert!(error.contains("old data could not be saved") || error.contains("broken"), "{error}");
        });
    }
}

/// What the job claims is what its stand-in claims, with which the access control is tested.
#[test]
fn claims_are_those_of_the_table() {
    Sim::run(0, |rt| async move {
        let claims = |owner: &GraphOwner| {
            let mut all: Vec<_> = owner
                .claims()
                .iter()
                .map(|c| (c.node.to_string(), c.claim, c.scope.clone(), c.pins, c.why.clone()))
                .collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        };
        let mut stand = stand_in::World::new(&rt).await.unwrap();
        stand.run(|d| stand_in::backup(d, "b", "top", "t1", None)).await.unwrap();
        let mut real = stand_in::World::new(&rt).await.unwrap();
        let (job, opener) = real_backup(&rt, options("t1").with("device", "top"));
        let mut draft = real.owner.draft();
        prepare(&job, &mut draft, &opener).await.unwrap();
        real.owner.commit(draft).await.unwrap();
        assert_eq!(claims(&real.owner), claims(&stand.owner));
        // And they work: past the filter nobody writes, through it everybody may.
        for (id, node, writable, refused) in [
            ("e1", "top", true, None),
            ("e2", "mid", true, Some("mid")),
            ("e3", "t1", true, Some("t1")),
            ("e4", "base", false, None),
        ] {
            match (real.run(|d| stand_in::export(d, id, node, writable)).await, refused) {
                (Ok(()), None) => {}
                (Err(e), Some(at)) => stand_in::assert_refused(&e, at, Actions::V, id, "b"),
                (other, _) => panic!("{id}: {other:?}"),
            }
        }
        for (name, e) in [
            ("resize", real.run(|d| stand_in::resize(d, "r", "top")).await),
            ("relink", real.run(|d| stand_in::relink_backing(d, "l", "top", "base")).await),
            ("commit", real.run(|d| stand_in::commit(d, "c", "mid", "base", false)).await),
        ] {
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Conflict, "{name}");
        }
    });
}

fn real_backup(rt: &Rt, mut options: Options) -> (Rc<Job>, NodeOpener<'_>) {
    let work = Backup::from_options(&mut options).unwrap();
    let job = Job::new(
        JobOptions::new(OpId::internal("b")),
        Box::new(work),
        rt,
        Rc::new(|_, _| {}),
        Rc::new(|_| {}),
    );
    let policy = OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };
    (job, NodeOpener { registry: Registry::new(&[]), policy, names: Registry::protocol_name, rt })
}

#[test]
fn mistakes_are_named() {
    Rig::run(1, |mut rig| async move {
        let mut random = Random::new(1);
        let w = World::new(&mut rig, &mut random, 1 << 20, 0).await;
        let mut draft = rig.owner.draft();
        add(&mut draft, "small", disk(Image::new(1 << 16), 0));
        rig.owner.commit(draft).await.unwrap();
        let perf = |name: &str, value: i128| {
            options("t").with("x-perf", Options::new().with(name, Value::Int(value)).into_value())
        };
        for (mut o, says) in [
            (options("t").with("sync", "bitmap"), "bitmaps are not supported yet"),
            (options("t").with("sync", "incremental"), "bitmaps are not supported yet"),
            (options("t").with("bitmap", "b"), "'bitmap' is not supported yet"),
            (options("t").with("compress", true), "Compression is not supported for this drive"),
            (options("t").with("fleecing", "f").with("sync", "none"), "'fleecing' works with sync=full only"),
            (perf("max-workers", 0), "max-workers must be between 1 and 2147483647"),
            (perf("max-chunk", -1), "max-chunk must be zero (which means no limit) or positive"),
        ] {
            let e = Backup::from_options(&mut o).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        for (o, says) in [
            (options("s"), "Source and target cannot be the same"),
            (options("small"), "Source and target image have different sizes"),
            (options("nobody"), "Cannot find device='nobody' nor node-name='nobody'"),
            (options("t").with("fleecing", "t"), "Source and target cannot be the same"),
            (options("t").with("filter-node-name", "f"), "Duplicate nodes with node-name='f'"),
            (perf("max-chunk", 1000), "Required max-chunk (1000) is less than backup cluster size (65536)"),
            (perf("min-cluster-size", 1000), "min-cluster-size needs to be a power of 2"),
        ] {
            let (job, opener) = real_backup(&rig.rt, o);
            let mut draft = rig.owner.draft();
            let e = prepare(&job, &mut draft, &opener).await.unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        assert_eq!(rig.owner.claims().len(), 0);
        assert_eq!(w.source.count(OpKind::Read), 0);
    });
}
