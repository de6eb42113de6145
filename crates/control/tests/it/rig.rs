//! A control task on a real runtime, with drivers that need no files.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dolmen_control::{Config, Control, MonitorOptions, listen_monitor};
use dolmen_graph::{
    AccessRule, ChildDef, ChildSpec, Class, Common, Cx, Description, Driver, DriverKind, Extent, ImageOps,
    Implicit, Limits, Node, NodeChange, Op, OpenCx, OpenPolicy, Opened, Opener, Parsed, Plan, Prepared,
    Registry, Request, Where,
};
use dolmen_qmp::{Framer, Request as Command};
use dolmen_rt::{Addr, LocalFuture, Memory, Rt, Stream, block_on};
use dolmen_types::{
    BlkEvent, ChildRole, Error, ErrorKind, OptionSpec, OptionType, Options, Result, Span, Value,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

static ROWS: &[&DriverKind] = &[&dolmen_sim::MEMORY, &PASS, &STUCK, &crate::guard::GATED];

/// A filter that does nothing.
static PASS: DriverKind = DriverKind::new(
    "pass",
    Class::Filter,
    "a filter that does nothing",
    &[OptionSpec::required("file", OptionType::Node, "the node below")],
    |options, _| {
        let file =
            ChildSpec { name: "file", role: ChildRole::Filtered, def: ChildDef::take(options, "file")? };
        Ok(Parsed {
            children: vec![file],
            rule: AccessRule::FILTER,
            relies_down_to: None,
            open: Box::new(Open(|| Ok(Arc::new(Pass { stuck: false })))),
        })
    },
);

/// The same, but what is written out on closing fails.
static STUCK: DriverKind = DriverKind::new(
    "stuck",
    Class::Filter,
    "a filter that can't be closed",
    &[OptionSpec::required("file", OptionType::Node, "the node below")],
    |options, _| {
        let file =
            ChildSpec { name: "file", role: ChildRole::Filtered, def: ChildDef::take(options, "file")? };
        Ok(Parsed {
            children: vec![file],
            rule: AccessRule::FILTER,
            relies_down_to: None,
            open: Box::new(Open(|| Ok(Arc::new(Pass { stuck: true })))),
        })
    },
);

struct Open(fn() -> Result<Arc<dyn Driver>>);

impl Opener for Open {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move { Ok(Opened::of((self.0)()?)) })
    }
}

#[derive(Debug)]
struct Pass {
    stuck: bool,
}

impl Driver for Pass {
    fn kind(&self) -> &'static DriverKind {
        if self.stuck { &STUCK } else { &PASS }
    }
    fn size(&self, node: &Node) -> u64 {
        node.children[0].node.size()
    }
    fn limits(&self, node: &Node) -> Limits {
        let below = &node.children[0].node;
        below.driver.limits(below)
    }
    fn access_rule(&self) -> AccessRule {
        AccessRule::FILTER
    }
    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        Plan::pass(request, span)
    }
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { cx.forward(0, op).await })
    }
    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let extent = Extent { len: span.len(), place: Where::Through { child: 0, at: span.offset() } };
        Box::pin(async move { Ok(extent) })
    }
    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }
    fn prepare<'a>(&'a self, _: Cx<'a>, _: &'a NodeChange) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async { Ok(Box::new(()) as Box<dyn Prepared>) })
    }
    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        let result = match self.stuck {
            true => Err(Error::new(ErrorKind::NoSpace, "the last table could not be written")),
            false => Ok(()),
        };
        Box::pin(async move { result })
    }
    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}

// The options are read by `parse` alone.
const _: fn(&mut Options, &Common) -> Result<Parsed> = PASS.parse;

/// A control task, a directory, and a monitor socket in it.
pub(crate) struct Rig {
    pub(crate) control: Control,
    pub(crate) rt: Rt,
    dir: Arc<TempDir>,
}

/// Runs a test on a runtime of its own. The control task is ended afterwards.
pub(crate) fn with_rig<Fut: Future<Output = ()> + 'static>(test: impl FnOnce(Arc<Rig>) -> Fut + 'static) {
    block_on(move |rt| async move {
        let dir = Arc::new(tempfile::tempdir().expect("a directory"));
        let policy = OpenPolicy {
            implicit: Implicit::Deny,
            probe: false,
            permit_with: "nothing here",
            probe_with: "nothing here",
        };
        let config = Config { registry: Registry::new(ROWS), policy, log: |line| eprintln!("log: {line}") };
        let control = Control::start(&rt, config);
        let socket = listen_monitor(&control, dir.path().join("qmp.sock")).await.expect("listens");
        let serving = control.clone();
        rt.spawn(async move { socket.serve(&serving, MonitorOptions::default()).await });
        #[allow(clippy::arc_with_non_send_sync, reason = "never leaves the thread; Rc would do as well")]
        let rig = Arc::new(Rig { control: control.clone(), rt, dir });
        test(rig).await;
        control.quit();
        control.ended().await;
    });
}

