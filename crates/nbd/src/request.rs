//! Requests of the transmission phase ("Request message", "Request types").

use crate::consts::{CommandFlags, Errno, REQUEST_MAGIC, TransmissionFlags, cmd};
use crate::limits;
use crate::server::{CloseReason, Session};
use crate::wire::Fields;

/// A request header as it goes over the wire, not judged yet. Offset and length in
/// bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: CommandFlags,
    /// Type, see [`cmd`].
    pub cmd: u16,
    /// What the reply will carry ("handle").
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range.
    pub len: u32,
}

/// What the front of the input holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestStep {
    /// This many bytes must be in the buffer.
    Need(usize),
    /// A request of [`Request::SIZE`] bytes, followed by this many bytes of payload.
    Got(Request, u32),
    /// The stream can't be followed any longer.
    Close(CloseReason),
}

impl Request {
    /// Bytes of a compact header.
    pub const SIZE: usize = 28;

    /// The bytes to send.
    pub fn encode(&self) -> [u8; Request::SIZE] {
        let mut b = [0; Request::SIZE];
        b[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        b[6..8].copy_from_slice(&self.cmd.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..24].copy_from_slice(&self.offset.to_be_bytes());
        b[24..].copy_from_slice(&self.len.to_be_bytes());
        b
    }

    /// Reads a header from the front of `input`. A payload that nobody promised to take
    /// ends the connection: it would have to be read to find the next request.
    pub fn decode(input: &[u8]) -> RequestStep {
        let mut f = Fields(input);
        let fields = (|| Some((f.u32()?, f.u16()?, f.u16()?, f.u64()?, f.u64()?, f.u32()?)))();
        let Some((magic, flags, cmd, cookie, offset, len)) = fields else {
            return RequestStep::Need(Request::SIZE);
        };
        if magic != REQUEST_MAGIC {
            return RequestStep::Close(CloseReason::Violation("the client sent a wrong request magic"));
        }
        let payload = if cmd == cmd::WRITE { len } else { 0 };
        if payload > limits::MAX_PAYLOAD {
            return RequestStep::Close(CloseReason::Violation("the client sent a write that is too long"));
        }
        RequestStep::Got(Request { flags: CommandFlags(flags), cmd, cookie, offset, len }, payload)
    }
}

/// A request that the session permits, its range inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send the range.
    Read {
        /// In one chunk.
        df: bool,
    },
    /// Store the payload.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// No more requests will come; no reply.
    Disconnect,
    /// Make everything acknowledged durable.
    Flush,
    /// The range is no longer needed.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// The range will be needed soon.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
        /// Fail rather than write a buffer of zeroes.
        fast: bool,
    },
    /// Describe the range.
    BlockStatus {
        /// One extent is enough.
        one: bool,
    },
}

