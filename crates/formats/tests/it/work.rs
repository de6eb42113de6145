//! Random work against a model: what a guest reads is what it wrote, and the image stays clean.

use dolmen_rt::Rt;
use dolmen_sim::{Image, MemoryDisk, Random, Sim, User};
use dolmen_types::{Options, ReadFlags, Span, WriteFlags};

use crate::support::{Files, assert_clean, create, guest_view, open, own_check};

/// Does `steps` random requests and checks every read against the model.
async fn random_work(
    user: &User,
    model: &mut Vec<u8>,
    r: &mut Random,
    steps: usize,
    cluster: u64,
    grow: bool,
) {
    for step in 0..steps {
        let size = model.len() as u64;
        // Around a cluster in length, mostly near the start so that ranges meet.
        let clusters = if r.below(4) == 0 { 5 } else { 1 };
        let len = 1 + r.below(cluster * clusters);
        let len = len.min(size);
        let span = if r.below(3) == 0 { size } else { size.min(cluster * 20).max(len) };
        let mut offset = r.below(span - len + 1).min(size - len);
        if r.below(3) == 0 {
            offset = offset / cluster * cluster;
        }
        let (a, b) = (offset as usize, (offset + len) as usize);
        match r.below(if grow { 14 } else { 13 }) {
            0..=4 => {
                let byte = 1 + r.below(255) as u8;
                let flags = if r.below(10) == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
                user.write(offset, &vec![byte; len as usize], flags).await.unwrap();
                model[a..b].fill(byte);
            }
            5 | 6 => {
                let flags = if r.below(2) == 0 { WriteFlags::MAY_UNMAP } else { WriteFlags::NONE };
                user.write_zeroes(Span::new(offset, len), flags).await.unwrap();
                model[a..b].fill(0);
            }
            7 => {
                user.discard(Span::new(offset, len)).await.unwrap();
                // Whatever it reads as now, it has to stay.
                let now = user.read(offset, len as usize).await.unwrap();
                model[a..b].copy_from_slice(&now);
            }
            8 => user.flush().await.unwrap(),
            9 => {
                let got = user.read_with(offset, len as usize, ReadFlags::POPULATE).await.unwrap();
                assert!(got == model[a..b], "populating read of {offset}+{len} in step {step}");
            }
            10..=12 => {
                let got = user.read(offset, len as usize).await.unwrap();
                assert!(got == model[a..b], "read of {offset}+{len} in step {step}");
            }
            _ => {
                let more = (size + r.below(cluster * 4)).next_multiple_of(512);
                user.resize(more).await.unwrap();
                model.resize(more as usize, 0);
            }
        }
    }
}

/// The whole disk in pieces.
async fn read_all(user: &User, size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while out.len() < size {
        let n = (size - out.len()).min(1 << 20);
        out.extend(user.read(out.len() as u64, n).await.unwrap());
    }
    out
}

struct Case {
    seed: u64,
    cluster: u64,
    version: &'static str,
    refcount_bits: u64,
    base: Option<u64>,
}

async fn run_case(rt: Rt, c: Case) {
    let clusters = if c.cluster >= 1 << 20 { 12 } else { 150 };
    let size = c.cluster * clusters + 512 * 3;
    let options = Options::new()
        .with("size", size)
        .with("cluster_size", c.cluster)
        .with("compat", c.version)
        .with("refcount_bits", c.refcount_bits);
    let disk = create(&rt, options).await.unwrap();
    let mut r = Random::new(c.seed);
    let mut model = vec![0u8; size as usize];
    let base = c.base.map(|len| {
        let bytes: Vec<u8> = (0..len).map(|i| if i / 700 % 3 == 0 { 0 } else { (i / 512) as u8 }).collect();
        let n = bytes.len().min(model.len());
        model[..n].copy_from_slice(&bytes[..n]);
        MemoryDisk::new(Image::from_bytes(&bytes))
    });
    for round in 0..3 {
        let h = open(&rt, &disk, base.as_ref()).await.unwrap();
        let user = h.user();
        random_work(&user, &mut model, &mut r, 120, c.cluster, round > 0).await;
        assert!(read_all(&user, model.len()).await == model, "everything in round {round}");
        drop(user);
        h.close().await.unwrap();
        let check = own_check(&rt, &disk).await;
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
    }
    let files = Files::new();
    let path = files.put("x.qcow2", &disk);
    assert_clean(&path);
    if base.is_none() {
        let mut seen = guest_view(&files, &path);
        seen.truncate(model.len());
        assert!(seen == model, "the installed tool reads something else");
    }
}

