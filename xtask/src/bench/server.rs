//! Servers under load: starting them, and reading their CPU time while they run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::Result;
use super::process::Line;

/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(20);

/// A running server; killed when dropped.
pub(super) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts it and waits until it listens.
    pub(super) fn start(line: &Line, socket: &Path) -> Result<Server> {
        let mut child = line
            .command()
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("{} cannot be started: {e}", line.program.display()))?;
        let end = Instant::now() + START;
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if let Some(status) = child.try_wait()? {
                return Err(format!("{line} ended at once: {status}").into());
            }
            if Instant::now() > end {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{line} does not listen on {}", socket.display()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Server { child, socket: socket.to_owned() })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its own end.
    pub(super) fn ended(mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the server ended with {status}").into()) }
    }

    /// CPU time of all its threads so far.
    pub(super) fn cpu(&self) -> Result<Cpu> {
        let dir = format!("/proc/{}", self.pid());
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("{dir}/task"))? {
            let path = entry?.path();
            // A thread may end between the two.
            let Ok(text) = fs::read_to_string(path.join("schedstat")) else { continue };
            let ns = text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
            threads.push((path, ns));
        }
        let stat = fs::read_to_string(format!("{dir}/stat"))?;
        // The name may hold anything; fields are counted from the parenthesis after it.
        let fields: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .map(|f| f.parse().unwrap_or(0))
            .collect();
        let ticks = fields.get(11).zip(fields.get(12)).map(|(u, s)| u + s).ok_or("no CPU time in /proc")?;
        Ok(Cpu { threads, ticks })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// A reading of a process's CPU time.
pub(super) struct Cpu {
    /// The threads that live, in nanoseconds.
    threads: Vec<(PathBuf, u64)>,
    /// Everything, also of threads that have ended, in hundredths of a second.
    ticks: u64,
}

impl Cpu {
    /// Nanoseconds since an earlier reading: exact if no thread has ended meanwhile,
    /// else as coarse as the kernel's clock ticks.
    pub(super) fn since(&self, earlier: &Cpu) -> u64 {
        let all_alive = earlier.threads.iter().all(|(p, _)| self.threads.iter().any(|(q, _)| p == q));
        if all_alive {
            let sum = |c: &Cpu| c.threads.iter().map(|t| t.1).sum::<u64>();
            sum(self).saturating_sub(sum(earlier))
        } else {
            (self.ticks - earlier.ticks) * 10_000_000
        }
    }
}
