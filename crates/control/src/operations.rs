//! Operations made visible: who uses what, what would be refused, and operations of
//! somebody else's who wants to be respected.

use dolmen_graph::{ClaimScope, Draft, Graph, OpClaim, OpInfo};
use dolmen_qmp::{QmpError, model};
use dolmen_rt::Instant;
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Value};
use serde_json::{Value as Json, json};

use crate::act;
use crate::task::Task;
use crate::{Change, query};

/// An operation of an external tool.
#[derive(Debug)]
pub struct OperationBegin {
    /// Unique among all operations.
    pub id: String,
    /// For people.
    pub detail: String,
    /// What it needs and allows where.
    pub claims: Vec<ToolClaim>,
}

/// A claim of an external tool.
#[derive(Debug)]
pub struct ToolClaim {
    /// The node, which can't go away meanwhile.
    pub node: String,
    /// What the tool does.
    pub needs: Actions,
    /// What others may not do.
    pub denies: Actions,
    /// Why.
    pub why: String,
}

impl OperationBegin {
    /// Reads the arguments of `operation-begin`.
    ///
    /// # Errors
    /// When a member is missing or unknown.
    pub fn from_options(mut o: Options) -> Result<OperationBegin> {
        let mut claims = Vec::new();
        for claim in o.take_list("claims")?.unwrap_or_default() {
            let mut c = Options::from_value(claim)?;
            claims.push(ToolClaim {
                node: c.require_str("node-name")?,
                needs: actions(&mut c, "needs")?,
                denies: actions(&mut c, "denies")?,
                why: c.take_str("why")?.unwrap_or_else(|| "relies on it".to_owned()),
            });
            c.finish("claim")?;
        }
        let out = OperationBegin {
            id: o.require_str("id")?,
            detail: o.take_str("detail")?.unwrap_or_else(|| "external".to_owned()),
            claims,
        };
        o.finish("operation-begin")?;
        Ok(out)
    }
}

fn actions(o: &mut Options, name: &str) -> Result<Actions> {
    let mut out = Actions::NONE;
    for word in o.take_list(name)?.unwrap_or_default() {
        let action = match &word {
            Value::Str(s) => dolmen_types::Action::ALL.into_iter().find(|a| a.word() == s),
            _ => None,
        };
        let Some(action) = action else {
            return Err(Error::new(ErrorKind::InvalidInput, format!("Unknown action in '{name}'")));
        };
        out |= action.into();
    }
    Ok(out)
}

/// Puts an external operation into a draft.
///
/// # Errors
/// The solver's; `NotFound`; `AlreadyExists`.
pub(crate) fn propose_begin(draft: &mut Draft, begin: OperationBegin) -> Result<(), QmpError> {
    let id = OpId::parse(&begin.id)?;
    draft.add_op(OpInfo {
        id: id.clone(),
        kind: "tool".into(),
        detail: begin.detail,
        since: None,
        ends_with: Some(format!("end the operation (operation-end '{id}')")),
        instead_of_writing: None,
    })?;
    for c in begin.claims {
        let node = NodeName::internal(c.node);
        draft.add_claim(OpClaim {
            op: id.clone(),
            node,
            claim: Claim { needs: c.needs, allows: Actions::EVERY - c.denies },
            scope: ClaimScope::Node,
            why: c.why,
            pins: true,
        })?;
    }
    // Refusals are worded for a newcomer; from here on it has a start time.
    draft.solve()?;
    draft.mark_started(&id);
    Ok(())
}

/// Takes an external operation out of a draft.
///
/// # Errors
/// `NotFound`, also for operations that end in another way.
pub(crate) fn propose_end(draft: &mut Draft, id: &str) -> Result<(), QmpError> {
    let Some(op) = draft.ops().iter().find(|o| o.id.as_str() == id).cloned() else {
        return Err(Error::new(ErrorKind::NotFound, format!("Operation '{id}' is not found"))
            .remedy("query-operations lists them")
            .into());
    };
    if op.kind != "tool" {
        let e = Error::new(
            ErrorKind::InvalidInput,
            format!("Operation '{id}' is of kind {}, not a tool's", op.kind),
        );
        return Err(match op.ends_with {
            Some(way) => e.remedy(way),
            None => e,
        }
        .into());
    }
    draft.remove_op(&op.id);
    draft.sweep();
    Ok(())
}

/// The reply of `query-operations`.
pub(crate) fn list(graph: &Graph, ops: &[OpInfo], claims: &[OpClaim], now: Instant) -> Json {
    let words = |a: Actions| -> Vec<&str> { a.iter().map(|a| a.word()).collect() };
    ops.iter()
        .map(|op| {
            let edges = graph.users.iter().filter(|u| *u.op() == op.id).map(|u| {
                let claim = u.claim();
                json!({
                    "node-name": u.node().name.as_str(),
                    "needs": words(claim.needs),
                    "allows": words(claim.allows),
                })
            });
            let claims = claims.iter().filter(|c| c.op == op.id).map(|c| {
                json!({
                    "node-name": c.node.as_str(),
                    "needs": words(c.claim.needs),
                    "allows": words(c.claim.allows),
                    "why": c.why,
                })
            });
            let filters = graph.nodes.iter().filter(|n| n.owner.as_ref() == Some(&op.id));
            let mut out = json!({
                "id": op.id.as_str(),
                "kind": op.kind,
                "detail": op.detail,
                "edges": edges.collect::<Vec<_>>(),
                "claims": claims.collect::<Vec<_>>(),
                "filters": filters.map(|n| n.name.as_str()).collect::<Vec<_>>(),
            });
            if let Some(since) = op.since {
                out["since-seconds"] = now.since(since).as_secs().into();
            }
            if let Some(way) = &op.ends_with {
                out["ends-with"] = way.as_str().into();
            }
            out
        })
        .collect()
}

/// The reply of `what-if`: the graph that a command would leave, or why it would be refused. It is found out by doing
/// the command up to the point where something changes.
pub(crate) async fn what_if(task: &Task, change: Change) -> Json {
    let mut draft = task.owner.draft();
    let mut started = Vec::new();
    let rehearsed = async {
        act::propose(task, &mut draft, change, &mut started).await?;
        Ok(task.owner.rehearse(&mut draft).await?)
    };
    let rehearsed = task.shared.patiently(rehearsed).await;
    let said = match rehearsed {
        Ok(graph) => {
            let graph = model::to_json(&query::block_graph(&graph, draft.ops()));
            let mut out = json!({"allowed": true, "graph": graph});
            if let Some(e) = started.iter().find_map(|s| s.fails.as_ref()) {
                out["job-error"] = e.to_json();
            }
            out
        }
        Err(e) => refused(&e),
    };
    task.let_go(draft).await;
    said
}

/// The reply of `what-if` about a command that is refused.
pub(crate) fn refused(why: &QmpError) -> Json {
    json!({"allowed": false, "error": why.to_json()})
}
