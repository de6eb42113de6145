//! Copy-on-read over real qcow2 images, alone, with `bottom`, and stacked with `raw`.

use std::sync::Arc;

use dolmen_formats::{QCOW2, RAW};
use dolmen_graph::{Node, Registry, own_status};
use dolmen_rt::Rt;
use dolmen_sim::{DiskConfig, Harness, Image, Leaf, MEMORY, MemoryDisk, Sim, SimDisk, create};
use dolmen_types::{Actions, OpKind, Options, ReadFlags, Span, Value, WriteFlags};

static REGISTRY: Registry =
    Registry::new(&[&QCOW2, &RAW, &dolmen_filters::COPY_ON_READ, &dolmen_filters::BLKDEBUG, &MEMORY]);

const K: u64 = 1024;
const M: u64 = K * K;
const CLUSTER: u64 = 64 * K;

/// An empty image of `size` bytes.
async fn image(rt: &Rt, size: u64) -> MemoryDisk {
    let disk = MemoryDisk::new(Image::new(0));
    create(rt, &QCOW2, Leaf::new("disk", disk.clone()), Options::new().with("size", size)).await.unwrap();
    disk
}

/// A disk of `size` bytes of `byte`.
fn filled(size: u64, byte: u8) -> MemoryDisk {
    MemoryDisk::new(Image::from_bytes(&vec![byte; size as usize]))
}

fn over(driver: &str, below: Options) -> Options {
    Options::new().with("driver", driver).with("file", below.into_value())
}

fn qcow2(name: &str, file: &str, backing: Value) -> Options {
    Options::new().with("driver", "qcow2").with("node-name", name).with("file", file).with("backing", backing)
}

/// What the layer of `node` holds of its first `clusters` clusters.
async fn held(node: &Arc<Node>, rt: &Rt, clusters: u64) -> Vec<bool> {
    let mut out = Vec::new();
    for i in 0..clusters {
        out.push(own_status(node, rt, Span::new(i * CLUSTER, CLUSTER)).await.unwrap().0);
    }
    out
}

fn first_bytes(data: &[u8]) -> Vec<u8> {
    data.chunks(CLUSTER as usize).map(|c| c[0]).collect()
}

/// Two filters with `raw` between them: the flag and the right to copy reach the format
/// through all four, and the base is not needed any more for what was read.
#[test]
fn stacked_with_raw() {
    Sim::run(0, |rt| async move {
        let top = image(&rt, 4 * M).await;
        let base = filled(4 * M, 1);
        let leaves = vec![Leaf::new("disk", top.clone()), Leaf::read_only("base", base.clone())];
        let cor = |below| over("copy-on-read", over("raw", below));
        let stack = cor(cor(qcow2("top", "disk", "base".into())));
        let h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D | Actions::V).await.unwrap();
        let user = h.user();
        user.write(M, &[2; 64 * K as usize], WriteFlags::NONE).await.unwrap();
        // Inside one cluster: all of it is copied. Across a border: both.
        assert_eq!(user.read(100, 1).await.unwrap(), [1]);
        assert_eq!(user.read(3 * CLUSTER - 1, 2).await.unwrap(), [1, 1]);
        user.read(M - CLUSTER, 3 * CLUSTER as usize).await.unwrap();
        base.replace(Image::from_bytes(&vec![9; 4 * M as usize]));
        let found = first_bytes(&user.read_with(0, 4 * CLUSTER as usize, ReadFlags::NONE).await.unwrap());
        assert_eq!(found, [1, 9, 1, 1], "the second cluster was not read before");
        assert_eq!(first_bytes(&user.read(M - CLUSTER, 3 * CLUSTER as usize).await.unwrap()), [1, 2, 1]);
        user.flush().await.unwrap();
        h.close().await.unwrap();

        let h = Harness::on_leaf(&rt, Leaf::read_only("disk", top), Actions::D).await.unwrap();
        let token = h.edge.begin().await.unwrap();
        let check = dolmen_formats::qcow2::check(token.read(&rt).unwrap()).await.unwrap();
        assert_eq!((check.corruptions, check.leaks), (0, 0), "{check:?}");
        drop(token);
    });
}

