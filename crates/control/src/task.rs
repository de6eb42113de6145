//! The task: takes changes one by one, and ends everything in the right order.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use dolmen_exports::NbdServer;
use dolmen_graph::{GraphEvent, GraphOwner, Notice, Notices};
use dolmen_jobs::Job as BlockJob;
use dolmen_qmp::QmpError;
use dolmen_types::OpId;
use serde_json::{Value as Json, json};

use crate::export::{Export, stop_server};
use crate::handle::{Config, Job, Published, Shared};
use crate::{Change, act, commands, jobs, operations, reopen};

/// How long the last replies may take to leave, once everything is closed. A client
/// that does not read must not keep the program alive.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long jobs may take to end at the end of the program.
const JOBS_END: Duration = Duration::from_secs(30);

/// Where the result of a change goes.
pub(crate) type Reply = Sender<Result<Json, QmpError>>;

/// Exports whose clients are gone: their operations can end.
pub(crate) struct Gone {
    pub(crate) ids: Vec<OpId>,
    pub(crate) reply: Option<Reply>,
}

/// Everything that only the task touches.
pub(crate) struct Task {
    pub(crate) shared: Rc<Shared>,
    pub(crate) config: Config,
    pub(crate) owner: GraphOwner,
    /// Newest first, as queries list them.
    pub(crate) exports: VecDeque<Export>,
    pub(crate) server: Option<Rc<NbdServer>>,
    /// Comes back from what runs beside the task.
    pub(crate) gone: Sender<Gone>,
    /// Jobs whose group is to be looked at.
    pub(crate) attention: Sender<Rc<BlockJob>>,
}

enum Next {
    Job(Job),
    Gone(Gone),
    Attention(Rc<BlockJob>),
}

