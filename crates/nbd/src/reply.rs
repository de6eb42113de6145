//! Replies: what a server sends, and what a client makes of what it received
//! ("Simple reply message", "Structured reply chunk message").
//!
//! A client reads a [`ReplyHead`], finds its request by the cookie and feeds the head to
//! that request's [`ReplyState`], which knows what a reply to it may say: pieces inside
//! the range, never twice the same byte, everything covered at the end. Payload of a
//! read is never copied here: the state says where in the caller's buffer it belongs.

use dolmen_types::{Error, ErrorKind, Result};

use crate::consts::{Errno, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use crate::limits;
use crate::wire::{Fields, clip, len32, put16, put32, put64};

/// Bytes of a simple reply without payload.
pub const SIMPLE_SIZE: usize = 16;
/// Bytes of a chunk header.
pub const CHUNK_SIZE: usize = 20;
/// Bytes in front of the data of a data chunk.
pub const DATA_HEAD_SIZE: usize = CHUNK_SIZE + 8;

/// A piece of a block status reply: length in bytes and the context's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never zero.
    pub len: u32,
    /// For `base:allocation`: [`crate::consts::STATE_HOLE`], [`crate::consts::STATE_ZERO`].
    pub flags: u32,
}

/// Appends a simple reply; data of a read follows it.
pub fn put_simple(out: &mut Vec<u8>, cookie: u64, errno: Option<Errno>) {
    put32(out, SIMPLE_REPLY_MAGIC);
    put32(out, errno.map_or(0, Errno::code));
    put64(out, cookie);
}

fn put_chunk(out: &mut Vec<u8>, cookie: u64, done: bool, kind: u16, payload: u32) {
    put32(out, STRUCTURED_REPLY_MAGIC);
    put16(out, if done { chunk::FLAG_DONE } else { 0 });
    put16(out, kind);
    put64(out, cookie);
    put32(out, payload);
}

/// Appends the chunk that ends a reply without saying anything more.
pub fn put_none(out: &mut Vec<u8>, cookie: u64) {
    put_chunk(out, cookie, true, chunk::NONE, 0);
}

/// Appends what comes before `len` bytes of data that start at `offset` of the export.
/// `len` is at least 1 and at most [`limits::MAX_PAYLOAD`].
pub fn put_data_head(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, len: u32) {
    debug_assert!(len > 0 && len <= limits::MAX_PAYLOAD);
    put_chunk(out, cookie, done, chunk::OFFSET_DATA, len + 8);
    put64(out, offset);
}

/// Appends a hole: `len` bytes at `offset` read as zeroes. `len` is not zero.
pub fn put_hole(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, len: u32) {
    debug_assert!(len > 0);
    put_chunk(out, cookie, done, chunk::OFFSET_HOLE, 12);
    put64(out, offset);
    put32(out, len);
}

/// Appends an error chunk that ends the reply.
pub fn put_error(out: &mut Vec<u8>, cookie: u64, errno: Errno, message: &str) {
    let message = clip(message).as_bytes();
    let length = u16::try_from(message.len()).expect("clipped to 4096");
    put_chunk(out, cookie, true, chunk::ERROR, 6 + u32::from(length));
    put32(out, errno.code());
    put16(out, length);
    out.extend_from_slice(message);
}

/// Appends a whole reply to a block status request: one context, its extents, done.
/// There is at least one extent, at most [`limits::MAX_EXTENTS_SENT`].
pub fn put_status(out: &mut Vec<u8>, cookie: u64, context: u32, extents: &[Extent]) {
    debug_assert!(!extents.is_empty() && extents.len() <= limits::MAX_EXTENTS_SENT);
    put_chunk(out, cookie, true, chunk::BLOCK_STATUS, len32(4 + 8 * extents.len()));
    put32(out, context);
    for e in extents {
        put32(out, e.len);
        put32(out, e.flags);
    }
}

