//! Drafts and publishing: the order of a commit, what a failure leaves behind, quiesce.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use dolmen_graph::{AccessRule, GraphEvent, GraphOwner, NodeDef, NodeFlags, OpInfo, UserEdge};
use dolmen_rt::{Memory, Rt};
use dolmen_sim::stand_in::{self as op, StandIn};
use dolmen_sim::{MemoryDisk, Sim, SimDisk};
use dolmen_types::{Actions, ChildRole, Claim, ErrorKind, NodeName, OpId, ReadFlags, Result, Span, Value};
use futures_lite::future::{poll_once, yield_now};

use crate::support::{Hooks, Log, add_filter, add_probe, edge};

fn name(n: &str) -> NodeName {
    NodeName::internal(n)
}

/// The first byte that the user reads: which leaf answered.
async fn read_byte(edge: &Arc<UserEdge>, rt: &Rt) -> Result<u8> {
    let token = edge.begin().await?;
    let memory = Memory::zeroed(1);
    token.read(rt)?.read(Span::new(0, 1), &memory.iovec(), ReadFlags::NONE).await?;
    Ok(memory.to_vec()[0])
}

/// `f` (a filter) over leaf `a`; leaf `b` beside it; export `e` on `f`.
async fn two_leaves(rt: &Rt) -> (GraphOwner, Log, Arc<Hooks>, Arc<Hooks>) {
    let log = Log::default();
    let mut owner = GraphOwner::new(rt.clone());
    let mut d = owner.draft();
    let a = add_probe(&mut d, "a", &log);
    let b = add_probe(&mut d, "b", &log);
    add_filter(&mut d, "f", "a");
    op::export(&mut d, "e", "f", false).unwrap();
    owner.commit(d).await.unwrap();
    log.take();
    (owner, log, a, b)
}

/// Links `f` to another leaf.
async fn relink(owner: &mut GraphOwner, to: &str) -> Result<()> {
    let mut d = owner.draft();
    d.link(&name("f"), "file", ChildRole::Filtered, to)?;
    owner.commit(d).await.map(drop)
}

/// Requests step over transparent nodes by a shortcut that the snapshot holds. It must
/// follow when something below is linked elsewhere, however many such nodes lie above.
#[test]
fn the_way_through_transparent_nodes_follows_the_links() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        add_probe(&mut d, "a", &log);
        add_probe(&mut d, "b", &log);
        add_filter(&mut d, "f", "a");
        for (n, over) in [("t1", "f"), ("t2", "t1"), ("t3", "t2")] {
            let pane = StandIn::new(&op::RAW, AccessRule::TRANSPARENT);
            op::add(&mut d, n, pane, None, &[("file", ChildRole::Filtered, over)]).unwrap();
        }
        op::export(&mut d, "e", "t3", false).unwrap();
        owner.commit(d).await.unwrap();
        let e = edge(&owner, "e");
        assert_eq!(e.node().name.as_str(), "t3");
        assert_eq!(e.node().size(), 1 << 20);
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'a');

        relink(&mut owner, "b").await.unwrap();
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'b', "the filter below them was relinked");

        let mut d = owner.draft();
        d.link(&name("t1"), "file", ChildRole::Filtered, "a").unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'a', "the lowest of them was relinked");
    });
}

#[test]
fn a_commit_prepares_then_commits_and_says_the_same_only_once() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        add_probe(&mut d, "a", &log);
        add_probe(&mut d, "b", &log);
        owner.commit(d).await.unwrap();
        assert_eq!(log.take(), [""; 0], "nobody is attached: nothing to say");

        let mut d = owner.draft();
        op::export(&mut d, "e", "a", true).unwrap();
        op::export(&mut d, "r", "b", false).unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(log.take(), ["prepare a DV/DVM", "prepare b D/DVM", "commit a", "commit b"]);

        let mut d = owner.draft();
        add_probe(&mut d, "c", &log);
        owner.commit(d).await.unwrap();
        assert_eq!(log.take(), [""; 0], "nothing changed for a and b");

        let mut d = owner.draft();
        d.remove_op(&OpId::internal("e"));
        owner.commit(d).await.unwrap();
        assert_eq!(log.take(), ["prepare a -/DVMS", "commit a"], "loosened");
    });
}

