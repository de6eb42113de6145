//! A graph of one's own, for tools and for programs that use Dolmen as a library.
//!
//! A [`Session`] owns a graph in the caller's task; every image opened in it is an
//! operation of kind "tool" with an edge to the image's top node. An [`Image`] takes a
//! token per request, like any other user of the graph: there is no back door for tools.
//!
//! Files that an image names are opened as the [`OpenPolicy`] says. The default
//! ([`beneath`]) trusts no image: plain file names beneath the image's own directory,
//! and no guessing of formats.

use std::sync::Arc;

use dolmen_graph::{
    BackingName, ChainStatus, Duty, Graph, GraphEvent, GraphOwner, Implicit, NewImage, Node, NodeOpener,
    OpInfo, OpenPolicy, PROBE_BYTES, Prealloc, Registry, UserEdge, chain_status,
};
use dolmen_rt::{IoVec, Memory, Rt};
use dolmen_types::{
    Actions, Claim, Error, ErrorKind, NodeName, OpId, Options, ReadFlags, Result, ResultExt, Span, Value,
    WriteFlags,
};

use crate::spec;

/// The option of the native commands that permits opening what images name.
const PERMIT_WITH: &str = "--allow-backing=anything";
/// The option of the native commands that permits guessing formats.
const PROBE_WITH: &str = "-f auto";

/// The policy for images that a stranger or a guest could have written: plain file names
/// beneath the image's own directory, no guessing of formats.
pub const fn beneath() -> OpenPolicy {
    OpenPolicy { implicit: Implicit::Beneath, probe: false, permit_with: PERMIT_WITH, probe_with: PROBE_WITH }
}

/// The policy of QEMU's tools: everything that an image names is opened, and
/// formats are guessed.
pub const fn trusting() -> OpenPolicy {
    OpenPolicy { implicit: Implicit::Anything, probe: true, permit_with: PERMIT_WITH, probe_with: PROBE_WITH }
}

/// Reads, and lets others do what they like.
pub const READ: Claim = Claim { needs: Actions::D, allows: Actions::EVERY };
/// Reads and writes.
pub const WRITE: Claim = Claim { needs: Actions::D.with(Actions::V), allows: Actions::EVERY };
/// Reads, writes and changes the size.
pub const RESIZE: Claim =
    Claim { needs: Actions::D.with(Actions::V).with(Actions::S), allows: Actions::EVERY };
/// Everything, and nobody else may do anything: for filling a new file.
pub const EXCLUSIVE: Claim = Claim { needs: Actions::DATA, allows: Actions::NONE };

/// A graph of one's own. Close it with [`Session::close`]: dropping it leaves images
/// without their last flush.
#[derive(Debug)]
pub struct Session {
    owner: GraphOwner,
    registry: Registry,
    policy: OpenPolicy,
    rt: Rt,
    opened: u32,
}

impl Session {
    /// A session with no image, on the runtime of the calling task.
    pub fn new(rt: &Rt, registry: Registry, policy: OpenPolicy) -> Session {
        Session { owner: GraphOwner::new(rt.clone()), registry, policy, rt: rt.clone(), opened: 0 }
    }

    /// The drivers.
    pub fn registry(&self) -> Registry {
        self.registry
    }

    /// What may be opened.
    pub fn policy_mut(&mut self) -> &mut OpenPolicy {
        &mut self.policy
    }

    /// The current snapshot.
    pub fn graph(&self) -> Arc<Graph> {
        self.owner.graph()
    }

    /// The runtime.
    pub fn rt(&self) -> &Rt {
        &self.rt
    }

    /// The options that a name stands for; see [`spec::image`].
    ///
    /// # Errors
    /// What the parser says.
    pub fn named(&self, name: &str, format: Option<&str>) -> Result<Options> {
        spec::image(self.registry, name, format)
    }

    /// Opens an image with everything below it.
    ///
    /// # Errors
    /// What parsing, opening or the access control says. The session is as before.
    pub async fn open(&mut self, options: Options, claim: Claim) -> Result<Image> {
        self.open_image(options, claim, false).await
    }

