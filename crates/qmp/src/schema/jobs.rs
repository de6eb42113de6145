//! The rows of jobs: their commands and events.

use super::{Command, EMPTY, EventRow, Field, Shape, Ty};
use crate::model;

const NOTHING: Ty = Ty::Object(&EMPTY);

/// The kinds of jobs; clients look for those of the established daemon, so all of them are here.
pub(crate) const TYPES: &[&str] = &[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
    "prefetch",
];

/// The states of a job.
pub(crate) const STATUS: &[&str] = &[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
];

const ON_ERROR: Ty = Ty::Enum(&["report", "ignore", "enospc", "stop", "auto"]);

const COPY_MODE: Ty = Ty::Enum(&["background", "write-blocking"]);

/// Those of all jobs that copy a node; not every job has every mode.
const SYNC: Ty = Ty::Enum(&["top", "full", "none", "incremental", "bitmap"]);

const BY_ID: Ty = Ty::Object(&super::commands::ID);
static DEVICE: Shape = Shape::of(&[Field::required("device", Ty::Str)]);
const BY_DEVICE: Ty = Ty::Object(&DEVICE);

const fn verb(name: &'static str, arguments: Ty, help: &'static str) -> Command {
    Command { name, arguments, returns: NOTHING, features: &[], help }
}

