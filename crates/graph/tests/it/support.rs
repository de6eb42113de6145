//! A leaf that writes down what happens to it and does what a test tells it.

use std::fmt;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use dolmen_graph::{
    AccessRule, Class, Common, Cx, Description, Draft, Driver, DriverKind, Extent, GraphOwner, ImageOps,
    Limits, Node, NodeChange, Op, Parsed, Plan, Prepared, Request, SELF, UserEdge, Where,
};
use dolmen_rt::{CoreIo, Instant, Lane, LocalFuture, Rt, Runtime};
use dolmen_sim::stand_in;
use dolmen_types::{BlkEvent, Error, ErrorKind, OpId, Options, Result, Span};
use event_listener::Event;

/// What happened, in order.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn add(&self, line: impl Into<String>) {
        self.0.lock().unwrap().push(line.into());
    }

    /// What happened since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Requests wait in front of it while it is shut.
#[derive(Default)]
pub(crate) struct Gate {
    shut: AtomicBool,
    opened: Event,
}

impl Gate {
    pub(crate) fn shut(&self) {
        self.shut.store(true, SeqCst);
    }

    pub(crate) fn open(&self) {
        self.shut.store(false, SeqCst);
        self.opened.notify(usize::MAX);
    }

    async fn pass(&self) {
        while self.shut.load(SeqCst) {
            let listener = self.opened.listen();
            if self.shut.load(SeqCst) {
                listener.await;
            }
        }
    }
}

/// The part of a [`Probe`] that the test keeps.
#[derive(Default)]
pub(crate) struct Hooks {
    /// Data requests wait here.
    pub(crate) requests: Gate,
    /// Flushes wait here.
    pub(crate) flushes: Gate,
    /// Closing waits here.
    pub(crate) closes: Gate,
    pub(crate) fail_prepare: AtomicBool,
    pub(crate) fail_flush: AtomicBool,
    pub(crate) fail_close: AtomicBool,
    pub(crate) in_flight: AtomicUsize,
    pub(crate) finished: AtomicUsize,
}

/// A leaf of 1 MiB without data that reads as the first byte of its name.
pub(crate) struct Probe {
    name: &'static str,
    log: Log,
    pub(crate) hooks: Arc<Hooks>,
}

pub(crate) static PROBE: DriverKind =
    DriverKind::new("probe", Class::Protocol, "a leaf that writes down what happens to it", &[], refuse);

fn refuse(_: &mut Options, _: &Common) -> Result<Parsed> {
    Err(Error::new(ErrorKind::InvalidInput, "made by the test"))
}

impl Probe {
    pub(crate) fn new(name: &'static str, log: &Log) -> (Probe, Arc<Hooks>) {
        let hooks = Arc::<Hooks>::default();
        (Probe { name, log: log.clone(), hooks: hooks.clone() }, hooks)
    }
}

/// Adds a probe of that name to a draft.
pub(crate) fn add_probe(d: &mut Draft, name: &'static str, log: &Log) -> Arc<Hooks> {
    let (probe, hooks) = Probe::new(name, log);
    stand_in::add(d, name, probe, None, &[]).unwrap();
    hooks
}

/// Adds a plain filter.
pub(crate) fn add_filter(d: &mut Draft, name: &str, over: &str) {
    let raw = stand_in::StandIn::new(&stand_in::RAW, AccessRule::FILTER);
    stand_in::add(d, name, raw, None, &[("file", dolmen_types::ChildRole::Filtered, over)]).unwrap();
}

/// The edge of an operation.
pub(crate) fn edge(owner: &GraphOwner, op: &str) -> Arc<UserEdge> {
    owner.edges(&OpId::internal(op)).next().expect("attached").clone()
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Probe({})", self.name)
    }
}

struct Held {
    name: &'static str,
    log: Log,
    done: bool,
}

impl Prepared for Held {
    fn commit(mut self: Box<Self>) {
        self.done = true;
        self.log.add(format!("commit {}", self.name));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.done {
            self.log.add(format!("abort {}", self.name));
        }
    }
}

fn failed(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("{what} failed"))
}

impl Driver for Probe {
    fn kind(&self) -> &'static DriverKind {
        &PROBE
    }

    fn size(&self, _: &Node) -> u64 {
        1 << 20
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits::BYTES
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, _: &Node, _: Request, _: Span) -> Plan {
        Plan::Slow
    }

    fn run<'a>(&'a self, _: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        struct Count<'a>(&'a Hooks);
        impl Drop for Count<'_> {
            fn drop(&mut self) {
                self.0.in_flight.fetch_sub(1, SeqCst);
                self.0.finished.fetch_add(1, SeqCst);
            }
        }
        Box::pin(async move {
            match op {
                Op::Flush => {
                    self.hooks.flushes.pass().await;
                    self.log.add(format!("flush {}", self.name));
                    if self.hooks.fail_flush.load(SeqCst) {
                        return Err(failed("flush"));
                    }
                }
                Op::Read { to, .. } => {
                    self.hooks.in_flight.fetch_add(1, SeqCst);
                    let _count = Count(&self.hooks);
                    self.hooks.requests.pass().await;
                    to.segments().iter().for_each(|s| s.fill(self.name.as_bytes()[0]));
                }
                Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } | Op::Resize { .. } => {
                    self.hooks.requests.pass().await;
                }
            }
            Ok(())
        })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let place = Where::Data { child: SELF, at: Some(span.offset()), compressed: false };
        Box::pin(async move { Ok(Extent { len: span.len(), place }) })
    }

    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        _: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            let NodeChange::Access { needs, allows } = change else {
                return Ok(Box::new(()) as Box<dyn Prepared>);
            };
            if self.hooks.fail_prepare.load(SeqCst) {
                self.log.add(format!("refuse {}", self.name));
                return Err(failed("prepare"));
            }
            self.log.add(format!("prepare {} {needs}/{}", self.name, *allows & dolmen_types::Actions::DATA));
            Ok(Box::new(Held { name: self.name, log: self.log.clone(), done: false }) as Box<dyn Prepared>)
        })
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.log.add(format!("close {}", self.name));
            self.hooks.closes.pass().await;
            if self.hooks.fail_close.load(SeqCst) { Err(failed("close")) } else { Ok(()) }
        })
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        Description::default()
    }
}

/// A runtime for tests with real threads: its clock stands still and no timer fires.
pub(crate) struct Still(Lane);

impl Runtime for Still {
    fn now(&self) -> Instant {
        Instant::from_nanos(0)
    }

    fn sleep_until(&self, _: Instant) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    fn spawn(&self, _: LocalFuture<'static, ()>) {
        panic!("these tests start no tasks");
    }

    fn random(&self) -> u64 {
        4
    }

    fn io(&self) -> Option<&CoreIo> {
        None
    }

    fn lane(&self) -> &Lane {
        &self.0
    }
}

/// A handle of [`Still`].
pub(crate) fn still() -> Rt {
    Rt::new(Rc::new(Still(Lane::take())))
}
