//! Filling an image from its backing files, through a copy-on-read node: what `block-stream` and
//! `blockdev-prefetch` do.
//!
//! The block status of the chain says what has to be copied: what some layer down to the last one
//! that counts holds, and the top does not. Neighbouring parts become one request of up to
//! [`PIECE`] bytes, even if they come from different layers, and several are in flight. Data are not moved
//! to here: the reads carry `PREFETCH`, so that the node that owns the allocation keeps them.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use dolmen_graph::{Node, chain_status, own_status};
use dolmen_rt::Memory;
use dolmen_types::{Error, NodeName, ReadFlags, Result, Span};
use futures_util::stream::{FuturesUnordered, Stream as _, StreamExt};

use crate::{Again, JobCx, OnError, Side};

/// Bytes of one request: large enough that its fixed costs do not matter, small enough that a
/// change of the graph, or a guest's write to the same place, does not wait long.
const PIECE: u64 = 2 << 20;

/// The least bytes of one request under a speed limit.
const SMALL_PIECE: u64 = 512 << 10;

/// How far ahead the status is asked for when nothing has to be copied there, in bytes.
const LOOK_AHEAD: u64 = 1 << 30;

/// How much a fill takes of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Priority {
    /// One request at a time, and a pause as long as it took.
    Low,
    /// A few.
    #[default]
    Normal,
    /// Many.
    High,
}

impl Priority {
    pub(crate) const WORDS: &'static [&'static str] = &["low", "normal", "high"];

    pub(crate) fn from_word(word: &str) -> Option<Priority> {
        let i = Priority::WORDS.iter().position(|w| *w == word)?;
        Some([Priority::Low, Priority::Normal, Priority::High][i])
    }

    const fn in_flight(self) -> usize {
        match self {
            Priority::Low => 1,
            Priority::Normal => 4,
            Priority::High => 16,
        }
    }
}

/// A fill.
pub(crate) struct Fill<'a> {
    pub(crate) cx: &'a JobCx,
    /// The job's edge to the copy-on-read node.
    pub(crate) edge: usize,
    /// The last layer that counts; all of them if there is none.
    pub(crate) bottom: Option<&'a NodeName>,
    /// Whether what reads as zeroes is copied, too.
    pub(crate) zeroes: bool,
    pub(crate) on_error: OnError,
    pub(crate) priority: Priority,
}

/// Waits for something while what is in flight goes on: that holds tokens, and what is waited for may
/// wait until all tokens have come back.
async fn meanwhile<T>(
    flying: &mut FuturesUnordered<impl Future<Output = Result<()>>>,
    failed: &mut Option<Error>,
    what: impl Future<Output = T>,
) -> T {
    let mut what = pin!(what);
    poll_fn(|cx| {
        while let Poll::Ready(Some(done)) = Pin::new(&mut *flying).poll_next(cx) {
            *failed = failed.take().or(done.err());
        }
        what.as_mut().poll(cx)
    })
    .await
}

/// What the start of a span needs.
struct Next {
    copy: bool,
    len: u64,
}

