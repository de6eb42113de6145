//! What `query-blockstats` and `query-block` return.
//!
//! Names and shapes are those of QEMU's daemon. Zoned devices and merged requests do not exist here: their
//! counters are always 0, and so is what counts requests that were refused before they were made.

use super::BlockDeviceInfo;
use crate::reply;
use crate::schema::{Field, Shape, Ty};

reply! {
    /// One entry of `query-blockstats`.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct BlockStats {
        /// The user that the counters belong to; not in the list of nodes, and not inside another entry.
        "device" device: Option<String>,
        /// The node; of a user, the one that it is attached to.
        "node-name" node_name: Option<String>,
        /// The counters.
        "stats" stats: BlockDeviceStats = Ty::Counters(BlockDeviceStats::ty),
        /// What only this driver counts.
        "driver-specific" driver_specific: Option<FileStats> = Ty::Object(&DRIVER_SPECIFIC),
        /// The node below that holds this one's data.
        "parent" parent: Option<Box<BlockStats>>,
        /// The backing node; not in the list of nodes.
        "backing" backing: Option<Box<BlockStats>>,
        never "qdev": Ty::Str,
    }
}

reply! {
    /// What the driver of a file counts.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct FileStats {
        /// Its name.
        "driver" driver: &'static str,
        /// Discards that succeeded.
        "discard-nb-ok" discard_nb_ok: u64,
        /// Discards that failed.
        "discard-nb-failed" discard_nb_failed: u64,
        /// Bytes of those that succeeded.
        "discard-bytes-ok" discard_bytes_ok: u64,
    }
}

reply! {
    /// Counters of a node or a user. Operations and bytes are those that succeeded; zero writes count as writes.
    #[derive(Clone, Debug, Default, PartialEq)]
    #[allow(missing_docs, reason = "the names are those of the protocol")]
    pub struct BlockDeviceStats {
        "rd_bytes" rd_bytes: u64,
        "wr_bytes" wr_bytes: u64,
        "zone_append_bytes" zone_append_bytes: u64,
        "unmap_bytes" unmap_bytes: u64,
        "rd_operations" rd_operations: u64,
        "wr_operations" wr_operations: u64,
        "zone_append_operations" zone_append_operations: u64,
        "flush_operations" flush_operations: u64,
        "unmap_operations" unmap_operations: u64,
        "rd_total_time_ns" rd_total_time_ns: u64,
        "wr_total_time_ns" wr_total_time_ns: u64,
        "zone_append_total_time_ns" zone_append_total_time_ns: u64,
        "flush_total_time_ns" flush_total_time_ns: u64,
        "unmap_total_time_ns" unmap_total_time_ns: u64,
        "wr_highest_offset" wr_highest_offset: u64,
        "rd_merged" rd_merged: u64,
        "wr_merged" wr_merged: u64,
        "zone_append_merged" zone_append_merged: u64,
        "unmap_merged" unmap_merged: u64,
        "failed_rd_operations" failed_rd_operations: u64,
        "failed_wr_operations" failed_wr_operations: u64,
        "failed_zone_append_operations" failed_zone_append_operations: u64,
        "failed_flush_operations" failed_flush_operations: u64,
        "failed_unmap_operations" failed_unmap_operations: u64,
        "invalid_rd_operations" invalid_rd_operations: u64,
        "invalid_wr_operations" invalid_wr_operations: u64,
        "invalid_zone_append_operations" invalid_zone_append_operations: u64,
        "invalid_flush_operations" invalid_flush_operations: u64,
        "invalid_unmap_operations" invalid_unmap_operations: u64,
        /// Since the last request; absent before the first, and of nodes.
        "idle_time_ns" idle_time_ns: Option<u64>,
        /// Whether invalid requests count in the time of the last access.
        "account_invalid" account_invalid: bool,
        /// Whether failed requests do.
        "account_failed" account_failed: bool,
        always "timed_stats": Ty::List(&TIMED_STATS) => [(); 0],
        rest further,
    }
}

static TIMED_STATS: Shape = Shape::of(&[
    Field::required("interval_length", Ty::Int),
    Field::required("min_rd_latency_ns", Ty::Int),
    Field::required("max_rd_latency_ns", Ty::Int),
    Field::required("avg_rd_latency_ns", Ty::Int),
    Field::required("min_wr_latency_ns", Ty::Int),
    Field::required("max_wr_latency_ns", Ty::Int),
    Field::required("avg_wr_latency_ns", Ty::Int),
    Field::required("min_zone_append_latency_ns", Ty::Int),
    Field::required("max_zone_append_latency_ns", Ty::Int),
    Field::required("avg_zone_append_latency_ns", Ty::Int),
    Field::required("min_flush_latency_ns", Ty::Int),
    Field::required("max_flush_latency_ns", Ty::Int),
    Field::required("avg_flush_latency_ns", Ty::Int),
    Field::required("avg_rd_queue_depth", Ty::Number),
    Field::required("avg_wr_queue_depth", Ty::Number),
    Field::required("avg_zone_append_queue_depth", Ty::Number),
]);

static FILE_STATS: Shape = Shape::of(&[
    Field::required("discard-nb-ok", Ty::Int),
    Field::required("discard-nb-failed", Ty::Int),
    Field::required("discard-bytes-ok", Ty::Int),
]);

reply! {
    /// One entry of `query-block`: a user that clients know as a device.
    #[derive(Clone, Debug, PartialEq)]
    pub struct BlockInfo {
        /// Its id.
        "device" device: String,
        /// What it is to a guest; "unknown" for exports.
        "type" kind: &'static str,
        /// Whether its medium can be taken out.
        "removable" removable: bool,
        /// Whether a guest has locked it.
        "locked" locked: bool,
        /// The node that it is attached to.
        "inserted" inserted: Option<BlockDeviceInfo>,
        never "qdev": Ty::Str,
        never "tray_open": Ty::Bool,
        never "io-status": Ty::Enum(&["ok", "failed", "nospace"]),
    }
}

static DRIVER_SPECIFIC: Shape = Shape {
    fields: &[Field::required("driver", Ty::Enum(&["file", "host_device"]))],
    tag: Some("driver"),
    variants: &[("file", &FILE_STATS), ("host_device", &FILE_STATS)],
};
