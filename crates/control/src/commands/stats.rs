//! Counters, as clients see them, and the write threshold.
//!
//! A user that answers requests of clients (an export) is shown as a device, with the counters of what its clients
//! asked for; nodes show what came to them, also of what is no device. Nodes that an operation put
//! there without a name are stepped over: a client that has not asked for them does not see them.

use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{Counts, Graph, Node, UserEdge};
use dolmen_qmp::QmpError;
use dolmen_qmp::model::{self, BlockDeviceStats, BlockExportInfo, BlockInfo, BlockStats, FileStats};
use dolmen_qmp::schema::{Field, NOTHING, Reply, Shape, Ty};
use dolmen_rt::{Instant, LocalFuture};
use dolmen_types::ChildRole;
use serde_json::json;

use crate::act::{Act, Proposal, Wait};
use crate::counter::CounterRow;
use crate::guard::Guard;
use crate::query::{Images, explicit, is_implicit};
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

/// The reply of `query-blockstats`: every node, or every export.
fn block_stats(
    graph: &Graph,
    exports: &[BlockExportInfo],
    counters: &[CounterRow],
    nodes: bool,
    now: Instant,
) -> Vec<BlockStats> {
    if nodes {
        return graph.nodes().iter().filter(|n| !is_implicit(n)).map(|n| node_stats(n, false)).collect();
    }
    devices(graph, exports)
        .map(|(id, edge)| {
            let node = edge.node();
            let mut out = node_stats(explicit(&node), true);
            let mut stats = shown(&edge.counters().read());
            stats.idle_time_ns = edge.last_ended().map(|at| nanos(now.since(at)));
            let of = |c: &CounterRow| Some((c.name.to_owned(), (c.read)(edge)?));
            stats.further = counters.iter().filter_map(of).collect();
            out.stats = stats;
            out.device = Some(id.to_owned());
            out
        })
        .collect()
}

/// The reply of `query-block`: every export and what it shows.
fn blocks(graph: &Graph, exports: &[BlockExportInfo]) -> Vec<BlockInfo> {
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
    exports.iter().filter_map(move |e| Some((e.id.as_str(), graph.edges(&e.id).next()?)))
}

/// What has come to a node and to those below it.
fn node_stats(node: &Arc<Node>, with_backing: bool) -> BlockStats {
    let counts = node.state.counters.read();
    let kind = node.driver.kind();
    let below = node.children.iter().find(|c| c.role != ChildRole::Backing);
    let boxed = |n: &Arc<Node>| Box::new(node_stats(explicit(n), with_backing));
    BlockStats {
        device: None,
        node_name: Some(node.name.as_str().to_owned()),
        stats: shown(&counts),
        driver_specific: kind.counts_discards.then_some(FileStats {
            driver: kind.name,
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

/// The first write beyond an offset is announced. Changes no link and no grant, so nothing is drafted.
struct SetWriteThreshold {
    node: String,
    /// The offset in bytes; 0 for none.
    threshold: u64,
}

impl SetWriteThreshold {
    fn node(&self, world: &World) -> Result<Arc<Node>, QmpError> {
        let node = world.owner.graph().node(&self.node).cloned();
        node.ok_or_else(|| QmpError::generic(format!("Device '{}' not found", self.node)))
    }
}

impl Act for SetWriteThreshold {
    fn wait(&self, _: &World) -> Wait {
        Wait::Nothing
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { self.node(p.world).map(drop) })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let node = self.node(&world)?;
            node.state.set_write_threshold(Some(self.threshold).filter(|t| *t != 0));
            Ok(json!({}))
        })
    }
}

static QUERY_NODES: Shape = Shape::of(&[Field::optional("query-nodes", Ty::Bool)]);
static THRESHOLD: Shape =
    Shape::of(&[Field::required("node-name", Ty::Str), Field::required("write-threshold", Ty::Size)]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::query(
        "query-block",
        NOTHING,
        Ty::ArrayOf(BlockInfo::ty),
        |world, _| {
            let graph = world.owner.graph();
            Ok(model::to_json(&blocks(&graph, &world.exports_of(&graph))))
        },
        "Every export as a device, with the node that it shows.",
    ),
    CommandRow::query(
        "query-blockstats",
        Ty::Object(&QUERY_NODES),
        Ty::ArrayOf(BlockStats::ty),
        |world, mut o| {
            let nodes = o.take_bool("query-nodes")?.unwrap_or(false);
            let graph = world.owner.graph();
            Ok(model::to_json(&block_stats(
                &graph,
                &world.exports_of(&graph),
                &world.counters,
                nodes,
                world.rt.now(),
            )))
        },
        "Counters of every export, or with query-nodes of every node.",
    ),
    CommandRow::verb(
        "block-set-write-threshold",
        Ty::Object(&THRESHOLD),
        |_, mut o| {
            let node = o.require_str("node-name")?;
            let threshold = o.take_size("write-threshold")?.unwrap_or(0);
            Ok(Box::new(SetWriteThreshold { node, threshold }))
        },
        "Announces the first write to a node that ends beyond the threshold; 0 for none.",
    ),
];
