//! The driver registry: one row per driver, and how a node is opened.
//!
//! Opening is in two steps. [`DriverKind::parse`] turns options into the children that
//! the node wants, its edge rule and an [`Opener`]: pure, so that the solver can look at
//! the candidate before anything is touched. Then the children are opened and granted,
//! and the opener may read them. Names found *inside* an image are only reported
//! ([`Opened::implicit`]); whether they are opened is the caller's policy.

use std::fs::Metadata;
use std::path::Path;

use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{ChildRole, Error, ErrorKind, NodeName, OptionSpec, OptionType, Options, Result, Value};

use std::sync::Arc;

use crate::{
    AccessRule, BackingName, CheckResult, ChildEdge, Class, Cx, DetectZeroes, Driver, Io, NodeFlags,
    Prepared, Read, Repairing, Resize, Write,
};

/// A driver's registry row: everything that the rest of the program asks about it. No driver is known by its name
/// outside of its module and the list of drivers.
pub struct DriverKind {
    /// Its name in options.
    pub name: &'static str,
    /// Its class.
    pub class: Class,
    /// One line for help.
    pub help: &'static str,
    /// The options it has besides the common ones.
    pub options: &'static [OptionSpec],
    /// The options for making a new image; empty if it can't.
    pub create_options: &'static [OptionSpec],
    /// Its `Forward` plans name places that can be freed and reused (formats): they are
    /// leases.
    pub maps: bool,
    /// Takes the driver's own options out and says what it wants. Pure.
    pub parse: fn(&mut Options, &Common) -> Result<Parsed>,
    /// How sure it is that these are the first bytes of an image of its format: 0 not at
    /// all, 100 certain. `None` for drivers that are never probed.
    pub probe: Option<fn(header: &[u8], filename: &str) -> u8>,
    /// Understands the options for making an image, if it can make any. Pure.
    pub create: Option<CreateFn>,
    /// What names of its nodes may begin with, before a colon: `nbd` in `nbd://host/export`.
    pub protocols: &'static [&'static str],
    /// The options that such a name stands for. `None` without protocols.
    pub from_name: Option<NameFn>,
    /// Its `filename` is a path on this host: how sure it is that it is the one to open what the path leads to, if
    /// that is there.
    pub path: Option<PathFn>,
    /// What the rest of the program uses it for.
    pub duties: &'static [Duty],
    /// Checks and repairs an image, which need not be one that can be opened.
    pub check: Option<CheckFn>,
    /// Changes the backing file that an image names and nothing else, whether the image can be opened or not.
    pub change_backing: Option<ChangeBackingFn>,
    /// The create options that the image tool reports, in this order, with their defaults; the others follow.
    pub create_report: &'static [(&'static str, Option<&'static str>)],
    /// It holds something back that closing writes out or gives back, so it is closed before it is reopened.
    pub closes_before_reopen: bool,
    /// `info` has details of its images (the flag for an unclean end).
    pub details: bool,
    /// `query-blockstats` has its counts of discards.
    pub counts_discards: bool,
}

impl DriverKind {
    /// A row without any abilities: a driver that is only opened by its options.
    pub const fn new(
        name: &'static str,
        class: Class,
        help: &'static str,
        options: &'static [OptionSpec],
        parse: fn(&mut Options, &Common) -> Result<Parsed>,
    ) -> DriverKind {
        DriverKind {
            name,
            class,
            help,
            options,
            create_options: &[],
            maps: false,
            parse,
            probe: None,
            create: None,
            protocols: &[],
            from_name: None,
            path: None,
            duties: &[],
            check: None,
            change_backing: None,
            create_report: &[("size", None)],
            closes_before_reopen: false,
            details: false,
            counts_discards: false,
        }
    }

    /// Whether it has an option of that name.
    pub fn has_option(&self, name: &str) -> bool {
        self.options.iter().any(|o| o.name == name)
    }
}

