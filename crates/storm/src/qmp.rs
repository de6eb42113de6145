//! A QMP client that measures how long it waits.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

/// The longest that a command may take. Far from what is promised: a busy machine must not matter.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What a command came to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reply {
    Done(Json),
    Refused(String),
    /// The daemon has hung up.
    Gone,
    /// No answer within [`PATIENCE`].
    Hangs,
}

impl Reply {
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Reply::Done(_))
    }
}

/// A monitor.
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
    text: Vec<u8>,
    /// Events that nobody has looked at.
    pub(crate) events: Vec<Json>,
}

impl Monitor {
    pub(crate) fn connect(socket: &Path) -> Option<Monitor> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        let mut m = Monitor { lines: BufReader::new(stream), text: Vec::new(), events: Vec::new() };
        let greeting = m.next(Instant::now() + PATIENCE).ok()??;
        if !greeting["QMP"].is_object() {
            return None;
        }
        m.send("qmp_capabilities", &json!({}));
        match m.reply(PATIENCE) {
            Reply::Done(_) => Some(m),
            _ => None,
        }
    }

    /// The next message; `None` if there is none until then, an error when there won't be any.
    fn next(&mut self, until: Instant) -> Result<Option<Json>, ()> {
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.lines.get_ref().set_read_timeout(Some(left)).map_err(drop)?;
            match self.lines.read_until(b'\n', &mut self.text) {
                Ok(0) => return Err(()),
                Ok(_) if self.text.ends_with(b"\n") => {
                    let v = serde_json::from_slice(&self.text).map_err(drop)?;
                    self.text.clear();
                    return Ok(Some(v));
                }
                Ok(_) => return Err(()),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {
                    return Ok(None);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(()),
            }
        }
    }

    pub(crate) fn send(&mut self, command: &str, arguments: &Json) {
        // When it fails, so will reading.
        let _ = self.raw(format!("{}\n", json!({"execute": command, "arguments": arguments})).as_bytes());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.lines.get_mut().write_all(bytes)
    }

    /// Waits for the answer to what was sent.
    pub(crate) fn reply(&mut self, patience: Duration) -> Reply {
        let until = Instant::now() + patience;
        loop {
            match self.next(until) {
                Ok(Some(v)) if v.get("return").is_some() => return Reply::Done(v["return"].clone()),
                Ok(Some(v)) if v.get("error").is_some() => {
                    return Reply::Refused(v["error"]["desc"].as_str().unwrap_or_default().to_owned());
                }
                Ok(Some(v)) if v.get("event").is_some() => self.events.push(v),
                // QEMU's daemon has been seen to greet twice.
                Ok(Some(_)) => {}
                Ok(None) => return Reply::Hangs,
                Err(()) => return Reply::Gone,
            }
        }
    }

    /// Waits for the answer to the command with this id, and passes over what else is said.
    pub(crate) fn reply_to(&mut self, id: u64, patience: Duration) -> Reply {
        let until = Instant::now() + patience;
        loop {
            match self.next(until) {
                Ok(Some(v)) if v["id"] == id => {
                    return match v.get("return") {
                        Some(done) => Reply::Done(done.clone()),
                        None => Reply::Refused(v["error"]["desc"].to_string()),
                    };
                }
                Ok(Some(_)) => {}
                Ok(None) => return Reply::Hangs,
                Err(()) => return Reply::Gone,
            }
        }
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: &Json) -> Reply {
        self.send(command, arguments);
        self.reply(PATIENCE)
    }

    /// Takes the events that come within a time.
    pub(crate) fn listen(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while let Ok(Some(v)) = self.next(until) {
            if v.get("event").is_some() {
                self.events.push(v);
            }
        }
    }
}
