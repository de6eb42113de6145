//! Client against server in memory, and both against noise.

use proptest::prelude::*;

use crate::client::{ClientHandshake, ClientStep, Goal};
use crate::consts::{self, TransmissionFlags, opt};
use crate::limits;
use crate::server::{Catalog, CloseReason, ExportInfo, ServerHandshake, ServerStep, Session};
use crate::wire::{put32, put64};
use dolmen_types::{Error, ErrorKind};

struct Exports {
    all: Vec<ExportInfo>,
    closing: bool,
}

impl Catalog for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        for e in &self.all {
            each(&e.name, &e.description);
        }
    }
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.all.iter().find(|e| e.name == name).cloned()
    }
    fn shutting_down(&self) -> bool {
        self.closing
    }
}

fn export(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: format!("description of {name}"),
        size: 12345,
        flags: TransmissionFlags::SEND_FLUSH.with(TransmissionFlags::SEND_FUA),
        min_block: 1,
        preferred_block: 4096,
        max_block: limits::MAX_PAYLOAD,
    }
}

fn exports() -> Exports {
    Exports { all: vec![export("a"), export(""), export("disk")], closing: false }
}

enum End {
    Both(Box<Session>, Box<Session>),
    Listed(Vec<String>),
    Failed(Error),
}

/// Runs both sides, handing over at most `piece` bytes at a time.
fn converse(goal: Goal, exports: &Exports, piece: usize) -> End {
    let mut server = ServerHandshake::new();
    let mut client = ClientHandshake::new(goal);
    let (mut to_server, mut to_client) = (Vec::new(), ServerHandshake::greeting().to_vec());
    let (mut at_server, mut at_client) = (Vec::new(), Vec::new());
    let mut server_session = None;
    // Any honest negotiation here is far shorter.
    for _ in 0..100_000 {
        let n = to_client.len().min(piece);
        at_client.extend(to_client.drain(..n));
        match client.step(&at_client, &mut to_server) {
            ClientStep::Need(n) => assert!(n > at_client.len() && n <= limits::MAX_HANDSHAKE_INPUT),
            ClientStep::Taken(n) => drop(at_client.drain(..n)),
            ClientStep::Ready { taken, session } => {
                assert_eq!((taken, to_client.len()), (at_client.len(), 0));
                return End::Both(server_session.expect("the server is first"), session);
            }
            ClientStep::Listed(l) => return End::Listed(l.into_iter().map(|e| e.name).collect()),
            ClientStep::Failed(e) => return End::Failed(e),
        }
        let n = to_server.len().min(piece);
        at_server.extend(to_server.drain(..n));
        if server_session.is_some() {
            continue;
        }
        match server.step(&at_server, exports, &mut to_client) {
            ServerStep::Need(n) => assert!(n > at_server.len() && n <= limits::MAX_HANDSHAKE_INPUT),
            ServerStep::Taken(n) => drop(at_server.drain(..n)),
            ServerStep::Ready { taken, session } => {
                assert_eq!(taken, at_server.len());
                server_session = Some(session);
            }
            ServerStep::Close(reason) => {
                return End::Failed(Error::new(ErrorKind::Disconnected, reason.to_string()));
            }
        }
    }
    panic!("the negotiation does not end");
}

fn goal(name: &str, structured: bool, status: bool) -> Goal {
    Goal::Use { export: name.into(), structured, status }
}

#[test]
fn both_sides_agree() {
    for piece in [1, 7, 1 << 20] {
        for (structured, status) in [(false, false), (true, false), (true, true)] {
            for name in ["", "disk"] {
                let End::Both(s, c) = converse(goal(name, structured, status), &exports(), piece) else {
                    panic!("no session");
                };
                assert_eq!(s, c);
                assert_eq!(c.export.size, 12345);
                assert_eq!(c.export.name, name);
                assert_eq!(c.structured, structured);
                assert_eq!(c.base_allocation.is_some(), status);
                assert_eq!(c.export.flags.has(TransmissionFlags::SEND_DF), structured);
            }
        }
    }
}

#[test]
fn listing() {
    let End::Listed(names) = converse(Goal::List, &exports(), 5) else { panic!("no listing") };
    assert_eq!(names, ["a", "", "disk"]);
}

#[test]
fn unknown_exports_and_shutdown_are_told() {
    let End::Failed(e) = converse(goal("nope", true, true), &exports(), 64) else { panic!("a session") };
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert!(e.to_string().contains("'nope'"), "{e}");
    let closing = Exports { closing: true, ..exports() };
    let End::Failed(e) = converse(goal("disk", true, true), &closing, 64) else { panic!("a session") };
    assert_eq!(e.kind(), ErrorKind::Disconnected);
}

