//! The driver: plans from memory, and what its node says about itself.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use dolmen_graph::{
    AccessRule, BackingName, Cx, Description, Driver, DriverKind, Extent, ImageOps, Io, Limits, Node,
    NodeChange, Op, Plan, Prepared, RangeLock, Read, Repair, Request, SnapshotInfo, Where,
};
use dolmen_rt::{Buffers, LocalFuture};
use dolmen_types::{BlkEvent, ChildRole, Error, ErrorKind, ReadFlags, Result, Span, Value, WriteFlags};
use event_listener::Event;

use super::bitmap::BitmapEntry;
use super::check::{check_recount, recount};
use super::cut_off;
use super::header::{COMPAT_LAZY_REFCOUNTS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, INCOMPAT_EXTENDED_L2};
use super::image::{self, Env, File, in_file};
use super::layout::Geometry;
use super::meta::{Meta, Own, Place, Run, Try};

/// The repair of an image that is to be written and was not closed by who wrote it last.
pub(super) struct Recount {
    pub core: Arc<Core>,
}

impl Repair for Recount {
    fn repair<'a>(self: Box<Self>, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = File::new(&cx.node.children[0], cx.rt);
            let io = file.read()?;
            recount(io, file.write()?, file.resize()?).await?;
            let (header, sector) = image::load_header(io).await?;
            let ready = header.autoclear == 0;
            let (meta, _) = load(io, header, sector, true).await?;
            *self.core.meta() = meta;
            self.core.write_ready.store(ready, SeqCst);
            Ok(())
        })
    }
}

/// Other options of an image that stays open.
pub(super) struct Reopened {
    pub core: Arc<Core>,
    pub writable: bool,
    pub pass_discard: bool,
}

impl Prepared for Reopened {
    fn commit(self: Box<Self>) {
        self.core.writable.store(self.writable, SeqCst);
        self.core.pass_discard.store(self.pass_discard, SeqCst);
    }
}

/// Bytes that a copy from a backing file moves at a time: as much as stays in a processor's cache between reading
/// and writing. A larger cluster goes at once.
const COPY_STEP: u64 = 512 << 10;

/// Buffers for copies that stay allocated.
const COPIES_KEPT: usize = 4;

/// The state of an open image.
pub(super) struct Core {
    /// Protects all metadata in memory. Never held across an await.
    meta: Mutex<Meta>,
    /// Virtual size in bytes.
    pub size: AtomicU64,
    /// Numbers that never change, at hand without the lock.
    pub(super) geo: Geometry,
    /// Opened for writing.
    pub writable: AtomicBool,
    /// Autoclear bits of features that Dolmen does not keep up have been cleared on disk.
    pub write_ready: AtomicBool,
    /// Discard freed clusters in the file.
    pass_discard: AtomicBool,
    /// Guest ranges of requests that change mappings. Waited for asynchronously.
    pub ranges: RangeLock,
    /// One round at a time, and the header belongs to who holds it.
    pub rounds: RangeLock,
    /// Tables being loaded, by host offset: nobody loads what another one is loading.
    pub loads: RangeLock,
    /// Growing the file.
    pub growing: RangeLock,
    /// Reserving space for refcount blocks.
    pub counting: RangeLock,
    /// The file was made longer than its clusters need, to be cut on close.
    pub grown: AtomicBool,
    /// The disk has become smaller, so the end of the file may be unused.
    pub shrunk: AtomicBool,
    /// A round has ended.
    pub round_ended: Event,
    /// What is copied from backing files goes through these.
    pub copies: Buffers,
    /// Itself, for tasks that outlive a request.
    pub me: Weak<Core>,
    bitmaps: Vec<BitmapEntry>,
}

