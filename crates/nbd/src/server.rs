//! The server's side of the handshake ("Fixed newstyle negotiation").
//!
//! [`ServerHandshake`] owns nothing but the state of the haggling. The caller keeps the
//! input buffer and the socket:
//!
//! 1. send [`ServerHandshake::greeting`];
//! 2. call [`ServerHandshake::step`] with what has been received; it says how many
//!    bytes to drop, appends replies to `out`, or says how many bytes it must see;
//! 3. on `Ready` the bytes after `taken` are already requests.
//!
//! ```text
//!   client flags ──► options ◄──┐          EXPORT_NAME, GO ──► Ready
//!                      │  └─────┘ replies  ABORT, violations ──► Close
//!                      └──► skipping (an option that is too long)
//! ```
//!
//! A refusal that the specification lets the client survive (unknown option, unknown
//! export, bad length) is a reply; only violations close the connection.

use std::fmt;

use crate::consts::{self, BASE_ALLOCATION, TransmissionFlags, handshake, info, opt, rep};
use crate::limits;
use crate::wire::{Fields, clip, len32, put16, put32, put64, string};

/// What a server says about an export. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name, at most 4096 bytes.
    pub name: String,
    /// For humans, at most 4096 bytes; empty for none.
    pub description: String,
    /// Size of the export.
    pub size: u64,
    /// What it can do. `HAS_FLAGS` and `SEND_DF` are added by the handshake.
    pub flags: TransmissionFlags,
    /// Smallest unit of a request: 1, or a power of two up to 64 KiB.
    pub min_block: u32,
    /// Unit that is efficient: a power of two, at least 512.
    pub preferred_block: u32,
    /// Largest payload.
    pub max_block: u32,
}

/// The exports that a server offers, asked during the negotiation.
pub trait Catalog {
    /// Calls `each` with every export's name and description, in order.
    fn list(&self, each: &mut dyn FnMut(&str, &str));
    /// The export of that name. The empty name asks for the default export.
    fn find(&self, name: &str) -> Option<ExportInfo>;
    /// Whether the server is shutting down: options are then refused as such.
    fn shutting_down(&self) -> bool;
}

/// How headers of the transmission phase look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderStyle {
    /// 28-byte requests, lengths of 32 bits.
    Compact,
}

/// What client and server agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export; its flags are those that the client was told.
    pub export: ExportInfo,
    /// Reads are answered with structured replies, errors may have text.
    pub structured: bool,
    /// Id of `base:allocation` when it was selected.
    pub base_allocation: Option<u32>,
    /// Style of the headers.
    pub headers: HeaderStyle,
}

/// Why a handshake ended without a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client said so.
    Aborted,
    /// The client asked by `EXPORT_NAME`, which can't be answered with an error.
    NoSuchExport(String),
    /// The server is shutting down.
    ShuttingDown,
    /// The peer broke the protocol or met a limit.
    Violation(&'static str),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Aborted => f.write_str("the client ended the negotiation"),
            CloseReason::NoSuchExport(name) => write!(f, "there is no export named '{name}'"),
            CloseReason::ShuttingDown => f.write_str("the server is shutting down"),
            CloseReason::Violation(what) => f.write_str(what),
        }
    }
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// Call again with at least this many bytes in the buffer (more than there are now,
    /// at most [`limits::MAX_HANDSHAKE_INPUT`]).
    Need(usize),
    /// Drop this many bytes, send what was appended to `out`, call again.
    Taken(usize),
    /// Drop `taken` bytes, send `out`, go to the transmission phase.
    Ready {
        /// Bytes of the input that belonged to the handshake.
        taken: usize,
        /// What was agreed.
        session: Box<Session>,
    },
    /// Send `out`, then close.
    Close(CloseReason),
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Options,
    /// Dropping this many bytes of an option that was too long.
    Skipping(u32),
}

/// The server's side of a negotiation.
#[derive(Debug)]
pub struct ServerHandshake {
    state: State,
    no_zeroes: bool,
    fixed: bool,
    structured: bool,
    /// The export for which `base:allocation` was selected last.
    selected_for: Option<String>,
    options_seen: u32,
}

