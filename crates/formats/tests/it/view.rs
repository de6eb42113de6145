//! What an image shows, read by the letter of the specification from its bytes: the model that a repair is judged
//! by. It knows nothing of the driver.

use std::collections::BTreeMap;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a guest cluster reads as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// These bytes.
    Data(Vec<u8>),
    /// Zeroes.
    Zero,
    /// What the backing file has.
    Below,
    /// Nothing, or nothing that anybody ever wrote there: the mapping itself is damaged.
    Damaged,
}

/// An image as bytes.
pub(crate) struct View<'a> {
    pub(crate) bytes: &'a [u8],
    /// Bytes of the backing file; 0 when there is none.
    pub(crate) backing: u64,
}

/// The disks of an image by name: the active one is "", a snapshot has its id and name.
pub(crate) type Disks = BTreeMap<String, Vec<Seen>>;

impl View<'_> {
    fn be(&self, at: u64, n: u64) -> u64 {
        (at..at.saturating_add(n)).fold(0, |v, i| v << 8 | u64::from(self.byte(i)))
    }

    fn byte(&self, at: u64) -> u8 {
        usize::try_from(at).ok().and_then(|i| self.bytes.get(i)).copied().unwrap_or(0)
    }

    fn slice(&self, at: u64, n: u64) -> Vec<u8> {
        let end = self.bytes.len() as u64;
        let mut out = self.bytes[at.min(end) as usize..(at + n).min(end) as usize].to_vec();
        out.resize(n as usize, 0);
        out
    }

    fn bits(&self) -> u64 {
        self.be(20, 4)
    }

    fn has(&self, at: u64) -> bool {
        at < (self.bytes.len() as u64).next_multiple_of(1 << self.bits())
    }

    /// All disks.
    pub(crate) fn disks(&self) -> Disks {
        let size = self.be(24, 8);
        let mut all = Disks::from([(String::new(), self.disk(self.be(40, 8), self.be(36, 4), size))]);
        let mut at = self.be(64, 8);
        for _ in 0..self.be(60, 4).min(16) {
            if at >= 1 << 56 {
                break;
            }
            let (id, name, extra) = (self.be(at + 12, 2), self.be(at + 14, 2), self.be(at + 36, 4));
            if extra > 1024 || !self.has(at + 40) {
                break;
            }
            let names = at + 40 + extra;
            let name = String::from_utf8_lossy(&self.slice(names, id + name)).into_owned();
            let size = if extra >= 16 { self.be(at + 48, 8) } else { size };
            if size <= 64 << 20 && !name.is_empty() {
                all.insert(name, self.disk(self.be(at, 8), self.be(at + 8, 4), size));
            }
            at = (names + id + self.be(at + 14, 2)).next_multiple_of(8);
        }
        all
    }

    fn disk(&self, l1: u64, entries: u64, size: u64) -> Vec<Seen> {
        let cluster = 1u64 << self.bits();
        let per_table = cluster / 8;
        (0..size.div_ceil(cluster))
            .map(|c| {
                let i = c / per_table;
                if i >= entries
                    || l1 >= 1 << 56
                    || !l1.is_multiple_of(cluster)
                    || l1 == 0
                    || !self.has(l1 + entries * 8 - 1)
                {
                    return Seen::Damaged;
                }
                let raw = self.be(l1 + i * 8, 8);
                let table = raw & OFFSET;
                match table {
                    0 if raw != 0 => Seen::Damaged,
                    0 => self.below(c),
                    _ if !table.is_multiple_of(cluster) || !self.has(table) => Seen::Damaged,
                    _ => self.cluster(c, self.be(table + c % per_table * 8, 8)),
                }
            })
            .collect()
    }

    fn below(&self, c: u64) -> Seen {
        if c << self.bits() < self.backing { Seen::Below } else { Seen::Zero }
    }

    fn cluster(&self, c: u64, raw: u64) -> Seen {
        let bits = self.bits();
        let (cluster, version) = (1u64 << bits, self.be(4, 4));
        if raw >> 62 & 1 == 1 {
            let x = 62 - (bits - 8);
            let host = raw & ((1 << x) - 1);
            let sectors = (raw >> x & ((1 << (bits - 8)) - 1)) + 1;
            if host < cluster || !self.has(host) {
                return Seen::Damaged;
            }
            let packed = self.slice(host, sectors * 512 - host % 512);
            let mut out = vec![0; cluster as usize];
            let mut inflate = flate2::Decompress::new(false);
            let done = inflate.decompress(&packed, &mut out, flate2::FlushDecompress::Finish);
            return match done {
                Ok(_) if inflate.total_out() == cluster => Seen::Data(out),
                _ => Seen::Damaged,
            };
        }
        let host = raw & OFFSET;
        if !host.is_multiple_of(cluster) || (raw & 1 == 1 && version < 3) || (host == 0 && raw & !1 != 0) {
            return Seen::Damaged;
        }
        match (host, raw & 1) {
            (_, 1) => Seen::Zero,
            (0, _) => self.below(c),
            _ if !self.has(host) => Seen::Damaged,
            _ => Seen::Data(self.slice(host, cluster)),
        }
    }

    /// Host clusters of all data, compressed ones included.
    pub(crate) fn data_clusters(&self) -> Vec<u64> {
        let (cluster, l1, entries) = (1u64 << self.bits(), self.be(40, 8), self.be(36, 4));
        let mut tables: Vec<u64> = (0..entries).map(|i| self.be(l1 + i * 8, 8) & OFFSET).collect();
        let mut at = self.be(64, 8);
        for _ in 0..self.be(60, 4) {
            let (l1, n) = (self.be(at, 8), self.be(at + 8, 4));
            tables.extend((0..n).map(|i| self.be(l1 + i * 8, 8) & OFFSET));
            at = (at + 40 + self.be(at + 36, 4) + self.be(at + 12, 2) + self.be(at + 14, 2))
                .next_multiple_of(8);
        }
        tables.retain(|t| *t != 0);
        let mut out = Vec::new();
        for raw in tables.iter().flat_map(|t| (0..cluster / 8).map(move |i| self.be(t + i * 8, 8))) {
            let x = 62 - (self.bits() - 8);
            if raw >> 62 & 1 == 1 {
                let host = raw & ((1 << x) - 1);
                let sectors = (raw >> x & ((1 << (self.bits() - 8)) - 1)) + 1;
                out.extend(host / cluster..=(host / 512 * 512 + sectors * 512 - 1) / cluster);
            } else if raw & OFFSET != 0 {
                out.push((raw & OFFSET) / cluster);
            }
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// A cluster that is metadata and something else too, in an image whose tables can be read.
    pub(crate) fn contested(&self) -> Option<u64> {
        let cluster = 1u64 << self.bits();
        let mut ranges = vec![
            (0, cluster),
            (self.be(40, 8), self.be(36, 4) * 8),
            (self.be(48, 8), self.be(56, 4) * cluster),
        ];
        let entries =
            |at: u64, n: u64| (0..n).map(move |i| self.be(at + i * 8, 8) & OFFSET).filter(|t| *t != 0);
        let mut tables: Vec<u64> = entries(self.be(40, 8), self.be(36, 4)).collect();
        ranges.extend(entries(self.be(48, 8), self.be(56, 4) * cluster / 8).map(|b| (b, cluster)));
        let start = self.be(64, 8);
        let mut at = start;
        for _ in 0..self.be(60, 4) {
            let (l1, n) = (self.be(at, 8), self.be(at + 8, 4));
            ranges.push((l1, n * 8));
            tables.extend(entries(l1, n));
            at = (at + 40 + self.be(at + 36, 4) + self.be(at + 12, 2) + self.be(at + 14, 2))
                .next_multiple_of(8);
        }
        ranges.push((start, at - start));
        tables.sort_unstable();
        tables.dedup();
        ranges.extend(tables.into_iter().map(|t| (t, cluster)));
        let mut all: Vec<u64> = ranges
            .into_iter()
            .flat_map(|(at, len)| at / cluster..(at + len).div_ceil(cluster))
            .chain(self.data_clusters())
            .collect();
        all.sort_unstable();
        all.windows(2).find(|w| w[0] == w[1]).map(|w| w[0])
    }

    /// The refcount of a cluster (of 16 bits).
    pub(crate) fn refcount(&self, c: u64) -> u64 {
        let cluster = 1u64 << self.bits();
        let block = self.be(self.be(48, 8) + c / (cluster / 2) * 8, 8);
        if block == 0 { 0 } else { self.be(block + c % (cluster / 2) * 2, 2) }
    }
}