impl Fill<'_> {
    /// Fills these spans. Progress counts every byte of them, copied or not.
    ///
    /// # Errors
    /// The first error; with a policy that ignores errors, when everything else is done.
    pub(crate) async fn run(&self, spans: &[Span]) -> Result<()> {
        let ignored = RefCell::new(None);
        // Never looked at: every request may have it.
        let scratch = Memory::zeroed(PIECE as usize);
        let mut flying = FuturesUnordered::new();
        let mut failed = None;
        for span in spans {
            let mut rest = *span;
            while !rest.is_empty() && failed.is_none() {
                if self.cx.wants_attention() || flying.len() >= self.priority.in_flight() {
                    match flying.next().await {
                        Some(Ok(())) => {}
                        Some(Err(e)) => failed = Some(e),
                        None => failed = self.cx.checkpoint().await.err(),
                    }
                    continue;
                }
                if flying.is_empty() {
                    failed = self.cx.checkpoint().await.err();
                } else {
                    // Storage that never makes anybody wait would have the core to itself.
                    meanwhile(&mut flying, &mut failed, self.cx.rt().yield_now()).await;
                }
                match meanwhile(&mut flying, &mut failed, self.next(rest)).await {
                    Ok(Next { copy: true, len }) => {
                        flying.push(self.piece(rest.prefix(len), &scratch, &ignored));
                        rest = rest.skip(len);
                    }
                    Ok(Next { copy: false, len }) => {
                        self.cx.progress_add(len);
                        rest = rest.skip(len);
                    }
                    Err(e) => match meanwhile(
                        &mut flying,
                        &mut failed,
                        self.cx.failed(Side::Source, self.on_error, e.duplicate()),
                    )
                    .await
                    {
                        Ok(Again::Retry) => {}
                        Ok(Again::Skip) => {
                            let len = PIECE.min(rest.len());
                            ignored.borrow_mut().get_or_insert(e);
                            self.cx.progress_add(len);
                            rest = rest.skip(len);
                        }
                        Err(e) => failed = Some(e),
                    },
                }
            }
        }
        // What is in flight comes to an end, or is refused by the throttle of a cancelled job.
        while let Some(done) = flying.next().await {
            failed = failed.or(done.err());
        }
        let ignored = ignored.take();
        match failed.or(ignored) {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    async fn piece(&self, span: Span, scratch: &Memory, ignored: &RefCell<Option<Error>>) -> Result<()> {
        loop {
            self.cx.throttle(span.len()).await?;
            let begun = self.cx.rt().now();
            let Err(e) = self.prefetch(span, scratch).await else {
                self.cx.progress_add(span.len());
                if self.priority == Priority::Low {
                    let now = self.cx.rt().now();
                    self.cx.sleep_until(now + now.since(begun)).await?;
                }
                return Ok(());
            };
            if self.cx.failed(Side::Source, self.on_error, e.duplicate()).await? == Again::Skip {
                ignored.borrow_mut().get_or_insert(e);
                self.cx.progress_add(span.len());
                return Ok(());
            }
        }
    }

    async fn prefetch(&self, span: Span, scratch: &Memory) -> Result<()> {
        let token = self.cx.edge(self.edge).begin().await?;
        let to = scratch.iovec().slice(0, span.len() as usize);
        token.read(self.cx.rt())?.read(span, &to, ReadFlags::PREFETCH).await
    }

    /// What the start of `span` needs; parts to be copied are joined up to a piece.
    async fn next(&self, span: Span) -> Result<Next> {
        let piece = match self.cx.speed() {
            0 => PIECE,
            speed => (speed / 10).clamp(SMALL_PIECE, PIECE) / SMALL_PIECE * SMALL_PIECE,
        };
        let token = self.cx.edge(self.edge).begin().await?;
        let node = token.node();
        let below = self.below(node);
        let mut copied = 0;
        while copied < piece.min(span.len()) {
            let most = if copied == 0 { LOOK_AHEAD } else { piece - copied };
            let next = self.wants(node, span.skip(copied).prefix(most), below).await?;
            if !next.copy {
                if copied == 0 {
                    return Ok(next);
                }
                break;
            }
            copied += next.len;
        }
        Ok(Next { copy: true, len: copied.min(piece) })
    }

    async fn wants(&self, node: &Arc<Node>, span: Span, below: Option<&Node>) -> Result<Next> {
        let rt = self.cx.rt();
        let (allocated, len) = own_status(node, rt, span).await?;
        if allocated {
            return Ok(Next { copy: false, len });
        }
        let status = chain_status(node, rt, span.prefix(len), below).await?;
        let copy = status.present && (self.zeroes || !status.zero);
        Ok(Next { copy, len: status.len })
    }

    /// The node below the last layer that counts, where looking for data ends.
    fn below<'n>(&self, node: &'n Arc<Node>) -> Option<&'n Node> {
        let bottom = self.bottom?;
        let mut at = node;
        while at.name != *bottom {
            at = at.filtered().or_else(|| at.backing())?;
        }
        at.backing().map(|n| &**n)
    }
}
