//! The task: gives every change its turn, and ends everything in the right order.
//!
//! It waits for nothing but the next thing to do. Each change runs as a task of its own and may wait for
//! storage; those that have to do with each other wait for each other ([`Turns`]).

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use dolmen_exports::NbdServer;
use dolmen_graph::{Draft, GraphEvent, GraphOwner, Notice, Notices, Patience};
use dolmen_jobs::Job as BlockJob;
use dolmen_qmp::QmpError;
use dolmen_rt::put_off;
use dolmen_types::{Error, ErrorKind, OpId};
use serde_json::{Value as Json, json};

use crate::export::stop_server;
use crate::handle::{Config, Job, PATIENCE, Shared};
use crate::turns::{Scope, Turn, Turns};
use crate::{Change, act, commands, jobs, operations};

/// How long the last replies may take to leave, once everything is closed. A client
/// that does not read must not keep the program alive.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long jobs may take to end at the end of the program.
const JOBS_END: Duration = Duration::from_secs(10);

/// How long clients of exports may then take to be disconnected: their requests are answered first.
const CLIENTS_END: Duration = Duration::from_secs(5);

/// How long nodes may take to be closed at last. What is flushed may be much, so that this is long; all of it together
/// is less than service managers wait before they kill.
const NODES_END: Patience =
    Patience { publish: Duration::from_secs(5), close: Some(Duration::from_secs(55)) };

/// How long a draft that is dropped may hold up the answer.
const LET_GO: Duration = Duration::from_secs(1);

/// What commands about the server have in common. No node has such a name.
const SERVER: &str = "\0server";

/// Where the result of a change goes.
pub(crate) type Reply = Sender<Result<Json, QmpError>>;

/// Exports whose clients are gone: their operations can end.
pub(crate) struct Gone {
    pub(crate) ids: Vec<OpId>,
    pub(crate) reply: Option<Reply>,
}

/// What the changes share. Nothing in it is borrowed while anybody waits.
pub(crate) struct Task {
    pub(crate) shared: Rc<Shared>,
    pub(crate) config: Config,
    pub(crate) owner: GraphOwner,
    pub(crate) server: RefCell<Option<Rc<NbdServer>>>,
    pub(crate) turns: Rc<Turns>,
    /// Comes back from what runs beside the task.
    pub(crate) gone: Sender<Gone>,
    /// Jobs whose group is to be looked at.
    pub(crate) attention: Sender<Rc<BlockJob>>,
}

/// Runs until the end is asked for, then closes everything.
pub(crate) async fn run(shared: Rc<Shared>, config: Config, jobs: Receiver<Job>) {
    let (gone, gone_queue) = async_channel::unbounded();
    let (attention, attention_queue) = async_channel::unbounded();
    let owner = shared.owner.clone();
    shared.rt.spawn(announce(shared.clone(), owner.notices()));
    let task = Rc::new(Task {
        shared: shared.clone(),
        config,
        owner,
        server: RefCell::default(),
        turns: Rc::default(),
        gone,
        attention,
    });
    shared.rt.spawn(look_after_exports(task.clone(), gone_queue));
    shared.rt.spawn(look_after_jobs(task.clone(), attention_queue));
    // The handle may be dropped without asking for the end; that is an end, too.
    while let Ok(job) = jobs.recv().await {
        if let Change::Quit = job.change {
            // The reply first: the connection it goes over is closed on the way.
            answer(&job.reply, Ok(json!({})));
            break;
        }
        let task = task.clone();
        // The place in the queue is taken here, in the order in which changes come.
        let turn = task.turn_of(&job);
        shared.rt.spawn(async move { task.apply(job, turn).await });
    }
    shared.hurry.set(true);
    shared.raise(&shared.quitting);
    task.end_jobs().await;
    shared.raise(&shared.closing);
    task.close().await;
    // Whoever still waits gets its refusal now, not at the end of the program.
    jobs.close();
    while let Ok(job) = jobs.try_recv() {
        drop(job);
    }
    let last: Vec<_> = shared.monitors.borrow().iter().cloned().collect();
    let said = async {
        for m in last {
            m.emptied().await;
        }
    };
    futures_lite::future::or(said, shared.rt.sleep(LAST_WORDS)).await;
    shared.raise(&shared.ended);
}

