//! What runs, and what is tried while it runs.

use serde_json::{Value as Json, json};

use crate::model::SIZE;
use crate::world::{Disk, Effect, Work, export};

/// A command with arguments, and what it brings about.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) command: &'static str,
    pub(crate) arguments: Json,
    pub(crate) effect: Effect,
}

/// Something that runs.
pub(crate) struct State {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step>,
    /// Images that it writes to by itself.
    pub(crate) writes: &'static [&'static str],
    /// A client writes to `top` from the beginning.
    pub(crate) guest: bool,
    /// Its job has been let go until it was ready.
    pub(crate) ready: bool,
    /// Attempts whose names contain one of these mean something else here.
    pub(crate) apart: &'static [&'static str],
}

/// Something that is tried.
pub(crate) struct Attempt {
    pub(crate) name: &'static str,
    /// What has to be done first; it disturbs nobody.
    pub(crate) before: Vec<Step>,
    pub(crate) step: Step,
    /// A client at `top` would be in its way by itself.
    pub(crate) without_guest: bool,
}

/// What a command is to this test.
pub(crate) enum Part {
    /// It is tried, in these ways.
    Tried(Vec<Attempt>),
    /// It uses no node: it only reads, or it is about something else.
    Apart,
}

/// The export that a guest writes through.
pub(crate) const GUEST: &str = "guest";

fn step(command: &'static str, arguments: Json, effect: Effect) -> Step {
    Step { command, arguments, effect }
}

fn client(id: &'static str, node: &str, disk: Disk, writable: bool) -> Step {
    step("block-export-add", export(id, node, writable), Effect::Client { id, disk, writable })
}

/// The guest's own export.
pub(crate) fn guest() -> Step {
    client(GUEST, "top", Disk::Top, true)
}

/// A job that does a first piece and then waits to be let go.
fn job(id: &'static str, command: &'static str, mut arguments: Json, work: Work) -> Step {
    arguments["job-id"] = id.into();
    arguments["speed"] = 1.into();
    step(command, arguments, Effect::Job { id, work })
}

fn stream(id: &'static str, device: &str, bottom: Option<&str>) -> Step {
    let mut arguments = json!({ "device": device });
    if let Some(b) = bottom {
        arguments["bottom"] = b.into();
    }
    job(id, "block-stream", arguments, Work::Unseen)
}

fn commit(id: &'static str, top: &'static str, base: &'static str) -> Step {
    let disk = |n| match n {
        "top" => Disk::Top,
        "mid" => Disk::Mid,
        _ => Disk::Base,
    };
    let mut arguments = json!({ "device": "top", "base-node": base });
    if top != "top" {
        arguments["top-node"] = top.into();
    }
    let between = (top == "top" && base == "base").then_some(Disk::Mid);
    let work = Work::Follow { from: disk(top), to: disk(base), node: base, between };
    job(id, "block-commit", arguments, work)
}

fn mirror(id: &'static str, from: &str, node: &'static str, mode: &str) -> Step {
    let disk = if from == "mid" { Disk::Mid } else { Disk::Top };
    let to = if node == "t1" { Disk::T1 } else { Disk::T2 };
    let arguments = json!({"device": from, "target": node, "sync": "full", "copy-mode": mode});
    job(id, "blockdev-mirror", arguments, Work::Follow { from: disk, to, node, between: None })
}

fn backup(id: &'static str, from: &str, node: &'static str) -> Step {
    let disk = if from == "mid" { Disk::Mid } else { Disk::Top };
    let to = if node == "t1" { Disk::T1 } else { Disk::T2 };
    let arguments = json!({"device": from, "target": node, "sync": "full"});
    job(id, "blockdev-backup", arguments, Work::Keep { from: disk, to, node })
}

/// The fleecing target: an overlay of what is backed up.
fn fleecing_target() -> Step {
    let arguments = json!({
        "driver": "qcow2", "node-name": "f", "backing": "top",
        "file": {"driver": "file", "node-name": "f-f", "filename": "DIR/f.qcow2"},
    });
    step("blockdev-add", arguments, Effect::Nothing)
}

