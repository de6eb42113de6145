//! Running futures: on the current thread, and on a pool of data-path threads.

use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use dolmen_types::{Error, ErrorKind};

use crate::core::{Core, Mail, Shared, Sleep};
use crate::{Config, CoreIo, Guards, Instant, Lane, LocalFuture, Result, Rt, Runtime};

/// The production runtime of one core.
struct Production {
    io: CoreIo,
}

impl Runtime for Production {
    fn now(&self) -> Instant {
        self.io.core().now()
    }
    fn sleep_until(&self, deadline: Instant) -> LocalFuture<'static, ()> {
        Box::pin(Sleep { core: self.io.core().clone(), deadline, key: None })
    }
    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.io.core().spawn(task);
    }
    fn random(&self) -> u64 {
        self.io.core().random()
    }
    fn io(&self) -> Option<&CoreIo> {
        Some(&self.io)
    }
    fn lane(&self) -> &Lane {
        self.io.core().lane()
    }
}

/// A handle of this core.
pub(crate) fn handle(core: &Rc<Core>) -> Rt {
    Rt::new(Rc::new(Production { io: CoreIo::new(core.clone()) }))
}

/// Runs a future on this thread until it completes, with the configuration of the environment ([`Config::from_env`]).
/// Tasks that it started and that still run then are cancelled; operations in flight are waited for.
///
/// # Panics
/// When the runtime cannot be set up (no descriptors left, or an engine was forced that is not available), and
/// when a runtime is running on this thread already. A panic of any task ends the runtime and comes out here.
pub fn block_on<F, Fut>(f: F) -> Fut::Output
where
    F: FnOnce(Rt) -> Fut,
    Fut: Future + 'static,
    Fut::Output: 'static,
{
    match block_on_with(&Config::from_env(), f) {
        Ok(out) => out,
        Err(e) => panic!("cannot start the runtime: {e}"),
    }
}

/// The same with a configuration.
///
/// # Errors
/// When the engine that the configuration asks for is not available, or descriptors or memory are short.
pub fn block_on_with<F, Fut>(config: &Config, f: F) -> Result<Fut::Output>
where
    F: FnOnce(Rt) -> Fut,
    Fut: Future + 'static,
    Fut::Output: 'static,
{
    let core = Core::new(config)?;
    // Moved about as one pointer: a program's main future may be large.
    let future = Box::pin(f(handle(&core)));
    Ok(core.run(future))
}

/// A core, for other threads.
#[derive(Clone)]
pub struct CoreHandle {
    shared: Arc<Shared>,
}

impl CoreHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> CoreHandle {
        CoreHandle { shared }
    }

    /// Starts a task on that core. When the core has ended, the task is dropped.
    pub fn spawn(&self, task: Box<dyn FnOnce(Rt) -> LocalFuture<'static, ()> + Send>) {
        let _ = self.shared.mailbox.push(Mail::Start(task));
    }

    /// Runs a task on that core and waits for its result. Dropping the future does not stop the task.
    ///
    /// # Errors
    /// `Cancelled` when the core ends first.
    pub fn call<T, F, Fut>(&self, f: F) -> impl Future<Output = Result<T>> + Send + use<T, F, Fut>
    where
        T: Send + 'static,
        F: FnOnce(Rt) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (tx, rx) = oneshot();
        self.spawn(Box::new(move |rt| {
            let future = f(rt);
            Box::pin(async move { tx.send(future.await) })
        }));
        async move {
            rx.await.ok_or_else(|| Error::new(ErrorKind::Cancelled, "the core that ran the task has ended"))
        }
    }
}

impl std::fmt::Debug for CoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CoreHandle")
    }
}

