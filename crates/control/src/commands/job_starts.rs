//! The commands that start a job.

use dolmen_qmp::schema::{Field, Shape, Ty};

use crate::job_args::{self, COPY_MODE, ON_ERROR, PERF, SYNC};
use crate::row::CommandRow;

const fn start(name: &'static str, arguments: &'static Shape, help: &'static str) -> CommandRow {
    CommandRow::edit(name, Ty::Object(arguments), |cx, o| Ok(Box::new(job_args::read(cx.name, o)?)), help)
}

static COMMIT: Shape = Shape::of(&[
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
]);

static MIRROR: Shape = Shape::of(&[
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
]);

static STREAM: Shape = Shape::of(&[
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
]);

static CREATE: Shape =
    Shape::of(&[Field::required("job-id", Ty::Str), Field::required("options", Ty::BlockdevCreateOptions)]);

static PREFETCH: Shape = Shape::of(&[
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
]);

/// The arguments of `blockdev-backup`. `on-cbw-error` and `fleecing` are our own.
static BACKUP: Shape = Shape::of(&[
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
    Field::optional("x-perf", Ty::Object(&PERF)),
]);

pub(crate) const ROWS: &[CommandRow] = &[
    start(
        "block-commit",
        &COMMIT,
        "Copies what nodes hold into a backing file of theirs and takes them out of the chain.",
    ),
    start(
        "blockdev-mirror",
        &MIRROR,
        "Copies a node and what is written to it meanwhile; the copy may take its place.",
    ),
    start(
        "block-stream",
        &STREAM,
        "Copies what backing files hold into a node and takes them out of its chain.",
    ),
    start("blockdev-create", &CREATE, "Makes an image; the job has to be dismissed."),
    start(
        "blockdev-prefetch",
        &PREFETCH,
        "Fills ranges of a node (default: all of it) from its backing files.",
    ),
    start("blockdev-backup", &BACKUP, "Copies a node as it is now while its guest goes on writing.")
        .in_transactions(),
];
