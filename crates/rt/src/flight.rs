//! What a request leaves behind when it is given up.
//!
//! A request is *in flight* until the storage has done with it, not until its future is gone: what the kernel has been told
//! to write is written, whoever still waits. So whatever protects that write (the count that a drain waits for, the
//! lease of the place that it goes to, a lock) must live as long as the operation, too.
//!
//! It costs nothing while all is well. Whoever holds such a thing during an await wraps the future in [`carry`]. Only when
//! a wrapped future is dropped before its end, the holder turns what it holds into a [`Guard`], and each operation that is
//! orphaned while the future falls apart (in a slot of the core, in the table of a connection, in the simulated disk) takes
//! a share of the guards of *all* the futures around it ([`Guards::of_given_up`]). The guard is dropped, which ends the
//! protection, with the last of these operations; at once, if there is none.
//!
//! Only operations that change something take guards: one that reads, and whose result nobody will see, harms nobody.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Something whose drop ends a protection. It may be dropped on another core than it was made on, and must not wait.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// What is held during a request.
pub trait Hold {
    /// The request has been given up: moves what is held into a guard. What is moved is not held here any more.
    fn leave(&mut self) -> Guard;
}

impl<H: Hold + ?Sized> Hold for &mut H {
    fn leave(&mut self) -> Guard {
        (**self).leave()
    }
}

thread_local! {
    /// The guards of the futures that are being dropped on this thread, outermost first.
    static GIVEN_UP: RefCell<Vec<Guard>> = const { RefCell::new(Vec::new()) };
}

/// The guards that an orphaned operation keeps until it is done.
#[derive(Clone, Default)]
pub struct Guards(Vec<Guard>);

impl Guards {
    /// Those of all requests that are being given up on this thread at this moment; none when nothing is given up.
    pub fn of_given_up() -> Guards {
        // Without the thread's memory the thread is ending, and nothing is in flight on it.
        Guards(GIVEN_UP.try_with(|g| g.borrow().clone()).unwrap_or_default())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Guards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guards({})", self.0.len())
    }
}

/// One guard is on the list while this lives.
struct Listed;

impl Listed {
    fn new(guard: Guard) -> Listed {
        let _ = GIVEN_UP.try_with(|g| g.borrow_mut().push(guard));
        Listed
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // The borrow ends before the guard is dropped: that may do anything.
        let guard = GIVEN_UP.try_with(|g| g.borrow_mut().pop());
        drop(guard);
    }
}

/// A future and what is held while it runs; see [`carry`].
#[must_use = "a future does nothing unless it is awaited"]
pub struct Carry<F, H: Hold> {
    /// Pinned with the whole; dropped in place by `drop` and nowhere else.
    future: ManuallyDrop<F>,
    held: H,
    /// There is nothing that could be left behind: it has ended, or never begun.
    idle: bool,
}

/// Runs `future`. If it is dropped before its end, operations that it leaves in flight keep what `held` leaves for them.
pub const fn carry<F: Future, H: Hold>(future: F, held: H) -> Carry<F, H> {
    Carry { future: ManuallyDrop::new(future), held, idle: true }
}

impl<F: Future, H: Hold + Unpin> Future for Carry<F, H> {
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `future` is not moved out of here: it is only polled below, and dropped in place in `drop`. The other fields
        // are not pinned.
        let this = unsafe { self.get_unchecked_mut() };
        // SAFETY: the whole is pinned, so its part is.
        let future = unsafe { Pin::new_unchecked(&mut *this.future) };
        let out = future.poll(cx);
        this.idle = out.is_ready();
        out
    }
}

impl<F, H: Hold> Drop for Carry<F, H> {
    fn drop(&mut self) {
        let _listed = (!self.idle).then(|| Listed::new(self.held.leave()));
        // SAFETY: dropped here only, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.future) }
    }
}

impl<F, H: Hold> fmt::Debug for Carry<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Carry")
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use futures_lite::future::{block_on, pending, poll_once};

    use super::*;

    /// Counts itself while it is held, by the request or by what it left behind.
    struct Counted(Option<One>);
    struct One(Arc<AtomicU32>);

    impl Counted {
        fn new(count: &Arc<AtomicU32>) -> Counted {
            count.fetch_add(1, SeqCst);
            Counted(Some(One(count.clone())))
        }
    }

    impl Hold for Counted {
        fn leave(&mut self) -> Guard {
            Arc::new(self.0.take().expect("left once"))
        }
    }

    impl Drop for One {
        fn drop(&mut self) {
            self.0.fetch_sub(1, SeqCst);
        }
    }

    /// An operation that is never done, and puts what it takes over into a box.
    struct Operation(Rc<RefCell<Guards>>);

    impl Drop for Operation {
        fn drop(&mut self) {
            *self.0.borrow_mut() = Guards::of_given_up();
        }
    }

    #[test]
    fn an_operation_takes_the_guards_of_all_futures_around_it() {
        let count = Arc::new(AtomicU32::new(0));
        let slot = Rc::new(RefCell::new(Guards::default()));
        let operation = Operation(slot.clone());
        let inner = carry(
            async move {
                let _in_flight = operation;
                pending::<()>().await;
            },
            Counted::new(&count),
        );
        let mut outer = Box::pin(carry(inner, Counted::new(&count)));
        assert!(block_on(poll_once(&mut outer)).is_none());
        assert_eq!(count.load(SeqCst), 2);
        drop(outer);
        assert_eq!((count.load(SeqCst), slot.borrow().0.len()), (2, 2), "the operation has them");
        assert!(Guards::of_given_up().is_empty());
        slot.take();
        assert_eq!(count.load(SeqCst), 0);
    }

    #[test]
    fn nothing_in_flight_keeps_nothing() {
        let count = Arc::new(AtomicU32::new(0));
        let mut waiting = Box::pin(carry(pending::<()>(), Counted::new(&count)));
        assert!(block_on(poll_once(&mut waiting)).is_none());
        drop(waiting);
        // Nor does one that has ended, or has not begun.
        block_on(carry(std::future::ready(()), Counted::new(&count)));
        drop(carry(pending::<()>(), Counted::new(&count)));
        assert_eq!(count.load(SeqCst), 0);
    }
}
