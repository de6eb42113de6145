//! The handle that everybody but the task holds.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_channel::{Receiver, Sender};
use dolmen_graph::{Graph, GraphOwner, OpClaim, OpInfo, OpenPolicy, Patience, Registry, common_options};
use dolmen_jobs::JobTable;
use dolmen_qmp::model::{self, BlockExportInfo};
use dolmen_qmp::schema::{Branch, Sources};
use dolmen_qmp::{
    ErrorClass, Event, QmpError, Request, Schema, Source, Timestamp, Version, already_negotiated,
};
use dolmen_rt::Rt;
use dolmen_types::{Error, ErrorKind, Options, Value};
use serde_json::{Value as Json, json};

use crate::export::Export;
use crate::monitor::Outgoing;
use crate::turns::Scope;
use crate::{Change, export, jobs, operations, query, stats};

/// What is said to those who come too late.
pub(crate) const ENDING: &str = "The daemon is shutting down";

/// How long a command waits for storage.
pub(crate) const PATIENCE: Patience =
    Patience { publish: Duration::from_secs(30), close: Some(Duration::from_secs(30)) };

/// Receives lines about what goes wrong without anybody waiting for it.
pub type Log = fn(&str);

/// What a control task is made of.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The drivers.
    pub registry: Registry,
    /// What may be opened because an image names it.
    pub policy: OpenPolicy,
    /// Where warnings go.
    pub log: Log,
}

/// The state of things, as queries see it.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) graph: Arc<Graph>,
    pub(crate) ops: Vec<OpInfo>,
    pub(crate) claims: Vec<OpClaim>,
    pub(crate) exports: Vec<BlockExportInfo>,
}

/// A change on its way to the task, and where its result goes.
pub(crate) struct Job {
    pub(crate) change: Change,
    /// The command, for messages.
    pub(crate) what: String,
    /// What it names.
    pub(crate) scope: Scope,
    pub(crate) reply: Sender<Result<Json, QmpError>>,
}

pub(crate) struct Shared {
    pub(crate) rt: Rt,
    pub(crate) schema: Schema,
    pub(crate) version: Version,
    pub(crate) owner: GraphOwner,
    /// Newest first, as queries list them.
    pub(crate) exports: RefCell<VecDeque<Export>>,
    pub(crate) monitors: RefCell<Vec<Rc<Outgoing>>>,
    pub(crate) log: Log,
    /// Every job, so that queries and verbs never wait for the task.
    pub(crate) jobs: JobTable,
    /// Somebody wants the end: what may take for ever is given up.
    pub(crate) hurry: Cell<bool>,
    /// The task has begun to end.
    pub(crate) quitting: Cell<bool>,
    /// Nodes are being closed: nothing changes any more.
    pub(crate) closing: Cell<bool>,
    /// Some node could not be closed: what it held may be lost.
    pub(crate) unclean: Cell<bool>,
    /// The task has ended: everything is closed.
    pub(crate) ended: Cell<bool>,
    /// Raised when one of them changes, and when a job has ended.
    pub(crate) progress: event_listener::Event,
    introspection: Json,
}

impl Shared {
    /// The state of things, now.
    pub(crate) fn published(&self) -> Published {
        let graph = self.owner.graph();
        let exports = self.exports.borrow().iter().map(|e| e.info(&graph)).collect();
        let mut ops = self.owner.ops();
        for op in &mut ops {
            // What the graph knows of a job's state is as old as the last change.
            if let Some(job) = self.jobs.get(op.id.as_str()) {
                op.detail = job.detail();
            }
        }
        Published { ops, claims: self.owner.claims(), exports, graph }
    }

    /// Sets one of the flags, and wakes who waits for it.
    pub(crate) fn raise(&self, flag: &Cell<bool>) {
        flag.set(true);
        self.progress.notify(usize::MAX);
    }

    /// Completes when `flag` is set.
    pub(crate) async fn until(&self, flag: &Cell<bool>) {
        while !flag.get() {
            let listener = self.progress.listen();
            if !flag.get() {
                listener.await;
            }
        }
    }

