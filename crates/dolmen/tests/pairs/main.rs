//! Every operation that runs, against every command that exists.
//!
//! For each pair a daemon starts with a chain of images and the operation; then the command is
//! tried ([`steps`]).
//!
//! - Allowed: both run to their end while clients write, and everything is compared with a
//!   model ([`world`], [`model`]).
//! - Refused by the access control: the refusal names both parties, the node, the reason and a way
//!   out; nothing has changed. Then the same is done in a daemon without access control: some promise
//!   must break, or the refusal was not needed.
//! - Refused for another reason (the node is in use, it is read-only): nothing has changed.
//!
//! The commands come from the daemon: one that nobody has classified fails the test. The result is
//! the table docs/pairs.md; `DOLMEN_PAIRS=write` brings it up to date, `DOLMEN_PAIRS=WORDS` runs
//! the pairs whose name contains all of these words and prints what happens.

mod client;
mod daemon;
mod model;
mod questions;
mod steps;
mod table;
mod what_if;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use daemon::Checks;
use serde_json::{Value as Json, json};
use steps::{Attempt, Part, State};
use world::{Order, Promise, Templates, World};

/// What a pair comes to.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    /// Both ran to their end; what broke, if anything did.
    Allowed(BTreeMap<Promise, String>),
    /// The access control said no; what breaks without it.
    Refused { conflict: Conflict, without: BTreeMap<Promise, String> },
    /// The command failed for another reason.
    Failed(String),
}

/// A refusal, as the error's data tell it.
#[derive(Clone, Debug, PartialEq)]
struct Conflict {
    node: String,
    actions: Vec<String>,
    asks: String,
    denies: String,
    why: String,
}

/// A pair, and what is wrong with its verdict, if anything is.
struct Row {
    state: &'static str,
    attempt: &'static str,
    verdict: Verdict,
    wrong: Vec<String>,
    took: Duration,
}

/// Brings a world into a state, or says why that can't be.
fn prepared(
    templates: &Templates,
    state: &State,
    attempt: &Attempt,
    checks: Checks,
) -> Result<World, String> {
    let seed = state
        .name
        .bytes()
        .chain(attempt.name.bytes())
        .fold(7u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut world = World::new(templates, checks, seed);
    let guest = (state.guest && !attempt.without_guest).then(steps::guest);
    for s in guest.iter().chain(&attempt.before).chain(&state.steps) {
        world
            .execute(s.command, &s.arguments, s.effect)
            .map_err(|e| format!("'{}' can't be begun: {} says {}", state.name, s.command, e["desc"]))?;
        world.burst();
    }
    if state.ready {
        let _ = world.daemon.ask("block-job-set-speed", &json!({"device": "j", "speed": 0}));
        world.ready("j")?;
        world.burst();
    }
    Ok(world)
}

/// Lets both run to their end; gives what broke.
fn run_out(mut world: World, order: Order) -> BTreeMap<Promise, String> {
    if !world.has(steps::GUEST) && !world.covered {
        let g = steps::guest();
        // It may be refused because of what runs: then there is no load from it.
        let _ = world.execute(g.command, &g.arguments, g.effect);
    }
    world.finish(order);
    world.end()
}

fn run(templates: &Templates, state: &State, attempt: &Attempt) -> Result<(Verdict, Vec<String>), String> {
    let mut wrong = Vec::new();
    let mut world = prepared(templates, state, attempt, Checks::On)?;
    let before = world.trace(state.writes);
    let step = &attempt.step;
    let refusal = match world.execute(step.command, &step.arguments, step.effect) {
        Ok(()) => {
            let broken = run_out(world, Order::OldestFirst);
            wrong.extend(broken.iter().map(|(p, text)| format!("{}: {text}", p.broken())));
            return Ok((Verdict::Allowed(broken), wrong));
        }
        Err(e) => e,
    };
    let after = world.trace(state.writes);
    if let Some(difference) = difference(&before.told, &after.told) {
        wrong.push(format!("the refusal left a trace: {difference}"));
    }
    for ((name, a), (_, b)) in before.images.iter().zip(&after.images) {
        if a != b {
            wrong.push(format!("the refusal left a trace in image '{name}'"));
        }
    }
    wrong.extend(
        run_out(world, Order::OldestFirst)
            .iter()
            .map(|(p, text)| format!("after the refusal, {}: {text}", p.broken())),
    );
    let text = refusal["desc"].as_str().unwrap_or_default().to_owned();
    let Some(conflict) = conflict(&refusal, &mut wrong) else {
        return Ok((Verdict::Failed(text), wrong));
    };
    // What breaks may depend on who ends first, and on the moment.
    let mut broken = BTreeMap::new();
    let orders = [Order::OldestFirst, Order::NewestFirst];
    // Where nothing is expected to break, one look is enough.
    let tries = if table::excused(state.name, attempt.name) { 1 } else { 6 };
    for order in orders.into_iter().cycle().take(tries) {
        let mut without = prepared(templates, state, attempt, Checks::Off)?;
        broken = match without.execute(step.command, &step.arguments, step.effect) {
            Ok(()) => run_out(without, order),
            // Something else refuses it as well.
            Err(e) => BTreeMap::from([(Promise::Job, e["desc"].to_string())]),
        };
        if !broken.is_empty() {
            break;
        }
    }
    Ok((Verdict::Refused { conflict, without: broken }, wrong))
}

/// Reads the four parts of a refusal, in text and as data.
fn conflict(error: &Json, wrong: &mut Vec<String>) -> Option<Conflict> {
    let c = &error["data"]["conflict"];
    if c.is_null() {
        return None;
    }
    let text = |v: &Json| v.as_str().unwrap_or_default().to_owned();
    let list = |v: &Json| v.as_array().map(|l| l.iter().map(text).collect::<Vec<_>>()).unwrap_or_default();
    let out = Conflict {
        node: text(&c["node"]),
        actions: list(&c["actions"]),
        asks: format!("{} '{}'", text(&c["asks"]["kind"]), text(&c["asks"]["id"])),
        denies: format!("{} '{}'", text(&c["denies"]["kind"]), text(&c["denies"]["id"])),
        why: text(&c["why"]),
    };
    let desc = text(&error["desc"]);
    for part in [&out.node, &out.asks, &out.denies, &out.why] {
        if part.is_empty() || !desc.contains(part.as_str()) {
            wrong.push(format!("the refusal's text lacks {part:?}: {desc}"));
        }
    }
    if out.actions.is_empty() {
        wrong.push(format!("the refusal names no action: {desc}"));
    }
    let remedies = list(&c["remedies"]);
    if remedies.is_empty() {
        wrong.push(format!("the refusal names no way out: {desc}"));
    }
    Some(out)
}

/// The first difference between two traces.
fn difference(a: &Json, b: &Json) -> Option<String> {
    match (a, b) {
        (Json::Object(x), Json::Object(y)) => {
            x.keys().chain(y.keys()).find_map(|k| difference(&a[k], &b[k]).map(|d| format!("{k}: {d}")))
        }
        (Json::Array(x), Json::Array(y)) if x.len() == y.len() => {
            x.iter().zip(y).find_map(|(a, b)| difference(a, b))
        }
        _ if a == b => None,
        _ => Some(format!("{a} became {b}")),
    }
}

/// The commands that a daemon has, and what each is to this test.
fn attempts(templates: &Templates) -> Vec<Attempt> {
    let mut world = World::new(templates, Checks::On, 1);
    let commands = world.daemon.ok("query-commands", json!({}));
    let _ = world.end();
    let mut out = Vec::new();
    for c in commands.as_array().expect("a list") {
        let name = c["name"].as_str().expect("a name");
        match steps::part(name) {
            None => panic!("command '{name}' is not classified: add it to steps::part"),
            Some(Part::Apart) => {}
            Some(Part::Tried(list)) => out.extend(list),
        }
    }
    out.retain(|a| is_driver(&a.step));
    out
}

/// Whether a step needs no driver, or one that this build has.
fn is_driver(step: &steps::Step) -> bool {
    let name = step.arguments["driver"].as_str();
    name.is_none_or(|n| dolmen::registry().rows().iter().any(|d| d.name == n))
}

/// Runs pairs on all cores; some wait, so there are more at a time than cores.
fn run_all(templates: &Templates, pairs: &[(&State, &Attempt)]) -> Vec<Row> {
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) * 2 {
            scope.spawn(|| {
                while let Some((state, attempt)) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    let ran = catch_unwind(AssertUnwindSafe(|| run(templates, state, attempt)));
                    let (verdict, wrong) = match ran {
                        Ok(Ok(ran)) => ran,
                        Ok(Err(e)) => (Verdict::Failed(e.clone()), vec![e]),
                        Err(p) => {
                            let text = daemon::panic_text(&*p);
                            (Verdict::Failed(text.clone()), vec![format!("panic: {text}")])
                        }
                    };
                    let took = started.elapsed();
                    let row = Row { state: state.name, attempt: attempt.name, verdict, wrong, took };
                    rows.lock().expect("rows").push(row);
                }
            });
        }
    });
    let mut rows = rows.into_inner().expect("rows");
    let place = |r: &Row| pairs.iter().position(|(s, a)| s.name == r.state && a.name == r.attempt);
    rows.sort_by_key(place);
    rows
}

