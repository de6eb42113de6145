//! What a driver is to the graph, and the words they speak.

use std::fmt;

use dolmen_rt::{IoVec, LocalFuture};
use dolmen_types::{Actions, BlkEvent, Error, ErrorKind, OpKind, ReadFlags, Result, Span, Value, WriteFlags};

use crate::{AccessRule, Cx, DriverKind, Node};

/// A request without its data: what [`Driver::plan`] has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// See [`OpKind::Read`].
    Read(ReadFlags),
    /// See [`OpKind::Write`].
    Write(WriteFlags),
    /// See [`OpKind::WriteZeroes`].
    WriteZeroes(WriteFlags),
    /// See [`OpKind::Discard`].
    Discard(WriteFlags),
    /// See [`OpKind::Flush`].
    Flush,
    /// See [`OpKind::Resize`].
    Resize,
}

impl Request {
    /// The kind.
    pub const fn kind(self) -> OpKind {
        match self {
            Request::Read(_) => OpKind::Read,
            Request::Write(_) => OpKind::Write,
            Request::WriteZeroes(_) => OpKind::WriteZeroes,
            Request::Discard(_) => OpKind::Discard,
            Request::Flush => OpKind::Flush,
            Request::Resize => OpKind::Resize,
        }
    }
}

/// How much of a new area is given space when a node grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prealloc {
    /// None.
    #[default]
    Off,
    /// The format's mapping only.
    Metadata,
    /// Reserved by the file system, not written.
    Falloc,
    /// Written with zeroes.
    Full,
}

/// A request with its data. Spans are in bytes of the node that gets it, and within its
/// size except where a driver says otherwise.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Fill `to` with the data of `span`.
    Read {
        /// Where.
        span: Span,
        /// As long as the span.
        to: &'a IoVec,
        /// Flags.
        flags: ReadFlags,
    },
    /// Store `from` at `span`.
    Write {
        /// Where.
        span: Span,
        /// As long as the span.
        from: &'a IoVec,
        /// Flags.
        flags: WriteFlags,
    },
    /// Make `span` read as zeroes.
    WriteZeroes {
        /// Where.
        span: Span,
        /// Flags.
        flags: WriteFlags,
    },
    /// Give `span`'s space back. Drivers may skip parts they can't discard.
    Discard {
        /// Where.
        span: Span,
        /// Flags.
        flags: WriteFlags,
    },
    /// Make everything acknowledged so far durable.
    Flush,
    /// Change the size to `size` bytes. New bytes read as zeroes.
    Resize {
        /// The new size in bytes.
        size: u64,
        /// Space for the new area.
        prealloc: Prealloc,
    },
}

impl Op<'_> {
    /// The kind.
    pub const fn kind(&self) -> OpKind {
        self.request().kind()
    }

    /// The request without its data.
    pub const fn request(&self) -> Request {
        match self {
            Op::Read { flags, .. } => Request::Read(*flags),
            Op::Write { flags, .. } => Request::Write(*flags),
            Op::WriteZeroes { flags, .. } => Request::WriteZeroes(*flags),
            Op::Discard { flags, .. } => Request::Discard(*flags),
            Op::Flush => Request::Flush,
            Op::Resize { .. } => Request::Resize,
        }
    }

    /// Where; `None` for what is about the whole node.
    pub(crate) const fn span(&self) -> Option<Span> {
        match self {
            Op::Read { span, .. }
            | Op::Write { span, .. }
            | Op::WriteZeroes { span, .. }
            | Op::Discard { span, .. } => Some(*span),
            Op::Flush | Op::Resize { .. } => None,
        }
    }
}

