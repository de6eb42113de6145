//! Shapes that several rows, or the checks of the command line, have in common.

use super::{Field, Shape, Ty};

/// The empty object.
pub static EMPTY: Shape = Shape::of(&[]);

/// No arguments, or a reply that says nothing.
pub const NOTHING: Ty = Ty::Object(&EMPTY);

/// An id and nothing else.
pub static ID: Shape = Shape::of(&[Field::required("id", Ty::Str)]);

/// The options of every export, besides `type`.
pub(super) static EXPORT_OPTIONS: &[Field] = &[
    Field::required("id", Ty::Str),
    Field::required("node-name", Ty::Str),
    Field::optional("writable", Ty::Bool),
    Field::optional("writethrough", Ty::Bool),
    Field::optional("allow-inactive", Ty::Bool),
];

/// The options of `--nbd-server`.
pub(super) static NBD_SERVER_OPTIONS: Shape = Shape::of(&[
    Field::optional("handshake-max-seconds", Ty::Int),
    Field::optional("max-connections", Ty::Int),
    Field::required("addr", Ty::Object(&SOCKET_ADDRESS)),
]);

static INET: Shape = Shape::of(&[Field::required("host", Ty::Str), Field::required("port", Ty::Str)]);
static UNIX: Shape = Shape::of(&[Field::required("path", Ty::Str)]);

/// A socket address with its members beside the type.
pub(super) static SOCKET_ADDRESS: Shape = Shape {
    fields: &[Field::required("type", Ty::Enum(&["inet", "unix"]))],
    tag: Some("type"),
    variants: &[("inet", &INET), ("unix", &UNIX)],
};

/// The same with the members in `data`.
pub static SOCKET_ADDRESS_LEGACY: Shape = Shape {
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

/// The reply of `query-version`.
pub static VERSION_INFO: Shape = Shape::of(&[
    Field::required("qemu", Ty::Object(&VERSION_TRIPLE)),
    Field::required("dolmen", Ty::Object(&VERSION_TRIPLE)),
    Field::required("package", Ty::Str),
]);

/// An entry of the reply of `query-qmp-schema`.
pub static SCHEMA_INFO: Shape = Shape {
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
