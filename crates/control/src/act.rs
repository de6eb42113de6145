//! What a command is once its arguments are read: an [`Act`] on a [`World`], or an [`Edit`] of its graph.
//!
//! Every command is a *proposal* first, which finds out everything that can be said against it and changes nothing outside
//! of its draft. The three things that can be done with a command are three short functions over the same proposal, so
//! they can't disagree:
//!
//! - [`carry_out`]: publish the draft, then perform what comes after that;
//! - a transaction: several edits in one draft, published in one commit (`commands/transaction.rs`);
//! - [`what_if`]: rehearse the publication, and drop the draft.
//!
//! What a command does beside the graph (an export offered, a header written) comes after its proposal, and has no
//! refusals of its own. New images are stand-ins in the draft; publishing it makes the files.

use std::future::Future;
use std::rc::Rc;

use dolmen_graph::{Draft, Graph, NodeOpener};
use dolmen_qmp::{QmpError, model};
use dolmen_rt::LocalFuture;
use dolmen_types::{NodeName, OpId};
use serde_json::{Value as Json, json};

use crate::guard::Guard;
use crate::jobs::{JobStart, Started};
use crate::query;
use crate::turns::Scope;
use crate::world::{Answer, Done, World};

/// What a command waits for before it is carried out, and before `what-if` asks about it.
pub(crate) enum Wait {
    /// Nothing: it changes nothing in the graph, or only says what is to go, which takes its turn later.
    Nothing,
    /// Changes of the part of the graph that its arguments name.
    Named,
    /// Changes of this part.
    For(Scope),
}

/// A command that does more than its draft says, or is done beside the task. There are no default methods: who adds a
/// command has to think about each.
pub(crate) trait Act {
    /// What it waits for.
    fn wait(&self, world: &World) -> Wait;

    /// Puts it into the draft. Nothing outside the draft changes, and nothing that is found out later refuses it.
    ///
    /// # Errors
    /// Why it can't be; the draft is then of no more use.
    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done>;

    /// Does the rest, once the draft is published. The guard is what the proposal asked for; it is
    /// released when it is dropped.
    ///
    /// # Errors
    /// What could not be known before: a disk error, for example.
    fn perform(self: Box<Self>, world: Rc<World>, guard: Option<Guard>) -> LocalFuture<'static, Answer>;
}

/// A command that is done when its draft is published, and waits for what its arguments name. Only such a command can be
/// part of a transaction.
pub(crate) trait Edit {
    /// As [`Act::propose`].
    ///
    /// # Errors
    /// As [`Act::propose`].
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done>;
}

/// An edit as an act.
pub(crate) struct Publish(Option<Box<dyn Edit>>);

impl Publish {
    pub(crate) fn new(edit: Box<dyn Edit>) -> Publish {
        Publish(Some(edit))
    }
}

impl Act for Publish {
    fn wait(&self, _: &World) -> Wait {
        Wait::Named
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        match self.0.take() {
            Some(edit) => edit.propose(p),
            None => Box::pin(async { Ok(()) }),
        }
    }

    fn perform(self: Box<Self>, _: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async { Ok(json!({})) })
    }
}

/// What a command proposes: a draft, the jobs that it starts, and the guard under which it is performed.
pub(crate) struct Proposal<'w> {
    pub(crate) world: &'w Rc<World>,
    /// Begun when it is needed: a command that drafts nothing publishes nothing.
    draft: Option<Draft>,
    jobs: Vec<Started>,
    /// Jobs end together.
    grouped: bool,
    /// The operation that stays until the command has been performed, and nodes that were made writable for it.
    guard: Option<(OpId, Vec<NodeName>)>,
}

impl<'w> Proposal<'w> {
    pub(crate) fn new(world: &'w Rc<World>) -> Proposal<'w> {
        Proposal { world, draft: None, jobs: Vec::new(), grouped: false, guard: None }
    }

    pub(crate) fn draft(&mut self) -> &mut Draft {
        self.draft.get_or_insert_with(|| {
            // Refusals say what jobs do now.
            self.world.describe_jobs();
            self.world.owner.draft()
        })
    }

    pub(crate) fn opener(&self) -> NodeOpener<'w> {
        self.world.opener()
    }

    /// Puts a job into the draft.
    ///
    /// # Errors
    /// Why the job can't be.
    pub(crate) async fn start(&mut self, start: JobStart) -> Done {
        let world = self.world;
        let started = Started::in_draft(world, self.draft(), start).await?;
        self.jobs.push(started);
        Ok(())
    }

    /// Has the jobs end together: all of them successfully, or none.
    pub(crate) fn group(&mut self) {
        self.grouped = true;
    }