/// A driver's answer from memory to "what becomes of this range?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The first `len` bytes are the business of a child, as `request`, at its offset
    /// `at`. For [`Request::Flush`] and [`Request::Resize`], `at` and `len` are ignored.
    Forward {
        /// Index of the child.
        child: u8,
        /// Offset in the child, in bytes.
        at: u64,
        /// How many bytes from the start of the span; at least 1 unless the span is empty.
        len: u64,
        /// The request as the child gets it; flags may be added, the kind stays.
        request: Request,
    },
    /// The first `len` bytes read as zeroes (only for reads).
    Zeroes {
        /// How many bytes from the start of the span.
        len: u64,
    },
    /// The first `len` bytes are done: nothing has to be moved.
    Done {
        /// How many bytes from the start of the span.
        len: u64,
    },
    /// [`Driver::run`] has to do it. Always a right answer; must be given whenever the
    /// driver would have to wait, allocate space, or is inside a conflicting request.
    Slow,
}

impl Plan {
    /// How many bytes of the span that was asked about the plan covers.
    pub const fn covers(self, span: Span) -> u64 {
        match self {
            Plan::Forward { len, .. } | Plan::Zeroes { len } | Plan::Done { len } => {
                if len < span.len() {
                    len
                } else {
                    span.len()
                }
            }
            Plan::Slow => span.len(),
        }
    }

    /// Everything goes to the only child unchanged: the plan of a plain filter.
    pub const fn pass(request: Request, span: Span) -> Plan {
        Plan::Forward { child: 0, at: span.offset(), len: span.len(), request }
    }
}

/// The limits of a node, in bytes. Zero means "no limit" for maxima.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of requests should be multiples of this; unaligned ones work
    /// but are slower. A power of two.
    pub request_alignment: u32,
    /// Largest read or write.
    pub max_transfer: u32,
    /// Preferred multiple for zero writes and discards; 0 if there is none.
    pub opt_discard: u32,
    /// Granularity in which the node allocates (cluster, or subcluster); 0 if it has none.
    pub cluster_size: u32,
    /// Where the first cluster of the node begins: not at 0 behind a window on another node.
    pub cluster_start: u32,
    /// Zero writes can be done without writing buffers of zeroes.
    pub fast_zeroes: bool,
    /// Discards give space back.
    pub discards: bool,
}

impl Limits {
    /// Byte-granular, no maxima.
    pub const BYTES: Limits = Limits {
        request_alignment: 1,
        max_transfer: 0,
        opt_discard: 0,
        cluster_size: 0,
        cluster_start: 0,
        fast_zeroes: false,
        discards: false,
    };

    /// The first piece of a request that has to be split into pieces of at most `max` bytes, multiples of `align`.
    ///
    /// A node zeroes and discards whole clusters; of one that a request covers in two pieces nothing comes back. So
    /// pieces end where the node's preferred multiple does, or else a cluster, if that is possible within `max`. The
    /// clusters that the pieces cover are then those that the whole request covers.
    #[must_use]
    pub fn split(&self, span: Span, max: u64, align: u64) -> Span {
        if span.len() <= max {
            return span;
        }
        let (cluster, start) = (u64::from(self.cluster_size.max(1)), u64::from(self.cluster_start));
        let within = align.max(self.request_alignment.into());
        let unit = lcm(cluster, within);
        let preferred = if start == 0 { lcm(unit, self.opt_discard.max(1).into()) } else { unit };
        for (unit, start) in [(preferred, start), (unit, start), (cluster, start), (within, 0)] {
            // How far the last boundary before the largest possible end lies before that end.
            let past = (span.offset() + max + unit - start % unit) % unit;
            if past < max && (span.offset() + max - past).is_multiple_of(align) {
                return span.prefix(max - past);
            }
        }
        span.prefix(max)
    }
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// [`Where::Data`]'s child index for "in this node itself" (leaf drivers).
pub const SELF: u8 = u8::MAX;

/// Where a range lives, from the view of one node only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many bytes from the start of the asked span the answer holds for; at least 1.
    pub len: u64,
    /// Where they live.
    pub place: Where,
}

