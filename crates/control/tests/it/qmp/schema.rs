//! The schema describes itself, and the types of replies fit it.

use std::collections::HashSet;

use dolmen_qmp::model::{self, *};
use dolmen_qmp::{Source, Version, keyval};
use dolmen_types::Actions;
use serde_json::{Value as Json, json};

use super::schema;

/// Names that an entry of the introspection refers to.
fn references(entry: &Json) -> Vec<&str> {
    let mut out: Vec<_> =
        ["arg-type", "ret-type", "element-type"].iter().filter_map(|k| entry[*k].as_str()).collect();
    for list in ["members", "variants"] {
        out.extend(entry[list].as_array().into_iter().flatten().filter_map(|m| m["type"].as_str()));
    }
    out
}

#[test]
fn introspection_is_closed_and_describes_itself() {
    let s = schema();
    let all = s.introspection();
    s.check_return("query-qmp-schema", all.clone()).expect("fits its own schema");
    let entries = all.as_array().expect("a list");
    let mut names = HashSet::new();
    for e in entries {
        assert!(names.insert(e["name"].as_str().expect("a name")), "twice: {e}");
    }
    for e in entries {
        for r in references(e) {
            assert!(names.contains(r), "{e} refers to {r}");
        }
    }
    let commands: Vec<_> =
        entries.iter().filter(|e| e["meta-type"] == "command").filter_map(|e| e["name"].as_str()).collect();
    assert_eq!(commands, s.command_names().collect::<Vec<_>>());
}

#[test]
fn no_two_types_are_equal() {
    let all = schema().introspection();
    let mut seen = HashSet::new();
    for e in all.as_array().expect("a list") {
        if matches!(e["meta-type"].as_str(), Some("command" | "event" | "builtin")) {
            continue;
        }
        let mut shape = e.clone();
        shape.as_object_mut().expect("an object").shift_remove("name");
        assert!(seen.insert(shape.to_string()), "{e}");
    }
}

fn image() -> ImageInfo {
    ImageInfo {
        backing_image: Some(Box::default()),
        virtual_size: 1 << 30,
        filename: "a".into(),
        cluster_size: Some(65536),
        format: "qcow2".into(),
        actual_size: Some(1),
        encrypted: Some(false),
        compressed: Some(false),
        backing_filename: Some("b".into()),
        full_backing_filename: Some("/b".into()),
        backing_filename_format: Some("raw".into()),
        snapshots: Some(vec![SnapshotInfo {
            id: "1".into(),
            name: "s".into(),
            vm_state_size: 0,
            date_sec: 1,
            date_nsec: 2,
            vm_clock_sec: 3,
            vm_clock_nsec: 4,
            icount: Some(5),
        }]),
        format_specific: Some(json!({"type": "qcow2", "data": {"compat": "1.1", "compression-type": "zlib",
            "lazy-refcounts": false, "refcount-bits": 16, "corrupt": false, "extended-l2": false,
            "data-file": "d", "data-file-raw": false}})),
        dirty_flag: Some(false),
    }
}

#[test]
fn replies_fit() {
    let s = schema();
    let mut node = BlockDeviceInfo {
        file: "a".into(),
        node_name: Some("n".into()),
        ro: true,
        drv: "qcow2".into(),
        backing_file: Some("b".into()),
        backing_file_depth: 1,
        active: true,
        encrypted: false,
        detect_zeroes: "off".into(),
        image: image(),
        cache: CacheInfo { writeback: true, direct: false, no_flush: false },
        write_threshold: 0,
    };
    s.check_return("query-named-block-nodes", model::to_json(&vec![&node])).expect("full");
    node.image = ImageInfo {
        format_specific: Some(json!({"type": "file", "data": {"extent-size-hint": 4096}})),
        ..ImageInfo::default()
    };
    node.backing_file = None;
    s.check_return("query-named-block-nodes", model::to_json(&vec![&node])).expect("minimal");

    let graph = BlockGraph {
        edges: vec![BlockGraphEdge {
            name: "file".into(),
            parent: 2,
            shared_perm: permission_words(Actions::EVERY),
            perm: permission_words(Actions::NONE),
            child: 1,
        }],
        nodes: vec![BlockGraphNode { name: "x".into(), kind: BlockGraphNodeType::BlockDriver, id: 1 }],
    };
    s.check_return("x-debug-query-block-graph", model::to_json(&graph)).expect("graph");
    assert_eq!(permission_words(Actions::EVERY), ["resize", "write-unchanged", "write", "consistent-read"]);

    let block = BlockInfo {
        device: "e".into(),
        kind: "unknown",
        removable: false,
        locked: false,
        inserted: Some(node.clone()),
    };
    s.check_return("query-block", model::to_json(&vec![block])).expect("device");
    let below = BlockStats {
        node_name: Some("f".into()),
        driver_specific: Some(FileStats {
            driver: "file",
            discard_nb_ok: 1,
            discard_nb_failed: 0,
            discard_bytes_ok: 512,
        }),
        ..BlockStats::default()
    };
    let stats = BlockStats {
        device: Some("e".into()),
        node_name: Some("n".into()),
        stats: BlockDeviceStats { rd_bytes: 4096, idle_time_ns: Some(1), ..BlockDeviceStats::default() },
        driver_specific: None,
        parent: Some(Box::new(below.clone())),
        backing: Some(Box::new(below)),
    };
    s.check_return("query-blockstats", model::to_json(&vec![stats])).expect("counters");
    s.check_event(
        "BLOCK_WRITE_THRESHOLD",
        json!({"node-name": "n", "amount-exceeded": 512, "write-threshold": 1u64 << 40}),
    )
    .expect("event");
    s.check_event("BLOCK_BITMAPS_INVALIDATED", json!({"node-name": "n", "bitmaps": ["b0"]})).expect("event");

    let export =
        BlockExportInfo { id: "e".into(), kind: "nbd".into(), node_name: "n".into(), shutting_down: false };
    s.check_return("query-block-exports", model::to_json(&vec![export])).expect("export");
    let job = JobInfo {
        current_progress: 1,
        status: "running".into(),
        total_progress: 2,
        kind: "prefetch".into(),
        id: "j".into(),
        estimated_remaining_ms: Some(3),
        error: Some("x".into()),
    };
    s.check_return("query-jobs", model::to_json(&vec![&job])).expect("full");
    let job = JobInfo { estimated_remaining_ms: None, error: None, ..job };
    s.check_return("query-jobs", model::to_json(&vec![job])).expect("minimal");
    let job = BlockJobInfo {
        auto_finalize: true,
        io_status: "nospace".into(),
        device: "j".into(),
        auto_dismiss: true,
        busy: false,
        len: 1,
        offset: 1,
        status: "standby".into(),
        paused: true,
        speed: 0,
        ready: true,
        kind: "mirror".into(),
        details: [("actively-synced".to_owned(), json!(false))].into_iter().collect(),
        error: Some("x".into()),
    };
    s.check_return("query-block-jobs", model::to_json(&vec![&job])).expect("full");
    let job = BlockJobInfo { kind: "stream".into(), details: Default::default(), error: None, ..job };
    s.check_return("query-block-jobs", model::to_json(&vec![job])).expect("minimal");
    s.check_return("query-version", Version::current().to_json()).expect("version");
    s.check_event("BLOCK_EXPORT_DELETED", json!({"id": "e"})).expect("event");
    assert!(s.check_event("BLOCK_EXPORT_DELETED", json!({})).is_err());
}

