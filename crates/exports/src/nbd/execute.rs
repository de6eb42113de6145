//! One request, from a permitted command to a reply.

use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{Token, UserEdge, chain_status};
use dolmen_nbd::consts::{STATE_HOLE, STATE_ZERO};
use dolmen_nbd::{Command, Errno, Extent, Session, limits};
use dolmen_rt::{Memory, Rt};
use dolmen_types::{Error, ErrorKind, OpKind, ReadFlags, Result, Span, WriteFlags};
use smallvec::SmallVec;

use super::pool::Pool;
use super::replies::{Body, Piece, Reply};

/// Reads of at least this many bytes ask where the holes are before they move data.
const SPARSE_READ_MIN: u64 = 256 * 1024;
/// A request to cache is done in steps of so many bytes.
pub(crate) const CACHE_STEP: u64 = 1 << 20;
/// Of a longer one, only so much is done: it is a hint, and a request must not keep a change of the graph waiting.
const CACHE_MOST: u64 = 32 << 20;
/// Pieces that a sparse read is cut into; what is left goes out as data.
const SPARSE_PIECES_MAX: usize = 16;
/// Questions about a block status for which one token is held.
pub(crate) const STATUS_STEP: usize = 64;
/// After this time a block status is answered with what is known.
const STATUS_TIME: Duration = Duration::from_millis(100);
/// A hole shorter than this goes out as data.
const SPARSE_HOLE_MIN: u64 = 16 * 1024;

/// What requests need; no connection, and no socket.
#[derive(Debug)]
pub(crate) struct RequestCx {
    pub(crate) rt: Rt,
    /// The edge that they go over.
    pub(crate) edge: Arc<UserEdge>,
    /// What the client negotiated.
    pub(crate) session: Session,
    /// Every write is durable before its reply.
    pub(crate) writethrough: bool,
    pub(crate) buffers: Pool,
}

/// A request on its way to the graph.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) cookie: u64,
    pub(crate) command: Command,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    /// Of a write: at least `len` bytes.
    pub(crate) payload: Option<Memory>,
    /// Bytes that the connection's budget counts until the reply is sent.
    pub(crate) charge: usize,
}

/// Runs the request; errors become error replies.
pub(crate) async fn execute(cx: &RequestCx, request: Pending) -> Reply {
    let Pending { cookie, command, offset, len, payload, charge } = request;
    let mut memory = payload;
    let began = cx.rt.now();
    let body = match run(cx, command, offset, len, &mut memory).await {
        Ok(body) => body,
        Err(e) => failed(&e),
    };
    if let Some(kind) = counted(command) {
        let span = Span::checked(offset, len.into()).unwrap_or(Span::new(0, 0));
        let ok = !matches!(body, Body::Failed(..));
        cx.edge.ended(&cx.rt, kind, span, began, ok);
    }
    Reply { cookie, body, memory, charge }
}

/// As what a command is counted.
fn counted(command: Command) -> Option<OpKind> {
    match command {
        Command::Read { .. } => Some(OpKind::Read),
        Command::Write { .. } => Some(OpKind::Write),
        Command::WriteZeroes { .. } => Some(OpKind::WriteZeroes),
        Command::Trim { .. } => Some(OpKind::Discard),
        Command::Flush => Some(OpKind::Flush),
        Command::Cache | Command::BlockStatus { .. } | Command::Disconnect => None,
    }
}

fn failed(e: &Error) -> Body {
    let errno = match e.kind() {
        // A lost connection somewhere below is a broken disk to this client; only this
        // server's own end is a shutdown.
        ErrorKind::Disconnected => Errno::Io,
        _ => Errno::from_errno(e.errno()),
    };
    Body::Failed(errno, e.to_string().into())
}

