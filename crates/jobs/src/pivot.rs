//! The images over a node that is to be replaced name it in their headers. A pivot that
//! moves only their links would be undone when they are opened again, and what was written
//! after it would be missing. So the headers are rewritten first; at that instant both
//! nodes hold the same data, so a crash before or after finds the right ones. Should the
//! pivot fail after all, the headers get their old names back.

use std::cell::RefCell;
use std::sync::Arc;

use dolmen_graph::{BackingName, Class, Cx, Draft, Graph, Node, header_name, own_file};
use dolmen_rt::Rt;
use dolmen_types::{Actions, Claim, Error, ErrorKind, NodeName, OpId, Result};

use crate::claims::claim;

/// The overlays of a node that is to be replaced.
#[derive(Debug, Default)]
pub(crate) struct Overlays {
    was_read_only: RefCell<Vec<NodeName>>,
    renamed: RefCell<Vec<Renamed>>,
}

/// A header that names another image, and what it named before.
#[derive(Debug)]
struct Renamed {
    node: NodeName,
    before: Option<(String, Option<String>)>,
    rt: Rt,
}

/// The first node at or below `node` that is no filter.
fn content(node: &Arc<Node>) -> &Arc<Node> {
    let mut at = node;
    while at.driver.kind().class == Class::Filter
        && let Some(next) = at.filtered()
    {
        at = next;
    }
    at
}

impl Overlays {
    /// Makes the headers of the overlays of `replaced` writable, and keeps them so.
    pub(crate) fn put(&self, op: &OpId, d: &mut Draft, replaced: &NodeName) -> Result<()> {
        use Actions as A;
        let mut was_read_only = Vec::new();
        for o in d.overlays(replaced) {
            was_read_only.extend(d.set_read_only(&o, false)?);
            claim(d, op, &o, A::G, A::G, "names another backing file when the job ends")?;
            d.add_user_below_filters(op, &o, Claim { needs: A::M, allows: A::EVERY })?;
        }
        *self.was_read_only.borrow_mut() = was_read_only;
        Ok(())
    }

    /// Has every overlay of `replaced` name `by`.
    pub(crate) async fn rename(&self, graph: &Graph, rt: &Rt, replaced: &str, by: &str) -> Result<()> {
        let (Some(old), Some(new)) = (graph.node(replaced), graph.node(by)) else { return Ok(()) };
        // What lies below the new node stays as it is: an image must not come to name itself, nor one above it.
        let spared = new.subtree();
        for node in graph.around(replaced) {
            let is_over = node.backing().is_some_and(|b| Arc::ptr_eq(&content(b).state, &content(old).state));
            if !is_over || spared.iter().any(|n| Arc::ptr_eq(&n.state, &node.state)) {
                continue;
            }
            if node.flags.read_only {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!(
                        "node '{}' is read-only, so its header would go on naming '{}' as its backing file",
                        node.name, old.name
                    ),
                )
                .remedy("remove that node or make it writable (blockdev-reopen), then start the job again"));
            }
            let (name, format) = header_name(new, &own_file(node))?;
            let before = node.driver.describe(node).backing;
            let to = BackingName { name: &name, format: Some(format) };
            dolmen_graph::set_backing(Cx { node, rt }, Some(to)).await?;
            self.renamed.borrow_mut().push(Renamed { node: node.name.clone(), before, rt: rt.clone() });
        }
        Ok(())
    }

    /// The pivot has failed: gives the headers their old names back, in the background. An
    /// image whose header can't be written any more has worse trouble, which its next user
    /// is told.
    pub(crate) fn undo(&self, d: &Draft) {
        for r in self.renamed.take() {
            let Ok(node) = d.built_node(&r.node) else { continue };
            let rt = r.rt.clone();
            rt.spawn(async move {
                let to =
                    r.before.as_ref().map(|(name, format)| BackingName { name, format: format.as_deref() });
                drop(dolmen_graph::set_backing(Cx { node: &node, rt: &r.rt }, to).await);
            });
        }
    }

    /// Makes read-only again what was so before.
    pub(crate) fn restore(&self, d: &mut Draft) {
        d.restore_read_only(&self.was_read_only.borrow());
    }
}
