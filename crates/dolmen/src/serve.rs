//! `dolmen serve`, also called as `qemu-storage-daemon`: the storage daemon.
//!
//! Executes its options in order through the same control task that monitors use, then
//! serves until it is told to end: by `quit`, SIGTERM, SIGINT or SIGHUP. At the end
//! clients are disconnected once their requests are answered, images are flushed and
//! closed, sockets and the pid file are removed. A second signal ends it at once.

mod background;
mod options;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use dolmen::control::{Config, Control, MonitorOptions, MonitorSocket, listen_monitor, serve_monitor};
use dolmen::qmp::{QmpError, Schema, Source, keyval};
use dolmen::rt::{Addr, Rt, Signals, Stream, block_on_with, block_signals};
use dolmen::types::{Error, ErrorKind, Options, Result, Value};

use crate::cli::{AllowBacking, Persona};
use background::PidFile;
use options::{Given, Kind};

/// How long the kernel may take with requests that nobody waits for any more.
const KERNEL_ENDS: Duration = Duration::from_secs(2);

/// A failure with the option that it belongs to.
struct Failed {
    option: Option<String>,
    message: String,
}

impl Failed {
    fn at(given: &Given, message: impl ToString) -> Failed {
        Failed { option: Some(given.text.clone()), message: message.to_string() }
    }
}

/// Runs the daemon; returns the exit code.
pub(crate) fn main(program: &str, persona: Persona, args: Vec<OsString>) -> u8 {
    // The arguments as the second process of `--daemonize` needs them, with the command.
    let again: Vec<OsString> = std::env::args_os().skip(1).collect();
    match start(program, persona, args, &again) {
        Ok(code) => code,
        Err(Failed { option, message }) => {
            match option {
                Some(o) => crate::cli::complain(&format!("{program}: {o}: {message}")),
                None => crate::cli::complain(&format!("{program}: {message}")),
            }
            1
        }
    }
}

fn start(
    program: &str,
    persona: Persona,
    args: Vec<OsString>,
    again: &[OsString],
) -> std::result::Result<u8, Failed> {
    let plain = |e: Error| Failed { option: None, message: QmpError::from(e).desc };
    let given = options::parse(args.into_iter().skip(1)).map_err(plain)?;
    let has = |kind: Kind| given.iter().any(|g| g.kind == kind);
    if has(Kind::Help) {
        crate::cli::say(format_args!("{}", options::help(program)));
        return Ok(0);
    }
    if has(Kind::Version) {
        let v = dolmen::qmp::Version::current();
        let (major, minor, micro) = v.compatible;
        crate::out!("{program} version {major}.{minor}.{micro} (Dolmen {})", env!("CARGO_PKG_VERSION"));
        return Ok(0);
    }
    let background = background::is_background();
    if has(Kind::Daemonize) && !background {
        return background::start(again).map_err(plain);
    }
    if background {
        background::detach().map_err(plain)?;
    }
    let mut allow = None;
    for g in given.iter().filter(|g| g.kind == Kind::AllowBacking) {
        allow =
            Some(allow_backing(&g.value).ok_or_else(|| {
                Failed::at(g, format!("'{}' is none of: none, beneath, anything", g.value))
            })?);
    }
    let mut policy = persona.policy(allow);
    policy.probe |= has(Kind::AllowProbing);
    policy.probe_with = "--allow-probing";
    let config = Config { registry: dolmen::registry(), policy, log };
    // Before any thread is started, so that no thread takes the signals.
    block_signals();
    let plan = Plan { given, background };
    let rt_config = dolmen::rt::Config::from_env();
    block_on_with(&rt_config, move |rt| async move { serve(&rt, config, &plan).await }).map_err(plain)?
}

fn allow_backing(word: &str) -> Option<AllowBacking> {
    match word {
        "none" => Some(AllowBacking::None),
        "beneath" => Some(AllowBacking::Beneath),
        "anything" => Some(AllowBacking::Anything),
        _ => None,
    }
}

/// Warnings that nobody waits for.
fn log(line: &str) {
    crate::cli::complain(&format!("dolmen: {line}"));
}

struct Plan {
    given: Vec<Given>,
    background: bool,
}

