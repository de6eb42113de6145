//! The request path: random stacks of drivers against a model, and what a request costs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dolmen_graph::{
    AccessRule, Class, Common, Counts, Cx, Description, Draft, Driver, DriverKind, Extent, GraphOwner,
    ImageOps, Limits, Node, NodeChange, Notice, Op, Parsed, Plan, Prepared, RangeLock, Request, Token, Where,
};
use dolmen_rt::{IoVec, LocalFuture, Memory, Rt};
use dolmen_sim::stand_in as op;
use dolmen_sim::{DiskConfig, Fault, FaultAction, Image, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{
    BlkEvent, ChildRole, Error, ErrorKind, OpKind, Options, ReadFlags, Result, Span, WriteFlags,
};
use futures_lite::future::{block_on, poll_once, yield_now};

use crate::support::{add_filter, edge, still};

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator unchanged; the counter is a
// plain thread-local cell without a destructor and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above; the memory came from the same allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes per cluster of the mapping test driver.
const CLUSTER: u64 = 64;

/// The drivers of these tests.
#[derive(Debug)]
enum Layer {
    /// A leaf that reads as zeroes, from memory.
    Null { size: u64 },
    /// The part of the child from `offset` on.
    Slice { offset: u64, size: u64 },
    /// A mapping of clusters, as a format has. Holes get a place when they are written.
    Mapping(Mapping),
    /// Breaks its contract: answers for no byte at all.
    Idle { size: u64, plan: Plan },
}

#[derive(Debug)]
struct Mapping {
    size: u64,
    /// Where each cluster lives in the child, in clusters. Never held across an await.
    table: Mutex<Vec<Option<u64>>>,
    /// Places of the child that nobody has, in clusters.
    free: Mutex<Vec<u64>>,
    /// Clusters for which `plan` does not answer, although it could.
    slow: Vec<bool>,
    /// Clusters that are being given a place.
    lock: RangeLock,
}

static LAYER: DriverKind =
    DriverKind { maps: true, ..DriverKind::new("layer", Class::Format, "a layer of the test", &[], refuse) };

fn refuse(_: &mut Options, _: &Common) -> Result<Parsed> {
    Err(Error::new(ErrorKind::InvalidInput, "made by the test"))
}

impl Mapping {
    fn place(&self, cluster: u64) -> Option<u64> {
        self.table.lock().unwrap()[cluster as usize]
    }

    /// The start of `span` within one cluster: that cluster, and how much of it.
    fn head(span: Span) -> (u64, Span) {
        let cluster = span.offset() / CLUSTER;
        (cluster, span.prefix(CLUSTER - span.offset() % CLUSTER))
    }

    fn plan(&self, request: Request, span: Span) -> Plan {
        let (cluster, part) = Mapping::head(span);
        if self.slow[cluster as usize] {
            return Plan::Slow;
        }
        match (self.place(cluster), request) {
            (Some(place), _) => Plan::Forward {
                child: 0,
                at: place * CLUSTER + part.offset() % CLUSTER,
                len: part.len(),
                request,
            },
            (None, Request::Read(_)) => Plan::Zeroes { len: part.len() },
            (None, Request::WriteZeroes(_) | Request::Discard(_)) => Plan::Done { len: part.len() },
            (None, Request::Write(_) | Request::Flush | Request::Resize) => Plan::Slow,
        }
    }

    /// Gives a hole a place that reads as zeroes.
    async fn fill(&self, cx: Cx<'_>, cluster: u64) -> Result<u64> {
        let _guard = self.lock.lock(Span::new(cluster * CLUSTER, CLUSTER)).await;
        if let Some(place) = self.place(cluster) {
            return Ok(place);
        }
        let place = self.free.lock().unwrap().pop().expect("one place for each cluster");
        cx.write(0)?.write_zeroes(Span::new(place * CLUSTER, CLUSTER), WriteFlags::NONE).await?;
        yield_now().await;
        self.table.lock().unwrap()[cluster as usize] = Some(place);
        Ok(place)
    }

    async fn run(&self, cx: Cx<'_>, op: Op<'_>) -> Result<()> {
        let (span, data) = match op {
            Op::Read { span, to, .. } => (span, Some(to)),
            Op::Write { span, from, .. } => (span, Some(from)),
            Op::WriteZeroes { span, .. } | Op::Discard { span, .. } => (span, None),
            Op::Flush | Op::Resize { .. } => return Ok(()),
        };
        let mut rest = span;
        while !rest.is_empty() {
            let (cluster, part) = Mapping::head(rest);
            let piece = data.map(|d| d.slice((span.len() - rest.len()) as usize, part.len() as usize));
            let place = match (self.place(cluster), op) {
                (None, Op::Write { .. }) => Some(self.fill(cx, cluster).await?),
                (place, _) => place,
            };
            let at = place.map(|p| Span::new(p * CLUSTER + part.offset() % CLUSTER, part.len()));
            match (op, at, &piece) {
                (Op::Read { flags, .. }, Some(at), Some(to)) => cx.read(0)?.read(at, to, flags).await?,
                (Op::Read { .. }, None, Some(to)) => to.fill(0),
                (Op::Write { flags, .. }, Some(at), Some(from)) => {
                    cx.write(0)?.write(at, from, flags).await?;
                }
                (Op::WriteZeroes { flags, .. }, Some(at), _) => {
                    cx.write(0)?.write_zeroes(at, flags).await?;
                }
                (Op::Discard { flags, .. }, Some(at), _) => cx.write(0)?.discard(at, flags).await?,
                (Op::WriteZeroes { .. } | Op::Discard { .. }, None, _) => {}
                (op, at, _) => panic!("{op:?} at {at:?}"),
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }
}

impl Driver for Layer {
    fn kind(&self) -> &'static DriverKind {
        &LAYER
    }
    fn size(&self, _: &Node) -> u64 {
        match self {
            Layer::Null { size } | Layer::Slice { size, .. } | Layer::Idle { size, .. } => *size,
            Layer::Mapping(m) => m.size,
        }
    }
    fn limits(&self, _: &Node) -> Limits {
        Limits::BYTES
    }
    fn access_rule(&self) -> AccessRule {
        match self {
            Layer::Null { .. } => AccessRule::LEAF,
            Layer::Slice { .. } | Layer::Idle { .. } => AccessRule::WINDOW,
            Layer::Mapping(_) => AccessRule::FORMAT,
        }
    }
    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match (self, request) {
            (Layer::Null { .. }, Request::Read(_)) => Plan::Zeroes { len: span.len() },
            (Layer::Null { .. }, _) => Plan::Done { len: span.len() },
            (Layer::Slice { offset, .. }, _) => {
                Plan::Forward { child: 0, at: span.offset() + offset, len: span.len(), request }
            }
            (Layer::Idle { plan, .. }, _) => *plan,
            (Layer::Mapping(_), Request::Flush | Request::Resize) => Plan::Slow,
            (Layer::Mapping(m), _) => m.plan(request, span),
        }
    }
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        match self {
            Layer::Mapping(m) => Box::pin(m.run(cx, op)),
            Layer::Null { .. } | Layer::Slice { .. } | Layer::Idle { .. } => panic!("never slow"),
        }
    }
    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let len = if matches!(self, Layer::Idle { .. }) { 0 } else { span.len() };
        Box::pin(async move { Ok(Extent { len, place: Where::Unallocated }) })
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
}

