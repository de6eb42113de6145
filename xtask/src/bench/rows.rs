//! The rows: what is measured, and the command lines of both sides.

use super::count::Counter;
use super::jobs::{self, Job};
use super::load::Load;
use super::process::Line;
use super::sample::{Measured, Sample, Side};
use super::server::Server;
use super::{Context, Result};

/// Requests that start every calibration.
const FIRST: u64 = 256;
/// Requests of the passes that count system calls.
const COUNTED: u64 = 20_000;
/// Requests in one run of the installed bench tool. It goes one call deeper with each
/// read that completes at once, and ends with a segmentation fault when its stack is full:
/// at depth 1, with all data in the page cache, somewhat above 100,000.
const THEIR_MOST: u64 = 40_000;
/// The distance from one request to the next: an odd number of 4k blocks, so that every
/// block of an image whose size is a power of two is visited, and never two neighbours
/// one after the other. Read-ahead has nothing to guess.
const STEP: u64 = 4096 * 97_003;

/// A row, or a few that are measured together because they are compared with each other.
pub(super) struct Row {
    pub(super) name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Format {
    Raw,
    Qcow2,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    fn image(self, cx: &Context) -> Result<String> {
        match self {
            Format::Raw => cx.images.raw(),
            Format::Qcow2 => cx.images.qcow2(),
        }
    }
}

#[derive(Clone, Copy)]
enum Peer {
    Daemon,
    Nbd,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Pass-through layers over nothing.
    Null { layers: &'static [(usize, &'static str)] },
    /// Random reads of a file.
    File { format: Format, direct: bool, depth: u64 },
    /// Random reads through an NBD export.
    Nbd { format: Format, depth: u64, peer: Peer },
    /// Start-up: `info` on an overlay.
    Info { chain: bool },
    /// A job on a chain.
    Job(Job),
}

const NULL_LAYERS: &[(usize, &str)] =
    &[(1, "null, 1 layer, depth 32"), (3, "null, 3 layers, depth 32"), (5, "null, 5 layers, depth 32")];

/// Names of the rows that the goals look at: see [`super::report::goals`].
pub(super) const NULL_1: &str = NULL_LAYERS[0].1;
pub(super) const NULL_5: &str = NULL_LAYERS[2].1;
pub(super) const MIRROR: &str = "mirror, per GiB";
pub(super) const COMMIT: &str = "commit (active), per GiB";
pub(super) const STREAM: &str = "stream, per GiB";
pub(super) const BACKUP: &str = "backup, per GiB";

/// All rows.
pub(super) fn all() -> Vec<Row> {
    use Format::{Qcow2, Raw};
    let file = |name, format, direct, depth| Row { name, kind: Kind::File { format, direct, depth } };
    let nbd = |name, format, depth, peer| Row { name, kind: Kind::Nbd { format, depth, peer } };
    vec![
        Row { name: "null", kind: Kind::Null { layers: NULL_LAYERS } },
        file("raw, cached, depth 1", Raw, false, 1),
        file("raw, cached, depth 32", Raw, false, 32),
        file("raw, direct, depth 1", Raw, true, 1),
        file("raw, direct, depth 32", Raw, true, 32),
        file("qcow2, cached, depth 1", Qcow2, false, 1),
        file("qcow2, cached, depth 32", Qcow2, false, 32),
        file("qcow2, direct, depth 1", Qcow2, true, 1),
        file("qcow2, direct, depth 32", Qcow2, true, 32),
        nbd("nbd raw, depth 1", Raw, 1, Peer::Daemon),
        nbd("nbd raw, depth 32", Raw, 32, Peer::Daemon),
        nbd("nbd raw, depth 32 (qemu-nbd)", Raw, 32, Peer::Nbd),
        nbd("nbd qcow2, depth 1", Qcow2, 1, Peer::Daemon),
        nbd("nbd qcow2, depth 32", Qcow2, 32, Peer::Daemon),
        Row { name: "info, overlay", kind: Kind::Info { chain: false } },
        Row { name: "info --backing-chain", kind: Kind::Info { chain: true } },
        Row { name: MIRROR, kind: Kind::Job(Job::Mirror) },
        Row { name: COMMIT, kind: Kind::Job(Job::Commit) },
        Row { name: STREAM, kind: Kind::Job(Job::Stream) },
        Row { name: BACKUP, kind: Kind::Job(Job::Backup) },
    ]
}

