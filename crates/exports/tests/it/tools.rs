//! The clients that people use: libnbd's and QEMU's tools.

use serde_json::Value;

use crate::memory::Memory;
use crate::rig::{Rig, pattern, run};

const MIB: u64 = 1 << 20;

#[test]
fn nbdinfo_sees_what_is_true() {
    run(async |rig| {
        rig.export("rw", 10 * MIB + 512, true).await;
        rig.export("ro", 4 * MIB, false).await;
        let json: Value =
            serde_json::from_str(&rig.ok("nbdinfo", &["--json", &rig.uri("rw")]).await).unwrap();
        assert_eq!(json["protocol"], "newstyle-fixed");
        assert_eq!(json["structured"], true);
        let e = &json["exports"][0];
        assert_eq!(e["export-name"], "rw");
        assert_eq!(e["description"], "the disk rw");
        assert_eq!(e["export-size"], 10 * MIB + 512);
        assert_eq!(e["contexts"], serde_json::json!(["base:allocation"]));
        for (flag, value) in [
            ("is_read_only", false),
            ("can_multi_conn", true),
            ("can_flush", true),
            ("can_fua", true),
            ("can_trim", true),
            ("can_zero", true),
            ("can_fast_zero", true),
            ("can_df", true),
            ("can_cache", true),
        ] {
            assert_eq!(e[flag], value, "{flag}");
        }
        assert_eq!(e["block_size_minimum"], 1);
        assert_eq!(e["block_size_preferred"], 4096);
        assert_eq!(e["block_size_maximum"], 32 * MIB);

        let json: Value =
            serde_json::from_str(&rig.ok("nbdinfo", &["--json", &rig.uri("ro")]).await).unwrap();
        let e = &json["exports"][0];
        assert_eq!(e["is_read_only"], true);
        assert_eq!(e["can_multi_conn"], true);
        assert_eq!(e["can_trim"], false);
        assert_eq!(e["can_zero"], false);

        let json: Value =
            serde_json::from_str(&rig.ok("nbdinfo", &["--json", "--list", &rig.uri("")]).await).unwrap();
        let names: Vec<_> = json["exports"].as_array().unwrap().iter().map(|e| &e["export-name"]).collect();
        assert_eq!(names, ["rw", "ro"]);

        let out = rig.tool("nbdinfo", &[&rig.uri("nope")]).await;
        assert!(!out.status.success());
    });
}

#[test]
fn nbdcopy_both_ways_keeps_data_and_holes() {
    run(async |rig| {
        let size = 9 * MIB as usize + 512;
        let edge = rig.export("d", size as u64, true).await;
        let mut image = vec![0; size];
        image[5000..2_500_000].copy_from_slice(&pattern(2_495_000, 1));
        image[8 << 20..].copy_from_slice(&pattern(size - (8 << 20), 2));
        let (from, to) = (rig.path("from"), rig.path("to"));
        std::fs::write(&from, &image).unwrap();
        rig.ok("nbdcopy", &["--flush", &from, &rig.uri("d")]).await;
        assert!(rig.peek(&edge, 0, size).await == image);
        assert!(Memory::counters(&Rig::node(&edge)).0 > 0, "flushed");
        rig.ok("nbdcopy", &[&rig.uri("d"), &to]).await;
        assert!(std::fs::read(&to).unwrap() == image);
        // What nobody wrote is a hole, on both sides.
        let map: Value =
            serde_json::from_str(&rig.ok("nbdinfo", &["--map", "--json", &rig.uri("d")]).await).unwrap();
        let holes = map.as_array().unwrap().iter().filter(|e| e["type"] == 3);
        let most = holes.map(|e| e["length"].as_u64().unwrap()).max();
        assert!(most > Some(4 * MIB), "{map}");
    });
}