/// A random stack on a disk of random bytes, and what its top reads as.
fn random_stack(d: &mut Draft, random: &mut Random) -> Vec<u8> {
    let size = CLUSTER * random.between(8, 24) + random.below(CLUSTER);
    let mut model: Vec<u8> = (0..size).map(|_| random.u64() as u8).collect();
    op::add(d, "n0", MemoryDisk::new(Image::from_bytes(&model)), None, &[]).unwrap();
    let layers = random.between(1, 5);
    for i in 1..=layers {
        let below = format!("n{}", i - 1);
        let name = format!("n{i}");
        match random.below(3) {
            0 => {
                // One that is asked, or one that requests step over.
                let rule = if random.percent(50) { AccessRule::FILTER } else { AccessRule::TRANSPARENT };
                let children = [("file", ChildRole::Filtered, below.as_str())];
                op::add(d, &name, op::StandIn::new(&op::RAW, rule), None, &children).unwrap();
            }
            1 => {
                let offset = random.below(model.len() as u64 / 4 + 1);
                let size = random.between(1, model.len() as u64 - offset);
                model = model[offset as usize..(offset + size) as usize].to_vec();
                let children = [("file", ChildRole::Data, below.as_str())];
                op::add(d, &name, Layer::Slice { offset, size }, None, &children).unwrap();
            }
            _ => {
                let places = model.len() as u64 / CLUSTER;
                if places == 0 {
                    add_filter(d, &name, &below);
                    continue;
                }
                // A shuffled place for each cluster; some clusters are holes.
                let mut free: Vec<u64> = (0..places).collect();
                for k in (1..free.len()).rev() {
                    free.swap(k, random.below(k as u64 + 1) as usize);
                }
                let clusters = random.between(1, places);
                let mut table = Vec::new();
                let mut reads = Vec::new();
                for _ in 0..clusters {
                    if random.percent(60) {
                        let place = free.pop().expect("as many places as clusters");
                        let at = (place * CLUSTER) as usize;
                        reads.extend_from_slice(&model[at..at + CLUSTER as usize]);
                        table.push(Some(place));
                    } else {
                        reads.extend_from_slice(&[0; CLUSTER as usize]);
                        table.push(None);
                    }
                }
                let size = random.between(1, clusters * CLUSTER);
                reads.truncate(size as usize);
                model = reads;
                let slow = (0..clusters).map(|_| random.percent(20)).collect();
                let mapping = Mapping {
                    size,
                    table: Mutex::new(table),
                    free: Mutex::new(free),
                    slow,
                    lock: RangeLock::new(),
                };
                let children = [("file", ChildRole::Metadata, below.as_str())];
                op::add(d, &name, Layer::Mapping(mapping), None, &children).unwrap();
            }
        }
    }
    op::export(d, "e", &format!("n{layers}"), true).unwrap();
    model
}

