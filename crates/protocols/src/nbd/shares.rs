//! What several nodes of one export want of it: an NBD server has no locks, so they are told to each other in the table of this
//! process, like nodes of one file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dolmen_graph::Prepared;
use dolmen_rt::{Addr, Rt};
use dolmen_types::{Result, text_of_os};

use crate::file::{Entry, Identity, Stance, TableGuard, enter_table};

/// What one node wants.
#[derive(Debug)]
pub(super) struct Shares {
    url: String,
    state: Mutex<State>,
    entry: Arc<Mutex<Entry>>,
    table: TableGuard,
}

#[derive(Debug, Default)]
struct State {
    /// What was committed last.
    committed: Stance,
    /// What open preparations want, by number.
    open: Vec<(u64, Stance)>,
    /// Counts preparations.
    latest: u64,
}

impl State {
    fn wanted(&self) -> Stance {
        self.open.iter().fold(self.committed, |all, (_, s)| all.union(*s))
    }
}

impl Shares {
    /// For a node of this export, which wants nothing yet.
    pub(super) async fn of(rt: &Rt, address: &Addr, url: String, export: &str) -> Shares {
        let server = match address {
            Addr::Unix(path) => {
                let real = real_path(rt, path).await;
                text_of_os(real.as_os_str())
            }
            Addr::Inet { host, port } => format!("{}:{port}", host.to_ascii_lowercase()),
        };
        let (entry, table) = enter_table(Identity::Export(server, export.to_owned()));
        Shares { url, state: Mutex::default(), entry, table }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each use leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wants this from the end of the change on, and what it wanted before until then.
    ///
    /// # Errors
    /// `Locked` when another node of the export does not get along with it; nothing has changed then.
    pub(super) fn prepare(self: &Arc<Shares>, node: &str, target: Stance) -> Result<Box<dyn Prepared>> {
        let (number, wanted) = {
            let mut state = self.state();
            state.latest += 1;
            let number = state.latest;
            state.open.push((number, target));
            (number, state.wanted())
        };
        // From here on dropping it puts everything back.
        let change = Change { shares: self.clone(), number };
        self.table.enter(&self.entry, &self.url, node, wanted)?;
        Ok(Box::new(change))
    }

    fn ended(&self, number: u64, committed: bool) {
        let mut state = self.state();
        let Some(i) = state.open.iter().position(|(n, _)| *n == number) else { return };
        let (_, target) = state.open.remove(i);
        if committed {
            state.committed = target;
        }
        let wanted = state.wanted();
        self.entry.lock().unwrap_or_else(PoisonError::into_inner).stance = wanted;
    }
}

/// The path of a socket without links, so that two spellings are one server.
async fn real_path(rt: &Rt, path: &Path) -> PathBuf {
    let Some(io) = rt.io() else { return path.to_owned() };
    let (name, path) = (path.to_owned(), path.to_owned());
    io.blocking_at(&name, move || std::fs::canonicalize(&path).unwrap_or(path)).await
}

/// A change that was prepared.
struct Change {
    shares: Arc<Shares>,
    number: u64,
}

impl Prepared for Change {
    fn commit(self: Box<Self>) {
        self.shares.ended(self.number, true);
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // Does nothing once it was committed.
        self.shares.ended(self.number, false);
    }
}
