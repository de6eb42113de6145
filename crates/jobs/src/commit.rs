//! `block-commit`: brings what overlays hold into an image below them.
//!
//! ```text
//!  intermediate                                 active
//!    top ----> top ----.                          guest              guest
//!     |                |                            |                  |
//!   commit_top         |                        mirror_top --.         |
//!     |                |                            |        |target   |
//!    mid      mid      |   (mid: stale no more       top       |         |     top   (stale from the
//!     |        |       |    than any image below      |        |         |      |     first write on)
//!    base     base <---'    a chain)                base <---'        base <---'
//! ```
//!
//! *Intermediate*: nothing above writes to the top node. What the layers from `top` to above `base`
//! hold is copied into `base`, which changes nothing that the overlays of `top` read. Then
//! they are linked to `base`, in their headers first: at every point in time both chains read the same.
//!
//! *Active*: `top` has no overlay, or somebody writes to it: a mirror ([`mirror_core`](crate::mirror_core))
//! with `base` as its target, which the user completes.
//!
//! `base` and the files that hold its data are made writable for the duration. It grows if it is smaller
//! than `top`. If it is larger, it stays so: users who came to `top` go on seeing the size of `top`, and whoever comes
//! later sees all of `base`. If an overlay of `top` is larger than `top`, what lies behind the end of `top` read as
//! zeroes in that overlay; so it is zeroed in `base`.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use dolmen_copy::{CopyOptions, Engine, Failure, Hooks, Moved, Pass, Route, Tracker};
use dolmen_graph::{
    AccessRule, BackingName, Class, Cx, Draft, NodeDef, NodeFlags, Prealloc, header_name_given, own_file,
};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result,
    Span, Value, WriteFlags,
};

use crate::claims::{claim, claim_beneath};
use crate::commit_filter::{COMMIT_TOP, CommitFilter};
use crate::mirror::{add_filter, filter_name};
use crate::mirror_core::{Core, CoreOptions, USUAL, backing_link, invalid};
use crate::pivot::Overlays;
use crate::{Again, BLOCK_JOB, BeginCx, Details, Ending, JobCx, JobKind, OnError, SettleCx, Side, Work};

/// Bytes of a chunk of an intermediate commit.
const CHUNK: u64 = 64 << 10;

/// How an image of the chain is named.
#[derive(Debug)]
enum Named {
    /// The default.
    Default,
    /// By its node name.
    Node(String),
    /// By its file name.
    File(String),
}

impl Named {
    fn take(o: &mut Options, file: &str, node: &str) -> Result<Named> {
        match (o.take_str(file)?, o.take_str(node)?) {
            (Some(_), Some(_)) => Err(invalid(format!("'{node}' and '{file}' are mutually exclusive"))),
            (Some(name), None) => Ok(Named::File(name)),
            (None, Some(name)) => Ok(Named::Node(name)),
            (None, None) => Ok(Named::Default),
        }
    }
}

/// What the commit turned out to be when it began.
#[derive(Debug)]
struct Begun {
    top: NodeName,
    base: NodeName,
    active: bool,
    /// Nodes that have the top node as their backing file.
    overlays: Vec<NodeName>,
    /// Nodes that were read-only before.
    was_read_only: Vec<NodeName>,
    /// The size that `base` has to get.
    grow_to: Option<u64>,
    /// What has to be zeroed in `base` behind the end of `top`.
    tail: Option<Span>,
}

/// A commit.
#[derive(Debug)]
pub struct Commit {
    device: String,
    top: Named,
    base: Named,
    backing_file: Option<String>,
    mask_protocol: bool,
    on_error: OnError,
    filter_name: Option<NodeName>,
    /// For an active commit.
    core: Core,
    pivot: Overlays,
    begun: RefCell<Option<Arc<Begun>>>,
}