/// A name with a protocol, in its parts.
#[derive(Clone, Copy, Debug)]
pub struct ProtocolName<'a> {
    /// All of it.
    pub whole: &'a str,
    /// What stands before the first colon.
    pub protocol: &'a str,
    /// What comes after it.
    pub rest: &'a str,
}

impl ProtocolName<'_> {
    /// The error for a protocol that no driver has.
    pub fn unknown(self) -> Error {
        Error::new(ErrorKind::Unsupported, format!("Unknown protocol '{}'", self.protocol)).remedy(format!(
            "write './{}' for a file of that name, or name a driver and its options instead",
            self.whole
        ))
    }
}

/// See [`DriverKind::from_name`].
pub type NameFn = fn(Registry, ProtocolName<'_>) -> Result<Options>;

/// See [`DriverKind::path`].
pub type PathFn = fn(&Path, Option<&Metadata>) -> u8;

/// See [`DriverKind::check`].
pub type CheckFn = for<'a> fn(Io<'a, Read>, Option<Repairing<'a>>) -> LocalFuture<'a, Result<CheckResult>>;

/// See [`DriverKind::change_backing`].
pub type ChangeBackingFn =
    for<'a> fn(Io<'a, Read>, Io<'a, Write>, Option<BackingName<'a>>) -> LocalFuture<'a, Result<()>>;

/// What the rest of the program uses a driver for, without knowing its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// New overlays, where the user says no format.
    Overlay,
    /// Copying what is read into an overlay.
    CopyOnRead,
}

/// See [`DriverKind::create`].
pub type CreateFn = fn(Options) -> Result<Box<dyn Creation>>;

/// An image to be made whose options have been understood: whatever could be wrong with them has been refused, and
/// nothing has been touched.
pub trait Creation {
    /// Bytes that a file of fixed length must have at least for the image to be made in it.
    fn room(&self) -> u64;
    /// Bytes from the start of the file that take space on the disk as soon as the image is made.
    fn space(&self) -> u64;
    /// The backing file that the image will name.
    fn backing(&self) -> Option<BackingName<'_>>;
    /// Makes it: a protocol a file that is not there yet, a format an image in [`CreateCx::file`].
    ///
    /// # Errors
    /// Input and output, and for a protocol `AlreadyExists`: nothing of the options any more.
    fn make<'a>(&'a self, cx: CreateCx<'a>) -> LocalFuture<'a, Result<()>>;
}

impl std::fmt::Debug for DriverKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DriverKind({})", self.name)
    }
}

/// What [`DriverKind::parse`] found.
pub struct Parsed {
    /// The children, in the order that the driver's indices mean.
    pub children: Vec<ChildSpec>,
    /// The edge rule.
    pub rule: AccessRule,
    /// The driver relies on the chain from its first child down to this node (copy-on-read
    /// with `bottom`): while the node exists, nobody may relink the nodes above it, or
    /// replace them.
    pub relies_down_to: Option<NodeName>,
    /// Opens the driver once the children are there.
    pub open: Box<dyn Opener>,
}

/// A child that a node wants.
#[derive(Debug)]
pub struct ChildSpec {
    /// The option's name: `file`, `backing`, ...
    pub name: &'static str,
    /// What it is to the parent.
    pub role: ChildRole,
    /// Which node.
    pub def: ChildDef,
}

/// Which node a child is.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildDef {
    /// An existing node.
    Reference(NodeName),
    /// A new node with these options (with `driver`).
    Inline(Options),
    /// None: given as `null`.
    None,
    /// As the image says, if the policy allows it; reported in [`Opened::implicit`].
    FromImage,
}

