//! Which file system a file or a name belongs to, found out without asking one that may not answer.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::{WaitsFor, late};

/// Symbolic links followed before a name counts as a loop, as the kernel does.
const MAX_LINKS: usize = 40;

/// File systems whose disk is one of this host, or its memory: what they know about an open file (its status, its locks)
/// they know without asking anybody. By the number that statfs(2) gives.
const LOCAL: [u64; 19] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0x0102_1994, // tmpfs, devtmpfs
    0x8584_58F6, // ramfs
    0xF2F5_2010, // f2fs
    0x2FC1_2FC1, // zfs
    0xCA45_1A4E, // bcachefs
    0x3153_464A, // jfs
    0x5265_4973, // reiserfs
    0x2011_BAB0, // exfat
    0x4D44,      // vfat
    0x7366_746E, // ntfs3
    0x9660,      // isofs
    0x7371_7368, // squashfs
    0x794C_7630, // overlayfs: as a rule over one of these
    0x9FA0,      // proc
    0x6265_6572, // sysfs
    0x5049_5045, // pipes
];

/// Where a file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Number of the disk or the file system.
    pub(crate) device: u64,
    /// Not known to be of this host alone.
    pub(crate) remote: bool,
}

impl Storage {
    /// Who has to answer before a call about a file there ends.
    pub fn waits_for(self) -> WaitsFor {
        WaitsFor::Device(self.device)
    }

    /// Whether calls that elsewhere only touch the memory of this host (file status, locks, closing a file) may wait for
    /// somebody else here.
    pub fn is_remote(self) -> bool {
        self.remote
    }

    /// Does something of that kind: at once where it waits for nobody, else it is put off ([`put_off`](crate::put_off)).
    pub fn soon(self, f: impl FnOnce() + Send + 'static) {
        if self.remote { late::put_off_to(self.waits_for(), f) } else { f() }
    }
}

/// Where an open file is stored. Asks the file system.
pub(crate) fn storage_of(file: impl AsFd) -> Storage {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: all-zero is a valid stat; fstat fills it.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::fstat(fd, &mut st) } != 0 {
        return Storage { device: 0, remote: true };
    }
    if st.st_mode & libc::S_IFMT == libc::S_IFBLK {
        return Storage { device: st.st_rdev, remote: false };
    }
    // SAFETY: all-zero is a valid statfs; fstatfs fills it.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let known = unsafe { libc::fstatfs(fd, &mut fs) } == 0;
    Storage { device: st.st_dev, remote: !known || !LOCAL.contains(&(fs.f_type as u64 & 0xFFFF_FFFF)) }
}

/// A mount point and the device number of what is mounted there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountPoint {
    at: PathBuf,
    device: u64,
}

/// What is mounted where. The kernel answers by itself.
fn table() -> Vec<MountPoint> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`
fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let mut words = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(words.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
    let at = PathBuf::from(OsString::from_vec(unescape(words.nth(1)?)));
    Some(MountPoint { at, device })
}

/// Blanks and the like are written as three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = word;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// A walk along a name, from one file system to the next. Each part of it is done where only that file system can hold it up.
pub(crate) struct Walk {
    mounts: Vec<MountPoint>,
    /// A directory without symbolic links on the way to it.
    done: PathBuf,
    rest: VecDeque<OsString>,
    links: usize,
}

impl Walk {
    /// The beginning. Waits for nobody but this host.
    pub(crate) fn new(name: &Path) -> Walk {
        let mut walk = Walk { mounts: table(), done: "/".into(), rest: VecDeque::new(), links: 0 };
        // The current directory has no links in its name.
        if !name.is_absolute()
            && let Ok(dir) = std::env::current_dir()
        {
            walk.done = dir;
        }
        walk.go_to(name);
        walk
    }

    fn go_to(&mut self, name: &Path) {
        if name.is_absolute() {
            self.done = "/".into();
        }
        for c in name.components().rev() {
            match c {
                Component::Normal(c) => self.rest.push_front(c.to_owned()),
                Component::ParentDir => self.rest.push_front("..".into()),
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
    }

    /// The file system that it has come to.
    pub(crate) fn device(&self) -> u64 {
        // Of those at the same place the last one is on top.
        let here = self.mounts.iter().filter(|m| self.done.starts_with(&m.at));
        here.max_by_key(|m| m.at.as_os_str().len()).map_or(0, |m| m.device)
    }

    /// Goes on, within one file system. False when it has come to another one, true at the end of the name; then what the
    /// name leads to is there, too.
    pub(crate) fn go_on(&mut self) -> bool {
        let device = self.device();
        while let Some(next) = self.rest.pop_front() {
            if next == OsStr::from_bytes(b"..") {
                self.done.pop();
            } else {
                let dir = self.done.clone();
                self.done.push(next);
                let is_mount = self.mounts.iter().any(|m| m.at == self.done);
                if !is_mount
                    && self.links < MAX_LINKS
                    && let Ok(to) = std::fs::read_link(&self.done)
                {
                    self.links += 1;
                    self.done = dir;
                    self.go_to(&to);
                }
            }
            if self.device() != device {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let line = b"36 35 98:7 /mnt1 /a\\040b\\134c rw,noatime master:1 - ext3 /dev/root rw";
        let expected = MountPoint { at: "/a b\\c".into(), device: libc::makedev(98, 7) };
        assert_eq!(parse_line(line), Some(expected));
        assert_eq!(parse_line(b"36 35 x"), None);
        assert!(table().iter().any(|m| m.at == Path::new("/")));
    }

    #[test]
    fn names_lead_from_one_file_system_to_another() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        std::fs::create_dir(at.join("d")).unwrap();
        std::fs::create_dir(at.join("far")).unwrap();
        std::os::unix::fs::symlink("../far/x", at.join("d/link")).unwrap();
        std::os::unix::fs::symlink(at.join("d"), at.join("far/back")).unwrap();
        std::os::unix::fs::symlink("turns", at.join("turns")).unwrap();
        let walk = |name: &str| {
            let mut w = Walk::new(&at.join(name));
            // As if something were mounted there.
            w.mounts = vec![
                MountPoint { at: "/".into(), device: 1 },
                MountPoint { at: at.join("far"), device: 3 },
                MountPoint { at: at.join("far"), device: 2 },
            ];
            let mut on = vec![w.device()];
            while !w.go_on() {
                on.push(w.device());
            }
            (on, w.device())
        };
        assert_eq!(walk("d/nothing/there"), (vec![1], 1));
        assert_eq!(walk("far/x"), (vec![1, 2], 2));
        assert_eq!(walk("farther"), (vec![1], 1));
        assert_eq!(walk("d/link"), (vec![1, 2], 2));
        assert_eq!(walk("far/../d"), (vec![1, 2, 1], 1));
        assert_eq!(walk("far/back/link"), (vec![1, 2, 1, 2], 2));
        assert_eq!(walk("turns"), (vec![1], 1));
    }

    #[test]
    fn what_is_here_is_not_remote() {
        let file = tempfile::tempfile().unwrap();
        assert!(!storage_of(&file).remote);
    }
}
