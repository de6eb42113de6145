//! Whether two nodes are of the same image: what one of them shows, the other shows as well, however they were opened.

use std::sync::Arc;

use dolmen_types::{ChildRole, Value};

use crate::filename::definition;
use crate::{Class, Node};

/// The node that shows the same data as `node` and is not a filter.
pub fn content(node: &Arc<Node>) -> &Arc<Node> {
    let mut at = node;
    while let Some(next) = at.filtered() {
        at = next;
    }
    at
}

/// Whether both show the same image: they are one node below their filters, or were opened on the same file (by
/// device and inode) or the same place on a server, in the same format.
pub fn same_image(a: &Arc<Node>, b: &Arc<Node>) -> bool {
    let (a, b) = (content(a), content(b));
    if Arc::ptr_eq(&a.state, &b.state) {
        return true;
    }
    let kind = a.driver.kind();
    if kind.name != b.driver.kind().name {
        return false;
    }
    match kind.class {
        Class::Protocol => match (a.driver.describe(a).file, b.driver.describe(b).file) {
            (Some(a), Some(b)) => a == b,
            (None, None) => definition(a) == definition(b),
            _ => false,
        },
        Class::Format => {
            let own = |n: &Arc<Node>| {
                let holds = |c: &&crate::ChildEdge| c.role != ChildRole::Backing;
                n.children.iter().filter(holds).cloned().collect::<Vec<_>>()
            };
            let (x, y) = (own(a), own(b));
            let pairs = x.iter().zip(&y);
            part_shown(a) == part_shown(b)
                && x.len() == y.len()
                && pairs.into_iter().all(|(x, y)| x.name == y.name && same_image(&x.node, &y.node))
        }
        // It shows something else than its child does, and when it did so matters.
        Class::Filter => false,
    }
}

/// Whether two backing chains (or the ends of two) show the same.
pub fn same_chain(a: Option<&Arc<Node>>, b: Option<&Arc<Node>>) -> bool {
    let (mut a, mut b) = (a, b);
    loop {
        match (a, b) {
            (None, None) => return true,
            (Some(x), Some(y)) if Arc::ptr_eq(&content(x).state, &content(y).state) => return true,
            (Some(x), Some(y)) if same_image(x, y) => (a, b) = (content(x).backing(), content(y).backing()),
            _ => return false,
        }
    }
}

/// The window of a `raw` node.
fn part_shown(node: &Node) -> [Option<&Value>; 2] {
    ["offset", "size"].map(|key| match &node.options {
        Value::Map(m) => m.iter().find(|(k, _)| k == key).map(|(_, v)| v),
        _ => None,
    })
}
