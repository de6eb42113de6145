//! The client's side of the handshake.
//!
//! Like the server's side it owns only the state of the haggling: call
//! [`ClientHandshake::step`] with what has been received, drop what it took, send what it
//! appended to `out`.
//!
//! ```text
//!   greeting ──► STRUCTURED_REPLY ──► SET_META_CONTEXT ──► GO ──────────► Ready
//!      │              (what was asked for and offered)      │ ERR_UNSUP
//!      │                                                    ▼
//!      ├──► (no fixed newstyle) ─────────────────────► EXPORT_NAME ─────► Ready
//!      └──► LIST ─────────────────────────────────────────────────────► Listed
//! ```

use dolmen_types::{Error, ErrorKind};

use crate::consts::{self, BASE_ALLOCATION, TransmissionFlags, handshake, info, opt, rep};
use crate::limits;
use crate::server::{ExportInfo, HeaderStyle, Session};
use crate::wire::{Fields, len32, put16, put32, put64, string};

/// What the client is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Use an export.
    Use {
        /// Its name, at most 4096 bytes; empty for the default export.
        export: String,
        /// Ask for structured replies.
        structured: bool,
        /// Ask for `base:allocation`; needs structured replies.
        status: bool,
    },
    /// List the exports, then go.
    List,
}

/// An export that a server listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// For humans.
    pub description: String,
}

/// What to do next.
#[derive(Debug)]
pub enum ClientStep {
    /// Call again with at least this many bytes in the buffer (more than there are now,
    /// at most [`limits::MAX_HANDSHAKE_INPUT`]).
    Need(usize),
    /// Drop this many bytes, send what was appended to `out`, call again.
    Taken(usize),
    /// Drop `taken` bytes and begin the transmission phase.
    Ready {
        /// Bytes of the input that belonged to the handshake.
        taken: usize,
        /// What was agreed.
        session: Box<Session>,
    },
    /// Send `out`, close: these are the exports.
    Listed(Vec<ListedExport>),
    /// Send `out` (a polite goodbye, where that is possible), close.
    Failed(Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// A reply to this option is awaited.
    Asked(u32),
    /// The answer to `EXPORT_NAME`, which is not an option reply.
    ExportName,
}

/// The client's side of a negotiation.
#[derive(Debug)]
pub struct ClientHandshake {
    goal: Goal,
    state: State,
    no_zeroes: bool,
    structured: bool,
    base_allocation: Option<u32>,
    /// From `REP_INFO`: size and flags.
    size_and_flags: Option<(u64, u16)>,
    name: Option<String>,
    description: String,
    block_sizes: Option<(u32, u32, u32)>,
    listed: Vec<ListedExport>,
    replies: u32,
}

impl ClientHandshake {
    /// A negotiation that has not begun: the server speaks first.
    pub fn new(goal: Goal) -> ClientHandshake {
        ClientHandshake {
            goal,
            state: State::Greeting,
            no_zeroes: false,
            structured: false,
            base_allocation: None,
            size_and_flags: None,
            name: None,
            description: String::new(),
            block_sizes: None,
            listed: Vec::new(),
            replies: 0,
        }
    }

    /// Takes at most one message from the front of `input`; what has to be sent is
    /// appended to `out`.
    pub fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> ClientStep {
        match self.state {
            State::Greeting => self.greeting(input, out),
            State::Asked(option) => self.option_reply(option, input, out),
            State::ExportName => self.export_name_reply(input),
        }
    }

    fn greeting(&mut self, input: &[u8], out: &mut Vec<u8>) -> ClientStep {
        let mut f = Fields(input);
        let (init, style) = (f.u64(), f.u64());
        if init.is_some_and(|m| m != consts::INIT_MAGIC) {
            return ClientStep::Failed(corrupt("the peer does not speak NBD"));
        }
        match style {
            None => return ClientStep::Need(18),
            Some(consts::OPTION_MAGIC) => {}
            Some(consts::OLDSTYLE_MAGIC) => {
                return ClientStep::Failed(
                    Error::new(ErrorKind::Unsupported, "the NBD server speaks the oldstyle protocol only")
                        .remedy("configure the server for newstyle negotiation"),
                );
            }
            Some(_) => return ClientStep::Failed(corrupt("the peer does not speak NBD")),
        }
        let Some(flags) = f.u16() else { return ClientStep::Need(18) };
        if let Goal::Use { export, .. } = &self.goal
            && string(export.as_bytes()).is_none()
        {
            return ClientStep::Failed(Error::new(
                ErrorKind::InvalidInput,
                format!("an NBD export name has at most {} bytes and no NUL", limits::MAX_STRING),
            ));
        }
        let fixed = flags & handshake::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        put32(
            out,
            if fixed { handshake::C_FIXED_NEWSTYLE } else { 0 }
                | if self.no_zeroes { handshake::C_NO_ZEROES } else { 0 },
        );
        match (&self.goal, fixed) {
            (Goal::List, false) => {
                return ClientStep::Failed(Error::new(
                    ErrorKind::Unsupported,
                    "the NBD server can't list its exports: it does not speak fixed newstyle",
                ));
            }
            (Goal::List, true) => self.ask(opt::LIST, &[], out),
            (Goal::Use { .. }, false) => self.ask_export_name(out),
            (Goal::Use { structured: true, .. }, true) => self.ask(opt::STRUCTURED_REPLY, &[], out),
            (Goal::Use { structured: false, .. }, true) => self.ask_go(out),
        }
        ClientStep::Taken(18)
    }