impl Commit {
    /// A commit from the options of `block-commit`, without those that all jobs have.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub fn from_options(o: &mut Options) -> Result<Commit> {
        let on_error = OnError::take(o, "on-error")?;
        let auto_converge = o.take_bool("auto-converge")?.unwrap_or(true);
        Ok(Commit {
            device: o.require_str("device")?,
            top: Named::take(o, "top", "top-node")?,
            base: Named::take(o, "base", "base-node")?,
            backing_file: o.take_str("backing-file")?,
            mask_protocol: o.take_bool("backing-mask-protocol")?.unwrap_or(false),
            on_error,
            filter_name: filter_name(o)?,
            core: Core::new(CoreOptions {
                on_source_error: on_error,
                on_target_error: on_error,
                auto_converge,
                ..CoreOptions::default()
            }),
            pivot: Overlays::default(),
            begun: RefCell::new(None),
        })
    }

    fn begun(&self) -> Result<Arc<Begun>> {
        self.begun.borrow().clone().ok_or_else(|| invalid("the job has not begun"))
    }

    /// The images that are meant: top and base.
    fn images(&self, d: &Draft) -> Result<(NodeName, NodeName)> {
        if !d.has_node(&self.device) {
            return Err(Error::new(ErrorKind::NotFound, format!("Device '{}' not found", self.device))
                .remedy("query-named-block-nodes lists the nodes there are"));
        }
        let chain = d.images(&self.device);
        let active = chain.first().ok_or_else(|| invalid(format!("'{}' has no image", self.device)))?;
        let find = |named: &Named, fallback: &NodeName, missing: &dyn Fn(&str) -> String| match named {
            Named::Default => Ok(fallback.clone()),
            Named::Node(name) => in_chain(d, &chain, name),
            Named::File(name) => chain
                .iter()
                .find(|n| d.filename(n).is_some_and(|f| same_file(&f, name)))
                .cloned()
                .ok_or_else(|| Error::new(ErrorKind::NotFound, missing(name))),
        };
        let top = find(&self.top, active, &|n| format!("Top image file {n} not found"))?;
        let lowest = chain.last().unwrap_or(active);
        let base = find(&self.base, lowest, &|n| format!("Can't find '{n}' in the backing chain"))?;
        if top == base {
            return Err(invalid("cannot commit an image into itself")
                .remedy("name a base that lies below the top node in its backing chain"));
        }
        if !d.images(&top).contains(&base) {
            return Err(invalid(format!("'{base}' is not in this backing file chain")));
        }
        let base = of_raw(d, &top, base);
        Ok((top, base))
    }

    fn put(&self, op: &OpId, d: &mut Draft) -> Result<()> {
        let (top, base) = self.images(d)?;
        let overlays = d.overlays(&top);
        let active = overlays.is_empty() || has_writer(d, &top)?;
        if active && self.backing_file.is_some() {
            return Err(invalid("'backing-file' specified, but 'top' is the active layer"));
        }
        let size = |d: &Draft, n: &NodeName| d.built_node(n).map(|n| n.size());
        let (top_size, base_size) = (size(d, &top)?, size(d, &base)?);
        let cluster = {
            let node = d.built_node(&base)?;
            node.driver.limits(&node).cluster_size
        };
        let mut shown_past_end = false;
        for o in &overlays {
            shown_past_end |= size(d, o)? > top_size;
        }
        let mut was_read_only = d.set_read_only(&base, false)?;
        if !active {
            for o in &overlays {
                was_read_only.extend(d.set_read_only(o, false)?);
            }
        }
        let begun = Begun {
            active,
            was_read_only,
            grow_to: (base_size < top_size).then_some(top_size),
            tail: (shown_past_end && base_size > top_size).then(|| Span::from_range(top_size, base_size)),
            top,
            base,
            overlays,
        };
        if active {
            self.put_active(op, d, &begun, top_size, cluster)?;
        } else {
            self.put_intermediate(op, d, &begun)?;
        }
        *self.begun.borrow_mut() = Some(Arc::new(begun));
        Ok(())
    }

    fn put_active(&self, op: &OpId, d: &mut Draft, b: &Begun, size: u64, cluster: u32) -> Result<()> {
        use Actions as A;
        let between = between(d, b);
        let beneath = d.resolve(&b.top)?;
        self.core.only_above(&b.base);
        let driver = self.core.make_filter(AccessRule::COPIES_WRITES_DOWN, size, cluster);
        let filter = add_filter(d, op, self.filter_name.as_ref(), driver)?;
        d.link(&filter, "target", ChildRole::Target, &b.base)?;
        d.interpose(&filter, "file", &b.top)?;
        d.add_user_below_filters(op, &filter, Claim { needs: A::D, allows: A::EVERY })?;
        // Whoever writes through the filter keeps the size that the base will have, as a format does not do with its file.
        claim(d, op, &filter, A::NONE, A::S, "commits it and replaces it at the end")?;
        claim(d, op, &beneath, A::D, A::V, "commits it and replaces it at the end")?;
        let denies = A::S | A::G | A::P;
        claim(d, op, &b.top, A::D | A::P, denies, "commits it and replaces it at the end")?;
        claim_beneath(d, op, &b.top, A::S, "commits it and replaces it at the end")?;
        for n in &between {
            claim(d, op, n, A::D, denies | A::D | A::V, "commits it, so that it gets stale")?;
        }
        self.put_base(op, d, b)?;
        self.pivot.put(op, d, &b.top)
    }

    fn put_intermediate(&self, op: &OpId, d: &mut Draft, b: &Begun) -> Result<()> {
        use Actions as A;
        let between = between(d, b);
        let filter = self.filter_name.clone().unwrap_or_else(|| d.fresh_name());
        d.add_node(NodeDef {
            name: filter.clone(),
            anonymous: self.filter_name.is_none(),
            kind: &COMMIT_TOP,
            rule: AccessRule::LETS_CHANGE,
            flags: NodeFlags { unmap: true, ..NodeFlags::default() },
            owner: Some(op.clone()),
            monitor: false,
            options: Value::Null,
        })?;
        d.set_driver(&filter, Arc::new(CommitFilter), false);
        d.interpose(&filter, "file", &b.top)?;
        d.add_user_below_filters(op, &b.top, Claim { needs: A::D, allows: A::EVERY })?;
        let still = A::V | A::M | A::S;
        claim(d, op, &filter, A::NONE, still, "commits what lies below, which must not change")?;
        // An overlay that came now would go on naming it.
        claim(d, op, &b.top, A::D, A::V | A::S | A::G | A::P, "commits it")?;
        claim_beneath(d, op, &b.top, A::S, "commits it")?;
        // What is written to the base is what the top node shows there already. An image between
        // them may show something else.
        d.keep_right(op, &b.top)?;
        for n in &between {
            claim(d, op, n, A::D, A::V | A::S | A::G, "commits it")?;
        }
        for o in &b.overlays {
            claim(d, op, o, A::G, A::S | A::G, "relinks it when the commit ends")?;
        }
        self.put_base(op, d, b)?;
        for o in &b.overlays {
            // Its header will name another backing file, so it must stay writable.
            d.add_user_below_filters(op, o, Claim { needs: A::M, allows: A::EVERY })?;
        }
        Ok(())
    }

    fn put_base(&self, op: &OpId, d: &mut Draft, b: &Begun) -> Result<()> {
        use Actions as A;
        let grows = if b.grow_to.is_some() { A::S } else { A::NONE };
        d.add_user(op, &b.base, Claim { needs: A::V | grows, allows: A::EVERY })?;
        // An overlay that is put over the base would take the job with it: the rest of the data would be in the overlay.
        claim(d, op, &b.base, A::V | A::M | grows, A::V | A::S | A::G | A::P, "commits into it")?;
        claim_beneath(d, op, &b.base, A::V | A::S, "commits into it")?;
        for n in d.images(&b.base).into_iter().skip(1) {
            claim(d, op, &n, A::NONE, A::S | A::G, "commits into an image that relies on it")?;
        }
        Ok(())
    }

    /// Makes `base` as large as it has to be.
    async fn grow(&self, cx: &JobCx, b: &Begun) -> Result<()> {
        let Some(size) = b.grow_to else { return Ok(()) };
        let token = cx.edge(1).begin().await?;
        token.resize(cx.rt())?.resize(size, Prealloc::Off).await
    }

    async fn copy(&self, cx: &JobCx, b: &Begun) -> Result<()> {
        let (size, above) = {
            let token = cx.edge(0).begin().await?;
            (token.size(), backing_link(token.node(), &b.base))
        };
        let tracker = Arc::new(Tracker::all_dirty(size, CHUNK));
        cx.set_remaining(size);
        let route = Route::Edges { source: cx.edge(0).clone(), target: cx.edge(1).clone() };
        let (workers, max_chunk) = USUAL;
        let options = CopyOptions { workers, max_chunk, ..CopyOptions::default() };
        let engine = Engine::new(cx.rt(), route, tracker, options).above(above);
        let hooks = Committing { cx, policy: self.on_error, again: Cell::new(false) };
        loop {
            cx.checkpoint().await?;
            hooks.again.set(false);
            if engine.run(&hooks).await? == Pass::Clean {
                break;
            }
        }
        loop {
            cx.checkpoint().await?;
            match zero_tail(cx.edge(1), cx.rt(), b).await {
                Ok(()) => return Ok(()),
                Err(e) => match cx.failed(Side::Target, self.on_error, e).await? {
                    Again::Retry => {}
                    // It can't be left out: without it the end of the base would show up in the overlay.
                    Again::Skip => cx.sleep_until(cx.rt().now() + crate::mirror_core::BACK_OFF).await?,
                },
            }
        }
    }

    /// Makes the data durable, then names `base` in the headers of the overlays: from then on
    /// both chains are right.
    async fn finish(&self, cx: &SettleCx<'_>, b: &Begun) -> Result<()> {
        flush(&cx.edge(1)?, cx.rt).await?;
        if b.active {
            return Ok(());
        }
        let graph = cx.owner.graph();
        let base = graph.node(&b.base).ok_or_else(|| invalid(format!("node '{}' is gone", b.base)))?;
        for overlay in &b.overlays {
            let Some(node) = graph.node(overlay) else { continue };
            let given = self.backing_file.as_deref();
            let (name, format) = header_name_given(base, &own_file(node), given, self.mask_protocol)?;
            let to = BackingName { name: &name, format: Some(format) };
            dolmen_graph::set_backing(Cx { node, rt: cx.rt }, Some(to)).await?;
        }
        Ok(())
    }
}

