//! Replies that wait for the socket, and how many of them become one send.
//!
//! Workers append to the queue; the sender takes what is there, writes all heads into one
//! buffer, and sends heads and data with one vectored call. While that call waits, more
//! replies gather: the busier the connection, the larger the batches.

use std::collections::VecDeque;

use dolmen_nbd::{Errno, Extent, Session, reply};
use dolmen_rt::{IoVec, Memory};
use smallvec::SmallVec;

/// Buffers of one batch; the kernel takes at most 1024 in one call.
const MAX_SEGMENTS: usize = 512;
/// Bytes of one batch, unless a single reply is larger.
const MAX_BYTES: usize = 4 << 20;

/// A part of a sparse read. Offset in the export, length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) hole: bool,
}

/// What a reply says.
#[derive(Debug)]
pub(crate) enum Body {
    /// Success without data.
    Done,
    /// The request failed.
    Failed(Errno, Box<str>),
    /// The first `len` bytes of the reply's memory are the data at `offset`.
    Data { offset: u64, len: u32 },
    /// The reply's memory begins at `start` of the export; holes are not in it.
    Sparse { start: u64, pieces: SmallVec<[Piece; 4]> },
    /// Block status.
    Status(Vec<Extent>),
}

/// A reply, and what goes back to the connection once it is sent.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) body: Body,
    pub(crate) memory: Option<Memory>,
    pub(crate) charge: usize,
}

/// A part of a batch in order: so many bytes of the heads, then so many of a memory.
#[derive(Debug, PartialEq, Eq)]
enum Segment {
    Heads(usize),
    Data { reply: usize, at: usize, len: usize },
}

/// Replies that are sent together. Reused from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Encoded heads.
    heads: Vec<u8>,
    segments: Vec<Segment>,
    bytes: usize,
    /// What is being sent; goes back when it is out.
    pub(crate) replies: Vec<Reply>,
    /// Memory that the heads are sent from.
    out: Option<Memory>,
}

impl Batch {
    /// Takes replies from the queue until the batch is full.
    pub(crate) fn fill(&mut self, queue: &mut VecDeque<Reply>, session: &Session) {
        debug_assert!(self.replies.is_empty());
        self.heads.clear();
        self.segments.clear();
        self.bytes = 0;
        while self.segments.len() < MAX_SEGMENTS && self.bytes < MAX_BYTES {
            let Some(reply) = queue.pop_front() else { break };
            self.encode(&reply, session);
            self.replies.push(reply);
        }
    }

    fn encode(&mut self, reply: &Reply, session: &Session) {
        let cookie = reply.cookie;
        match &reply.body {
            Body::Done if session.structured => self.heads(|h| reply::put_none(h, cookie)),
            Body::Done => self.heads(|h| reply::put_simple(h, cookie, None)),
            Body::Failed(errno, text) if session.structured => {
                self.heads(|h| reply::put_error(h, cookie, *errno, text));
            }
            Body::Failed(errno, _) => self.heads(|h| reply::put_simple(h, cookie, Some(*errno))),
            Body::Data { offset, len } => {
                if session.structured {
                    self.heads(|h| reply::put_data_head(h, cookie, true, *offset, *len));
                } else {
                    self.heads(|h| reply::put_simple(h, cookie, None));
                }
                self.data(0, *len as usize);
            }
            Body::Sparse { start, pieces } => {
                for (i, p) in pieces.iter().enumerate() {
                    let last = i + 1 == pieces.len();
                    if p.hole {
                        self.heads(|h| reply::put_hole(h, cookie, last, p.offset, p.len));
                    } else {
                        self.heads(|h| reply::put_data_head(h, cookie, last, p.offset, p.len));
                        self.data((p.offset - start) as usize, p.len as usize);
                    }
                }
            }
            Body::Status(extents) => {
                let context = session.base_allocation.unwrap_or(0);
                self.heads(|h| reply::put_status(h, cookie, context, extents));
            }
        }
    }

    /// Appends heads; neighbours become one segment.
    fn heads(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let before = self.heads.len();
        put(&mut self.heads);
        let n = self.heads.len() - before;
        self.bytes += n;
        match self.segments.last_mut() {
            Some(Segment::Heads(len)) => *len += n,
            _ => self.segments.push(Segment::Heads(n)),
        }
    }

    /// Appends data of the reply that is being added.
    fn data(&mut self, at: usize, len: usize) {
        self.bytes += len;
        self.segments.push(Segment::Data { reply: self.replies.len(), at, len });
    }

    /// Everything to be sent, in order.
    pub(crate) fn iovec(&mut self) -> IoVec {
        let n = self.heads.len();
        let out = match self.out.take() {
            Some(m) if m.len() >= n => m,
            _ => Memory::zeroed(n.next_power_of_two().max(4096)),
        };
        let shared = out.share();
        shared.copy_from_slice(0, &self.heads);
        let mut iov = IoVec::new();
        let mut at_heads = 0;
        for s in &self.segments {
            match *s {
                Segment::Heads(len) => {
                    iov.push(shared.slice(at_heads, len));
                    at_heads += len;
                }
                Segment::Data { reply, at, len } => {
                    let memory =
                        self.replies[reply].memory.as_ref().expect("a reply with data has its memory");
                    iov.push(memory.share().slice(at, len));
                }
            }
        }
        self.out = Some(out);
        iov
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dolmen_nbd::consts::TransmissionFlags;
    use dolmen_nbd::{ExportInfo, HeaderStyle};

    fn session(structured: bool) -> Session {
        Session {
            export: ExportInfo {
                name: String::new(),
                description: String::new(),
                size: 1 << 30,
                flags: TransmissionFlags::HAS_FLAGS,
                min_block: 1,
                preferred_block: 4096,
                max_block: 1 << 25,
            },
            structured,
            base_allocation: None,
            headers: HeaderStyle::Compact,
        }
    }

    fn data(cookie: u64, bytes: &[u8]) -> Reply {
        let body = Body::Data { offset: 0, len: bytes.len() as u32 };
        Reply { cookie, body, memory: Some(Memory::from_slice(bytes)), charge: 0 }
    }

    #[test]
    fn heads_and_data_in_order() {
        let done = |cookie| Reply { cookie, body: Body::Done, memory: None, charge: 0 };
        let mut queue: VecDeque<Reply> =
            [done(1), done(2), data(3, b"abc"), done(4), data(5, b"de")].into_iter().collect();
        let mut batch = Batch::default();
        batch.fill(&mut queue, &session(false));
        let iov = batch.iovec();
        // Two heads and the head of the first data are one segment.
        assert_eq!(iov.segments().len(), 4);
        let mut want = Vec::new();
        for (cookie, bytes) in [(1, &b""[..]), (2, b""), (3, b"abc"), (4, b""), (5, b"de")] {
            reply::put_simple(&mut want, cookie, None);
            want.extend_from_slice(bytes);
        }
        assert_eq!(iov.to_vec(), want);
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut queue: VecDeque<Reply> = (0..2000).map(|i| data(i, b"x")).collect();
        let mut batch = Batch::default();
        batch.fill(&mut queue, &session(true));
        assert!(batch.iovec().segments().len() <= MAX_SEGMENTS + 1);
        assert_eq!(queue.len() + batch.replies.len(), 2000);
        assert!(!queue.is_empty());
    }
}
