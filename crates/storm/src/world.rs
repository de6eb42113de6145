//! What the storm knows of a daemon: nodes and what they show, exports, jobs.
//!
//! Which nodes there are and how they are linked is read from the daemon after each command; what each of
//! them shows is known from what was asked for. A client's view never changes: whatever is
//! done to the graph, an export goes on showing the disk that it showed when it was added.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Value as Json;

use crate::book::{Book, ContentId, Moment, SECTOR};
use crate::qmp::{Monitor, Reply};

/// Drivers that show what their child shows.
const FILTERS: [&str; 9] = [
    "raw",
    "copy-on-read",
    "copy-before-write",
    "blkdebug",
    "mirror_top",
    "commit_top",
    "throttle",
    "compress",
    "preallocate",
];

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Node {
    pub(crate) driver: String,
    pub(crate) read_only: bool,
    /// Its image has been handed to another process, or another node.
    pub(crate) inactive: bool,
    pub(crate) size: u64,
    /// The name of its file, as the daemon has it.
    pub(crate) file: String,
}

/// The graph, as the daemon tells it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Graph {
    pub(crate) nodes: BTreeMap<String, Node>,
    /// Parent, child, the name of the link.
    pub(crate) edges: BTreeSet<(String, String, String)>,
}

impl Graph {
    pub(crate) fn read(monitor: &mut Monitor) -> Option<Graph> {
        let empty = Json::Object(serde_json::Map::new());
        let Reply::Done(nodes) = monitor.ask("query-named-block-nodes", &serde_json::json!({"flat": true}))
        else {
            return None;
        };
        let Reply::Done(graph) = monitor.ask("x-debug-query-block-graph", &empty) else { return None };
        let mut out = Graph::default();
        let text = |v: &Json| v.as_str().unwrap_or_default().to_owned();
        for n in nodes.as_array().into_iter().flatten() {
            let node = Node {
                driver: text(&n["drv"]),
                read_only: n["ro"].as_bool().unwrap_or_default(),
                inactive: n["active"] == false,
                size: n["image"]["virtual-size"].as_u64().unwrap_or_default(),
                file: text(&n["file"]),
            };
            out.nodes.insert(text(&n["node-name"]), node);
        }
        let mut names = BTreeMap::new();
        for n in graph["nodes"].as_array().into_iter().flatten() {
            let name = text(&n["name"]);
            if n["type"] == "block-driver" {
                // Filters of jobs are not among the named nodes everywhere.
                out.nodes.entry(name.clone()).or_default();
            }
            let prefix = if n["type"] == "block-driver" { "" } else { "user:" };
            names.insert(n["id"].as_u64(), format!("{prefix}{name}"));
        }
        for e in graph["edges"].as_array().into_iter().flatten() {
            let name = |k: &str| names.get(&e[k].as_u64()).cloned().unwrap_or_default();
            out.edges.insert((name("parent"), name("child"), text(&e["name"])));
        }
        Some(out)
    }

    pub(crate) fn child(&self, parent: &str, links: &[&str]) -> Option<&str> {
        let found = self.edges.iter().find(|e| e.0 == parent && links.contains(&e.2.as_str()));
        found.map(|e| e.1.as_str())
    }