#[test]
fn a_failed_preparation_leaves_no_trace() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        add_probe(&mut d, "a", &log);
        let b = add_probe(&mut d, "b", &log);
        let before = owner.commit(d).await.unwrap();

        b.fail_prepare.store(true, SeqCst);
        let attach = |owner: &GraphOwner| {
            let mut d = owner.draft();
            op::export(&mut d, "x", "a", false).unwrap();
            op::export(&mut d, "y", "b", false).unwrap();
            d
        };
        let e = owner.commit(attach(&owner)).await.unwrap_err();
        assert_eq!(e.to_string(), "prepare failed");
        assert_eq!(log.take(), ["prepare a D/DVM", "refuse b", "abort a"]);
        assert!(Arc::ptr_eq(&owner.graph(), &before));
        assert!(owner.ops().is_empty());

        // The next attempt tells both leaves everything again.
        b.fail_prepare.store(false, SeqCst);
        owner.commit(attach(&owner)).await.unwrap();
        assert_eq!(log.take(), ["prepare a D/DVM", "prepare b D/DVM", "commit a", "commit b"]);
    });
}

#[test]
fn dropping_a_draft_undoes_in_reverse() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        add_probe(&mut d, "a", &log);
        add_probe(&mut d, "b", &log);
        op::export(&mut d, "x", "a", false).unwrap();
        d.prepare(&rt).await.unwrap();
        op::export(&mut d, "y", "b", true).unwrap();
        d.prepare(&rt).await.unwrap();
        op::export(&mut d, "z", "a", true).unwrap();
        d.prepare(&rt).await.unwrap();
        assert_eq!(log.take(), ["prepare a D/DVM", "prepare b DV/DVM", "prepare a DV/DVM"]);
        drop(d);
        assert_eq!(log.take(), ["abort a", "abort b", "abort a"]);
    });
}

#[test]
fn requests_in_flight_finish_on_their_snapshot_and_new_ones_wait() {
    for seed in 0..20 {
        Sim::run(seed, |rt| async move {
            let (mut owner, log, a, _) = two_leaves(&rt).await;
            let e = edge(&owner, "e");
            a.requests.shut();
            let old = Rc::new(Cell::new(None));
            let new = Rc::new(Cell::new(None));
            {
                let (rt, e, old) = (rt.clone(), e.clone(), old.clone());
                rt.clone().spawn(async move { old.set(Some(read_byte(&e, &rt).await.unwrap())) });
            }
            while a.in_flight.load(SeqCst) == 0 {
                yield_now().await;
            }
            let mut commit = Box::pin(relink(&mut owner, "b"));
            assert!(poll_once(&mut commit).await.is_none(), "waits for the request");
            {
                let (rt, e, new) = (rt.clone(), e.clone(), new.clone());
                rt.clone().spawn(async move { new.set(Some(read_byte(&e, &rt).await.unwrap())) });
            }
            rt.sleep(Duration::from_secs(1)).await;
            assert!(poll_once(&mut commit).await.is_none());
            assert_eq!((old.get(), new.get()), (None, None));
            assert!(e.try_begin().unwrap().is_none(), "the gate is closed");
            a.requests.open();
            commit.await.unwrap();
            while new.get().is_none() {
                yield_now().await;
            }
            assert_eq!((old.get(), new.get()), (Some(b'a'), Some(b'b')));
            assert_eq!(
                log.take(),
                ["prepare a -/DVMS", "prepare b D/DVM", "flush a", "commit a", "commit b"],
                "the relinked filter was flushed on its old child"
            );
        });
    }
}

#[test]
fn a_drain_has_a_deadline_and_says_who_it_waited_for() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, a, _) = two_leaves(&rt).await;
        let before = owner.graph().clone();
        let e = edge(&owner, "e");
        a.requests.shut();
        let done = Rc::new(Cell::new(None));
        {
            let (rt, e, done) = (rt.clone(), e.clone(), done.clone());
            rt.clone().spawn(async move { done.set(Some(read_byte(&e, &rt).await.unwrap())) });
        }
        while a.in_flight.load(SeqCst) == 0 {
            yield_now().await;
        }
        let start = rt.now();
        let error = relink(&mut owner, "b").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(error.to_string(), "requests did not finish within 30 s: 'e' with 1 request on node 'f'");
        assert_eq!(rt.now().since(start), Duration::from_secs(30));
        assert_eq!(log.take(), ["prepare a -/DVMS", "prepare b D/DVM", "abort b", "abort a"]);
        assert!(Arc::ptr_eq(&owner.graph(), &before));
        // The request is not harmed, and new ones are let in again.
        a.requests.open();
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'a');
        while done.get().is_none() {
            yield_now().await;
        }
        relink(&mut owner, "b").await.unwrap();
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'b');
    });
}

