//! `what-if`, and then the command: the same verdict, in the same words, and no trace of the question.
//!
//! The story: `what-if` had a description of its own of what commands check. It called `job-pause` without a job, a
//! second `nbd-server-start` and `block-export-del` with clients possible, called a `blockdev-create` impossible that
//! was accepted, and repaired dirty images when it was asked about `blockdev-add`.
//!
//! Commands that are refused are given in the same world, which they leave as it was; those that are possible need a
//! world of their own, but for one that may spoil a world which is not needed any more. Each question ([`questions`]) is asked in every fifth state here, and every so-manieth command that
//! is possible is given; `DOLMEN_WHAT_IF=full` leaves out nothing (minutes). `DOLMEN_WHAT_IF=WORDS` takes all questions
//! whose text contains all of these words.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value as Json, json};

use crate::daemon::{self, Checks};
use crate::questions::{self, Question, Scene};
use crate::steps;
use crate::world::{Templates, World, locks};

/// A question is asked in one state of so many.
const STATES: usize = 5;

/// Of the commands that are possible, one in so many is given.
const ONE_IN: usize = 25;

/// Bytes of a qcow2 header: where its incompatible features are, and two of them.
const INCOMPATIBLE: usize = 79;
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;

/// Images that the worlds of the pair table don't need.
fn more_files(dir: &Path) {
    for (name, bit) in [("dirty", DIRTY), ("corrupt", CORRUPT)] {
        let mut image = fs::read(dir.join("x.qcow2")).expect("an image");
        image[INCOMPATIBLE] |= bit;
        fs::write(dir.join(format!("{name}.qcow2")), image).expect("written");
    }
    fs::write(dir.join("text"), "precious").expect("written");
}

fn opened(templates: &Templates, scene: &Scene, before: &[steps::Step]) -> World {
    let mut world = World::new(templates, Checks::On, 11);
    more_files(world.dir());
    let guest = scene.state.guest.then(steps::guest);
    for s in guest.iter().chain(before).chain(&scene.state.steps) {
        if let Err(e) = world.execute(s.command, &s.arguments, s.effect) {
            panic!("'{}' can't be begun: {} says {e}", scene.state.name, s.command);
        }
        world.burst();
    }
    if scene.state.ready {
        world.daemon.ok("block-job-set-speed", json!({"device": "j", "speed": 0}));
        world.ready("j").expect("it becomes ready");
    }
    for (step, status) in &scene.until {
        if let Some(s) = step {
            world.daemon.ok(s.command, s.arguments.clone());
        }
        let came = world.daemon.event(status, |e| {
            (e["event"] == "JOB_STATUS_CHANGE" && e["data"]["id"] == "j" && e["data"]["status"] == *status)
                .then_some(())
        });
        came.expect("the job goes on");
    }
    world
}

/// What a file is: inode, length, times of its last changes.
type Stamp = (u64, u64, i64, i64, i64, i64);

/// What a question must not change.
#[derive(PartialEq)]
struct Trace {
    told: Json,
    files: BTreeMap<String, Stamp>,
}

fn trace(world: &mut World, scene: &Scene) -> Trace {
    let mut told = json!({ "locks": locks(world.dir()) });
    for query in ["x-debug-query-block-graph", "query-named-block-nodes", "query-block-exports"] {
        told[query] = world.daemon.ok(query, json!({}));
    }
    let jobs = world.daemon.ok("query-jobs", json!({}));
    let of_job = |j: &Json| json!([j["id"], j["type"], j["status"], j["error"]]);
    told["jobs"] = jobs.as_array().expect("a list").iter().map(of_job).collect();
    let mut operations = world.daemon.ok("query-operations", json!({}));
    for o in operations.as_array_mut().expect("a list") {
        o["since-seconds"] = Json::Null;
    }
    told["operations"] = operations;
    if !scene.state.writes.is_empty() {
        forget_sizes(&mut told["query-named-block-nodes"]);
    }
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(world.dir()).expect("a directory").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let m = entry.metadata().expect("its state");
        let mut stamp = (m.ino(), m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
        // Somebody writes it by himself.
        if scene.state.writes.iter().any(|w| name.strip_suffix(".qcow2") == Some(w)) {
            stamp = (m.ino(), 0, 0, 0, 0, 0);
        }
        files.insert(name, stamp);
    }
    Trace { told, files }
}

/// Files grow while somebody writes them.
fn forget_sizes(v: &mut Json) {
    match v {
        Json::Object(m) => {
            m.remove("actual-size");
            if m.get("drv").is_some_and(|d| d == "file") {
                m.remove("image");
            }
            m.values_mut().for_each(forget_sizes);
        }
        Json::Array(list) => list.iter_mut().for_each(forget_sizes),
        _ => {}
    }
}

