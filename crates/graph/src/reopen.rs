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

use std::collections::BTreeSet;
use std::sync::Arc;

use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, ResultExt, Value,
};

use crate::draft::driver_op;
use crate::open::{Inherited, below, inherit};
use crate::state::DraftNode;
use crate::{
    AccessRule, ChildDef, ClaimScope, Class, Common, Draft, Node, NodeFlags, NodeOpener, OpClaim, OpenCx,
};

impl Draft {
    /// Moves every parent and user of `old` (or of the outermost filter interposed on it)
    /// to `new`, except nodes that `new` reaches and what is attached below filters on
    /// purpose. For a snapshot, where `new` lies over `old`, and for a pivot.
    ///
    /// Filters that move have nothing of their own to write out: what went through them is durable if it has to be
    /// (what an overlay leaves behind is flushed, what a job has copied was), so they are like users.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn replace(&mut self, old: &str, new: &str) -> Result<()> {
        let old = self.resolve(old)?;
        let new = self.resolve(new)?;
        self.take_in([old.as_str(), new.as_str()]);
        let below: BTreeSet<NodeName> = self.state.below(&new).into_iter().cloned().collect();
        let moved = self.state.nodes.relink(&old, &new, |n| below.contains(&n.def.name));
        let filters = moved.into_iter().filter(|(_, role)| *role == ChildRole::Filtered);
        self.unflushed.extend(filters.map(|(name, _)| name));
        self.move_users(&old, &new);
        Ok(())
    }

    /// Moves the users of `old` to `new`, but for what an operation does through its own
    /// filter.
    pub(crate) fn move_users(&mut self, old: &NodeName, new: &NodeName) {
        let owner = self.state.node(old).and_then(|n| n.def.owner.clone());
        let stays = |u: &crate::state::DraftUser| u.below_filters || Some(&u.op) == owner.as_ref();
        for user in self.state.users.iter_mut().filter(|u| u.node == *old && !stays(u)) {
            user.node = new.clone();
        }
    }

    /// Links a backing child that the caller has found to be the right one, without looking
    /// for filters that stand on it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn set_backing_link(&mut self, parent: &NodeName, child: Option<&str>) -> Result<()> {
        match child {
            Some(child) => {
                let child = self.find(child)?;
                self.link_exactly(parent, "backing", ChildRole::Backing, child)
            }
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
        let mut todo = vec![self.find(node)?];
        self.take_in([node]);
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
            self.take_in([name.as_str()]);
            let Some(i) = self.state.nodes.position(name) else { continue };
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

    /// The nodes that are shorter than before, with another driver.
    ///
    /// # Errors
    /// The solver's.
    pub fn shrunk(&self) -> Result<Vec<NodeName>> {
        let built = self.solved()?.nodes.clone();
        let is = |old: &&Arc<Node>| {
            built.get(&old.name).is_some_and(|new| {
                Arc::ptr_eq(&new.state, &old.state)
                    && !Arc::ptr_eq(&new.driver, &old.driver)
                    && new.size() < old.size()
            })
        };
        Ok(self.published.iter().filter(is).map(|n| n.name.clone()).collect())
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
            let edges = self.edges_for_opening(&name)?;
            let replaces = (!self.state.nodes[i].other_image).then_some(&old);
            let cx = OpenCx { name: &name, children: &edges, common: &common, replaces, rt };
            let opened = parsed.open.open(cx).await.context(|| format!("node '{name}' can't be reopened"))?;
            let forced = self.judge_opened(&name, &opened, &edges, &common)?;
            drop(edges);
            self.put_opened(&name, opened, forced);
            let node = &mut self.state.nodes[i];
            (node.reopening, node.other_image, node.retell) = (false, false, true);
        }
        Ok(())
    }

    /// Makes a node inactive, or active again, with what is below it; all nodes if none is
    /// named. An inactive node has written out everything, holds no locks and serves no
    /// requests, until it is activated: then it takes its locks and reads its image anew.
    ///
    /// A node below goes along if nothing that is active stands on it. Drivers are reopened
    /// when the draft is prepared; [`Draft::solve`] refuses what is still in use.
    ///
    /// # Errors
    /// `NotFound`; `Busy` for a node with an active parent.
    pub fn set_active(&mut self, node: Option<&str>, active: bool) -> Result<()> {
        let roots: Vec<NodeName> = match node {
            Some(name) => {
                self.take_in([name]);
                vec![self.find(name)?]
            }
            None => {
                self.take_in_all();
                self.state.nodes.iter().map(|n| n.def.name.clone()).collect()
            }
        };
        if active {
            let mut todo = roots;
            while let Some(name) = todo.pop() {
                let i = self.state.index(&name);
                todo.extend(self.state.nodes[i].children.iter().map(|c| c.node.clone()));
                self.state.nodes[i].mark_active(true);
            }
            return Ok(());
        }
        if node.is_none() {
            (0..self.state.nodes.len()).for_each(|i| self.state.nodes[i].mark_active(false));
            return Ok(());
        }
        let mut todo = roots;
        let mut first = true;
        while let Some(name) = todo.pop() {
            let parent = self
                .state
                .nodes
                .iter()
                .find(|n| !n.def.flags.inactive && n.children.iter().any(|c| c.node == name));
            if let Some(parent) = parent {
                if first {
                    let mut text = format!("Node has active parent node '{}'", parent.def.name);
                    let mut remedy =
                        "make the parent inactive instead; what is below it goes along".to_owned();
                    let owner = parent.def.owner.as_ref();
                    if let Some(o) = self.state.ops.iter().find(|o| owner == Some(&o.id)) {
                        text += &format!(" of {} '{}' ({})", o.kind, o.id, o.detail);
                        remedy = o.ends_with.clone().unwrap_or(remedy);
                    }
                    return Err(Error::new(ErrorKind::Busy, text).remedy(remedy));
                }
                continue;
            }
            first = false;
            let i = self.state.index(&name);
            todo.extend(self.state.nodes[i].children.iter().map(|c| c.node.clone()));
            self.state.nodes[i].mark_active(false);
        }
        Ok(())
    }

    /// The published nodes that have another size in the candidate.
    fn resized(&self) -> Result<Vec<NodeName>> {
        let built = self.solved()?.nodes.clone();
        // Compared as they are now: a file may be growing while its successor is opened.
        let differs =
            |old: &&std::sync::Arc<Node>| built.get(&old.name).is_some_and(|n| n.size() != old.size());
        Ok(self.published.iter().filter(differs).map(|n| n.name.clone()).collect())
    }

    /// The next node to be reopened: one with no such node below it.
    fn next_to_reopen(&self) -> Option<usize> {
        let nodes = &self.state.nodes;
        let mut next = (0..nodes.len()).find(|&i| nodes[i].reopening)?;
        // Down to the last one. What was passed has none but those that were passed as well, and there are no cycles.
        let mut todo: Vec<&NodeName> = nodes[next].children.iter().map(|c| &c.node).collect();
        let mut seen = BTreeSet::new();
        while let Some(name) = todo.pop() {
            if !seen.insert(name) {
                continue;
            }
            let i = self.state.index(name);
            if nodes[i].reopening {
                next = i;
                todo.clear();
                seen.clear();
            }
            todo.extend(nodes[i].children.iter().map(|c| &c.node));
        }
        Some(next)
    }
}

