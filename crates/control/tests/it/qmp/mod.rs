//! Tests of the wire layer from outside: the texts of whole conversations, the
//! schema, and both compared with QEMU's daemon where it is installed.

mod conversation;
mod peer;
mod schema;

use dolmen_qmp::Schema;
use dolmen_qmp::schema::Branch;
use dolmen_types::{OptionSpec, OptionType};

const NODE_OPTIONS: &[OptionSpec] = &[
    OptionSpec::optional("node-name", OptionType::Str, "name"),
    OptionSpec::optional("discard", OptionType::Enum(&["ignore", "unmap"]), "discard"),
    OptionSpec::optional(
        "cache",
        OptionType::Object(&[
            OptionSpec::optional("direct", OptionType::Bool, "bypass the page cache"),
            OptionSpec::optional("no-flush", OptionType::Bool, "ignore flushes"),
        ]),
        "cache",
    ),
    OptionSpec::optional("read-only", OptionType::Bool, "read-only"),
];

const FILE_CHILD: OptionSpec = OptionSpec::required("file", OptionType::Node, "the image file");

const DRIVERS: &[Branch] = &[
    Branch {
        name: "null-co",
        options: &[OptionSpec::optional("size", OptionType::Size, "bytes")],
        features: &[],
    },
    Branch {
        name: "file",
        options: &[
            OptionSpec::required("filename", OptionType::Str, "path"),
            OptionSpec::optional("locking", OptionType::Enum(&["auto", "on", "off"]), "lock"),
        ],
        features: &["dynamic-auto-read-only"],
    },
    Branch {
        name: "raw",
        options: &[
            FILE_CHILD,
            OptionSpec::optional("offset", OptionType::Size, "bytes"),
            OptionSpec::optional("size", OptionType::Size, "bytes"),
        ],
        features: &[],
    },
    Branch {
        name: "qcow2",
        options: &[FILE_CHILD, OptionSpec::optional("backing", OptionType::NodeOrNull, "below")],
        features: &[],
    },
    Branch {
        name: "copy-on-read",
        options: &[FILE_CHILD, OptionSpec::optional("bottom", OptionType::Str, "name")],
        features: &[],
    },
    Branch {
        name: "blkdebug",
        options: &[
            OptionSpec::required("image", OptionType::Node, "child"),
            OptionSpec::optional(
                "inject-error",
                OptionType::ObjectList(&[
                    OptionSpec::required("event", OptionType::Enum(&["pwritev", "flush_to_disk"]), "when"),
                    OptionSpec::optional("once", OptionType::Bool, "once"),
                ]),
                "rules",
            ),
        ],
        features: &[],
    },
    Branch {
        name: "nbd",
        options: &[
            OptionSpec::required("server", OptionType::SocketAddress, "where"),
            OptionSpec::optional("export", OptionType::Str, "name"),
        ],
        features: &[],
    },
];

fn schema() -> Schema {
    dolmen_control::schema(NODE_OPTIONS, DRIVERS)
}
