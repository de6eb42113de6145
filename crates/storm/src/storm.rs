//! One seed: files, a daemon, clients, steps, and the end of each round.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::book::{Book, ContentId};
use crate::choose::{self, Chooser};
use crate::daemon::{Daemon, Tools};
use crate::images::{Builder, DEVICE, Files, take_down};
use crate::load::{End, Worker};
use crate::pester::Pester;
use crate::qmp::{Monitor, Reply};
use crate::rng::Rng;
use crate::steps::{Command, Step};
use crate::testcase::Made;
use crate::weigh::Weight;
use crate::world::{Graph, Job, World};

/// More than this many MiB of memory, or descriptors, are a leak at any moment: the disks have a few.
const MOST_MEMORY: u64 = 700;
const MOST_FILES: usize = 400;
/// How long events are waited for after a step.
const LISTEN: Duration = Duration::from_millis(4);

/// What must not be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finding {
    /// Which promise.
    pub(crate) kind: &'static str,
    pub(crate) text: String,
}

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) commands: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) jobs: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) queries: AtomicU64,
    pub(crate) what_if: AtomicU64,
    pub(crate) compared: AtomicU64,
    pub(crate) rounds: AtomicU64,
    /// The slowest answer to a query, and to a command, in milliseconds.
    pub(crate) slowest_query: AtomicU64,
    pub(crate) slowest_command: AtomicU64,
    /// What was refused, and how often.
    pub(crate) refusals: Mutex<BTreeMap<String, u64>>,
    pub(crate) failures: Mutex<BTreeMap<String, u64>>,
}

impl Numbers {
    pub(crate) fn add(to: &AtomicU64, n: u64) {
        to.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn count(list: &Mutex<BTreeMap<String, u64>>, what: String) {
        *list.lock().unwrap_or_else(std::sync::PoisonError::into_inner).entry(what).or_default() += 1;
    }
}

/// How it is done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mode {
    /// Every step is printed.
    pub(crate) verbose: bool,
    /// Findings of these kinds do not count.
    pub(crate) past: Vec<String>,
}

/// Where steps come from.
pub(crate) enum Source<'a> {
    Chosen,
    Recorded(&'a [Step]),
}

/// What a seed came to.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) finding: Option<Finding>,
    pub(crate) steps: Vec<Step>,
    pub(crate) script: Vec<Made>,
    /// The commands with which each round began.
    pub(crate) opened: Vec<Vec<Command>>,
    /// Where it was done.
    pub(crate) dir: PathBuf,
    /// The directory, if it is kept.
    pub(crate) kept: Option<PathBuf>,
}

pub(crate) struct Storm<'a> {
    pub(crate) seed: u64,
    pub(crate) tools: &'a Tools,
    pub(crate) numbers: &'a Arc<Numbers>,
    pub(crate) dir: PathBuf,
    pub(crate) book: Arc<Mutex<Book>>,
    pub(crate) files: Files,
    pub(crate) world: World,
    pub(crate) daemon: Option<Daemon>,
    pub(crate) monitors: Vec<Monitor>,
    pub(crate) pester: Option<Pester>,
    pub(crate) back: Option<Daemon>,
    pub(crate) back_stopped: bool,
    pub(crate) workers: BTreeMap<String, Vec<Worker>>,
    pub(crate) findings: Vec<Finding>,
    /// Files in which a crash has left unused space.
    pub(crate) leaky: std::collections::BTreeSet<String>,
    /// The contents of the disks' active layers.
    pub(crate) disks: Vec<ContentId>,
    /// The daemon knows commands that QEMU's doesn't.
    pub(crate) ours: bool,
    /// What the daemon weighed before it had a node.
    pub(crate) empty: Weight,
    pub(crate) round: u64,
    pub(crate) opened: Vec<Vec<Command>>,
    step: u64,
    mode: Mode,
}

