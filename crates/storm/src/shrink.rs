//! The shortest list of steps that still fails, and how to do it again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::daemon::Tools;
use crate::steps::{Step, Way};
use crate::storm::{Mode, Numbers, Outcome, Source, run};
use crate::testcase;

/// How long is tried.
const TIME: Duration = Duration::from_secs(240);

/// What a list of steps comes to, if it fails in the same way; a failure that depends on timing gets some tries.
fn fails(seed: u64, steps: &[Step], kind: &str, tools: &Tools, mode: &Mode, tries: u32) -> Option<Outcome> {
    let numbers = Arc::new(Numbers::default());
    (0..tries).find_map(|_| {
        let stop = AtomicBool::new(false);
        let outcome = run(seed, &Source::Recorded(steps), tools, &numbers, mode, &stop).ok()?;
        outcome.finding.as_ref().is_some_and(|f| f.kind == kind).then_some(outcome)
    })
}

/// Takes steps away as long as it still fails; prints what is left.
pub(crate) fn shrink(seed: u64, outcome: &Outcome, tools: &Tools, mode: &Mode) {
    let mode = &Mode { verbose: false, ..mode.clone() };
    let Some(kind) = outcome.finding.as_ref().map(|f| f.kind) else { return };
    let until = Instant::now() + TIME;
    let tries = 3;
    let Some(mut best) = fails(seed, &outcome.steps, kind, tools, mode, tries) else {
        println!("  it does not fail again with the same steps: a matter of timing");
        return print(seed, outcome);
    };
    let mut size = best.steps.len() / 2;
    while size > 0 && Instant::now() < until {
        let mut at = 0;
        while at < best.steps.len() && Instant::now() < until {
            let end = (at + size).min(best.steps.len());
            let mut shorter = best.steps.clone();
            shorter.drain(at..end);
            // Most of what fails shows when the daemon ends.
            if !matches!(shorter.last(), Some(Step::End(..))) {
                shorter.push(Step::End(Way::Quit, false));
            }
            let fewer = shorter.len() < best.steps.len();
            match fewer.then(|| fails(seed, &shorter, kind, tools, mode, tries)).flatten() {
                Some(o) => best = o,
                None => at = end,
            }
        }
        size /= 2;
    }
    print(seed, &best);
}

/// Prints a failing list of steps, as steps and as a test.
pub(crate) fn print(seed: u64, outcome: &Outcome) {
    let Some(finding) = &outcome.finding else { return };
    let file = std::env::temp_dir().join(format!("storm-{seed}.json"));
    let list: Vec<Json> = outcome.steps.iter().map(Step::to_json).collect();
    let text = json!({"seed": seed, "kind": finding.kind, "text": finding.text, "steps": list});
    let mut out = format!("  {}: {}\n", finding.kind, finding.text);
    for line in &outcome.script {
        out += &format!("    {line}\n");
    }
    for (i, s) in outcome.steps.iter().enumerate() {
        out += &format!("    {:3} {s}\n", i + 1);
    }
    // The directory is gone when anyone reads this; programs are started in theirs.
    let relative = |text: String| text.replace(&format!("{}/", outcome.dir.display()), "");
    if std::fs::write(&file, relative(format!("{text:#}\n"))).is_ok() {
        out += &format!("  again: cargo xtask storm --replay {}\n", file.display());
    }
    let found = format!("{}: {}", finding.kind, finding.text);
    if let Some(test) = testcase::rust(seed, &found, &outcome.script, &outcome.opened, &outcome.steps) {
        let file = file.with_extension("rs");
        if std::fs::write(&file, relative(test)).is_ok() {
            out += &format!("  as a test for crates/dolmen/tests/it/story.rs: {}\n", file.display());
        }
    }
    print!("{out}");
}

/// Does the steps of a file.
pub(crate) fn replay(
    file: &Path,
    tools: &Tools,
    numbers: &Arc<Numbers>,
    mode: &Mode,
) -> Result<bool, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let v: Json = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let seed = v["seed"].as_u64().ok_or("no seed")?;
    let steps: Option<Vec<Step>> = v["steps"].as_array().into_iter().flatten().map(Step::from_json).collect();
    let steps = steps.ok_or("a step that nobody knows")?;
    let outcome = run(seed, &Source::Recorded(&steps), tools, numbers, mode, &AtomicBool::new(false))?;
    match outcome.finding {
        Some(f) => {
            println!("{}: {}", f.kind, f.text);
            Ok(false)
        }
        None => {
            println!("all is well");
            Ok(true)
        }
    }
}
