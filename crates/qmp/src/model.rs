//! What queries return: serialisable types beside their schema.
//!
//! Each struct stands next to the [`Shape`] that describes it; a test serialises a
//! full example of each and checks it against the schema, so that the two can't
//! drift apart. Names are those of the established daemon, and so are the members
//! that Dolmen has no use for (`bps` and its kin are always 0: throttling is a node
//! of its own).

mod stats;

use dolmen_types::{Action, Actions};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::schema::{Field, Shape, Ty, jobs};

/// One entry of `query-jobs`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// How much is done, in whatever the job counts.
    pub current_progress: u64,
    /// Where it is in its life.
    pub status: String,
    /// How much there is to be done, as far as is known.
    pub total_progress: u64,
    /// What kind of job it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id.
    pub id: String,
    /// How long it will take at its present pace; absent while that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_remaining_ms: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One entry of `query-block-jobs`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// Whether its result becomes visible without being asked for.
    pub auto_finalize: bool,
    /// `ok`, `failed` or `nospace`.
    pub io_status: String,
    /// Its id.
    pub device: String,
    /// Whether it is forgotten when it has ended.
    pub auto_dismiss: bool,
    /// Whether it does something right now.
    pub busy: bool,
    /// Bytes to be done, as far as is known.
    pub len: u64,
    /// Bytes done.
    pub offset: u64,
    /// Where it is in its life.
    pub status: String,
    /// Whether it is to pause.
    pub paused: bool,
    /// Its limit in bytes per second; 0 for none.
    pub speed: u64,
    /// Whether it can be completed.
    pub ready: bool,
    /// What kind of job it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// What only this kind of job shows.
    #[serde(flatten)]
    pub details: Map<String, Json>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

pub use stats::{BLOCK_INFO, BLOCK_STATS, BlockDeviceStats, BlockInfo, BlockStats, FileStats};

/// One entry of `query-named-block-nodes`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BlockDeviceInfo {
    /// How to open it again: a file name, or `json:{...}`.
    pub file: String,
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// Its driver.
    pub drv: String,
    /// The name of its backing file, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// The number of images below it; 0 in a flat list.
    pub backing_file_depth: u64,
    /// Whether this process may use the image now.
    pub active: bool,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// Limits of throttling; always 0 here.
    #[serde(flatten)]
    pub throttling: NoThrottling,
    /// The image.
    pub image: ImageInfo,
    /// How writes are cached.
    pub cache: CacheInfo,
    /// The offset at which an event is raised; 0 for none.
    pub write_threshold: u64,
}

/// Members that old clients read: a node has no limits of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NoThrottling {
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
}

/// The cache mode of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CacheInfo {
    /// Whether a write may be acknowledged before it is durable.
    pub writeback: bool,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Whether flushes are ignored.
    #[serde(rename = "no-flush")]
    pub no_flush: bool,
}

/// An image, as `query-named-block-nodes` and the image tools describe it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The images below it, unless the list is flat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_image: Option<Box<ImageInfo>>,
    /// What readers see, in bytes.
    pub virtual_size: u64,
    /// How to open it.
    pub filename: String,
    /// In bytes, where the format has clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Its driver.
    pub format: String,
    /// Bytes used on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Whether it is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// Whether it holds compressed clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed: Option<bool>,
    /// As recorded in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The same from the point of view of the working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// As recorded in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has: `{"type": ..., "data": {...}}`, made by its driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<Json>,
    /// Whether the image was not closed cleanly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_flag: Option<bool>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// Bytes of machine state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u64,
    /// The machine's clock then: seconds.
    pub vm_clock_sec: u64,
    /// And nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions executed, where that was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

/// One entry of `query-block-exports`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The node that was named when it was made.
    pub node_name: String,
    /// Whether it has been told to end and clients are still there.
    pub shutting_down: bool,
}

/// The reply of `x-debug-query-block-graph`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlockGraph {
    /// Needs and permissions along each edge.
    pub edges: Vec<BlockGraphEdge>,
    /// Nodes and users.
    pub nodes: Vec<BlockGraphNode>,
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

/// A point of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockGraphNode {
    /// Its name; an operation id for users.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: BlockGraphNodeType,
    /// A number for the edges of this reply.
    pub id: u64,
}

/// An edge of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraphEdge {
    /// The link's name in its parent.
    pub name: String,
    /// The user or node above.
    pub parent: u64,
    /// What it allows others.
    pub shared_perm: Vec<&'static str>,
    /// What it needs.
    pub perm: Vec<&'static str>,
    /// The node below.
    pub child: u64,
}

/// The permission words of a set, in the order of the established daemon.
pub fn permission_words(actions: Actions) -> Vec<&'static str> {
    let mut words: Vec<_> = actions.iter().filter_map(Action::qmp_word).collect();
    words.reverse();
    words
}

