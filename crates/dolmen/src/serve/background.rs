//! Going to the background, and the pid file.
//!
//! Forking a process with threads is full of traps, so `--daemonize` does not fork: the
//! first process starts the program again in a session of its own and waits until that
//! one says that it is ready. What the second process prints on the way reaches the
//! user; a failure becomes the first one's exit code.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dolmen::types::{Error, ErrorKind, Result, ResultExt};

/// Set for the second process only, which removes it.
const MARK: &str = "DOLMEN_IN_BACKGROUND";

/// What the second process says on its standard output when it is ready.
const READY: &[u8] = b"ready\n";

/// Whether this is the second process.
pub(super) fn is_background() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts the second process with the same arguments and waits until it is ready or has
/// failed. Returns the exit code for the first.
///
/// # Errors
/// When it can't be started.
pub(super) fn start(args: &[OsString]) -> Result<u8> {
    let name = std::env::args_os().next().unwrap_or_else(|| "dolmen".into());
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(args)
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context(|| "cannot start the process for the background")?;
    let mut said = Vec::new();
    if let Some(mut out) = child.stdout.take() {
        // Ends when the child is ready (it lets go of the pipe) or dead.
        out.read_to_end(&mut said).context(|| "waiting for the process in the background")?;
    }
    if said.ends_with(READY) {
        return Ok(0);
    }
    let status = child.wait().context(|| "waiting for the process in the background")?;
    Ok(status.code().and_then(|c| u8::try_from(c).ok()).filter(|c| *c != 0).unwrap_or(1))
}

/// In the second process: leaves the session of the first, so that its terminal does
/// not end this one.
///
/// # Errors
/// The system's.
pub(super) fn detach() -> Result<()> {
    rustix::process::setsid().map(drop).map_err(std::io::Error::from).context(|| "setsid")
}

/// In the second process: tells the first that all is ready, and lets go of its output.
///
/// # Errors
/// When `/dev/null` can't be opened.
pub(super) fn announce() -> Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context(|| "/dev/null")?;
    let mut out = std::io::stdout();
    // The first process may have been killed meanwhile; this one serves all the same.
    let _ = out.write_all(READY).and_then(|()| out.flush());
    let io = |r: rustix::io::Result<()>| r.map_err(std::io::Error::from);
    io(rustix::stdio::dup2_stdout(&null)).context(|| "standard output")?;
    io(rustix::stdio::dup2_stderr(&null)).context(|| "standard error")
}

/// A pid file, locked for as long as the process lives; removed when dropped.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Writes this process's id. A file left over by a dead process is taken over.
    ///
    /// # Errors
    /// The system's; `Busy` when a live process has it.
    pub(super) fn create(path: &Path) -> Result<PidFile> {
        let at = || format!("cannot create PID file: Could not create '{}'", path.display());
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .context(at)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut pid = String::new();
                    // Only for the message.
                    let _ = file.read_to_string(&mut pid);
                    return Err(Error::new(
                        ErrorKind::Busy,
                        format!(
                            "cannot create PID file: '{}' belongs to process {} that is alive",
                            path.display(),
                            pid.trim()
                        ),
                    )
                    .remedy("end that process first, or choose another --pidfile"));
                }
                Err(TryLockError::Error(e)) => return Err(Error::from(e).context(at())),
            }
            let ours = PidFile { path: path.to_owned(), file };
            // Its last owner may have removed it between opening and locking.
            if ours.is_in_place() {
                ours.file.set_len(0).context(at)?;
                writeln!(&ours.file, "{}", std::process::id()).context(at)?;
                return Ok(ours);
            }
            std::mem::drop(ours);
        }
    }

    fn is_in_place(&self) -> bool {
        let key = |m: std::fs::Metadata| (m.dev(), m.ino());
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(a), Ok(b)) => key(a) == key(b),
            _ => false,
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_in_place() {
            // Nothing can be done about a directory that has become read-only.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_has_one_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pid");
        std::fs::write(&path, "4711 left over\n").expect("written");
        let first = PidFile::create(&path).expect("taken over");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, format!("{}\n", std::process::id()));
        let e = PidFile::create(&path).expect_err("locked");
        assert_eq!(e.kind(), ErrorKind::Busy);
        drop(first);
        assert!(!path.exists());
        drop(PidFile::create(&path).expect("free again"));
    }

    #[test]
    fn somebody_elses_file_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pid");
        let ours = PidFile::create(&path).expect("created");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "other").expect("written");
        drop(ours);
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "other");
    }
}