impl DraftNode {
    fn mark_active(&mut self, active: bool) {
        if self.def.flags.inactive != active {
            return;
        }
        self.def.flags.inactive = !active;
        // A leaf that a program has put there itself has no options to be opened with.
        self.reopening = self.def.options != Value::Null;
        if let Value::Map(options) = &mut self.def.options {
            options.retain(|(k, _)| k != "active");
            if !active {
                options.push(("active".into(), false.into()));
            }
        }
    }

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

/// What becomes of one node.
struct Renewal {
    name: NodeName,
    common: Common,
    rule: AccessRule,
    options: Value,
    inherits: Vec<&'static str>,
    links: Vec<Link>,
    relies_down_to: Option<NodeName>,
}

/// A child as it is to be.
struct Link {
    name: &'static str,
    role: ChildRole,
    to: Option<NodeName>,
}

/// Why a node is given other options.
#[derive(Clone, Copy, PartialEq)]
enum Cause {
    /// Somebody said which ones.
    Asked,
    /// Its parent has changed, and it follows.
    Follows,
}

impl NodeOpener<'_> {
    /// Gives nodes that are in the draft other options, and other children where the
    /// options say so, all in one step, as operation `op`: what that needs is claimed, and
    /// the claims stay until the operation is removed. Options are complete (what is missing
    /// gets its default), with `node-name` and `driver`; children are named, or defined anew,
    /// or defined with their own `node-name` (or none) to be reopened in turn. A child that
    /// was defined inside its parent follows it where its own definition says nothing.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` when something can't be changed; what opening says. The
    /// draft is then of no more use.
    pub async fn reopen(&self, draft: &mut Draft, op: &OpId, nodes: Vec<Options>) -> Result<()> {
        let mut renewals = Vec::new();
        for options in nodes {
            self.renewal(draft, options, None, Cause::Asked, &mut renewals).await?;
        }
        self.renew(draft, op, renewals).await
    }

