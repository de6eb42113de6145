//! Making new images: whatever makes one (tools, snapshots, jobs with a target by name) does it here, in two steps.
//!
//! [`ImageMaker::check`] finds out everything that could be wrong: options, limits of the format, the kind of file, its
//! locks, whether the image would be its own backing file. It touches nothing; a file that is there is kept
//! open and locked, so that what was found stays true. [`ImageMaker::make`] then touches the file. It remembers
//! whether there was one before: [`ImageMaker::undo`] removes only what this maker has made.
//!
//! A change of a graph that needs a new image puts a stand-in into its draft ([`Opener::open_new`](crate::NodeOpener)):
//! all that the draft can be refused for is found with no file touched. Publishing the draft makes the files, those
//! that are not there yet first, because these can be removed again. What can remain of a change that fails
//! after that (a full disk, a flush that fails, a request that does not end): a file that was there is
//! empty or holds the new image.

use std::path::PathBuf;
use std::sync::Arc;

use dolmen_rt::Rt;
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, ResultExt, Value,
    text_of_os,
};

use crate::place::{self, FileId, Place};
use crate::stand_in::StandIn;
use crate::{
    ChildEdge, Common, CreateCx, Creation, Description, Draft, DriverKind, GraphOwner, Implicit, Io, Node,
    NodeDef, NodeOpener, OpInfo, OpenCx, OpenPolicy, Prealloc, Registry, Resize, join,
};

/// Nothing that the old content may name is looked at.
const NOTHING_IMPLICIT: OpenPolicy =
    OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };

/// An image that somebody wants.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The node that is to hold it, without its format: `{driver: file, filename: ...}`.
    pub file: Options,
    /// The format; `None` makes nothing but the file.
    pub format: Option<String>,
    /// Options for making it, of the format and of the protocol; `size` in bytes.
    pub options: Options,
    /// The open node that its backing file option names, if there is one: its chain need not be opened again.
    pub beneath: Option<Arc<Node>>,
}

/// The file that it goes into.
enum Target {
    /// Not there yet.
    Absent { path: PathBuf, make: Box<dyn Creation> },
    /// Open, and nobody else's, in a graph of its own.
    Present { owner: Box<GraphOwner>, id: Option<FileId>, description: Box<Description> },
}

/// An image that can be made as far as can be known before its file is touched.
pub struct ImageMaker {
    /// For messages.
    name: String,
    registry: Registry,
    format: Option<&'static DriverKind>,
    protocol: &'static DriverKind,
    creation: Box<dyn Creation>,
    file: Options,
    target: Option<Target>,
    /// What this maker has made.
    made: Option<(PathBuf, FileId)>,
}

impl std::fmt::Debug for ImageMaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ImageMaker({} in '{}')", self.format.map_or("file", |k| k.name), self.name)
    }
}

fn unsupported(who: &str, name: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{who} driver '{name}' does not support image creation"))
}

/// The operation under which an image is filled in a graph of its own.
fn filling() -> OpId {
    OpId::internal("create")
}

