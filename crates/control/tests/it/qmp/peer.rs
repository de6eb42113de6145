//! Side by side with QEMU's daemon, where it is installed.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dolmen_qmp::{Framer, Session, Step, Version};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::schema;

/// A running daemon with one connected monitor.
struct Peer {
    child: Child,
    stream: UnixStream,
    framer: Framer,
    _dir: TempDir,
}

impl Peer {
    /// `None` where the daemon is not installed.
    fn start() -> Option<Peer> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("m.sock");
        let started = dir.path().join("pid");
        let spawned = Command::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,path={},server=on,wait=off,id=m", path.display()))
            .args(["--monitor", "chardev=m"])
            .arg("--pidfile")
            .arg(&started)
            .stdin(Stdio::null())
            .spawn();
        let child = match spawned {
            Ok(c) => c,
            Err(_) => {
                eprintln!("qemu-storage-daemon is not installed: nothing to compare with");
                return None;
            }
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        // The socket is there before the daemon is ready: a client that comes then is greeted twice,
        // and what it has sent may be lost.
        while !std::fs::read(&started).is_ok_and(|text| text.ends_with(b"\n")) {
            assert!(Instant::now() < deadline, "the daemon does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(s) => break s,
                Err(e) => assert!(Instant::now() < deadline, "no monitor socket: {e}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let mut peer = Peer { child, stream, framer: Framer::new(), _dir: dir };
        assert!(peer.receive()["QMP"].is_object());
        assert_eq!(peer.ask("{\"execute\":\"qmp_capabilities\"}"), json!({"return": {}}));
        Some(peer)
    }

    fn receive(&mut self) -> Json {
        loop {
            if let Some(t) = self.framer.next_text() {
                return serde_json::from_str(&t.expect("framed")).expect("JSON");
            }
            let mut buf = [0; 4096];
            let n = self.stream.read(&mut buf).expect("a reply");
            assert!(n > 0, "the daemon hung up");
            assert_eq!(self.framer.feed(&buf[..n]), n);
        }
    }

    fn ask(&mut self, text: &str) -> Json {
        self.stream.write_all(text.as_bytes()).expect("sent");
        self.stream.write_all(b"\n").expect("sent");
        loop {
            // On a busy machine the peer greets twice.
            let reply = self.receive();
            if reply.get("QMP").is_none() {
                return reply;
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is wrong with a command is said in the same words and with the same class.
#[test]
fn the_same_words() {
    let Some(mut peer) = Peer::start() else { return };
    let schema = schema();
    let mut ours = Session::new(Version::current());
    ours.feed(b"{\"execute\":\"qmp_capabilities\"}");
    assert!(matches!(ours.next_step(&schema), Some(Step::Reply(_))));
    let add = |arguments: &str| format!("{{\"execute\":\"blockdev-add\",\"arguments\":{arguments}}}");
    let start = |arguments: &str| format!("{{\"execute\":\"nbd-server-start\",\"arguments\":{arguments}}}");
    for command in [
        "{}".to_owned(),
        "[]".into(),
        "\"x\"".into(),
        "}".into(),
        "{]".into(),
        "{\"execute\":5}".into(),
        "{\"execute\":\"nonsense\",\"id\":[{}]}".into(),
        "{\"exec\":\"x\"}".into(),
        "{\"execute\":\"query-version\",\"arguments\":[]}".into(),
        "{\"execute\":\"query-version\",\"arguments\":{\"a\":1}}".into(),
        "{\"execute\":\"query-version\",\"zork\":1}".into(),
        "{\"execute\":\"query-version\",\"exec-oob\":\"query-version\"}".into(),
        "{\"execute\":\"query-version\",\"execute\":\"x\"}".into(),
        "{\"execute\":\"qmp_capabilities\"}".into(),
        add("{}"),
        add("{\"driver\":\"nonsense\"}"),
        add("{\"driver\":[]}"),
        add("{\"driver\":\"null-co\",\"size\":\"x\"}"),
        add("{\"driver\":\"null-co\",\"size\":1.5}"),
        add("{\"driver\":\"null-co\",\"node-name\":5}"),
        add("{\"driver\":\"null-co\",\"zork\":{}}"),
        add("{\"driver\":\"null-co\",\"read-only\":\"on\"}"),
        add("{\"driver\":\"null-co\",\"discard\":\"x\"}"),
        add("{\"driver\":\"raw\",\"node-name\":\"a\"}"),
        add("{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":3}"),
        add("{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":null}"),
        add("{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":{}}"),
        add("{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":{\"driver\":\"file\"}}"),
        add(
            "{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":{\"driver\":\"file\",\"filename\":\"x\",\"cache\":{\"x\":1}}}",
        ),
        add("{\"driver\":\"qcow2\",\"node-name\":\"a\",\"file\":\"x\",\"backing\":3}"),
        add("{\"driver\":\"blkdebug\",\"image\":\"n\",\"inject-error\":[{\"event\":\"pwritev\",\"zz\":1}]}"),
        add("{\"driver\":\"blkdebug\",\"image\":\"n\",\"inject-error\":[{}]}"),
        add("{\"driver\":\"blkdebug\",\"image\":\"n\",\"inject-error\":[5]}"),
        add("{\"driver\":\"nbd\",\"server\":{\"type\":\"inet\",\"host\":\"x\"}}"),
        add("{\"driver\":\"nbd\",\"server\":\"x\"}"),
        start("{}"),
        start("{\"addr\":{\"type\":\"nonsense\"}}"),
        start("{\"addr\":{\"type\":\"unix\",\"path\":\"x\"}}"),
        start("{\"addr\":{\"type\":\"unix\",\"data\":{}}}"),
        "{\"execute\":\"blockdev-del\"}".into(),
        "{\"execute\":\"block-export-del\",\"arguments\":{\"id\":\"x\",\"mode\":\"y\"}}".into(),
        "{\"execute\":\"block-export-add\",\"arguments\":{\"type\":\"nbdx\",\"id\":\"e\"}}".into(),
        "{\"execute\":\"block-export-add\",\"arguments\":{\"type\":\"nbd\",\"id\":\"e\"}}".into(),
        "{\"execute\":\"query-named-block-nodes\",\"arguments\":{\"flat\":1}}".into(),
    ] {
        let theirs = peer.ask(&command);
        ours.feed(command.as_bytes());
        let Some(Step::Reply(mut mine)) = ours.next_step(&schema) else {
            panic!("{command} was not refused, but there: {theirs}");
        };
        // After the same words the values that would do are listed here.
        let desc = mine["error"]["desc"].as_str().unwrap_or_default().to_owned();
        if let Some((same, _)) = desc.split_once(" (use one of: ") {
            mine["error"]["desc"] = same.into();
            mine["error"].as_object_mut().expect("an error").remove("data");
        }
        assert_eq!(mine, theirs, "{command}");
    }
}

struct Index(HashMap<String, Json>);

impl Index {
    fn new(schema: &Json) -> Index {
        let entries = schema.as_array().expect("a list");
        Index(entries.iter().map(|e| (e["name"].as_str().expect("a name").to_owned(), e.clone())).collect())
    }

    fn get(&self, name: &Json) -> &Json {
        &self.0[name.as_str().expect("a type name")]
    }
}

/// Walks our types beside theirs: all that we describe is described there in the same way.
struct Compare {
    ours: Index,
    theirs: Index,
    seen: std::collections::HashSet<(String, String)>,
    differences: Vec<String>,
}

impl Compare {
    fn types(&mut self, path: &str, a: &Json, b: &Json) {
        if !self.seen.insert((a.to_string(), b.to_string())) {
            return;
        }
        let (a, b) = (self.ours.get(a).clone(), self.theirs.get(b).clone());
        if a["meta-type"] != b["meta-type"] {
            self.differences.push(format!("{path}: {} instead of {}", a["meta-type"], b["meta-type"]));
            return;
        }
        match a["meta-type"].as_str().expect("a meta-type") {
            "builtin" => {
                if a["name"] != b["name"] {
                    self.differences.push(format!("{path}: {} instead of {}", a["name"], b["name"]));
                }
            }
            "enum" => {
                let known = b["values"].as_array().expect("values");
                for v in a["values"].as_array().expect("values") {
                    if !known.contains(v) {
                        self.differences.push(format!("{path}: new word {v}"));
                    }
                }
            }
            "array" => self.types(&format!("{path}[]"), &a["element-type"], &b["element-type"]),
            "alternate" => {
                let kinds = |i: &Index, e: &Json| -> Vec<String> {
                    let of = e["members"].as_array().expect("members").iter();
                    let mut k: Vec<_> = of
                        .map(|m| match i.get(&m["type"])["meta-type"].as_str() {
                            Some("builtin") => m["type"].to_string(),
                            other => other.unwrap_or_default().to_owned(),
                        })
                        .collect();
                    k.sort();
                    k
                };
                let (x, y) = (kinds(&self.ours, &a), kinds(&self.theirs, &b));
                if x != y {
                    self.differences.push(format!("{path}: one of {x:?} instead of {y:?}"));
                }
            }
            "object" => self.objects(path, &a, &b),
            other => panic!("{path} is a {other}"),
        }
    }

    fn objects(&mut self, path: &str, a: &Json, b: &Json) {
        if a["tag"] != b["tag"] {
            self.differences.push(format!("{path}: tag {} instead of {}", a["tag"], b["tag"]));
        }
        let find = |list: &Json, key: &str, name: &Json| {
            list.as_array().into_iter().flatten().find(|m| m[key] == *name).cloned()
        };
        for m in a["members"].as_array().expect("members") {
            let inner = format!("{path}.{}", m["name"].as_str().expect("a name"));
            match find(&b["members"], "name", &m["name"]) {
                None => self.differences.push(format!("{inner}: new")),
                Some(o) => {
                    if m.get("default").is_some() != o.get("default").is_some() {
                        self.differences.push(format!("{inner}: optional here or there only"));
                    }
                    self.types(&inner, &m["type"], &o["type"]);
                }
            }
        }
        for m in b["members"].as_array().expect("members") {
            if m.get("default").is_none() && find(&a["members"], "name", &m["name"]).is_none() {
                self.differences.push(format!("{path}.{}: missing", m["name"]));
            }
        }
        for v in a["variants"].as_array().into_iter().flatten() {
            match find(&b["variants"], "case", &v["case"]) {
                None => self.differences.push(format!("{path}: new case {}", v["case"])),
                Some(o) => self.types(&format!("{path}<{}>", v["case"]), &v["type"], &o["type"]),
            }
        }
    }
}

/// Commands and events that only we have.
const OURS: &[&str] = &[
    "BLOCK_BITMAPS_INVALIDATED",
    // Of the emulator; the counters that it adds are compared.
    "block-latency-histogram-set",
    "blockdev-prefetch",
    "operation-begin",
    "operation-end",
    "query-operations",
    "what-if",
];

/// What QEMU's schema has no place for: our own version, our own kind of job, what we can say about jobs.
const ADDED: &[&str] = &[
    "query-version().dolmen: new",
    // The arguments of blockdev-backup, seen here first.
    "transaction.actions[]<\"blockdev-backup\">.data.on-cbw-error: new",
    "transaction.actions[]<\"blockdev-backup\">.data.fleecing: new",
    "query-jobs()[].type: new word \"prefetch\"",
    "query-jobs()[].estimated-remaining-ms: new",
    "query-block-jobs()[]: new case \"prefetch\"",
    "block-job-change: new case \"prefetch\"",
    "block-commit.auto-converge: new",
    "blockdev-mirror.auto-converge: new",
];

/// A client that knows QEMU's schema finds ours to be a part of it.
#[test]
fn our_schema_is_a_part_of_theirs() {
    let Some(mut peer) = Peer::start() else { return };
    let theirs = peer.ask("{\"execute\":\"query-qmp-schema\"}")["return"].clone();
    let ours = schema().introspection();
    let commands: Vec<Json> = ours
        .as_array()
        .expect("a list")
        .iter()
        .filter(|e| matches!(e["meta-type"].as_str(), Some("command" | "event")))
        .cloned()
        .collect();
    let mut c = Compare {
        ours: Index::new(&ours),
        theirs: Index::new(&theirs),
        seen: std::collections::HashSet::new(),
        differences: Vec::new(),
    };
    for mine in &commands {
        let name = mine["name"].as_str().expect("a name");
        if OURS.contains(&name) {
            continue;
        }
        let other = c.theirs.0.get(name).unwrap_or_else(|| panic!("{name} is not there")).clone();
        assert_eq!(mine.get("features"), other.get("features"), "{name}");
        c.types(name, &mine["arg-type"], &other["arg-type"]);
        if mine.get("ret-type").is_some() {
            c.types(&format!("{name}()"), &mine["ret-type"], &other["ret-type"]);
        }
    }
    assert_eq!(c.differences, ADDED);
}
