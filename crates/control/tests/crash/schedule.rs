//! One schedule: guests at work while jobs start, pause and end, filters come and go, and disks fail.
//!
//! Every command goes through the control task as a client's would. What the schedule knows is what a
//! client knows: replies, the states of jobs, and which data it has written.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::UserEdge;
use dolmen_sim::{
    DiskConfig, Fault, FaultAction, Journal, Oracle, Random, ReadMark, SECTOR, Sim, SimDisk, TagPattern,
    User, ZERO_TAG,
};
use dolmen_types::{Actions, ErrorKind, OpKind, Options, Value};
use serde_json::Value as Json;

use crate::guest::start_guest;
use crate::world::{Asked, PLENTY, Seen, World, content, image_name, image_node, make_image};

/// What a seed has drawn.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// Cluster size in bytes.
    cluster: u64,
    /// Size of the disk in sectors.
    sectors: u64,
    /// Size of the lowest image in sectors.
    base: u64,
    /// Images in the chain.
    images: u64,
    /// The guest works through a copy-on-read node.
    entry: bool,
    guests: u64,
    steps: u64,
    latency_ns_max: u64,
    errors: bool,
    /// Disks become full, and have space again.
    full: bool,
    /// Guests give up some of their requests.
    cancels: bool,
}

impl Schedule {
    pub(crate) fn draw(r: &mut Random) -> Schedule {
        let cluster = *r.pick(&[512, 1024, 2048, 4096, 4096, 16384, 65536]);
        let least = cluster / SECTOR;
        let sectors = r.between(2, 24).max(1) * least.max(8);
        let sectors = sectors.min(768.max(least * 3));
        Schedule {
            cluster,
            sectors,
            base: if r.percent(75) { sectors } else { r.between(1, sectors / 4) * 4 },
            images: r.between(2, 4),
            entry: r.percent(40),
            guests: r.between(1, 3),
            steps: r.between(3, 14),
            latency_ns_max: *r.pick(&[10_000, 100_000, 100_000, 400_000]),
            errors: r.percent(30),
            full: r.percent(30),
            cancels: r.percent(50),
        }
    }
}

/// What a schedule leaves behind.
pub(crate) struct Ran {
    pub(crate) journal: Journal,
    pub(crate) disks: Vec<(String, SimDisk)>,
    pub(crate) oracle: Oracle,
    pub(crate) seen: Vec<Seen>,
    pub(crate) errors: bool,
    pub(crate) done: Done,
}

impl Ran {
    /// What may have been the root of the chain at a moment.
    pub(crate) fn roots(&self, position: usize) -> Vec<String> {
        let mut roots: Vec<String> = Vec::new();
        for (i, seen) in self.seen.iter().enumerate() {
            let next = self.seen.get(i + 1).map_or(usize::MAX, |n| n.first);
            let before = if i == 0 { 0 } else { self.seen[i - 1].last };
            if before < position && position < seen.first || seen.first <= position && position < next {
                roots.push(seen.root.clone());
            }
        }
        if roots.is_empty() {
            roots.push(self.seen[0].root.clone());
        }
        roots
    }
}

/// How often which command did something, and which jobs ended successfully.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) counts: HashMap<&'static str, u64>,
}

impl Done {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Done) {
        for (what, n) in &other.counts {
            *self.counts.entry(what).or_default() += n;
        }
    }

    pub(crate) fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }
}