impl ChildDef {
    /// Reads a child option: a node name, an object, or (with `nullable`) `null` or the
    /// empty string.
    pub fn from_value(option: &str, value: Value, nullable: bool) -> Result<ChildDef> {
        match value {
            Value::Str(s) if s.is_empty() && nullable => Ok(ChildDef::None),
            Value::Null if nullable => Ok(ChildDef::None),
            Value::Str(s) => Ok(ChildDef::Reference(NodeName::internal(s))),
            Value::Map(m) => Ok(ChildDef::Inline(Options::from_value(Value::Map(m))?)),
            other => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "Invalid parameter type for '{option}', expected: node name or object, got: {}",
                    other.kind()
                ),
            )),
        }
    }

    /// Takes a required child option out.
    pub fn take(options: &mut Options, name: &'static str) -> Result<ChildDef> {
        match options.take(name) {
            Some(v) => ChildDef::from_value(name, v, false),
            None => Err(Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is missing"))),
        }
    }
}

/// Opens a driver; see [`Parsed::open`].
pub trait Opener {
    /// Opens it. Reads what it needs through `cx`, and changes nothing outside of this process: the draft may be
    /// refused, or only looked at. An image that has to be repaired first says so in [`Opened::repair`].
    /// Dropping the driver closes it again.
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>>;
}

/// A driver that has been opened.
pub struct Opened {
    /// The driver.
    pub driver: Arc<dyn Driver>,
    /// What the image names for the children that were left to it
    /// ([`ChildDef::FromImage`]).
    pub implicit: Vec<ImplicitChild>,
    /// What happens when the driver takes its place: for one that shares state with the
    /// driver that it replaces ([`OpenCx::replaces`]). Dropped if it never does.
    pub effect: Option<Box<dyn Prepared>>,
    /// What the image needs before it may be written.
    pub repair: Option<Box<dyn Repair>>,
}

/// A change of an image's file that comes before the image is used as it was opened. Opening finds out whether it can
/// be made; publishing the draft makes it, once nothing can be refused any more.
pub trait Repair {
    /// Makes it. The node is the one of the draft, which nobody else uses yet.
    ///
    /// # Errors
    /// What the storage says; the draft is then not published.
    fn repair<'a>(self: Box<Self>, cx: Cx<'a>) -> LocalFuture<'a, Result<()>>;
}

impl Opened {
    /// A driver and nothing else.
    pub fn of(driver: Arc<dyn Driver>) -> Opened {
        Opened { driver, implicit: Vec::new(), effect: None, repair: None }
    }
}

/// A reference to another file inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImplicitChild {
    /// The child option: `backing`, `data-file`.
    pub child: &'static str,
    /// What it is to the parent.
    pub role: ChildRole,
    /// The name in the image: a file name, or a `json:`/`proto:` pseudo name.
    pub filename: String,
    /// The format named in the image.
    pub format: Option<String>,
}

/// What an opener gets.
#[derive(Clone, Copy)]
pub struct OpenCx<'a> {
    /// The name of the node to be.
    pub name: &'a NodeName,
    /// The children that are there already, in the driver's order (those left to the
    /// image and those that are `None` are missing).
    pub children: &'a [ChildEdge],
    /// Common options.
    pub common: &'a Common,
    /// The driver that the node has now, when it is reopened with other options. It goes
    /// on serving requests until the change is published, then every request goes to the
    /// new one; it is not closed. The node has been flushed at that instant if it was
    /// writable. A driver that keeps state or locks takes them over from it
    /// ([`OpenCx::replaced`]); what becomes effective only then is [`Opened::effect`].
    pub replaces: Option<&'a Arc<dyn Driver>>,
    /// The runtime.
    pub rt: &'a Rt,
}

