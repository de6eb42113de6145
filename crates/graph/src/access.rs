//! Edge rules: what a driver needs of its children, and allows others there, given what
//! its own parents need and allow (access-control, section 3).
//!
//! A rule is data: one [`RoleRule`] for each role of a child. The shapes that several drivers, the solver's exhaustive
//! test and the stand-ins of the simulation share are named here by what they do; a driver whose rule is like no
//! other's says it in its own module.

use dolmen_types::{Actions, ChildRole, Claim};

/// What the rules may depend on besides the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node was opened for writing.
    pub writable: bool,
    /// Another node or a user is attached above.
    pub has_parents: bool,
}

/// What a node needs and allows on a child of one role, and what goes with that edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoleRule {
    /// Of what the parents need, this is needed of the child.
    pub needs_pass: Actions,
    /// This is needed whatever the parents need.
    pub needs_add: Actions,
    /// If the parents need one of the first, the second is needed, too.
    pub needs_if: [Actions; 2],
    /// This is needed, too, if the node was opened for writing.
    pub needs_if_writable: Actions,
    /// Of what the parents allow, this is allowed on the child.
    pub allows_pass: Actions,
    /// This is allowed whatever the parents allow.
    pub allows_add: Actions,
    /// If the parents allow all of the first, the second is allowed, too.
    pub allows_if: [Actions; 2],
    /// This is never allowed.
    pub denies: Actions,
    /// This is not allowed if the node was opened for writing.
    pub denies_if_writable: Actions,
    /// If the parents need one of the first, the second is not allowed.
    pub denies_if: [Actions; 2],
    /// This is not allowed while the node has parents.
    pub denies_below_parents: Actions,
    /// Events that the node's parents raise are passed on to this child.
    pub events: bool,
    /// The node is the one place to write the child through: who is refused there is told to use the node instead.
    pub sees_all_writes: bool,
    /// Why others are refused, as the end of "node 'x' ...".
    pub why: &'static str,
}

impl RoleRule {
    /// What the parents need and allow, and nothing else.
    pub const THROUGH: RoleRule = RoleRule {
        needs_pass: Actions::EVERY,
        needs_add: Actions::NONE,
        needs_if: [Actions::NONE; 2],
        needs_if_writable: Actions::NONE,
        allows_pass: Actions::DATA,
        allows_add: Actions::NONE,
        allows_if: [Actions::NONE; 2],
        denies: Actions::NONE,
        denies_if_writable: Actions::NONE,
        denies_if: [Actions::NONE; 2],
        denies_below_parents: Actions::NONE,
        events: true,
        sees_all_writes: false,
        why: "passes on what those above it do not allow",
    };

    /// A target of copies: written, and read by no one above.
    pub const TARGET: RoleRule = RoleRule {
        needs_pass: Actions::NONE,
        needs_add: Actions::V,
        allows_pass: Actions::NONE,
        allows_add: Actions::D.with(Actions::V).with(Actions::M),
        events: false,
        why: "writes a copy to it, which has to keep its size",
        ..RoleRule::THROUGH
    };

    /// A view of the child's data, whatever others do to them.
    pub const VIEW: RoleRule =
        RoleRule { needs_pass: Actions::D, allows_add: Actions::DATA, ..RoleRule::THROUGH };

    /// A format's file with its metadata.
    // M stays beside V: other processes see it as a separate lock byte.
    const METADATA: RoleRule = RoleRule {
        needs_add: Actions::D,
        needs_if: [Actions::V.with(Actions::M), Actions::V.with(Actions::S)],
        needs_if_writable: Actions::V.with(Actions::S),
        denies: Actions::V.with(Actions::S),
        events: false,
        sees_all_writes: true,
        why: "keeps its metadata there, which would be destroyed",
        ..RoleRule::THROUGH
    };

    /// A format's file with nothing but data.
    const DATA_FILE: RoleRule = RoleRule {
        needs_if: [Actions::V.with(Actions::M), Actions::V.with(Actions::S)],
        denies: Actions::S,
        events: false,
        sees_all_writes: true,
        ..RoleRule::THROUGH
    };

