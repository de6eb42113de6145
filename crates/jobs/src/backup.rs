//! `blockdev-backup`: copies a node as it was when the job began.
//!
//! ```text
//!   plain                              with a fleecing node
//!
//!   guest                              guest        job ------> target
//!     |                                  |           |            (slow)
//!   copy-before-write <-- job          copy-before-write <- snapshot-access
//!     |           \                      |           \
//!   source       target                source       fleecing node (fast, local)
//! ```
//!
//! A copy-before-write filter stands on the source from the first moment. What the guest is about to overwrite is saved
//! first; everything else is copied by the job. Both take their parts from one map, so nothing is copied
//! twice, and the guest waits for a part only while it is on its way.
//!
//! A slow target makes a plain backup slow for the guest, too. With `fleecing` the filter saves to that
//! node instead, which should be fast, and the job copies the point in time from there (and from the source) to
//! the target at its own pace; what has been copied is discarded from the fleecing node.
//!
//! `sync=full` copies everything, `top` what the topmost image holds, `none` nothing but what the guest
//! overwrites, until the job is cancelled.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use dolmen_copy::{
    COPY_BEFORE_WRITE, CopyBeforeWrite, CopyOptions, Engine, Failure, Hooks, Moved, OnCbwError, Pass,
    PointInTime, Route, SNAPSHOT_ACCESS, SnapshotAccess, Tracker, chunk_size,
};
use dolmen_graph::{
    ClaimScope, Cx, Draft, Driver, DriverKind, Node, NodeDef, NodeFlags, OpClaim, content, first_allocated,
    same_chain,
};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result,
    ResultExt, Span, Value,
};

use crate::claims::{claim_beneath, claim_target};
use crate::gone::end_of_point;
use crate::{
    BLOCK_JOB, BeginCx, Details, Ending, JobCx, JobKind, OnError, SettleCx, Side, Work, nothing_to_change,
};

/// Parts in flight unless the user wants more or fewer.
const WORKERS: u64 = 16;

/// The most parts in flight: each has a buffer of up to a megabyte or more.
const WORKERS_MAX: u64 = 64;

/// The most bytes in one part unless the user says so.
const MAX_CHUNK: u64 = 1 << 20;

/// How long a part that failed rests before it is tried again, when errors are ignored.
const RETRY: Duration = Duration::from_millis(100);

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sync {
    Full,
    Top,
    None,
}

/// What `begin` has made.
#[derive(Clone, Debug)]
struct Stand {
    point: Arc<PointInTime>,
    filter: Arc<dyn Driver>,
    source: NodeName,
    /// Where old data are saved.
    saved_in: NodeName,
    /// What is left to be copied: the point's own map, or, with a fleecing node, the job's.
    left: Arc<Tracker>,
    /// Of `sync=top`: the image below the topmost one.
    base: Option<Arc<Node>>,
}

