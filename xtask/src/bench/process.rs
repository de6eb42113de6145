//! Running programs and reading what they cost.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use super::Result;

/// What a program that has ended cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// From start to end.
    pub(super) wall: Duration,
    /// CPU time of all its threads, user and system.
    pub(super) cpu: Duration,
}

/// A command line, as a value.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) program: PathBuf,
    pub(super) args: Vec<String>,
}

impl Line {
    pub(super) fn new<S: AsRef<str>>(program: impl Into<PathBuf>, args: impl IntoIterator<Item = S>) -> Line {
        Line { program: program.into(), args: args.into_iter().map(|a| a.as_ref().to_owned()).collect() }
    }

    /// The same with more arguments.
    pub(super) fn with<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Line {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// As a command of the standard library.
    pub(super) fn command(&self) -> Command {
        let mut c = Command::new(&self.program);
        c.args(&self.args).stdin(Stdio::null());
        c
    }

    /// Runs it to the end. Gives its output and what it cost.
    pub(super) fn run(&self) -> Result<(String, Cost)> {
        // Children are waited for one at a time here, so the difference is this one's.
        let before = children_cpu()?;
        let started = Instant::now();
        let out = self
            .command()
            .stderr(Stdio::piped())
            .output()
            .map_err(|e| format!("{} cannot be started: {e}", self.program.display()))?;
        let wall = started.elapsed();
        let cpu = children_cpu()?.saturating_sub(before);
        if !out.status.success() {
            let text = String::from_utf8_lossy(&out.stderr);
            return Err(format!("{self} failed ({}): {}", out.status, text.trim()).into());
        }
        Ok((String::from_utf8_lossy(&out.stdout).into_owned(), Cost { wall, cpu }))
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.program.display(), self.args.join(" "))
    }
}

fn children_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = |t: nix::sys::time::TimeVal| t.tv_sec() as u64 * 1_000_000 + t.tv_usec() as u64;
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => dir.into(),
        None => crate::workspace::root().join("target"),
    }
}

/// Builds the program and gives its path.
pub(super) fn build(target: &Path) -> Result<PathBuf> {
    let status =
        crate::workspace::cargo().args(["build", "--quiet", "--release", "--package", "dolmen"]).status()?;
    if !status.success() {
        return Err("dolmen could not be built".into());
    }
    Ok(target.join("release/dolmen"))
}

/// Whether a program is there.
pub(super) fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| d.join(OsStr::new(program)).is_file())
}
