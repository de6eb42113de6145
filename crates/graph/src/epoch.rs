//! Epochs: when may the place that a mapping used to point to be reused?
//!
//! A `Forward` plan is a lease: somebody is about to read or write a host offset that
//! the driver told it from memory. If the driver frees that place meanwhile, it must
//! not give it to anybody else before the lease has ended. Leases are counted in two
//! slots, for the current and the previous epoch; the epoch can only advance when the
//! previous one has no lease left, so what was freed in epoch `e` is free of leases
//! once the epoch is `e + 2`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use dolmen_rt::{Guard, Hold};

use crate::NodeState;

/// The lease counters of one node.
#[derive(Debug, Default)]
pub struct Epochs {
    current: AtomicU64,
    leases: [AtomicU64; 2],
}

/// A held lease; dropping it ends it.
#[derive(Debug)]
pub struct Lease<'a> {
    state: &'a Arc<NodeState>,
    /// `None` once it has been left to somebody else.
    slot: Option<u8>,
}

impl<'a> Lease<'a> {
    #[inline]
    pub(crate) fn new(state: &'a Arc<NodeState>) -> Lease<'a> {
        Lease { state, slot: Some(state.epochs.enter()) }
    }

    /// The same lease, for longer than the request.
    pub(crate) fn keep(mut self) -> KeptLease {
        self.take()
    }

    fn take(&mut self) -> KeptLease {
        KeptLease { state: self.state.clone(), slot: self.slot.take() }
    }
}

impl Drop for Lease<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.state.epochs.leave(slot);
        }
    }
}

/// What a request was told may still be used by what it left in flight.
impl Hold for Lease<'_> {
    fn leave(&mut self) -> Guard {
        Arc::new(self.take())
    }
}

/// A lease of a request that was given up: ends with its last operation.
#[derive(Debug)]
pub(crate) struct KeptLease {
    state: Arc<NodeState>,
    slot: Option<u8>,
}

impl Drop for KeptLease {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.state.epochs.leave(slot);
        }
    }
}

/// The epoch in which something was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Epochs {
    /// Counts a lease. Must happen *before* the plan is made.
    fn enter(&self) -> u8 {
        loop {
            let epoch = self.current.load(SeqCst);
            let slot = (epoch & 1) as u8;
            self.leases[usize::from(slot)].fetch_add(1, SeqCst);
            // An advance between the load and the add could have taken our slot for
            // drained; then the lease is not counted where `over` looks.
            if self.current.load(SeqCst) == epoch {
                return slot;
            }
            self.leave(slot);
        }
    }

    /// Ends a lease.
    fn leave(&self, slot: u8) {
        self.leases[usize::from(slot)].fetch_sub(1, SeqCst);
    }

    /// The stamp for something freed now (after its mapping is gone from memory).
    pub fn stamp(&self) -> Stamp {
        Stamp(self.current.load(SeqCst))
    }

    /// Whether every lease taken up to `stamp` has ended. Advances the epoch as far as
    /// that is possible and needed.
    pub fn over(&self, stamp: Stamp) -> bool {
        loop {
            let epoch = self.current.load(SeqCst);
            if epoch >= stamp.0 + 2 {
                return true;
            }
            if self.leases[((epoch + 1) & 1) as usize].load(SeqCst) != 0 {
                return false;
            }
            // Lost races are fine: somebody else advanced.
            let _ = self.current.compare_exchange(epoch, epoch + 1, SeqCst, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_over_while_its_lease_lives() {
        let node = Arc::new(NodeState::default());
        let e = &node.epochs;
        let old = node.lease();
        let freed = e.stamp();
        assert!(!e.over(freed));
        let newer = node.lease();
        assert!(!e.over(freed));
        drop(old);
        // `newer` was taken after one advance at most; it does not hold up `freed`
        // unless it is in the same epoch.
        let later = e.stamp();
        drop(newer);
        assert!(e.over(freed));
        assert!(e.over(later));
    }

    #[test]
    fn a_kept_lease_ends_later() {
        let node = Arc::new(NodeState::default());
        let (kept, freed) = {
            let lease = node.lease();
            let freed = node.epochs.stamp();
            (lease.keep(), freed)
        };
        assert!(!node.epochs.over(freed));
        drop(kept);
        assert!(node.epochs.over(freed));
    }

    #[test]
    fn new_leases_do_not_starve_old_stamps() {
        let node = Arc::new(NodeState::default());
        let e = &node.epochs;
        let freed = e.stamp();
        let mut held = node.lease();
        for _ in 0..4 {
            let next = node.lease();
            held = next;
            e.over(freed);
        }
        drop(held);
        assert!(e.over(freed));
    }
}