/// Ends the operations of exports whose clients are gone.
async fn look_after_exports(task: Rc<Task>, queue: Receiver<Gone>) {
    // The task holds the sending end, so this ends with the program.
    while let Ok(gone) = queue.recv().await {
        let turn = task.turns.queue("block-export-del".into(), Scope::names(&gone.ids));
        let task = task.clone();
        task.shared.rt.clone().spawn(async move {
            let forgotten = async {
                turn.come(&task.owner).await;
                task.forget_exports(gone).await;
            };
            futures_lite::future::or(forgotten, task.shared.until(&task.shared.closing)).await;
        });
    }
}

/// Moves jobs on whose work has ended.
async fn look_after_jobs(task: Rc<Task>, queue: Receiver<Rc<BlockJob>>) {
    while let Ok(job) = queue.recv().await {
        let turn = task.turns.queue(format!("the end of job '{}'", job.id()), jobs::scope(&job));
        let task = task.clone();
        task.shared.rt.clone().spawn(async move {
            let attended = async {
                turn.come(&task.owner).await;
                task.attend(job).await;
            };
            futures_lite::future::or(attended, task.shared.until(&task.shared.closing)).await;
            drop(turn);
            task.shared.progress.notify(usize::MAX);
        });
    }
}

/// Makes events of what drivers notice by themselves, until everything has ended.
async fn announce(shared: Rc<Shared>, notices: Arc<Notices>) {
    loop {
        let ended = async {
            shared.until(&shared.ended).await;
            None
        };
        let noticed = async { Some(notices.next().await) };
        match futures_lite::future::or(noticed, ended).await {
            None => return,
            Some((node, notice @ Notice::BitmapsInvalid { .. })) => {
                if let Some(warning) = notice.warning(node.as_str()) {
                    (shared.log)(&warning);
                }
                let Notice::BitmapsInvalid { bitmaps } = notice else { continue };
                shared.event(
                    "BLOCK_BITMAPS_INVALIDATED",
                    json!({"node-name": node.as_str(), "bitmaps": bitmaps}),
                );
            }
            Some((node, Notice::Corrupted { message })) => shared.event(
                "BLOCK_IMAGE_CORRUPTED",
                json!({"device": "", "node-name": node.as_str(), "msg": message, "fatal": true}),
            ),
            Some((node, Notice::WriteThreshold { threshold, exceeded })) => shared.event(
                "BLOCK_WRITE_THRESHOLD",
                json!({"node-name": node.as_str(), "amount-exceeded": exceeded, "write-threshold": threshold}),
            ),
        }
    }
}

/// Whoever asked may have gone away; the change stands all the same.
pub(crate) fn answer(reply: &Reply, result: Result<Json, QmpError>) {
    let _ = reply.try_send(result);
}

impl Task {
    /// The place in the queue of a change; `None` for those that need none.
    fn turn_of(&self, job: &Job) -> Option<Turn> {
        // What-if waits for what the command would wait for.
        let (change, asks) = match &job.change {
            Change::WhatIf(inner) => (&**inner, true),
            change => (change, false),
        };
        let scope = match change {
            // What would go is taken out of a draft.
            Change::NbdServerStop if asks => {
                Scope::names(self.shared.exports.borrow().iter().map(|e| e.id.clone()))
            }
            Change::ExportDel { id, .. } if asks => Scope::names([id]),
            // They change nothing in the graph, or only say what is to go: that takes its turn later.
            Change::WhatIf(_)
            | Change::Nothing
            | Change::SetWriteThreshold { .. }
            | Change::NbdServerStop
            | Change::ExportDel { .. } => return None,
            Change::NbdServerStart(_) => Scope::names([SERVER]),
            Change::BlockdevSetActive { node: None, .. } => Scope::All,
            Change::Ask(ask) if ask.is_instant() => return None,
            Change::Ask(ask) => jobs::scope(&ask.job(&self.shared.jobs)?),
            _ => job.scope.clone(),
        };
        Some(self.turns.queue(job.what.clone(), scope))
    }

