//! The daemon of the tour: a process of its own, driven by QMP over a Unix socket.
//!
//! It is ended when the value is dropped, whatever happened before.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::out;
use dolmen::types::{Error, ErrorKind, Result, ResultExt};
use serde_json::Value as Json;

/// How long the daemon may take to come up.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often the tour looks whether it has.
const POLL: Duration = Duration::from_millis(5);

pub(super) struct Daemon {
    process: Child,
    qmp: BufReader<UnixStream>,
}

impl Daemon {
    /// Starts `dolmen serve` with these arguments and a monitor, and waits until it is
    /// ready.
    pub(super) fn start(exe: &Path, dir: &Path, args: &[&str]) -> Result<Daemon> {
        out!("  $ dolmen serve \\");
        for pair in args.chunks(2) {
            out!("      {} \\", pair.join(" "));
        }
        let monitor =
            ["--chardev", "socket,id=mon0,path=qmp.sock,server=on,wait=off", "--monitor", "chardev=mon0"];
        out!("      {} {} \\\n      {} {}", monitor[0], monitor[1], monitor[2], monitor[3]);
        crate::cli::flush();
        // The pid file is written when everything is up; the shell of a user would wait
        // for `--daemonize` to return.
        let child = Command::new(exe)
            .arg("serve")
            .args(args)
            .args(monitor)
            .args(["--pidfile", "serve.pid"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| "could not start the daemon")?;
        let mut starting = Starting(Some(child));
        let started = Instant::now();
        let stream = loop {
            if dir.join("serve.pid").exists()
                && let Ok(s) = UnixStream::connect(dir.join("qmp.sock"))
            {
                break s;
            }
            if let Some(text) = starting.failed()? {
                return Err(Error::new(ErrorKind::Io, format!("the daemon did not start: {text}")));
            }
            if started.elapsed() > START_LIMIT {
                return Err(Error::new(ErrorKind::TimedOut, "the daemon did not come up within 30 s"));
            }
            std::thread::sleep(POLL);
        };
        let mut daemon =
            Daemon { process: starting.0.take().expect("still there"), qmp: BufReader::new(stream) };
        let greeting = daemon.line()?;
        if greeting.get("QMP").is_none() {
            return Err(Error::new(ErrorKind::Corrupt, format!("the daemon greets with {greeting}")));
        }
        daemon.command("qmp_capabilities", "{}")?;
        Ok(daemon)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Runs a command and gives its result.
    pub(super) fn command(&mut self, name: &str, arguments: &str) -> Result<Json> {
        match self.exchange(name, arguments)? {
            Ok(value) => Ok(value),
            Err(text) => Err(Error::new(ErrorKind::Io, format!("{name} failed: {text}"))),
        }
    }

    /// Shows a command that has to be refused, and gives the explanation.
    pub(super) fn refused(&mut self, name: &str, arguments: &str) -> Result<String> {
        out!("  QMP> {{\"execute\": \"{name}\", \"arguments\": {arguments}}}");
        match self.exchange(name, arguments)? {
            Ok(_) => Err(Error::new(ErrorKind::Io, format!("{name} was accepted and must not be"))),
            Err(text) => Ok(text),
        }
    }

    /// Ends it the regular way.
    pub(super) fn quit(mut self) -> Result<()> {
        out!("  QMP> {{\"execute\": \"quit\"}}");
        self.command("quit", "{}")?;
        let status = self.process.wait().context(|| "waiting for the daemon")?;
        if !status.success() {
            return Err(Error::new(ErrorKind::Io, format!("the daemon ended with {status}")));
        }
        Ok(())
    }

    fn exchange(&mut self, name: &str, arguments: &str) -> Result<Result<Json, String>> {
        let text = format!("{{\"execute\": \"{name}\", \"arguments\": {arguments}}}\n");
        self.qmp.get_mut().write_all(text.as_bytes()).context(|| "sending a command")?;
        loop {
            let mut reply = self.line()?;
            if let Some(error) = reply.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or_default().to_owned()));
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            // Anything else is an event.
        }
    }

    fn line(&mut self) -> Result<Json> {
        let mut line = String::new();
        self.qmp.read_line(&mut line).context(|| "reading from the daemon")?;
        serde_json::from_str(&line)
            .map_err(|e| Error::new(ErrorKind::Corrupt, format!("the daemon said {line:?}")).source(e))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// A daemon that may not come up.
struct Starting(Option<Child>);

impl Starting {
    /// What it said, if it has ended already.
    fn failed(&mut self) -> Result<Option<String>> {
        let child = self.0.as_mut().expect("only taken at the end");
        if child.try_wait().context(|| "waiting for the daemon")?.is_none() {
            return Ok(None);
        }
        let mut text = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut text).context(|| "reading what the daemon said")?;
        }
        Ok(Some(text.trim().to_owned()))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// Ends a process that may have ended already; there is nobody to tell about failures.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