/// Whether the installed tools can be told to use io_uring.
pub(super) fn their_ring() -> Result<bool> {
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(1 << 20)?;
    let path = file.path().to_string_lossy().into_owned();
    Ok(Line::new("qemu-img", ["bench", "-f", "raw", "-i", "io_uring", "-c", "1", "-d", "1", &path])
        .run()
        .is_ok())
}

impl Row {
    /// Measures it.
    pub(super) fn measure(&self, cx: &Context) -> Result<Vec<Measured>> {
        match self.kind {
            Kind::Null { layers } => {
                let mut pairs = Vec::new();
                for (n, name) in layers {
                    let args = ["-s", "4k", "-d", "32", "--image-opts", &null_graph(*n)].map(str::to_owned);
                    pairs.push(Pair::bench(cx, name, args.to_vec(), Vec::new()));
                }
                alternate(cx, pairs)
            }
            Kind::File { format, direct, depth } => {
                let path = format.image(cx)?;
                if !direct {
                    cx.images.warm(&path)?;
                }
                let mut args: Vec<String> =
                    ["-f", format.name(), "-s", "4k", "-S", &STEP.to_string(), "-d", &depth.to_string()]
                        .map(str::to_owned)
                        .to_vec();
                if direct {
                    args.extend(["-t", "none"].map(str::to_owned));
                }
                args.push(path);
                let theirs =
                    if cx.their_ring { vec!["-i".to_owned(), "io_uring".to_owned()] } else { Vec::new() };
                alternate(cx, vec![Pair::bench(cx, self.name, args, theirs)])
            }
            Kind::Nbd { format, depth, peer } => {
                let path = format.image(cx)?;
                cx.images.warm(&path)?;
                alternate(cx, vec![Pair::nbd(cx, self.name, format, &path, depth, peer)?])
            }
            Kind::Info { chain } => {
                let path = cx.images.overlay()?;
                let args: &[&str] =
                    if chain { &["--backing-chain", "-f", "qcow2"] } else { &["-f", "qcow2"] };
                let line = |program: Line| Subject::Program(program.with(args).with([&path]));
                let ours = line(Line::new(&cx.dolmen, ["img", "info"]));
                let (peer, theirs) = match &cx.against {
                    Some(other) => (OTHER, line(Line::new(other, ["img", "info"]))),
                    None => ("qemu-img", line(Line::new("qemu-img", ["info"]))),
                };
                alternate(cx, vec![Pair { name: self.name, peer, ours, theirs }])
            }
            Kind::Job(job) => {
                let (peer, theirs) = match &cx.against {
                    Some(other) => (OTHER, Line::new(other, ["serve"])),
                    None => ("qemu-storage-daemon", Line::new("qemu-storage-daemon", [""; 0])),
                };
                let ours = Line::new(&cx.dolmen, ["serve"]);
                copies(cx, self.name, peer, [ours, theirs].map(|line| jobs::Subject::new(cx, line, job)))
            }
        }
    }
}

/// The name of another build of Dolmen in the place of the installed tools.
const OTHER: &str = "the other build";

/// `layers` times `raw`, then `null-co`, as an option string for both sides.
fn null_graph(layers: usize) -> String {
    let mut prefix = String::new();
    let mut text = String::new();
    for _ in 0..layers {
        text += &format!("{prefix}driver=raw,");
        prefix += "file.";
    }
    text + &format!("{prefix}driver=null-co,{prefix}size=1G")
}

struct Pair {
    name: &'static str,
    peer: &'static str,
    ours: Subject,
    theirs: Subject,
}

impl Pair {
    fn bench(cx: &Context, name: &'static str, args: Vec<String>, only_theirs: Vec<String>) -> Pair {
        let dolmen = |program| Subject::Bench {
            line: Line::new(program, ["img", "bench"]).with(&args),
            most: u64::MAX,
        };
        let (peer, theirs) = match &cx.against {
            Some(other) => (OTHER, dolmen(other)),
            None => {
                let line = Line::new("qemu-img", ["bench"]).with(&only_theirs).with(&args);
                ("qemu-img", Subject::Bench { line, most: THEIR_MOST })
            }
        };
        Pair { name, peer, ours: dolmen(&cx.dolmen), theirs }
    }

