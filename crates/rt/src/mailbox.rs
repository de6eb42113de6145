//! Messages from other threads to a core, and the protocol that wakes it.
//!
//! A core owns everything it works with, so other threads reach it in one way only: they put a message in its
//! mailbox. The state says whether the core has to be told:
//!
//! ```text
//!            prepare_sleep            push: writes the eventfd
//!   AWAKE ----------------> SLEEPING ----------------------+
//!     ^  ^------------------    |                          v
//!     |        awake            +-- (same) -----------> NOTIFIED
//!     +-------------------- drain <-------------------------'
//! ```
//!
//! Invariant: a message in the queue implies that the state is `NOTIFIED` or that its sender is about to make
//! it so; a core goes to sleep only from `AWAKE`, in one atomic step. So no wake-up is lost, and an eventfd is
//! written only for a core that sleeps. The model checker `loom` runs this file's protocol (see the tests).

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicU8, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicU8, Ordering},
};

const AWAKE: u8 = 0;
const SLEEPING: u8 = 1;
const NOTIFIED: u8 = 2;

/// How a sleeping core is woken: in production a write to its eventfd.
pub(crate) trait Bell {
    /// Wakes the core, or makes its next attempt to sleep return at once.
    fn ring(&self);
}

/// The mailbox of one core.
pub(crate) struct Mailbox<M, B> {
    /// Protects the messages only; never held across anything that waits. `None` once the core is gone.
    queue: Mutex<Option<Vec<M>>>,
    state: AtomicU8,
    bell: B,
}

impl<M, B: Bell> Mailbox<M, B> {
    pub(crate) fn new(bell: B) -> Mailbox<M, B> {
        Mailbox { queue: Mutex::new(Some(Vec::new())), state: AtomicU8::new(AWAKE), bell }
    }

    pub(crate) fn bell(&self) -> &B {
        &self.bell
    }

    /// Delivers a message; gives it back when the core is gone.
    pub(crate) fn push(&self, message: M) -> Result<(), M> {
        match &mut *self.queue.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(q) => q.push(message),
            None => return Err(message),
        }
        if self.state.swap(NOTIFIED, Ordering::AcqRel) == SLEEPING {
            self.bell.ring();
        }
        Ok(())
    }

    /// Whether there is something to drain.
    pub(crate) fn notified(&self) -> bool {
        self.state.load(Ordering::Acquire) == NOTIFIED
    }

    /// Takes all messages (the core's thread only). The buffer is swapped, so that steady traffic allocates
    /// nothing.
    pub(crate) fn drain(&self, into: &mut Vec<M>) {
        debug_assert!(into.is_empty());
        // Before the queue is taken: a message that comes later notifies again.
        self.state.swap(AWAKE, Ordering::AcqRel);
        if let Some(q) = &mut *self.queue.lock().unwrap_or_else(|e| e.into_inner()) {
            std::mem::swap(q, into);
        }
    }

    /// Announces sleep (the core's thread only). False when there is mail: do not sleep.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, SLEEPING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Announces that the core is awake again (the core's thread only).
    pub(crate) fn awake(&self) {
        // A failure means NOTIFIED, which stays until the mail is drained.
        let _ = self.state.compare_exchange(SLEEPING, AWAKE, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Refuses messages from now on and returns what is left.
    pub(crate) fn close(&self) -> Vec<M> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner()).take().unwrap_or_default()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    struct Channel(mpsc::SyncSender<()>);
    impl Bell for Channel {
        fn ring(&self) {
            let _ = self.0.try_send(());
        }
    }

    /// Four senders against a core that sleeps whenever it may: every message arrives.
    #[test]
    fn no_wake_up_is_lost() {
        const EACH: u32 = 20_000;
        let (tx, rx) = mpsc::sync_channel(1);
        let mailbox = Arc::new(Mailbox::new(Channel(tx)));
        let senders: Vec<_> = (0..4)
            .map(|_| {
                let m = mailbox.clone();
                std::thread::spawn(move || (0..EACH).for_each(|i| m.push(i).unwrap()))
            })
            .collect();
        let (mut got, mut batch) = (0, Vec::new());
        while got < 4 * EACH {
            if mailbox.prepare_sleep() {
                rx.recv().unwrap();
            }
            mailbox.awake();
            mailbox.drain(&mut batch);
            got += batch.drain(..).count() as u32;
        }
        senders.into_iter().for_each(|s| s.join().unwrap());
        assert_eq!(got, 4 * EACH);
        mailbox.close();
        assert_eq!(mailbox.push(7), Err(7));
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p dolmen-rt --lib loom_` runs every interleaving.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex as LoomMutex};

    #[derive(Default)]
    struct Event(Arc<(LoomMutex<bool>, Condvar)>);
    impl Bell for Event {
        fn ring(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }
    }

    #[test]
    fn loom_no_wake_up_is_lost() {
        loom::model(|| {
            let event = Event(Arc::new((LoomMutex::new(false), Condvar::new())));
            let wait = event.0.clone();
            let mailbox = Arc::new(Mailbox::new(event));
            let senders: Vec<_> = (0..2)
                .map(|i| {
                    let m = mailbox.clone();
                    loom::thread::spawn(move || m.push(i).unwrap())
                })
                .collect();
            let mut got = Vec::new();
            while got.len() < 2 {
                if mailbox.prepare_sleep() {
                    let mut rung = wait.0.lock().unwrap();
                    while !*rung {
                        rung = wait.1.wait(rung).unwrap();
                    }
                    *rung = false;
                }
                mailbox.awake();
                let mut batch = Vec::new();
                mailbox.drain(&mut batch);
                got.append(&mut batch);
            }
            senders.into_iter().for_each(|s| s.join().unwrap());
        });
    }
}