/// A chunk of a structured reply. Offsets are those of the export, lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Nothing more.
    None,
    /// Data follow the head.
    Data {
        /// Where they belong.
        offset: u64,
        /// How many; not zero.
        len: u32,
    },
    /// Zeroes.
    Hole {
        /// Where.
        offset: u64,
        /// How many; not zero.
        len: u32,
    },
    /// Status of the range, from its first byte.
    Status {
        /// The metadata context.
        context: u32,
        /// Its extents, encoded; see [`extents`].
        extents: &'a [u8],
    },
    /// The request failed.
    Error {
        /// How.
        errno: Errno,
        /// The server's words; may be empty.
        message: &'a str,
        /// At which offset, when the server says so.
        offset: Option<u64>,
    },
}

/// Decodes the extents of a status chunk.
pub fn extents(encoded: &[u8]) -> impl Iterator<Item = Extent> + '_ {
    encoded.chunks_exact(8).map(|b| Extent {
        len: u32::from_be_bytes([b[0], b[1], b[2], b[3]]),
        flags: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
    })
}

/// What the front of a client's input holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead<'a> {
    /// This many bytes must be in the buffer; at most a chunk header and
    /// [`limits::MAX_STATUS_PAYLOAD`].
    Need(usize),
    /// A simple reply of [`SIMPLE_SIZE`] bytes.
    Simple {
        /// Of the request.
        cookie: u64,
        /// The error, or success.
        errno: Option<Errno>,
    },
    /// A chunk.
    Chunk {
        /// Of the request.
        cookie: u64,
        /// What it says.
        chunk: Chunk<'a>,
        /// The last of the reply.
        done: bool,
        /// Bytes of the head, and of the payload except data.
        taken: usize,
    },
}

fn violation(text: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the NBD server {text}"))
}

impl ReplyHead<'_> {
    /// Reads the head of a reply. An error means that the stream can't be followed any
    /// longer and the connection has to be closed.
    pub fn decode(input: &[u8]) -> Result<ReplyHead<'_>> {
        let mut f = Fields(input);
        match f.u32() {
            None => Ok(ReplyHead::Need(SIMPLE_SIZE)),
            Some(SIMPLE_REPLY_MAGIC) => {
                let (Some(error), Some(cookie)) = (f.u32(), f.u64()) else {
                    return Ok(ReplyHead::Need(SIMPLE_SIZE));
                };
                Ok(ReplyHead::Simple { cookie, errno: (error != 0).then(|| Errno::from_code(error)) })
            }
            Some(STRUCTURED_REPLY_MAGIC) => decode_chunk(input, f),
            Some(_) => Err(violation("sent a wrong reply magic")),
        }
    }
}

fn decode_chunk<'a>(input: &'a [u8], mut f: Fields<'a>) -> Result<ReplyHead<'a>> {
    let fields = (|| Some((f.u16()?, f.u16()?, f.u64()?, f.u32()? as usize)))();
    let Some((flags, kind, cookie, length)) = fields else { return Ok(ReplyHead::Need(CHUNK_SIZE)) };
    let done = flags & chunk::FLAG_DONE != 0;
    let (least, most, buffered) = match kind {
        chunk::NONE => (0, 0, 0),
        chunk::OFFSET_DATA => (9, 8 + limits::MAX_PAYLOAD as usize, 8),
        chunk::OFFSET_HOLE => (12, 12, 12),
        chunk::BLOCK_STATUS => (12, limits::MAX_STATUS_PAYLOAD, length),
        _ if kind & chunk::ERROR_BIT != 0 => (6, limits::MAX_ERROR_PAYLOAD, length),
        _ => return Err(violation("sent a chunk of an unknown type")),
    };
    if length < least || length > most {
        return Err(violation("sent a chunk of a wrong length"));
    }
    let taken = CHUNK_SIZE + buffered;
    let Some(payload) = input.get(CHUNK_SIZE..taken) else { return Ok(ReplyHead::Need(taken)) };
    let mut p = Fields(payload);
    let chunk = match kind {
        chunk::NONE if done => Some(Chunk::None),
        chunk::NONE => None,
        chunk::OFFSET_DATA => p.u64().map(|offset| Chunk::Data { offset, len: len32(length - 8) }),
        chunk::OFFSET_HOLE => match (p.u64(), p.u32()) {
            (Some(offset), Some(len)) if len > 0 => Some(Chunk::Hole { offset, len }),
            _ => None,
        },
        chunk::BLOCK_STATUS => {
            let context = p.u32();
            let well_formed = p.0.len().is_multiple_of(8) && extents(p.0).all(|e| e.len > 0);
            context.filter(|_| well_formed).map(|context| Chunk::Status { context, extents: p.0 })
        }
        _ => decode_error(kind, p),
    };
    match chunk {
        Some(chunk) => Ok(ReplyHead::Chunk { cookie, chunk, done, taken }),
        None => Err(violation("sent a malformed chunk")),
    }
}

