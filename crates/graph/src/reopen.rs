//! Changing nodes that are in use: other options, other links, another driver instance.
//!
//! A node that is reopened keeps its name, its state and its place; it gets a driver that
//! was opened anew with the new options, while the old one goes on until the draft is
//! published (see [`OpenCx::replaces`]). Links may change at the same time, and several
//! nodes may be changed in one draft: either all of it happens, or nothing.
//!
//! What a change claims: a link that leads to other data than before needs G on the node,
//! and V on it and on every node above, because what they read as changes. A link that
//! leads to the same image, past or through one more filter, needs nothing.

use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, ResultExt, Value,
};

use crate::draft::{DraftNode, driver_op, no_such_node};
use crate::open::{Inherited, below};
use crate::{ChildDef, ClaimScope, Common, Draft, NodeOpener, OpClaim, OpenCx};

impl Draft {
    /// The node that shows the same data as `node` and is not a filter.
    pub fn content(&self, node: &NodeName) -> NodeName {
        let mut at = node.clone();
        while let Some(next) =
            self.state.node(&at).and_then(|n| n.children.iter().find(|c| c.role == ChildRole::Filtered))
        {
            at = next.node.clone();
        }
        at
    }

    /// The nodes from `node` down through filters and backing links, itself first.
    pub fn chain(&self, node: &str) -> Vec<NodeName> {
        let mut out = Vec::new();
        let mut at = self.state.node(node).map(|n| n.def.name.clone());
        while let Some(name) = at {
            let next = self.state.node(&name).and_then(|n| {
                n.children.iter().find(|c| matches!(c.role, ChildRole::Filtered | ChildRole::Backing))
            });
            at = next.map(|c| c.node.clone());
            out.push(name);
        }
        out
    }

    /// The images of the chain of `node`, filters left out.
    pub fn images(&self, node: &str) -> Vec<NodeName> {
        let is_image = |n: &NodeName| self.content(n) == *n;
        self.chain(node).into_iter().filter(is_image).collect()
    }

    /// The nodes that have `node` as their backing file, directly or through filters.
    pub fn overlays(&self, node: &NodeName) -> Vec<NodeName> {
        let content = self.content(node);
        let over = |n: &&DraftNode| {
            n.children.iter().any(|c| c.role == ChildRole::Backing && self.content(&c.node) == content)
        };
        self.state.nodes.iter().filter(over).map(|n| n.def.name.clone()).collect()
    }

    /// Whether the node may be written as far as its own options go.
    pub fn is_read_only(&self, node: &str) -> bool {
        self.state.node(node).is_some_and(|n| n.def.flags.read_only || n.forced_read_only)
    }

    /// The filters that operations have interposed on `node`, innermost first.
    pub fn interposed(&self, node: &NodeName) -> Vec<NodeName> {
        self.state.over.get(node).cloned().unwrap_or_default()
    }

    /// The nodes above `node` whose data change when its data do, itself included.
    pub fn readers(&self, node: &NodeName) -> Vec<NodeName> {
        let mut out = vec![node.clone()];
        let mut next = 0;
        while let Some(at) = out.get(next).cloned() {
            next += 1;
            for n in &self.state.nodes {
                let reads = n.children.iter().any(|c| c.node == at && c.role != ChildRole::Target);
                if reads && !out.contains(&n.def.name) {
                    out.push(n.def.name.clone());
                }
            }
        }
        out
    }

