//! Words in which jobs claim.

use dolmen_graph::{ClaimScope, Draft, OpClaim};
use dolmen_types::{Actions, Claim, NodeName, OpId, Result};

/// Claims that `op` needs `needs` on `node` and lets others do everything but `denies`, because it `why`. The
/// node can't go away meanwhile.
pub(crate) fn claim(
    d: &mut Draft,
    op: &OpId,
    node: &NodeName,
    needs: Actions,
    denies: Actions,
    why: &str,
) -> Result<()> {
    d.add_claim(OpClaim {
        op: op.clone(),
        node: node.clone(),
        claim: Claim { needs, allows: Actions::EVERY - denies },
        scope: ClaimScope::Node,
        why: why.into(),
        pins: true,
    })
}

/// The same for a node that the operation writes, and for what lies beneath it if it is a filter: others may come by
/// another way. What they deny there leaves out what the operation does itself.
pub(crate) fn claim_target(
    d: &mut Draft,
    op: &OpId,
    node: &NodeName,
    needs: Actions,
    denies: Actions,
    why: &str,
) -> Result<()> {
    claim(d, op, node, needs, denies, why)?;
    claim_beneath(d, op, node, denies, why)
}

/// Lets nobody do what `denies` says to what lies beneath a filter, but by the operation's own edges.
pub(crate) fn claim_beneath(
    d: &mut Draft,
    op: &OpId,
    node: &NodeName,
    denies: Actions,
    why: &str,
) -> Result<()> {
    for beneath in d.shown_by(node) {
        d.add_claim(OpClaim {
            op: op.clone(),
            node: beneath,
            claim: Claim { needs: Actions::NONE, allows: Actions::EVERY - denies },
            scope: ClaimScope::Beneath,
            why: why.into(),
            pins: true,
        })?;
    }
    Ok(())
}

/// The node of that name.
pub(crate) fn known(d: &Draft, name: &str) -> Result<NodeName> {
    d.find(name)
}
