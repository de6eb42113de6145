//! Stand-ins for operations: the claims and edges of exports, jobs and instant commands on
//! a small chain of images, without anything that moves data.
//!
//! ```text
//!   top --file--> top-f        t1, t2, ov: images without a backing file,
//!    | backing                 each with its t1-f, t2-f, ov-f
//!   mid --file--> mid-f
//!    | backing
//!   base --file--> base-f
//! ```
//!
//! Each function is one row of the table of operations in the access-control design,
//! applied to a [`Draft`]; [`World::run`] publishes the draft or hands the refusal back.
//! Tests of the access control use them, and tests of real operations can start from
//! them: what a job claims is to be what its stand-in claims.

use std::sync::Arc;

use dolmen_graph::{
    AccessRule, ClaimScope, Class, Common, Cx, Draft, Driver, DriverKind, GraphOwner, Node, NodeDef,
    NodeFlags, Op, OpClaim, OpInfo, Parsed, Plan, Request,
};
use dolmen_rt::{Instant, LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Span, Value,
};

use crate::{Image, MEMORY, MemoryDisk};

const ALL: Actions = Actions::EVERY;

fn parse(_: &mut Options, _: &Common) -> Result<Parsed> {
    Err(Error::new(ErrorKind::InvalidInput, "a stand-in is made by the test, not from options"))
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $class:ident;)*) => { $(
        $(#[$doc])*
        pub static $name: DriverKind = DriverKind::new(
$text,
Class::$class,
"a stand-in that passes everything to its first child",
&[],
parse,
);
    )* };
}

kinds! {
    /// An image format with a file and perhaps a backing child.
    FORMAT = "qcow2", Format;
    /// A plain filter.
    RAW = "raw", Filter;
    /// Copy-on-read.
    COPY_ON_READ = "copy-on-read", Filter;
    /// Copy-before-write.
    COPY_BEFORE_WRITE = "copy-before-write", Filter;
    /// The filter of a mirror.
    MIRROR = "mirror_top", Filter;
    /// The filter of a backup.
    BACKUP = "backup_top", Filter;
    /// The filters of a commit.
    COMMIT = "commit_top", Filter;
}

/// A driver that passes everything to its first child.
#[derive(Debug)]
pub struct StandIn {
    kind: &'static DriverKind,
    rule: AccessRule,
}

impl StandIn {
    /// A driver with this registry row and this edge rule.
    pub fn new(kind: &'static DriverKind, rule: AccessRule) -> StandIn {
        StandIn { kind, rule }
    }
}

impl Driver for StandIn {
    fn kind(&self) -> &'static DriverKind {
        self.kind
    }

    dolmen_graph::pass_through! { 0: size, limits, status, event, prepare, close, image, describe }

    fn access_rule(&self) -> AccessRule {
        self.rule
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        Plan::pass(request, span)
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { cx.forward(0, op).await })
    }
}

