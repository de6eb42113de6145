//! The crash explorer: random workloads over a stack of copy-on-read, qcow2 and a backing
//! file in the simulation, losing power at drawn points.
//!
//! For each seed a workload runs once ([`workload`]); then crashes are drawn from the log
//! of its disk and judged ([`judge`]): the image must pass the format's own check (leaks
//! are allowed), and a reader must find for each sector what the contract of a disk allows.
//!
//! The second kind of run is a schedule ([`schedule`]): a control task over a chain of images, with
//! jobs, exports, filters and reopened nodes while guests write, on disks that lose power together
//! ([`world`]). Its crashes are judged with all its images ([`aftermath`]): each passes its check,
//! and the chain that the headers name has what was flushed.
//!
//! Environment: `DOLMEN_SIM_SEEDS` how many seeds (default 1000), `DOLMEN_SIM_FIRST` the first
//! one (default 0), `DOLMEN_SIM_SEED` just this one, `DOLMEN_SIM_KEEP` a directory for the
//! image of each failure, `DOLMEN_SIM_TRACE` to see the commands of a schedule.
//!
//! This lives with the control crate because it needs formats and filters at once; they do
//! not know each other.

mod aftermath;
mod changes;
mod guest;
mod judge;
mod late;
mod schedule;
mod workload;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use aftermath::Left;
use dolmen_sim::Random;
use judge::Found;
use schedule::{Done, Schedule};
use workload::{Bug, Scenario, Weather};

/// Crashes drawn for each seed.
const CRASHES: u64 = 20;

/// Crashes drawn for each schedule: each is judged with all its images.
const SCHEDULE_CRASHES: u64 = 8;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// Explores one seed; the error names the crash.
fn explore(seed: u64, weather: Weather, bug: Bug) -> Result<Found, String> {
    let scenario = Scenario::draw(&mut Random::new(seed), weather);
    let run = workload::run(&scenario, seed, bug).map_err(|e| format!("{scenario:?}: {e}"))?;
    judge::judge(&scenario, &run, seed, CRASHES).map_err(|e| format!("{scenario:?}: {e}"))
}

/// Explores many seeds on all cores, until `enough` have failed. Returns what was found, and
/// the failures by seed.
fn explore_all<T: Default + Send>(
    seeds: std::ops::Range<u64>,
    enough: usize,
    explore: impl Fn(u64) -> Result<T, String> + Sync,
    add: impl Fn(&mut T, &T) + Sync,
) -> (T, Vec<(u64, String)>) {
    let next = AtomicU64::new(seeds.start);
    let results = Mutex::new((T::default(), Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let result = catch_unwind(AssertUnwindSafe(|| explore(seed))).unwrap_or_else(|p| {
                        let text = p.downcast_ref::<String>().cloned();
                        let text = text.or_else(|| p.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                        Err(format!("panic: {}", text.unwrap_or_default()))
                    });
                    let mut results = results.lock().expect("results");
                    match result {
                        Ok(found) => add(&mut results.0, &found),
                        Err(e) => results.1.push((seed, e)),
                    }
                    if results.1.len() >= enough {
                        return;
                    }
                }
            });
        }
    });
    let (found, mut failures) = results.into_inner().expect("results");
    failures.sort();
    (found, failures)
}

/// Explores seeds of the first kind: see [`explore`].
fn explore_workloads(
    seeds: std::ops::Range<u64>,
    weather: Weather,
    bug: Bug,
    enough: usize,
) -> (Found, Vec<(u64, String)>) {
    explore_all(seeds, enough, |seed| explore(seed, weather, bug), Found::add)
}

/// Plays the schedule of one seed and judges its end and its crashes.
fn explore_schedule(seed: u64) -> Result<(Left, Done), String> {
    let schedule = Schedule::draw(&mut Random::new(seed));
    let text = format!("{schedule:?}");
    if std::env::var_os("DOLMEN_SIM_TRACE").is_some() {
        eprintln!("{text}");
    }
    let ran = schedule::run(schedule, seed).map_err(|e| format!("{text}: {e}"))?;
    let left = aftermath::judge_end(&ran, seed).and_then(|()| aftermath::judge(&ran, seed, SCHEDULE_CRASHES));
    Ok((left.map_err(|e| format!("{text}: {e}"))?, ran.done))
}

/// The seeds that the environment asks for.
fn seeds(count: u64) -> std::ops::Range<u64> {
    match number("DOLMEN_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("DOLMEN_SIM_FIRST").unwrap_or(0);
            first..first + number("DOLMEN_SIM_SEEDS").unwrap_or(count)
        }
    }
}