/// Zeroes what an overlay of `top` would come to see behind the end of `top`.
async fn zero_tail(base: &Arc<dolmen_graph::UserEdge>, rt: &Rt, b: &Begun) -> Result<()> {
    let Some(tail) = b.tail else { return Ok(()) };
    let token = base.begin().await?;
    token.write(rt)?.write_zeroes(tail, WriteFlags::MAY_UNMAP).await
}

async fn flush(edge: &Arc<dolmen_graph::UserEdge>, rt: &Rt) -> Result<()> {
    let token = edge.begin().await?;
    token.write(rt)?.flush().await
}

/// The images that lie between top and base.
fn between(d: &Draft, b: &Begun) -> Vec<NodeName> {
    let base = d.content(&b.base);
    d.images(&b.top).into_iter().skip(1).take_while(|n| *n != base).collect()
}

/// The node by which others know an image below `top`: that of its format, if that is raw, and not the file, whatever filters
/// lie between them. Whoever goes on with the image belongs there, or the next snapshot of that node would miss them.
fn of_raw(d: &Draft, top: &NodeName, image: NodeName) -> NodeName {
    let class = |n: &NodeName| d.kind(n).map(|k| k.class);
    if class(&image) != Some(Class::Protocol) {
        return image;
    }
    let chain = d.chain(top);
    let at = chain.iter().position(|n| *n == image).unwrap_or(0);
    let over = chain[..at].iter().rev().take_while(|n| *n != top && d.content(n) == image);
    over.into_iter().find(|n| class(n) == Some(Class::Format)).cloned().unwrap_or(image)
}

