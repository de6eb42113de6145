//! Copy-before-write and snapshot-access: the point in time is what it was, always.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{GraphOwner, Implicit, NodeOpener, OpenPolicy, Registry, UserEdge};
use dolmen_rt::{Memory, Rt};
use dolmen_sim::{DiskConfig, Fault, FaultAction, Image, Random, Sim, SimDisk};
use dolmen_types::{Actions, ErrorKind, OpKind, Options, ReadFlags, Result, Span, WriteFlags};

use super::{Count, add, attach, disk, nap, patchwork, piece, scribble};
use crate::{
    COPY_BEFORE_WRITE, CopyBeforeWrite, CopyOptions, Engine, OnCbwError, Pass, PointInTime, Route,
    SNAPSHOT_ACCESS,
};

static REGISTRY: Registry = Registry::new(&[&COPY_BEFORE_WRITE, &SNAPSHOT_ACCESS]);

const CHUNK: u64 = 64 << 10;

struct World {
    owner: GraphOwner,
    file: SimDisk,
    target: SimDisk,
    before: Vec<u8>,
}

fn cbw() -> Options {
    Options::new()
        .with("driver", "copy-before-write")
        .with("node-name", "cbw")
        .with("file", "f")
        .with("target", "t")
}

async fn open(rt: &Rt, owner: &mut GraphOwner, options: Options) -> Result<()> {
    let policy =
        OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "nothing", probe_with: "nothing" };
    let opener = NodeOpener { registry: REGISTRY, policy, names: Registry::protocol_name, rt };
    let mut draft = owner.draft();
    opener.open(&mut draft, options, true).await?;
    owner.commit(draft).await.map(drop)
}

impl World {
    async fn leaves(rt: &Rt, image: Image, target: SimDisk) -> World {
        let (before, file) = (image.to_vec(), disk(image));
        let mut owner = GraphOwner::new(rt.clone());
        let mut draft = owner.draft();
        add(&mut draft, "f", file.clone());
        add(&mut draft, "t", target.clone());
        owner.commit(draft).await.unwrap();
        World { owner, file, target, before }
    }

    async fn new(rt: &Rt, image: Image, target: SimDisk, options: Options) -> World {
        let mut w = World::leaves(rt, image, target).await;
        open(rt, &mut w.owner, options).await.unwrap();
        let sa = Options::new()
            .with("driver", "snapshot-access")
            .with("node-name", "sa")
            .with("file", "cbw")
            .with("discard", "unmap");
        open(rt, &mut w.owner, sa).await.unwrap();
        w
    }

    async fn guest(&mut self) -> Arc<UserEdge> {
        attach(&mut self.owner, "guest", "cbw", Actions::D | Actions::V | Actions::M | Actions::S).await
    }

    async fn reader(&mut self) -> Arc<UserEdge> {
        attach(&mut self.owner, "reader", "sa", Actions::D | Actions::V).await
    }
}

async fn read(rt: &Rt, edge: &Arc<UserEdge>, span: Span) -> Result<Vec<u8>> {
    let token = edge.begin().await?;
    let memory = Memory::zeroed(span.len() as usize);
    token.read(rt)?.read(span, &memory.iovec(), ReadFlags::NONE).await?;
    Ok(memory.to_vec())
}

async fn write(rt: &Rt, edge: &Arc<UserEdge>, span: Span, byte: u8) -> Result<()> {
    let token = edge.begin().await?;
    let memory = Memory::from_slice(&vec![byte; span.len() as usize]);
    token.write(rt)?.write(span, &memory.iovec(), WriteFlags::NONE).await
}

async fn discard(rt: &Rt, edge: &Arc<UserEdge>, span: Span) -> Result<()> {
    let token = edge.begin().await?;
    token.write(rt)?.discard(span, WriteFlags::NONE).await
}

/// The chunks that lie wholly in a span.
fn whole(span: Span, size: u64) -> Span {
    let start = span.offset().next_multiple_of(CHUNK);
    let end = if span.end() >= size { size } else { span.end() / CHUNK * CHUNK };
    Span::from_range(start.min(end), end)
}

