//! The list of the commands: the only file that imports them. Adding one is a line here, or a row in its family.

use dolmen_jobs::{KINDS, OF_QEMU_ONLY};
use dolmen_qmp::Schema;
use dolmen_qmp::schema::{Branch, Command, EventRow, Field, JobBranch, Sources};
use dolmen_types::OptionSpec;

use crate::row::{Family, Table};
use crate::{commands, export, jobs, notices};

/// Every command, in the order in which they are listed.
pub(crate) const TABLE: Table = Table(&[
    Family::of(commands::session::ROWS),
    Family::of(commands::nodes::ROWS),
    Family::of(commands::stats::ROWS),
    Family::with_counters(commands::latency::ROWS, commands::latency::COUNTERS),
    Family::of(commands::server::ROWS),
    Family::of(commands::exports::ROWS),
    Family::of(commands::snapshots::ROWS),
    Family::of(commands::backing::ROWS),
    Family::of(commands::resize::ROWS),
    Family::of(commands::transaction::ROWS),
    Family::of(commands::operations::ROWS),
    Family::of(commands::what_if::ROWS),
    Family::of(commands::job_verbs::ROWS),
    Family::of(commands::job_starts::ROWS),
    Family::of(commands::drives::ROWS),
]);

/// Every event.
const EVENTS: &[&[EventRow]] = &[notices::EVENTS, export::EVENTS, jobs::EVENTS];

/// The commands, events and types of a program with these options of nodes and drivers.
pub fn schema(node_options: &[OptionSpec], drivers: &[Branch]) -> Schema {
    let commands: Vec<Command> = TABLE.rows().map(|r| r.schema).collect();
    let events: Vec<EventRow> = EVENTS.concat();
    let here = KINDS.iter().map(|k| JobBranch { name: k.name, change: k.change, details: k.details });
    let there = OF_QEMU_ONLY.iter().map(|name| JobBranch { name, change: &[], details: &[] });
    let job_kinds: Vec<JobBranch> = here.chain(there).collect();
    let counters: Vec<Field> = TABLE.counters().map(|c| Field::optional(c.name, c.ty)).collect();
    Schema::new(Sources {
        commands: &commands,
        events: &events,
        node_options,
        drivers,
        exports: &export::types(),
        counters: &counters,
        jobs: &job_kinds,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The second of two rows with one name would never be found.
    #[test]
    fn names_are_unique() {
        let mut names = HashSet::new();
        for row in TABLE.rows() {
            assert!(names.insert(row.schema.name), "{} twice", row.schema.name);
        }
    }
}