/// The work of a backup job.
#[derive(Debug)]
pub struct Backup {
    device: String,
    target: String,
    sync: Sync,
    fleecing: Option<String>,
    filter_name: Option<String>,
    discard_source: bool,
    on_source_error: OnError,
    on_target_error: OnError,
    on_cbw_error: OnCbwError,
    workers: u64,
    max_chunk: u64,
    min_cluster: u64,
    stand: RefCell<Option<Stand>>,
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

impl Backup {
    /// Reads the options of `blockdev-backup` that are not those of every job.
    ///
    /// # Errors
    /// `InvalidInput` when they make no sense; `Unsupported` for what needs bitmaps or compression.
    pub fn from_options(o: &mut Options) -> Result<Backup> {
        let device = o.require_str("device")?;
        let target = o.require_str("target")?;
        let sync = match o.require_str("sync")?.as_str() {
            "full" => Sync::Full,
            "top" => Sync::Top,
            "none" => Sync::None,
            word @ ("incremental" | "bitmap") => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("sync mode '{word}' needs a bitmap, and bitmaps are not supported yet"),
                )
                .remedy("use sync=full or sync=top"));
            }
            word => {
                return Err(invalid(format!("Parameter 'sync' does not accept value '{word}'"))
                    .remedy("use one of: full, top, none"));
            }
        };
        for name in ["bitmap", "bitmap-mode"] {
            if o.has(name) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("'{name}' is not supported yet: there are no bitmaps"),
                )
                .remedy("leave it out: everything is copied then"));
            }
        }
        if o.take_bool("compress")?.unwrap_or(false) {
            return Err(Error::new(ErrorKind::Unsupported, "Compression is not supported for this drive")
                .remedy("leave 'compress' out, and compress the copy afterwards"));
        }
        let fleecing = o.take_str("fleecing")?;
        if fleecing.is_some() && sync != Sync::Full {
            return Err(Error::new(ErrorKind::Unsupported, "'fleecing' works with sync=full only")
                .remedy("leave 'fleecing' out, or copy everything"));
        }
        let mut perf = o.take_map("x-perf")?.unwrap_or_default();
        perf.take_bool("use-copy-range")?;
        let workers = match perf.take("max-workers") {
            None => WORKERS,
            Some(Value::Int(n)) if (1..=i128::from(i32::MAX)).contains(&n) => (n as u64).min(WORKERS_MAX),
            Some(_) => return Err(invalid(format!("max-workers must be between 1 and {}", i32::MAX))),
        };
        let max_chunk = match perf.take("max-chunk") {
            None => 0,
            Some(Value::Int(n)) if (0..=i128::from(i64::MAX)).contains(&n) => n as u64,
            Some(_) => return Err(invalid("max-chunk must be zero (which means no limit) or positive")),
        };
        let min_cluster = perf.take_size("min-cluster-size")?.unwrap_or(0);
        perf.finish("x-perf")?;
        Ok(Backup {
            device,
            target,
            sync,
            fleecing,
            filter_name: o.take_str("filter-node-name")?,
            discard_source: o.take_bool("discard-source")?.unwrap_or(false),
            on_source_error: OnError::take(o, "on-source-error")?,
            on_target_error: OnError::take(o, "on-target-error")?,
            on_cbw_error: OnCbwError::take(o, "on-cbw-error")?,
            workers,
            max_chunk,
            min_cluster,
            stand: RefCell::new(None),
        })
    }

    fn stand(&self) -> Result<Stand> {
        self.stand.borrow().clone().ok_or_else(|| invalid(format!("{} has not begun", self.detail())))
    }

    /// The node that a user named, for a message in QEMU's words if there is none.
    fn known(&self, draft: &Draft, name: &str) -> Result<NodeName> {
        draft.find(name)
    }

    fn check(&self, source: &Node, target: &Node) -> Result<()> {
        if source.name == target.name {
            return Err(invalid("Source and target cannot be the same"));
        }
        if source.size() != target.size() {
            return Err(invalid("Source and target image have different sizes").remedy(format!(
                "'{}' has {} bytes, '{}' has {}: make the target as large as the source",
                source.name,
                source.size(),
                target.name,
                target.size()
            )));
        }
        Ok(())
    }

    /// The target of sync=top gets what the source itself holds: it must hold nothing else, and lie over the same
    /// images, if it lies over any yet.
    async fn check_overlay(&self, source: &Arc<Node>, target: &Arc<Node>, rt: &Rt) -> Result<()> {
        let (below, image) = (content(source).backing(), content(target));
        let takes_backing = image.driver.kind().options.iter().any(|o| o.name == "backing");
        // Without a backing file, everything is copied.
        if below.is_none() || !takes_backing {
            return Ok(());
        }
        if image.backing().is_some() && !same_chain(below, image.backing()) {
            return Err(invalid(format!(
                "target '{}' lies over other images than '{}' does, and gets only what '{}' itself holds",
                self.target, self.device, self.device
            ))
            .remedy("link the target to the source's backing file, or copy with sync=full"));
        }
        if let Some(at) = first_allocated(target, rt).await? {
            return Err(invalid(format!(
                "target '{}' holds data of its own (at byte {at}), which would show where '{}' holds none",
                self.target, self.device
            ))
            .remedy("use a new image as the target, or copy with sync=full"));
        }
        Ok(())
    }

    /// With sync=none, an overlay of the source shows the source as it was when the backup began: where it holds
    /// something from before, it would show that.
    async fn check_empty(&self, source: &Arc<Node>, target: &Arc<Node>, rt: &Rt) -> Result<()> {
        let below = content(target).backing();
        if below.is_none() || !same_chain(Some(content(source)), below) {
            return Ok(());
        }
        if let Some(at) = first_allocated(target, rt).await? {
            return Err(invalid(format!(
                "target '{}' is an overlay of '{}' and holds data of its own (at byte {at}), which would show instead \
                 of what '{}' held when the backup began",
                self.target, self.device, self.device
            ))
            .remedy("use a new image as the target"));
        }
        Ok(())
    }

    async fn begin(&self, cx: BeginCx<'_>) -> Result<()> {
        use Actions as A;
        let source = self.known(cx.draft, &self.device)?;
        let target = self.known(cx.draft, &self.target)?;
        let draft = cx.draft;
        let fleecing = self.fleecing.as_ref().map(|f| self.known(draft, f)).transpose()?;
        let (source_node, target_node) = (draft.built_node(&source)?, draft.built_node(&target)?);
        self.check(&source_node, &target_node)?;
        let mut chunk = chunk_size(&target_node, self.min_cluster).context(|| "Could not create node")?;
        if let Some(fleecing) = &fleecing {
            let node = draft.built_node(fleecing)?;
            self.check(&source_node, &node)?;
            self.check(&node, &target_node)?;
            // The same chunks on both sides, so that what was copied can be discarded as a whole.
            chunk = chunk.max(chunk_size(&node, self.min_cluster)?);
        }
        if self.max_chunk != 0 && self.max_chunk < chunk {
            return Err(invalid(format!(
                "Required max-chunk ({}) is less than backup cluster size ({chunk})",
                self.max_chunk
            )));
        }
        let size = source_node.size();
        let images = draft.images(&source);
        match self.sync {
            Sync::Top => self.check_overlay(&source_node, &target_node, cx.rt).await?,
            Sync::None => self.check_empty(&source_node, &target_node, cx.rt).await?,
            _ => {}
        }
        drop((source_node, target_node));

        let base = images.get(1).filter(|_| self.sync == Sync::Top);
        let base = base.map(|name| draft.built_node(name)).transpose()?;
        let point = Arc::new(PointInTime::new(size, chunk).above(base.clone()));
        let saved_in = fleecing.as_ref().unwrap_or(&target).clone();
        let filter = self.filter_name.as_ref().map(|n| NodeName::parse(n)).transpose()?;
        let anonymous = filter.is_none();
        let filter = filter.unwrap_or_else(|| draft.fresh_name());
        let driver: Arc<dyn Driver> =
            Arc::new(CopyBeforeWrite::for_job(point.clone(), &saved_in, self.on_cbw_error));
        add(draft, cx.op, &filter, anonymous, &COPY_BEFORE_WRITE, driver.clone())?;
        // What the filter will stand on: the source itself, or what others have put on it.
        let beneath = draft.resolve(&source)?;
        draft.link(&filter, "target", ChildRole::Target, &saved_in)?;
        draft.interpose(&filter, "file", &source)?;
        // What a guest overwrites is saved there first.
        draft.keep_right(cx.op, &saved_in)?;

        let needs = if self.discard_source { A::D | A::V } else { A::D };
        let left = match &fleecing {
            None => {
                draft.add_user_below_filters(cx.op, &filter, Claim { needs, allows: A::EVERY })?;
                point.tracker().clone()
            }
            Some(_) => {
                let view = draft.fresh_name();
                let access: Arc<dyn Driver> = Arc::new(SnapshotAccess::new(point.clone()));
                add(draft, cx.op, &view, true, &SNAPSHOT_ACCESS, access)?;
                // Exactly the job's own filter, whatever else may come to stand on the source.
                draft.link(&view, "file", ChildRole::Data, &filter)?;
                draft.add_user(cx.op, &view, Claim { needs: A::D | A::V, allows: A::EVERY })?;
                draft.add_user(cx.op, &target, Claim { needs: A::V, allows: A::EVERY })?;
                Arc::new(Tracker::all_dirty(size, chunk))
            }
        };

        let mut claim = |node: &NodeName, needs: A, denies: A, why: &str| {
            draft.add_claim(OpClaim {
                op: cx.op.clone(),
                node: node.clone(),
                claim: Claim { needs, allows: A::EVERY - denies },
                scope: ClaimScope::Node,
                why: why.into(),
                pins: true,
            })
        };
        let why = "copies it as it was when the backup began";
        claim(&beneath, needs, A::V | A::S, why)?;
        if beneath != source {
            claim(&source, A::D, A::S, why)?;
        }
        // The topmost image is the source itself, or guarded by the edges of the filters above it.
        for image in images.iter().skip(1) {
            claim(image, A::D, A::V, "copies it as part of its source")?;
        }
        claim_beneath(draft, cx.op, &source, A::S, why)?;
        // An overlay that is put over the target would get the rest of the copy.
        let denies = A::V | A::S | A::P;
        claim_target(draft, cx.op, &target, A::V | A::M, denies, "writes its copy to it")?;
        if let Some(fleecing) = &fleecing {
            let why = "keeps old data of its source in it";
            claim_target(draft, cx.op, fleecing, A::V | A::M, denies, why)?;
        }
        *self.stand.borrow_mut() = Some(Stand { point, filter: driver, source, saved_in, left, base });
        Ok(())
    }

    /// The engine for what is left.
    fn engine(&self, stand: &Stand, cx: &JobCx) -> Engine {
        let options = CopyOptions {
            workers: self.workers as usize,
            max_chunk: if self.max_chunk == 0 { MAX_CHUNK } else { self.max_chunk },
            discard_source: self.discard_source || self.fleecing.is_some(),
            ..CopyOptions::default()
        };
        let route = match self.fleecing {
            None => Route::Filter { edge: cx.edge(0).clone(), driver: stand.filter.clone() },
            Some(_) => Route::Edges { source: cx.edge(0).clone(), target: cx.edge(1).clone() },
        };
        Engine::new(cx.rt(), route, stand.left.clone(), options).above(stand.base.clone())
    }

    async fn run(&self, cx: &JobCx) -> Result<()> {
        let stand = self.stand()?;
        cx.set_remaining(stand.left.remaining());
        if self.sync == Sync::None {
            return self.keep_watch(&stand, cx).await;
        }
        let engine = self.engine(&stand, cx);
        let hooks = Watch { backup: self, stand: &stand, cx };
        loop {
            cx.checkpoint().await?;
            stand.intact()?;
            match engine.run(&hooks).await? {
                Pass::Attention => {}
                Pass::Clean => {
                    // The guest's writes may be saving the last parts.
                    let (moved, asked) = (stand.left.listen(), cx.changed());
                    if stand.left.is_done() {
                        break;
                    }
                    futures_lite::future::or(moved, asked).await;
                }
            }
        }
        stand.intact()?;
        hooks.progress();
        Ok(())
    }

    /// Copies nothing: the filter does all there is to do, until the job is cancelled.
    async fn keep_watch(&self, stand: &Stand, cx: &JobCx) -> Result<()> {
        loop {
            let (moved, asked) = (stand.left.listen(), cx.changed());
            cx.checkpoint().await?;
            stand.intact()?;
            futures_lite::future::or(moved, asked).await;
        }
    }
}

