//! What `query-blockstats` and `query-block` return.
//!
//! Names and shapes are those of the established daemon. Zoned devices and merged requests do not exist here: their
//! counters are always 0, and so is what counts requests that were refused before they were made.

use serde::Serialize;

use super::{BLOCK_DEVICE_INFO, BlockDeviceInfo};
use crate::schema::{Field, Shape, Ty};

/// One entry of `query-blockstats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockStats {
    /// The user that the counters belong to; not in the list of nodes, and not inside another entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The node; of a user, the one that it is attached to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockDeviceStats,
    /// What only this driver counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_specific: Option<FileStats>,
    /// The node below that holds this one's data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Box<BlockStats>>,
    /// The backing node; not in the list of nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<BlockStats>>,
}

/// What the driver of a file counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileStats {
    /// Its name.
    pub driver: &'static str,
    /// Discards that succeeded.
    pub discard_nb_ok: u64,
    /// Discards that failed.
    pub discard_nb_failed: u64,
    /// Bytes of those that succeeded.
    pub discard_bytes_ok: u64,
}

macro_rules! counters {
    ($($name:ident,)*) => {
        /// Counters of a node or a user. Operations and bytes are those that succeeded; zero writes count as writes.
        #[derive(Clone, Debug, Default, PartialEq, Serialize)]
        #[allow(missing_docs, reason = "the names are those of the protocol")]
        pub struct BlockDeviceStats {
            $(pub $name: u64,)*
            /// Since the last request; absent before the first, and of nodes.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub idle_time_ns: Option<u64>,
            /// Whether invalid requests count in the time of the last access.
            pub account_invalid: bool,
            /// Whether failed requests do.
            pub account_failed: bool,
            /// Statistics of intervals: nobody can ask for any.
            pub timed_stats: [(); 0],
        }

        static BLOCK_DEVICE_STATS: Shape = Shape::of(&[
            $(Field::required(stringify!($name), Ty::Int),)*
            Field::optional("idle_time_ns", Ty::Int),
            Field::required("account_invalid", Ty::Bool),
            Field::required("account_failed", Ty::Bool),
            Field::required("timed_stats", Ty::Array(&Ty::Object(&TIMED_STATS))),
        ]);
    };
}

counters! {
    rd_bytes,
    wr_bytes,
    zone_append_bytes,
    unmap_bytes,
    rd_operations,
    wr_operations,
    zone_append_operations,
    flush_operations,
    unmap_operations,
    rd_total_time_ns,
    wr_total_time_ns,
    zone_append_total_time_ns,
    flush_total_time_ns,
    unmap_total_time_ns,
    wr_highest_offset,
    rd_merged,
    wr_merged,
    zone_append_merged,
    unmap_merged,
    failed_rd_operations,
    failed_wr_operations,
    failed_zone_append_operations,
    failed_flush_operations,
    failed_unmap_operations,
    invalid_rd_operations,
    invalid_wr_operations,
    invalid_zone_append_operations,
    invalid_flush_operations,
    invalid_unmap_operations,
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

/// The shape of it.
pub static BLOCK_STATS: Shape = Shape::of(&[
    Field::optional("device", Ty::Str),
    Field::optional("qdev", Ty::Str),
    Field::optional("node-name", Ty::Str),
    Field::required("stats", Ty::Object(&BLOCK_DEVICE_STATS)),
    Field::optional(
        "driver-specific",
        Ty::Object(&Shape {
            fields: &[Field::required("driver", Ty::Enum(&["file", "host_device"]))],
            tag: Some("driver"),
            variants: &[("file", &FILE_STATS), ("host_device", &FILE_STATS)],
        }),
    ),
    Field::optional("parent", Ty::Object(&BLOCK_STATS)),
    Field::optional("backing", Ty::Object(&BLOCK_STATS)),
]);

static FILE_STATS: Shape = Shape::of(&[
    Field::required("discard-nb-ok", Ty::Int),
    Field::required("discard-nb-failed", Ty::Int),
    Field::required("discard-bytes-ok", Ty::Int),
]);

/// One entry of `query-block`: a user that clients know as a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BlockInfo {
    /// Its id.
    pub device: String,
    /// What it is to a guest; "unknown" for exports.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Whether its medium can be taken out.
    pub removable: bool,
    /// Whether a guest has locked it.
    pub locked: bool,
    /// The node that it is attached to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inserted: Option<BlockDeviceInfo>,
}

/// The shape of it.
pub static BLOCK_INFO: Shape = Shape::of(&[
    Field::required("device", Ty::Str),
    Field::optional("qdev", Ty::Str),
    Field::required("type", Ty::Str),
    Field::required("removable", Ty::Bool),
    Field::required("locked", Ty::Bool),
    Field::optional("inserted", Ty::Object(&BLOCK_DEVICE_INFO)),
    Field::optional("tray_open", Ty::Bool),
    Field::optional("io-status", Ty::Enum(&["ok", "failed", "nospace"])),
]);