async fn serve(rt: &Rt, config: Config, plan: &Plan) -> std::result::Result<u8, Failed> {
    let plain = |e: Error| Failed { option: None, message: QmpError::from(e).desc };
    let no_io = || plain(Error::new(ErrorKind::Unsupported, "this runtime has no sockets"));
    let mut signals = rt.io().ok_or_else(no_io)?.signals().map_err(plain)?;
    let control = Control::start(rt, config);
    // A signal must end the program while it still waits for something, too.
    let started = futures_lite::future::or(async { Some(start_all(&control, plan).await) }, async {
        wait_for_signal(&mut signals).await;
        None
    })
    .await;
    let (pid_file, result) = match started {
        Some(Ok(pid_file)) => {
            futures_lite::future::or(control.quitting(), wait_for_signal(&mut signals)).await;
            (pid_file, Ok(0))
        }
        Some(Err(failed)) => (None, Err(failed)),
        None => (None, Ok(0)),
    };
    // Ends with an error only if the end has begun already.
    let end = async {
        control.quit();
        control.ended().await;
        true
    };
    let forced = async {
        wait_for_signal(&mut signals).await;
        false
    };
    if !futures_lite::future::or(end, forced).await {
        log("ended by a second signal before everything was closed");
        drop(pid_file);
        // Not by returning: the runtime would wait for the request that does not end.
        std::process::exit(1);
    }
    drop(pid_file);
    // The runtime waits for requests that the kernel still runs. Some may never end, and nobody waits for their results.
    std::thread::spawn(|| {
        std::thread::sleep(KERNEL_ENDS);
        log("ended with requests that the kernel has not finished");
        std::process::exit(1);
    });
    // What could not be closed has been logged.
    result.map(|code| if control.is_unclean() { 1 } else { code })
}

async fn wait_for_signal(signals: &mut Signals) {
    if signals.next().await.is_err() {
        // Without signals the program still ends by `quit`.
        std::future::pending::<()>().await;
    }
}

/// A chardev.
struct Chardev {
    id: String,
    /// Clients that come later.
    socket: Option<MonitorSocket>,
    /// The client that is there already.
    stream: Option<Stream>,
    /// The monitor that has taken it.
    monitor: Option<MonitorOptions>,
}

/// Executes the options in order.
async fn start_all(control: &Control, plan: &Plan) -> std::result::Result<Option<PidFile>, Failed> {
    let mut chardevs: Vec<Chardev> = Vec::new();
    for given in &plan.given {
        execute(control, given, &mut chardevs).await.map_err(|e| Failed::at(given, e.desc))?;
    }
    let pid_path = plan.given.iter().rev().find(|g| g.kind == Kind::Pidfile).map(|g| &g.value);
    let pid_file = pid_path
        .map(|p| PidFile::create(Path::new(&dolmen::types::os_name(p))))
        .transpose()
        .map_err(|e| Failed { option: None, message: QmpError::from(e).desc })?;
    // Only now, as with QEMU's daemon: whoever is greeted may rely on everything that the command line
    // asks for.
    for chardev in &mut chardevs {
        answer_on(control, chardev);
    }
    // Chardevs without a monitor stay, as sockets that nobody answers on.
    control.rt().spawn({
        let control = control.clone();
        async move {
            control.ended().await;
            drop(chardevs);
        }
    });
    if plan.background {
        background::announce().map_err(|e| Failed { option: None, message: e.to_string() })?;
    }
    Ok(pid_file)
}

async fn execute(
    control: &Control,
    given: &Given,
    chardevs: &mut Vec<Chardev>,
) -> std::result::Result<(), QmpError> {
    let text = given.value.as_str();
    match given.kind {
        Kind::Blockdev => {
            let options = checked(control, text, Some("driver"), Schema::check_blockdev)?;
            control.command("blockdev-add", options).await?;
        }
        Kind::Export => {
            let options = checked(control, text, Some("type"), Schema::check_export)?;
            control.command("block-export-add", options).await?;
        }
        Kind::NbdServer => {
            let options = checked(control, text, None, Schema::check_nbd_server)?;
            control.command("nbd-server-start", options).await?;
        }
        Kind::Chardev => {
            let chardev = open_chardev(control, text).await?;
            if chardevs.iter().any(|c| c.id == chardev.id) {
                return Err(QmpError::generic(format!("Duplicate ID '{}' for chardev", chardev.id)));
            }
            chardevs.push(chardev);
        }
        Kind::Monitor => take_for_monitor(text, chardevs)?,
        Kind::Object => {
            let kind = text.split(',').next().unwrap_or_default();
            let kind = kind.strip_prefix("qom-type=").unwrap_or(kind);
            return Err(QmpError::generic(match kind {
                "help" => "this program has no types of objects".to_owned(),
                other => {
                    format!("object type '{other}' is not supported: this program has no types of objects")
                }
            }));
        }
        Kind::Pidfile if text.is_empty() => return Err(QmpError::generic("the path is empty")),
        // Looked at before or after everything else.
        Kind::AllowBacking
        | Kind::AllowProbing
        | Kind::Daemonize
        | Kind::Help
        | Kind::Pidfile
        | Kind::Version => {}
    }
    Ok(())
}