impl Rig {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("qmp.sock")
    }

    /// A monitor that has not negotiated.
    pub(crate) async fn connect(&self) -> Client {
        Client::connect(&self.rt, &self.socket()).await
    }

    /// A monitor that is ready for commands.
    pub(crate) async fn monitor(&self) -> Client {
        let mut c = self.connect().await;
        assert!(c.receive().await.expect("a greeting")["QMP"].is_object());
        assert_eq!(c.ask(json!({"execute": "qmp_capabilities"})).await, json!({"return": {}}));
        c
    }

    pub(crate) async fn nbd_server(&self, c: &mut Client) -> PathBuf {
        let path = self.path("nbd.sock");
        let addr = json!({"type": "unix", "data": {"path": path}});
        c.ok("nbd-server-start", json!({ "addr": addr })).await;
        path
    }

    /// Every command of the table, with no arguments, past the schema.
    pub(crate) async fn bare(&self, name: &'static str) -> std::result::Result<Json, String> {
        let command = Command { name, arguments: Value::Map(Vec::new()), id: None };
        self.control.execute(&command).await.map_err(|e| e.desc)
    }
}

/// A client on a raw socket.
pub(crate) struct Client {
    pub(crate) stream: Stream,
    framer: Framer,
    /// Received and not looked at: the framer takes a bounded number of texts.
    unread: Vec<u8>,
    /// Events that came while something else was waited for.
    pub(crate) events: Vec<Json>,
}

impl Client {
    async fn connect(rt: &Rt, path: &Path) -> Client {
        let io = rt.io().expect("a real runtime");
        let stream = io.connect(&Addr::Unix(path.to_owned())).await.expect("connects");
        Client { stream, framer: Framer::new(), unread: Vec::new(), events: Vec::new() }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.send_bytes(text.as_bytes()).await.expect("sent");
    }

    /// The next object; `None` when the daemon has hung up.
    pub(crate) async fn receive(&mut self) -> Option<Json> {
        loop {
            if let Some(t) = self.framer.next_text() {
                return Some(serde_json::from_str(&t.expect("framed")).expect("JSON"));
            }
            if self.unread.is_empty() {
                let memory = Memory::zeroed(64 << 10);
                let n = self.stream.recv_buf(&memory.share()).await.unwrap_or(0);
                if n == 0 {
                    return None;
                }
                self.unread.extend_from_slice(&memory.to_vec()[..n]);
            }
            let taken = self.framer.feed(&self.unread);
            self.unread.drain(..taken);
        }
    }

    /// Sends a command and returns its reply; events on the way are kept.
    pub(crate) async fn ask(&mut self, command: Json) -> Json {
        self.send(&command.to_string()).await;
        loop {
            let v = self.receive().await.expect("a reply");
            if v.get("event").is_none() {
                return v;
            }
            self.events.push(v);
        }
    }

    /// The value of a command that succeeds.
    pub(crate) async fn ok(&mut self, name: &str, arguments: Json) -> Json {
        let reply = self.ask(json!({"execute": name, "arguments": arguments})).await;
        assert!(reply.get("error").is_none(), "{name} {arguments}: {reply}");
        reply["return"].clone()
    }

    /// The error of a command that fails.
    pub(crate) async fn err(&mut self, name: &str, arguments: Json) -> Json {
        let reply = self.ask(json!({"execute": name, "arguments": arguments})).await;
        assert!(reply.get("return").is_none(), "{name} {arguments} was not refused");
        reply["error"].clone()
    }

    /// The next event, waiting for it if need be.
    pub(crate) async fn event(&mut self) -> Json {
        if self.events.is_empty() {
            let v = self.receive().await.expect("an event");
            assert!(v.get("event").is_some(), "{v}");
            return v;
        }
        self.events.remove(0)
    }

    pub(crate) async fn node_names(&mut self) -> Vec<String> {
        let nodes = self.ok("query-named-block-nodes", json!({"flat": true})).await;
        let names = nodes.as_array().expect("a list").iter();
        names.map(|n| n["node-name"].as_str().expect("a name").to_owned()).collect()
    }
}
