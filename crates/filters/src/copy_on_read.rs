//! `copy-on-read`: what is read for the first time is copied into the node below.
//!
//! The filter itself copies nothing. It adds [`ReadFlags::POPULATE`] to reads; the flag
//! travels through other filters and `raw` down to the node that owns the allocation, and that
//! node copies under its own range lock, so that a copy never overwrites a concurrent write.
//! Two of these filters in one chain therefore do no more than one.
//!
//! Writes, zero writes, discards, flushes and size changes pass unchanged.
//!
//! With `bottom`, only ranges that some layer between the child's own and `bottom`
//! (inclusive) holds are copied; the others are read as they are. The driver finds its way
//! down the chain by node name at each request, and relies on nobody relinking it meanwhile
//! ([`Parsed::relies_down_to`]).
//!
//! The filter needs M of its child always, so the child must be writable; a reader of the filter
//! needs to be allowed nothing. While M is not granted (an inactive node), everything counts as
//! allocated and nothing is copied.

use std::sync::Arc;

use dolmen_graph::option::{Child, Text};
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Driver, DriverKind, Duty, Extent, Node, Op, OpenCx, Opened,
    Opener, Parsed, Plan, Request, Where, chain_status, own_status,
};
use dolmen_rt::{IoVec, LocalFuture};
use dolmen_types::{Actions, ChildRole, Error, ErrorKind, NodeName, Options, ReadFlags, Result, Span};

/// Registry row.
pub static COPY_ON_READ: DriverKind = DriverKind {
    duties: &[Duty::CopyOnRead],
    ..DriverKind::new(
        "copy-on-read",
        Class::Filter,
        "copies what is read from backing files into the node below",
        CopyOnReadOptions::ROWS,
        parse,
    )
};

dolmen_graph::options! {
    struct CopyOnReadOptions {
        required "file" file: Child => "the node to read from and to copy into";
        optional "bottom" bottom: Text => "copy only what nodes down to this one hold (default: everything)";
    }
}

const FILE: usize = 0;

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let CopyOnReadOptions { file, bottom } = CopyOnReadOptions::take(options)?;
    let bottom = bottom.map(NodeName::internal);
    Ok(Parsed {
        children: vec![ChildSpec { name: "file", role: ChildRole::Filtered, def: file }],
        rule: AccessRule::POPULATES,
        relies_down_to: bottom.clone(),
        open: Box::new(Open { bottom }),
    })
}

struct Open {
    bottom: Option<NodeName>,
}

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            if let Some(bottom) = &self.bottom {
                check_bottom(&cx.child("file")?.node, bottom)?;
            }
            let driver = Arc::new(CopyOnRead { bottom: self.bottom });
            Ok(Opened::of(driver))
        })
    }
}

fn check_bottom(child: &Arc<Node>, bottom: &NodeName) -> Result<()> {
    match chain(child).find(|n| n.name == *bottom) {
        None => Err(Error::new(ErrorKind::InvalidInput, format!("Bottom node '{bottom}' not found"))
            .remedy("bottom must name a node of the backing chain below 'file'")),
        Some(node) if node.driver.kind().class == Class::Filter => {
            Err(Error::new(ErrorKind::InvalidInput, format!("Bottom node '{bottom}' is a filter"))
                .remedy("name the node that the filter stands on"))
        }
        Some(_) => Ok(()),
    }
}

/// The nodes from `top` down through filters and backing links.
fn chain(top: &Arc<Node>) -> impl Iterator<Item = &Arc<Node>> {
    std::iter::successors(Some(top), |n| n.filtered().or_else(|| n.backing()))
}

#[derive(Debug)]
struct CopyOnRead {
    bottom: Option<NodeName>,
}

/// Whether what is missing may be copied into the child.
fn granted(node: &Node) -> bool {
    node.children[FILE].claim.needs.contains(Actions::M)
}

