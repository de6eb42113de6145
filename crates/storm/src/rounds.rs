//! How a round begins, and what is looked at when it has ended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::sys::signal::Signal;
use serde_json::{Value as Json, json};

use crate::book::{ContentId, Look, SECTOR, Tag};
use crate::choose::server_start;
use crate::daemon::{Daemon, Tools};
use crate::images::{DEVICE, SERVED, tags_of};
use crate::load::Worker;
use crate::pester::Pester;
use crate::qmp::Reply;
use crate::rng::Rng;
use crate::steps::Way;
use crate::storm::{Numbers, Storm};
use crate::world::{World, short};

/// An image of a chain: the name of its file, its format, what its header names.
struct Link {
    name: String,
    format: String,
    backing: Option<String>,
    /// How it is opened, if that is more than a format of a file: an image in an image, say.
    definition: Option<Json>,
    /// Who names it says that there is nothing below, whatever its header names.
    cut: bool,
}

impl Link {
    /// What is served by the server behind the daemon, or what needs a definition of its own.
    fn other(name: &str, definition: Option<Json>) -> Link {
        Link { name: name.to_owned(), format: "raw".into(), backing: None, definition, cut: false }
    }

    /// The files in it.
    fn files(&self) -> Vec<String> {
        fn collect(v: &Json, into: &mut Vec<String>) {
            for (k, v) in v.as_object().into_iter().flatten() {
                match v.as_str() {
                    Some(name) if k == "filename" => into.push(short(name)),
                    _ => collect(v, into),
                }
            }
        }
        let mut out = vec![self.name.clone()];
        self.definition.iter().for_each(|d| collect(d, &mut out));
        out
    }
}

/// What files must show, by their names and the formats that they are read as.
type Expected = BTreeMap<(String, String), ContentId>;

/// What a header, or a definition, names.
enum Named {
    Nothing,
    File(String, String),
    Definition(Json),
}

