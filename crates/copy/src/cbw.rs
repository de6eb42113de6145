//! `copy-before-write`: what is about to be overwritten is saved first.
//!
//! ```text
//!   guest                  who reads the point in time (snapshot-access), or a job
//!     |                        |
//!   copy-before-write ---------+
//!     | file      | target
//!   the disk     old data, in chunks
//! ```
//!
//! Before a write, a zero write or a discard of the guest reaches `file`, the old content of every chunk
//! that it touches, and that has not been saved yet, is copied to `target`. Each chunk is saved once, so a
//! disk that has been overwritten costs no more than before. Reads, flushes and writes that change nothing
//! ([`WriteFlags::UNCHANGED`], copy-on-read below or above) go straight on, and all flags are passed on as
//! they are. Shrinking saves what is cut off.
//!
//! When saving fails, `on-cbw-error` says who suffers: the guest's request (`break-guest-write`, default), or
//! the point in time, which can't be read any more from then on (`break-snapshot`). Saving that takes
//! longer than `cbw-timeout` seconds counts as failed.
//!
//! The driver is two: a node that a user adds, and the filter of a backup job
//! ([`CopyBeforeWrite::for_job`]), which differs in its edge rule only.

use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::option::{Child, Number, OptionKind, Size, Word};
use dolmen_graph::{
    AccessRule, ChildSpec, Class, Common, Cx, Driver, DriverKind, Extent, Node, Op, OpenCx, Opened, Opener,
    Parsed, Plan, Request, Where,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{ChildRole, Error, ErrorKind, Options, Result, ResultExt, Span, WriteFlags};

use crate::PointInTime;
use crate::point::FILE;

/// Registry row.
pub static COPY_BEFORE_WRITE: DriverKind = DriverKind::new(
    "copy-before-write",
    Class::Filter,
    "saves old data to another node before they are overwritten",
    CbwOptions::ROWS,
    parse,
);

dolmen_graph::options! {
    struct CbwOptions {
        required "file" file: Child => "the node whose old data are saved";
        required "target" target: Child => "the node that they are saved in";
        default "on-cbw-error" on_error: Word<OnCbwError> = "break-guest-write" =>
            "what fails when old data can't be saved";
        default "cbw-timeout" timeout_sec: Number = "0" =>
            "saving that takes longer than this many seconds has failed; 0 for never";
        default "min-cluster-size" min_chunk: Size = "0" =>
            "smallest piece that is saved, a power of two; 0 for 64 KiB, or the target's cluster";
    }
}

/// The smallest chunk by default, in bytes.
const DEFAULT_CHUNK: u64 = 64 << 10;

/// The largest chunk, in bytes: a guest's smallest write waits for the copy of a whole one.
const CHUNK_MAX: u64 = 64 << 20;

dolmen_graph::words! {
    /// Who suffers when old data can't be saved.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub enum OnCbwError {
        /// The guest's write fails; nothing is lost.
        #[default]
        BreakGuestWrite = "break-guest-write",
        /// The point in time can't be read any more.
        BreakSnapshot = "break-snapshot",
    }
}

impl OnCbwError {
    /// Takes the option out.
    ///
    /// # Errors
    /// `InvalidInput` for another word.
    pub fn take(options: &mut Options, name: &str) -> Result<OnCbwError> {
        Ok(Word::<OnCbwError>::take(options, name)?.unwrap_or_default())
    }
}

/// The chunk in which `target` is written: 64 KiB, or its own cluster, or what the user wants if
/// that is more. In bytes.
///
/// # Errors
/// `InvalidInput` for a wish that is not a power of two, `Limit` for one that is too large.
pub fn chunk_size(target: &Node, wish: u64) -> Result<u64> {
    if wish != 0 && !wish.is_power_of_two() {
        return Err(Error::new(ErrorKind::InvalidInput, "min-cluster-size needs to be a power of 2"));
    }
    if wish > CHUNK_MAX {
        return Err(Error::new(ErrorKind::Limit, format!("min-cluster-size is larger than {CHUNK_MAX}"))
            .remedy("a guest's smallest write waits until a whole cluster has been saved"));
    }
    let own = u64::from(target.driver.limits(target).cluster_size).next_power_of_two();
    Ok(DEFAULT_CHUNK.max(own.min(CHUNK_MAX)).max(wish))
}

fn parse(options: &mut Options, _: &Common) -> Result<Parsed> {
    if options.has("bitmap") {
        return Err(Error::new(ErrorKind::Unsupported, "'bitmap' of copy-before-write is not supported yet")
            .remedy("leave it out: everything is saved then"));
    }
    let CbwOptions { file, target, on_error, timeout_sec, min_chunk } = CbwOptions::take(options)?;
    if timeout_sec > u64::from(u32::MAX) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("'cbw-timeout' expects at most {} seconds", u32::MAX),
        ));
    }
    Ok(Parsed {
        children: vec![
            ChildSpec { name: "file", role: ChildRole::Filtered, def: file },
            ChildSpec { name: "target", role: ChildRole::Target, def: target },
        ],
        rule: AccessRule::SAVES_OLD_DATA,
        relies_down_to: None,
        open: Box::new(Open { on_error, timeout: to_timeout(timeout_sec), min_chunk }),
    })
}

fn to_timeout(sec: u64) -> Option<Duration> {
    (sec > 0).then(|| Duration::from_secs(sec))
}

