//! Image locks: what a node needs and allows, told to other processes and to other nodes of this one.
//!
//! Two levels with the same rule ("somebody needs what another does not allow"):
//!
//! - Between processes, shared byte-range locks: byte 100+i says "I need action i", byte 200+i "I do not allow action
//!   i"; i is 0 for D, 1 for V, 2 for M, 3 for S. A lock is taken first, then the opposite byte is tested: of two that
//!   start at the same time, at least one sees the other. When both do, both roll back and try again after a random
//!   time. Bytes 104 and 204 belong to old programs and byte 0 to libvirt: never used.
//! - Inside the process, a table of the files that nodes have open, and of the exports of NBD servers (which have no
//!   locks). It holds also with `locking=off`, and names the other node instead of "this process".
//!
//! Tightening is done while a change is prepared and may fail; loosening is done when it is published and cannot.
//! Several preparations of one node may be open at once, of one draft or of several, and end in any order: held is what
//! the last one that was committed wants, and what those want that are open.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use super::shared::no_files;
use dolmen_graph::Prepared;
use dolmen_rt::sys::{self, LockHolder, Storage};
use dolmen_rt::{CoreIo, File, Rt};
use dolmen_types::{Action, Actions, Conflict, Error, Party, Result, ResultExt};

/// Byte of "I need D".
pub(super) const FIRST_NEED: u64 = 100;
/// Byte of "I do not allow D".
const FIRST_DENY: u64 = 200;
/// The actions that have bytes.
const LOCKED: [Action; 4] = [Action::ReadData, Action::WriteData, Action::WriteUnchanged, Action::Resize];
/// Attempts before a conflict is believed.
const ATTEMPTS: u32 = 3;
/// The longest wait between two attempts.
const RETRY_MAX: Duration = Duration::from_millis(20);

/// What is asked of everybody else: needs, and the actions that are not allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stance {
    pub(crate) needs: Actions,
    pub(crate) denies: Actions,
}

impl Stance {
    /// What a leaf wants whose parents together need and allow this.
    pub(crate) fn of(needs: Actions, allows: Actions, force_share: bool) -> Stance {
        match force_share {
            true => Stance { needs: needs & Actions::D, denies: Actions::NONE },
            false => Stance { needs: needs & Actions::DATA, denies: Actions::DATA - allows },
        }
    }

    pub(crate) fn union(self, other: Stance) -> Stance {
        Stance { needs: self.needs | other.needs, denies: self.denies | other.denies }
    }

    fn intersection(self, other: Stance) -> Stance {
        Stance { needs: self.needs & other.needs, denies: self.denies & other.denies }
    }

    fn bytes(self) -> impl Iterator<Item = u64> {
        let of = |set: Actions, first: u64| {
            LOCKED.into_iter().zip(first..).filter(move |(a, _)| set.contains((*a).into())).map(|(_, b)| b)
        };
        of(self.needs, FIRST_NEED).chain(of(self.denies, FIRST_DENY))
    }

    /// The first action that one of the two needs and the other does not allow, and whether it is `self` who needs it.
    fn clash(self, other: Stance) -> Option<(Action, bool)> {
        let mine = (self.needs & other.denies).iter().next().map(|a| (a, true));
        mine.or_else(|| (self.denies & other.needs).iter().next().map(|a| (a, false)))
    }
}

/// The locks of one node.
#[derive(Debug)]
pub(super) struct Locks {
    /// Device and inode.
    id: (u64, u64),
    at: Storage,
    /// The bytes that the kernel has, and for which descriptor.
    locked: Mutex<Locked>,
    filename: String,
    /// Whether bytes are locked; the table of this process is used in any case.
    between_processes: bool,
    /// Never held across an await.
    state: Mutex<State>,
    /// What the table knows about this node: what is held, and what is being asked for.
    entry: Arc<Mutex<Entry>>,
    table: TableGuard,
}

/// What the kernel has. Held while the kernel is asked, so only where that may wait ([`Storage::soon`], [`CoreIo::blocking_on`]).
/// What is to be let go is looked up at that time: what has been asked for since then stays.
#[derive(Debug)]
struct Locked {
    /// Replaced when the node is reopened.
    file: File,
    bytes: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct State {
    held: Stance,
    /// What is being asked for.
    wanted: Vec<Stance>,
    /// What was committed last.
    committed: Stance,
    /// What open preparations want, by number.
    open: Vec<(u64, Stance)>,
    /// Counts preparations.
    latest: u64,
}

impl Locks {
    pub(super) fn new(file: File, id: (u64, u64), filename: String, between_processes: bool) -> Locks {
        let (entry, table) = enter_table(Identity::File(id));
        Locks {
            id,
            at: file.storage(),
            locked: Mutex::new(Locked { file, bytes: BTreeSet::new() }),
            filename,
            between_processes,
            state: Mutex::default(),
            entry,
            table,
        }
    }

