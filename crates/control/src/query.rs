//! Queries: pure functions from a snapshot to what a client sees.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use dolmen_graph::{Class, Description, Filenames, Graph, Node, join, own_file};
use dolmen_qmp::json;
use dolmen_qmp::model::{
    BlockDeviceInfo, BlockGraph, BlockGraphEdge, BlockGraphNode, BlockGraphNodeType, CacheInfo, ImageInfo,
    SnapshotInfo, permission_words,
};
use dolmen_types::ChildRole;

/// Sizes are told in whole sectors, although a file may end in the middle of one.
const SECTOR: u64 = 512;

/// The reply of `query-named-block-nodes`: parents before children.
pub fn block_nodes(graph: &Graph, flat: bool) -> Vec<BlockDeviceInfo> {
    let nodes = graph.nodes();
    let images = Images::default();
    nodes.iter().rev().filter(|n| !is_implicit(n)).map(|n| images.block_node(n, flat)).collect()
}

/// What is known about the image of a node; with `chain` also about those below it.
pub fn image_info(node: &Arc<Node>, chain: bool) -> ImageInfo {
    Images::default().info(node, chain)
}

/// What is known about the images of one snapshot. Each node of a chain shows all below it: what is known about a node
/// is found out once.
#[derive(Default)]
pub(crate) struct Images<'g> {
    names: Filenames<'g>,
    chains: RefCell<HashMap<*const Node, ImageInfo>>,
}

impl<'g> Images<'g> {
    pub(crate) fn block_node(&self, node: &'g Arc<Node>, flat: bool) -> BlockDeviceInfo {
        let image = self.info(node, !flat);
        let depth = std::iter::successors(image.backing_image.as_deref(), |i| i.backing_image.as_deref());
        BlockDeviceInfo {
            file: image.filename.clone(),
            node_name: Some(node.name.as_str().to_owned()),
            ro: node.flags.read_only,
            drv: node.driver.kind().name.to_owned(),
            backing_file: node.backing().map(|b| self.names.of(b)),
            backing_file_depth: depth.count() as u64,
            active: !node.flags.inactive,
            encrypted: image.encrypted.unwrap_or(false),
            detect_zeroes: node.flags.detect_zeroes.as_str().to_owned(),
            image,
            cache: CacheInfo { writeback: true, direct: node.flags.direct, no_flush: node.flags.no_flush },
            write_threshold: node.state.write_threshold().unwrap_or(0),
        }
    }

    fn info(&self, node: &'g Arc<Node>, chain: bool) -> ImageInfo {
        if !chain {
            return self.image(node, None);
        }
        // From the deepest that is not known yet upwards: a chain may be longer than the stack.
        let known = |n: &&Arc<Node>| self.chains.borrow().contains_key(&Arc::as_ptr(n));
        let unknown: Vec<_> =
            std::iter::successors(Some(node), |n| next_image(n)).take_while(|n| !known(n)).collect();
        for n in unknown.into_iter().rev() {
            let below = next_image(n).and_then(|b| self.chains.borrow().get(&Arc::as_ptr(b)).cloned());
            let info = self.image(n, below);
            self.chains.borrow_mut().insert(Arc::as_ptr(n), info);
        }
        self.chains.borrow()[&Arc::as_ptr(node)].clone()
    }

    fn image(&self, node: &'g Arc<Node>, below: Option<ImageInfo>) -> ImageInfo {
        let d = describe(node);
        // A filter shows the image below it, but under its own name.
        let image = through_filters(node);
        let of_image = if Arc::ptr_eq(image, node) { d.clone() } else { describe(image) };
        let is_image = of_image.filename.is_some() || image.driver.kind().class == Class::Format;
        let backing = d.backing.as_ref().filter(|_| node.driver.kind().class == Class::Format);
        ImageInfo {
            backing_image: below.map(Box::new),
            virtual_size: node.size().next_multiple_of(SECTOR),
            filename: self.names.of(node),
            cluster_size: of_image.cluster_size,
            format: node.driver.kind().name.to_owned(),
            actual_size: actual_size(node),
            encrypted: d.encrypted.then_some(true),
            compressed: None,
            backing_filename: backing.map(|(name, _)| name.clone()),
            full_backing_filename: backing.map(|(name, _)| join(&own_file(node), name)),
            backing_filename_format: backing.and_then(|(_, format)| format.clone()),
            snapshots: Some(d.snapshots.iter().map(snapshot).collect()).filter(|s: &Vec<_>| !s.is_empty()),
            format_specific: d.format_specific.as_ref().map(json::from_value),
            dirty_flag: is_image.then_some(of_image.dirty),
        }
    }
}

