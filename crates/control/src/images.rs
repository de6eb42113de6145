//! Commands that make images: an overlay in a new file, a job whose target is a file by name.
//!
//! The image is a stand-in as long as the change is a proposal ([`NodeOpener::open_new`]), so such a command is proposed,
//! refused, put into a transaction and asked about with `what-if` like any other, and touches no file
//! meanwhile. Publishing the draft makes the files.

use dolmen_graph::{Draft, NewImage, NodeOpener, header_name};
use dolmen_qmp::QmpError;
use dolmen_types::{Error, ErrorKind, NodeName, OpId, Options, Result, Value};

use crate::JobStart;
use crate::act::{device_or_node, find, invalid, propose_snapshot};
use crate::jobs::{self, Started};
use crate::overlay;
use crate::task::Task;

/// An overlay in a file.
#[derive(Debug)]
pub struct SnapshotSync {
    /// The node to be frozen.
    pub node: String,
    /// The overlay's file.
    pub file: String,
    /// The overlay's node name; made up if there is none.
    pub overlay: Option<String>,
    /// Its format.
    pub format: String,
    /// The file is there already.
    pub existing: bool,
}

impl SnapshotSync {
    /// Reads the arguments of `blockdev-snapshot-sync`.
    ///
    /// # Errors
    /// When no node is named, or two.
    pub fn from_options(mut o: Options) -> Result<SnapshotSync> {
        let out = SnapshotSync {
            node: device_or_node(&mut o)?,
            file: o.require_str("snapshot-file")?,
            overlay: o.take_str("snapshot-node-name")?,
            format: o.take_str("format")?.unwrap_or_else(|| "qcow2".to_owned()),
            existing: o.take_enum("mode", &["existing", "absolute-paths"])? == Some("existing"),
        };
        o.finish("blockdev-snapshot-sync")?;
        Ok(out)
    }
}

/// A job whose target is a file, which is made first unless it exists.
#[derive(Debug)]
pub struct Drive {
    kind: DriveKind,
    options: Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DriveKind {
    Backup,
    Mirror,
}

impl Drive {
    /// The job of a command or an action; `None` for others.
    pub fn from_options(command: &str, options: Options) -> Option<Drive> {
        let kind = match command {
            "drive-backup" => DriveKind::Backup,
            "drive-mirror" => DriveKind::Mirror,
            _ => return None,
        };
        Some(Drive { kind, options })
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

/// Puts a job and its target into a draft.
pub(crate) async fn propose_drive(task: &Task, draft: &mut Draft, drive: Drive) -> Result<Started, QmpError> {
    let rt = task.shared.rt.clone();
    let opener = task.opener(&rt);
    let Plan { command, arguments, target, format, existing, below, mut node } = plan(draft, drive)?;
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
    match JobStart::from_options(command, arguments.with("target", target.as_str()))? {
        Some(start) => jobs::start_in_draft(task, draft, start).await,
        None => Err(QmpError::generic(format!("'{command}' starts no job"))),
    }
}

fn text(options: &Options, name: &str) -> String {
    match options.get(name) {
        Some(Value::Str(s)) => s.clone(),
        _ => String::new(),
    }
}

/// The options for making an image over a node of the draft, which is the image that its header names.
fn made_over(draft: &Draft, size: u64, below: Option<&NodeName>, file: &Options) -> Result<Options> {
    let mut options = Options::new().with("size", size);
    if let Some(below) = below {
        let (name, format) = header_name(&draft.built_node(below)?, &text(file, "filename"))?;
        options.set("backing_file", name);
        options.set("backing_fmt", format);
    }
    Ok(options)
}

/// Puts an overlay in a file over a node.
pub(crate) async fn propose_snapshot_sync(
    opener: &NodeOpener<'_>,
    draft: &mut Draft,
    sync: SnapshotSync,
) -> Result<OpId> {
    let node = find(draft, &sync.node)?;
    if let Some(name) = &sync.overlay
        && draft.has_node(name)
    {
        return Err(Error::new(ErrorKind::AlreadyExists, "New overlay node-name already in use")
            .remedy("choose another snapshot-node-name"));
    }
    let kind = opener.registry.find(&sync.format)?;
    if !kind.options.iter().any(|o| o.name == "backing") {
        return Err(invalid(format!("format '{}' does not support backing images", kind.name))
            .remedy("use a format with backing files, such as qcow2"));
    }
    let file = opener.file_options(&sync.file).await?;
    let mut options = Options::new().with("backing", Value::Null);
    if let Some(name) = sync.overlay {
        options.set("node-name", name);
    }
    let overlay = if sync.existing {
        let options = options.with("driver", sync.format).with("file", file.into_value());
        let overlay = opener.open(draft, options, false).await?;
        overlay::check(opener, draft, node.as_str(), overlay.as_str()).await?;
        overlay
    } else {
        let size = draft.built_node(&node)?.size();
        let made = made_over(draft, size, Some(&node), &file)?;
        let image = NewImage { file, format: Some(sync.format), options: made };
        opener.open_new(draft, image, options).await?
    };
    let op = propose_snapshot(draft, &node, &overlay)?;
    // Nothing would ever let go of an overlay that nothing holds.
    if draft.used_by(&overlay).is_none() {
        draft.keep(&overlay)?;
    }
    Ok(op)
}
