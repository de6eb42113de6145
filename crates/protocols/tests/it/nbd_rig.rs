//! A graph with one NBD node, and servers of other people.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::{DriverKind, GraphOwner, Implicit, NodeOpener, OpInfo, OpenPolicy, Registry, UserEdge};
use dolmen_protocols::NBD;
use dolmen_rt::{Memory, Rt, block_on};
use dolmen_types::{Actions, Claim, OpId, Options, ReadFlags, Result, Span, WriteFlags};

static DRIVERS: &[&DriverKind] = &[&NBD];

/// Longer than any test should take.
const TOO_LONG: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) rt: Rt,
    dir: tempfile::TempDir,
}

/// Runs a test on a runtime of its own.
pub(crate) fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Rc<Rig>) -> F + 'static) {
    block_on(|rt| async move {
        let rig = Rc::new(Rig { rt: rt.clone(), dir: tempfile::tempdir().unwrap() });
        rt.timeout(TOO_LONG, test(rig)).await.expect("the test takes too long");
    });
}

/// A node in use.
pub(crate) struct Disk {
    owner: GraphOwner,
    pub(crate) edge: Arc<UserEdge>,
    rt: Rt,
}

/// A server that is ended with the test.
pub(crate) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Rig {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Options for an export at the socket `name`.
    pub(crate) fn options(&self, name: &str, export: &str) -> Options {
        let server = Options::new().with("type", "unix").with("path", self.path(name).to_str().unwrap());
        Options::new()
            .with("driver", "nbd")
            .with("server", server.into_value())
            .with("export", export)
            .with("discard", "unmap")
    }

    /// Starts a server and waits until it listens at the socket `name`.
    pub(crate) async fn server(&self, name: &str, program: &str, args: &[&str]) -> Server {
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e} (see README for the packages)"));
        let mut server = Server(child);
        let path = self.path(name);
        while UnixStream::connect(&path).is_err() {
            let ended = server.0.try_wait().unwrap();
            assert!(ended.is_none(), "{program} {args:?}: {}", ended.unwrap());
            self.rt.sleep(Duration::from_millis(5)).await;
        }
        server
    }

    /// `qemu-nbd` for a raw file.
    pub(crate) async fn qemu_nbd(&self, name: &str, file: &str, more: &[&str]) -> Server {
        let socket = self.path(name);
        let file = self.path(file);
        let mut args = vec!["-k", socket.to_str().unwrap(), "-t", "-e", "8", "-f", "raw", "-x", "e"];
        args.extend(["--discard=unmap", "--detect-zeroes=off"]);
        args.extend(more);
        args.push(file.to_str().unwrap());
        self.server(name, "qemu-nbd", &args).await
    }

    /// `nbdkit` with a disk in memory.
    pub(crate) async fn nbdkit(&self, name: &str, args: &[&str]) -> Server {
        let socket = self.path(name);
        let mut all = vec!["-f", "-U", socket.to_str().unwrap()];
        all.extend(args);
        self.server(name, "nbdkit", &all).await
    }

    /// Opens a node and attaches a user to it.
    pub(crate) async fn open(&self, options: Options, needs: Actions) -> Result<Disk> {
        let mut owner = GraphOwner::new(self.rt.clone());
        let opener = NodeOpener {
            registry: Registry::new(DRIVERS),
            policy: OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" },
            names: Registry::protocol_name,
            rt: &self.rt,
        };
        let mut draft = owner.draft();
        let node = opener.open(&mut draft, options, true).await?;
        let op = OpId::internal("test");
        draft.add_op(OpInfo {
            id: op.clone(),
            kind: "tool".into(),
            detail: "test".into(),
            since: None,
            ends_with: None,
            instead_of_writing: None,
        })?;
        draft.add_user(&op, &node, Claim { needs, allows: Actions::DATA })?;
        owner.commit(draft).await?;
        let edge = owner.edges(&op).next().unwrap().clone();
        Ok(Disk { owner, edge, rt: self.rt.clone() })
    }

    /// Opens a node for reading and writing.
    pub(crate) async fn rw(&self, options: Options) -> Result<Disk> {
        self.open(options, Actions::D | Actions::V).await
    }
}

impl Disk {
    pub(crate) fn size(&self) -> u64 {
        self.edge.node().size()
    }

    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let token = self.edge.begin().await?;
        let m = Memory::zeroed(len);
        m.share().fill(0xcc);
        let span = Span::new(offset, len as u64);
        token.read(&self.rt)?.read(span, &m.iovec(), ReadFlags::NONE).await?;
        Ok(m.to_vec())
    }

    pub(crate) async fn write(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<()> {
        let token = self.edge.begin().await?;
        token.write(&self.rt)?.write_bytes(offset, data, flags).await
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        let token = self.edge.begin().await?;
        token.write(&self.rt)?.write_zeroes(Span::new(offset, len), flags).await
    }

    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let token = self.edge.begin().await?;
        token.write(&self.rt)?.discard(Span::new(offset, len), WriteFlags::NONE).await
    }

    pub(crate) async fn flush(&self) -> Result<()> {
        let token = self.edge.begin().await?;
        token.read(&self.rt)?.flush().await
    }

    /// Length and "zero, data" at an offset.
    pub(crate) async fn status(&self, offset: u64) -> Result<(u64, bool, bool)> {
        let token = self.edge.begin().await?;
        let span = Span::from_range(offset, token.size());
        let s = dolmen_graph::chain_status(token.node(), &self.rt, span, None).await?;
        Ok((s.len, s.zero, s.data))
    }

    pub(crate) async fn close(self) {
        self.try_close().await.unwrap();
    }

    pub(crate) async fn try_close(mut self) -> Result<()> {
        drop(self.edge);
        self.owner.close().await
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

/// Runs futures side by side; their results in order.
pub(crate) async fn join<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    use std::task::Poll;
    let mut running: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (f, out) in &mut running {
            if out.is_none() {
                match f.as_mut().poll(cx) {
                    Poll::Ready(v) => *out = Some(v),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().map(|(_, out)| out.unwrap()).collect()
}
