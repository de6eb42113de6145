use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::GraphOwner;
use dolmen_rt::Rt;
use dolmen_sim::{Fault, FaultAction, Image, Random, Sim, SimDisk};
use dolmen_types::{Actions, ErrorKind, OpKind, ReadFlags, Span, WriteFlags};

use super::{Count, add, attach, disk, done, nap, patchwork, piece, scribble};
use crate::{CopyOptions, Engine, Pass, Route, Tracker};

const CHUNK: u64 = 16 << 10;

struct World {
    owner: GraphOwner,
    source: SimDisk,
    target: SimDisk,
    tracker: Arc<Tracker>,
}

impl World {
    async fn new(rt: &Rt, source: Image, target: Image) -> World {
        let (size, source, target) = (source.size(), disk(source), disk(target));
        let mut owner = GraphOwner::new(rt.clone());
        let mut draft = owner.draft();
        add(&mut draft, "s", source.clone());
        add(&mut draft, "t", target.clone());
        owner.commit(draft).await.unwrap();
        World { owner, source, target, tracker: Arc::new(Tracker::all_dirty(size, CHUNK)) }
    }

    async fn engine(&mut self, rt: &Rt, options: CopyOptions) -> Engine {
        let source = attach(&mut self.owner, "reads", "s", Actions::D | Actions::V).await;
        let target = attach(&mut self.owner, "writes", "t", Actions::V).await;
        Engine::new(rt, Route::Edges { source, target }, self.tracker.clone(), options)
    }

    fn assert_same(&self) {
        assert!(self.source.image().to_vec() == self.target.image().to_vec(), "the copy differs");
    }
}

fn options(random: &mut Random) -> CopyOptions {
    CopyOptions {
        workers: random.between(1, 8) as usize,
        max_chunk: random.between(1, 12) * 8192,
        detect_zeroes: random.percent(30),
        ..CopyOptions::default()
    }
}

/// Guests write, zero and discard while the copy runs; some tell the map afterwards, others write to
/// both sides themselves; the target fails now and then. When everything has come to rest and the
/// last pass is through, both sides are the same.
#[test]
fn a_copy_under_load_is_the_same_in_the_end() {
    for seed in 0..120 {
        Sim::run(seed, |rt| async move {
            let mut random = Random::new(seed);
            let size = random.between(1, 60) * 9216;
            let old = patchwork(&mut random, size);
            let mut w = World::new(&rt, patchwork(&mut random, size), old).await;
            let options = options(&mut random);
            let engine = w.engine(&rt, options).await;
            for n in 0..2 {
                w.target.inject(Fault {
                    kind: OpKind::Write,
                    skip: random.below(20),
                    times: 1 + n,
                    action: FaultAction::Fail(ErrorKind::NoSpace),
                });
            }
            let guest = attach(&mut w.owner, "guest", "s", Actions::D | Actions::V).await;
            let twin = attach(&mut w.owner, "twin", "t", Actions::D | Actions::V).await;
            let left = Rc::new(std::cell::Cell::new(3));
            for i in 0..3u64 {
                let (rt, mut random, left) = (rt.clone(), random.fork(), left.clone());
                let (guest, twin, tracker) = (guest.clone(), twin.clone(), w.tracker.clone());
                rt.clone().spawn(async move {
                    for _ in 0..random.below(40) {
                        let span = piece(&mut random, size, 50_000);
                        if i == 0 {
                            both(&rt, &guest, &twin, &tracker, &mut random, span).await;
                        } else {
                            scribble(&rt, &guest, &mut random, span).await.unwrap();
                            tracker.mark(span);
                        }
                        nap(&rt, &mut random).await;
                    }
                    left.set(left.get() - 1);
                });
            }
            let hooks = Count::default();
            loop {
                assert_eq!(engine.run(&hooks).await.unwrap(), Pass::Clean);
                if left.get() == 0 && done(&w.tracker) {
                    break;
                }
                nap(&rt, &mut random).await;
            }
            w.assert_same();
        });
    }
}

