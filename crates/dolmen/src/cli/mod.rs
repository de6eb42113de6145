//! What the commands have in common: who we are called as, failures with exit codes, and
//! output that other programs read.

pub(crate) mod json;
pub(crate) mod units;

use std::fmt;
use std::io::Write;

use dolmen::graph::{Implicit, OpenPolicy};
use dolmen::types::{Error, Value};

/// Under which name a command runs. QEMU's names get QEMU's behaviour;
/// our own names get the safe defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Persona {
    /// `dolmen img`, `dolmen io`: nothing is guessed, images are not trusted.
    Native,
    /// `qemu-img`, `qemu-io`: what scripts written for those tools expect.
    Established,
}

impl Persona {
    /// The policy for opening images, given what `--allow-backing` said.
    pub(crate) fn policy(self, allow: Option<AllowBacking>) -> OpenPolicy {
        let mut policy = match self {
            Persona::Native => dolmen::session::beneath(),
            Persona::Established => dolmen::session::trusting(),
        };
        if let Some(allow) = allow {
            policy.implicit = match allow {
                AllowBacking::None => Implicit::Deny,
                AllowBacking::Beneath => Implicit::Beneath,
                AllowBacking::Anything => Implicit::Anything,
            };
        }
        policy
    }

    /// The format to open with: the word `auto` of the native commands permits guessing.
    pub(crate) fn format<'a>(self, given: Option<&'a str>, policy: &mut OpenPolicy) -> Option<&'a str> {
        match given {
            Some("auto") => {
                policy.probe = true;
                None
            }
            other => other,
        }
    }
}

/// What may be opened because an image names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AllowBacking {
    /// Nothing
    None,
    /// Plain file names beneath the image's own directory
    Beneath,
    /// Anything, as qemu-img does
    Anything,
}

/// A failed command: what to say and how to exit.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Without the program's name.
    pub(crate) message: String,
    /// What the user can do, on a line of its own.
    pub(crate) hint: Option<String>,
    /// The command was called in a wrong way: its help is pointed at.
    pub(crate) misused: Option<&'static str>,
    /// Exit code.
    pub(crate) code: u8,
}

impl Failure {
    /// Exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, misused: None, code: 1 }
    }

    /// A mistake in how `verb` was called; an empty verb is the program itself.
    pub(crate) fn usage(message: impl Into<String>, verb: &'static str) -> Failure {
        Failure { misused: Some(verb), ..Failure::new(message) }
    }

    /// Another exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Failure {
        self.code = code;
        self
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        let text = e.to_string();
        if let (Some(c), Some(lock)) = (e.conflict(), e.lock_text()) {
            // QEMU's words first, for those who look for them; then who it is.
            let before = text.split(&c.to_string()).next().unwrap_or_default();
            let message = format!("{before}{lock}");
            let mut c = c.clone();
            // A verb that writes does not become another by reading.
            c.remedies.retain(|r| r != "open it read-only");
            // The name of our own node tells the user nothing.
            let us = if c.asks.kind == "process" { &mut c.denies } else { &mut c.asks };
            us.detail.clear();
            let ours = us.to_string();
            let story = c.to_string().replacen(&format!(" {ours} "), " this command ", 1);
            return Failure { hint: Some(story), ..Failure::new(message) };
        }
        Failure { hint: e.remedy_text().map(|r| format!("To get on: {r}")), ..Failure::new(text) }
    }
}

/// How a command ends.
pub(crate) type Outcome = Result<u8, Failure>;

/// Runs a tool on a runtime in this thread, as the environment configures it.
///
/// # Panics
/// When the runtime can't be set up.
pub(crate) fn block_on<T, F>(f: impl FnOnce(dolmen::rt::Rt) -> F) -> T
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let config = dolmen::rt::Config::from_env().for_tool();
    dolmen::rt::block_on_with(&config, f).unwrap_or_else(|e| panic!("cannot start the runtime: {e}"))
}

/// Reports a failure and gives the exit code.
pub(crate) fn finish(program: &str, outcome: Outcome) -> u8 {
    match outcome {
        Ok(code) => code,
        Err(f) => {
            flush();
            if !f.message.is_empty() {
                complain(&format!("{program}: {}", f.message));
            }
            if let Some(h) = f.hint {
                complain(&h);
            }
            if let Some(verb) = f.misused {
                let blank = if verb.is_empty() { "" } else { " " };
                eprintln!("Try '{program}{blank}{verb} --help' for more info");
            }
            f.code
        }
    }
}

/// Writes to the standard output. A reader that has gone ends the program quietly, as a
/// shell pipeline expects.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    let text = text.to_string();
    if std::io::stdout().lock().write_all(&dolmen::types::bytes(&text)).is_err() {
        std::process::exit(1);
    }
}

/// Writes a line to the standard error. If nobody reads that, there is nobody to tell.
pub(crate) fn complain(line: &str) {
    let line = format!("{line}\n");
    let _ = std::io::stderr().lock().write_all(&dolmen::types::bytes(&line));
}

/// Makes sure that what was said is there before anything on the standard error.
pub(crate) fn flush() {
    if std::io::stdout().lock().flush().is_err() {
        std::process::exit(1);
    }
}

/// `println!` for command output.
#[macro_export]
macro_rules! out {
    ($($arg:tt)*) => {
        $crate::cli::say(format_args!("{}\n", format_args!($($arg)*)))
    };
}