/// The texts are those of QEMU's daemon for the same `--blockdev`.
#[test]
fn command_line_errors() {
    let s = schema();
    let check = |text: &str| {
        let (v, source) = keyval::parse(text, Some("driver")).expect("well-formed");
        s.check_blockdev(v, source).map(|v| v.to_string()).map_err(|e| e.desc)
    };
    for (text, desc) in [
        ("", "Parameter 'driver' is missing"),
        ("node-name=a,zork=1", "Parameter 'driver' is missing"),
        ("null-co,node-name=a,zork=1", "Parameter 'zork' is unexpected"),
        ("null-co,node-name=a,read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'"),
        (
            "null-co,node-name=a,cache.direct.x=on",
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        ("null-co,node-name=a,cache.x.y=on", "Parameters 'cache.x.*' are unexpected"),
        (
            "blkdebug,image=n,inject-error=pwritev",
            "Invalid parameter type for 'inject-error', expected: array",
        ),
        ("blkdebug,image=n,inject-error.0.eventx=pwritev", "Parameter 'inject-error.0.event' is missing"),
        (
            "blkdebug,image=n,inject-error.0.event=pwritev,inject-error.0.once=1",
            "Parameter 'inject-error.0.once' expects 'on' or 'off'",
        ),
        ("{\"driver\":\"null-co\",\"size\":\"5\"}", "Invalid parameter type for 'size', expected: integer"),
        ("nbd,server.type=inet,server.host=h", "Parameter 'server.port' is missing"),
        ("nbd,server.type=vsock", "Parameter 'type' does not accept value 'vsock' (use one of: inet, unix)"),
    ] {
        assert_eq!(check(text), Err(desc.to_owned()), "{text}");
    }
    assert_eq!(
        check("qcow2,node-name=a,file.driver=file,file.filename=x,backing=").as_deref(),
        Ok(
            r#"{"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "x"}, "backing": null}"#
        )
    );
    assert_eq!(
        check("null-co,size=1G,read-only=on").as_deref(),
        Ok(r#"{"driver": "null-co", "read-only": true, "size": 1073741824}"#)
    );
}

#[test]
fn other_command_line_options() {
    let s = schema();
    let (v, source) = keyval::parse("nbd,id=e,node-name=n,writable=on", Some("type")).expect("well-formed");
    assert_eq!(
        s.check_export(v, source).expect("fits").to_string(),
        r#"{"type": "nbd", "id": "e", "node-name": "n", "writable": true}"#
    );
    assert_eq!(
        s.check_export(json!({"type": "nbd", "id": "e"}), Source::Keyval).expect_err("misses").desc,
        "Parameter 'node-name' is missing"
    );
    let (v, source) = keyval::parse("addr.type=unix,addr.data.path=/x", None).expect("well-formed");
    assert_eq!(s.check_nbd_server(v, source).expect_err("flat").desc, "Parameter 'addr.path' is missing");
    let (v, source) =
        keyval::parse("addr.type=unix,addr.path=/x,max-connections=3", None).expect("well-formed");
    s.check_nbd_server(v, source).expect("fits");
}
