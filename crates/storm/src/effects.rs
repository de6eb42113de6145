//! What accepted commands and events mean for what disks show.

use serde_json::Value as Json;

use crate::book::{ContentId, Moment, SECTOR};
use crate::images::DEVICE;
use crate::world::{Export, Job, Work, World, short};

fn text<'a>(v: &'a Json, name: &str) -> &'a str {
    v[name].as_str().unwrap_or_default()
}

/// A node's definition with another's name or definition in it.
fn reference<'a>(v: &'a Json, name: &str) -> Option<&'a str> {
    v[name].as_str()
}

impl World {
    /// Whether a job is about to move what this node shows.
    fn is_moving(&mut self, node: &str) -> bool {
        let c = self.content(node);
        let down = self.graph.down(node);
        self.jobs.values().any(|j| {
            j.told.is_some()
                && (j.from == c || j.to == c || down.contains(&j.source) || down.contains(&j.target))
        })
    }

    /// What a node shows, for somebody who comes now.
    fn content_now(&mut self, node: &str) -> ContentId {
        if self.is_moving(node) {
            let c = self.book().unknown(node, "a job was about to move it");
            return c;
        }
        self.content(node)
    }

    /// A command has been accepted. It was sent at `from`.
    pub(crate) fn apply(&mut self, command: &str, a: &Json, from: Moment) {
        match command {
            "blockdev-add" => self.added(a, from),
            "block-export-add" => {
                // Nobody knows to which disk of the two it would write.
                let moving = self.is_moving(text(a, "node-name"));
                let content = self.content_now(text(a, "node-name"));
                let writable = a["writable"].as_bool().unwrap_or_default() && !moving;
                if writable {
                    self.taken_raw(text(a, "node-name"));
                }
                let export = Export { content, writable, ending: false };
                self.exports.insert(text(a, "id").to_owned(), export);
            }
            "block-export-del" => {
                if let Some(e) = self.exports.get_mut(text(a, "id")) {
                    e.ending = true;
                }
            }
            "operation-begin" => {
                self.operations.insert(text(a, "id").to_owned());
            }
            "operation-end" => {
                self.operations.remove(text(a, "id"));
            }
            "nbd-server-start" => self.server = true,
            "nbd-server-stop" => {
                self.server = false;
                self.exports.values_mut().for_each(|e| e.ending = true);
            }
            "transaction" => {
                for action in a["actions"].as_array().into_iter().flatten() {
                    self.apply(text(action, "type"), &action["data"], from);
                }
            }
            "blockdev-snapshot" => {
                let file = self.graph.file_of(text(a, "overlay"));
                self.covered(text(a, "node"), text(a, "overlay"), file, from);
            }
            "blockdev-snapshot-sync" => {
                self.images.remove(text(a, "snapshot-file"));
                self.formats.insert(text(a, "snapshot-file").to_owned(), text(a, "format").to_owned());
                // Its node is not in the graph that we know.
                let file = Some(text(a, "snapshot-file").to_owned());
                self.covered(text(a, "node-name"), text(a, "snapshot-node-name"), file, from);
            }
            "block_resize" => {
                self.taken_raw(text(a, "node-name"));
                let c = self.content_now(text(a, "node-name"));
                let size = a["size"].as_u64().unwrap_or_default();
                // A device has the size that it has; being asked for less is no error.
                let node = self.graph.format_node(text(a, "node-name"));
                let device = self.graph.file_of(&node).is_some_and(|f| f == DEVICE)
                    && self.graph.nodes.get(&node).is_some_and(|n| n.driver != "qcow2");
                let mut book = self.book();
                if book.is_known(c) && !device {
                    book.resize(c, size.div_ceil(SECTOR));
                }
            }
            "change-backing-file" => {
                let node = self.graph.format_node(text(a, "image-node-name"));
                let named = self.graph.backing(&node).and_then(|b| self.graph.file_of(b));
                if named != a["backing-file"].as_str().map(short)
                    && let Some(f) = self.graph.file_of(&node)
                {
                    self.renamed.insert(f);
                }
            }
            "blockdev-reopen" => {
                for o in a["options"].as_array().into_iter().flatten() {
                    self.reopened(o);
                }
            }
            "blockdev-set-active" => {
                // What others have done to the image meanwhile shows now.
                let names: Vec<String> = match a["node-name"].as_str() {
                    Some(n) => self.graph.down(n),
                    None => self.graph.nodes.keys().cloned().collect(),
                };
                for n in names.iter().filter(|_| a["active"] == true) {
                    if self.graph.file_of(n).is_some_and(|f| self.handed.contains(&f)) {
                        self.forget(n, "another node had its image");
                    }
                }
            }
            "blockdev-create" => {
                let file = short(text(&a["options"], "filename"));
                self.making.insert(text(a, "job-id").to_owned(), file);
                self.created(&a["options"]);
            }
            "block-stream" | "block-commit" | "blockdev-mirror" | "blockdev-backup" | "drive-mirror"
            | "drive-backup" => {
                self.job(command, a, from);
            }
            "job-complete" | "block-job-complete" => self.told(a, true),
            "job-cancel" | "block-job-cancel" => self.told(a, false),
            _ => {}
        }
    }

