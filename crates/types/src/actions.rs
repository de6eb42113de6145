//! What an edge or a claim needs of a node, and what it lets others do meanwhile.

use std::fmt;
use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not, Sub};

/// One thing that can be done to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Action {
    /// D: read data that is consistent and not half-way.
    ReadData = 0,
    /// V: change what an external reader sees.
    WriteData = 1,
    /// M: change the representation but not what a reader sees
    /// (copy-on-read, bitmaps, header).
    WriteUnchanged = 2,
    /// S: change the size.
    Resize = 3,
    /// G: change the node's own child links.
    RelinkChildren = 4,
    /// P: pivot or replace the node, or put an overlay above it.
    RelinkParents = 5,
    /// I: rely on allocation state or the header.
    ReadMetadata = 6,
}

impl Action {
    /// Every action, in the order of the letters `DVMSGPI`.
    pub const ALL: [Action; 7] = [
        Action::ReadData,
        Action::WriteData,
        Action::WriteUnchanged,
        Action::Resize,
        Action::RelinkChildren,
        Action::RelinkParents,
        Action::ReadMetadata,
    ];

    /// The one-letter name used in drawings and logs.
    pub const fn letter(self) -> char {
        match self {
            Action::ReadData => 'D',
            Action::WriteData => 'V',
            Action::WriteUnchanged => 'M',
            Action::Resize => 'S',
            Action::RelinkChildren => 'G',
            Action::RelinkParents => 'P',
            Action::ReadMetadata => 'I',
        }
    }

    /// The permission word that QMP clients know, where there is one.
    pub const fn qmp_word(self) -> Option<&'static str> {
        match self {
            Action::ReadData => Some("consistent-read"),
            Action::WriteData => Some("write"),
            Action::WriteUnchanged => Some("write-unchanged"),
            Action::Resize => Some("resize"),
            Action::RelinkChildren | Action::RelinkParents | Action::ReadMetadata => None,
        }
    }

    /// The word for it in JSON: the permission word where there is one.
    pub const fn word(self) -> &'static str {
        match self {
            Action::ReadData => "consistent-read",
            Action::WriteData => "write",
            Action::WriteUnchanged => "write-unchanged",
            Action::Resize => "resize",
            Action::RelinkChildren => "relink-children",
            Action::RelinkParents => "relink-parents",
            Action::ReadMetadata => "read-metadata",
        }
    }

    /// A verb phrase for messages: "needs to *write data*".
    pub const fn phrase(self) -> &'static str {
        match self {
            Action::ReadData => "read data",
            Action::WriteData => "write data",
            Action::WriteUnchanged => "write metadata",
            Action::Resize => "resize",
            Action::RelinkChildren => "relink its children",
            Action::RelinkParents => "relink its parents",
            Action::ReadMetadata => "read metadata",
        }
    }
}

/// A set of [`Action`]s.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Actions(u8);

impl Actions {
    /// The empty set.
    pub const NONE: Actions = Actions(0);
    /// D.
    pub const D: Actions = Actions(1);
    /// V.
    pub const V: Actions = Actions(1 << 1);
    /// M.
    pub const M: Actions = Actions(1 << 2);
    /// S.
    pub const S: Actions = Actions(1 << 3);
    /// G.
    pub const G: Actions = Actions(1 << 4);
    /// P.
    pub const P: Actions = Actions(1 << 5);
    /// I.
    pub const I: Actions = Actions(1 << 6);
    /// The actions that edges need and allow, and that lock bytes carry: D, V, M, S.
    pub const DATA: Actions = Actions(0b1111);
    /// Every action.
    pub const EVERY: Actions = Actions(0b111_1111);

    /// The set with the given bits; bits beyond the known actions are dropped.
    pub const fn from_bits(bits: u8) -> Actions {
        Actions(bits & Actions::EVERY.0)
    }

    /// The bits, D lowest.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether every action of `other` is in the set.
    pub const fn contains(self, other: Actions) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the sets share an action.
    pub const fn intersects(self, other: Actions) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Union, usable in constants.
    pub const fn with(self, other: Actions) -> Actions {
        Actions(self.0 | other.0)
    }

    /// Intersection, usable in constants.
    pub const fn and(self, other: Actions) -> Actions {
        Actions(self.0 & other.0)
    }

    /// Difference, usable in constants.
    pub const fn without(self, other: Actions) -> Actions {
        Actions(self.0 & !other.0)
    }

    /// The members, in the order of `DVMSGPI`.
    pub fn iter(self) -> impl Iterator<Item = Action> {
        Action::ALL.into_iter().filter(move |a| self.contains((*a).into()))
    }

    /// The permission words that QMP clients know, in the order of the bits.
    pub fn qmp_words(self) -> Vec<&'static str> {
        self.iter().filter_map(Action::qmp_word).collect()
    }
}

impl From<Action> for Actions {
    fn from(a: Action) -> Actions {
        Actions(1 << a as u8)
    }
}

impl BitOr for Actions {
    type Output = Actions;
    fn bitor(self, o: Actions) -> Actions {
        self.with(o)
    }
}
impl BitOrAssign for Actions {
    fn bitor_assign(&mut self, o: Actions) {
        self.0 |= o.0;
    }
}
impl BitAnd for Actions {
    type Output = Actions;
    fn bitand(self, o: Actions) -> Actions {
        Actions(self.0 & o.0)
    }
}
impl BitAndAssign for Actions {
    fn bitand_assign(&mut self, o: Actions) {
        self.0 &= o.0;
    }
}
impl Sub for Actions {
    type Output = Actions;
    fn sub(self, o: Actions) -> Actions {
        self.without(o)
    }
}
impl Not for Actions {
    type Output = Actions;
    fn not(self) -> Actions {
        Actions::EVERY.without(self)
    }
}

/// Letters, or `-` for the empty set.
impl fmt::Display for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.pad("-");
        }
        let s: String = self.iter().map(Action::letter).collect();
        f.pad(&s)
    }
}

impl fmt::Debug for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What somebody needs of a node, and what it allows everybody else to do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// Actions that will be done.
    pub needs: Actions,
    /// Actions that others may do meanwhile.
    pub allows: Actions,
}

impl Claim {
    /// Needs nothing and allows everything.
    pub const IDLE: Claim = Claim { needs: Actions::NONE, allows: Actions::EVERY };

    /// The actions that `self` needs and `other` does not allow.
    pub fn denied_by(self, other: Claim) -> Actions {
        self.needs - other.allows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_and_letters() {
        let a = Actions::D | Actions::V;
        assert_eq!(a.to_string(), "DV");
        assert_eq!((!a).to_string(), "MSGPI");
        assert_eq!(Actions::NONE.to_string(), "-");
        assert_eq!(a.qmp_words(), ["consistent-read", "write"]);
        assert_eq!(Actions::from_bits(0xff), Actions::EVERY);
    }

    #[test]
    fn denial_is_directional() {
        let writer = Claim { needs: Actions::V, allows: Actions::EVERY };
        let guard = Claim { needs: Actions::D, allows: Actions::D };
        assert_eq!(writer.denied_by(guard), Actions::V);
        assert_eq!(guard.denied_by(writer), Actions::NONE);
    }
}
