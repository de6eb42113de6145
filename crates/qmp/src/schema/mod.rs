//! One table of commands, from which checks and introspection derive.
//!
//! The rows are constants written with [`Ty`], [`Shape`] and [`Field`], each beside the code of its command.
//! [`Schema::new`] joins them with the option rows of the drivers and
//! export types that the program has, into an arena of types in which equal shapes
//! occur once. Recursive types (a node definition holds node definitions) are
//! cycles in the arena.

mod check;
mod introspect;
pub mod jobs;
mod reply;
mod shapes;

use std::collections::HashMap;

use dolmen_types::{OptionSpec, OptionType};

pub use check::Source;
pub use reply::Reply;
pub use serde::ser::{Serialize, SerializeMap, Serializer};
pub use shapes::{EMPTY, ID, NOTHING, SCHEMA_INFO, SOCKET_ADDRESS_LEGACY, VERSION_INFO};

/// What members of a reply may be held in.
pub type JsonMap = serde_json::Map<String, serde_json::Value>;

/// A type in a command row.
#[derive(Clone, Copy, Debug)]
pub enum Ty {
    /// Text.
    Str,
    /// A whole number; not negative in arguments.
    Int,
    /// A number of bytes: like `Int`, but a command line may use suffixes.
    Size,
    /// A number that need not be whole; only in replies.
    Number,
    /// A truth value.
    Bool,
    /// Anything.
    Any,
    /// One of these words.
    Enum(&'static [&'static str]),
    /// A list.
    Array(&'static Ty),
    /// An object.
    Object(&'static Shape),
    /// A list of objects.
    List(&'static Shape),
    /// The type of a reply.
    Of(fn() -> Ty),
    /// A list of them.
    ArrayOf(fn() -> Ty),
    /// The name of a driver that exists.
    DriverName,
    /// The name of an export type that exists.
    ExportName,
    /// A node definition: common options and those of the driver named in it.
    BlockdevOptions,
    /// The arguments of `block-export-add`.
    BlockExportOptions,
    /// A node: its name, or its definition.
    NodeRef,
    /// These options, list by list.
    Options(&'static [&'static [OptionSpec]]),
    /// The name of a kind of job.
    JobName,
    /// An object with the `type` of a job, and what a kind adds to it.
    OfJob(fn() -> Ty, JobPart),
    /// The counters of a device: these, and those of [`Sources::counters`].
    Counters(fn() -> Ty),
    /// An action of `transaction`: the name and the arguments of a command that can be part of one, or "abort".
    TransactionAction,
}

/// A part of a kind of job.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum JobPart {
    /// What can be changed while it runs.
    Change,
    /// What queries show of it.
    Details,
}

/// A kind of job, as far as the schema needs it.
#[derive(Clone, Copy, Debug)]
pub struct JobBranch {
    /// Its name.
    pub name: &'static str,
    /// What can be changed while it runs.
    pub change: &'static [OptionSpec],
    /// What queries show of it.
    pub details: &'static [OptionSpec],
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Ty,
    /// Whether it may be absent.
    pub optional: bool,
}

impl Field {
    /// A member that is always there.
    pub const fn required(name: &'static str, ty: Ty) -> Field {
        Field { name, ty, optional: false }
    }
    /// A member that may be absent.
    pub const fn optional(name: &'static str, ty: Ty) -> Field {
        Field { name, ty, optional: true }
    }
}

/// The members of an object; with a tag, more members depend on the tag's value.
#[derive(Debug)]
pub struct Shape {
    /// The members that are always possible.
    pub fields: &'static [Field],
    /// The member whose value selects one of `variants`.
    pub tag: Option<&'static str>,
    /// The further members for each value of the tag.
    pub variants: &'static [(&'static str, &'static Shape)],
}

impl Shape {
    /// An object without variants.
    pub const fn of(fields: &'static [Field]) -> Shape {
        Shape { fields, tag: None, variants: &[] }
    }
}

/// A command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments: an object.
    pub arguments: Ty,
    /// What it returns.
    pub returns: Ty,
    /// Special properties: "unstable".
    pub features: &'static [&'static str],
    /// Whether it can be an action of a transaction.
    pub in_transactions: bool,
    /// One line for people.
    pub help: &'static str,
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub struct EventRow {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static Shape,
    /// One line for people.
    pub help: &'static str,
}

/// A driver or an export type, as far as the schema needs it.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// The name that selects it.
    pub name: &'static str,
    /// Its own options.
    pub options: &'static [OptionSpec],
    /// Special properties that clients look for.
    pub features: &'static [&'static str],
}