/// Every command about jobs.
pub static COMMANDS: &[Command] = &[
    Command {
        name: "query-jobs",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&model::JOB_INFO)),
        features: &[],
        help: "Every job, with its state and progress.",
    },
    Command {
        name: "query-block-jobs",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&model::BLOCK_JOB_INFO)),
        features: &[],
        help: "Every job that works on nodes, in detail.",
    },
    verb("job-pause", BY_ID, "Stops a job for now; what is in flight finishes."),
    verb("job-resume", BY_ID, "Lets a paused job go on."),
    verb("job-cancel", BY_ID, "Ends a job without a result."),
    verb("job-complete", BY_ID, "Ends a ready job with its result."),
    verb("job-finalize", BY_ID, "Makes the result of a pending job visible."),
    verb("job-dismiss", BY_ID, "Forgets a job that has ended."),
    verb("block-job-pause", BY_DEVICE, "The same as job-pause."),
    verb("block-job-resume", BY_DEVICE, "The same as job-resume."),
    verb(
        "block-job-cancel",
        Ty::Object(&Shape::of(&[Field::required("device", Ty::Str), Field::optional("force", Ty::Bool)])),
        "Ends a job; a ready one that is not forced keeps what it has copied.",
    ),
    verb("block-job-complete", BY_DEVICE, "The same as job-complete."),
    verb("block-job-finalize", BY_ID, "The same as job-finalize."),
    verb("block-job-dismiss", BY_ID, "The same as job-dismiss."),
    verb(
        "block-job-set-speed",
        Ty::Object(&Shape::of(&[Field::required("device", Ty::Str), Field::required("speed", Ty::Int)])),
        "Limits the speed of a job, in bytes per second; 0 for no limit.",
    ),
    verb(
        "block-job-change",
        Ty::Object(&Shape {
            fields: &[Field::required("id", Ty::Str), Field::required("type", Ty::Enum(TYPES))],
            tag: Some("type"),
            variants: &[
                ("mirror", &Shape::of(&[Field::required("copy-mode", COPY_MODE)])),
                ("commit", &EMPTY),
                ("stream", &EMPTY),
                ("backup", &EMPTY),
                ("create", &EMPTY),
                ("amend", &EMPTY),
                ("snapshot-load", &EMPTY),
                ("snapshot-save", &EMPTY),
                ("snapshot-delete", &EMPTY),
                ("prefetch", &EMPTY),
            ],
        }),
        "Changes options of a job while it runs.",
    ),
    verb(
        "block-commit",
        Ty::Object(&Shape::of(&[
            Field::optional("job-id", Ty::Str),
            Field::required("device", Ty::Str),
            Field::optional("base-node", Ty::Str),
            Field::optional("base", Ty::Str),
            Field::optional("top-node", Ty::Str),
            Field::optional("top", Ty::Str),
            Field::optional("backing-file", Ty::Str),
            Field::optional("backing-mask-protocol", Ty::Bool),
            Field::optional("speed", Ty::Int),
            Field::optional("on-error", ON_ERROR),
            Field::optional("filter-node-name", Ty::Str),
            Field::optional("auto-converge", Ty::Bool),
            Field::optional("auto-finalize", Ty::Bool),
            Field::optional("auto-dismiss", Ty::Bool),
        ])),
        "Copies what nodes hold into a backing file of theirs and takes them out of the chain.",
    ),
    verb(
        "blockdev-mirror",
        Ty::Object(&Shape::of(&[
            Field::optional("job-id", Ty::Str),
            Field::required("device", Ty::Str),
            Field::required("target", Ty::Str),
            Field::optional("replaces", Ty::Str),
            Field::required("sync", SYNC),
            Field::optional("speed", Ty::Int),
            Field::optional("granularity", Ty::Int),
            Field::optional("buf-size", Ty::Int),
            Field::optional("on-source-error", ON_ERROR),
            Field::optional("on-target-error", ON_ERROR),
            Field::optional("filter-node-name", Ty::Str),
            Field::optional("copy-mode", COPY_MODE),
            Field::optional("auto-converge", Ty::Bool),
            Field::optional("auto-finalize", Ty::Bool),
            Field::optional("auto-dismiss", Ty::Bool),
        ])),
        "Copies a node and what is written to it meanwhile; the copy may take its place.",
    ),
    verb(
        "drive-mirror",
        Ty::Object(&Shape::of(&[
            Field::optional("job-id", Ty::Str),
            Field::required("device", Ty::Str),
            Field::required("target", Ty::Str),
            Field::optional("format", Ty::Str),
            Field::optional("node-name", Ty::Str),
            Field::optional("replaces", Ty::Str),
            Field::required("sync", SYNC),
            Field::optional("mode", Ty::Enum(&["existing", "absolute-paths"])),
            Field::optional("speed", Ty::Int),
            Field::optional("granularity", Ty::Int),
            Field::optional("buf-size", Ty::Int),
            Field::optional("on-source-error", ON_ERROR),
            Field::optional("on-target-error", ON_ERROR),
            Field::optional("unmap", Ty::Bool),
            Field::optional("copy-mode", COPY_MODE),
            Field::optional("auto-finalize", Ty::Bool),
            Field::optional("auto-dismiss", Ty::Bool),
        ])),
        "The same with a file as the target, which is made first.",
    ),
    verb(
        "block-stream",
        Ty::Object(&Shape::of(&[
            Field::optional("job-id", Ty::Str),
            Field::required("device", Ty::Str),
            Field::optional("base", Ty::Str),
            Field::optional("base-node", Ty::Str),
            Field::optional("backing-file", Ty::Str),
            Field::optional("backing-mask-protocol", Ty::Bool),
            Field::optional("bottom", Ty::Str),
            Field::optional("speed", Ty::Int),
            Field::optional("on-error", ON_ERROR),
            Field::optional("filter-node-name", Ty::Str),
            Field::optional("auto-finalize", Ty::Bool),
            Field::optional("auto-dismiss", Ty::Bool),
        ])),
        "Copies what backing files hold into a node and takes them out of its chain.",
    ),
    verb(
        "blockdev-backup",
        Ty::Object(&BACKUP),
        "Copies a node as it is now while its guest goes on writing.",
    ),
    Command {
        name: "drive-backup",
        arguments: Ty::Object(&DRIVE_BACKUP),
        returns: NOTHING,
        features: &["deprecated"],
        help: "The same as blockdev-backup, to a file that is made if it is not there.",
    },
    verb(
        "blockdev-create",
        Ty::Object(&Shape::of(&[
            Field::required("job-id", Ty::Str),
            Field::required("options", Ty::BlockdevCreateOptions),
        ])),
        "Makes an image; the job has to be dismissed.",
    ),
    verb(
        "blockdev-prefetch",
        Ty::Object(&Shape::of(&[
            Field::optional("job-id", Ty::Str),
            Field::required("node", Ty::Str),
            Field::optional(
                "ranges",
                Ty::Array(&Ty::Object(&Shape::of(&[
                    Field::required("offset", Ty::Int),
                    Field::required("length", Ty::Int),
                ]))),
            ),
            Field::optional("priority", Ty::Enum(&["low", "normal", "high"])),
            Field::optional("speed", Ty::Int),
            Field::optional("on-error", ON_ERROR),
            Field::optional("auto-finalize", Ty::Bool),
            Field::optional("auto-dismiss", Ty::Bool),
        ])),
        "Fills ranges of a node (default: all of it) from its backing files.",
    ),
];

const PREALLOCATION: Ty = Ty::Enum(&["off", "metadata", "falloc", "full"]);

/// What images can be made of, by driver.
pub(crate) static CREATE: &[(&str, &Shape)] = &[
    (
        "file",
        &Shape::of(&[
            Field::required("filename", Ty::Str),
            Field::required("size", Ty::Size),
            Field::optional("preallocation", PREALLOCATION),
        ]),
    ),
    (
        "qcow2",
        &Shape::of(&[
            Field::required("file", Ty::NodeRef),
            Field::optional("data-file-raw", Ty::Bool),
            Field::optional("extended-l2", Ty::Bool),
            Field::required("size", Ty::Size),
            Field::optional("version", Ty::Enum(&["v2", "v3"])),
            Field::optional("backing-file", Ty::Str),
            Field::optional("backing-fmt", Ty::DriverName),
            Field::optional("cluster-size", Ty::Size),
            Field::optional("preallocation", PREALLOCATION),
            Field::optional("lazy-refcounts", Ty::Bool),
            Field::optional("refcount-bits", Ty::Int),
            Field::optional("compression-type", Ty::Enum(&["zlib", "zstd"])),
        ]),
    ),
];

