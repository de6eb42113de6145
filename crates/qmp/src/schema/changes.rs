//! The rows of commands that change the graph beyond single nodes, and of operations.

use super::jobs::{BACKUP, DRIVE_BACKUP};
use super::{Command, EMPTY, Field, Shape, Ty};
use crate::model;

const NOTHING: Ty = Ty::Object(&EMPTY);

const MODE: Ty = Ty::Enum(&["existing", "absolute-paths"]);

/// The words for what is done to a node.
const ACTIONS: Ty = Ty::Array(&Ty::Enum(&[
    "consistent-read",
    "write",
    "write-unchanged",
    "resize",
    "relink-children",
    "relink-parents",
    "read-metadata",
]));

static SNAPSHOT: Shape = Shape::of(&[Field::required("node", Ty::Str), Field::required("overlay", Ty::Str)]);

static SNAPSHOT_SYNC: Shape = Shape::of(&[
    Field::optional("device", Ty::Str),
    Field::optional("node-name", Ty::Str),
    Field::required("snapshot-file", Ty::Str),
    Field::optional("snapshot-node-name", Ty::Str),
    Field::optional("format", Ty::Str),
    Field::optional("mode", MODE),
]);

static ACTION: Shape = Shape {
    fields: &[Field::required(
        "type",
        Ty::Enum(&[
            "abort",
            "blockdev-backup",
            "blockdev-snapshot",
            "blockdev-snapshot-sync",
            "drive-backup",
        ]),
    )],
    tag: Some("type"),
    variants: &[
        ("abort", &Shape::of(&[Field::required("data", NOTHING)])),
        ("blockdev-backup", &Shape::of(&[Field::required("data", Ty::Object(&BACKUP))])),
        ("blockdev-snapshot", &Shape::of(&[Field::required("data", Ty::Object(&SNAPSHOT))])),
        ("blockdev-snapshot-sync", &Shape::of(&[Field::required("data", Ty::Object(&SNAPSHOT_SYNC))])),
        ("drive-backup", &Shape::of(&[Field::required("data", Ty::Object(&DRIVE_BACKUP))])),
    ],
};

static TOUCHED: Shape = Shape::of(&[
    Field::required("node-name", Ty::Str),
    Field::required("needs", ACTIONS),
    Field::required("allows", ACTIONS),
]);

static OPERATION: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::required("kind", Ty::Str),
    Field::required("detail", Ty::Str),
    Field::optional("since-seconds", Ty::Int),
    Field::optional("ends-with", Ty::Str),
    Field::required("edges", Ty::Array(&Ty::Object(&TOUCHED))),
    Field::required(
        "claims",
        Ty::Array(&Ty::Object(&Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("needs", ACTIONS),
            Field::required("allows", ACTIONS),
            Field::required("why", Ty::Str),
        ]))),
    ),
    Field::required("filters", Ty::Array(&Ty::Str)),
]);

/// The commands.
pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "blockdev-snapshot",
        arguments: Ty::Object(&SNAPSHOT),
        returns: NOTHING,
        features: &["allow-write-only-overlay"],
        help: "Puts a node over another one: who used that one uses the overlay from now on.",
    },
    Command {
        name: "blockdev-snapshot-sync",
        arguments: Ty::Object(&SNAPSHOT_SYNC),
        returns: NOTHING,
        features: &[],
        help: "Makes an overlay in a file (mode=existing: opens it) and puts it over a node.",
    },
    Command {
        name: "change-backing-file",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("device", Ty::Str),
            Field::required("image-node-name", Ty::Str),
            Field::required("backing-file", Ty::Str),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Has an image name another backing file; the nodes stay linked as they are.",
    },
    Command {
        name: "block_resize",
        arguments: Ty::Object(&Shape::of(&[
            Field::optional("device", Ty::Str),
            Field::optional("node-name", Ty::Str),
            Field::required("size", Ty::Int),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Changes the size of a node, in bytes; what is new reads as zeroes.",
    },
    Command {
        name: "transaction",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("actions", Ty::Array(&Ty::Object(&ACTION))),
            Field::optional(
                "properties",
                Ty::Object(&Shape::of(&[Field::optional(
                    "completion-mode",
                    Ty::Enum(&["individual", "grouped"]),
                )])),
            ),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Several commands at one instant: all of them or none; grouped jobs also end together.",
    },
    Command {
        name: "query-operations",
        arguments: NOTHING,
        returns: Ty::Array(&Ty::Object(&OPERATION)),
        features: &[],
        help: "Who uses which node for what, and what they allow others.",
    },
    Command {
        name: "what-if",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("command", Ty::Str),
            Field::optional("arguments", Ty::Any),
        ])),
        returns: Ty::Object(&Shape::of(&[
            Field::required("allowed", Ty::Bool),
            Field::optional("graph", Ty::Object(&model::BLOCK_GRAPH)),
            Field::optional("error", Ty::Any),
            Field::optional("job-error", Ty::Any),
        ])),
        features: &[],
        help: "The graph that a command would leave, or why it would be refused; nothing changes. Of a command that \
               starts a job which is known to fail, job-error says why.",
    },
    Command {
        name: "operation-begin",
        arguments: Ty::Object(&Shape::of(&[
            Field::required("id", Ty::Str),
            Field::optional("detail", Ty::Str),
            Field::required(
                "claims",
                Ty::Array(&Ty::Object(&Shape::of(&[
                    Field::required("node-name", Ty::Str),
                    Field::optional("needs", ACTIONS),
                    Field::optional("denies", ACTIONS),
                    Field::optional("why", Ty::Str),
                ]))),
            ),
        ])),
        returns: NOTHING,
        features: &[],
        help: "Protects what an external tool does with nodes until operation-end.",
    },
    Command {
        name: "operation-end",
        arguments: Ty::Object(&super::commands::ID),
        returns: NOTHING,
        features: &[],
        help: "Ends an operation that operation-begin has begun.",
    },
];
