//! `cargo xtask bench`: Dolmen against the installed tools, in the same run.
//!
//! Every row is measured in alternating rounds (ours, theirs, ours, ...), because the
//! machine's mood changes over minutes but seldom between two neighbouring rounds; the
//! medians of the rounds are compared. Absolute numbers are those of this machine at
//! this moment, the ratios are what can be carried away.
//!
//! CPU time counts all threads, in the program and in the kernel on its behalf; what a
//! program needs to start is measured in each round and taken off. System calls are
//! counted in passes of their own (counting costs time): with tracepoints if `perf` may
//! use them, else with `strace`, whose delays change how much a program batches.
//!
//! Nothing here fails because of a number, unless `--check` asks for it.

mod count;
mod images;
mod jobs;
mod load;
mod process;
mod report;
mod rows;
mod sample;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

pub(crate) use process::target_dir;

/// Whatever goes wrong ends the run with its message.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Measure Dolmen against the installed tools.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench")]
struct Options {
    /// Rows to measure: those whose name contains one of these words (default: all)
    rows: Vec<String>,
    /// List the rows, then end
    #[arg(long)]
    list: bool,
    /// Small images, short and few rounds: less than a minute for everything
    #[arg(long)]
    quick: bool,
    /// Rounds of each row [default: 7, of jobs 3; with --quick 3, of jobs 1]
    #[arg(long)]
    rounds: Option<usize>,
    /// How long one measurement takes about, in seconds [default: 1; with --quick 0.12]
    #[arg(long)]
    seconds: Option<f64>,
    /// Size of the images in MiB [default: 1024, of jobs 4096; with --quick 256]
    #[arg(long)]
    size: Option<u64>,
    /// Directory for the images [default: target/bench]; not on tmpfs
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The program to measure [default: build it]
    #[arg(long)]
    dolmen: Option<PathBuf>,
    /// Another build of Dolmen to compare with, in place of the installed tools
    #[arg(long)]
    against: Option<PathBuf>,
    /// Where to write the numbers [default: target/bench.json]
    #[arg(long)]
    json: Option<PathBuf>,
    /// Do not count system calls
    #[arg(long)]
    no_syscalls: bool,
    /// Fail when a goal is missed
    #[arg(long)]
    check: bool,
}

/// What all rows share.
struct Context {
    dolmen: PathBuf,
    against: Option<PathBuf>,
    images: images::Images,
    chain: jobs::Chain,
    counter: count::Counter,
    rounds: usize,
    job_rounds: usize,
    seconds: f64,
    /// The installed tools know `-i io_uring`.
    their_ring: bool,
}

/// Runs the task.
pub(crate) fn main(args: &[String]) -> ExitCode {
    // The load generator runs as a process of its own while system calls are counted.
    if args.first().is_some_and(|a| a == load::VERB) {
        return finish(load::main(&args[1..]));
    }
    match Options::try_parse_from(std::iter::once("bench").chain(args.iter().map(String::as_str))) {
        Ok(options) => finish(run(&options)),
        Err(e) => {
            let _ = e.print();
            ExitCode::from(if e.use_stderr() { 2 } else { 0 })
        }
    }
}

fn finish(result: Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let rows: Vec<_> = rows::all()
        .into_iter()
        .filter(|r| options.rows.is_empty() || options.rows.iter().any(|w| r.name.contains(w.as_str())))
        .collect();
    if options.list || rows.is_empty() {
        rows.iter().for_each(|r| println!("{}", r.name));
        return Ok(!rows.is_empty());
    }
    let target = process::target_dir();
    let dolmen = match &options.dolmen {
        Some(path) => path.clone(),
        None => process::build(&target)?,
    };
    let quick = options.quick;
    let dir = options.dir.clone().unwrap_or_else(|| target.join("bench"));
    let size = |default| options.size.unwrap_or(if quick { 256 } else { default }) << 20;
    let images = images::Images::new(dir, size(1024))?;
    let cx = Context {
        chain: jobs::Chain::new(images.path(""), size(4096)),
        images,
        counter: if options.no_syscalls { count::Counter::None } else { count::Counter::find() },
        rounds: options.rounds.unwrap_or(if quick { 3 } else { 7 }).max(1),
        job_rounds: options.rounds.unwrap_or(if quick { 1 } else { 3 }).max(1),
        seconds: options.seconds.unwrap_or(if quick { 0.12 } else { 1.0 }),
        their_ring: rows::their_ring()?,
        dolmen,
        against: options.against.clone(),
    };
    println!("{}", report::heading(&cx)?);
    let started = Instant::now();
    let mut results = Vec::new();
    println!("{}", report::TABLE_HEAD);
    for row in &rows {
        match row.measure(&cx) {
            Ok(measured) => {
                measured.iter().for_each(|m| println!("{}", report::line(m)));
                results.extend(measured);
            }
            Err(e) => return Err(format!("row '{}': {e}", row.name).into()),
        }
    }
    let goals = report::goals(&results);
    println!("\n{}", report::legend(&cx));
    for goal in &goals {
        println!("{goal}");
    }
    let json = options.json.clone().unwrap_or_else(|| target.join("bench.json"));
    report::write_json(&json, &cx, &results, &goals)?;
    let took = Duration::from_secs(started.elapsed().as_secs());
    println!("\n{} rows in {took:?}; numbers in {}", results.len(), json.display());
    Ok(!options.check || goals.iter().all(|g| g.met))
}
