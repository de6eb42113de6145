//! The words of jobs, and what images can be made of.

use super::{Field, Shape, Ty};

/// The states of a job.
pub const STATUS: &[&str] = &[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
];

const PREALLOCATION: Ty = Ty::Enum(&["off", "metadata", "falloc", "full"]);

/// What images can be made of, by driver.
pub(crate) static CREATE: &[(&str, &Shape)] = &[
    (
        "file",
        &Shape::of(&[
            Field::required("filename", Ty::Str),
            Field::required("size", Ty::Size),
            Field::optional("preallocation", PREALLOCATION),
        ]),
    ),
    (
        "qcow2",
        &Shape::of(&[
            Field::required("file", Ty::NodeRef),
            Field::optional("data-file-raw", Ty::Bool),
            Field::optional("extended-l2", Ty::Bool),
            Field::required("size", Ty::Size),
            Field::optional("version", Ty::Enum(&["v2", "v3"])),
            Field::optional("backing-file", Ty::Str),
            Field::optional("backing-fmt", Ty::DriverName),
            Field::optional("cluster-size", Ty::Size),
            Field::optional("preallocation", PREALLOCATION),
            Field::optional("lazy-refcounts", Ty::Bool),
            Field::optional("refcount-bits", Ty::Int),
            Field::optional("compression-type", Ty::Enum(&["zlib", "zstd"])),
        ]),
    ),
];
