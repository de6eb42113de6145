//! Open files, shared by all cores.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI8, Ordering};

use crate::sys::Storage;

/// An open file (or block device). Cheap to clone; operations in flight keep it open.
#[derive(Clone)]
pub struct File(Arc<Inner>);

struct Inner {
    /// `None` only while it is dropped.
    fd: Option<OwnedFd>,
    storage: Storage,
    /// Whether recent reads found their data in the page cache, see [`PageCache`]. Shared by all cores; races
    /// only make the guess worse.
    cache: PageCache,
}

/// A guess whether the next read finds its data in the page cache.
///
/// Asking costs one system call and saves a ride through the ring; asking in vain costs both. A hit adds to the
/// score, a miss takes more away; below zero only every 16th read asks.
struct PageCache {
    score: AtomicI8,
}

const HOT: i8 = 16;
const COLD: i8 = -16;
const MISS: i8 = 4;
const NEVER: i8 = i8::MIN;

impl File {
    /// The file behind a descriptor. It must be open for what will be asked of it, and not be in non-blocking
    /// mode. Asks the file system, so it may block ([`CoreIo::blocking_at`](crate::CoreIo::blocking_at)).
    pub fn from_fd(fd: OwnedFd) -> File {
        let storage = crate::sys::storage_of(&fd);
        // O_DIRECT never meets the page cache, and elsewhere nobody promises that asking it does not wait.
        // SAFETY: F_GETFL takes no argument.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        let score = if storage.is_remote() || flags & libc::O_DIRECT != 0 { NEVER } else { HOT };
        let cache = PageCache { score: AtomicI8::new(score) };
        File(Arc::new(Inner { fd: Some(fd), storage, cache }))
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd().as_raw_fd()
    }

    fn fd(&self) -> &OwnedFd {
        self.0.fd.as_ref().expect("a file that is used is open")
    }

    /// Where it is stored.
    pub fn storage(&self) -> Storage {
        self.0.storage
    }

    pub(crate) fn same(&self, other: &File) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the next read should ask the page cache first.
    pub(crate) fn try_cache(&self) -> bool {
        let score = self.0.cache.score.load(Ordering::Relaxed);
        if score >= 0 {
            return true;
        }
        if score == NEVER {
            return false;
        }
        // Cold: count up to the next attempt.
        self.0.cache.score.store(score + 1, Ordering::Relaxed);
        false
    }

    pub(crate) fn cache_hit(&self) {
        let score = self.0.cache.score.load(Ordering::Relaxed);
        if score < HOT {
            self.0.cache.score.store(score + 1, Ordering::Relaxed);
        }
    }

    pub(crate) fn cache_miss(&self) {
        let score = self.0.cache.score.load(Ordering::Relaxed);
        let next = if score > MISS { score - MISS } else { COLD };
        self.0.cache.score.store(next, Ordering::Relaxed);
    }

    /// The file system can't answer such questions.
    pub(crate) fn cache_never(&self) {
        self.0.cache.score.store(NEVER, Ordering::Relaxed);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closing may tell a server, and wait for it.
        let fd = self.fd.take();
        self.storage.soon(move || drop(fd));
    }
}

impl PartialEq for File {
    /// Whether both are the same open file description.
    fn eq(&self, other: &File) -> bool {
        self.same(other)
    }
}

impl From<std::fs::File> for File {
    fn from(f: std::fs::File) -> File {
        File::from_fd(f.into())
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd().as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> RawFd {
        self.raw()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File(fd {})", self.raw())
    }
}
