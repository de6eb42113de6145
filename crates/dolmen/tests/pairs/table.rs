//! The table in docs/, and the judgement about a row of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::world::Promise;
use crate::{Row, Verdict};

/// Refusals that break nothing in this test when they are ignored, and why they are right all the
/// same: part of the state's name, part of the attempt's name, the reason.
const RIGHT_ALL_THE_SAME: &[(&str, &str, &str)] = &[
    ("stream of", "export of", COPIED_MEANWHILE),
    ("export of", "stream of", COPIED_MEANWHILE),
    ("stream of", "stream of", CHAIN_OF_OTHERS),
    ("stream of", "reopen top on base", CHAIN_OF_OTHERS),
    ("mirror", "export of t1, read-only", "it reads a copy that is not one yet"),
    ("", "change-backing-file of", NAMED_LATER),
    ("", "grow ", OTHER_SIZE),
    ("", "shrink top", OTHER_SIZE),
    ("copy-on-read", "shrink ", COPIED_UP),
    ("stream of", "shrink ", COPIED_UP),
    ("mirror of filters", "reopen top on base", READY_SHOWS),
    (
        "mirror of filters",
        "reopen top on base",
        "nothing as long as the filters between the job and the node hold nothing: see the mirror of the node itself",
    ),
    ("", "an operation that", "it only announces what somebody else does"),
    ("mirror, ", "reopen top on base", READY_SHOWS),
    ("mirror, ", "export of", READY_SHOWS),
    ("export of", "mirror of", READY_SHOWS),
    ("active commit of top to base, ready", "reopen top on base", "the data of mid are in base already"),
    ("bottom mid", "stream of", BOTTOM_GONE),
    ("bottom mid", "active commit of", BOTTOM_GONE),
    ("bottom mid", "mirror of", BOTTOM_GONE),
    ("bottom mid", "snapshot", "the filter relies on what stands directly below it"),
    ("stream of", "commit of", TWO_JOBS),
    ("commit of", "stream of", TWO_JOBS),
    ("commit of", "commit of", TWO_JOBS),
    ("commit of", "mirror of", TWO_JOBS),
    ("commit of", "backup of", TWO_JOBS),
    ("commit of", "prefetch of", TWO_JOBS),
    ("mirror", "commit of", TWO_JOBS),
    ("mirror", "stream of", TWO_JOBS),
    ("mirror", "mirror of", TWO_JOBS),
    ("mirror", "backup of", TWO_JOBS),
    ("backup", "commit of", TWO_JOBS),
    ("backup", "mirror of", TWO_JOBS),
    ("stream of", "mirror of", TWO_JOBS),
];

const NAMED_LATER: &str = "nothing in this test: the name is read when the image is opened again, and means a chain that \
    is about to be another one";
const COPIED_UP: &str =
    "nothing in this test: its client has read everything, so it had been copied up before";
const OTHER_SIZE: &str = "nothing in this test: jobs were begun for the size that there was, and overlays show what comes up behind the end";
const READY_SHOWS: &str = "nothing as long as nothing has been copied: see the mirror that is ready";
const BOTTOM_GONE: &str = "the node that the filter relies on leaves the chain";
const TWO_JOBS: &str = "nothing in the orders that were tried: two jobs on the same nodes, of which one changes what the \
    other one reads or links; refused by QEMU's daemon as well";

const COPIED_MEANWHILE: &str = "a reader of the overlay may see new data and then, when the job's copy of a moment \
    before arrives, the old ones: too short a moment for this test";
const CHAIN_OF_OTHERS: &str =
    "the one that ends first takes nodes out of the chain that the other one has still to read";

fn excuse(state: &str, attempt: &str) -> Option<&'static str> {
    RIGHT_ALL_THE_SAME
        .iter()
        .find(|(s, a, _)| state.contains(s) && attempt.contains(a))
        .map(|(_, _, reason)| *reason)
}

/// Whether a refusal of this pair is right although nothing may break without it.
pub(crate) fn excused(state: &str, attempt: &str) -> bool {
    excuse(state, attempt).is_some()
}

/// Everything that is wrong with a row.
pub(crate) fn wrong(row: &Row) -> Vec<String> {
    let mut out = row.wrong.clone();
    if let Verdict::Refused { without, .. } = &row.verdict
        && without.is_empty()
        && !excused(row.state, row.attempt)
    {
        out.push("nothing breaks when the refusal is ignored".into());
    }
    out
}

fn breaks(broken: &BTreeMap<Promise, String>) -> &'static str {
    // The worst of them: which others come along depends on the moment.
    broken.keys().next().map_or("", |p| p.broken())
}

fn render(rows: &[Row]) -> String {
    let mut out = String::from(
        "# What may run beside what\n\n\
         Written by a test (`DOLMEN_PAIRS=write cargo test -p dolmen --test pairs`): each pair of an operation that\n\
         runs and a command has been tried on the chain `top -> mid -> base`, jobs with a client that writes to\n\
         `top`. *Yes*: both ran to their end and all data were right. *No*: refused by the access control; the last\n\
         column says what breaks when the refusal is ignored. *Fails*: refused for another reason.\n",
    );
    let mut state = "";
    for row in rows {
        if row.state != state {
            state = row.state;
            let _ = write!(
                out,
                "\n## {state}\n\n| command | | who does not allow it, where | without the refusal |\n|---|---|---|---|\n"
            );
        }
        let _ = match &row.verdict {
            Verdict::Allowed(_) => {
                writeln!(out, "| {} | yes | | |", row.attempt)
            }
            Verdict::Failed(text) => {
                writeln!(out, "| {} | fails | {} | |", row.attempt, text.replace('|', "/"))
            }
            Verdict::Refused { conflict: c, without } => writeln!(
                out,
                "| {} | no | {}, at '{}': {} | {} |",
                row.attempt,
                c.denies,
                c.node,
                c.actions.join(", "),
                if without.is_empty() {
                    excuse(row.state, row.attempt).unwrap_or_default()
                } else {
                    breaks(without)
                },
            ),
        };
    }
    out
}

/// Compares with the file in docs/, or writes it.
pub(crate) fn check(rows: &[Row], write: bool) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/pairs.md");
    let text = render(rows);
    if write {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("docs/");
        std::fs::write(&path, text).expect("written");
        return;
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    // Which promise is the first to break depends on the moment.
    let verdict = |line: &str| {
        let cells: Vec<&str> = line.split(" | ").collect();
        cells[..cells.len().min(3)].join(" | ").trim_end_matches(" |").to_owned()
    };
    let (old, new): (Vec<_>, Vec<_>) =
        (there.lines().map(verdict).collect(), text.lines().map(verdict).collect());
    let differs = old.iter().zip(&new).find(|(a, b)| a != b);
    assert!(
        old == new,
        "docs/pairs.md is out of date ({differs:?}): DOLMEN_PAIRS=write cargo test -p dolmen --test pairs"
    );
}