    fn ask(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        put_option(out, option, data);
        self.state = State::Asked(option);
    }

    fn export(&self) -> &str {
        match &self.goal {
            Goal::Use { export, .. } => export,
            Goal::List => "",
        }
    }

    fn ask_go(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        put32(&mut data, len32(self.export().len()));
        data.extend_from_slice(self.export().as_bytes());
        put16(&mut data, 3);
        for kind in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            put16(&mut data, kind);
        }
        self.ask(opt::GO, &data, out);
    }

    fn ask_status(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        put32(&mut data, len32(self.export().len()));
        data.extend_from_slice(self.export().as_bytes());
        put32(&mut data, 1);
        put32(&mut data, len32(BASE_ALLOCATION.len()));
        data.extend_from_slice(BASE_ALLOCATION.as_bytes());
        self.ask(opt::SET_META_CONTEXT, &data, out);
    }

    fn ask_export_name(&mut self, out: &mut Vec<u8>) {
        put_option(out, opt::EXPORT_NAME, self.export().as_bytes());
        self.state = State::ExportName;
    }

    fn option_reply(&mut self, asked: u32, input: &[u8], out: &mut Vec<u8>) -> ClientStep {
        let mut f = Fields(input);
        match f.u64() {
            None => return ClientStep::Need(20),
            Some(consts::OPTION_REPLY_MAGIC) => {}
            Some(_) => return ClientStep::Failed(corrupt("the NBD server sent a wrong option reply magic")),
        }
        let (Some(option), Some(kind), Some(length)) = (f.u32(), f.u32(), f.u32()) else {
            return ClientStep::Need(20);
        };
        if option != asked {
            return ClientStep::Failed(corrupt("the NBD server answered another option"));
        }
        if length as usize > limits::MAX_OPTION_REPLY {
            return ClientStep::Failed(corrupt("the NBD server sent an option reply that is too long"));
        }
        let Some(data) = f.bytes(length as usize) else { return ClientStep::Need(20 + length as usize) };
        let taken = 20 + data.len();
        self.replies += 1;
        if self.replies > limits::MAX_OPTION_REPLIES {
            return ClientStep::Failed(corrupt("the NBD server sent too many option replies"));
        }
        if kind == rep::ACK {
            return self.acknowledged(asked, taken, out);
        }
        if kind & rep::ERROR != 0 {
            return self.refused(asked, kind, data, taken, out);
        }
        let understood = match (asked, kind) {
            (opt::LIST, rep::SERVER) => self.keep_listed(data),
            (opt::GO, rep::INFO) => self.keep_info(data),
            (opt::SET_META_CONTEXT, rep::META_CONTEXT) => self.keep_context(data),
            _ => None,
        };
        match understood {
            Some(()) => ClientStep::Taken(taken),
            None => ClientStep::Failed(corrupt("the NBD server sent a malformed or unexpected option reply")),
        }
    }

    /// The next question after one that was answered with success.
    fn acknowledged(&mut self, asked: u32, taken: usize, out: &mut Vec<u8>) -> ClientStep {
        match asked {
            opt::STRUCTURED_REPLY => {
                self.structured = true;
                match self.goal {
                    Goal::Use { status: true, .. } => self.ask_status(out),
                    Goal::Use { status: false, .. } | Goal::List => self.ask_go(out),
                }
                ClientStep::Taken(taken)
            }
            opt::SET_META_CONTEXT => {
                self.ask_go(out);
                ClientStep::Taken(taken)
            }
            opt::GO => match self.size_and_flags {
                Some((size, flags)) => self.ready(taken, size, flags),
                None => ClientStep::Failed(corrupt("the NBD server did not tell the size of the export")),
            },
            _ => {
                // LIST is the only other question; its answer is complete.
                put_option(out, opt::ABORT, &[]);
                ClientStep::Listed(std::mem::take(&mut self.listed))
            }
        }
    }

    fn refused(&mut self, asked: u32, kind: u32, data: &[u8], taken: usize, out: &mut Vec<u8>) -> ClientStep {
        match (asked, kind) {
            // The extras are not vital.
            (opt::STRUCTURED_REPLY, k) if k != rep::ERR_TLS_REQD && k != rep::ERR_SHUTDOWN => {
                self.ask_go(out);
                ClientStep::Taken(taken)
            }
            (opt::SET_META_CONTEXT, k) if k != rep::ERR_TLS_REQD && k != rep::ERR_SHUTDOWN => {
                self.base_allocation = None;
                self.ask_go(out);
                ClientStep::Taken(taken)
            }
            (opt::GO, rep::ERR_UNSUP) => {
                self.ask_export_name(out);
                ClientStep::Taken(taken)
            }
            _ => {
                put_option(out, opt::ABORT, &[]);
                ClientStep::Failed(refusal(self.export(), kind, data))
            }
        }
    }

