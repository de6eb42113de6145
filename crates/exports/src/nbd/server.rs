//! The server itself: listens, accepts, and ends.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dolmen_rt::{Addr, CoreIo, Listener, Rt, Stream};
use dolmen_types::{Error, ErrorKind, Result};

use super::conn;
use super::execute::RequestCx;
use super::offer::{NbdExport, Offer, Offers};
use super::pool::Pool;
use crate::export::{Drained, Export, Server, StopMode};

/// How a server treats its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdServerConfig {
    /// Connections at one time; further clients wait to be accepted. 0 for no limit.
    pub max_connections: u32,
    /// A client that has not finished its negotiation by then is disconnected; zero for
    /// no limit.
    pub handshake_max: Duration,
}

impl Default for NbdServerConfig {
    /// 100 connections, 10 seconds.
    fn default() -> NbdServerConfig {
        NbdServerConfig { max_connections: 100, handshake_max: Duration::from_secs(10) }
    }
}

/// A running NBD server. Dropping it stops accepting and disconnects every client
/// without waiting for them; [`Server::stop`] is the orderly way.
#[derive(Debug)]
pub struct NbdServer {
    shared: Rc<Shared>,
    address: Addr,
}

#[derive(Debug)]
struct Shared {
    rt: Rt,
    config: NbdServerConfig,
    exports: Rc<Offers>,
    /// Connections, negotiating or not.
    clients: Cell<u32>,
    stopping: Cell<bool>,
    /// Wakes whoever waits for `stopping` or for a change of `clients`.
    waiting: RefCell<Vec<Waker>>,
}

impl Shared {
    fn wait(&self, cx: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
    }

    fn notify(&self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// Accepts no client any more and disconnects all at once, so that the patience with slow ones is not added up.
    fn end(&self) {
        self.exports.closing.set(true);
        self.stopping.set(true);
        self.exports.all().iter().for_each(|e| e.disconnect());
        self.notify();
    }

    /// Waits until `ready` says so, looking again after each [`Shared::notify`].
    async fn until(&self, ready: impl Fn(&Shared) -> bool) {
        poll_fn(|cx| {
            if ready(self) {
                return Poll::Ready(());
            }
            self.wait(cx);
            Poll::Pending
        })
        .await;
    }
}

impl NbdServer {
    /// Finds out whether a server could listen at `address`; leaves no trace there.
    ///
    /// # Errors
    /// As [`NbdServer::listen`].
    pub async fn check(rt: &Rt, address: &Addr) -> Result<()> {
        io_of(rt)?.check_listen(address).await
    }

    /// Listens at `address` and begins to accept clients.
    ///
    /// # Errors
    /// What the operating system says about the address; `Busy` when somebody listens on
    /// that Unix socket. A socket left over by a dead server is replaced.
    pub async fn listen(rt: &Rt, address: &Addr, config: NbdServerConfig) -> Result<NbdServer> {
        let listener = io_of(rt)?.listen(address).await?;
        let address = match address {
            Addr::Inet { host, port } => {
                Addr::Inet { host: host.clone(), port: listener.port().unwrap_or(*port) }
            }
            Addr::Unix(path) => Addr::Unix(path.clone()),
        };
        let shared = Rc::new(Shared {
            rt: rt.clone(),
            config,
            exports: Rc::default(),
            clients: Cell::new(0),
            stopping: Cell::new(false),
            waiting: RefCell::default(),
        });
        rt.spawn(accept_clients(shared.clone(), listener));
        Ok(NbdServer { shared, address })
    }

    /// Where it listens; with the real port when port 0 was asked for.
    pub fn address(&self) -> &Addr {
        &self.address
    }

    /// Makes an export, which is offered once it is started.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken; `InvalidInput` or `PermissionDenied` when
    /// the export is not as [`NbdExport`] says.
    pub fn export(&self, export: NbdExport) -> Result<Rc<dyn Export>> {
        export.check()?;
        if self.has(&export.name) {
            return Err(super::offer::taken(&export.name));
        }
        Ok(Rc::new(Exported { offers: self.shared.exports.clone(), offer: Offer::new(export) }))
    }

    /// Whether an export has this name; true until the last client of an export that was stopped is gone.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.shared.exports.has(name)
    }
}

impl Server for NbdServer {
    /// Stops accepting, lets requests in flight finish and be answered, disconnects
    /// all clients, and removes the Unix socket. Completes when that is done; it takes as
    /// long as the slowest request, and at most 5 seconds for clients that do not take
    /// their answers.
    fn stop(&self) -> Drained {
        self.shared.end();
        let shared = self.shared.clone();
        Box::pin(async move {
            for export in shared.exports.all() {
                export.drained().await;
            }
            shared.until(|s| s.clients.get() == 0).await;
        })
    }
}

/// An export at a server.
#[derive(Debug)]
struct Exported {
    offers: Rc<Offers>,
    offer: Rc<Offer>,
}

impl Export for Exported {
    fn start(&self) -> Result<()> {
        self.offers.add(self.offer.clone())
    }

    fn clients(&self) -> usize {
        self.offer.clients()
    }

    fn stop(&self, mode: StopMode) -> Result<Drained> {
        self.offers.stop(&self.offer, mode)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.end();
    }
}

fn io_of(rt: &Rt) -> Result<&CoreIo> {
    rt.io().ok_or_else(|| Error::new(ErrorKind::Unsupported, "the simulation has no sockets"))
}

async fn accept_clients(shared: Rc<Shared>, listener: Listener) {
    loop {
        let max = shared.config.max_connections;
        shared.until(|s| s.stopping.get() || max == 0 || s.clients.get() < max).await;
        let accepted = until_stopping(&shared, listener.accept()).await;
        match accepted {
            None => return,
            Some(Ok(stream)) => {
                shared.clients.set(shared.clients.get() + 1);
                shared.rt.spawn(client(shared.clone(), stream));
            }
            // Out of descriptors, or the client has gone already: not a reason to stop
            // serving. Wait a little, or an error that stays would keep the core busy.
            Some(Err(_)) => {
                let pause = shared.rt.sleep(Duration::from_millis(100));
                if until_stopping(&shared, pause).await.is_none() {
                    return;
                }
            }
        }
    }
}

/// Runs `work`; `None` when the server stops first.
async fn until_stopping<T>(shared: &Shared, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if shared.stopping.get() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(v) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(v));
        }
        shared.wait(cx);
        Poll::Pending
    })
    .await
}

async fn client(shared: Rc<Shared>, stream: Stream) {
    let mut receive = conn::Receive::new();
    let work = until_stopping(&shared, conn::handshake(&stream, &mut receive, &*shared.exports));
    let limit = shared.config.handshake_max;
    let negotiated =
        if limit.is_zero() { work.await } else { shared.rt.timeout(limit, work).await.flatten() };
    // Errors and broken rules of a client are its own affair: it is disconnected.
    if let Some(Ok(Some(session))) = negotiated
        && let Some(export) = shared.exports.get(&session.export.name)
        && !shared.stopping.get()
    {
        let request = RequestCx {
            rt: shared.rt.clone(),
            edge: export.config.edge.clone(),
            session,
            writethrough: export.config.writethrough,
            buffers: Pool::default(),
        };
        let conn = conn::Conn::new(request, stream);
        export.connections.borrow_mut().push(conn.clone());
        conn.serve(receive).await;
        export.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &conn));
    }
    shared.clients.set(shared.clients.get() - 1);
    shared.notify();
}