/// `len` bytes in random segments.
fn random_vector(random: &mut Random, len: usize) -> IoVec {
    let mut v = IoVec::new();
    while v.len() < len {
        let n = random.between(1, (len - v.len()) as u64) as usize;
        // A window in the middle of a larger memory.
        v.push(Memory::zeroed(n + 16).share().slice(random.below(16) as usize, n));
    }
    v
}

#[test]
fn random_stacks_move_the_right_bytes() {
    for seed in 0..300 {
        Sim::run(seed, move |rt| async move {
            let mut random = Random::new(seed);
            let mut owner = GraphOwner::new(rt.clone());
            let mut d = owner.draft();
            let mut model = random_stack(&mut d, &mut random);
            owner.commit(d).await.unwrap();
            let e = edge(&owner, "e");
            let mut expected = Counts::default();
            for step in 0..30 {
                let token = e.begin().await.unwrap();
                let size = model.len() as u64;
                assert_eq!(token.size(), size.next_multiple_of(512));
                let offset = random.below(size);
                let len = random.between(1, size - offset);
                let span = token.check(offset, len).unwrap();
                let range = offset as usize..(offset + len) as usize;
                let kind = random.below(4);
                let tally = match kind {
                    0 => &mut expected.writes,
                    1 => &mut expected.zeroes,
                    _ => &mut expected.reads,
                };
                tally.requests += 1;
                tally.bytes += len;
                if kind < 2 {
                    expected.highest_write = expected.highest_write.max(span.end());
                }
                match kind {
                    0 => {
                        let from = random_vector(&mut random, len as usize);
                        let bytes: Vec<u8> = (0..len).map(|_| random.u64() as u8).collect();
                        from.copy_from_slice(0, &bytes);
                        token.write(&rt).unwrap().write(span, &from, WriteFlags::NONE).await.unwrap();
                        model[range].copy_from_slice(&bytes);
                    }
                    1 => {
                        token.write(&rt).unwrap().write_zeroes(span, WriteFlags::MAY_UNMAP).await.unwrap();
                        model[range].fill(0);
                    }
                    _ => {
                        let to = random_vector(&mut random, len as usize);
                        to.fill(0xaa);
                        token.read(&rt).unwrap().read(span, &to, ReadFlags::NONE).await.unwrap();
                        assert_eq!(to.to_vec(), model[range], "seed {seed}, step {step}, {span}");
                    }
                }
            }
            count_as(&owner, &e.node(), expected, seed);
            let all = Memory::zeroed(model.len());
            let token = e.begin().await.unwrap();
            let span = Span::new(0, model.len() as u64);
            token.read(&rt).unwrap().read(span, &all.iovec(), ReadFlags::NONE).await.unwrap();
            assert_eq!(all.to_vec(), model, "seed {seed}");
            assert_eq!(token.check(1, token.size()).unwrap_err().kind(), ErrorKind::OutOfBounds);
            assert_eq!(token.check(u64::MAX, 2).unwrap_err().kind(), ErrorKind::OutOfBounds);
        });
    }
}

