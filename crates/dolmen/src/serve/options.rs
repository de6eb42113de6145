//! The options of the daemon: one row each; parser and help derive from the rows.
//!
//! This stage knows only what was typed. Options keep their order, because the daemon
//! executes them one after the other: an export needs the node that an earlier option
//! opened.

use std::ffi::OsString;

use dolmen::types::{Error, ErrorKind, Result};

/// What an option is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    AllowBacking,
    AllowProbing,
    Blockdev,
    Chardev,
    Daemonize,
    Export,
    Help,
    Monitor,
    NbdServer,
    Object,
    Pidfile,
    Version,
}

/// A row.
struct Row {
    kind: Kind,
    /// Without the dashes.
    long: &'static str,
    short: Option<char>,
    /// What its value looks like; empty if it has none.
    value: &'static str,
    help: &'static str,
}

const ROWS: &[Row] = &[
    Row {
        kind: Kind::Blockdev,
        long: "blockdev",
        short: None,
        value: "[driver=]DRIVER[,node-name=NAME][,read-only=on|off][,cache.direct=on|off]...",
        help: "open a node; also as JSON, with the members of blockdev-add",
    },
    Row {
        kind: Kind::NbdServer,
        long: "nbd-server",
        short: None,
        value: "addr.type=unix,addr.path=PATH | addr.type=inet,addr.host=HOST,addr.port=PORT\n[,max-connections=N][,handshake-max-seconds=N]",
        help: "start the NBD server",
    },
    Row {
        kind: Kind::Export,
        long: "export",
        short: None,
        value: "[type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,description=TEXT][,writable=on|off]",
        help: "export a node; needs --nbd-server before it",
    },
    Row {
        kind: Kind::Chardev,
        long: "chardev",
        short: None,
        value: "socket,id=ID,path=PATH[,server=on|off][,wait=on|off] | stdio,id=ID",
        help: "a connection for a monitor: a Unix socket (with server=on for many clients at once, with wait=on\nthe daemon goes on when the first has come), or standard input and output",
    },
    Row {
        kind: Kind::Monitor,
        long: "monitor",
        short: None,
        value: "[chardev=]ID[,mode=control][,pretty=on|off]",
        help: "speak QMP on a chardev",
    },
    Row {
        kind: Kind::Object,
        long: "object",
        short: None,
        value: "TYPE,id=ID...",
        help: "make an object; this program has no types of objects",
    },
    Row {
        kind: Kind::Pidfile,
        long: "pidfile",
        short: None,
        value: "PATH",
        help: "write the process id to a file once everything is ready; it is removed at the end",
    },
    Row {
        kind: Kind::Daemonize,
        long: "daemonize",
        short: None,
        value: "",
        help: "go to the background once everything is ready",
    },
    Row {
        kind: Kind::AllowBacking,
        long: "allow-backing",
        short: None,
        value: "none|beneath|anything",
        help: "which files may be opened because an image names them: none, plain file names beneath the\nimage's own directory, anything",
    },
    Row {
        kind: Kind::AllowProbing,
        long: "allow-probing",
        short: None,
        value: "",
        help: "guess the format of a backing file when the image does not name it; unsafe when a guest could have\nwritten that file",
    },
    Row { kind: Kind::Help, long: "help", short: Some('h'), value: "", help: "this help" },
    Row { kind: Kind::Version, long: "version", short: Some('V'), value: "", help: "the version" },
];

