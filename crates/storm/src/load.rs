//! Clients that read, write and ask for the status of blocks all the time, several requests at once, and compare.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::book::{Book, ContentId, Look, Moment, SECTOR, fill};
use crate::nbd::{Answer, Client, Reply};
use crate::rng::Rng;
use crate::world::open;

/// What a client does at most at a time, in sectors.
const MOST: u64 = 256;
const ENOSPC: u32 = 28;

/// How a client ended.
#[derive(Debug, Default)]
pub(crate) struct End {
    /// What it read that can't be right.
    pub(crate) wrong: Option<String>,
    /// The connection broke.
    pub(crate) lost: Option<String>,
    /// Errors that were answered, with what was asked.
    pub(crate) errors: Vec<String>,
}

/// A client in a thread.
pub(crate) struct Worker {
    stop: Arc<AtomicBool>,
    pub(crate) done: Arc<AtomicU64>,
    thread: JoinHandle<End>,
    /// The size that it was told.
    pub(crate) size: u64,
}

struct Guest {
    client: Client,
    book: Arc<Mutex<Book>>,
    content: ContentId,
    rng: Rng,
    writes: bool,
    sectors: u64,
    asked: BTreeMap<u64, Asked>,
    end: End,
}

/// A request in flight.
enum Asked {
    Read(Range<u64>, Moment),
    Status(Range<u64>, Moment),
    Change(&'static str, Range<u64>, Moment),
    Flush(Moment),
}

impl Worker {
    pub(crate) fn start(
        socket: &Path,
        export: &str,
        book: &Arc<Mutex<Book>>,
        content: ContentId,
        writes: bool,
        mut rng: Rng,
    ) -> std::io::Result<Worker> {
        let client = Client::connect(socket, export, rng.percent(50))?;
        let size = client.size;
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut guest = Guest {
            client,
            book: book.clone(),
            content,
            rng,
            writes,
            // What lies beyond is nobody's.
            sectors: match open(book).sectors(content) {
                0 => size / SECTOR,
                known => known.min(size / SECTOR),
            },
            asked: BTreeMap::new(),
            end: End::default(),
        };
        let (halt, count) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            if let Err(e) = guest.work(&halt, &count) {
                guest.end.lost = Some(e.to_string());
            }
            guest.end
        });
        Ok(Worker { stop, done, thread, size })
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    pub(crate) fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(crate) fn end(self) -> End {
        self.tell_to_stop();
        self.thread.join().unwrap_or_default()
    }
}

/// A job may write before anybody has read that it was accepted, and before it is in the book. What was read stays the same, and no
/// later write can have been in it; so it may be judged again.
fn patiently(judge: impl Fn() -> Result<(), String>) -> Result<(), String> {
    let mut judged = judge();
    for _ in 0..10 {
        if judged.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        judged = judge();
    }
    judged
}

impl Guest {
    /// Keeps some requests in flight until it is told to stop, or has found something.
    fn work(&mut self, halt: &AtomicBool, count: &AtomicU64) -> std::io::Result<()> {
        while !halt.load(Ordering::Relaxed) && self.sectors > 0 {
            let depth = self.rng.one(&[1, 1, 2, 4, 12]);
            while self.client.in_flight() < depth {
                let asked = self.ask()?;
                self.asked.insert(asked.0, asked.1);
            }
            while self.client.in_flight() >= depth {
                if !self.hear(count)? {
                    return Ok(());
                }
            }
            std::thread::sleep(Duration::from_micros(self.rng.one(&[0, 0, 200, 1000, 3000])));
        }
        while self.client.in_flight() > 0 {
            if !self.hear(count)? {
                break;
            }
        }
        Ok(())
    }

    /// Somewhere, and some length.
    fn range(&mut self) -> Range<u64> {
        let most = self.rng.one(&[1, 8, 16, 128, MOST]).min(self.sectors);
        let len = 1 + self.rng.below(most);
        // Half of everything happens in one place.
        let room = if self.rng.percent(50) { (self.sectors / 8).max(len) } else { self.sectors };
        let mut at = self.rng.below(room - len + 1);
        if self.rng.percent(50) {
            at = at / 8 * 8;
        }
        at..at + len
    }

