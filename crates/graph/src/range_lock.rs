//! An asynchronous lock over byte ranges: metadata changes of one node exclude each
//! other only where they overlap.
//!
//! First come, first served among overlapping ranges. The inner mutex protects the list
//! only and is never held across an await.

use std::sync::Mutex;

use dolmen_types::Span;
use event_listener::Event;

/// A lock over byte ranges.
#[derive(Debug, Default)]
pub struct RangeLock {
    inner: Mutex<Inner>,
    released: Event,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// Held and waiting ranges in the order of arrival.
    entries: Vec<(u64, Span)>,
}

/// A held (or awaited) range; dropping it lets the next one in.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut inner = self.lock.inner.lock().expect("range list");
        inner.entries.retain(|(t, _)| *t != self.ticket);
        let waiting = !inner.entries.is_empty();
        drop(inner);
        if waiting {
            self.lock.released.notify(usize::MAX);
        }
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    /// Waits until no earlier holder or waiter overlaps `span`. Dropping the future
    /// gives up the place in the queue.
    pub async fn lock(&self, span: Span) -> RangeGuard<'_> {
        let ticket = {
            let mut inner = self.inner.lock().expect("range list");
            let ticket = inner.next;
            inner.next += 1;
            inner.entries.push((ticket, span));
            ticket
        };
        // From here on the guard removes the entry, also when the future is dropped.
        let guard = RangeGuard { lock: self, ticket };
        loop {
            if self.is_first(ticket, span) {
                return guard;
            }
            let listener = self.released.listen();
            if self.is_first(ticket, span) {
                return guard;
            }
            listener.await;
        }
    }

    /// Whether anybody holds or awaits a range that overlaps `span`.
    pub fn is_locked(&self, span: Span) -> bool {
        self.inner.lock().expect("range list").entries.iter().any(|(_, s)| s.overlaps(span))
    }

    fn is_first(&self, ticket: u64, span: Span) -> bool {
        let inner = self.inner.lock().expect("range list");
        !inner.entries.iter().any(|(t, s)| *t < ticket && s.overlaps(span))
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{block_on, poll_once};

    use super::*;

    #[test]
    fn overlapping_ranges_wait_in_order() {
        block_on(async {
            let lock = RangeLock::new();
            let a = lock.lock(Span::new(0, 10)).await;
            let b = lock.lock(Span::new(10, 10)).await;
            let mut c = std::pin::pin!(lock.lock(Span::new(5, 10)));
            assert!(poll_once(&mut c).await.is_none());
            let mut d = std::pin::pin!(lock.lock(Span::new(0, 6)));
            assert!(poll_once(&mut d).await.is_none());
            drop(a);
            assert!(poll_once(&mut c).await.is_none(), "b still overlaps c");
            assert!(poll_once(&mut d).await.is_none(), "c came before d");
            drop(b);
            let c = poll_once(&mut c).await.expect("c is first now");
            drop(c);
            assert!(poll_once(&mut d).await.is_some());
        });
    }

    #[test]
    fn a_dropped_waiter_leaves_the_queue() {
        block_on(async {
            let lock = RangeLock::new();
            let a = lock.lock(Span::new(0, 10)).await;
            {
                let mut b = std::pin::pin!(lock.lock(Span::new(0, 10)));
                assert!(poll_once(&mut b).await.is_none());
            }
            drop(a);
            assert!(!lock.is_locked(Span::new(0, 10)));
        });
    }
}
