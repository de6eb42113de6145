//! Termination signals as a future.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::op::Op;
use crate::{CoreIo, Result};

/// A signal that asks the process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGINT, as from Ctrl-C.
    Interrupt,
    /// SIGHUP.
    Hangup,
}

/// Termination signals. While it lives the process is not ended by them.
#[derive(Debug)]
pub struct Signals {
    io: CoreIo,
    fd: Arc<OwnedFd>,
    previous: libc::sigset_t,
}

/// Blocks SIGTERM, SIGINT and SIGHUP in this thread and in those that it starts from now on, so that [`CoreIo::signals`] gets
/// them. Call it before any thread is started.
pub fn block_signals() {
    // SAFETY: a valid set, initialised by `set`.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set(), std::ptr::null_mut()) };
}

fn set() -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the set; the signals are valid numbers.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, s);
        }
        set
    }
}

impl CoreIo {
    /// Receives SIGTERM, SIGINT and SIGHUP from now on. Other threads must have them blocked: see [`block_signals`].
    ///
    /// # Errors
    /// When descriptors are short.
    pub fn signals(&self) -> Result<Signals> {
        let set = set();
        // SAFETY: valid sets.
        let previous = unsafe {
            let mut previous = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut previous);
            previous
        };
        // SAFETY: a valid set.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Signals { io: self.clone(), fd, previous })
    }
}

impl Signals {
    /// The next signal.
    ///
    /// # Errors
    /// The system's.
    pub async fn next(&mut self) -> Result<Signal> {
        loop {
            self.io.submit(Op::Poll { fd: self.fd.clone(), events: libc::POLLIN }).await?;
            // SAFETY: all-zero is a valid signalfd_siginfo, and read gets its exact size.
            let (n, info) = unsafe {
                let mut info: libc::signalfd_siginfo = std::mem::zeroed();
                (libc::read(self.fd.as_raw_fd(), (&raw mut info).cast(), size_of_val(&info)), info)
            };
            if n == size_of_val(&info) as isize {
                return Ok(match info.ssi_signo as i32 {
                    libc::SIGINT => Signal::Interrupt,
                    libc::SIGHUP => Signal::Hangup,
                    _ => Signal::Terminate,
                });
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: a valid set, filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.previous, std::ptr::null_mut()) };
    }
}