    /// Moves every parent and user of `old` (or of the outermost filter interposed on it)
    /// to `new`, except nodes that `new` reaches and what is attached below filters on
    /// purpose. For a snapshot, where `new` lies over `old`, and for a pivot.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn replace(&mut self, old: &str, new: &str) -> Result<()> {
        let old = self.resolve(old)?;
        let new = self.resolve(new)?;
        let spared: Vec<NodeName> = self
            .state
            .nodes
            .iter()
            .map(|n| n.def.name.clone())
            .filter(|n| self.state.reaches(&new, n))
            .collect();
        for node in &mut self.state.nodes {
            if !spared.contains(&node.def.name) {
                for c in node.children.iter_mut().filter(|c| c.node == old) {
                    c.node = new.clone();
                }
            }
        }
        for user in self.state.users.iter_mut().filter(|u| u.node == old && !u.below_filters) {
            user.node = new.clone();
        }
        Ok(())
    }

    /// Links a backing child that the caller has found to be the right one, without looking
    /// for filters that stand on it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn set_backing_link(&mut self, parent: &NodeName, child: Option<&str>) -> Result<()> {
        match child {
            Some(child) => self.link(parent, "backing", ChildRole::Backing, child),
            None => {
                self.unlink(parent, "backing");
                Ok(())
            }
        }
    }

    /// Makes a node writable or read-only, with the nodes that hold its data (not its
    /// backing file). Returns those that this changes. The drivers are reopened when the
    /// draft is prepared.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn set_read_only(&mut self, node: &str, read_only: bool) -> Result<Vec<NodeName>> {
        let mut changed = Vec::new();
        let mut todo = vec![self.state.node(node).ok_or_else(|| no_such_node(node))?.def.name.clone()];
        while let Some(name) = todo.pop() {
            let i = self.state.index(&name);
            let node = &mut self.state.nodes[i];
            todo.extend(
                node.children.iter().filter(|c| c.role != ChildRole::Backing).map(|c| c.node.clone()),
            );
            if node.def.flags.read_only != read_only || (!read_only && node.forced_read_only) {
                node.mark_read_only(read_only);
                changed.push(name);
            }
        }
        Ok(changed)
    }

    /// Makes nodes read-only again that [`Draft::set_read_only`] has changed, except those
    /// that somebody else has come to write meanwhile.
    pub fn restore_read_only(&mut self, nodes: &[NodeName]) {
        for name in nodes {
            let Some(i) = self.state.nodes.iter().position(|n| n.def.name == *name) else { continue };
            if self.state.nodes[i].def.flags.read_only {
                continue;
            }
            let before = self.state.nodes[i].clone();
            self.state.nodes[i].mark_read_only(true);
            if self.solve().is_err() {
                self.state.nodes[i] = before;
            }
        }
    }

    /// Claims what a change of `node`'s data for other ones needs: V on it and on all that
    /// read through it. `why` completes "the change ...".
    ///
    /// # Errors
    /// `NotFound`, for the operation.
    pub fn claim_other_data(&mut self, op: &OpId, node: &NodeName, why: &str) -> Result<()> {
        for name in self.readers(node) {
            self.add_claim(OpClaim {
                op: op.clone(),
                node: name,
                claim: Claim { needs: Actions::V, allows: Actions::EVERY },
                scope: ClaimScope::Node,
                why: why.to_owned(),
                pins: false,
            })?;
        }
        Ok(())
    }

    /// Opens the drivers of nodes whose options have changed, children first.
    pub(crate) async fn reopen_drivers(&mut self, rt: &Rt) -> Result<()> {
        while let Some(i) = self.next_to_reopen() {
            let node = &self.state.nodes[i];
            let (name, kind) = (node.def.name.clone(), node.def.kind);
            let Some(old) = node.driver.clone() else { return Ok(()) };
            let mut options = Options::from_value(node.def.options.clone())?;
            options.take_str("driver")?;
            let common = Common::take(&mut options)?;
            let parsed = (kind.parse)(&mut options, &common)?;
            // A format may write as soon as it is opened for writing: locks first.
            self.tell(rt).await?;
            let edges = self.edges_of(&name)?;
            let cx = OpenCx { name: &name, children: &edges, common: &common, replaces: Some(&old), rt };
            let opened = parsed.open.open(cx).await.context(|| format!("node '{name}' can't be reopened"))?;
            let forced = common.auto_read_only && !common.flags.read_only && {
                let node = self.probe_node(&name, opened.driver.clone(), &edges);
                opened.driver.describe(&node).read_only
            };
            drop(edges);
            self.prepared.extend(opened.effect);
            self.set_driver(&name, opened.driver, forced);
            self.state.nodes[i].reopening = false;
        }
        Ok(())
    }

    /// The next node to be reopened: one with no such node below it.
    fn next_to_reopen(&self) -> Option<usize> {
        let nodes = &self.state.nodes;
        (0..nodes.len()).find(|&i| {
            let me = &nodes[i];
            me.reopening
                && nodes.iter().all(|n| {
                    !n.reopening
                        || n.def.name == me.def.name
                        || !self.state.reaches(&me.def.name, &n.def.name)
                })
        })
    }
}

impl DraftNode {
    fn mark_read_only(&mut self, read_only: bool) {
        self.def.flags.read_only = read_only;
        self.forced_read_only = false;
        self.reopening = true;
        if let Value::Map(options) = &mut self.def.options {
            options.retain(|(k, _)| k != "read-only" && (read_only || k != "force-share"));
            options.push(("read-only".into(), read_only.into()));
        }
        // Only a reader may share with everybody.
        self.def.flags.force_share &= read_only;
    }
}