/// A node counts a request once, however many pieces it is cut into further down; and one that passes everything on has
/// counted what its child has.
fn count_as(owner: &GraphOwner, top: &Arc<Node>, expected: Counts, seed: u64) {
    assert_eq!(top.state.counters.read(), expected, "seed {seed}: {top:?}");
    for parent in owner.graph().nodes().iter().filter(|n| n.children.len() == 1) {
        let own = parent.state.counters.read();
        let child = parent.children[0].node.state.counters.read();
        match parent.driver.access_rule() {
            AccessRule::FILTER | AccessRule::TRANSPARENT => assert_eq!(own, child, "seed {seed}: {parent:?}"),
            AccessRule::WINDOW => {
                let tallies = |c: Counts| (c.reads, c.writes, c.zeroes, c.discards, c.flushes);
                assert_eq!(tallies(own), tallies(child), "seed {seed}: {parent:?}");
                assert!(child.highest_write >= own.highest_write);
            }
            // A mapping asks its child for nothing that it has not been asked for, but for the
            // place of a hole, which it zeroes first.
            _ => assert!(child.reads.bytes <= own.reads.bytes && child.writes.bytes <= own.writes.bytes),
        }
    }
}

/// What failed is counted apart, on every node that the request had come through, and only there.
#[test]
fn failures_are_counted_on_the_whole_way() {
    Sim::run(3, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let disk = SimDisk::new(Image::new(8 * CLUSTER), DiskConfig::default());
        op::add(&mut d, "disk", disk.clone(), None, &[]).unwrap();
        let mapping = Mapping {
            size: 3 * CLUSTER,
            table: Mutex::new(vec![Some(1), Some(3), Some(2)]),
            free: Mutex::new(Vec::new()),
            slow: vec![false; 3],
            lock: RangeLock::new(),
        };
        op::add(&mut d, "map", Layer::Mapping(mapping), None, &[("file", ChildRole::Metadata, "disk")])
            .unwrap();
        let slice = Layer::Slice { offset: CLUSTER / 2, size: 2 * CLUSTER };
        op::add(&mut d, "slice", slice, None, &[("file", ChildRole::Data, "map")]).unwrap();
        let raw = op::StandIn::new(&op::RAW, AccessRule::TRANSPARENT);
        op::add(&mut d, "raw", raw, None, &[("file", ChildRole::Filtered, "slice")]).unwrap();
        op::export(&mut d, "e", "raw", true).unwrap();
        owner.commit(d).await.unwrap();
        let e = edge(&owner, "e");
        let memory = Memory::zeroed(2 * CLUSTER as usize);
        let whole = Span::new(0, 2 * CLUSTER);
        let write = async || {
            let token = e.begin().await.unwrap();
            token.write(&rt).unwrap().write(whole, &memory.iovec(), WriteFlags::NONE).await
        };
        write().await.unwrap();
        // Three pieces; the second one fails, the third one is not tried.
        let fail = FaultAction::Fail(ErrorKind::Io);
        disk.inject(Fault { kind: OpKind::Write, skip: 1, times: 1, action: fail });
        write().await.unwrap_err();
        disk.inject(Fault { kind: OpKind::Flush, skip: 0, times: 1, action: fail });
        let token = e.begin().await.unwrap();
        token.read(&rt).unwrap().flush().await.unwrap();
        let counts = |name: &str| owner.graph().node(name).unwrap().state.counters.read();
        for name in ["raw", "slice", "map"] {
            let c = counts(name);
            assert_eq!((c.writes.requests, c.writes.failed), (1, 1), "{name}");
            // Of the second one, the first piece was written.
            assert_eq!(c.writes.bytes, 2 * CLUSTER + CLUSTER / 2, "{name}");
            // The mapping answers a flush by itself.
            assert_eq!((c.flushes.requests, c.flushes.failed), (1, 0), "{name}");
        }
        let c = counts("disk");
        assert_eq!((c.writes.requests, c.writes.failed, c.writes.bytes), (4, 1, 2 * CLUSTER + CLUSTER / 2));
        assert_eq!(c.highest_write, 4 * CLUSTER);
        assert_eq!(counts("map").highest_write, 2 * CLUSTER + CLUSTER / 2);
        assert_eq!(c.flushes.requests, 0);
    });
}

