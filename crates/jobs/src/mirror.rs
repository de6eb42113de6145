//! `blockdev-mirror`: a copy of a node that follows what is written to it, and may take its place.
//!
//! ```text
//!   guest   overlay                       guest   overlay
//!       \   /                                 \   /
//!     mirror_top ----target----> t    --->      t        source   (if the user completes it)
//!         |                              end
//!       source
//! ```
//!
//! The copying is in [`mirror_core`](crate::mirror_core), what the filter does in
//! [`mirror_filter`](crate::mirror_filter); here are the claims and the pivot.
//!
//! What it claims: the data of the whole chain of the source must not change but through the filter, or
//! the target would not get it; the target is nobody else's to read (it is half-way) or to write.
//! Neither may be resized. At the end the parents of the source move (P).

use dolmen_copy::Route;
use dolmen_graph::{
    AccessRule, Draft, Node, NodeDef, NodeFlags, UserEdge, content, first_allocated, same_chain,
};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result,
    Value,
};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::claims::{claim, claim_beneath, claim_target, known};
use crate::mirror_core::{COPY_MODES, Core, CoreOptions, Sync, invalid};
use crate::mirror_filter::{MIRROR_TOP, MirrorFilter};
use crate::pivot::Overlays;
use crate::{BLOCK_JOB, BeginCx, Details, Ending, JobCx, JobKind, OnError, SettleCx, Work};

/// A mirror.
#[derive(Debug)]
pub struct Mirror {
    source: String,
    target: String,
    replaces: Option<String>,
    filter_name: Option<NodeName>,
    core: Core,
    overlays: Overlays,
    /// Where the target held data of its own at the start, unless it gets everything.
    had_data: Cell<Option<u64>>,
    /// The target had no backing file at the start.
    over_nothing: Cell<bool>,
    /// What the source lay over at the start. The job claims that it does not change, so a target over the same
    /// images is right even if the source itself needs them no more (a stream).
    below: RefCell<Option<Arc<Node>>>,
}

