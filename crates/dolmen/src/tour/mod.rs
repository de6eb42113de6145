//! `dolmen tour`: the main job, told as it happens.
//!
//! A base image with known content, an empty overlay, a copy-on-read node over it and an
//! NBD export of that node. A client reads; what it touched is then in the overlay, so
//! that the base can be taken away for those ranges. A second client writes. At the end
//! everything is compared with what it has to be.
//!
//! Nothing but this binary is needed: the commands that the tour shows are the commands
//! that it runs, the daemon is a process of its own, and the clients are Dolmen's. All
//! files live in a private directory that is removed at the end, and the daemon is ended
//! whatever happens.

mod content;
mod daemon;
mod draw;

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use dolmen::session;
use dolmen::types::{Error, ErrorKind, Options, Result, ResultExt};

use crate::out;
use content::{Content, Job};
use daemon::Daemon;

const HELP: &str = "\
Usage: dolmen tour

Serves a generated disk image live, through copy-on-read, and verifies every byte.
Needs nothing but this program, takes a few seconds and cleans up after itself.
";

/// Size of the disk that is shown, in bytes.
const DISK: u64 = 64 << 20;
/// What the first client reads: these ranges of the disk, in bytes.
const TOUCHED: [(u64, u64); 3] = [(0, 1 << 20), (5 << 20, 300_000), ((40 << 20) + 12_345, 2 << 20)];
/// What the second client writes.
const WRITTEN: [(u64, u64); 3] = [(512 << 10, 64 << 10), ((7 << 20) + 4096, 8192), (63 << 20, 1 << 20)];

/// Runs it; returns the exit code.
pub(crate) fn main(args: &[OsString]) -> u8 {
    if let Some(arg) = args.first() {
        let help = arg == "--help" || arg == "-h";
        if help {
            out!("{}", HELP.trim_end());
        } else {
            eprintln!("dolmen tour: unexpected argument '{}'\n{}", arg.to_string_lossy(), HELP.trim_end());
        }
        return u8::from(!help);
    }
    match tour() {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("dolmen tour: {e}");
            if let Some(remedy) = e.remedy_text() {
                eprintln!("  {remedy}");
            }
            1
        }
    }
}

