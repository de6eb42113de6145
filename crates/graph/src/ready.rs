//! How far a draft goes without touching anything: all that publishing finds out before it changes a file or stops a
//! request. Who only wants to know what would be ([`GraphOwner::rehearse`]) ends there, and drops the draft.
//!
//! What comes after that point can fail only for reasons that nobody can know before: the disk is full, a
//! request or a flush does not end.

use std::collections::BTreeSet;
use std::sync::Arc;

use dolmen_rt::Rt;
use dolmen_types::{Claim, NodeName, Result, ResultExt};

use crate::published::Part;
use crate::registry::Opened;
use crate::state::State;
use crate::{ChildEdge, Common, Cx, Draft, Grants, Graph, GraphOwner, NodeChange};

impl Draft {
    /// Makes the same change of a graph that was published meanwhile.
    ///
    /// # Errors
    /// `Busy` when the two changes have to do with each other.
    pub(crate) fn catch_up(&mut self, now: Arc<Graph>) -> Result<()> {
        if self.base.generation == now.generation {
            return Ok(());
        }
        let mut parts: BTreeSet<u64> = BTreeSet::new();
        let before = self.taken.values().map(|p| &p.state);
        for state in before.chain([&*self.state]) {
            parts.extend(state.nodes.iter().filter_map(|n| now.part_of_node(&n.def.name)));
            parts.extend(state.ops.iter().filter_map(|o| now.part_of_op(&o.id)));
        }
        let as_before = |k: &u64| match (self.taken.get(k), now.part(*k)) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        if parts.len() != self.taken.len() || !parts.iter().all(as_before) {
            let (mut then, mut is) = (State::default(), State::default());
            self.taken.values().for_each(|p| then.add(&p.state));
            let parts: Vec<(u64, Arc<Part>)> =
                parts.into_iter().filter_map(|k| Some((k, now.part(k)?.clone()))).collect();
            parts.iter().for_each(|(_, p)| is.add(&p.state));
            *self.state = crate::merge::merge(&then, &self.state, &is)?;
            self.published.clear();
            parts.iter().for_each(|(_, p)| self.note_before(p));
            self.taken = parts.into_iter().collect();
        }
        self.base = now;
        Ok(())
    }

    /// Whether every driver has been told what its parents need and allow.
    pub(crate) fn all_told(&self, grants: &Grants) -> bool {
        self.state.nodes.iter().zip(&grants.total).all(|(n, total)| {
            !n.retell && self.state.told.get(&n.def.name).copied().unwrap_or(Claim::IDLE) == *total
        })
    }

    /// Puts what was opened into its node.
    pub(crate) fn put_opened(&mut self, node: &NodeName, opened: Opened, forced_read_only: bool) {
        self.prepared.extend(opened.effect);
        self.set_driver(node, opened.driver, forced_read_only);
        // A driver that was opened before and replaced since has nothing to repair.
        self.repairs.retain(|(n, _)| n != node);
        self.repairs.extend(opened.repair.map(|r| (node.clone(), r)));
    }

    /// Lets the driver of a node say whether it can make a change that an operation is going to ask it for, once the
    /// draft is published.
    ///
    /// # Errors
    /// What the driver says; as [`Draft::prepare`].
    pub async fn prepare_change(&mut self, rt: &Rt, node: &NodeName, change: NodeChange) -> Result<()> {
        if let NodeChange::Resize { size } = change {
            crate::io::check_size(size)?;
        }
        self.prepare(rt).await?;
        let node = self.built_node(node)?;
        let prepared = node.driver.prepare(Cx { node: &node, rt }, &change).await?;
        self.prepared.push(prepared);
        Ok(())
    }

    /// Looks at a driver that has just been opened: whether it could only be opened for reading.
    ///
    /// # Errors
    /// `Limit` when it is larger than a node may be.
    pub(crate) fn judge_opened(
        &self,
        name: &NodeName,
        opened: &Opened,
        edges: &[ChildEdge],
        common: &Common,
    ) -> Result<bool> {
        let node = self.probe_node(name, opened.driver.clone(), edges);
        crate::io::check_size(opened.driver.size(&node))?;
        Ok(common.auto_read_only && !common.flags.read_only && opened.driver.describe(&node).read_only)
    }

    /// Repairs the images that can't be written as they are.
    ///
    /// # Errors
    /// What the storage says.
    pub(crate) async fn repair_images(&mut self, rt: &Rt) -> Result<()> {
        for (name, repair) in std::mem::take(&mut self.repairs) {
            if !self.has_node(&name) {
                continue;
            }
            let node = self.built_node(&name)?;
            let repaired = repair.repair(Cx { node: &node, rt }).await;
            repaired.context(|| format!("the image of node '{name}' can't be repaired"))?;
        }
        Ok(())
    }
}

impl GraphOwner {
    /// The graph that publishing a draft would make, or why it would be refused: the same steps, up to the first that
    /// changes anything.
    ///
    /// # Errors
    /// As [`GraphOwner::publish`], as far as it can be known.
    pub async fn rehearse(&self, draft: &mut Draft) -> Result<Graph> {
        self.make_ready(draft).await?;
        draft.preview()
    }

    /// Everything that can be refused, with nothing changed.
    pub(crate) async fn make_ready(&self, draft: &mut Draft) -> Result<()> {
        self.catch_up(draft)?;
        draft.sweep();
        self.prepare(draft).await?;
        draft.check_complete()
    }
}