impl ImageMaker {
    /// Finds out whether an image can be made.
    ///
    /// # Errors
    /// `Unsupported` when the format can't be made; `InvalidInput` and `Limit` for its options; `Locked`, `NotFound`,
    /// `PermissionDenied` for its file; `InvalidInput` for an image that would be its own backing file.
    pub async fn check(opener: &NodeOpener<'_>, image: NewImage) -> Result<ImageMaker> {
        let NewImage { file, format, mut options, beneath } = image;
        let rt = opener.rt;
        let format = format.map(|f| opener.registry.find(&f)).transpose()?;
        let parse = format.map(|k| k.create.ok_or_else(|| unsupported("Format", k.name))).transpose()?;
        let text = |name: &str| match file.get(name) {
            Some(Value::Str(s)) => Some(s.clone()),
            _ => None,
        };
        let protocol = opener.registry.find(&text("driver").unwrap_or_default())?;
        let filename = text("filename").map(|f| f.strip_prefix("file:").map_or(f.clone(), str::to_owned));
        let name = filename.clone().unwrap_or_else(|| file.clone().into_value().to_string());
        let (creation, of_file) = match (format, parse) {
            (Some(format), Some(parse)) => {
                let mut of_file = Options::new().with("size", 0u64);
                for spec in protocol.create_options.iter().filter(|s| s.name != "filename") {
                    if !format.create_options.iter().any(|s| s.name == spec.name)
                        && let Some(v) = options.take(spec.name)
                    {
                        of_file.set(spec.name, v);
                    }
                }
                (parse(options)?, of_file)
            }
            _ => {
                let make = protocol.create.ok_or_else(|| unsupported("Protocol", protocol.name))?;
                (make(options.clone().with("filename", name.as_str()))?, options)
            }
        };
        let place = match (&filename, protocol.path.is_some()) {
            (Some(f), true) => {
                place::place_in(rt, f).await.context(|| format!("Could not create '{name}'"))?
            }
            _ => None,
        };
        let target = match (place, protocol.create) {
            (Some(Place::Absent(path)), Some(make)) => {
                place::check_absent(rt, &path).await.context(|| format!("Could not create '{name}'"))?;
                // Under the name without links: that one is made, and removed again.
                let make = make(of_file.with("filename", text_of_os(path.as_os_str())))?;
                Target::Absent { path, make }
            }
            (Some(Place::Absent(_)), None) => {
                return Err(Error::from_errno(2, format!("Could not open '{name}'"))
                    .remedy("a device can't be made by writing an image"));
            }
            (place, make) => {
                if let Some(make) = make {
                    make(of_file.with("filename", name.as_str()))?;
                }
                open_target(opener, &name, &file, place).await?
            }
        };
        let registry = opener.registry;
        let maker =
            ImageMaker { name, registry, format, protocol, creation, file, target: Some(target), made: None };
        maker.check_room()?;
        maker.check_loop(opener, beneath.as_ref()).await?;
        Ok(maker)
    }

    /// A device, or an export, must be large enough as it is.
    fn check_room(&self) -> Result<()> {
        let (Some(Target::Present { owner, .. }), true) = (&self.target, self.is_fixed()) else {
            return Ok(());
        };
        let (has, needs) =
            (owner.edges(&filling()).next().map_or(0, |e| e.node().size()), self.creation.room());
        check_room(has, needs).context(|| format!("Could not create '{}'", self.name))
    }

    async fn check_loop(&self, opener: &NodeOpener<'_>, beneath: Option<&Arc<Node>>) -> Result<()> {
        let (Some(backing), Some(own)) = (self.creation.backing(), self.place()) else { return Ok(()) };
        let found = match beneath {
            Some(node) => opener.open_chain_has(node, &own).await,
            None => {
                let full = join(&self.name, backing.name);
                opener.chain_has(&full, backing.format, &own).await
            }
        };
        match found {
            true => Err(loops(&self.name, backing.name)),
            false => Ok(()),
        }
    }

    /// Where it goes, if that is a file of this host.
    pub(crate) fn place(&self) -> Option<Place> {
        match &self.target {
            Some(Target::Absent { path, .. }) => Some(Place::Absent(path.clone())),
            Some(Target::Present { id, .. }) => id.map(Place::Present),
            None => None,
        }
    }

    fn is_fixed(&self) -> bool {
        self.protocol.create.is_none()
    }

    /// Makes the image. To be called once; if it fails, or what comes after it does, [`ImageMaker::undo`] takes away
    /// what was made.
    ///
    /// # Errors
    /// Input and output; `AlreadyExists` when somebody else has made the file meanwhile.
    pub async fn make(&mut self, rt: &Rt) -> Result<()> {
        let made = self.make_now(rt).await;
        made.context(|| format!("Could not create '{}'", self.name))
    }

