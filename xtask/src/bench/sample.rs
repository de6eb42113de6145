//! Numbers of one measurement, and the medians of several.

/// What requests cost in one measurement. All per request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Wall-clock time, nanoseconds.
    pub(super) wall_ns: f64,
    /// CPU time of all threads, user and system, nanoseconds.
    pub(super) cpu_ns: f64,
}

/// A side of a row: its rounds, and the system calls that were counted apart.
#[derive(Clone, Debug)]
pub(super) struct Side {
    /// Requests of each measurement.
    pub(super) requests: u64,
    /// One for each round.
    pub(super) samples: Vec<Sample>,
    /// System calls per request, if they could be counted.
    pub(super) syscalls: Option<f64>,
}

impl Side {
    /// Medians of the rounds.
    pub(super) fn median(&self) -> Sample {
        Sample {
            wall_ns: median(self.samples.iter().map(|s| s.wall_ns)),
            cpu_ns: median(self.samples.iter().map(|s| s.cpu_ns)),
        }
    }
}

/// Both sides of a row.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) name: &'static str,
    /// The name of the program that stands for "theirs".
    pub(super) peer: &'static str,
    pub(super) ours: Side,
    pub(super) theirs: Side,
}

/// The middle of some values; the mean of the two in the middle of an even number.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut v: Vec<f64> = values.collect();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => v[n / 2],
        n => (v[n / 2 - 1] + v[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median([].into_iter()).is_nan());
    }
}
