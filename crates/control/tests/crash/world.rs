//! The world of a schedule: a chain of images on disks that lose power together, a control task
//! that rules them, and the guests.
//!
//! Disks are opened by name, as files are: what an image's header names can be opened again
//! after a crash, by somebody who knows nothing but the name of the image.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use dolmen_control::{Config, Control, JobStart};
use dolmen_graph::{
    AccessRule, Class, Common, Draft, DriverKind, Implicit, Node, NodeOpener, OpInfo, OpenCx, OpenPolicy,
    Opened, Opener, Parsed, Registry, UserEdge,
};
use dolmen_jobs::{
    BeginCx, Details, Ending, JobCx, JobKind, JobOptions, PREFETCH, SettleCx, Work, nothing_to_change,
};
use dolmen_qmp::{QmpError, Request};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_sim::{DiskConfig, Image, Journal, Leaf, MemoryDisk, Oracle, SimDisk, User};
use dolmen_types::{
    Actions, Claim, Error, ErrorKind, OpId, OptionSpec, OptionType, Options, Result, Value, WriteFlags,
};
use serde_json::Value as Json;

/// The drivers of a schedule.
pub(crate) static REGISTRY: Registry = Registry::new(&[
    &dolmen_formats::QCOW2,
    &dolmen_filters::COPY_ON_READ,
    &dolmen_filters::BLKDEBUG,
    &dolmen_copy::COPY_BEFORE_WRITE,
    &dolmen_copy::SNAPSHOT_ACCESS,
    &NAMED_DISK,
]);

/// Space of a disk that is not full.
pub(crate) const PLENTY: u64 = 1 << 40;

/// What images name may be opened: the names are those that the images of the test were given.
pub(crate) const POLICY: OpenPolicy = OpenPolicy {
    implicit: Implicit::Anything,
    probe: false,
    permit_with: "nothing in a test",
    probe_with: "nothing in a test",
};

/// The simulated disk, opened by name.
static NAMED_DISK: DriverKind = DriverKind::new(
    "sim-disk",
    Class::Protocol,
    "a simulated disk of this test",
    &[OptionSpec::required("name", OptionType::Str, "which one")],
    parse_named,
);

thread_local! {
    /// The disks of this thread's simulation.
    static DISKS: RefCell<Vec<(String, SimDisk)>> = const { RefCell::new(Vec::new()) };
}

fn parse_named(options: &mut Options, _: &Common) -> Result<Parsed> {
    let open = Box::new(OpenNamed(options.require_str("name")?));
    Ok(Parsed { children: Vec::new(), rule: AccessRule::LEAF, relies_down_to: None, open })
}

struct OpenNamed(String);

impl Opener for OpenNamed {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let disk = DISKS.with_borrow(|d| d.iter().find(|d| d.0 == self.0).map(|d| d.1.clone()));
            let disk = disk
                .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no disk '{}'", self.0)))?;
            Ok(Opened::of(Arc::new(disk)))
        })
    }
}

/// Makes these the disks that can be opened.
pub(crate) fn plug(disks: Vec<(String, SimDisk)>) {
    DISKS.set(disks);
}

/// The name that opens an image, as headers have it.
pub(crate) fn image_name(disk: &str) -> String {
    format!(r#"json:{{"driver":"qcow2","file":{{"driver":"sim-disk","name":"{disk}"}}}}"#)
}

/// The definition of an image's node.
pub(crate) fn image_node(disk: &str) -> Options {
    let file = Options::new()
        .with("driver", "sim-disk")
        .with("node-name", format!("{disk}-f"))
        .with("name", disk)
        .with("discard", "unmap");
    Options::new()
        .with("driver", "qcow2")
        .with("node-name", disk)
        .with("discard", "unmap")
        .with("file", file.into_value())
}

/// The node that holds the data which `node` shows.
pub(crate) fn content(node: &Arc<Node>) -> Arc<Node> {
    let mut at = node.clone();
    while let Some(next) = at.filtered().cloned() {
        at = next;
    }
    at
}

/// An image in memory: its size in sectors and what it holds itself, as runs of bytes.
pub(crate) async fn make_image(
    rt: &Rt,
    cluster: u64,
    size: u64,
    backing: Option<&str>,
    data: &[(u64, Vec<u8>)],
) -> Result<Image> {
    let disk = MemoryDisk::new(Image::new(0));
    let mut options = Options::new().with("size", size).with("cluster_size", cluster);
    if let Some(backing) = backing {
        options = options.with("backing_file", image_name(backing)).with("backing_fmt", "qcow2");
    }
    dolmen_sim::create(rt, &dolmen_formats::QCOW2, Leaf::new("disk", disk.clone()), options).await?;
    if !data.is_empty() {
        let stack = Options::new().with("driver", "qcow2").with("file", "disk").with("backing", Value::Null);
        let leaves = vec![Leaf::new("disk", disk.clone())];
        let needs = Actions::D | Actions::V;
        let harness = dolmen_sim::Harness::open(rt, REGISTRY, leaves, stack, needs).await?;
        for (at, bytes) in data {
            harness.user().write(*at, bytes, WriteFlags::NONE).await?;
        }
        harness.close().await?;
    }
    Ok(disk.image())
}

/// The root of the chain as guests had it, from one moment of the journal to another.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) root: String,
    pub(crate) first: usize,
    pub(crate) last: usize,
}

