//! A graph with disks, a server in a private directory, and tools run beside them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_exports::{Export, NbdExport, NbdServer, NbdServerConfig};
use dolmen_graph::{GraphOwner, Implicit, Node, NodeOpener, OpInfo, OpenPolicy, Registry, UserEdge};
use dolmen_rt::{Addr, Memory, Rt, block_on};
use dolmen_types::{Actions, Claim, OpId, Options, ReadFlags, Result, Span, WriteFlags};

use crate::memory::DRIVERS;

/// Longer than any test should take.
const TOO_LONG: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) rt: Rt,
    pub(crate) server: RefCell<Option<NbdServer>>,
    /// Those that were started, by their names.
    pub(crate) exports: RefCell<HashMap<String, Rc<dyn Export>>>,
    owner: RefCell<Option<GraphOwner>>,
    dir: tempfile::TempDir,
}

/// Runs a test on a runtime of its own.
pub(crate) fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Rc<Rig>) -> F + 'static) {
    run_with(NbdServerConfig::default(), test);
}

pub(crate) fn run_with<F: Future<Output = ()> + 'static>(
    config: NbdServerConfig,
    test: impl FnOnce(Rc<Rig>) -> F + 'static,
) {
    block_on(|rt| async move {
        let dir = tempfile::tempdir().unwrap();
        let address = Addr::Unix(dir.path().join("s"));
        let server = NbdServer::listen(&rt, &address, config).await.unwrap();
        let rig = Rc::new(Rig {
            rt: rt.clone(),
            server: RefCell::new(Some(server)),
            exports: RefCell::default(),
            owner: RefCell::new(Some(GraphOwner::new(rt.clone()))),
            dir,
        });
        rt.timeout(TOO_LONG, test(rig)).await.expect("the test takes too long");
    });
}

impl Rig {
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Makes a disk and an edge to it. The disk named `faulty` has faults.
    pub(crate) async fn disk(&self, name: &str, size: u64, writable: bool) -> Arc<UserEdge> {
        let mut owner = self.owner.borrow_mut().take().expect("one change at a time");
        let opener = NodeOpener {
            registry: Registry::new(DRIVERS),
            policy: OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" },
            names: Registry::protocol_name,
            rt: &self.rt,
        };
        let mut draft = owner.draft();
        let options = Options::new()
            .with("driver", "test-memory")
            .with("node-name", name)
            .with("size", size)
            .with("faults", name == "faulty")
            .with("discard", "unmap");
        opener.open(&mut draft, options, true).await.unwrap();
        let op = OpId::internal(format!("exp-{name}"));
        draft
            .add_op(OpInfo {
                id: op.clone(),
                kind: "export".into(),
                detail: "nbd".into(),
                since: None,
                ends_with: None,
                instead_of_writing: None,
            })
            .unwrap();
        let needs = if writable { Actions::D | Actions::V } else { Actions::D };
        draft.add_user(&op, name, Claim { needs, allows: Actions::DATA - Actions::S }).unwrap();
        owner.commit(draft).await.unwrap();
        let edge = owner.edges(&op).next().unwrap().clone();
        *self.owner.borrow_mut() = Some(owner);
        edge
    }

    /// Makes a disk and exports it under its name.
    pub(crate) async fn export(&self, name: &str, size: u64, writable: bool) -> Arc<UserEdge> {
        let edge = self.disk(name, size, writable).await;
        self.add(name, &edge, writable);
        edge
    }

    pub(crate) fn add(&self, name: &str, edge: &Arc<UserEdge>, writable: bool) {
        self.try_add(name, edge, writable).unwrap();
    }

    pub(crate) fn try_add(&self, name: &str, edge: &Arc<UserEdge>, writable: bool) -> Result<()> {
        let export = NbdExport {
            name: name.into(),
            description: format!("the disk {name}"),
            edge: edge.clone(),
            writable,
            writethrough: false,
        };
        let export = self.server.borrow().as_ref().expect("the server runs").export(export)?;
        export.start()?;
        self.exports.borrow_mut().insert(name.to_owned(), export);
        Ok(())
    }

    pub(crate) fn clients(&self, name: &str) -> usize {
        self.exports.borrow()[name].clients()
    }

    /// Runs a blocking function beside the runtime.
    pub(crate) async fn beside<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.rt.io().unwrap().blocking(dolmen_rt::WaitsFor::Host, f).await
    }

    /// Runs a tool; its output, whatever its exit code.
    pub(crate) async fn tool(&self, program: &str, args: &[&str]) -> Output {
        let mut c = Command::new(program);
        c.args(args).stdin(std::process::Stdio::null());
        let name = program.to_owned();
        self.beside(move || {
            c.output().unwrap_or_else(|e| panic!("{name}: {e} (see README for the packages)"))
        })
        .await
    }

    /// Runs a tool that must succeed; its standard output.
    pub(crate) async fn ok(&self, program: &str, args: &[&str]) -> String {
        let out = self.tool(program, args).await;
        assert!(
            out.status.success(),
            "{program} {args:?}: {}\n{}{}",
            out.status,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Reads from a disk, not through the server.
    pub(crate) async fn peek(&self, edge: &Arc<UserEdge>, offset: u64, len: usize) -> Vec<u8> {
        let token = edge.begin().await.unwrap();
        let m = Memory::zeroed(len);
        let span = Span::new(offset, len as u64);
        token.read(&self.rt).unwrap().read(span, &m.iovec(), ReadFlags::NONE).await.unwrap();
        m.to_vec()
    }

    /// Writes to a disk, not through the server.
    pub(crate) async fn poke(&self, edge: &Arc<UserEdge>, offset: u64, data: &[u8]) {
        let token = edge.begin().await.unwrap();
        let io = token.write(&self.rt).unwrap();
        io.write_bytes(offset, data, WriteFlags::NONE).await.unwrap();
    }

    /// Waits until something is so.
    pub(crate) async fn until(&self, what: impl Fn() -> bool) {
        while !what() {
            self.rt.sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn node(edge: &UserEdge) -> Arc<Node> {
        edge.node()
    }
}

/// Bytes that are different everywhere.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}