    /// Sends a request.
    fn ask(&mut self) -> std::io::Result<(u64, Asked)> {
        let range = self.range();
        let (at, len) = (range.start * SECTOR, ((range.end - range.start) * SECTOR) as u32);
        let what = if self.writes { self.rng.below(100) } else { self.rng.below(35) };
        let fua = self.rng.percent(10);
        let moment = || open(&self.book).moment();
        match what {
            0..5 if self.client.can_tell_status() => {
                let began = moment();
                Ok((self.client.block_status(at, len)?, Asked::Status(range, began)))
            }
            0..35 => {
                let began = moment();
                Ok((self.client.read(at, len)?, Asked::Read(range, began)))
            }
            35..80 => {
                let tag = open(&self.book).fresh_tag();
                let mut data = vec![0; len as usize];
                fill(tag, range.start, &mut data);
                let asked = self.begin("write", range, tag, true, fua);
                Ok((self.client.write(at, &data, fua)?, asked))
            }
            80..87 if self.client.can_zero() => {
                let no_hole = self.rng.percent(50);
                let asked = self.begin("zero write", range, 0, true, fua);
                Ok((self.client.zero(at, len, fua, no_hole)?, asked))
            }
            87..90 if self.client.can_trim() => {
                let asked = self.begin("discard", range, 0, false, false);
                Ok((self.client.trim(at, len)?, asked))
            }
            _ => {
                let began = moment();
                Ok((self.client.flush()?, Asked::Flush(began)))
            }
        }
    }

    /// A change begins. When the connection breaks, it may still be done at any time.
    fn begin(&self, what: &'static str, range: Range<u64>, tag: u64, strong: bool, fua: bool) -> Asked {
        let began = open(&self.book).begin(self.content, range.clone(), tag, strong, fua);
        Asked::Change(what, range, began)
    }

    /// Takes a reply; false when there is no sense in going on.
    fn hear(&mut self, count: &AtomicU64) -> std::io::Result<bool> {
        let Reply { cookie, answer, data, extents } = self.client.receive()?;
        count.fetch_add(1, Ordering::Relaxed);
        let asked = self.asked.remove(&cookie).expect("the client knows what it waits for");
        let failed = match answer {
            Answer::Done => None,
            Answer::Failed(e) => Some(e),
        };
        let judged = match &asked {
            Asked::Read(range, began) if failed.is_none() => {
                patiently(|| open(&self.book).judge(self.content, range.start, &data, Look::Live(*began)))
            }
            Asked::Status(range, began) if failed.is_none() => {
                patiently(|| self.judge_status(range, *began, &extents))
            }
            Asked::Flush(began) if failed.is_none() => {
                open(&self.book).flushed(self.content, *began);
                Ok(())
            }
            Asked::Change(_, range, began) => {
                open(&self.book).end(self.content, range.clone(), *began, failed.is_none());
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(e) = judged {
            self.end.wrong = Some(e);
            return Ok(false);
        }
        if let Some(errno) = failed {
            self.failed(&asked, errno);
        }
        Ok(true)
    }

    /// What is said to read as zeroes must be able to.
    fn judge_status(&self, range: &Range<u64>, began: Moment, extents: &[(u32, u32)]) -> Result<(), String> {
        let mut at = range.start * SECTOR;
        if extents.is_empty() || extents[0].0 == 0 {
            return Err(format!("a block status of sectors {range:?} that says nothing"));
        }
        for (len, flags) in extents {
            let end = at + u64::from(*len);
            if flags & 2 != 0 {
                let (first, last) = (at.div_ceil(SECTOR), (end / SECTOR).min(range.end));
                let zeroes = vec![0; (last.saturating_sub(first) * SECTOR) as usize];
                open(&self.book)
                    .judge(self.content, first, &zeroes, Look::Live(began))
                    .map_err(|e| format!("by a block status that says zeroes: {e}"))?;
            }
            at = end;
        }
        Ok(())
    }

    fn failed(&mut self, asked: &Asked, errno: u32) {
        let (what, range) = match asked {
            Asked::Read(r, _) => ("read", r.clone()),
            Asked::Status(r, _) => ("block status", r.clone()),
            Asked::Change(what, r, _) => (*what, r.clone()),
            Asked::Flush(_) => ("flush", 0..0),
        };
        if self.end.errors.len() < 100 {
            self.end.errors.push(format!("{what} of sectors {range:?}: error {errno}"));
        }
        // A full disk stays full for a while.
        std::thread::sleep(Duration::from_millis(if errno == ENOSPC { 10 } else { 2 }));
    }
}