/// Runs a schedule to its end. The error tells what went wrong without any crash.
pub(crate) fn run(schedule: Schedule, seed: u64) -> Result<Ran, String> {
    Sim::run(seed, move |rt| async move {
        let mut random = Random::new(seed ^ 0x5eed);
        let mut tags = vec![ZERO_TAG; schedule.sectors as usize];
        let chain = layers(&schedule, &mut random, &mut tags);
        let config = DiskConfig { latency_ns_max: schedule.latency_ns_max, ..DiskConfig::default() };
        let mut oracle = Oracle::new(tags);
        // No write has the tag of a layer, not even of one that is hidden.
        for _ in 0..schedule.images {
            oracle.fresh_tag();
        }
        let world = World::new(&rt, oracle, config, schedule.errors || schedule.full);
        world.only_full.set(schedule.full && !schedule.errors);
        world.fills.set(schedule.full);
        world.cancels.set(schedule.cancels);
        let mut below: Option<String> = None;
        for layer in &chain {
            let size = layer.sectors * SECTOR;
            let image = make_image(&rt, schedule.cluster, size, below.as_deref(), &layer.data)
                .await
                .map_err(|e| e.to_string())?;
            world.add_disk(&layer.name, image);
            let backing = below.map_or(Value::Null, Value::from);
            must(world.ask("blockdev-add", image_node(&layer.name).with("backing", backing)).await)?;
            below = Some(layer.name.clone());
        }
        let mut at = below.expect("at least two images");
        if schedule.entry {
            let entry = Options::new()
                .with("driver", "copy-on-read")
                .with("node-name", "entry")
                .with("discard", "unmap")
                .with("file", at);
            must(world.ask("blockdev-add", entry).await)?;
            at = "entry".into();
        }
        let edge = world.attach("guest", &at, Actions::D | Actions::V).await.map_err(|e| e.desc)?;
        *world.guest.borrow_mut() = Some(edge.clone());
        world.look();
        for _ in 0..schedule.guests {
            start_guest(&world, edge.clone(), random.fork(), 40, true);
        }
        drop(edge);
        let (steps, schedule_errors) = (schedule.steps, schedule.errors);
        let mut play = Play {
            world: world.clone(),
            schedule,
            random,
            jobs: Vec::new(),
            exports: Vec::new(),
            next: 0,
            done: Done::default(),
        };
        for _ in 0..steps {
            rt.sleep(Duration::from_nanos(play.random.below(2_000_000))).await;
            play.step().await?;
            play.attend().await?;
        }
        play.finish().await?;
        let mut done = std::mem::take(&mut play.done);
        *done.counts.entry("given up").or_default() += world.given_up.get();
        drop(play);
        world.guest.take();
        world.control.quit();
        world.control.ended().await;
        let errors = schedule_errors;
        let oracle = world.oracle.replace(Oracle::new(Vec::new()));
        Ok(Ran {
            journal: world.journal.clone(),
            disks: world.disks.take(),
            oracle,
            seen: world.seen.take(),
            errors,
            done,
        })
    })
}

fn must(asked: Asked) -> Result<Json, String> {
    asked?.map_err(|e| e.desc)
}

struct Layer {
    name: String,
    sectors: u64,
    data: Vec<(u64, Vec<u8>)>,
}

/// Draws what the images of the chain hold, lowest first, and puts what shows into `tags`.
fn layers(schedule: &Schedule, random: &mut Random, tags: &mut [u64]) -> Vec<Layer> {
    let mut out = Vec::new();
    for i in 0..schedule.images {
        let name = if i + 1 == schedule.images { "top".to_owned() } else { format!("base{i}") };
        let sectors = if i == 0 { schedule.base } else { schedule.sectors };
        let per = (schedule.cluster / SECTOR).max(1);
        let mut data = Vec::new();
        let density = if i == 0 { 70 } else { 35 };
        let mut at = 0;
        while at < sectors {
            let len = per.min(sectors - at);
            if random.percent(density) {
                // A zeroed cluster hides what is below as data do.
                let tag = if random.percent(15) { ZERO_TAG } else { i + 1 };
                let mut bytes = vec![0; (len * SECTOR) as usize];
                TagPattern::fill(tag, at, &mut bytes);
                data.push((at * SECTOR, bytes));
                tags[at as usize..(at + len) as usize].fill(tag);
            }
            at += len;
        }
        out.push(Layer { name, sectors, data });
    }
    out
}

/// What a job has promised.
#[derive(Debug)]
pub(crate) enum Promise {
    /// Guests do not notice.
    Unseen,
    /// The node holds what the disk held between two moments.
    Copy(String, ReadMark, ReadMark),
    /// The node follows the disk; from the first moment on since it was asked to keep what it has.
    Follow(String, Option<ReadMark>),
    /// The copy shows only as long as something else is below it, so it can't replace the source.
    Partial,
}