type Check = fn(&Schema, serde_json::Value, Source) -> std::result::Result<Value, QmpError>;

fn checked(
    control: &Control,
    text: &str,
    implied: Option<&str>,
    check: Check,
) -> std::result::Result<Options, QmpError> {
    let (value, source) = keyval::parse(text, implied).map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Options::from_value(check(control.schema(), value, source)?)?)
}

fn generic(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// Opens what `--chardev` describes.
async fn open_chardev(control: &Control, text: &str) -> Result<Chardev> {
    let mut options = Options::new();
    for (k, v) in keyval::parse_flat(text, Some("backend"))? {
        options.set(k, v);
    }
    let backend = options.require_str("backend")?;
    let Some(id) = options.take_str("id")? else {
        return Err(generic("chardev: no id specified"));
    };
    let io = control.rt().io().ok_or_else(|| generic("this runtime has no sockets"))?;
    match backend.as_str() {
        "stdio" => {
            // Whether the terminal's keys make signals: they always do here.
            options.take_bool("signal")?;
            options.finish("chardev stdio")?;
            Ok(Chardev { id, socket: None, stream: Some(io.stdio()?), monitor: None })
        }
        "socket" => {
            if let Some(other) = ["host", "port", "fd"].into_iter().find(|k| options.has(k)) {
                return Err(generic(format!("chardev: '{other}' is not supported, only Unix sockets are"))
                    .remedy("use path=PATH"));
            }
            let path = options.take_str("path")?.ok_or_else(|| generic("chardev: socket needs a path"))?;
            let server = options.take_bool("server")?.unwrap_or(false);
            let wait = options.take_bool("wait")?;
            options.finish("chardev socket")?;
            if !server {
                if wait.is_some() {
                    return Err(generic("'wait' option is incompatible with socket in client connect mode"));
                }
                let stream = io.connect(&Addr::Unix(dolmen::types::os_name(&path).into())).await?;
                return Ok(Chardev { id, socket: None, stream: Some(stream), monitor: None });
            }
            let socket = listen_monitor(control, dolmen::types::os_name(&path)).await?;
            let stream = match wait.unwrap_or(true) {
                true => {
                    log(&format!("waiting for a connection on unix:{path}"));
                    Some(socket.accept().await?)
                }
                false => None,
            };
            Ok(Chardev { id, socket: Some(socket), stream, monitor: None })
        }
        other => {
            Err(generic(format!("'{other}' is not a valid char driver name")).remedy("use socket or stdio"))
        }
    }
}

/// Notes that QMP is to be spoken on a chardev.
fn take_for_monitor(text: &str, chardevs: &mut [Chardev]) -> std::result::Result<(), QmpError> {
    let mut options = Options::from_value(keyval::parse_value(text, Some("chardev"))?)?;
    let id = options.require_str("chardev")?;
    options.take_str("id")?;
    let mode = options.take_str("mode")?;
    if mode.as_deref().is_some_and(|m| m != "control") {
        return Err(QmpError::generic("Parameter 'mode' expects 'control': there is only QMP"));
    }
    let monitor = MonitorOptions { pretty: options.take_bool("pretty")?.unwrap_or(false) };
    options.finish("monitor")?;
    let Some(i) = chardevs.iter().position(|c| c.id == id) else {
        return Err(QmpError::generic(format!("chardev \"{id}\" not found")));
    };
    if chardevs[i].monitor.replace(monitor).is_some() {
        return Err(QmpError::generic(format!("chardev \"{id}\" already has a monitor")));
    }
    Ok(())
}

/// Speaks QMP on a chardev that a monitor has taken.
fn answer_on(control: &Control, chardev: &mut Chardev) {
    let Some(monitor) = chardev.monitor else { return };
    if let Some(stream) = chardev.stream.take() {
        let control = control.clone();
        control.rt().clone().spawn(async move {
            // A lost connection is the client's affair.
            let _ = serve_monitor(&control, stream, monitor).await;
        });
    }
    if let Some(socket) = chardev.socket.take() {
        let control = control.clone();
        control.rt().clone().spawn(async move { socket.serve(&control, monitor).await });
    }
}