/// Adds a node that belongs to the job.
fn add(
    draft: &mut Draft,
    op: &OpId,
    name: &NodeName,
    anonymous: bool,
    kind: &'static DriverKind,
    driver: Arc<dyn Driver>,
) -> Result<()> {
    draft.add_node(NodeDef {
        name: name.clone(),
        anonymous,
        kind,
        rule: driver.access_rule(),
        // Discards pass it, whoever they come from: the nodes below decide.
        flags: NodeFlags { unmap: true, ..NodeFlags::default() },
        owner: Some(op.clone()),
        monitor: false,
        options: Value::Null,
    })?;
    draft.set_driver(name, driver, false);
    Ok(())
}

impl Stand {
    /// Whether the point in time can still be read.
    fn intact(&self) -> Result<()> {
        match self.point.broken() {
            Some(why) => Err(why.context("old data could not be saved before a write of the guest")),
            None => Ok(()),
        }
    }

    /// Completes when it can't.
    async fn broken(&self) {
        loop {
            let listener = self.point.tracker().listen();
            if self.point.broken().is_some() {
                return;
            }
            listener.await;
        }
    }
}

/// The engine's questions, put to the job.
struct Watch<'a> {
    backup: &'a Backup,
    stand: &'a Stand,
    cx: &'a JobCx,
}

