//! One workload: a drawn stack, several tasks that use it at the same time, and the
//! oracle that is told of everything.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use dolmen_graph::{Implicit, NodeOpener, OpenPolicy, Registry};
use dolmen_jobs::{Attention, Emit, Group, Job, JobOptions, Stream, launch, prepare};
use dolmen_rt::Rt;
use dolmen_sim::{
    DiskConfig, Fault, FaultAction, GuestOp, Harness, Image, Leaf, MEMORY, MemoryDisk, Oracle, Random,
    SECTOR, Sim, SimDisk, TagPattern, User, ZERO_TAG,
};
use dolmen_types::{Actions, Error, ErrorKind, OpId, OpKind, Options, Span, Value, WriteFlags};

/// The drivers of the stack.
pub(crate) static REGISTRY: Registry = Registry::new(&[
    &dolmen_formats::QCOW2,
    &dolmen_formats::RAW,
    &dolmen_filters::COPY_ON_READ,
    &dolmen_filters::BLKDEBUG,
    &MEMORY,
]);

/// The tag of the backing file's data.
const BASE_TAG: u64 = 1;

/// What a guest has to put up with besides power losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weather {
    /// Nothing.
    Fair,
    /// Errors of the disk, and its own impatience.
    Rough,
}

/// A bug that is planted on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// One flush of the file does nothing. Those that a guest has asked for are made up
    /// for, so that only the order inside of the format is wrong.
    MissingFlush,
}

/// What a seed has drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    /// Cluster size in bytes.
    pub(crate) cluster: u64,
    /// Size of the disk in sectors.
    pub(crate) sectors: u64,
    /// Size of the backing file in sectors, if there is one.
    pub(crate) base: Option<u64>,
    pub(crate) copy_on_read: bool,
    /// `raw` between the filter and the format.
    pub(crate) raw: bool,
    pub(crate) tasks: u64,
    /// Requests of each task.
    pub(crate) requests: u64,
    pub(crate) may_grow: bool,
    pub(crate) latency_ns_max: u64,
    /// Some requests of the format to its file fail.
    pub(crate) errors: bool,
    /// The guest drops some of its requests before they complete.
    pub(crate) cancels: bool,
    /// Many discards and flushes among the writes, so that clusters are freed and used again.
    pub(crate) churn: bool,
    /// The graph changes meanwhile: other options and links, and the image is let go and taken
    /// over again.
    pub(crate) changes: bool,
    /// The backing file is streamed into the image meanwhile, by a job that is paused, resumed and
    /// sometimes cancelled.
    pub(crate) stream: bool,
}

impl Scenario {
    pub(crate) fn draw(r: &mut Random, weather: Weather) -> Scenario {
        const K: u64 = 1024;
        let cluster = match r.below(100) {
            0 => 2 * K * K,
            1..=3 => 256 * K,
            4..=18 => 64 * K,
            _ => *r.pick(&[512, 512, K, 2 * K, 4 * K, 4 * K, 8 * K, 16 * K]),
        };
        // A few clusters of the large ones, some tables of the small ones.
        let sectors = r.between(8, (cluster / SECTOR * 6).clamp(256, 1024));
        let base = r.percent(85).then(|| match r.below(4) {
            0 => r.between(1, sectors),
            1 => sectors + r.below(sectors),
            _ => sectors,
        });
        let scenario = Scenario {
            cluster,
            sectors,
            base,
            copy_on_read: base.is_some() && r.percent(70),
            raw: r.percent(20),
            tasks: r.between(1, 4),
            requests: r.between(4, 16),
            may_grow: r.percent(40),
            latency_ns_max: *r.pick(&[0, 10_000, 100_000, 100_000]),
            errors: weather == Weather::Rough && r.percent(60),
            cancels: weather == Weather::Rough && r.percent(60),
            churn: r.percent(30),
            changes: r.percent(25),
            stream: false,
        };
        let stream = scenario.base.is_some() && !scenario.changes && r.percent(35);
        Scenario { stream, may_grow: scenario.may_grow && !stream, ..scenario }
    }

    /// The stack over the leaves `disk` and `base`.
    pub(crate) fn stack(&self) -> Options {
        let qcow2 = self.image();
        let over = |driver: &str, below: Options| {
            Options::new().with("driver", driver).with("discard", "unmap").with("file", below.into_value())
        };
        let stack = if self.raw { over("raw", qcow2) } else { qcow2 };
        if self.copy_on_read { over("copy-on-read", stack) } else { stack }
    }