    fn is_filter(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|n| FILTERS.contains(&n.driver.as_str()))
            // A filter that is not named.
            || self.nodes.get(name).is_some_and(|n| n.driver.is_empty())
    }

    /// The child that a filter shows.
    pub(crate) fn shown(&self, name: &str) -> Option<&str> {
        if !self.is_filter(name) {
            return None;
        }
        self.child(name, &["file", "image", "backing"])
    }

    /// A node, and what it only shows.
    pub(crate) fn down(&self, name: &str) -> Vec<String> {
        let mut out = vec![name.to_owned()];
        while let Some(below) = out.last().and_then(|n| self.shown(n)) {
            if out.len() > 100 {
                break;
            }
            out.push(below.to_owned());
        }
        out
    }

    /// The nodes that show the same as what lies below a node, but not because of it: when something takes the
    /// node's place, they stay where they are.
    pub(crate) fn beside(&self, node: &str) -> Vec<String> {
        let below = &self.down(node)[1..];
        let stays = |n: &&String| {
            let down = self.down(n);
            down.iter().all(|d| d != node) && down.iter().any(|d| below.contains(d))
        };
        self.nodes.keys().filter(stays).cloned().collect()
    }

    /// The format node that a node shows: the last that is no protocol.
    pub(crate) fn format_node(&self, name: &str) -> String {
        let down = self.down(name);
        let is_leaf = |n: &String| self.child(n, &["file", "image"]).is_none();
        down.iter().rev().find(|n| !is_leaf(n)).unwrap_or(&down[0]).clone()
    }

    /// The name of the file that a format node's own data are in.
    pub(crate) fn file_of(&self, name: &str) -> Option<String> {
        let mut at = name;
        let (mut steps, mut formats) = (0, 0);
        while let Some(below) = self.child(at, &["file", "image"]) {
            // A point in time is in no file.
            if self.nodes.get(at).is_some_and(|n| n.driver == "snapshot-access") {
                return None;
            }
            // An image in an image has no file of its own, whatever filters lie between; a filter has that of what it shows.
            formats += usize::from(!self.is_filter(at));
            if formats > 1 {
                return None;
            }
            at = below;
            steps += 1;
            if steps > 100 {
                return None;
            }
        }
        let n = self.nodes.get(at)?;
        ["file", "host_device"].contains(&n.driver.as_str()).then(|| short(&n.file))
    }

    /// The node below, over all filters.
    pub(crate) fn backing(&self, name: &str) -> Option<&str> {
        self.child(&self.format_node(name), &["backing"])
            .and_then(|b| self.nodes.get_key_value(b))
            .map(|(k, _)| k.as_str())
    }
}

/// A file's name in the storm's directory.
pub(crate) fn short(path: &str) -> String {
    match path.rsplit_once("/full/") {
        Some((_, name)) => format!("full/{name}"),
        None => path
            .strip_prefix("full/")
            .map_or_else(|| path.rsplit('/').next().unwrap_or(path).to_owned(), |_| path.to_owned()),
    }
}

/// What an export shows.
#[derive(Clone, Debug)]
pub(crate) struct Export {
    pub(crate) content: ContentId,
    pub(crate) writable: bool,
    /// It is going away.
    pub(crate) ending: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing that readers see.
    Unseen,
    /// What the target holds follows the source; the source gives way to the target in the end.
    Mirror,
    ActiveCommit,
    /// What the target holds becomes what the source holds.
    Commit,
    /// The target is the source as it was.
    Backup,
    /// The target shows the source as it was, as long as the job runs.
    Fleece,
}

/// A job.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) work: Work,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) from: ContentId,
    pub(crate) to: ContentId,
    /// The source as it was.
    pub(crate) before: Option<ContentId>,
    pub(crate) began: Moment,
    pub(crate) status: String,
    /// When it was told to end, and whether by pivoting.
    pub(crate) told: Option<(Moment, bool)>,
    /// It was told both.
    pub(crate) ambiguous: bool,
    /// The result may hold only a part.
    pub(crate) partial: bool,
    /// Where a copy goes that no node will show afterwards.
    pub(crate) file: Option<String>,
}

impl Job {
    /// Its target shows a point in time only while it runs.
    pub(crate) fn saves(&self) -> bool {
        self.work == Work::Fleece || self.work == Work::Backup && self.partial
    }
}

