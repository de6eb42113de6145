//! Words in which jobs claim.

use dolmen_graph::{ClaimScope, Draft, OpClaim};
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Result};

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

/// The node of that name.
pub(crate) fn known(d: &Draft, name: &str) -> Result<NodeName> {
    d.node_names().find(|n| n.as_str() == name).cloned().ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'"))
            .remedy("query-named-block-nodes lists the nodes there are")
    })
}