#[test]
fn every_pair_is_right() {
    let templates = Templates::new();
    let attempts = attempts(&templates);
    let known: Vec<&str> = attempts.iter().map(|a| a.step.command).collect();
    let states = steps::states();
    // A state that needs what this build does not have is left out.
    let states: Vec<&State> = states
        .iter()
        .filter(|s| s.steps.iter().all(|s| known.contains(&s.command) && is_driver(s)))
        .collect();
    let asked = std::env::var("DOLMEN_PAIRS").unwrap_or_default();
    let words: Vec<&str> = if asked == "write" { Vec::new() } else { asked.split(',').collect() };
    let pairs: Vec<(&State, &Attempt)> = states
        .iter()
        .flat_map(|s| attempts.iter().map(move |a| (*s, a)))
        .filter(|(s, a)| !s.apart.iter().any(|w| a.name.contains(w)))
        .filter(|(s, a)| words.iter().all(|w| format!("{} x {}", s.name, a.name).contains(w)))
        .collect();
    let started = Instant::now();
    let rows = run_all(&templates, &pairs);
    println!("{} pairs in {:.1} s", rows.len(), started.elapsed().as_secs_f64());
    for row in rows.iter().filter(|r| r.took > Duration::from_secs(5)) {
        println!("{} x {} took {:.1} s", row.state, row.attempt, row.took.as_secs_f64());
    }
    let mut bad = 0;
    for row in &rows {
        let wrong = table::wrong(row);
        bad += usize::from(!wrong.is_empty());
        if !wrong.is_empty() || (!words.is_empty() && words != [""]) {
            println!("{} x {}: {:?}", row.state, row.attempt, row.verdict);
            wrong.iter().for_each(|w| println!("    WRONG {w}"));
        }
    }
    assert_eq!(bad, 0, "of {} pairs, so many are wrong", rows.len());
    if words.is_empty() || words == [""] {
        table::check(&rows, asked == "write");
    }
}
