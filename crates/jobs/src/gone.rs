//! What an image lies over whose point in time has ended.
//!
//! While a backup saves to an overlay of its source, the overlay shows the source as it was. When the job ends,
//! nobody saves any more, and what the overlay has not got would read as what is in the source now. Somebody
//! who reads it all the same (an export that its user has not removed yet) gets an error for that part, not
//! wrong data; and the guest is not kept from writing by a reader.

use std::sync::Arc;

use dolmen_graph::{
    AccessRule, Class, Cx, Description, Draft, Driver, DriverKind, Extent, ImageOps, Limits, Node,
    NodeChange, NodeDef, NodeFlags, Op, Plan, Prepared, Request,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Error, ErrorKind, NodeName, OpId, Result, Span, Value};

/// Registry row; not in the registry.
static GONE: DriverKind = DriverKind::new(
    "point-in-time-gone",
    Class::Protocol,
    "in place of a point in time that has ended",
    &[],
    crate::mirror_filter::not_from_options,
);

/// Puts it below the image that `saved_in` shows, if that lies over `source` and is read by others than `op`,
/// which ends.
pub(crate) fn end_of_point(d: &mut Draft, op: &OpId, source: &NodeName, saved_in: &NodeName) -> Result<()> {
    let image = d.content(saved_in);
    let Some(below) = d.child(&image, "backing").cloned() else { return Ok(()) };
    let lies_over = d.chain(&below).contains(&d.content(source));
    if !lies_over || !d.is_read_without(op, &image) {
        return Ok(());
    }
    let driver = Gone { what: image.clone(), op: op.clone(), size: d.built_node(&below)?.size() };
    let name = d.fresh_name();
    d.add_node(NodeDef {
        name: name.clone(),
        anonymous: true,
        kind: &GONE,
        rule: AccessRule::LEAF,
        flags: NodeFlags { read_only: true, ..NodeFlags::default() },
        owner: None,
        monitor: false,
        options: Value::Null,
    })?;
    d.set_driver(&name, Arc::new(driver), false);
    d.take_back(&image, &name)
}

#[derive(Debug)]
struct Gone {
    what: NodeName,
    op: OpId,
    size: u64,
}

impl Gone {
    fn error(&self) -> Error {
        Error::new(
            ErrorKind::Io,
            format!(
                "node '{}' showed a point in time that ended with job '{}', and this part had not been saved in it",
                self.what, self.op
            ),
        )
        .remedy("remove what reads the node, then the node")
    }
}

impl Driver for Gone {
    fn kind(&self) -> &'static DriverKind {
        &GONE
    }

    fn size(&self, _: &Node) -> u64 {
        self.size
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits::BYTES
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, _: &Node, _: Request, _: Span) -> Plan {
        Plan::Slow
    }

    fn run<'a>(&'a self, _: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        let done = if matches!(op, Op::Flush) { Ok(()) } else { Err(self.error()) };
        Box::pin(async move { done })
    }

    fn status<'a>(&'a self, _: Cx<'a>, _: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move { Err(self.error()) })
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
            NodeChange::Resize { .. } => Box::pin(async { Err(self.error()) }),
            NodeChange::Access { .. } | NodeChange::Backing(_) => dolmen_graph::prepare_nothing(cx, change),
        }
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}