    fn keep_listed(&mut self, data: &[u8]) -> Option<()> {
        let mut f = Fields(data);
        let name = string(f.counted()?)?;
        if self.listed.len() < limits::MAX_LISTED {
            let description = string(f.0).unwrap_or("").to_owned();
            self.listed.push(ListedExport { name: name.to_owned(), description });
        }
        Some(())
    }

    fn keep_info(&mut self, data: &[u8]) -> Option<()> {
        let mut f = Fields(data);
        match f.u16()? {
            info::EXPORT => {
                self.size_and_flags = Some((f.u64()?, f.u16()?));
                f.is_empty().then_some(())?;
            }
            info::NAME => self.name = Some(string(f.0)?.to_owned()),
            info::DESCRIPTION => self.description = string(f.0)?.to_owned(),
            info::BLOCK_SIZE => {
                let (min, preferred, max) = (f.u32()?, f.u32()?, f.u32()?);
                // "Block size constraints"
                let sane = min.is_power_of_two()
                    && min <= 64 * 1024
                    && preferred.is_power_of_two()
                    && preferred >= min.max(512)
                    && preferred <= 32 * 1024 * 1024
                    && max >= min
                    && (max == u32::MAX || max.is_multiple_of(min))
                    && f.is_empty();
                sane.then_some(())?;
                self.block_sizes = Some((min, preferred, max));
            }
            // "MUST ignore information types that it does not recognize"
            _ => {}
        }
        Some(())
    }

    fn keep_context(&mut self, data: &[u8]) -> Option<()> {
        let mut f = Fields(data);
        let id = f.u32()?;
        if string(f.0)? == BASE_ALLOCATION {
            self.base_allocation = Some(id);
        }
        Some(())
    }

    fn export_name_reply(&mut self, input: &[u8]) -> ClientStep {
        let taken = if self.no_zeroes { 10 } else { 10 + 124 };
        let mut f = Fields(input);
        match (f.u64(), f.u16()) {
            (Some(size), Some(flags)) if input.len() >= taken => {
                // The selection was made for GO; without it nothing is known about blocks.
                self.ready(taken, size, flags)
            }
            _ => ClientStep::Need(taken),
        }
    }

    fn ready(&mut self, taken: usize, size: u64, flags: u16) -> ClientStep {
        if size > i64::MAX as u64 {
            return ClientStep::Failed(corrupt("the NBD server's export is larger than any disk"));
        }
        // Without the server's word 4096 is safe, and 1 where nothing else was asked for.
        let (min_block, preferred_block, max_block) =
            self.block_sizes.unwrap_or((1, 4096, limits::MAX_PAYLOAD));
        let name = self.name.take().unwrap_or_else(|| self.export().to_owned());
        let export = ExportInfo {
            name,
            description: std::mem::take(&mut self.description),
            size,
            flags: TransmissionFlags(flags),
            min_block,
            preferred_block,
            max_block: max_block.min(limits::MAX_PAYLOAD).max(min_block),
        };
        let session = Session {
            export,
            structured: self.structured,
            base_allocation: self.base_allocation.filter(|_| self.structured),
            headers: HeaderStyle::Compact,
        };
        ClientStep::Ready { taken, session: Box::new(session) }
    }
}

fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    put64(out, consts::OPTION_MAGIC);
    put32(out, option);
    put32(out, len32(data.len()));
    out.extend_from_slice(data);
}

fn corrupt(text: &str) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}

fn refusal(export: &str, kind: u32, data: &[u8]) -> Error {
    let error_kind = match kind {
        rep::ERR_UNKNOWN => ErrorKind::NotFound,
        rep::ERR_POLICY | rep::ERR_TLS_REQD => ErrorKind::PermissionDenied,
        rep::ERR_SHUTDOWN => ErrorKind::Disconnected,
        rep::ERR_INVALID | rep::ERR_TOO_BIG => ErrorKind::InvalidInput,
        _ => ErrorKind::Unsupported,
    };
    let mut text = format!("NBD export '{export}': {}", rep::name(kind));
    // The server's own words, if they are words.
    if let Some(words) = string(data).filter(|w| !w.is_empty()) {
        text += ": ";
        text.extend(words.chars().map(|c| if c.is_control() { ' ' } else { c }));
    }
    let e = Error::new(error_kind, text);
    match kind {
        rep::ERR_UNKNOWN => e.remedy("list the exports of the server, for example with `nbdinfo --list`"),
        rep::ERR_TLS_REQD => e.remedy("TLS is not available: let the server permit plain connections"),
        _ => e,
    }
}
