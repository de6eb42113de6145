//! Edge rules: what a driver needs of its children, and allows others there, given what
//! its own parents need and allow (access-control, section 3).

use dolmen_types::{Actions, ChildRole, Claim};

/// What the rules may depend on besides the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node was opened for writing.
    pub writable: bool,
    /// Somebody is attached above.
    pub has_parents: bool,
}

/// The edge rule of a driver. Data, not code: the solver is pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessRule {
    /// No children.
    Leaf,
    /// Passes on what its parents need and allow.
    Filter,
    /// A filter that is not there as far as requests are concerned: every request goes
    /// to its only child with the same span and flags, always, and so does the question
    /// for the size. Its `plan` and `size` are not asked: requests step over it, unless
    /// somebody below wants to hear what it does ([`Node::hears_events`](crate::Node::hears_events)).
    /// The answer must not change during the driver's life.
    Transparent,
    /// `raw` with an offset or a size: the child must not change its size.
    Slice,
    /// Copy-on-read.
    CopyOnRead,
    /// An image format: metadata and data children, and a backing child, which nobody may
    /// write or resize while somebody reads the overlay.
    Format,
    /// The same, whose user has said that its backing child may change while it is read.
    FormatOverChanging,
    /// Quorum; `rewrite` when it rewrites corrupted copies.
    Quorum {
        /// Whether it rewrites corrupted copies.
        rewrite: bool,
    },
    /// Copy-before-write, put there by a user.
    CopyBeforeWrite,
    /// Read-only view of a copy-before-write filter's point in time.
    SnapshotAccess,
    /// Filter of a mirror job.
    Mirror,
    /// Filter of a backup job.
    Backup,
    /// Filter of an active commit.
    CommitActive,
    /// Filter of an intermediate commit, above its top node.
    CommitMid,
    /// A filter for tests: it hears what its parents come to (`Driver::event`), and may
    /// hold more than they ask for.
    Debug {
        /// What it needs besides.
        take: Actions,
        /// What it does not allow.
        unshare: Actions,
    },
}

impl AccessRule {
    /// What the node needs and allows on a child in this role, when its parents
    /// together need `parents.needs` and allow `parents.allows`.
    ///
    /// Edges speak of D, V, M and S only. An inactive node holds nothing on its children,
    /// whatever its rule.
    pub fn child_claim(self, role: ChildRole, parents: Claim, facts: NodeFacts) -> Claim {
        use Actions as A;
        let Claim { needs, allows } = parents;
        let allows = allows & A::DATA;
        let through = Claim { needs, allows };
        match (self, role) {
            // Its data pass the filter by the chain that is committed, but what lies below the
            // target is read all the same.
            (AccessRule::CommitActive, ChildRole::Target) => {
                Claim { needs: needs & A::D | A::V, allows: A::DATA - A::S }
            }
            (_, ChildRole::Target) => Claim { needs: A::V, allows: A::DATA - A::S },
            (AccessRule::Leaf | AccessRule::Filter | AccessRule::Transparent, _) => through,
            (AccessRule::Slice, _) => Claim { needs, allows: allows - A::S },
            (AccessRule::CopyOnRead, _) => Claim { needs: needs | A::M, allows: allows | A::M },
            (AccessRule::Format | AccessRule::FormatOverChanging, ChildRole::Backing) => {
                let mut may_change = allows.contains(A::V);
                // Whoever reads the overlay sees its backing file where the overlay has nothing of its own.
                if self == AccessRule::Format && needs.contains(A::D) {
                    may_change = false;
                }
                Claim { needs: needs & A::D, allows: if may_change { A::DATA } else { A::D | A::M } }
            }
            (AccessRule::Format | AccessRule::FormatOverChanging, ChildRole::Data) => {
                let mut n = needs;
                if needs.intersects(A::V | A::M) {
                    n |= A::V | A::S;
                }
                Claim { needs: n, allows: allows - A::S }
            }
            (
                AccessRule::Format | AccessRule::FormatOverChanging,
                ChildRole::Metadata | ChildRole::Filtered,
            ) => {
                // M stays beside V: other processes see it as a lock byte of its own.
                let mut n = needs | A::D;
                if facts.writable || needs.intersects(A::V | A::M) {
                    n |= A::V | A::S;
                }
                Claim { needs: n, allows: allows - A::V - A::S }
            }
            (AccessRule::Quorum { rewrite }, _) => {
                Claim { needs: if rewrite { needs | A::V } else { needs }, allows: A::D | A::M }
            }
            (AccessRule::CopyBeforeWrite, _) => Claim {
                needs: if needs.contains(A::V) { needs | A::D } else { needs },
                allows: if facts.has_parents { allows - A::V } else { allows },
            },
            // Some of what it shows is still in the file of the filter below.
            (AccessRule::SnapshotAccess, _) => Claim { needs: needs & A::D, allows: A::DATA },
            (AccessRule::Mirror, _) => Claim { needs, allows: allows - A::V },
            (AccessRule::Backup, _) => Claim {
                needs: if needs.contains(A::V) { needs | A::D } else { needs },
                allows: allows - A::V,
            },
            (AccessRule::CommitActive, _) => Claim { needs: needs - A::D, allows: allows | A::V },
            (AccessRule::Debug { take, unshare }, _) => {
                Claim { needs: needs | take & A::DATA, allows: allows - unshare }
            }
            (AccessRule::CommitMid, _) => Claim { needs: needs & A::D, allows: A::DATA },
        }
    }
}
