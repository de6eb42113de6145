//! Rows of counters that a command adds to those of an export.

use dolmen_graph::UserEdge;
use dolmen_qmp::schema::Ty;
use serde_json::Value as Json;

/// A member of the counters of an export in `query-blockstats`, which is there only when it has been asked for.
#[derive(Clone, Copy)]
pub(crate) struct CounterRow {
    pub(crate) name: &'static str,
    pub(crate) ty: Ty,
    pub(crate) read: fn(&UserEdge) -> Option<Json>,
}
