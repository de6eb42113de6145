//! The rows: every command and event that exists.
//!
//! A command that is not here does not exist: dispatch, argument checks,
//! `query-commands`, `query-qmp-schema` and documentation all start from this table.

use super::{Command, EMPTY, EventRow, Field, Shape, Ty};
use crate::model;

const NOTHING: Ty = Ty::Object(&EMPTY);

/// Every command.
pub static COMMANDS: &[Command] = &[
    Command {
        name: "qmp_capabilities",
        arguments: Ty::Object(&Shape::of(&[Field::optional("enable", Ty::Array(&Ty::Enum(&["oob"])))])),
        returns: NOTHING,
        features: &[],
        help: "Finishes the negotiation; until then no other command is accepted.",
    },
    Command {
        name: "query-version",
        arguments: NOTHING,
        returns: Ty::Object(&VERSION_INFO),
        features: &[],
        help: "The established version whose behaviour to expect, and Dolmen's own version.",
    },
    Command {
        name: "query-commands",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&Shape::of(&[Field::required("name", Ty::Str)]))),
        features: &[],
        help: "The names of all commands.",
    },
    Command {
        name: "query-qmp-schema",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&SCHEMA_INFO)),
        features: &[],
        help: "Commands, events and types in detail.",
    },
    Command {
        name: "blockdev-add",
        arguments: Ty::BlockdevOptions,
        returns: NOTHING,
        features: &[],
        help: "Opens a node, with the nodes that are defined inside it; all of them or none.",
    },
    Command {
        name: "blockdev-del",
        arguments: Ty::Object(&Shape::of(&[Field::required("node-name", Ty::Str)])),
        returns: NOTHING,
        features: &[],
        help: "Closes a node that blockdev-add made and that nobody uses.",
    },
    Command {
        name: "blockdev-reopen",
        arguments: Ty::Object(&Shape::of(&[Field::required("options", Ty::Array(&Ty::BlockdevOptions))])),
        returns: NOTHING,
        features: &[],
        help: "Gives nodes other options and other children, while they are in use; all of them or none.",
    },
    Command {
        name: "blockdev-set-active",
        arguments: Ty::Object(&Shape::of(&[
            Field::optional("node-name", Ty::Str),
            Field::required("active", Ty::Bool),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Hands a node's image (all images, if none is named) to another process, or takes it over.",
    },
    Command {
        name: "query-named-block-nodes",
        arguments: Ty::Object(&Shape::of(&[Field::optional("flat", Ty::Bool)])),
        returns: Ty::Array(&Ty::Object(&model::BLOCK_DEVICE_INFO)),
        features: &[],
        help: "Every node; without flat, the images of its backing chain inside each.",
    },
    Command {
        name: "query-block",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&model::BLOCK_INFO)),
        features: &[],
        help: "Every export as a device, with the node that it shows.",
    },
    Command {
        name: "query-blockstats",
        arguments: Ty::Object(&Shape::of(&[Field::optional("query-nodes", Ty::Bool)])),
        returns: Ty::Array(&Ty::Object(&model::BLOCK_STATS)),
        features: &[],
        help: "Counters of every export, or with query-nodes of every node.",
    },
    Command {
        name: "block-set-write-threshold",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("write-threshold", Ty::Size),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Announces the first write to a node that ends beyond the threshold; 0 for none.",
    },
    Command {
        name: "x-debug-query-block-graph",
        arguments: NOTHING,
        returns: Ty::Object(&model::BLOCK_GRAPH),
        features: &["unstable"],
        help: "Nodes, users and edges with what each edge needs and allows.",
    },
    Command {
        name: "nbd-server-start",
        arguments: Ty::Object(&Shape::of(&[
            Field::optional("handshake-max-seconds", Ty::Int),
            Field::optional("max-connections", Ty::Int),
            Field::required("addr", Ty::Object(&SOCKET_ADDRESS_LEGACY)),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Starts the NBD server.",
    },
    Command {
        name: "nbd-server-stop",
        arguments: NOTHING,
        returns: NOTHING,
        features: &[],
        help: "Stops the NBD server and removes its exports.",
    },
    Command {
        name: "block-export-add",
        arguments: Ty::BlockExportOptions,
        returns: NOTHING,
        features: &[],
        help: "Makes a node available to clients.",
    },
    Command {
        name: "block-export-del",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("id", Ty::Str),
            Field::optional("mode", Ty::Enum(&["safe", "hard"])),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Removes an export; safe (the default) refuses while clients are connected.",
    },
    Command {
        name: "query-block-exports",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&model::BLOCK_EXPORT_INFO)),
        features: &[],
        help: "Every export.",
    },
    Command {
        name: "quit",
        arguments: NOTHING,
        returns: NOTHING,
        features: &[],
        help: "Drains, flushes, closes every image and ends the program.",
    },
];

/// Every event.
pub static EVENTS: &[EventRow] = &[
    EventRow {
        name: "BLOCK_BITMAPS_INVALIDATED",
        data: &Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("bitmaps", Ty::Array(&Ty::Str)),
        ]),
        help: "Dolmen's own. The first write to an image with persistent bitmaps: they are not kept up, so they are \
               not valid any more.",
    },
    EventRow {
        name: "BLOCK_EXPORT_DELETED",
        data: &ID,
        help: "An export is gone and its id may be used again.",
    },
    EventRow {
        name: "BLOCK_IMAGE_CORRUPTED",
        data: &Shape::of(&[
            Field::required("device", Ty::Str),
            Field::optional("node-name", Ty::Str),
            Field::required("msg", Ty::Str),
            Field::optional("offset", Ty::Int),
            Field::optional("size", Ty::Int),
            Field::required("fatal", Ty::Bool),
        ]),
        help: "An image's metadata are damaged; it is marked corrupt and not written any more.",
    },
    EventRow {
        name: "BLOCK_WRITE_THRESHOLD",
        data: &Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("amount-exceeded", Ty::Int),
            Field::required("write-threshold", Ty::Int),
        ]),
        help: "A write has ended beyond the threshold of a node, which has none any more.",
    },
];

