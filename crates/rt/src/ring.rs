//! The io_uring engine: sockets and files of a core in one ring, entered once per turn of the loop.
//!
//! Flags: `DEFER_TASKRUN` is not used, because such a ring posts completions only when it is entered, and then
//! watching the completion queue before sleeping would see nothing.
//!
//! Memory: every entry refers to memory that its slot owns (see [`crate::core`]); slots are freed when their completion
//! has been seen. The bell's entry is a poll and refers to no memory at all.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use crate::core::{Core, EventFd};
use crate::engine::{Completions, Config, Wait};
use crate::op::{MAX_TRANSFER, Op, Vecs};
use crate::stats::bump;

const SQ_ENTRIES: u32 = 256;
const CQ_ENTRIES: u32 = 2048;
/// `user_data` of the entries that belong to no slot.
const BELL: u64 = u64::MAX;
const IGNORE: u64 = u64::MAX - 1;
/// Vectors kept for later operations.
const SPARE_VECS: usize = 256;
/// How long the loop watches the completion queue before it sleeps. About what a sleep and a wake-up cost.
const SPIN: Duration = Duration::from_micros(32);
/// Spinning starts at this score and the score stays below the maximum.
const SPIN_FROM: u8 = 2;
const SPIN_MAX: u8 = 8;

/// Cores that spin right now, in the whole process: one CPU stays free for whoever has to do the work.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

pub(crate) struct Ring {
    ring: IoUring,
    /// Entries that did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    #[expect(clippy::vec_box, reason = "they go in and out of slots, where they must not move")]
    spare: Vec<Box<Vecs>>,
    bell_fd: i32,
    bell_armed: bool,
    has_truncate: bool,
    /// How many cores may spin at once; 0 when spinning is off. Not known before something comes soon after the loop went
    /// idle: the standard library reads several files to find out.
    spinners: Option<usize>,
    /// Grows when something comes soon after the loop went idle.
    spin_score: u8,
}

impl Ring {
    pub(crate) fn new(config: &Config, bell: &EventFd) -> std::io::Result<Ring> {
        let build = |extra: bool| {
            let mut b = IoUring::builder();
            b.dontfork().setup_cqsize(CQ_ENTRIES).setup_clamp();
            if extra {
                b.setup_submit_all().setup_single_issuer();
            }
            b.build(SQ_ENTRIES)
        };
        let ring = match build(true) {
            // Kernels before 6.0 do not know the flags.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => build(false)?,
            other => other?,
        };
        let params = ring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() || !params.is_feature_fast_poll() {
            return Err(std::io::Error::other("this kernel's io_uring is too old (5.11 is needed)"));
        }
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Recv::CODE,
            opcode::RecvMsg::CODE,
            opcode::SendMsg::CODE,
            opcode::Accept::CODE,
            opcode::Connect::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if let Some(code) = needed.into_iter().find(|c| !probe.is_supported(*c)) {
            return Err(std::io::Error::other(format!("io_uring operation {code} is missing")));
        }
        Ok(Ring {
            ring,
            backlog: VecDeque::new(),
            spare: Vec::new(),
            bell_fd: bell.raw(),
            bell_armed: false,
            has_truncate: probe.is_supported(opcode::Ftruncate::CODE),
            spinners: if config.spin { None } else { Some(0) },
            spin_score: 0,
        })
    }

    pub(crate) fn submit(&mut self, core: &Core, key: usize) {
        let entry = {
            let mut slots = core.slots.borrow_mut();
            let slot = &mut slots[key];
            let Some(op) = &slot.op else { unreachable!("a new slot has its operation") };
            // Where somebody else has to answer, the kernel may wait for it inside of the system call that submits.
            match op.file() {
                Some(file) if file.storage().is_remote() => None,
                _ => self.entry(op, &mut slot.vecs),
            }
        };
        match entry {
            Some(entry) => {
                bump(&core.stats.submissions);
                self.push(core, entry.user_data(key as u64));
            }
            None => core.to_pool(key),
        }
    }

