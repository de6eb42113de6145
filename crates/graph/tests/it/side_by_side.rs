//! Changes of the graph that go on at the same time.

use dolmen_graph::{GraphOwner, OpInfo};
use dolmen_sim::Sim;
use dolmen_types::{Actions, Claim, ErrorKind, OpId};
use futures_lite::future::poll_once;

use crate::support::{Log, add_filter, add_probe};

/// An operation without edges.
fn user_of(d: &mut dolmen_graph::Draft, id: &str) {
    d.add_op(OpInfo {
        id: OpId::internal(id),
        kind: "tool".into(),
        detail: String::new(),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })
    .unwrap();
}

/// While a change waits for a request, others are published. It is published on top of them, if they have nothing to do
/// with each other, with everything in its place: a job finds its edges by their order.
#[test]
fn a_change_that_waits_holds_up_no_other() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let log = Log::default();
        let mut d = owner.draft();
        for n in ["a", "b", "c", "x"] {
            add_probe(&mut d, n, &log);
        }
        for (id, nodes) in [("guest", &["a"][..]), ("job", &["b", "c"]), ("other", &["x"])] {
            user_of(&mut d, id);
            for n in nodes {
                d.add_user(&OpId::internal(id), n, Claim { needs: Actions::D, allows: Actions::EVERY })
                    .unwrap();
            }
        }
        owner.commit(d).await.unwrap();
        let guest = owner.edges(&OpId::internal("guest")).next().unwrap();
        let token = guest.begin().await.unwrap();

        // Waits for the token.
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("guest"));
        d.remove_node("a").unwrap();
        let mut first = owner.clone();
        let mut waits = Box::pin(first.commit(d));
        assert!(poll_once(&mut waits).await.is_none());

        // Publishes meanwhile.
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("other"));
        d.remove_node("x").unwrap();
        owner.commit(d).await.unwrap();

        drop(token);
        waits.await.unwrap();
        let names: Vec<_> = owner.graph().nodes().iter().map(|n| n.name.to_string()).collect();
        assert_eq!(names, ["b", "c"]);
        let edges: Vec<_> = owner.edges(&OpId::internal("job")).map(|e| e.node().name.to_string()).collect();
        assert_eq!(edges, ["b", "c"]);
        assert!(owner.ops().iter().all(|o| o.id.as_str() == "job"));
    });
}

/// The same for changes of one node: the later one is refused, and nothing of it is there.
#[test]
fn a_change_of_what_was_changed_meanwhile_is_refused() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let log = Log::default();
        let mut d = owner.draft();
        add_probe(&mut d, "a", &log);
        user_of(&mut d, "guest");
        let claim = Claim { needs: Actions::D, allows: Actions::EVERY };
        d.add_user(&OpId::internal("guest"), "a", claim).unwrap();
        owner.commit(d).await.unwrap();
        let guest = owner.edges(&OpId::internal("guest")).next().unwrap();
        let token = guest.begin().await.unwrap();
        let mut d = owner.draft();
        d.remove_op(&OpId::internal("guest"));
        let mut first = owner.clone();
        let mut waits = Box::pin(first.commit(d));
        assert!(poll_once(&mut waits).await.is_none());
        let mut d = owner.draft();
        user_of(&mut d, "late");
        d.add_user(&OpId::internal("late"), "a", claim).unwrap();
        owner.commit(d).await.unwrap();
        drop(token);
        assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(owner.ops().len(), 2);
        assert!(guest.begin().await.is_ok(), "its gate is open again");
    });
}

/// While a change is prepared, others join the part of the graph that it is in to another one, or take it apart: it is
/// published on top, and nothing of either is missing, or there twice.
#[test]
fn parts_that_are_joined_or_fall_apart_meanwhile() {
    let claim = Claim { needs: Actions::D, allows: Actions::EVERY };
    let state = |owner: &GraphOwner| {
        let graph = owner.graph();
        let nodes: Vec<_> = graph.nodes().iter().map(|n| n.name.to_string()).collect();
        let mut users: Vec<_> = graph.users().map(|u| format!("{}@{}", u.op(), u.node().name)).collect();
        users.sort();
        let found = nodes.iter().all(|n| graph.node(n).is_some_and(|x| x.name.as_str() == n));
        assert!(found && graph.len() == nodes.len(), "{graph:?}");
        (nodes.join(" "), users.join(" "))
    };
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let log = Log::default();
        let mut d = owner.draft();
        for n in ["a", "b", "c"] {
            add_probe(&mut d, n, &log);
        }
        add_filter(&mut d, "fa", "a");
        add_filter(&mut d, "fb", "b");
        // An operation may be named like a node.
        user_of(&mut d, "a");
        for n in ["a", "b"] {
            d.add_user(&OpId::internal("a"), n, claim).unwrap();
        }
        owner.commit(d).await.unwrap();

        // Each begins before the other two are published.
        let mut reads_fa = owner.draft();
        user_of(&mut reads_fa, "reader");
        reads_fa.add_user(&OpId::internal("reader"), "fa", claim).unwrap();
        let mut joins = owner.draft();
        user_of(&mut joins, "link");
        for n in ["fb", "c"] {
            joins.add_user(&OpId::internal("link"), n, claim).unwrap();
        }
        let mut parts = owner.draft();
        parts.remove_op(&OpId::internal("a"));
        owner.commit(joins).await.unwrap();
        owner.commit(reads_fa).await.unwrap();
        owner.commit(parts).await.unwrap();
        assert_eq!(state(&owner), ("a b c fa fb".into(), "link@c link@fb reader@fa".into()));

        // What is in the same part now, or was before, can be changed at the same time as well.
        let mut on_c = owner.draft();
        user_of(&mut on_c, "late");
        on_c.add_user(&OpId::internal("late"), "c", claim).unwrap();
        let mut on_a = owner.draft();
        on_a.remove_op(&OpId::internal("reader"));
        on_a.remove_node("fa").unwrap();
        let mut again = owner.draft();
        user_of(&mut again, "late");
        again.add_user(&OpId::internal("late"), "b", claim).unwrap();
        owner.commit(on_a).await.unwrap();
        owner.commit(on_c).await.unwrap();
        assert_eq!(
            owner.commit(again).await.unwrap_err().kind(),
            ErrorKind::Busy,
            "the id was taken meanwhile"
        );
        assert_eq!(state(&owner), ("a b c fb".into(), "late@c link@c link@fb".into()));
        owner.close().await.unwrap();
        assert_eq!(state(&owner), (String::new(), String::new()));
    });
}

/// Whoever walks a chain may do it by recursion, so that stacks have a limit; it is found out without recursion.
#[test]
fn stacks_have_a_limit() {
    Sim::run(1, |rt| async move {
        let owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let log = Log::default();
        add_probe(&mut d, "n0", &log);
        for i in 1..4096 {
            add_filter(&mut d, &format!("n{i}"), &format!("n{}", i - 1));
        }
        d.solve().unwrap();
        add_filter(&mut d, "one more", "n4095");
        let e = d.solve().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Limit, "{e}");
    });
}