async fn run(
    cx: &RequestCx,
    command: Command,
    offset: u64,
    len: u32,
    memory: &mut Option<Memory>,
) -> Result<Body> {
    let token = match cx.edge.try_begin() {
        Ok(Some(token)) => token,
        // Quiesced: wait until the graph has changed.
        Ok(None) => match cx.edge.begin().await {
            Ok(token) => token,
            Err(e) => return Ok(Body::Failed(Errno::Shutdown, e.to_string().into())),
        },
        Err(e) => return Ok(Body::Failed(Errno::Shutdown, e.to_string().into())),
    };
    let rt = &cx.rt;
    let durable = |fua: bool| {
        if fua || cx.writethrough { WriteFlags::FUA } else { WriteFlags::NONE }
    };
    match command {
        Command::Read { df } => {
            let span = token.check(offset, len.into())?;
            if span.is_empty() {
                return Ok(Body::Done);
            }
            let buffer = cx.buffers.take(len as usize);
            let result = if !df && cx.session.structured && span.len() >= SPARSE_READ_MIN {
                sparse_read(&token, rt, span, &buffer).await
            } else {
                token
                    .read(rt)?
                    .read(span, &window(&buffer, len), ReadFlags::NONE)
                    .await
                    .map(|()| Body::Data { offset, len })
            };
            *memory = Some(buffer);
            result
        }
        Command::Write { fua } => {
            let span = token.check(offset, len.into())?;
            let Some(payload) = memory.as_ref().filter(|_| !span.is_empty()) else { return Ok(Body::Done) };
            token.write(rt)?.write(span, &window(payload, len), durable(fua)).await?;
            Ok(Body::Done)
        }
        Command::Flush => {
            // A read-only export may be flushed: others write through the same node.
            token.read(rt)?.flush().await?;
            Ok(Body::Done)
        }
        Command::Trim { fua } => {
            let span = token.check(offset, len.into())?;
            token.write(rt)?.discard(span, durable(fua)).await?;
            Ok(Body::Done)
        }
        Command::WriteZeroes { fua, no_hole, fast } => {
            let span = token.check(offset, len.into())?;
            let mut flags = durable(fua);
            if !no_hole {
                flags = flags | WriteFlags::MAY_UNMAP;
            }
            if fast {
                flags = flags | WriteFlags::NO_FALLBACK;
            }
            token.write(rt)?.write_zeroes(span, flags).await?;
            Ok(Body::Done)
        }
        Command::BlockStatus { one } => {
            let span = token.check(offset, len.into())?;
            status(cx, token, span, one).await.map(Body::Status)
        }
        Command::Cache => {
            let span = token.check(offset, len.into())?.prefix(CACHE_MOST);
            let io = token.read(rt)?;
            // The data are not wanted, but a node may use the buffer; one is enough for all pieces.
            let size = span.len().min(CACHE_STEP);
            let buffer = cx.buffers.take(size as usize);
            for part in span.blocks(CACHE_STEP) {
                io.read(part, &window(&buffer, part.len() as u32), ReadFlags::PREFETCH).await?;
            }
            *memory = Some(buffer);
            Ok(Body::Done)
        }
        Command::Disconnect => Err(Error::new(ErrorKind::InvalidInput, "the command was not offered")),
    }
}

/// The first `len` bytes of a buffer.
fn window(memory: &Memory, len: u32) -> dolmen_rt::IoVec {
    memory.share().slice(0, len as usize).into()
}

/// Reads around the holes.
async fn sparse_read(token: &Token, rt: &Rt, span: Span, buffer: &Memory) -> Result<Body> {
    let mut pieces: SmallVec<[Piece; 4]> = SmallVec::new();
    let mut rest = span;
    while !rest.is_empty() {
        let (len, hole) = if pieces.len() + 1 < SPARSE_PIECES_MAX {
            let s = chain_status(token.node(), rt, rest, None).await?;
            let len = s.len.clamp(1, rest.len());
            (len, s.zero && len >= SPARSE_HOLE_MIN)
        } else {
            (rest.len(), false)
        };
        let piece_len = u32::try_from(len).expect("a read has at most 32 MiB");
        match pieces.last_mut() {
            Some(last) if last.hole == hole => last.len += piece_len,
            _ => pieces.push(Piece { offset: rest.offset(), len: piece_len, hole }),
        }
        rest = rest.skip(len);
    }
    let io = token.read(rt)?;
    for p in pieces.iter().filter(|p| !p.hole) {
        let at = usize::try_from(p.offset - span.offset()).expect("a read has at most 32 MiB");
        let to = buffer.share().slice(at, p.len as usize).into();
        io.read(Span::new(p.offset, p.len.into()), &to, ReadFlags::NONE).await?;
    }
    Ok(Body::Sparse { start: span.offset(), pieces })
}

/// `base:allocation` of a range, or of as much as fits a reply and is known soon: a client asks again for the rest. The token goes back
/// after every [`STATUS_STEP`] questions; if a change of the graph waits for it then, the reply is what is known.
async fn status(cx: &RequestCx, mut token: Token, span: Span, one: bool) -> Result<Vec<Extent>> {
    let rt = &cx.rt;
    let began = rt.now();
    let most = if one { 1 } else { limits::MAX_EXTENTS_SENT };
    let mut out: Vec<Extent> = Vec::new();
    let mut rest = span;
    loop {
        for _ in 0..STATUS_STEP {
            if rest.is_empty() {
                return Ok(out);
            }
            let s = chain_status(token.node(), rt, rest, None).await?;
            let len = u32::try_from(s.len.clamp(1, rest.len())).expect("a request has at most 4 GiB");
            let flags = if s.data { 0 } else { STATE_HOLE } | if s.zero { STATE_ZERO } else { 0 };
            let full = out.len() == most;
            match out.last_mut() {
                Some(last) if last.flags == flags => last.len += len,
                Some(_) if full => return Ok(out),
                _ => out.push(Extent { len, flags }),
            }
            rest = rest.skip(len.into());
            if rt.now().since(began) >= STATUS_TIME {
                return Ok(out);
            }
        }
        drop(token);
        rt.yield_now().await;
        token = match cx.edge.try_begin() {
            Ok(Some(token)) if token.check(rest.offset(), rest.len()).is_ok() => token,
            Ok(_) | Err(_) => return Ok(out),
        };
    }
}
