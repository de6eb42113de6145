//! Counters of one core, there from the first day: they show what a change costs.

use std::cell::Cell;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one core has done so far. Differences of two readings are what a workload cost.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Default)]
        pub(crate) struct Stats {
            $(pub(crate) $name: Cell<u64>,)*
        }

        impl Stats {
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.get(),)* }
            }
        }

        impl std::ops::Sub for Counters {
            type Output = Counters;
            fn sub(self, earlier: Counters) -> Counters {
                Counters { $($name: self.$name.wrapping_sub(earlier.$name),)* }
            }
        }

        impl std::ops::Add for Counters {
            type Output = Counters;
            fn add(self, other: Counters) -> Counters {
                Counters { $($name: self.$name.wrapping_add(other.$name),)* }
            }
        }
    };
}

counters! {
    /// System calls of the loop: io_uring_enter, or epoll_wait and epoll_ctl.
    enters,
    /// Operations handed to the kernel's ring.
    submissions,
    /// Operations that completed through the ring.
    completions,
    /// Operations that went to the thread pool.
    pool_jobs,
    /// Socket system calls made directly (thread engine only).
    direct_calls,
    /// Task polls.
    polls,
    /// Batches of mail from other threads.
    wakeups,
    /// Times that the loop went to sleep in the kernel.
    sleeps,
    /// Times that the loop looked at the completion queue for a while before it slept.
    spins,
    /// Of these, how often something came.
    spin_hits,
    /// Reads that the page cache answered without the ring.
    inline_reads,
    /// Reads that tried the page cache in vain.
    inline_misses,
    /// Bytes that Dolmen itself copied between buffers (bounce buffers).
    bytes_copied,
}

pub(crate) fn bump(cell: &Cell<u64>) {
    cell.set(cell.get().wrapping_add(1));
}