/// What of the directory must not change by a refused command: its files, and for those that the daemon has not
/// open, when they were changed.
type Traces = BTreeMap<String, Option<(u64, u64, i64, i64)>>;

/// Whether a directory has room for the files of some seeds: containers have small ones.
fn has_room(dir: &Path) -> bool {
    let (_, text) =
        Tools::run(Path::new("/"), Path::new("df"), &["-k", "--output=avail", &dir.to_string_lossy()]);
    text.lines().last().and_then(|l| l.trim().parse().ok()).is_some_and(|kib: u64| kib > 1 << 20)
}

/// Runs a seed.
pub(crate) fn run(
    seed: u64,
    source: &Source<'_>,
    tools: &Tools,
    numbers: &Arc<Numbers>,
    mode: &Mode,
    stop: &AtomicBool,
) -> Result<Outcome, String> {
    let memory = Path::new("/dev/shm");
    let dir = match seed.is_multiple_of(2) && has_room(memory) {
        true => tempfile::Builder::new().prefix("storm").tempdir_in(memory),
        false => tempfile::Builder::new().prefix("storm").tempdir(),
    }
    .map_err(|e| e.to_string())?;
    let mut outcome = Outcome::default();
    let book = Arc::new(Mutex::new(Book::default()));
    let mut storm = Storm {
        seed,
        tools,
        numbers,
        dir: dir.path().to_owned(),
        world: World::new(book.clone()),
        book,
        files: Files::default(),
        daemon: None,
        monitors: Vec::new(),
        pester: None,
        back: None,
        back_stopped: false,
        workers: BTreeMap::new(),
        findings: Vec::new(),
        leaky: std::collections::BTreeSet::new(),
        disks: Vec::new(),
        ours: false,
        empty: Weight::default(),
        round: 0,
        opened: Vec::new(),
        step: 0,
        mode: mode.clone(),
    };
    let done = storm.all(source, &mut outcome, stop);
    storm.pester = None;
    if let Some(b) = &storm.back {
        b.signal(Signal::SIGCONT);
    }
    storm.workers.values().flatten().for_each(Worker::tell_to_stop);
    storm.daemon = None;
    storm.back = None;
    for w in std::mem::take(&mut storm.workers).into_values().flatten() {
        w.end();
    }
    take_down(dir.path(), &storm.files);
    outcome.dir = dir.path().to_owned();
    outcome.script = std::mem::take(&mut storm.files.script);
    outcome.opened = std::mem::take(&mut storm.opened);
    outcome.finding = storm.findings.first().cloned();
    done?;
    if std::env::var_os("STORM_KEEP").is_some() && outcome.finding.is_some() {
        outcome.kept = Some(TempDir::keep(dir));
    }
    Ok(outcome)
}

