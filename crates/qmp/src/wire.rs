//! Greeting, negotiation, commands, replies, errors and events of one connection.
//!
//! [`Session`] is the whole protocol without a socket: bytes in, [`Step`]s out. It
//! answers by itself what concerns only the protocol (negotiation, malformed
//! commands, unknown names, wrong arguments); everything else comes out as a
//! [`Request`] whose arguments fit the schema.
//!
//! Commands are never executed out of order, so the `oob` capability is not
//! offered: the control task answers queries while changes wait, which is what
//! clients wanted it for.

use std::fmt;

use dolmen_types::{Action, Actions, Conflict, Error, Party, Value};
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use crate::framer::Framer;
use crate::schema::{Schema, Source};

/// The class of an error: the few that clients may match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command, or not now (negotiation).
    CommandNotFound,
    /// A device or node that has to be active is not.
    DeviceNotActive,
    /// No such device, for the commands that take one.
    DeviceNotFound,
    /// The accelerator is missing. Only for completeness of the table.
    KVMMissingCap,
}

/// An error as a client sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpError {
    /// Its class.
    pub class: ErrorClass,
    /// The text for people.
    pub desc: String,
    /// The same facts for programs: kind, remedy, the parties of a refusal.
    pub data: Option<Json>,
}

impl QmpError {
    /// An error without a class of its own.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::GenericError, desc: desc.into(), data: None }
    }

    /// An error of class `CommandNotFound`.
    pub fn command_not_found(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::CommandNotFound, desc: desc.into(), data: None }
    }

    /// The same error with another class.
    #[must_use]
    pub fn with_class(mut self, class: ErrorClass) -> QmpError {
        self.class = class;
        self
    }

    /// As clients see it.
    pub fn to_json(&self) -> Json {
        let mut m = Map::new();
        m.insert("class".into(), json!(self.class));
        m.insert("desc".into(), json!(self.desc));
        if let Some(d) = &self.data {
            m.insert("data".into(), d.clone());
        }
        Json::Object(m)
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}

/// The text begins with the error's own and ends with the way out, so that a client
/// that shows only `desc` shows it too.
impl From<&Error> for QmpError {
    fn from(e: &Error) -> QmpError {
        let mut data = Map::new();
        data.insert("kind".into(), json!(format!("{:?}", e.kind())));
        let mut desc = e.to_string();
        if let Some(r) = e.remedy_text() {
            desc = format!("{desc} ({r})");
            data.insert("remedy".into(), json!(r));
        }
        if let Some(c) = e.conflict() {
            data.insert("conflict".into(), conflict_json(c));
        }
        QmpError { class: ErrorClass::GenericError, desc, data: Some(Json::Object(data)) }
    }
}

impl From<Error> for QmpError {
    fn from(e: Error) -> QmpError {
        QmpError::from(&e)
    }
}

/// The four parts of a refusal as JSON.
fn conflict_json(c: &Conflict) -> Json {
    json!({
        "node": c.node,
        "actions": words(c.actions),
        "asks": party_json(&c.asks),
        "denies": party_json(&c.denies),
        "why": c.why,
        "remedies": c.remedies,
    })
}

fn party_json(p: &Party) -> Json {
    let mut m = Map::new();
    m.insert("id".into(), json!(p.id));
    m.insert("kind".into(), json!(p.kind));
    m.insert("detail".into(), json!(p.detail));
    if let Some(s) = p.since_secs {
        m.insert("since-seconds".into(), json!(s));
    }
    m.insert("needs".into(), json!(words(p.needs)));
    m.insert("allows".into(), json!(words(p.allows)));
    Json::Object(m)
}

/// One word per action: the permission word where there is one.
fn words(actions: Actions) -> Vec<&'static str> {
    actions.iter().map(Action::word).collect()
}

/// A successful reply, without the line end.
pub fn reply_ok(value: Json, id: Option<&Json>) -> Json {
    let mut m = Map::new();
    m.insert("return".into(), value);
    if let Some(id) = id {
        m.insert("id".into(), id.clone());
    }
    Json::Object(m)
}

/// A failed reply, without the line end.
pub fn reply_error(error: &QmpError, id: Option<&Json>) -> Json {
    let mut m = Map::new();
    if let Some(id) = id {
        m.insert("id".into(), id.clone());
    }
    m.insert("error".into(), error.to_json());
    Json::Object(m)
}

/// Wall-clock time of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: u64,
    /// And microseconds.
    pub microseconds: u32,
}

/// Something that happened, for every connection that has finished negotiation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// When.
    pub timestamp: Timestamp,
    /// Its name in the schema.
    pub event: &'static str,
    /// Its data, by the schema.
    pub data: Json,
}

/// What the greeting and `query-version` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// QEMU's version whose behaviour clients may expect.
    pub compatible: (u32, u32, u32),
    /// Dolmen's own version.
    pub own: (u32, u32, u32),
}