impl Watch<'_> {
    /// What the guest's writes have saved counts as well.
    fn progress(&self) {
        let left = &self.stand.left;
        let done = left.with(dolmen_copy::CopyMap::size) - left.remaining();
        self.cx.progress_add(done.saturating_sub(self.cx.progress().current));
    }
}

impl Hooks for Watch<'_> {
    fn throttle(&self, bytes: u64) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let limit = async {
                // Being cancelled is seen at the next look.
                let _ = self.cx.throttle(bytes).await;
            };
            futures_lite::future::or(limit, self.stand.broken()).await;
        })
    }

    fn moved(&self, _: Span, _: Moved) {
        self.progress();
    }

    fn failed(&self, failure: Failure) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let (side, policy) = match failure.side {
                dolmen_copy::Side::Source => (Side::Source, self.backup.on_source_error),
                dolmen_copy::Side::Target => (Side::Target, self.backup.on_target_error),
            };
            if self.cx.failed(side, policy, failure.error).await? == crate::Again::Skip {
                // A backup leaves nothing out: the part is tried again later.
                self.cx.sleep_until(self.cx.rt().now() + RETRY).await?;
            }
            Ok(())
        })
    }

    fn attention(&self) -> bool {
        self.cx.wants_attention() || self.stand.point.broken().is_some()
    }
}

