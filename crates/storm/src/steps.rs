//! What a storm does, step by step, as values that can be written down and done again.

use serde_json::{Value as Json, json};

/// How a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Quit,
    Terminate,
    Kill,
}

/// A command and its arguments.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Command {
    pub(crate) name: String,
    pub(crate) arguments: Json,
}

impl Command {
    pub(crate) fn new(name: &str, arguments: Json) -> Command {
        Command { name: name.into(), arguments }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// A command; what-if is asked before it, or not.
    Ask(Command, bool),
    /// Two commands at the same time, on two monitors.
    Both(Command, Command),
    /// The server behind the daemon is stopped, or goes on.
    Stop,
    Continue,
    /// Some milliseconds under load.
    Wait(u64),
    /// Wait until a job is ready, pending or over.
    Await(String),
    /// The daemon ends, with clients at work or without; everything is looked at, and another one starts.
    End(Way, bool),
}

impl Step {
    pub(crate) fn to_json(&self) -> Json {
        let command = |c: &Command| json!({"execute": c.name, "arguments": c.arguments});
        match self {
            Step::Ask(c, what_if) => json!({"ask": command(c), "what-if": what_if}),
            Step::Both(a, b) => json!({"both": [command(a), command(b)]}),
            Step::Stop => json!("stop"),
            Step::Continue => json!("continue"),
            Step::Wait(ms) => json!({"wait": ms}),
            Step::Await(job) => json!({"await": job}),
            Step::End(way, busy) => json!({"end": format!("{way:?}"), "busy": busy}),
        }
    }

    pub(crate) fn from_json(v: &Json) -> Option<Step> {
        let command = |v: &Json| {
            let name = v["execute"].as_str()?.to_owned();
            Some(Command { name, arguments: v["arguments"].clone() })
        };
        if let Some(word) = v.as_str() {
            return match word {
                "stop" => Some(Step::Stop),
                "continue" => Some(Step::Continue),
                _ => None,
            };
        }
        if let Some(c) = v.get("ask") {
            return Some(Step::Ask(command(c)?, v["what-if"].as_bool().unwrap_or_default()));
        }
        if let Some(c) = v.get("both") {
            return Some(Step::Both(command(&c[0])?, command(&c[1])?));
        }
        if let Some(ms) = v["wait"].as_u64() {
            return Some(Step::Wait(ms));
        }
        if let Some(job) = v["await"].as_str() {
            return Some(Step::Await(job.into()));
        }
        let way = match v["end"].as_str()? {
            "Quit" => Way::Quit,
            "Terminate" => Way::Terminate,
            _ => Way::Kill,
        };
        Some(Step::End(way, v["busy"].as_bool().unwrap_or_default()))
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let command = |c: &Command| format!("{} {}", c.name, c.arguments);
        match self {
            Step::Ask(c, false) => write!(f, "{}", command(c)),
            Step::Ask(c, true) => write!(f, "(what-if first) {}", command(c)),
            Step::Both(a, b) => write!(f, "{}   at the same time as   {}", command(a), command(b)),
            Step::Stop => write!(f, "SIGSTOP to the server behind the daemon"),
            Step::Continue => write!(f, "SIGCONT to the server behind the daemon"),
            Step::Wait(ms) => write!(f, "wait {ms} ms"),
            Step::Await(job) => write!(f, "wait until job {job} is ready or over"),
            Step::End(way, busy) => {
                write!(f, "{way:?}{}", if *busy { " under load" } else { " without load" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_can_be_written_down() {
        let c = || Command::new("blockdev-del", json!({"node-name": "n"}));
        for s in [
            Step::Ask(c(), true),
            Step::Both(c(), c()),
            Step::Stop,
            Step::Continue,
            Step::Wait(7),
            Step::Await("j1".into()),
            Step::End(Way::Terminate, true),
        ] {
            assert_eq!(Step::from_json(&s.to_json()), Some(s));
        }
    }
}