    /// The image itself.
    fn image(&self) -> Options {
        Options::new()
            .with("driver", "qcow2")
            .with("node-name", "top")
            .with("file", "disk")
            .with("discard", "unmap")
            .with("backing", if self.base.is_some() { Value::from("base") } else { Value::Null })
    }

    /// The same once the backing file has been streamed into the image, if that may happen.
    pub(crate) fn without_base(&self) -> Option<Options> {
        self.stream.then(|| Scenario { base: None, ..*self }.stack())
    }

    /// Tags of the disk's sectors in the beginning.
    fn tags(&self) -> Vec<u64> {
        (0..self.sectors).map(|s| if s < self.base.unwrap_or(0) { base_tag(s) } else { ZERO_TAG }).collect()
    }

    /// The backing file's leaf.
    pub(crate) fn base_leaf(&self) -> Option<Leaf> {
        let sectors = self.base?;
        let mut bytes = vec![0; (sectors * SECTOR) as usize];
        for (sector, out) in (0..).zip(bytes.chunks_mut(SECTOR as usize)) {
            TagPattern::fill(base_tag(sector), sector, out);
        }
        Some(Leaf::read_only("base", MemoryDisk::new(Image::from_bytes(&bytes))))
    }
}

/// Runs of data and of zeroes in the backing file.
const fn base_tag(sector: u64) -> u64 {
    if sector / 24 % 4 == 3 { ZERO_TAG } else { BASE_TAG }
}

/// What a workload leaves behind.
pub(crate) struct Run {
    pub(crate) disk: SimDisk,
    pub(crate) oracle: Oracle,
}

/// Runs the workload of a scenario.
pub(crate) fn run(scenario: &Scenario, seed: u64, bug: Bug) -> Result<Run, Error> {
    let oracle = Rc::new(RefCell::new(Oracle::new(scenario.tags())));
    let plan = Plan {
        stack: scenario.stack(),
        cluster: scenario.cluster,
        sectors: scenario.sectors,
        tasks: scenario.tasks,
        requests: scenario.requests,
        may_grow: scenario.may_grow,
        latency_ns_max: scenario.latency_ns_max,
        errors: scenario.errors,
        cancels: scenario.cancels,
        churn: scenario.churn,
        image: scenario.changes.then(|| scenario.image()),
        stream: scenario.stream,
        bug,
        seed,
    };
    let base = scenario.base_leaf();
    let shared = oracle.clone();
    let disk = Sim::run(seed, move |rt| async move { plan.run(rt, base, shared).await })?;
    let oracle = Rc::try_unwrap(oracle).expect("all tasks have ended").into_inner();
    Ok(Run { disk, oracle })
}

/// A scenario's part that moves into the simulation.
struct Plan {
    stack: Options,
    cluster: u64,
    sectors: u64,
    tasks: u64,
    requests: u64,
    may_grow: bool,
    latency_ns_max: u64,
    errors: bool,
    cancels: bool,
    churn: bool,
    /// The image's options, if they change meanwhile.
    image: Option<Options>,
    stream: bool,
    bug: Bug,
    seed: u64,
}

