//! Opening nodes into a draft, children first, with the locks that each step needs.
//!
//! For every node: parse its options (pure), link the children that were named, solve
//! and prepare (so that the children are locked for what the node will need), then let
//! the driver read them. What the image itself names is opened only if the policy says
//! so: an image may come from a stranger.
//!
//! Nothing is published here; dropping the draft closes everything again.

use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{ChildRole, Error, ErrorKind, NodeName, OpId, Options, Result, ResultExt, Span, Value};

use crate::{
    AccessRule, ChildDef, Common, DetectZeroes, Draft, ImplicitChild, Io, NodeDef, NodeFlags, OpenCx,
    RAW_FORMAT, Read, Registry,
};

/// The longest chain of backing files. Longer ones are either a mistake or an attack.
pub const MAX_CHAIN: usize = 200;

/// The most nodes that one graph may have.
pub const MAX_NODES: usize = 65_536;

/// How much of a file is looked at to find out its format, in bytes.
pub const PROBE_BYTES: u64 = 2048;

/// What may be opened because an image names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implicit {
    /// Nothing.
    Deny,
    /// Plain file names beneath the image's own directory, with the format named too.
    Beneath,
    /// Anything that the image names: as QEMU's tools do.
    Anything,
}

/// What the caller permits when nodes are opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenPolicy {
    /// Files that images name.
    pub implicit: Implicit,
    /// Whether the format may be guessed from a file's content. Unsafe when a guest could
    /// have written it: a guest can turn a raw disk into a qcow2 image that names any
    /// file of the host.
    pub probe: bool,
    /// The option that permits more, for messages: "--allow-backing=anything".
    pub permit_with: &'static str,
    /// The option that permits guessing, for messages.
    pub probe_with: &'static str,
}

/// Opens nodes into a draft.
pub struct Opener<'a> {
    /// The drivers.
    pub registry: Registry,
    /// What is permitted.
    pub policy: OpenPolicy,
    /// Reads names such as `nbd://host/export` or `json:{...}` found in images;
    /// [`Registry::protocol_name`] knows the common ones without JSON.
    pub names: fn(Registry, &str) -> Result<Options>,
    /// The runtime.
    pub rt: &'a Rt,
}

/// What a node inherits from the parent that it is defined in.
#[derive(Clone, Copy, Default)]
pub(crate) struct Inherited {
    flags: NodeFlags,
    auto_read_only: bool,
    depth: usize,
}

