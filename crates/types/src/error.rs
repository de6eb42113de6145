//! The error type: a small stable kind, what was being done, and the source.
//!
//! An [`Error`] is one pointer, so that `Result<()>` stays within 16 bytes on the
//! data path. A refusal of the access control carries both parties as data
//! ([`Conflict`]), never only as text.

use std::fmt;

use crate::Actions;

/// `Result` with Dolmen's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in a form that callers may match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No such file, node, export, job.
    NotFound,
    /// It exists already.
    AlreadyExists,
    /// The operating system or a policy does not permit it.
    PermissionDenied,
    /// The access control refused: see [`Error::conflict`].
    Conflict,
    /// Another process holds a lock on the image.
    Locked,
    /// A request or an option makes no sense.
    InvalidInput,
    /// The image or the peer breaks its specification.
    Corrupt,
    /// Well-formed, but not something that this build or node can do.
    Unsupported,
    /// The node can't be written.
    ReadOnly,
    /// No space left.
    NoSpace,
    /// The range lies beyond the end of the node.
    OutOfBounds,
    /// A limit that protects against hostile input was met.
    Limit,
    /// Something has to finish first.
    Busy,
    /// The operation was cancelled.
    Cancelled,
    /// A deadline passed.
    TimedOut,
    /// The connection to a peer was lost.
    Disconnected,
    /// Any other input/output error.
    Io,
}

impl ErrorKind {
    /// The errno that guests and NBD clients see.
    pub const fn errno(self) -> i32 {
        match self {
            ErrorKind::NotFound => 2,       // ENOENT
            ErrorKind::AlreadyExists => 17, // EEXIST
            ErrorKind::PermissionDenied | ErrorKind::Conflict | ErrorKind::ReadOnly => 1, // EPERM
            ErrorKind::Locked => 11,        // EAGAIN
            ErrorKind::InvalidInput | ErrorKind::OutOfBounds => 22, // EINVAL
            // A lost peer is lost storage for those who use it: they expect EIO of a disk.
            ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::Disconnected => 5, // EIO
            ErrorKind::Unsupported => 95,                                      // EOPNOTSUPP
            ErrorKind::NoSpace => 28,                                          // ENOSPC
            ErrorKind::Limit => 27,                                            // EFBIG
            ErrorKind::Busy => 16,                                             // EBUSY
            ErrorKind::Cancelled => 125,                                       // ECANCELED
            ErrorKind::TimedOut => 110,                                        // ETIMEDOUT
        }
    }

    /// The kind that an errno of the operating system belongs to.
    pub const fn from_errno(errno: i32) -> ErrorKind {
        match errno {
            2 => ErrorKind::NotFound,
            17 => ErrorKind::AlreadyExists,
            1 | 13 => ErrorKind::PermissionDenied,
            11 => ErrorKind::Locked,
            22 => ErrorKind::InvalidInput,
            95 | 38 | 25 => ErrorKind::Unsupported,
            30 => ErrorKind::ReadOnly,
            28 | 122 => ErrorKind::NoSpace,
            16 => ErrorKind::Busy,
            27 => ErrorKind::Limit,
            125 => ErrorKind::Cancelled,
            110 => ErrorKind::TimedOut,
            104 | 108 | 32 | 111 => ErrorKind::Disconnected,
            _ => ErrorKind::Io,
        }
    }
}

/// One side of a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its operation id, or the driver's node when a driver holds the claim.
    pub id: String,
    /// What it is: "export", "job", "node", "process", ...
    pub kind: String,
    /// More about it: "nbd, writable", "mirror of 'top', ready", "pid 4711: qemu-img".
    pub detail: String,
    /// Since when, in seconds before the refusal; `None` for the one that asks now.
    pub since_secs: Option<u64>,
    /// What it needs at the node.
    pub needs: Actions,
    /// What it allows others to do at the node.
    pub allows: Actions,
}