fn case(seed: u64, cluster: u64, version: &'static str, refcount_bits: u64, base: Option<u64>) {
    Sim::run(seed, |rt| run_case(rt, Case { seed, cluster, version, refcount_bits, base }));
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        case(bits, 1 << bits, "v3", 16, None);
    }
}

#[test]
fn version_2() {
    for bits in [9, 12, 16] {
        case(100 + bits, 1 << bits, "v2", 16, None);
        case(200 + bits, 1 << bits, "v2", 16, Some((1 << bits) * 77 + 100));
    }
}

#[test]
fn every_refcount_width() {
    for order in 0..=6 {
        case(300 + order, 512, "v3", 1 << order, None);
        case(400 + order, 4096, "v3", 1 << order, Some(100_000));
    }
}

#[test]
fn over_backing_files_of_any_length() {
    for (seed, len) in [(1, 1), (2, 65536), (3, 3_000_001), (4, 20 << 20)] {
        case(500 + seed, 65536, "v3", 16, Some(len));
        case(600 + seed, 2048, "v3", 16, Some(len));
    }
}

#[test]
fn the_refcount_table_grows() {
    for bits in [16u64, 64] {
        Sim::run(bits, |rt| async move {
            // 512-byte clusters with 64-bit refcounts: one cluster of the table reaches for 2 MiB.
            let options =
                Options::new().with("size", "24M").with("cluster_size", 512u64).with("refcount_bits", bits);
            let disk = create(&rt, options).await.unwrap();
            let h = open(&rt, &disk, None).await.unwrap();
            let user = h.user();
            for i in 0..20u64 {
                user.write(i << 20, &vec![i as u8 + 1; 1 << 20], WriteFlags::NONE).await.unwrap();
                if i % 3 == 0 {
                    user.flush().await.unwrap();
                }
            }
            for i in 0..20u64 {
                assert_eq!(user.read((i << 20) + 7777, 1).await.unwrap(), [i as u8 + 1]);
            }
            drop(user);
            h.close().await.unwrap();
            let check = own_check(&rt, &disk).await;
            assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
            let files = Files::new();
            assert_clean(&files.put("x.qcow2", &disk));
        });
    }
}

#[test]
fn more_tables_than_memory_for_them() {
    Sim::run(1, |rt| async move {
        // 512-byte clusters: a table maps 32 KiB, and 4096 tables are kept.
        const TABLES: u64 = 5000;
        let options = Options::new().with("size", TABLES << 15).with("cluster_size", 512u64);
        let disk = create(&rt, options).await.unwrap();
        let h = open(&rt, &disk, None).await.unwrap();
        let user = h.user();
        let at = |i: u64| (i << 15) + i % 64 * 512 + 17;
        for i in 0..TABLES {
            user.write(at(i), &i.to_be_bytes(), WriteFlags::NONE).await.unwrap();
        }
        for i in (0..TABLES).rev().chain(0..TABLES) {
            assert_eq!(user.read(at(i), 8).await.unwrap(), i.to_be_bytes());
        }
        drop(user);
        h.close().await.unwrap();
        let files = Files::new();
        assert_clean(&files.put("x.qcow2", &disk));
    });
}
