//! Daemons as processes, and QMP clients for them: ours and QEMU's.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

/// Nothing here takes longer than this unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long QEMU's daemon may take. It is not what is tested, and took more than a minute on a busy machine once.
const PEER_PATIENCE: Duration = Duration::from_secs(600);

/// The test that runs, for messages.
fn test_name() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

/// Waits until `ready` gives something: asks again and again, and leaves the processor to what it waits for.
pub(crate) fn eventually<T>(what: &str, ready: impl FnMut() -> Option<T>) -> T {
    within(PATIENCE, what, ready)
}

fn within<T>(patience: Duration, what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(v) = ready() {
            return v;
        }
        assert!(Instant::now() < deadline, "{}: waited {patience:?} for: {what}", test_name());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The storage daemon under a name: `dolmen serve`, or QEMU's name by a symbolic link.
pub(crate) fn serve() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_dolmen"));
    c.arg("serve");
    c
}

/// Our daemon, called as QEMU's.
pub(crate) fn by_established_name(dir: &Path) -> Command {
    let link = dir.join("qemu-storage-daemon");
    if !link.exists() {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dolmen"), &link).expect("a link");
    }
    Command::new(link)
}

/// QEMU's daemon itself; `None` where it is not installed.
pub(crate) fn established() -> Option<Command> {
    let found = Command::new("qemu-storage-daemon").arg("--version").output();
    match found {
        Ok(o) if o.status.success() => Some(Command::new("qemu-storage-daemon")),
        _ => {
            eprintln!("qemu-storage-daemon is not installed: nothing to compare with");
            None
        }
    }
}

/// Runs a command that ends by itself; status, standard output, standard error.
pub(crate) fn run(mut command: Command, args: &[impl AsRef<OsStr>]) -> (ExitStatus, String, String) {
    let out = command.args(args).stdin(Stdio::null()).output().expect("runs");
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    (out.status, text(out.stdout), text(out.stderr))
}

/// A running daemon with a monitor socket in a directory of its own.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) dir: TempDir,
    /// Its process identifier is written here at the end of its start.
    started: Option<PathBuf>,
    /// Its program and process, for messages.
    who: String,
    patience: Duration,
}

impl Daemon {
    fn of(child: Child, dir: TempDir, started: Option<PathBuf>, command: &Command) -> Daemon {
        let program = Path::new(command.get_program());
        let who = format!("{} (pid {})", program.display(), child.id());
        // Ours are called by a path.
        let patience = if program.is_absolute() { PATIENCE } else { PEER_PATIENCE };
        Daemon { child, dir, started, who, patience }
    }

    /// Starts it with a monitor and more arguments, in which `DIR` stands for its directory.
    pub(crate) fn start(command: impl FnOnce(&Path) -> Command, args: &[&str]) -> Daemon {
        let dir = tempfile::tempdir().expect("a directory");
        Daemon::start_in(dir, command, args)
    }

    pub(crate) fn start_in(dir: TempDir, command: impl FnOnce(&Path) -> Command, args: &[&str]) -> Daemon {
        let at = dir.path().display().to_string();
        let mut c = command(dir.path());
        c.arg("--chardev").arg(format!("socket,path={at}/m.sock,server=on,wait=off,id=m"));
        c.args(["--monitor", "chardev=m"]).args(args.iter().map(|a| a.replace("DIR", &at)));
        let started = (!args.contains(&"--pidfile")).then(|| dir.path().join("started"));
        if let Some(path) = &started {
            // One that was killed in the same directory left its own.
            let _ = std::fs::remove_file(path);
            c.arg("--pidfile").arg(path);
        }
        let child = c.current_dir(dir.path()).stdin(Stdio::null()).spawn().expect("starts");
        Daemon::of(child, dir, started, &c)
    }

