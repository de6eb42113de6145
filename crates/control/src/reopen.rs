//! `blockdev-reopen` and `blockdev-set-active`: nodes that are in use get other options and
//! other children, or hand their images to another process.
//!
//! Each is proposed on a draft first. What a proposal changes is guarded by the claims of an
//! operation of its own, which exists only as long as it takes to ask whether the draft may
//! stand beside everybody else's operations.

use dolmen_graph::{Draft, NodeOpener};
use dolmen_qmp::QmpError;
use dolmen_types::{ErrorKind, OpId, Options};

type Done = Result<(), QmpError>;

/// Puts into a draft what `blockdev-reopen` asks for. The operation stays in the draft, with its
/// claims, until [`settle`] takes it out.
///
/// # Errors
/// What can't be found, changed or opened; the draft is then of no more use.
pub(crate) async fn propose(
    opener: &NodeOpener<'_>,
    draft: &mut Draft,
    list: Vec<Options>,
) -> Result<OpId, QmpError> {
    let names: Vec<String> = list
        .iter()
        .filter_map(|o| match o.get("node-name") {
            Some(dolmen_types::Value::Str(s)) => Some(format!("'{s}'")),
            _ => None,
        })
        .collect();
    let op = draft.add_command("blockdev-reopen", format!("of {}", names.join(", ")));
    opener.reopen(draft, &op, list).await?;
    Ok(op)
}

/// Asks whether everybody can live with a proposal, takes the locks that it needs, and takes
/// its operation out again.
///
/// # Errors
/// The solver's, or `Locked`.
pub(crate) async fn settle(draft: &mut Draft, op: &OpId, opener: &NodeOpener<'_>) -> Done {
    // What is about to go must not be in the way.
    draft.sweep();
    draft.prepare(opener.rt).await?;
    // What is cut off is gone for overlays that nobody reads now, too: they show zeroes there from now on.
    let shrunk = draft.shrunk()?;
    if !shrunk.is_empty() {
        draft.mark_destructive(op)?;
        for node in &shrunk {
            draft.claim_other_data(op, node, "cuts off its end")?;
        }
        draft.solve()?;
    }
    draft.remove_op(op);
    Ok(())
}

/// Puts into a draft what `blockdev-set-active` asks for.
///
/// # Errors
/// `NotFound`, or what stands in the way.
pub(crate) fn propose_active(draft: &mut Draft, node: Option<&str>, active: bool) -> Done {
    if let Some(name) = node
        && !draft.has_node(name)
    {
        return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
    }
    draft.set_active(node, active)?;
    draft.solve().map_err(|e| match e.kind() {
        ErrorKind::Busy if !active => {
            let what = if node.is_some() { "node" } else { "all nodes" };
            QmpError::from(e.context(format!("Failed to inactivate {what}")))
        }
        _ => QmpError::from(e),
    })?;
    Ok(())
}
