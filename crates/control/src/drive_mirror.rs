//! `drive-mirror`: a mirror whose target is a file by name, made first if it is to be a new one.
//!
//! The target's nodes belong to nobody but the job: they go with it, unless the mirror has been completed and the
//! source had parents that hold them now.

use dolmen_graph::{ChildEdge, CreateCx, Draft, GraphOwner, NodeOpener, OpInfo, node_filename};
use dolmen_qmp::QmpError;
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Value};

use crate::jobs::{JobStart, Started, start_in_draft};
use crate::task::Task;

/// What is to be known of the source.
struct Source {
    size: u64,
    driver: &'static str,
    /// Node name, file name and driver of the backing file.
    backing: Option<(NodeName, String, &'static str)>,
}

fn source(task: &Task, device: &str) -> Result<Source> {
    let node = task.owner.graph().node(device).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("Cannot find device='{device}' nor node-name='{device}'"))
            .remedy("query-named-block-nodes lists the nodes there are")
    })?;
    let mut image = node;
    while let Some(below) = image.filtered() {
        image = below;
    }
    let backing = image.backing().map(|b| {
        let mut content = b;
        while let Some(below) = content.filtered() {
            content = below;
        }
        (b.name.clone(), node_filename(content), content.driver.kind().name)
    });
    Ok(Source { size: node.size(), driver: image.driver.kind().name, backing })
}

/// Starts the mirror that `drive-mirror` asks for.
pub(crate) async fn start(task: &mut Task, mut o: Options) -> Result<(), QmpError> {
    let device = o.require_str("device")?;
    let target = o.require_str("target")?;
    let format = o.take_str("format")?;
    let name = o.take_str("node-name")?;
    let existing = o.take_enum("mode", &["existing", "absolute-paths"])? == Some("existing");
    let mut sync = o.require_str("sync")?;
    let unmap = o.take_bool("unmap")?.unwrap_or(true);
    let src = source(task, &device)?;
    if sync == "top" && src.backing.is_none() {
        sync = "full".into();
    }
    let known = |f: &String| task.config.registry.find(f).is_ok();
    if let Some(f) = format.as_ref().filter(|f| !known(f)) {
        return Err(QmpError::generic(format!("Unknown file format '{f}'")));
    }
    let format = if existing { format } else { Some(format.unwrap_or_else(|| src.driver.to_owned())) };
    // A copy of everything needs no backing file; one of less has that of the source.
    let backing = match sync.as_str() {
        "top" => src.backing.clone(),
        _ => None,
    };
    // Whether the job can be is found out before a file is made: with the source in its own place.
    let arguments = o.with("device", device.as_str()).with("sync", sync.as_str()).with("unmap", unmap);
    if let (false, Some(format)) = (existing, &format) {
        JobStart::from_options("blockdev-mirror", arguments.clone().with("target", device.as_str()))?;
        let made = create(task, &target, format, src.size, backing.as_ref());
        task.shared.unless_quitting(async { Ok(made.await?) }).await?;
    }

    let mut node = Options::new().with("discard", if unmap { "unmap" } else { "ignore" });
    if let Some(format) = &format {
        node.set("driver", format.as_str());
    }
    if let Some(name) = name {
        node.set("node-name", name);
    }
    node.set("file", file_options(&target)?.into_value());
    if format.as_deref().is_some_and(|f| f != "raw") {
        node.set("backing", backing.map_or(Value::Null, |(node, ..)| Value::from(node.as_str())));
    }
    let mut draft = task.owner.draft();
    let rt = task.shared.rt.clone();
    let opener = opener(task, &rt);
    let open = async { Ok(opener.open(&mut draft, node, false).await?) };
    let node = task.shared.unless_quitting(open).await?;
    let started = begin(task, &mut draft, arguments.with("target", node.as_str())).await?;
    task.owner.commit(draft).await?;
    Started::after_commit(vec![started], task);
    Ok(())
}

async fn begin(task: &Task, draft: &mut Draft, arguments: Options) -> Result<Started, QmpError> {
    match JobStart::from_options("blockdev-mirror", arguments)? {
        Some(start) => start_in_draft(task, draft, start).await,
        None => Err(QmpError::generic("there are no mirrors")),
    }
}

fn opener<'a>(task: &Task, rt: &'a dolmen_rt::Rt) -> NodeOpener<'a> {
    NodeOpener { registry: task.config.registry, policy: task.config.policy, names: crate::image_name, rt }
}

fn file_options(name: &str) -> Result<Options> {
    if dolmen_graph::has_protocol(name) || name.starts_with("json:") {
        crate::image_name(name)
    } else {
        Ok(Options::new().with("driver", "file").with("filename", name))
    }
}

/// Makes an image in a graph of its own: nobody else knows of it yet.
async fn create(
    task: &Task,
    target: &str,
    format: &str,
    size: u64,
    backing: Option<&(NodeName, String, &'static str)>,
) -> Result<()> {
    let rt = task.shared.rt.clone();
    let file = file_options(target)?;
    let mut o = file.clone();
    let driver = o.require_str("driver")?;
    if let Some(make) = task.config.registry.find(&driver)?.create {
        let bytes = if format == "raw" { size } else { 0 };
        make(CreateCx { file: None, rt: &rt }, o.with("size", bytes)).await?;
    }
    if format == "raw" {
        return Ok(());
    }
    let make = task.config.registry.find(format)?.create.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("Format driver '{format}' does not support image creation"),
        )
        .remedy("name a format that does, or make the image first and use mode 'existing'")
    })?;
    let mut options = Options::new().with("size", size);
    if let Some((_, name, format)) = backing {
        options = options.with("backing-file", name.as_str()).with("backing-fmt", *format);
    }
    let mut owner = GraphOwner::new(rt.clone());
    let mut draft = owner.draft();
    let node = opener(task, &rt).open(&mut draft, file, true).await?;
    let op = OpId::internal("creation");
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "command".into(),
        detail: format!("creation of '{target}'"),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    draft.add_user(
        &op,
        &node,
        Claim { needs: Actions::D | Actions::V | Actions::S, allows: Actions::EVERY },
    )?;
    owner.commit(draft).await?;
    let edge = owner.edges(&op).next().cloned();
    let made = match edge {
        Some(edge) => {
            let child =
                ChildEdge { name: "file", role: ChildRole::Metadata, node: edge.node(), claim: edge.claim() };
            make(CreateCx { file: Some(&child), rt: &rt }, options).await
        }
        None => Err(Error::new(ErrorKind::NotFound, format!("'{target}' could not be opened"))),
    };
    owner.close().await?;
    made
}
