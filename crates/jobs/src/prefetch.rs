//! `blockdev-prefetch`: fills ranges of a node from its backing files, as if somebody had read them through
//! copy-on-read. No data go anywhere else, and nothing is relinked.
//!
//! It works through a copy-on-read node that stands on the node already, or through an implicit one that
//! exists as long as the job.

use std::cell::RefCell;

use dolmen_graph::{ClaimScope, Draft, Duty, OpClaim};
use dolmen_rt::LocalFuture;
use dolmen_types::{
    Actions, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result, Span, Value,
};

use crate::fill::{Fill, Priority};
use crate::stream::known;
use crate::{
    BLOCK_JOB, BeginCx, Details, Ending, JobCx, JobKind, OnError, SettleCx, Work, nothing_to_change,
};

/// The most ranges that one job takes.
const MAX_RANGES: usize = 65_536;

/// The work of a prefetch job.
#[derive(Debug)]
pub struct Prefetch {
    node: String,
    /// `None`: all of it.
    ranges: Option<Vec<Span>>,
    priority: Priority,
    on_error: OnError,
    /// Nodes that were made writable.
    made_writable: RefCell<Vec<NodeName>>,
}

impl Prefetch {
    /// Reads the options of `blockdev-prefetch` that are not those of every job.
    ///
    /// # Errors
    /// `InvalidInput` when a range makes no sense; `Limit` when there are too many.
    pub fn from_options(o: &mut Options) -> Result<Prefetch> {
        let ranges = o.take_list("ranges")?.map(|list| {
            if list.len() > MAX_RANGES {
                let text = format!("more than {MAX_RANGES} ranges");
                return Err(Error::new(ErrorKind::Limit, text).remedy("use several jobs"));
            }
            list.into_iter().map(range).collect::<Result<Vec<_>>>()
        });
        let priority = o.take_enum("priority", Priority::WORDS)?.and_then(Priority::from_word);
        Ok(Prefetch {
            node: o.require_str("node")?,
            ranges: ranges.transpose()?,
            priority: priority.unwrap_or_default(),
            on_error: OnError::take(o, "on-error")?,
            made_writable: RefCell::default(),
        })
    }

    async fn begin(&self, cx: BeginCx<'_>) -> Result<()> {
        let node = known(cx.draft, &self.node, &self.node)?;
        let image = cx.draft.content(&node);
        let through = match existing(cx.draft, &node) {
            Some(filter) => filter,
            None => {
                if cx.draft.is_read_only(&image) {
                    *self.made_writable.borrow_mut() = cx.draft.set_read_only(&image, false)?;
                }
                let options = Options::new()
                    .with("driver", cx.opener.registry.on_duty(Duty::CopyOnRead)?.name)
                    .with("file", node.as_str());
                let filter = cx.opener.open_interposed(cx.draft, options, cx.op).await?;
                cx.draft.interpose_opened(&filter, "file", &node)?;
                filter
            }
        };
        use Actions as A;
        cx.draft.add_user(cx.op, &through, Claim { needs: A::D, allows: A::EVERY })?;
        let images = cx.draft.images(&node);
        for (i, name) in images.iter().enumerate() {
            let (needs, denies) = if i == 0 { (A::D | A::M, A::S) } else { (A::D, A::NONE) };
            cx.draft.add_claim(OpClaim {
                op: cx.op.clone(),
                node: name.clone(),
                claim: Claim { needs, allows: A::EVERY - denies },
                scope: ClaimScope::Node,
                why: if i == 0 { "fills it" } else { "copies from it" }.into(),
                pins: true,
            })?;
        }
        Ok(())
    }
}

/// The copy-on-read node that `node` is, or that stands on it.
fn existing(draft: &Draft, node: &NodeName) -> Option<NodeName> {
    let copies = |n: &NodeName| draft.kind(n).is_some_and(|k| k.duties.contains(&Duty::CopyOnRead));
    if copies(node) {
        return Some(node.clone());
    }
    draft
        .parents(node)
        .into_iter()
        .map(|(n, _)| n)
        .find(|n| copies(n) && draft.child(n, "file") == Some(node))
}

fn range(value: Value) -> Result<Span> {
    let mut o = Options::from_value(value)?;
    let missing = |name: &str| Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is missing"));
    let offset = o.take_size("offset")?.ok_or_else(|| missing("offset"))?;
    let length = o.take_size("length")?.ok_or_else(|| missing("length"))?;
    o.finish("a range")?;
    Span::checked(offset, length).ok_or_else(|| {
        let text = format!("the range at {offset} with {length} bytes is too long");
        Error::new(ErrorKind::InvalidInput, text)
    })
}

impl Work for Prefetch {
    fn kind(&self) -> &'static JobKind {
        &PREFETCH
    }

    fn detail(&self) -> String {
        format!("prefetch of '{}'", self.node)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.begin(cx))
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let whole = Span::new(0, cx.edge(0).node().size());
            let spans: Vec<Span> = match &self.ranges {
                None => vec![whole],
                // What lies past the end can't be filled.
                Some(ranges) => ranges.iter().filter_map(|r| r.intersect(whole)).collect(),
            };
            cx.set_remaining(spans.iter().map(|s| s.len()).sum());
            let fill = Fill {
                cx,
                edge: 0,
                bottom: None,
                zeroes: true,
                on_error: self.on_error,
                priority: self.priority,
            };
            fill.run(&spans).await
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let token = cx.edge(0)?.begin().await?;
            token.read(cx.rt)?.flush().await
        })
    }

    fn end(&self, op: &OpId, draft: &mut Draft, _: Ending) -> Result<()> {
        // The filter goes first: it needs the node to be writable.
        draft.remove_op(op);
        draft.restore_read_only(&self.made_writable.borrow());
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
pub static PREFETCH: JobKind = JobKind {
    name: "prefetch",
    command: "blockdev-prefetch",
    help: "Fills ranges of a node (default: all of it) from its backing files.",
    is_block_job: true,
    is_completed: false,
    in_transactions: false,
    options: &[
        BLOCK_JOB,
        &[
            OptionSpec::required("node", OptionType::Str, "the node that is filled"),
            OptionSpec::optional(
                "ranges",
                OptionType::ObjectList(RANGE),
                "what is filled (default: everything)",
            ),
            OptionSpec::optional(
                "priority",
                OptionType::Enum(Priority::WORDS),
                "how much it may disturb (default: normal)",
            ),
            OptionSpec::optional("on-error", OnError::OPTION, "what to do about errors (default: report)"),
        ],
    ],
    change: &[],
    details: &[],
    parse: |o| Ok(Box::new(Prefetch::from_options(o)?)),
    failing: None,
};

const RANGE: &[OptionSpec] = &[
    OptionSpec::required("offset", OptionType::Int, "where it begins, in bytes"),
    OptionSpec::required("length", OptionType::Int, "how long it is, in bytes"),
];
