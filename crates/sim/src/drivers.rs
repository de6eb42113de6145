//! The leaf drivers of the simulation: the disk with crashes, and plain memory.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use dolmen_graph::{
    AccessRule, Class, Common, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node,
    NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prepared, Request, SELF, Where,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Error, ErrorKind, OptionSpec, OptionType, Options, Result, Span};

use crate::{Image, SimDisk};

/// Registry row of the simulated disk. It can't be made from options: a test makes a
/// [`SimDisk`] and adds it to a draft.
pub static SIM_DISK: DriverKind =
    DriverKind::new("sim-disk", Class::Protocol, "a simulated disk that can lose power", &[], parse_sim_disk);

fn parse_sim_disk(_: &mut Options, _: &Common) -> Result<Parsed> {
    Err(Error::new(ErrorKind::InvalidInput, "a simulated disk is made by the test, not from options"))
}

/// Registry row of the disk in memory.
pub static MEMORY: DriverKind = DriverKind::new(
    "memory",
    Class::Protocol,
    "a disk in memory",
    &[OptionSpec::optional("size", OptionType::Size, "size in bytes (default 0)")],
    parse_memory,
);

fn parse_memory(options: &mut Options, _: &Common) -> Result<Parsed> {
    let size = options.take_size("size")?.unwrap_or(0);
    let open = Box::new(OpenMemory { size });
    Ok(Parsed { children: Vec::new(), rule: AccessRule::LEAF, relies_down_to: None, open })
}

struct OpenMemory {
    size: u64,
}

impl Opener for OpenMemory {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let driver = Arc::new(MemoryDisk::new(Image::new(self.size)));
            Ok(Opened::of(driver))
        })
    }
}

/// A disk in memory: no cache, no latency, no faults. Clones are the same disk.
#[derive(Clone)]
pub struct MemoryDisk {
    image: Arc<Mutex<Image>>,
}

impl MemoryDisk {
    /// A disk with this content.
    pub fn new(image: Image) -> MemoryDisk {
        MemoryDisk { image: Arc::new(Mutex::new(image)) }
    }

    /// The content now.
    pub fn image(&self) -> Image {
        self.lock().clone()
    }

    /// Other content, as if somebody had changed the disk behind everybody's back.
    pub fn replace(&self, image: Image) {
        *self.lock() = image;
    }

    /// Never held across an await.
    fn lock(&self) -> MutexGuard<'_, Image> {
        self.image.lock().expect("memory disk")
    }

    fn apply(&self, op: Op<'_>) {
        let mut image = self.lock();
        match op {
            Op::Read { span, to, flags: _ } => {
                let mut bytes = vec![0; to.len()];
                image.read(span.offset(), &mut bytes);
                to.copy_from_slice(0, &bytes);
            }
            Op::Write { span, from, flags: _ } => image.write(span.offset(), &from.to_vec()),
            Op::WriteZeroes { span, flags: _ } => image.zero(span.offset(), span.len()),
            Op::Discard { span, flags: _ } => {
                let size = image.size();
                if let Some(span) = span.intersect(Span::new(0, size)) {
                    image.zero(span.offset(), span.len());
                }
            }
            Op::Flush => {}
            Op::Resize { size, prealloc: _ } => image.resize(size),
        }
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryDisk({:?})", self.lock())
    }
}

fn limits(request_alignment: u32) -> Limits {
    Limits { request_alignment, fast_zeroes: true, discards: true, ..Limits::BYTES }
}

/// Data and holes, as a file system tells them. What lies past the end is a hole.
fn extent(image: &Image, span: Span) -> Extent {
    let (hole, len) = image.hole(span.offset(), span.len());
    let at = span.offset();
    let place = if hole {
        Where::Zero { at: Some((SELF, at)) }
    } else {
        Where::Data { child: SELF, at: Some(at), compressed: false }
    };
    Extent { len, place }
}

/// What the two leaves have in common.
macro_rules! leaf_methods {
    () => {
        fn access_rule(&self) -> AccessRule {
            AccessRule::LEAF
        }

        fn plan(&self, _: &Node, _: Request, _: Span) -> Plan {
            Plan::Slow
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
            Description::default()
        }
    };
}

impl Driver for MemoryDisk {
    fn kind(&self) -> &'static DriverKind {
        &MEMORY
    }

    fn size(&self, _: &Node) -> u64 {
        self.lock().size()
    }

    fn limits(&self, _: &Node) -> Limits {
        limits(1)
    }

    fn run<'a>(&'a self, _: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.apply(op);
            Ok(())
        })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move { Ok(extent(&self.lock(), span)) })
    }

    leaf_methods!();
}

impl Driver for SimDisk {
    fn kind(&self) -> &'static DriverKind {
        &SIM_DISK
    }

    fn size(&self, _: &Node) -> u64 {
        SimDisk::size(self)
    }

    fn limits(&self, _: &Node) -> Limits {
        limits(self.config().request_alignment)
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(SimDisk::run(self, cx.rt, op))
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move { Ok(extent(&self.image(), span)) })
    }

    leaf_methods!();
}
