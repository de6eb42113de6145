//! `drive-mirror` and `drive-backup`: jobs whose target is a file, which is made first unless it exists.
//!
//! The image is a stand-in as long as the change is a proposal ([`NodeOpener::open_new`]), so such a command is proposed,
//! refused, put into a transaction and asked about with `what-if` like any other, and touches no file
//! meanwhile. Publishing the draft makes the files.

use dolmen_graph::{Draft, NewImage, NodeOpener, RAW_FORMAT};
use dolmen_jobs::{BACKUP, BLOCK_JOB, JobKind, MIRROR, OnError, PERF};
use dolmen_qmp::QmpError;
use dolmen_qmp::schema::Ty;
use dolmen_rt::LocalFuture;
use dolmen_types::{NodeName, OptionSpec, OptionType, Options, Result, Value};

use crate::act::{Edit, Proposal};
use crate::drafting::{find, invalid, made_over, text};
use crate::jobs::JobStart;
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
            let (kind, arguments) = with_target(&p.opener(), p.draft(), plan).await?;
            p.start(JobStart::read(kind, arguments)?).await
        })
    }
}

/// The target of a job, and the job's other arguments.
struct Plan {
    kind: &'static JobKind,
    arguments: Options,
    target: String,
    format: Option<String>,
    existing: bool,
    /// What the target is an overlay of: a node of the draft.
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
    let of_source = || images.first().and_then(|n| draft.kind(n)).map_or(RAW_FORMAT, |k| k.name).to_owned();
    let format = if existing { format } else { Some(format.unwrap_or_else(of_source)) };
    let mut node = Options::new().with("discard", if unmap { "unmap" } else { "ignore" });
    if let Some(name) = name {
        node.set("node-name", name);
    }
    // A new image is an overlay of nodes that are open already. An old one that is to be backed up to has its own chain.
    if format.as_deref().is_some_and(|f| f != RAW_FORMAT) && (kind == DriveKind::Mirror || !existing) {
        node.set("backing", below.map_or(Value::Null, |n| Value::from(n.as_str())));
    }
    Ok(Plan {
        kind: match kind {
            DriveKind::Backup => &BACKUP,
            DriveKind::Mirror => &MIRROR,
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
) -> Result<(&'static JobKind, Options), QmpError> {
    let Plan { kind, arguments, target, format, existing, below, mut node } = plan;
    if let Some(f) = format.as_ref().filter(|f| opener.registry.find(f).is_err()) {
        return Err(QmpError::generic(format!("Unknown file format '{f}'")));
    }
    let file = opener.file_options(&target).await?;
    let target = match format {
        Some(format) if !existing => {
            let size = draft.built_node(&find(draft, &text(&arguments, "device"))?)?.size();
            // A raw image is no overlay.
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
            let beneath = below.as_ref().filter(|_| names).map(|n| draft.built_node(n)).transpose()?;
            let image = NewImage { file, format: Some(format), options, beneath };
            opener.open_new(draft, image, node).await?
        }
        format => {
            if let Some(format) = format {
                node.set("driver", format);
            }
            opener.open(draft, node.with("file", file.into_value()), false).await?
        }
    };
    Ok((kind, arguments.with("target", target.as_str())))
}

const TARGET: &[OptionSpec] = &[
    OptionSpec::required("device", OptionType::Str, "the source"),
    OptionSpec::required("target", OptionType::Str, "the file to copy to"),
    OptionSpec::optional("format", OptionType::Str, "of the target (default: that of the source)"),
    OptionSpec::required(
        "sync",
        OptionType::Enum(&["top", "full", "none", "incremental", "bitmap"]),
        "what is copied: full, top or none",
    ),
    OptionSpec::optional(
        "mode",
        OptionType::Enum(&["existing", "absolute-paths"]),
        "whether the file is there (default: it is made)",
    ),
    OptionSpec::optional("on-source-error", OnError::OPTION, "what to do about errors (default: report)"),
    OptionSpec::optional("on-target-error", OnError::OPTION, "the same for writing"),
];

const OF_MIRROR: &[OptionSpec] = &[
    OptionSpec::optional("node-name", OptionType::Str, "name of the node of the target"),
    OptionSpec::optional(
        "replaces",
        OptionType::Str,
        "the node whose place the copy takes (default: the source)",
    ),
    OptionSpec::optional("granularity", OptionType::Int, "bytes that are copied at least at a time"),
    OptionSpec::optional("buf-size", OptionType::Int, "bytes in flight"),
    OptionSpec::optional("unmap", OptionType::Bool, "zeroes are holes in the copy (default: on)"),
    OptionSpec::optional(
        "copy-mode",
        OptionType::Enum(&["background", "write-blocking"]),
        "whether writes wait for the copy (default: background)",
    ),
];

const OF_BACKUP: &[OptionSpec] = &[
    OptionSpec::optional("bitmap", OptionType::Str, "not supported yet"),
    OptionSpec::optional(
        "bitmap-mode",
        OptionType::Enum(&["on-success", "never", "always"]),
        "not supported yet",
    ),
    OptionSpec::optional("compress", OptionType::Bool, "not supported"),
    OptionSpec::optional("filter-node-name", OptionType::Str, "name of the filter"),
    OptionSpec::optional("discard-source", OptionType::Bool, "discards what has been copied (default: off)"),
    OptionSpec::optional("x-perf", OptionType::Object(PERF), "how it is copied"),
];

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::edit(
        "drive-mirror",
        Ty::Options(&[BLOCK_JOB, TARGET, OF_MIRROR]),
        |_, options| Ok(Box::new(Drive { kind: DriveKind::Mirror, options })),
        "The same as blockdev-mirror, with a file as the target, which is made first.",
    ),
    CommandRow::edit(
        "drive-backup",
        Ty::Options(&[BLOCK_JOB, TARGET, OF_BACKUP]),
        |_, options| Ok(Box::new(Drive { kind: DriveKind::Backup, options })),
        "The same as blockdev-backup, to a file that is made if it is not there.",
    )
    .features(&["deprecated"])
    .in_transactions(),
];
