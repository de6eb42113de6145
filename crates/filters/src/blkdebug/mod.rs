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
//! Some events the node comes to itself, for every request that arrives: `flush_to_os` for a flush, `flush_to_disk` if
//! something was written since the last one; `pwritev` or `pwritev_zero` before and `pwritev_done` after the blocks of
//! a write; `pwritev_rmw_*` where only a part of a block is written. `cor_write` is the copy that a copying
//! read (copy-on-read above) has made below: the node that copies does not write through this one, so the node looks
//! which part is going to be copied, and fails it if a rule would fail that write.
//!
//! For permission tests the node can hold more on its child than its parents ask for (`take-child-perms`), and keep
//! others from what its parents would allow (`unshare-child-perms`).

mod config;
mod rules;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use dolmen_graph::option::{Child, OptionKind, Size, Text};
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Description, Driver, DriverKind, Extent, Limits, Node, Op,
    OpenCx, Opened, Opener, Parsed, Plan, ProtocolName, RangeLock, Registry, Request, RuleTable, Where,
    has_protocol, is_use, node_filename, own_status,
};
use dolmen_rt::{IoVec, LocalFuture, Memory};
use dolmen_types::{
    Actions, BlkEvent, ChildRole, Error, ErrorKind, OptionType, Options, ReadFlags, Result, ResultExt, Span,
    Value, WriteFlags,
};

use rules::{INJECT, IoType, Machine, Rules, SET_STATE};

/// Registry row.
pub static BLKDEBUG: DriverKind = DriverKind {
    protocols: &["blkdebug"],
    from_name: Some(from_name),
    ..DriverKind::new("blkdebug", Class::Filter, "injects errors, for tests", BlkdebugOptions::ROWS, parse)
};

dolmen_graph::options! {
    struct BlkdebugOptions {
        required "image" image: Child => "the node to stand on";
        default "config" config: Text = "" => "file with [inject-error] and [set-state] sections";
        default "align" align: Size = "0" => "pretend to need this alignment; 0 for the image's";
        default "max-transfer" max_transfer: Size = "0" => "split longer reads and writes; 0 for no limit";
        default "opt-write-zero" opt_write_zero: Size = "0" => "preferred multiple for zero writes";
        default "max-write-zero" max_write_zero: Size = "0" => "split longer zero writes; 0 for no limit";
        default "opt-discard" opt_discard: Size = "0" => "preferred multiple for discards";
        default "max-discard" max_discard: Size = "0" => "split longer discards; 0 for no limit";
        optional "inject-error" inject_error: Inject => "rules that make requests fail";
        optional "set-state" set_state: SetState => "rules that change the state";
        optional "take-child-perms" take: Permissions =>
            "permissions to take on the image besides what users of this node need";
        optional "unshare-child-perms" unshare: Permissions =>
            "permissions on the image to keep from others";
    }
}

/// A list of rules that make requests fail.
enum Inject {}

impl OptionKind for Inject {
    const TYPE: OptionType = OptionType::ObjectList(INJECT);
    type Value = Vec<Options>;
    fn take(options: &mut Options, name: &str) -> Result<Option<Vec<Options>>> {
        objects(options, name)
    }
}

/// A list of rules that change the state.
enum SetState {}

impl OptionKind for SetState {
    const TYPE: OptionType = OptionType::ObjectList(SET_STATE);
    type Value = Vec<Options>;
    fn take(options: &mut Options, name: &str) -> Result<Option<Vec<Options>>> {
        objects(options, name)
    }
}

fn objects(options: &mut Options, name: &str) -> Result<Option<Vec<Options>>> {
    let Some(list) = options.take_list(name)? else { return Ok(None) };
    let object = |v| match v {
        Value::Map(_) => Options::from_value(v),
        other => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("'{name}' expects objects, not {}", other.kind()),
        )),
    };
    list.into_iter().map(object).collect::<Result<_>>().map(Some)
}

/// Permissions, by the words that clients know.
enum Permissions {}

impl OptionKind for Permissions {
    const TYPE: OptionType = OptionType::EnumList(PERMISSIONS);
    type Value = Actions;
    fn take(options: &mut Options, name: &str) -> Result<Option<Actions>> {
        permissions(options, name).map(Some)
    }
}