/// An error chunk of any type: those that are not known fail the request all the same.
fn decode_error(kind: u16, mut p: Fields<'_>) -> Option<Chunk<'_>> {
    let error = p.u32()?;
    let length = p.u16()?;
    let message = p.bytes(length.into())?;
    let offset = match kind {
        chunk::ERROR_OFFSET => Some(p.u64()?),
        _ => None,
    };
    // Text that is not what the specification asks for is dropped; the error stays.
    Some(Chunk::Error {
        errno: Errno::from_code(error),
        message: crate::wire::string(message).unwrap_or(""),
        offset,
    })
}

/// What a reply is expected to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Nothing,
    Data { structured: bool },
    Status { context: u32 },
}

/// What the client does with a piece of a reply. Positions are relative to the start of
/// the request's range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkAction<'a> {
    /// Nothing.
    Nothing,
    /// Read `len` bytes from the connection into the buffer at `at`.
    Receive {
        /// Position in the buffer.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// Fill `len` bytes of the buffer at `at` with zeroes.
    Zero {
        /// Position in the buffer.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// Keep these extents; the first begins at the start of the range. The last may
    /// reach past its end when only one was asked for.
    Extents(&'a [u8]),
}

/// The progress of one reply on the client's side.
#[derive(Debug)]
pub struct ReplyState {
    expects: Expects,
    offset: u64,
    len: u32,
    /// Parts of the range that are there: ascending, disjoint, not adjacent.
    covered: Vec<(u32, u32)>,
    status_seen: bool,
    error: Option<Error>,
}

impl ReplyState {
    /// For a request whose reply has no payload.
    pub fn plain() -> ReplyState {
        ReplyState::new(Expects::Nothing, 0, 0)
    }

    /// For a read of `len` bytes at `offset`.
    pub fn read(structured: bool, offset: u64, len: u32) -> ReplyState {
        ReplyState::new(Expects::Data { structured }, offset, len)
    }

    /// For a block status request with one metadata context.
    pub fn status(context: u32, offset: u64, len: u32) -> ReplyState {
        ReplyState::new(Expects::Status { context }, offset, len)
    }

    fn new(expects: Expects, offset: u64, len: u32) -> ReplyState {
        ReplyState { expects, offset, len, covered: Vec::new(), status_seen: false, error: None }
    }

    /// A simple reply came: it is the whole reply once the action is done. An error here
    /// is a violation: close the connection.
    pub fn simple(&mut self, errno: Option<Errno>) -> Result<ChunkAction<'static>> {
        if let Some(errno) = errno {
            self.fail(errno, "", None);
            return Ok(ChunkAction::Nothing);
        }
        match self.expects {
            Expects::Nothing => Ok(ChunkAction::Nothing),
            Expects::Data { structured: false } => {
                self.cover(0, self.len)?;
                Ok(if self.len == 0 {
                    ChunkAction::Nothing
                } else {
                    ChunkAction::Receive { at: 0, len: self.len }
                })
            }
            Expects::Data { structured: true } => Err(violation("answered a read without structured reply")),
            Expects::Status { .. } => Err(violation("answered a block status request without a status")),
        }
    }

    /// A chunk came. An error here is a violation: close the connection.
    pub fn chunk<'a>(&mut self, chunk: Chunk<'a>) -> Result<ChunkAction<'a>> {
        match chunk {
            Chunk::None => Ok(ChunkAction::Nothing),
            Chunk::Data { offset, len } => {
                let at = self.piece(offset, len)?;
                Ok(ChunkAction::Receive { at, len })
            }
            Chunk::Hole { offset, len } => {
                let at = self.piece(offset, len)?;
                Ok(ChunkAction::Zero { at, len })
            }
            Chunk::Status { context, extents } => match self.expects {
                Expects::Status { context: wanted } if wanted != context => {
                    Err(violation("sent the status of a context that was not selected"))
                }
                Expects::Status { .. } if self.status_seen => {
                    Err(violation("sent the status of a context twice"))
                }
                Expects::Status { .. } => {
                    self.status_seen = true;
                    Ok(ChunkAction::Extents(extents))
                }
                Expects::Nothing | Expects::Data { .. } => {
                    Err(violation("sent a status that nobody asked for"))
                }
            },
            Chunk::Error { errno, message, offset } => {
                self.fail(errno, message, offset);
                Ok(ChunkAction::Nothing)
            }
        }
    }

    /// The reply is complete. The outer error is a violation (close the connection), the
    /// inner one is the request's.
    pub fn finish(&mut self) -> Result<Result<()>> {
        if let Some(error) = self.error.take() {
            return Ok(Err(error));
        }
        match self.expects {
            Expects::Data { .. } if self.len > 0 && self.covered != [(0, self.len)] => {
                Err(violation("claimed success of a read without sending all of it"))
            }
            Expects::Status { .. } if !self.status_seen => {
                Err(violation("claimed success of a block status request without a status"))
            }
            Expects::Nothing | Expects::Data { .. } | Expects::Status { .. } => Ok(Ok(())),
        }
    }

    fn fail(&mut self, errno: Errno, message: &str, offset: Option<u64>) {
        // The first error counts.
        if self.error.is_some() {
            return;
        }
        let mut text = format!("the NBD server reported {}", errno_name(errno));
        if let Some(offset) = offset {
            text += &format!(" at offset {offset}");
        }
        if !message.is_empty() {
            text += ": ";
            text.extend(message.chars().map(|c| if c.is_control() { ' ' } else { c }));
        }
        self.error = Some(Error::new(errno.kind(), text));
    }

    fn piece(&mut self, offset: u64, len: u32) -> Result<u32> {
        if !matches!(self.expects, Expects::Data { structured: true }) {
            return Err(violation("sent data that nobody asked for"));
        }
        let at = offset.checked_sub(self.offset).and_then(|at| u32::try_from(at).ok());
        let inside = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= self.len));
        let Some(at) = inside else { return Err(violation("sent data outside of the requested range")) };
        self.cover(at, at + len)?;
        Ok(at)
    }

    /// Adds `[start, end)`; merges with its neighbours.
    fn cover(&mut self, start: u32, end: u32) -> Result<()> {
        let i = self.covered.partition_point(|p| p.1 < start);
        let mut j = i;
        let mut joined = (start, end);
        while let Some(&(s, e)) = self.covered.get(j).filter(|p| p.0 <= end) {
            if s < end && start < e {
                return Err(violation("sent the same data twice"));
            }
            joined = (joined.0.min(s), joined.1.max(e));
            j += 1;
        }
        self.covered.splice(i..j, [joined]);
        if self.covered.len() > limits::MAX_FRAGMENTS {
            return Err(violation("scattered a read into too many pieces"));
        }
        Ok(())
    }
}

