//! `block_resize`.

use std::rc::Rc;

use dolmen_graph::{Draft, NodeChange, Prealloc};
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{Actions, Claim, OpId, Result};

use crate::act::{Act, Proposal, Wait, guarded};
use crate::drafting::{claim, command, device_or_node, find, invalid};
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

struct Resize {
    node: String,
    /// In bytes.
    size: u64,
    /// The operation that works on it, once it is proposed.
    op: Option<OpId>,
}

impl Act for Resize {
    fn wait(&self, _: &World) -> Wait {
        Wait::Named
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let world = p.world;
            let op = propose(p.draft(), &world.rt, &self.node, self.size).await?;
            self.op = Some(op.clone());
            p.guard(op, Vec::new());
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, guard: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let edge = self.op.as_ref().and_then(|op| world.owner.edges(op).next());
            let rt = world.rt.clone();
            let resized = async move {
                let edge = edge.ok_or_else(|| invalid(format!("node '{}' is gone", self.node)))?;
                let token = edge.begin().await?;
                Ok(token.resize(&rt)?.resize(self.size, Prealloc::Off).await?)
            };
            guarded(guard, resized).await
        })
    }
}

/// The operation of `block_resize`: an edge of its own at the node that was named.
async fn propose(draft: &mut Draft, rt: &Rt, node: &str, size: u64) -> Result<OpId> {
    let node = find(draft, node)?;
    let now = draft.built_node(&node)?.size();
    let op = command(draft, "block_resize", &node, format!("resize of '{node}' to {size} bytes"))?;
    // Filters hand it down: it is the image that gets another size.
    let image = draft.content(&node);
    if size < now {
        // What is cut off is gone for images above that are not read now, too.
        draft.mark_destructive(&op)?;
        draft.claim_other_data(&op, &image, "cuts off its end")?;
    }
    let needs = Actions::S | Actions::M;
    draft.add_user_below_filters(&op, &node, Claim { needs, allows: Actions::EVERY })?;
    // Filters above it change their size as well.
    for reader in draft.readers(&image) {
        if draft.content(&reader) == image {
            claim(draft, &op, &reader, Actions::S, "changes its size")?;
        }
    }
    draft.prepare_change(rt, &node, NodeChange::Resize { size }).await?;
    Ok(op)
}

static ARGUMENTS: Shape = Shape::of(&[
    Field::optional("device", Ty::Str),
    Field::optional("node-name", Ty::Str),
    Field::required("size", Ty::Int),
]);

pub(crate) const ROWS: &[CommandRow] = &[CommandRow::change(
    "block_resize",
    Ty::Object(&ARGUMENTS),
    |_, mut o| {
        let node = device_or_node(&mut o)?;
        Ok(Box::new(Resize { node, size: o.take_size("size")?.unwrap_or(0), op: None }))
    },
    "Changes the size of a node, in bytes; what is new reads as zeroes.",
)];
