//! `dolmen io`: reads and writes an image for tests, also called as `qemu-io`.
//!
//! The commands come from `-c` options, or one a line from the standard input. The shell
//! holds at most one image; each command is a row of [`table`]. Lines go to the standard
//! output in QEMU's form, failed commands among them, since scripts compare whole
//! transcripts; the exit code is 1 if any command failed.

mod getopt;
mod requests;
mod table;

use std::ffi::OsString;
use std::io::BufRead;
use std::rc::Rc;

use clap::Parser;
use dolmen::qmp::keyval;
use dolmen::rt::{Rt, WaitsFor};
use dolmen::session::{READ, RESIZE};
use dolmen::types::{ErrorKind, Options, Value};
use dolmen::{Image, Session};

use self::table::{Row, Verb};
use crate::cli::units::io_size;
use crate::cli::{self, AllowBacking, CacheMode, Failure, Persona};
use crate::out;

/// Read and write an image, for tests.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
struct Args {
    /// Command to run; may be given several times
    #[arg(short, long, value_name = "STRING", allow_hyphen_values = true)]
    cmd: Vec<String>,
    /// Image format; `auto` permits guessing it
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Open for reading
    #[arg(short, long)]
    read_only: bool,
    /// Write to a temporary snapshot file (refused: not available)
    #[arg(short, long)]
    snapshot: bool,
    /// Bypass the page cache
    #[arg(short, long)]
    nocache: bool,
    /// Copy what is read from backing files into the image
    #[arg(short = 'C', long)]
    copy_on_read: bool,
    /// Accepted
    #[arg(short, long)]
    misalign: bool,
    /// Accepted
    #[arg(short = 'k', long)]
    native_aio: bool,
    /// Accepted; the ring is chosen at start-up
    #[arg(short = 'i', long, value_name = "MODE")]
    aio: Option<String>,
    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<String>,
    /// Discard mode
    #[arg(short, long, value_name = "MODE")]
    discard: Option<String>,
    /// Accepted
    #[arg(short = 'T', long)]
    trace: Option<String>,
    /// Open although other processes use the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// FILE is an option string
    #[arg(long)]
    image_opts: bool,
    /// Object definition; accepted, there are no objects yet
    #[arg(long, value_name = "OBJDEF")]
    object: Vec<String>,
    /// What may be opened because an image names it
    /// [default: beneath; anything when called as qemu-io]
    #[arg(long, value_name = "WHAT")]
    allow_backing: Option<AllowBacking>,
    /// Print the version
    #[arg(short = 'V', long)]
    version: bool,
    /// Image
    file: Option<String>,
}

/// Runs the tool and gives its exit code.
pub(crate) fn main(program: &str, persona: Persona, args: Vec<OsString>) -> u8 {
    let args: Args = match cli::parse(program, persona, args) {
        Ok(a) => a,
        Err(code) => return code,
    };
    if args.version {
        crate::img::version(program, persona);
        return 0;
    }
    if args.image_opts && args.format.is_some() {
        eprintln!("{program}: --image-opts and -f are mutually exclusive");
        return 1;
    }
    let program = program.to_owned();
    cli::block_on(move |rt| async move { run(program, persona, args, rt).await })
}

/// What `open` gets, from the command line or from the command.
#[derive(Clone, Debug, Default)]
struct How {
    read_only: bool,
    copy_on_read: bool,
    force_share: bool,
    cache: Option<CacheMode>,
    discard: Option<bool>,
    native_aio: bool,
    format: Option<String>,
    /// Options given with `-o`, or an option string.
    options: Options,
}