/// A write that goes to both sides under a hold.
async fn both(
    rt: &Rt,
    source: &Arc<dolmen_graph::UserEdge>,
    target: &Arc<dolmen_graph::UserEdge>,
    tracker: &Tracker,
    random: &mut Random,
    span: Span,
) {
    let held = tracker.hold(span).await.unwrap();
    let mut same = random.fork();
    let memory = dolmen_rt::Memory::from_slice(&vec![same.between(1, 255) as u8; span.len() as usize]);
    for edge in [source, target] {
        let token = edge.begin().await.unwrap();
        let written = token.write(rt).unwrap().write(span, &memory.iovec(), WriteFlags::NONE).await;
        if written.is_err() {
            // The target broke: it gets the whole chunks again.
            drop(held);
            tracker.mark(span);
            return;
        }
    }
    held.done(span);
}

#[test]
fn holes_are_not_read_and_known_zeroes_not_written() {
    Sim::run(1, |rt| async move {
        let mut image = Image::new(64 * CHUNK);
        image.write(3 * CHUNK, &vec![7; CHUNK as usize]);
        let mut old = Image::new(64 * CHUNK);
        old.write(40 * CHUNK, &vec![9; 2 * CHUNK as usize]);
        let mut w = World::new(&rt, image, old).await;
        let engine = w.engine(&rt, CopyOptions::default()).await;
        let hooks = Count::default();
        assert_eq!(engine.run(&hooks).await.unwrap(), Pass::Clean);
        w.assert_same();
        assert_eq!((w.source.count(OpKind::Read), w.target.count(OpKind::Write)), (1, 1));
        assert_eq!(w.target.count(OpKind::WriteZeroes), 1, "only where there was something");
        assert_eq!(hooks.data.get(), CHUNK);
        assert_eq!(hooks.data.get() + hooks.zeroes.get() + hooks.nothing.get(), 64 * CHUNK);
    });
}

/// Story: "these 100 chunks are zeroes" was learnt, one of them was written to, and the rest of the
/// answer was believed all the same.
#[test]
fn a_write_after_the_look_is_not_overlooked() {
    for seed in 0..40 {
        Sim::run(seed, |rt| async move {
            let mut random = Random::new(seed);
            let size = 200 * CHUNK;
            let mut old = Image::new(size);
            old.write(0, &vec![1; size as usize]);
            let mut w = World::new(&rt, Image::new(size), old).await;
            let options = CopyOptions { workers: 2, ..CopyOptions::default() };
            let engine = w.engine(&rt, options).await;
            let guest = attach(&mut w.owner, "guest", "s", Actions::D | Actions::V).await;
            let (tracker, rt2) = (w.tracker.clone(), rt.clone());
            let over = Rc::new(std::cell::Cell::new(false));
            let over2 = over.clone();
            rt.spawn(async move {
                for _ in 0..30 {
                    let span = piece(&mut random, size, 3 * CHUNK);
                    scribble(&rt2, &guest, &mut random, span).await.unwrap();
                    tracker.mark(span);
                }
                over2.set(true);
            });
            while !(over.get() && done(&w.tracker)) {
                engine.run(&Count::default()).await.unwrap();
                rt.sleep(std::time::Duration::from_micros(50)).await;
            }
            w.assert_same();
        });
    }
}

/// Story: the engine looked what was still watched, then waited for its tokens while the graph changed. A write of that time
/// was overlooked, and a part of which one chunk had data was copied as zeroes.
#[test]
fn a_write_while_the_graph_changes_is_not_overlooked() {
    for seed in 0..300 {
        Sim::run(seed, |rt| async move {
            let mut random = Random::new(seed);
            let size = 12 * CHUNK;
            // Short runs of zeroes and of data: each part is found out in several steps.
            let mut image = Image::new(size);
            for at in (5..12).step_by(6) {
                image.write(at * CHUNK, &vec![7; 700]);
            }
            let mut old = Image::new(size);
            old.write(0, &vec![1; size as usize]);
            let mut w = World::new(&rt, image, old).await;
            let options = CopyOptions { workers: 1, ..CopyOptions::default() };
            let engine = w.engine(&rt, options).await;
            let guest = attach(&mut w.owner, "guest", "s", Actions::D | Actions::V).await;
            let left = Rc::new(std::cell::Cell::new(2));
            let (tracker, rt2, left2, mut random2) =
                (w.tracker.clone(), rt.clone(), left.clone(), random.fork());
            rt.spawn(async move {
                for _ in 0..6 {
                    let span = piece(&mut random2, size, CHUNK);
                    scribble(&rt2, &guest, &mut random2, span).await.unwrap();
                    tracker.mark(span);
                }
                left2.set(left2.get() - 1);
            });
            let (mut owner, source, rt2, left2) =
                (w.owner.clone(), w.source.clone(), rt.clone(), left.clone());
            rt.spawn(async move {
                for _ in 0..8 {
                    // Another driver of the node: whoever uses it has to wait.
                    let mut draft = owner.draft();
                    let name = draft.node_names().find(|n| n.as_str() == "s").unwrap().clone();
                    draft.set_driver(&name, Arc::new(source.clone()), false);
                    owner.commit(draft).await.unwrap();
                    rt2.yield_now().await;
                }
                left2.set(left2.get() - 1);
            });
            while !(left.get() == 0 && done(&w.tracker)) {
                engine.run(&Count::default()).await.unwrap();
                rt.sleep(std::time::Duration::from_micros(50)).await;
            }
            w.assert_same();
        });
    }
}