    /// Does something that may take for ever, unless the end is wanted meanwhile. It is
    /// dropped then, and must undo itself by that.
    ///
    /// # Errors
    /// Its own; `GenericError` when it was given up.
    pub(crate) async fn unless_quitting<T>(
        &self,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, QmpError> {
        self.unless(&self.hurry, work).await
    }

    /// The same for what commands do before anything is published, which always has an end: storage may not answer.
    ///
    /// # Errors
    /// As [`Shared::unless_quitting`]; `TimedOut`.
    pub(crate) async fn patiently<T>(
        &self,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, QmpError> {
        let late = async {
            self.rt.sleep(PATIENCE.publish).await;
            let secs = PATIENCE.publish.as_secs();
            let text = format!("storage that is needed for this did not answer within {secs} s");
            Err(Error::new(ErrorKind::TimedOut, text)
                .remedy("look for the server or file system that does not answer, then try again")
                .into())
        };
        self.unless_quitting(futures_lite::future::or(work, late)).await
    }

    /// The same for something that had better be finished: it is given up only when nodes are closed.
    ///
    /// # Errors
    /// As [`Shared::unless_quitting`].
    pub(crate) async fn unless_closing<T>(
        &self,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, QmpError> {
        self.unless(&self.closing, work).await
    }

    async fn unless<T>(
        &self,
        flag: &Cell<bool>,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, QmpError> {
        let given_up = async {
            self.until(flag).await;
            Err(QmpError::generic(ENDING))
        };
        futures_lite::future::or(work, given_up).await
    }

    /// Sends an event to every monitor that has finished its negotiation.
    pub(crate) fn event(&self, name: &'static str, data: Json) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = Timestamp { seconds: now.as_secs(), microseconds: now.subsec_micros() };
        let event = model::to_json(&Event { timestamp, event: name, data });
        for m in self.monitors.borrow().iter() {
            m.event(&event);
        }
    }
}

/// The handle of a control task. Cheap to clone; stays on the task's core.
#[derive(Clone)]
pub struct Control {
    pub(crate) shared: Rc<Shared>,
    jobs: Sender<Job>,
}

impl Control {
    /// Starts a control task with an empty graph. It runs until [`Change::Quit`].
    pub fn start(rt: &Rt, config: Config) -> Control {
        Control::start_with(rt, config, GraphOwner::new(rt.clone()))
    }

    /// The same without access control, for tests that show what it prevents.
    #[doc(hidden)]
    pub fn start_unchecked(rt: &Rt, config: Config) -> Control {
        Control::start_with(rt, config, GraphOwner::unchecked(rt.clone()))
    }

    fn start_with(rt: &Rt, config: Config, owner: GraphOwner) -> Control {
        let drivers: Vec<Branch> = config
            .registry
            .rows()
            .iter()
            .map(|d| Branch { name: d.name, options: d.options, features: &[] })
            .collect();
        let schema = Schema::new(Sources {
            node_options: common_options(),
            drivers: &drivers,
            exports: export::TYPES,
        });
        let introspection = schema.introspection();
        let shared = Rc::new(Shared {
            rt: rt.clone(),
            schema,
            version: Version::current(),
            owner: owner.with_patience(PATIENCE),
            exports: RefCell::default(),
            monitors: RefCell::default(),
            log: config.log,
            jobs: JobTable::default(),
            hurry: Cell::new(false),
            quitting: Cell::new(false),
            closing: Cell::new(false),
            unclean: Cell::new(false),
            ended: Cell::new(false),
            progress: event_listener::Event::new(),
            introspection,
        });
        // As many jobs wait as there are monitors and removals: each waits for its own.
        let (jobs, queue): (Sender<Job>, Receiver<Job>) = async_channel::unbounded();
        rt.spawn(crate::task::run(shared.clone(), config, queue));
        Control { shared, jobs }
    }

    /// The commands and types of this program.
    pub fn schema(&self) -> &Schema {
        &self.shared.schema
    }

    /// The runtime that the task runs on.
    pub fn rt(&self) -> &Rt {
        &self.shared.rt
    }

    /// The snapshot that the last change left.
    pub fn graph(&self) -> Arc<Graph> {
        self.shared.owner.graph()
    }

    /// Executes a checked command: a query at once, a change when its turn comes.
    ///
    /// # Errors
    /// As the command says.
    pub async fn execute(&self, request: &Request) -> Result<Json, QmpError> {
        if let Some(done) = jobs::at_once(&self.shared, request) {
            return done;
        }
        if request.name == "what-if" {
            return match self.supposed(request)? {
                Ok(change) => {
                    self.send(Change::WhatIf(Box::new(change)), request.name, Scope::of(&request.arguments))
                        .await
                }
                Err(why) => Ok(operations::refused(&why)),
            };
        }
        match Change::from_request(request)? {
            Some(Change::Ask(ask)) if ask.is_instant() => ask.carry_out(&self.shared),
            Some(change) => self.send(change, request.name, Scope::of(&request.arguments)).await,
            None => self.query(request),
        }
    }

    /// The change that `what-if` asks about, or the refusal of a command whose arguments make no sense.
    ///
    /// # Errors
    /// When it is no question: there is no such command.
    fn supposed(&self, request: &Request) -> Result<Result<Change, QmpError>, QmpError> {
        let mut o = Options::from_value(request.arguments.clone())?;
        let command = o.require_str("command")?;
        let arguments = match o.take("arguments") {
            Some(v) => dolmen_qmp::json::from_value(&v),
            None => json!({}),
        };
        match command.as_str() {
            "what-if" => return Err(QmpError::generic("what-if asks about commands, not about itself")),
            // Whoever asks has negotiated.
            "qmp_capabilities" => return Ok(Err(already_negotiated())),
            _ => {}
        }
        let (name, arguments) = match self.shared.schema.check_command(&command, arguments, Source::Json) {
            Err(e) if e.class == ErrorClass::CommandNotFound => return Err(e),
            Err(e) => return Ok(Err(e)),
            Ok(checked) => checked,
        };
        let change = Change::from_request(&Request { name, arguments, id: None });
        Ok(change.map(|c| c.unwrap_or(Change::Nothing)).map_err(QmpError::from))
    }

    /// Makes a change and waits for its result.
    ///
    /// # Errors
    /// As the change says; `GenericError` when the program is ending.
    pub async fn change(&self, change: Change) -> Result<Json, QmpError> {
        self.send(change, "a change", Scope::All).await
    }

    async fn send(&self, change: Change, what: &str, scope: Scope) -> Result<Json, QmpError> {
        let ending = || QmpError::generic(ENDING);
        if matches!(change, Change::Quit) {
            self.hurry();
        }
        let (reply, result) = async_channel::bounded(1);
        self.jobs.send(Job { change, what: what.to_owned(), scope, reply }).await.map_err(|_| ending())?;
        result.recv().await.map_err(|_| ending())?
    }

    /// The end is wanted: nobody waits any more for what may take for ever.
    pub(crate) fn hurry(&self) {
        self.shared.raise(&self.shared.hurry);
    }

    /// Whether the end has been asked for.
    pub(crate) fn is_ending(&self) -> bool {
        self.shared.hurry.get()
    }

    /// Completes when the task has begun to end.
    pub async fn quitting(&self) {
        self.shared.until(&self.shared.quitting).await;
    }

    /// Completes when everything is closed.
    pub async fn ended(&self) {
        self.shared.until(&self.shared.ended).await;
    }

    /// Whether some node could not be closed so far: data may be lost, and the program's exit code must say so.
    pub fn is_unclean(&self) -> bool {
        self.shared.unclean.get()
    }

    fn query(&self, request: &Request) -> Result<Json, QmpError> {
        let published = self.shared.published();
        Ok(match request.name {
            "query-version" => self.shared.version.to_json(),
            "query-commands" => {
                self.shared.schema.command_names().map(|name| json!({ "name": name })).collect()
            }
            "query-qmp-schema" => self.shared.introspection.clone(),
            "query-named-block-nodes" => {
                let flat = flag(request, "flat");
                model::to_json(&query::block_nodes(&published.graph, flat))
            }
            "x-debug-query-block-graph" => {
                model::to_json(&query::block_graph(&published.graph, &published.ops))
            }
            "query-block" => model::to_json(&stats::blocks(&published.graph, &published.exports)),
            "query-blockstats" => {
                let nodes = flag(request, "query-nodes");
                let now = self.shared.rt.now();
                model::to_json(&stats::block_stats(&published.graph, &published.exports, nodes, now))
            }
            "query-operations" => {
                operations::list(&published.graph, &published.ops, &published.claims, self.shared.rt.now())
            }
            "query-block-exports" => model::to_json(&published.exports),
            // A row of the command table without code here: a test finds it.
            other => {
                return Err(QmpError::command_not_found(format!("The command {other} has not been found")));
            }
        })
    }
}

/// Whether a request has this argument, and it is true.
fn flag(request: &Request, name: &str) -> bool {
    matches!(&request.arguments, Value::Map(m) if m.iter().any(|(k, v)| k == name && *v == Value::Bool(true)))
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control({:?})", self.graph())
    }
}
