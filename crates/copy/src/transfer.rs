//! Moving one part: what it is on the source, and getting it to the target.

use dolmen_graph::{Io, Node, Read, Write, chain_status, content as content_of};
use dolmen_rt::Rt;
use dolmen_types::{Error, ReadFlags, Span, WriteFlags};
use std::sync::Arc;

use crate::Buffers;

/// A side of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the data come from.
    Source,
    /// Where they go.
    Target,
}

/// An error, and on which side it came up.
#[derive(Debug)]
pub struct Failure {
    /// The side.
    pub side: Side,
    /// What was to be copied.
    pub span: Span,
    /// What went wrong.
    pub error: Error,
}

/// What a part of the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Has to be read.
    Data,
    /// Reads as zeroes.
    Zero,
    /// Held by no layer that is to be copied.
    Absent,
}

/// How parts are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// Zero writes may give space back.
    pub(crate) unmap: bool,
    /// Data that happen to be zeroes are written as zeroes.
    pub(crate) detect_zeroes: bool,
    /// Flags of data writes.
    pub(crate) flags: WriteFlags,
}

impl How {
    fn zero_flags(self) -> WriteFlags {
        let flags = self.flags.without(WriteFlags::COMPRESSED);
        if self.unmap { flags | WriteFlags::MAY_UNMAP } else { flags }
    }
}

/// What was done with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Its data were written.
    Data,
    /// Zeroes were written.
    Zeroes,
    /// Nothing had to be written: the target reads as zeroes there already, or the part is not in the
    /// layers that are copied.
    Nothing,
}

/// What the start of `span` is, and for how many bytes that holds. What can't be found out has to be
/// read: reading tells why.
pub(crate) async fn content(source: &Arc<Node>, rt: &Rt, span: Span, base: Option<&Node>) -> (Content, u64) {
    match chain_status(source, rt, span, base).await {
        Ok(s) => {
            let content = match (s.present, s.zero) {
                (false, _) if base.is_some() => Content::Absent,
                (_, true) => Content::Zero,
                (_, false) => Content::Data,
            };
            (content, s.len.clamp(1, span.len()))
        }
        Err(_) => (Content::Data, span.len()),
    }
}

/// Brings one part to the target.
///
/// # Errors
/// The first error, with its side. The target's content of the part is then unspecified.
pub(crate) async fn transfer(
    from: Io<'_, Read>,
    to: Io<'_, Write>,
    target: &Arc<Node>,
    span: Span,
    content: Content,
    how: How,
    buffers: &Buffers,
) -> Result<Moved, Failure> {
    let fail = |side| move |error| Failure { side, span, error };
    match content {
        Content::Absent => Ok(Moved::Nothing),
        Content::Zero => zero(to, target, span, how).await.map_err(fail(Side::Target)),
        Content::Data => {
            let buffer = buffers.get();
            let mut moved = Moved::Nothing;
            let mut rest = span;
            while !rest.is_empty() {
                let part = rest.prefix(buffers.size() as u64);
                let data = buffer.iovec(part.len() as usize);
                from.read(part, &data, ReadFlags::NONE).await.map_err(fail(Side::Source))?;
                if how.detect_zeroes && data.is_zero() {
                    let zeroed = zero(to, target, part, how).await.map_err(fail(Side::Target))?;
                    if moved == Moved::Nothing {
                        moved = zeroed;
                    }
                } else {
                    to.write(part, &data, how.flags).await.map_err(fail(Side::Target))?;
                    moved = Moved::Data;
                }
                rest = rest.skip(part.len());
            }
            Ok(moved)
        }
    }
}

/// Makes `span` of the target read as zeroes, as far as it does not do so yet.
async fn zero(to: Io<'_, Write>, target: &Arc<Node>, span: Span, how: How) -> dolmen_types::Result<Moved> {
    let mut moved = Moved::Nothing;
    let mut rest = span;
    // What has to be written, up to where `rest` begins.
    let mut start = span.offset();
    let image = content_of(target);
    // An image that names a backing file is opened over it some day, even if it lies over nothing now.
    let nothing_below = image.backing().is_none() && image.driver.describe(image).backing.is_none();
    while !rest.is_empty() {
        let (known, len) = match chain_status(target, to.rt(), rest, None).await {
            // Only what the target's own layer says: its backing file may be the very node
            // that is about to be overwritten.
            Ok(s) => (s.zero && s.depth == 0 && (s.present || nothing_below), s.len.clamp(1, rest.len())),
            Err(_) => (false, rest.len()),
        };
        if known {
            if start < rest.offset() {
                to.write_zeroes(Span::from_range(start, rest.offset()), how.zero_flags()).await?;
                moved = Moved::Zeroes;
            }
            start = rest.offset() + len;
        }
        rest = rest.skip(len);
    }
    if start < span.end() {
        to.write_zeroes(Span::from_range(start, span.end()), how.zero_flags()).await?;
        moved = Moved::Zeroes;
    }
    Ok(moved)
}