impl Storm<'_> {
    /// The chain that headers name, from the top.
    fn chain(&self, file: &str, format: &str) -> Result<Vec<Link>, String> {
        let mut out = Vec::new();
        self.follow(file, format, &mut out)?;
        Ok(out)
    }

    /// The same; what was found until it could not be followed any more is in `out`.
    fn follow(&self, file: &str, format: &str, out: &mut Vec<Link>) -> Result<(), String> {
        let mut next = Named::File(file.to_owned(), format.to_owned());
        loop {
            if out.len() > 60 {
                let links: Vec<&str> = out.iter().take(6).map(|l| l.name.as_str()).collect();
                return Err(format!("the chain of {file} has no end: {}", links.join(" -> ")));
            }
            let (name, format, below) = match next {
                Named::Nothing => return Ok(()),
                Named::File(name, _) if name.starts_with("nbd") => {
                    out.push(Link::other(SERVED, None));
                    return Ok(());
                }
                Named::File(name, format) => (short(&name), format, None),
                Named::Definition(d) => match simple(&d) {
                    Some((name, format)) => (short(&name), format, d.get("backing").cloned()),
                    None if d["driver"] == "nbd" || d["file"]["driver"] == "nbd" => {
                        out.push(Link::other(SERVED, None));
                        return Ok(());
                    }
                    None => {
                        out.push(Link::other(&format!("json:{d}"), Some(d)));
                        return Ok(());
                    }
                },
            };
            let format = if format == "qcow2" { "qcow2" } else { "raw" };
            let args = ["info", "-U", "--output=json", "-f", format, &name];
            let (code, text) = Tools::run(&self.dir, &self.tools.judge.join("qemu-img"), &args);
            if code != 0 {
                return Err(text);
            }
            let info: Json = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
            let header = info["backing-filename"].as_str().map(str::to_owned);
            let cut = header.is_some() && below == Some(Json::Null);
            next = match (below, &header) {
                (Some(Json::Null), _) => Named::Nothing,
                (Some(b), _) => Named::Definition(b),
                (None, Some(b)) => match b.strip_prefix("json:") {
                    Some(d) => Named::Definition(serde_json::from_str(d).map_err(|e| format!("{e}: {b}"))?),
                    None => {
                        let full = info["full-backing-filename"].as_str().unwrap_or(b);
                        let format = info["backing-filename-format"].as_str().unwrap_or("raw");
                        Named::File(full.to_owned(), format.to_owned())
                    }
                },
                (None, None) => Named::Nothing,
            };
            let backing = header.as_deref().map(short_name);
            out.push(Link { name, format: format.to_owned(), backing, definition: None, cut });
        }
    }

    /// Everything that a reader of a file sees.
    fn read(&self, file: &str, format: &str, options: &[&str]) -> Result<Vec<u8>, String> {
        let mut args = vec!["convert", "-O", "raw"];
        match options {
            [] if format == "json" => {}
            [] => args.extend(["-f", if format == "qcow2" { "qcow2" } else { "raw" }]),
            o => args.extend(o),
        }
        args.extend([file, "seen.raw"]);
        let (code, text) = Tools::run(&self.dir, &self.tools.judge.join("qemu-img"), &args);
        let seen = self.dir.join("seen.raw");
        let data = std::fs::read(&seen);
        let _ = std::fs::remove_file(seen);
        if code != 0 {
            return Err(format!("qemu-img {}: {text}", args.join(" ")));
        }
        data.map_err(|e| e.to_string())
    }

    pub(crate) fn begin_round(&mut self) -> Result<(), String> {
        let first = self.round == 0;
        self.opened.push(Vec::new());
        let (count, formats) = (self.world.count, std::mem::take(&mut self.world.formats));
        let images = std::mem::take(&mut self.world.images);
        self.world = World::new(self.book.clone());
        self.world.count = count;
        self.world.formats = formats;
        self.world.images = if first { self.files.images.keys().cloned().collect() } else { images };
        self.learn_files(first);
        let mut daemon = Daemon::start(&self.tools.daemon(), &self.dir, "storm")?;
        self.monitors = vec![daemon.connect(0)?, daemon.connect(1)?];
        let pester = daemon.connect(2)?;
        self.daemon = Some(daemon);
        let commands = self.monitors[0].ask("query-commands", &json!({}));
        self.ours = matches!(&commands, Reply::Done(v) if v.to_string().contains("\"what-if\""));
        self.empty = self.daemon.as_ref().map(Daemon::weight).unwrap_or_default();
        self.pester =
            Some(Pester::start(pester, Rng::new(self.seed, 300 + self.round), self.numbers.clone()));
        let start = server_start();
        self.must(&start.name, &start.arguments)?;
        self.world.server = true;
        for top in self.files.tops.clone() {
            self.open_chain(&top)?;
        }
        let mut rng = Rng::new(self.seed, 310 + self.round);
        let rest: Vec<String> = self.world.closed.keys().filter(|f| f.starts_with('t')).cloned().collect();
        for file in rest {
            if rng.percent(50) {
                let format = self.world.formats[&file].clone();
                self.open_target(&file, &format);
            }
        }
        self.observe();
        self.disks = self.files.tops.clone().iter().map(|t| self.world.content(t)).collect();
        Ok(())
    }

    /// What is known of each file.
    fn learn_files(&mut self, first: bool) {
        if first {
            let images = self.files.images.clone();
            for (name, i) in images {
                let c = self.world.book().known(&name, &i.tags);
                self.world.closed.insert(name.clone(), c);
                self.world.formats.insert(name.clone(), i.format.clone());
                if let Some(b) = i.backing {
                    self.world.backings.insert(name.clone(), b);
                    if matches!(name.as_bytes(), [b't', _, b'e' | b'f']) {
                        self.world.empty.insert(name);
                    }
                }
            }
            return;
        }
        let files = self.world.formats.clone();
        for (name, format) in files {
            let (Ok(data), Ok(chain)) = (self.read(&name, &format, &[]), self.chain(&name, &format)) else {
                continue;
            };
            let tags: Option<Vec<Tag>> = tags_of(&data).into_iter().collect();
            let c = match tags {
                Some(t) => self.world.book().known(&name, &t),
                None => self.world.book().unknown(&name, "it holds what nobody wrote"),
            };
            self.world.closed.insert(name.clone(), c);
            if let Some(b) = chain.first().and_then(|l| l.backing.clone()) {
                self.world.backings.insert(name, b);
            }
        }
    }

    fn must(&mut self, command: &str, arguments: &Json) -> Result<(), String> {
        self.tell(command, arguments);
        match self.monitors[0].ask(command, arguments) {
            Reply::Done(_) => Ok(()),
            other => Err(format!("{command} {arguments}: {other:?}")),
        }
    }

    /// Adds a node for each image of a chain, named like its file.
    fn open_chain(&mut self, top: &str) -> Result<(), String> {
        let format = self.world.formats.get(top).cloned().unwrap_or_default();
        let chain = self.chain(top, &format)?;
        let twice = |(i, l): (usize, &Link)| chain[..i].iter().any(|m| m.name == l.name);
        if chain.iter().enumerate().any(twice) {
            return Err(format!("a file is in the chain of {top} twice, as this and that"));
        }
        let mut below = Json::Null;
        for link in chain.iter().rev() {
            let name = match &link.definition {
                _ if link.name == SERVED => "served".to_owned(),
                Some(_) => self.world.fresh_name("w"),
                None => node_name(&link.name),
            };
            if self.world.shows.contains_key(&name) {
                // Two disks that share what is below.
                below = name.into();
                continue;
            }
            let mut a = match &link.definition {
                _ if link.name == SERVED => json!({
                    "driver": "nbd", "node-name": name, "export": "b", "server": {"type": "unix", "path": "back.nbd"},
                }),
                Some(d) => {
                    let mut d = d.clone();
                    d["node-name"] = name.clone().into();
                    d
                }
                None => {
                    let protocol = if link.name == DEVICE { "host_device" } else { "file" };
                    json!({
                        "driver": link.format, "node-name": name, "discard": "unmap",
                        "file": {"driver": protocol, "node-name": format!("{name}f"), "filename": link.name},
                    })
                }
            };
            if link.format == "qcow2" {
                a["backing"] = below.clone();
            }
            if link.name != top {
                a["read-only"] = true.into();
            }
            self.must("blockdev-add", &a)?;
            // Somebody may have named an image as if it were raw, say.
            let other = !self.world.is_format(&link.name, &link.format) || link.cut;
            if link.cut {
                self.world.renamed.insert(link.name.clone());
            }
            let c = match self.world.closed.get(&link.name) {
                Some(_) if other => self.world.book().unknown(&name, "it is opened as something else"),
                Some(c) => *c,
                None if link.definition.is_some() => {
                    let seen = self.read(&link.name, "json", &[]);
                    let tags = seen.ok().and_then(|d| tags_of(&d).into_iter().collect::<Option<Vec<Tag>>>());
                    match tags {
                        Some(t) => self.world.book().known(&name, &t),
                        None => self.world.book().unknown(&name, "it holds what nobody wrote"),
                    }
                }
                None => self.world.book().unknown(&name, "it is served by another"),
            };
            self.world.shows.insert(name.clone(), c);
            if link.format == "raw" {
                self.world.shows.insert(format!("{name}f"), c);
            }
            below = name.into();
        }
        Ok(())
    }

    fn open_target(&mut self, file: &str, format: &str) {
        let mut a = json!({
            "driver": if format == "qcow2" { "qcow2" } else { "raw" }, "node-name": node_name(file),
            "file": {"driver": "file", "node-name": format!("{}f", node_name(file)), "filename": file},
        });
        if format == "qcow2" && self.world.backings.contains_key(file) {
            a["backing"] = Json::Null;
        }
        let from = self.world.book().moment();
        self.tell("blockdev-add", &a);
        if let Reply::Done(_) = self.monitors[0].ask("blockdev-add", &a) {
            self.world.apply("blockdev-add", &a, from);
        }
    }

    pub(crate) fn end_round(&mut self, way: Way, busy: bool) {
        self.observe();
        if !self.findings.is_empty() {
            return;
        }
        if !busy {
            // What a stopped server does not answer is not answered here.
            self.stop_workers(self.back_stopped);
        }
        self.observe();
        self.weigh();
        let expected = self.expected();
        if !busy && way != Way::Kill && Rng::new(self.seed, 620 + self.round).percent(60) {
            self.clear_away();
        }
        let end = self.end_daemon(way);
        if let Some(b) = &self.back {
            b.signal(Signal::SIGCONT);
            self.back_stopped = false;
        }
        self.stop_workers(true);
        self.monitors.clear();
        if let Some(e) = end {
            self.found("end", e);
        }
        if let Some(text) = self.daemon.as_ref().and_then(Daemon::bad_words) {
            self.found("panic", text);
        }
        self.daemon = None;
        self.check_images(way);
        self.judge_files(&expected, way);
        self.judge_snapshots();
        self.find_tops(&expected);
        self.round += 1;
        Numbers::add(&self.numbers.rounds, 1);
    }

    fn stop_workers(&mut self, may_be_lost: bool) {
        self.workers.values().flatten().for_each(Worker::tell_to_stop);
        for (id, list) in std::mem::take(&mut self.workers) {
            for w in list {
                self.count_requests(&w);
                let ending = self.world.exports.get(&id).is_none_or(|e| e.ending);
                let end = w.end();
                self.judge_worker(&id, end, may_be_lost || ending);
            }
        }
    }

    /// Ends the daemon; what is wrong about how it ends.
    fn end_daemon(&mut self, way: Way) -> Option<String> {
        if let Some(p) = &self.pester {
            p.tell_to_stop();
        }
        let on_device = self.image_on_device();
        let daemon = self.daemon.as_mut()?;
        match way {
            Way::Quit => self.monitors[0].send("quit", &json!({})),
            Way::Terminate => daemon.signal(Signal::SIGTERM),
            Way::Kill => daemon.signal(Signal::SIGKILL),
        }
        let status = daemon.wait();
        self.pester = None;
        match status {
            None => Some(format!("the daemon does not end after {way:?}")),
            Some(s)
                if way != Way::Kill
                    && !s.success()
                    && !(self.files.full || on_device)
                    && self.files.served.is_none() =>
            {
                Some(format!("the daemon ends with {s} after {way:?}"))
            }
            Some(_) => None,
        }
    }

    /// What files have to hold, each read as one format.
    fn expected(&mut self) -> Expected {
        let mut out = BTreeMap::new();
        let moving: Vec<ContentId> =
            self.world.jobs.values().filter(|j| j.told.is_some()).flat_map(|j| [j.from, j.to]).collect();
        for (file, c) in &self.world.closed {
            let Some(format) = self.world.formats.get(file) else { continue };
            if !self.world.backings.contains_key(file) && !self.world.renamed.contains(file) {
                out.insert((file.clone(), format.clone()), *c);
            }
        }
        let names: Vec<String> = self.world.graph.nodes.keys().cloned().collect();
        for n in names {
            if self.world.graph.format_node(&n) != n {
                continue;
            }
            let Some(file) = self.world.graph.file_of(&n) else { continue };
            let Some(format) = self.world.formats.get(&file) else { continue };
            // A file with an image in it is raw as well.
            let format = match self.world.graph.nodes[&n].driver.as_str() {
                "qcow2" => "qcow2".to_owned(),
                _ if format == "device" => format.clone(),
                _ => "raw".to_owned(),
            };
            if self.world.graph.nodes[&n].inactive && self.world.handed.contains(&file) {
                continue;
            }
            let c = self.world.content(&n);
            if moving.contains(&c) || self.world.renamed.contains(&file) {
                out.remove(&(file, format));
            } else {
                out.insert((file, format), c);
            }
        }
        out
    }

    fn check_images(&mut self, way: Way) {
        let files: Vec<String> =
            self.world.formats.iter().filter(|f| f.1 == "qcow2").map(|f| f.0.clone()).collect();
        for file in files {
            let path = self.dir.join(&file);
            // A file that a refused command was to make.
            if !path.is_file() {
                continue;
            }
            if way == Way::Kill {
                self.leaky.insert(file.clone());
            }
            if way == Way::Kill && is_dirty(&path) {
                // Its reference counts are to be made anew by whoever opens it.
                continue;
            }
            let tool = self.tools.judge.join("qemu-img");
            // What stands below is looked at by itself.
            let alone =
                json!({"driver": "qcow2", "backing": null, "file": {"driver": "file", "filename": file}});
            let (code, text) = Tools::run(&self.dir, &tool, &["check", "-U", &format!("json:{alone}")]);
            let leaks = self.leaky.contains(&file) || file.starts_with("full");
            // A job that makes an image may have been killed before it was one.
            let half_made =
                code == 1 && self.world.jobs.values().any(|j| j.file.as_deref() == Some(file.as_str()));
            if code != 0 && !(code == 3 && leaks) && !half_made {
                let text: String = text.chars().take(600).collect();
                self.found("image", format!("qemu-img check {file} answers {code}: {text}"));
            }
        }
    }

    fn judge_files(&mut self, expected: &Expected, way: Way) {
        let now = self.world.book().moment();
        let look = if way == Way::Kill { Look::Crash } else { Look::Live(now) };
        for ((file, format), c) in expected {
            let (known, size) = {
                let book = self.world.book();
                (book.is_known(*c), book.sectors(*c) * SECTOR)
            };
            if !known {
                continue;
            }
            let honest = |l: &Link| l.cut || !l.files().iter().any(|f| self.world.renamed.contains(f));
            let mut chain = Vec::new();
            let followed = self.follow(file, format, &mut chain);
            // What somebody has named leads to anything.
            if !chain.iter().all(honest) {
                continue;
            }
            if let Err(e) = followed {
                self.found("chain", format!("the chain of {file} can't be followed after {way:?}: {e}"));
                continue;
            }
            match self.read(file, format, &[]) {
                // QEMU has no way to put another image in an image below one whose header names a file.
                Err(e) if e.contains("Can't specify 'file' and 'filename' options") => {}
                Err(e) => self.found("chain", format!("{file} can't be read after {way:?}: {e}")),
                Ok(mut data) => {
                    Numbers::add(&self.numbers.compared, 1);
                    // A device does not become shorter for what is written to it.
                    if self.world.longer.contains(file) || file == DEVICE && format != "qcow2" {
                        data.truncate(size as usize);
                    }
                    if data.len() as u64 != size {
                        self.found(
                            "size",
                            format!(
                                "{file} has {} bytes after {way:?}, not {size} ('{}')",
                                data.len(),
                                self.world.book().name(*c)
                            ),
                        );
                        continue;
                    }
                    let judged = self.world.book().judge(*c, 0, &data, look);
                    if let Err(e) = judged {
                        let chain: Vec<&str> = chain.iter().map(|l| l.name.as_str()).collect();
                        self.found(
                            "data",
                            format!("{file} (chain {}) after {way:?}: {e}", chain.join(" -> ")),
                        );
                    }
                }
            }
        }
    }

    /// Internal snapshots hold what they held in the beginning.
    fn judge_snapshots(&mut self) {
        let is_there = |n: &String| self.world.images.contains(n);
        let images: Vec<_> =
            self.files.images.iter().filter(|i| i.1.snapshot && is_there(i.0)).map(|i| i.0.clone()).collect();
        for name in images {
            let options = ["-f", "qcow2", "-l", "snapshot.name=s1"];
            // With a backing file of late, what it does not hold itself comes from there.
            let alone = self.chain(&name, "qcow2").is_ok_and(|c| c.len() == 1);
            let Some(data) = self.read(&name, "qcow2", &options).ok().filter(|_| alone) else { continue };
            let tags: Vec<Option<Tag>> = self.files.images[&name].tags.iter().map(|t| Some(*t)).collect();
            let seen = tags_of(&data);
            if let Some(s) = (0..tags.len().min(seen.len())).find(|s| seen[*s] != tags[*s]) {
                let text =
                    format!("snapshot s1 of {name}: sector {s} holds {:?}, not {:?}", seen[s], tags[s]);
                self.found("snapshot", text);
            }
        }
    }

    /// The files that the disks' active layers are in now.
    fn find_tops(&mut self, expected: &Expected) {
        for (i, c) in self.disks.clone().into_iter().enumerate() {
            let formats = &self.world.formats;
            let is_top =
                |e: &(&(String, String), &ContentId)| *e.1 == c && formats.get(&e.0.0) == Some(&e.0.1);
            if let Some(((file, _), _)) = expected.iter().find(is_top) {
                self.files.tops[i] = file.clone();
            }
        }
    }
}

