//! A bounded pool of threads for calls that may block.
//!
//! It belongs to the process, not to a core: the number of threads that wait for disks must not grow with the
//! number of cores. Threads start on demand and end when nothing came for a while.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// More calls wait in the queue. Threads that wait for a disk cost little; this many keep one busy.
const MAX_THREADS: usize = 32;
/// After this time without work a thread ends.
const IDLE: Duration = Duration::from_secs(5);

pub(crate) type Job = Box<dyn FnOnce() + Send>;

struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

struct Workers {
    /// Protects the queue and the counts; never held while a job runs.
    state: Mutex<State>,
    work: Condvar,
}

static WORKERS: Workers = Workers {
    state: Mutex::new(State { queue: VecDeque::new(), threads: 0, idle: 0 }),
    work: Condvar::new(),
};

/// Runs the job on some thread, soon.
pub(crate) fn submit(job: Job) {
    let mut s = WORKERS.state.lock().unwrap_or_else(|e| e.into_inner());
    s.queue.push_back(job);
    if s.queue.len() <= s.idle {
        WORKERS.work.notify_one();
        return;
    }
    if s.threads < MAX_THREADS {
        s.threads += 1;
        drop(s);
        let started = std::thread::Builder::new().name("dolmen-io".into()).spawn(work);
        if started.is_err() {
            // The job stays in the queue; some other thread takes it. Without any thread at all it must run here,
            // or nobody would ever answer.
            let mut s = WORKERS.state.lock().unwrap_or_else(|e| e.into_inner());
            s.threads -= 1;
            let job = if s.threads == 0 { s.queue.pop_front() } else { None };
            drop(s);
            if let Some(job) = job {
                job();
            }
        }
    }
}

fn work() {
    let mut s = WORKERS.state.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        while let Some(job) = s.queue.pop_front() {
            drop(s);
            job();
            s = WORKERS.state.lock().unwrap_or_else(|e| e.into_inner());
        }
        s.idle += 1;
        let (guard, timeout) = WORKERS.work.wait_timeout(s, IDLE).unwrap_or_else(|e| e.into_inner());
        s = guard;
        s.idle -= 1;
        if timeout.timed_out() && s.queue.is_empty() {
            s.threads -= 1;
            return;
        }
    }
}