struct Open {
    on_error: OnCbwError,
    timeout: Option<Duration>,
    min_chunk: u64,
}

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let (file, target) = (&cx.child("file")?.node, &cx.child("target")?.node);
            let content = content(file).to_owned();
            let old = cx.replaced::<CopyBeforeWrite>();
            if let Some(old) = old
                && (old.content.as_ref().is_some_and(|c| *c != content) || cx.common.flags.inactive)
            {
                let why = if cx.common.flags.inactive {
                    "another process must not change it"
                } else {
                    "another can't take its place"
                };
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "'{}' keeps old data of '{}': {why}",
                        cx.name,
                        old.content.as_ref().unwrap_or(&content)
                    ),
                )
                .remedy("remove the copy-before-write node first"));
            }
            let point = match old {
                Some(old) if old.target_name == target.name.as_str() => old.point.clone(),
                Some(old) => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!(
                            "the target of '{}' is '{}', which holds the old data, and can't be changed",
                            cx.name, old.target_name
                        ),
                    )
                    .remedy("add another copy-before-write node"));
                }
                None => {
                    check_sizes(file, target)?;
                    Arc::new(PointInTime::new(file.size(), chunk_size(target, self.min_chunk)?))
                }
            };
            Ok(Opened::of(Arc::new(CopyBeforeWrite {
                point,
                rule: AccessRule::SAVES_OLD_DATA,
                on_error: self.on_error,
                timeout: self.timeout,
                target_name: target.name.as_str().to_owned(),
                content: Some(content),
            })))
        })
    }
}

fn check_sizes(file: &Node, target: &Node) -> Result<()> {
    if target.size() < file.size() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "target '{}' has {} bytes, fewer than the {} bytes of '{}'",
                target.name,
                target.size(),
                file.size(),
                file.name
            ),
        )
        .remedy("make the target as large as the node whose old data it is to hold"));
    }
    Ok(())
}

/// The driver; see the module's head.
#[derive(Debug)]
pub struct CopyBeforeWrite {
    point: Arc<PointInTime>,
    rule: AccessRule,
    on_error: OnCbwError,
    timeout: Option<Duration>,
    target_name: String,
    /// The node below, past all filters, as it was when a user put this one there.
    content: Option<String>,
}

/// The name of the node whose data a node shows.
fn content(node: &Arc<Node>) -> &str {
    let last = std::iter::successors(Some(node), |n| n.filtered()).last();
    last.unwrap_or(node).name.as_str()
}

impl CopyBeforeWrite {
    /// The filter of a backup job, for `draft.set_driver`: its children are `file` (interposed) and
    /// `target`, in this order.
    pub fn for_job(point: Arc<PointInTime>, target: &str, on_error: OnCbwError) -> CopyBeforeWrite {
        CopyBeforeWrite {
            point,
            rule: AccessRule::SAVES_OLD_DATA_FOR_JOB,
            on_error,
            timeout: None,
            target_name: target.to_owned(),
            content: None,
        }
    }

    /// The point in time that it keeps.
    pub fn point(&self) -> &Arc<PointInTime> {
        &self.point
    }

    /// The driver of a node, if it is of this kind.
    pub(crate) fn of(node: &Node) -> Option<&CopyBeforeWrite> {
        let any: &dyn std::any::Any = &*node.driver;
        any.downcast_ref()
    }

    /// Makes sure that `span` may be overwritten.
    async fn before(&self, cx: Cx<'_>, span: Span) -> Result<()> {
        loop {
            if self.point.is_free(span) {
                return Ok(());
            }
            let saving = self.point.save_one(cx, span);
            let saved = match self.timeout {
                None => saving.await,
                Some(limit) => {
                    let late = async {
                        cx.rt.sleep(limit).await;
                        Err(Error::new(
                            ErrorKind::TimedOut,
                            format!("saving old data took longer than {} s", limit.as_secs()),
                        ))
                    };
                    futures_lite::future::or(saving, late).await
                }
            };
            match saved {
                Ok(true) => {}
                Ok(false) => self.point.readers_gone(span).await,
                Err(error) => match self.on_error {
                    OnCbwError::BreakGuestWrite => {
                        return Err(error).context(|| {
                            format!(
                                "old data at {span} could not be saved in '{}' before a write",
                                self.target_name
                            )
                        });
                    }
                    OnCbwError::BreakSnapshot => self.point.break_it(&error),
                },
            }
        }
    }
}

/// Whether a write of that kind changes what is read.
fn changes(flags: WriteFlags) -> bool {
    !flags.has(WriteFlags::UNCHANGED)
}

impl Driver for CopyBeforeWrite {
    fn kind(&self) -> &'static DriverKind {
        &COPY_BEFORE_WRITE
    }

    dolmen_graph::pass_through! { FILE: size, limits, event, prepare, close, image, describe }

    fn access_rule(&self) -> AccessRule {
        self.rule
    }

    fn plan(&self, _: &Node, request: Request, span: Span) -> Plan {
        match request {
            Request::Write(flags) | Request::WriteZeroes(flags) | Request::Discard(flags)
                if changes(flags) && !self.point.is_free(span) =>
            {
                Plan::Slow
            }
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
            let at_risk = match op {
                Op::Write { span, flags, .. }
                | Op::WriteZeroes { span, flags }
                | Op::Discard { span, flags } => changes(flags).then_some(span),
                Op::Resize { size, prealloc: _ } => {
                    let old = self.point.size();
                    (size < old).then(|| Span::from_range(size, old))
                }
                Op::Read { .. } | Op::Flush => None,
            };
            if let Some(span) = at_risk {
                self.before(cx, span).await?;
            }
            cx.forward(FILE, op).await
        })
    }

    fn status<'a>(&'a self, _: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            Ok(Extent { len: span.len(), place: Where::Through { child: FILE as u8, at: span.offset() } })
        })
    }
}