impl<'a> OpenCx<'a> {
    /// The driver that is replaced, if it is of this type.
    pub fn replaced<D: Driver>(&self) -> Option<&'a D> {
        let any: &dyn std::any::Any = &**self.replaces?;
        any.downcast_ref()
    }

    /// A child by name.
    pub fn child(&self, name: &str) -> Result<&'a ChildEdge> {
        self.children.iter().find(|c| c.name == name).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("node '{}' has no child '{name}'", self.name))
        })
    }

    /// Read access to a child.
    pub fn read(&self, name: &str) -> Result<Io<'a, Read>> {
        Io::on_edge(self.child(name)?, self.rt)
    }

    /// Write access to a child, for repairs on opening.
    pub fn write(&self, name: &str) -> Result<Io<'a, Write>> {
        Io::on_edge(self.child(name)?, self.rt)
    }
}

/// What a format's `create` gets: the file to be filled, which exists and is empty (or a
/// device). Protocol drivers get no file: they make it.
#[derive(Clone, Copy)]
pub struct CreateCx<'a> {
    /// The file, with every access; `None` for protocol drivers.
    pub file: Option<&'a ChildEdge>,
    /// The file keeps its length: it is a device, or belongs to a server.
    pub fixed: bool,
    /// The runtime.
    pub rt: &'a Rt,
}

impl<'a> CreateCx<'a> {
    fn file(&self) -> Result<&'a ChildEdge> {
        self.file.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a format is created in a file"))
    }

    /// Write access to the file.
    pub fn write(&self) -> Result<Io<'a, Write>> {
        Io::on_edge(self.file()?, self.rt)
    }

    /// Read access to the file.
    pub fn read(&self) -> Result<Io<'a, Read>> {
        Io::on_edge(self.file()?, self.rt)
    }

    /// Access for setting the file's size.
    pub fn resize(&self) -> Result<Io<'a, Resize>> {
        Io::on_edge(self.file()?, self.rt)
    }
}

/// The options that every node has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Common {
    /// `node-name`.
    pub node_name: Option<NodeName>,
    /// `read-only`, `cache.direct`, `cache.no-flush`, `force-share`, `discard`, `active`, `detect-zeroes`.
    pub flags: NodeFlags,
    /// `auto-read-only`: open read-only when writing is not possible.
    pub auto_read_only: bool,
}

const CACHE: &[OptionSpec] = &[
    OptionSpec::optional("direct", OptionType::Bool, "bypass the host page cache (default off)"),
    OptionSpec::optional("no-flush", OptionType::Bool, "ignore flush requests (default off)"),
];

/// The rows of the common options.
pub const fn common_options() -> &'static [OptionSpec] {
    COMMON
}

const COMMON: &[OptionSpec] = &[
    OptionSpec::optional("node-name", OptionType::Str, "name of the node (default: made up)"),
    OptionSpec::optional(
        "discard",
        OptionType::Enum(&["ignore", "unmap"]),
        "what becomes of discards (default ignore)",
    ),
    OptionSpec::optional("cache", OptionType::Object(CACHE), "cache mode"),
    OptionSpec::optional("read-only", OptionType::Bool, "open without the right to write (default off)"),
    OptionSpec::optional(
        "auto-read-only",
        OptionType::Bool,
        "open read-only if writing is not possible (default off)",
    ),
    OptionSpec::optional(
        "active",
        OptionType::Bool,
        "take part; off leaves the image to another process until blockdev-set-active (default on)",
    ),
    OptionSpec::optional(
        "force-share",
        OptionType::Bool,
        "open although others hold locks; needs read-only (default off)",
    ),
    OptionSpec::optional(
        "detect-zeroes",
        OptionType::Enum(&["off", "on", "unmap"]),
        "turn writes of zeroes into zero writes (default off)",
    ),
];