    fn nbd(
        cx: &Context,
        name: &'static str,
        format: Format,
        path: &str,
        depth: u64,
        peer: Peer,
    ) -> Result<Pair> {
        let daemon = |socket: &str, aio: &str| {
            [
                "--blockdev".to_owned(),
                format!("driver=file,node-name=file,filename={path},read-only=on{aio}"),
                "--blockdev".to_owned(),
                format!("driver={},node-name=disk,file=file,read-only=on", format.name()),
                "--nbd-server".to_owned(),
                format!("addr.type=unix,addr.path={socket}"),
                "--export".to_owned(),
                "type=nbd,id=export,node-name=disk,name=disk".to_owned(),
            ]
        };
        let ring = if cx.their_ring { ",aio=io_uring" } else { "" };
        let start = |line: Line, socket: String| -> Result<Subject> {
            let server = Server::start(&line, socket.as_ref())?;
            let load = Load { socket, export: "disk".to_owned(), requests: 0, depth };
            Ok(Subject::Served(server, load))
        };
        let socket = |who: &str| cx.images.path(who).to_string_lossy().into_owned();
        let (ours, theirs) = (socket("ours.sock"), socket("theirs.sock"));
        let serve =
            |program: &std::path::Path, socket: &str| Line::new(program, ["serve"]).with(daemon(socket, ""));
        let (peer, line) = match (&cx.against, peer) {
            (Some(other), _) => (OTHER, serve(other, &theirs)),
            (None, Peer::Daemon) => {
                let line = Line::new("qemu-storage-daemon", daemon(&theirs, ring));
                ("qemu-storage-daemon", line)
            }
            (None, Peer::Nbd) => {
                let line = Line::new("qemu-nbd", ["-r", "-t", "-e", "8", "-f", format.name(), "-x", "disk"])
                    .with(if cx.their_ring { &["--aio=io_uring"][..] } else { &[] })
                    .with(["-k", &theirs, path]);
                ("qemu-nbd", line)
            }
        };
        Ok(Pair { name, peer, ours: start(serve(&cx.dolmen, &ours), ours)?, theirs: start(line, theirs)? })
    }
}

/// Something that can be measured.
enum Subject {
    /// A bench verb, without its number of requests, and how many it can stand.
    Bench { line: Line, most: u64 },
    /// A server, and the load for it.
    Served(Server, Load),
    /// A program from start to end.
    Program(Line),
}

impl Subject {
    /// One measurement of `n` requests.
    fn sample(&self, n: u64) -> Result<Sample> {
        let per = |ns: f64| ns / n as f64;
        match self {
            Subject::Bench { line, .. } => {
                let (_, idle) = requests(line, 1).run()?;
                let (out, cost) = requests(line, n).run()?;
                let cpu = cost.cpu.saturating_sub(idle.cpu);
                Ok(Sample { wall_ns: per(completed(&out)? * 1e9), cpu_ns: per(cpu.as_nanos() as f64) })
            }
            Subject::Served(server, load) => {
                let mut readings = Vec::with_capacity(2);
                let wall = Load { requests: n, ..load.clone() }.run(|| {
                    readings.push(server.cpu()?);
                    Ok(())
                })?;
                let cpu = match readings.as_slice() {
                    [before, after] => after.since(before),
                    _ => return Err("the load was not framed by two readings".into()),
                };
                Ok(Sample { wall_ns: per(wall.as_nanos() as f64), cpu_ns: per(cpu as f64) })
            }
            Subject::Program(line) => {
                let (mut wall, mut cpu) = (0, 0);
                for _ in 0..n {
                    let (_, cost) = line.run()?;
                    wall += cost.wall.as_nanos();
                    cpu += cost.cpu.as_nanos();
                }
                Ok(Sample { wall_ns: per(wall as f64), cpu_ns: per(cpu as f64) })
            }
        }
    }

