//! Tests of the simulated disk: it loses what it may lose, and nothing else.

use std::collections::BTreeSet;
use std::rc::Rc;

use dolmen_graph::{Op, Prealloc};
use dolmen_rt::{Memory, Rt};
use dolmen_types::{ErrorKind, OpKind, ReadFlags, Result, Span, WriteFlags};

use crate::{
    CrashPoints, DiskConfig, Fault, FaultAction, Image, Oracle, Random, SECTOR, Sim, SimDisk, TagPattern,
    ZERO_TAG,
};

async fn write(rt: &Rt, disk: &SimDisk, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<()> {
    let memory = Memory::from_slice(bytes);
    let span = Span::new(offset, bytes.len() as u64);
    disk.run(rt, Op::Write { span, from: &memory.iovec(), flags }).await
}

async fn read(rt: &Rt, disk: &SimDisk, offset: u64, len: usize) -> Result<Vec<u8>> {
    let memory = Memory::zeroed(len);
    let span = Span::new(offset, len as u64);
    disk.run(rt, Op::Read { span, to: &memory.iovec(), flags: ReadFlags::NONE }).await?;
    Ok(memory.to_vec())
}

/// The distinct images of many crashes at a position.
fn crashes(disk: &SimDisk, position: usize) -> BTreeSet<Vec<u8>> {
    let mut points = CrashPoints::of(disk);
    points.advance(position);
    (0..300).map(|seed| points.crash(seed).to_vec()).collect()
}

fn sectors(values: &[u8]) -> Vec<u8> {
    values.iter().flat_map(|v| [*v; SECTOR as usize]).collect()
}

fn disk(values: &[u8]) -> SimDisk {
    SimDisk::new(Image::from_bytes(&sectors(values)), DiskConfig::default())
}

#[test]
fn unflushed_writes_are_lost_in_any_combination() {
    let d = disk(&[0, 0]);
    let d2 = d.clone();
    Sim::run(1, |rt| async move {
        write(&rt, &d2, 0, &sectors(&[1, 1]), WriteFlags::NONE).await.unwrap();
        write(&rt, &d2, 0, &sectors(&[2]), WriteFlags::NONE).await.unwrap();
        assert_eq!(read(&rt, &d2, 0, 1024).await.unwrap(), sectors(&[2, 1]));
    });
    let found = crashes(&d, d.position());
    let all: BTreeSet<_> = [0, 1, 2].iter().flat_map(|a| [0, 1].map(|b| sectors(&[*a, b]))).collect();
    assert_eq!(found, all, "every sector has its old value or that of any write");
}

#[test]
fn a_completed_flush_keeps_what_had_completed() {
    let d = disk(&[0, 0]);
    let d2 = d.clone();
    let before_flush = Sim::run(2, |rt| async move {
        write(&rt, &d2, 0, &sectors(&[1]), WriteFlags::NONE).await.unwrap();
        let before = d2.position();
        d2.run(&rt, Op::Flush).await.unwrap();
        write(&rt, &d2, 512, &sectors(&[2]), WriteFlags::NONE).await.unwrap();
        before
    });
    assert_eq!(crashes(&d, d.position()), BTreeSet::from([sectors(&[1, 0]), sectors(&[1, 2])]));
    assert_eq!(crashes(&d, before_flush), BTreeSet::from([sectors(&[0, 0]), sectors(&[1, 0])]));
    // Submitted, not completed: nothing is promised yet.
    assert_eq!(crashes(&d, before_flush + 1), BTreeSet::from([sectors(&[0, 0]), sectors(&[1, 0])]));
}

#[test]
fn a_flush_says_nothing_about_writes_in_flight() {
    let mut lost = 0;
    for seed in 0..50 {
        let d = disk(&[0]);
        let d2 = d.clone();
        Sim::run(seed, |rt| async move {
            let (rt2, d3) = (rt.clone(), d2.clone());
            rt.spawn(async move {
                write(&rt2, &d3, 0, &sectors(&[1]), WriteFlags::NONE).await.unwrap();
            });
            // Not before the write has been submitted.
            while d2.position() == 0 {
                rt.sleep(std::time::Duration::from_nanos(1)).await;
            }
            d2.run(&rt, Op::Flush).await.unwrap();
        });
        lost += u32::from(crashes(&d, d.position()).contains(&sectors(&[0])));
    }
    assert!(lost >= 40, "only {lost} of 50 runs could lose the write");
}

#[test]
fn fua_is_durable_and_nothing_older_comes_back() {
    let d = disk(&[0, 0]);
    let d2 = d.clone();
    Sim::run(3, |rt| async move {
        write(&rt, &d2, 0, &sectors(&[1, 1]), WriteFlags::NONE).await.unwrap();
        write(&rt, &d2, 0, &sectors(&[2]), WriteFlags::FUA).await.unwrap();
    });
    assert_eq!(crashes(&d, d.position()), BTreeSet::from([sectors(&[2, 0]), sectors(&[2, 1])]));
}

#[test]
fn unaligned_writes_keep_their_neighbours() {
    let d = disk(&[7]);
    let d2 = d.clone();
    Sim::run(4, |rt| async move {
        write(&rt, &d2, 8, &[1; 8], WriteFlags::NONE).await.unwrap();
        write(&rt, &d2, 16, &[2; 8], WriteFlags::NONE).await.unwrap();
    });
    let mut first = sectors(&[7]);
    first[8..16].fill(1);
    let mut second = first.clone();
    second[16..24].fill(2);
    assert_eq!(crashes(&d, d.position()), BTreeSet::from([sectors(&[7]), first, second]));
}

#[test]
fn sizes_are_lost_or_kept() {
    let d = disk(&[7, 8]);
    let d2 = d.clone();
    Sim::run(5, |rt| async move {
        d2.run(&rt, Op::Resize { size: 512, prealloc: Prealloc::Off }).await.unwrap();
        d2.run(&rt, Op::Resize { size: 1024, prealloc: Prealloc::Off }).await.unwrap();
        assert_eq!(read(&rt, &d2, 0, 1024).await.unwrap(), sectors(&[7, 0]));
    });
    let found = crashes(&d, d.position());
    assert!(found.contains(&sectors(&[7, 8])) && found.contains(&sectors(&[7, 0])));
    assert!(found.contains(&sectors(&[7])) && found.len() == 3, "{} images", found.len());
    d.flush_now();
    assert_eq!(crashes(&d, d.position()), BTreeSet::from([sectors(&[7, 0])]));
}

#[test]
fn a_swallowed_flush_is_a_lie() {
    let d = disk(&[0]);
    d.inject(Fault { kind: OpKind::Flush, skip: 0, times: 1, action: FaultAction::Swallow });
    let d2 = d.clone();
    Sim::run(6, |rt| async move {
        write(&rt, &d2, 0, &sectors(&[1]), WriteFlags::NONE).await.unwrap();
        d2.run(&rt, Op::Flush).await.unwrap();
    });
    assert!(crashes(&d, d.position()).contains(&sectors(&[0])));
    let d2 = d.clone();
    Sim::run(6, |rt| async move { d2.run(&rt, Op::Flush).await.unwrap() });
    assert_eq!(crashes(&d, d.position()), BTreeSet::from([sectors(&[1])]));
}

#[test]
fn injected_errors_hit_the_right_request() {
    let d = disk(&[0, 0]);
    d.inject(Fault { kind: OpKind::Write, skip: 1, times: 1, action: FaultAction::Fail(ErrorKind::NoSpace) });
    Sim::run(7, |rt| async move {
        write(&rt, &d, 0, &sectors(&[1]), WriteFlags::NONE).await.unwrap();
        let e = write(&rt, &d, 512, &sectors(&[1]), WriteFlags::NONE).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace);
        read(&rt, &d, 0, 512).await.unwrap();
        write(&rt, &d, 512, &sectors(&[1]), WriteFlags::NONE).await.unwrap();
        assert_eq!(d.count(OpKind::Write), 3);
    });
}