/// The threshold is a property of the node: it does not matter which way a write comes.
#[test]
fn a_write_beyond_the_threshold_is_noticed_once() {
    Sim::run(4, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        op::add(&mut d, "disk", MemoryDisk::new(Image::new(8192)), None, &[]).unwrap();
        add_filter(&mut d, "f", "disk");
        op::export(&mut d, "e", "f", true).unwrap();
        owner.commit(d).await.unwrap();
        let notices = owner.notices();
        let state = owner.graph().node("disk").unwrap().state.clone();
        state.set_write_threshold(Some(4096));
        let token = edge(&owner, "e").begin().await.unwrap();
        let (io, memory) = (token.write(&rt).unwrap(), Memory::zeroed(4096));
        io.write(Span::new(0, 4096), &memory.iovec(), WriteFlags::NONE).await.unwrap();
        io.discard(Span::new(4096, 4096), WriteFlags::NONE).await.unwrap();
        assert_eq!(state.write_threshold(), Some(4096));
        io.write_zeroes(Span::new(4000, 100), WriteFlags::NONE).await.unwrap();
        io.write(Span::new(4096, 4096), &memory.iovec(), WriteFlags::NONE).await.unwrap();
        assert_eq!(state.write_threshold(), None);
        let (node, notice) = notices.next().await;
        assert_eq!(node.as_str(), "disk");
        assert_eq!(notice, Notice::WriteThreshold { threshold: 4096, exceeded: 4 });
        assert!(poll_once(notices.next()).await.is_none(), "only once");
    });
}

/// A request needs what its token was granted; there is no other way in.
#[test]
fn a_token_gives_what_was_granted() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        op::add(&mut d, "n", MemoryDisk::new(Image::new(512)), None, &[]).unwrap();
        op::export(&mut d, "r", "n", false).unwrap();
        op::export(&mut d, "w", "n", true).unwrap();
        owner.commit(d).await.unwrap();
        let reader = edge(&owner, "r").begin().await.unwrap();
        assert!(reader.read(&rt).is_ok());
        let refused = |e: Error| assert_eq!(e.kind(), ErrorKind::PermissionDenied);
        refused(reader.write(&rt).unwrap_err());
        refused(reader.write_unchanged(&rt).unwrap_err());
        refused(reader.resize(&rt).unwrap_err());
        let writer = edge(&owner, "w").begin().await.unwrap();
        assert!(writer.read(&rt).is_ok() && writer.write(&rt).is_ok() && writer.write_unchanged(&rt).is_ok());
        let e = writer.resize(&rt).unwrap_err();
        assert_eq!(e.to_string(), "this user of node 'n' was not granted to resize");
    });
}