/// The id under which `base:allocation` is reported.
const BASE_ALLOCATION_ID: u32 = 1;

/// Zero bytes after the answer to `EXPORT_NAME` for clients that do not decline them.
const PADDING: [u8; 124] = [0; 124];

impl Default for ServerHandshake {
    fn default() -> Self {
        Self::new()
    }
}

impl ServerHandshake {
    /// A negotiation that has not begun.
    pub fn new() -> ServerHandshake {
        ServerHandshake {
            state: State::ClientFlags,
            no_zeroes: false,
            fixed: false,
            structured: false,
            selected_for: None,
            options_seen: 0,
        }
    }

    /// The bytes that a server sends first.
    pub fn greeting() -> [u8; 18] {
        let mut g = [0; 18];
        g[..8].copy_from_slice(&consts::INIT_MAGIC.to_be_bytes());
        g[8..16].copy_from_slice(&consts::OPTION_MAGIC.to_be_bytes());
        g[16..].copy_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        g
    }

    /// Takes at most one message from the front of `input`; replies are appended to `out`.
    pub fn step(&mut self, input: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> ServerStep {
        match self.state {
            State::ClientFlags => self.client_flags(input),
            State::Skipping(left) => {
                if input.is_empty() {
                    return ServerStep::Need(1);
                }
                let n = input.len().min(left as usize);
                let rest = left - len32(n);
                self.state = if rest == 0 { State::Options } else { State::Skipping(rest) };
                ServerStep::Taken(n)
            }
            State::Options => self.option(input, catalog, out),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> ServerStep {
        let Some(flags) = Fields(input).u32() else { return ServerStep::Need(4) };
        if flags & !(handshake::C_FIXED_NEWSTYLE | handshake::C_NO_ZEROES) != 0 {
            return ServerStep::Close(CloseReason::Violation("the client sent unknown handshake flags"));
        }
        self.fixed = flags & handshake::C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake::C_NO_ZEROES != 0;
        self.state = State::Options;
        ServerStep::Taken(4)
    }

    fn option(&mut self, input: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> ServerStep {
        let mut fields = Fields(input);
        match fields.u64() {
            None => return ServerStep::Need(16),
            Some(consts::OPTION_MAGIC) => {}
            Some(_) => {
                return ServerStep::Close(CloseReason::Violation("the client sent a wrong option magic"));
            }
        }
        let (Some(option), Some(length)) = (fields.u32(), fields.u32()) else { return ServerStep::Need(16) };
        if length as usize > limits::MAX_OPTION {
            return self.option_too_long(option, length, out);
        }
        let Some(data) = fields.bytes(length as usize) else { return ServerStep::Need(16 + length as usize) };
        let taken = 16 + data.len();
        self.options_seen += 1;
        if self.options_seen > limits::MAX_OPTIONS {
            return ServerStep::Close(CloseReason::Violation("the client sent too many options"));
        }
        if !self.fixed && option != opt::EXPORT_NAME {
            // "This is the only valid option in nonfixed newstyle negotiation."
            return ServerStep::Close(CloseReason::Violation(
                "the client sent options without agreeing to fixed newstyle",
            ));
        }
        if catalog.shutting_down() && option != opt::ABORT {
            if option == opt::EXPORT_NAME {
                return ServerStep::Close(CloseReason::ShuttingDown);
            }
            reply(out, option, rep::ERR_SHUTDOWN, b"the server is shutting down");
            return ServerStep::Taken(taken);
        }
        match option {
            opt::EXPORT_NAME => self.export_name(data, taken, catalog, out),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                ServerStep::Close(CloseReason::Aborted)
            }
            opt::LIST => {
                if data.is_empty() {
                    list(catalog, out);
                } else {
                    reply(out, option, rep::ERR_INVALID, b"LIST takes no data");
                }
                ServerStep::Taken(taken)
            }
            opt::INFO | opt::GO => self.info_or_go(option, data, taken, catalog, out),
            opt::STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.structured = true;
                    reply(out, option, rep::ACK, &[]);
                } else {
                    reply(out, option, rep::ERR_INVALID, b"STRUCTURED_REPLY takes no data");
                }
                ServerStep::Taken(taken)
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                self.meta_context(option, data, catalog, out);
                ServerStep::Taken(taken)
            }
            opt::STARTTLS => {
                reply(out, option, rep::ERR_UNSUP, b"this server does not offer TLS");
                ServerStep::Taken(taken)
            }
            _ => {
                reply(out, option, rep::ERR_UNSUP, b"option not supported");
                ServerStep::Taken(taken)
            }
        }
    }

    fn option_too_long(&mut self, option: u32, length: u32, out: &mut Vec<u8>) -> ServerStep {
        if length > limits::MAX_SKIPPED_OPTION || option == opt::EXPORT_NAME || !self.fixed {
            return ServerStep::Close(CloseReason::Violation("the client sent an option that is too long"));
        }
        self.options_seen += 1;
        if option == opt::SET_META_CONTEXT {
            self.selected_for = None;
        }
        reply(out, option, rep::ERR_TOO_BIG, b"option data too long");
        self.state = State::Skipping(length);
        ServerStep::Taken(16)
    }

    fn export_name(&self, data: &[u8], taken: usize, catalog: &dyn Catalog, out: &mut Vec<u8>) -> ServerStep {
        let Some(name) = string(data) else {
            return ServerStep::Close(CloseReason::Violation("the client sent a malformed export name"));
        };
        let Some(export) = catalog.find(name) else {
            return ServerStep::Close(CloseReason::NoSuchExport(name.to_owned()));
        };
        let session = self.session(name, export);
        put64(out, session.export.size);
        put16(out, session.export.flags.0);
        if !self.no_zeroes {
            out.extend_from_slice(&PADDING);
        }
        ServerStep::Ready { taken, session: Box::new(session) }
    }

    fn session(&self, asked: &str, mut export: ExportInfo) -> Session {
        export.flags = export
            .flags
            .with(TransmissionFlags::HAS_FLAGS)
            .without(TransmissionFlags::SEND_DF)
            .with_if(self.structured, TransmissionFlags::SEND_DF);
        // A selection holds only for the very name that it was made for.
        let base_allocation =
            (self.structured && self.selected_for.as_deref() == Some(asked)).then_some(BASE_ALLOCATION_ID);
        Session { export, structured: self.structured, base_allocation, headers: HeaderStyle::Compact }
    }

    fn info_or_go(
        &mut self,
        option: u32,
        data: &[u8],
        taken: usize,
        catalog: &dyn Catalog,
        out: &mut Vec<u8>,
    ) -> ServerStep {
        let Some((name, wanted)) = parse_info(data) else {
            reply(out, option, rep::ERR_INVALID, b"malformed INFO or GO");
            return ServerStep::Taken(taken);
        };
        let Some(export) = catalog.find(name) else {
            let mut text = b"there is no export named '".to_vec();
            text.extend_from_slice(clip(&name[..name.floor_char_boundary(256)]).as_bytes());
            text.push(b'\'');
            reply(out, option, rep::ERR_UNKNOWN, &text);
            return ServerStep::Taken(taken);
        };
        let session = self.session(name, export);
        let e = &session.export;
        let asked = |kind: u16| wanted.clone().any(|w| w == kind);

        let mut data = info::EXPORT.to_be_bytes().to_vec();
        put64(&mut data, e.size);
        put16(&mut data, e.flags.0);
        reply(out, option, rep::INFO, &data);
        if asked(info::NAME) {
            reply_info_text(out, option, info::NAME, &e.name);
        }
        if asked(info::DESCRIPTION) && !e.description.is_empty() {
            reply_info_text(out, option, info::DESCRIPTION, &e.description);
        }
        let sizes_asked = asked(info::BLOCK_SIZE);
        // Without the request a client relies on the defaults, 1 and 32 MiB at worst.
        let sizes_matter = e.min_block > 1;
        if sizes_asked || sizes_matter {
            let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
            put32(&mut data, e.min_block);
            put32(&mut data, e.preferred_block);
            put32(&mut data, e.max_block);
            reply(out, option, rep::INFO, &data);
        }
        reply(out, option, rep::ACK, &[]);
        match option {
            opt::GO => ServerStep::Ready { taken, session: Box::new(session) },
            _ => ServerStep::Taken(taken),
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // "replaces all previously-set metadata contexts (including when this command fails)"
            self.selected_for = None;
        }
        if !self.structured {
            return reply(out, option, rep::ERR_INVALID, b"structured replies have not been negotiated");
        }
        let Some((name, queries)) = parse_meta(data) else {
            return reply(out, option, rep::ERR_INVALID, b"malformed metadata query");
        };
        let Some(queries) = queries else {
            return reply(out, option, rep::ERR_TOO_BIG, b"too many metadata queries");
        };
        if catalog.find(name).is_none() {
            return reply(out, option, rep::ERR_UNKNOWN, b"no such export");
        }
        let matches = if set {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.iter().any(|q| *q == BASE_ALLOCATION || *q == "base:")
        };
        if matches {
            let mut data = if set { BASE_ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
            data.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, rep::META_CONTEXT, &data);
            if set {
                self.selected_for = Some(name.to_owned());
            }
        }
        reply(out, option, rep::ACK, &[]);
    }
}

/// Appends an option reply.
fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    put64(out, consts::OPTION_REPLY_MAGIC);
    put32(out, option);
    put32(out, kind);
    put32(out, len32(data.len()));
    out.extend_from_slice(data);
}

