//! Flushing: running rounds, giving freed clusters back, closing.
//!
//! A round, and each write of the header, runs in a task of its own: if it could be cancelled half-way, an old copy
//! might reach the disk after a newer one.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use dolmen_graph::{ChildEdge, NodeState, Prealloc, RangeGuard};
use dolmen_rt::Rt;
use dolmen_types::{BlkEvent, Result, Span, WriteFlags};

use super::driver::Core;
use super::image::{Env, File};
use super::layout::ClusterIndex;
use super::meta::Freed;
use super::round::{Patch, Reached, Round};

/// What a step needs to go on without its caller.
struct Shielded {
    core: Arc<Core>,
    edge: ChildEdge,
    rt: Rt,
    state: Arc<NodeState>,
}

impl Shielded {
    fn new(core: &Core, env: Env<'_>) -> Shielded {
        Shielded {
            core: core.itself(),
            edge: env.file.edge().clone(),
            rt: env.file.rt().clone(),
            state: env.state().clone(),
        }
    }

    /// Gives back what can be, writes a round, draws the conclusion, and gives back again: then space that a guest
    /// discards is free after its next flush.
    async fn round(self) -> Result<()> {
        let file = File::new(&self.edge, &self.rt);
        let env = Env::alone(file, &self.state);
        self.core.reap(env).await;
        let round = self.core.meta().begin_round();
        let mut reached = Reached::Nothing;
        let result = self.core.write_round(file, &round, &mut reached).await;
        self.core.meta().end_round(round, reached, self.state.epochs.stamp());
        if result.is_ok() {
            self.core.reap(env).await;
        }
        self.core.end_turn();
        result
    }

    /// Writes the header and makes it durable.
    async fn header(self, patch: Patch) -> Result<()> {
        let file = File::new(&self.edge, &self.rt);
        let mut result = self.core.write_patches(file, &[patch]).await;
        if result.is_ok() {
            result = self.core.flush_file(file).await;
        }
        self.core.end_turn();
        result
    }
}

/// Joins neighbours: what was scattered over the disk may lie together in the file, and is discarded there in one go.
/// A cluster that lost two references stays in the list twice.
fn coalesce(mut list: Vec<Freed>) -> Vec<Freed> {
    list.sort_unstable_by_key(|f| f.first);
    let mut out: Vec<Freed> = Vec::new();
    for f in list {
        match out.last_mut() {
            Some(last) if last.first.plus(last.count) == f.first => last.count += f.count,
            _ => out.push(f),
        }
    }
    out
}

impl Core {
    /// A flush request.
    pub(super) async fn flush(&self, env: Env<'_>) -> Result<()> {
        if self.writable() { self.round(env).await } else { self.flush_file(env.file).await }
    }

    /// Makes everything that has been acknowledged so far durable. Requests that come while a round is under way
    /// share the next one.
    pub(super) async fn round(&self, env: Env<'_>) -> Result<()> {
        let need = self.meta().rounds_begun + 1;
        let _turn = self.turn().await;
        {
            let mut m = self.meta();
            if m.rounds_done >= need {
                return Ok(());
            }
            m.check_usable()?;
            m.busy = true;
        }
        env.file.rt().shielded(Shielded::new(self, env).round()).await
    }

    /// Writes the header; the caller has the turn.
    pub(super) async fn write_header(&self, env: Env<'_>, patch: Patch) -> Result<()> {
        self.meta().busy = true;
        env.file.rt().shielded(Shielded::new(self, env).header(patch)).await
    }

    /// What a shielded step ends with.
    fn end_turn(&self) {
        self.meta().busy = false;
        self.round_ended.notify(usize::MAX);
    }