/// The null leaf below `layers` filters, and a token on top.
fn tower(rt: &Rt, layers: usize, rule: AccessRule) -> (GraphOwner, Token) {
    let mut owner = GraphOwner::new(rt.clone());
    let mut d = owner.draft();
    op::add(&mut d, "n0", Layer::Null { size: 1 << 30 }, None, &[]).unwrap();
    for i in 1..=layers {
        let below = format!("n{}", i - 1);
        let raw = op::StandIn::new(&op::RAW, rule);
        op::add(&mut d, &format!("n{i}"), raw, None, &[("file", ChildRole::Filtered, &below)]).unwrap();
    }
    op::export(&mut d, "e", &format!("n{layers}"), true).unwrap();
    block_on(owner.commit(d)).unwrap();
    let token = block_on(edge(&owner, "e").begin()).unwrap();
    (owner, token)
}

#[test]
fn a_request_through_five_layers_allocates_nothing() {
    let rt = still();
    let (owner, token) = tower(&rt, 5, AccessRule::FILTER);
    let e = edge(&owner, "e");
    let memory = Memory::zeroed(4096);
    let once = |at: u64| {
        let token = e.try_begin().unwrap().expect("open");
        let to = memory.iovec();
        let io = token.read(&rt).unwrap();
        block_on(io.read(Span::new(at, 4096), &to, ReadFlags::NONE)).unwrap();
        let io = token.write(&rt).unwrap();
        block_on(io.write(Span::new(at, 4096), &to, WriteFlags::NONE)).unwrap();
        block_on(io.write_zeroes(Span::new(at, 4096), WriteFlags::NONE)).unwrap();
        block_on(io.flush()).unwrap();
    };
    // The thread's parker and the like are made by the first request.
    once(0);
    let before = ALLOCATIONS.get();
    (0..100).for_each(|i| once(i * 4096));
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations in 100 rounds of four requests");
    // And the counter counts.
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
    drop(token);
}

/// Not a test but a measurement: run it with `--release -- --ignored --nocapture layers`.
#[test]
#[ignore = "a measurement"]
fn nanoseconds_per_request_by_layers() {
    let rt = still();
    let memory = Memory::zeroed(0);
    for (layers, rule) in [
        (0, AccessRule::FILTER),
        (1, AccessRule::FILTER),
        (3, AccessRule::FILTER),
        (5, AccessRule::FILTER),
        (1, AccessRule::TRANSPARENT),
        (5, AccessRule::TRANSPARENT),
    ] {
        let (_owner, token) = tower(&rt, layers, rule);
        let io = token.read(&rt).unwrap();
        let to = memory.iovec();
        let best = (0..20)
            .map(|_| {
                let start = std::time::Instant::now();
                block_on(async {
                    for i in 0..100_000u64 {
                        // Without bytes to fill, what is left is the path itself.
                        io.flush().await.unwrap();
                        std::hint::black_box((i, &to));
                    }
                });
                start.elapsed().as_nanos() as f64 / 100_000.0
            })
            .fold(f64::INFINITY, f64::min);
        let page = Memory::zeroed(512).iovec();
        let read = (0..20)
            .map(|_| {
                let start = std::time::Instant::now();
                block_on(async {
                    for i in 0..100_000u64 {
                        let span = Span::new(i * 512, 512);
                        io.read(span, &page, ReadFlags::NONE).await.unwrap();
                    }
                });
                start.elapsed().as_nanos() as f64 / 100_000.0
            })
            .fold(f64::INFINITY, f64::min);
        println!("{layers} layers ({rule:?}): {best:.1} ns a flush, {read:.1} ns a read of 512 bytes");
    }
}

/// Only those that wait or hold are in the queue, in the order in which they asked: none
/// that asked earlier may overlap.
fn took_over(queue: &[(u64, Span)], ticket: u64, span: Span) {
    let at = queue.iter().position(|q| q.0 == ticket).expect("asked for it");
    assert_eq!(queue[..at].iter().find(|q| q.1.overlaps(span)), None, "overtaken");
}

