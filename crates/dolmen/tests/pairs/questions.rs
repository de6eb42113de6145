//! What `what-if` is asked: everything that the pair table tries, and what it leaves out (jobs that run already, the
//! server, mistakes).

use serde_json::{Value as Json, json};

use crate::steps::{self, Part, State, Step};
use crate::world::{Effect, export};

/// A command that is asked about, and then given.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) command: String,
    pub(crate) arguments: Json,
    /// What has to be done first.
    pub(crate) before: Vec<Step>,
}

/// A state of the pair table, or one that only matters for what-if.
pub(crate) struct Scene {
    pub(crate) state: State,
    /// The statuses that job `j` is waited for in turn, each after a command if there is one.
    pub(crate) until: Vec<(Option<Step>, &'static str)>,
}

/// All questions about a command; `None` if nobody has thought about it.
pub(crate) fn about(command: &str) -> Option<Vec<Question>> {
    let mut out = Vec::new();
    if let Some(Part::Tried(attempts)) = steps::part(command) {
        out.extend(attempts.into_iter().map(|a| Question {
            command: command.to_owned(),
            arguments: a.step.arguments,
            before: a.before,
        }));
    }
    let known = !out.is_empty();
    let more = more(command);
    if !known && more.is_none() {
        return None;
    }
    let question = |arguments| Question { command: command.to_owned(), arguments, before: Vec::new() };
    out.extend(more.into_iter().flatten().map(question));
    Some(out)
}

/// Arguments that the pair table has no use for.
fn more(command: &str) -> Option<Vec<Json>> {
    if command.starts_with("query-") || command == "x-debug-query-block-graph" {
        return Some(vec![json!({})]);
    }
    Some(match command {
        "qmp_capabilities" | "quit" | "nbd-server-stop" => vec![json!({})],
        // Asks about others.
        "what-if" => vec![],
        _ if command.starts_with("job-") || command.starts_with("block-job-") => verb(command),
        _ if command.starts_with("nbd-") || command.starts_with("block-export-") => server(command),
        "blockdev-create" | "blockdev-snapshot-sync" | "drive-backup" | "drive-mirror" => images(command),
        "transaction" => transactions(),
        "block-stream" | "block-commit" | "blockdev-mirror" | "blockdev-backup" | "blockdev-prefetch" => {
            jobs(command)
        }
        "blockdev-add" | "blockdev-del" | "blockdev-reopen" | "blockdev-set-active" => nodes(command),
        _ => changes(command)?,
    })
}

fn verb(command: &str) -> Vec<Json> {
    let by = match command {
        "block-job-finalize" | "block-job-dismiss" | "block-job-change" => "id",
        _ if command.starts_with("block-job-") => "device",
        _ => "id",
    };
    let mut out = Vec::new();
    for id in ["j", "nobody", ""] {
        match command {
            "block-job-set-speed" => out.push(json!({by: id, "speed": 65536})),
            "block-job-change" => {
                out.push(json!({by: id, "type": "mirror", "copy-mode": "write-blocking"}));
                out.push(json!({by: id, "type": "mirror", "copy-mode": "background"}));
            }
            "block-job-cancel" => {
                out.push(json!({by: id}));
                out.push(json!({by: id, "force": true}));
            }
            _ => out.push(json!({ by: id })),
        }
    }
    out.push(json!({}));
    out
}

fn server(command: &str) -> Vec<Json> {
    let unix = |path: &str| json!({"addr": {"type": "unix", "data": {"path": path}}});
    let inet = |port: &str| json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": port}}});
    match command {
        "nbd-server-start" => vec![
            unix("DIR/nbd.sock"),
            unix("DIR/other.sock"),
            unix("DIR/top.qcow2"),
            unix("DIR/monitor.sock"),
            unix("DIR/none/x.sock"),
            unix(&format!("DIR/{}", "x".repeat(200))),
            inet("0"),
            inet("x"),
            json!({"addr": {"type": "unix", "data": {"path": "DIR/other.sock"}}, "max-connections": -1}),
        ],
        "block-export-del" => ["guest", "e", "es", "idle", "j", "nobody"]
            .iter()
            .flat_map(|id| {
                [json!({ "id": id }), json!({"id": id, "mode": "safe"}), json!({"id": id, "mode": "hard"})]
            })
            .collect(),
        _ => vec![
            export("guest", "t2", false),
            export("j", "t2", false),
            export("k", "nobody", false),
            export("9", "t2", false),
            json!({"type": "nbd", "id": "k", "name": "guest", "node-name": "t2"}),
            json!({"type": "nbd", "id": "k", "name": "x".repeat(5000), "node-name": "t2"}),
            json!({"type": "nbd", "id": "k", "node-name": "t2", "description": "x".repeat(5000)}),
            json!({"type": "vhost", "id": "k", "node-name": "t2"}),
            export("k", "d", true),
            export("k", "d", false),
        ],
    }
}

fn images(command: &str) -> Vec<Json> {
    match command {
        "blockdev-create" => {
            let qcow2 = json!({"driver": "qcow2", "file": "t2-f", "size": 1 << 20});
            let file = json!({"driver": "file", "filename": "DIR/new.raw", "size": 1 << 20});
            let create = |options: Json| json!({"job-id": "k", "options": options});
            vec![
                create(with(&qcow2, json!({"cluster-size": 3}))),
                create(with(&qcow2, json!({"refcount-bits": 3}))),
                create(with(&qcow2, json!({"version": "v2", "lazy-refcounts": true}))),
                create(with(&qcow2, json!({"backing-file": "t2.qcow2", "backing-fmt": "qcow2"}))),
                create(with(&qcow2, json!({"size": 1u64 << 62}))),
                create(with(&qcow2, json!({"file": "nobody"}))),
                create(with(&qcow2, json!({"file": "top-f"}))),
                create(with(&qcow2, json!({"file": {"driver": "file", "filename": "DIR/none"}}))),
                create(with(&qcow2, json!({"file": {"driver": "file", "filename": "DIR/x.qcow2"}}))),
                create(file.clone()),
                create(with(&file, json!({"filename": "DIR/none/x"}))),
                create(with(&file, json!({"filename": "DIR/top.qcow2"}))),
                create(with(&file, json!({"filename": "DIR/x.qcow2"}))),
                create(json!({"driver": "raw", "file": "t2-f", "size": 1 << 20})),
                create(json!({"driver": "copy-on-read", "file": "t2-f"})),
                json!({"job-id": "j", "options": file}),
                json!({"job-id": "9", "options": file}),
            ]
        }
        "blockdev-snapshot-sync" => {
            let new =
                json!({"node-name": "top", "snapshot-file": "DIR/new.qcow2", "snapshot-node-name": "n"});
            ["mid", "base", "t2", "nobody", "top-f", "c", "rr", "d"]
                .iter()
                .map(|node| with(&new, json!({ "node-name": node })))
                .chain([
                    with(&new, json!({"format": "raw"})),
                    with(&new, json!({"format": "nobody"})),
                    with(&new, json!({"snapshot-node-name": "t1"})),
                    with(&new, json!({"snapshot-file": "DIR/none/x"})),
                    with(&new, json!({"snapshot-file": "DIR/x.qcow2"})),
                    with(&new, json!({"snapshot-file": "DIR/mid.qcow2"})),
                    with(&new, json!({"snapshot-file": "DIR/x.qcow2", "mode": "existing"})),
                    with(&new, json!({"snapshot-file": "DIR/f.qcow2", "mode": "existing"})),
                    with(&new, json!({"snapshot-file": "DIR/dirty.qcow2", "mode": "existing"})),
                    with(&new, json!({"snapshot-file": "DIR/none", "mode": "existing"})),
                    with(&new, json!({"device": "top"})),
                ])
                .collect()
        }
        _ => {
            let new = json!({"job-id": "k", "device": "top", "target": "DIR/new.qcow2", "format": "qcow2",
                "sync": "full", "speed": 1});
            ["top", "none"]
                .iter()
                .map(|sync| with(&new, json!({ "sync": sync })))
                .chain([
                    new.clone(),
                    with(&new, json!({"format": "raw"})),
                    with(&new, json!({"format": "nobody"})),
                    with(&new, json!({"device": "mid"})),
                    with(&new, json!({"device": "rr"})),
                    with(&new, json!({"device": "nobody"})),
                    with(&new, json!({"job-id": "j"})),
                    with(&new, json!({"target": "DIR/none/x"})),
                    with(&new, json!({"target": "DIR/x.qcow2"})),
                    with(&new, json!({"target": "DIR/t2.qcow2"})),
                    with(&new, json!({"target": "DIR/dirty.qcow2", "mode": "existing"})),
                    with(&new, json!({"target": "DIR/corrupt.qcow2", "mode": "existing"})),
                    with(&new, json!({"target": "DIR/none", "mode": "existing"})),
                ])
                .collect()
        }
    }
}

fn transactions() -> Vec<Json> {
    let snapshot = json!({"type": "blockdev-snapshot-sync", "data": {
        "node-name": "top", "snapshot-file": "DIR/new.qcow2", "snapshot-node-name": "n",
    }});
    let again = json!({"type": "blockdev-snapshot-sync", "data": {
        "node-name": "n", "snapshot-file": "DIR/newer.qcow2", "snapshot-node-name": "nn",
    }});
    let same = json!({"type": "blockdev-snapshot-sync", "data": {
        "node-name": "t2", "snapshot-file": "DIR/new.qcow2", "snapshot-node-name": "nn",
    }});
    let backup = json!({"type": "drive-backup", "data": {
        "job-id": "k", "device": "top", "target": "DIR/copy.qcow2", "format": "qcow2", "sync": "full", "speed": 1,
    }});
    let bad = json!({"type": "blockdev-backup", "data": {
        "job-id": "l", "device": "top", "target": "nobody", "sync": "full",
    }});
    let abort = json!({"type": "abort", "data": {}});
    let grouped = json!({"completion-mode": "grouped"});
    vec![
        json!({ "actions": [] }),
        json!({ "actions": [snapshot] }),
        json!({ "actions": [snapshot, again] }),
        json!({ "actions": [snapshot, same] }),
        json!({ "actions": [backup, snapshot] }),
        json!({"actions": [backup, snapshot], "properties": grouped}),
        json!({ "actions": [snapshot, backup] }),
        json!({ "actions": [backup, backup] }),
        json!({ "actions": [snapshot, abort] }),
        json!({ "actions": [backup, bad] }),
        json!({ "actions": [{"type": "nobody", "data": {}}] }),
    ]
}

fn jobs(command: &str) -> Vec<Json> {
    let with_target = |device: &str, target: &str, sync: &str| json!({"job-id": "k", "device": device, "target": target, "sync": sync, "speed": 1});
    match command {
        "blockdev-mirror" | "blockdev-backup" => vec![
            with_target("nobody", "t2", "full"),
            with_target("top", "nobody", "full"),
            with_target("top", "top", "full"),
            with_target("top", "t2", "top"),
            with_target("top", "t2", "none"),
            with_target("top", "ov", "top"),
            with_target("top", "d", "full"),
            json!({"job-id": "j", "device": "top", "target": "t2", "sync": "full", "speed": 1}),
            json!({"job-id": "t2", "device": "top", "target": "t2", "sync": "full", "speed": -1}),
        ],
        "blockdev-prefetch" => vec![
            json!({"job-id": "k", "node": "top", "speed": 1}),
            json!({"job-id": "k", "node": "mid", "speed": 1}),
            json!({"job-id": "k", "node": "nobody"}),
            json!({"job-id": "j", "node": "top"}),
        ],
        _ => vec![
            json!({"job-id": "k", "device": "nobody"}),
            json!({"job-id": "j", "device": "top", "speed": 1}),
            json!({"job-id": "9", "device": "top", "speed": 1}),
            json!({"job-id": "k", "device": "base", "speed": 1}),
            json!({"job-id": "k", "device": "rr", "speed": 1}),
            json!({"job-id": "k", "device": "d", "speed": 1}),
        ],
    }
}

fn nodes(command: &str) -> Vec<Json> {
    let qcow2 = |file: &str, read_only: bool| {
        json!({"driver": "qcow2", "node-name": "n", "read-only": read_only,
               "file": {"driver": "file", "filename": format!("DIR/{file}")}})
    };
    match command {
        "blockdev-add" => vec![
            qcow2("dirty.qcow2", false),
            qcow2("dirty.qcow2", true),
            qcow2("corrupt.qcow2", false),
            qcow2("corrupt.qcow2", true),
            qcow2("side.qcow2", false),
            qcow2("top.qcow2", false),
            qcow2("mid.qcow2", true),
            qcow2("none", false),
            qcow2("text", false),
            json!({"driver": "qcow2", "node-name": "top", "file": "t2-f"}),
            json!({"driver": "qcow2", "node-name": "n", "file": "t2-f"}),
            json!({"driver": "qcow2", "file": "t2-f"}),
            json!({"driver": "nobody", "node-name": "n"}),
            json!({"driver": "raw", "node-name": "n", "file": "t2", "offset": 1u64 << 40}),
            json!({"driver": "raw", "node-name": "n", "file": {"driver": "raw", "file": "nobody"}}),
            json!({"driver": "null-co", "node-name": "n"}),
            json!({"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": "DIR/none"}}),
            json!({"driver": "nbd", "node-name": "n", "export": "guest",
                   "server": {"type": "unix", "path": "DIR/nbd.sock"}}),
        ],
        "blockdev-del" => {
            ["nobody", "t1-f", "c", "r", "rr", "j", "d"].iter().map(|n| json!({ "node-name": n })).collect()
        }
        "blockdev-reopen" => {
            let of = |options: Json| json!({ "options": options });
            let d = |read_only: bool| {
                json!({"driver": "qcow2", "node-name": "d", "backing": Json::Null, "read-only": read_only,
                       "file": "d-f"})
            };
            let file = |read_only: bool| {
                json!({"driver": "file", "node-name": "d-f", "filename": "DIR/dirty.qcow2",
                       "read-only": read_only})
            };
            vec![
                of(json!([])),
                of(json!([{"driver": "qcow2", "node-name": "nobody", "file": "t1-f"}])),
                of(json!([{"driver": "raw", "node-name": "t1", "file": "t1-f"}])),
                of(json!([{"driver": "qcow2", "node-name": "t1", "file": "t2-f", "backing": Json::Null}])),
                of(json!([{"driver": "qcow2", "node-name": "t1", "file": "t1-f", "backing": "t1"}])),
                of(json!([{"driver": "file", "node-name": "t1-f", "filename": "DIR/x.qcow2"}])),
                of(json!([d(false)])),
                of(json!([d(false), file(false)])),
                of(json!([file(false), d(false)])),
                of(json!([d(true), file(true)])),
            ]
        }
        _ => {
            let mut out = vec![json!({"active": false}), json!({"active": true})];
            for node in ["top", "mid", "t1", "t1-f", "d", "nobody"] {
                out.push(json!({"node-name": node, "active": false}));
                out.push(json!({"node-name": node, "active": true}));
            }
            out
        }
    }
}