impl CopyOnRead {
    fn plan_read(&self, node: &Node, flags: ReadFlags, span: Span) -> Plan {
        let copying = flags | ReadFlags::POPULATE;
        match &self.bottom {
            _ if !granted(node) => pass_read(flags, span),
            None => pass_read(copying, span),
            // What the child can answer for from memory although it was asked to copy
            // needs no copy.
            Some(_) => match node.children[FILE].node.ready(Request::Read(copying), span) {
                0 => Plan::Slow,
                len => pass_read(copying, span.prefix(len)),
            },
        }
    }

    async fn read_down_to(
        &self,
        cx: Cx<'_>,
        bottom: &NodeName,
        span: Span,
        to: &IoVec,
        flags: ReadFlags,
    ) -> Result<()> {
        let child = &cx.node.children[FILE].node;
        let below = below(child, bottom)?;
        let io = cx.read(FILE)?;
        let mut rest = span;
        while !rest.is_empty() {
            let (copy, len) = wants_copy(cx, child, rest, below).await;
            let mut piece = rest.prefix(len.max(1));
            // What several layers hold is copied by one request, not by one for each part.
            while copy && piece.len() < rest.len() {
                let (also, len) = wants_copy(cx, child, rest.skip(piece.len()), below).await;
                if !also {
                    break;
                }
                piece = rest.prefix(piece.len() + len.max(1));
            }
            let flags = if copy { flags | ReadFlags::POPULATE } else { flags };
            if wants_work(flags) {
                let part = to.slice((rest.offset() - span.offset()) as usize, piece.len() as usize);
                io.read(piece, &part, flags).await?;
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }
}

/// A prefetch that copies nothing has nothing to do.
fn wants_work(flags: ReadFlags) -> bool {
    !flags.has(ReadFlags::PREFETCH) || flags.has(ReadFlags::POPULATE)
}

fn pass_read(flags: ReadFlags, span: Span) -> Plan {
    if wants_work(flags) { Plan::pass(Request::Read(flags), span) } else { Plan::Done { len: span.len() } }
}

/// The node after `bottom` in the chain, where looking for data ends.
fn below<'a>(child: &'a Arc<Node>, bottom: &NodeName) -> Result<Option<&'a Node>> {
    let mut at = chain(child)
        .find(|n| n.name == *bottom)
        .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("Bottom node '{bottom}' not found")))?;
    // Through `raw` to the node that has the backing link.
    while let Some(next) = at.filtered() {
        at = next;
    }
    Ok(at.backing().map(|n| &**n))
}

/// Whether the start of `span` has to be copied, and for how many bytes that holds. When
/// the status can't be read, the copying read gets to report why.
async fn wants_copy(cx: Cx<'_>, child: &Arc<Node>, span: Span, below: Option<&Node>) -> (bool, u64) {
    match own_status(child, cx.rt, span).await {
        Ok((true, len)) => (false, len),
        Ok((false, len)) => match chain_status(child, cx.rt, span.prefix(len), below).await {
            Ok(status) => (status.present, status.len),
            Err(_) => (true, len),
        },
        Err(_) => (true, span.len()),
    }
}

impl Driver for CopyOnRead {
    fn kind(&self) -> &'static DriverKind {
        &COPY_ON_READ
    }

    dolmen_graph::pass_through! { FILE: size, limits, event, prepare, close, image, describe }

    fn access_rule(&self) -> AccessRule {
        AccessRule::POPULATES
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Read(flags) => self.plan_read(node, flags, span),
            Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Flush
            | Request::Resize => Plan::pass(request, span),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        match (op, &self.bottom) {
            (Op::Read { span, to, flags }, Some(bottom)) => {
                Box::pin(self.read_down_to(cx, bottom, span, to, flags))
            }
            (Op::Read { .. }, None)
            | (
                Op::Write { .. }
                | Op::WriteZeroes { .. }
                | Op::Discard { .. }
                | Op::Flush
                | Op::Resize { .. },
                _,
            ) => Box::pin(async move { cx.forward(FILE, op).await }),
        }
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            Ok(Extent { len: span.len(), place: Where::Through { child: FILE as u8, at: span.offset() } })
        })
    }
}
