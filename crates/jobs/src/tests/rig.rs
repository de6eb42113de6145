//! A job that reads a disk in memory, a log of its events, and a control task in small.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{
    AccessRule, ClaimScope, Draft, GraphOwner, Implicit, NodeDef, NodeFlags, NodeOpener, OpClaim, OpenPolicy,
    Registry,
};
use dolmen_rt::{LocalFuture, Memory, Rt};
use dolmen_sim::{Image, MEMORY, MemoryDisk, Sim};
use dolmen_types::{
    Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, ReadFlags, Result, Span, Value,
};

use crate::{
    Again, BeginCx, Details, Ending, Group, Job, JobCx, JobEvent, JobKind, JobOptions, JobTable, OnError,
    SettleCx, Side, Wish, Work, launch, nothing_to_change, prepare,
};

/// What happens at a step of the work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    None,
    /// The piece fails once.
    Once(u64, OnError, ErrorKind),
    /// The header can't be written.
    Settle,
}

/// Reads a disk piece by piece.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) pieces: u64,
    pub(super) piece: u64,
    pub(super) fault: Cell<Fault>,
    /// Becomes ready and waits for the user.
    pub(super) ready: bool,
    pub(super) ends: Rc<RefCell<Vec<(String, Ending)>>>,
}

impl Work for Reading {
    fn kind(&self) -> &'static JobKind {
        &crate::stream::STREAM
    }

    fn detail(&self) -> String {
        "reading of 'disk'".into()
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            cx.draft.add_user(cx.op, "disk", Claim { needs: Actions::D, allows: Actions::EVERY })?;
            cx.draft.add_claim(OpClaim {
                op: cx.op.clone(),
                node: NodeName::internal("disk"),
                claim: Claim { needs: Actions::NONE, allows: Actions::EVERY - Actions::S },
                scope: ClaimScope::Node,
                why: "reads it".into(),
                pins: true,
            })
        })
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            cx.set_remaining(self.pieces * self.piece);
            let memory = Memory::zeroed(self.piece as usize);
            let mut i = 0;
            while i < self.pieces {
                cx.checkpoint().await?;
                cx.throttle(self.piece).await?;
                let read = match self.fault.get() {
                    Fault::Once(at, policy, kind) if at == i => {
                        self.fault.set(Fault::None);
                        Err((policy, Error::new(kind, "injected")))
                    }
                    _ => {
                        let token = cx.edge(0).begin().await?;
                        let span = Span::new(i * self.piece, self.piece);
                        token.read(cx.rt())?.read(span, &memory.iovec(), ReadFlags::NONE).await?;
                        Ok(())
                    }
                };
                if let Err((policy, e)) = read
                    && cx.failed(Side::Source, policy, e).await? == Again::Retry
                {
                    continue;
                }
                cx.progress_add(self.piece);
                i += 1;
            }
            if self.ready {
                cx.ready();
                loop {
                    let changed = cx.changed();
                    cx.checkpoint().await?;
                    if cx.wish() != Wish::Nothing {
                        break;
                    }
                    changed.await;
                }
            }
            Ok(())
        })
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let token = cx.edge(0)?.begin().await?;
            token.read(cx.rt)?.flush().await?;
            match self.fault.get() {
                Fault::Settle => Err(Error::new(ErrorKind::NoSpace, "injected")),
                _ => Ok(()),
            }
        })
    }

    fn end(&self, op: &OpId, _: &mut Draft, ending: Ending) -> Result<()> {
        self.ends.borrow_mut().push((op.to_string(), ending));
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, _: Options) -> Result<crate::Effect<'_>> {
        Err(nothing_to_change())
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}

pub(super) struct Rig {
    pub(super) rt: Rt,
    pub(super) owner: GraphOwner,
    pub(super) log: Rc<RefCell<Vec<String>>>,
    pub(super) ends: Rc<RefCell<Vec<(String, Ending)>>>,
    pub(super) table: JobTable,
    queue: Rc<RefCell<Vec<Rc<Job>>>>,
    bell: Rc<event_listener::Event>,
}

pub(super) const SIZE: u64 = 1 << 20;

