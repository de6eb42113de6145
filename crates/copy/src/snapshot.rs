//! `snapshot-access`: a copy-before-write node's point in time, as a node to read from.
//!
//! Reads give the data as they were when the copy-before-write node was made, from its target where they
//! have been saved and from its file where they have not. A discard says that nobody wants the
//! range any more: what has not been saved will not be, what has been is discarded on the target, and
//! reading it is an error from then on. That is how a backup program that reads through this node
//! keeps the target small (`discard=unmap` must be set on the node, as always). Everything else that would change data is
//! refused.

use std::sync::Arc;

use dolmen_graph::option::Child;
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Driver, DriverKind, Extent, Limits, Node, NodeChange, Op,
    OpenCx, Opened, Opener, Parsed, Plan, Prepared, Request, SELF, Where,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, ChildRole, Error, ErrorKind, Options, Result, Span};

use crate::{CopyBeforeWrite, PointInTime};

/// Registry row.
pub static SNAPSHOT_ACCESS: DriverKind = DriverKind::new(
    "snapshot-access",
    Class::Filter,
    "shows the point in time that a copy-before-write node keeps",
    ViewOptions::ROWS,
    parse,
);

dolmen_graph::options! {
    struct ViewOptions {
        required "file" file: Child => "a copy-before-write node";
    }
}

const FILE: usize = 0;

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let ViewOptions { file } = ViewOptions::take(options)?;
    Ok(Parsed {
        children: vec![ChildSpec { name: "file", role: ChildRole::Data, def: file }],
        rule: AccessRule::POINT_IN_TIME,
        relies_down_to: None,
        open: Box::new(Open),
    })
}

struct Open;

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let node = &cx.child("file")?.node;
            let filter = CopyBeforeWrite::of(node).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "node '{}' keeps no point in time: it is '{}'",
                        node.name,
                        node.driver.kind().name
                    ),
                )
                .remedy("'file' must name a copy-before-write node")
            })?;
            Ok(Opened::of(Arc::new(SnapshotAccess { point: filter.point().clone() })))
        })
    }
}

/// The driver; see the module's head.
#[derive(Debug)]
pub struct SnapshotAccess {
    point: Arc<PointInTime>,
}

impl SnapshotAccess {
    /// A driver whose only child `file`, of role [`ChildRole::Data`], is a copy-before-write node that keeps
    /// this point: for `draft.set_driver`.
    pub fn new(point: Arc<PointInTime>) -> SnapshotAccess {
        SnapshotAccess { point }
    }

    /// The node of the filter that keeps the point. Others may have been interposed on it since, which
    /// may keep points of their own.
    fn keeper<'a>(&self, node: &'a Node) -> Result<&'a Node> {
        std::iter::successors(Some(&node.children[FILE].node), |n| n.filtered())
            .map(|n| &**n)
            .find(|n| CopyBeforeWrite::of(n).is_some_and(|f| Arc::ptr_eq(f.point(), &self.point)))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Disconnected,
                    format!("the copy-before-write node below '{}' is not there any more", node.name),
                )
            })
    }
}

fn unchangeable(node: &Node) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("node '{}' shows a point in time, which can't be changed", node.name),
    )
}

impl Driver for SnapshotAccess {
    fn kind(&self) -> &'static DriverKind {
        &SNAPSHOT_ACCESS
    }

    dolmen_graph::pass_through! { 0: close, image, describe }

    fn size(&self, _: &Node) -> u64 {
        self.point.size()
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits { discards: true, ..Limits::BYTES }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::POINT_IN_TIME
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Discard(_) if !node.flags.unmap => Plan::Done { len: span.len() },
            Request::Flush => Plan::Done { len: span.len() },
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Resize => Plan::Slow,
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let below = Cx { node: self.keeper(cx.node)?, rt: cx.rt };
            match op {
                Op::Read { span, to, flags: _ } => self.point.read(below, span, to).await,
                Op::Discard { span, flags: _ } => self.point.forget(below, span).await,
                Op::Flush => Ok(()),
                Op::Write { .. } | Op::WriteZeroes { .. } | Op::Resize { .. } => Err(unchangeable(cx.node)),
            }
        })
    }

    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            let below = Cx { node: self.keeper(cx.node)?, rt: cx.rt };
            // Where the data are may change with the guest's next write; what they are does not.
            let (zero, len) = self.point.is_zero(below, span).await?;
            let place = if zero {
                Where::Zero { at: None }
            } else {
                Where::Data { child: SELF, at: None, compressed: false }
            };
            Ok(Extent { len, place })
        })
    }

    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        match change {
            NodeChange::Resize { .. } => Box::pin(async move { Err(unchangeable(cx.node)) }),
            NodeChange::Access { .. } | NodeChange::Backing(_) => dolmen_graph::prepare_nothing(cx, change),
        }
    }
}