    /// Waits for a change's turn, but not for ever.
    async fn come(&self, turn: &Turn) -> Result<(), QmpError> {
        let come = async {
            turn.come(&self.owner).await;
            Ok(())
        };
        let late = async {
            self.shared.rt.sleep(PATIENCE.publish).await;
            let other = turn.waits_for(&self.owner).unwrap_or_default();
            let secs = PATIENCE.publish.as_secs();
            let text =
                format!("'{other}' changes the same part of the graph and has not finished within {secs} s");
            Err(Error::new(ErrorKind::TimedOut, text)
                .remedy("look for the storage that does not answer, then try again")
                .into())
        };
        self.shared.unless_quitting(futures_lite::future::or(come, late)).await
    }

    async fn apply(self: &Rc<Self>, Job { change, reply, .. }: Job, turn: Option<Turn>) {
        if let Some(turn) = &turn
            && let Err(e) = self.come(turn).await
        {
            return answer(&reply, Err(e));
        }
        self.describe_jobs();
        let result = match change {
            Change::SetWriteThreshold { node, threshold } => {
                commands::set_write_threshold(self, &node, threshold)
            }
            Change::NbdServerStart(start) => commands::nbd_server_start(self, start).await,
            Change::ExportAdd(add) => commands::export_add(self, add).await,
            // These answer when the clients are gone.
            Change::NbdServerStop => match commands::nbd_server_stop(self, &reply) {
                Ok(()) => return,
                Err(e) => Err(e),
            },
            Change::ExportDel { id, hard } => match commands::export_del(self, &id, hard, &reply) {
                Ok(()) => return,
                Err(e) => Err(e),
            },
            Change::Ask(ask) => jobs::finalize(self, &ask).await,
            Change::ChangeBackingFile { device, image, file } => {
                act::change_backing_file(self, &device, &image, &file).await
            }
            Change::Resize { node, size } => act::block_resize(self, &node, size).await,
            // Publishing the proposal is all that is to be done.
            change @ (Change::BlockdevAdd(_)
            | Change::BlockdevDel { .. }
            | Change::BlockdevReopen(_)
            | Change::BlockdevSetActive { .. }
            | Change::JobStart(_)
            | Change::Drive(_)
            | Change::Snapshot { .. }
            | Change::SnapshotSync(_)
            | Change::OperationBegin(_)
            | Change::OperationEnd { .. }
            | Change::Transaction { .. }
            | Change::Abort
            | Change::Nothing) => act::carry_out(self, change).await,
            Change::WhatIf(inner) => {
                let seen = operations::what_if(self, *inner).await;
                return answer(&reply, Ok(seen));
            }
            // Taken before it comes here; the end has begun already.
            Change::Quit => Ok(()),
        };
        // Whoever is answered may rely on its turn being over.
        drop(turn);
        answer(&reply, result.map(|()| json!({})));
    }

    /// Publishes a draft, unless the end is wanted meanwhile.
    ///
    /// # Errors
    /// As [`GraphOwner::publish`].
    pub(crate) async fn commit(&self, draft: Draft) -> Result<(), QmpError> {
        let mut owner = self.owner.clone();
        let closing = self.shared.unless_quitting(async { Ok(owner.publish(draft).await?) }).await?;
        // It is done: that the end is wanted meanwhile makes no failure of it.
        let hurry = self.shared.until(&self.shared.hurry);
        futures_lite::future::or(closing.ended(), hurry).await;
        Ok(())
    }