    fn covered(&mut self, node: &str, overlay: &str, file: Option<String>, from: Moment) {
        let old = self.shows.get(overlay).copied();
        let is_filled = self.jobs.values().any(|j| Some(j.to) == old && j.work != Work::Unseen);
        if self.is_moving(node) || is_filled {
            for n in [node, overlay] {
                let c = self.book().unknown(n, "a snapshot beside a job");
                self.show(n, c);
            }
            return;
        }
        self.taken_raw(node);
        let below = self.graph.file_of(node);
        let size = self.graph.nodes.get(overlay).map_or(0, |o| o.size / SECTOR);
        self.snapshot(node, overlay, from);
        // Nobody has written the end of a larger overlay. Who used the node keeps its size, new users see all.
        let c = self.content(overlay);
        {
            let mut book = crate::world::open(&self.book);
            if book.is_known(c) && size > book.sectors(c) {
                book.resize(c, size);
            }
        }
        // From now on its header has to name what is below.
        if let Some(f) = file {
            self.formats.insert(f.clone(), "qcow2".into());
            self.renamed.remove(&f);
            if let Some(b) = below {
                if self.longer.contains(&b) {
                    self.longer.insert(f.clone());
                }
                self.backings.insert(f, b);
            }
        }
    }

    fn added(&mut self, a: &Json, from: Moment) {
        let name = text(a, "node-name").to_owned();
        let child = reference(a, "file").or_else(|| reference(a, "image"));
        let content = match text(a, "driver") {
            "raw" if !a["offset"].is_null() || !a["size"].is_null() => {
                self.windows.insert(name.clone());
                None
            }
            "raw" | "copy-on-read" | "blkdebug" if child.is_some() => child.map(|c| self.content_now(c)),
            "copy-before-write" if child.is_some() => {
                child.map(|c| self.saves(&name, c, text(a, "target"), from))
            }
            "snapshot-access" => child.and_then(|c| self.saved.get(c).copied()),
            "qcow2" | "raw" => self.image(a, from),
            "host_device" | "file" => {
                let file = short(text(a, "filename"));
                let raw = self.formats.get(&file).is_some_and(|f| f != "qcow2");
                self.closed.get(&file).copied().filter(|_| raw)
            }
            _ => None,
        };
        let content = content.unwrap_or_else(|| self.book().unknown(&name, "nobody knows what it holds"));
        self.shows.insert(name, content);
        if let Some(n) = a["file"]["node-name"].as_str().filter(|_| a["driver"] == "raw") {
            self.shows.insert(n.to_owned(), content);
        }
    }

    fn saves(&mut self, name: &str, child: &str, target: &str, from: Moment) -> ContentId {
        let of = self.content_now(child);
        self.taken_raw(target);
        let into = self.content(target);
        let mut book = crate::world::open(&self.book);
        let sectors = book.sectors(of);
        let before = book.copy("a point in time", of, from, 0..sectors);
        self.saved.insert(name.to_owned(), before);
        book.feed(of, into, from, &[of]);
        book.feed_zeroes(into);
        book.follow(of, into);
        of
    }

