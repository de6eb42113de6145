//! What every type of export is to the rest of the program.
//!
//! A type is one module and one line of [`KINDS`](crate::KINDS). Its row reads its own options, which gives a proposal;
//! the proposal is checked, the graph grants an edge, and the proposal becomes an export. Nothing else knows the type.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::UserEdge;
use dolmen_rt::{LocalFuture, Rt};
use dolmen_types::{OptionSpec, Options, Result};

/// A type of exports.
pub struct ExportKind {
    /// As clients of the monitor call it.
    pub name: &'static str,
    /// Its options, besides those that all exports have.
    pub options: &'static [OptionSpec],
    /// Reads them; the rest of the options stays.
    pub parse: fn(&mut Options) -> Result<Box<dyn Proposal>>,
}

impl fmt::Debug for ExportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// What all exports have.
#[derive(Clone, Debug)]
pub struct Common {
    /// The node that is named.
    pub node: String,
    /// Clients may change it.
    pub writable: bool,
    /// Every write is durable before its reply.
    pub writethrough: bool,
}

/// What an export may use of the program.
#[derive(Clone, Copy, Debug)]
pub struct ExportCx<'a> {
    /// Where it lives.
    pub rt: &'a Rt,
    /// What runs for several exports.
    pub servers: &'a Servers,
}

/// An export that is asked for.
pub trait Proposal: fmt::Debug {
    /// Whether it could be made now. Changes nothing.
    ///
    /// # Errors
    /// Why not.
    fn check(&self, cx: &ExportCx<'_>, common: &Common) -> Result<()>;

    /// Makes it, not started yet, with the edge that was granted.
    ///
    /// # Errors
    /// As [`Proposal::check`]: time has passed.
    fn make(&self, cx: &ExportCx<'_>, common: &Common, edge: Arc<UserEdge>) -> Result<Rc<dyn Export>>;
}

/// An export that is made.
pub trait Export: fmt::Debug {
    /// Begins to serve clients.
    ///
    /// # Errors
    /// When it can't; the export is then dropped.
    fn start(&self) -> Result<()>;

    /// Clients that use it now.
    fn clients(&self) -> usize;

    /// Serves no new client from now on. Completes once no request is in flight any more.
    ///
    /// # Errors
    /// `Busy` when clients use it and may not be disconnected: nothing has changed then.
    fn stop(&self, mode: StopMode) -> Result<Drained>;
}

/// What happens to the clients of an export that is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// An export that has clients is not stopped.
    Safe,
    /// They are disconnected once what they asked for is answered.
    Hard,
}

/// Completes once nothing is in flight any more; what it waits for goes on without it.
pub type Drained = LocalFuture<'static, ()>;

/// What serves several exports, such as a socket that they share.
pub trait Server: Any + fmt::Debug {
    /// Stops accepting clients at once. Completes when the last one is gone.
    fn stop(&self) -> Drained;
}

/// The servers that run, at most one of each type.
#[derive(Debug, Default)]
pub struct Servers(RefCell<Vec<Rc<dyn Server>>>);

impl Servers {
    /// The server of a type, if it runs.
    pub fn get<S: Server>(&self) -> Option<Rc<S>> {
        self.0.borrow().iter().find_map(|s| typed(s.clone()))
    }

    /// Adds a server in the place of one of its type.
    pub fn add<S: Server>(&self, server: Rc<S>) {
        self.take::<S>();
        self.0.borrow_mut().push(server);
    }

    /// Takes the server of a type out; who has it, ends it.
    pub fn take<S: Server>(&self) -> Option<Rc<S>> {
        let mut all = self.0.borrow_mut();
        let at = all.iter().position(|s| typed::<S>(s.clone()).is_some())?;
        typed(all.remove(at))
    }

    /// Takes all servers out.
    pub fn take_all(&self) -> Vec<Rc<dyn Server>> {
        self.0.take()
    }
}

fn typed<S: Server>(server: Rc<dyn Server>) -> Option<Rc<S>> {
    let any: Rc<dyn Any> = server;
    any.downcast().ok()
}
