//! A daemon on a thread of this process, and a monitor for it.
//!
//! A process of its own would be closer to the product; a thread can be run with the
//! conflicts of the access control ignored, and a thousand of them start in no time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dolmen::control::{Config, Control, MonitorOptions, listen_monitor};
use serde_json::{Value as Json, json};

use crate::client::Outcome;

/// Nothing here takes longer unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What somebody panicked with.
pub(crate) fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

/// Whether conflicts are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checks {
    On,
    Off,
}

/// A running daemon.
pub(crate) struct Daemon {
    thread: Option<JoinHandle<()>>,
    monitor: Monitor,
}

impl Daemon {
    /// Starts it with its sockets in `dir`.
    pub(crate) fn start(dir: &Path, checks: Checks) -> Daemon {
        let path = dir.join("monitor.sock");
        let (ready, started) = mpsc::channel();
        let at = path.clone();
        let thread = std::thread::spawn(move || {
            dolmen::rt::block_on(|rt| async move {
                let config = Config {
                    registry: dolmen::registry(),
                    policy: dolmen::session::trusting(),
                    log: |line| println!("log: {line}"),
                };
                let control = match checks {
                    Checks::On => Control::start(&rt, config),
                    Checks::Off => Control::start_unchecked(&rt, config),
                };
                let socket = listen_monitor(&control, at).await.expect("listens");
                let serving = control.clone();
                rt.spawn(async move { socket.serve(&serving, MonitorOptions::default()).await });
                ready.send(()).expect("somebody waits");
                control.ended().await;
            });
        });
        started.recv().expect("the daemon has started");
        Daemon { thread: Some(thread), monitor: Monitor::connect(&path) }
    }

    /// Executes a command; the error is the whole error object.
    pub(crate) fn ask(&mut self, name: &str, arguments: &Json) -> Result<Json, Json> {
        self.monitor.ask(name, arguments)
    }

    /// Executes a command that has to succeed.
    pub(crate) fn ok(&mut self, name: &str, arguments: Json) -> Json {
        self.ask(name, &arguments).unwrap_or_else(|e| panic!("{name} {arguments}: {e}"))
    }

    /// Looks at events, those that have come first, until one is what is waited for. The others stay:
    /// somebody may wait for them later.
    ///
    /// # Errors
    /// When it does not come.
    pub(crate) fn event<T>(&mut self, what: &str, mut wanted: impl FnMut(&Json) -> Option<T>) -> Outcome<T> {
        let end = Instant::now() + PATIENCE;
        let mut looked_at = 0;
        loop {
            if let Some(event) = self.monitor.events.get(looked_at) {
                if let Some(found) = wanted(event) {
                    self.monitor.events.remove(looked_at);
                    return Ok(found);
                }
                looked_at += 1;
            } else if Instant::now() > end {
                return Err(format!("waited too long for {what}"));
            } else {
                let event = self.monitor.receive().map_err(|e| format!("waiting for {what}: {e}"))?;
                self.monitor.events.push(event);
            }
        }
    }

    /// Ends it in an orderly way.
    ///
    /// # Errors
    /// When it has ended in another way before.
    pub(crate) fn quit(mut self) -> Outcome<()> {
        let asked = self.ask("quit", &json!({}));
        let joined = self.thread.take().expect("not joined before").join();
        match (asked, joined) {
            (_, Err(p)) => Err(format!("the daemon panicked: {}", panic_text(&*p))),
            (Err(e), Ok(())) => Err(format!("quit failed: {e}")),
            (Ok(_), Ok(())) => Ok(()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A test has failed: the daemon must not outlive it.
            let _ = self.monitor.send("quit", &json!({}));
            let _ = thread.join();
        }
    }
}

struct Monitor {
    lines: BufReader<UnixStream>,
    /// Part of a line that came before time ran out.
    partial: String,
    events: Vec<Json>,
}

impl Monitor {
    fn connect(path: &PathBuf) -> Monitor {
        let stream = UnixStream::connect(path).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut m = Monitor { lines: BufReader::new(stream), partial: String::new(), events: Vec::new() };
        assert!(m.receive().expect("a greeting")["QMP"].is_object());
        m.ask("qmp_capabilities", &json!({})).expect("negotiated");
        m
    }

    fn send(&mut self, name: &str, arguments: &Json) -> Outcome<()> {
        let command = json!({ "execute": name, "arguments": arguments });
        let sent = self.lines.get_mut().write_all(command.to_string().as_bytes());
        sent.map_err(|e| format!("the monitor is closed: {e}"))
    }

    fn receive(&mut self) -> Outcome<Json> {
        match self.lines.read_line(&mut self.partial) {
            Ok(0) => Err("the monitor was closed".into()),
            Ok(_) => {
                let line = std::mem::take(&mut self.partial);
                serde_json::from_str(&line).map_err(|e| format!("{e}: {line}"))
            }
            Err(e) => Err(format!("nothing comes over the monitor: {e}")),
        }
    }

    fn ask(&mut self, name: &str, arguments: &Json) -> Result<Json, Json> {
        let broken = |e: String| json!({ "class": "Broken", "desc": e });
        self.send(name, arguments).map_err(broken)?;
        loop {
            let mut v = self.receive().map_err(broken)?;
            if v.get("event").is_some() {
                self.events.push(v);
            } else if v.get("error").is_some() {
                return Err(v["error"].take());
            } else {
                return Ok(v["return"].take());
            }
        }
    }
}
