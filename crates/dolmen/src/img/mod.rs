//! `dolmen img`: the image tool, also called as `qemu-img`.
//!
//! One file a verb. What differs between the two names is the [`Persona`] only: under
//! the native name an image is opened with the format that was given (`-f`, or `-f auto`
//! to permit guessing), and what it names is opened only beneath its own directory.
//! `info` without `--backing-chain` and `check` without `-r` may guess under either name:
//! they read the image's own metadata, write nothing, and open nothing that it names.

mod bench;
mod check;
mod compare;
mod create;
mod info;
mod map;
mod rebase;

use std::ffi::OsString;

use clap::Args;
use dolmen::types::{Claim, Options};
use dolmen::{Image, Session};

use crate::cli::{self, AllowBacking, CacheMode, Failure, Outcome, Persona};
use crate::out;

const COMMANDS: &[(&str, &str)] = &[
    ("bench", "measure requests on an image"),
    ("check", "check an image's metadata, and repair it"),
    ("compare", "compare the content of two images"),
    ("create", "make a new image"),
    ("info", "show what an image says about itself"),
    ("map", "show where the data of an image are"),
    ("rebase", "change the backing file that an image names"),
];

/// Runs the tool and gives its exit code.
pub(crate) fn main(program: &str, persona: Persona, args: Vec<OsString>) -> u8 {
    let mut args = args.into_iter().skip(1).peekable();
    // Options before the command; tracing is accepted and does nothing.
    while let Some(a) = args.peek().and_then(|a| a.to_str()).map(str::to_owned) {
        match a.as_str() {
            "-h" | "--help" => {
                help(program);
                return 0;
            }
            "-V" | "--version" => {
                version(program, persona);
                return 0;
            }
            "-T" | "--trace" => {
                args.next();
                if args.next().is_none() {
                    let message = match a.strip_prefix("--") {
                        Some(_) => format!("option '{a}' requires an argument"),
                        None => "option requires an argument -- 'T'".to_owned(),
                    };
                    return cli::finish(program, Err(Failure::usage(message, "")));
                }
            }
            _ if a.starts_with("--trace=") || (a.starts_with("-T") && a.len() > 2) => {
                args.next();
            }
            _ if a.len() > 1 && a.starts_with('-') => {
                let message = match a.strip_prefix("--") {
                    Some(_) => format!("unrecognized option '{a}'"),
                    None => format!("invalid option -- '{}'", a.chars().nth(1).unwrap_or('-')),
                };
                return cli::finish(program, Err(Failure::usage(message, "")));
            }
            _ => break,
        }
    }
    let Some(command) = args.next() else {
        return cli::finish(program, Err(Failure::usage("Not enough arguments", "")));
    };
    let command = command.to_string_lossy().into_owned();
    let full = format!("{program} {command}");
    let args: Vec<OsString> = std::iter::once(OsString::from(&full)).chain(args).collect();
    let outcome = match command.as_str() {
        "bench" => cli::parse(&full, persona, args).map(|a| bench::run(persona, a)),
        "check" => cli::parse(&full, persona, args).map(|a| check::run(persona, a)),
        "compare" => cli::parse(&full, persona, args).map(|a| compare::run(persona, a)),
        "create" => cli::parse(&full, persona, args).map(|a| create::run(persona, a)),
        "info" => cli::parse(&full, persona, args).map(|a| info::run(persona, a)),
        "map" => cli::parse(&full, persona, args).map(|a| map::run(persona, a)),
        "rebase" => cli::parse(&full, persona, args).map(|a| rebase::run(persona, a)),
        other => Ok(Err(Failure::usage(format!("Command not found: {other}"), ""))),
    };
    match outcome {
        Ok(done) => cli::finish(program, done),
        Err(code) => code,
    }
}

fn help(program: &str) {
    out!(
        "Usage: {program} [-T TRACE] COMMAND [OPTIONS]\n\nCommands ('{program} COMMAND --help' for more):\n"
    );
    for (name, what) in COMMANDS {
        out!("  {name:8} {what}");
    }
    let mut formats: Vec<&str> = dolmen::registry().rows().iter().map(|k| k.name).collect();
    formats.sort_unstable();
    out!("\nSupported image formats:\n\n  {}", formats.join(" "));
}