impl Opener<'_> {
    /// Opens a node and everything below it. `monitor` nodes stay until they are deleted
    /// by name. Without a `driver` option, the format of `file` is probed, if the policy
    /// permits it.
    ///
    /// # Errors
    /// What parsing, opening or the access control says; the draft is then of no more use.
    pub async fn open(&self, draft: &mut Draft, options: Options, monitor: bool) -> Result<NodeName> {
        self.node(draft, options, monitor, None, Inherited::default()).await
    }

    /// The same for a filter that operation `op` is going to interpose
    /// ([`Draft::interpose_opened`]) on the node that its options name as `file`. What the filter relies on
    /// is the operation's own business: it makes the claims.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_interposed(&self, draft: &mut Draft, options: Options, op: &OpId) -> Result<NodeName> {
        self.node(draft, options, false, Some(op.clone()), Inherited::default()).await
    }

    pub(crate) fn node<'b>(
        &'b self,
        draft: &'b mut Draft,
        options: Options,
        monitor: bool,
        owner: Option<OpId>,
        inherited: Inherited,
    ) -> LocalFuture<'b, Result<NodeName>> {
        Box::pin(self.node_inner(draft, options, monitor, owner, inherited))
    }

    async fn node_inner(
        &self,
        draft: &mut Draft,
        mut options: Options,
        monitor: bool,
        owner: Option<OpId>,
        inherited: Inherited,
    ) -> Result<NodeName> {
        if inherited.depth > MAX_CHAIN {
            return Err(Error::new(ErrorKind::Limit, format!("the chain has more than {MAX_CHAIN} images"))
                .remedy("look for an image that is its own backing file"));
        }
        if draft.node_count() >= MAX_NODES {
            return Err(Error::new(ErrorKind::Limit, format!("the graph has {MAX_NODES} nodes already")));
        }
        let driver = match options.take_str("driver")? {
            Some(d) => d,
            None => self.probe(draft, &mut options, inherited).await?,
        };
        let kind = self.registry.find(&driver)?;
        let inherits = inherit(&mut options, inherited);
        let described = options.clone().with("driver", driver.as_str()).into_value();
        let common = Common::take(&mut options)?;
        let how = self.without_file(&mut options)?;
        let parsed = (kind.parse)(&mut options, &common)?;
        options.finish(&format!("driver '{driver}'"))?;
        let anonymous = common.node_name.is_none();
        let owned = owner.is_some();
        let name = common.node_name.clone().unwrap_or_else(|| draft.fresh_name());
        draft.add_node(NodeDef {
            name: name.clone(),
            anonymous,
            kind,
            rule: parsed.rule,
            flags: common.flags,
            owner,
            monitor,
            options: described,
        })?;
        draft.set_inherited(&name, inherits);

        let mut from_image = false;
        for child in parsed.children {
            match child.def {
                ChildDef::None => {}
                ChildDef::FromImage => from_image = true,
                ChildDef::Reference(node) => draft.link(&name, child.name, child.role, &node)?,
                ChildDef::Inline(options) => {
                    let below = below(&common, parsed.rule, child.role, inherited.depth);
                    let node = self.node(draft, options, false, None, below).await?;
                    draft.link(&name, child.name, child.role, &node)?;
                }
            }
        }
        draft.prepare(self.rt).await?;
        let edges = draft.edges_for_opening(&name)?;
        let cx = OpenCx { name: &name, children: &edges, common: &common, replaces: None, rt: self.rt };
        let mut opened = parsed.open.open(cx).await?;
        let forced = draft.judge_opened(&name, &opened, &edges, &common)?;
        drop(edges);
        let named = std::mem::take(&mut opened.implicit);
        draft.put_opened(&name, opened, forced);
        if from_image {
            for implicit in named {
                self.implicit(draft, &name, &common, implicit, &how, inherited.depth).await?;
            }
        }
        // An operation lists itself what it relies on, and may permit more than the driver would.
        if let Some(bottom) = parsed.relies_down_to.as_ref().filter(|_| !owned) {
            draft.rely_down_to(&name, bottom)?;
        }
        draft.guard_target(&name)?;
        draft.prepare(self.rt).await?;
        Ok(name)
    }

    /// The options of what holds an image that a user names by a file name, or by a protocol.
    ///
    /// # Errors
    /// What the parser of names says.
    pub async fn file_options(&self, name: &str) -> Result<Options> {
        match name.strip_prefix("file:") {
            Some(path) => Ok(crate::names::path_options_in(self.registry, self.rt, path).await),
            None if has_protocol(name) => (self.names)(self.registry, name),
            None => Ok(crate::names::path_options_in(self.registry, self.rt, name).await),
        }
    }

    /// Takes out options for the backing file that say how to open it and not where it is: the image says that.
    fn without_file(&self, options: &mut Options) -> Result<Options> {
        let Some(Value::Map(m)) = options.get("backing") else { return Ok(Options::new()) };
        let format = |d: &str| self.registry.find(d).is_ok_and(|k| k.class != crate::Class::Protocol);
        let names_file = m.iter().any(|(k, v)| match (k.as_str(), v) {
            ("driver", Value::Str(d)) => !format(d),
            (k, _) => k.starts_with("file") || k.starts_with("image"),
        });
        match names_file {
            true => Ok(Options::new()),
            false => Ok(options.take_map("backing")?.unwrap_or_default()),
        }
    }

    /// Opens what an image names, if the policy permits it; a backing file with the options `how`.
    async fn implicit(
        &self,
        draft: &mut Draft,
        name: &NodeName,
        common: &Common,
        mut child: ImplicitChild,
        how: &Options,
        depth: usize,
    ) -> Result<()> {
        let image = draft.image_filename(name).unwrap_or_default();
        let how = if child.role == ChildRole::Backing { how.clone() } else { Options::new() };
        if let Some(Value::Str(driver)) = how.get("driver") {
            child.format = Some(driver.clone());
        }
        let mut options = self.permit(&image, &child).await?;
        for name in how.names() {
            if let Some(v) = how.get(name) {
                options.set(name, v.clone());
            }
        }
        if !options.has("read-only") {
            options.set("read-only", child.role == ChildRole::Backing || common.flags.read_only);
        }
        let below = Inherited { depth: depth + 1, ..below(common, AccessRule::FORMAT, child.role, depth) };
        let node = self
            .node(draft, options, false, None, below)
            .await
            .context(|| format!("Could not open {} file '{}' of '{image}'", child.child, child.filename))?;
        draft.link(name, child.child, child.role, &node)
    }

    /// The options for what an image names, or a refusal that says how to permit it.
    pub(crate) async fn permit(&self, image: &str, child: &ImplicitChild) -> Result<Options> {
        let refuse = |why: &str| self.refuse(image, child, why);
        let plain = !has_protocol(&child.filename);
        // An image that is not a file of this host has no directory here.
        let local = !image.is_empty() && !image.contains("://");
        match self.policy.implicit {
            Implicit::Deny => return Err(refuse("and files named inside images are not opened")),
            Implicit::Beneath => {
                if !plain {
                    return Err(refuse("which is not a plain file name"));
                }
                let path = std::path::Path::new(&child.filename);
                let climbs = path
                    .components()
                    .any(|c| !matches!(c, std::path::Component::Normal(_) | std::path::Component::CurDir));
                if path.is_absolute() {
                    return Err(refuse(
                        "by an absolute name: only names beneath the image's own directory are followed",
                    ));
                }
                if climbs {
                    return Err(refuse("which is not beneath the image's own directory"));
                }
                if child.role != ChildRole::Backing {
                    return Err(refuse("and external data files are not opened"));
                }
                if !local {
                    return Err(refuse("but is not a file of this host itself"));
                }
            }
            Implicit::Anything => {}
        }
        self.named_by(image, child).await
    }

    /// Whether options say which format the image has, or only what holds it, perhaps beneath filters (`blkdebug:`).
    fn has_format(&self, options: &Options) -> bool {
        let kind = match options.get("driver") {
            Some(Value::Str(d)) => self.registry.find(d),
            None => return true,
            Some(_) => return false,
        };
        match kind.map(|k| k.class) {
            Ok(crate::Class::Protocol) | Err(_) => false,
            Ok(crate::Class::Format) => true,
            Ok(crate::Class::Filter) => crate::loops::SHOWN.iter().any(|child| match options.get(child) {
                Some(Value::Map(m)) => {
                    Options::from_value(Value::Map(m.clone())).is_ok_and(|below| self.has_format(&below))
                }
                // A node that is open.
                Some(_) => true,
                None => false,
            }),
        }
    }

    fn refuse(&self, image: &str, child: &ImplicitChild, why: &str) -> Error {
        Error::new(
            ErrorKind::PermissionDenied,
            format!("image '{image}' names the {} file '{}', {why}", child.child, child.filename),
        )
        .remedy(format!("if you trust the image: {}", self.policy.permit_with))
    }

    /// The options for what an image names.
    pub(crate) async fn named_by(&self, image: &str, child: &ImplicitChild) -> Result<Options> {
        let plain = !has_protocol(&child.filename);
        let local = !image.contains("://");
        let full = join(image, &child.filename);
        let (file, filename) = if plain && !local && has_protocol(&full) {
            // Beside an image on a server: on the same server.
            ((self.names)(self.registry, &full)?, full)
        } else if plain {
            let mut file = crate::names::path_options_in(self.registry, self.rt, &full).await;
            if self.policy.implicit == Implicit::Beneath {
                file.set("x-beneath", directory(image));
            }
            (file, full)
        } else {
            ((self.names)(self.registry, &child.filename)?, child.filename.clone())
        };
        let protocol = |name: &str| self.registry.find(name).is_ok_and(|k| k.class == crate::Class::Protocol);
        if let Some(format) = child.format.as_ref().filter(|f| protocol(f)) {
            // A disk without a format may be recorded under the driver of what holds it. Any other driver is refused:
            // an image could have a file read through whatever there is.
            if !matches!(file.get("driver"), Some(Value::Str(d)) if d == format) {
                return Err(self.refuse(
                    image,
                    child,
                    &format!("as '{format}', which is not an image format"),
                ));
            }
            return Ok(Options::new().with("driver", RAW_FORMAT).with("file", file.into_value()));
        }
        // A `json:` definition may be of a whole node, with its format.
        if !plain && self.has_format(&file) {
            return Ok(file);
        }
        match &child.format {
            Some(format) => Ok(Options::new().with("driver", format.as_str()).with("file", file.into_value())),
            None if self.policy.probe => Ok(Options::new().with("file", file.into_value())),
            None => Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("image '{image}' does not say which format its {} file '{filename}' has, and guessing is unsafe", child.child),
            )
            .remedy(format!(
                "record the format (dolmen img rebase -u -b '{}' -F FORMAT '{image}'), or permit guessing: {}",
                child.filename, self.policy.probe_with
            ))),
        }
    }

    /// Finds out the format of `file` or `filename`, and leaves an open `file` child.
    pub(crate) async fn probe(
        &self,
        draft: &mut Draft,
        options: &mut Options,
        inherited: Inherited,
    ) -> Result<String> {
        let file = match options.take("file") {
            Some(Value::Str(name)) => draft.resolve(&name)?,
            Some(Value::Map(m)) => {
                let inline = Options::from_value(Value::Map(m))?;
                let mut peek = options.clone();
                let common = Common::take(&mut peek)?;
                let mut merged = below(&common, AccessRule::FORMAT, ChildRole::Metadata, inherited.depth);
                merged.flags.read_only |= inherited.flags.read_only;
                merged.flags.force_share |= inherited.flags.force_share;
                self.node(draft, inline, false, None, merged).await?
            }
            Some(other) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "Invalid parameter type for 'file', expected: node name or object, got: {}",
                        other.kind()
                    ),
                ));
            }
            None => return Err(Error::new(ErrorKind::InvalidInput, "Parameter 'driver' is missing")),
        };
        if !self.policy.probe {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                "the format was not given, and guessing it is unsafe on images that a guest could have written",
            )
            .remedy(format!("name the format (driver, or -f), or permit guessing: {}", self.policy.probe_with)));
        }
        let format = {
            let node = draft.built_node(&file)?;
            let filename = node.driver.describe(&node).filename.unwrap_or_default();
            let len = node.size().min(PROBE_BYTES);
            let mut header = vec![0; len as usize];
            let io: Io<'_, Read> = Io::for_probing(&node, self.rt);
            if len > 0 {
                let memory = dolmen_rt::Memory::zeroed(header.len());
                io.read(Span::new(0, len), &memory.iovec(), Default::default()).await?;
                header.copy_from_slice(&memory.to_vec());
            }
            self.registry.probe(&header, &filename)?
        };
        options.set("file", file.as_str());
        if format == RAW_FORMAT {
            // The guess must stay true: a guest must not be able to turn a raw disk into
            // another format by writing its first sector.
            options.set("x-probed", true);
        }
        Ok(format.to_owned())
    }
}