    /// Waits for the right to write the header and to begin a round. A step that lost its caller still goes on, so
    /// the lock alone does not say that there is none.
    pub(super) async fn turn(&self) -> RangeGuard<'_> {
        let guard = self.rounds.lock(Span::new(0, 1)).await;
        loop {
            let ended = self.round_ended.listen();
            if !self.meta().busy {
                return guard;
            }
            ended.await;
        }
    }

    pub(super) async fn write_round(&self, file: File<'_>, r: &Round, reached: &mut Reached) -> Result<()> {
        if r.is_empty() {
            self.flush_file(file).await?;
            *reached = Reached::C;
            return Ok(());
        }
        self.write_patches(file, &r.unreachable).await?;
        self.flush_file(file).await?;
        *reached = Reached::A;
        if !r.reftable.is_empty() || r.header.is_some() {
            if r.moves_reftable() {
                file.read()?.event(BlkEvent::ReftableGrow)?;
            }
            self.write_patches(file, &r.reftable).await?;
            self.flush_file(file).await?;
            if let Some(header) = &r.header {
                self.write_patches(file, std::slice::from_ref(header)).await?;
                self.flush_file(file).await?;
            }
        }
        *reached = Reached::B;
        if !r.mappings.is_empty() {
            self.write_patches(file, &r.mappings).await?;
            self.flush_file(file).await?;
        }
        *reached = Reached::C;
        Ok(())
    }

    /// Gives back clusters whose mapping is gone from the disk and that no request can still be using. What fails
    /// stays counted, which `check` reports as a leak.
    async fn reap(&self, env: Env<'_>) {
        loop {
            let batch = {
                let mut m = self.meta();
                match m.unmapped.front() {
                    Some((stamp, _)) if env.over(*stamp) => m.unmapped.pop_front().map(|(_, b)| b),
                    _ => None,
                }
            };
            let Some(batch) = batch else { return };
            for f in coalesce(batch) {
                let _ = self.give_back(env, f).await;
            }
        }
    }

    async fn give_back(&self, env: Env<'_>, f: Freed) -> Result<()> {
        let io = env.file.read()?;
        io.event(BlkEvent::ClusterFree)?;
        io.event(BlkEvent::RefblockAlloc)?;
        let mut at = 0;
        while at < f.count {
            let first = f.first.plus(at);
            // How many of them have this as their last reference: those may be discarded in the file, while they
            // still count as used so that nobody takes them meanwhile.
            let mut last = 0;
            while last < f.count - at
                && self.with(env.file, |m| m.refcount(first.plus(last))).await? == 1
                && (last == 0 || self.geo.refcount_position(first.plus(last)).1 != 0)
            {
                last += 1;
            }
            if last > 0 && self.pass_discard() {
                let bits = self.geo.cluster_bits;
                let span = Span::new(first.0 << bits, last << bits);
                let inside = span.intersect(Span::new(0, env.file.size()));
                if let (Some(span), Ok(io)) = (inside, env.file.write()) {
                    // Giving space back is a favour, not a duty.
                    let _ = io.discard(span, WriteFlags::NONE).await;
                }
            }
            let count = last.max(1);
            for i in 0..count {
                self.with(env.file, |m| m.decrement(first.plus(i))).await?;
            }
            at += count;
        }
        Ok(())
    }

    /// Finds the end of what is used, in clusters. Nothing is in flight, and what was freed is free on the disk.
    async fn used_end(&self, env: Env<'_>) -> Result<u64> {
        let mut end = self.meta().high;
        while end > 0 && self.with(env.file, |m| m.refcount(ClusterIndex(end - 1))).await? == 0 {
            end -= 1;
        }
        Ok(end)
    }

    /// Writes out everything and leaves nothing behind.
    pub(super) async fn close(&self, env: Env<'_>) -> Result<()> {
        if !self.writable() || self.meta().broken.is_some() {
            return Ok(());
        }
        let unused: Vec<_> = self.meta().spare.drain(..).collect();
        for first in unused {
            // What fails is a leak; the data are still to be written out.
            let _ = self.give_back(env, Freed { first, count: 1 }).await;
        }
        while self.meta().any_dirty() || !self.meta().unmapped.is_empty() {
            self.round(env).await?;
            let waiting = self.meta().unmapped.front().is_some_and(|(stamp, _)| !env.over(*stamp));
            if waiting && !self.meta().any_dirty() {
                break;
            }
        }
        let high = self.meta().high;
        let mut end = high;
        if self.shrunk.load(SeqCst) {
            // What can't be looked at may be in use: the file stays as it is.
            end = self.used_end(env).await.unwrap_or(high);
        }
        if (self.grown.load(SeqCst) || end < high)
            && env.file.size() > end << self.geo.cluster_bits
            && let Ok(io) = env.file.resize()
            && io.resize(end << self.geo.cluster_bits, Prealloc::Off).await.is_ok()
        {
            // A longer file is as valid. But what is behind the high-water mark counts as zeroes, and the driver may go
            // on (a reopened node takes it over): the mark is lowered only with the file.
            self.meta().high = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_nothing_is_lost() {
        let list = |l: &[(u64, u64)]| -> Vec<Freed> {
            l.iter().map(|(first, count)| Freed { first: ClusterIndex(*first), count: *count }).collect()
        };
        assert_eq!(
            coalesce(list(&[(9, 1), (5, 2), (3, 1), (7, 2), (1, 1)])),
            list(&[(1, 1), (3, 1), (5, 5)])
        );
        // Two references to cluster 6, of compressed data perhaps.
        let twice = coalesce(list(&[(6, 1), (5, 2), (7, 1)]));
        let mut counted: Vec<u64> = twice.iter().flat_map(|f| f.first.0..f.first.0 + f.count).collect();
        counted.sort_unstable();
        assert_eq!(counted, [5, 6, 6, 7]);
    }
}
