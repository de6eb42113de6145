//! Puts a refusal of the solver into words: node and action, both operations, why, and
//! the remedies that would work.

use dolmen_rt::Instant;
use dolmen_types::{Actions, Claim, Conflict, Error, ErrorKind, OpId, Party};

use crate::draft::State;
use crate::{AccessRule, EdgeRef, Refusal};

/// The error for a refusal on this candidate.
#[cold]
pub(crate) fn explain(state: &State, refusal: Refusal, now: Instant) -> Error {
    let name = |n: usize| state.nodes[n].def.name.as_str();
    match refusal {
        Refusal::Cycle { node } => {
            Error::new(ErrorKind::InvalidInput, format!("node '{}' would be its own child", name(node)))
        }
        Refusal::ReadOnly { node, asks } => {
            let (party, _) = party(state, asks, now);
            let forced = state.nodes[node].forced_read_only;
            let e = Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "Block node is read-only: node '{}' cannot be written, which {party} needs",
                    name(node)
                ),
            );
            if forced {
                e.remedy("the file could only be opened for reading: check its permissions")
            } else {
                e.remedy("open the node with read-only=off, or use it read-only")
            }
        }
        Refusal::Unaligned { node, asks } => {
            let (party, _) = party(state, asks, now);
            Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "node '{}' ends in the middle of a block and cannot be written by {party}",
                    name(node)
                ),
            )
            .remedy("resize it to a multiple of its block size, or use it without cache.direct")
        }
        Refusal::Conflict { node, actions, asks, denies } => {
            let (ask_party, ask_op) = party(state, asks, now);
            let (deny_party, deny_op) = party(state, denies, now);
            let mut remedies = Vec::new();
            let op = |id: &Option<OpId>| id.as_ref().and_then(|id| state.ops.iter().find(|o| o.id == *id));
            // The one that is there already can be ended; the newcomer can ask for less.
            for info in [op(&deny_op), op(&ask_op)].into_iter().flatten() {
                if let (Some(_), Some(text)) = (info.since, &info.ends_with) {
                    remedies.push(text.clone());
                }
            }
            if actions.intersects(Actions::V | Actions::M)
                && let Some(text) = op(&ask_op).and_then(|o| o.instead_of_writing.clone())
            {
                remedies.push(text);
            }
            if remedies.is_empty() {
                remedies.push(match denies {
                    EdgeRef::Child { parent, .. } => format!("use node '{}' instead", name(parent)),
                    EdgeRef::User(_) | EdgeRef::Claim(_) => "wait until it has finished".into(),
                });
            }
            Error::refused(Conflict {
                node: name(node).into(),
                actions,
                why: why(state, denies),
                asks: ask_party,
                denies: deny_party,
                remedies,
            })
        }
    }
}

/// Who an edge or a claim belongs to.
fn party(state: &State, at: EdgeRef, now: Instant) -> (Party, Option<OpId>) {
    let of_op = |id: &OpId, claim: Claim| {
        let info = state.ops.iter().find(|o| o.id == *id);
        let party = Party {
            // A driver's claims are known by the node's name.
            id: id.strip_prefix("driver:").unwrap_or(id).to_owned(),
            kind: info.map_or("operation".into(), |o| o.kind.clone()),
            detail: info.map_or(String::new(), |o| o.detail.clone()),
            since_secs: info.and_then(|o| o.since).map(|t| now.since(t).as_secs()),
            needs: claim.needs,
            allows: claim.allows,
        };
        (party, Some(id.clone()))
    };
    match at {
        EdgeRef::User(i) => of_op(&state.users[i].op, state.users[i].claim),
        EdgeRef::Claim(i) => of_op(&state.claims[i].op, state.claims[i].claim),
        EdgeRef::Child { parent, child } => {
            let node = &state.nodes[parent];
            let edge = &node.children[child];
            let claim = crate::solver::edge_claim(&state.topology(), parent, child);
            if let Some(owner) = &node.def.owner {
                return of_op(owner, claim);
            }
            let party = Party {
                id: node.def.name.to_string(),
                kind: "node".into(),
                detail: format!("{}, {} child '{}'", node.def.kind.name, edge.role.as_str(), edge.name),
                since_secs: None,
                needs: claim.needs,
                allows: claim.allows,
            };
            (party, None)
        }
    }
}

/// Why a party does not allow others more.
fn why(state: &State, at: EdgeRef) -> String {
    match at {
        EdgeRef::Claim(i) => state.claims[i].why.clone(),
        EdgeRef::User(i) => {
            let denied = !state.users[i].claim.allows & Actions::DATA;
            let words: Vec<_> = denied.iter().map(|a| a.phrase()).collect();
            format!("does not let others {} it", words.join(" or "))
        }
        EdgeRef::Child { parent, child } => {
            let node = &state.nodes[parent];
            match (node.def.rule, node.children[child].role) {
                (AccessRule::Format, dolmen_types::ChildRole::Metadata) => {
                    "keeps its metadata there, which would be destroyed".into()
                }
                (AccessRule::Format, dolmen_types::ChildRole::Backing) => {
                    "reads from it what it has not got itself, for users that need it unchanged".into()
                }
                (AccessRule::CopyBeforeWrite, _) => {
                    "must see every write first, to save what it overwrites".into()
                }
                _ => "passes on what those above it do not allow".into(),
            }
        }
    }
}
