//! A failing list of steps as a test for `crates/dolmen/tests/it`, in the words of its `story.rs`.

use std::fmt::Write as _;

use crate::book::Tag;
use crate::steps::{Command, Step};

/// What was done before the first daemon started.
#[derive(Clone, Debug)]
pub(crate) enum Made {
    /// A raw file with so many sectors; runs of sectors with the same tag.
    Raw(String, u64, Vec<(u64, u64, Tag)>),
    /// A tool of QEMU's, and its arguments.
    Tool(String, Vec<String>),
    /// A program of the system.
    System(String),
}

impl std::fmt::Display for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Made::Raw(name, sectors, runs) => {
                write!(f, "(raw file '{name}' of {sectors} sectors, {} runs of data)", runs.len())
            }
            Made::Tool(tool, args) => write!(f, "$ {tool} {}", args.join(" ")),
            Made::System(line) => write!(f, "$ {line}"),
        }
    }
}

/// The runs of sectors with the same tag; zeroes are left out.
pub(crate) fn runs(tags: &[Tag]) -> Vec<(u64, u64, Tag)> {
    let mut out: Vec<(u64, u64, Tag)> = Vec::new();
    for (at, tag) in (0..).zip(tags).filter(|t| *t.1 != 0) {
        match out.last_mut() {
            Some((_, end, t)) if *end == at && t == tag => *end += 1,
            _ => out.push((at, at + 1, *tag)),
        }
    }
    out
}

/// A command as a line of the test.
fn line(c: &Command) -> String {
    // JSON is what `json!` reads, word for word.
    format!("    s.ask({:?}, json!({}));\n", c.name, c.arguments)
}

fn step(s: &Step) -> String {
    match s {
        Step::Ask(c, true) => format!("    s.what_if({:?}, &json!({}));\n", c.name, c.arguments),
        Step::Ask(c, false) => line(c),
        Step::Both(a, b) => format!("    // At the same time, on two monitors:\n{}{}", line(a), line(b)),
        Step::Await(job) => format!("    s.wait({job:?});\n"),
        Step::Wait(ms) => format!("    // {ms} ms under load.\n    s.some_requests();\n"),
        Step::Stop | Step::Continue => format!("    // {s}\n"),
        Step::End(way, _) => format!("    s.end(\"{way:?}\");\n"),
    }
}

/// The test, if it can be one: a server behind the daemon, mounts and devices have no place in it.
pub(crate) fn rust(
    seed: u64,
    finding: &str,
    made: &[Made],
    opened: &[Vec<Command>],
    steps: &[Step],
) -> Option<String> {
    if made.iter().any(|m| matches!(m, Made::System(_))) || steps.iter().any(|s| matches!(s, Step::Stop)) {
        return None;
    }
    let mut out = format!("/// The story: (to be written). Seed {seed} of the storm:\n");
    for l in finding.lines() {
        let _ = writeln!(out, "/// {}", l.chars().take(160).collect::<String>());
    }
    let _ = write!(
        out,
        "#[test]\nfn seed_{seed}() {{\n    let Some(mut s) = Story::begin() else {{ return }};\n"
    );
    for m in made {
        match m {
            Made::Raw(name, sectors, runs) => {
                let runs: Vec<String> =
                    runs.iter().map(|(a, b, t)| format!("({a}, {b}, {})", 1 + t % 250)).collect();
                let _ = writeln!(out, "    s.raw({name:?}, {sectors}, &[{}]);", runs.join(", "));
            }
            Made::Tool(tool, args) => {
                let _ = writeln!(out, "    s.tool({tool:?}, &{args:?});");
            }
            Made::System(_) => return None,
        }
    }
    let mut rounds = opened.iter();
    let mut open = |out: &mut String| {
        out.push_str("    s.start();\n");
        rounds.next().into_iter().flatten().for_each(|c| out.push_str(&line(c)));
    };
    open(&mut out);
    for (i, s) in steps.iter().enumerate() {
        out.push_str(&step(s));
        if matches!(s, Step::End(..)) && i + 1 < steps.len() {
            open(&mut out);
        }
    }
    if !matches!(steps.last(), Some(Step::End(..))) {
        out.push_str("    s.end(\"Quit\");\n");
    }
    out.push_str("}\n");
    Some(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::steps::Way;

    #[test]
    fn steps_become_a_test() {
        let c = Command::new("blockdev-del", json!({"node-name": "n"}));
        let made = [
            Made::Raw("a".into(), 8, runs(&[0, 3, 3, 4, 0, 0, 0, 0])),
            Made::Tool("qemu-img".into(), vec!["info".into(), "a".into()]),
        ];
        let steps = [Step::Ask(c.clone(), true), Step::Await("j".into()), Step::End(Way::Quit, true)];
        let text = rust(7, "data: lost", &made, &[vec![c]], &steps).expect("a test");
        for part in [
            "fn seed_7() {",
            "s.raw(\"a\", 8, &[(1, 3, 4), (3, 4, 5)]);",
            "s.tool(\"qemu-img\", &[\"info\", \"a\"]);",
            "s.what_if(\"blockdev-del\", &json!({\"node-name\":\"n\"}));",
            "s.wait(\"j\");",
            "s.end(\"Quit\");",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(rust(7, "", &[Made::System("mount".into())], &[], &steps).is_none());
    }
}