/// Data-path threads, one core each.
#[derive(Debug)]
pub struct Pool {
    cores: Vec<CoreHandle>,
    stops: Vec<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` cores.
    ///
    /// A panic on one of them aborts the process: requests of other tasks are in flight there, and nobody could
    /// say what became of them.
    ///
    /// # Errors
    /// When a thread or its engine cannot be set up; the others have ended then.
    pub fn start(config: &Config, threads: usize) -> Result<Pool> {
        let mut pool = Pool { cores: Vec::new(), stops: Vec::new(), threads: Vec::new() };
        for i in 0..threads {
            let (stop, stopped) = oneshot();
            let (tx, rx) = std::sync::mpsc::sync_channel(1);
            let config = config.clone();
            let thread = std::thread::Builder::new().name(format!("dolmen-core{i}")).spawn(move || {
                let core = match Core::new(&config) {
                    Ok(core) => core,
                    Err(e) => {
                        let _ = tx.send(Err(e));
                        return;
                    }
                };
                let _ = tx.send(Ok(CoreHandle::new(core.shared.clone())));
                let run = std::panic::AssertUnwindSafe(|| {
                    core.run(async move {
                        stopped.await;
                    });
                });
                if std::panic::catch_unwind(run).is_err() {
                    std::process::abort();
                }
            })?;
            pool.threads.push(thread);
            let core =
                rx.recv().map_err(|_| Error::new(ErrorKind::Io, "a data-path thread did not start"))??;
            pool.cores.push(core);
            pool.stops.push(stop);
        }
        Ok(pool)
    }

    /// The cores.
    pub fn cores(&self) -> &[CoreHandle] {
        &self.cores
    }

    /// Ends all cores: tasks that still run are cancelled, operations in flight are waited for. Blocks.
    pub fn shutdown(self) {}
}

impl Drop for Pool {
    fn drop(&mut self) {
        for stop in self.stops.drain(..) {
            stop.send(());
        }
        for thread in self.threads.drain(..) {
            // A panic there has aborted the process.
            let _ = thread.join();
        }
    }
}

enum Slot<T> {
    Empty,
    Waiting(Waker),
    Full(T),
    Closed,
    /// Nobody waits any more; what the request held lives as long as the work that it began.
    Left(Guards),
}

/// One value from one thread to another.
#[derive(Debug)]
pub(crate) struct Sender<T>(Arc<Mutex<Slot<T>>>);
pub(crate) struct Receiver<T>(Arc<Mutex<Slot<T>>>);

impl<T> std::fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slot")
    }
}

pub(crate) fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let slot = Arc::new(Mutex::new(Slot::Empty));
    (Sender(slot.clone()), Receiver(slot))
}

impl<T> Sender<T> {
    fn put(&self, value: Slot<T>) {
        let old = {
            let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
            if matches!(*slot, Slot::Full(_) | Slot::Closed) {
                return;
            }
            std::mem::replace(&mut *slot, value)
        };
        match old {
            Slot::Waiting(waker) => waker.wake(),
            // The guards end here, outside of the lock.
            Slot::Left(guards) => drop(guards),
            Slot::Empty | Slot::Full(_) | Slot::Closed => {}
        }
    }

    pub(crate) fn send(self, value: T) {
        self.put(Slot::Full(value));
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.put(Slot::Closed);
    }
}

/// Whoever gives up waiting leaves its guards to the sender: the work goes on there.
impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let old = {
            let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
            match *slot {
                Slot::Empty | Slot::Waiting(_) => {
                    std::mem::replace(&mut *slot, Slot::Left(Guards::of_given_up()))
                }
                Slot::Full(_) | Slot::Closed | Slot::Left(_) => std::mem::replace(&mut *slot, Slot::Closed),
            }
        };
        drop(old);
    }
}

/// The value, or `None` when the sender is gone.
impl<T> Future for Receiver<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match std::mem::replace(&mut *slot, Slot::Closed) {
            Slot::Full(value) => Poll::Ready(Some(value)),
            Slot::Closed | Slot::Left(_) => Poll::Ready(None),
            Slot::Empty | Slot::Waiting(_) => {
                *slot = Slot::Waiting(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Rt {
    /// The future's result, or `None` when it takes longer than `limit`; it is dropped then.
    pub async fn timeout<T>(&self, limit: std::time::Duration, future: impl Future<Output = T>) -> Option<T> {
        let mut timer = pin!(self.sleep(limit));
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(out) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(out));
            }
            timer.as_mut().poll(cx).map(|()| None)
        })
        .await
    }

    /// Runs a future as a task of its own: dropping the future that is returned does not stop it. For steps that must not
    /// end half-way. What a request holds that is given up meanwhile ([`carry`](crate::carry)) is held until the task has ended.
    pub async fn shielded<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let (tx, rx) = oneshot();
        self.spawn(async move { tx.send(future.await) });
        match rx.await {
            Some(out) => out,
            // The runtime ends, and this future with it.
            None => std::future::pending().await,
        }
    }

    /// Lets other tasks and completions have a turn.
    pub async fn yield_now(&self) {
        yield_now().await;
    }
}

pub(crate) async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
