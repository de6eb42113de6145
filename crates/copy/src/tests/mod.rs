//! The engine and the drivers in the simulated runtime, over disks with latency.

mod cbw;
mod engine;

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{AccessRule, Draft, Driver, GraphOwner, NodeDef, NodeFlags, OpInfo, UserEdge};
use dolmen_rt::{LocalFuture, Memory, Rt};
use dolmen_sim::{DiskConfig, Image, Random, SimDisk};
use dolmen_types::{Actions, Claim, NodeName, OpId, Result, Span, Value, WriteFlags};

use crate::{Failure, Hooks, Moved, Tracker};

/// A disk without a log: writes take their time, in any order.
fn disk(image: Image) -> SimDisk {
    SimDisk::new(image, DiskConfig { log: false, ..DiskConfig::default() })
}

/// Bytes with stretches of data and of holes.
fn patchwork(random: &mut Random, size: u64) -> Image {
    let mut image = Image::new(size);
    let mut at = 0;
    while at < size {
        let len = (random.between(1, 40) * 4096).min(size - at);
        if random.percent(50) {
            let byte = random.between(1, 255) as u8;
            image.write(at, &vec![byte; len as usize]);
        }
        at += len;
    }
    image
}

/// Adds a leaf to a draft.
fn add(draft: &mut Draft, name: &str, driver: impl Driver) {
    let name = NodeName::internal(name);
    draft
        .add_node(NodeDef {
            name: name.clone(),
            anonymous: false,
            kind: driver.kind(),
            rule: AccessRule::LEAF,
            flags: NodeFlags { unmap: true, ..NodeFlags::default() },
            owner: None,
            monitor: true,
            options: Value::Null,
        })
        .unwrap();
    draft.set_driver(&name, Arc::new(driver), false);
}

/// Attaches an operation to a node.
async fn attach(owner: &mut GraphOwner, id: &str, node: &str, needs: Actions) -> Arc<UserEdge> {
    let op = OpId::internal(id);
    let mut draft = owner.draft();
    draft
        .add_op(OpInfo {
            id: op.clone(),
            kind: "tool".into(),
            detail: "a test".into(),
            since: None,
            ends_with: None,
            instead_of_writing: None,
        })
        .unwrap();
    draft.add_user(&op, node, Claim { needs, allows: Actions::EVERY }).unwrap();
    owner.commit(draft).await.unwrap();
    owner.edges(&op).next().expect("attached").clone()
}

/// A random piece of a disk of `size` bytes, with no alignment.
fn piece(random: &mut Random, size: u64, most: u64) -> Span {
    let at = random.below(size);
    Span::new(at, random.between(1, most).min(size - at))
}

/// What a guest does next.
async fn scribble(rt: &Rt, edge: &Arc<UserEdge>, random: &mut Random, span: Span) -> Result<()> {
    let token = edge.begin().await?;
    let io = token.write(rt)?;
    match random.below(4) {
        0 => io.write_zeroes(span, WriteFlags::MAY_UNMAP).await,
        1 => io.discard(span, WriteFlags::NONE).await,
        _ => {
            let bytes = vec![random.between(1, 255) as u8; span.len() as usize];
            io.write(span, &Memory::from_slice(&bytes).iovec(), WriteFlags::NONE).await
        }
    }
}

/// Hooks that let everything through, count, and try everything again.
#[derive(Default)]
struct Count {
    data: Cell<u64>,
    zeroes: Cell<u64>,
    nothing: Cell<u64>,
    failures: RefCell<Vec<Failure>>,
    give_up: bool,
    attention: Cell<bool>,
}

impl Hooks for Count {
    fn throttle(&self, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn moved(&self, span: Span, what: Moved) {
        let counter = match what {
            Moved::Data => &self.data,
            Moved::Zeroes => &self.zeroes,
            Moved::Nothing => &self.nothing,
        };
        counter.set(counter.get() + span.len());
    }

    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let error = failure.error.duplicate();
            self.failures.borrow_mut().push(failure);
            if self.give_up { Err(error) } else { Ok(()) }
        })
    }

    fn attention(&self) -> bool {
        self.attention.get()
    }
}

/// Time for others.
async fn nap(rt: &Rt, random: &mut Random) {
    rt.sleep(Duration::from_nanos(random.below(300_000))).await;
}

/// Whether a shared value's map is done.
fn done(tracker: &Tracker) -> bool {
    tracker.is_done()
}
