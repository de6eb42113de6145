//! The rules of `blkdebug` as a state machine over values.
//!
//! There is a current state, a number that starts at 1. An *event* looks at all rules
//! for that event whose `state` is the current one (or that name none): `inject-error`
//! rules become active, `set-state` rules determine the next state. When an event makes any
//! rule active, those active before are active no more; an event without such rules
//! leaves them. An active rule fails each request that fits its `iotype` and `sector`, with `once`
//! only the first. The event `none` happens once, when the node is opened.

use dolmen_graph::Request;
use dolmen_types::{BlkEvent, Error, ErrorKind, OptionSpec, OptionType, Options, Result, Span};

/// Members of an `inject-error` rule.
pub(super) const INJECT: &[OptionSpec] = &[
    OptionSpec::required("event", OptionType::Str, "the event that makes the rule active"),
    OptionSpec::optional("state", OptionType::Int, "only in this state (default: any)"),
    OptionSpec::optional(
        "iotype",
        OptionType::Enum(IO_TYPES),
        "only these requests (default: all but block-status)",
    ),
    OptionSpec::optional("errno", OptionType::Int, "the error (default 5, EIO)"),
    OptionSpec::optional("sector", OptionType::Int, "only requests that touch this sector of 512 bytes"),
    OptionSpec::optional("once", OptionType::Bool, "only the first request that fits (default off)"),
    OptionSpec::optional("immediately", OptionType::Bool, "fail without waiting first (default off)"),
];

/// Members of a `set-state` rule.
pub(super) const SET_STATE: &[OptionSpec] = &[
    OptionSpec::required("event", OptionType::Str, "the event that changes the state"),
    OptionSpec::optional("state", OptionType::Int, "only in this state (default: any)"),
    OptionSpec::required("new_state", OptionType::Int, "the next state"),
];

const IO_TYPES: &[&str] = &["read", "write", "write-zeroes", "discard", "flush", "block-status"];

/// EIO.
const EIO: i32 = 5;

/// The state in the beginning.
const FIRST_STATE: u64 = 1;

/// The most rules that one node may have.
const RULES_MAX: usize = 4096;

const SECTOR: u64 = 512;

/// What a rule can be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl IoType {
    const ALL: [IoType; 6] = [
        IoType::Read,
        IoType::Write,
        IoType::WriteZeroes,
        IoType::Discard,
        IoType::Flush,
        IoType::BlockStatus,
    ];

    /// `None` for requests that no rule is about.
    pub(super) const fn of(request: Request) -> Option<IoType> {
        match request {
            Request::Read(_) => Some(IoType::Read),
            Request::Write(_) => Some(IoType::Write),
            Request::WriteZeroes(_) => Some(IoType::WriteZeroes),
            Request::Discard(_) => Some(IoType::Discard),
            Request::Flush => Some(IoType::Flush),
            Request::Resize => None,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        IO_TYPES[self as usize]
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inject {
    event: BlkEvent,
    state: Option<u64>,
    /// `None` is all but block status.
    io: Option<IoType>,
    errno: i32,
    sector: Option<u64>,
    once: bool,
    immediately: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct SetState {
    event: BlkEvent,
    state: Option<u64>,
    new_state: u64,
}

/// The rules of one node, in the order in which they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    inject: Vec<Inject>,
    set_state: Vec<SetState>,
}

impl Rules {
    /// Adds the rule with these members to `section` ("inject-error" or "set-state").
    pub(super) fn add(&mut self, section: &str, mut members: Options) -> Result<()> {
        if self.inject.len() + self.set_state.len() >= RULES_MAX {
            return Err(Error::new(ErrorKind::Limit, format!("more than {RULES_MAX} blkdebug rules")));
        }
        let inject = match section {
            "inject-error" => true,
            "set-state" => false,
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("There is no option group '{other}'"),
                )
                .remedy("use [inject-error] or [set-state]"));
            }
        };
        let event = match members.take_str("event")? {
            None => return Err(Error::new(ErrorKind::InvalidInput, "Missing event name for rule")),
            Some(name) => BlkEvent::parse(&name).ok_or_else(|| {
                let known: Vec<_> = BlkEvent::ALL.iter().map(|e| e.as_str()).collect();
                Error::new(ErrorKind::InvalidInput, format!("invalid parameter value: {name}"))
                    .remedy(format!("the events are: {}", known.join(", ")))
            })?,
        };
        let state = members.take_size("state")?.filter(|s| *s != 0);
        if inject {
            let io = members.take_enum("iotype", IO_TYPES)?;
            let errno = members.take_size("errno")?.map_or(Ok(EIO), |n| match i32::try_from(n) {
                Ok(n) if n > 0 => Ok(n),
                _ => Err(Error::new(ErrorKind::InvalidInput, format!("{n} is no errno"))),
            })?;
            self.inject.push(Inject {
                event,
                state,
                io: io.and_then(|word| IoType::ALL.into_iter().find(|t| t.as_str() == word)),
                errno,
                sector: members.take_size("sector")?,
                once: members.take_bool("once")?.unwrap_or(false),
                immediately: members.take_bool("immediately")?.unwrap_or(false),
            });
        } else {
            let new_state = members.take_size("new_state")?.unwrap_or(0);
            self.set_state.push(SetState { event, state, new_state });
        }
        members.finish(&format!("[{section}]"))
    }

    /// Adds another set of rules behind these.
    pub(super) fn append(&mut self, mut more: Rules) {
        self.inject.append(&mut more.inject);
        self.set_state.append(&mut more.set_state);
    }

    /// Whether any rule is about this event.
    pub(super) fn listens(&self, event: BlkEvent) -> bool {
        self.inject.iter().any(|r| r.event == event) || self.set_state.iter().any(|r| r.event == event)
    }
}

