//! What was acknowledged beyond the end of a backing file stays when that file grows.
//!
//! The story: a top image of 256 KiB over a base of 96 KiB. `write -z 96k 4k` was acknowledged and did nothing, as the
//! range read as zeroes already; then the base was grown and written there, and the top showed the base's data.

use dolmen_rt::Rt;
use dolmen_sim::{Image, MemoryDisk, Random, Sim, User};
use dolmen_types::{Options, Span, WriteFlags};

use crate::support::{create, open, own_check};

/// What the base holds at first, and what it holds behind its old end once it has grown.
const OLD: u8 = 3;
const NEW: u8 = 5;

async fn top(rt: &Rt, version: &str, cluster: u64, size: u64) -> MemoryDisk {
    let options = Options::new()
        .with("size", size)
        .with("cluster_size", cluster)
        .with("compat", version)
        .with("backing_file", "base")
        .with("backing_fmt", "raw");
    create(rt, options).await.unwrap()
}

fn base(old: u64, len: u64) -> MemoryDisk {
    let mut bytes = vec![OLD; old as usize];
    bytes.resize(len as usize, NEW);
    MemoryDisk::new(Image::from_bytes(&bytes))
}

#[test]
fn a_zero_write_beyond_the_end_stays() {
    for version in ["v2", "v3"] {
        Sim::run(1, |rt| async move {
            let disk = top(&rt, version, 65536, 256 << 10).await;
            let h = open(&rt, &disk, Some(&base(96 << 10, 96 << 10))).await.unwrap();
            h.user().write_zeroes(Span::new(96 << 10, 4 << 10), WriteFlags::NONE).await.unwrap();
            h.close().await.unwrap();
            let h = open(&rt, &disk, Some(&base(96 << 10, 256 << 10))).await.unwrap();
            assert!(h.user().read(96 << 10, 4 << 10).await.unwrap() == vec![0; 4 << 10], "{version}");
            h.close().await.unwrap();
        });
    }
}

/// What a top image has promised: bytes that it must show whatever becomes of the base.
struct Model {
    data: Vec<u8>,
    promised: Vec<bool>,
}

impl Model {
    fn set(&mut self, span: Span, byte: u8) {
        let range = span.offset() as usize..span.end() as usize;
        self.data[range.clone()].fill(byte);
        self.promised[range].fill(true);
    }

    async fn check(&self, user: &User, what: &str) {
        let seen = user.read(0, self.data.len()).await.unwrap();
        let wrong = (0..seen.len()).find(|i| self.promised[*i] && seen[*i] != self.data[*i]);
        assert_eq!(wrong.map(|i| (i, seen[i], self.data[i])), None, "{what}");
    }
}

async fn step(user: &User, model: &mut Model, r: &mut Random, cluster: u64) {
    let size = model.data.len() as u64;
    let len = (1 + r.below(cluster * 3)).min(size);
    let mut span = Span::new(r.below(size - len + 1), len);
    if r.below(2) == 0 {
        span = Span::new(span.offset() / 512 * 512, len.next_multiple_of(512))
            .prefix(size - span.offset() / 512 * 512);
    }
    match r.below(8) {
        0..=3 => {
            let flags = if r.below(2) == 0 { WriteFlags::MAY_UNMAP } else { WriteFlags::NONE };
            user.write_zeroes(span, flags).await.unwrap();
            model.set(span, 0);
        }
        4 => {
            user.write(span.offset(), &vec![7; span.len() as usize], WriteFlags::NONE).await.unwrap();
            model.set(span, 7);
        }
        5 => {
            // A discard promises nothing new: what it takes away is not known any more.
            user.discard(span).await.unwrap();
            model.promised[span.offset() as usize..span.end() as usize].fill(false);
        }
        6 => {
            let more = (size + r.below(cluster * 4)).next_multiple_of(512);
            user.resize(more).await.unwrap();
            model.data.resize(more as usize, 0);
            model.promised.resize(more as usize, true);
        }
        _ => user.flush().await.unwrap(),
    }
}