/// `blkdebug:CONFIG:IMAGE`.
fn from_name(registry: Registry, name: ProtocolName<'_>) -> Result<Options> {
    let (config, image) = name.rest.split_once(':').ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "blkdebug requires both config file and image path")
            .remedy("write blkdebug:CONFIG:IMAGE; CONFIG may be empty")
    })?;
    let image = match has_protocol(image) {
        true => registry.protocol_name(image)?,
        false => registry.path_options(image),
    };
    let options = Options::new().with("driver", BLKDEBUG.name).with("image", image.into_value());
    Ok(if config.is_empty() { options } else { options.with("config", config) })
}

const IMAGE: usize = 0;

/// It acts on the events of its parents, and may hold more than they ask for.
static RULE: RuleTable = RuleTable { receives_events: true, ..RuleTable::THROUGH };

/// The longest configuration file that is read, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// The longest copy of a copying read that is looked at at once, in bytes.
const COPY_MAX: u64 = 16 << 20;

/// The largest alignment, in bytes.
const ALIGN_MAX: u64 = 1 << 30;

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let given = BlkdebugOptions::take(options)?;
    let held = Held { take: given.take.unwrap_or_default(), unshare: given.unshare.unwrap_or_default() };
    let shape = Shape::of(&given)?;
    let mut rules = Rules::default();
    for (section, list) in [("inject-error", given.inject_error), ("set-state", given.set_state)] {
        for rule in list.unwrap_or_default() {
            rules.add(section, rule)?;
        }
    }
    let config = Some(given.config).filter(|c| !c.is_empty());
    Ok(Parsed {
        children: vec![ChildSpec { name: "image", role: ChildRole::Filtered, def: given.image }],
        rule: held.rule(),
        relies_down_to: None,
        open: Box::new(Open { config, shape, held, rules }),
    })
}

/// The words of the permissions, as clients know them.
const PERMISSIONS: &[&str] = &["consistent-read", "write", "write-unchanged", "resize"];

fn permissions(options: &mut Options, name: &str) -> Result<Actions> {
    let mut out = Actions::NONE;
    for word in options.take_list(name)?.unwrap_or_default() {
        let word = match word {
            Value::Str(word) => word,
            other => other.kind().to_owned(),
        };
        let Some(action) = Actions::DATA.iter().find(|a| a.qmp_word() == Some(word.as_str())) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Parameter '{name}' does not accept value '{word}'"),
            )
            .remedy(format!("the permissions are: {}", PERMISSIONS.join(", "))));
        };
        out |= action.into();
    }
    Ok(out)
}

/// What is held on the image beyond what the parents of the node make it.
#[derive(Clone, Copy, Debug)]
struct Held {
    take: Actions,
    unshare: Actions,
}

impl Held {
    fn rule(self) -> AccessRule {
        AccessRule { take: self.take, unshare: self.unshare, ..AccessRule::of(&RULE) }
    }
}

struct Open {
    config: Option<String>,
    shape: Shape,
    held: Held,
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
            let driver = Arc::new(BlkDebug {
                shape: self.shape,
                held: self.held,
                rules,
                machine,
                ranges: RangeLock::new(),
                written: AtomicBool::new(false),
            });
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
    let name = PathBuf::from(dolmen_types::os_name(path));
    let text =
        io.blocking_at(&name.clone(), move || read_at_most(&name, CONFIG_MAX + 1)).await.context(what)?;
    if text.len() as u64 > CONFIG_MAX {
        return Err(
            Error::new(ErrorKind::Limit, format!("it is longer than {CONFIG_MAX} bytes")).context(what())
        );
    }
    Ok(text)
}

fn read_at_most(path: &Path, max: u64) -> std::io::Result<String> {
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
    fn of(given: &BlkdebugOptions) -> Result<Shape> {
        let align = match given.align {
            a if a <= ALIGN_MAX && (a == 0 || a.is_power_of_two()) => a,
            a => return Err(unmet("align", a)),
        };
        let size = |name: &str, value: u64, multiple_of: u64| match value {
            n if n <= i32::MAX as u64 && n.is_multiple_of(multiple_of.max(1)) => Ok(n),
            n => Err(unmet(name, n)),
        };
        let max_transfer = size("max-transfer", given.max_transfer, align)?;
        let opt_write_zero = size("opt-write-zero", given.opt_write_zero, align)?;
        let max_write_zero = size("max-write-zero", given.max_write_zero, opt_write_zero.max(align))?;
        let opt_discard = size("opt-discard", given.opt_discard, align)?;
        let max_discard = size("max-discard", given.max_discard, opt_discard.max(align))?;
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

    /// In bytes; at least 1.
    fn block(&self) -> u64 {
        self.align.max(1).into()
    }
}

fn unmet(name: &str, value: u64) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Cannot meet constraints with {name} {value}"))
        .remedy("alignments are powers of two, and limits multiples of them")
}

