//! The task: gives every change its turn, and ends everything in the right order.
//!
//! It waits for nothing but the next thing to do. Each change runs as a task of its own and may wait for
//! storage; those that have to do with each other wait for each other ([`Turns`](crate::turns::Turns)).

use std::rc::Rc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use dolmen_exports::{Drained, StopMode};
use dolmen_graph::Patience;
use dolmen_jobs::Job;
use dolmen_qmp::QmpError;
use dolmen_types::{Error, ErrorKind, OpId};
use serde_json::json;

use crate::act::{self, Act, Wait};
use crate::jobs;
use crate::notices;
use crate::turns::{Scope, Turn};
use crate::world::{Answer, Done, Gone, PATIENCE, Returns, World};

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

/// A change on its way to the task, and where its result goes.
pub(crate) struct Order {
    pub(crate) act: Box<dyn Act>,
    /// The command, for messages.
    pub(crate) what: String,
    /// What its arguments name.
    pub(crate) scope: Scope,
    pub(crate) reply: Sender<Answer>,
}

/// Runs until the end is asked for, then closes everything.
pub(crate) async fn run(world: Rc<World>, returns: Returns, orders: Receiver<Order>) {
    world.rt.spawn(notices::announce(world.clone(), world.owner.notices()));
    world.rt.spawn(look_after_exports(world.clone(), returns.gone));
    world.rt.spawn(look_after_jobs(world.clone(), returns.attention));
    loop {
        let end = async {
            world.until(&world.asked_to_end).await;
            None
        };
        // The handle may be dropped without asking for the end; that is an end, too.
        let next = futures_lite::future::or(end, async { orders.recv().await.ok() }).await;
        let Some(order) = next else { break };
        // The place in the queue is taken here, in the order in which changes come.
        let turn = turn_of(&world, &order);
        world.rt.spawn(apply(world.clone(), order, turn));
    }
    world.hurry.set(true);
    world.raise(&world.quitting);
    end_jobs(&world).await;
    world.raise(&world.closing);
    close(&world).await;
    // What still waits is refused now, not at the end of the program.
    orders.close();
    while let Ok(order) = orders.try_recv() {
        drop(order);
    }
    let last: Vec<_> = world.monitors.borrow().iter().cloned().collect();
    let said = async {
        for m in last {
            m.emptied().await;
        }
    };
    futures_lite::future::or(said, world.rt.sleep(LAST_WORDS)).await;
    world.raise(&world.ended);
}

/// Ends the operations of exports whose clients are gone.
async fn look_after_exports(world: Rc<World>, queue: Receiver<Gone>) {
    // The world holds the sending end, so this ends with the program.
    while let Ok(gone) = queue.recv().await {
        let turn = world.turns.queue("block-export-del".into(), Scope::names(&gone.ids));
        let world = world.clone();
        world.rt.clone().spawn(async move {
            let forgotten = async {
                turn.come(&world.owner).await;
                forget_exports(&world, gone).await;
            };
            futures_lite::future::or(forgotten, world.until(&world.closing)).await;
        });
    }
}

/// Moves jobs on whose work has ended.
async fn look_after_jobs(world: Rc<World>, queue: Receiver<Rc<Job>>) {
    while let Ok(job) = queue.recv().await {
        let turn = world.turns.queue(format!("the end of job '{}'", job.id()), jobs::scope(&job));
        let world = world.clone();
        world.rt.clone().spawn(async move {
            let attended = async {
                turn.come(&world.owner).await;
                jobs::attend(&world, job).await;
            };
            futures_lite::future::or(attended, world.until(&world.closing)).await;
            drop(turn);
            world.progress.notify(usize::MAX);
        });
    }
}

/// The place in the queue of a change; `None` for those that need none.
fn turn_of(world: &World, order: &Order) -> Option<Turn> {
    let scope = match order.act.wait(world) {
        Wait::Nothing => return None,
        Wait::Named => order.scope.clone(),
        Wait::For(scope) => scope,
    };
    Some(world.turns.queue(order.what.clone(), scope))
}