    async fn make_now(&mut self, rt: &Rt) -> Result<()> {
        let mut owner = match self.target.take() {
            None => return Err(Error::new(ErrorKind::InvalidInput, "it has been made already")),
            Some(Target::Present { owner, .. }) => *owner,
            Some(Target::Absent { path, make }) => {
                make.make(CreateCx { file: None, fixed: false, rt }).await?;
                let found = place::place_in(rt, &text_of_os(path.as_os_str())).await;
                if let Ok(Some(Place::Present(id))) = found {
                    self.made = Some((path, id));
                }
                let mut owner = GraphOwner::new(rt.clone());
                let opener = NodeOpener {
                    registry: self.registry,
                    policy: NOTHING_IMPLICIT,
                    names: Registry::protocol_name,
                    rt,
                };
                attach(&mut owner, &opener, &self.name, &self.file).await?;
                owner
            }
        };
        let made = self.fill(&owner, rt).await;
        made.and(owner.close().await)
    }

    async fn fill(&self, owner: &GraphOwner, rt: &Rt) -> Result<()> {
        let op = filling();
        let user = owner
            .edges(&op)
            .next()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the new file has no user"))?;
        let edge =
            ChildEdge { name: "file", role: ChildRole::Metadata, node: user.node(), claim: user.claim() };
        let cx = CreateCx { file: Some(&edge), fixed: self.is_fixed(), rt };
        // To the byte: it may have to be restored.
        let has = edge.node.driver.size(&edge.node);
        if !cx.fixed && has > 0 {
            let file = cx.resize()?;
            find_room(file, has, self.creation.space(), self.creation.room()).await?;
            file.resize(0, Prealloc::Off).await?;
        }
        self.creation.make(cx).await
    }

    /// Removes the file if this maker has made it. What was there before stays, with whatever it holds now.
    pub async fn undo(&mut self, rt: &Rt) {
        let Some((path, id)) = self.made.take() else { return };
        match rt.io() {
            Some(io) => io.blocking_at(&path.clone(), move || place::remove(&path, id)).await,
            None => place::remove(&path, id),
        }
    }

    /// Makes the image in memory, as the content of a stand-in.
    async fn stand_in(&self, rt: &Rt) -> Result<std::sync::Arc<StandIn>> {
        let (description, size) = match &self.target {
            Some(Target::Present { owner, description, .. }) if self.is_fixed() => {
                ((**description).clone(), owner.edges(&filling()).next().map_or(0, |e| e.node().size()))
            }
            Some(Target::Present { description, .. }) => ((**description).clone(), 0),
            _ => (Description { filename: Some(self.name.clone()), ..Description::default() }, 0),
        };
        let driver = std::sync::Arc::new(StandIn::new(self.protocol, description, size));
        let mut owner = GraphOwner::new(rt.clone());
        let mut draft = owner.draft();
        let name = draft.fresh_name();
        draft.add_node(NodeDef {
            name: name.clone(),
            anonymous: true,
            kind: self.protocol,
            rule: crate::AccessRule::LEAF,
            flags: crate::NodeFlags::default(),
            owner: None,
            monitor: true,
            options: Value::Null,
        })?;
        draft.set_driver(&name, driver.clone(), false);
        use_alone(&mut draft, &name, &self.name)?;
        owner.commit(draft).await?;
        let op = filling();
        let user = owner
            .edges(&op)
            .next()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the stand-in has no user"))?;
        let edge =
            ChildEdge { name: "file", role: ChildRole::Metadata, node: user.node(), claim: user.claim() };
        let cx = CreateCx { file: Some(&edge), fixed: self.is_fixed(), rt };
        self.creation.make(cx).await.context(|| format!("Could not create '{}'", self.name))?;
        owner.close().await?;
        Ok(driver)
    }
}