    /// Another program in a directory, which ends with this.
    pub(crate) fn other(dir: TempDir, mut command: Command) -> Daemon {
        let child = command.current_dir(dir.path()).stdin(Stdio::null()).spawn().expect("starts");
        Daemon::of(child, dir, None, &command)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A monitor that is ready for commands.
    ///
    /// The socket is there before the daemon is: QEMU's monitor opens a second time when a
    /// client comes while it starts, which greets twice and loses what has been received of a
    /// command. The process identifier is written at the end of the start.
    pub(crate) fn monitor(&mut self) -> Monitor {
        let path = self.path("m.sock");
        if let Some(started) = &self.started {
            within(self.patience, &format!("the start of {}", self.who), || {
                if let Some(status) = self.child.try_wait().expect("a child") {
                    panic!("{}: {} ended with {status}", test_name(), self.who);
                }
                std::fs::read(started).ok().filter(|text| text.ends_with(b"\n"))
            });
        }
        within(self.patience, &format!("the monitor of {}", self.who), || {
            if let Some(status) = self.child.try_wait().expect("a child") {
                panic!("{}: {} ended with {status}", test_name(), self.who);
            }
            Monitor::new(UnixStream::connect(&path).ok()?, &self.who, self.patience)
        })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("signalled");
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let what = format!("the end of {}", self.who);
        within(self.patience, &what, || self.child.try_wait().expect("a child"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QMP client on a raw socket.
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
    /// Events met on the way.
    pub(crate) events: Vec<Json>,
    /// The daemon, for messages.
    who: String,
    /// The command that was sent last.
    asked: String,
}

impl Monitor {
    /// `None` when there is no greeting: the socket of a daemon that was killed may accept
    /// connections for a moment longer.
    fn new(stream: UnixStream, who: &str, patience: Duration) -> Option<Monitor> {
        stream.set_read_timeout(Some(patience)).expect("a timeout");
        let (lines, who) = (BufReader::new(stream), who.to_owned());
        let mut m = Monitor { lines, events: Vec::new(), who, asked: "(the greeting)".into() };
        assert!(m.receive()?["QMP"].is_object());
        let reply = m.ask(&json!({"execute": "qmp_capabilities"}));
        if reply["QMP"].is_object() {
            // QEMU has greeted twice after all: whether it has got the command is not known on this connection.
            return None;
        }
        assert_eq!(reply, json!({"return": {}}));
        Some(m)
    }

    /// The next object; `None` when the daemon has hung up.
    pub(crate) fn receive(&mut self) -> Option<Json> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("JSON")),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("{}: {} does not answer to {}: {e}", test_name(), self.who, self.asked),
        }
    }

    pub(crate) fn send(&mut self, command: &Json) {
        self.asked = command.to_string();
        self.send_bytes(command.to_string().as_bytes());
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.lines.get_mut().write_all(bytes).expect("sent");
    }

    pub(crate) fn ask(&mut self, command: &Json) -> Json {
        self.send(command);
        loop {
            let reply = self.receive();
            let v = reply.unwrap_or_else(|| panic!("{}: {} hung up at {command}", test_name(), self.who));
            if v.get("event").is_none() {
                return v;
            }
            self.events.push(v);
        }
    }

    pub(crate) fn ok(&mut self, name: &str, arguments: Json) -> Json {
        let reply = self.ask(&json!({"execute": name, "arguments": arguments}));
        assert!(reply.get("error").is_none(), "{}: {}: {name} {arguments}: {reply}", test_name(), self.who);
        reply["return"].clone()
    }

    /// Everything until the daemon hangs up.
    pub(crate) fn rest(mut self) -> Vec<Json> {
        let mut out = std::mem::take(&mut self.events);
        while let Some(v) = self.receive() {
            out.push(v);
        }
        out
    }
}

/// Reads a stream to its end.
pub(crate) fn read_all(mut from: impl Read) -> String {
    let mut out = String::new();
    from.read_to_string(&mut out).expect("text");
    out
}