impl Core {
    /// Opens an image, and changes nothing in it. A writable one that is marked dirty has to be repaired before it
    /// is written ([`Recount`]); until then it is as good as a read-only one.
    pub(super) async fn open(file: File<'_>, writable: bool, pass_discard: bool) -> Result<Arc<Core>> {
        let io = file.read()?;
        let (header, sector) = image::load_header(io).await?;
        header.check_supported()?;
        if writable && header.incompatible & INCOMPAT_CORRUPT != 0 {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "qcow2: Image is corrupt; cannot be opened read/write",
            )
            .remedy("repair it with 'img check -r all', or open it with read-only=on"));
        }
        let dirty = writable && header.incompatible & INCOMPAT_DIRTY != 0;
        if dirty {
            check_recount(io).await?;
        }
        let (size, geo) = (header.size, header.geometry());
        let ready = header.autoclear == 0;
        let (meta, bitmaps) = load(io, header, sector, writable && !dirty).await?;
        Ok(Arc::new_cyclic(|me| Core {
            meta: Mutex::new(meta),
            size: AtomicU64::new(size),
            geo,
            writable: AtomicBool::new(writable),
            write_ready: AtomicBool::new(ready),
            pass_discard: AtomicBool::new(pass_discard),
            ranges: RangeLock::new(),
            rounds: RangeLock::new(),
            loads: RangeLock::new(),
            growing: RangeLock::new(),
            counting: RangeLock::new(),
            grown: AtomicBool::new(false),
            shrunk: AtomicBool::new(false),
            round_ended: Event::new(),
            copies: Buffers::new(COPY_STEP.max(geo.cluster_size()) as usize, COPIES_KEPT),
            me: me.clone(),
            bitmaps,
        }))
    }

    /// Whether it has to be repaired before it is written.
    pub(super) fn is_dirty(&self) -> bool {
        self.writable() && self.meta().header.incompatible & INCOMPAT_DIRTY != 0
    }

    /// What outlives a request needs its image for longer.
    pub(super) fn itself(&self) -> Arc<Core> {
        self.me.upgrade().expect("a method of it is running")
    }

    /// The metadata. Not to be held across an await.
    pub(super) fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().expect("no panic while metadata were changed")
    }

    /// Opened for writing, as far as the node goes.
    pub(super) fn writable(&self) -> bool {
        self.writable.load(SeqCst)
    }

    /// Whether freed clusters are discarded in the file.
    pub(super) fn pass_discard(&self) -> bool {
        self.pass_discard.load(SeqCst)
    }

    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    fn plan_read(&self, node: &Node, flags: ReadFlags, span: Span) -> Plan {
        if hears_events(node) {
            return Plan::Slow;
        }
        let run = match self.meta().lookup(span.offset(), span.len()) {
            Ok(Try::Done(run)) => run,
            Ok(Try::Load(_) | Try::Reserve(_)) | Err(_) => return Plan::Slow,
        };
        match run.place {
            Place::Unallocated if flags.has(ReadFlags::POPULATE) => Plan::Slow,
            Place::Unallocated => {
                let Some(child) = node.children.iter().position(|c| c.role == ChildRole::Backing) else {
                    return Plan::Zeroes { len: run.len };
                };
                match node.children[child].node.size().saturating_sub(span.offset()) {
                    0 => Plan::Zeroes { len: run.len },
                    rest => Plan::Forward {
                        child: child as u8,
                        at: span.offset(),
                        len: run.len.min(rest),
                        request: Request::Read(flags),
                    },
                }
            }
            Place::Zero { .. } => Plan::Zeroes { len: run.len },
            Place::Data { .. } if flags.has(ReadFlags::POPULATE | ReadFlags::PREFETCH) => {
                Plan::Done { len: run.len }
            }
            Place::Data { host, .. } => {
                // The last cluster may lie partly beyond the end of the file.
                match node.children[0].node.size().saturating_sub(host.0) {
                    0 => Plan::Slow,
                    rest => Plan::Forward {
                        child: 0,
                        at: host.0,
                        len: run.len.min(rest),
                        request: Request::Read(flags.without(ReadFlags::POPULATE)),
                    },
                }
            }
            Place::Compressed { .. } => Plan::Slow,
        }
    }

    fn plan_write(&self, node: &Node, flags: WriteFlags, span: Span) -> Plan {
        if flags.has(WriteFlags::FUA) || !self.write_ready.load(SeqCst) || hears_events(node) {
            return Plan::Slow;
        }
        let mut m = self.meta();
        let Ok(Try::Done(Run { place: Place::Data { host, copied: true }, len })) =
            m.lookup(span.offset(), span.len())
        else {
            return Plan::Slow;
        };
        // Space kept for zeroes may follow in the file: then it is one request.
        if len < span.len() && m.own_run(span.offset() + len, 1).is_ok_and(|o| goes_on(o, host.0 + len)) {
            return Plan::Slow;
        }
        let rest = node.children[0].node.size().saturating_sub(host.0);
        if m.broken.is_some() || rest == 0 || m.check_overlap(host, len).is_err() {
            return Plan::Slow;
        }
        // For the file this is a change of its data, whatever it is for the disk.
        Plan::Forward { child: 0, at: host.0, len: len.min(rest), request: Request::Write(WriteFlags::NONE) }
    }

    /// Where the start of a span lives, as the graph wants to hear it.
    async fn extent(&self, env: Env<'_>, span: Span) -> Result<Extent> {
        let run = self.find(env, span.offset(), span.len()).await?;
        let place = match run.place {
            Place::Unallocated => Where::Unallocated,
            Place::Zero { kept } => Where::Zero { at: kept.map(|(h, _)| (0, h.0)) },
            Place::Data { host, .. } => Where::Data { child: 0, at: Some(host.0), compressed: false },
            Place::Compressed { .. } => Where::Data { child: 0, at: None, compressed: true },
        };
        Ok(Extent { len: run.len, place })
    }

    /// The names of the bitmaps that the image had when it was opened.
    pub(super) fn bitmap_names(&self) -> Vec<String> {
        self.bitmaps.iter().map(|b| b.name.clone()).collect()
    }

    fn describe(&self) -> Description {
        let m = self.meta();
        let h = &m.header;
        let mut data = vec![("compat".to_owned(), Value::from(if h.version >= 3 { "1.1" } else { "0.10" }))];
        let mut put = |name: &str, v: Value| data.push((name.to_owned(), v));
        put("compression-type", h.compression.as_str().into());
        if h.version >= 3 {
            put("lazy-refcounts", (h.compatible & COMPAT_LAZY_REFCOUNTS != 0).into());
        }
        put("refcount-bits", (1u64 << h.refcount_order).into());
        if h.version >= 3 {
            put("corrupt", (h.incompatible & INCOMPAT_CORRUPT != 0).into());
            put("extended-l2", (h.incompatible & INCOMPAT_EXTENDED_L2 != 0).into());
        }
        if h.has_bitmaps() && !self.bitmaps.is_empty() {
            let list = self.bitmaps.iter().map(|b| {
                Value::Map(vec![
                    ("flags".into(), Value::List(b.flag_words().into_iter().map(Value::from).collect())),
                    ("name".into(), b.name.as_str().into()),
                    ("granularity".into(), (1u64 << b.granularity_bits).into()),
                ])
            });
            put("bitmaps", Value::List(list.collect()));
        }
        Description {
            cluster_size: Some(m.geo.cluster_size()),
            dirty: h.incompatible & INCOMPAT_DIRTY != 0,
            corrupt: h.incompatible & INCOMPAT_CORRUPT != 0,
            backing: h.backing_file.clone().map(|name| (name, h.backing_format())),
            format_specific: Some(Value::Map(vec![
                ("type".into(), "qcow2".into()),
                ("data".into(), Value::Map(data)),
            ])),
            snapshots: m
                .snapshots
                .iter()
                .map(|s| SnapshotInfo {
                    id: s.id.clone(),
                    name: s.name.clone(),
                    vm_state_size: s.vm_state_bytes,
                    date_sec: s.date_secs,
                    date_nsec: s.date_nanos,
                    vm_clock_nsec: s.vm_clock_nanos,
                    icount: s.icount,
                })
                .collect(),
            ..Description::default()
        }
    }
}