/// A request that has to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) errno: i32,
    pub(super) immediately: bool,
}

/// Where the machine is.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    state: u64,
    /// Indices of the active rules.
    active: Vec<usize>,
    /// `once` rules that have done their work.
    spent: Vec<bool>,
}

impl Machine {
    pub(super) fn new(rules: &Rules) -> Machine {
        let mut machine =
            Machine { state: FIRST_STATE, active: Vec::new(), spent: vec![false; rules.inject.len()] };
        machine.event(rules, BlkEvent::None);
        machine
    }

    /// The node above has come to this event.
    pub(super) fn event(&mut self, rules: &Rules, event: BlkEvent) {
        let state = self.state;
        let fits = |e: BlkEvent, s: Option<u64>| e == event && s.is_none_or(|s| s == state);
        let mut fresh = (0..rules.inject.len())
            .filter(|i| !self.spent[*i] && fits(rules.inject[*i].event, rules.inject[*i].state))
            .peekable();
        if fresh.peek().is_some() {
            self.active = fresh.collect();
        }
        for rule in rules.set_state.iter().filter(|r| fits(r.event, r.state)) {
            self.state = rule.new_state;
        }
    }

    fn find(&self, rules: &Rules, io: IoType, span: Option<Span>) -> Option<usize> {
        self.active.iter().copied().find(|i| {
            let rule = &rules.inject[*i];
            !self.spent[*i]
                && rule.io.map_or(io != IoType::BlockStatus, |wanted| wanted == io)
                && rule.sector.is_none_or(|s| {
                    let sector = s.checked_mul(SECTOR).and_then(|at| Span::checked(at, SECTOR));
                    sector.is_some_and(|sector| span.is_some_and(|span| span.overlaps(sector)))
                })
        })
    }

    /// Whether a request would fail.
    pub(super) fn hits(&self, rules: &Rules, io: IoType, span: Option<Span>) -> bool {
        self.find(rules, io, span).is_some()
    }

    /// Whether a request of this kind would fail somewhere.
    pub(super) fn may_hit(&self, rules: &Rules, io: IoType) -> bool {
        self.active.iter().any(|i| {
            let rule = &rules.inject[*i];
            !self.spent[*i] && rule.io.map_or(io != IoType::BlockStatus, |wanted| wanted == io)
        })
    }

