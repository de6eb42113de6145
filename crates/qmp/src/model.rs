//! What queries return: serialisable types beside their schema.
//!
//! [`reply!`](crate::reply) declares each struct together with its shape. Names are those of QEMU's daemon, and so are the members
//! that Dolmen has no use for (`bps` and its kin are always 0: throttling is a node
//! of its own).

mod stats;

use dolmen_types::{Action, Actions};
use serde::Serialize;
use serde_json::Value as Json;

use crate::reply;
use crate::schema::{Field, Reply, Shape, Ty, jobs};

reply! {
    /// One entry of `query-jobs`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct JobInfo {
        /// How much is done, in whatever the job counts.
        "current-progress" current_progress: u64,
        /// Where it is in its life.
        "status" status: String = Ty::Enum(jobs::STATUS),
        /// How much there is to be done, as far as is known.
        "total-progress" total_progress: u64,
        /// What kind of job it is.
        "type" kind: String = Ty::JobName,
        /// Its id.
        "id" id: String,
        /// How long it will take at its present pace; absent while that is not known.
        "estimated-remaining-ms" estimated_remaining_ms: Option<u64>,
        /// Why it failed.
        "error" error: Option<String>,
    }
}

reply! {
    /// One entry of `query-block-jobs`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct BlockJobInfo {
        /// Whether its result becomes visible without being asked for.
        "auto-finalize" auto_finalize: bool,
        /// `ok`, `failed` or `nospace`.
        "io-status" io_status: String = Ty::Enum(&["ok", "failed", "nospace"]),
        /// Its id.
        "device" device: String,
        /// Whether it is forgotten when it has ended.
        "auto-dismiss" auto_dismiss: bool,
        /// Whether it does something right now.
        "busy" busy: bool,
        /// Bytes to be done, as far as is known.
        "len" len: u64,
        /// Bytes done.
        "offset" offset: u64,
        /// Where it is in its life.
        "status" status: String = Ty::Enum(jobs::STATUS),
        /// Whether it is to pause.
        "paused" paused: bool,
        /// Its limit in bytes per second; 0 for none.
        "speed" speed: u64,
        /// Whether it can be completed.
        "ready" ready: bool,
        /// What kind of job it is.
        "type" kind: String = Ty::JobName,
        /// Why it failed.
        "error" error: Option<String>,
        rest details,
    }
}

pub use stats::{BlockDeviceStats, BlockInfo, BlockStats, FileStats};

reply! {
    /// One entry of `query-named-block-nodes`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct BlockDeviceInfo {
        /// How to open it again: a file name, or `json:{...}`.
        "file" file: String,
        /// Its name.
        "node-name" node_name: Option<String>,
        /// Whether it is read-only.
        "ro" ro: bool,
        /// Its driver.
        "drv" drv: String,
        /// The name of its backing file, where it has one.
        "backing_file" backing_file: Option<String>,
        /// The number of images below it; 0 in a flat list.
        "backing_file_depth" backing_file_depth: u64,
        /// Whether this process may use the image now.
        "active" active: bool,
        /// Whether the image is encrypted.
        "encrypted" encrypted: bool,
        /// `off`, `on` or `unmap`.
        "detect_zeroes" detect_zeroes: String = Ty::Enum(&["off", "on", "unmap"]),
        /// The image.
        "image" image: ImageInfo,
        /// How writes are cached.
        "cache" cache: CacheInfo,
        /// The offset at which an event is raised; 0 for none.
        "write_threshold" write_threshold: u64,
        always "bps": Ty::Int => 0,
        always "bps_rd": Ty::Int => 0,
        always "bps_wr": Ty::Int => 0,
        always "iops": Ty::Int => 0,
        always "iops_rd": Ty::Int => 0,
        always "iops_wr": Ty::Int => 0,
    }
}

reply! {
    /// The cache mode of a node.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CacheInfo {
        /// Whether a write may be acknowledged before it is durable.
        "writeback" writeback: bool,
        /// Whether the page cache is bypassed.
        "direct" direct: bool,
        /// Whether flushes are ignored.
        "no-flush" no_flush: bool,
    }
}

reply! {
    /// An image, as `query-named-block-nodes` and the image tools describe it.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct ImageInfo {
        /// The images below it, unless the list is flat.
        "backing-image" backing_image: Option<Box<ImageInfo>>,
        /// What readers see, in bytes.
        "virtual-size" virtual_size: u64,
        /// How to open it.
        "filename" filename: String,
        /// In bytes, where the format has clusters.
        "cluster-size" cluster_size: Option<u64>,
        /// Its driver.
        "format" format: String,
        /// Bytes used on the host.
        "actual-size" actual_size: Option<u64>,
        /// Whether it is encrypted.
        "encrypted" encrypted: Option<bool>,
        /// Whether it holds compressed clusters.
        "compressed" compressed: Option<bool>,
        /// As recorded in the image.
        "backing-filename" backing_filename: Option<String>,
        /// The same from the point of view of the working directory.
        "full-backing-filename" full_backing_filename: Option<String>,
        /// As recorded in the image.
        "backing-filename-format" backing_filename_format: Option<String>,
        /// Internal snapshots.
        "snapshots" snapshots: Option<Vec<SnapshotInfo>>,
        /// What only this format has: `{"type": ..., "data": {...}}`, made by its driver.
        "format-specific" format_specific: Option<Json> = Ty::Object(&FORMAT_SPECIFIC),
        /// Whether the image was not closed cleanly.
        "dirty-flag" dirty_flag: Option<bool>,
    }
}