/// Waits for a change's turn, but not for ever.
async fn come(world: &World, turn: &Turn) -> Done {
    let come = async {
        turn.come(&world.owner).await;
        Ok(())
    };
    let late = async {
        world.rt.sleep(PATIENCE.publish).await;
        let other = turn.waits_for(&world.owner).unwrap_or_default();
        let secs = PATIENCE.publish.as_secs();
        let text =
            format!("'{other}' changes the same part of the graph and has not finished within {secs} s");
        Err(Error::new(ErrorKind::TimedOut, text)
            .remedy("look for the storage that does not answer, then try again")
            .into())
    };
    world.unless_quitting(futures_lite::future::or(come, late)).await
}

async fn apply(world: Rc<World>, order: Order, turn: Option<Turn>) {
    let Order { act, reply, .. } = order;
    let done = async {
        if let Some(turn) = &turn {
            come(&world, turn).await?;
        }
        act::carry_out(&world, act).await
    };
    let answer = done.await;
    // A client that is answered may rely on its turn being over.
    drop(turn);
    // The client may have gone away; the change stands all the same.
    let _ = reply.try_send(answer);
}

/// Ends the operations of exports whose clients are gone.
async fn forget_exports(world: &World, gone: Gone) {
    let mut draft = world.owner.draft();
    gone.ids.iter().for_each(|id| draft.remove_op(id));
    let is_meant = |id: &OpId| gone.ids.contains(id);
    let result = match world.owner.clone().commit(draft).await {
        Ok(_) => {
            world.exports.borrow_mut().retain(|e| !is_meant(&e.id));
            say_deleted(world, &gone.ids);
            Ok(())
        }
        // The clients are gone but the operation stands: removing it again tries again.
        Err(e) => {
            let mut exports = world.exports.borrow_mut();
            exports.iter_mut().filter(|e| is_meant(&e.id)).for_each(|e| e.shutting_down = false);
            world.log(&e.duplicate().context("an export can't be removed yet").to_string());
            Err(QmpError::from(e))
        }
    };
    world.report_events();
    let _ = gone.reply.try_send(result);
}

/// Raises the event of exports that are gone.
fn say_deleted(world: &World, ids: &[OpId]) {
    for id in ids {
        world.event("BLOCK_EXPORT_DELETED", json!({"id": id.as_str()}));
    }
}

/// Cancels every job and waits for their ends, so that their filters are gone before the
/// nodes are closed. One that does not end in time is left to the graph, which ends its edges.
async fn end_jobs(world: &World) {
    let live = || world.jobs.all().into_iter().filter(|j| j.group().is_some()).collect::<Vec<_>>();
    live().iter().for_each(Job::give_up);
    let ended = async {
        // Also what is still on its way: it was told that the end is wanted.
        world.turns.idle().await;
        while !live().is_empty() {
            let listener = world.progress.listen();
            if !live().is_empty() {
                listener.await;
            }
        }
    };
    futures_lite::future::or(ended, world.rt.sleep(JOBS_END)).await;
}

/// Clients first, then the nodes: what clients wrote is in the nodes when they close.
async fn close(world: &World) {
    // All stop accepting before the first is waited for.
    let servers = world.servers.take_all();
    let mut waits: Vec<Drained> = servers.iter().map(|s| s.stop()).collect();
    waits.extend(world.exports.borrow().iter().filter_map(|e| e.serving.stop(StopMode::Hard).ok()));
    let drained = async {
        for wait in waits {
            wait.await;
        }
    };
    futures_lite::future::or(drained, world.rt.sleep(CLIENTS_END)).await;
    let closed = world.owner.with_patience(NODES_END).close().await;
    let ids: Vec<OpId> = world.exports.take().into_iter().map(|e| e.id).collect();
    say_deleted(world, &ids);
    if let Err(e) = closed {
        world.unclean.set(true);
        world.log(&e.context("closing the images").to_string());
    }
}