/// Everything that is known.
pub(crate) struct World {
    pub(crate) book: Arc<Mutex<Book>>,
    pub(crate) graph: Graph,
    /// What nodes show.
    pub(crate) shows: BTreeMap<String, ContentId>,
    pub(crate) exports: BTreeMap<String, Export>,
    pub(crate) jobs: BTreeMap<String, Job>,
    /// What files hold that no node has open.
    pub(crate) closed: BTreeMap<String, ContentId>,
    /// Files whose headers name what somebody wanted them to name.
    pub(crate) renamed: BTreeSet<String>,
    /// Overlays that hold nothing.
    pub(crate) empty: BTreeSet<String>,
    /// What the headers of files name, as far as is known.
    pub(crate) backings: BTreeMap<String, String>,
    /// What disks held when a copy-before-write node was put over them.
    pub(crate) saved: BTreeMap<String, ContentId>,
    /// Formats of files.
    pub(crate) formats: BTreeMap<String, String>,
    /// Nodes that show a part of what is below.
    pub(crate) windows: BTreeSet<String>,
    /// Files that are longer than what is shown of them: bases of commits.
    pub(crate) longer: BTreeSet<String>,
    /// Files that still hold the image that they held in the beginning.
    pub(crate) images: BTreeSet<String>,
    pub(crate) server: bool,
    /// Files that were opened while an inactive node had them.
    pub(crate) handed: BTreeSet<String>,
    /// Files that jobs are making, by the jobs.
    pub(crate) making: BTreeMap<String, String>,
    /// A job that showed a point in time has ended: what it did not save is an error.
    pub(crate) ended_point: bool,
    /// Operations that an external tool has begun.
    pub(crate) operations: BTreeSet<String>,
    /// Numbers of names.
    pub(crate) count: u64,
    /// Jobs that ended in success.
    pub(crate) ended_well: u64,
}

