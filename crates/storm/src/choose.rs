//! Which command comes next. A choice depends on the seed, on the number of the step, and on what the
//! daemon has said so far.

use serde_json::{Value as Json, json};

use crate::images::DEVICE;
use crate::rng::Rng;
use crate::steps::{Command, Step, Way};
use crate::world::World;

/// Steps of a round, at most.
const LONGEST: u64 = 45;

pub(crate) struct Chooser<'a> {
    pub(crate) world: &'a mut World,
    pub(crate) rng: Rng,
    /// There is a server behind the daemon; whether it is stopped.
    pub(crate) served: Option<bool>,
    pub(crate) full: bool,
}

type Choice = fn(&mut Chooser<'_>) -> Option<Command>;

/// What may come, and how often.
const CHOICES: &[(u64, Choice)] = &[
    (14, |c| c.export_add()),
    (4, |c| c.export_del()),
    (8, |c| c.add_image()),
    (8, |c| c.add_filter()),
    (2, |c| c.add_other()),
    (5, |c| c.del()),
    (4, |c| c.snapshot()),
    (7, |c| c.snapshot_sync()),
    (6, |c| c.stream()),
    (7, |c| c.commit()),
    (8, |c| c.mirror()),
    (7, |c| c.backup()),
    (3, |c| c.drive_mirror()),
    (3, |c| c.drive_backup()),
    (14, |c| c.verb()),
    (4, |c| c.resize()),
    (2, |c| c.change_backing()),
    (4, |c| c.reopen()),
    (2, |c| c.set_active()),
    (1, |c| c.server()),
    (5, |c| c.transaction()),
    (2, |c| c.create()),
    (1, |c| c.threshold()),
    (3, |c| c.operation()),
    (4, |c| c.nonsense()),
];

/// How many steps a round has.
pub(crate) fn round_length(seed: u64, round: u64) -> u64 {
    12 + Rng::new(seed, 500 + round).below(LONGEST - 12)
}

/// How a round ends.
pub(crate) fn round_end(seed: u64, round: u64) -> Step {
    let mut rng = Rng::new(seed, 600 + round);
    let way = rng.one(&[Way::Quit, Way::Terminate, Way::Kill, Way::Kill, Way::Quit]);
    Step::End(way, rng.percent(60))
}

impl Chooser<'_> {
    pub(crate) fn next(&mut self) -> Step {
        if let Some(stopped) = self.served {
            if stopped && self.rng.percent(40) {
                return Step::Continue;
            }
            if !stopped && self.rng.percent(4) {
                return Step::Stop;
            }
        }
        if !self.world.server && self.rng.percent(30) {
            return Step::Ask(server_start(), false);
        }
        if !self.world.jobs.is_empty() && self.rng.percent(12) {
            let ids: Vec<String> = self.world.jobs.keys().cloned().collect();
            return Step::Await(self.rng.pick(&ids).cloned().unwrap_or_default());
        }
        if self.rng.percent(6) {
            return Step::Wait(20 + self.rng.below(300));
        }
        loop {
            let Some(c) = self.command() else { continue };
            if self.rng.percent(8)
                && let Some(other) = self.harmless()
            {
                return Step::Both(c, other);
            }
            return Step::Ask(c, self.rng.percent(30));
        }
    }

    fn command(&mut self) -> Option<Command> {
        let all: u64 = CHOICES.iter().map(|c| c.0).sum();
        let mut at = self.rng.below(all);
        for (weight, choice) in CHOICES {
            if at < *weight {
                return choice(self);
            }
            at -= weight;
        }
        None
    }

    /// Something that commutes with everything.
    fn harmless(&mut self) -> Option<Command> {
        match self.rng.below(4) {
            0 => {
                let id = self.job()?;
                let speed = self.rng.one(&[0u64, 65536, 4 << 20]);
                Some(Command::new("block-job-set-speed", json!({"device": id, "speed": speed})))
            }
            1 => {
                let id = self.job()?;
                let name = self.rng.one(&["job-pause", "job-resume"]);
                Some(Command::new(name, json!({ "id": id })))
            }
            2 => Some(Command::new("query-blockstats", json!({"query-nodes": true}))),
            _ => self.nonsense(),
        }
    }

    fn fresh(&mut self, letter: &str) -> String {
        self.world.fresh_name(letter)
    }

    fn is_leaf(&self, name: &str) -> bool {
        self.world.graph.child(name, &["file", "image"]).is_none()
    }

    fn has_parent(&self, name: &str) -> bool {
        self.world.graph.edges.iter().any(|e| e.1 == name && !e.0.starts_with("user:"))
    }

    /// A node: mostly one that makes sense.
    fn node(&mut self) -> Option<String> {
        let names: Vec<String> = self.world.graph.nodes.keys().cloned().collect();
        let roll = self.rng.below(100);
        let fitting: Vec<String> = names
            .iter()
            .filter(|n| match roll {
                0..55 => !self.has_parent(n) && !self.is_leaf(n),
                55..85 => self.has_parent(n) && !self.is_leaf(n),
                85..97 => true,
                _ => false,
            })
            .cloned()
            .collect();
        let any = if fitting.is_empty() { &names } else { &fitting };
        if roll >= 99 {
            return Some("nobody".into());
        }
        self.rng.pick(any).cloned()
    }

    /// A node that has something below it.
    fn over(&mut self) -> Option<String> {
        let names: Vec<String> = self
            .world
            .graph
            .nodes
            .keys()
            .filter(|n| self.world.graph.backing(n).is_some())
            .cloned()
            .collect();
        if self.rng.percent(90) { self.rng.pick(&names).cloned() } else { self.node() }
    }

    /// Something below a node.
    fn under(&mut self, node: &str) -> Option<String> {
        let mut below = Vec::new();
        let mut at = node.to_owned();
        while let Some(b) = self.world.graph.backing(&at) {
            at = b.to_owned();
            below.push(at.clone());
        }
        self.rng.pick(&below).cloned()
    }

    /// A node that nobody stands on.
    fn target(&mut self) -> Option<String> {
        let names: Vec<String> = self
            .world
            .graph
            .nodes
            .keys()
            .filter(|n| {
                !self.has_parent(n)
                    && !self.is_leaf(n)
                    && !self.world.graph.edges.iter().any(|e| e.1 == **n && e.0.starts_with("user:"))
            })
            .cloned()
            .collect();
        if self.rng.percent(93) { self.rng.pick(&names).cloned() } else { self.node() }
    }

    /// The same, mostly one of the size of a node.
    fn target_for(&mut self, node: &str) -> Option<String> {
        let g = &self.world.graph;
        let size = g.nodes.get(node).map_or(0, |n| n.size);
        let fits = |n: &&String| {
            g.nodes[*n].size == size
                && ["qcow2", "raw"].contains(&g.nodes[*n].driver.as_str())
                && !g.nodes[*n].read_only
                && n.as_str() != node
                && !self.has_parent(n)
                && !g.edges.iter().any(|e| e.1 == **n)
        };
        let names: Vec<String> = g.nodes.keys().filter(fits).cloned().collect();
        if self.rng.percent(60) && !names.is_empty() { self.rng.pick(&names).cloned() } else { self.target() }
    }

    /// A node, and one that may become its overlay: its header names the node's image.
    fn overlay_pair(&mut self) -> Option<(String, String)> {
        let g = &self.world.graph;
        let mut pairs = Vec::new();
        for overlay in g.nodes.keys().filter(|n| !self.has_parent(n) && g.child(n, &["backing"]).is_none()) {
            let named = g.file_of(overlay).and_then(|f| self.world.backings.get(&f));
            let below = |n: &&String| {
                named.is_some()
                    && *n != overlay
                    && g.nodes[*n].driver != "file"
                    && g.file_of(n).as_ref() == named
            };
            pairs.extend(g.nodes.keys().filter(below).map(|n| (n.clone(), overlay.clone())));
        }
        self.rng.pick(&pairs).cloned()
    }

    /// A file that nobody has open, as far as is known.
    fn closed_file(&mut self) -> Option<(String, String)> {
        let open: Vec<String> =
            self.world.graph.nodes.keys().filter_map(|n| self.world.graph.file_of(n)).collect();
        let files: Vec<(String, String)> = self
            .world
            .formats
            .iter()
            .filter(|f| self.rng.clone().percent(4) || !open.contains(f.0))
            .map(|f| (f.0.clone(), f.1.clone()))
            .collect();
        self.rng.pick(&files).cloned()
    }

    /// A file that is not there, or that is.
    fn new_file(&mut self) -> String {
        if self.rng.percent(12)
            && let Some((f, _)) = self.closed_file()
        {
            return f;
        }
        if self.world.formats.contains_key(DEVICE) && self.rng.percent(12) {
            return DEVICE.into();
        }
        let name = self.fresh("s");
        if self.full && self.rng.percent(25) { format!("full/{name}") } else { name }
    }

    fn job(&mut self) -> Option<String> {
        let ids: Vec<String> = self.world.jobs.keys().cloned().collect();
        if self.rng.percent(96) { self.rng.pick(&ids).cloned() } else { Some("nojob".into()) }
    }

    fn export_add(&mut self) -> Option<Command> {
        if self.world.exports.len() > 5 {
            return None;
        }
        let (id, node) = (self.fresh("e"), self.node()?);
        let writable = self.rng.percent(70);
        Some(Command::new(
            "block-export-add",
            json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable}),
        ))
    }

    fn export_del(&mut self) -> Option<Command> {
        let ids: Vec<String> = self.world.exports.keys().cloned().collect();
        let id = self.rng.pick(&ids)?;
        let mode = self.rng.one(&["safe", "hard", "hard"]);
        Some(Command::new("block-export-del", json!({"id": id, "mode": mode})))
    }

    fn add_image(&mut self) -> Option<Command> {
        let (file, format) = self.closed_file()?;
        let name = self.fresh("n");
        let driver = if format == "qcow2" { "qcow2" } else { "raw" };
        let protocol = if file == DEVICE { "host_device" } else { "file" };
        let mut a = json!({
            "driver": driver, "node-name": name,
            "file": {"driver": protocol, "node-name": format!("{name}f"), "filename": file},
        });
        if driver == "qcow2" {
            let named = self.world.backings.get(&file).cloned();
            let below = self.world.graph.nodes.keys().find(|n| {
                self.world.graph.format_node(n) == **n
                    && self.world.graph.file_of(n) == named
                    && named.is_some()
            });
            match (self.rng.below(10), below.cloned()) {
                (0..5, Some(b)) => a["backing"] = b.into(),
                (5..8, _) => a["backing"] = Json::Null,
                (8, _) => a["backing"] = self.node()?.into(),
                _ => {}
            }
        }
        if self.rng.percent(15) {
            a["read-only"] = true.into();
        }
        if self.rng.percent(40) {
            a["discard"] = "unmap".into();
        }
        Some(Command::new("blockdev-add", a))
    }

    fn add_filter(&mut self) -> Option<Command> {
        let (name, below) = (self.fresh("f"), self.node()?);
        let a = match self.rng.below(10) {
            0..3 => json!({"driver": "copy-on-read", "node-name": name, "file": below}),
            3..5 => json!({"driver": "raw", "node-name": name, "file": below}),
            5 => json!({"driver": "raw", "node-name": name, "file": below, "offset": 65536, "size": 262_144}),
            6 => json!({"driver": "blkdebug", "node-name": name, "image": below}),
            7..9 => {
                json!({"driver": "copy-before-write", "node-name": name, "file": below, "target": self.target()?})
            }
            _ => {
                let cbw: Vec<String> = self.world.saved.keys().cloned().collect();
                json!({"driver": "snapshot-access", "node-name": name, "file": self.rng.pick(&cbw)?})
            }
        };
        Some(Command::new("blockdev-add", a))
    }

    fn add_other(&mut self) -> Option<Command> {
        let name = self.fresh("n");
        let a = match self.rng.below(3) {
            0 if self.served.is_some() => json!({
                "driver": "nbd", "node-name": name, "export": "b",
                "server": {"type": "unix", "path": "back.nbd"}, "read-only": self.rng.percent(50),
            }),
            1 => json!({"driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": true}),
            _ => json!({"driver": "file", "node-name": name, "filename": self.closed_file()?.0}),
        };
        Some(Command::new("blockdev-add", a))
    }

    fn del(&mut self) -> Option<Command> {
        let node = if self.rng.percent(70) { self.target()? } else { self.node()? };
        Some(Command::new("blockdev-del", json!({ "node-name": node })))
    }

    fn snapshot(&mut self) -> Option<Command> {
        let (node, overlay) = match self.overlay_pair().filter(|_| self.rng.percent(80)) {
            Some(pair) => pair,
            None => (self.node()?, self.target()?),
        };
        Some(Command::new("blockdev-snapshot", json!({"node": node, "overlay": overlay})))
    }

    fn snapshot_sync(&mut self) -> Option<Command> {
        let (node, file) = (self.node()?, self.new_file());
        let name = self.fresh("o");
        let format = if self.rng.percent(95) { "qcow2" } else { "raw" };
        Some(Command::new(
            "blockdev-snapshot-sync",
            json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": name, "format": format}),
        ))
    }

    /// What all jobs know.
    fn job_options(&mut self, mut a: Json) -> Json {
        a["job-id"] = self.fresh("j").into();
        if self.rng.percent(4)
            && let Some(taken) = self.job()
        {
            a["job-id"] = taken.into();
        }
        if self.rng.percent(40) {
            a["speed"] = self.rng.one(&[1u64, 262_144, 1 << 20, 8 << 20]).into();
        }
        for option in ["auto-finalize", "auto-dismiss"] {
            if self.rng.percent(12) {
                a[option] = false.into();
            }
        }
        if self.rng.percent(10) {
            a["filter-node-name"] = self.fresh("x").into();
        }
        a
    }

    fn stream(&mut self) -> Option<Command> {
        let node = self.over()?;
        let mut a = self.job_options(json!({ "device": node }));
        if self.rng.percent(50)
            && let Some(b) = self.under(&node)
        {
            a[self.rng.one(&["base-node", "base-node", "bottom"])] = b.into();
        }
        Some(Command::new("block-stream", a))
    }

    fn commit(&mut self) -> Option<Command> {
        let node = self.over()?;
        let mut a = self.job_options(json!({ "device": node }));
        let mut top = node.clone();
        if self.rng.percent(35)
            && let Some(b) = self.under(&node)
        {
            a["top-node"] = b.clone().into();
            top = b;
        }
        if self.rng.percent(75)
            && let Some(b) = self.under(&top)
        {
            a["base-node"] = b.into();
        }
        Some(Command::new("block-commit", a))
    }

    fn sync(&mut self) -> &'static str {
        self.rng.one(&["full", "full", "full", "top", "none"])
    }

    fn mirror(&mut self) -> Option<Command> {
        let device = self.node()?;
        let (target, sync) = (self.target_for(&device)?, self.sync());
        let mode = self.rng.one(&["background", "write-blocking"]);
        let a = json!({"device": device, "target": target, "sync": sync, "copy-mode": mode});
        Some(Command::new("blockdev-mirror", self.job_options(a)))
    }

    fn backup(&mut self) -> Option<Command> {
        let device = self.node()?;
        let (target, sync) = (self.target_for(&device)?, self.sync());
        let a = json!({"device": device, "target": target, "sync": sync});
        Some(Command::new("blockdev-backup", self.job_options(a)))
    }

    fn drive_mirror(&mut self) -> Option<Command> {
        let (device, target, sync) = (self.node()?, self.new_file(), self.sync());
        let name = self.fresh("m");
        let format = self.rng.one(&["qcow2", "qcow2", "raw"]);
        let mut a =
            json!({"device": device, "target": target, "sync": sync, "format": format, "node-name": name});
        if self.rng.percent(15) {
            a["mode"] = "existing".into();
        }
        let mut a = self.job_options(a);
        a.as_object_mut()?.remove("filter-node-name");
        Some(Command::new("drive-mirror", a))
    }

    fn drive_backup(&mut self) -> Option<Command> {
        let (device, target, sync) = (self.node()?, self.new_file(), self.sync());
        let format = self.rng.one(&["qcow2", "qcow2", "raw"]);
        let a = json!({"device": device, "target": target, "sync": sync, "format": format});
        Some(Command::new("drive-backup", self.job_options(a)))
    }

    fn verb(&mut self) -> Option<Command> {
        let id = self.job()?;
        let status = self.world.jobs.get(&id).map_or(String::new(), |j| j.status.clone());
        let names: &[&str] = match status.as_str() {
            "ready" => &[
                "job-complete",
                "job-complete",
                "job-complete",
                "job-cancel",
                "job-pause",
                "block-job-cancel",
            ],
            "pending" => &["job-finalize", "job-finalize", "job-cancel"],
            "concluded" => &["job-dismiss"],
            "paused" | "standby" => &["job-resume"],
            _ => &[
                "set-speed",
                "set-speed",
                "job-pause",
                "job-resume",
                "job-cancel",
                "job-complete",
                "job-dismiss",
            ],
        };
        let all = ["job-complete", "job-cancel", "job-pause", "job-resume", "job-finalize", "job-dismiss"];
        Some(match if self.rng.percent(90) { self.rng.one(names) } else { self.rng.one(&all) } {
            "set-speed" => {
                let speed = self.rng.one(&[0u64, 0, 0, 1 << 20]);
                Command::new("block-job-set-speed", json!({"device": id, "speed": speed}))
            }
            "block-job-cancel" => {
                Command::new("block-job-cancel", json!({"device": id, "force": self.rng.percent(50)}))
            }
            name => Command::new(name, json!({ "id": id })),
        })
    }

    fn resize(&mut self) -> Option<Command> {
        let node = self.node()?;
        let size = self.world.graph.nodes.get(&node).map_or(1 << 20, |n| n.size);
        let size = match self.rng.below(6) {
            0 => size + (1 << 20),
            1 => size + 512 * self.rng.below(300),
            2 => size / 2 / 512 * 512,
            3 => size.saturating_sub(65536),
            4 => size,
            _ => 0,
        };
        Some(Command::new("block_resize", json!({"node-name": node, "size": size})))
    }

    fn change_backing(&mut self) -> Option<Command> {
        let node = self.over()?;
        let below = self.world.graph.backing(&node).and_then(|b| self.world.graph.file_of(b));
        let mut name = if self.rng.percent(70) { below? } else { self.closed_file()?.0 };
        // A header's name is seen from its own directory.
        if self.world.graph.file_of(&node).is_some_and(|f| f.starts_with("full/")) {
            name = name.strip_prefix("full/").map_or_else(|| format!("../{name}"), str::to_owned);
        }
        Some(Command::new(
            "change-backing-file",
            json!({"device": node, "image-node-name": node, "backing-file": name}),
        ))
    }

    fn reopen(&mut self) -> Option<Command> {
        let node = self.node()?;
        let g = &self.world.graph;
        let driver = g.nodes.get(&node)?.driver.clone();
        let mut o = json!({"driver": driver, "node-name": node});
        for link in ["file", "backing", "target", "image"] {
            if let Some(c) = g.child(&node, &[link]) {
                o[link] = c.into();
            }
        }
        if self.is_leaf(&node) {
            o["filename"] = self.world.graph.file_of(&node)?.into();
        }
        match self.rng.below(6) {
            0 => o["read-only"] = true.into(),
            1 => o["read-only"] = false.into(),
            2 => o["discard"] = "unmap".into(),
            3 if !o["backing"].is_null() => o["backing"] = self.node()?.into(),
            4 if driver == "qcow2" => o["lazy-refcounts"] = true.into(),
            _ => {}
        }
        Some(Command::new("blockdev-reopen", json!({ "options": [o] })))
    }

    fn set_active(&mut self) -> Option<Command> {
        let active = self.rng.percent(50);
        Some(Command::new("blockdev-set-active", json!({"node-name": self.node()?, "active": active})))
    }

    fn server(&mut self) -> Option<Command> {
        let stop = self.world.server && self.rng.percent(70);
        Some(if stop { Command::new("nbd-server-stop", json!({})) } else { server_start() })
    }

    fn transaction(&mut self) -> Option<Command> {
        let count = 1 + self.rng.below(3) * self.rng.below(2);
        let mut actions = Vec::new();
        for _ in 0..count {
            let c = match self.rng.below(6) {
                0..2 => self.snapshot_sync()?,
                2 => self.snapshot()?,
                3..5 => self.backup()?,
                _ => self.drive_backup()?,
            };
            actions.push(json!({"type": c.name, "data": c.arguments}));
        }
        if self.rng.percent(15) {
            actions.push(json!({"type": "abort", "data": {}}));
        }
        let mut a = json!({ "actions": actions });
        if self.rng.percent(30) {
            a["properties"] = json!({"completion-mode": "grouped"});
        }
        Some(Command::new("transaction", a))
    }

    fn create(&mut self) -> Option<Command> {
        let id = self.fresh("j");
        let options = match self.rng.below(6) {
            4.. => self.new_overlay()?,
            0 => json!({"driver": "file", "filename": self.new_file(), "size": 1 << 20}),
            1 => json!({"driver": "qcow2", "file": self.node()?, "size": 1 << 20}),
            2 => json!({"driver": "qcow2", "file": self.node()?, "size": 1 << 20, "cluster-size": 3}),
            _ => json!({"driver": "raw", "file": self.node()?, "size": 1 << 20}),
        };
        Some(Command::new("blockdev-create", json!({"job-id": id, "options": options})))
    }

    /// An overlay in a raw file that is there already, for `blockdev-snapshot`.
    fn new_overlay(&mut self) -> Option<Json> {
        let node = self.node()?;
        let g = &self.world.graph;
        let below = g.file_of(&node)?;
        let format = if g.nodes[&g.format_node(&node)].driver == "qcow2" { "qcow2" } else { "raw" };
        let size = g.nodes[&node].size;
        let free = |n: &&String| g.nodes[*n].driver == "file" && !g.edges.iter().any(|e| e.1 == **n);
        let files: Vec<String> = g.nodes.keys().filter(free).cloned().collect();
        let file = self.rng.pick(&files)?;
        Some(
            json!({"driver": "qcow2", "file": file, "size": size, "backing-file": below, "backing-fmt": format}),
        )
    }

    fn threshold(&mut self) -> Option<Command> {
        let a = json!({"node-name": self.node()?, "write-threshold": self.rng.below(4 << 20)});
        Some(Command::new("block-set-write-threshold", a))
    }

    /// An external tool says what it relies on. They end soon, or nothing else would be allowed.
    fn operation(&mut self) -> Option<Command> {
        let begun: Vec<String> = self.world.operations.iter().cloned().collect();
        if self.rng.percent(if begun.is_empty() { 3 } else { 65 }) {
            let id = self.rng.pick(&begun).map_or("nobody", String::as_str);
            return Some(Command::new("operation-end", json!({ "id": id })));
        }
        let actions = [
            "consistent-read",
            "write",
            "write-unchanged",
            "resize",
            "relink-children",
            "relink-parents",
            "read-metadata",
            "everything",
        ];
        let mut claims = Vec::new();
        for _ in 0..1 + self.rng.below(2) {
            let (needs, denies) = (self.rng.one(&actions), self.rng.one(&actions));
            let mut claim = json!({"node-name": self.node()?});
            if self.rng.percent(70) {
                claim["needs"] = json!([needs]);
            }
            if self.rng.percent(70) {
                claim["denies"] = json!([denies]);
            }
            claims.push(claim);
        }
        let id = self.fresh("op");
        Some(Command::new("operation-begin", json!({"id": id, "detail": "storm", "claims": claims})))
    }

    /// What must be refused.
    fn nonsense(&mut self) -> Option<Command> {
        let node = self.node()?;
        Some(match self.rng.below(10) {
            0 => Command::new("blockdev-add", json!({"driver": "qcow2", "node-name": node, "file": node})),
            1 => Command::new("block-commit", json!({"device": node, "base-node": node, "job-id": "k"})),
            2 => Command::new(
                "blockdev-mirror",
                json!({"device": node, "target": node, "sync": "full", "job-id": "k"}),
            ),
            3 => Command::new("block_resize", json!({"node-name": node, "size": -1})),
            4 => Command::new("blockdev-snapshot", json!({"node": node, "overlay": node})),
            5 => Command::new("no-such-command", json!({"node": node})),
            6 => Command::new(
                "block-stream",
                json!({"device": node, "job-id": "k", "base-node": node, "bottom": node}),
            ),
            7 => {
                Command::new("blockdev-add", json!({"driver": "raw", "node-name": "bad name!", "file": node}))
            }
            8 => Command::new("block-export-add", json!({"type": "nbd", "id": "k", "node-name": 7})),
            _ => {
                let (file, _) = self.closed_file()?;
                let a = json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": node, "format": "qcow2"});
                Command::new("blockdev-snapshot-sync", a)
            }
        })
    }
}

/// The server that all exports are on.
pub(crate) fn server_start() -> Command {
    Command::new(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": "storm.nbd"}}, "max-connections": 0}),
    )
}