    /// Whether a request fails, and how; counts for `once`.
    pub(super) fn take(&mut self, rules: &Rules, io: IoType, span: Option<Span>) -> Option<Hit> {
        let i = self.find(rules, io, span)?;
        let rule = &rules.inject[i];
        self.spent[i] = rule.once;
        Some(Hit { errno: rule.errno, immediately: rule.immediately })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(of: &[(&str, Options)]) -> (Rules, Machine) {
        let mut rules = Rules::default();
        for (section, members) in of {
            rules.add(section, members.clone()).unwrap();
        }
        let machine = Machine::new(&rules);
        (rules, machine)
    }

    fn on(event: &str) -> Options {
        Options::new().with("event", event)
    }

    const AT: Option<Span> = Some(Span::new(1024, 512));

    #[test]
    fn a_rule_is_active_until_others_are() {
        let (r, mut m) = rules(&[
            ("inject-error", on("read_aio").with("iotype", "write")),
            ("inject-error", on("write_aio").with("iotype", "read").with("errno", 28)),
        ]);
        assert_eq!(m.take(&r, IoType::Write, AT), None);
        m.event(&r, BlkEvent::ReadAio);
        assert_eq!(m.take(&r, IoType::Read, AT), None);
        // An event that has no rules leaves them.
        m.event(&r, BlkEvent::L2Load);
        assert_eq!(m.take(&r, IoType::Write, AT), Some(Hit { errno: 5, immediately: false }));
        assert!(m.hits(&r, IoType::Write, AT), "not once: it goes on");
        m.event(&r, BlkEvent::WriteAio);
        assert_eq!(m.take(&r, IoType::Write, AT), None);
        assert_eq!(m.take(&r, IoType::Read, AT).unwrap().errno, 28);
    }

    #[test]
    fn once_gives_way_to_the_next_rule() {
        let (r, mut m) = rules(&[
            ("inject-error", on("write_aio").with("once", "on")),
            ("inject-error", on("write_aio").with("errno", 28).with("immediately", true)),
        ]);
        m.event(&r, BlkEvent::WriteAio);
        assert_eq!(m.take(&r, IoType::Write, AT), Some(Hit { errno: 5, immediately: false }));
        m.event(&r, BlkEvent::WriteAio);
        assert_eq!(m.take(&r, IoType::Write, AT), Some(Hit { errno: 28, immediately: true }));
    }

    #[test]
    fn one_event_makes_one_step() {
        let (r, mut m) = rules(&[
            ("set-state", on("read_aio").with("state", 1).with("new_state", 2)),
            ("set-state", on("read_aio").with("state", 2).with("new_state", 3)),
            ("inject-error", on("read_aio").with("state", 3)),
        ]);
        for fails in [false, false, true, true] {
            m.event(&r, BlkEvent::ReadAio);
            assert_eq!(m.take(&r, IoType::Read, AT).is_some(), fails);
        }
    }

    #[test]
    fn none_happens_when_the_node_is_opened() {
        let (r, mut m) = rules(&[
            ("inject-error", on("none").with("state", 7)),
            ("inject-error", on("none").with("sector", 2).with("state", 1)),
        ]);
        assert!(m.take(&r, IoType::Discard, AT).is_some());
        assert!(m.take(&r, IoType::Discard, Some(Span::new(0, 1024))).is_none());
        assert!(m.take(&r, IoType::Discard, Some(Span::new(1000, 25))).is_some());
        assert!(m.take(&r, IoType::Flush, None).is_none());
        assert!(m.take(&r, IoType::BlockStatus, AT).is_none(), "only when asked for");
    }

    #[test]
    fn wrong_rules_are_refused() {
        for (section, members, says) in [
            ("inject-error", Options::new().with("errno", 5), "Missing event name"),
            ("inject-error", on("bogus"), "invalid parameter value: bogus"),
            ("inject-error", on("read_aio").with("iotype", "bogus"), "does not accept value 'bogus'"),
            ("inject-error", on("read_aio").with("errno", "-5"), "expects a number"),
            ("inject-error", on("read_aio").with("errno", 0), "0 is no errno"),
            ("inject-error", on("read_aio").with("foo", "1"), "has no option 'foo'"),
            ("inject-error", on("read_aio").with("once", "maybe"), "expects 'on' or 'off'"),
            ("set-state", on("read_aio").with("new-state", 2), "has no option 'new-state'"),
            ("bogus", on("bogus"), "no option group 'bogus'"),
        ] {
            let e = Rules::default().add(section, members).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }
}
