//! Clients that read and write all the time, and compare.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::book::{Book, ContentId, Look, SECTOR, fill};
use crate::nbd::{Answer, Client};
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
    end: End,
}

impl Worker {
    pub(crate) fn start(
        socket: &Path,
        export: &str,
        book: &Arc<Mutex<Book>>,
        content: ContentId,
        writes: bool,
        rng: Rng,
    ) -> std::io::Result<Worker> {
        let client = Client::connect(socket, export)?;
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
            end: End::default(),
        };
        let (halt, count) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            while !halt.load(Ordering::Relaxed) && guest.sectors > 0 {
                match guest.step() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(e) => {
                        guest.end.lost = Some(e.to_string());
                        break;
                    }
                }
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(guest.rng.one(&[0, 0, 200, 1000, 3000])));
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

impl Guest {
    /// Somewhere, and some length.
    fn range(&mut self) -> std::ops::Range<u64> {
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

    /// One request; false when there is no sense in going on.
    fn step(&mut self) -> std::io::Result<bool> {
        let range = self.range();
        let (at, len) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
        let what = if self.writes { self.rng.below(100) } else { 0 };
        let fua = self.rng.percent(10);
        match what {
            0..35 => self.read(range),
            35..80 => {
                let tag = open(&self.book).fresh_tag();
                let mut data = vec![0; len as usize];
                fill(tag, range.start, &mut data);
                self.change(range, tag, true, fua, "write", |c| c.write(at, &data, fua))
            }
            80..87 if self.client.can_zero() => {
                let no_hole = self.rng.percent(50);
                self.change(range, 0, true, fua, "zero write", |c| c.zero(at, len as u32, fua, no_hole))
            }
            87..90 if self.client.can_trim() => {
                self.change(range, 0, false, false, "discard", |c| c.trim(at, len as u32))
            }
            _ => {
                let began = open(&self.book).moment();
                match self.client.flush()? {
                    Answer::Done => open(&self.book).flushed(self.content, began),
                    Answer::Failed(e) => self.failed("flush", 0..0, e),
                }
                Ok(true)
            }
        }
    }

    fn failed(&mut self, what: &str, range: std::ops::Range<u64>, errno: u32) {
        if self.end.errors.len() < 100 {
            self.end.errors.push(format!("{what} of sectors {range:?}: error {errno}"));
        }
        // A full disk stays full for a while.
        std::thread::sleep(Duration::from_millis(if errno == ENOSPC { 10 } else { 2 }));
    }

    fn read(&mut self, range: std::ops::Range<u64>) -> std::io::Result<bool> {
        let mut data = vec![0; ((range.end - range.start) * SECTOR) as usize];
        let began = open(&self.book).moment();
        match self.client.read(range.start * SECTOR, &mut data)? {
            Answer::Failed(e) => self.failed("read", range, e),
            Answer::Done => {
                let judged = open(&self.book).judge(self.content, range.start, &data, Look::Live(began));
                if let Err(e) = judged {
                    self.end.wrong = Some(e);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn change(
        &mut self,
        range: std::ops::Range<u64>,
        tag: u64,
        strong: bool,
        fua: bool,
        what: &str,
        request: impl FnOnce(&mut Client) -> std::io::Result<Answer>,
    ) -> std::io::Result<bool> {
        let began = open(&self.book).begin(self.content, range.clone(), tag, strong, fua);
        // When the connection breaks, it may still be done at any time.
        let answer = request(&mut self.client)?;
        open(&self.book).end(self.content, range.clone(), began, answer == Answer::Done);
        if let Answer::Failed(e) = answer {
            self.failed(what, range, e);
        }
        Ok(true)
    }
}
