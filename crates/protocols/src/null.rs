//! `null-co` and `null-aio`: a disk of any size that keeps nothing, for measuring what lies above it. The two names are
//! one driver: what differs in QEMU is how its requests are scheduled there.
//!
//! Requests are answered by the plan, without a future, unless a latency is asked for or data have to be left as they
//! are: reads then say that they did something although they did not, as QEMU's driver does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dolmen_graph::option::{Flag, Number, Size};
use dolmen_graph::{
    AccessRule, Class, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node, NodeChange, Op,
    OpenCx, Opened, Opener, Parsed, Plan, Prepared, ProtocolName, Registry, Request, SELF, Where,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Error, ErrorKind, Options, Result, Span};

/// Registry row.
pub static NULL_CO: DriverKind = DriverKind {
    protocols: &["null-co"],
    from_name: Some(from_name),
    ..DriverKind::new(
        "null-co",
        Class::Protocol,
        "accepts every request and keeps nothing",
        NullOptions::ROWS,
        |options, _| parse(options, &NULL_CO),
    )
};

/// Registry row.
pub static NULL_AIO: DriverKind = DriverKind {
    protocols: &["null-aio"],
    from_name: Some(from_name),
    ..DriverKind::new(
        "null-aio",
        Class::Protocol,
        "null-co under another name",
        NullOptions::ROWS,
        |options, _| parse(options, &NULL_AIO),
    )
};

fn from_name(_: Registry, name: ProtocolName<'_>) -> Result<Options> {
    match name.rest {
        "//" => Ok(Options::new().with("driver", name.protocol)),
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("The only allowed filename for this driver is '{}://'", name.protocol),
        )),
    }
}

dolmen_graph::options! {
    struct NullOptions {
        default "size" size: Size = "1G" => "size in bytes";
        default "latency-ns" latency: Number = "0" => "how long a request takes, in nanoseconds";
        default "read-zeroes" read_zeroes: Flag = "off" => "reads give zeroes; off leaves the buffer as it is";
    }
}

fn parse(options: &mut Options, kind: &'static DriverKind) -> Result<Parsed> {
    let plain = !NullOptions::ROWS.iter().any(|o| options.has(o.name));
    let NullOptions { size, latency, read_zeroes } = NullOptions::take(options)?;
    let null =
        Null { kind, plain, size: AtomicU64::new(size), latency: Duration::from_nanos(latency), read_zeroes };
    Ok(Parsed {
        children: Vec::new(),
        rule: AccessRule::LEAF,
        relies_down_to: None,
        open: Box::new(OpenNull(null)),
    })
}

struct OpenNull(Null);

impl Opener for OpenNull {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move { Ok(Opened::of(Arc::new(self.0))) })
    }
}

#[derive(Debug)]
struct Null {
    kind: &'static DriverKind,
    /// No option was given.
    plain: bool,
    size: AtomicU64,
    latency: Duration,
    read_zeroes: bool,
}

impl Driver for Null {
    fn kind(&self) -> &'static DriverKind {
        self.kind
    }

    fn size(&self, _: &Node) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits { fast_zeroes: true, discards: true, ..Limits::BYTES }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        let len = span.len();
        if !self.latency.is_zero() {
            return Plan::Slow;
        }
        match request {
            Request::Read(_) if self.read_zeroes => Plan::Zeroes { len },
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Flush => Plan::Done { len },
            Request::Resize => Plan::Slow,
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if !self.latency.is_zero() {
                cx.rt.sleep(self.latency).await;
            }
            match op {
                Op::Read { span: _, to, flags: _ } => {
                    if self.read_zeroes {
                        to.fill(0);
                    }
                }
                Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } | Op::Flush => {}
                Op::Resize { size, prealloc: _ } => self.size.store(size, Ordering::Relaxed),
            }
            Ok(())
        })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let at = span.offset();
        let place = if self.read_zeroes {
            Where::Zero { at: Some((SELF, at)) }
        } else {
            Where::Data { child: SELF, at: Some(at), compressed: false }
        };
        Box::pin(async move { Ok(Extent { len: span.len(), place }) })
    }

    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        dolmen_graph::prepare_nothing(cx, change)
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        // It takes no space, and says so as QEMU's driver does. Its name stands
        // for the disk without options.
        let filename = self.plain.then(|| format!("{}://", self.kind.name));
        Description { actual_size: Some(0), filename, ..Description::default() }
    }
}
