//! `blkdebug`: injects errors, for testing what lies above.
//!
//! Rules come from the options `inject-error` and `set-state`, and from a configuration
//! file (`config`). The node above says which point it has come to
//! ([`Io::event`](dolmen_graph::Io::event)); the rules ([`rules`]) then decide which of the
//! requests that follow fail, and how.
//!
//! The node can also pretend to be a picky disk: with `align` it takes requests apart so
//! that its child sees whole blocks only, with `max-transfer`, `max-write-zero` and
//! `max-discard` it splits longer ones, and `opt-*` changes what it tells about itself.
//!
//! Events `flush_to_os` and `flush_to_disk` are raised by a flush that arrives here.

mod config;
mod rules;

use std::sync::{Arc, Mutex, MutexGuard};

use dolmen_graph::{
    AccessRule, ChildDef, ChildSpec, Class, Common, Cx, Description, Driver, DriverKind, Extent, Limits,
    Node, NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prepared, RangeLock, Request, Where,
};
use dolmen_rt::{LocalFuture, Memory};
use dolmen_types::{
    BlkEvent, ChildRole, Error, ErrorKind, OptionSpec, OptionType, Options, ReadFlags, Result, ResultExt,
    Span, Value, WriteFlags,
};

use rules::{INJECT, IoType, Machine, Rules, SET_STATE};

/// Registry row.
pub static BLKDEBUG: DriverKind = DriverKind {
    name: "blkdebug",
    class: Class::Filter,
    help: "injects errors, for tests",
    options: &[
        OptionSpec::required("image", OptionType::Node, "the node to stand on"),
        OptionSpec::optional("config", OptionType::Str, "file with [inject-error] and [set-state] sections"),
        OptionSpec::optional(
            "align",
            OptionType::Size,
            "pretend to need this alignment (default: the image's)",
        ),
        OptionSpec::optional(
            "max-transfer",
            OptionType::Size,
            "split longer reads and writes (default: none)",
        ),
        OptionSpec::optional("opt-write-zero", OptionType::Size, "preferred multiple for zero writes"),
        OptionSpec::optional("max-write-zero", OptionType::Size, "split longer zero writes (default: none)"),
        OptionSpec::optional("opt-discard", OptionType::Size, "preferred multiple for discards"),
        OptionSpec::optional("max-discard", OptionType::Size, "split longer discards (default: none)"),
        OptionSpec::optional("inject-error", OptionType::ObjectList(INJECT), "rules that make requests fail"),
        OptionSpec::optional("set-state", OptionType::ObjectList(SET_STATE), "rules that change the state"),
    ],
    create_options: &[],
    maps: false,
    parse,
    probe: None,
    create: None,
};

const IMAGE: usize = 0;

/// The longest configuration file that is read, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// The largest alignment, in bytes.
const ALIGN_MAX: u64 = 1 << 30;

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let image = ChildDef::take(options, "image")?;
    for perms in ["take-child-perms", "unshare-child-perms"] {
        if options.has(perms) {
            return Err(Error::new(ErrorKind::Unsupported, format!("blkdebug does not know '{perms}' here"))
                .remedy("leave it out"));
        }
    }
    let config = options.take_str("config")?.filter(|c| !c.is_empty());
    let shape = Shape::take(options)?;
    let mut rules = Rules::default();
    for section in ["inject-error", "set-state"] {
        for rule in options.take_list(section)?.unwrap_or_default() {
            let rule = match rule {
                Value::Map(_) => Options::from_value(rule)?,
                other => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("'{section}' expects objects, not {}", other.kind()),
                    ));
                }
            };
            rules.add(section, rule)?;
        }
    }
    Ok(Parsed {
        children: vec![ChildSpec { name: "image", role: ChildRole::Filtered, def: image }],
        rule: AccessRule::Filter,
        relies_down_to: None,
        open: Box::new(Open { config, shape, rules }),
    })
}