fn tour() -> Result<()> {
    let started = std::time::Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("dolmen-tour-")
        .tempdir()
        .context(|| "could not make a private directory")?;
    let exe = std::env::current_exe().context(|| "could not find this program's file")?;
    let tour = Tour { dir: dir.path(), exe: &exe };
    tour.run()?;
    // Not left to the destructor: a failure to clean up is worth knowing.
    dir.close().context(|| "could not remove the tour's directory")?;
    out!(
        "\nDone in {:.1} s. Every byte was what it had to be, and nothing is left behind.",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Tour<'a> {
    dir: &'a Path,
    exe: &'a Path,
}

impl Tour<'_> {
    fn run(&self) -> Result<()> {
        let mut disk = Content::base(DISK);

        heading(1, "A base image, and an empty overlay over it");
        self.dolmen(&["img", "create", "-q", "-f", "qcow2", "base.qcow2", "64M"])?;
        self.fill_base(&disk)?;
        out!("  (wrote {} MiB of known content into base.qcow2)", disk.data_bytes() >> 20);
        self.dolmen(&[
            "img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "overlay.qcow2",
        ])?;

        heading(2, "The daemon: copy-on-read over the overlay, exported by NBD");
        let mut daemon = Daemon::start(
            self.exe,
            self.dir,
            &[
                "--blockdev",
                "file,node-name=overlay-file,filename=overlay.qcow2",
                "--blockdev",
                "file,node-name=base-file,filename=base.qcow2,read-only=on",
                "--blockdev",
                "qcow2,node-name=base,file=base-file,read-only=on",
                "--blockdev",
                "qcow2,node-name=overlay,file=overlay-file,backing=base",
                "--blockdev",
                "copy-on-read,node-name=cor,file=overlay",
                "--nbd-server",
                "addr.type=unix,addr.path=nbd.sock",
                "--export",
                "nbd,id=exp0,node-name=cor,name=disk,writable=on",
            ],
        )?;

        heading(3, "The graph: what each edge needs, and what it allows others to do");
        draw_graph(&mut daemon)?;

        heading(4, "A client reads three ranges; they are copied into the overlay on the way");
        self.client(Job::Verify(disk.clone(), TOUCHED.to_vec()))?;
        for (offset, len) in TOUCHED {
            out!("  read {len} bytes at {offset}: right");
        }

        heading(5, "Refused: what would destroy the image says who, why and what to do");
        let refused = daemon.refused(
            "block-export-add",
            r#"{"type": "nbd", "id": "exp1", "node-name": "overlay-file", "writable": true}"#,
        )?;
        out!("  {refused}");
        self.refused_by_lock(daemon.pid())?;

        heading(6, "A second client writes; the whole disk is read back");
        self.client(Job::Overwrite(WRITTEN.to_vec()))?;
        for (i, (offset, len)) in WRITTEN.into_iter().enumerate() {
            disk.overwrite(offset, len, i as u64);
            out!("  wrote {len} bytes at {offset}, flushed");
        }
        self.client(Job::Verify(disk.clone(), vec![(0, DISK)]))?;
        out!("  read the whole disk back through the export: right");

        heading(7, "The daemon ends; the overlay is checked");
        daemon.quit()?;
        self.dolmen(&["img", "check", "-f", "qcow2", "overlay.qcow2"])?;

        heading(8, "The base is taken away: what was touched is in the overlay");
        std::fs::rename(self.dir.join("base.qcow2"), self.dir.join("base-taken-away"))
            .context(|| "could not move the base away")?;
        let alone = Options::new().with("driver", "qcow2").with("backing", "").with("read-only", true);
        let ranges: Vec<(u64, u64)> = TOUCHED.into_iter().chain(WRITTEN).collect();
        let n = ranges.len();
        self.overlay(alone, Job::Verify(disk.clone(), ranges))?;
        out!("  all {n} ranges read right without the base");

        heading(9, "With the base again, overlay and base together are the disk");
        std::fs::rename(self.dir.join("base-taken-away"), self.dir.join("base.qcow2"))
            .context(|| "could not put the base back")?;
        let chain = Options::new().with("driver", "qcow2").with("read-only", true);
        self.overlay(chain, Job::Verify(disk, vec![(0, DISK)]))?;
        out!("  {} MiB compared, byte by byte: right", DISK >> 20);
        Ok(())
    }

    /// Shows and runs a command of this program.
    fn dolmen(&self, args: &[&str]) -> Result<()> {
        out!("  $ dolmen {}", args.join(" "));
        crate::cli::flush();
        let output = self.output(args)?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            out!("    {line}");
        }
        if !output.status.success() {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "'dolmen {}' failed: {}",
                    args.join(" "),
                    String::from_utf8_lossy(&output.stderr).trim()
                ),
            ));
        }
        Ok(())
    }

    fn output(&self, args: &[&str]) -> Result<std::process::Output> {
        Command::new(self.exe)
            .args(args)
            .current_dir(self.dir)
            .output()
            .context(|| "could not run this program")
    }

    /// Another process wants to write the overlay: the lock says who has it.
    fn refused_by_lock(&self, pid: u32) -> Result<()> {
        let args = ["io", "-f", "qcow2", "-c", "write 0 4k", "overlay.qcow2"];
        out!("  $ dolmen io -f qcow2 -c 'write 0 4k' overlay.qcow2");
        let output = self.output(&args)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        for line in text.lines() {
            out!("    {line}");
        }
        if output.status.success() || !text.contains(&pid.to_string()) {
            return Err(Error::new(
                ErrorKind::Io,
                format!("a second writer was not refused with the holder's pid {pid}: {text}"),
            ));
        }
        Ok(())
    }

    fn fill_base(&self, disk: &Content) -> Result<()> {
        let options = self.in_file(Options::new().with("driver", "qcow2"), "base.qcow2");
        content::run(options, session::WRITE, Job::Fill(disk.clone()))
    }

    /// Does something with the overlay, opened with these options.
    fn overlay(&self, options: Options, job: Job) -> Result<()> {
        content::run(self.in_file(options, "overlay.qcow2"), session::READ, job)
    }

    /// Does something as an NBD client of the export.
    fn client(&self, job: Job) -> Result<()> {
        let server = Options::new().with("type", "unix").with("path", self.path("nbd.sock"));
        let options =
            Options::new().with("driver", "nbd").with("server", server.into_value()).with("export", "disk");
        content::run(options, session::WRITE, job)
    }

    fn in_file(&self, options: Options, name: &str) -> Options {
        let file = Options::new().with("driver", "file").with("filename", self.path(name));
        options.with("file", file.into_value())
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }
}

fn draw_graph(daemon: &mut Daemon) -> Result<()> {
    let graph = daemon.command("x-debug-query-block-graph", "{}")?;
    draw::graph(&graph, &daemon.command("query-named-block-nodes", "{}")?)
}

fn heading(n: u32, text: &str) {
    out!("\n{n}. {text}");
    crate::cli::flush();
}