fn reply_info_text(out: &mut Vec<u8>, option: u32, kind: u16, text: &str) {
    let mut data = kind.to_be_bytes().to_vec();
    data.extend_from_slice(clip(text).as_bytes());
    reply(out, option, rep::INFO, &data);
}

fn list(catalog: &dyn Catalog, out: &mut Vec<u8>) {
    catalog.list(&mut |name, description| {
        let name = clip(name);
        let mut data = Vec::with_capacity(4 + name.len() + description.len());
        put32(&mut data, len32(name.len()));
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(clip(description).as_bytes());
        reply(out, opt::LIST, rep::SERVER, &data);
    });
    reply(out, opt::LIST, rep::ACK, &[]);
}

/// Name and information requests of `INFO` and `GO`.
fn parse_info(data: &[u8]) -> Option<(&str, impl Iterator<Item = u16> + Clone)> {
    let mut f = Fields(data);
    let name = string(f.counted()?)?;
    let n = f.u16()?;
    let wanted = f.bytes(2 * usize::from(n))?;
    f.is_empty().then_some(())?;
    Some((name, wanted.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]]))))
}

/// Name and queries of the metadata options; `None` in place of the queries when there
/// are more than the limit.
fn parse_meta(data: &[u8]) -> Option<(&str, Option<Vec<&str>>)> {
    let mut f = Fields(data);
    let name = string(f.counted()?)?;
    let n = f.u32()?;
    if n > limits::MAX_QUERIES {
        return Some((name, None));
    }
    let mut queries = Vec::new();
    for _ in 0..n {
        queries.push(string(f.counted()?)?);
    }
    f.is_empty().then_some((name, Some(queries)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One;
    impl Catalog for One {
        fn list(&self, each: &mut dyn FnMut(&str, &str)) {
            each("disk", "a disk");
        }
        fn find(&self, name: &str) -> Option<ExportInfo> {
            (name == "disk").then(|| ExportInfo {
                name: "disk".into(),
                description: "a disk".into(),
                size: 1 << 20,
                flags: TransmissionFlags::SEND_FLUSH,
                min_block: 1,
                preferred_block: 4096,
                max_block: limits::MAX_PAYLOAD,
            })
        }
        fn shutting_down(&self) -> bool {
            false
        }
    }

    fn option(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut v = consts::OPTION_MAGIC.to_be_bytes().to_vec();
        put32(&mut v, kind);
        put32(&mut v, len32(data.len()));
        v.extend_from_slice(data);
        v
    }

    /// Runs options after the client flags; the kinds of the replies to each.
    fn haggle(options: &[Vec<u8>]) -> (Vec<Vec<u32>>, Option<ServerStep>) {
        let mut h = ServerHandshake::new();
        let mut out = Vec::new();
        assert_eq!(h.step(&3u32.to_be_bytes(), &One, &mut out), ServerStep::Taken(4));
        let mut kinds = Vec::new();
        for o in options {
            out.clear();
            let step = h.step(o, &One, &mut out);
            let mut f = Fields(&out);
            let mut these = Vec::new();
            while f.u64() == Some(consts::OPTION_REPLY_MAGIC) {
                f.u32();
                these.push(f.u32().unwrap());
                f.counted().unwrap();
            }
            kinds.push(these);
            match step {
                ServerStep::Taken(n) => assert_eq!(n, o.len()),
                end => return (kinds, Some(end)),
            }
        }
        (kinds, None)
    }

    fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut d = Vec::new();
        put32(&mut d, len32(name.len()));
        d.extend_from_slice(name.as_bytes());
        put32(&mut d, len32(queries.len()));
        for q in queries {
            put32(&mut d, len32(q.len()));
            d.extend_from_slice(q.as_bytes());
        }
        d
    }

    #[test]
    fn refusals_keep_the_connection() {
        let (kinds, end) = haggle(&[
            option(99, b"whatever"),
            option(opt::STARTTLS, b""),
            option(opt::EXTENDED_HEADERS, b""),
            option(opt::LIST, b"x"),
            option(opt::GO, b"\0\0\0\x02no\0\0"),
            option(opt::GO, b"\0\0\xff\xff"),
            option(opt::SET_META_CONTEXT, &meta("disk", &[BASE_ALLOCATION])),
            option(opt::LIST, b""),
        ]);
        assert_eq!(end, None);
        assert_eq!(
            kinds,
            [
                vec![rep::ERR_UNSUP],
                vec![rep::ERR_UNSUP],
                vec![rep::ERR_UNSUP],
                vec![rep::ERR_INVALID],
                vec![rep::ERR_UNKNOWN],
                vec![rep::ERR_INVALID],
                vec![rep::ERR_INVALID],
                vec![rep::SERVER, rep::ACK],
            ]
        );
    }

    #[test]
    fn a_failed_selection_forgets_the_former_one() {
        let go = option(opt::GO, b"\0\0\0\x04disk\0\0");
        let session = |options: &[Vec<u8>]| match haggle(options).1 {
            Some(ServerStep::Ready { session, .. }) => *session,
            other => panic!("{other:?}"),
        };
        let structured = option(opt::STRUCTURED_REPLY, b"");
        let select = option(opt::SET_META_CONTEXT, &meta("disk", &["x:y", BASE_ALLOCATION]));
        let s = session(&[structured.clone(), select.clone(), go.clone()]);
        assert_eq!(s.base_allocation, Some(BASE_ALLOCATION_ID));
        assert!(s.export.flags.has(TransmissionFlags::SEND_DF));
        let bad = option(opt::SET_META_CONTEXT, b"\0");
        let s = session(&[structured, select, bad, go.clone()]);
        assert_eq!(s.base_allocation, None);
        let s = session(&[go]);
        assert!(!s.structured && !s.export.flags.has(TransmissionFlags::SEND_DF));
    }

    #[test]
    fn long_options_are_skipped_and_longer_ones_end_it() {
        let mut h = ServerHandshake::new();
        let mut out = Vec::new();
        h.step(&3u32.to_be_bytes(), &One, &mut out);
        let mut long = option(opt::GO, &vec![0; limits::MAX_OPTION + 1]);
        assert_eq!(h.step(&long, &One, &mut out), ServerStep::Taken(16));
        long.drain(..16);
        assert_eq!(h.step(&long, &One, &mut out), ServerStep::Taken(long.len()));
        assert_eq!(h.step(&option(opt::LIST, b""), &One, &mut out), ServerStep::Taken(16));
        let mut huge = consts::OPTION_MAGIC.to_be_bytes().to_vec();
        put32(&mut huge, opt::GO);
        put32(&mut huge, u32::MAX);
        assert!(matches!(h.step(&huge, &One, &mut out), ServerStep::Close(CloseReason::Violation(_))));
    }
}
