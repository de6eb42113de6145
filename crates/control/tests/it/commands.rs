//! What commands do and what they say when they refuse.

use serde_json::{Value as Json, json};

use crate::rig::{Client, with_rig};

/// Memory under a filter, both with names.
async fn chain(c: &mut Client) {
    c.ok(
        "blockdev-add",
        json!({"driver": "pass", "node-name": "top",
               "file": {"driver": "memory", "node-name": "disk", "size": 1 << 20}}),
    )
    .await;
}

fn desc(error: &Json) -> &str {
    error["desc"].as_str().expect("a text")
}

#[test]
fn nodes_come_and_go() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        chain(&mut c).await;
        assert_eq!(c.node_names().await, ["top", "disk"]);
        c.ok("blockdev-add", json!({"driver": "pass", "node-name": "second", "file": "top"})).await;

        let e = c.err("blockdev-del", json!({"node-name": "nothing"})).await;
        assert_eq!(desc(&e), "Failed to find node with node-name='nothing'");
        // Defined inside another node, so it goes with that one.
        let e = c.err("blockdev-del", json!({"node-name": "disk"})).await;
        assert_eq!(desc(&e), "Node disk is not owned by the monitor");
        let e = c.err("blockdev-del", json!({"node-name": "top"})).await;
        assert!(desc(&e).contains("in use") && desc(&e).contains("'second'"), "{e}");

        c.ok("blockdev-del", json!({"node-name": "second"})).await;
        assert_eq!(c.node_names().await, ["top", "disk"]);
        c.ok("blockdev-del", json!({"node-name": "top"})).await;
        assert!(c.node_names().await.is_empty());
    });
}

/// A definition is opened as a whole or not at all.
#[test]
fn adding_is_all_or_nothing() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        c.ok("blockdev-add", json!({"driver": "memory", "node-name": "disk", "size": 4096})).await;
        let before = c.ok("x-debug-query-block-graph", json!({})).await;
        for (definition, text) in [
            (json!({"driver": "memory"}), "'node-name' must be specified for the root node"),
            (json!({"driver": "memory", "node-name": "disk"}), "Duplicate nodes with node-name='disk'"),
            (json!({"driver": "memory", "node-name": "1st"}), "Invalid node-name: '1st'"),
            (json!({"driver": "pass", "node-name": "a", "file": "nothing"}), "'nothing'"),
            // The inner node is fine and opened first; it must be gone again.
            (
                json!({"driver": "pass", "node-name": "disk", "file": {"driver": "memory", "node-name": "inner"}}),
                "Duplicate nodes",
            ),
            (
                json!({"driver": "pass", "node-name": "a",
                       "file": {"driver": "pass", "node-name": "a", "file": {"driver": "memory", "node-name": "in"}}}),
                "Duplicate nodes",
            ),
        ] {
            let e = c.err("blockdev-add", definition.clone()).await;
            assert_eq!(e["class"], "GenericError");
            assert!(desc(&e).contains(text), "{definition}: {e}");
            assert_eq!(c.ok("x-debug-query-block-graph", json!({})).await, before, "{definition}");
        }
    });
}

#[test]
fn a_failed_close_is_reported_and_the_node_is_gone() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        c.ok(
            "blockdev-add",
            json!({"driver": "stuck", "node-name": "a", "file": {"driver": "memory", "size": 512}}),
        )
        .await;
        let e = c.err("blockdev-del", json!({"node-name": "a"})).await;
        assert!(desc(&e).contains("Node 'a' is closed") && desc(&e).contains("last table"), "{e}");
        assert_eq!(e["data"]["kind"], "NoSpace");
        assert!(c.node_names().await.is_empty());
    });
}

