//! The commands that change something.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_exports::{NbdExport, NbdServer, NbdServerConfig};
use dolmen_graph::{Draft, Node, OpInfo};
use dolmen_qmp::{QmpError, SocketAddress};
use dolmen_rt::Addr;
use dolmen_types::{Actions, Claim, Error, ErrorKind, OpId, Options};

use crate::export::{Export, stop_server};
use crate::owed::Owed;
use crate::task::{Gone, Reply, Task, answer};
use crate::{ExportAdd, NbdServerStart};

type Done = Result<(), QmpError>;

/// Puts a node and what is defined inside it into a draft.
pub(crate) async fn propose_add(task: &Task, draft: &mut Draft, options: Options) -> Done {
    if !options.has("node-name") {
        return Err(QmpError::generic("'node-name' must be specified for the root node"));
    }
    let rt = task.shared.rt.clone();
    task.opener(&rt).open(draft, options, true).await?;
    Ok(())
}

/// Takes a node out of a draft.
pub(crate) fn propose_del(task: &Task, draft: &mut Draft, name: &str) -> Done {
    if !draft.has_node(name) {
        return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
    }
    let graph = task.owner.graph();
    let over = graph.nodes.iter().find(|n| n.backing().is_some_and(|b| b.name.as_str() == name));
    if let Some(overlay) = over {
        let text = format!("Node '{name}' is busy: node is used as backing hd of '{}'", overlay.name);
        return Err(Error::new(ErrorKind::Busy, text)
            .remedy("remove the overlay first (blockdev-del)")
            .into());
    }
    if !task.owner.is_monitor_owned(name) {
        return Err(QmpError::generic(format!("Node {name} is not owned by the monitor")));
    }
    draft.remove_node(name)?;
    Ok(())
}

/// The node whose write threshold is to be set.
pub(crate) fn propose_write_threshold(task: &Task, name: &str) -> Result<Arc<Node>, QmpError> {
    let node = task.owner.graph().node(name).cloned();
    node.ok_or_else(|| QmpError::generic(format!("Device '{name}' not found")))
}

/// Sets the write threshold of a node. Changes no link and no grant, so nothing is drafted.
pub(crate) fn set_write_threshold(task: &Task, name: &str, threshold: u64) -> Done {
    let node = propose_write_threshold(task, name)?;
    node.state.set_write_threshold(Some(threshold).filter(|t| *t != 0));
    Ok(())
}

/// Where an NBD server would listen, if it could be started.
pub(crate) async fn propose_server(task: &Task, start: &NbdServerStart) -> Result<Addr, QmpError> {
    if task.server.borrow().is_some() {
        return Err(QmpError::generic("NBD server already running"));
    }
    let address = match &start.address {
        SocketAddress::Unix { path } => Addr::Unix(dolmen_types::os_name(path).into()),
        SocketAddress::Inet { host, port } => {
            let port = port.parse().map_err(|_| {
                QmpError::generic(format!("Parameter 'port' expects a number up to 65535, not '{port}'"))
            })?;
            Addr::Inet { host: host.clone(), port }
        }
    };
    // A name may take long to resolve.
    let check = async { Ok(NbdServer::check(&task.shared.rt, &address).await?) };
    task.shared.patiently(check).await?;
    Ok(address)
}

/// Starts the NBD server.
pub(crate) async fn nbd_server_start(task: &Task, start: NbdServerStart) -> Done {
    let address = propose_server(task, &start).await?;
    let config =
        NbdServerConfig { max_connections: start.max_connections, handshake_max: start.handshake_max };
    let listen = async { Ok(NbdServer::listen(&task.shared.rt, &address, config).await?) };
    let server = task.shared.patiently(listen).await?;
    task.server.replace(Some(Rc::new(server)));
    Ok(())
}

/// Takes all exports out of a draft.
pub(crate) fn propose_server_stop(task: &Task, draft: &mut Draft) -> Done {
    if task.server.borrow().is_none() {
        return Err(QmpError::generic("NBD server not running"));
    }
    task.shared.exports.borrow().iter().for_each(|e| draft.remove_op(&e.id));
    draft.sweep();
    Ok(())
}

/// Disconnects everybody and stops the server. Answers when that is done, or soon if clients don't go.
pub(crate) fn nbd_server_stop(task: &Task, reply: &Reply) -> Done {
    propose_server_stop(task, &mut task.owner.draft())?;
    let Some(server) = task.server.take() else { return Ok(()) };
    let mut exports = task.shared.exports.borrow_mut();
    exports.iter_mut().for_each(|e| e.shutting_down = true);
    let ids = exports.iter().map(|e| e.id.clone()).collect();
    let names: Vec<String> = exports.iter().map(|e| e.name.clone()).collect();
    answer_in_time(task, reply);
    let (gone, reply) = (task.gone.clone(), Some(reply.clone()));
    task.shared.rt.spawn(async move {
        stop_server(server, &names).await;
        // The task ends only with the program.
        let _ = gone.send(Gone { ids, reply }).await;
    });
    Ok(())
}