    /// System calls per request, counted in a pass of its own.
    fn syscalls(&self, counter: Counter) -> Result<Option<f64>> {
        Ok(match self {
            Subject::Bench { line, .. } => {
                let few = counter.of_program(&requests(line, 1))?;
                let many = counter.of_program(&requests(line, COUNTED))?;
                few.zip(many).map(|(f, m)| m.saturating_sub(f) as f64 / (COUNTED - 1) as f64)
            }
            Subject::Served(server, load) => {
                let load = Load { requests: COUNTED, ..load.clone() };
                counter.of_process(server.pid(), &load.line()?)?.map(|n| n as f64 / COUNTED as f64)
            }
            Subject::Program(line) => counter.of_program(line)?.map(|n| n as f64),
        })
    }

    /// How many requests take about `seconds`.
    fn calibrate(&self, seconds: f64) -> Result<u64> {
        if let Subject::Program(_) = self {
            self.sample(1)?;
            return Ok(((seconds * 1e9 / self.sample(1)?.wall_ns) as u64).max(1));
        }
        let most = match self {
            Subject::Bench { most, .. } => *most,
            Subject::Served(..) | Subject::Program(_) => u64::MAX,
        };
        let mut n = FIRST;
        loop {
            let took = self.sample(n)?.wall_ns * n as f64 / 1e9;
            if took >= seconds / 8.0 || n == most {
                return Ok(((n as f64 * seconds / took) as u64).clamp(FIRST, most));
            }
            n = (n * 4).min(most);
        }
    }
}

/// A bench command line with its number of requests.
fn requests(line: &Line, n: u64) -> Line {
    let mut line = line.clone();
    let at = line.args.iter().position(|a| a == "bench").map_or(0, |i| i + 1);
    line.args.splice(at..at, ["-c".to_owned(), n.to_string()]);
    line
}

/// Seconds in the line "Run completed in 1.234 seconds."
fn completed(out: &str) -> Result<f64> {
    out.lines()
        .find_map(|l| l.strip_prefix("Run completed in ")?.strip_suffix(" seconds.")?.parse().ok())
        .ok_or_else(|| format!("no time in the output: {out}").into())
}

/// Measures some pairs, all of them in every round.
fn alternate(cx: &Context, pairs: Vec<Pair>) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for p in &pairs {
        // Each side gets as many as fill the time: with the number that suits the slower
        // one, the faster one would be over before it can be measured.
        let side = |s: &Subject| -> Result<Side> {
            Ok(Side { requests: s.calibrate(cx.seconds)?, samples: Vec::new(), syscalls: None })
        };
        all.push(Measured { name: p.name, peer: p.peer, ours: side(&p.ours)?, theirs: side(&p.theirs)? });
    }
    for _ in 0..cx.rounds {
        for (p, m) in pairs.iter().zip(&mut all) {
            m.ours.samples.push(p.ours.sample(m.ours.requests)?);
            m.theirs.samples.push(p.theirs.sample(m.theirs.requests)?);
        }
    }
    for (p, m) in pairs.iter().zip(&mut all) {
        m.ours.syscalls = p.ours.syscalls(cx.counter)?;
        m.theirs.syscalls = p.theirs.syscalls(cx.counter)?;
    }
    Ok(all)
}

/// Measures a job under both daemons.
fn copies(
    cx: &Context,
    name: &'static str,
    peer: &'static str,
    [ours, theirs]: [jobs::Subject<'_>; 2],
) -> Result<Vec<Measured>> {
    let side = || Side { requests: 1, samples: Vec::new(), syscalls: None };
    let mut m = Measured { name, peer, ours: side(), theirs: side() };
    for _ in 0..cx.job_rounds {
        m.ours.samples.push(ours.sample()?);
        m.theirs.samples.push(theirs.sample()?);
    }
    Ok(vec![m])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn graphs_and_lines() {
        assert_eq!(null_graph(2), "driver=raw,file.driver=raw,file.file.driver=null-co,file.file.size=1G");
        let line = Line::new("qemu-img", ["bench", "-d", "1"]);
        assert_eq!(requests(&line, 7).args, ["bench", "-c", "7", "-d", "1"]);
        assert_eq!(completed("Sending\nRun completed in 1.250 seconds.\n").unwrap(), 1.25);
        assert!(completed("Run completed").is_err());
    }

    #[test]
    fn the_step_visits_every_block() {
        let (blocks, step) = (1 << 10, STEP / 4096);
        let mut seen = vec![false; blocks as usize];
        (0..blocks).for_each(|n| seen[(n * step % blocks) as usize] = true);
        assert!(seen.iter().all(|s| *s));
    }
}
