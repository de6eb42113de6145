//! Names of things: nodes, operations, and what a child is to its parent.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// A name that the program makes up itself, not checked.
            pub fn internal(name: impl AsRef<str>) -> Self {
                Self(name.as_ref().into())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl Deref for $name {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

name_type! {
    /// The name of a node in the graph (`node-name`), unique at any time.
    ///
    /// Names that the program makes up start with `#`, which users can't type.
    NodeName
}
name_type! {
    /// The id of an operation: an export, a job, an instant command or a monitor
    /// reference. Unique among everything that uses nodes.
    OpId
}

impl NodeName {
    /// The longest name that interfaces accept, in bytes.
    pub const MAX_LEN: usize = 31;

    /// Checks a name given by a user: a letter first, then letters, digits, `-`, `.`
    /// and `_`, at most [`NodeName::MAX_LEN`] bytes.
    pub fn parse(name: &str) -> Result<NodeName> {
        check("node-name", name, NodeName::MAX_LEN).map(|()| NodeName::internal(name))
    }
}

impl OpId {
    /// Checks an id given by a user: a letter first, then letters, digits, `-`, `.`, `_`.
    pub fn parse(id: &str) -> Result<OpId> {
        check("id", id, 255).map(|()| OpId::internal(id))
    }
}

fn check(what: &str, s: &str, max: usize) -> Result<()> {
    let mut chars = s.chars();
    let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if !well_formed {
        return Err(Error::new(ErrorKind::InvalidInput, format!("Invalid {what}: '{s}'"))
            .remedy("use a letter first, then letters, digits, '-', '.' or '_'"));
    }
    if s.len() > max {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{what} '{s}' is longer than {max} bytes")));
    }
    Ok(())
}

/// What a child is to its parent. Decides the edge rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildRole {
    /// The child's data are the parent's data, at the same offsets.
    Filtered,
    /// A format's file: it holds metadata, and data unless there is a data file.
    Metadata,
    /// Holds data only: an external data file, or `raw` with an offset.
    Data,
    /// Read where the parent has nothing allocated.
    Backing,
    /// Receives a copy: target of a copy-before-write, backup or mirror filter.
    Target,
}

impl ChildRole {
    /// One word for drawings.
    pub const fn as_str(self) -> &'static str {
        match self {
            ChildRole::Filtered => "filtered",
            ChildRole::Metadata => "metadata",
            ChildRole::Data => "data",
            ChildRole::Backing => "backing",
            ChildRole::Target => "target",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names() {
        assert!(NodeName::parse("top-0.x_y").is_ok());
        for bad in ["", "0top", "#block1", "a b", "ä", &"x".repeat(32)] {
            assert!(NodeName::parse(bad).is_err(), "{bad}");
        }
    }
}
