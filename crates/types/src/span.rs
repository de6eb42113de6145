//! Byte ranges of a node.

use std::fmt;

/// A byte range `[offset, offset + len)`.
///
/// The end never overflows: the constructors check it, so arithmetic on a span
/// that exists is safe.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    offset: u64,
    len: u64,
}

impl Span {
    /// The largest offset that any node may have: file offsets are signed 64-bit.
    pub const MAX_END: u64 = i64::MAX as u64;

    /// The largest unit in which any image format or storage allocates: multiples of it are whole blocks for everybody.
    pub const LARGEST_UNIT: u64 = 2 << 20;

    /// The largest size of a node, a multiple of every unit: a range within a node that is rounded out to whole units of
    /// any of them still is a span.
    pub const MAX_SIZE: u64 = Span::MAX_END / Span::LARGEST_UNIT * Span::LARGEST_UNIT;

    /// A span, or `None` when its end lies beyond [`Span::MAX_END`].
    pub const fn checked(offset: u64, len: u64) -> Option<Span> {
        match offset.checked_add(len) {
            Some(end) if end <= Span::MAX_END => Some(Span { offset, len }),
            _ => None,
        }
    }

    /// A span.
    ///
    /// # Panics
    /// When the end lies beyond [`Span::MAX_END`]; use [`Span::checked`] for numbers
    /// that come from outside.
    #[track_caller]
    pub const fn new(offset: u64, len: u64) -> Span {
        match Span::checked(offset, len) {
            Some(s) => s,
            None => panic!("span end overflows"),
        }
    }

    /// The span from `start` to `end` (exclusive).
    ///
    /// # Panics
    /// When `end < start`.
    #[track_caller]
    pub const fn from_range(start: u64, end: u64) -> Span {
        assert!(start <= end, "span ends before it starts");
        Span::new(start, end - start)
    }

    /// First byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether the span has no bytes.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes; the whole span when it is shorter.
    pub const fn prefix(self, len: u64) -> Span {
        Span { offset: self.offset, len: if len < self.len { len } else { self.len } }
    }

    /// At most the first `max` bytes, up to a multiple of `align` if one lies within them: the way to split a request
    /// for somebody who works in whole blocks.
    pub const fn prefix_to(self, max: u64, align: u64) -> Span {
        if self.len <= max {
            return self;
        }
        let past = (self.offset + max) % align;
        self.prefix(if past < max { max - past } else { max })
    }

    /// What is left after the first `n` bytes; empty at the end when `n` is larger.
    pub const fn skip(self, n: u64) -> Span {
        let n = if n < self.len { n } else { self.len };
        Span { offset: self.offset + n, len: self.len - n }
    }

    /// The bytes that both spans have.
    pub fn intersect(self, other: Span) -> Option<Span> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Span::from_range(start, end))
    }

    /// Whether the spans share a byte.
    pub fn overlaps(self, other: Span) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether every byte of `other` is in this span.
    pub const fn contains(self, other: Span) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The smallest span with both ends on multiples of `align` that contains this one; an empty one stays empty.
    ///
    /// `align` need not be a power of two. The end saturates at the last multiple
    /// below [`Span::MAX_END`].
    pub const fn align_out(self, align: u64) -> Span {
        let start = self.offset / align * align;
        // Nothing touches no block: whoever changes what this gives must not change the block around it.
        if self.len == 0 {
            return Span { offset: start, len: 0 };
        }
        let end = match self.end().checked_next_multiple_of(align) {
            Some(e) if e <= Span::MAX_END => e,
            _ => Span::MAX_END / align * align,
        };
        Span { offset: start, len: end - start }
    }

    /// Whether both ends are multiples of `align`.
    pub const fn is_aligned(self, align: u64) -> bool {
        self.offset.is_multiple_of(align) && self.len.is_multiple_of(align)
    }

    /// The pieces of the span between multiples of `block`.
    pub fn blocks(self, block: u64) -> impl Iterator<Item = Span> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let piece = rest.prefix(block - rest.offset % block);
            rest = rest.skip(piece.len);
            Some(piece)
        })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}
impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_is_refused() {
        assert!(Span::checked(u64::MAX, 1).is_none());
        assert!(Span::checked(Span::MAX_END, 0).is_some());
        assert!(Span::checked(Span::MAX_END, 1).is_none());
    }

    #[test]
    fn blocks_cover_the_span_once() {
        let s = Span::new(700, 1500);
        let pieces: Vec<_> = s.blocks(512).collect();
        assert_eq!(
            pieces,
            [Span::new(700, 324), Span::new(1024, 512), Span::new(1536, 512), Span::new(2048, 152)]
        );
        assert_eq!(s.align_out(512), Span::new(512, 2048));
    }

    #[test]
    fn intersection() {
        let a = Span::new(0, 10);
        assert_eq!(a.intersect(Span::new(5, 10)), Some(Span::new(5, 5)));
        assert_eq!(a.intersect(Span::new(10, 10)), None);
        assert!(!a.overlaps(Span::new(10, 1)));
    }
}