#[test]
fn an_error_that_ends_the_copy_leaves_its_part_dirty() {
    Sim::run(3, |rt| async move {
        let image = Image::from_bytes(&vec![5; 20 * CHUNK as usize]);
        let mut w = World::new(&rt, image, Image::new(20 * CHUNK)).await;
        let options = CopyOptions { workers: 3, max_chunk: CHUNK, ..CopyOptions::default() };
        let engine = w.engine(&rt, options).await;
        w.source.inject(Fault {
            kind: OpKind::Read,
            skip: 4,
            times: 1,
            action: FaultAction::Fail(ErrorKind::Io),
        });
        let hooks = Count { give_up: true, ..Count::default() };
        assert_eq!(engine.run(&hooks).await.unwrap_err().kind(), ErrorKind::Io);
        let failures = hooks.failures.take();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].side, crate::Side::Source);
        assert!(w.tracker.with(|m| m.is_dirty(failures[0].span)));
        assert!(w.tracker.with(|m| !m.is_in_flight(Span::new(0, 20 * CHUNK))), "the others have ended");
        // And it can go on.
        assert_eq!(engine.run(&Count::default()).await.unwrap(), Pass::Clean);
        w.assert_same();
    });
}

#[test]
fn attention_stops_between_parts() {
    Sim::run(4, |rt| async move {
        let image = Image::from_bytes(&vec![5; 40 * CHUNK as usize]);
        let mut w = World::new(&rt, image, Image::new(40 * CHUNK)).await;
        let options = CopyOptions { workers: 2, max_chunk: CHUNK, ..CopyOptions::default() };
        let engine = Rc::new(w.engine(&rt, options).await);
        let hooks = Rc::new(Count::default());
        let (hooks2, rt2) = (hooks.clone(), rt.clone());
        rt.spawn(async move {
            while hooks2.data.get() < 4 * CHUNK {
                rt2.sleep(std::time::Duration::from_micros(10)).await;
            }
            hooks2.attention.set(true);
        });
        assert_eq!(engine.run(&*hooks).await.unwrap(), Pass::Attention);
        assert!(hooks.data.get() < 20 * CHUNK);
        assert!(w.tracker.with(|m| !m.is_in_flight(Span::new(0, 40 * CHUNK))));
        hooks.attention.set(false);
        assert_eq!(engine.run(&*hooks).await.unwrap(), Pass::Clean);
        w.assert_same();
    });
}

/// What has been copied is given back on the source, and only that.
#[test]
fn the_source_is_discarded_after_the_copy() {
    Sim::run(5, |rt| async move {
        let image = Image::from_bytes(&vec![5; 8 * CHUNK as usize]);
        let mut w = World::new(&rt, image.clone(), Image::new(8 * CHUNK)).await;
        let options = CopyOptions { discard_source: true, ..CopyOptions::default() };
        let engine = w.engine(&rt, options).await;
        engine.run(&Count::default()).await.unwrap();
        assert!(w.target.image().to_vec() == image.to_vec());
        assert!(w.source.count(OpKind::Discard) > 0);
        let edge = attach(&mut w.owner, "look", "t", Actions::D).await;
        let token = edge.begin().await.unwrap();
        let memory = dolmen_rt::Memory::zeroed(512);
        token.read(&rt).unwrap().read(Span::new(0, 512), &memory.iovec(), ReadFlags::NONE).await.unwrap();
        assert_eq!(memory.to_vec(), [5; 512]);
    });
}