#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) id: String,
    pub(crate) what: &'static str,
    pub(crate) promise: Promise,
}

struct Export {
    id: String,
    edge: Arc<UserEdge>,
}

/// A schedule that is being played.
pub(crate) struct Play {
    pub(crate) world: Rc<World>,
    schedule: Schedule,
    pub(crate) random: Random,
    pub(crate) jobs: Vec<Running>,
    exports: Vec<Export>,
    /// For names.
    next: u64,
    pub(crate) done: Done,
}

impl Play {
    async fn step(&mut self) -> Result<(), String> {
        if self.random.percent(40) {
            self.fault();
        }
        match self.random.below(115) {
            0..9 => self.stream().await,
            9..20 => self.commit().await,
            20..34 => self.mirror().await,
            34..44 => self.backup().await,
            44..70 => self.verb().await,
            70..77 => self.export().await,
            77..89 => self.reopen().await,
            89..93 => self.delete().await,
            93..101 => self.snapshot().await,
            101..104 => self.hand_over().await,
            104..108 => self.resize().await,
            _ => {
                self.fault();
                Ok(())
            }
        }
    }

    /// Cluster size of the chain's images.
    pub(crate) fn cluster(&self) -> u64 {
        self.schedule.cluster
    }

    pub(crate) fn name(&mut self, what: &str) -> String {
        self.next += 1;
        format!("{what}{}", self.next)
    }

    /// The images of the chain, the root first.
    fn chain(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut at = Some(self.world.root());
        while let Some(node) = at {
            out.push(node.name.to_string());
            at = node.backing().map(content);
        }
        out
    }

    pub(crate) fn some_image(&mut self) -> String {
        let chain = self.chain();
        self.random.pick(&chain).clone()
    }

    pub(crate) fn mark(&self) -> ReadMark {
        self.world.oracle.borrow_mut().read()
    }

    /// What all jobs can be asked for.
    pub(crate) fn job(&mut self, id: &str) -> Options {
        let mut o = Options::new()
            .with("job-id", id)
            .with("auto-dismiss", false)
            .with("auto-finalize", self.random.percent(80));
        if self.random.percent(40) {
            o.set("speed", self.random.between(1, 64) << 20);
        }
        o
    }

    fn on_error(&mut self, o: &mut Options, names: &[&str]) {
        for name in names {
            if self.random.percent(40) {
                o.set(*name, *self.random.pick(&["report", "stop", "enospc"]));
            }
        }
    }

    async fn begin(&mut self, what: &'static str, o: Options, promise: Promise) -> Result<bool, String> {
        let Some(Value::Str(id)) = o.get("job-id").cloned() else { return Ok(false) };
        let started = self.world.ask(what, o).await?.is_ok();
        if started {
            self.done.count(what);
            self.jobs.push(Running { id, what, promise });
        } else {
            self.done.count("refused");
        }
        Ok(started)
    }

    async fn stream(&mut self) -> Result<(), String> {
        let id = self.name("stream");
        let mut o = self.job(&id);
        let device =
            if self.random.percent(70) { self.world.root().name.to_string() } else { self.some_image() };
        o.set("device", device);
        let image = self.some_image();
        match self.random.below(3) {
            0 => o.set("base-node", image),
            1 => o.set("bottom", image),
            _ => {}
        }
        self.on_error(&mut o, &["on-error"]);
        self.begin("block-stream", o, Promise::Unseen).await.map(drop)
    }

    async fn commit(&mut self) -> Result<(), String> {
        let id = self.name("commit");
        let mut o = self.job(&id).with("device", self.world.root().name.as_str());
        if self.random.percent(60) {
            o.set("top-node", self.some_image());
        }
        if self.random.percent(60) {
            o.set("base-node", self.some_image());
        }
        self.on_error(&mut o, &["on-error"]);
        self.begin("block-commit", o, Promise::Unseen).await.map(drop)
    }

