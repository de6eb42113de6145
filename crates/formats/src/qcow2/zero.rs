//! Zero writes and discards.
//!
//! Version 3 images have zero clusters, so both change entries only. Version 2 images do not: there, zeroes are
//! unmapped where nothing can ever shine through from below, and written as data elsewhere.
//!
//! That a backing file ends before a range proves nothing: it may grow, and what was never written here would then
//! show its data. An acknowledged zero write is an entry or data of this image ([`Core::nothing_below`]).

use dolmen_graph::{Prealloc, chain_status};
use dolmen_rt::{Memory, carry};
use dolmen_types::{BlkEvent, Error, ErrorKind, Result, Span, WriteFlags};

use super::driver::Core;
use super::entry::L2Entry;
use super::image::Env;
use super::meta::Place;

/// Largest buffer of zeroes, where zeroes have to be written as data.
const MAX_ZERO_BUFFER: u64 = 1 << 20;

impl Core {
    /// Whether what this image does not map reads as zeroes for good. Not when it has a backing node, however short
    /// that is, nor when it only names one: it is opened with it the next time.
    pub(super) fn nothing_below(&self, env: Env<'_>) -> bool {
        env.backing.is_none() && self.meta().header.backing_file.is_none()
    }

    /// Whether all of a range that this image does not map reads as zeroes from below now.
    async fn zero_below(&self, env: Env<'_>, span: Span) -> bool {
        let Some(backing) = env.backing else { return true };
        let mut rest = span.intersect(Span::new(0, env.backing_size())).unwrap_or(Span::new(0, 0));
        while !rest.is_empty() {
            // What can't be told has to be read, and whoever reads it says why it can't.
            match chain_status(&backing.node, env.file.rt(), rest, None).await {
                Ok(s) if s.zero => rest = rest.skip(s.len),
                Ok(_) | Err(_) => return false,
            }
        }
        true
    }

    /// The whole clusters of a span; the last one of the disk counts as whole although the disk ends in it.
    pub(super) fn whole_clusters(&self, span: Span) -> Span {
        let cluster = self.geo.cluster_size();
        let start = span.offset().next_multiple_of(cluster);
        let end = if span.end() >= self.size() { span.end().next_multiple_of(cluster) } else { span.end() };
        let end = end / cluster * cluster;
        Span::from_range(start, end.max(start))
    }

    /// A zero write request.
    pub(super) async fn write_zeroes(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let whole = self.whole_clusters(span);
        if whole.is_empty() {
            // Within one cluster, or the ends of two.
            for part in span.blocks(self.geo.cluster_size()) {
                self.zero_part(env, part, flags).await?;
            }
            return Ok(());
        }
        if span.offset() < whole.offset() {
            self.zero_part(env, Span::from_range(span.offset(), whole.offset()), flags).await?;
        }
        let mut rest = whole;
        while !rest.is_empty() {
            self.begin_change(env).await?;
            let part = self.table_part(rest);
            let _range = self.ranges.lock(part).await;
            if self.geo.version >= 3 {
                self.zero_entries(env, part, flags.has(WriteFlags::MAY_UNMAP)).await?;
            } else {
                self.zero_without_entries(env, part, flags).await?;
            }
            rest = rest.skip(part.len());
        }
        if span.end() > whole.end() {
            self.zero_part(env, Span::from_range(whole.end(), span.end()), flags).await?;
        }
        Ok(())
    }

    pub(super) async fn zero_entries(&self, env: Env<'_>, span: Span, unmap: bool) -> Result<()> {
        self.set_range(env, span, |_, old| match old {
            L2Entry::Data { host, copied: true } if !unmap => L2Entry::Zero { kept: Some((host, true)) },
            L2Entry::Zero { kept: Some((_, true)) } if !unmap => old,
            L2Entry::Unallocated
            | L2Entry::Zero { .. }
            | L2Entry::Data { .. }
            | L2Entry::Compressed { .. } => L2Entry::Zero { kept: None },
        })
        .await
    }

