//! `blkverify`: two nodes that must always hold the same data, for tests of drivers.
//!
//! The node shows `test`. Every write goes to `test` and to `raw`; every read is made of both and compared. A difference
//! is written to standard error with its offset and sector, in QEMU's words, and the read fails with `Corrupt`.
//! QEMU's process ends there; here the request ends, since a daemon has other disks, whose users have done nothing wrong.
//!
//! A write and a read of the same bytes go one after the other, or a difference could be what a write has done to one
//! node and not yet to the other. No one else may write either node, for the same reason.
//!
//! A discard is done by leaving the data as they are: what a discarded range reads as is a matter of each node. A flush
//! goes to both. Reads that only fill caches (`PREFETCH`) go to `test` alone, as nothing is seen of them.

use std::sync::Arc;

use dolmen_graph::option::Child;
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Driver, DriverKind, Limits, Node, NodeChange, Op, OpenCx,
    Opened, Opener, Parsed, Plan, Prepared, ProtocolName, RangeLock, Registry, Request, RoleRule, RuleTable,
    has_protocol, prepare_child,
};
use dolmen_rt::{IoVec, LocalFuture, Memory};
use dolmen_types::{
    Actions, ChildRole, Error, ErrorKind, Options, ReadFlags, Result, ResultExt, Span, WriteFlags,
};

/// Registry row.
pub static BLKVERIFY: DriverKind = DriverKind {
    protocols: &["blkverify"],
    from_name: Some(from_name),
    ..DriverKind::new(
        "blkverify",
        Class::Filter,
        "compares what is read of two nodes, for tests",
        BlkverifyOptions::ROWS,
        parse,
    )
};

dolmen_graph::options! {
    struct BlkverifyOptions {
        required "test" test: Child => "the node that is tested";
        required "raw" raw: Child => "the node that it is compared with";
    }
}

const TEST: usize = 0;
const RAW: usize = 1;
const SIDES: [usize; 2] = [TEST, RAW];

static RULE: RuleTable = RuleTable::one(RoleRule {
    denies: Actions::V.with(Actions::S),
    sees_all_writes: true,
    why: "compares it with another node, which has to get every write as well",
    ..RoleRule::THROUGH
});

/// How much of a read is compared at once, in bytes.
const STEP: u64 = 256 << 10;

/// `blkverify:RAW:TEST`.
fn from_name(registry: Registry, name: ProtocolName<'_>) -> Result<Options> {
    let (raw, test) = name.rest.split_once(':').ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "blkverify requires raw copy and original image path")
            .remedy("write blkverify:RAW:TEST")
    })?;
    let file = |name: &str| match has_protocol(name) {
        true => registry.protocol_name(name),
        false => Ok(registry.path_options(name)),
    };
    Ok(Options::new()
        .with("driver", BLKVERIFY.name)
        .with("raw", file(raw)?.into_value())
        // Its format is guessed, where that is permitted.
        .with("test", Options::new().with("file", file(test)?.into_value()).into_value()))
}

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let BlkverifyOptions { test, raw } = BlkverifyOptions::take(options)?;
    Ok(Parsed {
        // Only together are they what the node shows, so claims on that end at the node.
        children: vec![
            ChildSpec { name: "test", role: ChildRole::Metadata, def: test },
            ChildSpec { name: "raw", role: ChildRole::Metadata, def: raw },
        ],
        rule: AccessRule::of(&RULE),
        relies_down_to: None,
        open: Box::new(Open),
    })
}

struct Open;

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let (test, raw) = (&cx.child("test")?.node, &cx.child("raw")?.node);
            if raw.size() != test.size() {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "node '{}' has {} bytes and node '{}' has {}: they can't hold the same data",
                        test.name,
                        test.size(),
                        raw.name,
                        raw.size()
                    ),
                )
                .remedy("resize one of them"));
            }
            Ok(Opened::of(Arc::new(BlkVerify { ranges: RangeLock::new() })))
        })
    }
}

#[derive(Debug)]
struct BlkVerify {
    /// Requests of the same bytes go one after the other.
    ranges: RangeLock,
}

