//! Changes of the graph as proposals: what a command would publish, on a draft.
//!
//! Every command is a proposal first, which finds out everything that could be said against it and changes
//! nothing outside of its draft. Publishing that is doing it; publishing several at once is a transaction; rehearsing
//! the publication and dropping the draft is `what-if`. So the three can't disagree. What a command does beside the
//! graph (an export offered, a header written) comes after its proposal, and has no refusals of its own.
//!
//! An instant command guards what it changes by the claims of an operation of its own. It
//! is asked about ([`reopen::settle`]) and gone again before the draft is published.

use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{
    BackingName, ClaimScope, Class, Cx, Draft, Node, NodeChange, NodeOpener, OpClaim, OpInfo, Prealloc,
    header_name, own_file,
};
use dolmen_qmp::QmpError;
use dolmen_rt::Rt;
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, Result};

use crate::jobs::{self, Started};
use crate::owed::Owed;
use crate::task::Task;
use crate::{Change, commands, images, operations, overlay, reopen};

type Done = Result<(), QmpError>;

/// The node that a command means by `device` or `node-name`.
///
/// # Errors
/// `InvalidInput` unless one of the two is given.
pub(crate) fn device_or_node(o: &mut Options) -> Result<String> {
    match (o.take_str("device")?, o.take_str("node-name")?) {
        (Some(n), None) | (None, Some(n)) => Ok(n),
        (Some(_), Some(_)) | (None, None) => {
            Err(Error::new(ErrorKind::InvalidInput, "Need exactly one of 'device' and 'node-name'"))
        }
    }
}

/// Puts a change into a draft, and the jobs that it starts into `started`. Nothing outside the draft changes: images that
/// are to be made are stand-ins until the draft is published.
///
/// # Errors
/// Why it can't be; the draft is then of no more use.
pub(crate) async fn propose(
    task: &Task,
    draft: &mut Draft,
    change: Change,
    started: &mut Vec<Started>,
) -> Done {
    let rt = task.shared.rt.clone();
    let opener = task.opener(&rt);
    match change {
        Change::BlockdevAdd(options) => commands::propose_add(task, draft, options).await,
        Change::BlockdevDel { node } => commands::propose_del(task, draft, &node),
        Change::BlockdevReopen(list) if list.is_empty() => Ok(()),
        Change::BlockdevReopen(list) => {
            let op = reopen::propose(&opener, draft, list).await?;
            reopen::settle(draft, &op, &opener).await
        }
        Change::BlockdevSetActive { node, active } => reopen::propose_active(draft, node.as_deref(), active),
        Change::NbdServerStart(start) => commands::propose_server(task, &start).await.map(drop),
        Change::NbdServerStop => commands::propose_server_stop(task, draft),
        Change::ExportAdd(add) => commands::propose_export(task, draft, &add).map(drop),
        Change::ExportDel { id, hard } => commands::propose_export_del(task, draft, &id, hard),
        Change::JobStart(start) => {
            started.push(jobs::start_in_draft(task, draft, start).await?);
            Ok(())
        }
        Change::Drive(drive) => {
            started.push(images::propose_drive(task, draft, drive).await?);
            Ok(())
        }
        Change::Snapshot { node, overlay } => {
            overlay::check(&opener, draft, &node, &overlay).await?;
            let op = propose_snapshot(draft, &node, &overlay)?;
            reopen::settle(draft, &op, &opener).await
        }
        Change::SnapshotSync(sync) => {
            let op = images::propose_snapshot_sync(&opener, draft, sync).await?;
            reopen::settle(draft, &op, &opener).await
        }
        Change::ChangeBackingFile { device, image, file } => {
            let (op, opened) = propose_change_backing(&opener, draft, &device, &image, &file).await?;
            draft.remove_op(&op);
            draft.restore_read_only(&opened);
            Ok(())
        }
        Change::Resize { node, size } => {
            let op = propose_resize(draft, &rt, &node, size).await?;
            draft.remove_op(&op);
            Ok(())
        }
        Change::OperationBegin(begin) => operations::propose_begin(draft, begin),
        Change::OperationEnd { id } => operations::propose_end(draft, &id),
        Change::Transaction { actions, .. } => {
            for action in actions {
                Box::pin(propose(task, draft, action, started)).await?;
            }
            Ok(())
        }
        Change::Abort => Err(QmpError::generic("Transaction aborted using Abort action")),
        Change::WhatIf(inner) => Box::pin(propose(task, draft, *inner, started)).await,
        // They change nothing in the graph by themselves.
        Change::SetWriteThreshold { node, .. } => commands::propose_write_threshold(task, &node).map(drop),
        Change::Ask(ask) => ask.check(&task.shared.jobs).map(drop),
        Change::Nothing | Change::Quit => Ok(()),
    }
}

