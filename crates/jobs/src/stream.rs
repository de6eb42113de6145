//! `block-stream`: copies what backing files hold into the node above them, then takes them out of the chain.
//!
//! ```text
//!   parents                       parents                    parents
//!      |                             |                          |
//!     top              copy-on-read (bottom = mid)             top
//!      |                             |                          |
//!     mid       begin ->            top          end ->        base
//!      |                             |
//!     base                          mid
//!                                    |
//!                                   base
//! ```
//!
//! A stream is copy-on-read and prefetch: a filter with `bottom` set to the last node that is to go, and reads
//! of everything that the nodes from there up hold and the top does not. A guest's write and the copy of the
//! same range meet in the format, under its own lock, as with any other copy-on-read.
//!
//! Nothing is ever wrong on disk: whatever was copied reads the same from the top as from below. The name of
//! the backing file in the header is changed last, when everything is there and flushed; until then, a
//! job that fails or is cancelled leaves an image that merely has more in it.

use std::cell::RefCell;

use dolmen_graph::{BackingName, ClaimScope, Class, Cx, Draft, Duty, OpClaim, header_name_given, own_file};
use dolmen_rt::LocalFuture;
use dolmen_types::{
    Actions, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result, ResultExt,
    Span,
};

use crate::fill::{Fill, Priority};
use crate::{
    BLOCK_JOB, BeginCx, Details, Ending, JobCx, JobKind, OnError, SettleCx, Work, nothing_to_change,
};

/// Where the chain is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Until {
    /// Nothing remains below.
    All,
    /// The node with this file name remains.
    BaseFile(String),
    /// The node with this name remains.
    Base(String),
    /// The node with this name is the last to go.
    Bottom(String),
}

/// What `begin` found out.
#[derive(Clone, Debug)]
struct Plan {
    /// The image that is filled.
    top: NodeName,
    /// The last image that is to go; the top itself if there is nothing to do.
    bottom: NodeName,
    /// What remains below.
    base: Option<NodeName>,
    /// Nodes that were made writable.
    made_writable: Vec<NodeName>,
}

/// The work of a stream job.
#[derive(Debug)]
pub struct Stream {
    device: String,
    until: Until,
    backing_file: Option<String>,
    mask_protocol: bool,
    on_error: OnError,
    filter_name: Option<String>,
    plan: RefCell<Option<Plan>>,
}

impl Stream {
    /// Reads the options of `block-stream` that are not those of every job.
    ///
    /// # Errors
    /// `InvalidInput` when some exclude each other.
    pub fn from_options(o: &mut Options) -> Result<Stream> {
        let device = o.require_str("device")?;
        let base = o.take_str("base")?;
        let base_node = o.take_str("base-node")?;
        let bottom = o.take_str("bottom")?;
        for (a, name_a, b, name_b) in [
            (&base, "base", &base_node, "base-node"),
            (&base, "base", &bottom, "bottom"),
            (&bottom, "bottom", &base_node, "base-node"),
        ] {
            if a.is_some() && b.is_some() {
                let text = format!("'{name_a}' and '{name_b}' cannot be specified at the same time");
                return Err(Error::new(ErrorKind::InvalidInput, text).remedy("one of them says it all"));
            }
        }
        let until = match (base, base_node, bottom) {
            (Some(file), _, _) => Until::BaseFile(file),
            (_, Some(node), _) => Until::Base(node),
            (_, _, Some(node)) => Until::Bottom(node),
            (None, None, None) => Until::All,
        };
        Ok(Stream {
            device,
            until,
            backing_file: o.take_str("backing-file")?,
            mask_protocol: o.take_bool("backing-mask-protocol")?.unwrap_or(false),
            on_error: OnError::take(o, "on-error")?,
            filter_name: o.take_str("filter-node-name")?,
            plan: RefCell::new(None),
        })
    }

    fn plan(&self) -> Result<Plan> {
        self.plan
            .borrow()
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{} has not begun", self.detail())))
    }