/// The book, whoever else uses it.
pub(crate) fn open(book: &Arc<Mutex<Book>>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(book: Arc<Mutex<Book>>) -> World {
        World {
            book,
            graph: Graph::default(),
            shows: BTreeMap::new(),
            exports: BTreeMap::new(),
            jobs: BTreeMap::new(),
            closed: BTreeMap::new(),
            renamed: BTreeSet::new(),
            empty: BTreeSet::new(),
            saved: BTreeMap::new(),
            backings: BTreeMap::new(),
            formats: BTreeMap::new(),
            windows: BTreeSet::new(),
            longer: BTreeSet::new(),
            images: BTreeSet::new(),
            server: false,
            making: BTreeMap::new(),
            handed: BTreeSet::new(),
            ended_point: false,
            operations: BTreeSet::new(),
            count: 0,
            ended_well: 0,
        }
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        open(&self.book)
    }

    /// A name that nothing has.
    pub(crate) fn fresh_name(&mut self, letter: &str) -> String {
        self.count += 1;
        format!("{letter}{}", self.count)
    }

    /// What a node shows; a node that nobody knows is looked through.
    pub(crate) fn content(&mut self, node: &str) -> ContentId {
        if let Some(c) = self.shows.get(node) {
            return *c;
        }
        for below in self.graph.down(node).into_iter().skip(1) {
            if let Some(c) = self.shows.get(&below).copied() {
                self.shows.insert(node.to_owned(), c);
                return c;
            }
        }
        let c = self.book().unknown(node, "a node that came by itself");
        self.shows.insert(node.to_owned(), c);
        c
    }

    /// Takes over what the daemon says of its graph.
    pub(crate) fn learn(&mut self, graph: Graph) {
        let gone: Vec<String> =
            self.graph.nodes.keys().filter(|n| !graph.nodes.contains_key(*n)).cloned().collect();
        // What a file holds when its node goes.
        for n in &gone {
            let is_format = self.graph.format_node(n) == *n;
            let Some((file, c)) = self.graph.file_of(n).zip(self.shows.get(n).copied()) else { continue };
            // What a file holds with an image in it is what it holds as that image.
            if is_format && self.is_format(&file, &self.graph.nodes[n].driver) {
                self.closed.insert(file, c);
            }
        }
        for n in &gone {
            self.shows.remove(n);
        }
        self.graph = graph;
        let names: Vec<String> = self.graph.nodes.keys().cloned().collect();
        for n in &names {
            self.content(n);
            if let Some(f) = self.graph.file_of(n).filter(|_| self.graph.format_node(n) == *n) {
                self.closed.remove(&f);
            }
        }
        self.look_through_filters();
        self.grow_bases();
        self.follow_links();
    }

    /// A commit makes its base as large as what it commits. What is behind the old end comes from there.
    fn grow_bases(&mut self) {
        let commits = |j: &&Job| matches!(j.work, Work::Commit | Work::ActiveCommit);
        let commits: Vec<Job> = self.jobs.values().filter(commits).cloned().collect();
        for job in commits {
            let size =
                self.graph.nodes.get(&self.graph.format_node(&job.target)).map_or(0, |n| n.size / SECTOR);
            let mut book = open(&self.book);
            let (from, to) = (book.sectors(job.from), book.sectors(job.to));
            if book.is_known(job.to) && from > to && size > to {
                book.resize(job.to, size);
                let kept: Vec<ContentId> = self.shows_above(&job.source, job.from);
                book.feed(job.from, job.to, job.began, &kept);
            }
        }
    }

    /// A filter shows what lies below, wherever it has been put.
    fn look_through_filters(&mut self) {
        for _ in 0..10 {
            let mut changed = false;
            let names: Vec<String> = self.graph.nodes.keys().cloned().collect();
            for n in names.iter().filter(|n| !self.windows.contains(*n)) {
                let Some(below) = self.graph.shown(n).and_then(|b| self.shows.get(b).copied()) else {
                    continue;
                };
                changed |= self.shows.insert(n.clone(), below) != Some(below);
            }
            if !changed {
                return;
            }
        }
    }

    /// What is written to a layer may show in the layers over it.
    pub(crate) fn follow_links(&mut self) {
        let links: Vec<(String, String)> = self
            .graph
            .edges
            .iter()
            .filter(|e| e.2 == "backing" && !e.0.starts_with("user:"))
            .map(|e| (e.0.clone(), e.1.clone()))
            .collect();
        for (over, below) in links {
            let (over, below) = (self.content(&over), self.content(&below));
            self.book().follow(below, over);
        }
    }

    /// From now on a node, and what it only shows, shows this.
    pub(crate) fn show(&mut self, node: &str, content: ContentId) {
        for n in self.graph.down(node) {
            self.shows.insert(n, content);
        }
    }

    /// The file is open by way of a node that has given it away.
    pub(crate) fn is_handed(&self, file: &str) -> bool {
        let g = &self.graph;
        g.nodes.iter().any(|(n, node)| node.inactive && g.file_of(n).is_some_and(|f| f == file))
    }

    /// Whether a file is known to be what a node of this driver takes it for.
    pub(crate) fn is_format(&self, file: &str, driver: &str) -> bool {
        self.formats.get(file).is_none_or(|f| (f == "qcow2") == (driver == "qcow2"))
    }

    /// Somebody writes to a file as it is, whatever format it had.
    pub(crate) fn taken_raw(&mut self, node: &str) {
        let down = self.graph.down(node);
        // What is written through a window shows elsewhere in the whole.
        if let Some(at) = down.iter().position(|n| self.windows.contains(n)) {
            for n in &down[at + 1..] {
                self.forget(n, "it is written through a window");
            }
        }
        let Some(leaf) = down.last().filter(|l| self.graph.child(l, &["file", "image"]).is_none()) else {
            return;
        };
        if let Some(f) = self.graph.file_of(leaf) {
            // A node of the same file that nobody uses does not forbid it, and shows it.
            let g = &self.graph;
            let other = |n: &&String| g.file_of(n).as_ref() == Some(&f) && !g.down(n).contains(leaf);
            let others: Vec<String> = g.nodes.keys().filter(other).cloned().collect();
            for n in others {
                self.forget(&n, "its file is written by way of another node");
            }
            self.images.remove(&f);
            if let Some(format) = self.formats.get_mut(&f).filter(|f| *f == "qcow2") {
                *format = "raw".into();
            }
        }
    }

    /// A file is not what it was, and what it is nobody knows.
    pub(crate) fn spoilt(&mut self, file: &str) {
        self.closed.remove(file);
        self.formats.remove(file);
        self.images.remove(file);
        self.renamed.insert(file.to_owned());
    }

    /// Gives up on a node and what it shows.
    pub(crate) fn forget(&mut self, node: &str, why: &str) {
        let c = self.content(node);
        self.book().forget(c, why);
    }

    /// An overlay is put over a node: what the node showed shows there now, and the node keeps what it held.
    pub(crate) fn snapshot(&mut self, node: &str, overlay: &str, from: Moment) {
        let c = self.content(node);
        let old = self.shows.get(overlay).copied();
        let frozen = {
            let mut book = open(&self.book);
            let name = format!("{node} under {overlay}");
            let sectors = book.sectors(c);
            let frozen = book.copy(&name, c, from, 0..sectors);
            book.lie_over_the_same(frozen, c);
            frozen
        };
        self.stays(node, c, frozen);
        if let Some(old) = old {
            let moved: Vec<String> = self.shows.iter().filter(|s| *s.1 == old).map(|s| s.0.clone()).collect();
            for n in moved {
                self.shows.insert(n, c);
            }
            if self.exports.values().any(|e| e.content == old) {
                self.book().forget(old, "it became an overlay under its users");
            }
        }
        self.shows.insert(overlay.to_owned(), c);
    }

    /// A node, what it shows and whoever shows that too have `kept` from now on, since something has taken the node's place.
    fn stays(&mut self, node: &str, was: ContentId, kept: ContentId) {
        self.show(node, kept);
        let mut here = self.graph.beside(node);
        for n in &here {
            if self.shows.get(n) == Some(&was) {
                self.shows.insert(n.clone(), kept);
            }
        }
        here.extend(self.graph.down(node));
        // A job that copies from there copies what is kept.
        for j in self.jobs.values_mut().filter(|j| j.from == was && here.contains(&j.source)) {
            j.from = kept;
        }
    }

    /// What is shown above a node, and nowhere else: whoever copies the node's data to what lies below keeps it right.
    pub(crate) fn shows_above(&self, node: &str, content: ContentId) -> Vec<ContentId> {
        let mut above: Vec<&str> = vec![node];
        let mut at = 0;
        while let Some(name) = above.get(at).copied() {
            let parents = self.graph.edges.iter().filter(|e| e.1 == name && e.2 != "target");
            let new: Vec<&str> = parents.map(|e| e.0.as_str()).filter(|p| !above.contains(p)).collect();
            above.extend(new);
            at += 1;
        }
        let elsewhere = |c: &ContentId| self.shows.iter().any(|s| s.1 == c && !above.contains(&s.0.as_str()));
        let shown = above.iter().filter_map(|n| self.shows.get(*n).copied());
        shown.filter(|c| *c == content || !elsewhere(c)).collect()
    }

    /// The source of a job gives way to its target.
    pub(crate) fn pivot(&mut self, job: &Job, from: Moment) {
        let frozen = {
            let mut book = open(&self.book);
            let sectors = book.sectors(job.from);
            let name = format!("{} after a pivot", job.source);
            let frozen = book.copy(&name, job.from, from, 0..sectors);
            book.lie_over_the_same(frozen, job.from);
            frozen
        };
        self.stays(&job.source, job.from, frozen);
        {
            let kept = self.shows_above(&job.source, job.from);
            let mut book = open(&self.book);
            book.feed(job.from, job.to, from, &kept);
            book.follow(job.from, job.to);
        }
        {
            let mut book = open(&self.book);
            if book.sectors(job.to) > book.sectors(job.from) {
                self.longer.extend(self.graph.file_of(&job.target));
                // New users see all of it.
                if book.is_known(job.to) && book.is_known(job.from) {
                    book.take_tail(job.from, job.to);
                }
            }
        }
        self.show(&job.target.clone(), job.from);
        if let Some(f) = &job.file {
            self.closed.insert(f.clone(), job.from);
        }
    }
}