impl Rig {
    pub(super) fn run<F: Future<Output = ()> + 'static>(seed: u64, test: impl FnOnce(Rig) -> F + 'static) {
        Sim::run(seed, |rt| async move {
            let mut owner = GraphOwner::new(rt.clone());
            let mut draft = owner.draft();
            let name = NodeName::internal("disk");
            draft
                .add_node(NodeDef {
                    name: name.clone(),
                    anonymous: false,
                    kind: &MEMORY,
                    rule: AccessRule::LEAF,
                    flags: NodeFlags::default(),
                    owner: None,
                    monitor: true,
                    options: Value::Null,
                })
                .expect("new");
            draft.set_driver(&name, Arc::new(MemoryDisk::new(Image::new(SIZE))), false);
            owner.commit(draft).await.expect("commits");
            test(Rig {
                rt,
                owner,
                log: Rc::default(),
                ends: Rc::default(),
                table: JobTable::default(),
                queue: Rc::default(),
                bell: Rc::default(),
            })
            .await;
        });
    }

    pub(super) fn work(&self, fault: Fault) -> Reading {
        Reading {
            pieces: 16,
            piece: SIZE / 16,
            fault: Cell::new(fault),
            ready: false,
            ends: self.ends.clone(),
        }
    }

    pub(super) fn job(&self, id: &str, work: impl Work, change: impl FnOnce(&mut JobOptions)) -> Rc<Job> {
        let mut options = JobOptions::new(OpId::internal(id));
        change(&mut options);
        let (log, queue, bell) = (self.log.clone(), self.queue.clone(), self.bell.clone());
        Job::new(
            options,
            Box::new(work),
            &self.rt,
            Rc::new(move |job, event| log.borrow_mut().push(words(job, &event))),
            Rc::new(move |job| {
                queue.borrow_mut().push(job);
                bell.notify(usize::MAX);
            }),
        )
    }

    /// Starts a job alone.
    pub(super) async fn start_one(&mut self, job: &Rc<Job>) -> Result<Rc<Group>> {
        self.start(std::slice::from_ref(job)).await
    }

    /// Starts jobs as one group.
    pub(super) async fn start(&mut self, jobs: &[Rc<Job>]) -> Result<Rc<Group>> {
        let rt = self.rt.clone();
        let opener = NodeOpener {
            registry: Registry::new(&[]),
            policy: OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" },
            names: Registry::protocol_name,
            rt: &rt,
        };
        let mut draft = self.owner.draft();
        for job in jobs {
            prepare(job, &mut draft, &opener).await?;
        }
        self.owner.commit(draft).await?;
        let group = launch(jobs.to_vec(), &self.owner);
        self.table.insert(jobs, group.clone());
        Ok(group)
    }

    /// Plays the control task until the condition holds.
    pub(super) async fn until(&mut self, done: impl Fn() -> bool) {
        while !done() {
            let listener = self.bell.listen();
            let next = self.queue.borrow_mut().pop();
            match next {
                Some(job) => {
                    if let Some(group) = job.group() {
                        group.advance(&mut self.owner).await.expect("publishes");
                    }
                    self.table.sweep();
                }
                None => {
                    let turn = self.rt.sleep(std::time::Duration::from_millis(1));
                    futures_lite::future::or(listener, turn).await;
                }
            }
        }
    }

    /// What has happened since the last call, a word an event.
    pub(super) fn events(&self) -> String {
        self.log.borrow_mut().drain(..).collect::<Vec<_>>().join(" ")
    }
}

fn words(job: &Job, event: &JobEvent) -> String {
    let text = match event {
        JobEvent::Status(s) => s.as_str().to_owned(),
        JobEvent::Ready => "READY".into(),
        JobEvent::Pending => "PENDING".into(),
        JobEvent::Completed(None) => "COMPLETED".into(),
        JobEvent::Completed(Some(e)) => format!("FAILED({e})"),
        JobEvent::Cancelled => "CANCELLED".into(),
        JobEvent::Error { side, action } => format!("ERROR({},{})", side.operation(), action.as_str()),
    };
    format!("{}:{text}", job.id())
}

impl fmt::Debug for Rig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rig({:?})", self.owner)
    }
}