/// Tasks lock random ranges, hold them over some turns, and sometimes give up waiting.
/// Nobody ever holds what somebody else holds, earlier ones come first, and all end.
#[test]
fn range_locks_exclude_overlaps_in_order() {
    for seed in 0..100 {
        Sim::run(seed, move |rt| async move {
            let lock = Arc::new(RangeLock::new());
            // Per byte: who holds it. Asked in this order, per byte.
            let held: Arc<Mutex<Vec<Option<u64>>>> = Arc::new(Mutex::new(vec![None; 32]));
            let queue: Arc<Mutex<Vec<(u64, Span)>>> = Arc::default();
            let done = std::rc::Rc::new(Cell::new(0));
            const TASKS: u64 = 12;
            for id in 0..TASKS {
                let (lock, held, queue) = (lock.clone(), held.clone(), queue.clone());
                let (done, mut random) = (done.clone(), Random::new(seed * 1000 + id));
                rt.spawn(async move {
                    for _ in 0..10 {
                        let offset = random.below(31);
                        let span = Span::new(offset, random.between(1, 32 - offset));
                        let ticket = random.u64();
                        let patience = random.below(20);
                        let gives_up = random.percent(30);
                        let wait = async {
                            queue.lock().unwrap().push((ticket, span));
                            Some(lock.lock(span).await)
                        };
                        let impatient = async {
                            if !gives_up {
                                std::future::pending::<()>().await;
                            }
                            for _ in 0..patience {
                                yield_now().await;
                            }
                            None
                        };
                        let guard = futures_lite::future::or(wait, impatient).await;
                        let mine = span.offset() as usize..span.end() as usize;
                        if guard.is_some() {
                            took_over(&queue.lock().unwrap(), ticket, span);
                            for byte in &mut held.lock().unwrap()[mine.clone()] {
                                assert_eq!(byte.replace(ticket), None, "seed {seed}: held twice");
                            }
                            assert!(lock.is_locked(span));
                            for _ in 0..random.below(5) {
                                yield_now().await;
                            }
                            held.lock().unwrap()[mine].fill(None);
                        }
                        queue.lock().unwrap().retain(|q| q.0 != ticket);
                        drop(guard);
                        yield_now().await;
                    }
                    done.set(done.get() + 1);
                });
            }
            while done.get() < TASKS {
                yield_now().await;
            }
            assert!(!lock.is_locked(Span::new(0, 32)));
        });
    }
}

/// The story: a write in place is told where to go, its future is dropped, and the disk does
/// it all the same, later. Had the place been given to somebody else meanwhile, their data
/// would be gone. So the lease of such a write does not end with its future. Nor does it last for ever, or nothing would be
/// reused after the first write that was given up: it ends when the write has landed.
#[test]
fn a_dropped_write_keeps_its_place() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        let disk = SimDisk::new(Image::new(4 * CLUSTER), DiskConfig::default());
        op::add(&mut d, "disk", disk, None, &[]).unwrap();
        let mapping = Mapping {
            size: 2 * CLUSTER,
            table: Mutex::new(vec![Some(1), Some(3)]),
            free: Mutex::new(Vec::new()),
            slow: vec![false; 2],
            lock: RangeLock::new(),
        };
        let children = [("file", ChildRole::Metadata, "disk")];
        op::add(&mut d, "map", Layer::Mapping(mapping), None, &children).unwrap();
        op::export(&mut d, "e", "map", true).unwrap();
        owner.commit(d).await.unwrap();
        let e = edge(&owner, "e");
        let state = e.node().state.clone();

        let memory = Memory::zeroed(CLUSTER as usize);
        let v = memory.iovec();
        let token = e.begin().await.unwrap();
        {
            let io = token.read(&rt).unwrap();
            let mut read = std::pin::pin!(io.read(Span::new(0, CLUSTER), &v, ReadFlags::NONE));
            assert!(poll_once(&mut read).await.is_none(), "a disk takes its time");
        }
        let freed = state.epochs.stamp();
        assert!(state.epochs.over(freed), "a dropped read harms nobody");
        let io = token.write(&rt).unwrap();
        io.write(Span::new(0, CLUSTER), &v, WriteFlags::NONE).await.unwrap();
        let freed = state.epochs.stamp();
        assert!(state.epochs.over(freed), "a write that is done has no lease");
        {
            let mut write = std::pin::pin!(io.write(Span::new(0, CLUSTER), &v, WriteFlags::NONE));
            assert!(poll_once(&mut write).await.is_none(), "a disk takes its time");
        }
        let freed = state.epochs.stamp();
        assert!(!state.epochs.over(freed), "it may still land");
        assert_eq!((e.given_up(), e.in_flight()), (1, 2), "beside the token");
        while e.given_up() > 0 {
            rt.sleep(Duration::from_nanos(1)).await;
        }
        assert!(state.epochs.over(freed), "it has landed");
        drop(token);
        assert_eq!(e.in_flight(), 0);
    });
}