/// The version line. Under an established name the first number is that of the release
/// whose behaviour it follows.
pub(crate) fn version(program: &str, persona: Persona) {
    let ours = env!("CARGO_PKG_VERSION");
    match persona {
        Persona::Native => out!("dolmen {ours}"),
        Persona::Established => out!("{program} version 10.0.2 (Dolmen {ours})"),
    }
}

/// How an image is named and opened: the options that the verbs share.
#[derive(Args, Debug)]
pub(crate) struct Open {
    /// Image format; `auto` permits guessing it
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// FILENAME is an option string (driver=...,file.filename=...)
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// Open although other processes use the image
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Options that every verb takes.
#[derive(Args, Debug)]
pub(crate) struct Common {
    /// Object definition; accepted, there are no objects yet
    #[arg(long, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    /// What may be opened because an image names it
    /// [default: beneath; anything when called as qemu-img]
    #[arg(long, value_name = "WHAT")]
    pub(crate) allow_backing: Option<AllowBacking>,
}

/// An image argument with everything that says how to open it.
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    pub(crate) format: Option<&'a str>,
    pub(crate) image_opts: bool,
    pub(crate) force_share: bool,
    pub(crate) read_only: bool,
    pub(crate) cache: CacheMode,
}

impl Open {
    pub(crate) fn source<'a>(&'a self, name: &'a str) -> Source<'a> {
        Source {
            name,
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            force_share: self.force_share,
            read_only: true,
            cache: CacheMode::default(),
        }
    }

    /// A session with the policy that these options ask for.
    pub(crate) fn session(&self, rt: &dolmen::rt::Rt, persona: Persona) -> Session {
        Session::new(rt, dolmen::registry(), persona.policy(self.common.allow_backing))
    }
}

impl Source<'_> {
    /// The options that it stands for. `-f auto` changes the session's policy.
    pub(crate) fn options(&self, session: &mut Session, persona: Persona) -> Result<Options, Failure> {
        if self.image_opts && self.format.is_some() {
            return Err(Failure::new("--image-opts and --format are mutually exclusive"));
        }
        let format = persona.format(self.format, session.policy_mut());
        let mut options = if self.image_opts {
            dolmen::spec::image_opts(self.name)?
        } else {
            if let Some(f) = format {
                session.registry().find(f).map_err(|_| {
                    Failure::new(format!("Could not open '{}': Unknown driver '{f}'", self.name))
                })?;
            }
            dolmen::session::opening(session.named(self.name, format), self.name)?
        };
        if self.read_only {
            options.set("read-only", true);
        }
        if self.force_share {
            options.set("force-share", true);
        }
        self.cache.apply(&mut options);
        Ok(options)
    }

    /// Opens it.
    pub(crate) async fn open(
        &self,
        session: &mut Session,
        persona: Persona,
        claim: Claim,
    ) -> Result<Image, Failure> {
        let options = self.options(session, persona)?;
        Ok(dolmen::session::opening(session.open(options, claim).await, self.name)?)
    }
}

/// The cache mode of an option, or the established message.
pub(crate) fn cache(mode: Option<&str>, what: &str) -> Result<CacheMode, Failure> {
    match mode {
        None => Ok(CacheMode::default()),
        Some(m) => cli::cache_mode(m).ok_or_else(|| Failure::new(format!("Invalid {what} option: {m}"))),
    }
}

/// `--output`.
pub(crate) fn is_json(output: Option<&str>, verb: &'static str) -> Result<bool, Failure> {
    match output {
        None | Some("human") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"), verb)),
    }
}

/// Runs a verb on a runtime of its own.
pub(crate) fn block_on<F>(f: impl FnOnce(dolmen::rt::Rt) -> F) -> Outcome
where
    F: Future<Output = Outcome> + 'static,
{
    cli::block_on(f)
}

/// The lines of "Format specific information" for people.
pub(crate) fn specific_text(v: &dolmen::types::Value) -> String {
    info::specific_text(v)
}