/// Guests write, readers of the snapshot compare with what was there at the start, a reader discards what it
/// has seen, the target fails now and then: then the guest's write fails, and is tried again.
#[test]
fn the_snapshot_is_what_it_was() {
    for seed in 0..100 {
        Sim::run(seed, |rt| async move {
            let mut random = Random::new(seed);
            let size = random.between(1, 40) * 30_208;
            let junk = patchwork(&mut random, size + CHUNK);
            let mut w = World::new(&rt, patchwork(&mut random, size), disk(junk), cbw()).await;
            let (guest, reader) = (w.guest().await, w.reader().await);
            for _ in 0..2 {
                w.target.inject(Fault {
                    kind: OpKind::Write,
                    skip: random.below(10),
                    times: 1,
                    action: FaultAction::Fail(ErrorKind::Io),
                });
            }
            let left = Rc::new(Cell::new(0));
            let forgotten: Rc<RefCell<Vec<Span>>> = Rc::default();
            let failures = Rc::new(Cell::new(0));
            for i in 0..5 {
                let (rt, mut random, before) = (rt.clone(), random.fork(), w.before.clone());
                let (guest, reader, left, forgotten) =
                    (guest.clone(), reader.clone(), left.clone(), forgotten.clone());
                let failures = failures.clone();
                left.set(left.get() + 1);
                rt.clone().spawn(async move {
                    for _ in 0..random.between(1, 40) {
                        let span = piece(&mut random, size, 150_000);
                        if i < 3 {
                            if scribble(&rt, &guest, &mut random, span).await.is_err() {
                                failures.set(failures.get() + 1);
                            }
                        } else if i == 3 && random.percent(20) {
                            let gone = whole(span, size);
                            forgotten.borrow_mut().push(gone);
                            discard(&rt, &reader, span).await.unwrap();
                        } else {
                            let lost = |s: &Span| s.overlaps(span);
                            match read(&rt, &reader, span).await {
                                Ok(bytes) => {
                                    let range = span.offset() as usize..span.end() as usize;
                                    // A discard may have come while it was read.
                                    if !forgotten.borrow().iter().any(lost) {
                                        assert!(bytes == before[range], "seed {seed}: {span} differs");
                                    }
                                }
                                Err(e) => {
                                    assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
                                    assert!(forgotten.borrow().iter().any(lost), "seed {seed}: {e}");
                                }
                            }
                        }
                        nap(&rt, &mut random).await;
                    }
                    left.set(left.get() - 1);
                });
            }
            while left.get() > 0 {
                rt.sleep(Duration::from_millis(1)).await;
            }
            assert!(failures.get() <= 2, "one guest write per fault");
            // Everything that was not discarded is still there, and zeroes are told as such.
            let mut at = 0;
            while at < size {
                let span = Span::new(at, CHUNK.min(size - at));
                at += CHUNK;
                if forgotten.borrow().iter().any(|s| s.overlaps(span)) {
                    assert_eq!(
                        read(&rt, &reader, span).await.unwrap_err().kind(),
                        ErrorKind::PermissionDenied
                    );
                    continue;
                }
                let bytes = read(&rt, &reader, span).await.unwrap();
                assert!(bytes == w.before[span.offset() as usize..span.end() as usize]);
                let status = dolmen_graph::chain_status(&reader.node(), &rt, span, None).await.unwrap();
                if status.zero {
                    assert!(bytes[..status.len as usize].iter().all(|b| *b == 0));
                }
            }
        });
    }
}