    /// A backing node that may change while it is read.
    const CHANGING_BACKING: RoleRule = RoleRule {
        needs_pass: Actions::D,
        allows_pass: Actions::NONE,
        allows_add: Actions::D.with(Actions::M),
        allows_if: [Actions::V, Actions::V.with(Actions::S)],
        events: false,
        why: "shows what it holds where it has no data of its own",
        ..RoleRule::THROUGH
    };

    /// A backing node. Whoever reads the overlay sees it where the overlay has nothing of its own.
    const BACKING: RoleRule =
        RoleRule { denies_if: [Actions::D, Actions::V.with(Actions::S)], ..RoleRule::CHANGING_BACKING };

    /// A child whose old data are saved before they are overwritten.
    const SAVED: RoleRule = RoleRule {
        needs_if: [Actions::V, Actions::D],
        why: "must see every write first, to save what it overwrites",
        ..RoleRule::THROUGH
    };

    const fn claim(&self, parents: Claim, facts: NodeFacts) -> Claim {
        let Claim { needs: above, allows } = parents;
        let mut needs = above.and(self.needs_pass).with(self.needs_add);
        if above.intersects(self.needs_if[0]) {
            needs = needs.with(self.needs_if[1]);
        }
        if facts.writable {
            needs = needs.with(self.needs_if_writable);
        }
        let mut allowed = allows.and(self.allows_pass).with(self.allows_add);
        if allows.contains(self.allows_if[0]) {
            allowed = allowed.with(self.allows_if[1]);
        }
        allowed = allowed.without(self.denies);
        if facts.writable {
            allowed = allowed.without(self.denies_if_writable);
        }
        if above.intersects(self.denies_if[0]) {
            allowed = allowed.without(self.denies_if[1]);
        }
        if facts.has_parents {
            allowed = allowed.without(self.denies_below_parents);
        }
        Claim { needs, allows: allowed }
    }
}

/// The edge rule of a kind of driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleTable {
    /// The rules of these roles.
    pub roles: &'static [(ChildRole, RoleRule)],
    /// The rule of every other role but [`ChildRole::Target`], which is [`RoleRule::TARGET`].
    pub others: RoleRule,
    /// The driver acts on events that its parents raise (`Driver::event`).
    pub receives_events: bool,
    /// It is not there as far as requests are concerned: every request goes to its only
    /// child with the same span and flags, always, and so does the question
    /// for the size. Its `plan` and `size` are not asked: requests step over it, unless
    /// a node below receives events ([`Node::hears_events`](crate::Node::hears_events)).
    /// The answer must not change during the driver's life.
    pub transparent: bool,
    /// Discards are the business of the node below: a child that is defined inside this one gets its `discard`
    /// option. Other drivers decide about discards themselves, and their children pass on what they get.
    pub leaves_discards: bool,
    /// A flush of the node does not reach its children.
    pub ends_flushes: bool,
    /// Its target holds data that are nowhere else: while a user's node has this rule, no one else may write there.
    pub guards_target: bool,
}

impl RuleTable {
    /// What the parents need and allow, to every child.
    pub const THROUGH: RuleTable = RuleTable::one(RoleRule::THROUGH);

    /// The same rule for every child.
    pub const fn one(others: RoleRule) -> RuleTable {
        RuleTable {
            roles: &[],
            others,
            receives_events: false,
            transparent: false,
            leaves_discards: false,
            ends_flushes: false,
            guards_target: false,
        }
    }

    /// The rule of a role.
    pub fn role(&self, role: ChildRole) -> &RoleRule {
        match self.roles.iter().find(|(r, _)| *r == role) {
            Some((_, rule)) => rule,
            None if role == ChildRole::Target => &RoleRule::TARGET,
            None => &self.others,
        }
    }
}

/// The edge rule of a node. Data, not code: the solver is pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessRule {
    /// The rule of its kind.
    pub table: &'static RuleTable,
    /// What the node's options need besides of each child that is no target.
    pub take: Actions,
    /// What the node's options do not allow there.
    pub unshare: Actions,
}