fn changes(command: &str) -> Option<Vec<Json>> {
    Some(match command {
        "block_resize" => vec![
            json!({"node-name": "t2", "size": 1000}),
            json!({"node-name": "t2", "size": 1u64 << 62}),
            json!({"node-name": "t2", "size": -1}),
            json!({"node-name": "t2", "size": 2 << 20}),
            json!({"node-name": "nobody", "size": 512}),
            json!({"node-name": "top-f", "size": 512}),
            json!({"node-name": "t2", "device": "t2", "size": 512}),
            json!({"node-name": "c", "size": 4 << 20}),
            json!({"node-name": "rr", "size": 4 << 20}),
            json!({"node-name": "s", "size": 4 << 20}),
            json!({"node-name": "d", "size": 4 << 20}),
            json!({"node-name": "n", "size": 4 << 20}),
            json!({"node-name": "window", "size": 1 << 20}),
            json!({"node-name": "fixed", "size": 1 << 20}),
        ],
        "change-backing-file" => {
            let of = |device: &str, image: &str, file: &str| json!({"device": device, "image-node-name": image, "backing-file": file});
            vec![
                of("top", "top", "top.qcow2"),
                of("top", "mid", "top.qcow2"),
                of("top", "top", ""),
                of("top", "top", &"x".repeat(2000)),
                of("top", "top", "none.qcow2"),
                of("top", "base", "x.qcow2"),
                of("top", "t1", "x.qcow2"),
                of("t1", "t1", "x.qcow2"),
                of("top", "nobody", "x.qcow2"),
                of("nobody", "top", "x.qcow2"),
                of("top", "top-f", "x.qcow2"),
                of("d", "d", "base.qcow2"),
            ]
        }
        "blockdev-snapshot" => [
            ("nobody", "ov"),
            ("top", "nobody"),
            ("top", "t1"),
            ("top", "t1-f"),
            ("top", "mid"),
            ("mid", "ov"),
            ("top", "top"),
            ("rr", "ov"),
            ("d", "ov"),
        ]
        .iter()
        .map(|(n, o)| json!({"node": n, "overlay": o}))
        .collect(),
        "operation-begin" => {
            let of = |id: &str, node: &str, needs: &str| json!({"id": id, "claims": [{"node-name": node, "needs": [needs]}]});
            vec![
                of("tool", "top", "consistent-read"),
                of("j", "top", "consistent-read"),
                of("k", "nobody", "consistent-read"),
                of("k", "top", "nothing"),
                json!({"id": "9", "claims": []}),
                json!({"id": "k", "claims": []}),
            ]
        }
        "operation-end" => ["tool", "j", "guest", "nobody"].iter().map(|id| json!({ "id": id })).collect(),
        "block-latency-histogram-set" => vec![
            json!({"id": "guest", "boundaries": [1000]}),
            json!({"id": "guest", "boundaries": [1000, 10]}),
            json!({"id": "nobody"}),
            json!({"id": "j"}),
        ],
        "block-set-write-threshold" => vec![
            json!({"node-name": "nobody", "write-threshold": 1}),
            json!({"node-name": "top", "write-threshold": -1}),
        ],
        _ => return None,
    })
}