impl Mirror {
    /// A mirror from the options of `blockdev-mirror`, without those that all jobs have.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub fn from_options(o: &mut Options) -> Result<Mirror> {
        Ok(Mirror {
            source: o.require_str("device")?,
            target: o.require_str("target")?,
            replaces: o.take_str("replaces")?,
            filter_name: filter_name(o)?,
            core: Core::new(CoreOptions::take(o)?),
            overlays: Overlays::default(),
            had_data: Cell::new(None),
            over_nothing: Cell::new(false),
            below: RefCell::new(None),
        })
    }

    fn route(&self, edge: Arc<UserEdge>) -> Result<Route> {
        Ok(Route::Filter { edge, driver: self.core.filter()? })
    }

    fn put(&self, op: &OpId, d: &mut Draft) -> Result<()> {
        use Actions as A;
        let source = known(d, &self.source)?;
        let target = known(d, &self.target)?;
        if source == target || d.content(&source) == d.content(&target) {
            return Err(invalid("Can't mirror node into itself").remedy("name another node as the target"));
        }
        // When that operation ends, its users may go elsewhere, and what is written from then on would be missed.
        if let Some(owner) = d.owner_of(&source) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("node '{source}' belongs to operation '{owner}' and goes with it"),
            )
            .remedy("mirror the node that it stands on when that operation has ended"));
        }
        let everything = *self.core.sync() != Sync::None;
        if everything && d.chain(&target).contains(&d.content(&source)) {
            return Err(invalid(format!(
                "target '{target}' lies over '{source}', which it would be a copy of"
            ))
            .remedy(
                "name a target with a chain of its own, or commit into an image instead (block-commit)",
            ));
        }
        let replaced = match &self.replaces {
            None => source.clone(),
            Some(name) => self.replaceable(d, name, &source)?,
        };
        let probe = d.built_node(&source)?;
        let limits = d.built_node(&target).map(|n| n.driver.limits(&n))?;
        // The first image is the source itself, or the edges of the filters above it guard it: what
        // passes the job's filter arrives there.
        let low: Vec<NodeName> = d.images(&source).into_iter().skip(1).collect();
        // What the filter will stand on: the source itself, or what others have put on it.
        let beneath = d.resolve(&source)?;
        let driver = self.core.make_filter(AccessRule::COPIES_WRITES, probe.size(), limits.cluster_size);
        drop(probe);
        let filter = add_filter(d, op, self.filter_name.as_ref(), driver)?;
        d.link(&filter, "target", ChildRole::Target, &target)?;
        d.interpose(&filter, "file", &source)?;
        d.add_user_below_filters(op, &filter, Claim { needs: A::D, allows: A::EVERY })?;
        // What lies over the filter may not change the size, either, as the format of an image does with its file: what is
        // written behind the end that the copy knows would be missing in it.
        claim(d, op, &filter, A::NONE, A::S, "reads it as its source")?;
        claim(d, op, &beneath, A::D, A::V | A::S | A::P, "reads it as its source")?;
        if beneath != source {
            claim(d, op, &source, A::D, A::S | A::P, "reads it as its source")?;
        }
        claim(d, op, &replaced, A::P, A::NONE, "replaces it at the end")?;
        for n in &low {
            claim(d, op, n, A::D, A::V | A::S, "reads it as part of its source")?;
        }
        claim_beneath(d, op, &source, A::S, "reads it as its source")?;
        // An overlay that is put over the target would get the rest of the copy, and the target would take the source's place.
        let denies = A::V | A::D | A::S | A::P;
        claim_target(d, op, &target, A::V | A::M, denies, "writes its copy to it")?;
        self.overlays.put(op, d, &replaced)
    }

    /// Makes sure that the target reads like the source, so that it may take its place: what the mirror has not
    /// given it has to come from the same images below.
    fn reads_alike(&self, source: &Arc<Node>, target: &Arc<Node>) -> Result<()> {
        let (own, below) = (content(source), content(target).backing());
        let name = &self.target;
        let why = match &*self.core.sync() {
            Sync::Full if self.over_nothing.get() && below.is_some() => {
                format!(
                    "target '{name}' has got a backing file since the mirror began, which shows where the mirror wrote nothing \
                     because the source reads as zeroes"
                )
            }
            Sync::Full | Sync::Above(_) => return Ok(()),
            Sync::Top if below.is_none() => format!(
                "target '{name}' has no backing file, and this mirror has not given it all data of '{}': the rest would \
                 read as what the target held, or as zeroes",
                self.source
            ),
            Sync::Top
                if same_chain(own.backing(), below) || same_chain(self.below.borrow().as_ref(), below) =>
            {
                return Ok(());
            }
            Sync::Top => format!(
                "target '{name}' lies over other images than '{}' does, and this mirror has given it only what '{}' itself holds",
                self.source, self.source
            ),
            Sync::None if self.had_data.get().is_some() => format!(
                "target '{name}' held data of its own when the mirror began, and this mirror has given it only what was written since"
            ),
            Sync::None if below.is_none() => format!(
                "target '{name}' has no backing file, and this mirror has not given it all data of '{}': the rest would \
                 read as what the target held, or as zeroes",
                self.source
            ),
            Sync::None if below.is_some_and(|b| Arc::ptr_eq(&content(b).state, &own.state)) => return Ok(()),
            Sync::None => format!(
                "target '{name}' does not lie over '{}', and this mirror has given it only what was written since it began",
                self.source
            ),
        };
        Err(invalid(why).remedy(
            "keep the copy and the source as they are (block-job-cancel); to let a target take the source's place, mirror with \
             sync=full, or open the target with the right backing node: the source's own with sync=top, the source itself \
             with sync=none",
        ))
    }

    /// [`Mirror::reads_alike`] for the nodes as they are now.
    fn check_pivot(&self, edge: &UserEdge) -> Result<()> {
        let filter = self.filter_node(&edge.node())?;
        let child = |name: &str| filter.child(name).map(|c| &c.node);
        match (child("file"), child("target")) {
            (Some(source), Some(target)) => self.reads_alike(source, target),
            _ => Err(invalid("the filter of the mirror has lost a child")),
        }
    }

    /// The job's filter, at or below a node.
    fn filter_node(&self, top: &Arc<Node>) -> Result<Arc<Node>> {
        let driver: Arc<dyn dolmen_graph::Driver> = self.core.filter()?;
        std::iter::successors(Some(top), |n| n.filtered())
            .find(|n| Arc::ptr_eq(&n.driver, &driver))
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the filter of the mirror is gone"))
    }

    /// What is known about the target before anything is written to it.
    async fn look_at_target(&self, d: &Draft, rt: &Rt) -> Result<()> {
        let (source, target) = (known(d, &self.source)?, known(d, &self.target)?);
        let (source, target) = (d.built_node(&source)?, d.built_node(&target)?);
        if *self.core.sync() == Sync::Top && content(&source).backing().is_none() {
            // What it does not hold reads as zeroes, and the target has to learn that as well.
            self.core.copy_everything();
        }
        self.below.replace(content(&source).backing().cloned());
        self.over_nothing.set(content(&target).backing().is_none());
        let takes_backing = content(&target).driver.kind().options.iter().any(|o| o.name == "backing");
        if takes_backing && *self.core.sync() != Sync::Full {
            self.had_data.set(first_allocated(&target, rt).await?);
        }
        if let Some(at) = self.had_data.get().filter(|_| *self.core.sync() == Sync::Top) {
            return Err(invalid(format!(
                "target '{}' holds data of its own (at byte {at}), which would show where '{}' holds none",
                self.target, self.source
            ))
            .remedy("use a new image as the target, or mirror with sync=full"));
        }
        Ok(())
    }

    /// The node that is to be replaced, which must show the source's data.
    fn replaceable(&self, d: &Draft, name: &str, source: &NodeName) -> Result<NodeName> {
        let node = d.find(name).map_err(|_| {
            Error::new(ErrorKind::NotFound, format!("Failed to find node with node-name='{name}'"))
                .remedy("query-named-block-nodes lists the nodes there are")
        })?;
        if d.content(&node) != d.content(source) {
            return Err(invalid(format!(
                "Cannot replace '{name}' by a node mirrored from '{source}', because it cannot be guaranteed \
                 that doing so would not lead to an abrupt change of visible data"
            ))
            .remedy("name the source, or a filter above it"));
        }
        Ok(node)
    }
}

