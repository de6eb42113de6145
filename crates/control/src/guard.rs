//! The guard of a command that does I/O behind its proposal: the operation that it works under, and nodes that it made
//! writable.
//!
//! Such a command publishes an operation of its own first, so that nothing else gets in its way, and takes it out when it
//! is done. That second change can fail, too, and the command can be given up in between; the operation must go all the
//! same, or it would be in the way for ever. So the guard is released however the command ends.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use dolmen_qmp::QmpError;
use dolmen_types::{Error, ErrorKind, NodeName, OpId, Result};

use crate::turns::Scope;
use crate::world::{Done, ENDING, PATIENCE, World};

/// How long after a failed attempt it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What is released however the command ends: dropping this does it, too, as soon as that is possible.
pub(crate) struct Guard {
    world: Rc<World>,
    what: Option<What>,
}

struct What {
    op: OpId,
    /// Nodes that were read-only.
    writable: Vec<NodeName>,
}

impl What {
    /// Tries to release it.
    async fn release(&self, world: &World) -> Result<()> {
        let mut owner = world.owner.clone();
        let mut draft = owner.draft();
        draft.remove_op(&self.op);
        draft.restore_read_only(&self.writable);
        let Err(e) = owner.commit(draft).await else { return Ok(()) };
        if self.writable.is_empty() {
            return Err(e);
        }
        // An image that can't be written out stays writable; no other command has to wait for that.
        let mut draft = owner.draft();
        draft.remove_op(&self.op);
        owner.commit(draft).await?;
        let nodes: Vec<String> = self.writable.iter().map(|n| format!("'{n}'")).collect();
        let text =
            format!("{} can't be made read-only again (blockdev-reopen tries it again)", nodes.join(", "));
        world.log(&e.context(text).to_string());
        Ok(())
    }
}

impl Guard {
    pub(crate) fn new(world: &Rc<World>, op: OpId, writable: Vec<NodeName>) -> Guard {
        Guard { world: world.clone(), what: Some(What { op, writable }) }
    }

    /// Does what the operation is there for, then releases it: in a task of its own, so the caller may go away.
    ///
    /// # Errors
    /// Its own; `TimedOut` when it takes longer than commands wait. It goes on then, guarded by its operation.
    pub(crate) async fn during(self, work: impl Future<Output = Done> + 'static) -> Done {
        let world = self.world.clone();
        let op = self.what.as_ref().map(|w| w.op.to_string()).unwrap_or_default();
        let (tx, rx) = async_channel::bounded(1);
        let waits = world.clone();
        world.rt.spawn(async move {
            let done = waits.unless_closing(work).await;
            self.release().await;
            if let Err(unheard) = tx.try_send(done)
                && let Err(e) = unheard.into_inner()
            {
                waits.log(&format!("'{op}', which took long: {}", e.desc));
            }
        });
        let done = async { rx.recv().await.unwrap_or_else(|_| Err(QmpError::generic(ENDING))) };
        let late = async {
            world.rt.sleep(PATIENCE.publish).await;
            let secs = PATIENCE.publish.as_secs();
            let text = format!(
                "it has not finished within {secs} s; it goes on, and query-operations lists it until it has"
            );
            Err(Error::new(ErrorKind::TimedOut, text)
                .remedy("look for the storage that does not answer")
                .into())
        };
        let done = futures_lite::future::or(done, late).await;
        rx.close();
        done
    }

    /// The operation stays.
    pub(crate) fn keep(mut self) {
        self.what = None;
    }

    /// Releases it now. If that can't be now, it is tried again until it can: the
    /// command is none the worse for it.
    pub(crate) async fn release(mut self) {
        let Some(what) = &self.what else { return };
        match what.release(&self.world).await {
            Ok(()) => self.what = None,
            Err(e) => {
                self.world.log(&e.context(format!("operation '{}' can't end yet", what.op)).to_string())
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(what) = self.what.take() else { return };
        let world = self.world.clone();
        self.world.rt.spawn(async move {
            let again = async {
                loop {
                    let turn =
                        world.turns.queue(format!("the end of '{}'", what.op), Scope::names([&what.op]));
                    turn.come(&world.owner).await;
                    if what.release(&world).await.is_ok() {
                        return;
                    }
                    drop(turn);
                    world.rt.sleep(RETRY).await;
                }
            };
            // At the end of the program every operation goes.
            futures_lite::future::or(again, world.until(&world.closing)).await;
        });
    }
}
