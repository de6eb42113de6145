//! raw: the bytes of a file as they are, or a window of them.
//!
//! Without `offset` and `size` the node is a plain filter: same offsets, same size, every plan a pass-through.
//! With them it shows `size` bytes from `offset` on, and its child must not change its size.
//!
//! A node that was made by guessing (the file looked like no format) may be written by a guest, which could write
//! the magic of a format there; the next guess would then open files that the guest names. So such a node refuses
//! to store anything at its start that looks like a format.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use dolmen_graph::option::{Child, Size, Word};
use dolmen_graph::{
    AccessRule, BackingName, ChildSpec, Class, Common, CreateCx, Creation, Cx, Driver, DriverKind, Extent,
    Limits, Node, NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prealloc, Prepared, RAW_FORMAT,
    Request, Where,
};
use dolmen_rt::{IoVec, LocalFuture};
use dolmen_types::{BlkEvent, ChildRole, Error, ErrorKind, Options, Result, Span};

/// The registry row of raw.
pub static RAW: DriverKind = DriverKind {
    create_options: NewRawOptions::ROWS,
    // Anything is raw, but only when it is nothing else: the registry falls back to it.
    probe: Some(|_, _| 1),
    create: Some(create),
    ..DriverKind::new(
        RAW_FORMAT,
        Class::Format,
        "the bytes of a file, or a window of them",
        RawOptions::ROWS,
        parse,
    )
};

dolmen_graph::options! {
    struct RawOptions {
        required "file" file: Child => "the file";
        optional "offset" offset: Size => "first byte of the window (default 0)";
        optional "size" size: Size => "bytes of the window (default: to the end)";
    }
}

dolmen_graph::options! {
    struct NewRawOptions {
        required "size" size: Size => "size in bytes, rounded up to 512";
        default "preallocation" preallocation: Word<Space> = "off" =>
            "off, falloc (reserve space), full (write zeroes)";
    }
}

dolmen_graph::words! {
    enum Space { Off = "off", Falloc = "falloc", Full = "full" }
}

/// Bytes at the start of a disk that probing looks at.
const PROBED: u64 = 512;

/// Magic numbers of image formats: offset in the first sector, bytes. Wider than what this program can open:
/// other programs guess too.
const MAGICS: &[(usize, &[u8])] = &[
    (0, b"QFI\xfb"),
    (0, b"QED\0"),
    (0, b"KDMV"),
    (0, b"COWD"),
    (0, b"# Disk DescriptorFile"),
    (0, b"vhdxfile"),
    (0, b"conectix"),
    (0, b"WithoutFreeSpace"),
    (0, b"WithouFreSpacExt"),
    (0, b"LUKS\xba\xbe"),
    (0, b"Bochs Virtual HD Image"),
    (0, b"#!/bin/sh\n#V2.0 Format\n"),
    (0x40, b"\x7f\x10\xda\xbe"),
];

fn looks_like_a_format(sector: &[u8]) -> bool {
    MAGICS.iter().any(|(at, magic)| sector.get(*at..at + magic.len()) == Some(*magic))
}

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let RawOptions { file, offset, size } = RawOptions::take(options)?;
    let probed = options.take_bool("x-probed")?.unwrap_or(false);
    let window = offset.is_some() || size.is_some();
    let open = Open { offset: offset.unwrap_or(0), size, window, probed };
    Ok(Parsed {
        children: vec![ChildSpec {
            name: "file",
            role: if window { ChildRole::Data } else { ChildRole::Filtered },
            def: file,
        }],
        rule: rule(window, probed),
        relies_down_to: None,
        open: Box::new(open),
    })
}

/// Without a window it is in nobody's way; but writes to the start of a guessed image are
/// looked at.
fn rule(window: bool, probed: bool) -> AccessRule {
    match (window, probed) {
        (true, _) => AccessRule::WINDOW,
        (false, true) => AccessRule::FILTER,
        (false, false) => AccessRule::TRANSPARENT,
    }
}

struct Open {
    offset: u64,
    size: Option<u64>,
    window: bool,
    probed: bool,
}

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let have = cx.child("file")?.node.size();
            let mut len = 0;
            if self.window {
                let Some(rest) = have.checked_sub(self.offset) else {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("offset {} lies beyond the end of the file ({have} bytes)", self.offset),
                    ));
                };
                len = self.size.unwrap_or(rest);
                if len > rest {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!(
                            "offset {} and size {len} do not fit in the file ({have} bytes)",
                            self.offset
                        ),
                    )
                    .remedy("give a smaller size, or grow the file first"));
                }
            }
            let driver = Raw {
                offset: self.offset,
                len: self.window.then(|| AtomicU64::new(len)),
                fixed: self.size.is_some(),
                probed: self.probed,
            };
            Ok(Opened::of(Arc::new(driver)))
        })
    }
}

/// A raw image to be made: a file of its size.
struct NewRaw {
    size: u64,
    prealloc: Prealloc,
}

fn create(mut options: Options) -> Result<Box<dyn Creation>> {
    if !options.has("size") {
        return Err(Error::new(ErrorKind::InvalidInput, "Image creation needs a size parameter"));
    }
    let NewRawOptions { size, preallocation } = NewRawOptions::take(&mut options)?;
    let prealloc = match preallocation {
        Space::Off => Prealloc::Off,
        Space::Falloc => Prealloc::Falloc,
        Space::Full => Prealloc::Full,
    };
    options.finish("format 'raw'")?;
    let size = size
        .checked_next_multiple_of(512)
        .filter(|s| *s <= Span::MAX_END)
        .ok_or_else(|| Error::new(ErrorKind::Limit, "the size is too large"))?;
    Ok(Box::new(NewRaw { size, prealloc }))
}