impl NodeOpener<'_> {
    /// Gives a node that is in the draft other options, and other children where the
    /// options say so, as operation `op`: what that needs is claimed, and the claims stay
    /// until the operation is removed. `options` are complete (what is missing gets its
    /// default), with `node-name` and `driver`; children are named, or defined anew, or
    /// defined with their own `node-name` to be reopened in turn.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` when something can't be changed; what opening says. The
    /// draft is then of no more use.
    pub fn reopen<'b>(
        &'b self,
        draft: &'b mut Draft,
        op: &'b OpId,
        options: Options,
    ) -> LocalFuture<'b, Result<()>> {
        Box::pin(self.reopen_inner(draft, op, options))
    }

    async fn reopen_inner(&self, draft: &mut Draft, op: &OpId, mut options: Options) -> Result<()> {
        let Some(name) = options.take_str("node-name")? else {
            return Err(Error::new(ErrorKind::InvalidInput, "node-name not specified"));
        };
        let Some(node) = draft.state.node(&name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            )
            .remedy("query-named-block-nodes lists the nodes there are"));
        };
        let (name, kind, auto) = (node.def.name.clone(), node.def.kind, node.def.options.clone());
        if let Some(driver) = options.take_str("driver")?
            && driver != kind.name
        {
            return Err(Error::new(ErrorKind::InvalidInput, "Cannot change the option 'driver'").remedy(
                format!("node '{name}' has driver '{}': add another node and link that instead", kind.name),
            ));
        }
        let mut described = options.clone().with("driver", kind.name);
        if let (true, Value::Map(old)) = (node.def.anonymous, &auto)
            && !old.iter().any(|(k, _)| k == "node-name")
        {
            // Its name was made up; it is not one of its options.
            described.take("node-name");
        } else {
            described.set("node-name", name.as_str());
        }
        let common = Common::take(&mut options)?;
        let parsed = (kind.parse)(&mut options, &common)?;
        options.finish(&format!("driver '{}'", kind.name))?;
        let image_backing = node.driver.as_ref().and_then(|d| {
            let probe = draft.built_node(&name).ok()?;
            d.describe(&probe).backing
        });

        let mut other_data = false;
        for child in parsed.children {
            let now = draft.child(&name, child.name).cloned();
            let to = match child.def {
                ChildDef::None => None,
                ChildDef::FromImage => {
                    if now.is_some() || (child.role == ChildRole::Backing && image_backing.is_some()) {
                        return Err(Error::new(
                            ErrorKind::InvalidInput,
                            format!("{} is missing for '{name}'", child.name),
                        )
                        .remedy(format!(
                            "name the {} node, or say that there is to be none (null)",
                            child.name
                        )));
                    }
                    None
                }
                ChildDef::Reference(n) => Some(draft.resolve(&n)?),
                ChildDef::Inline(mut inline) => match &now {
                    Some(now) if inline.get("node-name").is_none_or(|n| *n == Value::from(now.as_str())) => {
                        inline.set("node-name", now.as_str());
                        self.reopen(draft, op, inline).await?;
                        Some(now.clone())
                    }
                    _ => {
                        let from: Inherited = below(&common, parsed.rule, child.role, 0);
                        Some(self.node(draft, inline, false, None, from).await?)
                    }
                },
            };
            if to == now {
                continue;
            }
            let same = match (&now, &to) {
                (Some(now), Some(to)) => draft.content(now) == draft.content(to),
                _ => false,
            };
            other_data |= !same;
            match &to {
                Some(to) => draft.link(&name, child.name, child.role, to)?,
                None => draft.unlink(&name, child.name),
            }
        }
        if other_data {
            draft.add_claim(OpClaim {
                op: op.clone(),
                node: name.clone(),
                claim: Claim { needs: Actions::G, allows: Actions::EVERY },
                scope: ClaimScope::Node,
                why: "gives it other children".into(),
                pins: false,
            })?;
        }
        let i = draft.state.index(&name);
        let before = size_of(draft, &name);
        let node = &mut draft.state.nodes[i];
        node.def.flags = common.flags;
        node.def.rule = parsed.rule;
        node.def.options = described.into_value();
        node.forced_read_only = false;
        node.reopening = true;
        draft.reopen_drivers(self.rt).await?;
        let size_changes = size_of(draft, &name) != before;
        if size_changes {
            for name in draft.readers(&name) {
                draft.add_claim(OpClaim {
                    op: op.clone(),
                    node: name,
                    claim: Claim { needs: Actions::S, allows: Actions::EVERY },
                    scope: ClaimScope::Node,
                    why: "changes its size".into(),
                    pins: false,
                })?;
            }
        }
        let offset = |v: &Value| Options::from_value(v.clone()).ok().and_then(|o| o.get("offset").cloned());
        let moved = offset(&auto) != offset(&draft.state.nodes[i].def.options);
        if other_data || size_changes || moved {
            draft.claim_other_data(op, &name, "changes what it reads as")?;
        }
        draft.remove_op(&driver_op(&name));
        if let Some(bottom) = &parsed.relies_down_to {
            draft.rely_down_to(&name, bottom)?;
        }
        Ok(())
    }
}

/// The size of a node of the candidate, where it can be said already.
fn size_of(draft: &Draft, name: &NodeName) -> Option<u64> {
    draft.built_node(name).ok().map(|n| n.size())
}