    fn renewal<'b>(
        &'b self,
        draft: &'b mut Draft,
        options: Options,
        from: Option<Inherited>,
        cause: Cause,
        out: &'b mut Vec<Renewal>,
    ) -> LocalFuture<'b, Result<()>> {
        Box::pin(self.renewal_inner(draft, options, from, cause, out))
    }

    /// Finds out what a node is to become, children first. Nodes that are defined anew are
    /// opened; nothing else is changed.
    async fn renewal_inner(
        &self,
        draft: &mut Draft,
        mut options: Options,
        from: Option<Inherited>,
        cause: Cause,
        out: &mut Vec<Renewal>,
    ) -> Result<()> {
        let Some(name) = options.take_str("node-name")? else {
            return Err(Error::new(ErrorKind::InvalidInput, "node-name not specified"));
        };
        draft.take_in([name.as_str()]);
        let Some(node) = draft.state.node(&name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            )
            .remedy("query-named-block-nodes lists the nodes there are"));
        };
        if let Some(owner) = &node.def.owner {
            return Err(Error::new(ErrorKind::Busy, format!("Node {name} belongs to operation '{owner}'"))
                .remedy("it goes when the operation ends"));
        }
        let (name, kind, old) = (node.def.name.clone(), node.def.kind, node.def.options.clone());
        if let Some(driver) = options.take_str("driver")?
            && driver != kind.name
        {
            return Err(Error::new(ErrorKind::InvalidInput, "Cannot change the option 'driver'").remedy(
                format!("node '{name}' has driver '{}': add another node and link that instead", kind.name),
            ));
        }
        // A guessed format stays a guess.
        for hidden in ["x-probed", "x-beneath"] {
            if let Some(v) = member(&old, hidden)
                && !options.has(hidden)
            {
                options.set(hidden, v.clone());
            }
        }
        let inherits = from.map(|from| inherit(&mut options, from)).unwrap_or_default();
        let mut described = options.clone().with("driver", kind.name);
        // A made-up name is not one of its options.
        if !node.def.anonymous || member(&old, "node-name").is_some() {
            described.set("node-name", name.as_str());
        }
        let active = !node.def.flags.inactive;
        let image_backing = node.driver.as_ref().and_then(|d| {
            let probe = draft.built_node(&name).ok()?;
            d.describe(&probe).backing
        });
        let mut common = Common::take(&mut options)?;
        let parsed = (kind.parse)(&mut options, &common)?;
        options.finish(&format!("driver '{}'", kind.name))?;
        if cause == Cause::Follows || member(&described.clone().into_value(), "active").is_none() {
            common.flags.inactive = !active;
            if !active {
                described.set("active", false);
            }
        } else if common.flags.inactive == active {
            return Err(Error::new(ErrorKind::InvalidInput, "Cannot change the option 'active'")
                .remedy("use blockdev-set-active"));
        }

        // A node that nobody named follows in its options, never in its links: what it was
        // defined with may be long past (a snapshot has linked its backing file since).
        let children = match cause {
            Cause::Asked => parsed.children,
            Cause::Follows => Vec::new(),
        };
        let mut links = match cause {
            Cause::Asked => Vec::new(),
            Cause::Follows => self.keep_links(draft, &name, &common, parsed.rule, out).await?,
        };
        for child in children {
            let now = draft.child(&name, child.name).cloned();
            let beneath = below(&common, parsed.rule, child.role, 0);
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
                ChildDef::Reference(n) => {
                    // A link that leads below a job's filter on purpose stays where it is.
                    let to = match &now {
                        Some(now) if *now == n => n,
                        _ => draft.resolve(&n)?,
                    };
                    if Some(&to) == now.as_ref() {
                        self.follow(draft, &to, beneath, out).await?;
                    }
                    Some(to)
                }
                ChildDef::Inline(mut inline) => match &now {
                    Some(now) if inline.get("node-name").is_none_or(|n| *n == Value::from(now.as_str())) => {
                        inline.set("node-name", now.as_str());
                        self.renewal(draft, inline, Some(beneath), cause, out).await?;
                        Some(now.clone())
                    }
                    _ => Some(self.node(draft, inline, false, None, beneath).await?),
                },
            };
            links.push(Link { name: child.name, role: child.role, to });
        }
        out.push(Renewal {
            name,
            common,
            rule: parsed.rule,
            options: described.into_value(),
            inherits,
            links,
            relies_down_to: parsed.relies_down_to,
        });
        Ok(())
    }

    /// The links of a node as they are; its children follow in turn.
    async fn keep_links(
        &self,
        draft: &mut Draft,
        name: &NodeName,
        common: &Common,
        rule: AccessRule,
        out: &mut Vec<Renewal>,
    ) -> Result<Vec<Link>> {
        let children = draft.state.node(name).map(|n| n.children.clone()).unwrap_or_default();
        let mut links = Vec::with_capacity(children.len());
        for c in children {
            self.follow(draft, &c.node, below(common, rule, c.role, 0), out).await?;
            links.push(Link { name: c.name, role: c.role, to: Some(c.node) });
        }
        Ok(links)
    }

    /// Lets a child that was defined inside its parent have the parent's options where its
    /// definition says nothing.
    async fn follow(
        &self,
        draft: &mut Draft,
        child: &NodeName,
        from: Inherited,
        out: &mut Vec<Renewal>,
    ) -> Result<()> {
        let Some(node) = draft.node(child) else { return Ok(()) };
        let parents =
            draft.around(child).nodes.iter().filter(|n| n.children.iter().any(|c| c.node == *child));
        if node.def.monitor || node.def.owner.is_some() || node.inherits.is_empty() || parents.count() != 1 {
            return Ok(());
        }
        let mut options = Options::from_value(node.def.options.clone())?;
        for name in &node.inherits {
            options.take(name);
        }
        let mut then = options.clone();
        inherit(&mut then, from);
        let same = Common::take(&mut then)?.flags == NodeFlags { inactive: false, ..node.def.flags };
        if same || out.iter().any(|r| r.name == *child) {
            return Ok(());
        }
        options.set("node-name", child.as_str());
        self.renewal(draft, options, Some(from), Cause::Follows, out).await
    }

    /// Changes the draft as found out, opens the drivers, and claims what all that needs.
    async fn renew(&self, draft: &mut Draft, op: &OpId, renewals: Vec<Renewal>) -> Result<()> {
        // How things are, before the first of them changes.
        let before: Vec<Before> = renewals.iter().map(|r| Before::of(draft, &r.name)).collect();
        for r in &renewals {
            draft.remove_op(&driver_op(&r.name));
            let i = draft.state.index(&r.name);
            let node = &mut draft.state.nodes[i];
            // Linked again when none of the old links can be in the way.
            node.children.clear();
            node.def.flags = r.common.flags;
            node.def.rule = r.rule;
            node.def.options = r.options.clone();
            node.inherits = r.inherits.clone();
            node.forced_read_only = false;
            node.reopening = true;
        }
        for r in &renewals {
            for link in &r.links {
                if let Some(to) = link.to.clone() {
                    draft.link_exactly(&r.name, link.name, link.role, to)?;
                }
            }
        }
        let mut other_data = Vec::new();
        for (r, before) in renewals.iter().zip(&before) {
            let changed = before.other_contents(draft, r);
            let i = draft.state.index(&r.name);
            let node = &mut draft.state.nodes[i];
            // What a format has in memory belongs to the image in its old file.
            node.other_image = node.def.kind.class == Class::Format
                && changed.iter().any(|role| *role != ChildRole::Backing);
            if !changed.is_empty() {
                draft.add_claim(OpClaim {
                    op: op.clone(),
                    node: r.name.clone(),
                    claim: Claim { needs: Actions::G, allows: Actions::EVERY },
                    scope: ClaimScope::Node,
                    why: "gives it other children".into(),
                    pins: false,
                })?;
            }
            if !changed.is_empty() || before.window != window(draft, &r.name) {
                draft.claim_other_data(op, &r.name, "changes what it reads as")?;
                other_data.push(r.name.clone());
            }
        }
        draft.reopen_drivers(self.rt).await?;
        for name in draft.resized()? {
            draft.add_claim(OpClaim {
                op: op.clone(),
                node: name.clone(),
                claim: Claim { needs: Actions::S, allows: Actions::EVERY },
                scope: ClaimScope::Node,
                why: "changes its size".into(),
                pins: false,
            })?;
            if !other_data.contains(&name) {
                draft.claim_other_data(op, &name, "changes what it reads as")?;
            }
        }
        for r in &renewals {
            if let Some(bottom) = &r.relies_down_to {
                draft.rely_down_to(&r.name, bottom)?;
            }
            draft.guard_target(&r.name)?;
        }
        Ok(())
    }
}