/// The story: that a plan and a status make progress was asserted in debug builds only. In a release build a driver's
/// mistake was an endless loop without an await, which stopped everything.
#[test]
fn a_driver_that_answers_for_nothing_is_an_error() {
    let forward = Plan::Forward { child: 0, at: 0, len: 0, request: Request::Read(ReadFlags::NONE) };
    for plan in [forward, Plan::Zeroes { len: 0 }, Plan::Done { len: 0 }] {
        Sim::run(1, move |rt| async move {
            let mut owner = GraphOwner::new(rt.clone());
            let mut d = owner.draft();
            op::add(&mut d, "null", Layer::Null { size: 4096 }, None, &[]).unwrap();
            let children = [("file", ChildRole::Data, "null")];
            op::add(&mut d, "idle", Layer::Idle { size: 4096, plan }, None, &children).unwrap();
            op::export(&mut d, "e", "idle", false).unwrap();
            owner.commit(d).await.unwrap();
            let token = edge(&owner, "e").begin().await.unwrap();
            let memory = Memory::zeroed(512);
            let io = token.read(&rt).unwrap();
            let span = Span::new(0, 512);
            let e = io.read(span, &memory.iovec(), ReadFlags::NONE).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Io);
            assert!(e.to_string().contains("node 'idle'"), "{e}");
            let e = io.status(span).await.unwrap_err();
            assert!(e.to_string().contains("knows nothing"), "{e}");
            assert!(dolmen_graph::chain_status(token.node(), &rt, span, None).await.is_err());
        });
    }
}

/// Who asks for more than there is gets an error, whatever lies below would make of it.
#[test]
fn requests_stay_within_their_node() {
    Sim::run(1, |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let mut d = owner.draft();
        op::add(&mut d, "disk", MemoryDisk::new(Image::new(8192)), None, &[]).unwrap();
        let children = [("file", ChildRole::Data, "disk")];
        op::add(&mut d, "slice", Layer::Slice { offset: 512, size: 4096 }, None, &children).unwrap();
        op::export(&mut d, "e", "slice", true).unwrap();
        owner.commit(d).await.unwrap();
        let token = edge(&owner, "e").begin().await.unwrap();
        let memory = Memory::zeroed(1024);
        let v = memory.iovec();
        for at in [4096 - 512, 4096, 1 << 50] {
            let span = Span::new(at, 1024);
            let (read, write) = (token.read(&rt).unwrap(), token.write(&rt).unwrap());
            let answers = [
                read.read(span, &v, ReadFlags::NONE).await,
                read.status(span).await.map(drop),
                write.write(span, &v, WriteFlags::NONE).await,
                write.write_zeroes(span, WriteFlags::NONE).await,
                write.discard(span, WriteFlags::NONE).await,
            ];
            for a in answers {
                assert_eq!(a.unwrap_err().kind(), ErrorKind::OutOfBounds);
            }
        }
    });
}
