//! Counters as clients see them: pure functions from a snapshot.
//!
//! A user that answers requests of clients (an export) is shown as a device, with the counters of what its clients
//! asked for; nodes show what came to them, also when nobody knows it as a device. Nodes that an operation put
//! there without a name are stepped over: a client that has not asked for them does not see them.

use std::collections::HashMap;
use std::sync::Arc;

use dolmen_graph::{Counts, Graph, Node, UserEdge};
use dolmen_qmp::model::{BlockDeviceStats, BlockExportInfo, BlockInfo, BlockStats, FileStats};
use dolmen_rt::Instant;
use dolmen_types::ChildRole;

use crate::query::Images;

/// The reply of `query-blockstats`: every node, or every export.
pub(crate) fn block_stats(
    graph: &Graph,
    exports: &[BlockExportInfo],
    nodes: bool,
    now: Instant,
) -> Vec<BlockStats> {
    if nodes {
        return graph.nodes.iter().filter(|n| !is_implicit(n)).map(|n| node_stats(n, false)).collect();
    }
    devices(graph, exports)
        .map(|(id, edge)| {
            let node = edge.node();
            let mut out = node_stats(explicit(&node), true);
            let mut stats = shown(&edge.counters().read());
            stats.idle_time_ns = edge.last_ended().map(|at| nanos(now.since(at)));
            out.stats = stats;
            out.device = Some(id.to_owned());
            out
        })
        .collect()
}

/// The reply of `query-block`: every export and what it shows.
pub(crate) fn blocks(graph: &Graph, exports: &[BlockExportInfo]) -> Vec<BlockInfo> {
    let shown: Vec<_> = devices(graph, exports).map(|(id, edge)| (id, edge.node())).collect();
    let images = Images::default();
    shown
        .iter()
        .map(|(id, node)| BlockInfo {
            device: (*id).to_owned(),
            kind: "unknown",
            removable: false,
            locked: false,
            inserted: Some(images.block_node(explicit(node), false)),
        })
        .collect()
}

/// The exports with their edges.
fn devices<'a>(
    graph: &'a Graph,
    exports: &'a [BlockExportInfo],
) -> impl Iterator<Item = (&'a str, &'a Arc<UserEdge>)> {
    // The first edge of an operation is what its export shows.
    let edges: HashMap<&str, _> = graph.users.iter().rev().map(|u| (u.op().as_str(), u)).collect();
    exports.iter().filter_map(move |e| Some((e.id.as_str(), *edges.get(e.id.as_str())?)))
}

/// Whether an operation put the node there and nobody gave it a name.
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

/// What has come to a node and to those below it.
fn node_stats(node: &Arc<Node>, with_backing: bool) -> BlockStats {
    let counts = node.state.counters.read();
    let driver = node.driver.kind().name;
    let below = node.children.iter().find(|c| c.role != ChildRole::Backing);
    let boxed = |n: &Arc<Node>| Box::new(node_stats(explicit(n), with_backing));
    BlockStats {
        device: None,
        node_name: Some(node.name.as_str().to_owned()),
        stats: shown(&counts),
        driver_specific: matches!(driver, "file" | "host_device").then(|| FileStats {
            driver,
            discard_nb_ok: counts.discards.requests,
            discard_nb_failed: counts.discards.failed,
            discard_bytes_ok: counts.discards.bytes,
        }),
        parent: below.map(|c| boxed(&c.node)),
        backing: node.backing().filter(|_| with_backing).map(boxed),
    }
}

fn nanos(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn shown(c: &Counts) -> BlockDeviceStats {
    BlockDeviceStats {
        rd_bytes: c.reads.bytes,
        wr_bytes: c.writes.bytes + c.zeroes.bytes,
        unmap_bytes: c.discards.bytes,
        rd_operations: c.reads.requests,
        wr_operations: c.writes.requests + c.zeroes.requests,
        flush_operations: c.flushes.requests,
        unmap_operations: c.discards.requests,
        rd_total_time_ns: nanos(c.reads.time),
        wr_total_time_ns: nanos(c.writes.time + c.zeroes.time),
        flush_total_time_ns: nanos(c.flushes.time),
        unmap_total_time_ns: nanos(c.discards.time),
        wr_highest_offset: c.highest_write,
        failed_rd_operations: c.reads.failed,
        failed_wr_operations: c.writes.failed + c.zeroes.failed,
        failed_flush_operations: c.flushes.failed,
        failed_unmap_operations: c.discards.failed,
        account_failed: true,
        ..BlockDeviceStats::default()
    }
}