/// Everything that a schedule works on.
pub(crate) struct World {
    pub(crate) rt: Rt,
    pub(crate) control: Control,
    pub(crate) journal: Journal,
    pub(crate) disks: RefCell<Vec<(String, SimDisk)>>,
    pub(crate) config: DiskConfig,
    pub(crate) oracle: RefCell<Oracle>,
    pub(crate) seen: RefCell<Vec<Seen>>,
    /// The edge of the first guest.
    pub(crate) guest: RefCell<Option<Arc<UserEdge>>>,
    /// Requests may fail.
    pub(crate) errors: bool,
    /// Disks become full.
    pub(crate) fills: Cell<bool>,
    /// Nothing fails but for that.
    pub(crate) only_full: Cell<bool>,
    /// Guests give up some of their requests.
    pub(crate) cancels: Cell<bool>,
    /// How many they have given up.
    pub(crate) given_up: Cell<u64>,
    /// Guests are to stop.
    pub(crate) stop: Cell<bool>,
    /// Guests are to make no requests for now.
    pub(crate) rest: Cell<bool>,
    /// Requests of guests under way.
    pub(crate) busy: Cell<u64>,
    /// Guests that run.
    pub(crate) guests: Cell<u64>,
}

impl World {
    pub(crate) fn new(rt: &Rt, oracle: Oracle, config: DiskConfig, errors: bool) -> Rc<World> {
        plug(Vec::new());
        let control = Control::start(rt, Config { registry: REGISTRY, policy: POLICY, log: |_| {} });
        Rc::new(World {
            rt: rt.clone(),
            control,
            journal: Journal::default(),
            disks: RefCell::default(),
            config,
            oracle: RefCell::new(oracle),
            seen: RefCell::default(),
            guest: RefCell::default(),
            errors,
            fills: Cell::new(false),
            only_full: Cell::new(false),
            cancels: Cell::new(false),
            given_up: Cell::new(0),
            stop: Cell::new(false),
            rest: Cell::new(false),
            busy: Cell::new(0),
            guests: Cell::new(0),
        })
    }

    /// Adds a disk with this content, all of it durable.
    pub(crate) fn add_disk(&self, name: &str, image: Image) {
        let mut disks = self.disks.borrow_mut();
        let disk = SimDisk::in_journal(image, self.config, &self.journal, disks.len());
        if self.fills.get() {
            // Zeroes that are written take space from the beginning.
            disk.set_capacity(Some(PLENTY));
        }
        disks.push((name.to_owned(), disk));
        plug(disks.clone());
    }

    pub(crate) fn position(&self) -> usize {
        self.journal.position()
    }

    /// The root of the chain as the guest has it.
    pub(crate) fn root(&self) -> Arc<Node> {
        content(&self.guest.borrow().as_ref().expect("the guest is attached").node())
    }

    /// Notes what the root is now.
    pub(crate) fn look(&self) {
        let Some(edge) = self.guest.borrow().clone() else { return };
        let (root, now) = (content(&edge.node()).name.to_string(), self.position());
        let mut seen = self.seen.borrow_mut();
        match seen.last_mut() {
            Some(last) if last.root == root => last.last = now,
            _ => seen.push(Seen { root, first: now, last: now }),
        }
    }

    /// Executes a command. One that is refused must not have changed anything.
    pub(crate) async fn ask(&self, name: &'static str, arguments: Options) -> Asked {
        let before = self.shape().await;
        let shown = arguments.clone().into_value().to_string();
        let request = Request { name, arguments: arguments.into_value(), id: None };
        let result = self.control.execute(&request).await;
        self.look();
        let after = self.shape().await;
        // A node that can't write out what it holds is gone all the same, and the command says so.
        let gone = |e: &QmpError| e.desc.contains("is closed, but closing it failed");
        if result.as_ref().is_err_and(|e| !gone(e))
            && before.ended == after.ended
            && before.graph != after.graph
        {
            return Err(format!(
                "{name} {shown} was refused, but changed the graph from\n{}to\n{}",
                before.graph, after.graph
            ));
        }
        if std::env::var_os("DOLMEN_SIM_TRACE").is_some() {
            let at = self.position();
            match &result {
                Ok(_) => eprintln!("{at}: {name} {shown}"),
                Err(e) => eprintln!("{at}: {name} {shown}: {}", e.desc),
            }
        }
        Ok(result)
    }