    fn locked(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Moves what is held to another descriptor of the same file: taken there first, so that
    /// nobody else can come between. Conflicts were tested through the old one, which does
    /// not see its own locks.
    pub(super) fn hand_over(self: &Arc<Self>, to: File) {
        let locks = self.clone();
        self.at.soon(move || {
            let mut locked = locks.locked();
            for byte in locked.bytes.iter() {
                // Shared locks get along with those of the old descriptor and of others. Should
                // the kernel have no memory for one, the old descriptor keeps it until it is closed.
                let _ = sys::lock_byte(&to, *byte);
            }
            let old = std::mem::replace(&mut locked.file, to);
            for byte in locked.bytes.iter() {
                let _ = sys::unlock_byte(&old, *byte);
            }
        });
    }

    /// Unlocks what nobody wants any more.
    fn let_go(self: &Arc<Self>) {
        if self.between_processes {
            let locks = self.clone();
            self.at.soon(move || locks.let_go_now());
        }
    }

    fn let_go_now(&self) {
        let mut locked = self.locked();
        let keep: BTreeSet<u64> = {
            let state = self.state();
            state.wanted.iter().chain([&state.held]).flat_map(|s| s.bytes()).collect()
        };
        let Locked { file, bytes } = &mut *locked;
        for byte in bytes.difference(&keep) {
            // Unlocking an open local file cannot fail. On a network file system the server frees the lock when the
            // file is closed; until then we are stricter than we say.
            let _ = sys::unlock_byte(&*file, *byte);
        }
        bytes.retain(|b| keep.contains(b));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Device and inode of the file.
    pub(super) fn file_id(&self) -> (u64, u64) {
        self.id
    }

    /// Whether bytes are locked.
    pub(super) fn between_processes(&self) -> bool {
        self.between_processes
    }

    /// Whether nobody else may do this now, as far as locks can say.
    pub(super) fn denies(&self, actions: Actions) -> bool {
        self.between_processes && self.state().held.denies.contains(actions)
    }

    /// Takes what `target` has more than what is held, or fails with `Locked` and everything as it was.
    pub(super) async fn prepare(
        self: &Arc<Locks>,
        rt: &Rt,
        node: &str,
        target: Stance,
    ) -> Result<Box<dyn Prepared>> {
        let before = self.state().held;
        let wanted = before.union(target);
        let prepared = {
            let mut state = self.state();
            state.latest += 1;
            let number = state.latest;
            state.open.push((number, target));
            LockChange { locks: self.clone(), number }
        };
        // From here on dropping `prepared` puts everything back.
        self.enter(node, wanted)?;
        if !self.between_processes || wanted == before {
            self.holds(target);
            return Ok(Box::new(prepared));
        }
        let io = rt.io().ok_or_else(no_files)?;
        let asking = Asking::new(self, wanted);
        for attempt in 1.. {
            let locks = self.clone();
            let take = move || {
                let taken = locks.take(wanted);
                // Unless nobody waits for it any more.
                locks.let_go_now();
                taken
            };
            let clash = io.blocking_on(self.at, take).await?;
            let Some((action, needed)) = clash else { break };
            asking.pause();
            if attempt < ATTEMPTS {
                let wait = rt.random() % RETRY_MAX.as_nanos() as u64;
                rt.sleep(Duration::from_nanos(wait)).await;
                asking.go_on(wanted);
                continue;
            }
            return Err(self.locked_by(node, target, action, needed, &self.holders(io).await));
        }
        self.holds(target);
        Ok(Box::new(prepared))
    }

    /// What was asked for is locked. Others may have taken or let go of something since it was asked for.
    fn holds(&self, target: Stance) {
        let mut state = self.state();
        state.held = state.held.union(target);
    }

    /// Locks the bytes that are new, then tests the opposite ones. Says which action clashes, and whether it is this
    /// node that needs it.
    fn take(&self, wanted: Stance) -> Result<Option<(Action, bool)>> {
        let mut locked = self.locked();
        let Locked { file, bytes } = &mut *locked;
        for byte in wanted.bytes() {
            if bytes.contains(&byte) {
                continue;
            }
            if !sys::lock_byte(&*file, byte).context(|| format!("Failed to lock byte {byte}"))? {
                // A write lock: some other kind of program has the whole file.
                let (first, needed) =
                    if byte >= FIRST_DENY { (FIRST_DENY, false) } else { (FIRST_NEED, true) };
                return Ok(Some((LOCKED[(byte - first) as usize], needed)));
            }
            bytes.insert(byte);
        }
        // What is needed comes first: that is what the refusal should be about.
        let actions = || LOCKED.into_iter().zip(0..);
        for (action, i) in actions().filter(|(a, _)| wanted.needs.contains((*a).into())) {
            if sys::byte_is_locked(&*file, FIRST_DENY + i)? {
                return Ok(Some((action, true)));
            }
        }
        for (action, i) in actions().filter(|(a, _)| wanted.denies.contains((*a).into())) {
            if sys::byte_is_locked(&*file, FIRST_NEED + i)? {
                return Ok(Some((action, false)));
            }
        }
        Ok(None)
    }

    /// Tells the table; fails when another node of this process has the file and does not get along.
    fn enter(&self, node: &str, wanted: Stance) -> Result<()> {
        self.table.enter(&self.entry, &self.filename, node, wanted)
    }

    /// The end of a preparation: what nobody wants any more is let go.
    fn ended(self: &Arc<Self>, number: u64, committed: bool) {
        let wanted = {
            let mut state = self.state();
            let Some(i) = state.open.iter().position(|(n, _)| *n == number) else { return };
            let (_, target) = state.open.remove(i);
            if committed {
                state.committed = target;
            }
            let wanted = state.open.iter().fold(state.committed, |all, (_, s)| all.union(*s));
            // What an open one wants may not be locked yet.
            state.held = state.held.intersection(wanted);
            wanted
        };
        self.entry.lock().unwrap_or_else(|e| e.into_inner()).stance = wanted;
        self.let_go();
    }

    async fn holders(self: &Arc<Self>, io: &CoreIo) -> Vec<LockHolder> {
        let locks = self.clone();
        io.blocking(self.at.waits_for(), move || sys::lock_holders(&locks.locked().file)).await
    }

    fn locked_by(
        &self,
        node: &str,
        target: Stance,
        action: Action,
        needed: bool,
        holders: &[LockHolder],
    ) -> Error {
        let byte = action as u64 + if needed { FIRST_DENY } else { FIRST_NEED };
        let me = party(node.to_owned(), "node", self.filename.clone(), target);
        let holder = holders.iter().find(|h| h.covers(byte)).or_else(|| {
            // A write lock over our own byte.
            holders.iter().find(|h| h.ranges.iter().any(|r| r.exclusive))
        });
        let (them, mut remedies) = match holder {
            Some(h) => {
                let command = shortened(&h.command, 200);
                let them = party(h.pid.to_string(), "process", command, stance_of(h));
                (them, vec![format!("close the image in process {} (end its export, job or monitor command, or the process)", h.pid)])
            }
            None => (
                party(
                    "?".into(),
                    "process",
                    "not visible: another user, container or host".into(),
                    Stance::default(),
                ),
                vec![
                    "look for the holder as root if it may be another user's, and in the containers and on the other \
                     hosts that use the file"
                        .to_owned(),
                ],
            ),
        };
        let readable = !target.needs.intersects(Actions::V | Actions::M | Actions::S);
        remedies.push(if readable {
            "open it with force-share=on (-U), at the risk of reading data that change meanwhile".to_owned()
        } else {
            "open it read-only".to_owned()
        });
        conflict(&self.filename, action, needed, me, them, remedies)
    }
}

/// At most so many characters; what is cut off shows as an ellipsis.
fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl Drop for Locks {
    /// Closing the file would do it too, but not while a child process that is just being started still has a copy
    /// of the descriptor.
    fn drop(&mut self) {
        let locked = self.locked.get_mut().unwrap_or_else(|e| e.into_inner());
        let bytes = std::mem::take(&mut locked.bytes);
        if !bytes.is_empty() {
            let file = locked.file.clone();
            self.at.soon(move || bytes.iter().for_each(|b| drop(sys::unlock_byte(&file, *b))));
        }
    }
}

/// Locks are being asked for; they are let go unless they are held when this ends.
struct Asking<'a>(&'a Arc<Locks>, Cell<Option<Stance>>);

impl<'a> Asking<'a> {
    fn new(locks: &'a Arc<Locks>, wanted: Stance) -> Asking<'a> {
        let asking = Asking(locks, Cell::new(None));
        asking.go_on(wanted);
        asking
    }

    fn go_on(&self, wanted: Stance) {
        self.1.set(Some(wanted));
        self.0.state().wanted.push(wanted);
    }

    fn pause(&self) {
        if let Some(wanted) = self.1.take() {
            let mut state = self.0.state();
            if let Some(i) = state.wanted.iter().position(|w| *w == wanted) {
                state.wanted.swap_remove(i);
            }
            drop(state);
            self.0.let_go();
        }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.pause();
    }
}

fn stance_of(h: &LockHolder) -> Stance {
    let set = |first: u64| {
        LOCKED
            .into_iter()
            .zip(first..)
            .filter(|(_, b)| h.covers(*b))
            .fold(Actions::NONE, |s, (a, _)| s | a.into())
    };
    Stance { needs: set(FIRST_NEED), denies: set(FIRST_DENY) }
}

fn party(id: String, kind: &str, detail: String, s: Stance) -> Party {
    let allows = Actions::DATA - s.denies;
    Party { id, kind: kind.to_owned(), detail, since_secs: None, needs: s.needs, allows }
}

fn conflict(
    file: &str,
    action: Action,
    needed: bool,
    me: Party,
    them: Party,
    remedies: Vec<String>,
) -> Error {
    let (asks, denies) = if needed { (me, them) } else { (them, me) };
    Error::locked(Conflict {
        node: file.to_owned(),
        actions: action.into(),
        asks,
        denies,
        why: "does not allow it".to_owned(),
        remedies,
    })
}

/// A change of locks that was prepared.
struct LockChange {
    locks: Arc<Locks>,
    number: u64,
}

impl Prepared for LockChange {
    fn commit(self: Box<Self>) {
        self.locks.ended(self.number, true);
    }
}

impl Drop for LockChange {
    fn drop(&mut self) {
        // Does nothing once it was committed.
        self.locks.ended(self.number, false);
    }
}

/// What a node of this process wants of a file or an export.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entry {
    node: String,
    pub(crate) stance: Stance,
}

/// What a node is opened on: two nodes of one identity are two ways to the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    /// A file, by device and inode.
    File((u64, u64)),
    /// An export: the server, and its name.
    Export(String, String),
}

type Table = HashMap<Identity, Vec<Weak<Mutex<Entry>>>>;

/// What nodes of this process have open. Process-wide, as files are.
static TABLE: Mutex<Option<Table>> = Mutex::new(None);

fn with_table<T>(f: impl FnOnce(&mut Table) -> T) -> T {
    let mut table = TABLE.lock().unwrap_or_else(|e| e.into_inner());
    f(table.get_or_insert_default())
}

/// Takes the row out of the table when the last node is gone.
#[derive(Debug)]
pub(crate) struct TableGuard(Identity);

impl TableGuard {
    /// Tells the table what a node wants; fails when another node of this process does not get along with it.
    pub(crate) fn enter(
        &self,
        entry: &Arc<Mutex<Entry>>,
        name: &str,
        node: &str,
        wanted: Stance,
    ) -> Result<()> {
        let what = match self.0 {
            Identity::File(_) => "the same file",
            Identity::Export(..) => "the same export",
        };
        for other in self.others(entry) {
            let other = other.lock().unwrap_or_else(|e| e.into_inner()).clone();
            if let Some((action, needed)) = wanted.clash(other.stance) {
                let me = party(node.to_owned(), "node", name.to_owned(), wanted);
                let them = party(other.node.clone(), "node", what.to_owned(), other.stance);
                let remedies = vec!["use the one node from both places".to_owned()];
                return Err(conflict(name, action, needed, me, them, remedies));
            }
        }
        let mut entry = entry.lock().unwrap_or_else(|e| e.into_inner());
        entry.node = node.to_owned();
        entry.stance = wanted;
        Ok(())
    }

    fn others(&self, me: &Arc<Mutex<Entry>>) -> Vec<Arc<Mutex<Entry>>> {
        with_table(|t| {
            let rows = t.get(&self.0).into_iter().flatten();
            rows.filter_map(Weak::upgrade).filter(|e| !Arc::ptr_eq(e, me)).collect()
        })
    }
}

impl Drop for TableGuard {
    fn drop(&mut self) {
        with_table(|t| {
            if let Some(rows) = t.get_mut(&self.0) {
                rows.retain(|r| r.strong_count() > 0);
                if rows.is_empty() {
                    t.remove(&self.0);
                }
            }
        });
    }
}

pub(crate) fn enter_table(id: Identity) -> (Arc<Mutex<Entry>>, TableGuard) {
    let entry = Arc::new(Mutex::new(Entry::default()));
    with_table(|t| t.entry(id.clone()).or_default().push(Arc::downgrade(&entry)));
    (entry, TableGuard(id))
}