    /// What an image shows when it is opened.
    fn image(&mut self, a: &Json, from: Moment) -> Option<ContentId> {
        let file = short(a["file"]["filename"].as_str()?);
        if self.is_handed(&file) {
            self.handed.insert(file);
            return None;
        }
        let same = self.is_format(&file, text(a, "driver"));
        let known = self.closed.get(&file).copied().filter(|_| same);
        let empty = self.empty.remove(&file);
        match (&a["backing"], self.backings.get(&file).cloned()) {
            (Json::Null, None) => known,
            (_, None) => {
                self.renamed.insert(file);
                None
            }
            (Json::String(b), Some(header)) => {
                if self.graph.file_of(b).as_ref() != Some(&header) {
                    self.renamed.insert(file.clone());
                }
                let sectors = known.map(|k| self.book().sectors(k));
                let below = self.content_now(b);
                // Whether an overlay that was used before shows what is below is its own affair, and what a base holds
                // beyond its former end nobody keeps track of.
                let empty = empty && !self.longer.contains(&header);
                empty.then(|| {
                    let mut book = crate::world::open(&self.book);
                    let over = book.copy(&file, below, from, 0..sectors.unwrap_or(0));
                    // What is written below from now on shows as well.
                    book.follow(below, over);
                    over
                })
            }
            _ => {
                self.renamed.insert(file);
                None
            }
        }
    }

    fn reopened(&mut self, o: &Json) {
        let node = text(o, "node-name").to_owned();
        let is = |link: &str, graph: &crate::world::Graph| match &o[link] {
            Json::String(s) => {
                graph.child(&node, &[link]).is_some_and(|c| graph.down(c).contains(s) || c == s)
            }
            Json::Null => {
                link != "backing" || o.get("backing").is_none() || graph.child(&node, &[link]).is_none()
            }
            _ => false,
        };
        if !is("backing", &self.graph) {
            if let Some(f) = self.graph.file_of(&node) {
                self.renamed.insert(f);
            }
            self.forget(&node, "it was put onto another node");
        } else if !is("file", &self.graph) || !o["offset"].is_null() || !o["size"].is_null() {
            self.forget(&node, "it was put onto another file");
        }
    }

    fn created(&mut self, o: &Json) {
        if let Some(node) = reference(o, "file") {
            self.taken_raw(node);
        }
        match reference(o, "file") {
            Some(node) => {
                let node = node.to_owned();
                if let (Some(b), Some(f)) = (o["backing-file"].as_str(), self.graph.file_of(&node)) {
                    self.backings.insert(f.clone(), short(b));
                    self.formats.insert(f, "qcow2".into());
                }
                self.forget(&node, "an image was created in it");
                let over: Vec<String> =
                    self.graph.edges.iter().filter(|e| e.1 == node).map(|e| e.0.clone()).collect();
                for n in over {
                    self.forget(&n, "an image was created below it");
                }
            }
            None => {
                let file = short(text(o, "filename"));
                self.closed.remove(&file);
                self.images.remove(&file);
                self.backings.remove(&file);
                self.formats.insert(file, "raw".into());
            }
        }
    }

    fn told(&mut self, a: &Json, pivot: bool) {
        let id = a["id"].as_str().or_else(|| a["device"].as_str()).unwrap_or_default().to_owned();
        let now = self.book().moment();
        let force = a["force"].as_bool().unwrap_or_default();
        if let Some(j) = self.jobs.get_mut(&id) {
            match j.told {
                Some((_, p)) if p != pivot => j.ambiguous = true,
                Some(_) => {}
                None => j.told = Some((now, pivot)),
            }
            j.ambiguous |= force && j.told.is_some_and(|t| t.1);
        }
    }

