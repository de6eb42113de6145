//! What the commands have in common: who we are called as, failures with exit codes, and
//! output that other programs read.

pub(crate) mod json;
pub(crate) mod units;

use std::fmt;
use std::io::Write;

use dolmen::graph::{Implicit, OpenPolicy};
use dolmen::types::{Error, Value};

/// Under which name a command runs. The established names get the established behaviour;
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
    /// Exit code.
    pub(crate) code: u8,
}

impl Failure {
    /// Exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, code: 1 }
    }

    /// A mistake in how the command was called.
    pub(crate) fn usage(message: impl Into<String>, command: &str) -> Failure {
        Failure {
            message: message.into(),
            hint: Some(format!("Try '{command} --help' for more info")),
            code: 1,
        }
    }

    /// Another exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Failure {
        self.code = code;
        self
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        Failure { hint: e.remedy_text().map(|r| format!("To get on: {r}")), ..Failure::new(e.to_string()) }
    }
}

/// How a command ends.
pub(crate) type Outcome = Result<u8, Failure>;

/// Reports a failure and gives the exit code.
pub(crate) fn finish(program: &str, outcome: Outcome) -> u8 {
    match outcome {
        Ok(code) => code,
        Err(f) => {
            flush();
            if !f.message.is_empty() {
                eprintln!("{program}: {}", f.message);
            }
            if let Some(h) = f.hint {
                eprintln!("{h}");
            }
            f.code
        }
    }
}

/// Writes to the standard output. A reader that has gone ends the program quietly, as a
/// shell pipeline expects.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    if std::io::stdout().lock().write_fmt(text).is_err() {
        std::process::exit(1);
    }
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

/// Parses arguments with clap, with the established exit code for mistakes.
pub(crate) fn parse<P: clap::Parser>(program: &str, args: Vec<std::ffi::OsString>) -> Result<P, u8> {
    let command = P::command().bin_name(program.to_owned()).name(program.to_owned());
    let parsed = command.try_get_matches_from(args).and_then(|m| P::from_arg_matches(&m));
    parsed.map_err(|e| {
        // A closed pipe is all that can go wrong here.
        let _ = e.print();
        u8::from(e.use_stderr())
    })
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