async fn run(program: String, persona: Persona, args: Args, rt: Rt) -> u8 {
    let session = Session::new(&rt, dolmen::registry(), persona.policy(args.allow_backing));
    let mut shell = Shell { program, persona, session, image: None, background: Rc::default(), quit: false };
    let mut how = How {
        read_only: args.read_only,
        copy_on_read: args.copy_on_read,
        force_share: args.force_share,
        format: args.format.clone(),
        ..How::default()
    };
    let opened = async {
        let aio = args.aio.as_deref().or(args.native_aio.then_some("native"));
        shell.modes(
            &mut how,
            args.nocache,
            args.cache.as_deref(),
            args.discard.as_deref(),
            aio,
            args.snapshot,
        )?;
        let Some(file) = &args.file else { return Ok(()) };
        if args.image_opts {
            how.options = dolmen::spec::image_opts(dolmen::registry(), file)?;
            shell.open(None, Some(file), how).await
        } else {
            shell.open(Some(file), Some(file), how).await
        }
    };
    let mut failed = false;
    match opened.await {
        Ok(()) => {
            if args.cmd.is_empty() {
                failed |= shell.interactive().await;
            }
            for c in &args.cmd {
                if shell.quit {
                    break;
                }
                failed |= shell.command(c).await.is_err();
                shell.warn();
            }
        }
        Err(f) => {
            cli::finish(&shell.program, Err(f));
            failed = true;
        }
    }
    shell.background.finish().await;
    shell.warn();
    let Shell { program, mut session, image, .. } = shell;
    if let Some(o) = image
        && let Err(e) = close(&mut session, o).await
    {
        failed = true;
        cli::finish(&program, Err(e.into()));
    }
    if let Err(e) = session.close().await {
        failed = true;
        cli::finish(&program, Err(e.into()));
    }
    u8::from(failed)
}

/// The image that is open.
struct Open {
    image: Rc<Image>,
    how: How,
    name: Option<String>,
    writethrough: bool,
}

/// A command failed; what there is to say has been said.
struct Failed;

type Done = Result<(), Failed>;

struct Shell {
    program: String,
    persona: Persona,
    session: Session,
    image: Option<Open>,
    background: Rc<requests::Background>,
    quit: bool,
}

async fn close(session: &mut Session, open: Open) -> dolmen::types::Result<()> {
    let flushed = if open.how.read_only { Ok(()) } else { open.image.flush().await };
    match Rc::try_unwrap(open.image) {
        Ok(image) => flushed.and(session.close_image(image).await),
        Err(_) => flushed,
    }
}

impl Shell {
    fn say(&self, f: impl Into<Failure>) -> Failed {
        cli::finish(&self.program, Err(f.into()));
        Failed
    }

    fn modes(
        &self,
        how: &mut How,
        nocache: bool,
        cache: Option<&str>,
        discard: Option<&str>,
        aio: Option<&str>,
        snapshot: bool,
    ) -> Result<(), Failure> {
        let mode = cache.or(nocache.then_some("none"));
        if let Some(m) = mode {
            how.cache =
                Some(cli::cache_mode(m).ok_or_else(|| Failure::new(format!("Invalid cache option: {m}")))?);
        }
        how.discard = match discard {
            None => None,
            Some("unmap" | "on") => Some(true),
            Some("ignore" | "off") => Some(false),
            Some(d) => return Err(Failure::new(format!("Invalid discard option: {d}"))),
        };
        how.native_aio = match aio {
            None | Some("threads" | "io_uring") => false,
            Some("native") => true,
            Some(a) => return Err(Failure::new(format!("Invalid aio option: {a}"))),
        };
        if snapshot {
            return Err(Failure::new("-s: writing to a temporary snapshot file is not available"));
        }
        Ok(())
    }