/// Ranges that nobody has read as zeroes, and become allocated all the same.
#[test]
fn what_is_allocated_nowhere_is_populated() {
    Sim::run(0, |rt| async move {
        let top = image(&rt, 4 * CLUSTER + 1024).await;
        let stack = over("copy-on-read", qcow2("top", "disk", Value::Null));
        let h = Harness::open(&rt, REGISTRY, vec![Leaf::new("disk", top)], stack, Actions::D).await.unwrap();
        let node = h.top();
        assert_eq!(held(&node, &rt, 4).await, [false; 4]);
        let user = h.user();
        assert_eq!(user.read(CLUSTER, 4096).await.unwrap(), [0; 4096]);
        assert_eq!(user.read(4 * CLUSTER, 1024).await.unwrap(), [0; 1024], "the last cluster is cut off");
        assert!(user.read(0, 0).await.unwrap().is_empty());
        assert_eq!(held(&node, &rt, 4).await, [false, true, false, false]);
        assert!(own_status(&node, &rt, Span::new(4 * CLUSTER, 1024)).await.unwrap().0);
        h.close().await.unwrap();
    });
}

/// What is there already is neither copied nor written again.
#[test]
fn allocated_parts_are_left_alone() {
    Sim::run(0, |rt| async move {
        let fresh = image(&rt, M).await;
        let disk = SimDisk::new(fresh.image(), DiskConfig::default());
        let leaves = vec![Leaf::new("disk", disk.clone()), Leaf::read_only("base", filled(M, 1))];
        let stack = over("copy-on-read", qcow2("top", "disk", "base".into()));
        let h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D | Actions::V).await.unwrap();
        let user = h.user();
        user.write(0, &[2; 2 * CLUSTER as usize], WriteFlags::NONE).await.unwrap();
        user.write_zeroes(Span::new(2 * CLUSTER, CLUSTER), WriteFlags::NONE).await.unwrap();
        user.flush().await.unwrap();
        let writes = || disk.count(OpKind::Write) + disk.count(OpKind::WriteZeroes);
        let before = writes();
        let found = user.read(0, 3 * CLUSTER as usize).await.unwrap();
        assert_eq!(first_bytes(&found), [2, 2, 0]);
        assert_eq!(writes(), before);
        assert_eq!(user.read(3 * CLUSTER, 1).await.unwrap(), [1]);
        assert_eq!(writes(), before + 1, "one cluster, one write; the metadata wait for a flush");
        h.close().await.unwrap();
    });
}

/// A copy that can't be stored fails the read, and the next one tries again.
#[test]
fn a_failing_copy_fails_the_read() {
    Sim::run(0, |rt| async move {
        let rule = Options::new().with("event", "cor_write").with("once", true).with("errno", 28);
        let debug = Options::new()
            .with("driver", "blkdebug")
            .with("image", qcow2("top", "disk", "base".into()).into_value())
            .with("inject-error", Value::List(vec![rule.with("iotype", "write").into_value()]));
        let leaves = vec![Leaf::new("disk", image(&rt, M).await), Leaf::read_only("base", filled(M, 1))];
        let stack = over("copy-on-read", debug);
        let h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D).await.unwrap();
        let user = h.user();
        assert_eq!(user.read(0, 512).await.unwrap_err().errno(), 28);
        assert_eq!(held(&h.top(), &rt, 1).await, [false]);
        assert_eq!(user.read(0, 512).await.unwrap(), [1; 512]);
        assert_eq!(held(&h.top(), &rt, 1).await, [true]);
        h.close().await.unwrap();
    });
}

/// top over mid over base, with `bottom=mid`: what mid holds is copied, what base holds is
/// only read, and what nobody holds is not populated either.
#[test]
fn bottom() {
    Sim::run(0, |rt| async move {
        let (top, mid) = (image(&rt, 8 * CLUSTER).await, image(&rt, 8 * CLUSTER).await);
        let h = Harness::open(
            &rt,
            REGISTRY,
            vec![Leaf::new("disk", mid.clone())],
            qcow2("mid", "disk", Value::Null),
            Actions::D | Actions::V,
        )
        .await
        .unwrap();
        h.user().write(CLUSTER, &[2; 2 * CLUSTER as usize], WriteFlags::NONE).await.unwrap();
        h.close().await.unwrap();

        let leaves = vec![
            Leaf::new("disk", top),
            Leaf::read_only("mid-disk", mid),
            Leaf::read_only("base", filled(4 * CLUSTER, 1)),
        ];
        let mid = qcow2("mid", "mid-disk", "base".into()).with("read-only", true);
        let stack =
            over("copy-on-read", over("raw", qcow2("top", "disk", mid.into_value()))).with("bottom", "mid");
        let h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D).await.unwrap();
        let found = h.user().read(0, 8 * CLUSTER as usize).await.unwrap();
        assert_eq!(first_bytes(&found), [1, 2, 2, 1, 0, 0, 0, 0]);
        let copied = held(&h.top(), &rt, 4).await;
        assert_eq!(copied, [false, true, true, false]);
        h.close().await.unwrap();
    });
}
