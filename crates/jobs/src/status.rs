//! The states of a job and how it moves between them, as tables.
//!
//! ```text
//! undefined -> created -> running <-> paused
//!                |          |  \
//!                |          |   `-> ready <-> standby
//!                |          v        |
//!                |       waiting <---'
//!                |          |
//!                |          v
//!                |       pending ---------.
//!                |          |              v
//!                `-> (any) aborting -> concluded -> null
//! ```
//!
//! Jobs of one transaction wait for each other in `waiting`; `pending` is left by
//! `job-finalize` (or at once with auto-finalize), `concluded` by `job-dismiss` (or at
//! once with auto-dismiss). The tables are QEMU's, so that management
//! programs see the events in the order they know.

use dolmen_types::{Error, ErrorKind, Result};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The word that QMP clients know.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }
    };
}

words! {
    /// Where a job is in its life.
    Status {
        /// Being made; nobody can see it.
        Undefined = "undefined",
        /// Made, not started.
        Created = "created",
        /// At work.
        Running = "running",
        /// Stopped by the user, or by an error that stops it.
        Paused = "paused",
        /// Source and target are in step; waits for `job-complete`.
        Ready = "ready",
        /// Paused while ready.
        Standby = "standby",
        /// Done; waits for the other jobs of its transaction.
        Waiting = "waiting",
        /// Done; waits for `job-finalize`.
        Pending = "pending",
        /// Failed or cancelled; cleaning up.
        Aborting = "aborting",
        /// Finished either way; waits for `job-dismiss`.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
    }
}

words! {
    /// What a user can ask of a job.
    Verb {
        /// Give up.
        Cancel = "cancel",
        /// Stop for now.
        Pause = "pause",
        /// Go on.
        Resume = "resume",
        /// Change the speed limit.
        SetSpeed = "set-speed",
        /// Change options.
        Change = "change",
        /// End a ready job successfully.
        Complete = "complete",
        /// Make the result visible.
        Finalize = "finalize",
        /// Forget it.
        Dismiss = "dismiss",
    }
}

impl Status {
    /// The states that a job can move to from this one.
    pub const fn next(self) -> &'static [Status] {
        use Status as S;
        match self {
            S::Undefined => &[S::Created],
            S::Created => &[S::Running, S::Aborting, S::Null],
            S::Running => &[S::Paused, S::Ready, S::Waiting, S::Aborting],
            S::Paused => &[S::Running],
            S::Ready => &[S::Standby, S::Waiting, S::Aborting],
            S::Standby => &[S::Ready],
            S::Waiting => &[S::Pending, S::Aborting],
            S::Pending => &[S::Aborting, S::Concluded],
            S::Aborting => &[S::Aborting, S::Concluded],
            S::Concluded => &[S::Null],
            S::Null => &[],
        }
    }

    /// Whether a job can move from this state to `to`.
    pub fn can_become(self, to: Status) -> bool {
        self.next().contains(&to)
    }

    /// Moves on.
    ///
    /// # Panics
    /// When the table has no such transition: jobs decide what happens next, so this is a
    /// mistake in a job, never in what a user has asked for.
    #[must_use]
    pub fn step(self, to: Status) -> Status {
        assert!(self.can_become(to), "a job can't go from {} to {}", self.as_str(), to.as_str());
        to
    }
}

impl Verb {
    /// The states in which a user may ask for this.
    pub const fn legal_in(self) -> &'static [Status] {
        use Status as S;
        match self {
            Verb::Cancel => {
                &[S::Created, S::Running, S::Paused, S::Ready, S::Standby, S::Waiting, S::Pending]
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                &[S::Created, S::Running, S::Paused, S::Ready, S::Standby]
            }
            Verb::Complete => &[S::Ready, S::Standby],
            Verb::Finalize => &[S::Pending],
            Verb::Dismiss => &[S::Concluded],
        }
    }

    /// Checks that job `id` in state `status` may be asked for this.
    ///
    /// # Errors
    /// `InvalidInput`, with the states in which it could be.
    pub fn check(self, id: &str, status: Status) -> Result<()> {
        if self.legal_in().contains(&status) {
            return Ok(());
        }
        let states: Vec<_> = self.legal_in().iter().map(|s| s.as_str()).collect();
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "Job '{id}' in state '{}' cannot accept command verb '{}'",
                status.as_str(),
                self.as_str()
            ),
        )
        .remedy(format!("'{}' is possible in: {}", self.as_str(), states.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The transitions as text, written down independently of the code.
    const TRANSITIONS: &[(&str, &str)] = &[
        ("undefined", "created"),
        ("created", "running aborting null"),
        ("running", "paused ready waiting aborting"),
        ("paused", "running"),
        ("ready", "standby waiting aborting"),
        ("standby", "ready"),
        ("waiting", "pending aborting"),
        ("pending", "aborting concluded"),
        ("aborting", "aborting concluded"),
        ("concluded", "null"),
        ("null", ""),
    ];

    const VERBS: &[(&str, &str)] = &[
        ("cancel", "created running paused ready standby waiting pending"),
        ("pause", "created running paused ready standby"),
        ("resume", "created running paused ready standby"),
        ("set-speed", "created running paused ready standby"),
        ("change", "created running paused ready standby"),
        ("complete", "ready standby"),
        ("finalize", "pending"),
        ("dismiss", "concluded"),
    ];

    fn row<'a>(table: &[(&str, &'a str)], name: &str) -> Vec<&'a str> {
        let found: Vec<_> = table.iter().filter(|(n, _)| *n == name).collect();
        assert_eq!(found.len(), 1, "{name} has one row");
        found[0].1.split_whitespace().collect()
    }

    #[test]
    fn every_pair_of_states() {
        for from in Status::ALL {
            let allowed = row(TRANSITIONS, from.as_str());
            for to in Status::ALL {
                let expected = allowed.contains(&to.as_str());
                assert_eq!(from.can_become(*to), expected, "{} -> {}", from.as_str(), to.as_str());
                let moved = std::panic::catch_unwind(|| from.step(*to));
                assert_eq!(moved.ok(), expected.then_some(*to));
            }
        }
    }

    #[test]
    fn every_verb_in_every_state() {
        for verb in Verb::ALL {
            let legal = row(VERBS, verb.as_str());
            for status in Status::ALL {
                let checked = verb.check("j", *status);
                assert_eq!(checked.is_ok(), legal.contains(&status.as_str()), "{verb:?} in {status:?}");
            }
        }
        let e = Verb::Dismiss.check("j0", Status::Running).unwrap_err();
        assert_eq!(e.to_string(), "Job 'j0' in state 'running' cannot accept command verb 'dismiss'");
        assert_eq!(e.remedy_text(), Some("'dismiss' is possible in: concluded"));
    }

    /// From everywhere a job can come to its end, and nothing leads out of it.
    #[test]
    fn every_life_ends() {
        for start in Status::ALL {
            let mut reached = vec![*start];
            let mut at = 0;
            while at < reached.len() {
                for next in reached[at].next() {
                    if !reached.contains(next) {
                        reached.push(*next);
                    }
                }
                at += 1;
            }
            assert!(reached.contains(&Status::Null), "{start:?}");
        }
    }
}
