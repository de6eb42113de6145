//! Exports: added, removed, listed.

use std::rc::Rc;

use dolmen_exports::{Common, ExportKind, KINDS, StopMode};
use dolmen_graph::{Draft, OpInfo};
use dolmen_qmp::model::BlockExportInfo;
use dolmen_qmp::schema::{Field, NOTHING, Reply, Shape, Ty};
use dolmen_qmp::{QmpError, model};
use dolmen_rt::LocalFuture;
use dolmen_types::{Actions, Claim, OpId, Options};
use serde_json::json;

use crate::act::{Act, Proposal, Wait};
use crate::export::{Export, clients_gone};
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::turns::Scope;
use crate::world::{Answer, Done, Gone, World};

/// An export: an operation with an edge in the graph, and what serves clients over it.
struct Add {
    id: String,
    kind: &'static ExportKind,
    common: Common,
    /// Whether the node may be inactive while it is exported.
    allow_inactive: bool,
    /// What the type has of its own.
    asked: Box<dyn dolmen_exports::Proposal>,
    /// Once it is proposed.
    proposed: Option<OpId>,
}

impl Add {
    fn from_options(mut o: Options) -> Result<Add, QmpError> {
        let kind = o.require_str("type")?;
        let Some(kind) = KINDS.iter().find(|k| k.name == kind) else {
            let names: Vec<&str> = KINDS.iter().map(|k| k.name).collect();
            let text =
                format!("Parameter 'type' does not accept value '{kind}': it is one of {}", names.join(", "));
            return Err(QmpError::generic(text));
        };
        let common = Common {
            node: o.require_str("node-name")?,
            writable: o.take_bool("writable")?.unwrap_or(false),
            writethrough: o.take_bool("writethrough")?.unwrap_or(false),
        };
        let out = Add {
            id: o.require_str("id")?,
            kind,
            common,
            allow_inactive: o.take_bool("allow-inactive")?.unwrap_or(false),
            asked: (kind.parse)(&mut o)?,
            proposed: None,
        };
        o.finish("block-export-add")?;
        Ok(out)
    }

    /// Whether it may be, as far as names and the type are concerned.
    fn check(&self, world: &World, draft: &Draft) -> Result<OpId, QmpError> {
        let id = OpId::parse(&self.id).map_err(|e| QmpError::from(e.context("Invalid block export id")))?;
        if draft.op(&id).is_some() {
            return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
        }
        let Common { node, writable, .. } = &self.common;
        if !draft.has_node(node) {
            let text = format!("Cannot find device='' nor node-name='{node}'");
            return Err(QmpError::generic(text));
        }
        self.asked.check(&world.export_cx(), &self.common)?;
        let read_only = world.owner.graph().node(node).is_some_and(|n| n.flags.read_only);
        if *writable && read_only {
            return Err(QmpError::generic("Cannot export read-only node as writable"));
        }
        Ok(id)
    }

    /// Puts it into a draft.
    fn draft(&self, id: &OpId, draft: &mut Draft) -> Done {
        let Common { node, writable, .. } = &self.common;
        let access = if *writable { "writable" } else { "read-only" };
        draft.add_op(OpInfo {
            id: id.clone(),
            kind: "export".into(),
            detail: format!("{}, {access}", self.kind.name),
            since: None,
            ends_with: Some(format!("remove the export (block-export-del '{id}')")),
            instead_of_writing: Some(format!("export '{node}' read-only")),
        })?;
        let needs = if *writable { Actions::D | Actions::V } else { Actions::D };
        draft.add_user(id, node, Claim { needs, allows: Actions::EVERY - Actions::S })?;
        if self.allow_inactive {
            draft.allow_inactive(id);
        } else if !draft.is_active(node) {
            // An export wants to use its node.
            draft.set_active(Some(node), true)?;
        }
        // Refusals are worded for a newcomer; from here on it has a start time.
        draft.solve()?;
        draft.mark_started(id);
        Ok(())
    }
}