impl Common {
    /// Takes the common options out.
    pub fn take(options: &mut Options) -> Result<Common> {
        let node_name = options.take_str("node-name")?.map(|n| NodeName::parse(&n)).transpose()?;
        let unmap =
            matches!(options.take_enum("discard", &["ignore", "unmap", "off", "on"])?, Some("unmap" | "on"));
        let mut cache = options.take_map("cache")?.unwrap_or_default();
        // Command lines write `cache.direct=on`; both spellings arrive here.
        let direct = cache.take_bool("direct")?.or(options.take_bool("cache.direct")?);
        let no_flush = cache.take_bool("no-flush")?.or(options.take_bool("cache.no-flush")?);
        cache.finish("cache")?;
        let read_only = options.take_bool("read-only")?.unwrap_or(false);
        let auto_read_only = options.take_bool("auto-read-only")?.unwrap_or(false);
        let force_share = options.take_bool("force-share")?.unwrap_or(false);
        let active = options.take_bool("active")?.unwrap_or(true);
        if force_share && !read_only {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "force-share=on can only be used with read-only images",
            )
            .remedy("add read-only=on"));
        }
        let detect_zeroes = match options.take_enum("detect-zeroes", &["off", "on", "unmap"])? {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        };
        if detect_zeroes == DetectZeroes::Unmap && !unmap {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            )
            .remedy("add discard=unmap"));
        }
        Ok(Common {
            node_name,
            flags: NodeFlags {
                read_only,
                direct: direct.unwrap_or(false),
                no_flush: no_flush.unwrap_or(false),
                force_share,
                unmap,
                inactive: !active,
                detect_zeroes,
            },
            auto_read_only,
        })
    }
}

/// The drivers that this program has.
#[derive(Clone, Copy, Debug)]
pub struct Registry(&'static [&'static DriverKind], Foreign);

/// The format, as options and image headers name it, of a disk that has none: its bytes are its file's.
pub const RAW_FORMAT: &str = "raw";

/// Names a format by its first bytes that no driver here opens.
pub type Foreign = fn(header: &[u8]) -> Option<&'static str>;

impl Registry {
    /// These drivers.
    pub const fn new(rows: &'static [&'static DriverKind]) -> Registry {
        Registry(rows, |_| None)
    }

    /// The same, with a way to recognise formats that can't be opened here, so that their images are not
    /// taken for raw disks.
    #[must_use]
    pub const fn recognising(self, foreign: Foreign) -> Registry {
        Registry(self.0, foreign)
    }

    /// All rows.
    pub fn rows(self) -> &'static [&'static DriverKind] {
        self.0
    }

    /// The row of that name.
    pub fn find(self, name: &str) -> Result<&'static DriverKind> {
        self.0.iter().copied().find(|d| d.name == name).ok_or_else(|| {
            let known: Vec<_> = self.0.iter().map(|d| d.name).collect();
            Error::new(ErrorKind::InvalidInput, format!("Unknown driver '{name}'"))
                .remedy(format!("this program has: {}", known.join(", ")))
        })
    }

    /// The driver that has this duty.
    ///
    /// # Errors
    /// `Unsupported` when this program has none.
    pub fn on_duty(self, duty: Duty) -> Result<&'static DriverKind> {
        self.0.iter().copied().find(|d| d.duties.contains(&duty)).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("this program has no driver for {duty:?}"))
        })
    }

    /// The format that is surest of these first bytes of a file; `raw` when none is.
    ///
    /// # Errors
    /// `Unsupported` when they belong to a format that can't be opened here: as a raw disk its content would be
    /// silently wrong.
    pub fn probe(self, header: &[u8], filename: &str) -> Result<&'static str> {
        let sure = self
            .0
            .iter()
            .filter_map(|d| Some((d.probe?(header, filename), d.name)))
            .filter(|(score, _)| *score > 0)
            .max_by_key(|(score, _)| *score);
        match (sure, (self.1)(header)) {
            (Some((_, name)), None) => Ok(name),
            // Surer than "it may be anything".
            (Some((score, name)), Some(_)) if score > 1 => Ok(name),
            (None, None) => Ok(RAW_FORMAT),
            (_, Some(name)) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the image has the format {name}, which can't be opened here"),
            )
            .remedy("convert it first, or name the format 'raw' to get its bytes as they are")),
        }
    }
}