/// Takes the name of a job's filter out of options.
pub(crate) fn filter_name(o: &mut Options) -> Result<Option<NodeName>> {
    o.take_str("filter-node-name")?.map(|n| NodeName::parse(&n)).transpose()
}

/// Adds the filter of a job, without children. Without a name it is hidden from queries.
pub(crate) fn add_filter(
    d: &mut Draft,
    op: &OpId,
    name: Option<&NodeName>,
    driver: Arc<MirrorFilter>,
) -> Result<NodeName> {
    let rule = dolmen_graph::Driver::access_rule(&*driver);
    let filter = name.cloned().unwrap_or_else(|| d.fresh_name());
    d.add_node(NodeDef {
        name: filter.clone(),
        anonymous: name.is_none(),
        kind: &MIRROR_TOP,
        rule,
        flags: NodeFlags { unmap: true, ..NodeFlags::default() },
        owner: Some(op.clone()),
        monitor: false,
        options: Value::Null,
    })?;
    d.set_driver(&filter, driver, false);
    Ok(filter)
}

impl Work for Mirror {
    fn kind(&self) -> &'static JobKind {
        &MIRROR
    }

    fn detail(&self) -> String {
        format!("mirror of '{}' to '{}'", self.source, self.target)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.look_at_target(cx.draft, cx.rt).await?;
            self.put(cx.op, cx.draft)
        })
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            {
                let token = cx.edge(0).begin().await?;
                let node = self.filter_node(token.node())?;
                let target = node.child("target").map(|c| c.node.size());
                if target != Some(token.size()) {
                    return Err(invalid("Source and target image have different sizes")
                        .remedy("resize the target to the size of the source (block_resize)"));
                }
            }
            self.core.begin_with(cx.edge(0));
            self.core.run(cx, self.route(cx.edge(0).clone())?).await
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if self.core.pivots() {
                // Links may have changed since the user was answered.
                self.check_pivot(&*cx.edge(0)?)?;
            }
            self.core.settle(cx.rt, self.route(cx.edge(0)?)?).await?;
            if self.core.pivots() {
                let replaced = self.replaces.as_deref().unwrap_or(&self.source);
                self.overlays.rename(&cx.owner.graph(), cx.rt, replaced, &self.target).await?;
            }
            Ok(())
        })
    }

    fn end(&self, op: &OpId, draft: &mut Draft, ending: Ending) -> Result<()> {
        match ending {
            Ending::Success => {
                if self.core.end()? {
                    draft.replace(self.replaces.as_deref().unwrap_or(&self.source), &self.target)?;
                }
            }
            Ending::Abort => {
                self.below.take();
                self.core.abort();
                self.overlays.undo(draft);
            }
        }
        // The job itself must not be what keeps nodes writable.
        draft.remove_op(op);
        self.overlays.restore(draft);
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        match self.core.edge() {
            Some(edge) => self.check_pivot(&edge),
            None => Ok(()),
        }
    }

    fn change(&self, options: Options) -> Result<crate::Effect<'_>> {
        self.core.change(options)
    }

    fn details(&self) -> Details {
        vec![("actively-synced", Value::Bool(self.core.actively_synced()))]
    }
}

