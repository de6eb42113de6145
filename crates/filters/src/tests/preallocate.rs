use dolmen_sim::{Harness, Sim};
use dolmen_types::{Actions, Options, WriteFlags};

use super::overlay::CLUSTER;
use super::{REGISTRY, disk};

const C: u64 = CLUSTER;
const KIB: u64 = 1 << 10;

fn preallocate() -> Options {
    Options::new()
        .with("driver", "preallocate")
        .with("node-name", "grows")
        .with("file", "file")
        .with("prealloc-align", 64 * KIB)
        .with("prealloc-size", 100 * KIB)
}

const EVERYTHING: Actions = Actions::D.with(Actions::V).with(Actions::S);

#[test]
fn a_growing_file_gets_more_than_it_was_asked_for_and_gives_it_back() {
    let (file, leaf) = disk("file", 4, 1);
    let len = move || file.image().to_vec().len() as u64;
    Sim::run(0, |rt| async move {
        let h = Harness::open(&rt, REGISTRY, vec![leaf], preallocate(), EVERYTHING).await.unwrap();
        let user = h.user();
        user.write(0, &[2; 512], WriteFlags::NONE).await.unwrap();
        assert_eq!(len(), 4 * C, "a write within the node reserves nothing");

        let size = 4 * C + 4 * KIB;
        user.resize(size).await.unwrap();
        let reserved = (size + 100 * KIB).next_multiple_of(64 * KIB);
        assert_eq!((user.size(), len()), (size, reserved));
        user.write(4 * C, &[3; 512], WriteFlags::NONE).await.unwrap();
        user.resize(size + 4 * KIB).await.unwrap();
        assert_eq!((user.size(), len()), (size + 4 * KIB, reserved), "it lies in the reserve");
        assert_eq!(user.read(size, 4 * KIB as usize).await.unwrap(), vec![0; 4 * KIB as usize]);

        // What was data must not come back as the zeroes of a reserve.
        user.resize(4 * C).await.unwrap();
        assert_eq!((user.size(), len()), (4 * C, 4 * C));
        user.resize(size).await.unwrap();
        assert_eq!(user.read(4 * C, 512).await.unwrap(), [0; 512]);

        assert!(len() > size);
        h.close().await.unwrap();
        assert_eq!(len(), size, "closing cuts the surplus off");
    });
}

#[test]
fn a_node_that_is_only_read_reserves_nothing_and_lets_others_write() {
    let (file, leaf) = disk("file", 4, 1);
    Sim::run(0, |rt| async move {
        let options = preallocate().with("read-only", true);
        let h = Harness::open(&rt, REGISTRY, vec![leaf], options, Actions::D).await.unwrap();
        let claim = h.top().children[0].claim;
        assert!(!claim.needs.intersects(Actions::V | Actions::S), "{claim:?}");
        h.close().await.unwrap();
        assert_eq!(file.image().to_vec().len() as u64, 4 * C);
    });
}

#[test]
fn the_end_of_a_writable_file_belongs_to_the_node() {
    let (_, leaf) = disk("file", 4, 1);
    Sim::run(0, |rt| async move {
        let h = Harness::open(&rt, REGISTRY, vec![leaf], preallocate(), Actions::D).await.unwrap();
        let claim = h.top().children[0].claim;
        assert!(claim.needs.contains(Actions::S), "it cuts the surplus, whoever uses it: {claim:?}");
        assert!(!claim.allows.intersects(Actions::V | Actions::S), "{claim:?}");
    });
}

#[test]
fn an_alignment_that_makes_no_sense_is_refused() {
    for bad in [0, 1000] {
        let (_, leaf) = disk("file", 1, 1);
        Sim::run(0, |rt| async move {
            let options = preallocate().with("prealloc-align", bad);
            let e = Harness::open(&rt, REGISTRY, vec![leaf], options, Actions::D).await.err().unwrap();
            assert!(e.to_string().contains(&format!("prealloc-align={bad}")), "{e}");
        });
    }
}