#[test]
fn whatever_was_promised_beyond_the_end_stays() {
    for (cluster, seeds) in [(512u64, 8), (4096, 8), (65536, 6), (2 << 20, 1)] {
        for (seed, version) in (0..seeds).flat_map(|s| [(s, "v2"), (s, "v3")]) {
            Sim::run(seed, |rt| async move {
                let mut r = Random::new(seed * 31 + cluster);
                let size = cluster * 12 + 512;
                let disk = top(&rt, version, cluster, size).await;
                let old = r.below(cluster * 8);
                let mut model = Model { data: vec![0; size as usize], promised: vec![false; size as usize] };
                for round in 0..2 {
                    // Half of the time without its base, which its header names all the same.
                    let below = (r.below(2) == 0).then(|| base(old, old));
                    let h = open(&rt, &disk, below.as_ref()).await.unwrap();
                    for _ in 0..25 {
                        step(&h.user(), &mut model, &mut r, cluster).await;
                    }
                    model
                        .check(&h.user(), &format!("{version}, {cluster}, seed {seed}, round {round}"))
                        .await;
                    h.close().await.unwrap();
                }
                let grown = base(old, model.data.len() as u64 + cluster);
                let h = open(&rt, &disk, Some(&grown)).await.unwrap();
                model
                    .check(&h.user(), &format!("{version}, {cluster}, seed {seed}, over the grown base"))
                    .await;
                h.close().await.unwrap();
                let check = own_check(&rt, &disk).await;
                assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
            });
        }
    }
}

#[test]
fn zeroes_over_zeroes_take_no_space() {
    // The base, the span, and how many data clusters there are afterwards: those that do not read as zeroes
    // all over.
    Sim::run(1, |rt| async move {
        let hole = |len: u64, data: Span| {
            let mut image = Image::new(len);
            image.write(data.offset(), &vec![OLD; data.len() as usize]);
            MemoryDisk::new(image)
        };
        for (below, span, clusters) in [
            (None, Span::new(100, 50), 0),
            (Some(hole(1 << 20, Span::new(0, 65536))), Span::new(70_000, 4096), 0),
            (Some(hole(96 << 10, Span::new(0, 65536))), Span::new(96 << 10, 4096), 0),
            (Some(hole(96 << 10, Span::new(0, 65536))), Span::new(200_000, 512), 0),
            (Some(hole(1 << 20, Span::new(0, 65536))), Span::new(60_000, 4096), 1),
            (Some(hole(1 << 20, Span::new(0, 65536))), Span::new(60_000, 70_000), 1),
        ] {
            let disk = top(&rt, "v3", 65536, 1 << 20).await;
            let h = open(&rt, &disk, below.as_ref()).await.unwrap();
            h.user().write_zeroes(span, WriteFlags::NONE).await.unwrap();
            let seen = h.user().read(span.offset(), span.len() as usize).await.unwrap();
            assert!(seen.iter().all(|b| *b == 0), "{span}");
            h.close().await.unwrap();
            assert_eq!(own_check(&rt, &disk).await.allocated_clusters, clusters, "{span}");
        }
    });
}

/// Growing within the last cluster made an empty span of whole clusters, and rounded it out to the last cluster: all that it
/// showed became zeroes.
#[test]
fn growing_within_the_last_cluster_keeps_its_data() {
    for (version, old, size) in
        [("v3", 96u64 << 10, 100u64 << 10), ("v2", 96 << 10, 100 << 10), ("v3", 65_536 + 512, 65_536 + 1024)]
    {
        Sim::run(1, |rt| async move {
            let disk = top(&rt, version, 65536, old).await;
            let below = base(old, old);
            let h = open(&rt, &disk, Some(&below)).await.unwrap();
            let user = h.user();
            user.write(65536, &[9; 512], WriteFlags::NONE).await.unwrap();
            user.resize(size).await.unwrap();
            let seen = user.read(0, size as usize).await.unwrap();
            assert!(seen[..65536].iter().all(|b| *b == OLD), "{version}");
            assert!(seen[65536..66048].iter().all(|b| *b == 9), "{version}");
            assert!(seen[66048..old as usize].iter().all(|b| *b == OLD), "{version}");
            assert!(seen[old as usize..].iter().all(|b| *b == 0), "{version}");
            drop(user);
            h.close().await.unwrap();
        });
    }
}