/// A refusal by the access control, as data: the four parts of every such message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The node (or the file) where the parties meet.
    pub node: String,
    /// What is needed by `asks` and not allowed by `denies`.
    pub actions: Actions,
    /// Who asks.
    pub asks: Party,
    /// Who does not allow it.
    pub denies: Party,
    /// Why the one that denies does so.
    pub why: String,
    /// What would work, most useful first.
    pub remedies: Vec<String>,
}

struct Inner {
    kind: ErrorKind,
    errno: Option<i32>,
    /// Outermost last.
    context: Vec<String>,
    message: String,
    remedy: Option<String>,
    conflict: Option<Conflict>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// An error: kind, message, context, remedy, source. One pointer in size.
pub struct Error(Box<Inner>);

impl Error {
    /// An error with a message.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            errno: None,
            context: Vec::new(),
            message: message.into(),
            remedy: None,
            conflict: None,
            source: None,
        }))
    }

    /// An error of the operating system.
    #[cold]
    pub fn from_errno(errno: i32, message: impl Into<String>) -> Error {
        let mut e = Error::new(ErrorKind::from_errno(errno), message);
        e.0.errno = Some(errno);
        e.0.source = Some(Box::new(std::io::Error::from_raw_os_error(errno)));
        e
    }

    /// A refusal of the access control.
    #[cold]
    pub fn refused(conflict: Conflict) -> Error {
        let mut e = Error::new(ErrorKind::Conflict, String::new());
        e.0.conflict = Some(conflict);
        e
    }

    /// The same for another process that holds a lock.
    #[cold]
    pub fn locked(conflict: Conflict) -> Error {
        let mut e = Error::new(ErrorKind::Locked, String::new());
        e.0.conflict = Some(conflict);
        e
    }

    /// Adds the underlying error.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// Adds what was being done, outermost last.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Error {
        self.0.context.push(context.into());
        self
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Error {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Adds a way out that the one who asked knows, in front of those that are there.
    #[must_use]
    pub fn first_remedy(mut self, remedy: impl Into<String>) -> Error {
        let first = remedy.into();
        match (&mut self.0.conflict, &mut self.0.remedy) {
            (Some(c), _) => c.remedies.insert(0, first),
            (None, Some(r)) => *r = format!("{first}, or {r}"),
            (None, none) => *none = Some(first),
        }
        self
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno for guests and NBD clients: the original one if the operating system
    /// reported it, else the one that belongs to the kind.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or(self.0.kind.errno())
    }

    /// The way out, if one is known.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The parties of a refusal.
    pub fn conflict(&self) -> Option<&Conflict> {
        self.0.conflict.as_ref()
    }

    /// For a lock of another process: the words that QEMU's tools use and scripts look for, such as
    /// `Failed to get "write" lock`, and their hint on a second line. `None` for other errors.
    pub fn lock_text(&self) -> Option<String> {
        let c = self.conflict().filter(|_| self.0.kind == ErrorKind::Locked)?;
        let word = c.actions.iter().find_map(crate::Action::qmp_word)?;
        // "Shared" when somebody needs what we do not allow.
        let shared = if c.asks.kind == "process" { "shared " } else { "" };
        Some(format!(
            "Failed to get {shared}\"{word}\" lock\nIs another process using the image [{}]?",
            c.node
        ))
    }

    /// A second error with the same kind and text, for every request that waited for
    /// the same thing. The source is kept as text.
    #[must_use]
    pub fn duplicate(&self) -> Error {
        let mut e = Error::new(self.0.kind, self.0.message.clone());
        e.0.errno = self.0.errno;
        e.0.context = self.0.context.clone();
        e.0.remedy = self.0.remedy.clone();
        e.0.conflict = self.0.conflict.clone();
        e.0.source = self.0.source.as_ref().map(|s| s.to_string().into());
        e
    }
}