/// Whether an image says that its reference counts may be wrong.
fn is_dirty(path: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut feature = [0; 8];
    let read = std::fs::File::open(path).and_then(|f| f.read_exact_at(&mut feature, 72));
    let version_3 = read.is_ok();
    version_3 && feature[7] & 1 != 0
}

/// The name in a header, as files are called here; an empty one for what is more than a format of a file.
fn short_name(name: &str) -> String {
    match name.strip_prefix("json:").map(serde_json::from_str::<Json>) {
        None if name.starts_with("nbd") => SERVED.to_owned(),
        None => short(name),
        Some(Ok(d)) if d["driver"] == "nbd" || d["file"]["driver"] == "nbd" => SERVED.to_owned(),
        Some(d) => d.ok().and_then(|d| simple(&d)).map(|n| short(&n.0)).unwrap_or_default(),
    }
}

/// The file and the format of a definition that is no more than that.
fn simple(d: &Json) -> Option<(String, String)> {
    let driver = d["driver"].as_str()?;
    let leaf = |v: &Json| ["file", "host_device"].contains(&v["driver"].as_str().unwrap_or_default());
    if leaf(d) {
        return Some((d["filename"].as_str()?.to_owned(), "raw".into()));
    }
    let plain = d.as_object()?.keys().all(|k| ["driver", "file", "backing"].contains(&k.as_str()));
    let format = ["qcow2", "raw"].contains(&driver) && plain && leaf(&d["file"]);
    format.then(|| Some((d["file"]["filename"].as_str()?.to_owned(), driver.to_owned())))?
}

/// A node's name for a file.
fn node_name(file: &str) -> String {
    Path::new(file).file_name().map_or_else(|| file.to_owned(), |n| n.to_string_lossy().into_owned())
}

/// So many requests, for the report.
pub(crate) fn total(numbers: &Numbers) -> u64 {
    numbers.requests.load(Ordering::Relaxed)
}
