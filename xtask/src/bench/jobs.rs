//! Jobs: how long a daemon takes to copy a chain, and what CPU that costs it.
//!
//! The disk is a chain of two qcow2 images, `top` over `base`. Of each 16 MiB of it, 4 MiB
//! of data are in `base`, the next 4 MiB in `top`, and the rest is nowhere, so that half of
//! the disk is full. Each measurement starts with fresh copies of the images that the
//! job changes, written out to the disk and still in the page cache, and with a new daemon.
//! Time and CPU are taken from the command that starts the job to the event that says
//! that it is over, so they include the flushes and the change of the graph at its end.
//!
//! The first measurement of each side is checked: the result must read like the chain did.

use std::cell::OnceCell;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::process::Line;
use super::sample::Sample;
use super::server::Server;
use super::{Context, Result};

/// Bytes of data in one run.
const RUN: u64 = 4 << 20;
/// One run in `base`, one in `top`, two nowhere.
const PERIOD: u64 = 4 * RUN;
/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a monitor may take to greet.
const GREETING: Duration = Duration::from_secs(20);

/// The jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Mirror,
    Backup,
    Stream,
    Commit,
}

impl Job {
    /// Bytes that it moves, on a disk of `size` bytes.
    fn moves(self, size: u64) -> u64 {
        let run = size / PERIOD * RUN;
        match self {
            Job::Mirror | Job::Backup => 2 * run,
            Job::Stream | Job::Commit => run,
        }
    }

    fn command(self) -> Value {
        let (name, arguments) = match self {
            Job::Mirror => ("blockdev-mirror", json!({"device": "top", "target": "target", "sync": "full"})),
            Job::Backup => ("blockdev-backup", json!({"device": "top", "target": "target", "sync": "full"})),
            Job::Stream => ("block-stream", json!({"device": "top"})),
            Job::Commit => ("block-commit", json!({"device": "top", "base-node": "base"})),
        };
        let mut arguments = arguments;
        arguments["job-id"] = "job".into();
        json!({ "execute": name, "arguments": arguments })
    }

    /// What must read like the chain did before.
    fn result(self) -> &'static str {
        match self {
            Job::Mirror | Job::Backup => "target.qcow2",
            Job::Stream => "top.qcow2",
            Job::Commit => "base.qcow2",
        }
    }
}

/// The chain that every measurement starts from.
pub(super) struct Chain {
    dir: PathBuf,
    size: u64,
    made: OnceCell<()>,
}

impl Chain {
    /// A chain of `size` bytes in a directory that exists; made when first asked for.
    pub(super) fn new(dir: PathBuf, size: u64) -> Chain {
        Chain { dir, size: size / PERIOD * PERIOD, made: OnceCell::new() }
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The templates, for comparing with and copying from.
    fn make(&self) -> Result<()> {
        if self.made.get().is_some() {
            return Ok(());
        }
        let size = self.size.to_string();
        for (name, at, seed) in [("base", 0, 0x2545_f491_4f6c_dd1d_u64), ("top", RUN, 0x9e37_79b9_7f4a_7c15)]
        {
            let (raw, image) = (self.path("run.raw"), self.path(&format!("{name}.template")));
            self.fill(&raw, at, seed)?;
            Line::new("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&image)])
                .run()?;
            fs::remove_file(raw)?;
        }
        let (top, base) = (text(&self.path("top.template")), text(&self.path("base.template")));
        Line::new("qemu-img", ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &base, &top]).run()?;
        for name in ["base.template", "top.template"] {
            fs::File::open(self.path(name))?.sync_all()?;
        }
        // What the job's own target looks like when it is new.
        let empty = text(&self.path("target.template"));
        Line::new("qemu-img", ["create", "-q", "-f", "qcow2", &empty, &size]).run()?;
        self.made.get_or_init(|| ());
        Ok(())
    }

    /// A sparse raw file with data in every period from `at` on.
    fn fill(&self, path: &Path, at: u64, mut x: u64) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let file = fs::File::create(path)?;
        file.set_len(self.size)?;
        let mut block = vec![0u8; RUN as usize];
        for period in 0..self.size / PERIOD {
            for word in block.chunks_exact_mut(8) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                word.copy_from_slice(&x.to_le_bytes());
            }
            file.write_all_at(&block, period * PERIOD + at)?;
        }
        Ok(())
    }

    /// Fresh images for one measurement.
    fn reset(&self) -> Result<()> {
        for name in ["base", "top", "target"] {
            let to = self.path(&format!("{name}.qcow2"));
            fs::copy(self.path(&format!("{name}.template")), &to)?;
            fs::File::open(&to)?.sync_all()?;
        }
        let (top, base) = (text(&self.path("top.qcow2")), text(&self.path("base.qcow2")));
        Line::new("qemu-img", ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &base, &top]).run()?;
        fs::File::open(&top)?.sync_all()?;
        Ok(())
    }
}