    /// Drops a draft that is not published, and waits a little until its files and locks are let go: whoever is answered
    /// finds things as they were.
    pub(crate) async fn let_go(&self, draft: Draft) {
        let ((), late) = put_off(|| drop(draft));
        futures_lite::future::or(late.done(), self.shared.rt.sleep(LET_GO)).await;
    }

    /// What opens nodes as this program is configured.
    pub(crate) fn opener<'a>(&self, rt: &'a dolmen_rt::Rt) -> dolmen_graph::NodeOpener<'a> {
        dolmen_graph::NodeOpener {
            registry: self.config.registry,
            policy: self.config.policy,
            names: crate::image_name,
            rt,
        }
    }

    /// Ends the operations of exports whose clients are gone.
    async fn forget_exports(&self, gone: Gone) {
        let mut draft = self.owner.draft();
        gone.ids.iter().for_each(|id| draft.remove_op(id));
        let is_meant = |id: &OpId| gone.ids.contains(id);
        let result = match self.owner.clone().commit(draft).await {
            Ok(_) => {
                self.shared.exports.borrow_mut().retain(|e| !is_meant(&e.id));
                self.say_deleted(&gone.ids);
                Ok(json!({}))
            }
            // The clients are gone but the operation stands: removing it again tries again.
            Err(e) => {
                let mut exports = self.shared.exports.borrow_mut();
                exports.iter_mut().filter(|e| is_meant(&e.id)).for_each(|e| e.shutting_down = false);
                (self.shared.log)(&e.duplicate().context("an export can't be removed yet").to_string());
                Err(QmpError::from(e))
            }
        };
        self.report_events();
        if let Some(reply) = gone.reply {
            answer(&reply, result);
        }
    }

    fn say_deleted(&self, ids: &[OpId]) {
        for id in ids {
            self.shared.event("BLOCK_EXPORT_DELETED", json!({"id": id.as_str()}));
        }
    }

    /// Tells the log what went wrong while the graph changed; the first one is returned.
    pub(crate) fn report_events(&self) -> Option<QmpError> {
        let mut first = None;
        for event in self.owner.clone().take_events() {
            match event {
                GraphEvent::CloseFailed { node, error } => {
                    let error = error.context(format!("Node '{node}' is closed, but closing it failed"));
                    (self.shared.log)(&error.to_string());
                    self.shared.unclean.set(true);
                    first = first.or(Some(QmpError::from(error)));
                }
            }
        }
        first
    }

    /// Cancels every job and waits for their ends, so that their filters are gone before the
    /// nodes are closed. One that does not end in time is left to the graph, which ends its edges.
    async fn end_jobs(&self) {
        let shared = &self.shared;
        let live = || shared.jobs.all().into_iter().filter(|j| j.group().is_some()).collect::<Vec<_>>();
        live().iter().for_each(BlockJob::give_up);
        let ended = async {
            // Also what is still on its way: it was told that the end is wanted.
            self.turns.idle().await;
            while !live().is_empty() {
                let listener = shared.progress.listen();
                if !live().is_empty() {
                    listener.await;
                }
            }
        };
        futures_lite::future::or(ended, shared.rt.sleep(JOBS_END)).await;
    }

    /// Clients first, then the nodes: what clients wrote is in the nodes when they close.
    async fn close(&self) {
        let shared = &self.shared;
        let names: Vec<String> = shared.exports.borrow().iter().map(|e| e.name.clone()).collect();
        let server = self.server.take();
        if let Some(server) = server {
            futures_lite::future::or(stop_server(server, &names), shared.rt.sleep(CLIENTS_END)).await;
        }
        let closed = self.owner.with_patience(NODES_END).close().await;
        let ids: Vec<OpId> = shared.exports.take().into_iter().map(|e| e.id).collect();
        self.say_deleted(&ids);
        if let Err(e) = closed {
            shared.unclean.set(true);
            (shared.log)(&e.context("closing the images").to_string());
        }
    }
}