/// Makes sure that a file can become as long as an image, and that the disk has space for what is written at once: as
/// long as the file still holds what it held, which stays if not.
async fn find_room(file: Io<'_, Resize>, has: u64, space: u64, room: u64) -> Result<()> {
    if space > has {
        match file.resize(space, Prealloc::Falloc).await {
            Err(e) if e.kind() != ErrorKind::Unsupported => return Err(e),
            Ok(()) | Err(_) => {}
        }
    }
    if room > has.max(space)
        && let Err(e) = file.resize(room, Prealloc::Off).await
    {
        // The first error is the one that matters.
        let _ = file.resize(has, Prealloc::Off).await;
        return Err(e);
    }
    Ok(())
}

/// Makes sure that a file that can't grow has room for an image.
///
/// # Errors
/// `NoSpace`.
pub fn check_room(has: u64, needs: u64) -> Result<()> {
    if has >= needs {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NoSpace, format!("it has {has} bytes, and the image needs {needs}"))
        .remedy("name a larger device, or make the image smaller"))
}

/// The refusal of an image that would be found below itself.
pub(crate) fn loops(image: &str, backing: &str) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("'{backing}' can't be the backing file of '{image}': it is the same file, or lies over it"),
    )
    .remedy("name an image whose chain of backing files does not lead to this one")
}

async fn open_target(
    opener: &NodeOpener<'_>,
    name: &str,
    file: &Options,
    place: Option<Place>,
) -> Result<Target> {
    let mut owner = GraphOwner::new(opener.rt.clone());
    let opener = NodeOpener { policy: NOTHING_IMPLICIT, ..*opener };
    let description =
        attach(&mut owner, &opener, name, file).await.context(|| format!("Could not create '{name}'"))?;
    let id = match place {
        Some(Place::Present(id)) => Some(id),
        _ => description.file,
    };
    Ok(Target::Present { owner: Box::new(owner), id, description: Box::new(description) })
}

/// Opens the file in a graph of its own, for one user that shares it with nobody.
async fn attach(
    owner: &mut GraphOwner,
    opener: &NodeOpener<'_>,
    name: &str,
    file: &Options,
) -> Result<Description> {
    let mut draft = owner.draft();
    let mut leaf = file.clone();
    // The name is the graph's that it is made for.
    leaf.take("node-name");
    let node = opener.open(&mut draft, leaf, true).await?;
    use_alone(&mut draft, &node, name)?;
    owner.commit(draft).await?;
    let graph = owner.graph();
    let node = graph.node(&node).ok_or_else(|| crate::draft::no_such_node(&node))?;
    Ok(node.driver.describe(node))
}

fn use_alone(draft: &mut Draft, node: &NodeName, name: &str) -> Result<()> {
    let op = filling();
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "command".into(),
        detail: format!("creation of '{name}'"),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    draft.add_user(&op, node, Claim { needs: Actions::DATA, allows: Actions::NONE })
}

/// Makes a new image in a file by name, and removes the file if that fails, unless it was there before.
///
/// # Errors
/// As [`ImageMaker::check`] and [`ImageMaker::make`].
pub async fn create_image(opener: &NodeOpener<'_>, image: NewImage) -> Result<()> {
    let mut maker = ImageMaker::check(opener, image).await?;
    let made = maker.make(opener.rt).await;
    if made.is_err() {
        maker.undo(opener.rt).await;
    }
    made
}

/// An image of a draft that is made when the draft is published.
pub(crate) struct Pending {
    leaf: NodeName,
    maker: ImageMaker,
}

