//! What several commands have in common when they work on a draft.

use dolmen_graph::{ClaimScope, Draft, OpClaim, OpInfo, header_name};
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Value};

/// The node that a command means by `device` or `node-name`.
///
/// # Errors
/// `InvalidInput` unless one of the two is given.
pub(crate) fn device_or_node(o: &mut Options) -> Result<String> {
    match (o.take_str("device")?, o.take_str("node-name")?) {
        (Some(n), None) | (None, Some(n)) => Ok(n),
        (Some(_), Some(_)) | (None, None) => {
            Err(Error::new(ErrorKind::InvalidInput, "Need exactly one of 'device' and 'node-name'"))
        }
    }
}

/// The operation of an instant command on a node. Several of one kind may be there at one time, on
/// different nodes.
pub(crate) fn command(draft: &mut Draft, name: &str, node: &NodeName, detail: String) -> Result<OpId> {
    let op = OpId::internal(format!("command:{name}:{node}"));
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "command".into(),
        detail,
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    Ok(op)
}

/// What such an operation does to a node.
pub(crate) fn claim(draft: &mut Draft, op: &OpId, node: &NodeName, needs: Actions, why: &str) -> Result<()> {
    draft.add_claim(OpClaim {
        op: op.clone(),
        node: node.clone(),
        claim: Claim { needs, allows: Actions::EVERY },
        scope: ClaimScope::Node,
        why: why.to_owned(),
        pins: false,
    })
}

/// The node of this name.
///
/// # Errors
/// `NotFound`.
pub(crate) fn find(draft: &Draft, name: &str) -> Result<NodeName> {
    draft.find(name)
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// The options for making an image that is to be an overlay of a node of the draft: its header names that node's image.
pub(crate) fn made_over(
    draft: &Draft,
    size: u64,
    below: Option<&NodeName>,
    file: &Options,
) -> Result<Options> {
    let mut options = Options::new().with("size", size);
    if let Some(below) = below {
        let (name, format) = header_name(&draft.built_node(below)?, &text(file, "filename"))?;
        options.set("backing_file", name);
        options.set("backing_fmt", format);
    }
    Ok(options)
}

/// A text among options; empty if there is none.
pub(crate) fn text(options: &Options, name: &str) -> String {
    match options.get(name) {
        Some(Value::Str(s)) => s.clone(),
        _ => String::new(),
    }
}
