//! Operations on files and sockets as values.
//!
//! An [`Op`] owns everything that the kernel needs: the file and the memory stay alive as long as it does.
//! Each engine decides how to run it; the result is what a system call returns, with `-errno` for errors.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::file::File;
use crate::net::{SockAddr, Socket};
use crate::sys::errno;
use crate::workers::WaitsFor;
use crate::{Buf, IoVec};

/// The kernel takes no more buffers in one call.
pub(crate) const IOV_MAX: usize = 1024;
/// The kernel moves no more bytes in one call.
pub(crate) const MAX_TRANSFER: usize = 0x7fff_f000;

/// How long the thread engine tries to connect.
const CONNECT_SECONDS: i64 = 20;

pub(crate) enum Op {
    Read {
        file: File,
        iov: IoVec,
        offset: u64,
    },
    Write {
        file: File,
        iov: IoVec,
        offset: u64,
        dsync: bool,
    },
    Sync {
        file: File,
        data_only: bool,
    },
    Fallocate {
        file: File,
        mode: i32,
        offset: u64,
        len: u64,
    },
    Truncate {
        file: File,
        len: u64,
    },
    Recv {
        socket: Socket,
        iov: IoVec,
    },
    Send {
        socket: Socket,
        iov: IoVec,
    },
    Accept {
        socket: Socket,
    },
    Connect {
        socket: Socket,
        addr: Box<SockAddr>,
    },
    /// Waits for readiness; `events` as in poll(2). The result is the events that are there.
    Poll {
        fd: Arc<OwnedFd>,
        events: i16,
    },
    /// Anything that may block, for a thread pool.
    Call(WaitsFor, Box<dyn FnOnce() -> i64 + Send>),
}

impl Op {
    /// Whether it may wait for a peer, without a bound: such operations are cancelled when nobody wants them.
    pub(crate) fn waits_for_peer(&self) -> bool {
        match self {
            Op::Recv { .. } | Op::Send { .. } | Op::Accept { .. } | Op::Connect { .. } | Op::Poll { .. } => {
                true
            }
            Op::Read { .. }
            | Op::Write { .. }
            | Op::Sync { .. }
            | Op::Fallocate { .. }
            | Op::Truncate { .. }
            | Op::Call(..) => false,
        }
    }

    /// Whether it changes what a file holds: an orphan of this kind keeps what its request held.
    pub(crate) fn changes_file(&self) -> bool {
        match self {
            Op::Write { .. } | Op::Fallocate { .. } | Op::Truncate { .. } => true,
            // Calls open files and ask about them. What changes data has a form of its own.
            Op::Call(..)
            | Op::Read { .. }
            | Op::Sync { .. }
            | Op::Recv { .. }
            | Op::Send { .. }
            | Op::Accept { .. }
            | Op::Connect { .. }
            | Op::Poll { .. } => false,
        }
    }

    /// Who has to answer before it can end.
    pub(crate) fn waits_for(&self) -> WaitsFor {
        match self {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::Sync { file, .. }
            | Op::Fallocate { file, .. }
            | Op::Truncate { file, .. } => file.storage().waits_for(),
            Op::Connect { addr, .. } => WaitsFor::Peer(addr.number()),
            Op::Call(what, _) => *what,
            // Readiness operations do not go to a pool.
            Op::Recv { .. } | Op::Send { .. } | Op::Accept { .. } | Op::Poll { .. } => WaitsFor::Host,
        }
    }

    /// The file that it works on.
    pub(crate) fn file(&self) -> Option<&File> {
        match self {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::Sync { file, .. }
            | Op::Fallocate { file, .. }
            | Op::Truncate { file, .. } => Some(file),
            Op::Recv { .. }
            | Op::Send { .. }
            | Op::Accept { .. }
            | Op::Connect { .. }
            | Op::Poll { .. }
            | Op::Call(..) => None,
        }
    }

    /// What has to happen to a result that nobody will look at: an accepted socket is closed.
    pub(crate) fn discard_result(is_accept: bool, result: i64) {
        if is_accept && result >= 0 {
            // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
            drop(unsafe { OwnedFd::from_raw_fd(result as RawFd) });
        }
    }

    /// Runs the operation with a blocking system call. Called on a pool thread; consumes the operation, so that
    /// the memory is free before the result is known.
    pub(crate) fn run_blocking(self) -> i64 {
        match self {
            Op::Read { file, iov, offset } => {
                let v = Vecs::new(&iov);
                // SAFETY: the iovecs point into memory that `iov` keeps alive during the call.
                retry(|| unsafe { libc::preadv(file.raw(), v.as_ptr(), v.count(), offset as i64) as i64 })
            }
            Op::Write { file, iov, offset, dsync } => {
                let v = Vecs::new(&iov);
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                retry(|| unsafe {
                    libc::pwritev2(file.raw(), v.as_ptr(), v.count(), offset as i64, flags) as i64
                })
            }
            Op::Sync { file, data_only } => retry(|| {
                // SAFETY: a plain call on a descriptor that `file` keeps open.
                i64::from(unsafe {
                    if data_only { libc::fdatasync(file.raw()) } else { libc::fsync(file.raw()) }
                })
            }),
            Op::Fallocate { file, mode, offset, len } => retry(|| {
                // SAFETY: as above.
                i64::from(unsafe { libc::fallocate(file.raw(), mode, offset as i64, len as i64) })
            }),
            Op::Truncate { file, len } => retry(|| {
                // SAFETY: as above.
                i64::from(unsafe { libc::ftruncate(file.raw(), len as i64) })
            }),
            Op::Connect { socket, addr } => connect(socket.raw(), &addr),
            Op::Call(_, f) => f(),
            Op::Recv { .. } | Op::Send { .. } | Op::Accept { .. } | Op::Poll { .. } => {
                unreachable!("readiness operations do not go to the pool")
            }
        }
    }