/// The text without the remedy, context outermost first, then the source.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.context.iter().rev() {
            write!(f, "{c}: ")?;
        }
        match &self.0.conflict {
            Some(c) => write!(f, "{c}")?,
            None => f.write_str(&self.0.message)?,
        }
        match &self.0.source {
            Some(s) => match s.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
                // "No such file or directory", without "(os error 2)".
                Some(_) => {
                    let text = s.to_string();
                    write!(f, ": {}", text.rsplit_once(" (os error").map_or(text.as_str(), |(t, _)| t))
                }
                None => write!(f, ": {s}"),
            },
            None => Ok(()),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phrases: Vec<_> = self.actions.iter().map(|a| a.phrase()).collect();
        write!(
            f,
            "node '{}': {} needs to {}, but {} {}",
            self.node,
            self.asks,
            phrases.join(" and to "),
            self.denies,
            self.why
        )?;
        if !self.remedies.is_empty() {
            let text = self.remedies.join(", or ");
            let mut chars = text.chars();
            let first = chars.next().into_iter().flat_map(char::to_uppercase).collect::<String>();
            write!(f, ". {first}{}", chars.as_str())?;
        }
        f.write_str(".")
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}'", self.kind, self.id)?;
        let since = self.since_secs.map(|s| match s {
            0..=59 => format!("since {s} s"),
            60..=7199 => format!("since {} min", s / 60),
            _ => format!("since {} h", s / 3600),
        });
        match (self.detail.is_empty(), since) {
            (true, None) => Ok(()),
            (false, None) => write!(f, " ({})", self.detail),
            (true, Some(s)) => write!(f, " ({s})"),
            (false, Some(s)) => write!(f, " ({}, {s})", self.detail),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        if let Some(r) = &self.0.remedy {
            write!(f, " [{r}]")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

impl From<std::io::Error> for Error {
    #[cold]
    fn from(e: std::io::Error) -> Error {
        match e.raw_os_error() {
            Some(errno) => {
                let mut out = Error::new(ErrorKind::from_errno(errno), "");
                let text = e.to_string();
                out.0.message = text.rsplit_once(" (os error").map_or(text.as_str(), |(t, _)| t).to_owned();
                out.0.errno = Some(errno);
                out
            }
            None => {
                let kind = match e.kind() {
                    std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                    std::io::ErrorKind::UnexpectedEof => ErrorKind::Disconnected,
                    std::io::ErrorKind::TimedOut => ErrorKind::TimedOut,
                    std::io::ErrorKind::InvalidData => ErrorKind::Corrupt,
                    std::io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
                    _ => ErrorKind::Io,
                };
                Error::new(kind, e.to_string())
            }
        }
    }
}

/// Adds context to a `Result`.
pub trait ResultExt<T> {
    /// Adds what was being done; the text is made only when there is an error.
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().context(context()))
    }
}

const _: () = assert!(size_of::<Result<()>>() <= 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_outside_in() {
        let e = Error::from_errno(2, "Could not open 'x'").context("node 'top'");
        assert_eq!(e.to_string(), "node 'top': Could not open 'x': No such file or directory");
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert_eq!(e.errno(), 2);
    }

    #[test]
    fn a_refusal_says_four_things() {
        let c = Conflict {
            node: "base".into(),
            actions: Actions::V,
            asks: Party {
                id: "exp0".into(),
                kind: "export".into(),
                detail: "nbd, writable".into(),
                since_secs: None,
                needs: Actions::D | Actions::V,
                allows: Actions::EVERY,
            },
            denies: Party {
                id: "mir0".into(),
                kind: "job".into(),
                detail: "mirror of 'top', ready".into(),
                since_secs: Some(240),
                needs: Actions::D,
                allows: Actions::D | Actions::M,
            },
            why: "reads it as part of its source".into(),
            remedies: vec![
                "Finish the job first (job-complete or job-cancel 'mir0')".into(),
                "export 'base' read-only".into(),
            ],
        };
        assert_eq!(Error::refused(c.clone()).lock_text(), None);
        let lock = Error::locked(c.clone()).lock_text().unwrap();
        assert_eq!(lock, "Failed to get \"write\" lock\nIs another process using the image [base]?");
        assert_eq!(
            Error::refused(c).to_string(),
            "node 'base': export 'exp0' (nbd, writable) needs to write data, but job 'mir0' (mirror of 'top', ready, \
             since 4 min) reads it as part of its source. Finish the job first (job-complete or job-cancel 'mir0'), \
             or export 'base' read-only."
        );
    }
}
