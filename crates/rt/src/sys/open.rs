//! Opening files and finding out what they are.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use dolmen_types::{Error, ErrorKind, ResultExt};

use crate::Result;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For writing as well as reading.
    pub write: bool,
    /// Past the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Made; an error if it exists already.
    pub create: bool,
}

/// What a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// Anything else.
    Other,
}

/// Facts about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// What it is.
    pub kind: FileKind,
    /// Size in bytes; of a block device too.
    pub size: u64,
    /// Device and inode: two descriptors of one file have the same.
    pub id: (u64, u64),
    /// Space it takes, in bytes.
    pub allocated: u64,
    /// Offsets and lengths of direct I/O must be multiples of this; 0 when direct I/O is not possible or not known.
    pub direct_offset_align: u32,
    /// Addresses of direct I/O must be multiples of this.
    pub direct_memory_align: u32,
}

/// Opens a file. Never waits for the other end of a FIFO.
///
/// # Errors
/// The system's.
pub fn open(path: &Path, how: OpenHow) -> Result<OwnedFd> {
    let c = c_path(path)?;
    // SAFETY: a valid C string.
    let fd = unsafe { libc::open(c.as_ptr(), flags(how), 0o644 as libc::c_uint) };
    own(fd)
}

/// Opens a file whose name must lead to something beneath `dir`: no `..`, and no symbolic link that leaves it.
///
/// # Errors
/// The system's; `EXDEV` when the name leaves the directory.
pub fn open_beneath(dir: &Path, name: &Path, how: OpenHow) -> Result<OwnedFd> {
    let d = c_path(dir)?;
    // SAFETY: a valid C string.
    let dir_fd = own(unsafe { libc::open(d.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) })
        .context(|| format!("directory '{}'", dir.display()))?;
    if name.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::from_errno(
            libc::EXDEV,
            format!("'{}' is not beneath the directory", name.display()),
        ));
    }
    let c = c_path(name)?;
    // SAFETY: all-zero is a valid open_how.
    let mut open_how: libc::open_how = unsafe { std::mem::zeroed() };
    open_how.flags = flags(how) as u64;
    open_how.mode = if how.create { 0o644 } else { 0 };
    open_how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: a valid string and a structure of the given size.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir_fd.as_raw_fd(),
            c.as_ptr(),
            &raw const open_how,
            size_of_val(&open_how),
        )
    };
    own(fd as i32)
}

/// Makes sure that entries can be made in a directory.
///
/// # Errors
/// The system's.
pub fn check_writable_dir(dir: &Path) -> Result<()> {
    let c = c_path(dir)?;
    // SAFETY: a valid C string.
    let r = unsafe { libc::faccessat(libc::AT_FDCWD, c.as_ptr(), libc::W_OK | libc::X_OK, libc::AT_EACCESS) };
    if r != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn flags(how: OpenHow) -> i32 {
    // O_NONBLOCK: a FIFO must not stop us here; `facts` tells the caller what it is.
    let mut f = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    f |= if how.write { libc::O_RDWR } else { libc::O_RDONLY };
    if how.direct {
        f |= libc::O_DIRECT;
    }
    if how.create {
        f |= libc::O_CREAT | libc::O_EXCL;
    }
    f
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(ErrorKind::InvalidInput, "a file name must not contain a NUL byte"))
}

fn own(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    super::set_nonblocking(fd, false);
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Looks at an open file. The size of a block device comes from the device.
///
/// # Errors
/// The system's.
pub fn facts(file: impl AsFd) -> Result<FileFacts> {
    let fd = file.as_fd().as_raw_fd();
    let st = stat(fd)?;
    let kind = match st.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFBLK => FileKind::Block,
        _ => FileKind::Other,
    };
    let (offset_align, memory_align) = direct_alignment(fd);
    let mut facts = FileFacts {
        kind,
        size: st.st_size as u64,
        id: (st.st_dev, st.st_ino),
        allocated: st.st_blocks as u64 * 512,
        direct_offset_align: offset_align,
        direct_memory_align: memory_align,
    };
    if kind == FileKind::Block {
        let mut size = 0u64;
        // SAFETY: BLKGETSIZE64 writes 8 bytes.
        if unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut size) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        facts.size = size;
        // The inode of the device node says nothing about the disk; its number does.
        facts.id = device_id(st.st_rdev);
        let mut sector: libc::c_int = 0;
        // SAFETY: BLKSSZGET writes one int.
        if facts.direct_offset_align == 0 && unsafe { libc::ioctl(fd, libc::BLKSSZGET, &raw mut sector) } == 0
        {
            facts.direct_offset_align = sector as u32;
            facts.direct_memory_align = sector as u32;
        }
    }
    Ok(facts)
}