    /// The jobs, newest first.
    pub(crate) async fn jobs(&self) -> Vec<Json> {
        let request = Request { name: "query-jobs", arguments: Value::Map(Vec::new()), id: None };
        match self.control.execute(&request).await {
            Ok(Json::Array(jobs)) => jobs,
            other => panic!("query-jobs: {other:?}"),
        }
    }

    /// What must not change when a command is refused.
    async fn shape(&self) -> Shape {
        let mut graph = String::new();
        for n in self.control.graph().nodes() {
            let children: Vec<_> = n.children.iter().map(|c| format!("{}={}", c.name, c.node.name)).collect();
            graph += &format!("  {} {:?} {:?} {}\n", n.name, n.flags, children, n.options);
        }
        let is_live = |j: &&Json| !["concluded", "null"].contains(&j["status"].as_str().unwrap_or("null"));
        let ended = self.jobs().await.iter().filter(is_live).map(|j| j["id"].to_string()).collect::<Vec<_>>();
        Shape { graph, ended }
    }

    /// Attaches somebody to a node. `Err` is the refusal.
    pub(crate) async fn attach(
        &self,
        id: &str,
        node: &str,
        needs: Actions,
    ) -> std::result::Result<Arc<UserEdge>, QmpError> {
        let edge = Rc::new(RefCell::new(None));
        let work = Box::new(Attach { node: node.to_owned(), needs, edge: edge.clone() });
        let options = JobOptions::new(OpId::parse(id).expect("a good id"));
        self.control.start_job(JobStart { work, options }).await?;
        loop {
            if let Some(edge) = edge.borrow().clone() {
                return Ok(edge);
            }
            self.rt.sleep(std::time::Duration::from_nanos(1)).await;
        }
    }

    /// Detaches somebody, and waits until it is gone.
    pub(crate) async fn detach(&self, id: &str) {
        let by_id = Options::new().with("id", id);
        let request = Request { name: "job-cancel", arguments: by_id.into_value(), id: None };
        self.control.execute(&request).await.expect("it was attached");
        while self.jobs().await.iter().any(|j| j["id"] == id) {
            self.rt.sleep(std::time::Duration::from_micros(10)).await;
        }
    }

    /// What a node shows, read by a user of its own.
    pub(crate) async fn read_node(&self, node: &str) -> std::result::Result<Vec<u8>, String> {
        let edge = self.attach("judge", node, Actions::D).await.map_err(|e| e.desc)?;
        let user = User::new(edge, self.rt.clone());
        let bytes = user.read(0, user.size() as usize).await.map_err(|e| e.to_string());
        drop(user);
        self.detach("judge").await;
        bytes
    }
}

/// What came of a command; `Err` when it did what no command may do.
pub(crate) type Asked = std::result::Result<std::result::Result<Json, QmpError>, String>;

struct Shape {
    graph: String,
    ended: Vec<String>,
}

/// An export in small: a user of the graph, held by a job that does nothing.
#[derive(Debug)]
struct Attach {
    node: String,
    needs: Actions,
    edge: Rc<RefCell<Option<Arc<UserEdge>>>>,
}

impl Work for Attach {
    fn kind(&self) -> &'static JobKind {
        &PREFETCH
    }

    fn detail(&self) -> String {
        format!("a user of '{}'", self.node)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        let claim = Claim { needs: self.needs, allows: Actions::EVERY - Actions::S };
        Box::pin(async move { cx.draft.add_user(cx.op, &self.node, claim) })
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            *self.edge.borrow_mut() = Some(cx.edge(0).clone());
            loop {
                let changed = cx.changed();
                cx.checkpoint().await?;
                changed.await;
            }
        })
    }

    fn settle<'a>(&'a self, _: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn end(&self, _: &OpId, _: &mut Draft, _: Ending) -> Result<()> {
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, _: Options) -> Result<dolmen_jobs::Effect<'_>> {
        Err(nothing_to_change())
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}

/// Opens an image with nothing but its name, as somebody does who comes after a crash, and
/// reads it whole.
pub(crate) async fn read_image(rt: &Rt, disk: &str) -> Result<Vec<u8>> {
    let mut owner = dolmen_graph::GraphOwner::new(rt.clone());
    let mut draft = owner.draft();
    let opener = NodeOpener { registry: REGISTRY, policy: POLICY, names: dolmen_control::image_name, rt };
    let node = opener.open(&mut draft, image_node(disk), true).await?;
    let op = OpId::internal("reader");
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "tool".into(),
        detail: "whoever comes after the crash".into(),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    // A guest would write again.
    let claim = Claim { needs: Actions::D | Actions::V, allows: Actions::EVERY };
    draft.add_user(&op, node.as_str(), claim)?;
    owner.commit(draft).await?;
    let edge = owner.edges(&op).next().expect("just attached");
    let user = User::new(edge, rt.clone());
    let bytes = user.read(0, user.size() as usize).await?;
    drop(user);
    owner.close().await?;
    Ok(bytes)
}
