//! Turns: changes of the same part of the graph go one after the other, others side by side.
//!
//! This excludes nothing (the solver does that, and publishing checks that nothing has changed
//! in between); it keeps commands that meet from refusing each other for no reason. A change
//! says which nodes and operations it names; its part of the graph is everything that is linked to these in any
//! way. It waits for changes that came earlier and have something of that part, and for nothing else. So
//! storage that does not answer holds up what depends on it, and nothing more.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use dolmen_graph::GraphOwner;
use dolmen_types::Value;
use event_listener::Event;

/// What a change names.
#[derive(Clone, Debug)]
pub(crate) enum Scope {
    /// Nobody knows, so everything.
    All,
    /// Some things.
    Names(Names),
}

/// Words that a change uses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    /// All of them. Those that are names of nodes or operations say where the change belongs.
    words: BTreeSet<String>,
    /// Those that name what is not there yet, and images that are made.
    new: BTreeSet<String>,
}

/// The arguments that name something new.
const NEW: &[&str] = &[
    "node-name",
    "snapshot-node-name",
    "filter-node-name",
    "id",
    "job-id",
    "name",
    "snapshot-file",
    "target",
];

impl Scope {
    /// Names of nodes and operations, there already or new.
    pub(crate) fn names<S: ToString>(names: impl IntoIterator<Item = S>) -> Scope {
        let words: BTreeSet<String> = names.into_iter().map(|n| n.to_string()).collect();
        Scope::Names(Names { new: words.clone(), words })
    }

    /// What the arguments of a command name.
    pub(crate) fn of(arguments: &Value) -> Scope {
        let mut names = Names::default();
        let mut todo = vec![("", arguments)];
        while let Some((key, v)) = todo.pop() {
            match v {
                Value::Str(s) => {
                    if NEW.contains(&key) {
                        names.new.insert(s.clone());
                    }
                    names.words.insert(s.clone());
                }
                Value::List(l) => todo.extend(l.iter().map(|v| (key, v))),
                Value::Map(m) => todo.extend(m.iter().map(|(k, v)| (k.as_str(), v))),
                _ => {}
            }
        }
        Scope::Names(names)
    }

    /// With everything that is linked to it now.
    fn part(&self, owner: &GraphOwner) -> Scope {
        match self {
            Scope::All => Scope::All,
            Scope::Names(Names { words, new }) => {
                let draft = owner.draft();
                let there = |w: &&String| draft.has_node(w) || draft.op(w).is_some();
                let known = words.iter().filter(there).chain(new).map(String::as_str);
                Scope::Names(Names { new: draft.connected(known), words: words.clone() })
            }
        }
    }

    /// Whether two parts have something in common, or one is going to make what the other names.
    fn meets(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::Names(a), Scope::Names(b)) => {
                !a.new.is_disjoint(&b.new) || !a.words.is_disjoint(&b.new) || !b.words.is_disjoint(&a.new)
            }
            _ => true,
        }
    }
}

struct Entry {
    id: u64,
    /// For messages.
    what: String,
    /// While it waits, what it names; then its part of the graph.
    scope: Scope,
    running: bool,
}

/// Changes that wait or run, in the order in which they came.
#[derive(Default)]
pub(crate) struct Turns {
    entries: RefCell<Vec<Entry>>,
    next: Cell<u64>,
    ended: Event,
}

impl Turns {
    /// Puts a change into the queue.
    pub(crate) fn queue(self: &Rc<Self>, what: String, scope: Scope) -> Turn {
        let id = self.next.get();
        self.next.set(id + 1);
        self.entries.borrow_mut().push(Entry { id, what, scope, running: false });
        Turn { turns: self.clone(), id }
    }

    /// Completes when no change waits or runs.
    pub(crate) async fn idle(&self) {
        while !self.entries.borrow().is_empty() {
            let listener = self.ended.listen();
            if !self.entries.borrow().is_empty() {
                listener.await;
            }
        }
    }
}

/// A place in the queue, and then the turn; over when it is dropped.
pub(crate) struct Turn {
    turns: Rc<Turns>,
    id: u64,
}

impl Turn {
    /// Completes when it is this change's turn.
    pub(crate) async fn come(&self, owner: &GraphOwner) {
        while self.waits_for(owner).is_some() {
            let listener = self.turns.ended.listen();
            if self.waits_for(owner).is_some() {
                listener.await;
            }
        }
        let mut entries = self.turns.entries.borrow_mut();
        if let Some(e) = entries.iter_mut().find(|e| e.id == self.id) {
            e.scope = e.scope.part(owner);
            e.running = true;
        }
    }

    /// What it has to wait for.
    pub(crate) fn waits_for(&self, owner: &GraphOwner) -> Option<String> {
        let entries = self.turns.entries.borrow();
        let mine = entries.iter().find(|e| e.id == self.id)?.scope.part(owner);
        let meets =
            |e: &&Entry| if e.running { e.scope.meets(&mine) } else { e.scope.part(owner).meets(&mine) };
        entries.iter().take_while(|e| e.id != self.id).find(meets).map(|e| e.what.clone())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.entries.borrow_mut().retain(|e| e.id != self.id);
        self.turns.ended.notify(usize::MAX);
    }
}