/// Loop devices over loop devices that are followed.
const MAX_LOOPS: usize = 8;

/// Whose bytes a block device shows, by its number: a loop device over a whole file is that file (device and inode), any
/// other one itself (number and zero). May wait for the file system.
pub fn device_id(number: u64) -> (u64, u64) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let mut id = (number, 0);
    for _ in 0..MAX_LOOPS {
        let at = format!("/sys/dev/block/{}:{}/loop", libc::major(id.0), libc::minor(id.0));
        let attribute = |name: &str| std::fs::read(Path::new(&at).join(name)).ok();
        // A window of a file has bytes of its own: two of them get along.
        if attribute("offset").is_none_or(|o| o.trim_ascii() != b"0") {
            return id;
        }
        let file = attribute("backing_file").and_then(|name| {
            let name = name.strip_suffix(b"\n").unwrap_or(&name);
            std::fs::metadata(Path::new(std::ffi::OsStr::from_bytes(name))).ok()
        });
        match file {
            Some(m) if m.file_type().is_block_device() => id = (m.rdev(), 0),
            Some(m) => return (m.dev(), m.ino()),
            // Removed, or named in another namespace.
            None => return id,
        }
    }
    id
}

/// `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;

/// Offset and memory alignment of direct I/O (kernel 6.1 and later); zeroes when not known.
fn direct_alignment(fd: i32) -> (u32, u32) {
    // SAFETY: all-zero is a valid statx buffer; the empty path with AT_EMPTY_PATH means the descriptor.
    unsafe {
        let mut sx: libc::statx = std::mem::zeroed();
        let r = libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut sx);
        if r == 0 && sx.stx_mask & libc::STATX_DIOALIGN != 0 {
            (sx.stx_dio_offset_align, sx.stx_dio_mem_align)
        } else {
            (0, 0)
        }
    }
}

/// Device and inode of an open file.
pub(crate) fn fd_id(file: impl AsFd) -> Result<(u64, u64)> {
    stat(file.as_fd().as_raw_fd()).map(|st| (st.st_dev, st.st_ino))
}

/// Space that an open file takes, in bytes.
///
/// # Errors
/// The system's.
pub fn allocated(file: impl AsFd) -> Result<u64> {
    stat(file.as_fd().as_raw_fd()).map(|st| st.st_blocks as u64 * 512)
}

fn stat(fd: i32) -> Result<libc::stat> {
    // SAFETY: all-zero is a valid stat; fstat fills it.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::fstat(fd, &mut st) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(st)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beneath() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("a"), b"abc").unwrap();
        std::fs::write(dir.path().join("secret"), b"s").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("out")).unwrap();
        std::os::unix::fs::symlink("a", inside.join("near")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), inside.join("absolute")).unwrap();
        let how = OpenHow::default();
        let f = open_beneath(&inside, Path::new("a"), how).unwrap();
        assert_eq!(facts(&f).unwrap().size, 3);
        assert_eq!(facts(&f).unwrap().kind, FileKind::Regular);
        open_beneath(&inside, Path::new("near"), how).unwrap();
        for bad in ["out", "absolute", "../secret", "/etc/passwd"] {
            let e = open_beneath(&inside, Path::new(bad), how).unwrap_err();
            assert_eq!(e.errno(), libc::EXDEV, "{bad}");
        }
    }

    #[test]
    fn a_fifo_does_not_stop_us() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let c = c_path(&path).unwrap();
        // SAFETY: a valid C string.
        assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
        let f = open(&path, OpenHow::default()).unwrap();
        assert_eq!(facts(&f).unwrap().kind, FileKind::Other);
    }
}
