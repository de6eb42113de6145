//! Nodes: opened, closed, given other options and children, handed over, listed.

use std::rc::Rc;

use dolmen_qmp::model::BlockDeviceInfo;
use dolmen_qmp::schema::{Field, Reply, Shape, Ty};
use dolmen_qmp::{QmpError, model};
use dolmen_rt::LocalFuture;
use dolmen_types::{ChildRole, Error, ErrorKind, Options, Value};
use serde_json::json;

use crate::act::{Act, Edit, Proposal, Wait};
use crate::guard::Guard;
use crate::query;
use crate::row::CommandRow;
use crate::turns::Scope;
use crate::world::{Answer, Done, World};

/// A node, with what is defined inside it.
struct Add(Options);

impl Edit for Add {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            if !self.0.has("node-name") {
                return Err(QmpError::generic("'node-name' must be specified for the root node"));
            }
            p.opener().open(p.draft(), self.0, true).await?;
            Ok(())
        })
    }
}

struct Del {
    node: String,
}

impl Edit for Del {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let name = self.node.as_str();
            if !p.draft().has_node(name) {
                return Err(no_node(name));
            }
            let over = p.draft().parents(name).into_iter().find(|(_, role)| *role == ChildRole::Backing);
            if let Some((overlay, _)) = over {
                let text = format!("Node '{name}' is busy: node is used as backing hd of '{overlay}'");
                return Err(Error::new(ErrorKind::Busy, text)
                    .remedy("remove the overlay first (blockdev-del)")
                    .into());
            }
            if !p.world.owner.is_monitor_owned(name) {
                return Err(QmpError::generic(format!("Node {name} is not owned by the monitor")));
            }
            p.draft().remove_node(name)?;
            Ok(())
        })
    }
}

fn no_node(name: &str) -> QmpError {
    QmpError::generic(format!("Failed to find node with node-name='{name}'"))
}

/// Nodes that get other options and children, in one step, while they are in use.
struct Reopen(Vec<Options>);

impl Edit for Reopen {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            if self.0.is_empty() {
                return Ok(());
            }
            let names: Vec<String> = self
                .0
                .iter()
                .filter_map(|o| match o.get("node-name") {
                    Some(Value::Str(s)) => Some(format!("'{s}'")),
                    _ => None,
                })
                .collect();
            let op = p.draft().add_command("blockdev-reopen", format!("of {}", names.join(", ")));
            p.opener().reopen(p.draft(), &op, self.0).await?;
            p.settle(&op).await
        })
    }
}

/// Images that are handed to another process, or taken over from it.
struct SetActive {
    /// All if none is named.
    node: Option<String>,
    active: bool,
}

impl Act for SetActive {
    fn wait(&self, _: &World) -> Wait {
        match self.node {
            None => Wait::For(Scope::All),
            Some(_) => Wait::Named,
        }
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            let node = self.node.as_deref();
            if let Some(name) = node.filter(|name| !p.draft().has_node(name)) {
                return Err(no_node(name));
            }
            p.draft().set_active(node, self.active)?;
            p.draft().solve().map_err(|e| match e.kind() {
                ErrorKind::Busy if !self.active => {
                    let what = if node.is_some() { "node" } else { "all nodes" };
                    QmpError::from(e.context(format!("Failed to inactivate {what}")))
                }
                _ => QmpError::from(e),
            })?;
            Ok(())
        })
    }

    fn perform(self: Box<Self>, _: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async { Ok(json!({})) })
    }
}

fn list(world: &World, mut o: Options) -> Answer {
    let flat = o.take_bool("flat")?.unwrap_or(false);
    Ok(model::to_json(&query::block_nodes(&world.owner.graph(), flat)))
}

static NODE_NAME: Shape = Shape::of(&[Field::required("node-name", Ty::Str)]);
static OPTIONS: Shape = Shape::of(&[Field::required("options", Ty::Array(&Ty::BlockdevOptions))]);
static ACTIVE: Shape =
    Shape::of(&[Field::optional("node-name", Ty::Str), Field::required("active", Ty::Bool)]);
static FLAT: Shape = Shape::of(&[Field::optional("flat", Ty::Bool)]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::edit(
        "blockdev-add",
        Ty::BlockdevOptions,
        |_, o| Ok(Box::new(Add(o))),
        "Opens a node, with the nodes that are defined inside it; all of them or none.",
    ),
    CommandRow::edit(
        "blockdev-del",
        Ty::Object(&NODE_NAME),
        |_, mut o| Ok(Box::new(Del { node: o.require_str("node-name")? })),
        "Closes a node that blockdev-add made and that nothing uses.",
    ),
    CommandRow::edit(
        "blockdev-reopen",
        Ty::Object(&OPTIONS),
        |_, mut o| {
            let nodes = o.take_list("options")?.unwrap_or_default();
            let nodes = nodes.into_iter().map(Options::from_value).collect::<Result<_, _>>()?;
            Ok(Box::new(Reopen(nodes)))
        },
        "Gives nodes other options and other children, while they are in use; all of them or none.",
    ),
    CommandRow::change(
        "blockdev-set-active",
        Ty::Object(&ACTIVE),
        |_, mut o| {
            let node = o.take_str("node-name")?;
            Ok(Box::new(SetActive { node, active: o.take_bool("active")?.unwrap_or(true) }))
        },
        "Hands a node's image (all images, if none is named) to another process, or takes it over.",
    ),
    CommandRow::query(
        "query-named-block-nodes",
        Ty::Object(&FLAT),
        Ty::ArrayOf(BlockDeviceInfo::ty),
        list,
        "Every node; without flat, the images of its backing chain inside each.",
    ),
];
