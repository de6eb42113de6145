//! Somebody on another monitor who asks all the time, sensibly and not, and counts how long the answers take.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::qmp::{Monitor, Reply};
use crate::rng::Rng;
use crate::storm::Numbers;

/// A query that takes longer has been forgotten. What is promised is far less; this is for a busy machine.
const BOUND: Duration = Duration::from_secs(5);

const QUERIES: [&str; 7] = [
    "query-jobs",
    "query-block-jobs",
    "query-named-block-nodes",
    "query-block-exports",
    "query-blockstats",
    "query-version",
    "query-commands",
];

/// What must be answered with an error, and change nothing.
const NONSENSE: [&str; 8] = [
    r#"{"execute": "job-complete", "arguments": {"id": "nobody"}}"#,
    r#"{"execute": "blockdev-del", "arguments": {"node-name": 3}}"#,
    r#"{"execute": "blockdev-add"}"#,
    r#"{"execute": ["query-jobs"]}"#,
    r#"{"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {}}]}}"#,
    r#"{"execute": "block-export-del", "arguments": {"id": "", "mode": "soft"}}"#,
    r#"{"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw"}]}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "nobody", "size": 1e300}}"#,
];

/// Bytes that are no message, or the beginning of one. 0xFF after them begins anew, as other tools rely on.
fn noise(rng: &mut Rng) -> Vec<u8> {
    let deep = 1 + rng.below(3000) as usize;
    match rng.below(8) {
        0 => vec![0xff; deep.min(9)],
        1 => b"[".repeat(deep),
        2 => br#"{"a":"#.repeat(deep),
        3 => br#"{"execute": "query-"#.to_vec(),
        4 => b"\"\x01\xc3\x28\\".to_vec(),
        5 => [br#"{"execute": "query-jobs", "arguments": {"a": "#.to_vec(), b"9".repeat(deep)].concat(),
        6 => b"}]:,nul%-1e\0".to_vec(),
        _ => (0..deep).map(|_| rng.next() as u8).filter(|b| !b"\n\r".contains(b)).collect(),
    }
}

/// Sends noise and then a query; the query must be answered.
fn after_noise(monitor: &mut Monitor, rng: &mut Rng) -> Reply {
    let mut bytes = noise(rng);
    bytes.push(0xff);
    let id = rng.next() >> 12;
    bytes.extend(format!("{}\n", json!({"execute": "query-version", "id": id})).bytes());
    match monitor.raw(&bytes) {
        Ok(()) => monitor.reply_to(id, BOUND),
        Err(_) => Reply::Gone,
    }
}

pub(crate) struct Pester {
    stop: Arc<AtomicBool>,
    finding: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Pester {
    pub(crate) fn start(mut monitor: Monitor, mut rng: Rng, numbers: Arc<Numbers>) -> Pester {
        let (stop, finding) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (halt, note) = (stop.clone(), finding.clone());
        let thread = std::thread::spawn(move || {
            while !halt.load(Ordering::Relaxed) {
                let (text, wrong) = match rng.below(100) {
                    0..70 => (json!({"execute": rng.one(&QUERIES)}).to_string(), false),
                    70..95 => (rng.one(&NONSENSE).to_owned(), true),
                    _ => ("query-version after noise".to_owned(), false),
                };
                let asked = Instant::now();
                let reply = if text.starts_with('{') {
                    match monitor.raw(format!("{text}\n").as_bytes()) {
                        Ok(()) => monitor.reply(BOUND),
                        Err(_) => Reply::Gone,
                    }
                } else {
                    after_noise(&mut monitor, &mut rng)
                };
                monitor.events.clear();
                let took = asked.elapsed();
                numbers.slowest_query.fetch_max(took.as_millis() as u64, Ordering::Relaxed);
                Numbers::add(&numbers.queries, 1);
                let bad = match reply {
                    Reply::Hangs => Some(format!("{text} is not answered within {BOUND:?}")),
                    Reply::Gone => Some(format!("the monitor hangs up after {text}")),
                    Reply::Done(_) if wrong => Some(format!("{text} is accepted")),
                    Reply::Refused(e) if !wrong => Some(format!("{text} is refused: {e}")),
                    Reply::Done(_) | Reply::Refused(_) => None,
                };
                if let Some(bad) = bad.filter(|_| !halt.load(Ordering::Relaxed)) {
                    *note.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(bad);
                    return;
                }
                std::thread::sleep(Duration::from_millis(10 + rng.below(60)));
            }
        });
        Pester { stop, finding, thread: Some(thread) }
    }

    pub(crate) fn finding(&self) -> Option<String> {
        self.finding.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Pester {
    fn drop(&mut self) {
        self.tell_to_stop();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}
