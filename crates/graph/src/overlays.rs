//! What a draft knows about overlays: which operations keep them right while they write
//! what the overlays lie over, and what moves when another overlay is put over a node.

use std::collections::BTreeSet;

use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Result};

use crate::state::State;
use crate::{ClaimScope, Draft, OpClaim, Overlays, Stance};

impl State {
    /// How operations stand to overlays, for the solver.
    pub(crate) fn stances(&self, number: &dyn Fn(&OpId) -> u32) -> Vec<Stance> {
        let mut out: Vec<Stance> = Vec::new();
        for (op, node) in &self.kept {
            let (op, node) = (number(op), self.index(node));
            if !self.nodes[node].children.iter().any(|c| c.role == ChildRole::Backing) {
                continue;
            }
            match out.iter_mut().find(|s| s.op == op).map(|s| &mut s.overlays) {
                Some(Overlays::Kept(list)) => list.push(node),
                Some(Overlays::All) => {}
                None => out.push(Stance { op, overlays: Overlays::Kept(vec![node]) }),
            }
        }
        for op in &self.destructive {
            let op = number(op);
            out.retain(|s| s.op != op);
            out.push(Stance { op, overlays: Overlays::All });
        }
        out
    }
}

impl Draft {
    /// A node stays from now on until it is deleted by name.
    ///
    /// # Errors
    /// `NotFound` without such a node.
    pub fn keep(&mut self, node: &NodeName) -> Result<()> {
        self.find(node)?;
        self.take_in([node.as_str()]);
        let i = self.state.index(node);
        self.state.nodes[i].def.monitor = true;
        Ok(())
    }

    /// Says that what `op` writes below the image that `node` shows leaves it as it is: a
    /// commit of that image, or copy-before-write that saves to it. So the image does not
    /// keep `op` from writing its backing file.
    ///
    /// # Errors
    /// `NotFound`, for the operation.
    pub fn keep_right(&mut self, op: &OpId, node: &NodeName) -> Result<()> {
        self.known(op)?;
        let image = self.content(node);
        self.take_in([image.as_str()]);
        self.state.kept.push((op.clone(), image));
        Ok(())
    }

    /// Has the image `overlay` read from `below` where it has nothing of its own, for as long as its
    /// node is open. What the image holds and names on disk stays as it is, so this does not wait
    /// for a flush that may fail: with it, an operation that ends takes back what the overlay shows.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn take_back(&mut self, overlay: &NodeName, below: &NodeName) -> Result<()> {
        self.set_backing_link(overlay, Some(below))?;
        self.unflushed.push(overlay.clone());
        Ok(())
    }

    /// Says that `op` takes data away for good. So even overlays that nobody reads now may
    /// keep it from that.
    ///
    /// # Errors
    /// `NotFound`, for the operation.
    pub fn mark_destructive(&mut self, op: &OpId) -> Result<()> {
        self.known(op)?;
        self.state.destructive.push(op.clone());
        Ok(())
    }

    /// Puts `overlay` over `node`: users and filters of the node (or of the outermost filter
    /// interposed on it) go to the overlay, which lies over the node from now on. Other
    /// overlays stay where they are: their headers name the file of the node, and what it
    /// holds does not change any more.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when a filter has both an overlay above it, which has to stay, and
    /// somebody who has to move.
    pub fn put_over(&mut self, node: &str, overlay: &str) -> Result<()> {
        let old = self.resolve(node)?;
        let new = self.resolve(overlay)?;
        self.take_in([old.as_str(), new.as_str()]);
        let stays = self.staying(&old)?;
        let below: BTreeSet<NodeName> = self.state.below(&new).into_iter().cloned().collect();
        self.state.nodes.relink(&old, &new, |n| stays.contains(&n.def.name) || below.contains(&n.def.name));
        self.move_users(&old, &new);
        let image = self.find(overlay)?;
        self.set_backing_link(&image, Some(&old))
    }

    /// The parents of `node` that stay when an overlay is put over it: its overlays, and
    /// filters that are there for overlays only.
    fn staying(&self, node: &NodeName) -> Result<Vec<NodeName>> {
        let mut out = Vec::new();
        for parent in self.state.nodes.iter() {
            let name = &parent.def.name;
            for c in parent.children.iter().filter(|c| c.node == *node) {
                let filter = c.role == ChildRole::Filtered;
                if c.role == ChildRole::Backing || filter && self.is_for_overlays(name)? {
                    out.push(name.clone());
                }
            }
        }
        Ok(out)
    }

    /// Whether everything above a filter reads it as a backing file.
    fn is_for_overlays(&self, filter: &NodeName) -> Result<bool> {
        let staying = self.staying(filter)?;
        let Some(overlay) = staying.first() else { return Ok(false) };
        let mover = self
            .state
            .nodes
            .iter()
            .find(|n| !staying.contains(&n.def.name) && n.children.iter().any(|c| c.node == *filter))
            .map(|n| format!("node '{}'", n.def.name));
        let user = self.state.users.iter().find(|u| u.node == *filter).map(|u| format!("'{}'", u.op));
        match mover.or(user) {
            None => Ok(true),
            Some(who) => Err(Error::new(
                ErrorKind::Busy,
                format!("filter '{filter}' is below the overlay '{overlay}', which has to stay, and below {who}, which has to move"),
            )
            .remedy(format!("give '{overlay}' a filter of its own, or link it to the image itself"))),
        }
    }

    /// Claims, for a user's copy-before-write node, that nobody else writes the node in which
    /// it saves old data: they would be lost, or be taken for the data of its point in time.
    ///
    /// # Errors
    /// `AlreadyExists` when it has claimed that already.
    pub fn guard_target(&mut self, node: &NodeName) -> Result<()> {
        let target = self
            .node(node)
            .filter(|n| n.def.rule.table.guards_target && n.def.owner.is_none())
            .and_then(|n| n.children.iter().find(|c| c.role == ChildRole::Target))
            .map(|c| c.node.clone());
        let Some(target) = target else { return Ok(()) };
        let op = self.add_driver_op(node)?;
        self.keep_right(&op, &target)?;
        let beneath = self.shown_by(&target).into_iter().map(|n| (n, ClaimScope::Beneath));
        for (node, scope) in std::iter::once((target, ClaimScope::Node)).chain(beneath) {
            self.add_claim(OpClaim {
                op: op.clone(),
                node,
                claim: Claim { needs: Actions::NONE, allows: Actions::EVERY - Actions::V },
                scope,
                why: "saves in it what is overwritten elsewhere".into(),
                pins: true,
            })?;
        }
        Ok(())
    }
}
