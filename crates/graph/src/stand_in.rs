//! The file of an image that is to be made, before any file is touched: its content is in memory.
//!
//! A draft with a new image is made, solved and prepared over a stand-in, with the real format driver on it, so that
//! everything that can be refused is refused before there is a file. [`GraphOwner::commit`](crate::GraphOwner::commit)
//! makes the file and puts its driver in the stand-in's place; nobody who could issue requests ever sees the stand-in.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard};

use dolmen_rt::LocalFuture;
use dolmen_types::{BlkEvent, Result, Span};

use crate::{
    AccessRule, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node, NodeChange, Op, Plan,
    Prepared, Request, SELF, Where, prepare_nothing,
};

const PAGE: u64 = 4096;

/// Metadata are few and far between: only pages that were written take memory.
#[derive(Default)]
struct Content {
    size: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Content {
    fn page(&mut self, at: u64) -> &mut [u8; PAGE as usize] {
        self.pages.entry(at).or_insert_with(|| Box::new([0; PAGE as usize]))
    }

    /// Page by page: number, first byte in it, first byte in the span, length.
    fn pieces(span: Span) -> impl Iterator<Item = (u64, usize, usize, usize)> {
        span.blocks(PAGE).map(move |s| {
            let (at, within) = (s.offset() / PAGE, (s.offset() % PAGE) as usize);
            (at, within, (s.offset() - span.offset()) as usize, s.len() as usize)
        })
    }

    fn read(&self, span: Span, out: &mut [u8]) {
        for (page, from, to, len) in Content::pieces(span) {
            match self.pages.get(&page) {
                Some(p) => out[to..to + len].copy_from_slice(&p[from..from + len]),
                None => out[to..to + len].fill(0),
            }
        }
    }

    fn write(&mut self, span: Span, bytes: &[u8]) {
        for (page, to, from, len) in Content::pieces(span) {
            self.page(page)[to..to + len].copy_from_slice(&bytes[from..from + len]);
        }
        self.size = self.size.max(span.end());
    }

    fn zero(&mut self, span: Span) {
        for (page, p) in self.pages.range_mut(span.offset() / PAGE..span.end().div_ceil(PAGE)) {
            let from = span.offset().saturating_sub(page * PAGE).min(PAGE) as usize;
            let to = span.end().saturating_sub(page * PAGE).min(PAGE) as usize;
            p[from..to].fill(0);
        }
        self.size = self.size.max(span.end());
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(Span::from_range(size, self.size));
        }
        self.size = size;
    }
}

/// See the module.
pub(crate) struct StandIn {
    kind: &'static DriverKind,
    /// What the real file tells about itself, or will tell.
    description: Description,
    content: Mutex<Content>,
}

impl StandIn {
    pub(crate) fn new(kind: &'static DriverKind, description: Description, size: u64) -> StandIn {
        StandIn { kind, description, content: Mutex::new(Content { size, ..Content::default() }) }
    }

    /// Never held across an await.
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn apply(&self, op: Op<'_>) {
        let mut content = self.content();
        match op {
            Op::Read { span, to, flags: _ } => {
                let mut bytes = vec![0; to.len()];
                content.read(span, &mut bytes);
                to.copy_from_slice(0, &bytes);
            }
            Op::Write { span, from, flags: _ } => content.write(span, &from.to_vec()),
            Op::WriteZeroes { span, flags: _ } => content.zero(span),
            Op::Discard { .. } | Op::Flush => {}
            Op::Resize { size, prealloc: _ } => content.resize(size),
        }
    }
}

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StandIn({}, {} bytes)", self.kind.name, self.content().size)
    }
}

impl Driver for StandIn {
    fn kind(&self) -> &'static DriverKind {
        self.kind
    }

    fn size(&self, _: &Node) -> u64 {
        self.content().size
    }

    fn limits(&self, _: &Node) -> Limits {
        Limits { fast_zeroes: true, ..Limits::BYTES }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, _: &Node, _: Request, _: Span) -> Plan {
        Plan::Slow
    }

    fn run<'a>(&'a self, _: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.apply(op);
            Ok(())
        })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let place = Where::Data { child: SELF, at: Some(span.offset()), compressed: false };
        Box::pin(async move { Ok(Extent { len: span.len(), place }) })
    }

    fn event(&self, _: &Node, _: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        // The image's own file is locked by the one who is to make it.
        prepare_nothing(cx, change)
    }

    fn close<'a>(&'a self, _: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        self.description.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_sparse() {
        let mut c = Content::default();
        c.write(Span::new(4090, 10), &[7; 10]);
        c.resize(1 << 40);
        let mut out = [1; 12];
        c.read(Span::new(4089, 12), &mut out);
        assert_eq!(out, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        c.zero(Span::new(4092, 5));
        c.read(Span::new(4089, 12), &mut out);
        assert_eq!(out, [0, 7, 7, 0, 0, 0, 0, 0, 7, 7, 7, 0]);
        c.resize(4091);
        c.resize(8192);
        c.read(Span::new(4089, 12), &mut out);
        assert_eq!(out, [0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(c.pages.len(), 2);
    }
}