fn fleece(id: &'static str) -> Step {
    let arguments = json!({"device": "top", "target": "f", "sync": "none"});
    job(id, "blockdev-backup", arguments, Work::Show { from: Disk::Top, to: Disk::F, node: "f" })
}

fn add(arguments: Json) -> Step {
    step("blockdev-add", arguments, Effect::Nothing)
}

fn copy_on_read(name: &str, bottom: Option<&str>) -> Step {
    let mut arguments = json!({"driver": "copy-on-read", "node-name": name, "file": "top"});
    if let Some(b) = bottom {
        arguments["bottom"] = b.into();
    }
    add(arguments)
}

/// `raw` over `top`, and `blkdebug` over that: neither copies anything.
fn filters() -> [Step; 2] {
    [
        add(json!({"driver": "raw", "node-name": "r", "file": "top"})),
        add(json!({"driver": "blkdebug", "node-name": "rr", "image": "r"})),
    ]
}

/// A job on two filters over `top`, with a client that writes through them.
fn filtered(name: &'static str, job: Step, writes: &'static [&'static str]) -> State {
    let [inner, outer] = filters();
    // The job ends with the guest on another node: `top` is not the disk any more.
    let apart: &[&str] = match job.command {
        "blockdev-mirror" => &["export of top, read-only", "mirror of top to t2", "drive-mirror of top"],
        _ => &[],
    };
    let steps = vec![inner, outer, client(GUEST, "rr", Disk::Top, true), job];
    State { name, steps, writes, guest: false, ready: false, apart }
}

/// The overlay of `base` beside the chain.
fn side() -> Step {
    add(json!({
        "driver": "qcow2", "node-name": "side", "backing": "base",
        "file": {"driver": "file", "node-name": "side-f", "filename": "DIR/side.qcow2"},
    }))
}

fn copy_before_write(name: &str, target: &str) -> Step {
    add(json!({"driver": "copy-before-write", "node-name": name, "file": "top", "target": target}))
}

/// Everything that runs.
pub(crate) fn states() -> Vec<State> {
    let running = |name, steps, writes| State { name, steps, writes, guest: true, ready: false, apart: &[] };
    let alone = |name, steps| State { name, steps, writes: &[], guest: false, ready: false, apart: &[] };
    vec![
        alone("nothing", vec![]),
        alone("export of top, writable", vec![client("e", "top", Disk::Top, true)]),
        alone("export of top, read-only", vec![client("e", "top", Disk::Top, false)]),
        alone("export of mid, writable", vec![client("e", "mid", Disk::Mid, true)]),
        alone("export of mid, read-only", vec![client("e", "mid", Disk::Mid, false)]),
        alone("export of base, writable", vec![client("e", "base", Disk::Base, true)]),
        alone("export of base, read-only", vec![client("e", "base", Disk::Base, false)]),
        alone("export of a sibling over base, writable", vec![side(), client("e", "side", Disk::Side, true)]),
        alone("a sibling over base that nobody reads", vec![side()]),
        State {
            writes: &["top"],
            ..alone("copy-on-read over top", vec![copy_on_read("c", None), client("e", "c", Disk::Top, true)])
        },
        State {
            writes: &["top"],
            ..alone(
                "copy-on-read over top, bottom mid",
                vec![copy_on_read("c", Some("mid")), client("e", "c", Disk::Top, true)],
            )
        },
        State {
            writes: &["t1"],
            ..alone(
                "copy-before-write over top",
                vec![
                    Step {
                        effect: Effect::Shown { from: Disk::Top, to: Disk::F, through: Disk::T1 },
                        ..copy_before_write("c", "t1")
                    },
                    client("e", "c", Disk::Top, true),
                    add(json!({"driver": "snapshot-access", "node-name": "s", "file": "c"})),
                    client("es", "s", Disk::F, false),
                ],
            )
        },
        running("stream of top", vec![stream("j", "top", None)], &["top"]),
        running("stream of top, bottom mid", vec![stream("j", "top", Some("mid"))], &["top"]),
        running("stream of mid", vec![stream("j", "mid", None)], &["mid"]),
        running("commit of mid", vec![commit("j", "mid", "base")], &["base"]),
        running("active commit of top to mid", vec![commit("j", "top", "mid")], &["mid"]),
        running("active commit of top to base", vec![commit("j", "top", "base")], &["base"]),
        running("mirror, background", vec![mirror("j", "top", "t1", "background")], &["t1"]),
        running("mirror, write-blocking", vec![mirror("j", "top", "t1", "write-blocking")], &["t1"]),
        State {
            ready: true,
            ..running("mirror, ready", vec![mirror("j", "top", "t1", "background")], &["t1"])
        },
        State {
            ready: true,
            ..running("active commit of top to base, ready", vec![commit("j", "top", "base")], &["base"])
        },
        running("backup, full", vec![backup("j", "top", "t1")], &["t1"]),
        running("backup, none (fleecing)", vec![fleecing_target(), fleece("j")], &["f"]),
        filtered("mirror of filters over top", mirror("j", "rr", "t1", "background"), &["top", "t1"]),
        filtered("backup of filters over top", backup("j", "rr", "t1"), &["top", "t1"]),
        filtered(
            "active commit of filters over top",
            Step {
                arguments: json!({"device": "rr", "base-node": "base", "job-id": "j", "speed": 1}),
                ..commit("j", "top", "base")
            },
            &["top", "base"],
        ),
        filtered("stream of filters over top", stream("j", "rr", None), &["top"]),
    ]
}

fn attempt(name: &'static str, step: Step) -> Attempt {
    Attempt { name, before: Vec::new(), step, without_guest: false }
}

/// The same, but a client at `top` has to wait until it is done.
fn alone(name: &'static str, step: Step) -> Attempt {
    Attempt { without_guest: true, ..attempt(name, step) }
}

fn reopen(options: Json, effect: Effect) -> Step {
    step("blockdev-reopen", json!({ "options": [options] }), effect)
}

fn operation(node: &str, needs: &str) -> Step {
    let claims = json!([{"node-name": node, "needs": [needs]}]);
    step("operation-begin", json!({"id": "k", "claims": claims}), Effect::Nothing)
}

/// The options that a node of the chain was opened with.
fn options(name: &str, backing: Json) -> Json {
    json!({"driver": "qcow2", "node-name": name, "file": format!("{name}-f"), "backing": backing})
}

fn with(mut options: Json, name: &str, value: Json) -> Json {
    options[name] = value;
    options
}

/// What every command is to this test; `None` for one that nobody has thought about.
pub(crate) fn part(command: &str) -> Option<Part> {
    let tried = |attempts: Vec<Attempt>| Some(Part::Tried(attempts));
    let apart = Some(Part::Apart);
    match command {
        "block-export-add" => tried(vec![
            attempt("export of top, writable", client("k", "top", Disk::Top, true)),
            attempt("export of top, read-only", client("k", "top", Disk::Top, false)),
            attempt("export of mid, writable", client("k", "mid", Disk::Mid, true)),
            attempt("export of mid, read-only", client("k", "mid", Disk::Mid, false)),
            attempt("export of base, writable", client("k", "base", Disk::Base, true)),
            attempt("export of base, read-only", client("k", "base", Disk::Base, false)),
            attempt("export of t1, writable", client("k", "t1", Disk::T1, true)),
            attempt("export of t1, read-only", client("k", "t1", Disk::T1, false)),
            attempt(
                "export of the file of top, writable",
                step("block-export-add", export("k", "top-f", true), Effect::Scribble { id: "k" }),
            ),
        ]),
        "blockdev-add" => tried(vec![
            attempt("add copy-on-read over top", copy_on_read("n", None)),
            attempt("add raw over top", add(json!({"driver": "raw", "node-name": "n", "file": "top"}))),
            attempt("add raw over mid", add(json!({"driver": "raw", "node-name": "n", "file": "mid"}))),
            attempt("add copy-before-write over top", copy_before_write("n", "t2")),
            attempt(
                "add an overlay of mid",
                add(json!({
                    "driver": "qcow2", "node-name": "n", "backing": "mid",
                    "file": {"driver": "file", "filename": "DIR/x.qcow2"},
                })),
            ),
        ]),
        "blockdev-del" => tried(vec![
            alone("delete top", step("blockdev-del", json!({"node-name": "top"}), Effect::Nothing)),
            attempt("delete mid", step("blockdev-del", json!({"node-name": "mid"}), Effect::Nothing)),
            attempt("delete t1", step("blockdev-del", json!({"node-name": "t1"}), Effect::Nothing)),
        ]),
        // They end or begin what clients are connected to, and use no node.
        "block-export-del" | "nbd-server-start" | "nbd-server-stop" | "quit" => apart,
        // It looks at what an export is asked for, and uses no node.
        "block-latency-histogram-set" => apart,
        // About the connection.
        "qmp_capabilities" => apart,
        // These only read.
        "x-debug-query-block-graph" | "what-if" => apart,
        _ if command.starts_with("query-") => apart,
        // About a job that runs already.
        "job-cancel" | "job-complete" | "job-dismiss" | "job-finalize" | "job-pause" | "job-resume" => apart,
        _ if command.starts_with("block-job-") => apart,
        "block-stream" => tried(vec![
            attempt("stream of top", stream("k", "top", None)),
            attempt("stream of top, bottom mid", stream("k", "top", Some("mid"))),
            attempt("stream of mid", stream("k", "mid", None)),
        ]),
        "block-commit" => tried(vec![
            attempt("commit of mid", commit("k", "mid", "base")),
            attempt("active commit of top to mid", commit("k", "top", "mid")),
            attempt("active commit of top to base", commit("k", "top", "base")),
        ]),
        // The same job as blockdev-mirror and blockdev-backup, with a target that they open.
        "drive-mirror" => tried(vec![attempt(
            "drive-mirror of top",
            Step {
                command: "drive-mirror",
                arguments: json!({
                    "job-id": "k", "speed": 1, "device": "top", "target": "DIR/x.qcow2", "format": "qcow2",
                    "sync": "full", "mode": "existing", "node-name": "n",
                }),
                effect: Effect::Job {
                    id: "k",
                    work: Work::Follow { from: Disk::Top, to: Disk::T2, node: "n", between: None },
                },
            },
        )]),
        "drive-backup" => tried(vec![attempt(
            "drive-backup of top",
            Step {
                command: "drive-backup",
                arguments: json!({
                    "job-id": "k", "speed": 1, "device": "top", "target": "DIR/x.qcow2", "format": "qcow2",
                    "sync": "full", "mode": "existing",
                }),
                effect: Effect::Job {
                    id: "k",
                    work: Work::Keep { from: Disk::Top, to: Disk::T2, node: "x" },
                },
            },
        )]),
        "blockdev-create" => tried(vec![attempt(
            "create an image in the file of t1",
            step(
                "blockdev-create",
                json!({"job-id": "k", "options": {"driver": "qcow2", "file": "t1-f", "size": 1 << 20}}),
                Effect::Nothing,
            ),
        )]),
        "blockdev-prefetch" => tried(vec![attempt(
            "prefetch of top",
            job("k", "blockdev-prefetch", json!({"node": "top"}), Work::Unseen),
        )]),
        "blockdev-snapshot-sync" => tried(vec![attempt(
            "snapshot-sync of top",
            step(
                "blockdev-snapshot-sync",
                json!({
                    "node-name": "top", "snapshot-file": "DIR/new.qcow2", "snapshot-node-name": "n",
                    "format": "qcow2",
                }),
                Effect::Frozen { image: "top", disk: Disk::Top },
            ),
        )]),
        "blockdev-set-active" => tried(vec![
            alone(
                "deactivate top",
                step("blockdev-set-active", json!({"node-name": "top", "active": false}), Effect::Nothing),
            ),
            attempt(
                "deactivate t1",
                step("blockdev-set-active", json!({"node-name": "t1", "active": false}), Effect::Nothing),
            ),
        ]),
        // A transaction is the sum of its actions.
        "transaction" => tried(vec![attempt(
            "transaction: backup of top to t2, snapshot of top",
            Step {
                command: "transaction",
                arguments: json!({"actions": [
                    {"type": "blockdev-backup", "data": {
                        "job-id": "k", "device": "top", "target": "t2", "sync": "full", "speed": 1,
                    }},
                    {"type": "blockdev-snapshot", "data": {"node": "top", "overlay": "ov"}},
                ]}),
                effect: Effect::JobAndOverlay {
                    id: "k",
                    work: Work::Keep { from: Disk::Top, to: Disk::T2, node: "t2" },
                },
            },
        )]),
        // An operation of somebody else's, which allows and needs what it says.
        "operation-begin" => tried(vec![
            attempt("an operation that reads top", operation("top", "consistent-read")),
            attempt("an operation that writes mid", operation("mid", "write")),
        ]),
        "operation-end" => apart,
        "blockdev-mirror" => tried(vec![
            attempt("mirror of top to t2", mirror("k", "top", "t2", "background")),
            attempt("mirror of top to t2, write-blocking", mirror("k", "top", "t2", "write-blocking")),
            attempt("mirror of mid to t2", mirror("k", "mid", "t2", "background")),
            attempt("mirror of top to t1", mirror("k", "top", "t1", "background")),
            Attempt {
                before: vec![add(json!({"driver": "raw", "node-name": "k-raw", "file": "top"}))],
                ..attempt("mirror of raw over top to t2", mirror("k", "k-raw", "t2", "background"))
            },
        ]),
        "blockdev-backup" => tried(vec![
            attempt("backup of top to t2", backup("k", "top", "t2")),
            attempt("backup of mid to t2", backup("k", "mid", "t2")),
            attempt("backup of top to t1", backup("k", "top", "t1")),
            Attempt {
                before: vec![add(json!({"driver": "raw", "node-name": "k-raw", "file": "top"}))],
                ..attempt("backup of raw over top to t2", backup("k", "k-raw", "t2"))
            },
        ]),
        "blockdev-snapshot" => tried(vec![attempt(
            "snapshot of top",
            step(
                "blockdev-snapshot",
                json!({"node": "top", "overlay": "ov"}),
                Effect::Frozen { image: "top", disk: Disk::Top },
            ),
        )]),
        "change-backing-file" => tried(vec![
            attempt(
                "change-backing-file of top",
                step(
                    "change-backing-file",
                    json!({"device": "top", "image-node-name": "top", "backing-file": "mid.qcow2"}),
                    Effect::Nothing,
                ),
            ),
            attempt(
                "change-backing-file of mid",
                step(
                    "change-backing-file",
                    json!({"device": "top", "image-node-name": "mid", "backing-file": "base.qcow2"}),
                    Effect::Nothing,
                ),
            ),
        ]),
        "block_resize" => {
            let resize = |name, node: &str, size: usize, effect| {
                alone(name, step("block_resize", json!({"node-name": node, "size": size}), effect))
            };
            let (more, less) = (SIZE + crate::world::GROWTH, SIZE / 4);
            tried(vec![
                resize("grow top", "top", more, Effect::Grown(Disk::Top)),
                resize("grow mid", "mid", more, Effect::Grown(Disk::Mid)),
                resize("grow base", "base", more, Effect::Grown(Disk::Base)),
                resize("shrink top", "top", less, Effect::Shrunk),
                resize("shrink mid", "mid", less, Effect::Nothing),
                resize("shrink base", "base", less, Effect::Nothing),
                Attempt {
                    before: vec![add(json!({"driver": "raw", "node-name": "k-raw", "file": "base"}))],
                    ..resize("shrink raw over base", "k-raw", less, Effect::Nothing)
                },
            ])
        }
        "blockdev-reopen" => tried(vec![
            attempt("reopen top on base", reopen(options("top", json!("base")), Effect::TopOverBase)),
            attempt(
                "reopen top with lazy refcounts",
                reopen(with(options("top", json!("mid")), "lazy-refcounts", true.into()), Effect::Nothing),
            ),
            alone(
                "reopen top read-only",
                reopen(with(options("top", json!("mid")), "read-only", true.into()), Effect::Nothing),
            ),
            attempt(
                "reopen base read-only",
                reopen(with(options("base", Json::Null), "read-only", true.into()), Effect::Nothing),
            ),
        ]),
        "block-set-write-threshold" => tried(vec![attempt(
            "write threshold of the file of top",
            step(
                "block-set-write-threshold",
                json!({"node-name": "top-f", "write-threshold": 1 << 30}),
                Effect::Nothing,
            ),
        )]),
        _ => None,
    }
}
