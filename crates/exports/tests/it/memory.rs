//! A sparse disk in memory, with faults on request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use dolmen_graph::{
    AccessRule, Class, Common, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node,
    NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prepared, Request, SELF, Where,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Error, ErrorKind, OptionSpec, OptionType, Options, Result, Span, WriteFlags};

const BLOCK: u64 = 4096;

static MEMORY: DriverKind = DriverKind::new(
    "test-memory",
    Class::Protocol,
    "a sparse disk in memory",
    &[
        OptionSpec::required("size", OptionType::Size, "bytes"),
        OptionSpec::optional("faults", OptionType::Bool, "has a bad and a slow sector"),
    ],
    parse,
);

pub(crate) static DRIVERS: &[&DriverKind] = &[&MEMORY];

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let size = options.take_size("size")?.unwrap_or(0);
    let faults = options.take_bool("faults")?.unwrap_or(false);
    let disk = Memory { size, faults, state: Arc::default() };
    Ok(Parsed {
        children: Vec::new(),
        rule: AccessRule::LEAF,
        relies_down_to: None,
        open: Box::new(Open(disk)),
    })
}

struct Open(Memory);
impl Opener for Open {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async { Ok(Opened::of(Arc::new(self.0))) })
    }
}

#[derive(Debug, Default)]
struct State {
    /// Blocks that are allocated.
    blocks: BTreeMap<u64, Box<[u8]>>,
    flushes: u64,
    fua_writes: u64,
    discards: u64,
    running: usize,
    running_most: usize,
}

#[derive(Debug)]
pub(crate) struct Memory {
    size: u64,
    faults: bool,
    state: Arc<Mutex<State>>,
}

/// With `faults`, reads that touch this byte fail with EIO.
pub(crate) const BAD_SECTOR: u64 = 3 << 20;
/// With `faults`, reads that begin here take a while.
pub(crate) const SLOW_SECTOR: u64 = 2 << 20;

/// With `faults`, where data lie from here on is found out slowly.
pub(crate) const SLOW_STATUS: u64 = 4 << 20;

fn sub(span: Span) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let start = span.offset();
    span.blocks(BLOCK).map(move |b| {
        let at = (b.offset() % BLOCK) as usize;
        (b.offset() / BLOCK, at, b.len() as usize, (b.offset() - start) as usize)
    })
}

impl Memory {
    /// Counters: flushes, writes with FUA, discards, most requests at one time.
    pub(crate) fn counters(node: &Node) -> (u64, u64, u64, usize) {
        let any = node.driver.describe(node).actual_size;
        let packed = any.expect("the test driver packs its counters here");
        (packed & 0xffff, packed >> 16 & 0xffff, packed >> 32 & 0xffff, (packed >> 48) as usize)
    }

    fn read(&self, span: Span) -> Vec<u8> {
        let s = self.state.lock().unwrap();
        let mut out = vec![0; span.len() as usize];
        for (block, at, len, pos) in sub(span) {
            if let Some(b) = s.blocks.get(&block) {
                out[pos..pos + len].copy_from_slice(&b[at..at + len]);
            }
        }
        out
    }

    fn write(&self, span: Span, data: impl Fn(usize, &mut [u8])) {
        let mut s = self.state.lock().unwrap();
        for (block, at, len, pos) in sub(span) {
            let b = s.blocks.entry(block).or_insert_with(|| vec![0; BLOCK as usize].into());
            data(pos, &mut b[at..at + len]);
        }
    }

    fn punch(&self, span: Span) {
        let mut s = self.state.lock().unwrap();
        for (block, at, len, _) in sub(span) {
            if len == BLOCK as usize {
                s.blocks.remove(&block);
            } else if let Some(b) = s.blocks.get_mut(&block) {
                b[at..at + len].fill(0);
            }
        }
    }

    fn note(&self, flags: WriteFlags) {
        if flags.has(WriteFlags::FUA) {
            self.state.lock().unwrap().fua_writes += 1;
        }
    }

    async fn op(&self, cx: Cx<'_>, op: Op<'_>) -> Result<()> {
        match op {
            Op::Read { span, to, .. } => {
                if self.faults && span.overlaps(Span::new(BAD_SECTOR, 512)) {
                    return Err(Error::new(ErrorKind::Io, "bad sector"));
                }
                if self.faults && span.offset() == SLOW_SECTOR {
                    cx.rt.sleep(std::time::Duration::from_millis(200)).await;
                } else {
                    // Let others run, so that requests overlap.
                    cx.rt.yield_now().await;
                }
                to.copy_from_slice(0, &self.read(span));
            }
            Op::Write { span, from, flags } => {
                self.note(flags);
                cx.rt.yield_now().await;
                self.write(span, |pos, to| from.copy_to_slice(pos, to));
            }
            Op::WriteZeroes { span, flags } => {
                self.note(flags);
                if flags.has(WriteFlags::MAY_UNMAP) {
                    self.punch(span);
                } else {
                    self.write(span, |_, to| to.fill(0));
                }
            }
            Op::Discard { span, flags } => {
                self.note(flags);
                self.state.lock().unwrap().discards += 1;
                self.punch(span);
            }
            Op::Flush => self.state.lock().unwrap().flushes += 1,
            Op::Resize { .. } => return Err(Error::new(ErrorKind::Unsupported, "fixed size")),
        }
        Ok(())
    }
}

impl Driver for Memory {
    fn kind(&self) -> &'static DriverKind {
        &MEMORY
    }
    fn size(&self, _: &Node) -> u64 {
        self.size
    }
    fn limits(&self, _: &Node) -> Limits {
        Limits { fast_zeroes: true, discards: true, ..Limits::BYTES }
    }
    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }
    fn plan(&self, _: &Node, _: Request, _: Span) -> Plan {
        Plan::Slow
    }
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            {
                let mut s = self.state.lock().unwrap();
                s.running += 1;
                s.running_most = s.running_most.max(s.running);
            }
            let result = self.op(cx, op).await;
            self.state.lock().unwrap().running -= 1;
            result
        })
    }
    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            if self.faults && span.offset() >= SLOW_STATUS {
                cx.rt.sleep(std::time::Duration::from_millis(5)).await;
            }
            let s = self.state.lock().unwrap();
            let has = |block: u64| s.blocks.contains_key(&block);
            let first = span.offset() / BLOCK;
            let state = has(first);
            let mut end = first + 1;
            while end * BLOCK < span.end() && has(end) == state {
                end += 1;
            }
            let len = (end * BLOCK).min(span.end()) - span.offset();
            let place = if state {
                Where::Data { child: SELF, at: Some(span.offset()), compressed: false }
            } else {
                Where::Zero { at: None }
            };
            Ok(Extent { len, place })
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
        let s = self.state.lock().unwrap();
        let packed = s.flushes | s.fua_writes << 16 | s.discards << 32 | (s.running_most as u64) << 48;
        Description { actual_size: Some(packed), ..Description::default() }
    }
}