fn in_chain(d: &Draft, chain: &[NodeName], name: &str) -> Result<NodeName> {
    let node = crate::stream::known(d, "", name)?;
    let content = d.content(&node);
    chain
        .iter()
        .find(|n| **n == content)
        .cloned()
        .ok_or_else(|| invalid(format!("'{name}' is not in this backing file chain")))
}

/// Whether an operation or a node above writes to the node.
fn has_writer(d: &Draft, node: &NodeName) -> Result<bool> {
    Ok(d.total(node)?.needs.contains(Actions::V))
}

/// Whether a file is meant by a name: as it was opened, or by the end of its path.
fn same_file(file: &str, name: &str) -> bool {
    file == name || (!name.starts_with('/') && file.ends_with(&format!("/{name}")))
}

/// The engine's way to the job.
struct Committing<'a> {
    cx: &'a JobCx,
    policy: OnError,
    /// The job was stopped by an error and resumed: all workers begin anew.
    again: Cell<bool>,
}

impl Hooks for Committing<'_> {
    fn throttle(&self, bytes: u64) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            // A cancelled job is noticed as attention.
            let _ = self.cx.throttle(bytes).await;
        })
    }

    fn moved(&self, span: Span, _: Moved) {
        self.cx.progress_add(span.len());
    }

    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>> {
        let side = match failure.side {
            dolmen_copy::Side::Source => Side::Source,
            dolmen_copy::Side::Target => Side::Target,
        };
        Box::pin(async move {
            match self.cx.failed(side, self.policy, failure.error).await? {
                Again::Retry => self.again.set(true),
                Again::Skip => {
                    self.cx.sleep_until(self.cx.rt().now() + crate::mirror_core::BACK_OFF).await?;
                }
            }
            Ok(())
        })
    }

    fn attention(&self) -> bool {
        self.cx.wants_attention() || self.again.get()
    }
}

