//! Stories that the storm found, told again: files, commands, load on every writable export, and an end after which the
//! files are looked at. `cargo xtask storm` writes such tests for what it finds (those for which the load and the
//! checks here are enough fail as they are; others say what to check).

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::daemon::{Daemon, Monitor, by_established_name, eventually};
use crate::load::{BLOCK, Client, Load, Model, assert_part};
use crate::peer::{Bench, in_path};

/// Blocks that each client works on.
const PART: u64 = 16;

struct Story {
    /// Where the files are; the daemon has it while it runs.
    dir: Option<tempfile::TempDir>,
    daemon: Option<(Daemon, Monitor)>,
    loads: BTreeMap<String, Load>,
    /// Clients that there have been.
    clients: u64,
}

impl Story {
    fn begin() -> Option<Story> {
        Bench::with_peers()?;
        let dir = Some(tempfile::tempdir().expect("a directory"));
        Some(Story { dir, daemon: None, loads: BTreeMap::new(), clients: 0 })
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        let dir = self.daemon.as_ref().map(|d| &d.0.dir).or(self.dir.as_ref());
        dir.expect("a directory").path().join(name)
    }

    /// A raw file of so many sectors, with runs that hold a byte each.
    fn raw(&self, name: &str, sectors: u64, runs: &[(u64, u64, u8)]) {
        let file = std::fs::File::create(self.at(name)).expect("a file");
        file.set_len(sectors * 512).expect("a size");
        for (first, end, byte) in runs {
            let data = vec![*byte; (end - first) as usize * 512];
            file.write_all_at(&data, first * 512).expect("written");
        }
    }

    fn command(&self, tool: &str, args: &[&str]) -> Command {
        let mut c = Command::new(in_path(tool).expect("installed"));
        c.current_dir(self.at("")).args(args);
        c
    }

    /// Runs a tool of QEMU's, which has to succeed.
    fn tool(&self, tool: &str, args: &[&str]) -> String {
        let out = self.command(tool, args).output().expect("it starts");
        let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{tool} {args:?}: {text}");
        text.into_owned()
    }

    fn start(&mut self) {
        let dir = self.dir.take().expect("no daemon runs");
        let mut daemon = Daemon::start_in(dir, by_established_name, &[]);
        let monitor = daemon.monitor();
        self.daemon = Some((daemon, monitor));
    }

    fn monitor(&mut self) -> &mut Monitor {
        &mut self.daemon.as_mut().expect("a daemon runs").1
    }

    /// Asks for something, which may be refused. A writable export gets a client at work.
    fn ask(&mut self, command: &str, arguments: Json) -> Json {
        let reply = self.monitor().ask(&json!({"execute": command, "arguments": arguments}));
        if command == "block-export-add" && reply.get("return").is_some() && arguments["writable"] == true {
            let id = arguments["id"].as_str().expect("an id").to_owned();
            let name = arguments["name"].as_str().unwrap_or(&id);
            let client = Client::connect(&self.at("storm.nbd"), name).expect("connected");
            let first = self.clients * PART;
            let end = (first + PART).min(client.size / BLOCK);
            self.clients += 1;
            if first < end {
                let load = Load::start(client, first..end, self.clients, Model::new(), true);
                self.loads.insert(id, load);
                self.some_requests();
            }
        }
        reply
    }

    /// Asks what if, and then does it: both have to say the same.
    fn what_if(&mut self, command: &str, arguments: &Json) {
        let question = json!({"command": command, "arguments": arguments});
        let foreseen = self.monitor().ok("what-if", question);
        let reply = self.ask(command, arguments.clone());
        assert_eq!(foreseen["allowed"], reply.get("return").is_some(), "{command}: {foreseen} and {reply}");
    }

    /// Waits until a job is ready, pending or over.
    fn wait(&mut self, job: &str) {
        eventually("the job to get on", || {
            let jobs = self.monitor().ok("query-jobs", json!({}));
            let found = jobs.as_array().expect("a list").iter().find(|j| j["id"] == job);
            let over = ["ready", "pending", "concluded", "standby", "paused"];
            found.is_none_or(|j| over.contains(&j["status"].as_str().expect("a status"))).then_some(())
        });
    }

    /// Until every client has got some further.
    fn some_requests(&self) {
        let before: Vec<u64> = self.loads.values().map(Load::requests).collect();
        eventually("requests", || {
            let further = |(load, was): (&Load, &u64)| load.has_ended() || load.requests() > was + 20;
            self.loads.values().zip(&before).all(further).then_some(())
        });
    }

