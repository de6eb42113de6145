//! Counting system calls from outside.
//!
//! `perf stat` counts at the kernel's entry tracepoint and hardly disturbs; it needs the
//! right to use tracepoints. `strace -c` works for everybody's own processes but stops
//! them at each call, so that a server under it finds more requests waiting each time.

use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Result;
use super::process::{Line, exists};

const EVENT: &str = "raw_syscalls:sys_enter";
/// How long a tracer may take to attach.
const ATTACH: Duration = Duration::from_secs(10);

/// How system calls are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counter {
    Perf,
    Strace,
    /// Not at all.
    None,
}

impl Counter {
    /// The best that works here.
    pub(super) fn find() -> Counter {
        let works = |c: Counter| c.of_program(&Line::new("true", [""; 0])).is_ok_and(|n| n.is_some());
        if exists("perf") && works(Counter::Perf) {
            Counter::Perf
        } else if exists("strace") && works(Counter::Strace) {
            Counter::Strace
        } else {
            Counter::None
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Counter::Perf => "perf",
            Counter::Strace => "strace",
            Counter::None => "nothing: neither perf (with tracepoints) nor strace works here",
        }
    }

    /// System calls of a program from start to end, children included.
    pub(super) fn of_program(self, line: &Line) -> Result<Option<u64>> {
        let file = tempfile::NamedTempFile::new()?;
        let path = file.path().to_string_lossy().into_owned();
        let under = match self {
            Counter::None => return Ok(None),
            Counter::Perf => Line::new("perf", ["stat", "-x,", "-e", EVENT, "-o", &path, "--"]),
            Counter::Strace => Line::new("strace", ["-f", "-c", "-o", &path, "--"]),
        };
        let program = line.program.to_string_lossy().into_owned();
        under.with([program]).with(&line.args).run()?;
        self.parse(&fs::read_to_string(&path)?).map(Some)
    }

    /// System calls of a running process while `load` runs.
    pub(super) fn of_process(self, pid: u32, load: &Line) -> Result<Option<u64>> {
        let file = tempfile::NamedTempFile::new()?;
        let path = file.path().to_string_lossy().into_owned();
        let pid_text = pid.to_string();
        match self {
            Counter::None => Ok(None),
            Counter::Perf => {
                // With a process and a command it counts the process as long as the command runs.
                let under =
                    Line::new("perf", ["stat", "-x,", "-e", EVENT, "-o", &path, "-p", &pid_text, "--"]);
                let program = load.program.to_string_lossy().into_owned();
                under.with([program]).with(&load.args).run()?;
                self.parse(&fs::read_to_string(&path)?).map(Some)
            }
            Counter::Strace => {
                let mut tracer = Command::new("strace")
                    .args(["-f", "-c", "-o", &path, "-p", &pid_text])
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()?;
                let run = wait_for_tracer(pid).and_then(|()| load.run());
                // It writes its table when it is interrupted.
                kill(Pid::from_raw(tracer.id() as i32), Signal::SIGINT)?;
                tracer.wait()?;
                run?;
                self.parse(&fs::read_to_string(&path)?).map(Some)
            }
        }
    }

    fn parse(self, text: &str) -> Result<u64> {
        let found = match self {
            // value,unit,event,...
            Counter::Perf => text
                .lines()
                .find(|l| l.contains(EVENT))
                .and_then(|l| l.split(',').next())
                .and_then(|n| n.parse().ok()),
            // % time, seconds, usecs/call, calls, [errors,] "total"
            Counter::Strace => text
                .lines()
                .find(|l| l.trim_end().ends_with(" total"))
                .and_then(|l| l.split_whitespace().nth(3))
                .and_then(|n| n.parse().ok()),
            Counter::None => None,
        };
        found.ok_or_else(|| format!("no count in the output of {}: {text}", self.name()).into())
    }
}

fn wait_for_tracer(pid: u32) -> Result<()> {
    let end = Instant::now() + ATTACH;
    let path = format!("/proc/{pid}/status");
    loop {
        let mut text = String::new();
        fs::File::open(&path)?.read_to_string(&mut text)?;
        if text.lines().any(|l| l.starts_with("TracerPid:") && l.split_whitespace().nth(1) != Some("0")) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err("strace did not attach".into());
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_counters() {
        let perf = "# started on x\n\n36,,raw_syscalls:sys_enter,903921,100.00,,\n";
        assert_eq!(Counter::Perf.parse(perf).unwrap(), 36);
        assert!(Counter::Perf.parse("<not supported>,,raw_syscalls:sys_enter,0,").is_err());
        let strace = "  0.00    0.000000           0         1           set_tid_address\n\
            ------ ----------- ----------- --------- --------- ------------------\n\
            100.00    0.400089          37     10736         2 total\n";
        assert_eq!(Counter::Strace.parse(strace).unwrap(), 10736);
        assert!(Counter::Strace.parse("").is_err());
    }
}