/// A job under one daemon.
pub(super) struct Subject<'a> {
    cx: &'a Context,
    /// The daemon without its options.
    daemon: Line,
    job: Job,
    checked: std::cell::Cell<bool>,
}

impl<'a> Subject<'a> {
    /// `daemon` is a storage daemon, or our program with its verb.
    pub(super) fn new(cx: &'a Context, daemon: Line, job: Job) -> Subject<'a> {
        Subject { cx, daemon, job, checked: std::cell::Cell::new(false) }
    }

    /// What a job moves, in units of the table: GiB.
    fn gib(&self) -> f64 {
        self.job.moves(self.cx.chain.size()) as f64 / (1u64 << 30) as f64
    }

    /// One measurement.
    pub(super) fn sample(&self) -> Result<Sample> {
        let chain = &self.cx.chain;
        chain.make()?;
        chain.reset()?;
        let socket = chain.path("monitor.sock");
        let node = |name: &str, rest: &str| {
            format!(
                "driver=qcow2,node-name={name},file.driver=file,file.filename={}{rest}",
                text(&chain.path(&format!("{name}.qcow2")))
            )
        };
        let monitor = format!("socket,path={},server=on,wait=off,id=m", text(&socket));
        let line = self
            .daemon
            .clone()
            .with(["--blockdev", &node("base", ""), "--blockdev", &node("top", ",backing=base")])
            .with(["--blockdev", &node("target", "")])
            .with(["--chardev", &monitor, "--monitor", "chardev=m"]);
        let server = Server::start(&line, &socket)?;
        let mut monitor = Monitor::open(&socket)?;
        let (before, started) = (server.cpu()?, Instant::now());
        monitor.send(&self.job.command())?;
        monitor.finish()?;
        let wall = started.elapsed();
        let cpu = server.cpu()?.since(&before);
        monitor.send(&json!({"execute": "quit"}))?;
        monitor.rest();
        server.ended()?;
        if !self.checked.replace(true) {
            let images = [text(&chain.path(self.job.result())), text(&chain.path("top.template"))];
            Line::new("qemu-img", ["compare", "-q", "-f", "qcow2", "-F", "qcow2"]).with(&images).run()?;
        }
        Ok(Sample { wall_ns: wall.as_nanos() as f64 / self.gib(), cpu_ns: cpu as f64 / self.gib() })
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The least of a monitor that a job needs.
struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects. A daemon that serves one client at a time may still be busy with the one
    /// that looked whether it listens.
    fn open(socket: &Path) -> Result<Monitor> {
        let end = Instant::now() + GREETING;
        loop {
            match Monitor::try_open(socket) {
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                opened => return opened,
            }
        }
    }

    fn try_open(socket: &Path) -> Result<Monitor> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut m = Monitor { lines: BufReader::new(stream) };
        m.receive()?;
        m.send(&json!({"execute": "qmp_capabilities"}))?;
        while m.receive()?.get("return").is_none() {}
        Ok(m)
    }

    fn send(&mut self, command: &Value) -> Result<()> {
        Ok(self.lines.get_mut().write_all(format!("{command}\n").as_bytes())?)
    }

    /// The next reply or event; an error of the other side is one here.
    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err("the daemon closed its monitor".into());
        }
        let value: Value = serde_json::from_str(&line)?;
        match value.get("error") {
            Some(e) => Err(format!("the daemon refused: {e}").into()),
            None => Ok(value),
        }
    }

    /// Completes the job when it is ready, and waits for its end.
    fn finish(&mut self) -> Result<()> {
        loop {
            let value = self.receive()?;
            match value["event"].as_str() {
                Some("BLOCK_JOB_READY") => {
                    self.send(&json!({"execute": "job-complete", "arguments": {"id": "job"}}))?;
                }
                Some("BLOCK_JOB_COMPLETED") if value["data"].get("error").is_none() => return Ok(()),
                Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_ERROR") => {
                    return Err(format!("the job failed: {value}").into());
                }
                _ => {}
            }
        }
    }

    /// Reads until the daemon hangs up, in whatever way.
    fn rest(&mut self) {
        let mut line = String::new();
        while self.lines.read_line(&mut line).is_ok_and(|n| n > 0) {
            line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_disk_is_full() {
        assert_eq!(Job::Mirror.moves(1 << 30), 1 << 29);
        assert_eq!(Job::Commit.moves(1 << 30) + Job::Stream.moves(1 << 30), 1 << 29);
        assert_eq!(Chain::new("x".into(), (1 << 30) + 4096).size(), 1 << 30);
    }
}
