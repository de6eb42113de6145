//! The runtime handle: one of the two seams between Dolmen and the world.

use std::fmt;
use std::future::Future;
use std::ops::{Add, Sub};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// A boxed future that stays on the core it was made on.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A point on the runtime's monotonic clock, in nanoseconds since an arbitrary start.
///
/// Not `std::time::Instant`, so that the simulation can make them up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Instant(u64);

impl Instant {
    /// The point `ns` nanoseconds after the clock's start.
    pub const fn from_nanos(ns: u64) -> Instant {
        Instant(ns)
    }

    /// Nanoseconds since the clock's start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero when that lies in the future.
    pub const fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, d: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.since(earlier)
    }
}

/// What a runtime does for the code above it. Implemented by the executor of this
/// crate and by the simulation.
///
/// All futures stay on the core that the handle belongs to.
pub trait Runtime: 'static {
    /// The monotonic clock.
    fn now(&self) -> Instant;
    /// A future that completes at `deadline`; dropping it forgets the timer.
    fn sleep_until(&self, deadline: Instant) -> LocalFuture<'static, ()>;
    /// Starts a task on this core. It runs until it completes or the runtime ends.
    fn spawn(&self, task: LocalFuture<'static, ()>);
    /// A random number; reproducible in the simulation, not for secrets.
    fn random(&self) -> u64;
    /// Files and sockets of this core; `None` in the simulation.
    fn io(&self) -> Option<&crate::CoreIo>;
    /// Where this core counts: the same for all handles of the core.
    fn lane(&self) -> &crate::Lane;
}

/// Handle of the current core's runtime. Cheap to clone, not `Send`.
#[derive(Clone)]
pub struct Rt(Rc<dyn Runtime>);

impl Rt {
    /// A handle of this runtime.
    pub fn new(runtime: Rc<dyn Runtime>) -> Rt {
        Rt(runtime)
    }

    /// The monotonic clock.
    pub fn now(&self) -> Instant {
        self.0.now()
    }

    /// Completes at `deadline`; dropping the future forgets the timer.
    pub fn sleep_until(&self, deadline: Instant) -> LocalFuture<'static, ()> {
        self.0.sleep_until(deadline)
    }

    /// Completes after `d`.
    pub fn sleep(&self, d: Duration) -> LocalFuture<'static, ()> {
        self.0.sleep_until(self.now() + d)
    }

    /// Starts a task on this core. It runs until it completes or the runtime ends.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.spawn(Box::pin(task));
    }

    /// A random number; reproducible in the simulation, not for secrets.
    pub fn random(&self) -> u64 {
        self.0.random()
    }

    /// Files and sockets of this core; `None` in the simulation.
    pub fn io(&self) -> Option<&crate::CoreIo> {
        self.0.io()
    }

    /// Where this core counts.
    pub fn lane(&self) -> &crate::Lane {
        self.0.lane()
    }

    /// Does work that takes the processor for more than a few microseconds (decompression, encryption, digests)
    /// where it holds up no other request of this core, and waits for the result. Dropping the future does not stop
    /// work that has begun, which therefore owns what it needs. In the simulation it takes a reproducible time and is done
    /// in between other tasks, as its result is elsewhere.
    pub async fn compute<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        match self.io() {
            Some(io) => io.compute(f).await,
            None => {
                let ns = self.random() % SIMULATED_WORK_NS;
                self.sleep(Duration::from_nanos(ns)).await;
                f()
            }
        }
    }
}

/// Work takes less than this in the simulation.
const SIMULATED_WORK_NS: u64 = 50_000;

impl fmt::Debug for Rt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rt(now {:?})", self.now())
    }
}