#[derive(Debug)]
struct BlkDebug {
    shape: Shape,
    held: Held,
    rules: Rules,
    /// Which rules are active. Never held across an await.
    machine: Mutex<Machine>,
    /// Blocks that are being written, if there are blocks: one that is read, changed and written must not be
    /// written by anybody else meanwhile.
    ranges: RangeLock,
    /// Something was written since the last flush.
    written: AtomicBool,
}

/// The requests that a copying read makes of the node below, for the rules.
const COPY_TYPES: [IoType; 2] = [IoType::Write, IoType::WriteZeroes];

impl BlkDebug {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().expect("blkdebug rules")
    }

    fn reach(&self, event: BlkEvent) {
        self.machine().event(&self.rules, event);
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

    /// Whether a read that copies has to be looked at: a rule may fail the copy.
    fn watches_copies(&self, flags: ReadFlags, machine: &Machine) -> bool {
        flags.has(ReadFlags::POPULATE)
            && (self.rules.listens(BlkEvent::CorWrite)
                || COPY_TYPES.iter().any(|io| machine.may_hit(&self.rules, *io)))
    }

    /// Whole blocks around a span; the last block of the image may be cut off by its end.
    fn blocks_around(&self, cx: Cx<'_>, span: Span) -> Span {
        let outer = span.align_out(self.shape.block());
        Span::from_range(outer.offset(), outer.end().min(cx.node.size().max(span.end())))
    }

    /// Does a request that consists of whole blocks, no more at once than the limits say.
    async fn pieces(&self, cx: Cx<'_>, op: Op<'_>, span: Span) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let piece = self.first_piece(cx.node, op.request(), rest);
            let at = (rest.offset() - span.offset()) as usize;
            self.piece(cx, op, piece, at).await?;
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    /// As much of a request as may be done at once.
    fn first_piece(&self, node: &Node, request: Request, span: Span) -> Span {
        let block = self.shape.block();
        let max = match self.shape.max(request) {
            0 => return span,
            max => (max / block).max(1) * block,
        };
        if span.len() <= max {
            return span;
        }
        let image = &node.children[IMAGE].node;
        let mut limits = image.driver.limits(image);
        // What this node prefers is as good for its child as what the child prefers.
        let ours = match request {
            Request::WriteZeroes(_) => self.shape.opt_write_zero,
            Request::Discard(_) => self.shape.opt_discard,
            Request::Read(_) | Request::Write(_) | Request::Flush | Request::Resize => 0,
        };
        if ours > 0 {
            limits.opt_discard = ours;
        }
        limits.split(span, max, block)
    }

    /// Does the part of a request that starts `at` bytes into it.
    async fn piece(&self, cx: Cx<'_>, op: Op<'_>, piece: Span, at: usize) -> Result<()> {
        if let Some(io) = IoType::of(op.request()) {
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

    async fn read(&self, cx: Cx<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        let outer = self.blocks_around(cx, span);
        let (head, tail) = (span.offset() - outer.offset(), outer.end() - span.end());
        if head + tail == 0 {
            return self.pieces(cx, Op::Read { span, to, flags }, span).await;
        }
        let mut all = Memory::zeroed(head as usize).iovec();
        to.segments().iter().for_each(|s| all.push(s.clone()));
        all.push(Memory::zeroed(tail as usize).share());
        self.pieces(cx, Op::Read { span: outer, to: &all, flags }, outer).await
    }

    /// A read that copies what the image does not have. The image copies by itself; here is decided whether a rule
    /// fails the write that this would be, if it came through this node.
    async fn read_copying(&self, cx: Cx<'_>, span: Span, to: &IoVec, flags: ReadFlags) -> Result<()> {
        let image = &cx.node.children[IMAGE].node;
        let limits = image.driver.limits(image);
        let cluster = u64::from(limits.cluster_size.max(1)).max(self.shape.block());
        let mut rest = span;
        while !rest.is_empty() {
            let (present, len) = own_status(image, cx.rt, rest).await?;
            let mut piece = rest.prefix(len.max(1));
            if !present {
                let around = piece.align_out(cluster).prefix(COPY_MAX.max(cluster));
                let copied = Span::from_range(around.offset(), around.end().min(image.size()));
                piece = piece.prefix(copied.end() - piece.offset());
                self.inject(IoType::Read, Some(copied)).await?;
                let data = Memory::zeroed(copied.len() as usize).iovec();
                cx.read(IMAGE)?.read(copied, &data, ReadFlags::NONE).await?;
                self.reach(BlkEvent::CorWrite);
                let zeroes = limits.fast_zeroes && data.is_zero();
                self.inject(COPY_TYPES[usize::from(zeroes)], Some(copied)).await?;
            }
            let part = to.slice((piece.offset() - span.offset()) as usize, piece.len() as usize);
            if !present {
                // The rules have had their say about this part.
                cx.read(IMAGE)?.read(piece, &part, flags).await?;
            } else if !flags.has(ReadFlags::PREFETCH) {
                self.read(cx, piece, &part, flags.without(ReadFlags::POPULATE)).await?;
            }
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    async fn write(&self, cx: Cx<'_>, span: Span, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let outer = self.blocks_around(cx, span);
        let (head, tail) = (span.offset() - outer.offset(), outer.end() - span.end());
        let all = match head + tail {
            0 => from.clone(),
            _ => self.with_padding(cx, outer, head, from, tail).await?,
        };
        self.reach(BlkEvent::Pwritev);
        let written = self.pieces(cx, Op::Write { span: outer, from: &all, flags }, outer).await;
        self.reach(BlkEvent::PwritevDone);
        written
    }

    /// Data with what surrounds them in their blocks, of which `head` bytes lie before and `tail` behind.
    async fn with_padding(
        &self,
        cx: Cx<'_>,
        outer: Span,
        head: u64,
        from: &IoVec,
        tail: u64,
    ) -> Result<IoVec> {
        use BlkEvent::{PwritevRmwAfterHead, PwritevRmwAfterTail, PwritevRmwHead, PwritevRmwTail};
        let block = self.shape.block();
        let mut all = IoVec::new();
        if head > 0 {
            let old = self.old(cx, outer.prefix(block), [PwritevRmwHead, PwritevRmwAfterHead]).await?;
            old.slice(0, head as usize).segments().iter().for_each(|s| all.push(s.clone()));
        }
        from.segments().iter().for_each(|s| all.push(s.clone()));
        if tail > 0 {
            let start = (outer.end() - 1) / block * block;
            let last = Span::from_range(start, outer.end());
            let old = self.old(cx, last, [PwritevRmwTail, PwritevRmwAfterTail]).await?;
            let kept = old.slice((last.len() - tail) as usize, tail as usize);
            kept.segments().iter().for_each(|s| all.push(s.clone()));
        }
        Ok(all)
    }

    /// A private copy of what a block holds, with the events before and after reading it.
    async fn old(&self, cx: Cx<'_>, block: Span, [before, after]: [BlkEvent; 2]) -> Result<IoVec> {
        self.reach(before);
        let old = Memory::zeroed(block.len() as usize).iovec();
        self.pieces(cx, Op::Read { span: block, to: &old, flags: ReadFlags::NONE }, block).await?;
        self.reach(after);
        Ok(old)
    }

    /// Parts of blocks are written as data, whole ones as zeroes.
    async fn write_zeroes(&self, cx: Cx<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let whole = self.whole_blocks(cx, span);
        let as_data = async |part: Span| {
            let flags = flags.without(WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK);
            self.write(cx, part, &Memory::zeroed(part.len() as usize).iovec(), flags).await
        };
        if whole.is_empty() {
            return as_data(span).await;
        }
        if span.offset() < whole.offset() {
            as_data(Span::from_range(span.offset(), whole.offset())).await?;
        }
        self.reach(BlkEvent::PwritevZero);
        let written = self.pieces(cx, Op::WriteZeroes { span: whole, flags }, whole).await;
        self.reach(BlkEvent::PwritevDone);
        written?;
        if whole.end() < span.end() {
            as_data(Span::from_range(whole.end(), span.end())).await?;
        }
        Ok(())
    }

    /// The blocks that a span covers to their ends; none if it lies within one or two of them.
    fn whole_blocks(&self, cx: Cx<'_>, span: Span) -> Span {
        let block = self.shape.block();
        let start = span.offset().next_multiple_of(block);
        let end = if span.end() >= cx.node.size() { span.end() } else { span.end() / block * block };
        Span::from_range(start, end.max(start))
    }

    /// Does what changes a span.
    async fn change(&self, cx: Cx<'_>, op: Op<'_>) -> Result<()> {
        self.written.store(true, Relaxed);
        let (Op::Write { span, .. } | Op::WriteZeroes { span, .. } | Op::Discard { span, .. }) = op else {
            return Ok(());
        };
        let _held = match self.shape.align {
            0 | 1 => None,
            _ => Some(self.ranges.lock(self.blocks_around(cx, span)).await),
        };
        match op {
            Op::Write { span, from, flags } => self.write(cx, span, from, flags).await,
            Op::WriteZeroes { span, flags } => self.write_zeroes(cx, span, flags).await,
            // A part of a block can't be given back.
            Op::Discard { .. } => self.pieces(cx, op, self.whole_blocks(cx, span)).await,
            Op::Read { .. } | Op::Flush | Op::Resize { .. } => Ok(()),
        }
    }

    /// The events that a request comes to by itself.
    fn own_events(request: Request) -> &'static [BlkEvent] {
        match request {
            Request::Write(_) => &[BlkEvent::Pwritev, BlkEvent::PwritevDone],
            Request::WriteZeroes(_) => &[BlkEvent::PwritevZero, BlkEvent::PwritevDone],
            Request::Flush => &[BlkEvent::FlushToOs, BlkEvent::FlushToDisk],
            Request::Read(_) | Request::Discard(_) | Request::Resize => &[],
        }
    }
}

impl Driver for BlkDebug {
    fn kind(&self) -> &'static DriverKind {
        &BLKDEBUG
    }

    dolmen_graph::pass_through! { IMAGE: size, prepare, close, image }

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
        self.held.rule()
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        let Some(io) = IoType::of(request) else { return Plan::pass(request, span) };
        let machine = self.machine();
        let piece = self.first_piece(node, request, span);
        let aligned = self.shape.align <= 1 || span.is_aligned(self.shape.align.into());
        let slow = match request {
            Request::Read(flags) => !aligned || self.watches_copies(flags, &machine),
            Request::Write(_) | Request::WriteZeroes(_) | Request::Discard(_) => {
                self.written.store(true, Relaxed);
                // Somebody may be writing a part of these blocks.
                self.shape.align > 1
            }
            Request::Flush | Request::Resize => false,
        };
        let at = if io == IoType::Flush { None } else { Some(piece) };
        let heard = BlkDebug::own_events(request).iter().any(|e| self.rules.listens(*e));
        if slow || heard || machine.hits(&self.rules, io, at) {
            Plan::Slow
        } else {
            Plan::pass(request, piece)
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        match op {
            Op::Read { span, to, flags } => Box::pin(async move {
                let watched = self.watches_copies(flags, &self.machine());
                if watched {
                    self.read_copying(cx, span, to, flags).await
                } else {
                    self.read(cx, span, to, flags).await
                }
            }),
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } => Box::pin(self.change(cx, op)),
            Op::Flush => Box::pin(async move {
                self.reach(BlkEvent::FlushToOs);
                // With `cache.no-flush` the flush is the business of nodes below only.
                if !cx.node.flags.no_flush {
                    if self.written.swap(false, Relaxed) {
                        self.reach(BlkEvent::FlushToDisk);
                    }
                    self.inject(IoType::Flush, None).await?;
                }
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
        // "none" happened when the node was opened.
        if event != BlkEvent::None {
            self.reach(event);
        }
        let child = &node.children[IMAGE].node;
        child.driver.event(child, event)
    }

    /// `blkdebug:CONFIG:FILE`, where that says it all.
    fn describe(&self, node: &Node) -> Description {
        let Value::Map(options) = &node.options else { return Description::default() };
        let config = match options.iter().find(|(k, _)| k == "config") {
            None => "",
            Some((_, Value::Str(config))) => config,
            Some(_) => return Description::default(),
        };
        let says_more =
            options.iter().any(|(k, _)| !["driver", "image", "config"].contains(&k.as_str()) && !is_use(k));
        let image = node.children.get(IMAGE).map(|c| node_filename(&c.node));
        Description {
            filename: image
                .filter(|i| !says_more && !i.starts_with("json:"))
                .map(|i| format!("blkdebug:{config}:{i}")),
            ..Description::default()
        }
    }
}