    /// Makes an empty image with a node; `backing` names the image below, by its node.
    pub(crate) async fn target(&mut self, backing: Option<&str>) -> Result<Option<String>, String> {
        let name = self.name("t");
        let cluster = if self.random.percent(70) { self.schedule.cluster } else { 4096 };
        let size = self.world.root().size();
        let image =
            make_image(&self.world.rt, cluster, size, backing, &[]).await.map_err(|e| e.to_string())?;
        self.world.add_disk(&name, image);
        let below = backing.map_or(Value::Null, Value::from);
        let added = self.world.ask("blockdev-add", image_node(&name).with("backing", below)).await?;
        Ok(added.ok().map(|_| name))
    }

    async fn mirror(&mut self) -> Result<(), String> {
        let id = self.name("mirror");
        let root = self.world.root();
        let (device, below) = (root.name.to_string(), root.backing().map(content));
        drop(root);
        let sync = *self.random.pick(&["full", "full", "full", "top", "none"]);
        let below = below.map(|b| b.name.to_string());
        let backing = match sync {
            "top" => below.as_deref(),
            "none" => Some(device.as_str()),
            _ => None,
        };
        let Some(target) = self.target(backing).await? else { return Ok(()) };
        let mut o =
            self.job(&id).with("device", device.as_str()).with("target", target.as_str()).with("sync", sync);
        if self.random.percent(50) {
            o.set("copy-mode", *self.random.pick(&["background", "write-blocking"]));
        }
        if self.random.percent(50) {
            o.set("granularity", *self.random.pick(&[512u64, 1024, 4096, 65536]));
        }
        self.on_error(&mut o, &["on-source-error", "on-target-error"]);
        let promise = if sync == "none" { Promise::Partial } else { Promise::Follow(target, None) };
        if self.begin("blockdev-mirror", o, promise).await? && self.world.root().name.as_str() != device {
            // Another job has replaced the root meanwhile.
            self.jobs.last_mut().expect("just begun").promise = Promise::Partial;
        }
        Ok(())
    }

    async fn backup(&mut self) -> Result<(), String> {
        let id = self.name("backup");
        let root = self.world.root();
        let (device, below) = (root.name.to_string(), root.backing().map(content));
        drop(root);
        let below = below.map(|b| b.name.to_string());
        let sync = *self.random.pick(&["full", "full", "top", "none"]);
        let backing = match sync {
            "top" => below.as_deref(),
            "none" => Some(device.as_str()),
            _ => None,
        };
        let Some(target) = self.target(backing).await? else { return Ok(()) };
        let mut o =
            self.job(&id).with("device", device.as_str()).with("target", target.as_str()).with("sync", sync);
        self.on_error(&mut o, &["on-source-error", "on-target-error"]);
        let from = self.mark();
        if self.begin("blockdev-backup", o, Promise::Partial).await? {
            let to = self.mark();
            let job = self.jobs.last_mut().expect("just begun");
            if sync == "none" && self.world.root().name.as_str() == device {
                // It shows the past for as long as it runs.
                self.world.rt.sleep(Duration::from_nanos(self.random.below(1_000_000))).await;
                self.check_fleece(&id, &target, from, to).await?;
            } else if self.world.root().name.as_str() == device {
                job.promise = Promise::Copy(target, from, to);
            }
        }
        Ok(())
    }

    /// Reads what a backup keeps of the past while it runs.
    async fn check_fleece(
        &mut self,
        id: &str,
        target: &str,
        from: ReadMark,
        to: ReadMark,
    ) -> Result<(), String> {
        // The target is read as the overlay that it is. Nothing keeps a write of the guest from overtaking
        // such a read between the look into the target and the one into its backing file (readers of a
        // snapshot-access node are waited for), so the guests rest meanwhile.
        self.world.rest.set(true);
        for _ in 0..200 {
            if self.world.busy.get() == 0 {
                break;
            }
            self.world.rt.sleep(Duration::from_micros(20)).await;
        }
        let calm = self.world.busy.get() == 0;
        let read = if calm { self.world.read_node(target).await.ok() } else { None };
        self.world.rest.set(false);
        let Some(bytes) = read else { return Ok(()) };
        // It may have failed meanwhile.
        let jobs = self.world.jobs().await;
        let running =
            jobs.iter().any(|j| j["id"] == id && (j["status"] == "running" || j["status"] == "paused"));
        if running && jobs.iter().all(|j| j["id"] != id || j["error"].is_null()) {
            self.done.count("fleece compared");
            let judged = self.world.oracle.borrow().check_copy(from, to, &bytes);
            judged.map_err(|v| format!("fleece '{target}' of {id}: {v}"))?;
        }
        Ok(())
    }

