//! What an instant command has taken is given back, however it ends: it works under an operation of its own, and one that
//! stayed was in everybody's way for ever.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use dolmen_control::{Config, Control};
use dolmen_graph::{
    AccessRule, Class, Cx, Description, Driver, DriverKind, Extent, ImageOps, Implicit, Limits, Node,
    NodeChange, Op, OpenCx, OpenPolicy, Opened, Opener, Parsed, Plan, Prepared, Registry, Request, Where,
};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_sim::Sim;
use dolmen_types::{Actions, BlkEvent, Error, ErrorKind, Options, Result, Span};
use event_listener::Event;
use serde_json::json;

use crate::rig::with_rig;

thread_local! {
    /// What the drivers of this test do.
    static GATE: RefCell<Arc<Gate>> = RefCell::default();
}

/// Whatever a driver may wait for.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Not 0: they wait.
    resizes: AtomicU64,
    preparations: AtomicU64,
    opens: AtomicU64,
    /// How many times the end of writing can't be prepared.
    failures: AtomicU64,
    /// How many wait now.
    waiting: AtomicU64,
    opened: Event,
}

impl Gate {
    fn here() -> Arc<Gate> {
        GATE.with(|g| g.borrow().clone())
    }

    async fn pass(&self, shut: &AtomicU64) {
        self.waiting.fetch_add(1, SeqCst);
        while shut.load(SeqCst) > 0 {
            let listener = self.opened.listen();
            if shut.load(SeqCst) > 0 {
                listener.await;
            }
        }
        self.waiting.fetch_sub(1, SeqCst);
    }

    fn open(&self, shut: &AtomicU64) {
        shut.store(0, SeqCst);
        self.opened.notify(usize::MAX);
    }
}

/// Zeroes, behind a gate.
pub(crate) static GATED: DriverKind =
    DriverKind::new("gated", Class::Protocol, "zeroes that wait", &[], |_, _| {
        Ok(Parsed {
            children: Vec::new(),
            rule: AccessRule::LEAF,
            relies_down_to: None,
            open: Box::new(OpenGated),
        })
    });

static ROWS: &[&DriverKind] = &[&GATED];

struct OpenGated;

impl Opener for OpenGated {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        let driver = Gated { gate: Gate::here(), size: AtomicU64::new(1 << 20) };
        Box::pin(async move {
            driver.gate.pass(&driver.gate.opens).await;
            Ok(Opened::of(Arc::new(driver)))
        })
    }
}

#[derive(Debug)]
struct Gated {
    gate: Arc<Gate>,
    size: AtomicU64,
}

impl Driver for Gated {
    fn kind(&self) -> &'static DriverKind {
        &GATED
    }
    fn size(&self, _: &Node) -> u64 {
        self.size.load(SeqCst)
    }
    fn limits(&self, _: &Node) -> Limits {
        Limits::BYTES
    }
    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }
    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        let len = span.len();
        match request {
            Request::Read(_) => Plan::Zeroes { len },
            Request::Write(_) | Request::WriteZeroes(_) | Request::Discard(_) | Request::Flush => {
                Plan::Done { len }
            }
            Request::Resize => Plan::Slow,
        }
    }
    fn run<'a>(&'a self, _: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if let Op::Resize { size, .. } = op {
                self.gate.pass(&self.gate.resizes).await;
                self.size.store(size, SeqCst);
            }
            Ok(())
        })
    }
    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move { Ok(Extent { len: span.len(), place: Where::Zero { at: None } }) })
    }
    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }
    fn prepare<'a>(&'a self, _: Cx<'a>, to: &'a NodeChange) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            self.gate.pass(&self.gate.preparations).await;
            let ends_writing = matches!(to, NodeChange::Access { needs, .. } if !needs.contains(Actions::V));
            if ends_writing && self.gate.failures.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok() {
                return Err(Error::new(ErrorKind::Io, "the lock server is away"));
            }
            Ok(Box::new(()) as Box<dyn Prepared>)
        })
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

