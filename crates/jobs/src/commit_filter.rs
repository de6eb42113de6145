//! The filter of an intermediate commit: it passes everything.
//!
//! It stands above the top node, so that the job can claim on it that nothing is written, copied on read or
//! resized from above while the commit goes on.

use dolmen_graph::{
    AccessRule, BackingName, Class, Cx, Description, Driver, DriverKind, Extent, Limits, Node, NodeChange,
    Op, Plan, Prepared, Request, Where, no_backing,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Result, Span};

/// Registry row; not in the registry.
pub(crate) static COMMIT_TOP: DriverKind = DriverKind::new(
    "commit_top",
    Class::Filter,
    "the filter of a commit",
    &[],
    crate::mirror_filter::not_from_options,
);

/// The driver.
#[derive(Debug)]
pub(crate) struct CommitFilter;

impl Driver for CommitFilter {
    fn kind(&self) -> &'static DriverKind {
        &COMMIT_TOP
    }

    fn size(&self, node: &Node) -> u64 {
        node.children[0].node.size()
    }

    fn limits(&self, node: &Node) -> Limits {
        let child = &node.children[0].node;
        child.driver.limits(child)
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LETS_CHANGE
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        Plan::pass(request, span)
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { cx.forward(0, op).await })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let place = Where::Through { child: 0, at: span.offset() };
        Box::pin(async move { Ok(Extent { len: span.len(), place }) })
    }

    fn event(&self, node: &Node, event: BlkEvent) -> Result<()> {
        let child = &node.children[0].node;
        child.driver.event(child, event)
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        dolmen_graph::prepare_child(cx, 0, change)
    }

    fn set_backing<'a>(&'a self, cx: Cx<'a>, _: Option<BackingName<'a>>) -> LocalFuture<'a, Result<()>> {
        no_backing(cx)
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}