    /// The clients stop and flush, the daemon ends, and the files hold what was written.
    fn end(&mut self, way: &str) {
        let exports = self.monitor().ok("query-block-exports", json!({}));
        let nodes = self.monitor().ok("query-named-block-nodes", json!({"flat": true}));
        let find = |list: &Json, key: &str, is: &Json| {
            list.as_array().expect("a list").iter().find(|n| n[key] == *is).cloned().unwrap_or_default()
        };
        let mut files = Vec::new();
        for (id, load) in std::mem::take(&mut self.loads) {
            let (model, result) = load.end();
            let export = find(&exports, "id", &json!(id));
            let node = find(&nodes, "node-name", &export["node-name"]);
            let plain = |f: &&str| !f.is_empty() && !f.starts_with("json:");
            if let (Ok(()), Some(file)) = (result, node["file"].as_str().filter(plain)) {
                let mut client = Client::connect(&self.at("storm.nbd"), &id).expect("connected");
                client.flush().expect("flushed");
                files.push((file.to_owned(), node["drv"].as_str().unwrap_or("raw").to_owned(), model));
            }
        }
        let (mut daemon, mut monitor) = self.daemon.take().expect("a daemon runs");
        match way {
            "Quit" => monitor.send(&json!({"execute": "quit"})),
            "Terminate" => daemon.signal(Signal::TERM),
            _ => daemon.signal(Signal::KILL),
        }
        let status = daemon.wait();
        assert!(way == "Kill" || status.success(), "{status}");
        self.dir = Some(std::mem::replace(&mut daemon.dir, tempfile::tempdir().expect("a directory")));
        for (file, format, model) in files {
            let format = if format == "qcow2" { "qcow2" } else { "raw" };
            self.tool("qemu-img", &["convert", "-f", format, "-O", "raw", &file, "seen"]);
            assert_part(&std::fs::read(self.at("seen")).expect("a file"), &model);
        }
        self.check(way);
    }

    /// No image is damaged, and every chain can be opened.
    fn check(&self, way: &str) {
        for entry in std::fs::read_dir(self.at("")).expect("a directory") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type().expect("a type").is_file()
                || !std::fs::read(entry.path()).expect("a file").starts_with(b"QFI\xfb")
            {
                continue;
            }
            let out =
                self.command("qemu-img", &["check", "-U", "-f", "qcow2", &name]).output().expect("it starts");
            let leaks = way == "Kill" && out.status.code() == Some(3);
            assert!(out.status.success() || leaks, "{name}: {}", String::from_utf8_lossy(&out.stdout));
            self.tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &name, "seen"]);
        }
    }
}

/// The story: `raw` over a qcow2 node, and a snapshot of it: the header of the new image named the inner file with format
/// raw, so that the disk read as the bytes of the image when it was opened again. Seed 9 of the storm.
#[test]
fn seed_9() {
    let Some(mut s) = Story::begin() else { return };
    s.raw("whole", 2048, &[(0, 512, 7), (1024, 1100, 8)]);
    s.tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "whole", "d0l0"]);
    s.start();
    s.ask(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": "storm.nbd"}}, "max-connections": 0}),
    );
    s.ask(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "d0l0", "file": {"driver": "file", "filename": "d0l0"}}),
    );
    s.ask("blockdev-add", json!({"driver": "raw", "node-name": "f1", "file": "d0l0"}));
    s.ask(
        "block-export-add",
        json!({"type": "nbd", "id": "e2", "name": "e2", "node-name": "f1", "writable": true}),
    );
    s.what_if(
        "blockdev-snapshot-sync",
        &json!({"node-name": "f1", "snapshot-file": "s3", "snapshot-node-name": "o4", "format": "qcow2"}),
    );
    s.some_requests();
    s.end("Quit");
    s.tool("qemu-io", &["-r", "-c", "read -P 7 200k 56k", "s3"]);
}

/// A mirror of the filter of another mirror, and the pivot of the lower one under load: the upper one would stay behind with
/// the old source, so it is refused; what was flushed is there after a crash, in the file that the export ended up on.
/// Seed 110 of the storm.
#[test]
fn seed_110() {
    let Some(mut s) = Story::begin() else { return };
    s.raw("whole", 2048, &[(0, 512, 7), (1024, 1100, 8)]);
    for name in ["d0l0", "t0f"] {
        s.tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "whole", name]);
    }
    s.start();
    s.ask(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": "storm.nbd"}}, "max-connections": 0}),
    );
    for name in ["d0l0", "t0f"] {
        let file = json!({"driver": "file", "filename": name});
        s.ask("blockdev-add", json!({"driver": "qcow2", "node-name": name, "file": file}));
    }
    s.ask(
        "blockdev-mirror",
        json!({"device": "d0l0", "target": "t0f", "sync": "full", "job-id": "j5", "filter-node-name": "x6"}),
    );
    s.ask(
        "block-export-add",
        json!({"type": "nbd", "id": "e7", "name": "e7", "node-name": "d0l0", "writable": true}),
    );
    s.wait("j5");
    let second = json!({"device": "x6", "target": "s8", "sync": "top", "format": "qcow2", "node-name": "m9",
                        "job-id": "j10"});
    let reply = s.ask("drive-mirror", second);
    let desc = reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("accepted: {reply}"));
    assert!(desc.contains("belongs to operation 'j5'"), "{desc}");
    s.some_requests();
    let reply = s.ask("job-complete", json!({"id": "j5"}));
    assert!(reply.get("return").is_some(), "{reply}");
    s.some_requests();
    s.end("Kill");
}
