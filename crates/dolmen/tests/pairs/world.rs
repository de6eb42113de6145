//! A daemon with a chain of images, clients that write to it, and a model of what they must read.
//!
//! `top -> mid -> base`, an overlay `side` of `base` that is opened where it is wanted, and empty targets `t1`, `t2`, `f` (which a fleecing backup puts over `top`) and
//! `ov`. Everything that breaks what the model says is noted, not fatal: with the
//! access control switched off that is what is looked for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::client::{Client, Outcome};
use crate::daemon::{Checks, Daemon};
use crate::model::{CLUSTER, PER_CLUSTER, SIZE, Tag, UNIT, UNITS, View, fill, first_tag};

/// Writes of one burst, for each client that may write.
const BURST: usize = 8;
/// Writes that a client does while a job is waited for, at most.
const LOAD: usize = 400;
/// It writes to units from here on: those before still come from below where they did.
const LOADED: usize = UNITS / 2;
/// The images, in the order of [`Disk`].
pub(crate) const IMAGES: [&str; 9] = ["top", "mid", "base", "t1", "t2", "f", "side", "ov", "x"];

/// What a client sees, whatever node it comes from at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    Top,
    Mid,
    Base,
    T1,
    T2,
    /// The disk of the fleecing target.
    F,
    /// The disk of an overlay of `base` beside the chain.
    Side,
}

/// A promise that did not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Promise {
    /// The daemon goes on.
    Alive,
    /// A client reads what it wrote, or what was there.
    Client,
    /// A copy is what it was to be a copy of.
    Copy,
    /// An image that is opened again reads like its last user saw it.
    Image,
    /// The size of a disk does not change under a client that can't be told.
    Size,
    /// A job that was begun comes to its end.
    Job,
}

impl Promise {
    /// What is to be said when it is broken.
    pub(crate) fn broken(self) -> &'static str {
        match self {
            Promise::Alive => "the daemon ends",
            Promise::Client => "a client reads wrong data",
            Promise::Copy => "the copy is wrong",
            Promise::Image => "an image is wrong when it is opened again",
            Promise::Size => "the size changes under a client",
            Promise::Job => "the job fails",
        }
    }
}