    /// Opens an image: `path` with `how.options` beside it, or the options alone. `shown`
    /// is what messages call it.
    async fn open(&mut self, path: Option<&str>, shown: Option<&str>, how: How) -> Result<(), Failure> {
        let what = shown.map_or("can't open".to_owned(), |s| format!("can't open device {s}"));
        let fail = |e: dolmen::types::Error| {
            let f = Failure::from(e);
            Failure { message: format!("{what}: {}", f.message), ..f }
        };
        let read_only =
            how.read_only || how.options.clone().take_bool("read-only").map_err(fail)?.unwrap_or(false);
        if how.copy_on_read && read_only {
            return Err(Failure::new(format!("{what}: Can't use copy-on-read on read-only device")));
        }
        if how.force_share && !read_only {
            return Err(Failure {
                hint: Some("To get on: add -r".into()),
                ..Failure::new(format!("{what}: force-share=on can only be used with read-only images"))
            });
        }
        if how.native_aio && !how.cache.is_some_and(|c| c.direct) {
            return Err(Failure::new(format!(
                "{what}: aio=native was specified, but it requires cache.direct=on, which was not specified."
            )));
        }
        let mut options = how.options.clone();
        if let Some(path) = path {
            let given = options.clone().take_str("driver").map_err(fail)?;
            let format = how.format.as_deref().or(given.as_deref());
            let format = self.persona.format(format, self.session.policy_mut()).map(str::to_owned);
            let registry = self.session.registry();
            if let Some(f) = &format {
                registry.find(f).map_err(|_| Failure::new(format!("{what}: Unknown driver '{f}'")))?;
            }
            options = match options.is_empty() {
                true => self.session.named(path, format.as_deref()),
                false => {
                    let _ = options.take("driver");
                    options = format.map_or(options.clone(), |f| options.with("driver", f));
                    dolmen::spec::with_filename(
                        registry,
                        dolmen::spec::with_file_drivers(registry, options),
                        path,
                    )
                }
            }
            .map_err(fail)?;
        }
        if how.read_only {
            options.set("read-only", true);
        }
        if how.force_share {
            options.set("force-share", true);
        }
        let discard = if how.discard == Some(false) { "ignore" } else { "unmap" };
        if !options.has("discard") {
            options.set("discard", discard);
        }
        if let Some(c) = how.cache {
            c.apply(&mut options);
        }
        let read_only =
            how.read_only || options.clone().take_bool("read-only").map_err(fail)?.unwrap_or(false);
        let claim = if read_only { READ } else { RESIZE };
        let image = if how.copy_on_read {
            self.session.open_copying(options, claim).await
        } else {
            self.session.open(options, claim).await
        };
        let image = image.map_err(fail)?;
        // Without a cache mode each write is durable when it is acknowledged.
        let writethrough = how.cache.is_none_or(|c| c.writethrough);
        self.image = Some(Open {
            image: Rc::new(image),
            how: How { read_only, ..how },
            name: path.map(str::to_owned),
            writethrough,
        });
        Ok(())
    }

    /// Reads commands from the standard input. True if one failed.
    async fn interactive(&mut self) -> bool {
        let mut failed = false;
        while !self.quit {
            cli::say(format_args!("{}> ", self.program));
            cli::flush();
            // Reading may block; requests in the background go on meanwhile.
            let read = || {
                let mut line = String::new();
                std::io::stdin().lock().read_line(&mut line).map(|n| (n > 0).then_some(line))
            };
            let line = match self.session.rt().io() {
                Some(io) => io.blocking(WaitsFor::Host, read).await,
                None => read(),
            };
            match line {
                Ok(Some(line)) => {
                    failed |= self.command(&line).await.is_err();
                    self.warn();
                }
                Ok(None) => break,
                Err(e) => {
                    self.say(Failure::new(format!("reading commands: {e}")));
                    return true;
                }
            }
        }
        failed
    }

    /// Says on standard error what drivers noticed by themselves.
    fn warn(&mut self) {
        for w in self.session.warnings() {
            eprint_line(&format!("{}: warning: {w}", self.program));
        }
    }