    async fn verb(&mut self) -> Result<(), String> {
        let Some(i) = (!self.jobs.is_empty()).then(|| self.random.below(self.jobs.len() as u64) as usize)
        else {
            return Ok(());
        };
        let id = self.jobs[i].id.clone();
        let by_id = Options::new().with("id", id.as_str());
        let by_device = Options::new().with("device", id.as_str());
        let what = match self.random.below(12) {
            0..3 => "job-pause",
            3..5 => "job-resume",
            5 => "job-cancel",
            6 => "block-job-cancel",
            7..9 if !matches!(self.jobs[i].promise, Promise::Partial) => "job-complete",
            9 => "block-job-change",
            10 => "job-finalize",
            _ => "block-job-set-speed",
        };
        let result = match what {
            "block-job-cancel" => {
                let mark = self.mark();
                let result = self.world.ask(what, by_device).await?;
                if let (Ok(_), Promise::Follow(_, from)) = (&result, &mut self.jobs[i].promise) {
                    from.get_or_insert(mark);
                }
                result
            }
            "block-job-set-speed" => {
                let speed = *self.random.pick(&[0, 1 << 20, 8 << 20, 64 << 20]);
                self.world.ask(what, by_device.with("speed", speed)).await?
            }
            "block-job-change" => {
                let change = by_id.with("type", "mirror").with("copy-mode", "write-blocking");
                self.world.ask(what, change).await?
            }
            _ => self.world.ask(what, by_id).await?,
        };
        self.done.count(if result.is_ok() { what } else { "refused" });
        Ok(())
    }

    /// Somebody else comes or goes.
    async fn export(&mut self) -> Result<(), String> {
        if !self.exports.is_empty() && self.random.percent(50) {
            let i = self.random.below(self.exports.len() as u64) as usize;
            let Export { id, edge } = self.exports.swap_remove(i);
            drop(edge);
            self.world.detach(&id).await;
            self.world.look();
            self.done.count("export del");
            return Ok(());
        }
        let id = self.name("export");
        let root = self.world.root().name.to_string();
        let writable = self.random.percent(40);
        let node = if writable || self.random.percent(50) { root.clone() } else { self.some_image() };
        let needs = if writable { Actions::D | Actions::V } else { Actions::D };
        match self.world.attach(&id, &node, needs).await {
            Ok(edge) => {
                self.done.count("export add");
                // The root may have changed while this waited for its turn.
                if content(&edge.node()).name == self.world.root().name {
                    start_guest(&self.world, edge.clone(), self.random.fork(), 10, writable);
                }
                self.exports.push(Export { id, edge });
            }
            Err(_) => self.done.count("refused"),
        }
        self.world.look();
        Ok(())
    }