fn step(command: &'static str, arguments: Json) -> Step {
    Step { command, arguments, effect: Effect::Nothing }
}

/// An object with other members, too.
fn with(base: &Json, more: Json) -> Json {
    let mut out = base.clone();
    for (k, v) in more.as_object().expect("an object") {
        out[k] = v.clone();
    }
    out
}

/// A job of `top` into `t1` that is still known when it has ended.
fn job(command: &'static str, more: Json) -> Step {
    let base = json!({"job-id": "j", "device": "top", "target": "t1", "sync": "full", "auto-dismiss": false});
    step(command, with(&base, more))
}

/// A node of the image that has to be repaired before it is written.
fn dirty(more: Json) -> Step {
    let base = json!({
        "driver": "qcow2", "node-name": "d",
        "file": {"driver": "file", "node-name": "d-f", "filename": "DIR/dirty.qcow2"},
    });
    step("blockdev-add", with(&base, more))
}

fn window(name: &str, more: Json) -> Step {
    let base = json!({"driver": "raw", "node-name": name, "file": "t2", "offset": 65536});
    step("blockdev-add", with(&base, more))
}

fn scene(name: &'static str, steps: Vec<Step>, until: Vec<(Option<Step>, &'static str)>) -> Scene {
    let state = State { name, steps, writes: &["t1"], guest: true, ready: false, apart: &[] };
    Scene { state, until }
}