reply! {
    /// An internal snapshot.
    #[derive(Clone, Debug, PartialEq)]
    pub struct SnapshotInfo {
        /// Unique.
        "id" id: String,
        /// For people.
        "name" name: String,
        /// Bytes of machine state.
        "vm-state-size" vm_state_size: u64,
        /// When it was taken: seconds since 1970.
        "date-sec" date_sec: u64,
        /// And nanoseconds.
        "date-nsec" date_nsec: u64,
        /// The machine's clock then: seconds.
        "vm-clock-sec" vm_clock_sec: u64,
        /// And nanoseconds.
        "vm-clock-nsec" vm_clock_nsec: u64,
        /// Instructions executed, where that was recorded.
        "icount" icount: Option<u64>,
    }
}

reply! {
    /// One entry of `query-block-exports`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct BlockExportInfo {
        /// Its id.
        "id" id: String,
        /// Its type.
        "type" kind: String = Ty::ExportName,
        /// The node that was named when it was made.
        "node-name" node_name: String,
        /// Whether it has been told to end and clients are still there.
        "shutting-down" shutting_down: bool,
    }
}

reply! {
    /// The reply of `x-debug-query-block-graph`.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    pub struct BlockGraph {
        /// Needs and permissions along each edge.
        "edges" edges: Vec<BlockGraphEdge>,
        /// Nodes and users.
        "nodes" nodes: Vec<BlockGraphNode>,
    }
}

/// What a point of the graph is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockGraphNodeType {
    /// A user: an export, a monitor.
    BlockBackend,
    /// A job.
    BlockJob,
    /// A node.
    BlockDriver,
}

impl Reply for BlockGraphNodeType {
    const OPTIONAL: bool = false;

    fn ty() -> Ty {
        Ty::Enum(&["block-backend", "block-job", "block-driver"])
    }

    fn is_absent(&self) -> bool {
        false
    }
}

reply! {
    /// A point of the graph.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct BlockGraphNode {
        /// Its name; an operation id for users.
        "name" name: String,
        /// What it is.
        "type" kind: BlockGraphNodeType,
        /// A number for the edges of this reply.
        "id" id: u64,
    }
}

reply! {
    /// An edge of the graph.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct BlockGraphEdge {
        /// The link's name in its parent.
        "name" name: String,
        /// The user or node above.
        "parent" parent: u64,
        /// What it allows others.
        "shared-perm" shared_perm: Vec<&'static str> = PERMISSIONS,
        /// What it needs.
        "perm" perm: Vec<&'static str> = PERMISSIONS,
        /// The node below.
        "child" child: u64,
    }
}

/// The permission words of a set, in the order of QEMU's daemon.
pub fn permission_words(actions: Actions) -> Vec<&'static str> {
    let mut words: Vec<_> = actions.iter().filter_map(Action::qmp_word).collect();
    words.reverse();
    words
}

const PERMISSIONS: Ty = Ty::Array(&Ty::Enum(&["consistent-read", "write", "write-unchanged", "resize"]));

static FORMAT_SPECIFIC: Shape = Shape {
    fields: &[Field::required("type", Ty::Enum(&["qcow2", "file"]))],
    tag: Some("type"),
    variants: &[
        (
            "qcow2",
            &Shape::of(&[Field::required(
                "data",
                Ty::Object(&Shape::of(&[
                    Field::required("compat", Ty::Str),
                    Field::optional("data-file", Ty::Str),
                    Field::optional("data-file-raw", Ty::Bool),
                    Field::optional("extended-l2", Ty::Bool),
                    Field::optional("lazy-refcounts", Ty::Bool),
                    Field::optional("corrupt", Ty::Bool),
                    Field::required("refcount-bits", Ty::Int),
                    Field::required("compression-type", Ty::Enum(&["zlib", "zstd"])),
                ])),
            )]),
        ),
        (
            "file",
            &Shape::of(&[Field::required(
                "data",
                Ty::Object(&Shape::of(&[Field::optional("extent-size-hint", Ty::Int)])),
            )]),
        ),
    ],
};

/// As JSON. The types of this module have only text keys, so this can't fail.
pub fn to_json<T: Serialize>(value: &T) -> Json {
    serde_json::to_value(value).unwrap_or(Json::Null)
}
