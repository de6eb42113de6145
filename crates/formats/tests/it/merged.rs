//! What lies together in the file is one request to the file.
//!
//! The story: a write over data, kept space for zeroes and data was three requests, and the discard of 1 GiB in shuffled
//! clusters 16,384.

use dolmen_rt::Rt;
use dolmen_sim::{DiskConfig, Harness, Image, Leaf, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{OpKind, Options, Span, Value, WriteFlags};

use crate::support::{EVERYTHING, REGISTRY, create, node, own_check};

const CLUSTER: u64 = 4096;

async fn image(rt: &Rt) -> (SimDisk, Harness) {
    let options = Options::new().with("size", CLUSTER * 600).with("cluster_size", CLUSTER);
    let image: Image = create(rt, options).await.unwrap().image();
    let disk = SimDisk::new(image, DiskConfig { log: false, ..DiskConfig::default() });
    let options = node("qcow2", "leaf").with("discard", "unmap").with("backing", Value::Null);
    let leaves = vec![Leaf::new("leaf", disk.clone())];
    let h = Harness::open(rt, REGISTRY, leaves, options, EVERYTHING).await.unwrap();
    (disk, h)
}

#[test]
fn a_write_over_data_and_kept_zeroes_is_one_request() {
    Sim::run(1, |rt| async move {
        // Which of six adjacent clusters read as zeroes, and where the write begins and ends.
        for (zeroes, at, end) in [
            (&[1, 2][..], 0, 4 * CLUSTER),
            (&[0], 0, 2 * CLUSTER),
            (&[0], 100, 2 * CLUSTER + 7),
            (&[3], CLUSTER + 9, 3 * CLUSTER + 9),
            (&[0, 2, 4], 5, 5 * CLUSTER - 5),
            (&[0, 1, 2, 3, 4, 5], 1, 6 * CLUSTER - 1),
            (&[2], 2 * CLUSTER + 500, 2 * CLUSTER + 600),
            (&[], 0, 6 * CLUSTER),
        ] {
            let (disk, h) = image(&rt).await;
            let user = h.user();
            user.write(0, &[1; 6 * CLUSTER as usize], WriteFlags::NONE).await.unwrap();
            let mut model = vec![1; 6 * CLUSTER as usize];
            for z in zeroes {
                user.write_zeroes(Span::new(z * CLUSTER, CLUSTER), WriteFlags::NONE).await.unwrap();
                model[(z * CLUSTER) as usize..((z + 1) * CLUSTER) as usize].fill(0);
            }
            let before = (disk.count(OpKind::Write), disk.count(OpKind::WriteZeroes));
            user.write(at, &vec![2; (end - at) as usize], WriteFlags::NONE).await.unwrap();
            model[at as usize..end as usize].fill(2);
            let after = (disk.count(OpKind::Write), disk.count(OpKind::WriteZeroes));
            assert_eq!(after, (before.0 + 1, before.1), "{zeroes:?}, {at} to {end}");
            assert!(user.read(0, model.len()).await.unwrap() == model, "{zeroes:?}, {at} to {end}");
            drop(user);
            h.close().await.unwrap();
            let check = own_check(&rt, &MemoryDisk::new(disk.image())).await;
            assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
        }
    });
}

#[test]
fn discards_of_what_is_scattered_are_merged() {
    Sim::run(2, |rt| async move {
        let (disk, h) = image(&rt).await;
        let mut order: Vec<u64> = (0..500).collect();
        let mut r = Random::new(2);
        for i in (1..order.len()).rev() {
            order.swap(i, r.below(i as u64 + 1) as usize);
        }
        for i in order {
            h.user().write(i * CLUSTER, &[3; CLUSTER as usize], WriteFlags::NONE).await.unwrap();
        }
        h.user().flush().await.unwrap();
        let before = disk.count(OpKind::Discard);
        h.user().discard(Span::new(0, 500 * CLUSTER)).await.unwrap();
        h.user().flush().await.unwrap();
        // The table that maps the clusters lies among them.
        let discards = disk.count(OpKind::Discard) - before;
        assert!((1..=3).contains(&discards), "{discards} requests");
        h.close().await.unwrap();
        let check = own_check(&rt, &MemoryDisk::new(disk.image())).await;
        assert_eq!(
            (check.corruptions, check.leaks, check.allocated_clusters),
            (0, 0, 0),
            "{:?}",
            check.messages
        );
    });
}