const fn errno_name(e: Errno) -> &'static str {
    match e {
        Errno::Perm => "EPERM (not permitted)",
        Errno::Io => "EIO (input/output error)",
        Errno::NoMem => "ENOMEM (out of memory)",
        Errno::Inval => "EINVAL (invalid argument)",
        Errno::NoSpc => "ENOSPC (no space left)",
        Errno::Overflow => "EOVERFLOW (value too large)",
        Errno::NotSup => "ENOTSUP (not supported)",
        Errno::Shutdown => "ESHUTDOWN (server is shutting down)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(bytes: &[u8]) -> ReplyHead<'_> {
        ReplyHead::decode(bytes).unwrap()
    }

    #[test]
    fn encodings_round_trip() {
        let mut b = Vec::new();
        put_simple(&mut b, 5, Some(Errno::NoSpc));
        assert_eq!(head(&b), ReplyHead::Simple { cookie: 5, errno: Some(Errno::NoSpc) });
        b.clear();
        put_data_head(&mut b, 6, true, 4096, 512);
        let chunk = Chunk::Data { offset: 4096, len: 512 };
        assert_eq!(head(&b), ReplyHead::Chunk { cookie: 6, chunk, done: true, taken: DATA_HEAD_SIZE });
        b.clear();
        put_error(&mut b, 7, Errno::Io, "bad sector");
        let chunk = Chunk::Error { errno: Errno::Io, message: "bad sector", offset: None };
        assert_eq!(head(&b), ReplyHead::Chunk { cookie: 7, chunk, done: true, taken: b.len() });
        for n in 0..b.len() {
            assert!(matches!(head(&b[..n]), ReplyHead::Need(m) if m > n && m <= b.len()));
        }
        b.clear();
        let e = [Extent { len: 512, flags: 3 }, Extent { len: 1024, flags: 0 }];
        put_status(&mut b, 8, 1, &e);
        match head(&b) {
            ReplyHead::Chunk { chunk: Chunk::Status { context: 1, extents: x }, done: true, .. } => {
                assert!(extents(x).eq(e));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_read_must_be_covered_once() {
        let data = |offset, len| Chunk::Data { offset, len };
        let mut r = ReplyState::read(true, 100, 50);
        assert_eq!(r.chunk(data(120, 30)).unwrap(), ChunkAction::Receive { at: 20, len: 30 });
        assert!(r.finish().is_err());
        assert_eq!(
            r.chunk(Chunk::Hole { offset: 100, len: 20 }).unwrap(),
            ChunkAction::Zero { at: 0, len: 20 }
        );
        r.finish().unwrap().unwrap();
        for (offset, len) in [(99, 2), (149, 2), (100, 51), (u64::MAX, 1), (0, u32::MAX), (100, 1), (149, 1)]
        {
            assert!(r.chunk(data(offset, len)).is_err(), "{offset}+{len}");
        }
    }

    #[test]
    fn text_of_the_server_is_shown() {
        let mut r = ReplyState::plain();
        r.chunk(Chunk::Error { errno: Errno::Io, message: "disk\nburns", offset: Some(9) }).unwrap();
        let e = r.finish().unwrap().unwrap_err();
        assert_eq!(e.to_string(), "the NBD server reported EIO (input/output error) at offset 9: disk burns");
        assert_eq!(e.kind(), ErrorKind::Io);
    }

    proptest! {
        /// Coverage agrees with a byte map.
        #[test]
        fn coverage(pieces in prop::collection::vec((0u32..64, 1u32..16), 0..40)) {
            let mut state = ReplyState::read(true, 1000, 64);
            let mut map = [false; 64];
            for (at, len) in pieces {
                let end = at + len;
                let fine = end <= 64 && !map[at as usize..end as usize].contains(&true);
                let got = state.chunk(Chunk::Data { offset: 1000 + u64::from(at), len });
                prop_assert_eq!(got.is_ok(), fine);
                if fine {
                    map[at as usize..end as usize].fill(true);
                }
            }
            prop_assert_eq!(state.finish().is_ok(), map == [true; 64]);
        }

        /// Nothing that a server sends makes the decoder panic or ask for too much.
        #[test]
        fn hostile_chunks(kind: u16, flags: u16, length: u32, rest in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut b = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
            put16(&mut b, flags);
            put16(&mut b, if kind & 0x40 == 0 { kind & 0x8007 } else { kind });
            put64(&mut b, 1);
            put32(&mut b, if length & 1 == 0 { length } else { (length >> 1) % 300 });
            b.extend(rest);
            match ReplyHead::decode(&b) {
                Ok(ReplyHead::Need(n)) => prop_assert!(n > b.len() && n <= CHUNK_SIZE + limits::MAX_STATUS_PAYLOAD),
                Ok(ReplyHead::Chunk { taken, .. }) => prop_assert!(taken <= b.len()),
                Ok(ReplyHead::Simple { .. }) => prop_assert!(false),
                Err(_) => {}
            }
        }
    }
}
