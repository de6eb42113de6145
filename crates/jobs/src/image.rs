//! A new image file for a job that is told a file name: `drive-backup` with `mode=absolute-paths`.
//!
//! Making a file is nothing that a draft could take back, so it is not part of [`Work::begin`](crate::Work::begin):
//! whoever starts the job for real makes the image first.

use dolmen_graph::{ChildEdge, CreateCx, Draft, GraphOwner, NodeOpener, OpInfo};
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, Result, ResultExt};

/// What becomes the backing file of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// Nothing.
    None,
    /// The node that is copied.
    Source,
    /// Its own backing file.
    Backing,
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The node whose size it gets.
    pub(crate) device: String,
    /// Where.
    pub(crate) filename: String,
    /// Its format.
    pub(crate) format: String,
    pub(crate) below: Below,
}

impl NewImage {
    /// Makes it; an existing file of that name is overwritten, unless somebody uses it.
    ///
    /// # Errors
    /// `NotFound` for the node, `Unsupported` for a format that can't be made; what the drivers say.
    pub async fn make(&self, draft: &Draft, opener: &NodeOpener<'_>) -> Result<()> {
        let name = NodeName::internal(&self.device);
        let node = draft.built_node(&name)?;
        let size = node.size();
        let images = draft.images(&name);
        let below = match self.below {
            Below::None => None,
            Below::Source => images.first(),
            Below::Backing => images.get(1),
        };
        let unsupported = |what: &str| {
            Error::new(ErrorKind::Unsupported, format!("'{what}' can't make images"))
                .remedy("choose another format")
        };
        let rt = opener.rt;
        let file = opener.registry.find("file")?.create.ok_or_else(|| unsupported("file"))?;
        let raw = self.format == "raw";
        let length = if raw { size } else { 0 };
        let options = Options::new().with("filename", self.filename.as_str()).with("size", length);
        file(CreateCx { file: None, rt }, options).await?;
        if raw {
            return Ok(());
        }
        let kind = opener.registry.find(&self.format)?;
        let create = kind.create.ok_or_else(|| unsupported(kind.name))?;
        let mut options = Options::new().with("size", size);
        if let Some(below) = below {
            let format = draft.kind(below).map_or("raw", |k| k.name);
            options.set("backing_file", draft.filename(below).unwrap_or_default());
            options.set("backing_fmt", format);
        }
        // A graph of its own, so that nobody else sees the unfinished image.
        let mut owner = GraphOwner::new(rt.clone());
        let mut scratch = owner.draft();
        let leaf = Options::new().with("driver", "file").with("filename", self.filename.as_str());
        let leaf = opener.open(&mut scratch, leaf, true).await?;
        let op = OpId::internal("create");
        scratch.add_op(OpInfo {
            id: op.clone(),
            kind: "command".into(),
            detail: format!("creation of '{}'", self.filename),
            since: None,
            ends_with: None,
            instead_of_writing: None,
        })?;
        let needs = Actions::D | Actions::V | Actions::S;
        scratch.add_user(&op, &leaf, Claim { needs, allows: Actions::EVERY })?;
        owner.commit(scratch).await?;
        let made = match owner.edges(&op).next().cloned() {
            None => Err(Error::new(ErrorKind::NotFound, "the new file has no user")),
            Some(edge) => {
                let token = edge.begin().await?;
                let child = ChildEdge {
                    name: "file",
                    role: ChildRole::Metadata,
                    node: token.node().clone(),
                    claim: edge.claim(),
                };
                create(CreateCx { file: Some(&child), rt }, options).await
            }
        };
        let closed = owner.close().await;
        made.and(closed).context(|| format!("Could not create '{}'", self.filename))
    }
}