/// See [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// The child's answer counts as the node's own (filters, `raw`).
    Through {
        /// Index of the child.
        child: u8,
        /// Offset in the child.
        at: u64,
    },
    /// Allocated by this node.
    Data {
        /// Child that holds the bytes, or [`SELF`].
        child: u8,
        /// Where in that child, if it can be said (not for compressed data).
        at: Option<u64>,
        /// Stored compressed.
        compressed: bool,
    },
    /// This node says that the range reads as zeroes.
    Zero {
        /// Space that is kept for it, if any: child (or [`SELF`]) and offset.
        at: Option<(u8, u64)>,
    },
    /// Not in this node: it reads from the backing child, or as zeroes without one.
    Unallocated,
}

/// What a driver tells about itself for `info` and query commands. All from memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Description {
    /// File name or URL of a leaf; of a format, nothing.
    pub filename: Option<String>,
    /// Which file of this host a leaf has open: see [`FileId`](crate::FileId).
    pub file: Option<crate::FileId>,
    /// A leaf that asked for `auto-read-only` could only be opened for reading.
    pub read_only: bool,
    /// Bytes of disk space used, where known. Where another host has to be asked, it is what that one said last.
    pub actual_size: Option<u64>,
    /// Cluster size of a format.
    pub cluster_size: Option<u64>,
    /// The image is encrypted.
    pub encrypted: bool,
    /// The image may hold compressed data.
    pub compressed: bool,
    /// The image was not closed cleanly.
    pub dirty: bool,
    /// The image is marked corrupt.
    pub corrupt: bool,
    /// Backing file as named in the image: name, format.
    pub backing: Option<(String, Option<String>)>,
    /// The `format-specific` object (with its `type` and `data`).
    pub format_specific: Option<Value>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Id, unique in the image.
    pub id: String,
    /// Name.
    pub name: String,
    /// Size of the saved VM state in bytes.
    pub vm_state_size: u64,
    /// Creation date, seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds part.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count, if recorded.
    pub icount: Option<u64>,
}

/// The backing file as it is written into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingName<'a> {
    /// File name, URL or `json:` text; relative to the image's directory.
    pub name: &'a str,
    /// Its format; `None` leaves it to be guessed.
    pub format: Option<&'a str>,
}

/// What drivers of images can do with an image besides serving requests: a facet of [`Driver`].
pub trait ImageOps {
    /// Makes the image name another backing file, or none, without touching any data. The
    /// data in memory are written out first; durable when it returns. The node's links
    /// stay as they are.
    ///
    /// Fails with `InvalidInput` or `NoSpace` for a name that does not fit into the header; the old
    /// name then still stands. Not to be cancelled.
    fn set_backing<'a>(&'a self, cx: Cx<'a>, to: Option<BackingName<'a>>) -> LocalFuture<'a, Result<()>>;
}

/// Makes the image of a node name another backing file: see [`ImageOps::set_backing`].
///
/// # Errors
/// As there; `Unsupported` if the driver has no such images.
pub async fn set_backing(cx: Cx<'_>, to: Option<BackingName<'_>>) -> Result<()> {
    match cx.node.driver.image() {
        Some(image) => image.set_backing(cx, to).await,
        None => Err(no_backing(cx.node)),
    }
}

fn no_backing(node: &Node) -> Error {
    let (name, kind) = (&node.name, node.driver.kind().name);
    Error::new(
        ErrorKind::Unsupported,
        format!("node '{name}' has driver '{kind}', whose images name no backing file"),
    )
}

/// A change that a driver has to prepare for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeChange {
    /// What all parents together need of this node, and allow others to do, becomes
    /// this. Leaf drivers take locks: tighten now, loosen in [`Prepared::commit`].
    Access {
        /// D, V, M, S.
        needs: Actions,
        /// D, V, M, S.
        allows: Actions,
    },
    /// An [`Op::Resize`] follows, without preallocation. What can be said against it without touching anything is said
    /// now, in the words in which [`Driver::run`] says it.
    Resize {
        /// The new size in bytes.
        size: u64,
    },
    /// [`ImageOps::set_backing`] follows, with this name and format. The same goes for it.
    Backing(Option<(String, Option<String>)>),
}

