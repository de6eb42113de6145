//! The seeded generator behind every drawn decision.
//!
//! Our own (SplitMix64, a dozen lines) rather than a crate's: a seed in a failure report
//! has to mean the same run after every update of the dependencies.

/// A small, fast, reproducible generator of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub const fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// A sequence that is independent of this one's further use; for a part of a test
    /// whose draws should not shift the others'.
    pub fn fork(&mut self) -> Random {
        Random(self.u64() ^ 0x9e6c_63d0_876a_68ee)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // The bias of the remainder is of no matter for tests.
        if n == 0 { 0 } else { self.u64() % n }
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// True `percent` times of a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of these.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_sequence() {
        // The published test vector of SplitMix64 for seed 1234567.
        let mut r = Random::new(1_234_567);
        assert_eq!(r.u64(), 6_457_827_717_110_365_317);
        assert_eq!(r.u64(), 3_203_168_211_198_807_973);
        let mut a = Random::new(7);
        let mut b = Random::new(7);
        assert_eq!(a.fork().u64(), b.fork().u64());
        assert_eq!(a.u64(), b.u64());
    }

    #[test]
    fn ranges_hold() {
        let mut r = Random::new(1);
        for _ in 0..1000 {
            assert!((3..=5).contains(&r.between(3, 5)));
            assert!(r.below(4) < 4);
        }
        assert_eq!(r.below(0), 0);
    }
}