struct Open {
    config: Option<String>,
    shape: Shape,
    rules: Rules,
}

impl Opener for Open {
    fn open<'a>(mut self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            // The sections of the file come first, as if its rules had been given before.
            let mut rules = Rules::default();
            if let Some(path) = self.config.take() {
                let text = read_config(&cx, &path).await?;
                config::parse(&text, &mut rules).context(|| path)?;
            }
            rules.append(self.rules);
            let machine = Mutex::new(Machine::new(&rules));
            let driver = Arc::new(BlkDebug { shape: self.shape, rules, machine, ranges: RangeLock::new() });
            Ok(Opened::of(driver))
        })
    }
}

/// Reads the configuration file, off the core: opening a file may wait for the file system.
async fn read_config(cx: &OpenCx<'_>, path: &str) -> Result<String> {
    let what = || format!("Could not read blkdebug config file '{path}'");
    let Some(io) = cx.rt.io() else {
        return Err(Error::new(ErrorKind::Unsupported, "the simulation has no files").context(what()));
    };
    let name = path.to_owned();
    let text = io.blocking(move || read_at_most(&name, CONFIG_MAX + 1)).await.context(what)?;
    if text.len() as u64 > CONFIG_MAX {
        return Err(
            Error::new(ErrorKind::Limit, format!("it is longer than {CONFIG_MAX} bytes")).context(what())
        );
    }
    Ok(text)
}

fn read_at_most(path: &str, max: u64) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(max).read_to_string(&mut text)?;
    Ok(text)
}

/// The disk that the node pretends to be; zero: as the image is.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    align: u32,
    max_transfer: u32,
    opt_write_zero: u32,
    max_write_zero: u32,
    opt_discard: u32,
    max_discard: u32,
}

impl Shape {
    fn take(options: &mut Options) -> Result<Shape> {
        let align = match options.take_size("align")?.unwrap_or(0) {
            a if a <= ALIGN_MAX && (a == 0 || a.is_power_of_two()) => a,
            a => return Err(unmet("align", a)),
        };
        let mut size = |name: &str, multiple_of: u64| match options.take_size(name)?.unwrap_or(0) {
            n if n <= i32::MAX as u64 && n.is_multiple_of(multiple_of.max(1)) => Ok(n),
            n => Err(unmet(name, n)),
        };
        let max_transfer = size("max-transfer", align)?;
        let opt_write_zero = size("opt-write-zero", align)?;
        let max_write_zero = size("max-write-zero", opt_write_zero.max(align))?;
        let opt_discard = size("opt-discard", align)?;
        let max_discard = size("max-discard", opt_discard.max(align))?;
        Ok(Shape {
            align: align as u32,
            max_transfer: max_transfer as u32,
            opt_write_zero: opt_write_zero as u32,
            max_write_zero: max_write_zero as u32,
            opt_discard: opt_discard as u32,
            max_discard: max_discard as u32,
        })
    }

    const fn max(&self, request: Request) -> u64 {
        (match request {
            Request::Read(_) | Request::Write(_) => self.max_transfer,
            Request::WriteZeroes(_) => self.max_write_zero,
            Request::Discard(_) => self.max_discard,
            Request::Flush | Request::Resize => 0,
        }) as u64
    }

    fn aligned(&self, span: Span) -> bool {
        self.align <= 1 || span.is_aligned(self.align.into())
    }
}

fn unmet(name: &str, value: u64) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Cannot meet constraints with {name} {value}"))
        .remedy("alignments are powers of two, and limits multiples of them")
}

#[derive(Debug)]
struct BlkDebug {
    shape: Shape,
    rules: Rules,
    /// Which rules are active. Never held across an await.
    machine: Mutex<Machine>,
    /// Blocks that are being read, changed and written because of `align`.
    ranges: RangeLock,
}

