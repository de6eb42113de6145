//! Epochs: when may the place that a mapping used to point to be reused?
//!
//! A `Forward` plan is a lease: somebody is about to read or write a host offset that
//! the driver told it from memory. If the driver frees that place meanwhile, it must
//! not give it to anybody else before the lease has ended. Leases are counted in two
//! slots, for the current and the previous epoch; the epoch can only advance when the
//! previous one has no lease left, so what was freed in epoch `e` is free of leases
//! once the epoch is `e + 2`.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The lease counters of one node.
#[derive(Debug, Default)]
pub struct Epochs {
    current: AtomicU64,
    leases: [AtomicU64; 2],
}

/// A held lease; dropping it ends it.
#[derive(Debug)]
pub struct Lease<'a> {
    slot: &'a AtomicU64,
}

impl Lease<'_> {
    /// Never ends the lease: what it protects is not reused as long as the node is open.
    pub(crate) fn keep(self) {
        let _ = std::mem::ManuallyDrop::new(self);
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.slot.fetch_sub(1, SeqCst);
    }
}

/// The epoch in which something was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Epochs {
    /// Takes a lease. Must happen *before* the plan is made.
    pub fn enter(&self) -> Lease<'_> {
        loop {
            let epoch = self.current.load(SeqCst);
            let slot = &self.leases[(epoch & 1) as usize];
            slot.fetch_add(1, SeqCst);
            // An advance between the load and the add could have taken our slot for
            // drained; then the lease is not counted where `over` looks.
            if self.current.load(SeqCst) == epoch {
                return Lease { slot };
            }
            slot.fetch_sub(1, SeqCst);
        }
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
        let e = Epochs::default();
        let old = e.enter();
        let freed = e.stamp();
        assert!(!e.over(freed));
        let newer = e.enter();
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
    fn a_kept_lease_never_ends() {
        let e = Epochs::default();
        let freed = {
            let lease = e.enter();
            let freed = e.stamp();
            lease.keep();
            freed
        };
        assert!(!e.over(freed));
    }

    #[test]
    fn new_leases_do_not_starve_old_stamps() {
        let e = Epochs::default();
        let freed = e.stamp();
        let mut held = e.enter();
        for _ in 0..4 {
            let next = e.enter();
            held = next;
            e.over(freed);
        }
        drop(held);
        assert!(e.over(freed));
    }
}