#[test]
fn a_commit_that_is_dropped_opens_the_gates_again() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, a, _) = two_leaves(&rt).await;
        let e = edge(&owner, "e");
        let token = e.begin().await.unwrap();
        {
            let mut commit = Box::pin(relink(&mut owner, "b"));
            assert!(poll_once(&mut commit).await.is_none());
            assert!(e.try_begin().unwrap().is_none());
        }
        assert_eq!(log.take(), ["prepare a -/DVMS", "prepare b D/DVM", "abort b", "abort a"]);
        assert!(e.try_begin().unwrap().is_some(), "open again");
        drop(token);
        // Also when it waits in the flush.
        a.flushes.shut();
        {
            let mut commit = Box::pin(relink(&mut owner, "b"));
            assert!(poll_once(&mut commit).await.is_none());
        }
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'a');
    });
}

#[test]
fn a_flush_that_fails_or_hangs_keeps_the_old_graph() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, a, _) = two_leaves(&rt).await;
        let before = owner.graph().clone();
        a.fail_flush.store(true, SeqCst);
        let error = relink(&mut owner, "b").await.unwrap_err();
        assert_eq!(error.to_string(), "node 'f' must be flushed before its links change: flush failed");
        assert_eq!(log.take(), ["prepare a -/DVMS", "prepare b D/DVM", "flush a", "abort b", "abort a"]);
        a.fail_flush.store(false, SeqCst);
        a.flushes.shut();
        let error = relink(&mut owner, "b").await.unwrap_err();
        assert_eq!(error.to_string(), "node 'f' was not flushed within 30 s");
        assert!(Arc::ptr_eq(&owner.graph(), &before));
        assert_eq!(read_byte(&edge(&owner, "e"), &rt).await.unwrap(), b'a');
    });
}

#[test]
fn only_the_users_of_what_changes_are_stopped() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, _, _) = two_leaves(&rt).await;
        let mut d = owner.draft();
        op::export(&mut d, "other", "b", false).unwrap();
        owner.commit(d).await.unwrap();
        let other = edge(&owner, "other");
        let token = other.begin().await.unwrap();
        let node = other.node();
        // A node above `b` changes nothing for its users.
        relink(&mut owner, "b").await.unwrap();
        assert!(Arc::ptr_eq(&other.node(), &node), "unchanged nodes are the same value");
        drop(token);
    });
}

#[test]
fn users_follow_a_relink_and_drivers_stay() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, _, _) = two_leaves(&rt).await;
        let e = edge(&owner, "e");
        let before = e.node();
        relink(&mut owner, "b").await.unwrap();
        let after = e.node();
        assert!(!Arc::ptr_eq(&before, &after));
        assert!(Arc::ptr_eq(&before.driver, &after.driver));
        assert!(Arc::ptr_eq(&before.state, &after.state));
        assert_eq!(before.children[0].node.name.as_str(), "a", "snapshots do not change");
        assert_eq!(read_byte(&e, &rt).await.unwrap(), b'b');
        assert_eq!(owner.graph().generation, 2);
    });
}

#[test]
fn an_edge_that_was_taken_away_refuses_everybody() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, a, _) = two_leaves(&rt).await;
        let e = edge(&owner, "e");
        let token = e.begin().await.unwrap();
        a.requests.shut();
        let refused = Rc::new(Cell::new(0));
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("e"));
        let mut commit = Box::pin(owner.commit(d));
        assert!(poll_once(&mut commit).await.is_none());
        for _ in 0..3 {
            let (rt, e, refused) = (rt.clone(), e.clone(), refused.clone());
            rt.clone().spawn(async move {
                let error = read_byte(&e, &rt).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Disconnected);
                assert_eq!(error.to_string(), "'e' has been taken off its node");
                refused.set(refused.get() + 1);
            });
        }
        rt.sleep(Duration::from_millis(1)).await;
        drop(token);
        commit.await.unwrap();
        while refused.get() < 3 {
            yield_now().await;
        }
        assert_eq!(e.try_begin().unwrap_err().kind(), ErrorKind::Disconnected);
        assert!(owner.graph().users().next().is_none());
    });
}