#[test]
fn qemu_io_and_qemu_img() {
    run(async |rig| {
        let edge = rig.export("d", 8 * MIB, true).await;
        let uri = rig.uri("d");
        rig.ok(
            "qemu-io",
            &[
                "-f",
                "raw",
                &uri,
                "-c",
                "write -P 0x11 0 1M",
                "-c",
                "write -f -P 0x22 1M 64k",
                "-c",
                "write -z -u 64k 64k",
                "-c",
                "write -z 256k 64k",
                "-c",
                "discard 512k 64k",
                "-c",
                "write -P 0x33 7777 3",
                "-c",
                "flush",
                "-c",
                "read -P 0x11 0 7777",
                "-c",
                "read -P 0x33 7777 3",
                "-c",
                "read -P 0 64k 64k",
                "-c",
                "read -P 0 256k 64k",
                "-c",
                "read -P 0x22 1M 64k",
                "-c",
                "aio_read -P 0x11 128k 64k",
                "-c",
                "aio_write -P 0x44 2M 1M",
                "-c",
                "aio_flush",
                "-c",
                "read -P 0x44 2M 1M",
            ],
        )
        .await;
        let (_, fua, discards, _) = Memory::counters(&Rig::node(&edge));
        assert!(fua >= 1 && discards >= 1);
        assert_eq!(rig.peek(&edge, 7777, 3).await, [0x33; 3]);
        let map: Value =
            serde_json::from_str(&rig.ok("qemu-img", &["map", "--output=json", &uri]).await).unwrap();
        let at = |offset: u64| {
            let e = map.as_array().unwrap().iter().find(|e| {
                let start = e["start"].as_u64().unwrap();
                (start..start + e["length"].as_u64().unwrap()).contains(&offset)
            });
            let e = e.unwrap();
            (e["zero"].as_bool().unwrap(), e["data"].as_bool().unwrap())
        };
        assert_eq!(at(0), (false, true));
        assert_eq!(at(65536), (true, false), "unmapped");
        assert_eq!(at(256 << 10), (false, true), "zeroes that are kept are data");
        assert_eq!(at(4 * MIB), (true, false));
        let copy = rig.path("copy.qcow2");
        rig.ok("qemu-img", &["convert", "-O", "qcow2", &uri, &copy]).await;
        rig.ok("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, &copy]).await;
    });
}

#[test]
fn read_only_exports_stay_as_they_are() {
    run(async |rig| {
        let edge = rig.disk("d", MIB, true).await;
        rig.poke(&edge, 0, &[7; 4096]).await;
        rig.add("d", &edge, false);
        let uri = rig.uri("d");
        let out = rig.tool("qemu-io", &["-f", "raw", &uri, "-c", "write 0 512"]).await;
        assert!(!out.status.success());
        rig.ok("qemu-io", &["-r", "-f", "raw", &uri, "-c", "read -P 7 0 4k"]).await;
        assert_eq!(rig.peek(&edge, 0, 1).await, [7]);
    });
}

#[test]
fn tcp_and_several_connections() {
    run(async |rig| {
        let edge = rig.disk("d", 32 * MIB, true).await;
        let address = dolmen_rt::Addr::Inet { host: "127.0.0.1".into(), port: 0 };
        let server = dolmen_exports::NbdServer::listen(&rig.rt, &address, Default::default()).await.unwrap();
        let export = dolmen_exports::NbdExport {
            name: "d".into(),
            description: String::new(),
            edge: edge.clone(),
            writable: true,
            writethrough: true,
        };
        let export = server.export(export).unwrap();
        export.start().unwrap();
        let dolmen_rt::Addr::Inet { port, .. } = *server.address() else { panic!("not TCP") };
        assert_ne!(port, 0);
        let uri = format!("nbd://127.0.0.1:{port}/d");
        let image = pattern(32 << 20, 3);
        let from = rig.path("from");
        std::fs::write(&from, &image).unwrap();
        rig.ok("nbdcopy", &["--connections=4", "--requests=32", &from, &uri]).await;
        assert!(rig.peek(&edge, 0, 32 << 20).await == image);
        let (flushes, fua, ..) = Memory::counters(&Rig::node(&edge));
        assert!(fua > 0 && flushes == 0, "writethrough makes every write durable");
        rig.until(|| export.clients() == 0).await;
        dolmen_exports::Server::stop(&server).await;
        assert!(!rig.tool("nbdinfo", &["--size", &uri]).await.status.success());
    });
}