    fn job(&mut self, command: &str, a: &Json, from: Moment) {
        let device = text(a, "device").to_owned();
        let id = text(a, "job-id").to_owned();
        let source = a["top-node"].as_str().map_or_else(|| device.clone(), str::to_owned);
        let sync = text(a, "sync");
        let (mut file, mut target) = (None, text(a, "target").to_owned());
        let mut work = match command {
            "block-stream" => Work::Unseen,
            "block-commit" => {
                target = match a["base-node"].as_str() {
                    Some(b) => b.to_owned(),
                    None => self.lowest(&source),
                };
                if source == device { Work::ActiveCommit } else { Work::Commit }
            }
            "blockdev-mirror" | "drive-mirror" => Work::Mirror,
            _ => Work::Backup,
        };
        let from_content = self.content_now(&source);
        let to = match command {
            "drive-mirror" | "drive-backup" => {
                let name = std::mem::replace(&mut target, text(a, "node-name").to_owned());
                self.images.remove(&name);
                self.backings.remove(&name);
                // What lies below a copy of the topmost image, or of new writes only, may be written when the job is over.
                let below = match sync {
                    "top" => self.graph.backing(&source).map(str::to_owned),
                    "none" => Some(source.clone()),
                    _ => None,
                };
                if let Some(b) = below {
                    self.backings.insert(name.clone(), self.graph.file_of(&b).unwrap_or_default());
                }
                self.formats.insert(name.clone(), text(a, "format").to_owned());
                self.closed.remove(&name);
                file = Some(name);
                let c = self.book().unknown(&target, "a copy that is not finished");
                if !target.is_empty() {
                    self.shows.insert(target.clone(), c);
                }
                c
            }
            "block-stream" => from_content,
            _ => {
                self.taken_raw(&target.clone());
                self.content(&target)
            }
        };
        let partial = match sync {
            "top" if command.starts_with("blockdev-") => self.below(&target) != self.below(&source),
            "top" => false,
            "none" | "incremental" | "bitmap" => true,
            _ => false,
        };
        if work == Work::Backup && sync == "none" && self.below(&target) == Some(from_content) {
            work = Work::Fleece;
        }
        let base = self.graph.file_of(&target);
        // A copy of what is longer than we know is as long.
        if self.graph.file_of(&source).is_some_and(|f| self.longer.contains(&f)) {
            self.longer.extend(file.iter().chain(&base).cloned());
        }
        let kept = self.shows_above(&source, from_content);
        let before = self.flow(work, (from_content, to), from, base, &kept);
        if matches!(work, Work::Commit | Work::ActiveCommit) {
            self.zeroes_past_end(&source, from_content, to);
        }
        let job = Job {
            work,
            source,
            target,
            from: from_content,
            to,
            before,
            began: from,
            status: String::new(),
            told: None,
            ambiguous: false,
            partial,
            file,
        };
        self.jobs.insert(id, job);
    }

    /// Data begin to go from one disk to another.
    fn flow(
        &mut self,
        work: Work,
        (source, target): (ContentId, ContentId),
        from: Moment,
        file: Option<String>,
        kept: &[ContentId],
    ) -> Option<ContentId> {
        let mut book = crate::world::open(&self.book);
        let sectors = book.sectors(source);
        match work {
            Work::Unseen => None,
            Work::Mirror | Work::ActiveCommit | Work::Commit => {
                let grows = book.sectors(source) > book.sectors(target);
                if let Some(f) = file.filter(|_| work != Work::Mirror && grows) {
                    self.longer.insert(f);
                }
                book.feed(source, target, from, kept);
                if work == Work::Mirror {
                    book.feed_zeroes(target);
                }
                book.follow(source, target);
                None
            }
            Work::Backup => {
                let before = book.copy("a point in time", source, from, 0..sectors);
                book.feed(before, target, from, kept);
                book.feed_zeroes(target);
                Some(before)
            }
            Work::Fleece => {
                book.copy_into(target, source, from, 0..sectors);
                None
            }
        }
    }