/// What a command brings about, once it has succeeded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Effect {
    /// Nothing that readers could see.
    Nothing,
    /// An export on the server, of this disk.
    Client { id: &'static str, disk: Disk, writable: bool },
    /// A job.
    Job { id: &'static str, work: Work },
    /// A job, and an overlay over `top`.
    JobAndOverlay { id: &'static str, work: Work },
    /// `top` now stands on `base`.
    TopOverBase,
    /// The disk is longer by [`GROWTH`].
    Grown(Disk),
    /// `top` has lost its end: nobody looks at it any more.
    Shrunk,
    /// An export of the file of `top`, to which something is written.
    Scribble { id: &'static str },
    /// A node that shows what the disk held, of which the overwritten parts are in `through`.
    Shown { from: Disk, to: Disk, through: Disk },
    /// What the node held is frozen.
    Frozen { image: &'static str, disk: Disk },
}

/// What a job promises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Work {
    /// Nothing is seen of it.
    Unseen,
    /// In the end, `node` reads like the disk did from then on.
    Follow { from: Disk, to: Disk, node: &'static str, between: Option<Disk> },
    /// In the end, `node` reads like the disk did in the beginning.
    Keep { from: Disk, to: Disk, node: &'static str },
    /// At all times, the node reads like the disk did in the beginning.
    Show { from: Disk, to: Disk, node: &'static str },
}

/// How much a disk grows, in bytes.
pub(crate) const GROWTH: usize = 1 << 20;

/// How much is written past an image's own driver, from its second cluster on, in bytes.
const SCRIBBLE: usize = 1 << 20;

/// Which job is let go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    OldestFirst,
    NewestFirst,
}

struct Guest {
    id: &'static str,
    disk: Disk,
    writable: bool,
    client: Client,
}

struct Running {
    id: &'static str,
    work: Work,
    /// The disk as it was when the job began.
    before: Option<View>,
    /// It has been seen to be ready.
    ready: bool,
}

/// A flow of data: what is written to one disk may show on the other.
struct Flow {
    from: Disk,
    to: Disk,
}

/// See the head of the module.
pub(crate) struct World {
    pub(crate) daemon: Daemon,
    guests: Vec<Guest>,
    disks: Vec<View>,
    /// Sizes of the disks in bytes.
    sizes: [usize; 7],
    /// Clusters of the chain's three images that are known to be allocated.
    allocated: [Vec<bool>; 3],
    /// The chain, from the top.
    chain: Vec<Disk>,
    /// `top` stands on another node than its image says.
    relinked: bool,
    /// `top` has an overlay, or has lost its end: who names `top` now does not mean the disk.
    pub(crate) covered: bool,
    flows: Vec<Flow>,
    jobs: Vec<Running>,
    /// Images that must read like this when they are opened again.
    frozen: Vec<(&'static str, View)>,
    random: u64,
    written: u32,
    /// What did not hold, with the details.
    pub(crate) broken: BTreeMap<Promise, String>,
    /// The last to go: the daemon closes its files first.
    dir: TempDir,
}

/// What can be seen of a daemon from outside.
pub(crate) struct Trace {
    /// By queries, and in the kernel.
    pub(crate) told: Json,
    /// Whole files, by name.
    pub(crate) images: Vec<(&'static str, Vec<u8>)>,
}

/// Images that every world starts with.
pub(crate) struct Templates {
    dir: TempDir,
}

fn holds(disk: Disk, cluster: usize) -> bool {
    match disk {
        Disk::Base => cluster % 3 != 2,
        Disk::Mid => cluster % 5 < 2,
        Disk::Top => cluster % 7 < 2,
        Disk::T1 | Disk::T2 | Disk::F | Disk::Side => false,
    }
}

/// What the chain holds in the beginning, seen from a disk of it.
fn first(disk: Disk, unit: usize) -> Tag {
    let below = match disk {
        Disk::Top => Some(Disk::Mid),
        Disk::Mid | Disk::Side => Some(Disk::Base),
        Disk::Base | Disk::T1 | Disk::T2 | Disk::F => None,
    };
    match below {
        _ if holds(disk, unit / PER_CLUSTER) => first_tag(disk as u32, unit),
        Some(below) => first(below, unit),
        None => 0,
    }
}

/// Memory in place of a disk, where there is one.
fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).expect("a directory"),
        false => tempfile::tempdir().expect("a directory"),
    }
}

impl Templates {
    pub(crate) fn new() -> Templates {
        let dir = directory();
        let dolmen = |args: &[&str]| {
            let mut c = std::process::Command::new(env!("CARGO_BIN_EXE_dolmen"));
            let out = c.arg("img").args(args).current_dir(dir.path()).output().expect("runs");
            assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        };
        for (name, backing) in [
            ("base", None),
            ("mid", Some("base.qcow2")),
            ("top", Some("mid.qcow2")),
            ("t1", None),
            ("t2", None),
            ("f", Some("top.qcow2")),
            ("side", Some("base.qcow2")),
            ("ov", Some("top.qcow2")),
            ("x", None),
        ] {
            let (file, size) = (format!("{name}.qcow2"), SIZE.to_string());
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            if let Some(b) = backing {
                args.extend(["-F", "qcow2", "-b", b]);
            }
            args.extend([file.as_str(), &size]);
            dolmen(&args);
        }
        let templates = Templates { dir };
        // Each on its own: what stands below is filled last, so that nothing is copied up.
        for disk in [Disk::Top, Disk::Mid, Disk::Base] {
            templates.fill(disk);
        }
        templates
    }

    fn fill(&self, disk: Disk) {
        let name = IMAGES[disk as usize];
        let mut d = Daemon::start(self.dir.path(), Checks::On);
        let socket = self.dir.path().join("nbd.sock");
        d.ok("nbd-server-start", server_at(&socket));
        let file = self.dir.path().join(format!("{name}.qcow2"));
        d.ok("blockdev-add", node(name, &file, Json::Null));
        d.ok("block-export-add", export("e", name, true));
        let mut client = Client::connect(&socket, "e").expect("connects");
        let mut data = vec![0; CLUSTER];
        for cluster in (0..SIZE / CLUSTER).filter(|c| holds(disk, *c)) {
            for (i, unit) in data.chunks_exact_mut(UNIT).enumerate() {
                fill(unit, first_tag(disk as u32, cluster * PER_CLUSTER + i));
            }
            client.write((cluster * CLUSTER) as u64, &data).expect("written");
        }
        drop(client);
        d.quit().expect("ends");
    }
}

fn server_at(socket: &Path) -> Json {
    json!({"addr": {"type": "unix", "data": {"path": socket}}})
}

/// The definition of a qcow2 node.
fn node(name: &str, file: &Path, backing: Json) -> Json {
    json!({
        "driver": "qcow2", "node-name": name, "backing": backing,
        "file": {"driver": "file", "node-name": format!("{name}-f"), "filename": file},
    })
}

/// The arguments of an export.
pub(crate) fn export(id: &str, node: &str, writable: bool) -> Json {
    json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable})
}

impl World {
    pub(crate) fn new(templates: &Templates, checks: Checks, seed: u64) -> World {
        let dir = directory();
        for name in IMAGES {
            let file = format!("{name}.qcow2");
            fs::copy(templates.dir.path().join(&file), dir.path().join(&file)).expect("copied");
        }
        let mut daemon = Daemon::start(dir.path(), checks);
        daemon.ok("nbd-server-start", server_at(&dir.path().join("nbd.sock")));
        let below = |name: &str| match name {
            "top" => json!("mid"),
            "mid" => json!("base"),
            _ => Json::Null,
        };
        for name in ["base", "mid", "top", "t1", "t2", "ov"] {
            let file = dir.path().join(format!("{name}.qcow2"));
            daemon.ok("blockdev-add", node(name, &file, below(name)));
        }
        let views = [Disk::Top, Disk::Mid, Disk::Base, Disk::T1, Disk::T2, Disk::F, Disk::Side];
        World {
            daemon,
            guests: Vec::new(),
            disks: views.map(|d| View::new((0..UNITS).map(|u| first(d, u)))).to_vec(),
            sizes: [SIZE; 7],
            allocated: [Disk::Top, Disk::Mid, Disk::Base]
                .map(|d| (0..SIZE / CLUSTER).map(|c| holds(d, c)).collect()),
            chain: vec![Disk::Top, Disk::Mid, Disk::Base],
            relinked: false,
            covered: false,
            flows: Vec::new(),
            jobs: Vec::new(),
            frozen: Vec::new(),
            random: seed | 1,
            written: 0,
            broken: BTreeMap::new(),
            dir,
        }
    }

    /// Where its files are.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Puts the directory's name in the place of `DIR`.
    pub(crate) fn placed(&self, arguments: &Json) -> Json {
        let dir = self.dir.path().display().to_string();
        serde_json::from_str(&arguments.to_string().replace("DIR", &dir)).expect("JSON as before")
    }

    fn broke(&mut self, promise: Promise, text: impl Into<String>) {
        self.broken.entry(promise).or_insert(text.into());
    }

    fn below(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % n
    }

    /// Executes a command and, if it succeeds, notes what it brings about.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Json, effect: Effect) -> Result<(), Json> {
        // Clients have seen what is there now: nobody must see anything older afterwards.
        self.look();
        let placed = self.placed(arguments);
        self.daemon.ask(command, &placed)?;
        match effect {
            Effect::Nothing => {}
            Effect::Client { id, disk, writable } => self.connect(id, disk, writable),
            Effect::Job { id, work } => self.begin(id, work),
            Effect::JobAndOverlay { id, work } => {
                self.covered = true;
                self.begin(id, work);
            }
            Effect::TopOverBase => {
                for unit in 0..UNITS {
                    if !self.allocated[Disk::Top as usize][unit / PER_CLUSTER] {
                        let tag = self.disks[Disk::Base as usize].newest(unit);
                        self.may_become(Disk::Top, unit, tag);
                    }
                }
                self.chain.retain(|d| *d != Disk::Mid);
                self.relinked = true;
            }
            Effect::Shrunk => self.covered = true,
            Effect::Grown(disk) => self.sizes[disk as usize] += GROWTH,
            Effect::Shown { from, to, through } => {
                let view = self.disks[from as usize].clone();
                self.disks[through as usize].may_become_all(&view);
                self.disks[to as usize] = view;
            }
            Effect::Scribble { id } => {
                let client = Client::connect(&self.dir.path().join("nbd.sock"), id);
                let wrote = client.and_then(|mut c| c.write(CLUSTER as u64, &vec![0; SCRIBBLE]));
                if let Err(e) = wrote {
                    self.broke(Promise::Client, format!("{id}: {e}"));
                }
            }
            Effect::Frozen { image, disk } => {
                self.covered = true;
                self.frozen.push((image, self.disks[disk as usize].clone()));
            }
        }
        self.sizes_hold();
        Ok(())
    }

    fn connect(&mut self, id: &'static str, disk: Disk, writable: bool) {
        match Client::connect(&self.dir.path().join("nbd.sock"), id) {
            Ok(client) => self.guests.push(Guest { id, disk, writable, client }),
            Err(e) => self.broke(Promise::Client, format!("{id} can't connect: {e}")),
        }
    }

    fn begin(&mut self, id: &'static str, work: Work) {
        let before = match work {
            Work::Unseen => None,
            Work::Follow { from, to, .. } => {
                let view = self.disks[from as usize].clone();
                self.disks[to as usize].may_become_all(&view);
                self.flows.push(Flow { from, to });
                None
            }
            Work::Keep { from, to, .. } => {
                let view = self.disks[from as usize].clone();
                self.disks[to as usize].may_become_all(&view);
                Some(view)
            }
            Work::Show { from, to, .. } => {
                let view = self.disks[from as usize].clone();
                self.disks[to as usize] = view.clone();
                Some(view)
            }
        };
        self.jobs.push(Running { id, work, before, ready: false });
    }

    fn may_become(&mut self, disk: Disk, unit: usize, tag: Tag) {
        self.disks[disk as usize].may_become(unit, tag);
        let to: Vec<Disk> = self.flows.iter().filter(|f| f.from == disk).map(|f| f.to).collect();
        for t in to {
            if self.disks[t as usize].newest(unit) != tag {
                self.may_become(t, unit, tag);
            }
        }
    }

    /// Notes a write that is complete.
    fn wrote(&mut self, disk: Disk, unit: usize, tag: Tag) {
        self.may_become(disk, unit, tag);
        self.disks[disk as usize].set(unit, tag);
        let Some(at) = self.chain.iter().position(|d| *d == disk) else { return };
        let cluster = unit / PER_CLUSTER;
        self.allocated[disk as usize][cluster] = true;
        // It shines through whatever above has nothing of its own there, as long as nobody looks.
        for i in (0..at).rev() {
            let above = self.chain[i];
            let read = self.guests.iter().any(|g| g.disk == above);
            if read || self.allocated[above as usize][cluster] {
                break;
            }
            self.may_become(above, unit, tag);
        }
    }

    /// Every client that may write writes something and reads it back.
    pub(crate) fn burst(&mut self) {
        for g in 0..self.guests.len() {
            if !self.guests[g].writable {
                continue;
            }
            // The top gets most of its writes where the load goes, the images below more of them.
            let top = self.guests[g].disk == Disk::Top;
            for i in 0..if top { BURST } else { 2 * BURST } {
                let from = if top && i % 4 != 0 { LOADED } else { 0 };
                let unit = from + self.below(UNITS - from - 2);
                let units = 1 + self.below(2);
                let mut data = vec![0; units * UNIT];
                let tags: Vec<Tag> = (0..units).map(|_| self.fresh_tag()).collect();
                data.chunks_exact_mut(UNIT).zip(&tags).for_each(|(u, t)| fill(u, *t));
                let Guest { id, disk, client, .. } = &mut self.guests[g];
                let (id, disk) = (*id, *disk);
                let mut back = vec![0; data.len()];
                let at = (unit * UNIT) as u64;
                let done = client
                    .write(at, &data)
                    .and_then(|()| if i == BURST / 2 { client.flush() } else { Ok(()) })
                    .and_then(|()| client.read(at, &mut back));
                match done {
                    Err(e) => return self.broke(Promise::Client, format!("{id}: {e}")),
                    Ok(()) if back != data => {
                        self.broke(
                            Promise::Client,
                            format!("{id} does not read what it wrote to unit {unit}"),
                        );
                    }
                    Ok(()) => {}
                }
                for (i, tag) in tags.into_iter().enumerate() {
                    self.wrote(disk, unit + i, tag);
                }
            }
        }
    }

    fn fresh_tag(&mut self) -> Tag {
        self.written += 1;
        9 << 24 | self.written << 8 | 0x77
    }

    /// Every client reads everything and compares.
    pub(crate) fn look(&mut self) {
        for g in 0..self.guests.len() {
            let mut data = vec![0; SIZE];
            let Guest { id, disk, client, .. } = &mut self.guests[g];
            let (id, disk) = (*id, *disk);
            let seen = client.read(0, &mut data).and_then(|()| self.disks[disk as usize].observe(&data));
            if let Err(e) = seen {
                self.broke(Promise::Client, format!("{id}: {e}"));
            }
        }
    }

    /// No disk has another size than its clients were told.
    fn sizes_hold(&mut self) {
        let socket = self.dir.path().join("nbd.sock");
        for g in 0..self.guests.len() {
            let (id, told) = (self.guests[g].id, self.guests[g].client.size);
            match Client::connect(&socket, id) {
                Ok(c) if c.size == told => {}
                Ok(c) => self.broke(Promise::Size, format!("{id} was told {told}, now it is {}", c.size)),
                Err(e) => self.broke(Promise::Client, format!("{id} can't connect again: {e}")),
            }
        }
    }

    /// Does something while the first client that may write to the top keeps writing.
    fn under_load<T>(&mut self, what: impl FnOnce(&mut Daemon) -> T) -> T {
        let Some(g) = self.guests.iter().position(|g| g.writable && g.disk == Disk::Top) else {
            return what(&mut self.daemon);
        };
        let plan: Vec<(usize, Tag)> =
            (0..LOAD).map(|_| (LOADED + self.below(UNITS - LOADED), self.fresh_tag())).collect();
        let stop = AtomicBool::new(false);
        let (daemon, guest) = (&mut self.daemon, &mut self.guests[g]);
        let (out, done) = std::thread::scope(|scope| {
            let load = scope.spawn(|| -> Outcome<usize> {
                let mut unit_data = vec![0; UNIT];
                for (i, (unit, tag)) in plan.iter().enumerate() {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(i);
                    }
                    fill(&mut unit_data, *tag);
                    guest.client.write((unit * UNIT) as u64, &unit_data)?;
                }
                Ok(plan.len())
            });
            let out = what(daemon);
            stop.store(true, Ordering::Relaxed);
            (out, load.join().expect("the load does not panic"))
        });
        match done {
            Ok(n) => plan[..n].iter().for_each(|(unit, tag)| self.wrote(Disk::Top, *unit, *tag)),
            Err(e) => self.broke(Promise::Client, format!("under load: {e}")),
        }
        out
    }

    /// Lets every job run to its end, under load, and compares what it leaves behind.
    pub(crate) fn finish(&mut self, order: Order) {
        self.burst();
        self.look();
        let mut jobs = std::mem::take(&mut self.jobs);
        if order == Order::NewestFirst {
            jobs.reverse();
        }
        for job in jobs {
            if let Err(e) = self.finish_job(&job) {
                self.broke(Promise::Job, format!("job '{}': {e}", job.id));
            }
            self.burst();
            self.look();
        }
        self.sizes_hold();
    }

    fn finish_job(&mut self, job: &Running) -> Outcome<()> {
        let id = job.id;
        // It may be over already: there may have been nothing to do.
        let _ = self.daemon.ask("block-job-set-speed", &json!({"device": id, "speed": 0}));
        if let Work::Show { to, node, .. } = job.work {
            // Ends only when it is told to; until then the node shows what was.
            self.compare(node, to)?;
            self.under_load(|d| {
                d.ask("block-job-cancel", &json!({"device": id})).map_err(|e| e["desc"].to_string())
            })?;
            self.ended(id)?;
            return Ok(());
        }
        if job.ready || self.under_load(|d| next_of(d, id))? == Next::Ready {
            self.burst();
            // What clients have seen by now must be in the result.
            self.look();
            self.under_load(|d| {
                d.ask("job-complete", &json!({"id": id})).map_err(|e| e["desc"].to_string())
            })?;
        }
        self.ended(id)?;
        match job.work {
            Work::Unseen | Work::Show { .. } => {}
            Work::Follow { from, to, node, between } => {
                self.disks[to as usize] = self.disks[from as usize].clone();
                if let Some(b) = between {
                    self.chain.retain(|d| *d != b);
                }
                self.compare(node, to)?;
            }
            Work::Keep { to, node, .. } => {
                self.disks[to as usize] = job.before.clone().expect("kept");
                self.compare(node, to)?;
                self.frozen.push((node, self.disks[to as usize].clone()));
            }
        }
        Ok(())
    }

    fn ask(&mut self, command: &str, arguments: &Json) -> Outcome<Json> {
        self.daemon.ask(command, arguments).map_err(|e| format!("{command}: {}", e["desc"]))
    }

    /// Waits until a job is ready.
    pub(crate) fn ready(&mut self, id: &str) -> Outcome<()> {
        match next_of(&mut self.daemon, id)? {
            Next::Ready => {
                let job = self.jobs.iter_mut().find(|j| j.id == id).expect("it has begun");
                job.ready = true;
                Ok(())
            }
            Next::Over => Err("it is over already".into()),
        }
    }

    /// Waits until a job is gone, after its end if that has not been seen.
    fn ended(&mut self, id: &str) -> Outcome<()> {
        self.daemon.event("the end of a job", |e| {
            (e["event"] == "JOB_STATUS_CHANGE" && e["data"]["id"] == id && e["data"]["status"] == "null")
                .then_some(())
        })
    }

    /// Reads a node through an export of its own and compares with the disk. A node that may
    /// not be read now is not read.
    fn compare(&mut self, node: &str, disk: Disk) -> Outcome<()> {
        if self.daemon.ask("block-export-add", &export("probe", node, false)).is_err() {
            return Ok(());
        }
        let mut client = Client::connect(&self.dir.path().join("nbd.sock"), "probe")?;
        let mut data = vec![0; SIZE.min(client.size as usize)];
        client.read(0, &mut data)?;
        let size = client.size as usize;
        drop(client);
        self.ask("block-export-del", &json!({"id": "probe", "mode": "hard"}))?;
        if let Err(e) = self.disks[disk as usize].observe(&data) {
            self.broke(Promise::Copy, format!("{node}: {e}"));
        }
        if size < self.sizes[disk as usize] {
            self.broke(Promise::Copy, format!("{node} has {size} bytes, not {}", self.sizes[disk as usize]));
        }
        Ok(())
    }

    /// Whether a client with this export is connected.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.guests.iter().any(|g| g.id == id)
    }

    /// What must not change when a command is refused; images that somebody writes to by himself
    /// are left out.
    pub(crate) fn trace(&mut self, writes: &[&str]) -> Trace {
        let graph = self.daemon.ok("x-debug-query-block-graph", json!({}));
        let exports = self.daemon.ok("query-block-exports", json!({}));
        let nodes = self.daemon.ok("query-named-block-nodes", json!({"flat": true}));
        let of_nodes: Vec<Json> = nodes
            .as_array()
            .expect("a list")
            .iter()
            .map(|n| {
                // A file grows under a job that goes on.
                let size = if n["drv"] == "file" { Json::Null } else { n["image"]["virtual-size"].clone() };
                json!([n["node-name"], n["ro"], size, n["backing_file"]])
            })
            .collect();
        let told = json!({
            "graph": graph,
            "exports": exports,
            "nodes": of_nodes,
            "jobs": self.optional("query-jobs", &["id", "type", "status"]),
            "operations": self.optional("query-operations", &["id", "kind", "claims"]),
            "locks": locks(self.dir.path()),
        });
        let images = IMAGES.iter().filter(|n| !writes.contains(n));
        let read = |n: &&str| fs::read(self.dir.path().join(format!("{n}.qcow2"))).expect("an image");
        Trace { told, images: images.map(|n| (*n, read(n))).collect() }
    }

    /// Some members of what a query lists, if the query exists.
    fn optional(&mut self, query: &str, members: &[&str]) -> Json {
        let Ok(list) = self.daemon.ask(query, &json!({})) else { return Json::Null };
        let list = list.as_array().cloned().unwrap_or_default();
        list.iter().map(|o| members.iter().map(|m| o[m].clone()).collect::<Json>()).collect()
    }

    /// Ends the daemon and opens again what its users had.
    pub(crate) fn end(mut self) -> BTreeMap<Promise, String> {
        let writers_below =
            self.guests.iter().any(|g| g.writable && matches!(g.disk, Disk::Mid | Disk::Base));
        let mut wanted: Vec<(PathBuf, View)> = self
            .frozen
            .iter()
            // What an overlay reads from below is whatever others write there.
            .filter(|(image, _)| *image != "top" || !writers_below)
            .map(|(image, view)| (self.dir.path().join(format!("{image}.qcow2")), view.clone()))
            .collect();
        // What is a view of the past has no image of its own; what was linked elsewhere by hand is
        // not what its image says.
        let relinked = self.relinked;
        let has_image = |d: Disk| d != Disk::F && !(relinked && d == Disk::Top);
        let clients: Vec<_> =
            self.guests.iter().filter(|g| has_image(g.disk)).map(|g| (g.id, g.disk)).collect();
        for (id, disk) in clients {
            match self.image_of(id) {
                Some(file) => wanted.push((file, self.disks[disk as usize].clone())),
                None => self.broke(Promise::Client, format!("{id} has no image")),
            }
        }
        self.guests.clear();
        let World { dir, daemon, mut broken, .. } = self;
        if let Err(e) = daemon.quit() {
            broken.insert(Promise::Alive, e);
            return broken;
        }
        if let Err(e) = reopened(dir.path(), wanted) {
            broken.entry(Promise::Image).or_insert(e);
        }
        broken
    }

    /// The file of the image that an export leads to now.
    fn image_of(&mut self, id: &str) -> Option<PathBuf> {
        let graph = self.daemon.ok("x-debug-query-block-graph", json!({}));
        let named = |id: &Json| {
            graph["nodes"].as_array()?.iter().find(|n| n["id"] == *id)?["name"].as_str().map(str::to_owned)
        };
        let edges = graph["edges"].as_array()?;
        let user =
            edges.iter().find(|e| e["name"] == "root" && named(&e["parent"]).as_deref() == Some(id))?;
        let mut at = user["child"].clone();
        while let Some(edge) =
            edges.iter().find(|e| e["parent"] == at && (e["name"] == "file" || e["name"] == "image"))
        {
            at = edge["child"].clone();
        }
        let leaf = named(&at)?;
        let nodes = self.daemon.ok("query-named-block-nodes", json!({"flat": true}));
        let leaf = nodes.as_array()?.iter().find(|n| n["node-name"] == *leaf)?;
        Some(PathBuf::from(leaf["file"].as_str()?))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Next {
    Ready,
    Over,
}

/// Waits until a job is ready or over.
fn next_of(daemon: &mut Daemon, id: &str) -> Outcome<Next> {
    daemon.event("a job that is ready or over", |e| {
        (e["data"]["device"] == id).then_some(())?;
        match e["event"].as_str() {
            Some("BLOCK_JOB_READY") => Some(Ok(Next::Ready)),
            Some("BLOCK_JOB_COMPLETED") => Some(match e["data"].get("error") {
                Some(error) => Err(error.to_string()),
                None => Ok(Next::Over),
            }),
            Some("BLOCK_JOB_CANCELLED") => Some(Err("it was cancelled".into())),
            _ => None,
        }
    })?
}

/// Opens images by their names, with the backing files that they name, and compares.
fn reopened(dir: &Path, wanted: Vec<(PathBuf, View)>) -> Outcome<()> {
    let mut d = Daemon::start(dir, Checks::On);
    let socket = dir.join("nbd.sock");
    d.ok("nbd-server-start", server_at(&socket));
    for (i, (file, mut view)) in wanted.into_iter().enumerate() {
        let (name, id) = (format!("n{i}"), format!("e{i}"));
        let short = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let failed = |e: Json| format!("{short}: {}", e["desc"]);
        let add = json!({
            "driver": "qcow2", "node-name": name, "read-only": true,
            "file": {"driver": "file", "filename": file},
        });
        d.ask("blockdev-add", &add).map_err(failed)?;
        d.ask("block-export-add", &export(&id, &name, false)).map_err(failed)?;
        let mut client = Client::connect(&socket, &id)?;
        let mut data = vec![0; SIZE.min(client.size as usize)];
        client.read(0, &mut data)?;
        view.observe(&data).map_err(|e| format!("{short}: {e}"))?;
        drop(client);
        d.ok("block-export-del", json!({"id": id, "mode": "hard"}));
        d.ok("blockdev-del", json!({"node-name": name}));
    }
    d.quit()
}

/// Locks that this process holds on files of a directory.
pub(crate) fn locks(dir: &Path) -> Vec<String> {
    let mut out = Vec::new();
    for fd in fs::read_dir("/proc/self/fd").expect("a list").flatten() {
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        if !target.starts_with(dir) {
            continue;
        }
        let info = Path::new("/proc/self/fdinfo").join(fd.file_name());
        let text = fs::read_to_string(info).unwrap_or_default();
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for line in text.lines().filter(|l| l.starts_with("lock:")) {
            // "lock: 1: OFDLCK ADVISORY READ -1 00:1a:77 100 100": the number is by position.
            let words: Vec<&str> = line.split_whitespace().skip(2).collect();
            out.push(format!("{name} {}", words.join(" ")));
        }
    }
    out.sort();
    out
}