impl Creation for NewRaw {
    fn room(&self) -> u64 {
        self.size
    }

    fn space(&self) -> u64 {
        if self.prealloc == Prealloc::Off { 0 } else { self.size }
    }

    fn backing(&self) -> Option<BackingName<'_>> {
        None
    }

    fn make<'a>(&'a self, cx: CreateCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if cx.fixed {
                return Ok(());
            }
            cx.resize()?.resize(self.size, self.prealloc).await
        })
    }
}

/// The driver of a raw node.
struct Raw {
    offset: u64,
    /// Bytes of the window; `None` for a plain filter.
    len: Option<AtomicU64>,
    /// The size was given.
    fixed: bool,
    probed: bool,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Raw(offset {})", self.offset)
    }
}

impl Raw {
    /// The size that the child gets for this one to have `size` bytes.
    fn size_below(&self, size: u64) -> Result<u64> {
        if self.len.is_none() {
            return Ok(size);
        }
        if self.fixed {
            return Err(Error::new(ErrorKind::Unsupported, "Cannot resize fixed-size raw disks")
                .remedy("open it without the option 'size'"));
        }
        size.checked_add(self.offset)
            .filter(|s| *s <= Span::MAX_END)
            .ok_or_else(|| Error::new(ErrorKind::Limit, format!("the image can't have {size} bytes")))
    }

    fn below(&self, span: Span) -> Span {
        Span::new(span.offset() + self.offset, span.len())
    }

    /// Fails when a write would make the start of the disk look like an image format.
    async fn check_start(&self, cx: Cx<'_>, span: Span, from: &IoVec) -> Result<()> {
        let mut sector = vec![0u8; PROBED.min(cx.node.size()) as usize];
        let Some(hit) = span.intersect(Span::new(0, sector.len() as u64)) else { return Ok(()) };
        if hit.len() < sector.len() as u64 {
            let io = cx
                .read(0)
                .map_err(|e| e.context("a guessed raw image reads its start before changing it"))?;
            io.read_bytes(self.offset, &mut sector).await?;
        }
        let at = hit.offset() as usize;
        from.slice(0, hit.len() as usize).copy_to_slice(0, &mut sector[at..at + hit.len() as usize]);
        if looks_like_a_format(&sector) {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "node '{}': the format of this image was guessed as raw, and this write would make it look \
                     like another one",
                    cx.node.name
                ),
            )
            .remedy("open the image with driver=raw"));
        }
        Ok(())
    }
}

impl Driver for Raw {
    fn kind(&self) -> &'static DriverKind {
        &RAW
    }

    dolmen_graph::pass_through! { 0: event, close, image, describe }

    fn size(&self, node: &Node) -> u64 {
        match &self.len {
            None => node.children[0].node.size(),
            Some(len) => len.load(SeqCst),
        }
    }

    fn limits(&self, node: &Node) -> Limits {
        let file = &node.children[0].node;
        let mut limits = file.driver.limits(file);
        if limits.cluster_size > 0 {
            let cluster = u64::from(limits.cluster_size);
            let start = u64::from(limits.cluster_start) + cluster - self.offset % cluster;
            limits.cluster_start = u32::try_from(start % cluster).expect("less than a cluster");
        }
        limits
    }

    fn access_rule(&self) -> AccessRule {
        rule(self.len.is_some(), self.probed)
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Read(_) | Request::Write(_) if node.children[0].node.hears_events() => Plan::Slow,
            Request::Write(_) if self.probed && span.offset() < PROBED => Plan::Slow,
            Request::Resize if self.len.is_some() => Plan::Slow,
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Flush
            | Request::Resize => Plan::pass(request, self.below(span)),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            match op {
                Op::Read { span, to, flags } => {
                    self.event(cx.node, BlkEvent::ReadAio)?;
                    cx.forward(0, Op::Read { span: self.below(span), to, flags }).await
                }
                Op::Write { span, from, flags } => {
                    if self.probed {
                        self.check_start(cx, span, from).await?;
                    }
                    self.event(cx.node, BlkEvent::WriteAio)?;
                    cx.forward(0, Op::Write { span: self.below(span), from, flags }).await
                }
                Op::WriteZeroes { span, flags } => {
                    cx.forward(0, Op::WriteZeroes { span: self.below(span), flags }).await
                }
                Op::Discard { span, flags } => {
                    cx.forward(0, Op::Discard { span: self.below(span), flags }).await
                }
                Op::Flush => cx.forward(0, Op::Flush).await,
                Op::Resize { size, prealloc } => {
                    cx.forward(0, Op::Resize { size: self.size_below(size)?, prealloc }).await?;
                    if let Some(len) = &self.len {
                        len.store(size, SeqCst);
                    }
                    Ok(())
                }
            }
        })
    }

    fn status<'a>(&'a self, _cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        let place = Where::Through { child: 0, at: span.offset() + self.offset };
        Box::pin(async move { Ok(Extent { len: span.len(), place }) })
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            match *change {
                NodeChange::Resize { size } => {
                    let below = NodeChange::Resize { size: self.size_below(size)? };
                    dolmen_graph::prepare_child(cx, 0, &below).await
                }
                NodeChange::Access { .. } | NodeChange::Backing(_) => {
                    dolmen_graph::prepare_nothing(cx, change).await
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_found_where_they_are() {
        let mut s = vec![0u8; 512];
        assert!(!looks_like_a_format(&s));
        s[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert!(looks_like_a_format(&s));
        assert!(looks_like_a_format(b"QFI\xfb"));
        assert!(!looks_like_a_format(b"QFI"));
    }
}