impl Version {
    /// Version 10.0.2 of QEMU's daemon, and the version of this crate.
    pub fn current() -> Version {
        let number = |s: &str| s.parse().unwrap_or(0);
        Version {
            compatible: (10, 0, 2),
            own: (
                number(env!("CARGO_PKG_VERSION_MAJOR")),
                number(env!("CARGO_PKG_VERSION_MINOR")),
                number(env!("CARGO_PKG_VERSION_PATCH")),
            ),
        }
    }

    /// As `query-version` returns it.
    pub fn to_json(&self) -> Json {
        let triple =
            |(major, minor, micro): (u32, u32, u32)| json!({"micro": micro, "minor": minor, "major": major});
        let (a, b, c) = self.own;
        json!({
            "qemu": triple(self.compatible),
            "dolmen": triple(self.own),
            "package": format!("Dolmen {a}.{b}.{c}"),
        })
    }
}

/// A command whose name exists and whose arguments fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The name in the schema.
    pub name: &'static str,
    /// The arguments, typed by the schema; always a map.
    pub arguments: Value,
    /// What the client wants to see again in the reply.
    pub id: Option<Json>,
}

/// What to do next for a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Send this.
    Reply(Json),
    /// Execute this, then send [`reply_ok`] or [`reply_error`].
    Execute(Request),
}

/// The protocol state of one connection.
pub struct Session {
    framer: Framer,
    negotiated: bool,
    version: Version,
}

impl Session {
    /// A fresh connection.
    pub fn new(version: Version) -> Session {
        Session { framer: Framer::new(), negotiated: false, version }
    }

    /// The first thing to send.
    pub fn greeting(&self) -> Json {
        json!({"QMP": {"version": self.version.to_json(), "capabilities": []}})
    }

    /// Whether events may be sent.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Takes received bytes; fewer than given when [`Session::next_step`] has to be called
    /// first.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        self.framer.feed(bytes)
    }

    /// The next step, in the order of the commands; `None` when more bytes are needed.
    pub fn next_step(&mut self, schema: &Schema) -> Option<Step> {
        let json = match self.framer.next_text()? {
            Ok(text) => crate::json::parse(&text).map_err(QmpError::from),
            Err(e) => Err(QmpError::generic(e.to_string())),
        };
        let mut json = match json {
            Ok(Json::Object(m)) => m,
            Ok(_) => return Some(failed(&QmpError::generic("QMP input must be a JSON object"), None)),
            // A syntax error has no more to tell than its text.
            Err(e) => return Some(failed(&QmpError::generic(e.desc), None)),
        };
        let id = json.remove("id");
        Some(match self.command(json, schema) {
            Ok(Some((name, arguments))) => Step::Execute(Request { name, arguments, id }),
            Ok(None) => Step::Reply(reply_ok(json!({}), id.as_ref())),
            Err(e) => failed(&e, id.as_ref()),
        })
    }

    /// `None` when the command was the negotiation itself.
    fn command(
        &mut self,
        members: Map<String, Json>,
        schema: &Schema,
    ) -> Result<Option<(&'static str, Value)>, QmpError> {
        let (mut name, mut arguments) = (None, None);
        for (key, value) in members {
            match (key.as_str(), value) {
                ("execute", Json::String(s)) => name = Some(s),
                ("execute", _) => {
                    return Err(QmpError::generic("QMP input member 'execute' must be a string"));
                }
                ("arguments", v @ Json::Object(_)) => arguments = Some(v),
                ("arguments", _) => {
                    return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
                }
                _ => return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected"))),
            }
        }
        let Some(name) = name else {
            return Err(QmpError::generic("QMP input lacks member 'execute'"));
        };
        if name == "qmp_capabilities" && self.negotiated {
            return Err(already_negotiated());
        }
        if name != "qmp_capabilities" && !self.negotiated {
            return Err(QmpError::command_not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let (name, arguments) =
            schema.check_command(&name, arguments.unwrap_or_else(|| json!({})), Source::Json)?;
        if name != "qmp_capabilities" {
            return Ok(Some((name, arguments)));
        }
        if let Value::Map(m) = &arguments
            && let Some((_, Value::List(wanted))) = m.iter().find(|(k, _)| k == "enable")
            && let Some(Value::Str(first)) = wanted.first()
        {
            return Err(QmpError::generic(format!("Capability {first} not available")));
        }
        self.negotiated = true;
        Ok(None)
    }
}

fn failed(error: &QmpError, id: Option<&Json>) -> Step {
    Step::Reply(reply_error(error, id))
}
/// The refusal of `qmp_capabilities` once the negotiation is over.
pub fn already_negotiated() -> QmpError {
    QmpError::command_not_found("Capabilities negotiation is already complete, command ignored")
}
