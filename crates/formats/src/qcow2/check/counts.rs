//! Sparse counts of host clusters.

use std::collections::BTreeMap;

use dolmen_types::{Error, ErrorKind, Result};

/// Counts per page.
const PAGE: u64 = 1024;
/// Pages of one map: 512 MiB, enough for 2^27 clusters in use (8 TiB of 64 KiB clusters).
const MAX_PAGES: usize = 1 << 17;

/// Counts of clusters; those that were never touched are 0.
#[derive(Default)]
pub(super) struct Counts(BTreeMap<u64, Box<[u32]>>);

impl Counts {
    /// Adds `n` to the count of a cluster; it sticks at the largest number.
    pub(super) fn add(&mut self, c: u64, n: u64) -> Result<()> {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        if n == 0 {
            return Ok(());
        }
        if self.0.len() == MAX_PAGES && !self.0.contains_key(&(c / PAGE)) {
            return Err(Error::new(ErrorKind::Limit, "the image has too many clusters in use to be checked"));
        }
        let page = self.0.entry(c / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
        let slot = &mut page[(c % PAGE) as usize];
        *slot = slot.saturating_add(n);
        Ok(())
    }

    /// The count of a cluster.
    pub(super) fn get(&self, c: u64) -> u64 {
        self.0.get(&(c / PAGE)).map_or(0, |p| u64::from(p[(c % PAGE) as usize]))
    }

    /// All clusters with a count, in order.
    pub(super) fn nonzero(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().flat_map(|(page, counts)| {
            counts
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(move |(i, n)| (page * PAGE + i as u64, u64::from(*n)))
        })
    }

    /// Whether any of `n` clusters from `first` on has a count.
    pub(super) fn any(&self, first: u64, n: u64) -> bool {
        let end = first + n;
        self.0.range(first / PAGE..=(end.max(1) - 1) / PAGE).any(|(page, counts)| {
            let from = first.saturating_sub(page * PAGE).min(PAGE);
            let to = (end - page * PAGE).min(PAGE);
            counts[from as usize..to as usize].iter().any(|n| *n > 0)
        })
    }

    /// The last cluster with a count.
    pub(super) fn last(&self) -> Option<u64> {
        self.0
            .iter()
            .rev()
            .find_map(|(page, counts)| counts.iter().rposition(|n| *n > 0).map(|i| page * PAGE + i as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_over_pages() {
        let mut c = Counts::default();
        c.add(5000, 2).unwrap();
        c.add(5000, u64::MAX).unwrap();
        assert_eq!((c.get(5000), c.get(5001), c.last()), (u64::from(u32::MAX), 0, Some(5000)));
        assert!(c.any(0, 5001) && c.any(5000, 1) && c.any(4999, 100_000));
        assert!(!c.any(0, 5000) && !c.any(5001, 100_000) && !c.any(0, 0));
        assert_eq!(c.nonzero().count(), 1);
    }
}
