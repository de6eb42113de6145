//! Lanes: a number for each runtime that is alive, so that every core can count in a place of its own.
//!
//! A counter that many cores add to costs a locked instruction and a cache line that travels. With a lane each core has
//! its own word and adds to it with a plain load and store; who reads adds the words up. That is right only because no
//! two live runtimes ever have the same lane, which this file guarantees. More runtimes than lanes have none, and count
//! in the shared place.

use std::sync::atomic::{AtomicU64, Ordering};

/// Taken lanes, one bit each. A lane that is given back is handed to the next runtime with everything that the last
/// one stored (release here, acquire there).
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// The lane of one runtime; given back when dropped.
#[derive(Debug)]
pub struct Lane {
    number: u32,
}

impl Lane {
    /// How many lanes there are.
    pub const COUNT: usize = 64;

    /// A free lane, or none if all are taken.
    pub fn take() -> Lane {
        let mut taken = TAKEN.load(Ordering::Relaxed);
        loop {
            let number = taken.trailing_ones();
            if number as usize >= Lane::COUNT {
                return Lane { number };
            }
            match TAKEN.compare_exchange_weak(
                taken,
                taken | 1 << number,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Lane { number },
                Err(now) => taken = now,
            }
        }
    }

    /// The number, below [`Lane::COUNT`]; `None` when there was none left.
    pub fn number(&self) -> Option<usize> {
        let n = self.number as usize;
        (n < Lane::COUNT).then_some(n)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.number().is_some() {
            TAKEN.fetch_and(!(1 << self.number), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_shares_a_lane() {
        // Other tests of this process hold some.
        let many: Vec<Lane> = (0..2 * Lane::COUNT).map(|_| Lane::take()).collect();
        let mut numbers: Vec<usize> = many.iter().filter_map(Lane::number).collect();
        let held = numbers.len();
        assert!(held <= Lane::COUNT);
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), held, "each lane once");
        assert!(many.last().is_some_and(|l| l.number().is_none()), "there were more than lanes");
        drop(many);
        assert!(Lane::take().number().is_some(), "they come back");
    }
}