    async fn command(&mut self, line: &str) -> Done {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let Some((name, args)) = words.split_first() else { return Ok(()) };
        let Some(row) = table::find(name) else {
            eprint_line(&format!("command \"{name}\" not found"));
            return Err(Failed);
        };
        if self.image.is_none() && !row.closed {
            eprint_line("no file open, try 'help open'");
            return Err(Failed);
        }
        if let Err(e) = row.check(args.len()) {
            eprint_line(&e);
            return Err(Failed);
        }
        let opts = match getopt::parse(row.name, row.options, args) {
            Ok(o) => o,
            Err(e) => {
                eprint_line(&e);
                return usage(row);
            }
        };
        match row.verb {
            Verb::Read => self.read(row, &opts, false).await,
            Verb::Readv => self.read(row, &opts, true).await,
            Verb::AioRead => self.aio_read(row, &opts),
            Verb::Write => self.write(row, &opts, false).await,
            Verb::Writev => self.write(row, &opts, true).await,
            Verb::AioWrite => self.aio_write(row, &opts),
            Verb::AioFlush => {
                self.background.finish().await;
                Ok(())
            }
            Verb::Flush => match self.image()?.flush().await {
                Ok(()) => Ok(()),
                Err(e) => Err(self.failed("flush", &e)),
            },
            Verb::Discard => self.discard(row, &opts).await,
            Verb::Truncate => self.truncate(row, &opts).await,
            Verb::Length => {
                out!("{}", io_size(self.image()?.size() as f64));
                Ok(())
            }
            Verb::Info => self.info(),
            Verb::Alloc => self.alloc(&opts.rest).await,
            Verb::Map => self.map().await,
            Verb::Open => self.open_command(row, &opts).await,
            Verb::Reopen => self.reopen(row, &opts).await,
            Verb::Close => {
                self.background.finish().await;
                match self.image.take() {
                    Some(o) => {
                        let closed = close(&mut self.session, o).await;
                        closed.map_err(|e| self.say(e))
                    }
                    None => Ok(()),
                }
            }
            Verb::Sleep => {
                let ms = opts.rest.first().and_then(|a| a.parse::<u64>().ok());
                let Some(ms) = ms else {
                    out!("{} is not a valid number", opts.rest.first().map_or("", String::as_str));
                    return Err(Failed);
                };
                self.session.rt().sleep(std::time::Duration::from_millis(ms)).await;
                Ok(())
            }
            Verb::Abort => {
                cli::flush();
                std::process::abort();
            }
            Verb::Sigraise => sigraise(opts.rest.first().map_or("", String::as_str)),
            Verb::Help => help(opts.rest.first().map(String::as_str)),
            Verb::Quit => {
                self.quit = true;
                Ok(())
            }
        }
    }

    /// The open image; commands that need one are not run without.
    fn image(&self) -> Result<Rc<Image>, Failed> {
        self.image.as_ref().map(|o| o.image.clone()).ok_or(Failed)
    }

    /// "read failed: Input/output error": scripts look for the words of the errno. Under
    /// the native name the whole story follows on the standard error.
    fn failed(&self, what: &str, e: &dolmen::types::Error) -> Failed {
        out!("{what} failed: {}", errno_text(e));
        if self.persona == Persona::Native {
            self.say(Failure::new(e.to_string()));
        }
        Failed
    }

    fn info(&self) -> Done {
        let node = self.image()?.node();
        let d = node.driver.describe(&node);
        out!("format name: {}", node.driver.kind().name);
        let cluster = d.cluster_size.unwrap_or(0);
        out!("cluster size: {}", io_size(cluster as f64));
        out!("vm state offset: {}", io_size(vm_state_offset(cluster, node.size()) as f64));
        if let Some(v) = &d.format_specific {
            cli::say(format_args!("{}", crate::img::specific_text(v)));
        }
        Ok(())
    }

    async fn open_command(&mut self, row: &Row, opts: &getopt::Parsed) -> Done {
        let mut how = How {
            read_only: opts.has('r'),
            copy_on_read: opts.has('C'),
            force_share: opts.has('U'),
            ..How::default()
        };
        let aio = opts.value('i').or(opts.has('k').then_some("native"));
        self.modes(&mut how, opts.has('n'), opts.value('t'), opts.value('d'), aio, opts.has('s'))
            .map_err(|f| self.say(f))?;
        if let Some(text) = opts.value('o') {
            let value = keyval::parse_value(text, None).and_then(Options::from_value);
            how.options = value.map_err(|e| self.say(e))?;
        }
        let path = match opts.rest.as_slice() {
            [] if how.options.is_empty() => return usage(row),
            [] => None,
            [path] => Some(path.clone()),
            _ => return usage(row),
        };
        if self.image.is_some() {
            return Err(self.say(Failure::new("file open already, try 'help close'")));
        }
        if path.is_none() {
            how.options = dolmen::spec::with_file_drivers(self.session.registry(), how.options);
        }
        let opened = self.open(path.as_deref(), path.as_deref(), how).await;
        opened.map_err(|f| self.say(f))
    }

