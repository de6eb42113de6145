//! The filter of an intermediate commit: it passes everything.
//!
//! It stands above the top node, so that the job can claim on it that nothing is written, copied on read or
//! resized from above while the commit goes on.

use dolmen_graph::{AccessRule, Class, Cx, Driver, DriverKind, Node, Op, Plan, Request};
use dolmen_rt::LocalFuture;
use dolmen_types::{Result, Span};

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

    dolmen_graph::pass_through! { 0: size, limits, status, event, prepare, close, image, describe }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LETS_CHANGE
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        Plan::pass(request, span)
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { cx.forward(0, op).await })
    }
}