impl Storm<'_> {
    fn all(&mut self, source: &Source<'_>, outcome: &mut Outcome, stop: &AtomicBool) -> Result<(), String> {
        self.build()?;
        self.begin_round()?;
        match source {
            Source::Chosen => {
                let rounds = 1 + Rng::new(self.seed, 400).below(3);
                while self.round < rounds && self.findings.is_empty() && !stop.load(Ordering::Relaxed) {
                    for _ in 0..choose::round_length(self.seed, self.round) {
                        let step = self.choose();
                        outcome.steps.push(step.clone());
                        self.execute(&step);
                        if !self.findings.is_empty() {
                            return Ok(());
                        }
                    }
                    let end = choose::round_end(self.seed, self.round);
                    outcome.steps.push(end.clone());
                    self.execute(&end);
                    // A chain that somebody named wrongly in a header can't be opened: then that was all.
                    if self.findings.is_empty() && self.round < rounds && self.begin_round().is_err() {
                        return Ok(());
                    }
                }
            }
            Source::Recorded(steps) => {
                for (i, step) in steps.iter().enumerate() {
                    outcome.steps.push(step.clone());
                    self.execute(step);
                    if !self.findings.is_empty() {
                        return Ok(());
                    }
                    if matches!(step, Step::End(..)) && i + 1 < steps.len() {
                        self.begin_round()?;
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn found(&mut self, kind: &'static str, text: impl Into<String>) {
        let text = text.into();
        if self.mode.verbose {
            println!("    FOUND {kind}: {text}");
        }
        if kind != "full" && !self.mode.past.iter().any(|p| p == kind) {
            self.findings.push(Finding { kind, text });
        }
    }

    /// A command with which a round begins.
    pub(crate) fn tell(&mut self, command: &str, arguments: &Json) {
        if let Some(round) = self.opened.last_mut() {
            round.push(Command::new(command, arguments.clone()));
        }
        if self.mode.verbose {
            println!("  ({command} {arguments})");
        }
    }

    fn build(&mut self) -> Result<(), String> {
        let book = self.book.clone();
        let mut book = crate::world::open(&book);
        let mut builder = Builder {
            dir: &self.dir.clone(),
            tools: self.tools,
            book: &mut book,
            rng: Rng::new(self.seed, 1),
            files: Files::default(),
        };
        builder.surroundings();
        let (program, dir) = (self.tools.daemon(), self.dir.clone());
        let back = std::cell::RefCell::new(None);
        let built = builder.build(|| {
            *back.borrow_mut() = Some(serve_behind(&program, &dir)?);
            Ok(())
        });
        self.files = builder.files;
        self.back = back.into_inner();
        built
    }

    fn choose(&mut self) -> Step {
        let mut chooser = Chooser {
            world: &mut self.world,
            rng: Rng::new(self.seed, 1001 + self.step),
            served: self.back.as_ref().map(|_| self.back_stopped),
            full: self.files.full,
        };
        chooser.next()
    }

    fn execute(&mut self, step: &Step) {
        self.step += 1;
        if self.mode.verbose {
            println!("  {step}");
        }
        match step {
            Step::Ask(c, what_if) => self.ask(c, *what_if),
            Step::Both(a, b) => self.both(a, b),
            Step::Stop | Step::Continue => {
                let stop = *step == Step::Stop;
                if let Some(b) = &self.back {
                    b.signal(if stop { Signal::SIGSTOP } else { Signal::SIGCONT });
                    self.back_stopped = stop;
                }
            }
            Step::Wait(ms) => {
                let time = Duration::from_millis(*ms);
                if let Some(m) = self.monitors.first_mut() {
                    m.listen(time);
                }
            }
            Step::Await(job) => self.await_job(job),
            Step::End(way, busy) => return self.end_round(*way, *busy),
        }
        self.observe();
    }

    /// Takes in what has happened.
    pub(crate) fn observe(&mut self) {
        if let Some(m) = self.monitors.first_mut() {
            m.listen(LISTEN);
        }
        for _ in 0..4 {
            self.events();
            let Some(m) = self.monitors.first_mut() else { return };
            match Graph::read(m) {
                Some(g) => self.world.learn(g),
                None => return self.gone("while the graph was asked for"),
            }
            if self.monitors[0].events.is_empty() {
                break;
            }
        }
        self.look_after_workers();
        let Some(d) = &self.daemon else { return };
        let weight = d.weight();
        if let Some(text) = d.bad_words() {
            self.found("panic", text);
        }
        if weight.mib > MOST_MEMORY || weight.files > MOST_FILES {
            self.found("leak", format!("the daemon has {weight:?}"));
        }
        if let Some(text) = self.pester.as_ref().and_then(Pester::finding) {
            self.found("monitor", text);
        }
    }

    fn events(&mut self) {
        let events = self.monitors.first_mut().map(|m| std::mem::take(&mut m.events)).unwrap_or_default();
        for e in events {
            if self.mode.verbose {
                let quiet = e["event"] == "JOB_STATUS_CHANGE";
                if !quiet {
                    println!("    {} {}", e["event"].as_str().unwrap_or_default(), e["data"]);
                }
            }
            if e["event"] == "BLOCK_IMAGE_CORRUPTED" {
                self.found("corrupt", e.to_string());
            }
            let before = self.world.ended_well;
            self.world.event(&e);
            Numbers::add(&self.numbers.jobs, self.world.ended_well - before);
        }
    }

    /// What came before the answer to a command had happened before: a job that had ended did not write any more. What
    /// is told of a job that the command has begun has to wait until we know it.
    fn events_of_known_jobs(&mut self) {
        let events = std::mem::take(&mut self.monitors[0].events);
        let known = |e: &Json| {
            let id = e["data"]["device"].as_str().or_else(|| e["data"]["id"].as_str()).unwrap_or_default();
            self.world.jobs.contains_key(id)
        };
        let (now, later): (Vec<_>, Vec<_>) = events.into_iter().partition(known);
        self.monitors[0].events = now;
        self.events();
        self.monitors[0].events = later;
    }

    /// The monitor has no answer.
    pub(crate) fn gone(&mut self, what: &str) {
        // The connection goes before the process has.
        let mut ended = None;
        for _ in 0..100 {
            ended = self.daemon.as_mut().and_then(Daemon::ended);
            if ended.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let words = self.daemon.as_ref().and_then(Daemon::bad_words).unwrap_or_default();
        match ended {
            Some(status) => self.found("death", format!("the daemon ended with {status} {what}: {words}")),
            None => self.found("monitor", format!("the monitor does not answer, {what}: {words}")),
        }
    }

    fn await_job(&mut self, job: &str) {
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until {
            let Some(j) = self.world.jobs.get(job) else { return };
            if ["ready", "pending", "concluded", "standby", "paused"].contains(&j.status.as_str())
                && j.told.is_none()
            {
                return;
            }
            let Some(m) = self.monitors.first_mut() else { return };
            m.listen(Duration::from_millis(20));
            self.events();
        }
    }

    /// Files that the daemon has not open, and when they were changed.
    fn traces(&self) -> Traces {
        let open = self.daemon.as_ref().map(Daemon::open_files).unwrap_or_default();
        let mut out = Traces::new();
        for dir in [self.dir.clone(), self.dir.join("full")] {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(m) = fs::symlink_metadata(&path) else { continue };
                // Sockets, and what daemons say.
                if !m.is_file() || path.extension().is_some() {
                    continue;
                }
                let name = path.strip_prefix(&self.dir).unwrap_or(&path).display().to_string();
                let time = |s: i64, ns: i64| (s << 30) + ns;
                let state =
                    (m.ino(), m.len(), time(m.mtime(), m.mtime_nsec()), time(m.ctime(), m.ctime_nsec()));
                let busy = open.contains(&path) || self.world.making.values().any(|f| *f == name);
                out.insert(name, (!busy).then_some(state));
            }
        }
        // What a job is making may come at any time.
        for name in self.world.making.values() {
            out.insert(name.clone(), None);
        }
        out
    }

    fn exports(&mut self) -> Json {
        match self.monitors[0].ask("query-block-exports", &json!({})) {
            Reply::Done(v) => v,
            _ => Json::Null,
        }
    }

    pub(crate) fn ask(&mut self, c: &Command, what_if: bool) {
        self.observe();
        if !self.findings.is_empty() || self.monitors.is_empty() {
            return;
        }
        let quiet = self.world.jobs.is_empty();
        let (graph, traces, exports) = (self.world.graph.clone(), self.traces(), self.exports());
        let mut foreseen = None;
        if what_if && self.ours {
            let before = self.traces();
            let question = json!({"command": c.name, "arguments": c.arguments});
            match self.monitors[0].ask("what-if", &question) {
                Reply::Done(v) => {
                    foreseen = v["allowed"].as_bool().map(|a| (a, v["error"]["desc"].to_string()))
                }
                Reply::Refused(_) => {}
                Reply::Gone | Reply::Hangs => {
                    return self.gone(&format!("after what-if {} {}", c.name, c.arguments));
                }
            }
            if let Some((file, t)) = touched(&before, &self.traces()) {
                self.world.spoilt(&file);
                self.found("what-if", format!("what-if {} {} touched {file}, {t}", c.name, c.arguments));
            }
        }
        self.let_go_below(c, &exports);
        let from = self.world.book().moment();
        let asked = Instant::now();
        let reply = self.monitors[0].ask(&c.name, &c.arguments);
        self.took(asked);
        match &reply {
            Reply::Done(_) => {
                self.events_of_known_jobs();
                self.accepted(c, from);
            }
            Reply::Refused(text) => {
                self.refused(c, text);
                if let Some((file, t)) = touched(&traces, &self.traces()) {
                    self.world.spoilt(&file);
                    // A disk that turns out to be full while an image is made over another file.
                    let full = file.starts_with("full/") && text.contains("No space left on device");
                    let kind = if full { "full" } else { "refusal" };
                    self.found(
                        kind,
                        format!("{} {} was refused ({text}), but touched {file}, {t}", c.name, c.arguments),
                    );
                }
                self.graph_holds(c, text, quiet, &graph, &exports);
            }
            Reply::Gone | Reply::Hangs => self.gone(&format!("after {} {}", c.name, c.arguments)),
        }
        if let Some((allowed, error)) = foreseen.filter(|_| quiet) {
            Numbers::add(&self.numbers.what_if, 1);
            // Nobody can know before that a disk will be full.
            let full = (self.files.full || self.files.device.is_some())
                && matches!(&reply, Reply::Refused(text) if text.contains("No space left on device"));
            if allowed != reply.is_done() && !full {
                self.found(
                    "what-if",
                    format!(
                        "{} {}: what-if says {allowed} {error}, the command {reply:?}",
                        c.name, c.arguments
                    ),
                );
            }
        }
    }

    /// A refused command leaves the graph as it was, when nothing else goes on.
    fn graph_holds(&mut self, c: &Command, text: &str, quiet: bool, graph: &Graph, exports: &Json) {
        if !quiet || !self.monitors[0].events.is_empty() || c.name == "block-export-del" {
            return;
        }
        let now = self.exports();
        let Some(after) = Graph::read(&mut self.monitors[0]) else { return };
        if after.edges != graph.edges || after.nodes.keys().ne(graph.nodes.keys()) || now != *exports {
            self.monitors[0].listen(Duration::from_millis(200));
            if self.monitors[0].events.is_empty() {
                let lost: Vec<_> = graph.edges.difference(&after.edges).collect();
                let new: Vec<_> = after.edges.difference(&graph.edges).collect();
                self.found(
                    "refusal",
                    format!(
                        "{} {} was refused ({text}), but the graph changed: lost {lost:?}, new {new:?}",
                        c.name, c.arguments
                    ),
                );
            }
        }
    }

    fn took(&self, since: Instant) {
        Numbers::add(&self.numbers.commands, 1);
        self.numbers.slowest_command.fetch_max(since.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn refused(&mut self, c: &Command, text: &str) {
        Numbers::add(&self.numbers.refused, 1);
        if self.mode.verbose {
            println!("    refused: {text}");
        }
        let kind: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).take(90).collect();
        Numbers::count(&self.numbers.refusals, format!("{}: {kind}", c.name));
        if text.contains("internal error") || text.contains("panicked") {
            self.found("panic", format!("{} {}: {text}", c.name, c.arguments));
        }
    }

    fn accepted(&mut self, c: &Command, from: u64) {
        self.world.apply(&c.name, &c.arguments, from);
        if c.name == "block-export-add" {
            let text = |name: &str| c.arguments[name].as_str().unwrap_or_default();
            self.attach(text("id"), text("node-name"));
        }
        // What was told to end does so now, or hangs.
        if matches!(c.name.as_str(), "job-complete" | "job-cancel" | "block-job-cancel") {
            self.monitors[0].listen(Duration::from_millis(30));
        }
    }

    fn both(&mut self, a: &Command, b: &Command) {
        self.observe();
        if !self.findings.is_empty() || self.monitors.len() < 2 {
            return;
        }
        let exports = self.exports();
        self.let_go_below(a, &exports);
        let from = self.world.book().moment();
        let asked = Instant::now();
        self.monitors[0].send(&a.name, &a.arguments);
        self.monitors[1].send(&b.name, &b.arguments);
        let replies =
            [self.monitors[0].reply(crate::qmp::PATIENCE), self.monitors[1].reply(crate::qmp::PATIENCE)];
        self.took(asked);
        self.monitors[1].events.clear();
        for (c, reply) in [a, b].into_iter().zip(&replies) {
            match reply {
                Reply::Done(_) => self.accepted(c, from),
                Reply::Refused(text) => self.refused(c, text),
                Reply::Gone | Reply::Hangs => self.gone(&format!("after {} {}", c.name, c.arguments)),
            }
        }
    }

    /// A command takes what users of a node show to another node; users of what is below that node stay where they
    /// are, and show something else than before from then on. They are not watched any longer.
    fn let_go_below(&mut self, c: &Command, exports: &Json) {
        let mut devices = Vec::new();
        let actions = c.arguments["actions"].as_array().into_iter().flatten().map(|a| &a["data"]);
        for a in actions.chain([&c.arguments]) {
            for name in ["device", "node", "node-name", "top-node"] {
                devices.extend(a[name].as_str().map(str::to_owned));
            }
        }
        let moves = [
            "blockdev-snapshot",
            "blockdev-snapshot-sync",
            "block-commit",
            "blockdev-mirror",
            "drive-mirror",
        ];
        if !moves.contains(&c.name.as_str()) && c.name != "transaction" {
            return;
        }
        if self.mode.verbose {
            let at: Vec<String> = exports
                .as_array()
                .into_iter()
                .flatten()
                .map(|e| format!("{} at {}", e["id"], e["node-name"]))
                .collect();
            println!("    exports: {}", at.join(", "));
        }
        let below: Vec<String> = devices.iter().flat_map(|d| self.world.graph.beside(d)).collect();
        for e in exports.as_array().into_iter().flatten() {
            let (id, node) =
                (e["id"].as_str().unwrap_or_default(), e["node-name"].as_str().unwrap_or_default());
            if below.iter().any(|b| b == node) {
                for w in self.workers.remove(id).into_iter().flatten() {
                    self.count_requests(&w);
                    let end = w.end();
                    self.judge_worker(id, end, false);
                }
            }
        }
    }

    /// Clients for an export.
    fn attach(&mut self, id: &str, node: &str) {
        let (Some(e), Some(d)) = (self.world.exports.get(id).cloned(), &self.daemon) else { return };
        let mut rng = Rng::new(self.seed, 7000 + self.step);
        let count = 1 + rng.below(2);
        let socket = d.nbd.clone();
        for i in 0..count {
            let rng = Rng::new(self.seed, 8000 + 10 * self.step + i);
            match Worker::start(&socket, id, &self.book, e.content, e.writable, rng) {
                Ok(w) => {
                    let known = {
                        let book = self.world.book();
                        book.is_known(e.content).then(|| book.sectors(e.content) * 512)
                    };
                    let node = self.world.graph.down(node);
                    let longer = node
                        .iter()
                        .any(|n| self.world.graph.file_of(n).is_some_and(|f| self.world.longer.contains(&f)));
                    if known.is_some_and(|s| s != w.size && !(longer && s < w.size)) {
                        self.found("size", format!("export {id} has {} bytes, not {known:?}", w.size));
                    }
                    self.workers.entry(id.to_owned()).or_default().push(w);
                }
                // A stopped server behind it may be in the way.
                Err(e) if !self.back_stopped => {
                    self.found(
                        "client",
                        format!("no connection to the export {id} that was just added: {e}"),
                    );
                }
                Err(_) => {}
            }
        }
    }

    /// Clients that have ended by themselves.
    fn look_after_workers(&mut self) {
        let ids: Vec<String> = self.workers.keys().cloned().collect();
        for id in ids {
            let Some(list) = self.workers.remove(&id) else { continue };
            let gone = !self.world.exports.contains_key(&id);
            let (ended, alive): (Vec<_>, Vec<_>) = list.into_iter().partition(|w| gone || w.has_ended());
            if !alive.is_empty() {
                self.workers.insert(id.clone(), alive);
            }
            for w in ended {
                let expected = self.world.exports.get(&id).is_none_or(|e| e.ending);
                self.count_requests(&w);
                let end = w.end();
                self.judge_worker(&id, end, expected);
            }
        }
    }

    /// Whether an overlay lies over a point in time that has ended, or ends with the daemon.
    fn has_ended_point(&self) -> bool {
        self.world.ended_point
            || self.world.graph.nodes.values().any(|n| n.driver == "point-in-time-gone")
            || self.world.jobs.values().any(Job::saves)
    }

    pub(crate) fn image_on_device(&self) -> bool {
        self.world.formats.get(DEVICE).is_some_and(|f| f == "qcow2")
    }

    pub(crate) fn count_requests(&self, w: &Worker) {
        Numbers::add(&self.numbers.requests, w.done.load(Ordering::Relaxed));
    }

    pub(crate) fn judge_worker(&mut self, id: &str, end: End, may_be_lost: bool) {
        if let Some(wrong) = end.wrong {
            self.found("data", format!("a client of export {id} reads {wrong}"));
        }
        if let Some(lost) = end.lost.filter(|_| !may_be_lost) {
            let status = self.daemon.as_mut().and_then(Daemon::ended);
            self.found(
                "client",
                format!("the connection of a client of export {id} broke: {lost} (daemon: {status:?})"),
            );
        }
        let weak = self.files.full
            || self.files.served.is_some()
            || self.world.graph.nodes.values().any(|n| n.driver == "copy-before-write");
        // An image on a device finds no room behind its end.
        let on_device = self.image_on_device();
        for e in end.errors {
            let full = on_device && e.ends_with("error 28");
            // What a backup's target shows of its point in time ends with the job; the rest is an error.
            let gone = e.ends_with("error 5") && self.has_ended_point();
            let kind: String = e.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
            Numbers::count(&self.numbers.failures, kind);
            if !weak && !full && !gone {
                self.found("client", format!("a request to export {id} failed: {e}"));
                break;
            }
        }
    }
}

/// The first file that differs between two looks at which it was not open, and how.
fn touched(before: &Traces, after: &Traces) -> Option<(String, String)> {
    for (name, was) in before {
        match (was, after.get(name)) {
            (None, None) => {}
            (Some(_), None) => return Some((name.clone(), "which is gone".into())),
            (Some(was), Some(Some(is))) if is != was => {
                return Some((name.clone(), format!("whose size was {} and is {}", was.1, is.1)));
            }
            _ => {}
        }
    }
    after.keys().find(|n| !before.contains_key(*n)).map(|n| (n.clone(), "which was not there".into()))
}

/// Starts the server behind the daemon.
fn serve_behind(program: &Path, dir: &Path) -> Result<Daemon, String> {
    let mut back = Daemon::start(program, dir, "back")?;
    let mut m = back.connect(0)?;
    let steps = [
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "back.nbd"}}, "max-connections": 0}),
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "b", "filename": "served.raw", "discard": "unmap"}),
        ),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "b", "name": "b", "node-name": "b", "writable": true}),
        ),
    ];
    for (command, arguments) in steps {
        if let Reply::Refused(e) = m.ask(command, &arguments) {
            return Err(format!("the server behind the daemon: {e}"));
        }
    }
    Ok(back)
}
