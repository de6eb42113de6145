//! Snapshots: a node, or a new image, becomes the overlay of a node that is in use.

use dolmen_graph::{Class, Draft, NewImage, NodeOpener};
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_rt::LocalFuture;
use dolmen_types::{Actions, Error, ErrorKind, NodeName, OpId, Options, Result, Value};

use crate::act::{Edit, Proposal};
use crate::drafting::{claim, command, device_or_node, find, invalid, made_over};
use crate::overlay;
use crate::row::CommandRow;
use crate::world::Done;

/// A node becomes the overlay of another one.
struct Snapshot {
    node: String,
    overlay: String,
}

impl Edit for Snapshot {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            overlay::check(&p.opener(), p.draft(), &self.node, &self.overlay).await?;
            let op = insert_overlay(p.draft(), &self.node, &self.overlay)?;
            p.settle(&op).await
        })
    }
}

/// Makes `overlay` the overlay of `node`: everybody who used the node uses the overlay from now on.
fn insert_overlay(draft: &mut Draft, node: &str, overlay: &str) -> Result<OpId> {
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
    // A job's target that nobody reads yet may get what it lies over, if nobody reads that, either: whoever does would see
    // what is being written to the overlay.
    let is_read = |node: &NodeName| Ok::<_, Error>(draft.total(node)?.needs.contains(Actions::D));
    let is_read = is_read(&overlay)? || is_read(&node)?;
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

/// An overlay in a file.
struct SnapshotSync {
    /// The node to be frozen.
    node: String,
    /// The overlay's file.
    file: String,
    /// The overlay's node name; made up if there is none.
    overlay: Option<String>,
    /// Its format.
    format: String,
    /// The file is there already.
    existing: bool,
}

impl SnapshotSync {
    fn from_options(mut o: Options) -> Result<SnapshotSync> {
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

impl Edit for SnapshotSync {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let op = propose_sync(&p.opener(), p.draft(), *self).await?;
            p.settle(&op).await
        })
    }
}

/// Opens or makes the image, and makes it the overlay of the node.
async fn propose_sync(opener: &NodeOpener<'_>, draft: &mut Draft, sync: SnapshotSync) -> Result<OpId> {
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
        let beneath = Some(draft.built_node(&node)?);
        let image = NewImage { file, format: Some(sync.format), options: made, beneath };
        opener.open_new(draft, image, options).await?
    };
    let op = insert_overlay(draft, &node, &overlay)?;
    // Nothing would ever let go of an overlay that nothing holds.
    if draft.used_by(&overlay).is_none() {
        draft.keep(&overlay)?;
    }
    Ok(op)
}

static SNAPSHOT: Shape = Shape::of(&[Field::required("node", Ty::Str), Field::required("overlay", Ty::Str)]);

static SNAPSHOT_SYNC: Shape = Shape::of(&[
    Field::optional("device", Ty::Str),
    Field::optional("node-name", Ty::Str),
    Field::required("snapshot-file", Ty::Str),
    Field::optional("snapshot-node-name", Ty::Str),
    Field::optional("format", Ty::Str),
    Field::optional("mode", Ty::Enum(&["existing", "absolute-paths"])),
]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::edit(
        "blockdev-snapshot",
        Ty::Object(&SNAPSHOT),
        |_, mut o| {
            Ok(Box::new(Snapshot { node: o.require_str("node")?, overlay: o.require_str("overlay")? }))
        },
        "Makes a node the overlay of another one: who used that one uses the overlay from now on.",
    )
    .features(&["allow-write-only-overlay"])
    .in_transactions(),
    CommandRow::edit(
        "blockdev-snapshot-sync",
        Ty::Object(&SNAPSHOT_SYNC),
        |_, o| Ok(Box::new(SnapshotSync::from_options(o)?)),
        "Makes an image (mode=existing: opens it) and makes it the overlay of a node.",
    )
    .in_transactions(),
];