#[test]
fn nodes_are_closed_parents_first_and_once() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let a = add_probe(&mut d, "a", &log);
        add_probe(&mut d, "b", &log);
        // Over each of them a format: closing it must come before its file is closed.
        for (n, over) in [("fa", "a"), ("fb", "b")] {
            let format = StandIn::new(&op::FORMAT, AccessRule::FORMAT);
            op::add(&mut d, n, format, None, &[("file", ChildRole::Metadata, over)]).unwrap();
        }
        owner.commit(d).await.unwrap();
        log.take();
        a.fail_close.store(true, SeqCst);
        let mut d = owner.draft();
        assert_eq!(d.remove_node("a").unwrap_err().kind(), ErrorKind::Busy);
        d.remove_node("fa").unwrap();
        d.remove_node("a").unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(log.take(), ["close a"]);
        let events = owner.take_events();
        assert!(
            matches!(&events[..], [GraphEvent::CloseFailed { node, error }]
                if node.as_str() == "a" && error.to_string() == "close failed"),
            "{events:?}"
        );
        owner.close().await.unwrap();
        assert_eq!(log.take().last().unwrap(), "close b");
        assert!(owner.graph().is_empty());
        owner.close().await.unwrap();
        assert_eq!(log.take(), [""; 0]);
    });
}

/// A commit is published, its caller gives up while the first of two nodes is closed: the
/// other is still closed, or what it holds in memory would be lost.
#[test]
fn closing_goes_on_after_a_caller_gave_up() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let a = add_probe(&mut d, "a", &log);
        let b = add_probe(&mut d, "b", &log);
        owner.commit(d).await.unwrap();
        a.closes.shut();
        b.closes.shut();
        let mut d = owner.draft();
        d.remove_node("a").unwrap();
        d.remove_node("b").unwrap();
        {
            let mut commit = Box::pin(owner.commit(d));
            assert!(poll_once(&mut commit).await.is_none());
        }
        assert!(owner.graph().is_empty(), "published");
        assert_eq!(log.take(), ["close b"]);
        a.closes.open();
        b.closes.open();
        owner.close().await.unwrap();
        assert_eq!(log.take(), ["close a"]);
    });
}

#[test]
fn drafts_of_an_older_graph_are_not_published() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, _, _) = two_leaves(&rt).await;
        let mut stale = owner.draft();
        stale.remove_node("b").unwrap();
        relink(&mut owner, "b").await.unwrap();
        assert_eq!(owner.commit(stale).await.unwrap_err().kind(), ErrorKind::Busy);
        assert!(owner.graph().node("b").is_some());
    });
}

/// A definition without a driver.
fn def(n: &str) -> NodeDef {
    NodeDef {
        name: name(n),
        anonymous: false,
        kind: &op::RAW,
        rule: AccessRule::FILTER,
        flags: NodeFlags::default(),
        owner: None,
        monitor: true,
        options: Value::Null,
    }
}

#[test]
fn drafts_that_make_no_sense_are_refused() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, _, _) = two_leaves(&rt).await;
        let mut d = owner.draft();
        let e = d.add_node(def("a")).unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (ErrorKind::AlreadyExists, "Duplicate nodes with node-name='a'")
        );
        let e = d.link(&name("f"), "file", ChildRole::Filtered, "f").unwrap_err();
        assert_eq!(e.to_string(), "Making 'f' a file child of 'f' would create a cycle");
        add_filter(&mut d, "g", "f");
        let e = d.link(&name("f"), "file", ChildRole::Filtered, "g").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert_eq!(
            d.link(&name("f"), "file", ChildRole::Filtered, "z").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(
            d.link(&name("z"), "file", ChildRole::Filtered, "f").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(d.remove_node("z").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(d.resolve("z").unwrap_err().kind(), ErrorKind::NotFound);
        let nobody = OpId::internal("nobody");
        assert_eq!(d.add_user(&nobody, "f", Claim::IDLE).unwrap_err().kind(), ErrorKind::NotFound);
        let orphan = NodeDef { owner: Some(nobody), ..def("x") };
        assert_eq!(d.add_node(orphan).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(op::export(&mut d, "e", "f", false).unwrap_err().to_string(), "id 'e' is already in use");
        d.solve().unwrap();

        let mut d = owner.draft();
        d.add_node(def("half")).unwrap();
        let e = owner.commit(d).await.unwrap_err();
        assert_eq!(e.to_string(), "node 'half' has no driver, or a child without one");
    });
}

#[test]
fn a_read_only_node_is_not_written() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let disk = || Arc::new(MemoryDisk::new(dolmen_sim::Image::new(512)));
        for (n, read_only, forced) in [("ro", true, false), ("forced", false, true)] {
            d.add_node(NodeDef {
                kind: &dolmen_sim::MEMORY,
                rule: AccessRule::LEAF,
                flags: NodeFlags { read_only, ..NodeFlags::default() },
                ..def(n)
            })
            .unwrap();
            d.set_driver(&name(n), disk(), forced);
        }
        owner.commit(d).await.unwrap();
        for (n, remedy) in [("ro", "read-only=off"), ("forced", "permissions")] {
            let mut d = owner.draft();
            op::export(&mut d, "w", n, true).unwrap();
            let e = d.solve().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ReadOnly);
            assert_eq!(
                e.to_string(),
                format!(
                    "Block node is read-only: node '{n}' cannot be written, which export 'w' (nbd, writable) needs"
                )
            );
            assert!(e.remedy_text().unwrap().contains(remedy), "{e:?}");
        }
    });
}

