//! A stand-in for an image format: an overlay of one cluster size, with its allocation map in
//! memory, that does what the contract of [`ReadFlags::POPULATE`] asks for.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use dolmen_graph::{
    AccessRule, ChildDef, ChildSpec, Class, Common, Cx, Description, Driver, DriverKind, Extent, ImageOps,
    Limits, Node, NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prepared, RangeLock, Request, Where,
};
use dolmen_rt::{LocalFuture, Memory};
use dolmen_types::{BlkEvent, ChildRole, Options, ReadFlags, Result, Span, Value, WriteFlags};

pub(super) const CLUSTER: u64 = 4096;

pub(super) static OVERLAY: DriverKind = DriverKind {
    maps: true,
    ..DriverKind::new("overlay", Class::Format, "a stand-in for a format", &[], parse)
};

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let mut children =
        vec![ChildSpec { name: "file", role: ChildRole::Metadata, def: ChildDef::take(options, "file")? }];
    if let Some(backing) = options.take("backing") {
        let def = ChildDef::from_value("backing", backing, true)?;
        children.push(ChildSpec { name: "backing", role: ChildRole::Backing, def });
    }
    // Numbers of the clusters that hold data already.
    let mut allocated = BTreeSet::new();
    for n in options.take_list("allocated")?.unwrap_or_default() {
        if let Value::Int(n) = n {
            allocated.insert(n as u64);
        }
    }
    Ok(Parsed { children, rule: AccessRule::FORMAT, relies_down_to: None, open: Box::new(Open(allocated)) })
}

struct Open(BTreeSet<u64>);

impl Opener for Open {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let driver = Arc::new(Overlay { allocated: Mutex::new(self.0), ranges: RangeLock::new() });
            Ok(Opened::of(driver))
        })
    }
}

#[derive(Debug)]
struct Overlay {
    allocated: Mutex<BTreeSet<u64>>,
    ranges: RangeLock,
}

impl Overlay {
    fn has(&self, span: Span) -> bool {
        self.allocated.lock().unwrap().contains(&(span.offset() / CLUSTER))
    }

    async fn fill(&self, cx: Cx<'_>, span: Span) -> Result<()> {
        if self.has(span) {
            return Ok(());
        }
        let cluster = span.align_out(CLUSTER);
        let bounce = Memory::zeroed(CLUSTER as usize).iovec();
        if let Some(backing) = cx.node.child_index("backing") {
            cx.read_backing(backing)?.read(cluster, &bounce, ReadFlags::NONE).await?;
        }
        let file = cx.write(0)?;
        file.event(BlkEvent::WriteAio)?;
        file.write(cluster, &bounce, WriteFlags::NONE).await?;
        self.allocated.lock().unwrap().insert(span.offset() / CLUSTER);
        Ok(())
    }
}

impl Driver for Overlay {
    fn kind(&self) -> &'static DriverKind {
        &OVERLAY
    }
    fn size(&self, node: &Node) -> u64 {
        node.children[0].node.size()
    }
    fn limits(&self, _: &Node) -> Limits {
        Limits { cluster_size: CLUSTER as u32, ..Limits::BYTES }
    }
    fn access_rule(&self) -> AccessRule {
        AccessRule::FORMAT
    }
    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Read(_) if self.has(span) => {
                Plan::pass(request, span.blocks(CLUSTER).next().unwrap_or(span))
            }
            Request::Flush | Request::Resize => Plan::pass(request, span),
            _ => Plan::Slow,
        }
    }
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let span = match op {
                Op::Read { span, .. }
                | Op::Write { span, .. }
                | Op::WriteZeroes { span, .. }
                | Op::Discard { span, .. } => span,
                Op::Flush | Op::Resize { .. } => return cx.forward(0, op).await,
            };
            for piece in span.blocks(CLUSTER) {
                let at = (piece.offset() - span.offset()) as usize;
                let len = piece.len() as usize;
                let _held = self.ranges.lock(piece.align_out(CLUSTER)).await;
                match op {
                    Op::Read { to, flags, .. } => {
                        if flags.has(ReadFlags::POPULATE) {
                            self.fill(cx, piece).await?;
                        }
                        let part = to.slice(at, len);
                        match cx.node.child_index("backing") {
                            _ if self.has(piece) => cx.read(0)?.read(piece, &part, ReadFlags::NONE).await?,
                            Some(b) => cx.read_backing(b)?.read(piece, &part, ReadFlags::NONE).await?,
                            None => part.fill(0),
                        }
                    }
                    Op::Write { from, .. } => {
                        self.fill(cx, piece).await?;
                        cx.write(0)?.write(piece, &from.slice(at, len), WriteFlags::NONE).await?;
                    }
                    Op::WriteZeroes { flags, .. } => {
                        self.fill(cx, piece).await?;
                        cx.write(0)?.write_zeroes(piece, flags).await?;
                    }
                    Op::Discard { .. } | Op::Flush | Op::Resize { .. } => {}
                }
            }
            Ok(())
        })
    }
    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            let first = span.blocks(CLUSTER).next().unwrap_or(span);
            let at = Some(span.offset());
            let place = if self.has(first) {
                Where::Data { child: 0, at, compressed: false }
            } else {
                Where::Unallocated
            };
            Ok(Extent { len: first.len(), place })
        })
    }
    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }
    fn prepare<'a>(&'a self, _: Cx<'a>, _: &'a NodeChange) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async { Ok(Box::new(()) as Box<dyn Prepared>) })
    }
    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}
