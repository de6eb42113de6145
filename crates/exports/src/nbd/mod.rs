//! The NBD server: listens, negotiates, and serves exports from the graph.
//!
//! Owns sockets and connections; the protocol itself is the sans-I/O crate `dolmen-nbd`,
//! and every request goes through a token of the export's edge. A server lives on one
//! core. Its parts:
//!
//! - `export`: what is offered under a name, and what is true about it;
//! - `conn`: one client: reader, workers, sender, budget;
//! - `execute`: a permitted command becomes graph requests and a reply;
//! - `replies`: many replies become one send;
//! - `pool`: buffers of a connection.
//!
//! A client that misbehaves loses its own connection and nothing else: every limit is
//! per connection, and the number of connections is limited as well.

mod conn;
mod execute;
mod export;
mod pool;
mod replies;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dolmen_rt::{Addr, CoreIo, Listener, Rt, Stream};
use dolmen_types::{Error, ErrorKind, Result};

pub use export::NbdExport;
use export::{Export, Exports};

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
/// without waiting for them; [`NbdServer::shut_down`] is the orderly way.
#[derive(Debug)]
pub struct NbdServer {
    shared: Rc<Shared>,
    address: Addr,
}

#[derive(Debug)]
struct Shared {
    rt: Rt,
    config: NbdServerConfig,
    exports: Exports,
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

    /// Checks what clients are told about an export.
    ///
    /// # Errors
    /// `InvalidInput` for texts that the protocol can't carry.
    pub fn check_texts(name: &str, description: &str) -> Result<()> {
        export::check_texts(name, description)
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
            exports: Exports::default(),
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

    /// Offers an export.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken; `InvalidInput` or `PermissionDenied` when
    /// the export is not as [`NbdExport`] says.
    pub fn add_export(&self, export: NbdExport) -> Result<()> {
        export.check()?;
        if self.shared.exports.get(&export.name).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("NBD server already has an export named '{}'", export.name),
            ));
        }
        self.shared.exports.all.borrow_mut().push(Rc::new(Export::new(export)));
        Ok(())
    }

    /// Clients that use the export now; `None` when there is no such export.
    pub fn clients(&self, name: &str) -> Option<usize> {
        self.shared.exports.get(name).map(|e| e.connections.borrow().len())
    }

    /// Stops offering an export. With `hard` its clients are disconnected; either way it
    /// returns once no request to it is under way.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when clients use it and `hard` is not set: nothing has changed
    /// then.
    pub async fn remove_export(&self, name: &str, hard: bool) -> Result<()> {
        let Some(export) = self.shared.exports.get(name) else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no export named '{name}'")));
        };
        let clients = export.connections.borrow().len();
        if clients > 0 && !hard {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("export '{name}' still has {clients} client(s)"),
            )
            .remedy("disconnect them first, or remove the export in mode 'hard'"));
        }
        export.removed.set(true);
        self.shared.exports.all.borrow_mut().retain(|e| !Rc::ptr_eq(e, &export));
        drain(&export).await;
        Ok(())
    }

    /// Stops accepting, lets requests under way finish and be answered, disconnects
    /// everybody, and removes the Unix socket. Completes when that is done; it takes as
    /// long as the slowest request, and at most 5 seconds for clients that do not take
    /// their answers.
    pub async fn shut_down(self) {
        self.shared.exports.closing.set(true);
        self.shared.stopping.set(true);
        self.shared.notify();
        let all: Vec<_> = self.shared.exports.all.borrow().clone();
        // All at once, so that the patience with slow clients is not added up.
        for export in &all {
            export.connections.borrow().iter().for_each(|c| c.stop());
        }
        for export in &all {
            drain(export).await;
        }
        self.shared.until(|s| s.clients.get() == 0).await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.exports.closing.set(true);
        self.shared.stopping.set(true);
        for export in self.shared.exports.all.borrow().iter() {
            export.connections.borrow().iter().for_each(|c| c.stop());
        }
        self.shared.notify();
    }
}

fn io_of(rt: &Rt) -> Result<&CoreIo> {
    rt.io().ok_or_else(|| Error::new(ErrorKind::Unsupported, "the simulation has no sockets"))
}

/// Disconnects the clients of an export; completes when the last is gone.
async fn drain(export: &Export) {
    // A connection takes itself off the list, so look again after each.
    loop {
        let Some(conn) = export.connections.borrow().first().cloned() else { return };
        for c in export.connections.borrow().iter() {
            c.stop();
        }
        conn.ended().await;
        export.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &conn));
    }
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
    let work = until_stopping(&shared, conn::handshake(&stream, &mut receive, &shared.exports));
    let limit = shared.config.handshake_max;
    let negotiated =
        if limit.is_zero() { work.await } else { shared.rt.timeout(limit, work).await.flatten() };
    // Errors and broken rules of a client are its own affair: it is disconnected.
    if let Some(Ok(Some(session))) = negotiated
        && let Some(export) = shared.exports.get(&session.export.name)
        && !shared.stopping.get()
    {
        let conn = conn::Conn::new(shared.rt.clone(), export.clone(), session, stream);
        export.connections.borrow_mut().push(conn.clone());
        conn.serve(receive).await;
        export.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &conn));
    }
    shared.clients.set(shared.clients.get() - 1);
    shared.notify();
}