/// Why a request is refused: the error value, and text for a human.
pub type Refusal = (Errno, &'static str);

impl Session {
    /// Judges a request: is it known, offered, and inside the export? Errors as in
    /// "Error values": `EPERM` for changes of a read-only export, `ENOSPC` for writes
    /// past the end, `EINVAL` for everything else that makes no sense.
    pub fn check(&self, r: &Request) -> Result<Command, Refusal> {
        let offered = self.export.flags;
        let fua = r.flags.has(CommandFlags::FUA);
        if fua && !offered.has(TransmissionFlags::SEND_FUA) {
            return Err((Errno::Inval, "FUA is not offered"));
        }
        // FUA is valid on every command once it is offered.
        let extra = r.flags.without(CommandFlags::FUA);
        let only = |allowed: CommandFlags| {
            if extra.without(allowed).0 == 0 { Ok(()) } else { Err((Errno::Inval, "flag not valid here")) }
        };
        let none = CommandFlags(0);
        let changes = |offer: TransmissionFlags| {
            if offered.has(TransmissionFlags::READ_ONLY) {
                Err((Errno::Perm, "the export is read-only"))
            } else if offered.has(offer) {
                Ok(())
            } else {
                Err((Errno::Inval, "command not offered"))
            }
        };
        match r.cmd {
            cmd::READ => {
                let df = offered.has(TransmissionFlags::SEND_DF);
                only(none.with_if(df, CommandFlags::DF))?;
                if r.len > limits::MAX_PAYLOAD {
                    return Err((Errno::Inval, "read longer than 32 MiB"));
                }
                self.inside(r, Errno::Inval)?;
                Ok(Command::Read { df: extra.has(CommandFlags::DF) })
            }
            cmd::WRITE => {
                only(none)?;
                changes(TransmissionFlags::HAS_FLAGS)?;
                self.inside(r, Errno::NoSpc)?;
                Ok(Command::Write { fua })
            }
            cmd::DISC => Ok(Command::Disconnect),
            cmd::FLUSH => {
                only(none)?;
                if !offered.has(TransmissionFlags::SEND_FLUSH) {
                    return Err((Errno::Inval, "command not offered"));
                }
                Ok(Command::Flush)
            }
            cmd::TRIM => {
                only(none)?;
                changes(TransmissionFlags::SEND_TRIM)?;
                self.inside(r, Errno::Inval)?;
                Ok(Command::Trim { fua })
            }
            cmd::CACHE => {
                only(none)?;
                if !offered.has(TransmissionFlags::SEND_CACHE) {
                    return Err((Errno::Inval, "command not offered"));
                }
                self.inside(r, Errno::Inval)?;
                Ok(Command::Cache)
            }
            cmd::WRITE_ZEROES => {
                let fast = offered.has(TransmissionFlags::SEND_FAST_ZERO);
                only(CommandFlags::NO_HOLE.with_if(fast, CommandFlags::FAST_ZERO))?;
                changes(TransmissionFlags::SEND_WRITE_ZEROES)?;
                self.inside(r, Errno::NoSpc)?;
                Ok(Command::WriteZeroes {
                    fua,
                    no_hole: extra.has(CommandFlags::NO_HOLE),
                    fast: extra.has(CommandFlags::FAST_ZERO),
                })
            }
            cmd::BLOCK_STATUS => {
                only(CommandFlags::REQ_ONE)?;
                if self.base_allocation.is_none() {
                    return Err((Errno::Inval, "no metadata context was selected"));
                }
                if r.len == 0 {
                    return Err((Errno::Inval, "status of no bytes"));
                }
                self.inside(r, Errno::Inval)?;
                Ok(Command::BlockStatus { one: extra.has(CommandFlags::REQ_ONE) })
            }
            _ => Err((Errno::Inval, "unknown command")),
        }
    }

    fn inside(&self, r: &Request, beyond: Errno) -> Result<(), Refusal> {
        let end = r.offset.checked_add(r.len.into());
        if end.is_none_or(|end| end > self.export.size) {
            return Err((beyond, "beyond the end of the export"));
        }
        let min = u64::from(self.export.min_block);
        // A request may reach an end of the export that is not a multiple itself.
        let end_aligned = end.is_some_and(|e| e == self.export.size || e.is_multiple_of(min));
        if min > 1 && !(r.offset.is_multiple_of(min) && end_aligned) {
            return Err((Errno::Inval, "not a multiple of the minimum block size"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{ExportInfo, HeaderStyle};
    use proptest::prelude::*;

    fn session(flags: TransmissionFlags) -> Session {
        Session {
            export: ExportInfo {
                name: String::new(),
                description: String::new(),
                size: 1 << 20,
                flags,
                min_block: 1,
                preferred_block: 4096,
                max_block: limits::MAX_PAYLOAD,
            },
            structured: false,
            base_allocation: None,
            headers: HeaderStyle::Compact,
        }
    }

    fn request(cmd: u16, flags: CommandFlags, offset: u64, len: u32) -> Request {
        Request { flags, cmd, cookie: 7, offset, len }
    }

    #[test]
    fn errors_are_those_of_the_specification() {
        let none = CommandFlags(0);
        let all = session(TransmissionFlags(0xfff));
        let ro = session(TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::READ_ONLY));
        let rw = session(TransmissionFlags(0xfff).without(TransmissionFlags::READ_ONLY));
        let bare = session(TransmissionFlags::HAS_FLAGS);
        let errno = |s: &Session, r| s.check(&r).unwrap_err().0;
        assert_eq!(errno(&ro, request(cmd::WRITE, none, 0, 512)), Errno::Perm);
        assert_eq!(errno(&all, request(cmd::TRIM, none, 0, 512)), Errno::Perm);
        assert_eq!(errno(&rw, request(cmd::WRITE, none, 1 << 20, 1)), Errno::NoSpc);
        assert_eq!(errno(&rw, request(cmd::WRITE_ZEROES, none, u64::MAX, 1)), Errno::NoSpc);
        assert_eq!(errno(&rw, request(cmd::READ, none, 1 << 20, 1)), Errno::Inval);
        assert_eq!(errno(&rw, request(cmd::READ, CommandFlags::NO_HOLE, 0, 1)), Errno::Inval);
        assert_eq!(errno(&rw, request(cmd::BLOCK_STATUS, none, 0, 512)), Errno::Inval);
        assert_eq!(errno(&rw, request(9, none, 0, 512)), Errno::Inval);
        for c in [cmd::FLUSH, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
            assert_eq!(errno(&bare, request(c, none, 0, 512)), Errno::Inval);
        }
        assert_eq!(errno(&bare, request(cmd::WRITE, CommandFlags::FUA, 0, 512)), Errno::Inval);
        assert_eq!(
            rw.check(&request(cmd::READ, CommandFlags::FUA, 0, 1 << 20)),
            Ok(Command::Read { df: false })
        );
        assert_eq!(
            rw.check(&request(cmd::WRITE_ZEROES, CommandFlags(0b10011), 0, 1 << 20)),
            Ok(Command::WriteZeroes { fua: true, no_hole: true, fast: true })
        );
    }

    #[test]
    fn a_payload_too_long_ends_the_connection() {
        let r = request(cmd::WRITE, CommandFlags(0), 0, limits::MAX_PAYLOAD + 1);
        assert!(matches!(Request::decode(&r.encode()), RequestStep::Close(_)));
        let r = request(cmd::TRIM, CommandFlags(0), 0, limits::MAX_PAYLOAD + 1);
        assert_eq!(Request::decode(&r.encode()), RequestStep::Got(r, 0));
    }

    proptest! {
        #[test]
        fn headers_round_trip(flags: u16, c in 0u16..9, cookie: u64, offset: u64, len in 0u32..1 << 25) {
            let r = Request { flags: CommandFlags(flags), cmd: c, cookie, offset, len };
            let payload = if c == cmd::WRITE { len } else { 0 };
            prop_assert_eq!(Request::decode(&r.encode()), RequestStep::Got(r, payload));
        }

        #[test]
        fn permitted_means_inside(flags: u16, c in 0u16..9, offset: u64, len: u32, tflags: u16) {
            let s = session(TransmissionFlags(tflags));
            let r = Request { flags: CommandFlags(flags), cmd: c, cookie: 0, offset, len };
            let nowhere = |c: &Command| matches!(c, Command::Flush | Command::Disconnect);
            if s.check(&r).is_ok_and(|c| !nowhere(&c)) {
                prop_assert!(offset + u64::from(len) <= s.export.size);
            }
        }
    }
}