fn difference(a: &Trace, b: &Trace) -> Option<String> {
    if let Some(d) = crate::difference(&a.told, &b.told) {
        return Some(d);
    }
    let names = a.files.keys().chain(b.files.keys());
    let mut changed = names.filter(|n| a.files.get(*n) != b.files.get(*n));
    changed.next().map(|n| format!("file {n}: {:?} became {:?}", a.files.get(n), b.files.get(n)))
}

/// The content of every file.
fn contents(world: &World, scene: &Scene) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(world.dir()).expect("a directory").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(bytes) = fs::read(entry.path())
            && !scene.state.writes.iter().any(|w| name.strip_suffix(".qcow2") == Some(w))
        {
            out.insert(name, bytes);
        }
    }
    out
}

/// Made-up names and times are others each time.
fn words(error: &Json) -> String {
    let text = error["desc"].as_str().unwrap_or_default();
    let mut out = String::new();
    for word in text.split(' ') {
        let made_up = word.contains("#block");
        let number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
        let shown = if made_up || number { "*" } else { word };
        out.push_str(shown);
        out.push(' ');
    }
    format!("{}: {out}", error["class"].as_str().unwrap_or_default())
}

/// What `what-if` says: the words of a refusal.
fn ask(world: &mut World, q: &Question) -> Result<Option<String>, String> {
    let question = json!({"command": q.command, "arguments": world.placed(&q.arguments)});
    match world.daemon.ask("what-if", &question) {
        Ok(v) if v["allowed"] == true => Ok(None),
        Ok(v) => Ok(Some(words(&v["error"]))),
        Err(e) => Err(format!("what-if itself is refused: {e}")),
    }
}

fn give(world: &mut World, q: &Question) -> Option<String> {
    // Once it has begun nobody can begin again.
    if q.command == "qmp_capabilities" {
        return world.daemon.ask(&q.command, &json!({})).err().map(|e| words(&e));
    }
    let placed = world.placed(&q.arguments);
    world.daemon.ask(&q.command, &placed).err().map(|e| words(&e))
}

/// What is found in one world.
#[derive(Default)]
struct Found {
    wrong: Vec<String>,
    /// Questions that were answered with yes, by their place in the list.
    possible: Vec<usize>,
}

/// Asks questions; commands that would be refused are given.
fn ask_all(templates: &Templates, scene: &Scene, questions: &[(usize, &Question)]) -> Found {
    let mut out = Found::default();
    let Some((_, first)) = questions.first() else { return out };
    let mut world = opened(templates, scene, &first.before);
    let before = contents(&world, scene);
    let mut now = trace(&mut world, scene);
    for (i, q) in questions {
        let about = format!("{}: {} {}", scene.state.name, q.command, short(&q.arguments));
        let seen = match ask(&mut world, q) {
            Ok(seen) => seen,
            Err(e) => {
                out.wrong.push(format!("{about}: {e}"));
                continue;
            }
        };
        let after = trace(&mut world, scene);
        if let Some(d) = difference(&now, &after) {
            out.wrong.push(format!("{about}: what-if left a trace: {d}"));
        }
        now = after;
        let Some(seen) = seen else {
            out.possible.push(*i);
            continue;
        };
        match give(&mut world, q) {
            Some(said) if said == seen => {}
            Some(said) => {
                out.wrong.push(format!("{about}: what-if says\n    {seen}\n  the command\n    {said}"));
            }
            None => {
                out.wrong.push(format!("{about}: the command is accepted, what-if says\n    {seen}"));
                world = opened(templates, scene, &first.before);
                now = trace(&mut world, scene);
                continue;
            }
        }
        let after = trace(&mut world, scene);
        if let Some(d) = difference(&now, &after) {
            out.wrong.push(format!("{about}: the refused command left a trace: {d}"));
        }
        now = after;
    }
    if out.wrong.is_empty() {
        let after = contents(&world, scene);
        out.wrong.extend(
            before
                .iter()
                .filter(|(n, bytes)| after.get(*n) != Some(*bytes))
                .map(|(n, _)| format!("{}: the content of {n} has changed", scene.state.name)),
        );
    }
    // The world is not needed any more.
    if !out.possible.is_empty() {
        let last = out.possible.remove(questions.len() % out.possible.len());
        let q = questions.iter().find(|(i, _)| *i == last).map(|(_, q)| *q).expect("it was asked");
        if let Some(said) = give(&mut world, q) {
            let about = format!("{}: {} {}", scene.state.name, q.command, short(&q.arguments));
            out.wrong.push(format!("{about}: what-if says yes, the command\n    {said}"));
        }
    }
    out
}

