//! What a file name leads to on this host: the driver that opens it, and which file it is.
//!
//! Two names are of the same file if device and inode are the same; of a file that is not there yet, if they lead to
//! the same entry of the same directory. Everything here asks the file system, so it is called where waiting
//! stops nobody ([`dolmen_rt::CoreIo::blocking_at`]).

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use dolmen_rt::{Rt, sys};
use dolmen_types::{Error, ErrorKind, Result, ResultExt, os_name};

/// Which file it is: device and inode; of a block device its number, unless it is a loop device over a whole file.
pub type FileId = (u64, u64);

/// Symbolic links followed before a name counts as a loop, as the kernel does.
const MAX_LINKS: usize = 40;

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// To a file that is there.
    Present(FileId),
    /// To nothing yet: the entry that would be made, in a directory without symbolic links.
    Absent(PathBuf),
}

/// Which file metadata are of.
pub fn id_of(m: &std::fs::Metadata) -> FileId {
    if m.file_type().is_block_device() { sys::device_id(m.rdev()) } else { (m.dev(), m.ino()) }
}

/// Where a name leads.
///
/// # Errors
/// What the file system says, except that the last part of the name is not there.
pub(crate) fn place(name: &Path) -> Result<Place> {
    let mut name = name.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::metadata(&name) {
            Ok(m) => return Ok(Place::Present(id_of(&m))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        let dir = match name.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
            _ => PathBuf::from("."),
        };
        // A link that leads to nothing: what it names would be made.
        if let Ok(to) = std::fs::read_link(&name) {
            name = dir.join(to);
            continue;
        }
        let last = name.file_name().ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("'{}' does not name a file", name.display()))
        })?;
        let dir = std::fs::canonicalize(dir)?;
        return Ok(Place::Absent(dir.join(last)));
    }
    Err(Error::new(ErrorKind::InvalidInput, "too many levels of symbolic links"))
}

/// [`place`] in a task; `None` where there are no files (in a simulation).
pub(crate) async fn place_in(rt: &Rt, name: &str) -> Result<Option<Place>> {
    let Some(io) = rt.io() else { return Ok(None) };
    let path = PathBuf::from(os_name(name));
    io.blocking_at(&path.clone(), move || place(&path)).await.map(Some)
}

/// Whether an entry can be made in the directory of a place that is absent.
pub(crate) async fn check_absent(rt: &Rt, path: &Path) -> Result<()> {
    let Some(io) = rt.io() else { return Ok(()) };
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let at = dir.clone();
    let check = move || sys::check_writable_dir(&dir).context(|| format!("directory '{}'", dir.display()));
    io.blocking_at(&at, check).await
}

/// Removes a file that was made a moment ago, unless another one has taken its place.
pub(crate) fn remove(path: &Path, id: FileId) {
    if place(path).is_ok_and(|p| p == Place::Present(id)) {
        // One that somebody else has removed meanwhile is gone as well.
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_and_links_of_one_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |n: &str| dir.path().join(n);
        std::fs::create_dir(at("d")).expect("a directory");
        std::fs::write(at("a"), b"").expect("a file");
        std::fs::hard_link(at("a"), at("hard")).expect("a link");
        std::os::unix::fs::symlink("a", at("soft")).expect("a link");
        std::os::unix::fs::symlink("d/../new", at("dangling")).expect("a link");
        std::os::unix::fs::symlink("turns", at("turns")).expect("a link");
        let a = place(&at("a")).expect("it is there");
        assert!(matches!(a, Place::Present(_)));
        for same in ["hard", "soft", "./a", "d/../a"] {
            assert_eq!(place(&at(same)).expect("it is there"), a, "{same}");
        }
        let new = place(&at("new")).expect("its directory is there");
        assert!(matches!(new, Place::Absent(_)));
        for same in ["dangling", "d/../new"] {
            assert_eq!(place(&at(same)).expect("its directory is there"), new, "{same}");
        }
        assert!(place(&at("turns")).is_err());
        assert!(place(&at("nowhere/x")).is_err());
    }
}