/// A child without a name of its own goes with its last parent; one that the user added
/// by name stays.
#[test]
fn anonymous_children_go_with_their_last_parent() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        for (n, monitor) in [("base", true), ("anonymous", false), ("below", false)] {
            d.add_node(NodeDef { kind: &crate::support::PROBE, rule: AccessRule::LEAF, monitor, ..def(n) })
                .unwrap();
        }
        // `anonymous` is a filter over `below`, all others are leaves.
        let (base, _) = crate::support::Probe::new("base", &log);
        let (below, _) = crate::support::Probe::new("below", &log);
        d.set_driver(&name("base"), Arc::new(base), false);
        d.set_driver(&name("below"), Arc::new(below), false);
        d.set_driver(&name("anonymous"), Arc::new(StandIn::new(&op::RAW, AccessRule::FILTER)), false);
        d.link(&name("anonymous"), "file", ChildRole::Filtered, "below").unwrap();
        add_filter(&mut d, "one", "anonymous");
        add_filter(&mut d, "two", "anonymous");
        add_filter(&mut d, "three", "base");
        owner.commit(d).await.unwrap();

        let mut d = owner.draft();
        d.remove_node("one").unwrap();
        d.remove_node("three").unwrap();
        owner.commit(d).await.unwrap();
        assert!(owner.graph().node("anonymous").is_some(), "'two' still has it");
        assert!(owner.graph().node("base").is_some(), "was added by name");

        // Relinking the last parent lets it go as well, and what is below it.
        let mut d = owner.draft();
        d.unlink(&name("two"), "file");
        d.link(&name("two"), "file", ChildRole::Filtered, "base").unwrap();
        log.take();
        owner.commit(d).await.unwrap();
        let names: Vec<_> = owner.graph().nodes().iter().map(|n| n.name.to_string()).collect();
        assert_eq!(names, ["base", "two"]);
        assert_eq!(log.take(), ["flush below", "close below"]);
    });
}

/// A user holds a node without a name as well, until it goes.
#[test]
fn anonymous_nodes_go_with_their_last_user() {
    Sim::run(1, |rt| async move {
        let log = Log::default();
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        d.add_node(NodeDef {
            kind: &crate::support::PROBE,
            rule: AccessRule::LEAF,
            monitor: false,
            ..def("n")
        })
        .unwrap();
        let (probe, _) = crate::support::Probe::new("n", &log);
        d.set_driver(&name("n"), Arc::new(probe), false);
        owner.commit(d).await.unwrap();
        assert!(owner.graph().node("n").is_some(), "new, and somebody may attach to it yet");
        let mut d = owner.draft();
        op::export(&mut d, "x", "n", false).unwrap();
        op::export(&mut d, "y", "n", false).unwrap();
        owner.commit(d).await.unwrap();
        for (id, left) in [("x", true), ("y", false)] {
            let mut d = owner.draft();
            d.remove_op(&OpId::internal(id));
            owner.commit(d).await.unwrap();
            assert_eq!(owner.graph().node("n").is_some(), left, "after {id}");
        }
    });
}

