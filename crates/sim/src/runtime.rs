//! The simulated runtime.
//!
//! One thread, one run queue. Of the tasks that can run, the seed chooses the next; when
//! none can, the clock jumps to the next timer. Nothing else moves the clock, so a run
//! takes no real time for waiting and is the same for the same seed, as long as the code
//! under test takes time, randomness and tasks from its handle only.
//!
//! A run in which nobody can run and no timer is set can never go on: it panics with the
//! seed and the number of tasks that wait. So does one that polls for ever.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use dolmen_rt::{CoreIo, Instant, Lane, LocalFuture, Rt, Runtime};

use crate::Random;

/// Polls after which a run counts as a livelock. Far above what any test needs.
const POLLS_MAX: u64 = 3_000_000;

/// The simulated runtime; see the module's head.
#[derive(Debug)]
pub struct Sim;

impl Sim {
    /// Runs the future that `main` makes until it completes, together with the tasks it
    /// starts. What still runs then is dropped, as at a power loss.
    ///
    /// # Panics
    /// When nothing can ever run again although `main` has not completed.
    pub fn run<T, F>(seed: u64, main: impl FnOnce(Rt) -> F) -> T
    where
        F: Future<Output = T> + 'static,
        T: 'static,
    {
        let core = Rc::new_cyclic(|me| Core {
            me: me.clone(),
            seed,
            random: RefCell::new(Random::new(seed)),
            now_ns: Cell::new(0),
            tasks: RefCell::new(Vec::new()),
            free: RefCell::new(Vec::new()),
            ready: Arc::new(Mutex::new(Vec::new())),
            timers: RefCell::new(BTreeMap::new()),
            next_timer: Cell::new(0),
            lane: Lane::take(),
        });
        let rt = Rt::new(core.clone());
        let result = Rc::new(RefCell::new(None));
        let future = main(rt);
        let to = result.clone();
        core.start(Box::pin(async move {
            let value = future.await;
            *to.borrow_mut() = Some(value);
        }));
        let mut polls = 0;
        while result.borrow().is_none() {
            core.turn();
            polls += 1;
            assert!(polls < POLLS_MAX, "simulation with seed {seed} does not come to an end ({polls} polls)");
        }
        core.drop_tasks();
        let value = result.borrow_mut().take();
        value.expect("the loop ends when there is a result")
    }
}

struct Task {
    future: Option<LocalFuture<'static, ()>>,
    waker: Arc<TaskWaker>,
}

struct Core {
    me: Weak<Core>,
    seed: u64,
    random: RefCell<Random>,
    now_ns: Cell<u64>,
    /// Tasks by number; `None` when it has ended and the number is free.
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    /// Numbers of the tasks that can run. Shared with the wakers, which may be kept by
    /// anybody; held for a push or a pop only.
    ready: Arc<Mutex<Vec<Arc<TaskWaker>>>>,
    /// Deadline and a number that makes it unique.
    timers: RefCell<BTreeMap<(u64, u64), Waker>>,
    next_timer: Cell<u64>,
    lane: Lane,
}

struct TaskWaker {
    task: usize,
    /// Whether it is in the run queue, so that it is there once.
    queued: AtomicBool,
    /// The task has ended and its number may belong to another one.
    ended: AtomicBool,
    ready: Arc<Mutex<Vec<Arc<TaskWaker>>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.ended.load(Ordering::Relaxed) && !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().expect("run queue").push(self.clone());
        }
    }
}

impl Core {
    fn start(&self, future: LocalFuture<'static, ()>) {
        let mut tasks = self.tasks.borrow_mut();
        let number = self.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(None);
            tasks.len() - 1
        });
        let waker = Arc::new(TaskWaker {
            task: number,
            queued: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            ready: self.ready.clone(),
        });
        tasks[number] = Some(Task { future: Some(future), waker: waker.clone() });
        waker.wake();
    }

    /// Runs one task once, after jumping to the next timer if none can run.
    fn turn(&self) {
        let Some(next) = self.choose() else {
            self.jump();
            return;
        };
        next.queued.store(false, Ordering::Relaxed);
        let future = match &mut self.tasks.borrow_mut()[next.task] {
            Some(task) if Arc::ptr_eq(&task.waker, &next) => task.future.take(),
            _ => None,
        };
        let Some(mut future) = future else { return };
        let waker = Waker::from(next.clone());
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => {
                if let Some(task) = &mut self.tasks.borrow_mut()[next.task] {
                    task.future = Some(future);
                }
            }
            Poll::Ready(()) => {
                next.ended.store(true, Ordering::Relaxed);
                self.tasks.borrow_mut()[next.task] = None;
                self.free.borrow_mut().push(next.task);
                // Last: dropping it may start tasks.
                drop(future);
            }
        }
    }

    fn choose(&self) -> Option<Arc<TaskWaker>> {
        let mut ready = self.ready.lock().expect("run queue");
        match ready.len() {
            0 => None,
            n => Some(ready.swap_remove(self.random.borrow_mut().below(n as u64) as usize)),
        }
    }

    /// Moves the clock to the next timer and wakes everybody whose time has come.
    fn jump(&self) {
        let mut due = Vec::new();
        {
            let mut timers = self.timers.borrow_mut();
            let Some((&(deadline, _), _)) = timers.first_key_value() else {
                let waiting = self.tasks.borrow().iter().flatten().count();
                panic!(
                    "deadlock in the simulation with seed {} at {} ns: {waiting} tasks wait, \
                     none can run and no timer is set",
                    self.seed,
                    self.now_ns.get()
                );
            };
            self.now_ns.set(deadline);
            while let Some(entry) = timers.first_entry() {
                if entry.key().0 > deadline {
                    break;
                }
                due.push(entry.remove());
            }
        }
        due.into_iter().for_each(Waker::wake);
    }

    /// Drops all tasks; those that are started by doing so as well.
    fn drop_tasks(&self) {
        loop {
            let tasks: Vec<_> = self.tasks.borrow_mut().iter_mut().filter_map(Option::take).collect();
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        self.timers.borrow_mut().clear();
        self.ready.lock().expect("run queue").clear();
    }
}