/// A node before it is changed.
struct Before {
    /// Each child, and the image that it shows.
    contents: Vec<(&'static str, NodeName)>,
    window: (Option<Value>, Option<Value>),
}

impl Before {
    fn of(draft: &Draft, name: &NodeName) -> Before {
        let children = draft.state.node(name).map_or(&[][..], |n| &n.children);
        Before {
            contents: children.iter().map(|c| (c.name, draft.content(&c.node))).collect(),
            window: window(draft, name),
        }
    }

    /// The roles of the children that show another image now, or none, or that are new.
    fn other_contents(&self, draft: &Draft, r: &Renewal) -> Vec<ChildRole> {
        let changed = |l: &&Link| {
            let was = self.contents.iter().find(|(name, _)| *name == l.name).map(|(_, c)| c);
            was != l.to.as_ref().map(|to| draft.content(to)).as_ref()
        };
        r.links.iter().filter(changed).map(|l| l.role).collect()
    }
}

/// The part of its child that a node shows, where it is not all of it.
fn window(draft: &Draft, name: &NodeName) -> (Option<Value>, Option<Value>) {
    let options = draft.state.node(name).map(|n| &n.def.options);
    let of = |key: &str| options.and_then(|o| member(o, key)).cloned();
    (of("offset").filter(|v| *v != Value::from(0u64)), of("size"))
}

fn member<'a>(options: &'a Value, name: &str) -> Option<&'a Value> {
    match options {
        Value::Map(m) => m.iter().find(|(k, _)| k == name).map(|(_, v)| v),
        _ => None,
    }
}
