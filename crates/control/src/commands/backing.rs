//! `change-backing-file`: an image names another backing file, nothing else changes.

use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{BackingName, Cx, Draft, Node, NodeChange, NodeOpener, header_name, own_file};
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_rt::LocalFuture;
use dolmen_types::{Actions, NodeName, OpId, Result};

use crate::act::{Act, Proposal, Wait, guarded};
use crate::drafting::{claim, command, find, invalid};
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

struct ChangeBackingFile {
    /// A node at or above the image.
    device: String,
    /// The image's node.
    image: String,
    /// The new name; none if empty.
    file: String,
}

impl Act for ChangeBackingFile {
    fn wait(&self, _: &World) -> Wait {
        Wait::Named
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let opener = p.opener();
            let (op, opened) = propose(&opener, p.draft(), &self.device, &self.image, &self.file).await?;
            p.guard(op, opened);
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, guard: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let (rt, graph) = (world.rt.clone(), world.owner.graph());
            let rewritten = async move {
                let gone = || invalid(format!("node '{}' is gone", self.image));
                let node = graph.node(&self.image).ok_or_else(gone)?;
                let name = backing_name(node, &self.file)?;
                Ok(dolmen_graph::set_backing(Cx { node, rt: &rt }, name).await?)
            };
            guarded(guard, rewritten).await
        })
    }
}

/// The operation of `change-backing-file`, and the nodes that are made writable for it.
async fn propose(
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

static ARGUMENTS: Shape = Shape::of(&[
    Field::required("device", Ty::Str),
    Field::required("image-node-name", Ty::Str),
    Field::required("backing-file", Ty::Str),
]);

pub(crate) const ROWS: &[CommandRow] = &[CommandRow::change(
    "change-backing-file",
    Ty::Object(&ARGUMENTS),
    |_, mut o| {
        Ok(Box::new(ChangeBackingFile {
            device: o.require_str("device")?,
            image: o.require_str("image-node-name")?,
            file: o.require_str("backing-file")?,
        }))
    },
    "Has an image name another backing file; the nodes stay linked as they are.",
)];
