//! A speed limit, as a value: when may the next piece start?
//!
//! The limit keeps the point in time at which everything that was admitted is paid for.
//! A piece is admitted as long as that point is at most a [`SLICE`] ahead, so that
//! pieces in flight overlap; then it moves the point by its own length. A piece that is longer
//! than a slice's worth is admitted whole, and paid for afterwards. Over any time the bytes admitted
//! are at most `speed * time`, plus a slice's worth, plus one piece.

use std::time::Duration;

use dolmen_rt::Instant;

/// How far ahead of its time a piece may start.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Bytes per second; 0 for no limit.
    speed: u64,
    /// When everything admitted is paid for.
    paid_at: Instant,
}

impl Limit {
    pub(crate) fn new(speed: u64) -> Limit {
        Limit { speed, paid_at: Instant::default() }
    }

    pub(crate) fn speed(&self) -> u64 {
        self.speed
    }

    /// What was admitted under the old speed is forgiven.
    pub(crate) fn set_speed(&mut self, speed: u64, now: Instant) {
        self.speed = speed;
        self.paid_at = now;
    }

    /// When the next piece may start; not after `now` if it may start at once.
    pub(crate) fn opens_at(&self, now: Instant) -> Instant {
        if self.speed == 0 {
            return now;
        }
        Instant::from_nanos(self.paid_at.as_nanos().saturating_sub(SLICE.as_nanos() as u64))
    }

    /// A piece of this many bytes starts now.
    pub(crate) fn admit(&mut self, bytes: u64, now: Instant) {
        if self.speed == 0 {
            return;
        }
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.speed);
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(now) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(limit: &mut Limit, piece: u64, secs: u64) -> u64 {
        let mut now = Instant::from_nanos(5_000_000_000);
        let end = now + Duration::from_secs(secs);
        let mut admitted = 0;
        while now < end {
            limit.admit(piece, now);
            admitted += piece;
            now = now.max(limit.opens_at(now));
        }
        admitted
    }

    #[test]
    fn the_limit_holds_and_is_used() {
        for (speed, piece) in [(MIB, 64 << 10), (10 * MIB, MIB), (64 << 10, MIB), (1, 1)] {
            let mut limit = Limit::new(speed);
            let admitted = run(&mut limit, piece, 60);
            assert!(admitted <= speed * 60 + speed / 10 + piece, "{speed} {piece}: {admitted}");
            assert!(admitted >= speed * 60, "{speed} {piece}: {admitted}");
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut limit = Limit::new(MIB);
        limit.admit(1, Instant::from_nanos(0));
        let late = Instant::from_nanos(3_600_000_000_000);
        assert!(limit.opens_at(late) <= late);
        limit.admit(MIB, late);
        assert_eq!(limit.opens_at(late), late + Duration::from_millis(900));
    }

    #[test]
    fn another_speed_counts_from_now() {
        let now = Instant::from_nanos(1_000_000_000);
        let mut limit = Limit::new(1);
        limit.admit(MIB, now);
        assert!(limit.opens_at(now) > now + Duration::from_secs(1_000_000));
        limit.set_speed(MIB, now);
        assert!(limit.opens_at(now) <= now);
        limit.set_speed(0, now);
        limit.admit(u64::MAX, now);
        assert_eq!(limit.opens_at(now), now);
    }
}