    /// Tries a socket operation without waiting; `-EAGAIN` when it would have to.
    pub(crate) fn try_ready(&self) -> i64 {
        match self {
            Op::Recv { socket, iov } => {
                let mut v = Vecs::new(iov);
                let msg = v.msghdr();
                // SAFETY: the message header points to iovecs and memory that live during the call.
                retry(|| unsafe { libc::recvmsg(socket.raw(), msg, libc::MSG_DONTWAIT) as i64 })
            }
            Op::Send { socket, iov } => {
                let mut v = Vecs::new(iov);
                let msg = v.msghdr();
                // SAFETY: as above.
                retry(|| unsafe {
                    libc::sendmsg(socket.raw(), msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as i64
                })
            }
            Op::Accept { socket } => retry(|| {
                // SAFETY: no address is asked for.
                i64::from(unsafe {
                    libc::accept4(
                        socket.raw(),
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        libc::SOCK_CLOEXEC,
                    )
                })
            }),
            Op::Poll { fd, events } => {
                let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: *events, revents: 0 };
                // SAFETY: one valid pollfd.
                match retry(|| i64::from(unsafe { libc::poll(&mut p, 1, 0) })) {
                    0 => -i64::from(libc::EAGAIN),
                    n if n < 0 => n,
                    _ => i64::from(p.revents),
                }
            }
            Op::Read { .. }
            | Op::Write { .. }
            | Op::Sync { .. }
            | Op::Fallocate { .. }
            | Op::Truncate { .. }
            | Op::Connect { .. }
            | Op::Call(..) => unreachable!("not a readiness operation"),
        }
    }

    /// The descriptor and the poll(2) events that a readiness operation waits for; `None` for those that the
    /// thread pool runs.
    pub(crate) fn readiness(&self) -> Option<(RawFd, i16)> {
        match self {
            Op::Recv { socket, .. } | Op::Accept { socket } => Some((socket.raw(), libc::POLLIN)),
            Op::Send { socket, .. } => Some((socket.raw(), libc::POLLOUT)),
            Op::Poll { fd, events } => Some((fd.as_raw_fd(), *events)),
            Op::Read { .. }
            | Op::Write { .. }
            | Op::Sync { .. }
            | Op::Fallocate { .. }
            | Op::Truncate { .. }
            | Op::Connect { .. }
            | Op::Call(..) => None,
        }
    }
}

/// A blocking connect, which nobody can cancel: so it gives up after a while.
fn connect(fd: RawFd, addr: &SockAddr) -> i64 {
    let set_limit = |seconds: i64| {
        let time = libc::timeval { tv_sec: seconds as libc::time_t, tv_usec: 0 };
        // SAFETY: the value is one timeval. It limits connect(2) too; without it connecting only takes longer to fail.
        unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_SNDTIMEO,
                (&raw const time).cast(),
                size_of_val(&time) as libc::socklen_t,
            )
        };
    };
    set_limit(CONNECT_SECONDS);
    let (ptr, len) = addr.as_raw();
    // SAFETY: a valid address of that length.
    let result = retry(|| i64::from(unsafe { libc::connect(fd, ptr, len) }));
    set_limit(0);
    // What the kernel says when the limit was met.
    if result == -i64::from(libc::EINPROGRESS) { -i64::from(libc::ETIMEDOUT) } else { result }
}

/// Repeats a call that a signal interrupted; `-errno` on errors.
pub(crate) fn retry(mut call: impl FnMut() -> i64) -> i64 {
    loop {
        let n = call();
        if n >= 0 {
            return n;
        }
        match errno() {
            libc::EINTR => continue,
            e => return -i64::from(e),
        }
    }
}

/// iovecs and a message header in stable places, for the time of an operation.
pub(crate) struct Vecs {
    iov: Vec<libc::iovec>,
    msg: libc::msghdr,
}

// SAFETY: the pointers refer to memory that is kept alive by the IoVec beside it, which is Send.
unsafe impl Send for Vecs {}

impl Vecs {
    pub(crate) fn empty() -> Vecs {
        // SAFETY: all-zero is a valid msghdr.
        Vecs { iov: Vec::new(), msg: unsafe { std::mem::zeroed() } }
    }

    pub(crate) fn new(iov: &IoVec) -> Vecs {
        let mut v = Vecs::empty();
        v.set(iov);
        v
    }

    /// Takes the addresses over; no more than the kernel accepts in one call.
    pub(crate) fn set(&mut self, iov: &IoVec) {
        self.iov.clear();
        self.iov.extend(iov.segments().iter().take(IOV_MAX).map(raw));
    }

    pub(crate) fn as_ptr(&self) -> *const libc::iovec {
        self.iov.as_ptr()
    }

    pub(crate) fn count(&self) -> libc::c_int {
        self.iov.len() as libc::c_int
    }

    /// The message header; valid until the next `set` and as long as `self` does not move.
    pub(crate) fn msghdr(&mut self) -> *mut libc::msghdr {
        self.msg.msg_iov = self.iov.as_mut_ptr();
        self.msg.msg_iovlen = self.iov.len() as _;
        &mut self.msg
    }
}

fn raw(buf: &Buf) -> libc::iovec {
    libc::iovec { iov_base: buf.as_ptr().cast(), iov_len: buf.len() }
}