/// What need not be saved is not: writes that change nothing, the second write to a chunk.
#[test]
fn each_chunk_is_saved_once_and_only_if_it_changes() {
    Sim::run(0, |rt| async move {
        let image = Image::from_bytes(&vec![1; 4 * CHUNK as usize]);
        let mut w = World::new(&rt, image, disk(Image::new(4 * CHUNK)), cbw()).await;
        let guest = w.guest().await;
        {
            let token = guest.begin().await.unwrap();
            let same = Memory::from_slice(&[1; 512]);
            let io = token.write_unchanged(&rt).unwrap();
            io.write(Span::new(0, 512), &same.iovec(), WriteFlags::NONE).await.unwrap();
        }
        assert_eq!(w.target.count(OpKind::Write), 0);
        for at in [0, 512, 100, CHUNK - 1] {
            write(&rt, &guest, Span::new(at, 1), 9).await.unwrap();
        }
        assert_eq!(w.target.count(OpKind::Write), 1);
        assert_eq!(w.target.image().to_vec()[..CHUNK as usize], vec![1; CHUNK as usize]);
        // Several chunks at once, then the rest by cutting the node.
        write(&rt, &guest, Span::new(CHUNK - 1, CHUNK), 9).await.unwrap();
        assert_eq!(w.target.count(OpKind::Write), 2);
        let token = guest.begin().await.unwrap();
        token.resize(&rt).unwrap().resize(CHUNK, dolmen_graph::Prealloc::Off).await.unwrap();
        drop(token);
        assert_eq!((w.file.size(), w.target.image().to_vec()), (CHUNK, w.before.clone()));
        let reader = w.reader().await;
        assert_eq!(read(&rt, &reader, Span::new(0, 4 * CHUNK)).await.unwrap(), w.before);
    });
}

#[test]
fn a_snapshot_breaks_instead_of_the_guest_if_so_wished() {
    Sim::run(0, |rt| async move {
        let image = Image::from_bytes(&vec![1; 4 * CHUNK as usize]);
        let options = cbw().with("on-cbw-error", "break-snapshot");
        let mut w = World::new(&rt, image, disk(Image::new(4 * CHUNK)), options).await;
        let (guest, reader) = (w.guest().await, w.reader().await);
        write(&rt, &guest, Span::new(0, 1), 9).await.unwrap();
        w.target.inject(Fault {
            kind: OpKind::Write,
            skip: 0,
            times: 1,
            action: FaultAction::Fail(ErrorKind::NoSpace),
        });
        write(&rt, &guest, Span::new(CHUNK, 1), 9).await.unwrap();
        for at in [0, CHUNK, 3 * CHUNK] {
            let e = read(&rt, &reader, Span::new(at, 1)).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
        }
        write(&rt, &guest, Span::new(3 * CHUNK, 1), 9).await.unwrap();
        assert_eq!(w.target.count(OpKind::Write), 2, "nothing is saved any more");
    });
}

/// A target that answers after hours, and a limit of a second.
#[test]
fn a_slow_target_is_given_up() {
    for (on_error, guest_fails) in [("break-guest-write", true), ("break-snapshot", false)] {
        Sim::run(7, |rt| async move {
            let slow = DiskConfig { latency_ns_max: 1 << 50, log: false, ..DiskConfig::default() };
            let image = Image::from_bytes(&vec![1; 2 * CHUNK as usize]);
            let options = cbw().with("on-cbw-error", on_error).with("cbw-timeout", 1u64);
            let mut w = World::new(&rt, image, SimDisk::new(Image::new(2 * CHUNK), slow), options).await;
            let guest = w.guest().await;
            let start = rt.now();
            let wrote = write(&rt, &guest, Span::new(0, 1), 9).await;
            assert!(rt.now().since(start) < Duration::from_secs(2));
            match wrote {
                Ok(()) => assert!(!guest_fails),
                Err(e) => assert!(guest_fails && e.kind() == ErrorKind::TimedOut, "{e}"),
            }
        });
    }
}

#[test]
fn mistakes_are_named() {
    Sim::run(0, |rt| async move {
        let mut w = World::leaves(&rt, Image::new(CHUNK), disk(Image::new(CHUNK / 2))).await;
        let bitmap = Options::new().with("node", "f").with("name", "b");
        for (options, says) in [
            (cbw(), "fewer than the"),
            (cbw().with("min-cluster-size", 3000u64), "min-cluster-size needs to be a power of 2"),
            (cbw().with("min-cluster-size", 1u64 << 40), "min-cluster-size is larger than"),
            (cbw().with("bitmap", bitmap.into_value()), "'bitmap'"),
            (cbw().with("on-cbw-error", "x"), "does not accept value 'x'"),
            (Options::new().with("driver", "snapshot-access").with("file", "f"), "keeps no point in time"),
        ] {
            let e = open_over(&rt, &mut w.owner, options, says).await;
            assert!(e.contains(says), "{e}");
        }
    });
}