impl BlkVerify {
    async fn read(&self, cx: Cx<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        if flags.has(ReadFlags::PREFETCH) {
            return cx.forward(TEST, Op::Read { span, to, flags }).await;
        }
        let mut rest = span;
        while !rest.is_empty() {
            let piece = rest.prefix(STEP.min(rest.len()));
            let part = to.slice((piece.offset() - span.offset()) as usize, piece.len() as usize);
            self.compare(cx, span, piece, &part, flags).await?;
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// Reads a piece of `whole` from both nodes.
    async fn compare(
        &self,
        cx: Cx<'_>,
        whole: Span,
        piece: Span,
        to: &IoVec,
        flags: ReadFlags,
    ) -> Result<()> {
        let expected = Memory::zeroed(piece.len() as usize).iovec();
        let _held = self.ranges.lock(piece).await;
        cx.forward(TEST, Op::Read { span: piece, to, flags }).await.context(|| "the test image")?;
        let raw = Op::Read { span: piece, to: &expected, flags: flags.without(ReadFlags::POPULATE) };
        cx.forward(RAW, raw).await.context(|| "the raw image")?;
        let (mut is, mut should) = (vec![0u8; piece.len() as usize], vec![0u8; piece.len() as usize]);
        to.copy_to_slice(0, &mut is);
        expected.copy_to_slice(0, &mut should);
        let Some(at) = is.iter().zip(&should).position(|(a, b)| a != b) else { return Ok(()) };
        let at = piece.offset() + at as u64;
        let text = format!(
            "read offset={} bytes={} contents mismatch at offset {at} (sector {})",
            whole.offset(),
            whole.len(),
            at / 512
        );
        eprintln!("blkverify: {text}");
        Err(Error::new(ErrorKind::Corrupt, format!("node '{}': {text}", cx.node.name))
            .remedy("the driver of the node 'test' is wrong, or a write reached only one of the nodes: it failed, was given up, or came before"))
    }

    /// Does to both what changes a span.
    async fn change(&self, cx: Cx<'_>, span: Span, op: Op<'_>) -> Result<()> {
        let _held = self.ranges.lock(span).await;
        for side in SIDES {
            cx.forward(side, op).await?;
        }
        Ok(())
    }
}

impl Driver for BlkVerify {
    fn kind(&self) -> &'static DriverKind {
        &BLKVERIFY
    }

    dolmen_graph::pass_through! { TEST: size, status, event, close, image, describe }

    fn limits(&self, node: &Node) -> Limits {
        let [test, raw] = SIDES.map(|side| {
            let child = &node.children[side].node;
            child.driver.limits(child)
        });
        Limits {
            request_alignment: test.request_alignment.max(raw.request_alignment),
            max_transfer: [test.max_transfer, raw.max_transfer]
                .into_iter()
                .filter(|m| *m > 0)
                .min()
                .unwrap_or(0),
            fast_zeroes: test.fast_zeroes && raw.fast_zeroes,
            discards: false,
            ..test
        }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::of(&RULE)
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Discard(_) => Plan::Done { len: span.len() },
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Flush
            | Request::Resize => Plan::Slow,
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            match op {
                Op::Read { span, to, flags } => self.read(cx, span, to, flags).await,
                Op::Write { span, .. } => self.change(cx, span, op).await,
                // A node that would write zeroes as data does so: the other may be faster.
                Op::WriteZeroes { span, flags } => {
                    let flags = flags.without(WriteFlags::NO_FALLBACK);
                    self.change(cx, span, Op::WriteZeroes { span, flags }).await
                }
                Op::Discard { .. } => Ok(()),
                Op::Flush => {
                    for side in SIDES {
                        cx.forward(side, Op::Flush).await?;
                    }
                    Ok(())
                }
                Op::Resize { size, .. } => {
                    let larger = size.max(cx.node.size());
                    self.change(cx, Span::new(0, larger), op).await
                }
            }
        })
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            let test = prepare_child(cx, TEST, change).await?;
            let raw = prepare_child(cx, RAW, change).await?;
            Ok(Box::new(Both([test, raw])) as Box<dyn Prepared>)
        })
    }
}

/// A change that both nodes are prepared for.
struct Both([Box<dyn Prepared>; 2]);

impl Prepared for Both {
    fn commit(self: Box<Self>) {
        self.0.into_iter().for_each(Prepared::commit);
    }
}
