//! The process that is tested, seen from outside.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::qmp::Monitor;
use crate::weigh::Weight;

/// How long it may take to come up, or to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(60);

/// Words on the standard error that tell of a mistake in the program.
const BAD_WORDS: [&str; 6] =
    ["panicked", "overflowed its stack", "assertion", "Assertion", "Sanitizer", "unreachable code"];

/// The tools by their names in QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) dir: PathBuf,
    /// The ones that look at images afterwards: QEMU's where they are installed.
    pub(crate) judge: PathBuf,
}

impl Tools {
    pub(crate) fn daemon(&self) -> PathBuf {
        self.dir.join("qemu-storage-daemon")
    }

    /// Runs a tool to its end: whether it succeeded, its code, everything that it said.
    pub(crate) fn run(dir: &Path, tool: &Path, args: &[&str]) -> (i32, String) {
        let out = Command::new(tool).args(args).current_dir(dir).stdin(Stdio::null()).output();
        match out {
            Ok(o) => {
                let text = String::from_utf8_lossy(&o.stdout) + String::from_utf8_lossy(&o.stderr);
                (o.status.code().unwrap_or(-1), text.into_owned())
            }
            Err(e) => (-1, format!("{}: {e}", tool.display())),
        }
    }
}

/// A daemon.
pub(crate) struct Daemon {
    child: Child,
    stderr: PathBuf,
    pub(crate) monitor: PathBuf,
    pub(crate) nbd: PathBuf,
}

impl Daemon {
    /// Starts it in a directory, with sockets that begin with `name`.
    pub(crate) fn start(program: &Path, dir: &Path, name: &str) -> Result<Daemon, String> {
        let monitor = dir.join(format!("{name}.qmp"));
        let _ = fs::remove_file(&monitor);
        let stderr = dir.join(format!("{name}.err"));
        let err = File::options().create(true).append(true).open(&stderr).map_err(|e| e.to_string())?;
        let mut c = Command::new(program);
        for i in 0..3 {
            // One socket a monitor: QEMU's serve one client at a time.
            c.arg("--chardev").arg(format!("socket,path={name}.qmp{},server=on,wait=off,id=m{i}", suffix(i)));
            c.args(["--monitor", &format!("chardev=m{i}")]);
        }
        let child = c
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(err)
            .spawn()
            .map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(Daemon { child, stderr, monitor, nbd: dir.join(format!("{name}.nbd")) })
    }

    /// One of the monitors.
    pub(crate) fn connect(&mut self, number: usize) -> Result<Monitor, String> {
        let mut path = self.monitor.clone().into_os_string();
        path.push(suffix(number));
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(m) = Monitor::connect(Path::new(&path)) {
                return Ok(m);
            }
            if let Some(status) = self.ended() {
                return Err(format!("the daemon ended with {status}: {}", self.said()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err("the monitor does not come up".into())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, which is near.
    pub(crate) fn wait(&mut self) -> Option<ExitStatus> {
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() > until {
                return ended;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn said(&self) -> String {
        let text = fs::read(&self.stderr).unwrap_or_default();
        String::from_utf8_lossy(&text).chars().take(2000).collect()
    }

    /// Words that tell of a mistake in the program, with what is around them.
    pub(crate) fn bad_words(&self) -> Option<String> {
        let text = self.said();
        BAD_WORDS.iter().any(|w| text.contains(w)).then_some(text)
    }

    /// Resident memory, and open descriptors.
    pub(crate) fn weight(&self) -> Weight {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = fs::read_to_string(proc.join("status")).unwrap_or_default();
        let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib = kib.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0);
        let fds = fs::read_dir(proc.join("fd")).map_or(0, Iterator::count);
        Weight { mib: kib / 1024, files: fds }
    }

    /// The files that it has open.
    pub(crate) fn open_files(&self) -> Vec<PathBuf> {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        fds.into_iter().flatten().flatten().filter_map(|f| fs::read_link(f.path()).ok()).collect()
    }
}

fn suffix(number: usize) -> String {
    if number == 0 { String::new() } else { number.to_string() }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that is stopped is killed as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
