use dolmen_sim::{Harness, Image, Sim};
use dolmen_types::{Actions, ErrorKind, Options, Span, WriteFlags};

use super::overlay::CLUSTER;
use super::{REGISTRY, clusters, disk};

const C: u64 = CLUSTER;

fn verify() -> Options {
    Options::new().with("driver", "blkverify").with("test", "test").with("raw", "raw")
}

const EVERYTHING: Actions = Actions::D.with(Actions::V).with(Actions::S);

#[test]
fn writes_go_to_both_and_equal_data_are_read() {
    let (test, test_leaf) = disk("test", 4, 1);
    let (raw, raw_leaf) = disk("raw", 4, 1);
    Sim::run(0, |rt| async move {
        let h = Harness::open(&rt, REGISTRY, vec![test_leaf, raw_leaf], verify(), EVERYTHING).await.unwrap();
        let user = h.user();
        user.write(C, &vec![7; C as usize], WriteFlags::NONE).await.unwrap();
        user.write_zeroes(Span::new(2 * C, C), WriteFlags::NONE).await.unwrap();
        user.discard(Span::new(0, C)).await.unwrap();
        user.flush().await.unwrap();
        assert_eq!((clusters(&test), clusters(&raw)), (vec![1, 7, 0, 1], vec![1, 7, 0, 1]));
        assert_eq!(user.read(C - 1, 2).await.unwrap(), [1, 7]);
        user.resize(5 * C).await.unwrap();
        assert_eq!(
            (test.image().to_vec().len(), raw.image().to_vec().len()),
            (5 * C as usize, 5 * C as usize)
        );
        assert_eq!(user.read(0, 5 * C as usize).await.unwrap().last(), Some(&0));
        h.close().await.unwrap();
    });
}

#[test]
fn a_difference_fails_the_read_that_finds_it_and_no_other() {
    let (_, test_leaf) = disk("test", 4, 1);
    let (raw, raw_leaf) = disk("raw", 4, 1);
    Sim::run(0, |rt| async move {
        let h = Harness::open(&rt, REGISTRY, vec![test_leaf, raw_leaf], verify(), EVERYTHING).await.unwrap();
        let user = h.user();
        let mut bytes = raw.image().to_vec();
        bytes[2 * C as usize + 513] = 9;
        raw.replace(Image::from_bytes(&bytes));
        let e = user.read(C, 2 * C as usize).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        let at = 2 * C + 513;
        let says =
            format!("read offset={C} bytes={} contents mismatch at offset {at} (sector {})", 2 * C, at / 512);
        assert!(e.to_string().contains(&says), "{e}");
        assert_eq!(user.read(0, 2 * C as usize).await.unwrap(), vec![1; 2 * C as usize]);
        // Written to both, they are equal again.
        user.write(at, &[5], WriteFlags::NONE).await.unwrap();
        assert_eq!(user.read(at, 1).await.unwrap(), [5]);
    });
}

#[test]
fn nodes_of_different_sizes_are_refused() {
    let (_, test_leaf) = disk("test", 4, 1);
    let (_, raw_leaf) = disk("raw", 3, 1);
    Sim::run(0, |rt| async move {
        let e = Harness::open(&rt, REGISTRY, vec![test_leaf, raw_leaf], verify(), Actions::D)
            .await
            .err()
            .unwrap();
        assert!(e.to_string().contains("they can't hold the same data"), "{e}");
    });
}
