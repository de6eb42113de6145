//! Byte-range locks of open file descriptions, and who holds them.
//!
//! Such a lock belongs to the open file description, not to the process: it ends when the last descriptor of it is
//! closed, also when the process dies, and two descriptions of one process conflict like those of two. Only shared
//! (read) locks are taken; what would be refused is found out with a test for a write lock.
//!
//! None of these calls waits for another holder. On a network file system they ask the server.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use crate::Result;

/// Someone who holds locks on a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// The process.
    pub pid: u32,
    /// Its descriptor.
    pub fd: u32,
    /// Its command line, arguments joined by spaces; the short name for a kernel thread or when it may not be seen.
    pub command: String,
    /// First and last byte of every lock, and whether it is a write lock.
    pub ranges: Vec<LockRange>,
}

/// A lock on some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    /// First byte.
    pub first: u64,
    /// Last byte.
    pub last: u64,
    /// A write lock excludes everybody.
    pub exclusive: bool,
}

impl LockHolder {
    /// Whether a lock of this holder covers the byte.
    pub fn covers(&self, byte: u64) -> bool {
        self.ranges.iter().any(|r| r.first <= byte && byte <= r.last)
    }
}

fn one_byte(kind: i32, byte: u64) -> libc::flock {
    // SAFETY: all-zero is a valid flock; l_pid must be 0 for these commands.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    l.l_start = byte as libc::off_t;
    l.l_len = 1;
    l
}

fn command(fd: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> std::io::Result<()> {
    // SAFETY: a valid lock description.
    let n = crate::op::retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut *lock) }));
    if n < 0 { Err(std::io::Error::from_raw_os_error(-n as i32)) } else { Ok(()) }
}

/// Takes a shared lock on one byte. False when somebody has a write lock there.
///
/// # Errors
/// The system's: `EINVAL` or `EOPNOTSUPP` where such locks do not exist.
pub fn lock_byte(file: impl AsFd, byte: u64) -> Result<bool> {
    match command(file.as_fd(), libc::F_OFD_SETLK, &mut one_byte(libc::F_RDLCK, byte)) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Gives up this description's lock on one byte.
///
/// # Errors
/// The system's.
pub fn unlock_byte(file: impl AsFd, byte: u64) -> Result<()> {
    Ok(command(file.as_fd(), libc::F_OFD_SETLK, &mut one_byte(libc::F_UNLCK, byte))?)
}

/// Whether another open file description holds any lock on the byte.
///
/// # Errors
/// As for [`lock_byte`].
pub fn byte_is_locked(file: impl AsFd, byte: u64) -> Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, byte);
    command(file.as_fd(), libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Who holds locks on this file, besides this very descriptor. Reads `/proc`: processes of other users and other hosts
/// are not visible. May take milliseconds: run it on the thread pool.
pub fn lock_holders(file: impl AsFd) -> Vec<LockHolder> {
    let own = file.as_fd().as_raw_fd();
    let Ok(id) = super::fd_id(file.as_fd()) else { return Vec::new() };
    let me = std::process::id();
    let mut holders = Vec::new();
    for process in numbers(Path::new("/proc")) {
        let dir = format!("/proc/{process}");
        for fd in numbers(Path::new(&format!("{dir}/fdinfo"))) {
            if process == me && i64::from(fd) == i64::from(own) {
                continue;
            }
            let Ok(info) = std::fs::read_to_string(format!("{dir}/fdinfo/{fd}")) else { continue };
            // Asking about a file of a server that is gone takes for ever, so only about those that may be this one.
            let may_be = info.lines().any(|l| lock_file(l).is_some_and(|f| f.0 == id.0 || f.1 == id.1));
            let ranges: Vec<_> = info.lines().filter_map(parse_lock_line).collect();
            if !may_be || ranges.is_empty() || !same_file(&format!("{dir}/fd/{fd}"), id) {
                continue;
            }
            holders.push(LockHolder { pid: process, fd, command: command_line(&dir), ranges });
        }
    }
    holders
}

fn numbers(dir: &Path) -> impl Iterator<Item = u32> + use<> {
    std::fs::read_dir(dir).into_iter().flatten().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
}

fn same_file(path: &str, id: (u64, u64)) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == id)
}

fn command_line(dir: &str) -> String {
    let raw = std::fs::read(format!("{dir}/cmdline")).unwrap_or_default();
    let words: Vec<_> =
        raw.split(|b| *b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
    if words.is_empty() {
        return std::fs::read_to_string(format!("{dir}/comm"))
            .map_or_else(|_| "?".into(), |c| c.trim().into());
    }
    words.join(" ")
}

/// One `lock:` line of /proc/PID/fdinfo/FD: `lock:  1: OFDLCK  ADVISORY  READ -1 08:01:42 100 101`.
fn parse_lock_line(line: &str) -> Option<LockRange> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
    if !matches!(words.next()?, "OFDLCK" | "POSIX") {
        return None;
    }
    let exclusive = words.nth(1)? == "WRITE";
    let first = words.nth(2)?.parse().ok()?;
    let last = match words.next()? {
        "EOF" => u64::MAX,
        n => n.parse().ok()?,
    };
    Some(LockRange { first, last, exclusive })
}

/// Device and inode in such a line, as the file system numbers them inside: not always what stat(2) says.
fn lock_file(line: &str) -> Option<(u64, u64)> {
    let mut parts = line.strip_prefix("lock:")?.split_whitespace().nth(5)?.split(':');
    let device = |s: &str| u32::from_str_radix(s, 16).ok();
    let (major, minor) = (device(parts.next()?)?, device(parts.next()?)?);
    Some((libc::makedev(major, minor), parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:391 100 101";
        assert_eq!(parse_lock_line(line), Some(LockRange { first: 100, last: 101, exclusive: false }));
        let line = "lock:\t2: POSIX  ADVISORY  WRITE 4711 fe:00:391 0 EOF";
        assert_eq!(parse_lock_line(line), Some(LockRange { first: 0, last: u64::MAX, exclusive: true }));
        assert_eq!(parse_lock_line("lock:\t1: FLOCK  ADVISORY  WRITE 4711 fe:00:391 0 EOF"), None);
        assert_eq!(lock_file(line), Some((libc::makedev(0xfe, 0), 391)));
        assert_eq!(parse_lock_line("flags:\t0100002"), None);
        assert_eq!(parse_lock_line("lock: 1: OFDLCK ADVISORY"), None);
    }

    #[test]
    fn two_descriptions_of_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"").unwrap();
        let a = std::fs::File::open(&path).unwrap();
        let b = std::fs::File::open(&path).unwrap();
        assert!(lock_byte(&a, 101).unwrap());
        assert!(lock_byte(&b, 101).unwrap(), "shared locks share");
        unlock_byte(&b, 101).unwrap();
        assert!(!byte_is_locked(&a, 101).unwrap(), "one's own lock is none");
        assert!(byte_is_locked(&b, 101).unwrap());
        assert!(!byte_is_locked(&b, 100).unwrap());
        let holders = lock_holders(&b);
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].pid, std::process::id());
        assert!(holders[0].covers(101) && !holders[0].covers(100));
        assert!(lock_holders(&a).is_empty());
        drop(a);
        assert!(!byte_is_locked(&b, 101).unwrap());
    }
}