/// The error of opening; the target is large enough unless that is what is tested.
async fn open_over(rt: &Rt, owner: &mut GraphOwner, mut options: Options, says: &str) -> String {
    if says.starts_with("min") {
        options.set("target", "f");
        options.set("file", "t");
    }
    open(rt, owner, options).await.unwrap_err().to_string()
}

/// The point is set up as a job does it; the guest writes through the filter while the engine copies.
#[test]
fn a_backup_is_what_was_there_at_the_start() {
    for seed in 0..80 {
        Sim::run(seed, |rt| async move {
            let mut random = Random::new(seed);
            let size = random.between(1, 40) * 30_208;
            let junk = patchwork(&mut random, size);
            let mut w = World::leaves(&rt, patchwork(&mut random, size), disk(junk)).await;
            let guest = attach(&mut w.owner, "guest", "f", Actions::D | Actions::V).await;
            let point = Arc::new(PointInTime::new(size, 8192 << random.below(5)));
            let (edge, driver) = interpose(&mut w.owner, &point).await;
            let options = CopyOptions {
                workers: random.between(1, 5) as usize,
                max_chunk: random.between(1, 5) * CHUNK,
                ..CopyOptions::default()
            };
            let route = Route::Filter { edge, driver };
            let engine = Engine::new(&rt, route, point.tracker().clone(), options);
            w.target.inject(Fault {
                kind: OpKind::Write,
                skip: random.below(10),
                times: 1,
                action: FaultAction::Fail(ErrorKind::Io),
            });
            let left = Rc::new(Cell::new(3));
            for _ in 0..3 {
                let (rt, mut random) = (rt.clone(), random.fork());
                let (guest, left) = (guest.clone(), left.clone());
                rt.clone().spawn(async move {
                    for _ in 0..random.below(30) {
                        let span = piece(&mut random, size, 150_000);
                        // A write that fails has changed nothing; another will come.
                        let _ = scribble(&rt, &guest, &mut random, span).await;
                        nap(&rt, &mut random).await;
                    }
                    left.set(left.get() - 1);
                });
            }
            let hooks = Count::default();
            while !point.tracker().is_done() {
                assert_eq!(engine.run(&hooks).await.unwrap(), Pass::Clean);
                nap(&rt, &mut random).await;
            }
            assert!(w.target.image().to_vec() == w.before, "seed {seed}");
            while left.get() > 0 {
                rt.sleep(Duration::from_millis(1)).await;
            }
            assert!(w.target.image().to_vec() == w.before, "seed {seed}: and stays so");
        });
    }
}

async fn interpose(
    owner: &mut GraphOwner,
    point: &Arc<PointInTime>,
) -> (Arc<UserEdge>, Arc<dyn dolmen_graph::Driver>) {
    use dolmen_graph::{AccessRule, NodeDef, NodeFlags, OpInfo};
    use dolmen_types::{ChildRole, Claim, NodeName, OpId, Value};
    let (op, name) = (OpId::internal("backup"), NodeName::internal("filter"));
    let driver: Arc<dyn dolmen_graph::Driver> =
        Arc::new(CopyBeforeWrite::for_job(point.clone(), "t", OnCbwError::BreakGuestWrite));
    let mut draft = owner.draft();
    draft
        .add_op(OpInfo {
            id: op.clone(),
            kind: "job".into(),
            detail: "backup".into(),
            since: None,
            ends_with: None,
            instead_of_writing: None,
        })
        .unwrap();
    draft
        .add_node(NodeDef {
            name: name.clone(),
            anonymous: true,
            kind: &COPY_BEFORE_WRITE,
            rule: AccessRule::SAVES_OLD_DATA_FOR_JOB,
            flags: NodeFlags { unmap: true, ..NodeFlags::default() },
            owner: Some(op.clone()),
            monitor: false,
            options: Value::Null,
        })
        .unwrap();
    draft.link(&name, "target", ChildRole::Target, "t").unwrap();
    draft.set_driver(&name, driver.clone(), false);
    draft.interpose(&name, "file", "f").unwrap();
    draft.add_user(&op, &name, Claim { needs: Actions::D, allows: Actions::EVERY }).unwrap();
    owner.commit(draft).await.unwrap();
    let edge = owner.edges(&op).next().unwrap().clone();
    (edge, driver)
}