const PERMISSIONS: Ty = Ty::Array(&Ty::Enum(&["consistent-read", "write", "write-unchanged", "resize"]));

/// The shape of it.
pub static BLOCK_DEVICE_INFO: Shape = Shape::of(&[
    Field::required("file", Ty::Str),
    Field::optional("node-name", Ty::Str),
    Field::required("ro", Ty::Bool),
    Field::required("drv", Ty::Str),
    Field::optional("backing_file", Ty::Str),
    Field::required("backing_file_depth", Ty::Int),
    Field::required("active", Ty::Bool),
    Field::required("encrypted", Ty::Bool),
    Field::required("detect_zeroes", Ty::Enum(&["off", "on", "unmap"])),
    Field::required("bps", Ty::Int),
    Field::required("bps_rd", Ty::Int),
    Field::required("bps_wr", Ty::Int),
    Field::required("iops", Ty::Int),
    Field::required("iops_rd", Ty::Int),
    Field::required("iops_wr", Ty::Int),
    Field::required("image", Ty::Object(&IMAGE_INFO)),
    Field::required(
        "cache",
        Ty::Object(&Shape::of(&[
            Field::required("writeback", Ty::Bool),
            Field::required("direct", Ty::Bool),
            Field::required("no-flush", Ty::Bool),
        ])),
    ),
    Field::required("write_threshold", Ty::Int),
]);

static IMAGE_INFO: Shape = Shape::of(&[
    Field::required("filename", Ty::Str),
    Field::required("format", Ty::Str),
    Field::optional("dirty-flag", Ty::Bool),
    Field::optional("actual-size", Ty::Int),
    Field::required("virtual-size", Ty::Int),
    Field::optional("cluster-size", Ty::Int),
    Field::optional("encrypted", Ty::Bool),
    Field::optional("compressed", Ty::Bool),
    Field::optional("backing-filename", Ty::Str),
    Field::optional("full-backing-filename", Ty::Str),
    Field::optional("backing-filename-format", Ty::Str),
    Field::optional("snapshots", Ty::Array(&Ty::Object(&SNAPSHOT_INFO))),
    Field::optional("format-specific", Ty::Object(&FORMAT_SPECIFIC)),
    Field::optional("backing-image", Ty::Object(&IMAGE_INFO)),
]);

static SNAPSHOT_INFO: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::required("name", Ty::Str),
    Field::required("vm-state-size", Ty::Int),
    Field::required("date-sec", Ty::Int),
    Field::required("date-nsec", Ty::Int),
    Field::required("vm-clock-sec", Ty::Int),
    Field::required("vm-clock-nsec", Ty::Int),
    Field::optional("icount", Ty::Int),
]);

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

/// The shape of it.
pub static BLOCK_EXPORT_INFO: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::required("type", Ty::ExportName),
    Field::required("node-name", Ty::Str),
    Field::required("shutting-down", Ty::Bool),
]);

/// The shape of it.
pub static BLOCK_GRAPH: Shape = Shape::of(&[
    Field::required(
        "nodes",
        Ty::Array(&Ty::Object(&Shape::of(&[
            Field::required("id", Ty::Int),
            Field::required("type", Ty::Enum(&["block-backend", "block-job", "block-driver"])),
            Field::required("name", Ty::Str),
        ]))),
    ),
    Field::required(
        "edges",
        Ty::Array(&Ty::Object(&Shape::of(&[
            Field::required("parent", Ty::Int),
            Field::required("child", Ty::Int),
            Field::required("name", Ty::Str),
            Field::required("perm", PERMISSIONS),
            Field::required("shared-perm", PERMISSIONS),
        ]))),
    ),
]);

/// The shape of it.
pub static JOB_INFO: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::required("type", Ty::JobName),
    Field::required("status", Ty::Enum(jobs::STATUS)),
    Field::required("current-progress", Ty::Int),
    Field::required("total-progress", Ty::Int),
    Field::optional("estimated-remaining-ms", Ty::Int),
    Field::optional("error", Ty::Str),
]);

/// The shape of it, but for `type`.
pub static BLOCK_JOB_INFO: Shape = Shape::of(&[
    Field::required("device", Ty::Str),
    Field::required("len", Ty::Int),
    Field::required("offset", Ty::Int),
    Field::required("busy", Ty::Bool),
    Field::required("paused", Ty::Bool),
    Field::required("speed", Ty::Int),
    Field::required("io-status", Ty::Enum(&["ok", "failed", "nospace"])),
    Field::required("ready", Ty::Bool),
    Field::required("status", Ty::Enum(jobs::STATUS)),
    Field::required("auto-finalize", Ty::Bool),
    Field::required("auto-dismiss", Ty::Bool),
    Field::optional("error", Ty::Str),
]);

/// As JSON. The types of this module have only text keys, so this can't fail.
pub fn to_json<T: Serialize>(value: &T) -> Json {
    serde_json::to_value(value).unwrap_or(Json::Null)
}