    /// The same with an implicit copy-on-read node on the image: what is read from backing files is
    /// copied into it. The image must be writable.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub async fn open_copying(&mut self, options: Options, claim: Claim) -> Result<Image> {
        self.open_image(options, claim, true).await
    }

    fn opener<'a>(&self, rt: &'a Rt) -> NodeOpener<'a> {
        NodeOpener { registry: self.registry, policy: self.policy, names: spec::protocol_options, rt }
    }

    async fn open_image(&mut self, options: Options, claim: Claim, copying: bool) -> Result<Image> {
        let mut draft = self.owner.draft();
        let rt = self.rt.clone();
        let opener = self.opener(&rt);
        let node = opener.open(&mut draft, options, false).await?;
        let op = OpId::internal(format!("#image{}", self.opened));
        let writes = claim.needs.contains(Actions::V);
        draft.add_op(OpInfo {
            id: op.clone(),
            kind: "tool".into(),
            detail: if writes { "writable" } else { "read-only" }.into(),
            since: Some(self.rt.now()),
            ends_with: Some("close the image".into()),
            instead_of_writing: writes.then(|| "open the image read-only".into()),
        })?;
        if copying {
            let filter = Options::new()
                .with("driver", self.registry.on_duty(Duty::CopyOnRead)?.name)
                .with("file", node.as_str());
            let filter = opener.open_interposed(&mut draft, filter, &op).await?;
            draft.interpose_opened(&filter, "file", &node)?;
        }
        draft.add_user(&op, &node, claim)?;
        self.owner.commit(draft).await?;
        self.opened += 1;
        let edge = self.owner.edges(&op).next().expect("the commit made the edge").clone();
        Ok(Image { edge, op, node, rt: self.rt.clone() })
    }

    /// Whether the policy permits guessing formats.
    ///
    /// # Errors
    /// `PermissionDenied`, with the option that permits it.
    pub fn may_probe(&self) -> Result<()> {
        if self.policy.probe {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "the format was not given, and guessing it is unsafe on images that a guest could have written",
        )
        .remedy(format!("name the format (-f), or permit guessing: {}", self.policy.probe_with)))
    }

    /// The name of the format that the first bytes of `file` (a protocol's options) look
    /// like, whatever the policy says about guessing. Opens nothing but that file, for
    /// reading.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub async fn probe(&mut self, file: Options) -> Result<&'static str> {
        let image = self.open(file, READ).await?;
        let len = image.size().min(PROBE_BYTES);
        let memory = Memory::zeroed(len as usize);
        let read = if len > 0 { image.read(0, &memory.iovec(), ReadFlags::NONE).await } else { Ok(()) };
        let name = image.node().driver.describe(&image.node()).filename.unwrap_or_default();
        self.close_image(image).await?;
        read?;
        self.registry.probe(&memory.to_vec(), &name)
    }

    /// Closes an image, and with it the nodes that nobody else uses.
    ///
    /// # Errors
    /// What writing out the last state says.
    pub async fn close_image(&mut self, image: Image) -> Result<()> {
        let mut draft = self.owner.draft();
        draft.remove_op(&image.op);
        // With a filter of its own, the node has gone together with that.
        if draft.has_node(&image.node) {
            draft.remove_node(&image.node)?;
        }
        drop(image.edge);
        self.owner.commit(draft).await?;
        self.check_closed()
    }

    fn check_closed(&mut self) -> Result<()> {
        match self.owner.take_events().into_iter().next() {
            Some(GraphEvent::CloseFailed { node, error }) => {
                Err(error.context(format!("closing node '{node}'")))
            }
            None => Ok(()),
        }
    }

    /// What drivers noticed since it was last asked, as far as somebody has to be told.
    pub fn warnings(&mut self) -> Vec<String> {
        let notices = self.owner.notices();
        std::iter::from_fn(|| notices.take())
            .filter_map(|(name, n)| {
                let graph = self.graph();
                let node = graph.node(&name);
                n.warning(&node.map_or_else(|| name.to_string(), dolmen_graph::node_filename))
            })
            .collect()
    }

    /// Closes everything.
    ///
    /// # Errors
    /// The first failure; the rest is closed all the same.
    pub async fn close(mut self) -> Result<()> {
        self.owner.close().await
    }

    /// Makes a new image of `format` in the file, device or export that `filename` names. A file is replaced if it
    /// exists, unless somebody uses it. `options` are the format's and the file driver's create options, with
    /// `size`. Nothing is touched before everything has been checked; a file that this call has made is removed if it
    /// fails.
    ///
    /// # Errors
    /// As [`dolmen_graph::create_image`].
    pub async fn create(&mut self, filename: &str, format: &str, options: Options) -> Result<()> {
        let rt = self.rt.clone();
        let image = NewImage {
            file: spec::file(self.registry, filename)?,
            format: Some(format.to_owned()),
            options,
            beneath: None,
        };
        dolmen_graph::create_image(&self.opener(&rt), image).await
    }

    /// Makes sure that an image does not become its own backing file, directly or by way of others.
    ///
    /// # Errors
    /// `InvalidInput` when it would.
    pub async fn check_backing(&self, image: &Image, to: BackingName<'_>) -> Result<()> {
        self.opener(&self.rt).check_backing(&image.node(), to).await
    }
}