impl Plan {
    async fn run(self, rt: Rt, base: Option<Leaf>, oracle: Rc<RefCell<Oracle>>) -> Result<SimDisk, Error> {
        let fresh = MemoryDisk::new(Image::new(0));
        let mut options =
            Options::new().with("size", self.sectors * SECTOR).with("cluster_size", self.cluster);
        if self.stream {
            // The judge asks the header whether the base still counts.
            options.set("backing_file", "base");
        }
        dolmen_sim::create(&rt, &dolmen_formats::QCOW2, Leaf::new("disk", fresh.clone()), options).await?;
        let config = DiskConfig { latency_ns_max: self.latency_ns_max, ..DiskConfig::default() };
        let disk = SimDisk::new(fresh.image(), config);
        let leaves = base.into_iter().chain([Leaf::new("disk", disk.clone())]).collect();
        // A stream lets nobody change the size.
        let size = if self.stream { Actions::NONE } else { Actions::S };
        let needs = Actions::D | Actions::V | size;
        let mut harness = Harness::open(&rt, REGISTRY, leaves, self.stack, needs).await?;
        let mut random = Random::new(self.seed ^ 0x5eed);
        if self.bug == Bug::MissingFlush {
            let skip = random.below(12);
            disk.inject(Fault { kind: OpKind::Flush, skip, times: 1, action: FaultAction::Swallow });
        }
        for _ in 0..if self.errors { random.between(1, 3) } else { 0 } {
            disk.inject(some_fault(&mut random));
        }
        if self.errors && random.percent(30) {
            disk.set_capacity(Some(disk.image().space() + random.below(self.sectors * SECTOR)));
        }
        let running = Rc::new(Cell::new(self.tasks));
        let paused = Rc::new(Cell::new(false));
        for task in 0..self.tasks {
            let guest = Guest {
                user: harness.user(),
                oracle: oracle.clone(),
                disk: disk.clone(),
                random: random.fork(),
                max_len: (self.cluster / SECTOR * 2).clamp(8, 64),
                may_grow: self.may_grow && task == 0,
                bug: self.bug,
                errors: self.errors,
                cancels: self.cancels,
                churn: self.churn,
                paused: paused.clone(),
                rt: rt.clone(),
            };
            let (requests, running) = (self.requests, running.clone());
            rt.spawn(async move {
                guest.run(requests).await;
                running.set(running.get() - 1);
            });
        }
        let mut changes = self.image.filter(|_| self.bug == Bug::None).map(|image| Changes {
            rt: rt.clone(),
            image,
            oracle,
            disk: disk.clone(),
            paused,
            errors: self.errors,
            random: random.fork(),
        });
        let mut streaming = None;
        if self.stream && self.bug == Bug::None {
            match Streaming::start(&rt, &mut harness, random.fork(), self.errors).await {
                Ok(started) => streaming = Some(started),
                Err(_) if self.errors => {}
                Err(e) => return Err(e),
            }
        }
        while running.get() > 0 || streaming.as_ref().is_some_and(|s| !s.has_ended()) {
            rt.sleep(Duration::from_micros(200)).await;
            if let Some(changes) = &mut changes {
                changes.step(&mut harness).await;
            }
            if let Some(streaming) = &mut streaming {
                streaming.step(&mut harness).await?;
            }
        }
        drop(changes);
        if let Some(streaming) = streaming {
            streaming.check();
        }
        // With errors about, closing may fail; what the disk holds must still be right.
        match harness.close().await {
            Err(e) if !self.errors => Err(e),
            _ => Ok(disk),
        }
    }
}

/// A stream job under the guest.
struct Streaming {
    job: Rc<Job>,
    group: Rc<Group>,
    /// The work has ended, or is to end.
    attention: Rc<Cell<bool>>,
    random: Random,
    cancelled: bool,
    errors: bool,
}

impl Streaming {
    async fn start(
        rt: &Rt,
        harness: &mut Harness,
        mut random: Random,
        errors: bool,
    ) -> Result<Streaming, Error> {
        let mut options = JobOptions::new(OpId::internal("stream"));
        // Some are so slow that they are never done before they are cancelled.
        options.speed = *random.pick(&[0, 0, 1 << 30, 1]);
        let device = harness.edge.node().name.to_string();
        let work = Stream::from_options(&mut Options::new().with("device", device.as_str()))?;
        let attention = Rc::new(Cell::new(false));
        let asked = attention.clone();
        let (emit, attend): (Emit, Attention) = (Rc::new(|_, _| {}), Rc::new(move |_| asked.set(true)));
        let job = Job::new(options, Box::new(work), rt, emit, attend);
        let policy = OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };
        let opener = NodeOpener { registry: REGISTRY, policy, names: Registry::protocol_name, rt };
        let mut draft = harness.owner.draft();
        prepare(&job, &mut draft, &opener).await?;
        harness.owner.commit(draft).await?;
        let group = launch(vec![job.clone()], &harness.owner);
        Ok(Streaming { job, group, attention, random, cancelled: false, errors })
    }

    fn has_ended(&self) -> bool {
        self.group.is_concluded()
    }

    async fn step(&mut self, harness: &mut Harness) -> Result<(), Error> {
        if self.job.speed() == 1 && self.random.percent(10) || self.random.percent(1) {
            // Too late, perhaps.
            self.cancelled |= self.job.cancel(true).is_ok();
        }
        match self.random.below(4) {
            0 => drop(self.job.pause()),
            1 | 2 => drop(self.job.resume()),
            _ => {}
        }
        if self.attention.replace(false)
            && let Err(e) = self.group.advance(&mut harness.owner).await
        {
            // An abort can't be published while flushing fails: it is tried again.
            self.attention.set(true);
            return if self.errors { Ok(()) } else { Err(e) };
        }
        Ok(())
    }

    /// It succeeds unless there is a reason.
    fn check(&self) {
        assert!(self.job.error().is_none() || self.cancelled || self.errors, "{:?}", self.job.error());
    }
}

