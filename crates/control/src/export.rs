//! The exports that exist.

use std::rc::Rc;
use std::time::Duration;

use async_channel::Receiver;
use dolmen_exports::{Export as Serving, ExportKind, KINDS};
use dolmen_graph::Graph;
use dolmen_qmp::QmpError;
use dolmen_qmp::model::BlockExportInfo;
use dolmen_qmp::schema::{Branch, EventRow, ID};
use dolmen_rt::Rt;
use dolmen_types::OpId;
use serde_json::{Value as Json, json};

/// How long a command that removes exports waits until their clients are gone.
const CLIENTS_GO: Duration = Duration::from_secs(1);

/// The types of exports, as the schema shows them.
pub(crate) fn types() -> Vec<Branch> {
    KINDS.iter().map(|k| Branch { name: k.name, options: k.options, features: &[] }).collect()
}

/// An export that is in the graph.
#[derive(Debug)]
pub(crate) struct Export {
    /// The operation.
    pub(crate) id: OpId,
    pub(crate) kind: &'static ExportKind,
    /// What serves its clients.
    pub(crate) serving: Rc<dyn Serving>,
    /// A command is waiting for its clients to go.
    pub(crate) shutting_down: bool,
}

impl Export {
    /// What clients are told, with the node that is served now: not the one that was named, once a
    /// snapshot, a pivot or a filter has come between.
    pub(crate) fn info(&self, graph: &Graph) -> BlockExportInfo {
        let edge = graph.edges(&self.id).next();
        BlockExportInfo {
            id: self.id.as_str().to_owned(),
            kind: self.kind.name.into(),
            node_name: edge.map(|e| e.node().name.to_string()).unwrap_or_default(),
            shutting_down: self.shutting_down,
        }
    }
}

/// The answer of a command that removes exports: when they are gone, or soon whatever clients do. A request of theirs may
/// wait for storage that never answers, and the caller wants to go on; an event tells when an export is gone.
///
/// # Errors
/// Why they could not be removed.
pub(crate) async fn clients_gone(rt: Rt, done: Receiver<Result<(), QmpError>>) -> Result<Json, QmpError> {
    let gone = async {
        match done.recv().await {
            Ok(result) => result.map(|()| json!({})),
            // The program ends, and they with it.
            Err(_) => std::future::pending().await,
        }
    };
    let late = async {
        rt.sleep(CLIENTS_GO).await;
        Ok(json!({}))
    };
    futures_lite::future::or(gone, late).await
}

/// The events.
pub(crate) const EVENTS: &[EventRow] = &[EventRow {
    name: "BLOCK_EXPORT_DELETED",
    data: &ID,
    help: "An export is gone and its id may be used again.",
}];