impl BlkDebug {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().expect("blkdebug rules")
    }

    /// Fails if a rule says so.
    async fn inject(&self, io: IoType, span: Option<Span>) -> Result<()> {
        let hit = self.machine().take(&self.rules, io, span);
        let Some(hit) = hit else { return Ok(()) };
        if !hit.immediately {
            futures_lite::future::yield_now().await;
        }
        Err(Error::from_errno(hit.errno, format!("blkdebug: injected error in a {}", io.as_str())))
    }

    /// Does a request with a span piece by piece: no piece is longer than the limits say,
    /// and the child sees whole blocks only.
    async fn by_pieces(&self, cx: Cx<'_>, op: Op<'_>, span: Span) -> Result<()> {
        let align = u64::from(self.shape.align.max(1));
        let max = match self.shape.max(op.request()) {
            0 => u64::MAX,
            max => max,
        };
        let mut rest = span;
        while !rest.is_empty() {
            let whole = rest.len().min(max) / align * align;
            let piece = if rest.offset().is_multiple_of(align) && whole > 0 {
                rest.prefix(whole)
            } else {
                rest.prefix(align - rest.offset() % align)
            };
            let at = (rest.offset() - span.offset()) as usize;
            if piece.is_aligned(align) {
                self.blocks(cx, op, piece, at).await?;
            } else {
                self.part_of_block(cx, op, piece, at).await?;
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// Does the part of a request that starts `at` bytes into it.
    async fn blocks(&self, cx: Cx<'_>, op: Op<'_>, piece: Span, at: usize) -> Result<()> {
        let io = IoType::of(op.request());
        if let Some(io) = io {
            self.inject(io, Some(piece)).await?;
        }
        let len = piece.len() as usize;
        match op {
            Op::Read { to, flags, .. } => cx.read(IMAGE)?.read(piece, &to.slice(at, len), flags).await,
            Op::Write { from, flags, .. } if flags.has(WriteFlags::UNCHANGED) => {
                cx.write_unchanged(IMAGE)?.write(piece, &from.slice(at, len), flags).await
            }
            Op::Write { from, flags, .. } => cx.write(IMAGE)?.write(piece, &from.slice(at, len), flags).await,
            Op::WriteZeroes { flags, .. } if flags.has(WriteFlags::UNCHANGED) => {
                cx.write_unchanged(IMAGE)?.write_zeroes(piece, flags).await
            }
            Op::WriteZeroes { flags, .. } => cx.write(IMAGE)?.write_zeroes(piece, flags).await,
            Op::Discard { flags, .. } if flags.has(WriteFlags::UNCHANGED) => {
                cx.write_unchanged(IMAGE)?.discard(piece, flags).await
            }
            Op::Discard { flags, .. } => cx.write(IMAGE)?.discard(piece, flags).await,
            Op::Flush | Op::Resize { .. } => Ok(()),
        }
    }

    async fn part_of_block(&self, cx: Cx<'_>, op: Op<'_>, piece: Span, at: usize) -> Result<()> {
        // The last block of the image may be cut off by its end.
        let outer = piece.align_out(self.shape.align.into());
        let size = cx.node.size().max(piece.end());
        let block = Span::from_range(outer.offset(), outer.end().min(size));
        let inside = (piece.offset() - block.offset()) as usize;
        let len = piece.len() as usize;
        let bounce = Memory::zeroed(block.len() as usize).iovec();
        let (data, flags) = match op {
            Op::Read { to, flags, .. } => {
                let whole = Op::Read { span: block, to: &bounce, flags };
                self.blocks(cx, whole, block, 0).await?;
                to.slice(at, len).copy_from(&bounce.slice(inside, len));
                return Ok(());
            }
            Op::Write { from, flags, .. } => (Some(from.slice(at, len)), flags),
            Op::WriteZeroes { flags, .. } => {
                (None, flags.without(WriteFlags::MAY_UNMAP).without(WriteFlags::NO_FALLBACK))
            }
            // A part of a block can't be given back.
            Op::Discard { .. } | Op::Flush | Op::Resize { .. } => return Ok(()),
        };
        let _held = self.ranges.lock(block).await;
        let head = inside > 0;
        self.reach(if head { BlkEvent::PwritevRmwHead } else { BlkEvent::PwritevRmwTail });
        let old = Op::Read { span: block, to: &bounce, flags: ReadFlags::NONE };
        self.blocks(cx, old, block, 0).await?;
        self.reach(if head { BlkEvent::PwritevRmwAfterHead } else { BlkEvent::PwritevRmwAfterTail });
        match data {
            Some(data) => bounce.slice(inside, len).copy_from(&data),
            None => bounce.slice(inside, len).fill(0),
        }
        self.blocks(cx, Op::Write { span: block, from: &bounce, flags }, block, 0).await
    }

    fn reach(&self, event: BlkEvent) {
        self.machine().event(&self.rules, event);
    }
}

impl Driver for BlkDebug {
    fn kind(&self) -> &'static DriverKind {
        &BLKDEBUG
    }

    fn size(&self, node: &Node) -> u64 {
        node.children[IMAGE].node.size()
    }

    fn limits(&self, node: &Node) -> Limits {
        let child = &node.children[IMAGE].node;
        let mut limits = child.driver.limits(child);
        limits.request_alignment = limits.request_alignment.max(self.shape.align);
        let or = |ours: u32, theirs: u32| if ours == 0 { theirs } else { ours };
        limits.max_transfer = or(self.shape.max_transfer, limits.max_transfer);
        limits.opt_discard = or(self.shape.opt_discard.max(self.shape.opt_write_zero), limits.opt_discard);
        limits
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::Filter
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        let machine = self.machine();
        let Some(io) = IoType::of(request) else { return Plan::pass(request, span) };
        if io == IoType::Flush {
            let events = [BlkEvent::FlushToOs, BlkEvent::FlushToDisk];
            let quiet = !events.iter().any(|e| self.rules.listens(*e));
            return if quiet && !machine.hits(&self.rules, io, None) {
                Plan::pass(request, span)
            } else {
                Plan::Slow
            };
        }
        let piece = match self.shape.max(request) {
            0 => span,
            max => span.prefix(max),
        };
        if self.shape.aligned(span) && !machine.hits(&self.rules, io, Some(piece)) {
            Plan::pass(request, piece)
        } else {
            Plan::Slow
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        match op {
            Op::Read { span, .. }
            | Op::Write { span, .. }
            | Op::WriteZeroes { span, .. }
            | Op::Discard { span, .. } => Box::pin(self.by_pieces(cx, op, span)),
            Op::Flush => Box::pin(async move {
                self.reach(BlkEvent::FlushToOs);
                self.reach(BlkEvent::FlushToDisk);
                self.inject(IoType::Flush, None).await?;
                cx.forward(IMAGE, op).await
            }),
            Op::Resize { .. } => Box::pin(async move { cx.forward(IMAGE, op).await }),
        }
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            self.inject(IoType::BlockStatus, Some(span)).await?;
            Ok(Extent { len: span.len(), place: Where::Through { child: IMAGE as u8, at: span.offset() } })
        })
    }

    fn event(&self, node: &Node, event: BlkEvent) -> Result<()> {
        self.reach(event);
        let child = &node.children[IMAGE].node;
        child.driver.event(child, event)
    }

    fn prepare<'a>(
        &'a self,
        _: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        match change {
            NodeChange::Access { .. } => {}
        }
        Box::pin(async { Ok(Box::new(()) as Box<dyn Prepared>) })
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn set_backing<'a>(
        &'a self,
        cx: Cx<'a>,
        _: Option<dolmen_graph::BackingName<'a>>,
    ) -> LocalFuture<'a, Result<()>> {
        dolmen_graph::no_backing(cx)
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}