/// Parses arguments with clap, with QEMU's exit code for mistakes. Under one of
/// QEMU's names mistakes are told in the words of getopt, since scripts that try
/// whether an option exists look for them.
pub(crate) fn parse<P: clap::Parser>(
    program: &str,
    persona: Persona,
    args: Vec<std::ffi::OsString>,
) -> Result<P, u8> {
    let words: Vec<String> = args.iter().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let command = P::command().bin_name(program.to_owned()).name(program.to_owned());
    let parsed = command.try_get_matches_from(args).and_then(|m| P::from_arg_matches(&m));
    parsed.map_err(|e| {
        match getopt_words(&e, &words).filter(|_| persona == Persona::Established) {
            // An argument too many is no option's mistake: the tool itself speaks.
            Some(Mistake::Extra(word)) => {
                let tool = program.split(' ').next().unwrap_or(program);
                eprintln!("{tool}: Unexpected argument: {word}");
                eprintln!("Try '{program} --help' for more info");
            }
            Some(Mistake::Option(message)) => {
                eprintln!("{program}: {message}");
                eprintln!("Try '{program} --help' for more info");
            }
            // A closed pipe is all that can go wrong here.
            None => drop(e.print()),
        }
        u8::from(e.use_stderr())
    })
}

/// A mistake in a command line.
#[derive(Debug, PartialEq, Eq)]
enum Mistake {
    /// About an option, in the words of getopt.
    Option(String),
    /// An argument that is one too many.
    Extra(String),
}

/// What getopt would say, for the mistakes that it knows.
fn getopt_words(e: &clap::Error, words: &[String]) -> Option<Mistake> {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let context = |kind| match e.get(kind) {
        Some(ContextValue::String(s)) => Some(s.as_str()),
        _ => None,
    };
    let option = |message| Some(Mistake::Option(message));
    let arg = context(ContextKind::InvalidArg)?;
    match e.kind() {
        ErrorKind::UnknownArgument => match arg.strip_prefix('-') {
            None | Some("") => Some(Mistake::Extra(arg.to_owned())),
            Some(rest) if rest.starts_with('-') => {
                // As it was typed, with its value.
                let typed = words.iter().find(|w| w.split('=').next() == Some(arg));
                option(format!("unrecognized option '{}'", typed.map_or(arg, String::as_str)))
            }
            Some(rest) => option(format!("invalid option -- '{}'", rest.chars().next()?)),
        },
        ErrorKind::InvalidValue if context(ContextKind::InvalidValue) == Some("") => {
            // "--format <FMT>"; what was typed may be the short option.
            let long = arg.split([' ', '=']).next().unwrap_or(arg);
            match words.last() {
                Some(last) if last.starts_with('-') && !last.starts_with("--") => {
                    option(format!("option requires an argument -- '{}'", last.chars().last()?))
                }
                _ => option(format!("option '{long}' requires an argument")),
            }
        }
        ErrorKind::TooManyValues => {
            let long = arg.split([' ', '=']).next().unwrap_or(arg);
            option(format!("option '{long}' doesn't allow an argument"))
        }
        _ => None,
    }
}

/// A cache mode of `-t` and `-T`, as node options: direct, no-flush, writethrough.
pub(crate) fn cache_mode(mode: &str) -> Option<CacheMode> {
    let (direct, no_flush, writethrough) = match mode {
        "none" | "off" => (true, false, false),
        "writeback" => (false, false, false),
        "writethrough" => (false, false, true),
        "directsync" => (true, false, true),
        "unsafe" => (false, true, false),
        _ => return None,
    };
    Some(CacheMode { direct, no_flush, writethrough })
}

/// See [`cache_mode`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheMode {
    /// Bypass the page cache.
    pub(crate) direct: bool,
    /// Ignore flushes.
    pub(crate) no_flush: bool,
    /// Flush after each write.
    pub(crate) writethrough: bool,
}

impl CacheMode {
    /// Adds the options of a node.
    pub(crate) fn apply(self, options: &mut dolmen::types::Options) {
        if self.direct || self.no_flush {
            let cache = dolmen::types::Options::new()
                .with("direct", self.direct)
                .with("no-flush", self.no_flush)
                .into_value();
            options.set("cache", cache);
        }
    }
}

/// Reads a size argument: digits with an optional suffix.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    Value::parse_size(text).filter(|n| *n <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personas_differ_in_trust() {
        assert_eq!(Persona::Native.policy(None).implicit, Implicit::Beneath);
        assert!(!Persona::Native.policy(None).probe);
        assert_eq!(Persona::Established.policy(None).implicit, Implicit::Anything);
        assert_eq!(Persona::Established.policy(Some(AllowBacking::None)).implicit, Implicit::Deny);
        let mut p = Persona::Native.policy(None);
        assert_eq!(Persona::Native.format(Some("auto"), &mut p), None);
        assert!(p.probe);
        assert_eq!(Persona::Native.format(Some("raw"), &mut p), Some("raw"));
    }

    #[test]
    fn cache_modes() {
        assert_eq!(cache_mode("none"), Some(CacheMode { direct: true, ..CacheMode::default() }));
        assert_eq!(cache_mode("writethrough").map(|c| c.writethrough), Some(true));
        assert_eq!(cache_mode("foo"), None);
    }

    #[test]
    fn sizes_end_at_the_largest_offset() {
        assert_eq!(parse_size("1k"), Some(1024));
        assert_eq!(parse_size("8E"), None);
        assert_eq!(parse_size("abc"), None);
    }
}