/// Explores, and fails if any seed does.
fn all_survive(seeds: std::ops::Range<u64>, weather: Weather) -> Found {
    let count = seeds.end - seeds.start;
    let start = std::time::Instant::now();
    let (found, failures) = explore_workloads(seeds, weather, Bug::None, 20);
    println!("{weather:?}: {count} seeds in {:.1} s: {found:?}", start.elapsed().as_secs_f64());
    for (seed, failure) in failures.iter().take(10) {
        println!("seed {seed}: {failure}\n  again: DOLMEN_SIM_SEED={seed}");
    }
    assert!(failures.is_empty(), "{} of {count} seeds failed", failures.len());
    assert_eq!(found.crashes, count * CRASHES);
    found
}

#[test]
fn flushed_data_survive_and_nothing_is_corrupt() {
    let seeds = seeds(1000);
    let many = seeds.end - seeds.start >= 100;
    let found = all_survive(seeds, Weather::Fair);
    if many {
        // Nothing is proven by crashes at which nothing was at stake.
        assert!(found.with_unflushed * 2 > found.crashes, "{found:?}");
        assert!(found.with_flushed * 4 > found.crashes, "{found:?}");
        assert!(found.leaks > 0, "no crash ever interrupted an allocation: {found:?}");
        assert!(found.streamed > 0, "no crash came after the end of a stream: {found:?}");
    }
}

/// The same while requests of the format to its file fail, and the guest drops requests that are
/// on their way: what had been submitted for them still lands, at any later time.
#[test]
fn neither_errors_nor_dropped_requests_make_it_worse() {
    all_survive(seeds(200), Weather::Rough);
}

/// The story of a seed: growing the file by a large step failed after it had been done, and was tried again with less, which cut
/// off what another request had written behind that.
#[test]
fn a_growth_that_fails_after_it_was_done_cuts_nothing_off() {
    explore(2548, Weather::Rough, Bug::None).unwrap_or_else(|e| panic!("{e}"));
}

/// The explorer must be able to find what it looks for: one flush of the file that the
/// format needs between the phases of writing its metadata is missing.
#[test]
fn a_missing_flush_is_found() {
    let (_, failures) = explore_workloads(0..300, Weather::Fair, Bug::MissingFlush, 3);
    println!("the first: {:?}", failures.first());
    assert!(failures.len() >= 3, "the planted bug was found with {} of 300 seeds", failures.len());
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..10 {
        let scenario = Scenario::draw(&mut Random::new(seed), Weather::Rough);
        let run = || {
            let run = workload::run(&scenario, seed, Bug::None).expect("a run without crashes");
            (run.disk.position(), run.disk.image().to_vec())
        };
        assert!(run() == run(), "two runs of seed {seed} differ");
    }
}

/// Jobs, exports and reconfiguration in any order, with errors, and power losses at any point: every
/// image stays whole, every copy is right, and what was flushed is where a restarted host looks for it.
#[test]
fn schedules_lose_nothing() {
    let seeds = seeds(1000);
    let count = seeds.end - seeds.start;
    let start = std::time::Instant::now();
    let add = |sum: &mut (Left, Done), one: &(Left, Done)| {
        sum.0.add(&one.0);
        sum.1.add(&one.1);
    };
    let ((left, done), failures) = explore_all(seeds, 20, explore_schedule, add);
    println!("schedules: {count} seeds in {:.1} s: {left:?} {done:?}", start.elapsed().as_secs_f64());
    for (seed, failure) in failures.iter().take(20) {
        println!(
            "seed {seed}: {failure}\n  again: DOLMEN_SIM_SEED={seed} cargo test -p dolmen-control --test crash schedules -- --nocapture"
        );
    }
    assert!(failures.is_empty(), "{} of {count} seeds failed", failures.len());
    if count >= 1000 {
        // Nothing is proven by schedules in which nothing happened.
        for what in ["streamed", "committed", "mirrored", "backed up", "copy compared", "fleece compared"] {
            assert!(done.of(what) * 20 > count, "{what}: {done:?}");
        }
        for what in [
            "blockdev-reopen",
            "export add",
            "refused",
            "cancelled",
            "failed",
            "job-pause",
            "given up",
            "full",
        ] {
            assert!(done.of(what) * 50 > count, "{what}: {done:?}");
        }
        assert!(left.after_pivot * 50 > left.crashes, "{left:?}");
        assert!(left.with_unflushed * 2 > left.crashes, "{left:?}");
    }
}
