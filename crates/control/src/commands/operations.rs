//! Operations made visible: who uses what, and operations of external tools that want to be respected.

use dolmen_graph::{ClaimScope, Draft, Graph, OpClaim, OpInfo};
use dolmen_qmp::model::{self, BlockGraph};
use dolmen_qmp::schema::{Field, ID, NOTHING, Shape, Ty};
use dolmen_rt::{Instant, LocalFuture};
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, Value};
use serde_json::{Value as Json, json};

use crate::act::{Edit, Proposal};
use crate::query;
use crate::row::CommandRow;
use crate::world::Done;

/// An operation of an external tool.
struct Begin {
    /// Unique among all operations.
    id: String,
    /// For people.
    detail: String,
    /// What it needs and allows where.
    claims: Vec<ToolClaim>,
}

/// A claim of an external tool.
struct ToolClaim {
    /// The node, which can't go away meanwhile.
    node: String,
    /// What the tool does.
    needs: Actions,
    /// What others may not do.
    denies: Actions,
    /// Why.
    why: String,
}

impl Begin {
    fn from_options(mut o: Options) -> Result<Begin> {
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
        let out = Begin {
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

impl Edit for Begin {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { Ok(begin(p.draft(), *self)?) })
    }
}

/// Puts an external operation into a draft.
///
/// # Errors
/// The solver's; `NotFound`; `AlreadyExists`.
fn begin(draft: &mut Draft, begin: Begin) -> Result<()> {
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

/// The end of such an operation.
struct End {
    id: String,
}

impl Edit for End {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { Ok(end(p.draft(), &self.id)?) })
    }
}

/// Takes an external operation out of a draft.
///
/// # Errors
/// `NotFound`, also for operations that end in another way.
fn end(draft: &mut Draft, id: &str) -> Result<()> {
    let Some(op) = draft.op(id).cloned() else {
        return Err(Error::new(ErrorKind::NotFound, format!("Operation '{id}' is not found"))
            .remedy("query-operations lists them"));
    };
    if op.kind != "tool" {
        let e = Error::new(
            ErrorKind::InvalidInput,
            format!("Operation '{id}' is of kind {}, not a tool's", op.kind),
        );
        return Err(match op.ends_with {
            Some(way) => e.remedy(way),
            None => e,
        });
    }
    draft.remove_op(&op.id);
    draft.sweep();
    Ok(())
}

/// The reply of `query-operations`.
fn list(graph: &Graph, ops: &[OpInfo], claims: &[OpClaim], now: Instant) -> Json {
    let words = |a: Actions| -> Vec<&str> { a.iter().map(|a| a.word()).collect() };
    ops.iter()
        .map(|op| {
            let edges = graph.edges(&op.id).map(|u| {
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
            let filters = graph.each_node().filter(|n| n.owner.as_ref() == Some(&op.id));
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

/// The words for what is done to a node.
const ACTIONS: Ty = Ty::Array(&Ty::Enum(&[
    "consistent-read",
    "write",
    "write-unchanged",
    "resize",
    "relink-children",
    "relink-parents",
    "read-metadata",
]));

static TOUCHED: Shape = Shape::of(&[
    Field::required("node-name", Ty::Str),
    Field::required("needs", ACTIONS),
    Field::required("allows", ACTIONS),
]);

static OPERATION: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::required("kind", Ty::Str),
    Field::required("detail", Ty::Str),
    Field::optional("since-seconds", Ty::Int),
    Field::optional("ends-with", Ty::Str),
    Field::required("edges", Ty::List(&TOUCHED)),
    Field::required("claims", Ty::List(&CLAIMED)),
    Field::required("filters", Ty::Array(&Ty::Str)),
]);

static CLAIMED: Shape = Shape::of(&[
    Field::required("node-name", Ty::Str),
    Field::required("needs", ACTIONS),
    Field::required("allows", ACTIONS),
    Field::required("why", Ty::Str),
]);

static CLAIM: Shape = Shape::of(&[
    Field::required("node-name", Ty::Str),
    Field::optional("needs", ACTIONS),
    Field::optional("denies", ACTIONS),
    Field::optional("why", Ty::Str),
]);

static BEGIN: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::optional("detail", Ty::Str),
    Field::required("claims", Ty::List(&CLAIM)),
]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::query(
        "x-debug-query-block-graph",
        NOTHING,
        BlockGraph::TY,
        |world, _| Ok(model::to_json(&query::block_graph(&world.owner.graph()))),
        "Nodes, users and edges with what each edge needs and allows.",
    )
    .features(&["unstable"]),
    CommandRow::query(
        "query-operations",
        NOTHING,
        Ty::List(&OPERATION),
        |world, _| {
            let (graph, claims) = (world.owner.graph(), world.owner.claims());
            Ok(list(&graph, &world.operations(), &claims, world.rt.now()))
        },
        "Who uses which node for what, and what they allow others.",
    ),
    CommandRow::edit(
        "operation-begin",
        Ty::Object(&BEGIN),
        |_, o| Ok(Box::new(Begin::from_options(o)?)),
        "Protects what an external tool does with nodes until operation-end.",
    ),
    CommandRow::edit(
        "operation-end",
        Ty::Object(&ID),
        |_, mut o| Ok(Box::new(End { id: o.require_str("id")? })),
        "Ends an operation that operation-begin has begun.",
    ),
];