/// An open image: an edge into a [`Session`]'s graph. All offsets and lengths are bytes.
#[derive(Debug)]
pub struct Image {
    edge: Arc<UserEdge>,
    op: OpId,
    node: NodeName,
    rt: Rt,
}

impl Image {
    /// The edge, for exports and measurements.
    pub fn edge(&self) -> &Arc<UserEdge> {
        &self.edge
    }

    /// The top node in the current snapshot.
    pub fn node(&self) -> Arc<Node> {
        self.edge.node()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.edge.size()
    }

    /// The runtime of the image's session.
    pub fn rt(&self) -> &Rt {
        &self.rt
    }

    /// Reads `to.len()` bytes.
    ///
    /// # Errors
    /// `OutOfBounds`, or what the storage says.
    pub async fn read(&self, offset: u64, to: &IoVec, flags: ReadFlags) -> Result<()> {
        let token = self.edge.begin().await?;
        let span = token.check(offset, to.len() as u64)?;
        token.read(&self.rt)?.read(span, to, flags).await
    }

    /// Writes `from.len()` bytes.
    ///
    /// # Errors
    /// As [`Image::read`]; `PermissionDenied` when the image was opened for reading.
    pub async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let token = self.edge.begin().await?;
        let span = token.check(offset, from.len() as u64)?;
        token.write(&self.rt)?.write(span, from, flags).await
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Image::write`]; `Unsupported` with `NO_FALLBACK`.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        let token = self.edge.begin().await?;
        let span = token.check(offset, len)?;
        token.write(&self.rt)?.write_zeroes(span, flags).await
    }

    /// Gives the space of a range back, where that is possible.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let token = self.edge.begin().await?;
        let span = token.check(offset, len)?;
        token.write(&self.rt)?.discard(span, WriteFlags::NONE).await
    }

    /// Makes everything acknowledged so far durable. Nothing to do on an image that was
    /// opened for reading.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn flush(&self) -> Result<()> {
        let token = self.edge.begin().await?;
        if !self.edge.claim().needs.contains(Actions::V) {
            return Ok(());
        }
        token.write(&self.rt)?.flush().await
    }

    /// Changes the size; new bytes read as zeroes.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn resize(&self, size: u64, prealloc: Prealloc) -> Result<()> {
        let token = self.edge.begin().await?;
        token.resize(&self.rt)?.resize(size, prealloc).await
    }

    /// Where the start of a range lives in the chain.
    ///
    /// # Errors
    /// What reading metadata says.
    pub async fn status(&self, offset: u64, len: u64) -> Result<ChainStatus> {
        let token = self.edge.begin().await?;
        chain_status(token.node(), &self.rt, Span::new(offset, len), None).await
    }
}

/// Sets an option on the image that `options` describe if the driver has such an option.
pub fn set_if_known(registry: Registry, options: &mut Options, name: &str, value: impl Into<Value>) {
    let known = match options.get("driver") {
        Some(Value::Str(d)) => registry.find(d).is_ok_and(|k| k.options.iter().any(|o| o.name == name)),
        _ => false,
    };
    if known && !options.has(name) {
        options.set(name, value);
    }
}

/// Runs `f` on a runtime in this thread, as the environment configures it.
///
/// # Panics
/// When the runtime can't be set up.
pub fn run<T, F>(f: impl FnOnce(Rt) -> F) -> T
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    dolmen_rt::block_on(f)
}

/// Names the image in an error.
///
/// # Errors
/// The error, with "Could not open 'name'" before it.
pub fn opening<T>(result: Result<T>, name: &str) -> Result<T> {
    result.context(|| format!("Could not open '{name}'"))
}
