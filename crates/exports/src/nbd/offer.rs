//! What the server offers under a name, and what is true about it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::UserEdge;
use dolmen_nbd::consts::TransmissionFlags;
use dolmen_nbd::{Catalog, ExportInfo, limits};
use dolmen_types::{Actions, Error, ErrorKind, Result};

use super::conn::Conn;
use crate::export::{Drained, StopMode};

/// Block size that clients should prefer, in bytes: a page, which every node handles
/// well. Larger clusters do not make small requests slow enough to say more.
const PREFERRED_BLOCK: u32 = 4096;

/// An export to be offered.
#[derive(Debug)]
pub struct NbdExport {
    /// The name that clients ask for; at most 4096 bytes, may be empty.
    pub name: String,
    /// For humans; at most 4096 bytes, empty for none.
    pub description: String,
    /// The edge that its requests go over. Needs D, and V when `writable`.
    pub edge: Arc<UserEdge>,
    /// Clients may change it.
    pub writable: bool,
    /// Every write is durable before its reply.
    pub writethrough: bool,
}

impl NbdExport {
    /// Checks names and grants.
    pub(crate) fn check(&self) -> Result<()> {
        check_texts(&self.name, &self.description)?;
        let needs = if self.writable { Actions::D | Actions::V } else { Actions::D };
        if !self.edge.claim().needs.contains(needs) {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("'{}' was not granted what an NBD export needs", self.edge.op()),
            ));
        }
        Ok(())
    }
}

/// Checks what clients are told.
pub(crate) fn check_texts(name: &str, description: &str) -> Result<()> {
    for (what, text) in [("name", name), ("description", description)] {
        if text.len() > limits::MAX_STRING || text.contains('\0') {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the {what} of an NBD export has at most {} bytes and no NUL", limits::MAX_STRING),
            ));
        }
    }
    Ok(())
}

pub(crate) fn taken(name: &str) -> Error {
    Error::new(ErrorKind::AlreadyExists, format!("NBD server already has export named '{name}'"))
}

/// An export of a server, offered once it is started.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) config: NbdExport,
    /// Connections in the transmission phase.
    pub(crate) connections: RefCell<Vec<Rc<Conn>>>,
    /// No longer offered.
    removed: Cell<bool>,
}

impl Offer {
    pub(crate) fn new(config: NbdExport) -> Rc<Offer> {
        Rc::new(Offer { config, connections: RefCell::default(), removed: Cell::new(false) })
    }

    pub(crate) fn clients(&self) -> usize {
        self.connections.borrow().len()
    }

    /// Ends every connection in an orderly way.
    pub(crate) fn disconnect(&self) {
        self.connections.borrow().iter().for_each(|c| c.stop());
    }

    /// Completes when the last connection is gone.
    pub(crate) async fn drained(&self) {
        // A connection takes itself off the list, so look again after each.
        loop {
            let Some(conn) = self.connections.borrow().first().cloned() else { return };
            self.disconnect();
            conn.ended().await;
            self.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &conn));
        }
    }

    /// What the handshake says about it, true at this moment.
    fn info(&self) -> ExportInfo {
        use TransmissionFlags as T;
        let node = self.config.edge.node();
        let facts = node.driver.limits(&node);
        let w = self.config.writable;
        // All connections go to one node, so a flush covers what any of them wrote.
        let flags = T::HAS_FLAGS
            .with(T::CAN_MULTI_CONN)
            .with(T::SEND_FLUSH)
            .with(T::SEND_CACHE)
            .with_if(!w, T::READ_ONLY)
            .with_if(w, T::SEND_FUA)
            .with_if(w, T::SEND_TRIM)
            .with_if(w, T::SEND_WRITE_ZEROES)
            .with_if(w && facts.fast_zeroes, T::SEND_FAST_ZERO);
        ExportInfo {
            name: self.config.name.clone(),
            description: self.config.description.clone(),
            size: self.config.edge.size(),
            flags,
            min_block: 1,
            preferred_block: facts.request_alignment.clamp(PREFERRED_BLOCK, 1 << 20),
            max_block: limits::MAX_PAYLOAD,
        }
    }
}

/// The exports of a server. A name is taken until the last client is gone, also of an export that is no longer offered.
#[derive(Debug, Default)]
pub(crate) struct Offers {
    all: RefCell<Vec<Rc<Offer>>>,
    pub(crate) closing: Cell<bool>,
}

impl Offers {
    /// The export that is offered under a name.
    pub(crate) fn get(&self, name: &str) -> Option<Rc<Offer>> {
        self.all.borrow().iter().find(|e| e.config.name == name && !e.removed.get()).cloned()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.all.borrow().iter().any(|e| e.config.name == name)
    }

    pub(crate) fn all(&self) -> Vec<Rc<Offer>> {
        self.all.borrow().clone()
    }

    pub(crate) fn add(&self, offer: Rc<Offer>) -> Result<()> {
        if self.has(&offer.config.name) {
            return Err(taken(&offer.config.name));
        }
        self.all.borrow_mut().push(offer);
        Ok(())
    }

    /// Offers it no more. Its name is free once it is drained.
    pub(crate) fn stop(self: &Rc<Offers>, offer: &Rc<Offer>, mode: StopMode) -> Result<Drained> {
        let clients = offer.clients();
        if clients > 0 && mode == StopMode::Safe {
            let message = format!("export '{}' still has {clients} client(s)", offer.config.name);
            return Err(Error::new(ErrorKind::Busy, message)
                .remedy("disconnect them first, or remove the export in mode 'hard'"));
        }
        offer.removed.set(true);
        offer.disconnect();
        let (offers, offer) = (self.clone(), offer.clone());
        Ok(Box::pin(async move {
            offer.drained().await;
            offers.all.borrow_mut().retain(|e| !Rc::ptr_eq(e, &offer));
        }))
    }
}

impl Catalog for Offers {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        for e in self.all.borrow().iter().filter(|e| !e.removed.get()) {
            each(&e.config.name, &e.config.description);
        }
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.get(name).map(|e| e.info())
    }

    fn shutting_down(&self) -> bool {
        self.closing.get()
    }
}