    /// Other options for an image, or a filter in or out on one of its sides.
    async fn reopen(&mut self) -> Result<(), String> {
        let graph = self.world.control.graph();
        let images: Vec<_> = graph.nodes().into_iter().filter(|n| n.driver.kind().name == "qcow2").collect();
        let node = self.random.pick(&images).clone();
        let child = |name: &str| node.child(name).map(|c| c.node.clone());
        let (file, backing) = (child("file"), node.backing().cloned());
        let Some(file) = file else { return Ok(()) };
        drop(graph);
        let mut o = Options::new()
            .with("driver", "qcow2")
            .with("node-name", node.name.as_str())
            .with("discard", *self.random.pick(&["unmap", "unmap", "ignore"]))
            .with("lazy-refcounts", self.random.percent(20))
            .with("file", file.name.as_str())
            .with("backing", backing.as_ref().map_or(Value::Null, |b| Value::from(b.name.as_str())));
        if self.random.percent(10) {
            o.set("read-only", true);
        }
        let side = if backing.is_some() && self.random.percent(50) { "backing" } else { "file" };
        let below = if side == "backing" { backing.unwrap_or(file) } else { file };
        let mut inserted = None;
        if self.random.percent(60) {
            match below.filtered() {
                Some(next) => o.set(side, next.name.as_str()),
                None => {
                    let name = self.name("filter");
                    let filter = Options::new()
                        .with("driver", "blkdebug")
                        .with("node-name", name.as_str())
                        .with("discard", "unmap")
                        .with("image", below.name.as_str());
                    if self.world.ask("blockdev-add", filter).await?.is_ok() {
                        o.set(side, name.as_str());
                        inserted = Some(name);
                    }
                }
            }
        }
        let options = Options::new().with("options", Value::List(vec![o.into_value()]));
        let result = self.world.ask("blockdev-reopen", options).await?;
        self.done.count(if result.is_ok() { "blockdev-reopen" } else { "refused" });
        if let (Err(_), Some(name)) = (result, inserted) {
            self.world
                .ask("blockdev-del", Options::new().with("node-name", name))
                .await?
                .map_err(|e| e.desc)?;
        }
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), String> {
        let graph = self.world.control.graph();
        let named: Vec<String> =
            graph.nodes().iter().filter(|n| !n.anonymous).map(|n| n.name.to_string()).collect();
        drop(graph);
        let name = self.random.pick(&named).clone();
        let result = self.world.ask("blockdev-del", Options::new().with("node-name", name.as_str())).await?;
        if result.is_ok() {
            self.done.count("blockdev-del");
            for job in &mut self.jobs {
                if matches!(&job.promise, Promise::Copy(n, ..) | Promise::Follow(n, _) if *n == name) {
                    job.promise = Promise::Unseen;
                }
            }
        } else {
            self.done.count("refused");
        }
        Ok(())
    }

    /// Some requests to a disk are going to fail.
    fn fault(&mut self) {
        if !self.world.errors {
            return;
        }
        let disks = self.world.disks.borrow();
        let disk = &self.random.pick(&disks).1;
        if self.world.fills.get() && (self.world.only_full.get() || self.random.percent(50)) {
            let space = disk.image().space() + self.random.below(4) * self.random.below(16 << 10);
            disk.set_capacity(Some(if self.random.percent(40) { PLENTY } else { space }));
            drop(disks);
            self.done.count("full");
            return;
        }
        let kinds = [OpKind::Write, OpKind::Write, OpKind::Read, OpKind::Flush, OpKind::WriteZeroes];
        disk.inject(Fault {
            kind: *self.random.pick(&kinds),
            skip: self.random.below(12),
            times: self.random.between(1, 3),
            action: FaultAction::Fail(*self.random.pick(&[ErrorKind::Io, ErrorKind::NoSpace])),
        });
        drop(disks);
        self.done.count("fault");
    }

    /// Judges jobs that have ended, and forgets them.
    async fn attend(&mut self) -> Result<(), String> {
        self.world.look();
        for shown in self.world.jobs().await {
            let Some(i) = self.jobs.iter().position(|j| shown["id"] == j.id.as_str()) else { continue };
            if shown["status"] != "concluded" {
                continue;
            }
            let job = self.jobs.swap_remove(i);
            let to = self.mark();
            must(self.world.ask("job-dismiss", Options::new().with("id", job.id.as_str())).await)?;
            if !shown["error"].is_null() {
                let error = shown["error"].as_str().unwrap_or_default();
                let cancelled = error.contains("cancel");
                self.done.count(if cancelled { "cancelled" } else { "failed" });
                // An overlay came, or became read-only, after the job that was to rename its backing file.
                let overlay = error.contains("is read-only, so its header would go on naming");
                // Clusters of 512 and 1024 bytes have room for short names, not for two descriptions of filters.
                let name = error.contains("has no room for a backing file name");
                if !cancelled && !overlay && !name && !self.world.errors {
                    return Err(format!("{} failed although nothing was injected: {error}", job.id));
                }
                continue;
            }
            self.done.count(match job.what {
                "block-stream" => "streamed",
                "block-commit" => "committed",
                "blockdev-mirror" => "mirrored",
                _ => "backed up",
            });
            let (node, from, to) = match job.promise {
                Promise::Copy(node, from, to) => (node, from, to),
                // Guests use it from now on, and see for themselves whether it is right.
                Promise::Follow(node, _) if self.chain().contains(&node) => continue,
                Promise::Follow(node, Some(from)) => (node, from, to),
                Promise::Follow(..) | Promise::Unseen | Promise::Partial => continue,
            };
            let bytes = match self.world.read_node(&node).await {
                Ok(bytes) => bytes,
                Err(_) if self.world.errors => continue,
                // Another job changes what is below.
                Err(e) if e.contains("Finish the job") => continue,
                Err(e) => return Err(format!("the copy of {} can't be read: {e}", job.id)),
            };
            self.done.count("copy compared");
            let judged = self.world.oracle.borrow().check_copy(from, to, &bytes);
            judged.map_err(|v| format!("{} to '{node}': {v}", job.id))?;
        }
        Ok(())
    }

