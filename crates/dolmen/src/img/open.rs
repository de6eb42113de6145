//! What the verbs share: how an image is named, opened, and what `--output` and cache options say.

use std::ffi::OsString;

use clap::Args;
use dolmen::types::{Claim, Options};
use dolmen::{Image, Session};

use crate::cli::{self, AllowBacking, CacheMode, Failure, Outcome, Persona};

/// A verb: its row stands in its module.
pub(crate) struct Verb {
    pub(crate) name: &'static str,
    /// One line for the list of verbs.
    pub(crate) help: &'static str,
    /// Reads the arguments, the first of which is the full name for messages, and does it; an exit code when the
    /// arguments were answered already, as with `--help`.
    pub(crate) run: fn(&str, Persona, Vec<OsString>) -> Result<Outcome, u8>,
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
            dolmen::spec::image_opts(session.registry(), self.name)?
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

/// The cache mode of an option, or QEMU's message.
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
