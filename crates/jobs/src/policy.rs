//! What a job does about an error while it copies.

use dolmen_types::{Error, ErrorKind, OptionType, Options, Result};

/// Which side of a job an error came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where it reads.
    Source,
    /// Where it writes.
    Target,
}

impl Side {
    /// The operation that events name.
    pub const fn operation(self) -> &'static str {
        match self {
            Side::Source => "read",
            Side::Target => "write",
        }
    }
}

/// What a user wants done about an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Fail.
    #[default]
    Report,
    /// Go on.
    Ignore,
    /// Pause until the user resumes the job, then try again.
    Stop,
    /// Pause when there is no space left, fail otherwise.
    Enospc,
}

impl OnError {
    /// The words of QMP, in the order of the variants.
    pub const WORDS: &'static [&'static str] = &["report", "ignore", "stop", "enospc"];
    /// The option of a job.
    pub const OPTION: OptionType = OptionType::Enum(&["report", "ignore", "enospc", "stop", "auto"]);
    const ALL: [OnError; 4] = [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc];

    /// The policy that a word stands for; `auto` is another word for `enospc`.
    pub fn from_word(word: &str) -> Option<OnError> {
        if word == "auto" {
            return Some(OnError::Enospc);
        }
        OnError::WORDS.iter().position(|w| *w == word).map(|i| OnError::ALL[i])
    }

    /// Takes the option `name`; [`OnError::Report`] if it is not there.
    ///
    /// # Errors
    /// `InvalidInput` for a word that is no policy.
    pub fn take(options: &mut Options, name: &str) -> Result<OnError> {
        let Some(word) = options.take_str(name)? else { return Ok(OnError::Report) };
        OnError::from_word(&word).ok_or_else(|| {
            let text = format!("Parameter '{name}' does not accept value '{word}'");
            Error::new(ErrorKind::InvalidInput, text).remedy(format!("one of: {}", OnError::WORDS.join(", ")))
        })
    }

    /// What is to be done about this error.
    pub fn action(self, error: &Error) -> Action {
        match self {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if error.kind() == ErrorKind::NoSpace => Action::Stop,
            OnError::Enospc => Action::Report,
        }
    }
}

/// What is done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses.
    Stop,
}

impl Action {
    /// The word that events carry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Action::Report => "report",
            Action::Ignore => "ignore",
            Action::Stop => "stop",
        }
    }
}

/// How a job goes on after an error that does not end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The user has resumed the job: try the same piece once more.
    Retry,
    /// The error is to be ignored: go on with something else. What that means for the failed
    /// piece is the job's own business.
    Skip,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_on_both_kinds_of_error() {
        let full = Error::new(ErrorKind::NoSpace, "full");
        let broken = Error::new(ErrorKind::Io, "broken");
        let table = [
            ("report", "report", "report"),
            ("ignore", "ignore", "ignore"),
            ("stop", "stop", "stop"),
            ("enospc", "stop", "report"),
            ("auto", "stop", "report"),
        ];
        for (word, on_full, on_broken) in table {
            let policy = OnError::from_word(word).expect("known");
            assert_eq!(policy.action(&full).as_str(), on_full, "{word}");
            assert_eq!(policy.action(&broken).as_str(), on_broken, "{word}");
        }
        assert_eq!(OnError::from_word("panic"), None);
    }
}