#[test]
fn a_dropped_request_still_happens() {
    let d = disk(&[0]);
    Sim::run(8, |rt| async move {
        {
            let dropped = std::pin::pin!(write(&rt, &d, 0, &[1; 512], WriteFlags::NONE));
            assert!(futures_lite::future::poll_once(dropped).await.is_none());
        }
        assert_eq!(d.image().to_vec(), sectors(&[0]));
        rt.sleep(std::time::Duration::from_secs(1)).await;
        assert_eq!(d.image().to_vec(), sectors(&[1]));
        assert_eq!(d.position(), 3, "submitted, applied, completed");
    });
}

/// Several tasks write, zero and flush a bare disk; the oracle judges crashes of it. The disk
/// itself must keep the contract that the explorer later demands of a stack above it.
fn bare_disk(seed: u64) -> (Vec<Image>, usize) {
    const SECTORS: u64 = 16;
    let disk = SimDisk::new(Image::new(SECTORS * SECTOR), DiskConfig::default());
    let oracle = Rc::new(std::cell::RefCell::new(Oracle::new(vec![ZERO_TAG; SECTORS as usize])));
    let (d, o) = (disk.clone(), oracle.clone());
    Sim::run(seed, |rt| async move {
        let (done, all_done) = (Rc::new(std::cell::Cell::new(0)), 3);
        for task in 0..all_done {
            let (rt2, d, o, done) = (rt.clone(), d.clone(), o.clone(), done.clone());
            rt.spawn(async move {
                let mut random = Random::new(seed * 10 + task);
                for _ in 0..12 {
                    let first = random.below(SECTORS);
                    let span = Span::new(first, random.between(1, (SECTORS - first).min(4)));
                    let bytes = Span::new(span.offset() * SECTOR, span.len() * SECTOR);
                    match random.below(5) {
                        0 => {
                            let op = o.borrow_mut().flush(d.position());
                            let r = d.run(&rt2, Op::Flush).await;
                            o.borrow_mut().flushed(op, &r, d.position());
                        }
                        1 => {
                            let op = o.borrow_mut().discard(span, d.position());
                            let r = d.run(&rt2, Op::Discard { span: bytes, flags: WriteFlags::NONE }).await;
                            o.borrow_mut().complete(op, &r, d.position());
                        }
                        2 => {
                            let mark = o.borrow_mut().read();
                            let found = read(&rt2, &d, bytes.offset(), bytes.len() as usize).await.unwrap();
                            o.borrow_mut().check_read(mark, first, &found).unwrap();
                        }
                        _ => {
                            let fua = random.percent(20);
                            let tag = o.borrow_mut().fresh_tag();
                            let op = o.borrow_mut().write(span, tag, fua, d.position());
                            let mut data = vec![0; bytes.len() as usize];
                            TagPattern::fill(tag, first, &mut data);
                            let flags = if fua { WriteFlags::FUA } else { WriteFlags::NONE };
                            let r = write(&rt2, &d, bytes.offset(), &data, flags).await;
                            o.borrow_mut().complete(op, &r, d.position());
                        }
                    }
                }
                done.set(done.get() + 1);
            });
        }
        while done.get() < all_done {
            rt.sleep(std::time::Duration::from_micros(50)).await;
        }
    });
    let mut points = CrashPoints::of(&disk);
    let mut images = Vec::new();
    for position in 0..=points.events() {
        points.advance(position);
        let image = points.crash(seed ^ position as u64);
        if let Err(v) = oracle.borrow().check_crash(position, &image.to_vec()) {
            panic!("seed {seed}: {v}");
        }
        images.push(image);
    }
    (images, points.events())
}

#[test]
fn the_oracle_agrees_with_the_disk() {
    let mut events = 0;
    for seed in 0..100 {
        events += bare_disk(seed).1;
    }
    assert!(events > 5000, "only {events} events");
}

#[test]
fn one_seed_one_run() {
    let (a, b) = (bare_disk(77), bare_disk(77));
    assert_eq!(a.1, b.1);
    assert!(a.0.iter().zip(&b.0).all(|(x, y)| x.to_vec() == y.to_vec()));
}