const COPY_MODE: OptionType = OptionType::Enum(COPY_MODES);

/// The kind.
pub static MIRROR: JobKind = JobKind {
    name: "mirror",
    command: "blockdev-mirror",
    help: "Copies a node and what is written to it meanwhile; the copy may take its place.",
    is_block_job: true,
    is_completed: true,
    in_transactions: false,
    options: &[
        BLOCK_JOB,
        &[
            OptionSpec::required("device", OptionType::Str, "the source"),
            OptionSpec::required("target", OptionType::Str, "the node to copy to"),
            OptionSpec::optional(
                "replaces",
                OptionType::Str,
                "the node whose place the copy takes (default: the source)",
            ),
            OptionSpec::required(
                "sync",
                OptionType::Enum(&["top", "full", "none", "incremental", "bitmap"]),
                "what is copied: full, top or none",
            ),
            OptionSpec::optional("granularity", OptionType::Int, "bytes that are copied at least at a time"),
            OptionSpec::optional("buf-size", OptionType::Int, "bytes in flight"),
            OptionSpec::optional(
                "on-source-error",
                OnError::OPTION,
                "what to do about errors (default: report)",
            ),
            OptionSpec::optional("on-target-error", OnError::OPTION, "the same for writing"),
            OptionSpec::optional("filter-node-name", OptionType::Str, "name of the filter"),
            OptionSpec::optional(
                "copy-mode",
                COPY_MODE,
                "whether writes wait for the copy (default: background)",
            ),
            OptionSpec::optional(
                "auto-converge",
                OptionType::Bool,
                "slows writers down that are faster than the copy (default: on)",
            ),
        ],
    ],
    change: &[OptionSpec::required("copy-mode", COPY_MODE, "whether writes wait for the copy")],
    details: &[OptionSpec::required("actively-synced", OptionType::Bool, "every write goes to both sides")],
    parse: |o| Ok(Box::new(Mirror::from_options(o)?)),
    failing: None,
};
