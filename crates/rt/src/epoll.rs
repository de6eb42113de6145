//! The engine for systems where io_uring is forbidden: files on the thread pool, sockets on epoll.
//!
//! Socket operations are tried at once; what would wait is registered with epoll for one shot and tried again when
//! the descriptor is ready. A descriptor is registered only while something waits for it, and what waits keeps the
//! descriptor open, so its number cannot come to mean something else.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::core::{Core, EventFd};
use crate::engine::{Completions, Wait};
use crate::op::Op;
use crate::stats::bump;

const BELL: u64 = u64::MAX;
const EVENTS_PER_TURN: usize = 128;
const EAGAIN: i64 = -(libc::EAGAIN as i64);

pub(crate) struct Epoll {
    fd: OwnedFd,
    /// Who waits for which descriptor, with poll(2) events.
    waiting: HashMap<RawFd, Vec<(usize, i16)>>,
    /// Completed since the last turn.
    ready: Completions,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    pub(crate) fn new(bell: &EventFd) -> std::io::Result<Epoll> {
        // SAFETY: a plain call.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let epoll = Epoll {
            fd,
            waiting: HashMap::new(),
            ready: Vec::new(),
            events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS_PER_TURN],
        };
        match epoll.control(libc::EPOLL_CTL_ADD, bell.raw(), libc::EPOLLIN as u32, BELL) {
            0 => Ok(epoll),
            e => Err(std::io::Error::from_raw_os_error(-e)),
        }
    }

    fn control(&self, what: i32, fd: RawFd, events: u32, data: u64) -> i32 {
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: one valid event.
        match unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), what, fd, &mut event) } {
            0 => 0,
            _ => -crate::sys::errno(),
        }
    }

    pub(crate) fn submit(&mut self, core: &Core, key: usize) {
        let (result, wait) = {
            let slots = core.slots.borrow();
            let Some(op) = &slots[key].op else { unreachable!("a new slot has its operation") };
            match op.readiness() {
                None => (0, None),
                Some(wait) => {
                    if let Op::Accept { socket } = op {
                        // A client may vanish between readiness and accept, which would block then.
                        crate::sys::set_nonblocking(socket.raw(), true);
                    }
                    bump(&core.stats.direct_calls);
                    (op.try_ready(), Some(wait))
                }
            }
        };
        match wait {
            None => core.to_pool(key),
            Some((fd, events)) if result == EAGAIN => {
                let first = !self.waiting.contains_key(&fd);
                self.waiting.entry(fd).or_default().push((key, events));
                if let Err(e) = self.arm(core, fd, first) {
                    // Regular files cannot be polled: they are always ready.
                    let result = if e == -libc::EPERM { i64::from(events) } else { i64::from(e) };
                    self.waiting.remove(&fd);
                    self.ready.push((key, result));
                }
            }
            Some(_) => self.ready.push((key, result)),
        }
    }

    /// Registers the union of what is waited for on a descriptor.
    fn arm(&self, core: &Core, fd: RawFd, first: bool) -> Result<(), i32> {
        let Some(waiters) = self.waiting.get(&fd) else { return Ok(()) };
        // The bits of poll and epoll are the same for POLLIN, POLLOUT, POLLHUP.
        let events = waiters.iter().fold(libc::EPOLLONESHOT as u32, |all, (_, e)| all | *e as u16 as u32);
        let what = if first { libc::EPOLL_CTL_ADD } else { libc::EPOLL_CTL_MOD };
        bump(&core.stats.enters);
        match self.control(what, fd, events, fd as u64) {
            0 => Ok(()),
            e => Err(e),
        }
    }

    pub(crate) fn cancel(&mut self, key: usize) {
        let found = self.waiting.iter().find_map(|(fd, w)| w.iter().any(|(k, _)| *k == key).then_some(*fd));
        let Some(fd) = found else { return };
        let Some(waiters) = self.waiting.get_mut(&fd) else { return };
        waiters.retain(|(k, _)| *k != key);
        if waiters.is_empty() {
            self.waiting.remove(&fd);
            self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
        }
        self.ready.push((key, -i64::from(libc::ECANCELED)));
    }

    pub(crate) fn turn(&mut self, core: &Core, wait: Wait, done: &mut Completions) {
        done.append(&mut self.ready);
        let timeout = match wait {
            Wait::No => 0,
            Wait::Until(_) if !done.is_empty() => 0,
            Wait::Until(None) => -1,
            Wait::Until(Some(at)) => {
                let left = at.saturating_duration_since(std::time::Instant::now());
                // Rounded up, so that the timer is due afterwards.
                i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
            }
        };
        if timeout == 0 && self.waiting.is_empty() {
            return;
        }
        let sleep = timeout != 0 && core.shared.mailbox.prepare_sleep();
        bump(&core.stats.enters);
        if sleep {
            bump(&core.stats.sleeps);
        }
        // SAFETY: the array has EVENTS_PER_TURN entries.
        let n = unsafe {
            libc::epoll_wait(
                self.fd.as_raw_fd(),
                self.events.as_mut_ptr(),
                EVENTS_PER_TURN as i32,
                if sleep { timeout } else { 0 },
            )
        };
        if sleep {
            core.shared.mailbox.awake();
        }
        // An error can only be EINTR: then there are no events.
        for i in 0..usize::try_from(n).unwrap_or(0) {
            let data = self.events[i].u64;
            if data == BELL {
                core.shared.mailbox.bell().clear();
            } else {
                self.retry(core, data as RawFd, done);
            }
        }
    }

    /// A descriptor is ready: tries again what waits for it.
    fn retry(&mut self, core: &Core, fd: RawFd, done: &mut Completions) {
        let Some(waiters) = self.waiting.get_mut(&fd) else { return };
        let slots = core.slots.borrow();
        waiters.retain(|(key, _)| {
            let Some(op) = &slots[*key].op else { unreachable!("a waiting slot has its operation") };
            bump(&core.stats.direct_calls);
            let result = op.try_ready();
            if result != EAGAIN {
                done.push((*key, result));
            }
            result == EAGAIN
        });
        drop(slots);
        if waiters.is_empty() {
            self.waiting.remove(&fd);
            self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
        } else if let Err(e) = self.arm(core, fd, false) {
            for (key, _) in self.waiting.remove(&fd).unwrap_or_default() {
                done.push((key, i64::from(e)));
            }
        }
    }
}