    /// Opens the image again. It is closed in between: what lies below does not have to
    /// agree with both states at once.
    async fn reopen(&mut self, row: &Row, opts: &getopt::Parsed) -> Done {
        if opts.has('r') && opts.has('w') || !opts.rest.is_empty() || opts.has('o') {
            return usage(row);
        }
        self.background.finish().await;
        let Some(open) = self.image.take() else { return Err(Failed) };
        let (old, name) = (open.how.clone(), open.name.clone());
        let mut new = old.clone();
        new.read_only = (old.read_only || opts.has('r')) && !opts.has('w');
        if opts.has('r') || opts.has('w') {
            let _ = new.options.take("read-only");
        }
        if let Some(c) = opts.value('c') {
            self.modes(&mut new, false, Some(c), None, None, false).map_err(|f| self.say(f))?;
        }
        close(&mut self.session, open).await.map_err(|e| self.say(e))?;
        if let Err(f) = self.open(name.as_deref(), name.as_deref(), new).await {
            self.say(f);
            self.open(name.as_deref(), name.as_deref(), old).await.map_err(|f| self.say(f))?;
            return Err(Failed);
        }
        Ok(())
    }
}

/// Where a format with clusters would put the VM state: the first multiple of what one
/// second-level table maps behind the disk.
fn vm_state_offset(cluster: u64, size: u64) -> u64 {
    let table = cluster * (cluster / 8);
    if table == 0 { 0 } else { size.div_ceil(table) * table }
}

fn usage(row: &Row) -> Done {
    out!("{}", row.line());
    Err(Failed)
}

fn help(name: Option<&str>) -> Done {
    match name {
        None => {
            for row in table::ROWS {
                out!("{}", row.line());
            }
            out!("\nUse 'help commandname' for extended help.");
            Ok(())
        }
        Some(n) => match table::find(n) {
            Some(row) => {
                out!("{}", row.line());
                Ok(())
            }
            None => {
                out!("command {n} not found");
                Err(Failed)
            }
        },
    }
}

/// Signal 0 only asks whether there is a process to send it to.
fn sigraise(text: &str) -> Done {
    let signal = number(text)?;
    cli::flush();
    if signal == 0 {
        return Ok(());
    }
    let signal = i32::try_from(signal).ok().and_then(rustix::process::Signal::from_named_raw);
    match signal.map(|s| rustix::process::kill_process(rustix::process::getpid(), s)) {
        Some(Ok(())) => Ok(()),
        Some(Err(_)) | None => {
            out!("{text} is not a signal that can be raised");
            Err(Failed)
        }
    }
}

fn eprint_line(text: &str) {
    cli::flush();
    cli::complain(text);
}

/// The system's words for the errno that a guest would see.
fn errno_text(e: &dolmen::types::Error) -> String {
    // A range beyond the end is an input/output error to QEMU's tool.
    let errno = if e.kind() == ErrorKind::OutOfBounds { ErrorKind::Io.errno() } else { e.errno() };
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// A number argument, or QEMU's message.
fn number(text: &str) -> Result<u64, Failed> {
    Value::parse_size(text).filter(|n| *n <= i64::MAX as u64).ok_or_else(|| {
        out!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}");
        Failed
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_state_lies_behind_the_disk() {
        // Captured from qemu-io 10.0.2: 4 MiB with 64 KiB clusters, and raw.
        assert_eq!(vm_state_offset(65536, 4 << 20), 512 << 20);
        assert_eq!(vm_state_offset(0, 1 << 20), 0);
    }

    #[test]
    fn errors_in_the_systems_words() {
        let e = dolmen::types::Error::new(ErrorKind::OutOfBounds, "x");
        assert_eq!(errno_text(&e), "Input/output error");
        let e = dolmen::types::Error::from_errno(28, "x");
        assert_eq!(errno_text(&e), "No space left on device");
    }
}