fn job(d: &mut dolmen_graph::Draft, id: &str, filter: &str, on: &str) {
    let op = OpId::internal(id);
    d.add_op(OpInfo {
        id: op.clone(),
        kind: "job".into(),
        detail: String::new(),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })
    .unwrap();
    let raw = StandIn::new(&op::RAW, AccessRule::FILTER);
    let filter = op::add(d, filter, raw, Some(&op), &[]).unwrap();
    d.interpose(&filter, "file", on).unwrap();
}

#[test]
fn names_lead_to_the_outermost_filter_whichever_goes_first() {
    for first in ["j1", "j2"] {
        Sim::run(1, move |rt| async move {
            let (mut owner, _, _, _) = two_leaves(&rt).await;
            let e = edge(&owner, "e");
            for (id, filter) in [("j1", "inner"), ("j2", "outer")] {
                let mut d = owner.draft();
                job(&mut d, id, filter, "a");
                assert_eq!(d.resolve("a").unwrap().as_str(), filter);
                owner.commit(d).await.unwrap();
                // Parents moved onto the filter.
                assert_eq!(e.node().children[0].node.name.as_str(), filter);
            }
            let outer = owner.graph().node("outer").unwrap().clone();
            assert_eq!(outer.children[0].node.name.as_str(), "inner");
            assert_eq!(outer.owner.as_deref(), Some("j2"));

            let second = if first == "j1" { "j2" } else { "j1" };
            let left = if first == "j1" { "outer" } else { "inner" };
            let mut d = owner.draft();
            d.remove_op(&OpId::internal(first));
            assert_eq!(d.resolve("a").unwrap().as_str(), left);
            owner.commit(d).await.unwrap();
            let e2 = owner.graph().node("f").unwrap().clone();
            assert_eq!(e2.children[0].node.name.as_str(), left);
            let mut d = owner.draft();
            add_filter(&mut d, "late", "a");
            assert_eq!(d.child("late", "file").unwrap().as_str(), left);
            d.remove_op(&OpId::internal(second));
            assert_eq!(d.child("late", "file").unwrap().as_str(), "a");
            assert_eq!(d.resolve("a").unwrap().as_str(), "a");
            owner.commit(d).await.unwrap();
            assert_eq!(read_byte(&e, &rt).await.unwrap(), b'a');
        });
    }
}

#[test]
fn a_job_may_work_beneath_its_own_filter() {
    Sim::run(1, |rt| async move {
        let (mut owner, _, _, _) = two_leaves(&rt).await;
        let mut d = owner.draft();
        job(&mut d, "j", "filter", "a");
        let op = OpId::internal("j");
        let claim = Claim { needs: Actions::D, allows: Actions::EVERY };
        d.add_user_below_filters(&op, "a", claim).unwrap();
        d.add_user(&op, "a", claim).unwrap();
        owner.commit(d).await.unwrap();
        let nodes: Vec<_> = owner.edges(&op).map(|e| e.node().name.to_string()).collect();
        assert_eq!(nodes, ["a", "filter"]);
    });
}

#[test]
fn a_filter_is_not_interposed_below_itself() {
    Sim::run(1, |rt| async move {
        let (owner, _, _, _) = two_leaves(&rt).await;
        let mut d = owner.draft();
        job(&mut d, "j", "filter", "a");
        let e = d.interpose(&name("filter"), "file", "f").unwrap_err();
        assert_eq!(e.to_string(), "Interposing 'filter' on 'f' would create a cycle");
    });
}

#[test]
fn a_driver_that_relies_on_a_chain_says_so() {
    Sim::run(1, |rt| async move {
        let mut world = op::World::new(&rt).await.unwrap();
        world.run(|d| op::copy_on_read(d, "c", "top", Some("base"))).await.unwrap();
        let claims: Vec<_> = world
            .owner
            .claims()
            .iter()
            .map(|c| (c.node.to_string(), (Actions::EVERY - c.claim.allows).to_string(), c.pins))
            .collect();
        let want = [("top", "GP"), ("mid", "GP"), ("base", "P")];
        assert_eq!(claims, want.map(|(n, d)| (n.to_owned(), d.to_owned(), true)));
        // They go with the node.
        world.run(|d| d.remove_node("c")).await.unwrap();
        assert!(world.owner.claims().is_empty() && world.owner.ops().is_empty());
        let e = world.run(|d| op::copy_on_read(d, "c", "mid", Some("top"))).await.unwrap_err();
        assert_eq!(e.to_string(), "Bottom node 'top' is not below node 'c'");
    });
}