impl Work for Backup {
    fn kind(&self) -> &'static JobKind {
        &BACKUP
    }

    fn detail(&self) -> String {
        format!("backup of '{}' to '{}'", self.device, self.target)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.begin(cx))
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.run(cx))
    }

    fn settle<'a>(&'a self, cx: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let stand = self.stand()?;
            if self.fleecing.is_some() {
                let token = cx.edge(1)?.begin().await?;
                return token.write(cx.rt)?.flush().await;
            }
            let token = cx.edge(0)?.begin().await?;
            let filter = std::iter::successors(Some(token.node()), |n| n.filtered())
                .find(|n| Arc::ptr_eq(&n.driver, &stand.filter))
                .ok_or_else(|| Error::new(ErrorKind::NotFound, "the filter of the backup is gone"))?;
            let Some(target) = filter.child_index("target") else { return Ok(()) };
            Cx { node: filter, rt: cx.rt }.write(target)?.flush().await
        })
    }

    fn end(&self, op: &OpId, draft: &mut Draft, _: Ending) -> Result<()> {
        // The filters go with the operation, and nobody saves any more what is overwritten.
        let stand = self.stand()?;
        end_of_point(draft, op, &stand.source, &stand.saved_in)
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, _: Options) -> Result<crate::Effect<'_>> {
        Err(nothing_to_change())
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}

/// The kind.
pub static BACKUP: JobKind = JobKind {
    name: "backup",
    command: "blockdev-backup",
    help: "Copies a node as it is now while its guest goes on writing.",
    is_block_job: true,
    is_completed: false,
    in_transactions: true,
    options: &[
        BLOCK_JOB,
        &[
            OptionSpec::required("device", OptionType::Str, "the source"),
            OptionSpec::required("target", OptionType::Str, "the node to copy to"),
            OptionSpec::required(
                "sync",
                OptionType::Enum(&["top", "full", "none", "incremental", "bitmap"]),
                "what is copied: full, top or none",
            ),
            OptionSpec::optional("bitmap", OptionType::Str, "not supported yet"),
            OptionSpec::optional(
                "bitmap-mode",
                OptionType::Enum(&["on-success", "never", "always"]),
                "not supported yet",
            ),
            OptionSpec::optional("compress", OptionType::Bool, "not supported"),
            OptionSpec::optional(
                "on-source-error",
                OnError::OPTION,
                "what to do about errors (default: report)",
            ),
            OptionSpec::optional("on-target-error", OnError::OPTION, "the same for writing"),
            OptionSpec::optional(
                "on-cbw-error",
                OptionType::Enum(&["break-guest-write", "break-snapshot"]),
                "what gives way when old data can't be saved (default: the write)",
            ),
            OptionSpec::optional("filter-node-name", OptionType::Str, "name of the filter"),
            OptionSpec::optional(
                "discard-source",
                OptionType::Bool,
                "discards what has been copied (default: off)",
            ),
            OptionSpec::optional("fleecing", OptionType::Str, "a fast node where old data are saved first"),
            OptionSpec::optional("x-perf", OptionType::Object(PERF), "how it is copied"),
        ],
    ],
    change: &[],
    details: &[],
    parse: |o| Ok(Box::new(Backup::from_options(o)?)),
    failing: None,
};

/// How a backup is copied.
pub const PERF: &[OptionSpec] = &[
    OptionSpec::hint("use-copy-range", OptionType::Bool, "accepted: what is copied is read and written"),
    OptionSpec::optional("max-workers", OptionType::Int, "parts in flight (default: 16; at most 64)"),
    OptionSpec::optional("max-chunk", OptionType::Int, "most bytes of a part (default: 0, 1 MiB)"),
    OptionSpec::optional("min-cluster-size", OptionType::Int, "least bytes of a part"),
];
