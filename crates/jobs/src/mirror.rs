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
use dolmen_graph::{AccessRule, Draft, NodeDef, NodeFlags, UserEdge};
use dolmen_rt::LocalFuture;
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Value};
use std::sync::Arc;

use crate::claims::{claim, known};
use crate::mirror_core::{Core, CoreOptions, Sync, invalid};
use crate::mirror_filter::{MIRROR_TOP, MirrorFilter};
use crate::pivot::Overlays;
use crate::{BeginCx, Details, Ending, JobCx, Kind, SettleCx, Work};

/// A mirror.
#[derive(Debug)]
pub struct Mirror {
    source: String,
    target: String,
    replaces: Option<String>,
    filter_name: Option<NodeName>,
    core: Core,
    overlays: Overlays,
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
        let everything = !matches!(self.core.options.sync, Sync::None);
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
        let driver = self.core.make_filter(AccessRule::Mirror, probe.size(), limits.cluster_size);
        drop(probe);
        let filter = add_filter(d, op, self.filter_name.as_ref(), driver)?;
        d.link(&filter, "target", ChildRole::Target, &target)?;
        d.interpose(&filter, "file", &source)?;
        d.add_user_below_filters(op, &filter, Claim { needs: A::D, allows: A::EVERY })?;
        claim(d, op, &beneath, A::D, A::V | A::S | A::P, "reads it as its source")?;
        if beneath != source {
            claim(d, op, &source, A::D, A::S | A::P, "reads it as its source")?;
        }
        claim(d, op, &replaced, A::P, A::NONE, "replaces it at the end")?;
        for n in &low {
            claim(d, op, n, A::D, A::V | A::S, "reads it as part of its source")?;
        }
        claim(d, op, &target, A::V | A::M, A::V | A::D | A::S, "writes its copy to it")?;
        self.overlays.put(op, d, &replaced)
    }

    /// Makes sure that the target shows what it has not been given: a copy of less than everything needs
    /// something to lie over.
    fn shows_all(&self, graph: &dolmen_graph::Graph) -> Result<()> {
        let below = |name: &str| {
            let mut at = graph.node(name)?;
            while let (None, Some(next)) = (at.backing(), at.filtered()) {
                at = next;
            }
            at.backing()
        };
        let missing = match self.core.options.sync {
            Sync::Full | Sync::Above(_) => false,
            Sync::Top => below(&self.source).is_some() && below(&self.target).is_none(),
            Sync::None => below(&self.target).is_none(),
        };
        if !missing {
            return Ok(());
        }
        Err(invalid(format!(
            "target '{}' has no backing file, and this mirror has not given it all data of '{}': what is missing \
             would read as zeroes",
            self.target, self.source
        ))
        .remedy("link a backing file to the target first (blockdev-snapshot, blockdev-reopen), or mirror with sync=full"))
    }

    /// The node that is to be replaced, which must show the source's data.
    fn replaceable(&self, d: &Draft, name: &str, source: &NodeName) -> Result<NodeName> {
        let node = d.node_names().find(|n| n.as_str() == name).cloned().ok_or_else(|| {
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
    fn kind(&self) -> Kind {
        Kind::Mirror
    }

    fn detail(&self) -> String {
        format!("mirror of '{}' to '{}'", self.source, self.target)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { self.put(cx.op, cx.draft) })
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            {
                let token = cx.edge(0).begin().await?;
                let filter = self.core.filter()?;
                let node = std::iter::successors(Some(token.node()), |n| n.filtered()).find(|n| {
                    let here: Arc<dyn dolmen_graph::Driver> = filter.clone();
                    Arc::ptr_eq(&n.driver, &here)
                });
                let target = node.and_then(|n| n.child("target")).map(|c| c.node.size());
                if target != Some(token.size()) {
                    return Err(invalid("Source and target image have different sizes")
                        .remedy("resize the target to the size of the source (block_resize)"));
                }
            }
            self.core.run(cx, self.route(cx.edge(0).clone())?).await
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if self.core.pivots() {
                self.shows_all(cx.owner.graph())?;
            }
            self.core.settle(cx.rt, self.route(cx.edge(0)?)?).await?;
            if self.core.pivots() {
                let replaced = self.replaces.as_deref().unwrap_or(&self.source);
                self.overlays.rename(cx.owner.graph(), cx.rt, replaced, &self.target).await?;
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
                self.core.abort();
                self.overlays.undo(draft);
            }
        }
        // The job itself must not be what keeps nodes writable.
        draft.remove_op(op);
        self.overlays.restore(draft);
        Ok(())
    }

    fn change(&self, options: Options) -> Result<()> {
        self.core.change(options)
    }

    fn details(&self) -> Details {
        Details { actively_synced: Some(self.core.actively_synced()) }
    }
}
