//! What commands work on: the graph's owner, exports, their servers, jobs, monitors, and when the end is wanted. It knows no
//! command.
//!
//! Nothing in it is borrowed while anybody waits.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_channel::{Receiver, Sender};
use dolmen_exports::{ExportCx, Servers};
use dolmen_graph::{
    Draft, Graph, GraphEvent, GraphOwner, NodeOpener, OpInfo, OpenPolicy, Patience, Registry,
};
use dolmen_jobs::{Job, JobTable};
use dolmen_qmp::model::{self, BlockExportInfo};
use dolmen_qmp::{Event, QmpError, Schema, Timestamp, Version};
use dolmen_rt::{Rt, put_off};
use dolmen_types::{Error, ErrorKind, OpId};
use serde_json::Value as Json;

use crate::counter::CounterRow;
use crate::export::Export;
use crate::outgoing::Outgoing;
use crate::turns::Turns;

/// What is said to those who come too late.
pub(crate) const ENDING: &str = "The daemon is shutting down";

/// How long a command waits for storage.
pub(crate) const PATIENCE: Patience =
    Patience { publish: Duration::from_secs(30), close: Some(Duration::from_secs(30)) };

/// How long a draft that is dropped may hold up the answer.
const LET_GO: Duration = Duration::from_secs(1);

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

/// The result of a command, or of a step of one that returns nothing.
pub(crate) type Answer = Result<Json, QmpError>;
pub(crate) type Done = Result<(), QmpError>;

/// Exports whose clients are gone: their operations can end.
pub(crate) struct Gone {
    pub(crate) ids: Vec<OpId>,
    /// Where the result goes.
    pub(crate) reply: Sender<Done>,
}

/// Comes back to the task from what runs beside it.
pub(crate) struct Returns {
    pub(crate) gone: Receiver<Gone>,
    pub(crate) attention: Receiver<Rc<Job>>,
}

pub(crate) struct World {
    pub(crate) rt: Rt,
    pub(crate) config: Config,
    pub(crate) schema: Schema,
    /// The reply of `query-qmp-schema`, which never changes.
    pub(crate) introspection: Json,
    pub(crate) version: Version,
    /// Counters of exports beside those that every export has.
    pub(crate) counters: Vec<CounterRow>,
    pub(crate) owner: GraphOwner,
    pub(crate) servers: Servers,
    /// Newest first, as queries list them.
    pub(crate) exports: RefCell<VecDeque<Export>>,
    pub(crate) monitors: RefCell<Vec<Rc<Outgoing>>>,
    /// Every job, so that queries and verbs never wait for the task.
    pub(crate) jobs: JobTable,
    pub(crate) turns: Rc<Turns>,
    pub(crate) gone: Sender<Gone>,
    /// Jobs whose group is to be looked at.
    pub(crate) attention: Sender<Rc<Job>>,
    /// The end is wanted: what may take for ever is given up.
    pub(crate) hurry: Cell<bool>,
    /// The task is asked to end.
    pub(crate) asked_to_end: Cell<bool>,
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
}

impl World {
    /// With an empty graph, and what is to be received for it.
    pub(crate) fn new(
        rt: &Rt,
        config: Config,
        schema: Schema,
        counters: Vec<CounterRow>,
        owner: GraphOwner,
    ) -> (Rc<World>, Returns) {
        // As many wait as there are removals and jobs: each waits for its own.
        let (gone, gone_queue) = async_channel::unbounded();
        let (attention, attention_queue) = async_channel::unbounded();
        let world = World {
            rt: rt.clone(),
            config,
            introspection: schema.introspection(),
            schema,
            version: Version::current(),
            counters,
            owner: owner.with_patience(PATIENCE),
            servers: Servers::default(),
            exports: RefCell::default(),
            monitors: RefCell::default(),
            jobs: JobTable::default(),
            turns: Rc::default(),
            gone,
            attention,
            hurry: Cell::new(false),
            asked_to_end: Cell::new(false),
            quitting: Cell::new(false),
            closing: Cell::new(false),
            unclean: Cell::new(false),
            ended: Cell::new(false),
            progress: event_listener::Event::new(),
        };
        (Rc::new(world), Returns { gone: gone_queue, attention: attention_queue })
    }

    pub(crate) fn log(&self, line: &str) {
        (self.config.log)(line);
    }

    /// The operations, as queries show them.
    pub(crate) fn operations(&self) -> Vec<OpInfo> {
        let mut ops = self.owner.ops();
        for op in &mut ops {
            // What the graph knows of a job's state is as old as the last change.
            if let Some(job) = self.jobs.get(op.id.as_str()) {
                op.detail = job.detail();
            }
        }
        ops
    }

    /// What an export may use.
    pub(crate) fn export_cx(&self) -> ExportCx<'_> {
        ExportCx { rt: &self.rt, servers: &self.servers }
    }

    /// The exports, as queries show them.
    pub(crate) fn exports_of(&self, graph: &Graph) -> Vec<BlockExportInfo> {
        self.exports.borrow().iter().map(|e| e.info(graph)).collect()
    }

    /// Tells the graph what state jobs are in, for messages.
    pub(crate) fn describe_jobs(&self) {
        let mut owner = self.owner.clone();
        for job in self.jobs.all() {
            owner.describe_op(job.id(), &job.detail());
        }
    }

    /// What opens nodes as this program is configured.
    pub(crate) fn opener(&self) -> NodeOpener<'_> {
        NodeOpener {
            registry: self.config.registry,
            policy: self.config.policy,
            names: crate::names::image_name,
            rt: &self.rt,
        }
    }

    /// Sets one of the flags, and wakes who waits for it.
    pub(crate) fn raise(&self, flag: &Cell<bool>) {
        flag.set(true);
        self.progress.notify(usize::MAX);
    }

    /// Has the task end, and everything that waits be given up.
    pub(crate) fn end(&self) {
        self.hurry.set(true);
        self.raise(&self.asked_to_end);
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
    /// As [`World::unless_quitting`]; `TimedOut`.
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
    /// As [`World::unless_quitting`].
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

    /// Publishes a draft, unless the end is wanted meanwhile.
    ///
    /// # Errors
    /// As [`GraphOwner::publish`].
    pub(crate) async fn commit(&self, draft: Draft) -> Done {
        let mut owner = self.owner.clone();
        let closing = self.unless_quitting(async { Ok(owner.publish(draft).await?) }).await?;
        // It is done: that the end is wanted meanwhile makes no failure of it.
        futures_lite::future::or(closing.ended(), self.until(&self.hurry)).await;
        Ok(())
    }

    /// Drops a draft that is not published, and waits a little until its files and locks are released: who is answered
    /// finds things as they were.
    pub(crate) async fn release(&self, draft: Draft) {
        let ((), late) = put_off(|| drop(draft));
        futures_lite::future::or(late.done(), self.rt.sleep(LET_GO)).await;
    }

    /// Tells the log what went wrong while the graph changed; the first one is returned.
    pub(crate) fn report_events(&self) -> Option<QmpError> {
        let mut first = None;
        for event in self.owner.clone().take_events() {
            match event {
                GraphEvent::CloseFailed { node, error } => {
                    let error = error.context(format!("Node '{node}' is closed, but closing it failed"));
                    self.log(&error.to_string());
                    self.unclean.set(true);
                    first = first.or(Some(QmpError::from(error)));
                }
            }
        }
        first
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