/// Gives a command that is possible.
fn do_it(templates: &Templates, scene: &Scene, q: &Question) -> Found {
    let mut world = opened(templates, scene, &q.before);
    let about = format!("{}: {} {}", scene.state.name, q.command, short(&q.arguments));
    let seen = ask(&mut world, q);
    let said = give(&mut world, q);
    let wrong = match (seen, said) {
        (Ok(None), None) => Vec::new(),
        (seen, said) => vec![format!("{about}: what-if says\n    {seen:?}\n  the command\n    {said:?}")],
    };
    Found { wrong, possible: Vec::new() }
}

fn short(arguments: &Json) -> String {
    arguments.to_string().chars().take(300).collect()
}

/// Does pieces of work on all cores; what panics is found as well.
fn all<T: Sync>(work: &[T], what: impl Fn(&T) -> Found + Sync) -> Vec<Found> {
    let next = AtomicUsize::new(0);
    let out = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) * 2 {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(w) = work.get(i) else { return };
                    let found = catch_unwind(AssertUnwindSafe(|| what(w))).unwrap_or_else(|p| Found {
                        wrong: vec![format!("panic: {}", daemon::panic_text(&*p))],
                        possible: Vec::new(),
                    });
                    out.lock().expect("results").push((i, found));
                }
            });
        }
    });
    let mut out = out.into_inner().expect("results");
    out.sort_by_key(|(i, _)| *i);
    out.into_iter().map(|(_, f)| f).collect()
}

/// Questions about every command that a daemon has.
fn all_questions(templates: &Templates) -> Vec<Question> {
    let mut world = World::new(templates, Checks::On, 1);
    let commands = world.daemon.ok("query-commands", json!({}));
    let mut out = Vec::new();
    for c in commands.as_array().expect("a list") {
        let name = c["name"].as_str().expect("a name");
        let Some(questions) = questions::about(name) else {
            panic!("nobody has thought about what-if of '{name}': add it to questions::more");
        };
        out.extend(questions);
    }
    out
}

#[test]
fn what_if_says_what_the_command_says_and_changes_nothing() {
    let templates = Templates::new();
    let asked = std::env::var("DOLMEN_WHAT_IF").unwrap_or_default();
    let (full, only) = (asked == "full", asked != "full" && !asked.is_empty());
    let text = |s: &Scene, q: &Question| format!("{}: {} {}", s.state.name, q.command, q.arguments);
    let wanted = |n: usize, s: &Scene, i: usize, q: &Question| match only {
        true => asked.split(',').all(|w| text(s, q).contains(w)),
        false => full || (n + i).is_multiple_of(STATES),
    };
    let questions = all_questions(&templates);
    let scenes = questions::scenes();
    let started = Instant::now();

    // Those that need the same beginning share a world.
    let mut worlds: Vec<(&Scene, Vec<(usize, &Question)>)> = Vec::new();
    for (n, scene) in scenes.iter().enumerate() {
        let mut same: BTreeMap<String, Vec<(usize, &Question)>> = BTreeMap::new();
        for (i, q) in questions.iter().enumerate().filter(|(i, q)| wanted(n, scene, *i, q)) {
            same.entry(format!("{:?}", q.before)).or_default().push((i, q));
        }
        worlds.extend(same.into_values().map(|questions| (scene, questions)));
    }
    let found = all(&worlds, |(scene, questions)| ask_all(&templates, scene, questions));
    let number: usize = worlds.iter().map(|(_, q)| q.len()).sum();
    let mut wrong = Vec::new();
    let mut possible: Vec<(&Scene, &Question)> = Vec::new();
    for ((scene, _), f) in worlds.iter().zip(found) {
        wrong.extend(f.wrong);
        possible.extend(f.possible.iter().map(|i| (*scene, &questions[*i])));
    }
    let answers = possible.len();
    // The list is ordered by states, and within each by commands: every so-manieth is some of each.
    let given: Vec<_> = possible.into_iter().step_by(if full || only { 1 } else { ONE_IN }).collect();
    let found = all(&given, |(scene, q)| do_it(&templates, scene, q));
    wrong.extend(found.into_iter().flat_map(|f| f.wrong));
    println!(
        "{number} questions, {answers} answered with yes, of which {} were tried, in {:.1} s",
        given.len(),
        started.elapsed().as_secs_f64()
    );
    wrong.iter().for_each(|w| println!("WRONG {w}"));
    assert!(wrong.is_empty(), "{} answers are wrong", wrong.len());
}