#[test]
fn claims_that_do_not_pin_go_with_their_node() {
    Sim::run(1, |rt| async move {
        let mut world = op::World::new(&rt).await.unwrap();
        world.run(|d| op::backup(d, "j", "top", "t1", Some("bm"))).await.unwrap();
        let bitmaps = world.owner.claims().iter().filter(|c| !c.pins).count();
        assert_eq!(bitmaps, 1);
        // All pinning claims of the job out of the way, the node can go.
        let mut d = world.owner.draft();
        d.remove_op(&OpId::internal("j"));
        op::change_bitmap(&mut d, "k", "top", "bm").unwrap();
        d.remove_node("top").unwrap();
        d.solve().unwrap();
        world.owner.commit(d).await.unwrap();
        assert!(world.owner.graph().node("top").is_none());
    });
}

/// With blocks of 4096 bytes, writing the last block of a disk of 5000 bytes would make it
/// longer: only those may who may resize it.
#[test]
fn a_node_that_ends_in_a_block_is_written_by_those_who_may_resize_it() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let disk = |size| {
            let config = dolmen_sim::DiskConfig { request_alignment: 4096, ..Default::default() };
            SimDisk::new(dolmen_sim::Image::new(size), config)
        };
        let mut d = owner.draft();
        op::add(&mut d, "odd", disk(5000), None, &[]).unwrap();
        op::add(&mut d, "even", disk(8192), None, &[]).unwrap();
        owner.commit(d).await.unwrap();
        let mut d = owner.draft();
        op::export(&mut d, "r", "odd", false).unwrap();
        op::export(&mut d, "w", "even", true).unwrap();
        d.solve().unwrap();
        op::export(&mut d, "x", "odd", true).unwrap();
        let e = d.solve().unwrap_err();
        assert_eq!(
            e.to_string(),
            "node 'odd' ends in the middle of a block and cannot be written by export 'x' (nbd, writable)"
        );
        let mut d = owner.draft();
        op::export(&mut d, "x", "odd", false).unwrap();
        let needs = Actions::V | Actions::S;
        d.remove_op(&OpId::internal("x"));
        job(&mut d, "j", "filter", "even");
        d.add_user(&OpId::internal("j"), "odd", Claim { needs, allows: Actions::EVERY }).unwrap();
        d.solve().unwrap();
    });
}

/// Two images `top` and `ov`, with `top` over nothing, an export that writes `top`, and the probes below them.
async fn two_images(rt: &Rt) -> (GraphOwner, Log, Arc<Hooks>) {
    let log = Log::default();
    let mut owner = GraphOwner::new(rt.clone());
    let mut d = owner.draft();
    let top = add_probe(&mut d, "t", &log);
    add_probe(&mut d, "o", &log);
    for (image, file) in [("top", "t"), ("ov", "o")] {
        let format = StandIn::new(&op::FORMAT, AccessRule::FORMAT);
        op::add(&mut d, image, format, None, &[("file", ChildRole::Metadata, file)]).unwrap();
    }
    op::export(&mut d, "e", "top", true).unwrap();
    owner.commit(d).await.unwrap();
    log.take();
    (owner, log, top)
}

fn flushes(log: &Log) -> Vec<String> {
    log.take().into_iter().filter(|l| l.starts_with("flush")).collect()
}

/// What a client had written, and was told was written, was lost when a snapshot came between the write and the
/// flush: the snapshot moved the client to the overlay, whose flush ends at its backing file, and the node below,
/// which had the data in memory, had got no other links, so that nothing flushed it.
#[test]
fn what_later_flushes_do_not_reach_is_durable_before_the_graph_changes() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, _) = two_images(&rt).await;
        let snapshot = |owner: &GraphOwner| {
            let mut d = owner.draft();
            d.replace("top", "ov").unwrap();
            d.set_backing_link(&name("ov"), Some("top")).unwrap();
            d
        };
        owner.commit(snapshot(&owner)).await.unwrap();
        assert_eq!(
            flushes(&log),
            ["flush t", "flush o"],
            "top is left behind, and the overlay has another child"
        );
        assert_eq!(edge(&owner, "e").node().name.as_str(), "ov");

        // What writes go through and what flushes reach stays the same: nothing to be done.
        let mut d = owner.draft();
        add_filter(&mut d, "f", "ov");
        d.replace("ov", "f").unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(flushes(&log), [""; 0]);
    });
}