/// A server that knows nothing but `EXPORT_NAME`: the client falls back to it.
#[test]
fn fallback_to_export_name() {
    let mut client = ClientHandshake::new(goal("x", true, true));
    let mut out = Vec::new();
    assert!(matches!(client.step(&ServerHandshake::greeting(), &mut out), ClientStep::Taken(18)));
    for option in [opt::STRUCTURED_REPLY, opt::GO] {
        let mut r = Vec::new();
        put64(&mut r, consts::OPTION_REPLY_MAGIC);
        put32(&mut r, option);
        put32(&mut r, consts::rep::ERR_UNSUP);
        put32(&mut r, 0);
        assert!(matches!(client.step(&r, &mut out), ClientStep::Taken(20)), "{option}");
    }
    assert!(out.ends_with(b"\0\0\0\x01\0\0\0\x01x"));
    let mut r = 4096u64.to_be_bytes().to_vec();
    r.extend(1u16.to_be_bytes());
    match client.step(&r, &mut out) {
        ClientStep::Ready { taken: 10, session } => {
            assert_eq!((session.export.size, session.structured), (4096, false));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn oldstyle_servers_are_recognised() {
    let mut b = consts::INIT_MAGIC.to_be_bytes().to_vec();
    b.extend(consts::OLDSTYLE_MAGIC.to_be_bytes());
    match ClientHandshake::new(Goal::List).step(&b, &mut Vec::new()) {
        ClientStep::Failed(e) => assert_eq!(e.kind(), ErrorKind::Unsupported),
        other => panic!("{other:?}"),
    }
}

/// Bytes of an option that are likely to get past the first checks.
fn option_bytes() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(4), Just(b'd'), any::<u8>()], 0..40),
        Just(b"\0\0\0\x04disk\0\0".to_vec()),
        Just(b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation".to_vec()),
    ];
    let length = prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (0u32..14, data, length).prop_map(|(option, data, length)| {
        let mut b = consts::OPTION_MAGIC.to_be_bytes().to_vec();
        put32(&mut b, option);
        put32(&mut b, length.unwrap_or(data.len() as u32));
        b.extend(data);
        b
    })
}

proptest! {
    /// A hostile client: no panic, bounded look-ahead and output, every step consumes.
    #[test]
    fn server_against_noise(
        flags in prop_oneof![Just(3u32), Just(1), Just(0), any::<u32>()],
        options in prop::collection::vec(option_bytes(), 0..12),
        tail in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let exports = exports();
        let mut input = flags.to_be_bytes().to_vec();
        input.extend(options.concat());
        input.extend(tail);
        let mut server = ServerHandshake::new();
        let mut at = 0;
        loop {
            let mut out = Vec::new();
            match server.step(&input[at..], &exports, &mut out) {
                ServerStep::Need(n) => {
                    prop_assert!(n > input.len() - at && n <= limits::MAX_HANDSHAKE_INPUT);
                    break;
                }
                ServerStep::Taken(n) => {
                    prop_assert!(n > 0 && at + n <= input.len());
                    at += n;
                }
                ServerStep::Ready { taken, session } => {
                    prop_assert!(at + taken <= input.len());
                    prop_assert!(exports.find(&session.export.name).is_some());
                    break;
                }
                ServerStep::Close(reason) => {
                    prop_assert!(!matches!(reason, CloseReason::ShuttingDown));
                    break;
                }
            }
            prop_assert!(out.len() < 1024);
        }
    }

    /// A hostile server: no panic, bounded look-ahead, every step consumes.
    #[test]
    fn client_against_noise(
        fixed: bool,
        list: bool,
        replies in prop::collection::vec(
            (0u32..12, prop_oneof![0u32..6, (0u32..12).prop_map(|n| n | 1 << 31)],
             prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)],
             prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..40)),
            0..12),
    ) {
        let mut input = ServerHandshake::greeting().to_vec();
        input[17] = if fixed { 3 } else { 0 };
        let goal = if list { Goal::List } else { goal("disk", true, true) };
        let mut client = ClientHandshake::new(goal);
        let mut replies = replies.into_iter();
        let mut out = Vec::new();
        let mut asked = 0;
        loop {
            match client.step(&input, &mut out) {
                ClientStep::Need(n) => {
                    prop_assert!(n > input.len() && n <= limits::MAX_HANDSHAKE_INPUT);
                    let Some((option, kind, length, data)) = replies.next() else { break };
                    put64(&mut input, consts::OPTION_REPLY_MAGIC);
                    // Mostly the option that was asked, else it would end at once.
                    put32(&mut input, if option == 0 { 0 } else { asked });
                    put32(&mut input, kind);
                    put32(&mut input, length.unwrap_or(data.len() as u32));
                    input.extend(data);
                }
                ClientStep::Taken(n) => {
                    prop_assert!(n > 0 && n <= input.len());
                    input.drain(..n);
                    if let Some(at) = out.windows(8).rposition(|w| w == consts::OPTION_MAGIC.to_be_bytes()) {
                        asked = u32::from_be_bytes(out[at + 8..at + 12].try_into().unwrap());
                    }
                }
                ClientStep::Ready { taken, .. } => {
                    prop_assert!(taken <= input.len());
                    break;
                }
                ClientStep::Listed(_) | ClientStep::Failed(_) => break,
            }
        }
    }
}
