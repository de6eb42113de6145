//! What a connection has to remember for the next one.
//!
//! The promise of the driver:
//!
//! - **A flush that succeeds covers every change acknowledged before it.** A change that was acknowledged and not
//!   flushed is in the hands of the server that acknowledged it. When the connection to that server breaks, it may
//!   have died, and the server behind the next connection need not know the change. So from then on every flush
//!   fails, as with a file after a failed flush: the protocol has no way to find out, and a flush that succeeds
//!   once more would hide the loss for ever.
//! - **An acknowledged change is not undone by an older one.** A change that was in flight when the connection
//!   broke is sent again over the next one (with `reconnect-delay`). The old server may be alive and execute the
//!   first copy at any later time. The copy alone does no harm, for it changes the same bytes to the same values;
//!   but it would overwrite a newer change of these bytes. So newer changes where such a copy may be executed are
//!   refused.
//!
//! Both end when the node is closed and opened again: whoever does that has seen to it that the old server is gone.
//! (Rejected: waiting for some time, for no time is long enough; asking the kernel whether the server's process has
//! ended, for it tells the process that listens, which need not be the one that serves.)

use dolmen_types::{Error, ErrorKind, Result, Span};

use super::link::Unanswered;

/// Changes whose end is unknown, at the most. Beyond that they are remembered as one range that covers them all.
const UNANSWERED_MAX: usize = 1024;

/// What must not be forgotten when a new connection takes the place of a broken one.
#[derive(Debug, Default)]
pub(super) struct History {
    /// The number of the last change.
    numbers: u64,
    /// Changes that were acknowledged, and how many of these the last successful flush covers.
    acknowledged: u64,
    flushed: u64,
    /// Acknowledged changes went down with a connection, so no flush can succeed any more.
    lost: bool,
    /// Changes that an old server may still execute.
    unanswered: Vec<Unanswered>,
}

impl History {
    /// A number for a change that is about to be sent.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Whether a change may be sent: no *other* change of the same bytes may come after it.
    ///
    /// # Errors
    /// `Io` when one may.
    pub(super) fn check(&self, number: u64, span: Span) -> Result<()> {
        match self.unanswered.iter().find(|u| u.change != number && u.span.overlaps(span)) {
            None => Ok(()),
            Some(u) => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "a write of {} bytes at offset {} was in flight when the connection to the NBD server broke; \
                     the old server may still execute it, and would undo a newer one",
                    u.span.len(),
                    u.span.offset()
                ),
            )
            .remedy("make sure that the old server has ended, then close the node and open it again")),
        }
    }

    /// A change was acknowledged that is not on stable storage yet; over the current connection, or over one that is
    /// broken by now.
    pub(super) fn acknowledged(&mut self, current: bool) {
        if current {
            self.acknowledged += 1;
        } else {
            self.lost = true;
        }
    }

    /// Whether anything was acknowledged that no flush covers.
    pub(super) const fn is_owed_a_flush(&self) -> bool {
        self.lost || self.acknowledged > self.flushed
    }

    /// A flush is about to be sent; it covers what was acknowledged before.
    ///
    /// # Errors
    /// `Io` when acknowledged changes may be lost.
    pub(super) fn flushing(&self) -> Result<u64> {
        if self.lost {
            return Err(lost());
        }
        Ok(self.acknowledged)
    }

    /// The server has flushed, over whatever connection.
    ///
    /// # Errors
    /// As for [`History::flushing`]: the connection may have broken meanwhile.
    pub(super) fn flushed(&mut self, mark: u64) -> Result<()> {
        if self.lost {
            return Err(lost());
        }
        self.flushed = self.flushed.max(mark);
        Ok(())
    }

    /// A new connection takes the place of one that broke while these changes were in flight.
    pub(super) fn reconnected(&mut self, unanswered: &[Unanswered]) {
        self.lost |= self.acknowledged > self.flushed;
        self.unanswered.extend(unanswered);
        if self.unanswered.len() > UNANSWERED_MAX {
            let start = self.unanswered.iter().map(|u| u.span.offset()).min().unwrap_or(0);
            let end = self.unanswered.iter().map(|u| u.span.end()).max().unwrap_or(0);
            // No change has this number, so none is excepted.
            self.unanswered = vec![Unanswered { change: 0, span: Span::from_range(start, end) }];
        }
    }
}

fn lost() -> Error {
    Error::new(
        ErrorKind::Io,
        "the connection to the NBD server broke while acknowledged writes were not flushed, so they may be lost",
    )
    .remedy("check the server and what is on it, then close the node and open it again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(change: u64, offset: u64) -> Unanswered {
        Unanswered { change, span: Span::new(offset, 512) }
    }

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it() {
        let mut h = History::default();
        h.acknowledged(true);
        let mark = h.flushing().expect("nothing is lost");
        // Acknowledged while the flush is under way.
        h.acknowledged(true);
        h.flushed(mark).expect("the first is covered");
        h.reconnected(&[]);
        assert!(h.flushing().is_err(), "the second is not");

        let mut h = History::default();
        h.acknowledged(true);
        let mark = h.flushing().expect("nothing is lost");
        h.flushed(mark).expect("all is covered");
        h.reconnected(&[]);
        assert!(h.flushing().is_ok());
        h.acknowledged(false);
        assert!(h.flushing().is_err(), "its server is gone");
    }

    #[test]
    fn a_flush_over_a_new_connection_does_not_cover_the_old_one() {
        let mut h = History::default();
        h.acknowledged(true);
        let mark = h.flushing().expect("nothing is lost yet");
        h.reconnected(&[]);
        assert!(h.flushed(mark).is_err());
    }

    #[test]
    fn a_change_may_be_repeated_and_not_followed() {
        let mut h = History::default();
        let first = h.number();
        h.reconnected(&[change(first, 1024)]);
        assert!(h.check(first, Span::new(1024, 512)).is_ok());
        let second = h.number();
        assert!(h.check(second, Span::new(1000, 100)).is_err());
        assert!(h.check(second, Span::new(0, 1024)).is_ok());
        assert!(h.check(second, Span::new(1536, 512)).is_ok());
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut h = History::default();
        for i in 0..=UNANSWERED_MAX as u64 {
            h.reconnected(&[change(i + 1, i * 4096)]);
        }
        assert!(h.unanswered.len() <= UNANSWERED_MAX);
        let number = h.number();
        assert!(h.check(number, Span::new(2048, 512)).is_err(), "between two of them");
        assert!(h.check(number, Span::new(1 << 30, 512)).is_ok());
    }
}