    /// Keeps an operation of the draft, with nodes that were made writable for it, until the command has been performed.
    pub(crate) fn guard(&mut self, op: OpId, writable: Vec<NodeName>) {
        self.guard = Some((op, writable));
    }

    /// Asks whether every operation allows what the draft holds, takes the locks that it needs, and takes the operation
    /// out that guarded it: of a command that is done when the draft is published.
    ///
    /// # Errors
    /// The solver's, or `Locked`.
    pub(crate) async fn settle(&mut self, op: &OpId) -> Done {
        let opener = self.opener();
        let draft = self.draft();
        // What is about to go must not be in the way.
        draft.sweep();
        draft.prepare(opener.rt).await?;
        // What is cut off is gone for overlays that are not read now, too: they show zeroes there from now on.
        let shrunk = draft.shrunk()?;
        if !shrunk.is_empty() {
            draft.mark_destructive(op)?;
            for node in &shrunk {
                draft.claim_other_data(op, node, "cuts off its end")?;
            }
            draft.solve()?;
        }
        draft.remove_op(op);
        Ok(())
    }

    /// Publishes the draft, if there is one, and sets its jobs to work.
    async fn publish(self) -> Result<Option<Guard>, QmpError> {
        let Proposal { world, draft, jobs, grouped, guard } = self;
        let Some(mut draft) = draft else { return Ok(None) };
        if let Some((op, _)) = &guard {
            draft.mark_started(op);
        }
        world.commit(draft).await?;
        let guard = guard.map(|(op, nodes)| Guard::new(world, op, nodes));
        if grouped {
            Started::launch(jobs, world);
        } else {
            jobs.into_iter().for_each(|job| Started::launch(vec![job], world));
        }
        Ok(guard)
    }

    /// The graph that it would leave. What it would be guarded by is gone by then.
    async fn rehearse(&mut self) -> Result<Graph, QmpError> {
        if let Some((op, writable)) = self.guard.take() {
            let draft = self.draft();
            draft.remove_op(&op);
            draft.restore_read_only(&writable);
        }
        let owner = &self.world.owner;
        Ok(owner.rehearse(self.draft.get_or_insert_with(|| owner.draft())).await?)
    }

    /// Drops it, and waits a little until what it has opened and locked is released.
    async fn release(self) {
        if let Some(draft) = self.draft {
            self.world.release(draft).await;
        }
    }
}

/// Makes a proposal, publishes it, and performs what comes after that.
pub(crate) async fn carry_out(world: &Rc<World>, mut act: Box<dyn Act>) -> Answer {
    let mut p = Proposal::new(world);
    // A server may not answer. Dropping the draft on the way out closes what was opened.
    if let Err(e) = world.patiently(act.propose(&mut p)).await {
        p.release().await;
        return Err(e);
    }
    let done_by_publishing = p.draft.is_some() && p.guard.is_none();
    let guard = p.publish().await?;
    let answer = act.perform(world.clone(), guard).await?;
    if done_by_publishing && let Some(e) = world.report_events() {
        return Err(e);
    }
    Ok(answer)
}

/// Does what a guard is there for, and releases it.
///
/// # Errors
/// The work's own; `TimedOut` when it takes longer than commands wait.
pub(crate) async fn guarded(guard: Option<Guard>, work: impl Future<Output = Done> + 'static) -> Answer {
    match guard {
        Some(guard) => guard.during(work).await?,
        None => work.await?,
    }
    Ok(json!({}))
}

/// Carries out a command that publishes nothing: its draft only tells whether it can be done.
pub(crate) async fn at_once(world: &Rc<World>, mut act: Box<dyn Act>) -> Answer {
    let mut p = Proposal::new(world);
    act.propose(&mut p).await?;
    drop(p);
    act.perform(world.clone(), None).await
}

/// The graph that a command would leave, or why it would be refused. It is found out by doing the command up to the point
/// where something changes.
pub(crate) async fn what_if(world: &Rc<World>, mut act: Box<dyn Act>) -> Json {
    let mut p = Proposal::new(world);
    let rehearsed = async {
        act.propose(&mut p).await?;
        p.rehearse().await
    };
    let said = match world.patiently(rehearsed).await {
        Ok(graph) => {
            let graph = model::to_json(&query::block_graph(&graph));
            let mut out = json!({"allowed": true, "graph": graph});
            if let Some(e) = p.jobs.iter().find_map(|s| s.fails.as_ref()) {
                out["job-error"] = e.to_json();
            }
            out
        }
        Err(e) => refused(&e),
    };
    p.release().await;
    said
}

/// The reply of `what-if` about a command that is refused.
pub(crate) fn refused(why: &QmpError) -> Json {
    json!({"allowed": false, "error": why.to_json()})
}

/// A job is started by publishing the draft that it is in.
impl Edit for JobStart {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { p.start(*self).await })
    }
}