/// Changes the graph under the guest.
struct Changes {
    rt: Rt,
    image: Options,
    oracle: Rc<RefCell<Oracle>>,
    disk: SimDisk,
    /// The guest begins nothing new.
    paused: Rc<Cell<bool>>,
    errors: bool,
    random: Random,
}

impl Changes {
    async fn step(&mut self, harness: &mut Harness) {
        if self.random.percent(30) {
            return self.let_go_and_take_over(harness).await;
        }
        let result = self.reopen(harness).await;
        assert!(self.errors || result.is_ok(), "reopening failed: {result:?}");
    }

    /// Other options, and filters in and out below the image on both sides.
    async fn reopen(&mut self, harness: &mut Harness) -> Result<(), Error> {
        let mut options = self.image.clone();
        options.set("pass-discard-request", self.random.percent(50));
        let over = |node: &str, name: &str| {
            let filter = Options::new().with("driver", "raw").with("node-name", name).with("file", node);
            filter.with("discard", "unmap").into_value()
        };
        let mut draft = harness.owner.draft();
        // Filters that stand there are named, others made.
        let through = |options: &mut Options, child: &str, node: &str, name: &str| {
            let there = draft.has_node(name);
            options.set(child, if there { Value::from(name) } else { over(node, name) });
        };
        if self.random.percent(50) {
            through(&mut options, "file", "disk", "below");
        }
        if self.random.percent(50) && options.get("backing") == Some(&Value::from("base")) {
            through(&mut options, "backing", "base", "behind");
        }
        let rt = self.rt.clone();
        let policy = OpenPolicy {
            implicit: Implicit::Deny,
            probe: false,
            permit_with: "nothing in a test",
            probe_with: "nothing in a test",
        };
        let opener = NodeOpener { registry: REGISTRY, policy, names: Registry::protocol_name, rt: &rt };
        let op = draft.add_command("blockdev-reopen", "of 'top'".to_owned());
        opener.reopen(&mut draft, &op, vec![options]).await?;
        draft.prepare(&rt).await?;
        draft.remove_op(&op);
        harness.owner.commit(draft).await.map(drop)
    }

    /// What was acknowledged is durable once the image is let go.
    async fn let_go_and_take_over(&mut self, harness: &mut Harness) {
        self.paused.set(true);
        let op = self.oracle.borrow_mut().flush(self.disk.position());
        let result = self.set_active(harness, false).await;
        self.oracle.borrow_mut().flushed(op, &result, self.disk.position());
        assert!(self.errors || result.is_ok(), "letting go failed: {result:?}");
        // The disk's errors end some time.
        for attempt in 0.. {
            match self.set_active(harness, true).await {
                Ok(()) => break,
                Err(e) => assert!(self.errors && attempt < 20, "taking over failed: {e:?}"),
            }
        }
        self.paused.set(false);
    }

    async fn set_active(&mut self, harness: &mut Harness, active: bool) -> Result<(), Error> {
        let mut draft = harness.owner.draft();
        draft.allow_inactive(harness.edge.op());
        let top = harness.top().name.clone();
        draft.set_active(Some(&top), active)?;
        harness.owner.commit(draft).await.map(drop)
    }
}

/// A few requests of one kind that fail at some time.
fn some_fault(random: &mut Random) -> Fault {
    let kind = *random.pick(&[
        OpKind::Write,
        OpKind::Write,
        OpKind::Flush,
        OpKind::Read,
        OpKind::WriteZeroes,
        OpKind::Discard,
        OpKind::Resize,
    ]);
    let often = matches!(kind, OpKind::Write);
    Fault {
        kind,
        skip: random.below(if often { 60 } else { 12 }),
        times: random.between(1, 3),
        action: FaultAction::Fail(*random.pick(&[ErrorKind::Io, ErrorKind::NoSpace])),
    }
}

/// One task of the guest: one request after the other.
struct Guest {
    user: User,
    oracle: Rc<RefCell<Oracle>>,
    disk: SimDisk,
    random: Random,
    /// Longest request in sectors.
    max_len: u64,
    may_grow: bool,
    bug: Bug,
    errors: bool,
    cancels: bool,
    churn: bool,
    paused: Rc<Cell<bool>>,
    rt: Rt,
}