#[test]
fn exports_come_and_go() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        let mut other = rig.monitor().await;
        chain(&mut c).await;
        let add = |id: &str, more: Json| {
            let mut v = json!({"type": "nbd", "id": id, "node-name": "top"});
            v.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("an object"));
            v
        };
        let e = c.err("block-export-add", add("e0", json!({}))).await;
        assert_eq!(desc(&e), "NBD server not running");
        rig.nbd_server(&mut c).await;
        let again = json!({"addr": {"type": "unix", "data": {"path": rig.path("other.sock")}}});
        let e = c.err("nbd-server-start", again).await;
        assert_eq!(desc(&e), "NBD server already running");

        for (definition, text) in [
            (add("e0", json!({"node-name": "nothing"})), "Cannot find device='' nor node-name='nothing'"),
            (add("1st", json!({})), "Invalid block export id"),
        ] {
            let e = c.err("block-export-add", definition).await;
            assert!(desc(&e).starts_with(text), "{e}");
        }
        c.ok("block-export-add", add("e0", json!({"writable": true}))).await;
        let e = c.err("block-export-add", add("e0", json!({"name": "x"}))).await;
        assert_eq!(desc(&e), "Block export id 'e0' is already in use");
        let e = c.err("block-export-add", add("e1", json!({}))).await;
        assert_eq!(desc(&e), "NBD server already has export named 'top'");
        c.ok("block-export-add", add("e1", json!({"name": "x", "description": "hello"}))).await;

        let info = |id: &str| json!({"id": id, "type": "nbd", "node-name": "top", "shutting-down": false});
        assert_eq!(c.ok("query-block-exports", json!({})).await, json!([info("e1"), info("e0")]));
        let graph = c.ok("x-debug-query-block-graph", json!({})).await;
        let root = graph["edges"]
            .as_array()
            .expect("edges")
            .iter()
            .find(|e| e["name"] == "root" && e["perm"] == json!(["write", "consistent-read"]));
        assert_eq!(
            root.expect("the writer's edge")["shared-perm"],
            json!(["write-unchanged", "write", "consistent-read"])
        );
        let e = c.err("blockdev-del", json!({"node-name": "top"})).await;
        assert!(desc(&e).contains("Node top is in use") && desc(&e).contains("export 'e0'"), "{e}");

        let e = c.err("block-export-del", json!({"id": "nothing"})).await;
        assert_eq!(desc(&e), "Export 'nothing' is not found");
        c.ok("block-export-del", json!({"id": "e1"})).await;
        // The event was there before the reply, on every monitor.
        assert_eq!(c.events.len(), 1);
        for m in [&mut c, &mut other] {
            let event = m.event().await;
            assert_eq!(event["event"], "BLOCK_EXPORT_DELETED");
            assert_eq!(event["data"], json!({"id": "e1"}));
            assert!(event["timestamp"]["seconds"].as_u64().is_some_and(|s| s > 1_600_000_000), "{event}");
        }
        c.ok("nbd-server-stop", json!({})).await;
        assert_eq!(c.event().await["data"], json!({"id": "e0"}));
        let e = c.err("nbd-server-stop", json!({})).await;
        assert_eq!(desc(&e), "NBD server not running");
        assert_eq!(c.ok("query-block-exports", json!({})).await, json!([]));
        assert!(!rig.path("nbd.sock").exists());
        c.ok("blockdev-del", json!({"node-name": "top"})).await;
    });
}

#[test]
fn a_read_only_node_is_not_exported_writable() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        rig.nbd_server(&mut c).await;
        c.ok(
            "blockdev-add",
            json!({"driver": "memory", "node-name": "disk", "size": 4096, "read-only": true}),
        )
        .await;
        let export =
            |writable: bool| json!({"type": "nbd", "id": "e", "node-name": "disk", "writable": writable});
        let e = c.err("block-export-add", export(true)).await;
        assert_eq!(desc(&e), "Cannot export read-only node as writable");
        // A refusal leaves nothing behind: the id is free.
        c.ok("block-export-add", export(false)).await;
    });
}

/// Every row of the command table has code behind it.
#[test]
fn every_command_exists() {
    with_rig(|rig| async move {
        let names: Vec<_> = rig.control.schema().command_names().collect();
        for name in names {
            // `quit` ends the test; the negotiation belongs to the connection.
            if matches!(name, "quit" | "qmp_capabilities") {
                continue;
            }
            if let Err(text) = rig.bare(name).await {
                assert!(!text.contains("has not been found"), "{name}: {text}");
            }
        }
    });
}

#[test]
fn replies_fit_the_schema() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        chain(&mut c).await;
        rig.nbd_server(&mut c).await;
        c.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "top"})).await;
        let schema = rig.control.schema();
        for query in [
            "query-version",
            "query-commands",
            "query-qmp-schema",
            "query-named-block-nodes",
            "x-debug-query-block-graph",
            "query-block-exports",
            "query-block",
            "query-blockstats",
        ] {
            let value = c.ok(query, json!({})).await;
            schema.check_return(query, value).unwrap_or_else(|e| panic!("{query}: {e}"));
        }
    });
}