/// An option as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) kind: Kind,
    /// The option with its dashes and value, for messages.
    pub(super) text: String,
    /// Its value; empty if it has none.
    pub(super) value: String,
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// Reads arguments (without the program's name).
///
/// # Errors
/// For an unknown or ambiguous option, a missing value, and anything that is not an option.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Vec<Given>> {
    let mut args = args.into_iter().map(|a| {
        a.into_string()
            .map_err(|a| invalid(format!("{}: the argument is not valid UTF-8", a.to_string_lossy())))
    });
    let mut out = Vec::new();
    while let Some(arg) = args.next().transpose()? {
        let (name, inline) = match arg.split_once('=') {
            Some((n, v)) if n.starts_with("--") => (n, Some(v.to_owned())),
            _ => (arg.as_str(), None),
        };
        if !name.starts_with('-') || name == "-" || name == "--" {
            return Err(invalid(format!("{arg}: Unexpected argument")));
        }
        let row = find(name)?;
        let mut value = String::new();
        let shown = format!("--{}", row.long);
        match (row.value.is_empty(), inline) {
            (true, None) => {}
            (true, Some(_)) => return Err(invalid(format!("option '{shown}' doesn't allow an argument"))),
            (false, Some(v)) => value = v,
            (false, None) => {
                value = args
                    .next()
                    .transpose()?
                    .ok_or_else(|| invalid(format!("option '{shown}' requires an argument")))?;
            }
        }
        let text = if row.value.is_empty() { shown } else { format!("{shown} {value}") };
        out.push(Given { kind: row.kind, text, value });
    }
    Ok(out)
}

/// The row of a name; a long name may be cut short as long as it is the only one.
fn find(name: &str) -> Result<&'static Row> {
    let unknown = || {
        invalid(match name.strip_prefix("--") {
            Some(_) => format!("unrecognized option '{name}'"),
            None => format!("invalid option -- '{}'", name.trim_start_matches('-')),
        })
    };
    // QEMU's daemon takes long names with one dash as well.
    let long = name.trim_start_matches('-');
    if let Some(row) = ROWS.iter().find(|r| r.long == long) {
        return Ok(row);
    }
    if !name.starts_with("--") && long.chars().count() == 1 {
        return ROWS.iter().find(|r| r.short.is_some_and(|s| long.starts_with(s))).ok_or_else(unknown);
    }
    let mut candidates = ROWS.iter().filter(|r| r.long.starts_with(long));
    match (candidates.next(), candidates.next()) {
        (Some(row), None) => Ok(row),
        (None, _) => Err(unknown()),
        (Some(_), Some(_)) => {
            let all: Vec<_> =
                ROWS.iter().filter(|r| r.long.starts_with(long)).map(|r| format!("'--{}'", r.long)).collect();
            Err(invalid(format!("option '{name}' is ambiguous; possibilities: {}", all.join(" "))))
        }
    }
}

/// The help text.
pub(super) fn help(program: &str) -> String {
    let mut out = format!(
        "Usage: {program} [OPTIONS]\n\nThe storage daemon: opens images and exports them. Options are executed in the order given.\n\n"
    );
    for row in ROWS {
        out.push_str("  ");
        if let Some(s) = row.short {
            out.push_str(&format!("-{s}, "));
        }
        out.push_str(&format!("--{}", row.long));
        if !row.value.is_empty() {
            out.push_str(&format!(" {}", row.value.replace('\n', "\n      ")));
        }
        out.push_str(&format!("\n          {}\n", row.help.replace('\n', "\n          ")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(args: &[&str]) -> std::result::Result<Vec<String>, String> {
        parse(args.iter().map(OsString::from))
            .map(|g| g.into_iter().map(|g| g.text).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn order_and_forms() {
        assert_eq!(
            texts(&["--export", "nbd,id=e", "--blockdev=null-co,node-name=n", "--daemonize", "-h"]),
            Ok(vec![
                "--export nbd,id=e".into(),
                "--blockdev null-co,node-name=n".into(),
                "--daemonize".into(),
                "--help".into()
            ])
        );
        assert_eq!(texts(&["--pid", "/x"]), Ok(vec!["--pidfile /x".into()]));
    }

    /// The texts are those of QEMU's daemon.
    #[test]
    fn mistakes() {
        for (args, error) in [
            (&["--bogus"][..], "unrecognized option '--bogus'"),
            (&["extra"], "extra: Unexpected argument"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["--daemonize=on"], "option '--daemonize' doesn't allow an argument"),
            (&["-x"], "invalid option -- 'x'"),
        ] {
            assert_eq!(texts(args), Err(error.to_owned()));
        }
    }

    #[test]
    fn every_option_is_in_the_help() {
        let text = help("dolmen serve");
        for row in ROWS {
            assert!(text.contains(&format!("--{}", row.long)), "{}", row.long);
            assert!(ROWS.iter().filter(|r| r.long == row.long).count() == 1, "{}", row.long);
        }
    }
}
