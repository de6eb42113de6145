//! `preallocate`: a file that grows gets more space than it was asked for, so that it grows seldom and in large pieces.
//!
//! It belongs between a format and its file. When the node grows, the file is reserved up to the new size and
//! `prealloc-size` bytes more, rounded up to `prealloc-align`; the node has the size that was asked for. Growing into
//! what is reserved already costs nothing. The surplus was never written, so it reads as zeroes when it becomes part of
//! the node. A file system that can't reserve, or is too full for it, gets no surplus.
//!
//! The surplus is cut off when the node shrinks, is closed, or is reopened (read-only, say). A process that is killed
//! leaves it: a format does not mind that its file is longer, but without one the image is.
//!
//! A node that is open for writing relies on the end of its file, so no one else may write or resize that
//! ([`RoleRule::denies_if_writable`]), and the node needs to resize it even if its parents don't, to cut it in the end.
//!
//! A size change with a preallocation of its own is done as it is asked for, without surplus.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use dolmen_graph::option::{Child, Size};
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Driver, DriverKind, Node, NodeState, Op, OpenCx, Opened,
    Opener, Parsed, Plan, Prealloc, RangeLock, Request, RoleRule, RuleTable, content,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{Actions, ChildRole, Error, ErrorKind, Options, Result, Span};

/// Registry row.
pub static PREALLOCATE: DriverKind = DriverKind {
    closes_before_reopen: true,
    ..DriverKind::new(
        "preallocate",
        Class::Filter,
        "reserves space for a growing file in large pieces",
        PreallocateOptions::ROWS,
        parse,
    )
};

dolmen_graph::options! {
    struct PreallocateOptions {
        required "file" file: Child => "the file that grows";
        default "prealloc-align" align: Size = "1M" => "the file's length becomes a multiple of this, in bytes";
        default "prealloc-size" size: Size = "128M" => "how much is reserved beyond the end, in bytes";
    }
}

const FILE: usize = 0;

const CHANGES: Actions = Actions::V.with(Actions::S);

static RULE: RuleTable = RuleTable::one(RoleRule {
    needs_if: [Actions::V.with(Actions::M), CHANGES],
    needs_if_writable: CHANGES,
    denies_if_writable: CHANGES,
    sees_all_writes: true,
    why: "keeps space in reserve behind its end",
    ..RoleRule::THROUGH
});

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    let PreallocateOptions { file, align, size } = PreallocateOptions::take(options)?;
    if align == 0 || !align.is_multiple_of(512) || align > Span::MAX_END || size > Span::MAX_END {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("prealloc-align={align} and prealloc-size={size} make no sense"),
        )
        .remedy("prealloc-align is a multiple of 512, and neither is larger than an image can be"));
    }
    Ok(Parsed {
        // The file holds more than the node shows, so claims on what the node shows end at the node.
        children: vec![ChildSpec { name: "file", role: ChildRole::Metadata, def: file }],
        rule: AccessRule::of(&RULE),
        relies_down_to: None,
        open: Box::new(Open { align, size }),
    })
}

struct Open {
    align: u64,
    size: u64,
}

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let file = &cx.child("file")?.node;
            // The one that is replaced may still be growing the file, and cuts its surplus before this one serves.
            let data = content(file).state.clone();
            let end = match cx.replaced::<Preallocate>() {
                // Of another file it knows nothing.
                Some(old) if old.tracks && Arc::ptr_eq(&old.data, &data) => old.end.clone(),
                _ => Arc::new(AtomicU64::new(file.driver.size(file))),
            };
            let tracks = !cx.common.flags.read_only && !cx.common.flags.inactive;
            let driver = Preallocate {
                align: self.align,
                extra: self.size,
                tracks,
                reserved: AtomicU64::new(0),
                surplus: AtomicBool::new(false),
                end,
                data,
                resizing: RangeLock::new(),
            };
            Ok(Opened::of(Arc::new(driver)))
        })
    }
}

#[derive(Debug)]
struct Preallocate {
    align: u64,
    extra: u64,
    /// The node is writable, so that the end of the file is its own business.
    tracks: bool,
    /// The node's size. Shared with the driver that takes this one's place.
    end: Arc<AtomicU64>,
    /// What the end is that of: the node that holds the data, below filters.
    data: Arc<NodeState>,
    /// Up to here the file reads as zeroes behind the node's end, for certain.
    reserved: AtomicU64,
    /// The file may be longer than the node.
    surplus: AtomicBool,
    /// One change of the size at a time.
    resizing: RangeLock,
}

impl Preallocate {
    async fn resize(&self, cx: Cx<'_>, size: u64, prealloc: Prealloc) -> Result<()> {
        let _resizing = self.resizing.lock(Span::new(0, 1)).await;
        let end = self.end.load(SeqCst);
        if prealloc == Prealloc::Off && size > end {
            if size > self.reserved.load(SeqCst) {
                self.grow(cx, size).await?;
            }
        } else {
            if size > end {
                self.cut(cx).await?;
            }
            self.reserved.store(0, SeqCst);
            cx.forward(FILE, Op::Resize { size, prealloc }).await?;
            self.surplus.store(false, SeqCst);
        }
        self.end.store(size, SeqCst);
        Ok(())
    }

    /// Makes the file longer than `size`, or as long if there is no space for more.
    async fn grow(&self, cx: Cx<'_>, size: u64) -> Result<()> {
        let wanted = size.checked_add(self.extra).and_then(|s| s.checked_next_multiple_of(self.align));
        if let Some(wanted) = wanted.filter(|w| *w <= Span::MAX_END) {
            // Whatever comes of it, also when nobody waits for it any more.
            self.surplus.store(true, SeqCst);
            let grown = cx.forward(FILE, Op::Resize { size: wanted, prealloc: Prealloc::Falloc }).await;
            if grown.is_ok() {
                self.reserved.store(wanted, SeqCst);
                return Ok(());
            }
        }
        self.reserved.store(0, SeqCst);
        cx.forward(FILE, Op::Resize { size, prealloc: Prealloc::Off }).await?;
        self.surplus.store(false, SeqCst);
        Ok(())
    }

    /// Cuts off what lies behind the node's end.
    async fn cut(&self, cx: Cx<'_>) -> Result<()> {
        if !self.surplus.load(SeqCst) {
            return Ok(());
        }
        self.reserved.store(0, SeqCst);
        let size = self.end.load(SeqCst);
        cx.forward(FILE, Op::Resize { size, prealloc: Prealloc::Off }).await?;
        self.surplus.store(false, SeqCst);
        Ok(())
    }
}

impl Driver for Preallocate {
    fn kind(&self) -> &'static DriverKind {
        &PREALLOCATE
    }

    dolmen_graph::pass_through! { FILE: limits, status, event, prepare, image, describe }

    fn size(&self, node: &Node) -> u64 {
        match self.tracks {
            true => self.end.load(SeqCst),
            false => {
                let file = &node.children[FILE].node;
                file.driver.size(file)
            }
        }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::of(&RULE)
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Resize => Plan::Slow,
            Request::Read(_)
            | Request::Write(_)
            | Request::WriteZeroes(_)
            | Request::Discard(_)
            | Request::Flush => Plan::pass(request, span),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            match op {
                Op::Resize { size, prealloc } => self.resize(cx, size, prealloc).await,
                Op::Read { .. }
                | Op::Write { .. }
                | Op::WriteZeroes { .. }
                | Op::Discard { .. }
                | Op::Flush => cx.forward(FILE, op).await,
            }
        })
    }

    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let _resizing = self.resizing.lock(Span::new(0, 1)).await;
            self.cut(cx).await
        })
    }
}