/// A control task in the simulation, where 30 s take no time, with the node `disk`.
fn simulated<F: Future<Output = ()> + 'static>(test: impl FnOnce(Rt, Control) -> F + 'static) {
    Sim::run(1, |rt| async move {
        let policy = OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };
        let config = Config { registry: Registry::new(ROWS), policy, log: |line| eprintln!("log: {line}") };
        let control = Control::start(&rt, config);
        let disk = Options::new().with("driver", "gated").with("node-name", "disk");
        control.command("blockdev-add", disk).await.expect("added");
        test(rt, control.clone()).await;
        control.quit();
        control.ended().await;
    });
}

async fn resize(
    control: &Control,
    size: u64,
) -> std::result::Result<serde_json::Value, dolmen_qmp::QmpError> {
    control.command("block_resize", Options::new().with("node-name", "disk").with("size", size)).await
}

fn size(control: &Control) -> u64 {
    control.graph().node("disk").expect("it is there").size()
}

async fn until(rt: &Rt, ready: impl Fn() -> bool) {
    while !ready() {
        rt.yield_now().await;
    }
}

#[test]
fn a_command_that_takes_long_is_answered_and_ends_later() {
    simulated(|rt, control| async move {
        let gate = Gate::here();
        gate.resizes.store(1, SeqCst);
        let late = resize(&control, 2 << 20).await.expect_err("it waits");
        assert!(late.desc.contains("has not finished within 30 s"), "{}", late.desc);
        // Guarded until it ends.
        let refused = resize(&control, 3 << 20).await.expect_err("guarded");
        assert!(refused.desc.contains("block_resize"), "{}", refused.desc);
        gate.open(&gate.resizes);
        until(&rt, || size(&control) == 2 << 20).await;
        resize(&control, 3 << 20).await.expect("nothing is in its way");
        assert_eq!(size(&control), 3 << 20);
    });
}

#[test]
fn a_command_that_nobody_waits_for_ends_all_the_same() {
    simulated(|rt, control| async move {
        let gate = Gate::here();
        gate.resizes.store(1, SeqCst);
        let asked = rt.timeout(std::time::Duration::from_secs(1), resize(&control, 2 << 20));
        assert!(asked.await.is_none(), "it waits, and is dropped");
        assert_eq!(gate.waiting.load(SeqCst), 1);
        gate.open(&gate.resizes);
        until(&rt, || size(&control) == 2 << 20).await;
        resize(&control, 3 << 20).await.expect("nothing is in its way");
    });
}

/// Opening waits for somebody who never answers: the command has an end, and leaves nothing behind.
#[test]
fn what_is_not_opened_in_time_is_given_up() {
    simulated(|_, control| async move {
        let gate = Gate::here();
        gate.opens.store(1, SeqCst);
        let other = || Options::new().with("driver", "gated").with("node-name", "other");
        let late = control.command("blockdev-add", other()).await.expect_err("nobody answers");
        assert!(late.desc.contains("did not answer within 30 s"), "{}", late.desc);
        gate.open(&gate.opens);
        assert!(control.graph().node("other").is_none());
        control.command("blockdev-add", other()).await.expect("it answers, and the name is free");
    });
}

/// The roll-back of an export failed, so its operation stayed, and the node could not be removed ever after.
#[test]
fn an_export_that_comes_to_nothing_gives_back_its_operation() {
    with_rig(|rig| async move {
        let gate = Gate::here();
        let mut c = rig.monitor().await;
        c.ok("blockdev-add", json!({"driver": "gated", "node-name": "disk"})).await;
        rig.nbd_server(&mut c).await;
        gate.preparations.store(1, SeqCst);
        let mut exporting = rig.monitor().await;
        let add = json!({"execute": "block-export-add",
                         "arguments": {"type": "nbd", "id": "e", "node-name": "disk", "writable": true}});
        exporting.send(&add.to_string()).await;
        until(&rig.rt, || gate.waiting.load(SeqCst) > 0).await;
        c.ok("nbd-server-stop", json!({})).await;
        gate.failures.store(1, SeqCst);
        gate.open(&gate.preparations);
        let reply = exporting.receive().await.expect("a reply");
        assert!(reply["error"]["desc"].to_string().contains("stopped meanwhile"), "{reply}");
        assert_eq!(gate.failures.load(SeqCst), 0, "giving it back has failed once");
        while c.ok("query-operations", json!({})).await != json!([]) {
            rig.rt.yield_now().await;
        }
        c.ok("blockdev-del", json!({"node-name": "disk"})).await;
    });
}