#[test]
fn an_image_that_can_not_be_made_durable_does_not_become_a_backing_file() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, top) = two_images(&rt).await;
        let before = owner.graph().clone();
        top.fail_flush.store(true, SeqCst);
        let mut d = owner.draft();
        d.replace("top", "ov").unwrap();
        d.set_backing_link(&name("ov"), Some("top")).unwrap();
        let e = owner.commit(d).await.unwrap_err();
        assert!(e.to_string().contains("flush failed"), "{e:?}");
        assert!(Arc::ptr_eq(&owner.graph(), &before));
        assert_eq!(edge(&owner, "e").node().name.as_str(), "top");
        assert!(flushes(&log).contains(&"flush t".to_owned()));
    });
}

/// The writer is gone, and what it wrote is still in memory: whoever comes to the overlay finds it, and
/// relies on it being there for good.
#[test]
fn what_somebody_wrote_who_is_gone_is_durable_below_an_overlay() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, _) = two_images(&rt).await;
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("e"));
        d.set_backing_link(&name("ov"), Some("top")).unwrap();
        owner.commit(d).await.unwrap();
        assert!(flushes(&log).contains(&"flush t".to_owned()));

        // A user that goes on writing to it flushes it itself.
        let (mut owner, log, _) = two_images(&rt).await;
        let mut d = owner.draft();
        d.set_backing_link(&name("ov"), Some("top")).unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(flushes(&log), ["flush o"]);
    });
}

/// A job has brought everything to another node, and made it durable there: the old one is
/// none of the client's business any more, so its dying disk must not keep the client on it.
#[test]
fn a_node_that_was_replaced_is_not_flushed() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, top) = two_images(&rt).await;
        top.fail_flush.store(true, SeqCst);
        let mut d = owner.draft();
        d.replace("top", "ov").unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(flushes(&log), [""; 0]);
        assert_eq!(edge(&owner, "e").node().name.as_str(), "ov");
    });
}

/// The same with filters on the way: they have nothing of their own to write out. One was flushed on its old child, so a mirror could
/// not pivot away from a dying disk when the client came through it.
#[test]
fn a_node_that_was_replaced_under_a_filter_is_not_flushed() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, top) = two_images(&rt).await;
        let mut d = owner.draft();
        add_filter(&mut d, "f", "top");
        d.replace("top", "f").unwrap();
        add_filter(&mut d, "g", "f");
        d.replace("f", "g").unwrap();
        owner.commit(d).await.unwrap();
        log.take();
        top.fail_flush.store(true, SeqCst);
        let mut d = owner.draft();
        d.replace("top", "ov").unwrap();
        owner.commit(d).await.unwrap();
        assert_eq!(flushes(&log), [""; 0]);
        let f = edge(&owner, "e").node().children[0].node.clone();
        assert_eq!((f.name.as_str(), f.children[0].node.name.as_str()), ("f", "ov"));
    });
}

/// A stream that failed because its disk did could not end: taking its filter out relinked the node above it, which was flushed
/// first, and that failed as well, for ever.
#[test]
fn a_filter_comes_and_goes_on_a_disk_that_fails_flushes() {
    Sim::run(1, |rt| async move {
        let (mut owner, log, top) = two_images(&rt).await;
        let mut d = owner.draft();
        add_filter(&mut d, "above", "top");
        d.replace("top", "above").unwrap();
        d.set_backing_link(&name("ov"), Some("top")).unwrap();
        owner.commit(d).await.unwrap();
        log.take();
        top.fail_flush.store(true, SeqCst);
        let mut d = owner.draft();
        let raw = StandIn::new(&op::RAW, AccessRule::FILTER);
        let f = op::add(&mut d, "f", raw, None, &[]).unwrap();
        d.interpose(&f, "file", "top").unwrap();
        owner.commit(d).await.unwrap();
        let above = edge(&owner, "e").node();
        assert_eq!(above.children[0].node.name.as_str(), "f");
        assert_eq!(owner.graph().node("ov").unwrap().backing().unwrap().name.as_str(), "f");
        let mut d = owner.draft();
        d.take_out(&f);
        owner.commit(d).await.unwrap();
        assert_eq!(edge(&owner, "e").node().children[0].node.name.as_str(), "top");
        assert_eq!(flushes(&log), [""; 0]);
    });
}