impl Act for Add {
    fn wait(&self, _: &World) -> Wait {
        Wait::Named
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let world = p.world;
            let id = self.check(world, p.draft())?;
            self.draft(&id, p.draft())?;
            self.proposed = Some(id);
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let Some(id) = self.proposed else { return Ok(json!({})) };
            // The operation goes again unless the export is started.
            let guard = Guard::new(&world, id.clone(), Vec::new());
            let made = match world.owner.edges(&id).next() {
                None => Err(QmpError::generic(format!("Export '{id}' has lost its node"))),
                Some(edge) => {
                    let made = self.asked.make(&world.export_cx(), &self.common, edge);
                    made.and_then(|export| export.start().map(|()| export)).map_err(QmpError::from)
                }
            };
            let serving = match made {
                Ok(serving) => serving,
                Err(e) => {
                    guard.release().await;
                    return Err(e);
                }
            };
            guard.keep();
            let export = Export { id, kind: self.kind, serving, shutting_down: false };
            world.exports.borrow_mut().push_front(export);
            Ok(json!({}))
        })
    }
}

/// The end of an export. Answers when its clients are gone, or soon if they don't go, or at once when they are not
/// to be disturbed.
struct Del {
    id: String,
    /// Disconnect its clients instead of refusing.
    hard: bool,
}

impl Del {
    fn from_options(mut o: Options) -> Result<Del, QmpError> {
        let hard = o.take_enum("mode", &["safe", "hard"])? == Some("hard");
        Ok(Del { id: o.require_str("id")?, hard })
    }

    fn check(&self, world: &World) -> Result<OpId, QmpError> {
        let id = &self.id;
        let exports = world.exports.borrow();
        let Some(export) = exports.iter().find(|e| e.id.as_str() == id) else {
            return Err(QmpError::generic(format!("Export '{id}' is not found")));
        };
        if export.shutting_down {
            return Err(QmpError::generic(format!("Export '{id}' is already shutting down")));
        }
        let clients = export.serving.clients();
        if !self.hard && clients > 0 {
            return Err(QmpError::generic(format!(
                "export '{id}' still in use by {clients} client(s) (disconnect them first, or use mode='hard' to disconnect them)"
            )));
        }
        Ok(export.id.clone())
    }
}

impl Act for Del {
    fn wait(&self, _: &World) -> Wait {
        Wait::For(Scope::names([&self.id]))
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let op = self.check(p.world)?;
            p.draft().remove_op(&op);
            p.draft().sweep();
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        let mut exports = world.exports.borrow_mut();
        let Some(export) = exports.iter_mut().find(|e| e.id.as_str() == self.id) else {
            return Box::pin(async { Ok(json!({})) });
        };
        let mode = if self.hard { StopMode::Hard } else { StopMode::Safe };
        let drained = match export.serving.stop(mode) {
            Ok(drained) => drained,
            // A client came after the proposal.
            Err(e) => return Box::pin(async { Err(QmpError::from(e)) }),
        };
        export.shutting_down = true;
        let op = export.id.clone();
        drop(exports);
        let (reply, done) = async_channel::bounded(1);
        let gone = world.gone.clone();
        world.rt.spawn(async move {
            drained.await;
            // The task ends only with the program.
            let _ = gone.send(Gone { ids: vec![op], reply }).await;
        });
        Box::pin(clients_gone(world.rt.clone(), done))
    }
}

static DEL: Shape =
    Shape::of(&[Field::required("id", Ty::Str), Field::optional("mode", Ty::Enum(&["safe", "hard"]))]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::change(
        "block-export-add",
        Ty::BlockExportOptions,
        |_, o| Ok(Box::new(Add::from_options(o)?)),
        "Makes a node available to clients.",
    ),
    CommandRow::verb(
        "block-export-del",
        Ty::Object(&DEL),
        |_, o| Ok(Box::new(Del::from_options(o)?)),
        "Removes an export; safe (the default) refuses while clients are connected.",
    ),
    CommandRow::query(
        "query-block-exports",
        NOTHING,
        Ty::ArrayOf(BlockExportInfo::ty),
        |world, _| Ok(model::to_json(&world.exports_of(&world.owner.graph()))),
        "Every export.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removal_is_safe_by_default() {
        let id = Options::new().with("id", "e");
        assert!(!Del::from_options(id.clone()).expect("reads").hard);
        assert!(Del::from_options(id.with("mode", "hard")).expect("reads").hard);
    }
}
