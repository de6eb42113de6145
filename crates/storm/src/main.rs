//! `cargo xtask storm`: random commands under load against a storage daemon, with crashes and a model of
//! what must come of it.
//!
//! - [`images`] makes the files, [`choose`] the commands, [`load`] and [`pester`] the clients;
//! - [`book`] judges what is read, [`world`] and [`effects`] know which node and export shows what;
//! - [`storm`] does one seed, [`rounds`] the beginning and the end of a daemon's life in it, [`weigh`] what it holds;
//! - [`shrink`] looks for the shortest list of steps that still fails, [`testcase`] writes it down as a test.
//!
//! What is chosen depends on the seed and on what the daemon answers, so a seed does the same again as far as
//! timing lets it. Steps are values ([`steps`]): a list of them can be done again exactly.
#![forbid(unsafe_code)]

mod book;
mod choose;
mod daemon;
mod effects;
mod images;
mod load;
mod nbd;
mod pester;
mod qmp;
mod rng;
mod rounds;
mod shrink;
mod steps;
mod storm;
mod testcase;
mod weigh;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};

use crate::daemon::Tools;
use crate::storm::{Mode, Numbers, Source};

/// Random commands under load against a storage daemon.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask storm")]
struct Options {
    /// Seeds: one, or FIRST-LAST
    #[arg(long, default_value = "1-1000000")]
    seed: String,
    /// No new seed is begun after so many minutes
    #[arg(long)]
    minutes: Option<f64>,
    /// A directory with tools that are named like QEMU's [default: the debug build of dolmen]
    #[arg(long)]
    bin: Option<PathBuf>,
    /// Seeds at the same time [default: 2]
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Go on after a finding
    #[arg(long)]
    go_on: bool,
    /// Print every step
    #[arg(short, long)]
    verbose: bool,
    /// Do not look for the shortest list of steps that fails
    #[arg(long)]
    no_shrink: bool,
    /// Do the steps of a file that a failing seed has written
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Do not stop at findings of these kinds, for looking at what comes after them
    #[arg(long, value_delimiter = ',')]
    past: Vec<String>,
    /// Print what was refused, and how often
    #[arg(long)]
    refusals: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("storm: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A directory in which our program has the names of QEMU's tools.
fn ours() -> Result<(tempfile::TempDir, PathBuf), String> {
    let program = std::env::var_os("STORM_DOLMEN").ok_or("STORM_DOLMEN does not name the program")?;
    let program = std::fs::canonicalize(&program).map_err(|e| format!("{}: {e}", program.display()))?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    for name in ["qemu-storage-daemon", "qemu-img", "qemu-io"] {
        std::os::unix::fs::symlink(&program, dir.path().join(name)).map_err(|e| e.to_string())?;
    }
    let path = dir.path().to_owned();
    Ok((dir, path))
}

fn run(options: &Options) -> Result<bool, String> {
    let (_links, dir) = match &options.bin {
        Some(d) => (None, std::fs::canonicalize(d).map_err(|e| format!("{}: {e}", d.display()))?),
        None => ours().map(|(links, dir)| (Some(links), dir))?,
    };
    let installed = PathBuf::from("/usr/bin");
    let judge = if installed.join("qemu-img").exists() { installed } else { dir.clone() };
    let tools = Tools { dir, judge };
    let numbers = Arc::new(Numbers::default());
    if let Some(file) = &options.replay {
        let mode = Mode { verbose: options.verbose, past: options.past.clone() };
        return shrink::replay(file, &tools, &numbers, &mode);
    }
    let (first, last) = match options.seed.split_once('-') {
        Some((a, b)) => (number(a)?, number(b)?),
        None => (number(&options.seed)?, number(&options.seed)?),
    };
    if first > last {
        return Err(format!("--seed {}: there is no seed in this range", options.seed));
    }
    let until = options.minutes.map(|m| Instant::now() + Duration::from_secs_f64(m * 60.0));
    let started = Instant::now();
    let (next, done, found) = (AtomicU64::new(first), AtomicU64::new(0), AtomicU64::new(0));
    let stop = stop_at_signals()?;
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > last
                        || stop.load(Ordering::Relaxed)
                        || until.is_some_and(|u| Instant::now() >= u)
                    {
                        return;
                    }
                    let clean = one(seed, &tools, &numbers, options, stop);
                    done.fetch_add(1, Ordering::Relaxed);
                    if !clean {
                        found.fetch_add(1, Ordering::Relaxed);
                        if !options.go_on {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let done = done.into_inner();
    report(&numbers, done, started, options);
    if done == 0 {
        return Err("no seed was done: nothing is known".into());
    }
    let found = found.into_inner();
    println!("{found} seeds with findings");
    Ok(found == 0)
}

/// Set when somebody interrupts: the seeds under way come to an end, and take down what they have mounted.
fn stop_at_signals() -> Result<&'static AtomicBool, String> {
    static STOP: AtomicBool = AtomicBool::new(false);
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Threads inherit it, processes do not.
    signals.thread_block().map_err(|e| e.to_string())?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
        // Whoever insists is obeyed.
        if signals.wait().is_ok() {
            std::process::exit(1);
        }
    });
    Ok(&STOP)
}

fn number(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|e| format!("'{text}': {e}"))
}

/// One seed; whether all was well.
fn one(seed: u64, tools: &Tools, numbers: &Arc<Numbers>, options: &Options, stop: &AtomicBool) -> bool {
    if options.verbose {
        println!("seed {seed}");
    }
    let mode = Mode { verbose: options.verbose, past: options.past.clone() };
    match storm::run(seed, &Source::Chosen, tools, numbers, &mode, stop) {
        Err(e) => {
            println!("seed {seed}: can't be done: {e}");
            false
        }
        Ok(outcome) => match &outcome.finding {
            None => true,
            Some(f) => {
                println!("seed {seed}, step {}: {}: {}", outcome.steps.len(), f.kind, f.text);
                if let Some(kept) = &outcome.kept {
                    println!("  kept in {}", kept.display());
                }
                if options.no_shrink {
                    shrink::print(seed, &outcome);
                } else {
                    shrink::shrink(seed, &outcome, tools, &mode);
                }
                false
            }
        },
    }
}

fn report(n: &Numbers, seeds: u64, started: Instant, options: &Options) {
    let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
    println!(
        "{seeds} seeds in {} s: {} commands ({} refused), {} jobs that ended well, {} client requests, {} queries, {} \
         what-ifs judged, {} daemons' lives, {} images compared; slowest query {} ms, slowest command {} ms",
        started.elapsed().as_secs(),
        get(&n.commands),
        get(&n.refused),
        get(&n.jobs),
        rounds::total(n),
        get(&n.queries),
        get(&n.what_if),
        get(&n.rounds),
        get(&n.compared),
        get(&n.slowest_query),
        get(&n.slowest_command),
    );
    for (title, list) in [("refusals", &n.refusals), ("failed requests", &n.failures)] {
        let list = list.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut list: Vec<_> = list.iter().collect();
        list.sort_by_key(|l| std::cmp::Reverse(*l.1));
        let most = if options.refusals { 60 } else { 0 };
        if most > 0 {
            println!("{title}:");
        }
        list.iter().take(most).for_each(|(what, count)| println!("{count:6} {what}"));
    }
}
