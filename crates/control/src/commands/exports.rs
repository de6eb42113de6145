//! Exports: added, removed, listed.

use std::rc::Rc;

use dolmen_exports::{NbdExport, NbdServer};
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

/// An export: an operation with an edge in the graph, and a name at the server.
struct Add {
    id: String,
    node: String,
    /// Whether clients may change it.
    writable: bool,
    /// Whether every write is durable before its reply.
    writethrough: bool,
    /// Whether the node may be inactive while it is exported.
    allow_inactive: bool,
    /// The name that clients ask for.
    name: String,
    /// For people; may be empty.
    description: String,
    /// Once it is proposed: the operation, and the server that is to offer it.
    proposed: Option<(OpId, Rc<NbdServer>)>,
}

impl Add {
    fn from_options(mut o: Options) -> Result<Add, QmpError> {
        // The schema knows one type so far, so there is nothing to choose between.
        o.take_enum("type", &["nbd"])?;
        let node = o.require_str("node-name")?;
        let out = Add {
            id: o.require_str("id")?,
            writable: o.take_bool("writable")?.unwrap_or(false),
            writethrough: o.take_bool("writethrough")?.unwrap_or(false),
            allow_inactive: o.take_bool("allow-inactive")?.unwrap_or(false),
            name: o.take_str("name")?.unwrap_or_else(|| node.clone()),
            description: o.take_str("description")?.unwrap_or_default(),
            node,
            proposed: None,
        };
        o.finish("block-export-add")?;
        Ok(out)
    }

    /// Whether it may be, as far as the server and the names are concerned.
    fn check(&self, world: &World, draft: &Draft) -> Result<(OpId, Rc<NbdServer>), QmpError> {
        let id = OpId::parse(&self.id).map_err(|e| QmpError::from(e.context("Invalid block export id")))?;
        if world.owner.ops().iter().any(|o| o.id == id) {
            return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
        }
        if !draft.has_node(&self.node) {
            let text = format!("Cannot find device='' nor node-name='{}'", self.node);
            return Err(QmpError::generic(text));
        }
        let Some(server) = world.server.borrow().clone() else {
            return Err(QmpError::generic("NBD server not running"));
        };
        let name = &self.name;
        if world.exports.borrow().iter().any(|e| e.name == *name) {
            return Err(QmpError::generic(format!("NBD server already has export named '{name}'")));
        }
        NbdServer::check_texts(name, &self.description)?;
        let read_only = world.owner.graph().node(&self.node).is_some_and(|n| n.flags.read_only);
        if self.writable && read_only {
            return Err(QmpError::generic("Cannot export read-only node as writable"));
        }
        Ok((id, server))
    }

    /// Puts it into a draft.
    fn draft(&self, id: &OpId, draft: &mut Draft) -> Done {
        let detail = if self.writable { "nbd, writable" } else { "nbd, read-only" };
        draft.add_op(OpInfo {
            id: id.clone(),
            kind: "export".into(),
            detail: detail.into(),
            since: None,
            ends_with: Some(format!("remove the export (block-export-del '{id}')")),
            instead_of_writing: Some(format!("export '{}' read-only", self.node)),
        })?;
        let needs = if self.writable { Actions::D | Actions::V } else { Actions::D };
        draft.add_user(id, &self.node, Claim { needs, allows: Actions::EVERY - Actions::S })?;
        if self.allow_inactive {
            draft.allow_inactive(id);
        } else if !draft.is_active(&self.node) {
            // An export wants to use its node.
            draft.set_active(Some(&self.node), true)?;
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
            let (id, server) = self.check(world, p.draft())?;
            self.draft(&id, p.draft())?;
            self.proposed = Some((id, server));
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let Some((id, server)) = self.proposed else { return Ok(json!({})) };
            // The operation goes again unless the export is offered.
            let guard = Guard::new(&world, id.clone(), Vec::new());
            let edge = world.owner.edges(&id).next();
            let same_server = world.server.borrow().as_ref().is_some_and(|s| Rc::ptr_eq(s, &server));
            let offered = match edge {
                None => Err(QmpError::generic(format!("Export '{id}' has lost its node"))),
                Some(_) if !same_server => Err(QmpError::generic("NBD server was stopped meanwhile")),
                Some(edge) => server
                    .add_export(NbdExport {
                        name: self.name.clone(),
                        description: self.description,
                        edge,
                        writable: self.writable,
                        writethrough: self.writethrough,
                    })
                    .map_err(QmpError::from),
            };
            if let Err(e) = offered {
                guard.release().await;
                return Err(e);
            }
            guard.keep();
            world.exports.borrow_mut().push_front(Export { id, name: self.name, shutting_down: false });
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
        let clients = world.server.borrow().as_ref().and_then(|s| s.clients(&export.name)).unwrap_or(0);
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
        export.shutting_down = true;
        let (server, name, op) = (world.server.borrow().clone(), export.name.clone(), export.id.clone());
        drop(exports);
        let (reply, done) = async_channel::bounded(1);
        let gone = world.gone.clone();
        world.rt.spawn(async move {
            if let Some(server) = server {
                // `clients` was 0 a moment ago if the removal is not hard, and nothing has run
                // since: an error means that the server has no such export any more.
                let _ = server.remove_export(&name, self.hard).await;
            }
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
