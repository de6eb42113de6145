//! Connections: many at once, broken ones, slow ones, and the end.

use dolmen_control::listen_monitor;
use dolmen_types::ErrorKind;
use serde_json::json;

use crate::rig::with_rig;

#[test]
fn commands_in_pieces_and_in_heaps() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        for piece in ["{\"exec", "ute\":\"query-version\",\"id", "\":1}"] {
            c.send(piece).await;
        }
        assert_eq!(c.receive().await.expect("a reply")["id"], 1);
        let heap: String =
            (0..300).map(|i| json!({"execute": "query-block-exports", "id": i}).to_string()).collect();
        c.send(&heap).await;
        for i in 0..300 {
            assert_eq!(c.receive().await.expect("a reply"), json!({"return": [], "id": i}));
        }
    });
}

#[test]
fn monitors_do_not_disturb_each_other() {
    with_rig(|rig| async move {
        let mut good = rig.monitor().await;
        let mut silent = rig.connect().await;
        let mut broken = rig.monitor().await;
        broken.send("}{]\"").await;
        let mut gone = rig.monitor().await;
        gone.send("{\"execute\":\"query-qmp-schema\"}{\"execute\":").await;
        drop(gone);
        good.ok("blockdev-add", json!({"driver": "memory", "node-name": "disk", "size": 4096})).await;
        assert_eq!(good.node_names().await, ["disk"]);
        // Still in its negotiation: the greeting and no events.
        rig.nbd_server(&mut good).await;
        good.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "disk"})).await;
        good.ok("block-export-del", json!({"id": "e"})).await;
        assert!(silent.receive().await.expect("a greeting")["QMP"].is_object());
        let reply = silent.ask(json!({"execute": "query-version"})).await;
        assert_eq!(reply["error"]["class"], "CommandNotFound");
        assert!(silent.events.is_empty());
    });
}

/// A client that sends commands and never reads holds up only itself.
#[test]
fn a_client_that_does_not_read() {
    with_rig(|rig| async move {
        let deaf = rig.monitor().await;
        let mut good = rig.monitor().await;
        let flood = "{\"execute\":\"query-qmp-schema\"}".repeat(2000);
        let sent = async {
            // Blocks once the daemon stops reading, which is the point.
            let _ = deaf.stream.send_bytes(flood.as_bytes()).await;
            std::future::pending::<()>().await;
        };
        let worked = async {
            for i in 0..50 {
                let name = format!("d{i}");
                good.ok("blockdev-add", json!({"driver": "memory", "node-name": name, "size": 512})).await;
                good.ok("blockdev-del", json!({"node-name": name})).await;
            }
        };
        futures_lite::future::or(worked, sent).await;
    });
}

#[test]
fn quit_answers_and_hangs_up() {
    with_rig(|rig| async move {
        let mut c = rig.monitor().await;
        let mut other = rig.monitor().await;
        c.ok("blockdev-add", json!({"driver": "memory", "node-name": "disk", "size": 4096})).await;
        rig.nbd_server(&mut c).await;
        c.ok("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "disk"})).await;
        c.send("{\"execute\":\"quit\"}").await;
        let mut replies = Vec::new();
        while let Some(v) = c.receive().await {
            replies.push(v);
        }
        assert!(replies.contains(&json!({"return": {}})), "{replies:?}");
        assert!(replies.iter().any(|v| v["event"] == "BLOCK_EXPORT_DELETED"), "{replies:?}");
        while let Some(v) = other.receive().await {
            assert!(v.get("event").is_some(), "{v}");
        }
        rig.control.ended().await;
        assert!(!rig.path("nbd.sock").exists());
        let late =
            rig.control.command("nbd-server-stop", dolmen_types::Options::new()).await.expect_err("too late");
        assert_eq!(late.desc, "The daemon is shutting down");
    });
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    with_rig(|rig| async move {
        let e = listen_monitor(&rig.control, rig.socket()).await.expect_err("in use");
        assert_eq!(e.kind(), ErrorKind::Busy);
        // The first listener has not been harmed.
        rig.monitor().await;

        let stale = rig.path("stale.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale).expect("bound"));
        assert!(stale.exists());
        let socket = listen_monitor(&rig.control, &stale).await.expect("replaced");
        drop(socket);
        assert!(!stale.exists());
    });
}
