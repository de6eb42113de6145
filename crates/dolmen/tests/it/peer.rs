//! Running our tools and QEMU's side by side.
//!
//! Each test has a private directory with `ours/`: symbolic links by which our binary
//! answers to QEMU's names. Tests that need the other side ask [`Bench::peers`]
//! and say so when it is not installed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A private directory to work in.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("ours")).expect("ours/");
        for name in ["qemu-img", "qemu-io", "qemu-storage-daemon"] {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dolmen"), dir.path().join("ours").join(name))
                .expect("a link");
        }
        Bench { dir }
    }

    /// A bench, if QEMU's tools are there to compare with.
    pub(crate) fn with_peers() -> Option<Bench> {
        let there = ["qemu-img", "qemu-io"].iter().all(|t| in_path(t).is_some());
        if !there {
            println!("not compared: qemu-img and qemu-io are not installed");
        }
        there.then(Bench::new)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command in the directory, not started yet. `program` is `qemu-img` and so on for
    /// QEMU's tool, `ours/qemu-img` for ours by that name, `dolmen` for ours.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut c = match program {
            "dolmen" => Command::new(env!("CARGO_BIN_EXE_dolmen")),
            _ if program.starts_with("ours/") => Command::new(self.path(program)),
            _ => Command::new(in_path(program).unwrap_or_else(|| program.into())),
        };
        c.current_dir(self.dir.path()).env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null());
        c
    }

    /// Runs a command to its end.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Ran {
        let out = self.command(program).args(args).output().expect("the program starts");
        ran(out)
    }

    /// Runs a command that has to succeed, and gives its output.
    pub(crate) fn ok<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> String {
        let r = self.run(program, args);
        assert_eq!(r.code, 0, "{program} failed: {r:?}");
        r.out
    }

    /// Runs both tools with the same arguments; ours has to behave like the other one,
    /// except for what `same` makes equal.
    pub(crate) fn same<S: AsRef<OsStr> + std::fmt::Debug>(
        &self,
        tool: &str,
        args: &[S],
        same: impl Fn(&str) -> String,
    ) {
        let theirs = self.run(tool, args);
        let ours = self.run(&format!("ours/{tool}"), args);
        assert_eq!(
            (ours.code, same(&ours.out)),
            (theirs.code, same(&theirs.out)),
            "{tool} {args:?}\nours says: {}\ntheirs says: {}",
            ours.err,
            theirs.err
        );
        assert_eq!(ours.err.is_empty(), theirs.err.is_empty(), "{tool} {args:?}: {ours:?} {theirs:?}");
    }
}

impl Bench {
    /// As [`Bench::same`], with the same words on the standard error.
    pub(crate) fn same_words(&self, tool: &str, args: &[&str]) {
        let dir = in_path(tool).and_then(|p| Some(format!("{}/", p.parent()?.display()))).unwrap_or_default();
        let mut theirs = self.run(tool, args);
        theirs.err = theirs.err.replace(&dir, "");
        assert_eq!(self.run(&format!("ours/{tool}"), args), theirs, "{tool} {args:?}");
    }
}

pub(crate) fn ran(out: Output) -> Ran {
    Ran {
        code: out.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&out.stdout).into_owned(),
        err: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// Where a program is installed.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|d| d.join(name))
        .find(|p: &PathBuf| Path::is_file(p))
}

/// The version of QEMU's tools, as `(10, 0)`.
pub(crate) fn version(b: &Bench) -> (u32, u32) {
    let text = b.ok("qemu-img", &["--version"]);
    let number = text.split_whitespace().nth(2).unwrap_or_default();
    let mut parts = number.split('.').map(|p| p.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// Whether the other side is the release whose behaviour ours follows to the letter; if
/// not, says what is not compared.
pub(crate) fn is_reference(b: &Bench, what: &str) -> bool {
    let v = version(b);
    if v < (10, 0) {
        println!("not compared with qemu-img {}.{}: {what}", v.0, v.1);
    }
    v >= (10, 0)
}
