//! Files that end before their images do.
//!
//! What is missing is an error where it is read. Once something is written behind it, it is a hole in the middle of the
//! file that reads as zeroes; so such an image is not opened for writing.

use std::collections::BTreeSet;

use dolmen_graph::{Io, Read};
use dolmen_types::Result;

use super::entry::{L1Entry, L2Entry, refcount_get};
use super::header::Header;
use super::image::{in_file, read_bytes, read_table};
use super::layout::HostOffset;
use super::snapshot::Snapshot;

/// More refcount blocks than this behind the end of the file are not looked through: the tables are.
const MAX_BLOCKS: usize = 16;

/// Fails when an L2 table or data of the image, or of a snapshot in it, lie beyond the end of the file.
///
/// A crash may leave counts of clusters that nothing refers to. They cost a look through the tables; an image
/// without such counts costs one refcount block.
pub(super) async fn check(
    io: Io<'_, Read>,
    header: &Header,
    l1: &[u64],
    reftable: &[u64],
    snapshots: &[Snapshot],
) -> Result<()> {
    if !counts_beyond(io, header, reftable).await? {
        return Ok(());
    }
    let mut seen = BTreeSet::new();
    tables(io, header, l1, &mut seen).await?;
    for s in snapshots {
        let bytes = u64::from(s.l1_entries) * 8;
        in_file("the L1 table of a snapshot", s.l1_table.0, bytes, io.size())?;
        let l1 = read_table(io, s.l1_table.0, s.l1_entries as usize).await?;
        tables(io, header, &l1, &mut seen).await?;
    }
    Ok(())
}

/// Whether a cluster beyond the end of the file counts as used.
async fn counts_beyond(io: Io<'_, Read>, header: &Header, reftable: &[u64]) -> Result<bool> {
    let geo = header.geometry();
    let end = geo.clusters_for(io.size());
    let per_block = geo.refblock_entries();
    let mut block = vec![0u8; geo.cluster_len()];
    let from = (end / per_block) as usize;
    let in_use = reftable.iter().enumerate().skip(from).filter(|(_, e)| **e & !511 != 0);
    for (looked_at, (i, entry)) in in_use.enumerate() {
        let host = entry & !511;
        if looked_at == MAX_BLOCKS
            || in_file("a refcount block", host, geo.cluster_size(), io.size()).is_err()
        {
            return Ok(true);
        }
        read_bytes(io, host, &mut block).await?;
        let first = end.saturating_sub(i as u64 * per_block);
        if (first..per_block).any(|c| refcount_get(&block, header.refcount_order, c as usize) != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn tables(io: Io<'_, Read>, header: &Header, l1: &[u64], seen: &mut BTreeSet<u64>) -> Result<()> {
    let geo = header.geometry();
    let mut table = vec![0u8; geo.cluster_len()];
    for entry in l1 {
        // What is damaged otherwise is found where it is used.
        let Ok(Some(host)) = L1Entry(*entry).table(geo) else { continue };
        if !seen.insert(host.0) {
            continue;
        }
        in_file("an L2 table", host.0, geo.cluster_size(), io.size())?;
        read_bytes(io, host.0, &mut table).await?;
        for raw in table.chunks_exact(8) {
            let raw = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
            match L2Entry::decode(raw, geo) {
                Ok(L2Entry::Data { host: HostOffset(at), .. }) => {
                    in_file("a data cluster", at, geo.cluster_size(), io.size())?;
                }
                Ok(L2Entry::Compressed { host: HostOffset(at), .. }) => {
                    in_file("a compressed cluster", at, 1, io.size())?;
                }
                Ok(L2Entry::Unallocated | L2Entry::Zero { .. }) | Err(_) => {}
            }
        }
    }
    Ok(())
}
