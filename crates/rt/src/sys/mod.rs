//! System calls in a safe form: all `unsafe` for files, locks and processes is here.

mod lock;
mod mounts;
mod open;

pub use lock::{LockHolder, LockRange, byte_is_locked, lock_byte, lock_holders, unlock_byte};
pub use mounts::Storage;
pub(crate) use mounts::{Walk, storage_of};
pub(crate) use open::fd_id;
pub use open::{
    FileFacts, FileKind, OpenHow, allocated, check_writable_dir, device_id, facts, open, open_beneath,
};

use std::os::fd::RawFd;
use std::path::Path;

use crate::{Buf, Result};

/// The calling thread's errno.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Sets or clears `O_NONBLOCK`; a failure is seen by the next operation.
pub(crate) fn set_nonblocking(fd: RawFd, on: bool) {
    // SAFETY: F_GETFL and F_SETFL take integers only.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        let wanted = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
        if flags >= 0 && wanted != flags {
            libc::fcntl(fd, libc::F_SETFL, wanted);
        }
    }
}

/// read(2) into one buffer.
pub(crate) fn read(fd: RawFd, buf: &Buf) -> Result<usize> {
    // SAFETY: the buffer is alive during the call.
    let n = crate::op::retry(|| unsafe { libc::read(fd, buf.as_ptr().cast(), buf.len()) as i64 });
    usize::try_from(n).map_err(|_| std::io::Error::from_raw_os_error(-n as i32).into())
}

/// write(2) from one buffer.
pub(crate) fn write(fd: RawFd, buf: &Buf) -> Result<usize> {
    // SAFETY: the buffer is alive during the call.
    let n =
        crate::op::retry(|| unsafe { libc::write(fd, buf.as_ptr().cast_const().cast(), buf.len()) as i64 });
    usize::try_from(n).map_err(|_| std::io::Error::from_raw_os_error(-n as i32).into())
}

/// Whether the path names a socket.
pub(crate) fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}

/// Device and inode of what the path names.
pub(crate) fn file_id(path: &Path) -> std::io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}