/// Adds a node with its children and its driver. A node with an owner belongs to that
/// operation.
///
/// # Errors
/// What the draft says.
pub fn add(
    d: &mut Draft,
    name: &str,
    driver: impl Driver,
    owner: Option<&OpId>,
    children: &[(&'static str, ChildRole, &str)],
) -> Result<NodeName> {
    let name = NodeName::internal(name);
    d.add_node(NodeDef {
        name: name.clone(),
        anonymous: false,
        kind: driver.kind(),
        rule: driver.access_rule(),
        flags: NodeFlags::default(),
        owner: owner.cloned(),
        monitor: owner.is_none(),
        options: Value::Null,
    })?;
    for (child, role, node) in children {
        d.link(&name, child, *role, node)?;
    }
    d.set_driver(&name, Arc::new(driver), false);
    Ok(name)
}

/// Adds an image: a format node over a disk in memory named `NAME-f`.
///
/// # Errors
/// What the draft says.
pub fn add_image(d: &mut Draft, name: &str, size: u64, backing: Option<&str>) -> Result<NodeName> {
    let file = format!("{name}-f");
    add(d, &file, MemoryDisk::new(Image::new(size)), None, &[])?;
    let mut children = vec![("file", ChildRole::Metadata, file.as_str())];
    children.extend(backing.map(|b| ("backing", ChildRole::Backing, b)));
    add(d, name, StandIn::new(&FORMAT, AccessRule::FORMAT), None, &children)
}

/// The chain of the module's head, published, and the operations on it.
#[derive(Debug)]
pub struct World {
    /// The owner of the graph.
    pub owner: GraphOwner,
}

impl World {
    /// A new chain.
    ///
    /// # Errors
    /// What publishing says.
    pub async fn new(rt: &Rt) -> Result<World> {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        add_image(&mut d, "base", 1 << 20, None)?;
        add_image(&mut d, "mid", 1 << 20, Some("base"))?;
        add_image(&mut d, "top", 1 << 20, Some("mid"))?;
        for name in ["t1", "t2", "ov"] {
            add_image(&mut d, name, 1 << 20, None)?;
        }
        owner.commit(d).await?;
        Ok(World { owner })
    }

    /// Publishes what `step` makes of a draft. On an error the graph is as before.
    ///
    /// # Errors
    /// What the step or publishing says.
    pub async fn run(&mut self, step: impl FnOnce(&mut Draft) -> Result<()>) -> Result<()> {
        let mut d = self.owner.draft();
        step(&mut d)?;
        self.owner.commit(d).await.map(drop)
    }
}

/// The images below `node` through backing links, filters left out.
pub fn below(d: &Draft, node: &str) -> Vec<NodeName> {
    let mut out = Vec::new();
    let mut at = d.child(node, "backing");
    while let Some(name) = at {
        if d.kind(name).is_some_and(|k| k.class == Class::Filter) {
            at = d.child(name, "file");
        } else {
            out.push(name.clone());
            at = d.child(name, "backing");
        }
    }
    out
}

fn begin(d: &mut Draft, id: &str, kind: &str, detail: String, since: Option<Instant>) -> Result<OpId> {
    let op = OpId::internal(id);
    let ends_with = match kind {
        "export" => Some(format!("remove the export first (block-export-del '{id}')")),
        "job" => Some(format!("finish the job first (job-complete or job-cancel '{id}')")),
        _ => None,
    };
    let instead = detail.contains("writable").then(|| "export it read-only".to_owned());
    let op_info =
        OpInfo { id: op.clone(), kind: kind.into(), detail, since, ends_with, instead_of_writing: instead };
    d.add_op(op_info)?;
    Ok(op)
}

/// A job, since the start of the clock.
fn begin_job(d: &mut Draft, id: &str, detail: String) -> Result<OpId> {
    begin(d, id, "job", detail, Some(Instant::from_nanos(0)))
}

fn claim(d: &mut Draft, op: &OpId, node: &str, needs: Actions, denies: Actions, why: &str) -> Result<()> {
    d.add_claim(OpClaim {
        op: op.clone(),
        node: NodeName::internal(node),
        claim: Claim { needs, allows: ALL - denies },
        scope: ClaimScope::Node,
        why: why.into(),
        pins: true,
    })
}

/// An NBD export: everything but S is allowed to others.
///
/// # Errors
/// What the draft says; so for all that follow.
pub fn export(d: &mut Draft, id: &str, node: &str, writable: bool) -> Result<()> {
    let (detail, needs) =
        if writable { ("nbd, writable", Actions::D | Actions::V) } else { ("nbd, read-only", Actions::D) };
    let op = begin(d, id, "export", detail.into(), Some(Instant::from_nanos(0)))?;
    d.add_user(&op, node, Claim { needs, allows: ALL - Actions::S })
}

/// Stream into `device`, down to without `bottom`'s backing file.
pub fn stream(d: &mut Draft, id: &str, device: &str, bottom: Option<&str>) -> Result<()> {
    use Actions as A;
    let op = begin_job(d, id, format!("stream of '{device}'"))?;
    let filter =
        add(d, &format!("{id}-filter"), StandIn::new(&COPY_ON_READ, AccessRule::POPULATES), Some(&op), &[])?;
    d.interpose(&filter, "file", device)?;
    d.add_user(&op, &filter, Claim { needs: A::D, allows: ALL })?;
    let mut low = below(d, device);
    claim(d, &op, device, A::D | A::M | A::G, A::S | A::G, "relinks it when the stream ends")?;
    if let Some(at) = bottom.and_then(|b| low.iter().position(|n| n.as_str() == b)) {
        low.truncate(at + 1);
    }
    for n in low {
        claim(d, &op, &n, A::D, A::V | A::S | A::G, "copies from it")?;
    }
    Ok(())
}

/// Commit of `top` into `base`: as an active commit if asked, or if `top` has a writer.
pub fn commit(d: &mut Draft, id: &str, top: &str, base: &str, active: bool) -> Result<()> {
    use Actions as A;
    let active = active || d.total(top)?.needs.contains(A::V);
    let overlay = d.parents(top).into_iter().find(|(_, role)| *role == ChildRole::Backing).map(|(n, _)| n);
    let kind = if active { "active commit" } else { "commit" };
    let op = begin_job(d, id, format!("{kind} of '{top}' into '{base}'"))?;
    let rule = if active { AccessRule::COPIES_WRITES_DOWN } else { AccessRule::LETS_CHANGE };
    let filter = add(d, &format!("{id}-filter"), StandIn::new(&COMMIT, rule), Some(&op), &[])?;
    let between: Vec<NodeName> = below(d, top).into_iter().take_while(|n| n.as_str() != base).collect();
    if active {
        d.link(&filter, "target", ChildRole::Target, base)?;
    } else {
        d.keep_right(&op, &NodeName::internal(top))?;
    }
    d.interpose(&filter, "file", top)?;
    if active {
        d.add_user(&op, &filter, Claim { needs: A::D, allows: ALL })?;
        claim(d, &op, top, A::D | A::P, A::V | A::S | A::G | A::P, "commits it and replaces it at the end")?;
        for n in &between {
            claim(d, &op, n, A::D, A::D | A::V | A::S | A::G | A::P, "commits it, so that it gets stale")?;
        }
    } else {
        d.add_user_below_filters(&op, top, Claim { needs: A::D, allows: ALL })?;
        claim(
            d,
            &op,
            &filter,
            A::NONE,
            A::V | A::M | A::S,
            "commits what lies below, which must not change",
        )?;
        claim(d, &op, top, A::D, A::V | A::S | A::G | A::P, "commits it")?;
        if let Some(overlay) = overlay {
            claim(d, &op, &overlay, A::G, A::S | A::G, "relinks it when the commit ends")?;
        }
    }
    d.add_user_below_filters(&op, base, Claim { needs: A::V, allows: ALL })?;
    claim(d, &op, base, A::V | A::M, A::V | A::S | A::G | A::P, "commits into it")?;
    for n in below(d, base) {
        claim(d, &op, &n, A::NONE, A::S | A::G, "commits into an image that relies on it")?;
    }
    Ok(())
}

/// Mirror of `source` to `target`, in either copy mode.
pub fn mirror(d: &mut Draft, id: &str, source: &str, target: &str) -> Result<()> {
    use Actions as A;
    let op = begin_job(d, id, format!("mirror of '{source}'"))?;
    let filter =
        add(d, &format!("{id}-filter"), StandIn::new(&MIRROR, AccessRule::COPIES_WRITES), Some(&op), &[])?;
    let low = below(d, source);
    let beneath = d.resolve(source)?;
    d.interpose(&filter, "file", source)?;
    d.add_user(&op, &filter, Claim { needs: A::D, allows: ALL })?;
    claim(d, &op, &beneath, A::D | A::P, A::V | A::S | A::P, "reads it as its source")?;
    if beneath.as_str() != source {
        claim(d, &op, source, A::D | A::P, A::S | A::P, "reads it as its source")?;
    }
    for n in low {
        claim(d, &op, &n, A::D, A::V | A::S, "reads it as part of its source")?;
    }
    d.add_user(&op, target, Claim { needs: A::V, allows: ALL })?;
    claim(d, &op, target, A::V | A::M, A::V | A::D | A::S | A::P, "writes its copy to it")
}

/// Backup of `source` to `target`, perhaps with a bitmap of `source`.
pub fn backup(d: &mut Draft, id: &str, source: &str, target: &str, bitmap: Option<&str>) -> Result<()> {
    use Actions as A;
    let op = begin_job(d, id, format!("backup of '{source}'"))?;
    let low = below(d, source);
    let filter = add(
        d,
        &format!("{id}-filter"),
        StandIn::new(&BACKUP, AccessRule::SAVES_OLD_DATA_FOR_JOB),
        Some(&op),
        &[("target", ChildRole::Target, target)],
    )?;
    let beneath = d.resolve(source)?;
    d.interpose(&filter, "file", source)?;
    d.keep_right(&op, &NodeName::internal(target))?;
    d.add_user(&op, &filter, Claim { needs: A::D, allows: ALL })?;
    let why = "copies it as it was when the backup began";
    claim(d, &op, &beneath, A::D, A::V | A::S, why)?;
    if beneath.as_str() != source {
        claim(d, &op, source, A::D, A::S, why)?;
    }
    for n in low {
        claim(d, &op, &n, A::D, A::V, "copies it as part of its source")?;
    }
    claim(d, &op, target, A::V | A::M, A::V | A::S | A::P, "writes its copy to it")?;
    match bitmap {
        Some(bitmap) => bitmap_user(d, &op, source, bitmap),
        None => Ok(()),
    }
}

fn bitmap_user(d: &mut Draft, op: &OpId, node: &str, bitmap: &str) -> Result<()> {
    d.add_claim(OpClaim {
        op: op.clone(),
        node: NodeName::internal(node),
        claim: Claim { needs: Actions::M, allows: ALL - Actions::M },
        scope: ClaimScope::Bitmap(bitmap.into()),
        why: format!("uses its bitmap '{bitmap}'"),
        pins: false,
    })
}

/// An instant command with one claim, tried and ended.
fn instant(
    d: &mut Draft,
    id: &str,
    detail: String,
    claims: impl FnOnce(&mut Draft, &OpId) -> Result<()>,
) -> Result<()> {
    let op = begin(d, id, "command", detail, None)?;
    claims(d, &op)?;
    d.solve()?;
    d.remove_op(&op);
    Ok(())
}

/// A change of a bitmap.
pub fn change_bitmap(d: &mut Draft, id: &str, node: &str, bitmap: &str) -> Result<()> {
    instant(d, id, format!("change of bitmap '{bitmap}'"), |d, op| bitmap_user(d, op, node, bitmap))
}

/// A resize that makes the node longer.
pub fn resize(d: &mut Draft, id: &str, node: &str) -> Result<()> {
    instant(d, id, format!("resize of '{node}'"), |d, op| {
        claim(d, op, node, Actions::S, Actions::NONE, "changes its size")
    })
}

/// A resize that cuts off the node's end.
pub fn shrink(d: &mut Draft, id: &str, node: &str) -> Result<()> {
    instant(d, id, format!("resize of '{node}'"), |d, op| {
        let image = d.content(&NodeName::internal(node));
        d.mark_destructive(op)?;
        d.claim_other_data(op, &image, "cuts off its end")?;
        claim(d, op, node, Actions::S, Actions::NONE, "changes its size")
    })
}

/// An external snapshot: something is put above the node.
pub fn external_snapshot(d: &mut Draft, id: &str, node: &str) -> Result<()> {
    instant(d, id, format!("snapshot of '{node}'"), |d, op| {
        claim(d, op, node, Actions::P, Actions::NONE, "puts an overlay above it")
    })
}

/// A reopen that gives `node` another backing file, with other data as far as one knows.
pub fn relink_backing(d: &mut Draft, id: &str, node: &str, backing: &str) -> Result<()> {
    instant(d, id, format!("reopen of '{node}'"), |d, op| {
        let denies = Actions::NONE;
        claim(d, op, node, Actions::G | Actions::V, denies, "changes what it reads as")?;
        d.link(&NodeName::internal(node), "backing", ChildRole::Backing, backing)
    })
}

/// A copy-on-read node that a user puts over `node`; with `bottom` it relies on the chain
/// down to there.
pub fn copy_on_read(d: &mut Draft, name: &str, node: &str, bottom: Option<&str>) -> Result<()> {
    let driver = StandIn::new(&COPY_ON_READ, AccessRule::POPULATES);
    let name = add(d, name, driver, None, &[("file", ChildRole::Filtered, node)])?;
    match bottom {
        Some(bottom) => d.rely_down_to(&name, &NodeName::internal(bottom)),
        None => Ok(()),
    }
}

/// A copy-before-write node that a user puts over `node`.
pub fn copy_before_write(d: &mut Draft, name: &str, node: &str, target: &str) -> Result<()> {
    let driver = StandIn::new(&COPY_BEFORE_WRITE, AccessRule::SAVES_OLD_DATA);
    let children = [("file", ChildRole::Filtered, node), ("target", ChildRole::Target, target)];
    let name = add(d, name, driver, None, &children)?;
    d.guard_target(&name)
}

/// Checks that an error is a refusal with its four parts: node and action, both
/// operations, why, and a way out; as data and in the text. `asks` and `denies` are ids
/// that the parties must have, in their own name or as the operation behind an edge.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn assert_refused(error: &Error, node: &str, actions: Actions, asks: &str, denies: &str) {
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
    let c = error.conflict().unwrap_or_else(|| panic!("no parties: {error:?}"));
    let text = error.to_string();
    assert_eq!((c.node.as_str(), c.actions), (node, actions), "{text}");
    for (party, id) in [(&c.asks, asks), (&c.denies, denies)] {
        assert!(party.id == id || party.detail.contains(&format!("'{id}'")), "{party:?} is not {id}: {text}");
        assert!(!party.kind.is_empty() && text.contains(&party.to_string()), "{party:?}: {text}");
    }
    assert!(c.asks.needs.contains(actions), "who asks needs it: {text}");
    assert!(!c.denies.allows.intersects(actions), "who denies does not allow it: {text}");
    assert!(text.contains(&format!("node '{node}'")), "{text}");
    for a in actions.iter() {
        assert!(text.contains(a.phrase()), "{text}");
    }
    assert!(!c.why.is_empty() && text.contains(&c.why), "{text}");
    assert!(!c.remedies.is_empty() && c.remedies.iter().all(|r| !r.is_empty()), "{text}");
    for r in &c.remedies {
        // The first one begins a sentence.
        assert!(text.contains(&r[1..]), "{text}");
    }
}

/// The registry rows of the stand-ins and of the disk in memory.
pub static KINDS: [&DriverKind; 8] =
    [&MEMORY, &FORMAT, &RAW, &COPY_ON_READ, &COPY_BEFORE_WRITE, &MIRROR, &BACKUP, &COMMIT];
