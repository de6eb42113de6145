//! `img resize`: gives an image another size.

use std::ffi::OsString;

use clap::Parser;
use dolmen::graph::Prealloc;
use dolmen::session;
use dolmen::types::Value;

use super::open::{self, Open, Verb};
use crate::cli::{self, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "resize",
    help: "change the size of an image",
    run: |name, persona, args| cli::parse(name, persona, relative(args)).map(|a| run(name, persona, a)),
};

/// Change the size of an image. What is new reads as zeroes.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
struct Resize {
    #[command(flatten)]
    open: Open,
    /// How the new space is allocated: off, metadata, falloc or full
    #[arg(long, value_name = "PREALLOC")]
    preallocation: Option<String>,
    /// Permit a smaller size: the data beyond it are lost
    #[arg(long)]
    shrink: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Image, and its new size in bytes (suffixes k, M, G, T, P, E); +SIZE and -SIZE are relative to the size that it has
    #[arg(value_name = "FILENAME [+|-]SIZE")]
    words: Vec<String>,
}

/// Stands for the minus of a size, so that it is not taken for an option.
const MINUS: char = '\u{2212}';

/// The arguments, with sizes such as `-1G` made positional.
fn relative(args: Vec<OsString>) -> Vec<OsString> {
    let is_size = |a: &OsString| {
        let b = a.as_encoded_bytes();
        b.len() > 1 && b[0] == b'-' && b[1].is_ascii_digit()
    };
    args.into_iter()
        .map(|a| match a.to_str() {
            Some(text) if is_size(&a) => format!("{MINUS}{}", &text[1..]).into(),
            _ => a,
        })
        .collect()
}

/// A new size, as it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    To(u64),
    By(i128),
}

impl Size {
    fn parse(text: &str) -> Result<Size, Failure> {
        let (sign, digits) = match text.chars().next() {
            Some('+') => (1, &text[1..]),
            Some('-') => (-1, &text[1..]),
            Some(MINUS) => (-1, &text[MINUS.len_utf8()..]),
            _ => (0, text),
        };
        let Some(n) = Value::parse_size(digits) else {
            return Err(Failure {
                hint: Some(
                    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                     and exabytes, respectively."
                        .into(),
                ),
                ..Failure::new("Parameter 'size' expects a non-negative number below 2^64")
            });
        };
        Ok(if sign == 0 { Size::To(n) } else { Size::By(sign * i128::from(n)) })
    }

    /// For an image of `now` bytes. Relative sizes count from its last full sector, as in QEMU.
    fn of(self, now: u64) -> Result<u64, Failure> {
        let new = match self {
            Size::To(n) => n.into(),
            Size::By(n) => i128::from(now.next_multiple_of(512)) + n,
        };
        u64::try_from(new)
            .ok()
            .filter(|n| (1..=i64::MAX as u64).contains(n))
            .ok_or_else(|| Failure::new("New image size must be positive"))
    }
}

fn prealloc(mode: Option<&str>) -> Result<Prealloc, Failure> {
    Ok(match mode {
        None | Some("off") => Prealloc::Off,
        Some("metadata") => Prealloc::Metadata,
        Some("falloc") => Prealloc::Falloc,
        Some("full") => Prealloc::Full,
        Some(other) => {
            return Err(Failure {
                hint: Some("It is one of: off, metadata, falloc, full".into()),
                ..Failure::new(format!("Invalid preallocation mode '{other}'"))
            });
        }
    })
}

/// Runs it.
fn run(name: &str, persona: Persona, a: Resize) -> Outcome {
    let program = name.trim_end_matches(" resize").to_owned();
    let [filename, size] = match <[String; 2]>::try_from(a.words.clone()) {
        Ok(both) => both,
        Err(words) if words.len() > 2 => {
            return Err(Failure::usage("Extra argument(s) in command line", "resize"));
        }
        Err(_) => return Err(Failure::usage("Expecting image file name and size", "resize")),
    };
    let prealloc = prealloc(a.preallocation.as_deref())?;
    let size = Size::parse(&size)?;
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        let mut source = a.open.source(&filename);
        source.read_only = false;
        let mut options = source.options(&mut session, persona)?;
        if a.shrink && !options.has("discard") {
            // What is cut off is given back to the file system.
            options.set("discard", "unmap");
        }
        let image = session::opening(session.open(options, session::RESIZE).await, &filename)?;
        let resized = async {
            let now = image.size();
            let new = size.of(now)?;
            if new <= now && prealloc != Prealloc::Off {
                return Err(Failure::new("Preallocation can only be used for growing images"));
            }
            if new < now && !a.shrink {
                let warning = "warning: Shrinking an image will delete all data beyond the shrunken image's end. \
                               Before performing such an operation, make sure there is no important data there.";
                return Err(Failure {
                    hint: Some(format!("{program}: {warning}")),
                    ..Failure::new("Use the --shrink option to perform a shrink operation.")
                });
            }
            Ok(image.resize(new, prealloc).await?)
        };
        let resized = resized.await;
        let closed = session.close_image(image).await;
        session.close().await?;
        resized?;
        closed?;
        if !a.quiet {
            out!("Image resized.");
        }
        Ok(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let of = |text: &str, now| Size::parse(text).ok()?.of(now).ok();
        assert_eq!(of("2M", 5), Some(2 << 20));
        assert_eq!(of("+1k", 1024), Some(2048));
        assert_eq!(of("-1k", 4096), Some(3072));
        assert_eq!(of("\u{2212}512", 1024), Some(512));
        // From the last full sector.
        assert_eq!(of("+1", 1000), Some(1025));
        assert_eq!(of("-100", 1025), Some(1436));
        for wrong in ["0", "-1k", "+", "", "10x", "9E", "18446744073709551615"] {
            assert_eq!(of(wrong, 1024), None, "{wrong}");
        }
    }

    #[test]
    fn a_minus_is_no_option() {
        let args = ["img resize", "-f", "raw", "-q", "x", "-1G"].map(OsString::from);
        let made = relative(args.to_vec());
        assert_eq!(made[5], OsString::from("\u{2212}1G"));
        assert_eq!(made[..5], args[..5]);
    }
}