    /// Finds the part of the chain that is to go.
    fn choose(&self, draft: &Draft) -> Result<Plan> {
        let device = known(draft, &self.device, &self.device)?;
        let images = draft.images(&device);
        let Some(top) = images.first().cloned() else {
            return Err(Error::new(ErrorKind::NotFound, format!("node '{device}' shows no image")));
        };
        let bottom = match &self.until {
            Until::All => images[images.len() - 1].clone(),
            Until::Bottom(name) => {
                let node = known(draft, "", name)?;
                if !draft.chain(&device).contains(&node) {
                    let text = format!("Node '{node}' is not in a chain starting from '{device}'");
                    return Err(Error::new(ErrorKind::InvalidInput, text));
                }
                if draft.kind(&node).is_some_and(|k| k.class == Class::Filter) {
                    let text = format!("Node '{node}' is a filter, use a non-filter node as 'bottom'");
                    return Err(Error::new(ErrorKind::InvalidInput, text));
                }
                node
            }
            Until::Base(name) => {
                let node = known(draft, "", name)?;
                above(&images, &draft.content(&node)).ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidInput,
                        format!("Node '{node}' is not a backing image of '{device}'"),
                    )
                })?
            }
            Until::BaseFile(file) => {
                let has_name = |n: &&NodeName| draft.filename(n).is_some_and(|f| f == *file);
                images.iter().skip(1).find(has_name).and_then(|n| above(&images, n)).ok_or_else(|| {
                    let text = format!("Can't find '{file}' in the backing chain");
                    Error::new(ErrorKind::InvalidInput, text).remedy("name the node with base-node instead")
                })?
            }
        };
        // With whatever filters stand on the base.
        let base = draft.child(&bottom, "backing").cloned();
        if base.is_none() && self.backing_file.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "backing file specified, but streaming the entire chain",
            ));
        }
        Ok(Plan { top, bottom, base, made_writable: Vec::new() })
    }

    async fn begin(&self, cx: BeginCx<'_>) -> Result<()> {
        let mut plan = self.choose(cx.draft)?;
        if let Some(name) = &self.backing_file {
            let to = BackingName { name, format: None };
            cx.opener.check_backing(&cx.draft.built_node(&plan.top)?, to).await?;
        }
        if cx.draft.is_read_only(&plan.top) {
            plan.made_writable = cx.draft.set_read_only(&plan.top, false)?;
        }
        let mut options = Options::new()
            .with("driver", cx.opener.registry.on_duty(Duty::CopyOnRead)?.name)
            .with("file", self.device.as_str())
            .with("bottom", plan.bottom.as_str());
        if let Some(name) = &self.filter_name {
            options.set("node-name", name.as_str());
        }
        let filter = cx.opener.open_interposed(cx.draft, options, cx.op).await;
        let filter = filter.context(|| "Could not create node")?;
        cx.draft.interpose_opened(&filter, "file", &self.device)?;
        cx.draft.add_user_below_filters(
            cx.op,
            &filter,
            Claim { needs: Actions::D, allows: Actions::EVERY },
        )?;
        let images = cx.draft.images(&plan.top);
        use Actions as A;
        let mut claim = |node: &NodeName, needs: A, denies: A, why: &str| {
            cx.draft.add_claim(OpClaim {
                op: cx.op.clone(),
                node: node.clone(),
                claim: Claim { needs, allows: A::EVERY - denies },
                scope: ClaimScope::Node,
                why: why.into(),
                pins: true,
            })
        };
        claim(&plan.top, A::D | A::M | A::G, A::S | A::G, "relinks it when the stream ends")?;
        let last = images.iter().position(|n| *n == plan.bottom).unwrap_or(0);
        for node in images.iter().take(last + 1).skip(1) {
            claim(node, A::D, A::V | A::S | A::G, "copies from it")?;
        }
        *self.plan.borrow_mut() = Some(plan);
        Ok(())
    }
}

/// The image whose backing file is `base`.
fn above(images: &[NodeName], base: &NodeName) -> Option<NodeName> {
    let at = images.iter().position(|n| n == base)?;
    images.get(at.checked_sub(1)?).cloned()
}

