//! A small graph for a test: leaves made by the test, one stack on top of them, one user.

use std::sync::Arc;

use dolmen_graph::{
    AccessRule, ChildEdge, CreateCx, Draft, Driver, DriverKind, GraphOwner, Implicit, Node, NodeDef,
    NodeFlags, NodeOpener, OpInfo, OpenPolicy, Prealloc, Registry, Token, UserEdge,
};
use dolmen_rt::{Memory, Rt};
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, Options, ReadFlags, Result, Span, Value,
    WriteFlags,
};

/// A leaf that a test adds to the graph under a name.
#[derive(Debug)]
pub struct Leaf {
    /// Its node name.
    pub name: &'static str,
    /// The driver, shared with the test.
    pub driver: Arc<dyn Driver>,
    /// Whether the node is read-only.
    pub read_only: bool,
}

impl Leaf {
    /// A writable leaf.
    pub fn new(name: &'static str, driver: impl Driver) -> Leaf {
        Leaf { name, driver: Arc::new(driver), read_only: false }
    }

    /// A read-only leaf.
    pub fn read_only(name: &'static str, driver: impl Driver) -> Leaf {
        Leaf { name, driver: Arc::new(driver), read_only: true }
    }
}

/// A draft with nothing but these leaves.
fn with_leaves(rt: &Rt, leaves: Vec<Leaf>) -> Result<(GraphOwner, Draft)> {
    let owner = GraphOwner::new(rt.clone());
    let mut draft = owner.draft();
    for leaf in leaves {
        let name = NodeName::parse(leaf.name)?;
        draft.add_node(NodeDef {
            name: name.clone(),
            anonymous: false,
            kind: leaf.driver.kind(),
            rule: AccessRule::LEAF,
            flags: NodeFlags { read_only: leaf.read_only, unmap: true, ..NodeFlags::default() },
            owner: None,
            monitor: true,
            options: Value::Null,
        })?;
        draft.set_driver(&name, leaf.driver, false);
    }
    Ok((owner, draft))
}

/// Makes an image on an empty leaf.
///
/// # Errors
/// `Unsupported` when the driver can't make images, or what it says.
pub async fn create(rt: &Rt, kind: &DriverKind, leaf: Leaf, options: Options) -> Result<()> {
    let Some(create) = kind.create else {
        return Err(Error::new(ErrorKind::Unsupported, format!("'{}' can't make images", kind.name)));
    };
    let harness = Harness::on_leaf(rt, leaf, Actions::DATA).await?;
    let claim = harness.edge.claim();
    let file = ChildEdge { name: "file", role: ChildRole::Metadata, node: harness.top(), claim };
    create(options)?.make(CreateCx { file: Some(&file), fixed: false, rt }).await?;
    harness.close().await
}

/// A graph with one user, and the requests of that user.
#[derive(Debug)]
pub struct Harness {
    /// The owner of the graph.
    pub owner: GraphOwner,
    /// The user's edge.
    pub edge: Arc<UserEdge>,
    rt: Rt,
}

impl Harness {
    /// Opens a stack over the leaves and attaches a user to it that needs `needs` and
    /// allows everything.
    ///
    /// # Errors
    /// What opening or the access control says.
    pub async fn open(
        rt: &Rt,
        registry: Registry,
        leaves: Vec<Leaf>,
        options: Options,
        needs: Actions,
    ) -> Result<Harness> {
        let (owner, mut draft) = with_leaves(rt, leaves)?;
        let policy = OpenPolicy {
            implicit: Implicit::Deny,
            probe: false,
            permit_with: "nothing in a test",
            probe_with: "nothing in a test",
        };
        let opener = NodeOpener { registry, policy, names: Registry::protocol_name, rt };
        let top = opener.open(&mut draft, options, true).await?;
        Harness::attach(rt, owner, draft, &top, needs).await
    }

    /// Attaches a user to a leaf itself.
    ///
    /// # Errors
    /// What the access control says.
    pub async fn on_leaf(rt: &Rt, leaf: Leaf, needs: Actions) -> Result<Harness> {
        let name = NodeName::parse(leaf.name)?;
        let (owner, draft) = with_leaves(rt, vec![leaf])?;
        Harness::attach(rt, owner, draft, &name, needs).await
    }

    async fn attach(
        rt: &Rt,
        mut owner: GraphOwner,
        mut draft: Draft,
        node: &NodeName,
        needs: Actions,
    ) -> Result<Harness> {
        let op = OpId::internal("test");
        draft.add_op(OpInfo {
            id: op.clone(),
            kind: "tool".into(),
            detail: "a test".into(),
            since: Some(rt.now()),
            ends_with: None,
            instead_of_writing: None,
        })?;
        draft.add_user(&op, node, Claim { needs, allows: Actions::EVERY })?;
        owner.commit(draft).await?;
        let edge = owner.edges(&op).next().expect("just attached").clone();
        Ok(Harness { owner, edge, rt: rt.clone() })
    }

    /// The runtime.
    pub fn rt(&self) -> &Rt {
        &self.rt
    }

    /// The node the user is attached to.
    pub fn top(&self) -> Arc<Node> {
        self.edge.node()
    }

    /// A handle for requests from several tasks.
    pub fn user(&self) -> User {
        User { edge: self.edge.clone(), rt: self.rt.clone() }
    }

    /// Closes everything.
    ///
    /// # Errors
    /// What writing out says.
    pub async fn close(mut self) -> Result<()> {
        self.owner.close().await
    }
}

/// The requests of a test's user. Offsets and lengths in bytes.
#[derive(Clone, Debug)]
pub struct User {
    edge: Arc<UserEdge>,
    rt: Rt,
}

impl User {
    /// The requests of an edge that a test has got elsewhere.
    pub fn new(edge: Arc<UserEdge>, rt: Rt) -> User {
        User { edge, rt }
    }

    async fn token(&self) -> Result<Token> {
        self.edge.begin().await
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.edge.size()
    }

    /// Reads.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.read_with(offset, len, ReadFlags::NONE).await
    }

    /// Reads with flags.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn read_with(&self, offset: u64, len: usize, flags: ReadFlags) -> Result<Vec<u8>> {
        let token = self.token().await?;
        let span = token.check(offset, len as u64)?;
        let memory = Memory::zeroed(len);
        token.read(&self.rt)?.read(span, &memory.iovec(), flags).await?;
        Ok(memory.to_vec())
    }

    /// Writes.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn write(&self, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<()> {
        let token = self.token().await?;
        let span = token.check(offset, bytes.len() as u64)?;
        let memory = Memory::from_slice(bytes);
        token.write(&self.rt)?.write(span, &memory.iovec(), flags).await
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn write_zeroes(&self, span: Span, flags: WriteFlags) -> Result<()> {
        let token = self.token().await?;
        token.write(&self.rt)?.write_zeroes(token.check(span.offset(), span.len())?, flags).await
    }

    /// Discards.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn discard(&self, span: Span) -> Result<()> {
        let token = self.token().await?;
        token.write(&self.rt)?.discard(token.check(span.offset(), span.len())?, WriteFlags::NONE).await
    }

    /// Flushes.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn flush(&self) -> Result<()> {
        let token = self.token().await?;
        token.read(&self.rt)?.flush().await
    }

    /// Changes the size.
    ///
    /// # Errors
    /// What the stack says.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let token = self.token().await?;
        token.resize(&self.rt)?.resize(size, Prealloc::Off).await
    }
}