impl Runtime for Core {
    fn now(&self) -> Instant {
        Instant::from_nanos(self.now_ns.get())
    }

    fn sleep_until(&self, deadline: Instant) -> LocalFuture<'static, ()> {
        Box::pin(Sleep { core: self.me.clone(), deadline_ns: deadline.as_nanos(), key: None })
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.start(task);
    }

    fn random(&self) -> u64 {
        self.random.borrow_mut().u64()
    }

    fn io(&self) -> Option<&CoreIo> {
        None
    }

    fn lane(&self) -> &Lane {
        &self.lane
    }
}

struct Sleep {
    core: Weak<Core>,
    deadline_ns: u64,
    key: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(core) = self.core.upgrade() else { return Poll::Pending };
        if core.now_ns.get() >= self.deadline_ns {
            return Poll::Ready(());
        }
        let key = self.key.unwrap_or_else(|| {
            let number = core.next_timer.get();
            core.next_timer.set(number + 1);
            (self.deadline_ns, number)
        });
        self.key = Some(key);
        core.timers.borrow_mut().insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let (Some(key), Some(core)) = (self.key, self.core.upgrade()) {
            core.timers.borrow_mut().remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The order in which five tasks of three steps each get to run.
    fn order(seed: u64) -> Vec<(u32, u32, u64)> {
        Sim::run(seed, |rt| async move {
            let log = Rc::new(RefCell::new(Vec::new()));
            for task in 0..5 {
                let (rt2, log) = (rt.clone(), log.clone());
                rt.spawn(async move {
                    for step in 0..3 {
                        rt2.sleep(Duration::from_nanos(rt2.random() % 3)).await;
                        log.borrow_mut().push((task, step, rt2.now().as_nanos()));
                    }
                });
            }
            rt.sleep(Duration::from_secs(3600)).await;
            log.take()
        })
    }

    #[test]
    fn a_seed_is_a_schedule() {
        assert_eq!(order(1), order(1));
        assert_eq!(order(1).len(), 15);
        let different = (0..20).map(order).collect::<std::collections::HashSet<_>>();
        assert!(different.len() > 15, "only {} schedules from 20 seeds", different.len());
    }

    #[test]
    fn the_clock_jumps() {
        let real = std::time::Instant::now();
        let virtual_ns = Sim::run(0, |rt| async move {
            rt.sleep(Duration::from_secs(1_000_000)).await;
            rt.now().as_nanos()
        });
        assert_eq!(virtual_ns, 1_000_000_000_000_000);
        assert!(real.elapsed() < Duration::from_secs(60));
    }

    /// Work is done somewhere else: other tasks run before it is, in an order that the seed says.
    #[test]
    fn work_ends_when_the_seed_says() {
        let order = |seed| {
            Sim::run(seed, |rt| async move {
                let done = Rc::new(std::cell::RefCell::new(Vec::new()));
                let finished = Rc::new(event_listener::Event::new());
                for n in 0..5 {
                    let (rt2, done, finished) = (rt.clone(), done.clone(), finished.clone());
                    rt.spawn(async move {
                        let result = rt2.compute(move || n).await;
                        done.borrow_mut().push(result);
                        finished.notify(usize::MAX);
                    });
                }
                while done.borrow().len() < 5 {
                    finished.listen().await;
                }
                done.take()
            })
        };
        assert_eq!(order(1), order(1));
        assert!((0..20).map(order).collect::<std::collections::HashSet<_>>().len() > 10);
    }

    #[test]
    #[should_panic(expected = "deadlock in the simulation with seed 42")]
    fn a_deadlock_is_named() {
        Sim::run(42, |rt| async move {
            rt.spawn(std::future::pending());
            rt.sleep(Duration::from_nanos(5)).await;
            std::future::pending::<()>().await;
        });
    }

    #[test]
    fn a_dropped_sleep_leaves_no_timer() {
        let end = Sim::run(0, |rt| async move {
            let short = rt.sleep(Duration::from_nanos(10));
            let long = rt.sleep(Duration::from_secs(10));
            futures_lite::future::or(short, long).await;
            rt.sleep(Duration::from_nanos(1)).await;
            rt.now().as_nanos()
        });
        assert_eq!(end, 11);
    }

    #[test]
    fn what_still_runs_is_dropped() {
        struct Noisy(Rt, Rc<Cell<u32>>);
        impl Drop for Noisy {
            fn drop(&mut self) {
                self.1.set(self.1.get() + 1);
                let count = self.1.clone();
                // Even a task that is started while everything ends does no harm.
                self.0.spawn(async move { count.set(100) });
            }
        }
        let dropped = Rc::new(Cell::new(0));
        let seen = dropped.clone();
        Sim::run(3, |rt| async move {
            let noisy = Noisy(rt.clone(), seen);
            rt.spawn(async move {
                let _held = noisy;
                std::future::pending::<()>().await;
            });
            rt.sleep(Duration::from_nanos(1)).await;
        });
        assert_eq!(dropped.get(), 1);
    }
}