/// [`Driver::prepare`] of a leaf that holds nothing and gets any size.
pub fn prepare_nothing<'a>(cx: Cx<'a>, change: &'a NodeChange) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
    Box::pin(async move {
        match change {
            NodeChange::Access { .. } | NodeChange::Resize { .. } => {}
            NodeChange::Backing(_) => return Err(no_backing(cx.node)),
        }
        Ok(Box::new(()) as Box<dyn Prepared>)
    })
}

/// [`Driver::prepare`] of a filter that holds nothing and has its child resized as it is itself.
pub fn prepare_child<'a>(
    cx: Cx<'a>,
    child: usize,
    change: &'a NodeChange,
) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
    match (change, cx.node.children.get(child)) {
        (NodeChange::Resize { .. }, Some(below)) => {
            below.node.driver.prepare(Cx { node: &below.node, rt: cx.rt }, change)
        }
        _ => prepare_nothing(cx, change),
    }
}

/// Something prepared. Dropping it undoes it.
#[must_use = "dropping a preparation aborts it"]
pub trait Prepared {
    /// Makes it effective. Cannot fail.
    fn commit(self: Box<Self>);
}

/// A preparation that has nothing to do.
impl Prepared for () {
    fn commit(self: Box<Self>) {}
}

/// Class of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A leaf: talks to something outside the graph.
    Protocol,
    /// An image format.
    Format,
    /// Passes its child's data on.
    Filter,
}

/// A node's driver. Shared by all cores; each of its futures stays on one core.
///
/// There are no default methods: whoever adds a method has to think about every driver.
/// Metadata locks inside a driver are never held across an await.
pub trait Driver: fmt::Debug + std::any::Any + Send + Sync + 'static {
    /// Its registry row.
    fn kind(&self) -> &'static DriverKind;
    /// Size in bytes. Filters ask their child (through `node`). Where it is no multiple of 512, requests may reach to the
    /// end of the last sector ([`Node::size`]): what lies beyond the size reads as zeroes.
    fn size(&self, node: &Node) -> u64;
    /// Limits of the node.
    fn limits(&self, node: &Node) -> Limits;
    /// The edge rule as it is now.
    fn access_rule(&self) -> AccessRule;
    /// What becomes of `span`: from memory only, never waits, allocates nothing.
    ///
    /// A `Forward` answer is a lease: see [`Epochs`](crate::Epochs). The caller has
    /// taken it before the call if the kind says `maps`.
    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan;
    /// Does a request that `plan` called slow. Dropping the future cancels: what was
    /// submitted may still happen, nothing else of the node is harmed.
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>>;
    /// Where the start of `span` lives.
    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>>;
    /// A parent has come to `event`. Filters pass it to their child, `blkdebug` acts
    /// on it, others do nothing.
    fn event(&self, node: &Node, event: BlkEvent) -> Result<()>;
    /// Prepares for a change, without anything that would need undoing by hand.
    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>>;
    /// Writes out what is in memory, on a clean end, with no request in flight. The node is
    /// gone afterwards even if it fails; but a format is also closed when its node is about to
    /// be reopened, and goes on as before if that comes to nothing.
    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>>;
    /// What it can do with an image, if it has one. A new facet concerns every driver once, a new method of a
    /// facet only those that have it.
    fn image(&self) -> Option<&dyn ImageOps>;
    /// What it can tell about itself.
    fn describe(&self, node: &Node) -> Description;
}