    /// The ring's form of an operation; `None` for what the thread pool has to do.
    fn entry(&mut self, op: &Op, vecs: &mut Option<Box<Vecs>>) -> Option<squeue::Entry> {
        let spare = &mut self.spare;
        let mut vectored = |iov: &crate::IoVec| -> *mut Vecs {
            let mut v = spare.pop().unwrap_or_else(|| Box::new(Vecs::empty()));
            v.set(iov);
            &raw mut **vecs.insert(v)
        };
        Some(match op {
            Op::Read { file, iov, offset } => match iov.segments() {
                [one] => opcode::Read::new(types::Fd(file.raw()), one.as_ptr(), clamp(one.len()))
                    .offset(*offset)
                    .build(),
                _ => {
                    let v = vectored(iov);
                    // SAFETY: `v` was just made from the slot's box.
                    let v = unsafe { &*v };
                    opcode::Readv::new(types::Fd(file.raw()), v.as_ptr(), v.count() as u32)
                        .offset(*offset)
                        .build()
                }
            },
            Op::Write { file, iov, offset, dsync } => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                match iov.segments() {
                    [one] => opcode::Write::new(types::Fd(file.raw()), one.as_ptr(), clamp(one.len()))
                        .offset(*offset)
                        .rw_flags(flags)
                        .build(),
                    _ => {
                        let v = vectored(iov);
                        // SAFETY: as above.
                        let v = unsafe { &*v };
                        opcode::Writev::new(types::Fd(file.raw()), v.as_ptr(), v.count() as u32)
                            .offset(*offset)
                            .rw_flags(flags)
                            .build()
                    }
                }
            }
            Op::Sync { file, data_only } => {
                let flags = if *data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
                opcode::Fsync::new(types::Fd(file.raw())).flags(flags).build()
            }
            Op::Fallocate { file, mode, offset, len } => {
                opcode::Fallocate::new(types::Fd(file.raw()), *len).offset(*offset).mode(*mode).build()
            }
            Op::Truncate { file, len } if self.has_truncate => {
                opcode::Ftruncate::new(types::Fd(file.raw()), *len).build()
            }
            Op::Truncate { .. } | Op::Call(..) => return None,
            Op::Recv { socket, iov } => match iov.segments() {
                [one] => opcode::Recv::new(types::Fd(socket.raw()), one.as_ptr(), clamp(one.len())).build(),
                _ => {
                    let v = vectored(iov);
                    // SAFETY: as above; the box stays in its slot until the completion.
                    opcode::RecvMsg::new(types::Fd(socket.raw()), unsafe { (*v).msghdr() }).build()
                }
            },
            Op::Send { socket, iov } => {
                let flags = libc::MSG_NOSIGNAL as u32;
                match iov.segments() {
                    [one] => opcode::Send::new(types::Fd(socket.raw()), one.as_ptr(), clamp(one.len()))
                        .flags(flags as i32)
                        .build(),
                    _ => {
                        let v = vectored(iov);
                        // SAFETY: as above.
                        opcode::SendMsg::new(types::Fd(socket.raw()), unsafe { (*v).msghdr() })
                            .flags(flags)
                            .build()
                    }
                }
            }
            Op::Accept { socket } => {
                opcode::Accept::new(types::Fd(socket.raw()), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Connect { socket, addr } => {
                let (ptr, len) = addr.as_raw();
                opcode::Connect::new(types::Fd(socket.raw()), ptr, len).build()
            }
            Op::Poll { fd, events } => {
                use std::os::fd::AsRawFd;
                opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), *events as u16 as u32).build()
            }
        })
    }

    fn push(&mut self, core: &Core, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: the entry refers to memory of its slot, which is freed after the completion.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            return;
        }
        // Full: hand over what is there. Should the kernel be busy, the next turn tries again.
        bump(&core.stats.enters);
        let _ = self.ring.submit();
        // SAFETY: as above.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    pub(crate) fn cancel(&mut self, core: &Core, key: usize) {
        self.push(core, opcode::AsyncCancel::new(key as u64).build().user_data(IGNORE));
    }

    pub(crate) fn recycle(&mut self, vecs: Box<Vecs>) {
        if self.spare.len() < SPARE_VECS {
            self.spare.push(vecs);
        }
    }

    pub(crate) fn turn(&mut self, core: &Core, wait: Wait, done: &mut Completions) {
        if !self.bell_armed {
            self.bell_armed = true;
            // Edge-triggered, many shots: the counter need not be read.
            let poll = opcode::PollAdd::new(types::Fd(self.bell_fd), libc::POLLIN as u32).multi(true);
            self.push(core, poll.build().user_data(BELL));
        }
        self.push_backlog();
        match wait {
            Wait::No => self.flush(core),
            Wait::Until(deadline) => self.wait(core, deadline),
        }
        self.reap(core, done);
    }

    fn push_backlog(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Hands new entries to the kernel, without waiting.
    fn flush(&mut self, core: &Core) {
        let overflow = self.ring.submission().cq_overflow();
        if !self.ring.submission().is_empty() || overflow {
            bump(&core.stats.enters);
            check(self.ring.submit());
        }
    }

    fn wait(&mut self, core: &Core, deadline: Option<Instant>) {
        if !self.ring.completion().is_empty() {
            return self.flush(core);
        }
        let start = Instant::now();
        let mut missed = false;
        if self.spin_score >= SPIN_FROM {
            match self.spin(core, start, deadline) {
                Some(true) => return,
                Some(false) => missed = true,
                None => {}
            }
        }
        if !core.shared.mailbox.prepare_sleep() {
            return self.flush(core);
        }
        bump(&core.stats.enters);
        bump(&core.stats.sleeps);
        match deadline {
            None => check(self.ring.submit_and_wait(1)),
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                let time = types::Timespec::from(left);
                let args = types::SubmitArgs::new().timespec(&time);
                check(self.ring.submitter().submit_with_args(1, &args));
            }
        }
        core.shared.mailbox.awake();
        // Would spinning have helped?
        if self.spinners != Some(0) && !missed {
            if start.elapsed() <= SPIN {
                self.spin_score = (self.spin_score + 1).min(SPIN_MAX);
            } else {
                self.spin_score = self.spin_score.saturating_sub(1);
            }
        }
    }

    /// Watches the completion queue for a moment. True when the loop has something to do; `None` when it did not watch.
    fn spin(&mut self, core: &Core, start: Instant, deadline: Option<Instant>) -> Option<bool> {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let spinners = *self.spinners.get_or_insert_with(|| cpus() - 1);
        if SPINNING.fetch_add(1, Ordering::Relaxed) >= spinners {
            SPINNING.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        self.flush(core);
        bump(&core.stats.spins);
        let end = deadline.map_or(start + SPIN, |d| d.min(start + SPIN));
        let hit = loop {
            if !self.ring.completion().is_empty() || core.shared.mailbox.notified() {
                break true;
            }
            if Instant::now() >= end {
                break false;
            }
            for _ in 0..8 {
                std::hint::spin_loop();
            }
        };
        SPINNING.fetch_sub(1, Ordering::Relaxed);
        if hit {
            bump(&core.stats.spin_hits);
            self.spin_score = (self.spin_score + 1).min(SPIN_MAX);
        } else {
            self.spin_score = self.spin_score.saturating_sub(2);
        }
        Some(hit)
    }

    fn reap(&mut self, core: &Core, done: &mut Completions) {
        for c in self.ring.completion() {
            match c.user_data() {
                BELL => self.bell_armed = io_uring::cqueue::more(c.flags()),
                IGNORE => {}
                key => {
                    bump(&core.stats.completions);
                    done.push((key as usize, i64::from(c.result())));
                }
            }
        }
    }
}

fn clamp(len: usize) -> u32 {
    len.min(MAX_TRANSFER) as u32
}

/// Errors of io_uring_enter that are part of life: time is up, a signal came, or the kernel is short of
/// something and asks to try again later.
#[track_caller]
fn check(result: std::io::Result<usize>) {
    if let Err(e) = result {
        match e.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
            _ => panic!("io_uring_enter failed: {e}"),
        }
    }
}