/// Puts an export into a draft: an operation with an edge.
pub(crate) fn propose_export(task: &Task, draft: &mut Draft, add: &ExportAdd) -> Result<OpId, QmpError> {
    let id = OpId::parse(&add.id).map_err(|e| QmpError::from(e.context("Invalid block export id")))?;
    if task.owner.ops().iter().any(|o| o.id == id) {
        return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
    }
    if !draft.has_node(&add.node) {
        return Err(QmpError::generic(format!("Cannot find device='' nor node-name='{}'", add.node)));
    }
    if task.server.borrow().is_none() {
        return Err(QmpError::generic("NBD server not running"));
    }
    let name = add.name.as_ref().unwrap_or(&add.node);
    if task.shared.exports.borrow().iter().any(|e| e.name == *name) {
        return Err(QmpError::generic(format!("NBD server already has export named '{name}'")));
    }
    NbdServer::check_texts(name, &add.description)?;
    let read_only = task.owner.graph().node(&add.node).is_some_and(|n| n.flags.read_only);
    if add.writable && read_only {
        return Err(QmpError::generic("Cannot export read-only node as writable"));
    }
    let detail = if add.writable { "nbd, writable" } else { "nbd, read-only" };
    draft.add_op(OpInfo {
        id: id.clone(),
        kind: "export".into(),
        detail: detail.into(),
        since: None,
        ends_with: Some(format!("remove the export (block-export-del '{id}')")),
        instead_of_writing: Some(format!("export '{}' read-only", add.node)),
    })?;
    let needs = if add.writable { Actions::D | Actions::V } else { Actions::D };
    draft.add_user(&id, &add.node, Claim { needs, allows: Actions::EVERY - Actions::S })?;
    if add.allow_inactive {
        draft.allow_inactive(&id);
    } else if !draft.is_active(&add.node) {
        // Who exports a node wants to use it.
        draft.set_active(Some(&add.node), true)?;
    }
    // Refusals are worded for a newcomer; from here on it has a start time.
    draft.solve()?;
    draft.mark_started(&id);
    Ok(id)
}

/// Adds an export: an operation with an edge in the graph, and a name at the server.
pub(crate) async fn export_add(task: &Rc<Task>, add: ExportAdd) -> Done {
    let mut draft = task.owner.draft();
    let id = propose_export(task, &mut draft, &add)?;
    let Some(server) = task.server.borrow().clone() else {
        return Err(QmpError::generic("NBD server not running"));
    };
    let name = add.name.unwrap_or_else(|| add.node.clone());
    task.commit(draft).await?;
    let owed = Owed::new(task, id.clone(), Vec::new());
    let edge = task.owner.edges(&id).next();
    let same_server = task.server.borrow().as_ref().is_some_and(|s| Rc::ptr_eq(s, &server));
    let offered = match edge {
        None => Err(QmpError::generic(format!("Export '{id}' has lost its node"))),
        Some(_) if !same_server => Err(QmpError::generic("NBD server was stopped meanwhile")),
        Some(edge) => server
            .add_export(NbdExport {
                name: name.clone(),
                description: add.description,
                edge,
                writable: add.writable,
                writethrough: add.writethrough,
            })
            .map_err(QmpError::from),
    };
    if let Err(e) = offered {
        owed.give_back().await;
        return Err(e);
    }
    owed.keep();
    task.shared.exports.borrow_mut().push_front(Export { id, name, shutting_down: false });
    Ok(())
}

/// How long who removes exports waits until their clients are gone.
const CLIENTS_GO: Duration = Duration::from_secs(1);

/// Answers soon whatever clients do: a request of theirs may wait for storage that never answers, and
/// whoever asked wants to go on. An event tells when the export is gone.
fn answer_in_time(task: &Task, reply: &Reply) {
    let (rt, reply) = (task.shared.rt.clone(), reply.clone());
    task.shared.rt.spawn(async move {
        rt.sleep(CLIENTS_GO).await;
        // Nobody waits any more if the export is gone.
        answer(&reply, Ok(serde_json::json!({})));
    });
}

/// Takes an export out of a draft.
pub(crate) fn propose_export_del(task: &Task, draft: &mut Draft, id: &str, hard: bool) -> Done {
    let exports = task.shared.exports.borrow();
    let Some(export) = exports.iter().find(|e| e.id.as_str() == id) else {
        return Err(QmpError::generic(format!("Export '{id}' is not found")));
    };
    if export.shutting_down {
        return Err(QmpError::generic(format!("Export '{id}' is already shutting down")));
    }
    let clients = task.server.borrow().as_ref().and_then(|s| s.clients(&export.name)).unwrap_or(0);
    if !hard && clients > 0 {
        return Err(QmpError::generic(format!(
            "export '{id}' still in use by {clients} client(s) (disconnect them first, or use mode='hard' to disconnect them)"
        )));
    }
    draft.remove_op(&export.id);
    draft.sweep();
    Ok(())
}

/// Removes an export. Answers when its clients are gone, or soon if they don't go, or at once when they are not
/// to be disturbed.
pub(crate) fn export_del(task: &Task, id: &str, hard: bool, reply: &Reply) -> Done {
    propose_export_del(task, &mut task.owner.draft(), id, hard)?;
    let mut exports = task.shared.exports.borrow_mut();
    let Some(export) = exports.iter_mut().find(|e| e.id.as_str() == id) else { return Ok(()) };
    export.shutting_down = true;
    answer_in_time(task, reply);
    let (server, name, op) = (task.server.borrow().clone(), export.name.clone(), export.id.clone());
    let (gone, reply) = (task.gone.clone(), reply.clone());
    task.shared.rt.spawn(async move {
        if let Some(server) = server {
            // `clients` was 0 a moment ago if the removal is not hard, and nothing has run
            // since: an error means that the server has no such export any more.
            let _ = server.remove_export(&name, hard).await;
        }
        let failed = gone.send(Gone { ids: vec![op], reply: Some(reply.clone()) }).await.is_err();
        if failed {
            answer(&reply, Ok(serde_json::json!({})));
        }
    });
    Ok(())
}