/// Makes a proposal and publishes it.
pub(crate) async fn carry_out(task: &Task, change: Change) -> Done {
    let grouped = matches!(change, Change::Transaction { grouped: true, .. });
    let mut draft = task.owner.draft();
    let mut started = Vec::new();
    let proposed = task.shared.clone();
    // A server may not answer. Dropping the draft on the way out closes what was opened.
    let made = proposed.patiently(propose(task, &mut draft, change, &mut started)).await;
    let done = match made {
        Ok(()) => task.commit(draft).await,
        Err(e) => {
            task.let_go(draft).await;
            Err(e)
        }
    };
    done?;
    if grouped {
        Started::after_commit(started, task);
    } else {
        started.into_iter().for_each(|job| Started::after_commit(vec![job], task));
    }
    task.report_events().map_or(Ok(()), Err)
}

/// The operation of an instant command on a node. Several of one kind may be there at one time, on
/// different nodes.
fn command(draft: &mut Draft, name: &str, node: &NodeName, detail: String) -> Result<OpId> {
    let op = OpId::internal(format!("command:{name}:{node}"));
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "command".into(),
        detail,
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    Ok(op)
}

fn claim(draft: &mut Draft, op: &OpId, node: &NodeName, needs: Actions, why: &str) -> Result<()> {
    draft.add_claim(OpClaim {
        op: op.clone(),
        node: node.clone(),
        claim: Claim { needs, allows: Actions::EVERY },
        scope: ClaimScope::Node,
        why: why.to_owned(),
        pins: false,
    })
}

pub(crate) fn find(draft: &Draft, name: &str) -> Result<NodeName> {
    draft.node_names().find(|n| n.as_str() == name).cloned().ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'"))
            .remedy("query-named-block-nodes lists the nodes there are")
    })
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// Puts `overlay` over `node`: everybody who used the node uses the overlay from now on.
pub(crate) fn propose_snapshot(draft: &mut Draft, node: &str, overlay: &str) -> Result<OpId> {
    let node = find(draft, node)?;
    let overlay = find(draft, overlay)?;
    let kind = draft.kind(&overlay).filter(|k| k.class == Class::Format);
    if !kind.is_some_and(|k| k.options.iter().any(|o| o.name == "backing")) {
        return Err(invalid("The overlay does not support backing images")
            .remedy("use a node of a format with backing files, such as qcow2"));
    }
    if draft.child(&overlay, "backing").is_some() {
        return Err(invalid("The overlay already has a backing image")
            .remedy("open it with backing=null: the snapshot links it"));
    }
    // A mirror's target that nobody reads yet may get what it lies over.
    let grants = draft.solve()?;
    let is_read = draft
        .node_names()
        .position(|n| *n == overlay)
        .is_some_and(|i| grants.total[i].needs.contains(Actions::D));
    if let Some(user) = draft.used_by(&overlay).filter(|_| is_read) {
        return Err(Error::new(ErrorKind::Busy, format!("The overlay is already in use: {user}"))
            .remedy("remove what uses it first"));
    }
    let op = command(draft, "blockdev-snapshot", &node, format!("snapshot of '{node}' in '{overlay}'"))?;
    claim(draft, &op, &node, Actions::P, "puts an overlay above it")?;
    let sizes = (draft.built_node(&node)?.size(), draft.built_node(&overlay)?.size());
    let under = draft.resolve(&node)?;
    if sizes.0 != sizes.1 {
        for reader in draft.readers(&under) {
            claim(draft, &op, &reader, Actions::S, "puts an overlay of another size above it")?;
        }
        // Asked before the overlay is linked: it is no party to the conflict.
        draft.solve().map_err(|e| match e.conflict() {
            Some(c) if c.actions == Actions::S => {
                e.first_remedy(format!("use an overlay of {} bytes", sizes.0))
            }
            _ => e,
        })?;
    }
    draft.put_over(&node, &overlay)?;
    Ok(op)
}