impl NodeOpener<'_> {
    /// Opens an image that is yet to be made, with everything checked and nothing touched: publishing the draft makes
    /// it. `options` are the node's, without `driver` and `file`.
    ///
    /// # Errors
    /// As [`ImageMaker::check`] and [`NodeOpener::open`]; `Busy` when a node of the draft is the same file.
    pub async fn open_new(&self, draft: &mut Draft, image: NewImage, options: Options) -> Result<NodeName> {
        let format = image.format.clone().unwrap_or_else(|| crate::RAW_FORMAT.to_owned());
        let maker = ImageMaker::check(self, image).await?;
        if let Some(node) = draft.node_of(&maker)? {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("Could not create '{}': it is the file of node '{node}'", maker.name),
            )
            .remedy("name another file, or remove that node first (blockdev-del)"));
        }
        let driver = maker.stand_in(self.rt).await?;
        let mut leaf_options = maker.file.clone();
        let mut peek = options.clone();
        let above = Common::take(&mut peek)?;
        let inherited = crate::open::below(&above, crate::AccessRule::FORMAT, ChildRole::Metadata, 0);
        let inherits = crate::open::inherit(&mut leaf_options, inherited);
        let described = leaf_options.clone().into_value();
        let common = Common::take(&mut leaf_options)?;
        let leaf = common.node_name.clone().unwrap_or_else(|| draft.fresh_name());
        draft.add_node(NodeDef {
            name: leaf.clone(),
            anonymous: common.node_name.is_none(),
            kind: maker.protocol,
            rule: crate::AccessRule::LEAF,
            flags: common.flags,
            owner: None,
            monitor: false,
            options: described,
        })?;
        draft.set_inherited(&leaf, inherits);
        draft.set_driver(&leaf, driver, false);
        draft.new_images.push(Pending { leaf: leaf.clone(), maker });
        self.open(draft, options.with("driver", format).with("file", leaf.as_str()), false).await
    }
}

impl Draft {
    /// The node whose file a maker would overwrite.
    fn node_of(&self, maker: &ImageMaker) -> Result<Option<NodeName>> {
        let Some(place) = maker.place() else { return Ok(None) };
        let pending = self.new_images.iter().find(|p| p.maker.place().as_ref() == Some(&place));
        if let Some(p) = pending {
            return Ok(Some(p.leaf.clone()));
        }
        let Place::Present(id) = place else { return Ok(None) };
        let holds = |node: &Arc<Node>| node.driver.describe(node).file == Some(id);
        let mine = self.solved()?.nodes.values().find(|n| holds(n)).map(|n| n.name.clone());
        Ok(mine.or_else(|| self.base.holder_of(id, |part| self.taken.contains_key(&part)).cloned()))
    }

    /// Makes the files of the draft's new images and puts their drivers in the places of the stand-ins. Files that are
    /// not there yet come first: they can be removed again.
    ///
    /// # Errors
    /// Input and output. [`Draft::unmake`] takes away what was made by then.
    pub(crate) async fn make_images(&mut self, rt: &Rt) -> Result<()> {
        let mut pending = std::mem::take(&mut self.new_images);
        pending.retain(|p| self.has_node(&p.leaf));
        pending.sort_by_key(|p| matches!(p.maker.target, Some(Target::Present { .. })));
        for Pending { leaf, mut maker } in pending {
            let made = maker.make(rt).await;
            self.made.extend(maker.made.take());
            made?;
            let mut options = Options::from_value(self.options_of(&leaf))?;
            options.take("driver");
            let common = Common::take(&mut options)?;
            let parsed = (maker.protocol.parse)(&mut options, &common)?;
            let cx = OpenCx { name: &leaf, children: &[], common: &common, replaces: None, rt };
            let opened = parsed.open.open(cx).await?;
            self.put_opened(&leaf, opened, false);
            // The stand-in took no locks.
            self.state.told.remove(&leaf);
        }
        Ok(())
    }

    /// Removes the files that were made for the draft, in reverse order.
    pub(crate) async fn unmake(&mut self, rt: &Rt) {
        let made = std::mem::take(&mut self.made);
        if made.is_empty() {
            return;
        }
        for (path, id) in made.into_iter().rev() {
            match rt.io() {
                Some(io) => io.blocking_at(&path.clone(), move || place::remove(&path, id)).await,
                None => place::remove(&path, id),
            }
        }
    }
}