impl Work for Commit {
    fn kind(&self) -> &'static JobKind {
        &COMMIT
    }

    fn detail(&self) -> String {
        let name = |n: &Named, fallback: &str| match n {
            Named::Default => fallback.to_owned(),
            Named::Node(n) | Named::File(n) => format!("'{n}'"),
        };
        let top = name(&self.top, &format!("'{}'", self.device));
        format!("commit of {top} into {}", name(&self.base, "its lowest backing file"))
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if let Some(name) = &self.backing_file {
                let (top, _) = self.images(cx.draft)?;
                for o in cx.draft.overlays(&top) {
                    let to = BackingName { name, format: None };
                    cx.opener.check_backing(&cx.draft.built_node(&o)?, to).await?;
                }
            }
            self.put(cx.op, cx.draft)
        })
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let b = self.begun()?;
            self.grow(cx, &b).await?;
            if b.active {
                let route = Route::Edges { source: cx.edge(0).clone(), target: cx.edge(1).clone() };
                self.core.run(cx, route).await
            } else {
                self.copy(cx, &b).await
            }
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let b = self.begun()?;
            if b.active {
                let route = Route::Edges { source: cx.edge(0)?, target: cx.edge(1)? };
                if self.core.pivots() {
                    zero_tail(&cx.edge(1)?, cx.rt, &b).await?;
                }
                self.core.settle(cx.rt, route).await?;
                if self.core.pivots() {
                    self.pivot.rename(&cx.owner.graph(), cx.rt, &b.top, &b.base).await?;
                }
                Ok(())
            } else {
                self.finish(&cx, &b).await
            }
        })
    }

    fn end(&self, op: &OpId, draft: &mut Draft, ending: Ending) -> Result<()> {
        let b = self.begun()?;
        let mut stays_writable = false;
        match ending {
            Ending::Success if b.active => {
                if self.core.end()? {
                    draft.replace(&b.top, &b.base)?;
                    // It is what the guest writes to from now on.
                    stays_writable = true;
                }
            }
            Ending::Success => draft.replace(&b.top, &b.base)?,
            Ending::Abort => {
                self.core.abort();
                self.pivot.undo(draft);
            }
        }
        // The job itself must not be what keeps nodes writable.
        draft.remove_op(op);
        if !stays_writable {
            draft.restore_read_only(&b.was_read_only);
        }
        self.pivot.restore(draft);
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, options: Options) -> Result<crate::Effect<'_>> {
        if self.begun()?.active { self.core.change(options) } else { Err(crate::nothing_to_change()) }
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}

/// The kind.
pub(crate) static COMMIT: JobKind = JobKind {
    name: "commit",
    command: "block-commit",
    help: "Copies what nodes hold into a backing file of theirs and takes them out of the chain.",
    is_block_job: true,
    is_completed: true,
    in_transactions: false,
    options: &[
        BLOCK_JOB,
        &[
            OptionSpec::required("device", OptionType::Str, "the chain"),
            OptionSpec::optional("base-node", OptionType::Str, "where to copy to (default: the lowest)"),
            OptionSpec::optional("base", OptionType::Str, "its file name"),
            OptionSpec::optional(
                "top-node",
                OptionType::Str,
                "the topmost node to be copied (default: the active one)",
            ),
            OptionSpec::optional("top", OptionType::Str, "its file name"),
            OptionSpec::optional("backing-file", OptionType::Str, "the name of the base in the header above"),
            OptionSpec::optional(
                "backing-mask-protocol",
                OptionType::Bool,
                "no json: name in the header (default: off)",
            ),
            OptionSpec::optional("on-error", OnError::OPTION, "what to do about errors (default: report)"),
            OptionSpec::optional("filter-node-name", OptionType::Str, "name of the filter"),
            OptionSpec::optional(
                "auto-converge",
                OptionType::Bool,
                "slows writers down that are faster than the copy (default: on)",
            ),
        ],
    ],
    change: &[],
    details: &[],
    parse: |o| Ok(Box::new(Commit::from_options(o)?)),
    failing: None,
};