/// The error of opening an image for writing that can be read all the same.
fn mendable(e: Error) -> Error {
    e.remedy("open the image with read-only=on, or repair it with 'img check -r all'")
}

/// Reads what is kept in memory of an image; for one that is written, also what only that needs.
async fn load(
    io: Io<'_, Read>,
    header: Header,
    sector: [u8; 512],
    writable: bool,
) -> Result<(Meta, Vec<BitmapEntry>)> {
    let l1_bytes = u64::from(header.l1_entries) * 8;
    in_file("the active L1 table", header.l1_table.0, l1_bytes, io.size())?;
    if writable {
        header.check_writable()?;
        let bytes = u64::from(header.reftable_clusters) << header.cluster_bits;
        in_file("the refcount table", header.reftable.0, bytes, io.size()).map_err(mendable)?;
    }
    let l1 = image::load_l1(io, &header).await?;
    let reftable = if writable { image::load_reftable(io, &header).await? } else { Vec::new() };
    let (snapshots, table_bytes) = match image::load_snapshots(io, &header).await {
        Ok(s) => s,
        Err(e) if writable => return Err(mendable(e)),
        // Nothing that is only read is found by way of snapshots.
        Err(_) => (Vec::new(), 0),
    };
    if writable {
        cut_off::check(io, &header, &l1, &reftable, &snapshots).await?;
    }
    // Damaged bitmaps do not keep anybody from the data.
    let bitmaps = image::load_bitmaps(io, &header).await.unwrap_or_default();
    let mut meta = Meta::new(header, sector, l1, reftable, io.size());
    if writable && !snapshots.is_empty() {
        meta.own(meta.header.snapshot_table, table_bytes);
        for s in &snapshots {
            meta.own(s.l1_table, u64::from(s.l1_entries) * 8);
        }
    }
    meta.snapshots = snapshots;
    Ok((meta, bitmaps))
}