/// The arguments of `blockdev-backup`. `on-cbw-error` and `fleecing` are our own.
pub(crate) static BACKUP: Shape = Shape::of(&[
    Field::optional("job-id", Ty::Str),
    Field::required("device", Ty::Str),
    Field::required("target", Ty::Str),
    Field::required("sync", Ty::Enum(&["top", "full", "none", "incremental", "bitmap"])),
    Field::optional("speed", Ty::Int),
    Field::optional("bitmap", Ty::Str),
    Field::optional("bitmap-mode", Ty::Enum(&["on-success", "never", "always"])),
    Field::optional("compress", Ty::Bool),
    Field::optional("on-source-error", ON_ERROR),
    Field::optional("on-target-error", ON_ERROR),
    Field::optional("on-cbw-error", Ty::Enum(&["break-guest-write", "break-snapshot"])),
    Field::optional("auto-finalize", Ty::Bool),
    Field::optional("auto-dismiss", Ty::Bool),
    Field::optional("filter-node-name", Ty::Str),
    Field::optional("discard-source", Ty::Bool),
    Field::optional("fleecing", Ty::Str),
    Field::optional(
        "x-perf",
        Ty::Object(&Shape::of(&[
            Field::optional("use-copy-range", Ty::Bool),
            Field::optional("max-workers", Ty::Int),
            Field::optional("max-chunk", Ty::Int),
            Field::optional("min-cluster-size", Ty::Int),
        ])),
    ),
]);

/// The arguments of `drive-backup`, whose target is a file name.
pub(crate) static DRIVE_BACKUP: Shape = Shape::of(&[
    Field::optional("job-id", Ty::Str),
    Field::required("device", Ty::Str),
    Field::required("target", Ty::Str),
    Field::required("sync", Ty::Enum(&["top", "full", "none", "incremental", "bitmap"])),
    Field::optional("speed", Ty::Int),
    Field::optional("bitmap", Ty::Str),
    Field::optional("bitmap-mode", Ty::Enum(&["on-success", "never", "always"])),
    Field::optional("compress", Ty::Bool),
    Field::optional("on-source-error", ON_ERROR),
    Field::optional("on-target-error", ON_ERROR),
    Field::optional("auto-finalize", Ty::Bool),
    Field::optional("auto-dismiss", Ty::Bool),
    Field::optional("filter-node-name", Ty::Str),
    Field::optional("discard-source", Ty::Bool),
    Field::optional(
        "x-perf",
        Ty::Object(&Shape::of(&[
            Field::optional("use-copy-range", Ty::Bool),
            Field::optional("max-workers", Ty::Int),
            Field::optional("max-chunk", Ty::Int),
            Field::optional("min-cluster-size", Ty::Int),
        ])),
    ),
    Field::optional("format", Ty::Str),
    Field::optional("mode", Ty::Enum(&["existing", "absolute-paths"])),
]);

/// What most events of block jobs carry.
const ABOUT: [Field; 5] = [
    Field::required("type", Ty::Enum(TYPES)),
    Field::required("device", Ty::Str),
    Field::required("len", Ty::Int),
    Field::required("offset", Ty::Int),
    Field::required("speed", Ty::Int),
];

static ENDED: Shape = Shape::of(&ABOUT);

/// Every event of jobs.
pub static EVENTS: &[EventRow] = &[
    EventRow {
        name: "JOB_STATUS_CHANGE",
        data: &Shape::of(&[Field::required("id", Ty::Str), Field::required("status", Ty::Enum(STATUS))]),
        help: "A job has come to another state.",
    },
    EventRow { name: "BLOCK_JOB_READY", data: &ENDED, help: "A job can be completed from now on." },
    EventRow {
        name: "BLOCK_JOB_PENDING",
        data: &Shape::of(&[Field::required("type", Ty::Enum(TYPES)), Field::required("id", Ty::Str)]),
        help: "A job waits for job-finalize.",
    },
    EventRow {
        name: "BLOCK_JOB_COMPLETED",
        data: &Shape::of(&[
            ABOUT[0],
            ABOUT[1],
            ABOUT[2],
            ABOUT[3],
            ABOUT[4],
            Field::optional("error", Ty::Str),
        ]),
        help: "A job has ended; with its error if it failed.",
    },
    EventRow { name: "BLOCK_JOB_CANCELLED", data: &ENDED, help: "A job was cancelled." },
    EventRow {
        name: "BLOCK_JOB_ERROR",
        data: &Shape::of(&[
            Field::required("device", Ty::Str),
            Field::required("operation", Ty::Enum(&["read", "write"])),
            Field::required("action", Ty::Enum(&["ignore", "report", "stop"])),
        ]),
        help: "A request of a job failed; what the job does about it.",
    },
];