fn describe(node: &Arc<Node>) -> Description {
    node.driver.describe(node)
}

fn snapshot(s: &dolmen_graph::SnapshotInfo) -> SnapshotInfo {
    const SECOND: u64 = 1_000_000_000;
    SnapshotInfo {
        id: s.id.clone(),
        name: s.name.clone(),
        vm_state_size: s.vm_state_size,
        date_sec: s.date_sec.into(),
        date_nsec: s.date_nsec.into(),
        vm_clock_sec: s.vm_clock_nsec / SECOND,
        vm_clock_nsec: s.vm_clock_nsec % SECOND,
        icount: s.icount,
    }
}

/// The first node at or below this one that is not a filter.
fn through_filters(node: &Arc<Node>) -> &Arc<Node> {
    let mut at = node;
    while at.driver.kind().class == Class::Filter
        && let Some(next) = at.filtered()
    {
        at = next;
    }
    at
}

/// The next image of the chain, as QEMU counts them: what a filter
/// is inserted above, or the backing node.
fn next_image(node: &Arc<Node>) -> Option<&Arc<Node>> {
    match node.driver.kind().class {
        Class::Filter => node.filtered(),
        Class::Format | Class::Protocol => node.backing(),
    }
}

/// Host bytes of a node: its own, or those of its children that are not backing files.
fn actual_size(node: &Arc<Node>) -> Option<u64> {
    if let Some(n) = describe(node).actual_size {
        return Some(n);
    }
    let own = node.children.iter().filter(|c| c.role != ChildRole::Backing);
    own.map(|c| actual_size(&c.node)).reduce(|a, b| Some(a?.saturating_add(b?))).flatten()
}

/// The reply of `x-debug-query-block-graph`.
pub fn block_graph(graph: &Graph) -> BlockGraph {
    let nodes = graph.nodes();
    // Children first, so numbers grow towards the users.
    let numbers: HashMap<&str, u64> = nodes.iter().map(|n| n.name.as_str()).zip(1..).collect();
    let number = |n: &Arc<Node>| numbers.get(n.name.as_str()).copied().unwrap_or(0);
    let mut out = BlockGraph::default();
    for node in nodes.iter().rev() {
        out.nodes.push(BlockGraphNode {
            name: node.name.as_str().to_owned(),
            kind: BlockGraphNodeType::BlockDriver,
            id: number(node),
        });
        out.edges.extend(node.children.iter().map(|c| BlockGraphEdge {
            name: c.name.to_owned(),
            parent: number(node),
            shared_perm: permission_words(c.claim.allows),
            perm: permission_words(c.claim.needs),
            child: number(&c.node),
        }));
    }
    for (user, id) in graph.users().zip(nodes.len() as u64 + 1..) {
        let is_job = graph.op(user.op()).is_some_and(|o| o.kind == "job");
        out.nodes.push(BlockGraphNode {
            name: user.op().as_str().to_owned(),
            kind: if is_job { BlockGraphNodeType::BlockJob } else { BlockGraphNodeType::BlockBackend },
            id,
        });
        let claim = user.claim();
        out.edges.push(BlockGraphEdge {
            name: "root".into(),
            parent: id,
            shared_perm: permission_words(claim.allows),
            perm: permission_words(claim.needs),
            child: number(&user.node()),
        });
    }
    out
}

/// Whether an operation put the node there without a name.
pub(crate) fn is_implicit(node: &Node) -> bool {
    node.owner.is_some() && node.anonymous
}

/// The first node at or below this one that is shown.
pub(crate) fn explicit(node: &Arc<Node>) -> &Arc<Node> {
    let mut at = node;
    while is_implicit(at)
        && let Some(next) = at.filtered()
    {
        at = next;
    }
    at
}
