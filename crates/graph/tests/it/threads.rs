//! Real threads: tokens against commits, leases against reuse.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

use dolmen_graph::{GraphOwner, NodeState};
use dolmen_rt::{Lane, Memory};
use dolmen_sim::stand_in as op;
use dolmen_types::{ChildRole, NodeName, OpId, ReadFlags, Span};
use futures_lite::future::block_on;

use crate::support::{Log, add_filter, add_probe, edge, still};

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Threads issue requests while the owner links the node to one leaf and the other in
/// turn. While a leaf is not linked nobody may be inside it: that is what quiesce is for.
#[test]
fn no_request_reaches_a_leaf_that_is_not_linked() {
    let rt = still();
    let mut owner = GraphOwner::new(rt.clone());
    let log = Log::default();
    let mut d = owner.draft();
    let leaves = [add_probe(&mut d, "a", &log), add_probe(&mut d, "b", &log)];
    add_filter(&mut d, "f", "a");
    op::export(&mut d, "e", "f", false).unwrap();
    block_on(owner.commit(d)).unwrap();
    let e = edge(&owner, "e");
    let served = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        // Whoever fails lets the others end.
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            s.spawn(|| {
                let _stop = StopOnDrop(&stop);
                let rt = still();
                let memory = Memory::zeroed(1);
                while !stop.load(SeqCst) {
                    let Ok(token) = block_on(e.begin()) else { return };
                    let io = token.read(&rt).unwrap();
                    let to = memory.iovec();
                    block_on(io.read(Span::new(0, 1), &to, ReadFlags::NONE)).unwrap();
                    // The snapshot that the token pinned is the one that answered.
                    let linked = token.node().children[0].node.name.as_bytes()[0];
                    assert_eq!(to.to_vec(), [linked]);
                    served.fetch_add(1, SeqCst);
                }
            });
        }
        let f = NodeName::internal("f");
        for round in 0..30 {
            let (new, old) = if round % 2 == 0 { (1, 0) } else { (0, 1) };
            let mut d = owner.draft();
            d.link(&f, "file", ChildRole::Filtered, ["a", "b"][new]).unwrap();
            block_on(owner.commit(d)).unwrap();
            let finished = leaves[old].finished.load(SeqCst);
            let before = served.load(SeqCst);
            assert_eq!(leaves[old].in_flight.load(SeqCst), 0);
            // Let the threads do something on the new leaf.
            while served.load(SeqCst) < before + 3 {
                assert!(!stop.load(SeqCst), "a thread has failed");
                std::thread::yield_now();
            }
            assert_eq!(leaves[old].in_flight.load(SeqCst), 0);
            assert_eq!(leaves[old].finished.load(SeqCst), finished);
        }
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("e"));
        block_on(owner.commit(d)).unwrap();
    });
    assert_eq!(e.in_flight(), 0);
    let finished: usize = leaves.iter().map(|l| l.finished.load(SeqCst)).sum();
    assert_eq!(finished, served.load(SeqCst));
}

/// Counting takes no lock and no locked instruction, and still nothing is lost: also not by threads that have no lane
/// of their own.
#[test]
fn no_request_is_lost_in_counting() {
    const THREADS: u64 = 4;
    const EACH: u64 = 2000;
    let rt = still();
    // All lanes but a few are taken, so that some threads have none.
    let mut taken: Vec<Lane> = (0..Lane::COUNT).map(|_| Lane::take()).collect();
    taken.drain(..2);
    let mut owner = GraphOwner::new(rt.clone());
    let log = Log::default();
    let mut d = owner.draft();
    add_probe(&mut d, "a", &log);
    add_filter(&mut d, "f", "a");
    op::export(&mut d, "e", "f", false).unwrap();
    block_on(owner.commit(d)).unwrap();
    let e = edge(&owner, "e");
    std::thread::scope(|s| {
        for _ in 0..THREADS {
            s.spawn(|| {
                let rt = still();
                let memory = Memory::zeroed(3);
                for _ in 0..EACH {
                    let token = block_on(e.begin()).unwrap();
                    let io = token.read(&rt).unwrap();
                    block_on(io.read(Span::new(0, 3), &memory.iovec(), ReadFlags::NONE)).unwrap();
                }
            });
        }
    });
    for name in ["f", "a"] {
        let reads = owner.graph().node(name).unwrap().state.counters.read().reads;
        assert_eq!((reads.requests, reads.bytes), (THREADS * EACH, 3 * THREADS * EACH), "{name}");
    }
}

/// A mapping that points at one of a few places. Readers take a lease, look at the
/// mapping, and use the place; the writer remaps, stamps the old place and reuses it once
/// its leases are over. A reader that holds a lease must never see its place reused.
#[test]
fn a_place_is_not_reused_under_a_lease() {
    const PLACES: usize = 4;
    const REUSED: u64 = 300;
    let node = Arc::new(NodeState::default());
    let epochs = &node.epochs;
    let mapping = AtomicUsize::new(0);
    // Each place holds a number that changes when it is given to somebody else.
    let places: [AtomicU64; PLACES] = std::array::from_fn(|i| AtomicU64::new(i as u64));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            s.spawn(|| {
                let _stop = StopOnDrop(&stop);
                while !stop.load(SeqCst) {
                    let lease = node.lease();
                    let place = &places[mapping.load(SeqCst)];
                    let first = place.load(SeqCst);
                    for _ in 0..20 {
                        std::hint::spin_loop();
                    }
                    assert_eq!(place.load(SeqCst), first, "reused under a lease");
                    drop(lease);
                }
            });
        }
        let mut freed = std::collections::VecDeque::new();
        let mut free: Vec<usize> = (1..PLACES).collect();
        let mut reused = 0;
        while reused < REUSED && !stop.load(SeqCst) {
            while let Some(&(place, stamp)) = freed.front() {
                if !epochs.over(stamp) {
                    break;
                }
                freed.pop_front();
                free.push(place);
            }
            let Some(next) = free.pop() else {
                std::thread::yield_now();
                continue;
            };
            // Handing the place to somebody else changes what is in it.
            places[next].store(reused + PLACES as u64, SeqCst);
            reused += 1;
            let old = mapping.swap(next, SeqCst);
            freed.push_back((old, epochs.stamp()));
        }
    });
}

/// Clones of an edge's tokens keep their snapshot alive, and nothing else does.
#[test]
fn a_snapshot_lives_as_long_as_its_last_token() {
    let rt = still();
    let mut owner = GraphOwner::new(rt.clone());
    let log = Log::default();
    let mut d = owner.draft();
    add_probe(&mut d, "a", &log);
    op::export(&mut d, "e", "a", false).unwrap();
    let graph = block_on(owner.commit(d)).unwrap();
    let node = Arc::downgrade(graph.node("a").unwrap());
    drop(graph);
    let e = edge(&owner, "e");
    let token = block_on(e.begin()).unwrap();
    drop(token);
    block_on(owner.close()).unwrap();
    assert!(node.upgrade().is_some(), "the export's handle still has it");
    drop(e);
    assert!(node.upgrade().is_none());
}