/// What an inline child inherits.
pub(crate) fn below(common: &Common, parent: AccessRule, role: ChildRole, depth: usize) -> Inherited {
    let f = common.flags;
    let backing = role == ChildRole::Backing;
    Inherited {
        flags: NodeFlags {
            // Below an overlay nothing is written unless it is asked for.
            read_only: f.read_only || backing,
            direct: f.direct,
            no_flush: f.no_flush,
            force_share: f.force_share,
            // A parent that decides about discards has a file that always passes them on.
            unmap: !(parent.table.leaves_discards || backing) || f.unmap,
            // Each node says so for itself.
            inactive: false,
            detect_zeroes: DetectZeroes::Off,
        },
        auto_read_only: common.auto_read_only,
        depth: if backing { depth + 1 } else { depth },
    }
}

/// What a node takes over from the parent that it is defined in, where nothing was given.
const INHERITED: [&[&str]; 5] = [
    &["read-only"],
    &["auto-read-only"],
    &["force-share"],
    &["discard"],
    &["cache", "cache.direct", "cache.no-flush"],
];

/// Fills in what was not given. Returns the names of options that were not.
pub(crate) fn inherit(options: &mut Options, i: Inherited) -> Vec<&'static str> {
    let missing = |group: &&&[&str]| !group.iter().any(|name| options.has(name));
    let free: Vec<&str> = INHERITED.iter().filter(missing).flat_map(|group| group.iter().copied()).collect();
    let is_free = |name: &str| free.contains(&name);
    if is_free("read-only") && i.flags.read_only {
        options.set("read-only", true);
    }
    if is_free("auto-read-only") && i.auto_read_only {
        options.set("auto-read-only", true);
    }
    let read_only = matches!(options.get("read-only"), Some(Value::Bool(true)))
        || matches!(options.get("read-only"), Some(Value::Str(s)) if s == "on" || s == "true");
    if is_free("force-share") && i.flags.force_share && read_only {
        options.set("force-share", true);
    }
    if is_free("discard") && i.flags.unmap {
        options.set("discard", "unmap");
    }
    if is_free("cache") {
        if i.flags.direct {
            options.set("cache.direct", true);
        }
        if i.flags.no_flush {
            options.set("cache.no-flush", true);
        }
    }
    free
}

/// Whether a name is of the form `protocol:rest` rather than a path.
pub fn has_protocol(name: &str) -> bool {
    match name.find(':') {
        Some(colon) => !name[..colon].contains('/'),
        None => false,
    }
}

/// The directory part of a file name, `.` if it has none.
fn directory(image: &str) -> &str {
    match image.rfind('/') {
        Some(0) => "/",
        Some(i) => &image[..i],
        None => ".",
    }
}

/// A name in an image is relative to the image's directory.
pub fn join(image: &str, name: &str) -> String {
    if name.starts_with('/') || has_protocol(name) {
        return name.to_owned();
    }
    match image.rfind('/') {
        Some(i) => format!("{}/{name}", &image[..i]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_images() {
        assert_eq!(join("/a/b/top.qcow2", "base.qcow2"), "/a/b/base.qcow2");
        assert_eq!(join("top.qcow2", "base.qcow2"), "base.qcow2");
        assert_eq!(join("d/top", "/abs"), "/abs");
        assert!(has_protocol("nbd://x"));
        assert!(has_protocol("json:{}"));
        assert!(!has_protocol("./a:b"));
        assert_eq!(directory("/x"), "/");
        assert_eq!(directory("x"), ".");
    }
}
