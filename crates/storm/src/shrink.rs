//! The shortest list of steps that still fails, and how to do it again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::daemon::Tools;
use crate::steps::{Step, Way};
use crate::storm::{Finding, Mode, Numbers, Outcome, Source, run};

/// How long is tried.
const TIME: Duration = Duration::from_secs(240);

/// Whether a list of steps fails in the same way; a failure that depends on timing gets some tries.
fn fails(seed: u64, steps: &[Step], kind: &str, tools: &Tools, mode: &Mode, tries: u32) -> Option<Finding> {
    let numbers = Arc::new(Numbers::default());
    (0..tries).find_map(|_| {
        let outcome =
            run(seed, &Source::Recorded(steps), tools, &numbers, mode, &AtomicBool::new(false)).ok()?;
        outcome.finding.filter(|f| f.kind == kind)
    })
}

/// Takes steps away as long as it still fails; prints what is left.
pub(crate) fn shrink(seed: u64, outcome: &Outcome, tools: &Tools, mode: &Mode) {
    let mode = &Mode { verbose: false, ..mode.clone() };
    let Some(finding) = &outcome.finding else { return };
    let mut steps = outcome.steps.clone();
    let until = Instant::now() + TIME;
    let tries = 3;
    if fails(seed, &steps, finding.kind, tools, mode, tries).is_none() {
        println!("  it does not fail again with the same steps: a matter of timing");
        return print(seed, &steps, finding, outcome);
    }
    let mut finding = finding.clone();
    let mut size = steps.len() / 2;
    while size > 0 && Instant::now() < until {
        let mut at = 0;
        while at < steps.len() && Instant::now() < until {
            let end = (at + size).min(steps.len());
            let mut shorter = steps.clone();
            shorter.drain(at..end);
            // Most of what fails shows when the daemon ends.
            if !matches!(shorter.last(), Some(Step::End(..))) {
                shorter.push(Step::End(Way::Quit, false));
            }
            if shorter.len() < steps.len()
                && let Some(f) = fails(seed, &shorter, finding.kind, tools, mode, tries)
            {
                (steps, finding) = (shorter, f);
            } else {
                at = end;
            }
        }
        size /= 2;
    }
    print(seed, &steps, &finding, outcome);
}

pub(crate) fn print(seed: u64, steps: &[Step], finding: &Finding, outcome: &Outcome) {
    let file = std::env::temp_dir().join(format!("storm-{seed}.json"));
    let list: Vec<Json> = steps.iter().map(Step::to_json).collect();
    let text = json!({"seed": seed, "kind": finding.kind, "text": finding.text, "steps": list});
    let mut out = format!("  {}: {}\n", finding.kind, finding.text);
    for line in &outcome.script {
        out += &format!("    $ {line}\n");
    }
    for (i, s) in steps.iter().enumerate() {
        out += &format!("    {:3} {s}\n", i + 1);
    }
    if std::fs::write(&file, format!("{text:#}\n")).is_ok() {
        out += &format!("  again: cargo xtask storm --replay {}\n", file.display());
    }
    print!("{out}");
}

/// Does the steps of a file.
pub(crate) fn replay(
    file: &Path,
    tools: &Tools,
    numbers: &Arc<Numbers>,
    verbose: bool,
) -> Result<bool, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let v: Json = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let seed = v["seed"].as_u64().ok_or("no seed")?;
    let steps: Option<Vec<Step>> = v["steps"].as_array().into_iter().flatten().map(Step::from_json).collect();
    let steps = steps.ok_or("a step that nobody knows")?;
    let mode = Mode { verbose, past: Vec::new() };
    let outcome = run(seed, &Source::Recorded(&steps), tools, numbers, &mode, &AtomicBool::new(false))?;
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