impl AccessRule {
    /// No children.
    pub const LEAF: AccessRule =
        AccessRule::of(&RuleTable::one(RoleRule { events: false, ..RoleRule::THROUGH }));
    /// Passes on what its parents need and allow.
    pub const FILTER: AccessRule = AccessRule::of(&RuleTable { leaves_discards: true, ..RuleTable::THROUGH });
    /// A filter that requests step over: see [`RuleTable::transparent`].
    pub const TRANSPARENT: AccessRule =
        AccessRule::of(&RuleTable { leaves_discards: true, transparent: true, ..RuleTable::THROUGH });
    /// A window on its child, which must not change its size.
    pub const WINDOW: AccessRule =
        AccessRule::of(&RuleTable::one(RoleRule { denies: Actions::S, ..RoleRule::THROUGH }));
    /// Writes what it has read where it is missing, whatever is asked of it.
    pub const POPULATES: AccessRule = AccessRule::of(&RuleTable::one(RoleRule {
        needs_add: Actions::M,
        allows_add: Actions::M,
        ..RoleRule::THROUGH
    }));
    /// An image format: metadata and data children, and a backing child, which no one may
    /// write or resize while the overlay is read.
    pub const FORMAT: AccessRule = AccessRule::of(&RuleTable {
        roles: &[(ChildRole::Backing, RoleRule::BACKING), (ChildRole::Data, RoleRule::DATA_FILE)],
        ..RuleTable::one(RoleRule::METADATA)
    });
    /// The same, whose user has said that its backing child may change while it is read.
    pub const FORMAT_OVER_CHANGING: AccessRule = AccessRule::of(&RuleTable {
        roles: &[(ChildRole::Backing, RoleRule::CHANGING_BACKING), (ChildRole::Data, RoleRule::DATA_FILE)],
        ..RuleTable::one(RoleRule::METADATA)
    });
    /// Saves old data in its target before they are overwritten, for as long as it is there.
    pub const SAVES_OLD_DATA: AccessRule = AccessRule::of(&RuleTable {
        guards_target: true,
        ..RuleTable::one(RoleRule {
            denies_below_parents: Actions::V,
            sees_all_writes: true,
            ..RoleRule::SAVED
        })
    });
    /// The same for an operation: no one else may write below it, be there parents or not.
    pub const SAVES_OLD_DATA_FOR_JOB: AccessRule =
        AccessRule::of(&RuleTable::one(RoleRule { denies: Actions::V, ..RoleRule::SAVED }));
    /// A read-only view of a point in time. Some of what it shows is still in the file of the filter below.
    pub const POINT_IN_TIME: AccessRule = AccessRule::of(&RuleTable {
        ends_flushes: true,
        ..RuleTable::one(RoleRule { events: false, ..RoleRule::VIEW })
    });
    /// Passes every write to a target as well.
    pub const COPIES_WRITES: AccessRule = AccessRule::of(&RuleTable::one(RoleRule {
        denies: Actions::V,
        why: "must see every write, to copy it to its target",
        ..RoleRule::THROUGH
    }));
    /// The same, with a target that lies below it on the same chain: the chain's data pass by way of this filter, but
    /// what lies below the target is read all the same.
    pub const COPIES_WRITES_DOWN: AccessRule = AccessRule::of(&RuleTable {
        roles: &[(ChildRole::Target, RoleRule { needs_pass: Actions::D, ..RoleRule::TARGET })],
        ..RuleTable::one(RoleRule {
            needs_pass: Actions::EVERY.without(Actions::D),
            allows_add: Actions::V,
            ..RoleRule::THROUGH
        })
    });
    /// Reads what is below it, and lets others change it.
    pub const LETS_CHANGE: AccessRule = AccessRule::of(&RuleTable::one(RoleRule::VIEW));

    /// The rule of a table.
    pub const fn of(table: &'static RuleTable) -> AccessRule {
        AccessRule { table, take: Actions::NONE, unshare: Actions::NONE }
    }

    /// The rule of a role.
    pub fn role(self, role: ChildRole) -> &'static RoleRule {
        self.table.role(role)
    }

    /// What the node needs and allows on a child in this role, when its parents
    /// together need `parents.needs` and allow `parents.allows`.
    ///
    /// Edges speak of D, V, M and S only. An inactive node holds nothing on its children,
    /// whatever its rule.
    pub fn child_claim(self, role: ChildRole, parents: Claim, facts: NodeFacts) -> Claim {
        let claim = self.role(role).claim(parents, facts);
        if role == ChildRole::Target {
            return claim;
        }
        Claim { needs: claim.needs | self.take & Actions::DATA, allows: claim.allows - self.unshare }
    }
}