    /// Version 2 has no zero clusters: unmap where nothing shines through, else write zeroes.
    pub(super) async fn zero_without_entries(
        &self,
        env: Env<'_>,
        span: Span,
        flags: WriteFlags,
    ) -> Result<()> {
        // Whole clusters, as entries are changed.
        let step = MAX_ZERO_BUFFER.max(self.geo.cluster_size());
        let mut rest = span;
        while !rest.is_empty() {
            let run = self.find(env, rest.offset(), rest.len().min(step)).await?;
            let part = rest.prefix(run.len);
            let nothing_below = self.nothing_below(env);
            match run.place {
                Place::Unallocated if nothing_below => {}
                Place::Data { copied: true, .. } if !flags.has(WriteFlags::MAY_UNMAP) || !nothing_below => {
                    self.zero_locked(env, part, flags).await?;
                }
                Place::Data { .. } | Place::Compressed { .. } if nothing_below => {
                    self.set_range(env, part, |_, _| L2Entry::Unallocated).await?;
                }
                Place::Unallocated | Place::Zero { .. } | Place::Data { .. } | Place::Compressed { .. } => {
                    self.zero_locked(env, part, flags).await?;
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Zeroes a part of one cluster.
    pub(super) async fn zero_part(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        self.begin_change(env).await?;
        let cluster = span.align_out(self.geo.cluster_size());
        let _range = self.ranges.lock(cluster).await;
        self.zero_part_locked(env, span, flags).await
    }

    /// Zeroes a part of one cluster, of which the caller holds the range lock. A cluster that reads as zeroes all over
    /// afterwards becomes a zero cluster: no data are allocated for it.
    pub(super) async fn zero_part_locked(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let cluster = span.align_out(self.geo.cluster_size());
        if self.geo.version >= 3 {
            let run = self.find(env, cluster.offset(), 1).await?;
            let head = Span::from_range(cluster.offset(), span.offset());
            let tail = Span::from_range(span.end(), cluster.end().min(self.size()).max(span.end()));
            if run.place == Place::Unallocated
                && self.zero_below(env, head).await
                && self.zero_below(env, tail).await
            {
                return self.set_range(env, cluster, |_, _| L2Entry::Zero { kept: None }).await;
            }
        }
        self.zero_locked(env, span, flags).await
    }

    /// Zeroes a range without zero clusters: nothing where it reads as zeroes, in place where that is possible,
    /// as data otherwise. The caller holds the range lock.
    pub(super) async fn zero_locked(&self, env: Env<'_>, span: Span, flags: WriteFlags) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let lease = env.lease();
            let step = rest.prefix_to(MAX_ZERO_BUFFER, self.geo.cluster_size());
            let run = self.find(env, rest.offset(), step.len()).await?;
            let part = rest.prefix(run.len);
            match run.place {
                Place::Zero { .. } => {}
                Place::Unallocated if self.nothing_below(env) => {}
                Place::Data { host, copied: true } => {
                    let checked = self.meta().check_overlap(host, part.len());
                    if let Err(e) = checked {
                        return Err(self.note_damage(env, e).await);
                    }
                    self.reserve(env.file, host.0 + part.len(), Prealloc::Off).await?;
                    let io = env.file.write()?;
                    io.event(BlkEvent::WriteAio)?;
                    let keep = flags.without(WriteFlags::FUA | WriteFlags::UNCHANGED);
                    carry(io.write_zeroes(Span::new(host.0, part.len()), keep), lease).await?;
                }
                Place::Unallocated | Place::Data { .. } | Place::Compressed { .. } => {
                    if flags.has(WriteFlags::NO_FALLBACK) {
                        return Err(Error::new(
                            ErrorKind::Unsupported,
                            "zeroes would have to be written as data here",
                        ));
                    }
                    for piece in part.blocks(self.geo.l2_coverage()) {
                        let zeroes = Memory::zeroed(piece.len() as usize).iovec();
                        self.write_mapping(env, piece, &zeroes).await?;
                    }
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// A discard request. Parts of clusters are left alone, and so is everything that a version 2 image could
    /// only uncover its backing file for.
    pub(super) async fn discard(&self, env: Env<'_>, span: Span) -> Result<()> {
        let whole = self.whole_clusters(span);
        let backed = !self.nothing_below(env);
        let zero_entries = self.geo.version >= 3;
        if backed && !zero_entries {
            return Ok(());
        }
        let mut rest = whole;
        while !rest.is_empty() {
            self.begin_change(env).await?;
            let part = self.table_part(rest);
            let _range = self.ranges.lock(part).await;
            // No table is made just to say that nothing is there.
            let run = self.find(env, part.offset(), part.len()).await?;
            if run.len < part.len() || run.place != Place::Unallocated || backed {
                self.set_range(env, part, |_, old| match old {
                    L2Entry::Unallocated if !backed => old,
                    L2Entry::Zero { kept: None } => old,
                    L2Entry::Unallocated
                    | L2Entry::Zero { .. }
                    | L2Entry::Data { .. }
                    | L2Entry::Compressed { .. } => {
                        if zero_entries {
                            L2Entry::Zero { kept: None }
                        } else {
                            L2Entry::Unallocated
                        }
                    }
                })
                .await?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }
}
