//! `drive-mirror` and `drive-backup`: jobs whose target is a file, which is made first unless it exists.
//!
//! The image is a stand-in as long as the change is a proposal ([`NodeOpener::open_new`]), so such a command is proposed,
//! refused, put into a transaction and asked about with `what-if` like any other, and touches no file
//! meanwhile. Publishing the draft makes the files.

use dolmen_graph::{Draft, NewImage, NodeOpener};
use dolmen_qmp::QmpError;
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_rt::LocalFuture;
use dolmen_types::{NodeName, Options, Result, Value};

use crate::act::{Edit, Proposal};
use crate::drafting::{find, invalid, made_over, text};
use crate::job_args::{self, COPY_MODE, ON_ERROR, PERF, SYNC};
use crate::row::CommandRow;
use crate::world::Done;

/// A job whose target is a file.
struct Drive {
    kind: DriveKind,
    options: Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DriveKind {
    Backup,
    Mirror,
}

impl Edit for Drive {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let plan = plan(p.draft(), *self)?;
            let (command, arguments) = with_target(&p.opener(), p.draft(), plan).await?;
            p.start(job_args::read(command, arguments)?).await
        })
    }
}

/// The target of a job, and the job's other arguments.
struct Plan {
    command: &'static str,
    arguments: Options,
    target: String,
    format: Option<String>,
    existing: bool,
    /// What the target lies over: a node of the draft.
    below: Option<NodeName>,
    /// The options of the target's node.
    node: Options,
}

fn plan(draft: &Draft, drive: Drive) -> Result<Plan> {
    let Drive { kind, options: mut o } = drive;
    let device = o.require_str("device")?;
    let source = find(draft, &device)?;
    let target = o.require_str("target")?;
    let format = o.take_str("format")?;
    let name = o.take_str("node-name")?;
    let existing = o.take_enum("mode", &["existing", "absolute-paths"])? == Some("existing");
    let mut sync = o.require_str("sync")?;
    let images = draft.images(&source);
    let below = match (kind, sync.as_str()) {
        (_, "top") => images.get(1),
        // A backup keeps what the source had, and a mirror what is written from now on: the rest is the source's.
        (_, "none") => images.first(),
        _ => None,
    };
    let mut unmap = true;
    if kind == DriveKind::Mirror {
        unmap = o.take_bool("unmap")?.unwrap_or(true);
        o.set("unmap", unmap);
        // A copy of everything needs no backing file.
        if sync == "top" && below.is_none() {
            sync = "full".into();
        }
    }
    let of_source = || images.first().and_then(|n| draft.kind(n)).map_or("raw", |k| k.name).to_owned();
    let format = if existing { format } else { Some(format.unwrap_or_else(of_source)) };
    let mut node = Options::new().with("discard", if unmap { "unmap" } else { "ignore" });
    if let Some(name) = name {
        node.set("node-name", name);
    }
    // A new image lies over nodes that are open already. An old one that is to be backed up to has its own chain.
    if format.as_deref().is_some_and(|f| f != "raw") && (kind == DriveKind::Mirror || !existing) {
        node.set("backing", below.map_or(Value::Null, |n| Value::from(n.as_str())));
    }
    Ok(Plan {
        command: match kind {
            DriveKind::Backup => "blockdev-backup",
            DriveKind::Mirror => "blockdev-mirror",
        },
        arguments: o.with("device", device).with("sync", sync),
        target,
        format,
        existing,
        below: below.cloned(),
        node,
    })
}

/// Opens the target, or makes it; returns the job that copies to it.
async fn with_target(
    opener: &NodeOpener<'_>,
    draft: &mut Draft,
    plan: Plan,
) -> Result<(&'static str, Options), QmpError> {
    let Plan { command, arguments, target, format, existing, below, mut node } = plan;
    if let Some(f) = format.as_ref().filter(|f| opener.registry.find(f).is_err()) {
        return Err(QmpError::generic(format!("Unknown file format '{f}'")));
    }
    let file = opener.file_options(&target).await?;
    let target = match format {
        Some(format) if !existing => {
            let size = draft.built_node(&find(draft, &text(&arguments, "device"))?)?.size();
            // A raw image lies over nothing.
            let names =
                opener.registry.find(&format)?.create_options.iter().any(|o| o.name == "backing_file");
            if let Some(below) = below.as_ref().filter(|_| !names && text(&arguments, "sync") == "top") {
                return Err(invalid(format!(
                    "Backing file not supported for file format '{format}': a copy of the topmost image alone would \
                     read as zeroes instead of the data of '{below}'"
                ))
                .remedy("copy with sync=full, or to a format with backing files, such as qcow2")
                .into());
            }
            let options = made_over(draft, size, below.as_ref().filter(|_| names), &file)?;
            let image = NewImage { file, format: Some(format), options };
            opener.open_new(draft, image, node).await?
        }
        format => {
            if let Some(format) = format {
                node.set("driver", format);
            }
            opener.open(draft, node.with("file", file.into_value()), false).await?
        }
    };
    Ok((command, arguments.with("target", target.as_str())))
}

static DRIVE_MIRROR: Shape = Shape::of(&[
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
]);

static DRIVE_BACKUP: Shape = Shape::of(&[
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
    Field::optional("x-perf", Ty::Object(&PERF)),
    Field::optional("format", Ty::Str),
    Field::optional("mode", Ty::Enum(&["existing", "absolute-paths"])),
]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::edit(
        "drive-mirror",
        Ty::Object(&DRIVE_MIRROR),
        |_, options| Ok(Box::new(Drive { kind: DriveKind::Mirror, options })),
        "The same as blockdev-mirror, with a file as the target, which is made first.",
    ),
    CommandRow::edit(
        "drive-backup",
        Ty::Object(&DRIVE_BACKUP),
        |_, options| Ok(Box::new(Drive { kind: DriveKind::Backup, options })),
        "The same as blockdev-backup, to a file that is made if it is not there.",
    )
    .features(&["deprecated"])
    .in_transactions(),
];