    /// Lets all jobs come to an end, then the guests.
    async fn finish(&mut self) -> Result<(), String> {
        if self.random.percent(80) {
            self.world.disks.borrow().iter().for_each(|d| d.1.heal());
        }
        for round in 0..2000 {
            self.attend().await?;
            if self.jobs.is_empty() {
                break;
            }
            if round == 50 && self.world.fills.get() {
                // A job that is to ignore errors goes on when there is space again.
                self.world.disks.borrow().iter().for_each(|d| d.1.set_capacity(Some(PLENTY)));
            }
            if round == 1999 {
                return Err(format!("jobs do not end: {:?} {:?}", self.jobs, self.world.jobs().await));
            }
            for shown in self.world.jobs().await {
                let Some(i) = self.jobs.iter().position(|j| shown["id"] == j.id.as_str()) else { continue };
                let id = self.jobs[i].id.clone();
                let by_id = Options::new().with("id", id.as_str());
                let by_device = Options::new().with("device", id.as_str());
                let partial = matches!(self.jobs[i].promise, Promise::Partial);
                // All of them may have come too late.
                let _ = match shown["status"].as_str().unwrap_or_default() {
                    "paused" | "standby" => self.world.ask("job-resume", by_id).await?,
                    "ready" if partial => self.world.ask("block-job-cancel", by_device).await?,
                    // A pivot onto what does not read like the source is refused for good.
                    "ready" => match self.world.ask("job-complete", by_id).await? {
                        Err(_) if round >= 200 => self.world.ask("block-job-cancel", by_device).await?,
                        answer => answer,
                    },
                    "pending" => self.world.ask("job-finalize", by_id).await?,
                    "running" if partial => self.world.ask("job-cancel", by_id).await?,
                    "running" if round == 10 => {
                        self.world.ask("block-job-set-speed", by_device.with("speed", 0u64)).await?
                    }
                    _ => continue,
                };
            }
            // What ends a job is tried again after a second, as often as an injected error meets it.
            self.world.rt.sleep(Duration::from_millis(if round < 200 { 1 } else { 20 })).await;
        }
        self.world.stop.set(true);
        while self.world.guests.get() > 0 {
            self.world.rt.sleep(Duration::from_micros(100)).await;
        }
        for Export { id, edge } in std::mem::take(&mut self.exports) {
            drop(edge);
            self.world.detach(&id).await;
        }
        let edge = self.world.guest.borrow().clone().expect("attached");
        let user = User::new(edge, self.world.rt.clone());
        let mark = self.mark();
        match user.read(0, user.size() as usize).await {
            Ok(bytes) => {
                self.world
                    .oracle
                    .borrow_mut()
                    .check_read(mark, 0, &bytes)
                    .map_err(|v| format!("live: {v}"))?;
            }
            Err(_) if self.world.errors => {}
            Err(e) => return Err(format!("the disk can't be read: {e}")),
        }
        self.world.look();
        Ok(())
    }
}

/// Names of images are what headers hold: it has to fit.
#[test]
fn names_fit_into_headers() {
    assert!(image_name("a-rather-long-name").len() < 1023);
}