/// Runs until the end is asked for, then closes everything.
pub(crate) async fn run(shared: Rc<Shared>, config: Config, owner: GraphOwner, jobs: Receiver<Job>) {
    let (gone, gone_queue) = async_channel::unbounded();
    let (attention, attention_queue) = async_channel::unbounded();
    shared.rt.spawn(announce(shared.clone(), owner.notices()));
    let mut task = Task {
        shared: shared.clone(),
        config,
        owner,
        exports: VecDeque::new(),
        server: None,
        gone,
        attention,
    };
    // The handle may be dropped without asking for the end; that is an end, too.
    while let Some(next) = next(&jobs, &gone_queue, &attention_queue).await {
        match next {
            Next::Gone(g) => task.forget_exports(g).await,
            Next::Attention(job) => task.attend(job).await,
            Next::Job(Job { change: Change::Quit, reply }) => {
                // The reply first: the connection it goes over is closed on the way.
                answer(&reply, Ok(json!({})));
                break;
            }
            Next::Job(job) => task.apply(job).await,
        }
    }
    shared.quitting.set(true);
    shared.progress.notify(usize::MAX);
    task.end_jobs(&attention_queue).await;
    task.close(&gone_queue).await;
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
    shared.ended.set(true);
    shared.progress.notify(usize::MAX);
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

async fn next(
    jobs: &Receiver<Job>,
    gone: &Receiver<Gone>,
    attention: &Receiver<Rc<BlockJob>>,
) -> Option<Next> {
    let job = async { jobs.recv().await.ok().map(Next::Job) };
    let gone = async { gone.recv().await.ok().map(Next::Gone) };
    let attention = async { attention.recv().await.ok().map(Next::Attention) };
    futures_lite::future::or(gone, futures_lite::future::or(attention, job)).await
}

/// Whoever asked may have gone away; the change stands all the same.
pub(crate) fn answer(reply: &Reply, result: Result<Json, QmpError>) {
    let _ = reply.try_send(result);
}

impl Task {
    async fn apply(&mut self, Job { change, reply }: Job) {
        self.describe_jobs();
        let result = match change {
            Change::BlockdevAdd(options) => commands::blockdev_add(self, options).await,
            Change::BlockdevDel { node } => commands::blockdev_del(self, &node).await,
            Change::SetWriteThreshold { node, threshold } => {
                commands::set_write_threshold(self, &node, threshold)
            }
            Change::BlockdevReopen(list) => reopen::blockdev_reopen(self, list).await,
            Change::BlockdevSetActive { node, active } => {
                reopen::blockdev_set_active(self, node.as_deref(), active).await
            }
            Change::NbdServerStart(start) => commands::nbd_server_start(self, start).await,
            Change::ExportAdd(add) => commands::export_add(self, add).await,
            // These answer when the clients are gone.
            Change::NbdServerStop => match commands::nbd_server_stop(self, &reply) {
                Ok(()) => return self.publish(),
                Err(e) => Err(e),
            },
            Change::ExportDel { id, hard } => match commands::export_del(self, &id, hard, &reply) {
                Ok(()) => return self.publish(),
                Err(e) => Err(e),
            },
            Change::JobStart(start) => jobs::start(self, start).await,
            Change::JobFinalize { id, block } => jobs::finalize(self, &id, block).await,
            Change::ChangeBackingFile { device, image, file } => {
                act::change_backing_file(self, &device, &image, &file).await
            }
            Change::Resize { node, size } => act::block_resize(self, &node, size).await,
            change @ (Change::Drive(_)
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
        self.publish();
        answer(&reply, result.map(|()| json!({})));
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
    pub(crate) async fn forget_exports(&mut self, gone: Gone) {
        let mut draft = self.owner.draft();
        gone.ids.iter().for_each(|id| draft.remove_op(id));
        let result = match self.owner.commit(draft).await {
            Ok(_) => {
                self.exports.retain(|e| !gone.ids.contains(&e.id));
                self.publish();
                for id in &gone.ids {
                    self.shared.event("BLOCK_EXPORT_DELETED", json!({"id": id.as_str()}));
                }
                Ok(json!({}))
            }
            // The clients are gone but the operation stands: removing it again tries again.
            Err(e) => {
                self.exports
                    .iter_mut()
                    .filter(|e| gone.ids.contains(&e.id))
                    .for_each(|e| e.shutting_down = false);
                self.publish();
                Err(QmpError::from(e))
            }
        };
        self.report_events();
        if let Some(reply) = gone.reply {
            answer(&reply, result);
        }
    }

    /// Makes the state of things visible to queries.
    pub(crate) fn publish(&self) {
        *self.shared.published.borrow_mut() = Rc::new(Published {
            graph: self.owner.graph().clone(),
            ops: self.owner.ops().to_vec(),
            claims: self.owner.claims().to_vec(),
            exports: self.exports.iter().map(|e| e.info(self.owner.graph())).collect(),
        });
    }

    /// Tells the log what went wrong while the graph changed; the first one is returned.
    pub(crate) fn report_events(&mut self) -> Option<QmpError> {
        let mut first = None;
        for event in self.owner.take_events() {
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
    async fn end_jobs(&mut self, attention: &Receiver<Rc<BlockJob>>) {
        let shared = self.shared.clone();
        let live = || shared.jobs.all().into_iter().filter(|j| j.group().is_some()).collect::<Vec<_>>();
        live().iter().for_each(BlockJob::give_up);
        let deadline = shared.rt.now() + JOBS_END;
        while !live().is_empty() {
            let job = async { attention.recv().await.ok() };
            let late = async {
                shared.rt.sleep_until(deadline).await;
                None
            };
            match futures_lite::future::or(job, late).await {
                Some(job) => self.attend(job).await,
                None => return,
            }
        }
    }

    /// Clients first, then the nodes: what clients wrote is in the nodes when they close.
    async fn close(&mut self, gone_queue: &Receiver<Gone>) {
        let names: Vec<String> = self.exports.iter().map(|e| e.name.clone()).collect();
        if let Some(server) = self.server.take() {
            stop_server(server, &names).await;
        }
        // Removals that were under way when the end was asked for.
        while let Ok(g) = gone_queue.try_recv() {
            self.forget_exports(g).await;
        }
        let ids = self.exports.iter().map(|e| e.id.clone()).collect();
        self.forget_exports(Gone { ids, reply: None }).await;
        if let Err(e) = self.owner.close().await {
            self.shared.unclean.set(true);
            (self.shared.log)(&e.context("closing the images").to_string());
        }
        self.exports.clear();
        self.publish();
    }
}
