use dolmen_sim::{Harness, Image, Leaf, Sim};
use dolmen_types::{Actions, ErrorKind, Options, ReadFlags, Span, WriteFlags};

use super::overlay::CLUSTER;
use super::{REGISTRY, clusters, cor, disk, overlay};

const C: u64 = CLUSTER;

/// What is read is in the overlay afterwards, and the base is not needed for it any more.
#[test]
fn what_was_read_is_copied() {
    let (base, base_leaf) = disk("base", 4, 1);
    let (top, top_leaf) = disk("top-file", 4, 0);
    Sim::run(0, |rt| async move {
        let backing = overlay("b", "base", None, &[0, 1, 2, 3]);
        let stack = cor(overlay("top", "top-file", Some(backing), &[]));
        let h = Harness::open(&rt, REGISTRY, vec![base_leaf, top_leaf], stack, Actions::D).await.unwrap();
        let user = h.user();
        // Two bytes over a border: both clusters.
        assert_eq!(user.read(C - 1, 2).await.unwrap(), [1, 1]);
        assert_eq!(clusters(&top), [1, 1, 0, 0]);
        base.replace(Image::new(0));
        assert_eq!(user.read(0, 2 * C as usize).await.unwrap(), vec![1; 2 * C as usize]);
        h.close().await.unwrap();
    });
}

#[test]
fn two_filters_do_no_more_than_one_and_writes_pass() {
    let (_, base_leaf) = disk("base", 4, 1);
    let (top, top_leaf) = disk("top-file", 4, 0);
    Sim::run(0, |rt| async move {
        let backing = overlay("b", "base", None, &[0, 1, 2, 3]);
        let pass = Options::new()
            .with("driver", "blkdebug")
            .with("image", cor(overlay("top", "top-file", Some(backing), &[])).into_value());
        let h = Harness::open(&rt, REGISTRY, vec![base_leaf, top_leaf], cor(pass), Actions::D | Actions::V)
            .await
            .unwrap();
        let user = h.user();
        user.write(2 * C, &[9; 512], WriteFlags::NONE).await.unwrap();
        assert_eq!(clusters(&top), [0, 0, 9, 0], "a write reads nothing through the filter");
        user.read(0, 1).await.unwrap();
        assert_eq!(clusters(&top), [1, 0, 9, 0]);
        assert_eq!(user.read(2 * C, 1).await.unwrap(), [9]);
        user.write_zeroes(Span::new(0, C), WriteFlags::NONE).await.unwrap();
        user.flush().await.unwrap();
        assert_eq!(user.read(0, 1).await.unwrap(), [0]);
    });
}

#[test]
fn a_prefetch_copies_and_returns_nothing() {
    let (_, base_leaf) = disk("base", 2, 1);
    let (top, top_leaf) = disk("top-file", 2, 0);
    Sim::run(0, |rt| async move {
        let backing = overlay("b", "base", None, &[0, 1]);
        let stack = cor(overlay("top", "top-file", Some(backing), &[]));
        let h = Harness::open(&rt, REGISTRY, vec![base_leaf, top_leaf], stack, Actions::D).await.unwrap();
        h.user().read_with(0, C as usize, ReadFlags::PREFETCH).await.unwrap();
        assert_eq!(clusters(&top), [1, 0]);
    });
}

/// top (nothing) over mid (cluster 1) over base (all): only what mid holds is copied.
#[test]
fn bottom_limits_what_is_copied() {
    let (_, base_leaf) = disk("base", 4, 1);
    let (_, mid_leaf) = disk("mid-file", 4, 2);
    let (top, top_leaf) = disk("top-file", 4, 0);
    Sim::run(0, |rt| async move {
        let backing = overlay("mid", "mid-file", Some(overlay("b", "base", None, &[0, 1, 2, 3])), &[1]);
        let stack = cor(overlay("top", "top-file", Some(backing), &[3])).with("bottom", "mid");
        let leaves = vec![base_leaf, mid_leaf, top_leaf];
        let mut h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D).await.unwrap();
        let user = h.user();
        let all = user.read(0, 4 * C as usize).await.unwrap();
        assert_eq!(all.chunks(C as usize).map(|c| c[0]).collect::<Vec<_>>(), [1, 2, 1, 0]);
        assert_eq!(clusters(&top), [0, 2, 0, 0]);
        // A prefetch of what is not copied does nothing.
        user.read_with(0, C as usize, ReadFlags::PREFETCH).await.unwrap();
        assert_eq!(clusters(&top), [0, 2, 0, 0]);
        // The chain down to mid is claimed: nobody may relink or replace top.
        let on_top: Vec<_> = h.owner.claims().into_iter().filter(|c| c.node.as_str() == "top").collect();
        assert_eq!(on_top.len(), 1);
        assert!(!on_top[0].claim.allows.intersects(Actions::G | Actions::P));
        // And mid is pinned.
        let mut draft = h.owner.draft();
        assert_eq!(draft.remove_node("mid").unwrap_err().kind(), ErrorKind::Busy);
        drop(draft);
        h.owner.close().await.unwrap();
    });
}

#[test]
fn a_wrong_bottom_is_refused() {
    for (bottom, says) in [("nobody", "Bottom node 'nobody' not found"), ("filter", "is a filter")] {
        let (_, base_leaf) = disk("base", 1, 1);
        let (_, top_leaf) = disk("top-file", 1, 0);
        Sim::run(0, |rt| async move {
            let backing = Options::new()
                .with("driver", "blkdebug")
                .with("node-name", "filter")
                .with("image", overlay("b", "base", None, &[0]).into_value());
            let stack = cor(overlay("top", "top-file", Some(backing), &[])).with("bottom", bottom);
            let e =
                Harness::open(&rt, REGISTRY, vec![base_leaf, top_leaf], stack, Actions::D).await.unwrap_err();
            assert!(e.to_string().contains(says), "{e}");
        });
    }
}

#[test]
fn the_child_must_be_writable() {
    let (base, _) = disk("base", 1, 1);
    Sim::run(0, |rt| async move {
        let leaf = Leaf::read_only("base", base);
        let stack =
            cor(Options::new().with("driver", "overlay").with("file", "base").with("read-only", true));
        let e = Harness::open(&rt, REGISTRY, vec![leaf], stack, Actions::D).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly, "{e}");
    });
}
