//! A small graph with real files under a user with a claim.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{Draft, GraphOwner, Implicit, NodeOpener, OpInfo, OpenPolicy, Registry, Token, UserEdge};
use dolmen_rt::{Config, CoreIo, EngineKind, Rt, block_on_with};
use dolmen_types::{Actions, Claim, NodeName, OpId, Options, Result};

/// Runs a test on both engines.
pub(crate) fn on_both<F, Fut>(test: F)
where
    F: Fn(World) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    for engine in [EngineKind::Threads, EngineKind::IoUring] {
        let config = Config::default().with_engine(engine);
        // Where io_uring is forbidden, the other engine is the one that counts.
        let _ = block_on_with(&config, |rt| test(World::new(rt)));
    }
}

pub(crate) struct World {
    pub(crate) rt: Rt,
    pub(crate) owner: GraphOwner,
    next: Rc<std::cell::Cell<u32>>,
}

impl World {
    pub(crate) fn new(rt: Rt) -> World {
        World { owner: GraphOwner::new(rt.clone()), rt, next: Rc::default() }
    }

    pub(crate) fn io(&self) -> CoreIo {
        self.rt.io().unwrap().clone()
    }

    /// Opens a node.
    pub(crate) async fn open(&mut self, options: Options) -> Result<NodeName> {
        let policy = OpenPolicy {
            implicit: Implicit::Deny,
            probe: false,
            permit_with: "nothing",
            probe_with: "nothing",
        };
        let rt = self.rt.clone();
        let opener = NodeOpener {
            registry: Registry::new(dolmen_protocols::DRIVERS),
            policy,
            names: Registry::protocol_name,
            rt: &rt,
        };
        let mut draft = self.owner.draft();
        let name = opener.open(&mut draft, options, true).await?;
        self.owner.commit(draft).await?;
        Ok(name)
    }

    /// Attaches a user that needs and allows these.
    pub(crate) async fn attach(
        &mut self,
        node: &str,
        needs: Actions,
        allows: Actions,
    ) -> Result<Arc<UserEdge>> {
        let (draft, id) = self.prepared(node, needs, allows).await?;
        self.owner.commit(draft).await?;
        let edge = self.owner.edges(&id).next().unwrap().clone();
        Ok(edge)
    }

    /// The draft of that, with its locks.
    pub(crate) async fn prepared(
        &self,
        node: &str,
        needs: Actions,
        allows: Actions,
    ) -> Result<(Draft, OpId)> {
        let n = self.next.get();
        self.next.set(n + 1);
        let id = OpId::parse(&format!("user{n}")).unwrap();
        let mut draft = self.owner.draft();
        draft.add_op(OpInfo {
            id: id.clone(),
            kind: "tool".into(),
            detail: "test".into(),
            since: None,
            ends_with: None,
            instead_of_writing: None,
        })?;
        draft.add_user(&id, node, Claim { needs, allows })?;
        draft.prepare(&self.rt).await?;
        Ok((draft, id))
    }

    /// Takes a user off again.
    pub(crate) async fn detach(&mut self, edge: &Arc<UserEdge>) {
        let mut draft = self.owner.draft();
        draft.remove_op(edge.op());
        self.owner.commit(draft).await.unwrap();
    }
}

/// A token for one request.
pub(crate) async fn token(edge: &Arc<UserEdge>) -> Token {
    edge.begin().await.unwrap()
}