/// What the program has.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The commands, in the order in which they are listed.
    pub commands: &'a [Command],
    /// The events.
    pub events: &'a [EventRow],
    /// Options of every node.
    pub node_options: &'a [OptionSpec],
    /// The drivers.
    pub drivers: &'a [Branch],
    /// The export types.
    pub exports: &'a [Branch],
    /// Further counters of devices.
    pub counters: &'a [Field],
    /// The kinds of jobs.
    pub jobs: &'a [JobBranch],
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct TypeId(usize);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Builtin {
    Str,
    Int,
    Size,
    Number,
    Bool,
    Null,
    Any,
}

#[derive(Clone, Debug)]
pub(crate) struct FieldDef {
    name: &'static str,
    ty: TypeId,
    optional: bool,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct ObjectDef {
    fields: Vec<FieldDef>,
    /// The tag's name and a type for each of its values.
    union: Option<(&'static str, Vec<(&'static str, TypeId)>)>,
    features: Vec<&'static str>,
}

#[derive(Clone, Debug)]
pub(crate) enum TypeDef {
    Builtin(Builtin),
    Enum(Vec<&'static str>),
    Array(TypeId),
    Object(ObjectDef),
    /// One of these, told apart by the JSON type; the name is for messages.
    Alternate(&'static str, Vec<TypeId>),
}

/// What a type was made from, so that it is made once.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Origin {
    Builtin(u8),
    Words(Vec<&'static str>),
    Array(TypeId),
    Shape(*const Shape),
    Options(*const OptionSpec, usize, Vec<&'static str>),
    Alternate(&'static str),
    Named(&'static str),
    Action(&'static str),
    Lists(*const &'static [OptionSpec]),
    OfJob(*const Shape, JobPart),
}

#[derive(Debug)]
struct CommandDef {
    name: &'static str,
    arguments: TypeId,
    returns: TypeId,
    features: &'static [&'static str],
}

/// Commands, events and types of a program.
#[derive(Debug)]
pub struct Schema {
    types: Vec<TypeDef>,
    commands: Vec<CommandDef>,
    events: Vec<(&'static str, TypeId)>,
    blockdev: TypeId,
    export: TypeId,
    nbd_server: TypeId,
}

/// Makes a [`Schema`].
struct Builder<'a> {
    types: Vec<TypeDef>,
    known: HashMap<Origin, TypeId>,
    sources: Sources<'a>,
}

impl Schema {
    /// The schema of a program with these drivers and export types.
    pub fn new(sources: Sources<'_>) -> Schema {
        let mut b = Builder { types: Vec::new(), known: HashMap::new(), sources };
        let commands = sources
            .commands
            .iter()
            .map(|c| CommandDef {
                name: c.name,
                arguments: b.ty(c.arguments),
                returns: b.ty(c.returns),
                features: c.features,
            })
            .collect();
        let events = sources.events.iter().map(|e| (e.name, b.shape(e.data))).collect();
        let blockdev = b.blockdev_options();
        let export = b.export_options();
        let nbd_server = b.shape(&shapes::NBD_SERVER_OPTIONS);
        Schema { types: b.types, commands, events, blockdev, export, nbd_server }
    }

    /// The names of the commands, as `query-commands` returns them.
    pub fn command_names(&self) -> impl Iterator<Item = &'static str> {
        self.commands.iter().map(|c| c.name)
    }

    fn def(&self, id: TypeId) -> &TypeDef {
        &self.types[id.0]
    }
}

impl Builder<'_> {
    fn intern(&mut self, origin: Origin, def: TypeDef) -> TypeId {
        if let Some(id) = self.known.get(&origin) {
            return *id;
        }
        let id = TypeId(self.types.len());
        self.types.push(def);
        self.known.insert(origin, id);
        id
    }

    /// Reserves a place first, so that the type may hold itself.
    fn object(&mut self, origin: Origin, fill: impl FnOnce(&mut Self) -> ObjectDef) -> TypeId {
        if let Some(id) = self.known.get(&origin) {
            return *id;
        }
        let id = self.intern(origin, TypeDef::Object(ObjectDef::default()));
        let def = fill(self);
        self.types[id.0] = TypeDef::Object(def);
        id
    }

    fn builtin(&mut self, b: Builtin) -> TypeId {
        self.intern(Origin::Builtin(b as u8), TypeDef::Builtin(b))
    }

    fn words(&mut self, words: Vec<&'static str>) -> TypeId {
        self.intern(Origin::Words(words.clone()), TypeDef::Enum(words))
    }

    fn array(&mut self, of: TypeId) -> TypeId {
        self.intern(Origin::Array(of), TypeDef::Array(of))
    }

    fn ty(&mut self, ty: Ty) -> TypeId {
        match ty {
            Ty::Str => self.builtin(Builtin::Str),
            Ty::Int => self.builtin(Builtin::Int),
            Ty::Size => self.builtin(Builtin::Size),
            Ty::Number => self.builtin(Builtin::Number),
            Ty::Bool => self.builtin(Builtin::Bool),
            Ty::Any => self.builtin(Builtin::Any),
            Ty::Enum(w) => self.words(w.to_vec()),
            Ty::Array(of) => {
                let of = self.ty(*of);
                self.array(of)
            }
            Ty::Object(shape) => self.shape(shape),
            Ty::List(of) => {
                let of = self.shape(of);
                self.array(of)
            }
            Ty::Of(ty) => self.ty(ty()),
            Ty::ArrayOf(of) => {
                let of = self.ty(of());
                self.array(of)
            }
            Ty::DriverName => self.driver_names(),
            Ty::ExportName => self.export_names(),
            Ty::BlockdevOptions => self.blockdev_options(),
            Ty::BlockExportOptions => self.export_options(),
            Ty::NodeRef => self.node_ref("BlockdevRef", false),
            Ty::Options(lists) => self.option_lists(lists),
            Ty::JobName => self.job_names(),
            Ty::OfJob(of, part) => match of() {
                Ty::Object(shape) => self.of_job(shape, part),
                other => self.ty(other),
            },
            Ty::Counters(of) => match of() {
                Ty::Object(shape) => self.counters(shape),
                other => self.ty(other),
            },
            Ty::TransactionAction => self.transaction_action(),
        }
    }

    fn shape(&mut self, shape: &'static Shape) -> TypeId {
        // Two constants without members are one type to a client.
        let origin = if shape.fields.is_empty() && shape.tag.is_none() {
            Origin::Shape(&EMPTY)
        } else {
            Origin::Shape(shape)
        };
        self.object(origin, |b| {
            let fields = shape
                .fields
                .iter()
                .map(|f| FieldDef { name: f.name, ty: b.ty(f.ty), optional: f.optional })
                .collect();
            let union =
                shape.tag.map(|tag| (tag, shape.variants.iter().map(|(n, s)| (*n, b.shape(s))).collect()));
            ObjectDef { fields, union, features: Vec::new() }
        })
    }

    fn options(&mut self, options: &'static [OptionSpec], features: &[&'static str]) -> TypeId {
        if options.is_empty() && features.is_empty() {
            return self.shape(&EMPTY);
        }
        let origin = Origin::Options(options.as_ptr(), options.len(), features.to_vec());
        self.object(origin, |b| {
            let fields = options.iter().map(|o| b.option(o)).collect();
            ObjectDef { fields, union: None, features: features.to_vec() }
        })
    }

    fn option(&mut self, o: &OptionSpec) -> FieldDef {
        let ty = match o.ty {
            OptionType::Bool => self.builtin(Builtin::Bool),
            OptionType::Str => self.builtin(Builtin::Str),
            OptionType::Int => self.builtin(Builtin::Int),
            OptionType::Size => self.builtin(Builtin::Size),
            OptionType::Enum(w) => self.words(w.to_vec()),
            OptionType::EnumList(w) => {
                let of = self.words(w.to_vec());
                self.array(of)
            }
            OptionType::Node => self.node_ref("BlockdevRef", false),
            OptionType::NodeOrNull => self.node_ref("BlockdevRefOrNull", true),
            OptionType::Object(m) => self.options(m, &[]),
            OptionType::ObjectList(m) => {
                let of = self.options(m, &[]);
                self.array(of)
            }
            OptionType::SocketAddress => self.shape(&shapes::SOCKET_ADDRESS),
            OptionType::NewImage => self.create_options(),
        };
        FieldDef { name: o.name, ty, optional: !o.required }
    }

    fn node_ref(&mut self, name: &'static str, or_null: bool) -> TypeId {
        let mut of = vec![self.blockdev_options(), self.builtin(Builtin::Str)];
        if or_null {
            of.push(self.builtin(Builtin::Null));
        }
        self.intern(Origin::Alternate(name), TypeDef::Alternate(name, of))
    }

    fn driver_names(&mut self) -> TypeId {
        let names = self.sources.drivers.iter().map(|d| d.name).collect();
        self.words(names)
    }

    fn export_names(&mut self) -> TypeId {
        let names = self.sources.exports.iter().map(|e| e.name).collect();
        self.words(names)
    }

    fn blockdev_options(&mut self) -> TypeId {
        self.object(Origin::Named("BlockdevOptions"), |b| {
            let mut fields = vec![FieldDef { name: "driver", ty: b.driver_names(), optional: false }];
            let common = b.sources.node_options;
            fields.extend(common.iter().map(|o| b.option(o)));
            let union = b.branches(b.sources.drivers);
            ObjectDef { fields, union: Some(("driver", union)), features: Vec::new() }
        })
    }

    fn export_options(&mut self) -> TypeId {
        self.object(Origin::Named("BlockExportOptions"), |b| {
            let mut fields = vec![FieldDef { name: "type", ty: b.export_names(), optional: false }];
            fields.extend(shapes::EXPORT_OPTIONS.iter().map(|f| FieldDef {
                name: f.name,
                ty: b.ty(f.ty),
                optional: f.optional,
            }));
            let union = b.branches(b.sources.exports);
            ObjectDef { fields, union: Some(("type", union)), features: Vec::new() }
        })
    }

    fn create_options(&mut self) -> TypeId {
        self.object(Origin::Named("BlockdevCreateOptions"), |b| {
            let fields = vec![FieldDef { name: "driver", ty: b.driver_names(), optional: false }];
            let of = |name| jobs::CREATE.iter().find(|(n, _)| *n == name).map_or(&EMPTY, |(_, s)| *s);
            let drivers = b.sources.drivers;
            let union = drivers.iter().map(|d| (d.name, b.shape(of(d.name)))).collect();
            ObjectDef { fields, union: Some(("driver", union)), features: Vec::new() }
        })
    }

    fn option_lists(&mut self, lists: &'static [&'static [OptionSpec]]) -> TypeId {
        self.object(Origin::Lists(lists.as_ptr()), |b| {
            let fields = lists.iter().flat_map(|l| l.iter()).map(|o| b.option(o)).collect();
            ObjectDef { fields, ..ObjectDef::default() }
        })
    }

    fn job_names(&mut self) -> TypeId {
        let names = self.sources.jobs.iter().map(|j| j.name).collect();
        self.words(names)
    }

    fn of_job(&mut self, shape: &'static Shape, part: JobPart) -> TypeId {
        self.object(Origin::OfJob(shape, part), |b| {
            let mut fields = vec![FieldDef { name: "type", ty: b.job_names(), optional: false }];
            let others = shape.fields.iter().filter(|f| f.name != "type");
            fields.extend(others.map(|f| FieldDef { name: f.name, ty: b.ty(f.ty), optional: f.optional }));
            let jobs = b.sources.jobs;
            let of = |j: &JobBranch| if part == JobPart::Change { j.change } else { j.details };
            let union = jobs.iter().map(|j| (j.name, b.options(of(j), &[]))).collect();
            ObjectDef { fields, union: Some(("type", union)), features: Vec::new() }
        })
    }

    fn counters(&mut self, shape: &'static Shape) -> TypeId {
        self.object(Origin::Named("Counters"), |b| {
            let all = shape.fields.iter().chain(b.sources.counters);
            let fields =
                all.map(|f| FieldDef { name: f.name, ty: b.ty(f.ty), optional: f.optional }).collect();
            ObjectDef { fields, ..ObjectDef::default() }
        })
    }

    fn transaction_action(&mut self) -> TypeId {
        self.object(Origin::Named("TransactionAction"), |b| {
            let commands = b.sources.commands.iter().filter(|c| c.in_transactions);
            let mut actions: Vec<_> = commands.map(|c| (c.name, c.arguments)).collect();
            actions.push(("abort", NOTHING));
            actions.sort_by_key(|(name, _)| *name);
            let names = b.words(actions.iter().map(|(name, _)| *name).collect());
            let union = actions
                .into_iter()
                .map(|(name, arguments)| {
                    let data = |b: &mut Self| FieldDef { name: "data", ty: b.ty(arguments), optional: false };
                    let of = |b: &mut Self| ObjectDef { fields: vec![data(b)], ..ObjectDef::default() };
                    (name, b.object(Origin::Action(name), of))
                })
                .collect();
            let fields = vec![FieldDef { name: "type", ty: names, optional: false }];
            ObjectDef { fields, union: Some(("type", union)), features: Vec::new() }
        })
    }

    fn branches(&mut self, branches: &[Branch]) -> Vec<(&'static str, TypeId)> {
        branches.iter().map(|d| (d.name, self.options(d.options, d.features))).collect()
    }
}
