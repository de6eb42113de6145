//! What a command has to give back: the operation that it works under, and nodes that it made writable.
//!
//! An instant command that does I/O publishes an operation of its own first, so that nobody else gets in
//! its way, and takes it out when it is done. That second change can fail, too, and the command can be
//! given up in between; the operation must go all the same, or it would be in everybody's way for ever.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use dolmen_qmp::QmpError;
use dolmen_types::{Error, ErrorKind, NodeName, OpId, Result};

use crate::handle::{ENDING, PATIENCE};
use crate::task::Task;
use crate::turns::Scope;

/// How long after a failed attempt it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What is to be given back, however the command ends: dropping this does it, too, as soon as that
/// is possible.
pub(crate) struct Owed {
    task: Rc<Task>,
    what: Option<What>,
}

struct What {
    op: OpId,
    /// Nodes that were read-only.
    writable: Vec<NodeName>,
}

impl What {
    /// Tries to give it back.
    async fn give_back(&self, task: &Task) -> Result<()> {
        let mut owner = task.owner.clone();
        let mut draft = owner.draft();
        draft.remove_op(&self.op);
        draft.restore_read_only(&self.writable);
        let Err(e) = owner.commit(draft).await else { return Ok(()) };
        if self.writable.is_empty() {
            return Err(e);
        }
        // An image that can't be written out stays writable; nobody else has to wait for that.
        let mut draft = owner.draft();
        draft.remove_op(&self.op);
        owner.commit(draft).await?;
        let nodes: Vec<String> = self.writable.iter().map(|n| format!("'{n}'")).collect();
        let text =
            format!("{} can't be made read-only again (blockdev-reopen tries it again)", nodes.join(", "));
        (task.shared.log)(&e.context(text).to_string());
        Ok(())
    }
}

impl Owed {
    pub(crate) fn new(task: &Rc<Task>, op: OpId, writable: Vec<NodeName>) -> Owed {
        Owed { task: task.clone(), what: Some(What { op, writable }) }
    }

    /// Does what the operation is there for, then gives it back: in a task of its own, so whoever asked for it may go away.
    ///
    /// # Errors
    /// Its own; `TimedOut` when it takes longer than commands wait. It goes on then, guarded by its operation.
    pub(crate) async fn after(
        self,
        work: impl Future<Output = Result<(), QmpError>> + 'static,
    ) -> Result<(), QmpError> {
        let shared = self.task.shared.clone();
        let op = self.what.as_ref().map(|w| w.op.to_string()).unwrap_or_default();
        let (tx, rx) = async_channel::bounded(1);
        let (log, waits) = (shared.log, shared.clone());
        shared.rt.spawn(async move {
            let done = waits.unless_closing(work).await;
            self.give_back().await;
            if let Err(unheard) = tx.try_send(done)
                && let Err(e) = unheard.into_inner()
            {
                log(&format!("'{op}', which took long: {}", e.desc));
            }
        });
        let done = async { rx.recv().await.unwrap_or_else(|_| Err(QmpError::generic(ENDING))) };
        let late = async {
            shared.rt.sleep(PATIENCE.publish).await;
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

    /// Gives it back now. If that can't be now, it is tried again until it can: the
    /// command is none the worse for it.
    pub(crate) async fn give_back(mut self) {
        let Some(what) = &self.what else { return };
        match what.give_back(&self.task).await {
            Ok(()) => self.what = None,
            Err(e) => (self.task.shared.log)(
                &e.context(format!("operation '{}' can't end yet", what.op)).to_string(),
            ),
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let Some(what) = self.what.take() else { return };
        let task = self.task.clone();
        self.task.shared.rt.spawn(async move {
            let again = async {
                loop {
                    let turn =
                        task.turns.queue(format!("the end of '{}'", what.op), Scope::names([&what.op]));
                    turn.come(&task.owner).await;
                    if what.give_back(&task).await.is_ok() {
                        return;
                    }
                    drop(turn);
                    task.shared.rt.sleep(RETRY).await;
                }
            };
            // At the end of the program every operation goes.
            futures_lite::future::or(again, task.shared.until(&task.shared.closing)).await;
        });
    }
}
