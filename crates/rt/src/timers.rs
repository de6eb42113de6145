//! Timers of one core: deadlines in order.

use std::collections::BTreeMap;
use std::task::Waker;

use crate::Instant;

/// Identifies a timer: its deadline and a sequence number that keeps equal deadlines in order.
pub(crate) type TimerKey = (Instant, u64);

#[derive(Default)]
pub(crate) struct Timers {
    queue: BTreeMap<TimerKey, Waker>,
    sequence: u64,
}

impl Timers {
    pub(crate) fn insert(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        self.sequence += 1;
        let key = (deadline, self.sequence);
        self.queue.insert(key, waker);
        key
    }

    /// Replaces the waker of a timer that has not fired.
    pub(crate) fn update(&mut self, key: TimerKey, waker: &Waker) {
        if let Some(w) = self.queue.get_mut(&key) {
            w.clone_from(waker);
        }
    }

    pub(crate) fn remove(&mut self, key: TimerKey) {
        self.queue.remove(&key);
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// Takes one timer that is due.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let entry = self.queue.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}
