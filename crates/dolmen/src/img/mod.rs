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
mod open;
mod rebase;
mod resize;

use std::ffi::OsString;

pub(crate) use info::specific_text;
use open::Verb;

use crate::cli::{self, Failure, Persona};
use crate::out;

/// The verbs.
const VERBS: &[&Verb] = &[
    &bench::VERB,
    &check::VERB,
    &compare::VERB,
    &create::VERB,
    &info::VERB,
    &map::VERB,
    &rebase::VERB,
    &resize::VERB,
];

/// Verbs of QEMU's tool that are not there yet: no mistakes of who types them.
const MISSING: &[&str] = &["amend", "bitmap", "commit", "convert", "dd", "measure", "snapshot"];

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
    let outcome = match VERBS.iter().find(|v| v.name == command) {
        Some(verb) => (verb.run)(&full, persona, args),
        None if MISSING.contains(&command.as_str()) => {
            let message = format!("Command '{command}' is not available in Dolmen yet");
            Ok(Err(Failure {
                hint: Some("To get on: use QEMU's qemu-img for it".into()),
                ..Failure::new(message)
            }))
        }
        None => Ok(Err(Failure::usage(format!("Command not found: {command}"), ""))),
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
    for verb in VERBS {
        out!("  {:8} {}", verb.name, verb.help);
    }
    let mut formats: Vec<&str> = dolmen::registry().rows().iter().map(|k| k.name).collect();
    formats.sort_unstable();
    out!("\nSupported image formats:\n\n  {}", formats.join(" "));
}

/// The version line. Under one of QEMU's names the first number is that of the release
/// whose behaviour it follows.
pub(crate) fn version(program: &str, persona: Persona) {
    let ours = env!("CARGO_PKG_VERSION");
    match persona {
        Persona::Native => out!("dolmen {ours}"),
        Persona::Established => out!("{program} version 10.0.2 (Dolmen {ours})"),
    }
}