/// Methods of [`Driver`] that a filter has its child answer, one by one: `pass_through! { FILE: size, limits, event }`
/// with the index of the child. What is not listed, the filter says itself.
///
/// - `size`, `limits`: the child's.
/// - `status`: it is the child's business, at the same place.
/// - `event`: passed on.
/// - `prepare`: a change of size is the child's as well; other changes need nothing.
/// - `close`: nothing is held.
/// - `image`: it has none of its own.
/// - `describe`: nothing to say.
#[macro_export]
macro_rules! pass_through {
    ($child:tt : $($method:ident),+ $(,)?) => { $($crate::pass_through!(@$method $child);)+ };
    (@size $child:tt) => {
        fn size(&self, node: &$crate::Node) -> u64 {
            node.children[$child].node.size()
        }
    };
    (@limits $child:tt) => {
        fn limits(&self, node: &$crate::Node) -> $crate::Limits {
            let child = &node.children[$child].node;
            child.driver.limits(child)
        }
    };
    (@status $child:tt) => {
        fn status<'a>(
            &'a self,
            _: $crate::Cx<'a>,
            span: $crate::types::Span,
        ) -> $crate::types::LocalFuture<'a, $crate::types::Result<$crate::Extent>> {
            let place = $crate::Where::Through { child: $child as u8, at: span.offset() };
            Box::pin(async move { Ok($crate::Extent { len: span.len(), place }) })
        }
    };
    (@event $child:tt) => {
        fn event(&self, node: &$crate::Node, event: $crate::types::BlkEvent) -> $crate::types::Result<()> {
            let child = &node.children[$child].node;
            child.driver.event(child, event)
        }
    };
    (@prepare $child:tt) => {
        fn prepare<'a>(
            &'a self,
            cx: $crate::Cx<'a>,
            change: &'a $crate::NodeChange,
        ) -> $crate::types::LocalFuture<'a, $crate::types::Result<Box<dyn $crate::Prepared>>> {
            $crate::prepare_child(cx, $child, change)
        }
    };
    (@close $child:tt) => {
        fn close<'a>(
            &'a self,
            _: $crate::Cx<'a>,
        ) -> $crate::types::LocalFuture<'a, $crate::types::Result<()>> {
            Box::pin(async { Ok(()) })
        }
    };
    (@image $child:tt) => {
        fn image(&self) -> Option<&dyn $crate::ImageOps> {
            None
        }
    };
    (@describe $child:tt) => {
        fn describe(&self, _: &$crate::Node) -> $crate::Description {
            $crate::Description::default()
        }
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The clusters that lie in a span as a whole.
    fn whole(limits: &Limits, span: Span) -> Vec<u64> {
        let (cluster, start) = (u64::from(limits.cluster_size), u64::from(limits.cluster_start));
        let first = (span.offset() + cluster - start).div_ceil(cluster);
        let end = (span.end() + cluster - start) / cluster;
        (first..end.max(first)).collect()
    }

    proptest! {
        /// The story: a discard of 40 MiB from byte 1 on, through a node that takes 15 MiB at once, left the clusters at
        /// 15 and at 30 MiB, of which each piece covered a part only.
        #[test]
        fn pieces_cover_the_clusters_that_the_request_covers(
            cluster_bits in 9u32..=21,
            starts_at in 0u32..4096,
            align_bits in 0u32..=12,
            opt in 0u32..40,
            clusters_at_once in 1u64..40,
            more in 0u64..(1 << 21),
            offset in 0u64..(1 << 30),
            len in 1u64..(1 << 28),
        ) {
            let (cluster, align) = (1u64 << cluster_bits, 1u64 << align_bits);
            let limits = Limits {
                cluster_size: cluster as u32,
                // Blocks of somebody between that don't fit the clusters leave no whole ones.
                cluster_start: starts_at.wrapping_mul(align as u32) % cluster as u32 / align.min(cluster) as u32
                    * align.min(cluster) as u32,
                opt_discard: opt << 16,
                ..Limits::BYTES
            };
            prop_assume!(align <= cluster);
            let max = (cluster * clusters_at_once + more) / align * align;
            let span = Span::new(offset / align * align, len.next_multiple_of(align));
            let (mut rest, mut covered) = (span, Vec::new());
            while !rest.is_empty() {
                let piece = limits.split(rest, max, align);
                prop_assert!(!piece.is_empty() && piece.len() <= max);
                prop_assert!(piece.end() == span.end() || piece.end().is_multiple_of(align));
                covered.extend(whole(&limits, piece));
                rest = rest.skip(piece.len());
            }
            prop_assert_eq!(covered, whole(&limits, span));
        }
    }
}