/// The operation of `change-backing-file`, and the nodes that are made writable for it.
async fn propose_change_backing(
    opener: &NodeOpener<'_>,
    draft: &mut Draft,
    device: &str,
    image: &str,
    file: &str,
) -> Result<(OpId, Vec<NodeName>)> {
    find(draft, device)?;
    let image = find(draft, image)?;
    if !draft.chain(device).contains(&image) {
        return Err(invalid(format!("'{image}' and '{device}' are not in the same chain"))
            .remedy("image-node-name has to be a node at or below device"));
    }
    if draft.child(&image, "backing").is_none() {
        return Err(invalid(format!("node '{image}' has no backing file that could get another name"))
            .remedy("link one first (blockdev-reopen)"));
    }
    let node = draft.built_node(&image)?;
    if !file.is_empty() {
        // A header must not lead back to its own image.
        opener.check_backing(&node, BackingName { name: file, format: None }).await?;
    }
    let to = backing_name(&node, file)?.map(|b| (b.name.to_owned(), b.format.map(str::to_owned)));
    drop(node);
    let op = command(
        draft,
        "change-backing-file",
        &image,
        format!("change of the backing file named by '{image}'"),
    )?;
    claim(draft, &op, &image, Actions::G | Actions::M, "rewrites its header")?;
    let opened = draft.set_read_only(&image, false)?;
    draft.prepare_change(opener.rt, &image, NodeChange::Backing(to)).await?;
    Ok((op, opened))
}

/// The name as it goes into the header, with the format of the image that lies below now.
fn backing_name<'a>(node: &Arc<Node>, file: &'a str) -> Result<Option<BackingName<'a>>> {
    if file.is_empty() {
        return Ok(None);
    }
    let format = node.backing().map(|below| header_name(below, &own_file(node))).transpose()?.map(|n| n.1);
    Ok(Some(BackingName { name: file, format }))
}

/// `change-backing-file`: the header names another file, nothing else changes.
pub(crate) async fn change_backing_file(task: &Rc<Task>, device: &str, image: &str, file: &str) -> Done {
    let mut draft = task.owner.draft();
    let shared = task.shared.clone();
    let opener = task.opener(&shared.rt);
    let proposed = async { Ok(propose_change_backing(&opener, &mut draft, device, image, file).await?) };
    let (op, opened) = shared.patiently(proposed).await?;
    draft.mark_started(&op);
    task.commit(draft).await?;
    let owed = Owed::new(task, op, opened);
    let (rt, graph) = (task.shared.rt.clone(), task.owner.graph());
    let (image, file) = (image.to_owned(), file.to_owned());
    let rewritten = async move {
        let node = graph.node(&image).ok_or_else(|| invalid(format!("node '{image}' is gone")))?;
        Ok(node.driver.set_backing(Cx { node, rt: &rt }, backing_name(node, &file)?).await?)
    };
    owed.after(rewritten).await
}

/// The operation of `block_resize`: an edge of its own at the node that was named.
async fn propose_resize(draft: &mut Draft, rt: &Rt, node: &str, size: u64) -> Result<OpId> {
    let node = find(draft, node)?;
    let now = draft.built_node(&node)?.size();
    let op = command(draft, "block_resize", &node, format!("resize of '{node}' to {size} bytes"))?;
    // Filters hand it down: it is the image that gets another size.
    let image = draft.content(&node);
    if size < now {
        // What is cut off is gone for images above that nobody reads now, too.
        draft.mark_destructive(&op)?;
        draft.claim_other_data(&op, &image, "cuts off its end")?;
    }
    let needs = Actions::S | Actions::M;
    draft.add_user_below_filters(&op, &node, Claim { needs, allows: Actions::EVERY })?;
    // What lies over it in filters changes its size as well.
    for reader in draft.readers(&image) {
        if draft.content(&reader) == image {
            claim(draft, &op, &reader, Actions::S, "changes its size")?;
        }
    }
    draft.prepare_change(rt, &node, NodeChange::Resize { size }).await?;
    Ok(op)
}

/// `block_resize`.
pub(crate) async fn block_resize(task: &Rc<Task>, node: &str, size: u64) -> Done {
    let mut draft = task.owner.draft();
    let shared = task.shared.clone();
    let proposed = async { Ok(propose_resize(&mut draft, &shared.rt, node, size).await?) };
    let op = shared.patiently(proposed).await?;
    draft.mark_started(&op);
    task.commit(draft).await?;
    let edge = task.owner.edges(&op).next();
    let owed = Owed::new(task, op, Vec::new());
    let (rt, node) = (task.shared.rt.clone(), node.to_owned());
    let resized = async move {
        let edge = edge.ok_or_else(|| invalid(format!("node '{node}' is gone")))?;
        let token = edge.begin().await?;
        Ok(token.resize(&rt)?.resize(size, Prealloc::Off).await?)
    };
    owed.after(resized).await
}