impl Guest {
    async fn run(mut self, requests: u64) {
        for _ in 0..requests {
            if self.random.percent(30) {
                let pause_ns = self.random.below(300_000);
                self.rt.sleep(Duration::from_nanos(pause_ns)).await;
            }
            // Nothing is awaited between this and the request's token.
            while self.paused.get() {
                self.rt.sleep(Duration::from_micros(10)).await;
            }
            self.request().await;
        }
    }

    /// Where the next request goes, in sectors. Half of them to the same few.
    fn place(&mut self) -> Span {
        let size = self.user.size() / SECTOR;
        let hot = size.min(self.max_len * 2);
        let first = if self.random.percent(50) { self.random.below(hot) } else { self.random.below(size) };
        let longest = if self.random.percent(50) { 4 } else { self.max_len };
        Span::new(first, self.random.between(1, longest.min(size - first)))
    }

    async fn request(&mut self) {
        let at = self.place();
        let bytes = Span::new(at.offset() * SECTOR, at.len() * SECTOR);
        let user = self.user.clone();
        let dice = if self.churn && self.random.percent(60) {
            *self.random.pick(&[0, 0, 60, 60, 90])
        } else {
            self.random.below(100)
        };
        match dice {
            0..45 => self.write(at, bytes).await,
            45..57 => {
                let unmap = self.random.percent(50);
                let flags = if unmap { WriteFlags::MAY_UNMAP } else { WriteFlags::NONE };
                let op = self.oracle.borrow_mut().write(at, ZERO_TAG, false, self.disk.position());
                let result = self.attempt("write zeroes", user.write_zeroes(bytes, flags)).await;
                self.complete(op, result);
            }
            57..67 => {
                let op = self.oracle.borrow_mut().discard(at, self.disk.position());
                let result = self.attempt("discard", user.discard(bytes)).await;
                self.complete(op, result);
            }
            67..85 => {
                let mark = self.oracle.borrow_mut().read();
                let read = user.read(bytes.offset(), bytes.len() as usize);
                if let Some(Ok(found)) = self.attempt("read", read).await
                    && let Err(v) = self.oracle.borrow_mut().check_read(mark, at.offset(), &found)
                {
                    panic!("{v}");
                }
            }
            97.. if self.may_grow => {
                let size = self.user.size() / SECTOR;
                let size = size + self.random.between(1, size.clamp(8, 300));
                let op = self.oracle.borrow_mut().grow(size, self.disk.position());
                let result = self.attempt("resize", user.resize(size * SECTOR)).await;
                self.complete(op, result);
            }
            _ => {
                let op = self.oracle.borrow_mut().flush(self.disk.position());
                let result = self.attempt("flush", user.flush()).await;
                if self.bug == Bug::MissingFlush {
                    self.disk.flush_now();
                }
                if let Some(result) = result {
                    self.oracle.borrow_mut().flushed(op, &result, self.disk.position());
                }
            }
        }
    }

    async fn write(&mut self, at: Span, bytes: Span) {
        // The planted bug would make FUA a lie, which is not what is looked for.
        let fua = self.bug == Bug::None && self.random.percent(10);
        let tag = self.oracle.borrow_mut().fresh_tag();
        let mut data = vec![0; bytes.len() as usize];
        TagPattern::fill(tag, at.offset(), &mut data);
        let op = self.oracle.borrow_mut().write(at, tag, fua, self.disk.position());
        let flags = if fua { WriteFlags::FUA } else { WriteFlags::NONE };
        let user = self.user.clone();
        let result = self.attempt("write", user.write(bytes.offset(), &data, flags)).await;
        self.complete(op, result);
    }

    /// A request that was dropped may have happened, or happen later: for the oracle it never
    /// completes.
    fn complete(&mut self, op: GuestOp, result: Option<Result<(), Error>>) {
        if let Some(result) = result {
            self.oracle.borrow_mut().complete(op, &result, self.disk.position());
        }
    }

    /// Waits for a request, or drops it after a while (`None`).
    async fn attempt<T>(
        &mut self,
        what: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Option<Result<T, Error>> {
        let result = if self.cancels && self.random.percent(15) {
            let patience = self.rt.sleep(Duration::from_nanos(self.random.below(400_000)));
            futures_lite::future::or(async { Some(request.await) }, async {
                patience.await;
                None
            })
            .await
        } else {
            Some(request.await)
        };
        match &result {
            Some(Err(e)) if !self.errors => panic!("{what} failed at {}: {e:?}", self.disk.position()),
            _ => result,
        }
    }
}
