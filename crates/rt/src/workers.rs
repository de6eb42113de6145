//! Bounded pools of threads for calls that may block.
//!
//! They belong to the process, not to a core: the number of threads that wait for disks must not grow with the
//! number of cores. Threads start on demand and end when nothing came for a while.
//!
//! A call says what it waits for, and there is a pool for each such thing. A file system whose server is gone takes the
//! threads of its own pool for as long as it is gone, and nobody else's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// More calls wait in the queue. Threads that wait for a disk cost little; this many keep one busy.
const MAX_THREADS: usize = 32;
/// After this time without work a thread ends.
const IDLE: Duration = Duration::from_secs(5);

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// What a call that may block waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaitsFor {
    /// A disk, or whoever serves a file system: its device number.
    Device(u64),
    /// A peer on the network, by a number that its address has.
    Peer(u64),
    /// Whoever knows the addresses of names.
    Names,
    /// Nobody but this host and its user.
    Host,
    /// The processor: work, and no waiting.
    Processor,
}

impl WaitsFor {
    /// Threads for such calls at most. Those that wait cost little, those that work need a processor each.
    fn threads(self) -> usize {
        match self {
            WaitsFor::Device(_) | WaitsFor::Peer(_) | WaitsFor::Names | WaitsFor::Host => MAX_THREADS,
            WaitsFor::Processor => {
                std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS)
            }
        }
    }
}

struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

struct Pool {
    /// Protects the queue and the counts; never held while a job runs.
    state: Mutex<State>,
    work: Condvar,
}

/// The pools that have threads.
static POOLS: Mutex<Option<HashMap<WaitsFor, Arc<Pool>>>> = Mutex::new(None);

fn pools() -> MutexGuard<'static, Option<HashMap<WaitsFor, Arc<Pool>>>> {
    POOLS.lock().unwrap_or_else(|e| e.into_inner())
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Runs the job on some thread, soon; behind others that wait for the same only.
pub(crate) fn submit(what: WaitsFor, job: Job) {
    // Both locks at once, here and where a pool ends: a pool that is found goes on.
    let mut all = pools();
    let pool = all.get_or_insert_default().entry(what).or_insert_with(|| {
        let state = State { queue: VecDeque::new(), threads: 0, idle: 0 };
        Arc::new(Pool { state: Mutex::new(state), work: Condvar::new() })
    });
    let pool = pool.clone();
    let mut s = pool.state();
    drop(all);
    s.queue.push_back(job);
    if s.queue.len() <= s.idle {
        pool.work.notify_one();
        return;
    }
    if s.threads < what.threads() {
        s.threads += 1;
        drop(s);
        let at = pool.clone();
        let started = std::thread::Builder::new().name("dolmen-io".into()).spawn(move || work(what, &at));
        if started.is_err() {
            // The job stays in the queue; some other thread takes it. Without any thread at all it must run here,
            // or nobody would ever answer.
            let mut s = pool.state();
            s.threads -= 1;
            let job = if s.threads == 0 { s.queue.pop_front() } else { None };
            drop(s);
            if let Some(job) = job {
                job();
            }
        }
    }
}

fn work(what: WaitsFor, pool: &Arc<Pool>) {
    let mut s = pool.state();
    loop {
        while let Some(job) = s.queue.pop_front() {
            drop(s);
            job();
            s = pool.state();
        }
        s.idle += 1;
        let (guard, timeout) = pool.work.wait_timeout(s, IDLE).unwrap_or_else(|e| e.into_inner());
        s = guard;
        s.idle -= 1;
        if timeout.timed_out() && s.queue.is_empty() {
            drop(s);
            let mut all = pools();
            s = pool.state();
            if !s.queue.is_empty() {
                continue;
            }
            s.threads -= 1;
            if s.threads == 0 {
                all.as_mut().and_then(|pools| pools.remove(&what));
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_answer_takes_its_own_threads_only() {
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (done, results) = std::sync::mpsc::channel();
        for _ in 0..3 * MAX_THREADS {
            let (gate, done) = (gate.clone(), done.clone());
            submit(
                WaitsFor::Device(u64::MAX),
                Box::new(move || {
                    // All of them wait until the sender is gone.
                    let _ = gate.lock().expect("not poisoned").recv();
                    done.send(true).expect("somebody waits");
                }),
            );
        }
        for other in [
            WaitsFor::Device(u64::MAX - 1),
            WaitsFor::Peer(7),
            WaitsFor::Names,
            WaitsFor::Host,
            WaitsFor::Processor,
        ] {
            let done = done.clone();
            submit(other, Box::new(move || done.send(false).expect("somebody waits")));
            assert!(!results.recv().expect("done"), "{other:?} has waited for something else");
        }
        let threads = pools().as_ref().expect("pools")[&WaitsFor::Device(u64::MAX)].state().threads;
        assert_eq!(threads, MAX_THREADS);
        drop(release);
        for _ in 0..3 * MAX_THREADS {
            assert!(results.recv().expect("done"));
        }
    }
}