/// The node of this name; messages name what the client gave as its device as well.
pub(crate) fn known(draft: &Draft, device: &str, name: &str) -> Result<NodeName> {
    draft.find(name).map_err(|_| {
        Error::new(ErrorKind::NotFound, format!("Cannot find device='{device}' nor node-name='{name}'"))
            .remedy("query-named-block-nodes lists the nodes there are")
    })
}

impl Work for Stream {
    fn kind(&self) -> &'static JobKind {
        &STREAM
    }

    fn detail(&self) -> String {
        format!("stream of '{}'", self.device)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.begin(cx))
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let plan = self.plan()?;
            if plan.top == plan.bottom {
                // Nothing is to go.
                return Ok(());
            }
            let size = cx.edge(0).node().size();
            cx.set_remaining(size);
            let fill = Fill {
                cx,
                edge: 0,
                bottom: Some(&plan.bottom),
                // Without a backing file, what is missing reads as zeroes.
                zeroes: plan.base.is_some(),
                on_error: self.on_error,
                priority: Priority::Normal,
            };
            fill.run(&[Span::new(0, size)]).await
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let plan = self.plan()?;
            let token = cx.edge(0)?.begin().await?;
            let node = |name: &NodeName| {
                cx.owner
                    .graph()
                    .node(name)
                    .cloned()
                    .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("node '{name}' is gone")))
            };
            let (top, bottom) = (node(&plan.top)?, node(&plan.bottom)?);
            if top.backing().is_none() {
                return Ok(());
            }
            let named = match bottom.backing() {
                Some(b) => {
                    let given = self.backing_file.as_deref();
                    Some(header_name_given(b, &own_file(&top), given, self.mask_protocol)?)
                }
                None => None,
            };
            let to = named.as_ref().map(|(name, format)| BackingName { name, format: Some(format) });
            let set = dolmen_graph::set_backing(Cx { node: &top, rt: cx.rt }, to).await;
            drop(token);
            set.context(|| format!("the backing file of node '{}' can't be changed", plan.top))
        })
    }

    fn end(&self, op: &OpId, draft: &mut Draft, ending: Ending) -> Result<()> {
        let plan = self.plan()?;
        if ending == Ending::Success && plan.top != plan.bottom {
            // Another job's filter may stand on the base by now.
            let base = draft.child(&plan.bottom, "backing").cloned();
            draft.set_backing_link(&plan.top, base.as_ref().map(|b| b.as_str()))?;
        }
        // The filter goes first: it needs the node to be writable.
        draft.remove_op(op);
        draft.restore_read_only(&plan.made_writable);
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, _: Options) -> Result<crate::Effect<'_>> {
        Err(nothing_to_change())
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}
/// The kind.
pub(crate) static STREAM: JobKind = JobKind {
    name: "stream",
    command: "block-stream",
    help: "Copies what backing files hold into a node and takes them out of its chain.",
    is_block_job: true,
    is_completed: false,
    in_transactions: false,
    options: &[
        BLOCK_JOB,
        &[
            OptionSpec::required("device", OptionType::Str, "the node that is filled"),
            OptionSpec::optional("base", OptionType::Str, "file name of the node that remains below"),
            OptionSpec::optional("base-node", OptionType::Str, "the node that remains below"),
            OptionSpec::optional("bottom", OptionType::Str, "the last node that goes"),
            OptionSpec::optional(
                "backing-file",
                OptionType::Str,
                "the name of the remaining backing file in the header",
            ),
            OptionSpec::optional(
                "backing-mask-protocol",
                OptionType::Bool,
                "no json: name in the header (default: off)",
            ),
            OptionSpec::optional("on-error", OnError::OPTION, "what to do about errors (default: report)"),
            OptionSpec::optional("filter-node-name", OptionType::Str, "name of the filter"),
        ],
    ],
    change: &[],
    details: &[],
    parse: |o| Ok(Box::new(Stream::from_options(o)?)),
    failing: None,
};