/// An id and nothing else.
pub(crate) static ID: Shape = Shape::of(&[Field::required("id", Ty::Str)]);

/// The options of every export, besides `type`.
pub(crate) static EXPORT_OPTIONS: &[Field] = &[
    Field::required("id", Ty::Str),
    Field::required("node-name", Ty::Str),
    Field::optional("writable", Ty::Bool),
    Field::optional("writethrough", Ty::Bool),
    Field::optional("allow-inactive", Ty::Bool),
];

/// The options of `--nbd-server`.
pub(crate) static NBD_SERVER_OPTIONS: Shape = Shape::of(&[
    Field::optional("handshake-max-seconds", Ty::Int),
    Field::optional("max-connections", Ty::Int),
    Field::required("addr", Ty::Object(&SOCKET_ADDRESS)),
]);

static INET: Shape = Shape::of(&[Field::required("host", Ty::Str), Field::required("port", Ty::Str)]);
static UNIX: Shape = Shape::of(&[Field::required("path", Ty::Str)]);

/// A socket address with its members beside the type.
pub(crate) static SOCKET_ADDRESS: Shape = Shape {
    fields: &[Field::required("type", Ty::Enum(&["inet", "unix"]))],
    tag: Some("type"),
    variants: &[("inet", &INET), ("unix", &UNIX)],
};

/// The same with the members in `data`.
static SOCKET_ADDRESS_LEGACY: Shape = Shape {
    fields: &[Field::required("type", Ty::Enum(&["inet", "unix"]))],
    tag: Some("type"),
    variants: &[
        ("inet", &Shape::of(&[Field::required("data", Ty::Object(&INET))])),
        ("unix", &Shape::of(&[Field::required("data", Ty::Object(&UNIX))])),
    ],
};

static VERSION_TRIPLE: Shape = Shape::of(&[
    Field::required("major", Ty::Int),
    Field::required("minor", Ty::Int),
    Field::required("micro", Ty::Int),
]);

static VERSION_INFO: Shape = Shape::of(&[
    Field::required("qemu", Ty::Object(&VERSION_TRIPLE)),
    Field::required("dolmen", Ty::Object(&VERSION_TRIPLE)),
    Field::required("package", Ty::Str),
]);

static SCHEMA_INFO: Shape = Shape {
    fields: &[
        Field::required("name", Ty::Str),
        Field::required(
            "meta-type",
            Ty::Enum(&["builtin", "enum", "array", "object", "alternate", "command", "event"]),
        ),
        Field::optional("features", Ty::Array(&Ty::Str)),
    ],
    tag: Some("meta-type"),
    variants: &[
        (
            "builtin",
            &Shape::of(&[Field::required(
                "json-type",
                Ty::Enum(&["string", "number", "int", "boolean", "null", "object", "array", "value"]),
            )]),
        ),
        (
            "enum",
            &Shape::of(&[
                Field::required("members", Ty::Array(&Ty::Object(&NAMED))),
                Field::required("values", Ty::Array(&Ty::Str)),
            ]),
        ),
        ("array", &Shape::of(&[Field::required("element-type", Ty::Str)])),
        (
            "object",
            &Shape::of(&[
                Field::required("members", Ty::Array(&Ty::Object(&MEMBER))),
                Field::optional("tag", Ty::Str),
                Field::optional("variants", Ty::Array(&Ty::Object(&VARIANT))),
            ]),
        ),
        ("alternate", &Shape::of(&[Field::required("members", Ty::Array(&Ty::Object(&TYPED)))])),
        (
            "command",
            &Shape::of(&[
                Field::required("arg-type", Ty::Str),
                Field::required("ret-type", Ty::Str),
                Field::optional("allow-oob", Ty::Bool),
            ]),
        ),
        ("event", &Shape::of(&[Field::required("arg-type", Ty::Str)])),
    ],
};

static NAMED: Shape =
    Shape::of(&[Field::required("name", Ty::Str), Field::optional("features", Ty::Array(&Ty::Str))]);
static TYPED: Shape = Shape::of(&[Field::required("type", Ty::Str)]);
static VARIANT: Shape = Shape::of(&[Field::required("case", Ty::Str), Field::required("type", Ty::Str)]);
static MEMBER: Shape = Shape::of(&[
    Field::required("name", Ty::Str),
    Field::required("type", Ty::Str),
    Field::optional("default", Ty::Any),
    Field::optional("features", Ty::Array(&Ty::Str)),
]);