/// The states of the pair table, and those in which job verbs, servers and images that have to be repaired make a
/// difference.
pub(crate) fn scenes() -> Vec<Scene> {
    let mut out: Vec<Scene> =
        steps::states().into_iter().map(|state| Scene { state, until: Vec::new() }).collect();
    let pause = step("job-pause", json!({"id": "j"}));
    let failing = json!({"driver": "qcow2", "file": "t2-f", "size": 1 << 20, "cluster-size": 3});
    let tool = json!([{"node-name": "mid", "needs": ["consistent-read"], "denies": ["write"]}]);
    out.extend([
        scene(
            "a paused mirror",
            vec![job("blockdev-mirror", json!({"speed": 1}))],
            vec![(Some(pause.clone()), "paused")],
        ),
        scene(
            "a mirror that is ready and paused",
            vec![job("blockdev-mirror", json!({}))],
            vec![(None, "ready"), (Some(pause), "standby")],
        ),
        scene(
            "a backup that waits to be finalized",
            vec![job("blockdev-backup", json!({"auto-finalize": false}))],
            vec![(None, "pending")],
        ),
        scene("a backup that has ended", vec![job("blockdev-backup", json!({}))], vec![(None, "concluded")]),
        scene(
            "a creation that has failed",
            vec![step("blockdev-create", json!({"job-id": "j", "options": failing}))],
            vec![(None, "concluded")],
        ),
        scene(
            "an operation of a tool",
            vec![step("operation-begin", json!({"id": "tool", "claims": tool}))],
            vec![],
        ),
        scene(
            "an export without clients",
            vec![step("block-export-add", export("idle", "t2", true))],
            vec![],
        ),
        scene(
            "a dirty image, read-only",
            vec![dirty(json!({"read-only": true, "backing": Json::Null}))],
            vec![],
        ),
        scene(
            "a dirty image over base, read-only",
            vec![dirty(json!({"read-only": true, "backing": "base"}))],
            vec![],
        ),
        scene(
            "a dirty image, inactive",
            vec![dirty(json!({"active": false, "backing": Json::Null}))],
            vec![],
        ),
        scene(
            "windows of an image",
            vec![window("window", json!({})), window("fixed", json!({"size": 65536}))],
            vec![],
        ),
    ]);
    let mut alone = scene("no server", vec![step("nbd-server-stop", json!({}))], vec![]);
    alone.state.guest = false;
    out.push(alone);
    out
}