/// Whether a run of an image's own clusters begins at a place in the file.
fn goes_on(run: Try<Option<Own>>, at: u64) -> bool {
    matches!(run, Try::Done(Some(own)) if own.host.0 == at)
}

/// The driver of a qcow2 node.
pub(super) struct Qcow2 {
    pub kind: &'static DriverKind,
    pub core: Arc<Core>,
    pub rule: AccessRule,
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qcow2({} bytes)", self.core.size())
    }
}

/// Whether somebody listens to the events that a request comes to. A plan can't raise them, as it may be made
/// without the request being sent.
fn hears_events(node: &Node) -> bool {
    node.children[0].node.hears_events()
}

impl Driver for Qcow2 {
    fn kind(&self) -> &'static DriverKind {
        self.kind
    }

    fn size(&self, _node: &Node) -> u64 {
        self.core.size()
    }

    fn limits(&self, node: &Node) -> Limits {
        let file = &node.children[0].node;
        let below = file.driver.limits(file);
        let geo = self.core.geo;
        let cluster = 1u32 << geo.cluster_bits;
        Limits {
            request_alignment: below.request_alignment.max(1),
            max_transfer: 0,
            opt_discard: cluster,
            cluster_size: cluster,
            cluster_start: 0,
            fast_zeroes: geo.version >= 3,
            discards: true,
        }
    }

    fn access_rule(&self) -> AccessRule {
        self.rule
    }

    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        match request {
            // An empty span and what would lie beyond the end have no mapping to look at.
            Request::Read(_) | Request::Write(_) if span.is_empty() || span.end() > self.core.size() => {
                Plan::Slow
            }
            Request::Read(flags) => self.core.plan_read(node, flags, span),
            Request::Write(flags) => self.core.plan_write(node, flags, span),
            Request::Discard(_) if !node.flags.unmap => Plan::Done { len: span.len() },
            Request::WriteZeroes(_) | Request::Discard(_) | Request::Flush | Request::Resize => Plan::Slow,
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let env = Env::of(cx);
            let core = &self.core;
            match op {
                Op::Read { span, to, flags } => core.read(env, span, to, flags).await,
                Op::Write { span, from, flags } => {
                    core.write(env, span, from).await?;
                    core.after_write(env, flags).await
                }
                Op::WriteZeroes { span, flags } => {
                    core.write_zeroes(env, span, flags).await?;
                    core.after_write(env, flags).await
                }
                Op::Discard { span, flags } => {
                    core.discard(env, span).await?;
                    core.after_write(env, flags).await
                }
                Op::Flush => core.flush(env).await,
                Op::Resize { size, prealloc } => core.resize(env, size, prealloc).await,
            }
        })
    }

    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(self.core.extent(Env::of(cx), span))
    }

    fn event(&self, _node: &Node, _event: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            match change {
                // Locks are the leaf's business.
                NodeChange::Access { .. } => {}
                NodeChange::Resize { size } => self.core.check_size(*size)?,
                NodeChange::Backing(to) => {
                    let to =
                        to.as_ref().map(|(name, format)| BackingName { name, format: format.as_deref() });
                    self.core.header_naming(Env::of(cx), to).await?;
                }
            }
            Ok(Box::new(()) as Box<dyn Prepared>)
        })
    }

    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.core.close(Env::of(cx)))
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        Some(self)
    }

    fn describe(&self, _node: &Node) -> Description {
        self.core.describe()
    }
}

impl ImageOps for Qcow2 {
    fn set_backing<'a>(&'a self, cx: Cx<'a>, to: Option<BackingName<'a>>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.core.set_backing(Env::of(cx), to))
    }
}