    /// An overlay that is larger than what is committed reads zeroes behind the end of that; a larger base gets them there.
    fn zeroes_past_end(&mut self, top: &str, committed: ContentId, base: ContentId) {
        let image = self.graph.format_node(top);
        let size = |n: &str| self.graph.nodes.get(n).map_or(0, |n| n.size);
        let over =
            self.graph.edges.iter().filter(|e| e.2 == "backing" && self.graph.format_node(&e.1) == image);
        let larger = over.map(|e| size(&e.0)).any(|s| s > size(&image));
        let mut book = crate::world::open(&self.book);
        let (from, to) = (book.sectors(committed), book.sectors(base));
        if larger && from < to {
            book.begin(base, from..to, 0, false, false);
        }
    }

    fn lowest(&self, node: &str) -> String {
        let mut at = node.to_owned();
        for _ in 0..100 {
            match self.graph.backing(&at) {
                Some(b) => at = b.to_owned(),
                None => break,
            }
        }
        at
    }

    fn below(&mut self, node: &str) -> Option<ContentId> {
        let b = self.graph.backing(node)?.to_owned();
        Some(self.content(&b))
    }

    /// Something has happened.
    pub(crate) fn event(&mut self, e: &Json) {
        let data = &e["data"];
        let device = text(data, "device").to_owned();
        match text(e, "event") {
            "JOB_STATUS_CHANGE" => {
                let id = text(data, "id").to_owned();
                if data["status"] == "concluded" {
                    self.making.remove(&id);
                }
                if data["status"] == "null" {
                    self.jobs.remove(&id);
                } else if let Some(j) = self.jobs.get_mut(&id) {
                    j.status = text(data, "status").to_owned();
                }
            }
            "BLOCK_JOB_READY" => {
                if let Some(j) = self.jobs.get_mut(&device).filter(|j| j.work == Work::Commit) {
                    // Somebody writes its top node, so it has to be completed like an active one.
                    j.work = Work::ActiveCommit;
                }
            }
            "BLOCK_JOB_COMPLETED" => self.over(&device, data.get("error").is_none()),
            "BLOCK_JOB_CANCELLED" => self.over(&device, false),
            "BLOCK_EXPORT_DELETED" => {
                self.exports.remove(text(data, "id"));
            }
            _ => {}
        }
    }

    fn over(&mut self, id: &str, succeeded: bool) {
        let Some(j) = self.jobs.get_mut(id) else { return };
        let job = j.clone();
        j.told = None;
        self.ended_well += u64::from(succeeded);
        self.ended_point |= job.saves();
        let sectors = self.book().sectors(job.from);
        match job.work {
            Work::Fleece => {
                let mut book = self.book();
                let now = book.moment();
                book.feed(job.from, job.to, now, &[job.from]);
                book.follow(job.from, job.to);
            }
            _ if !succeeded => {
                if let Some(f) = &job.file {
                    self.closed.remove(f);
                }
            }
            Work::Unseen => {}
            Work::Mirror | Work::ActiveCommit => match job.told {
                Some((at, true)) if !job.ambiguous => self.pivot(&job, at),
                Some((at, false)) if !job.ambiguous => {
                    self.copied(&job, job.from, at, sectors);
                }
                // Nobody wrote its top node, so it ended by itself, like one from the middle of a chain.
                None if job.work == Work::ActiveCommit => self.pivot(&job, job.began),
                _ => {
                    for n in [&job.source, &job.target] {
                        let c = self.book().unknown(n, "who knows how its job ended");
                        self.show(n, c);
                    }
                }
            },
            // Whoever used its top node uses the base from now on.
            Work::Commit => self.pivot(&job, job.began),
            Work::Backup => {
                let before = job.before.expect("kept in the beginning");
                self.copied(&job, before, 0, sectors);
            }
        }
    }

    fn copied(&mut self, job: &Job, of: ContentId, at: Moment, sectors: u64) {
        if job.partial {
            let mut book = self.book();
            book.forget(job.to, "a copy of a part");
        } else {
            let at = if at == 0 { self.book().moment() } else { at };
            self.book().copy_into(job.to, of, at, 0..sectors);
        }
        if let Some(f) = &job.file {
            self.closed.insert(f.clone(), job.to);
        }
    }
}
