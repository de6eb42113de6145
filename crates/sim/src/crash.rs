//! From the log of a simulated disk to the images that a power loss may leave.
//!
//! The log is replayed forwards once; at each position any number of crashes can be
//! drawn. Three things are kept up to date: the durable content, the writes that are applied
//! but not durable (in the order of application), and the writes that have not been applied.

use crate::disk::{Change, Event, SECTOR, SimDisk};
use crate::{Image, Random};
use dolmen_types::Span;

/// The possible crashes of one run; see the module's head.
#[derive(Debug)]
pub struct CrashPoints {
    events: Vec<Event>,
    /// Events replayed so far.
    position: usize,
    durable: Image,
    volatile: Image,
    applied: Vec<Unflushed>,
    waiting: Vec<Waiting>,
    /// Flushes on their way: number and position of submission.
    flushes: Vec<(u64, usize)>,
}

/// A write that has not been applied.
#[derive(Clone, Debug)]
struct Waiting {
    id: u64,
    change: Change,
    submitted: usize,
    fua: bool,
}

/// A write that has been applied and is not durable.
#[derive(Debug)]
struct Unflushed {
    id: u64,
    parts: Vec<Part>,
    submitted: usize,
    completed: Option<usize>,
    fua: bool,
    /// Sectors that a later write with FUA has settled.
    settled: Vec<Span>,
}

/// A piece with the final values of whole sectors.
#[derive(Clone, Debug)]
struct Part(Change);

/// How much of the unflushed writes a drawn crash keeps.
#[derive(Clone, Copy)]
enum Keep {
    Nothing,
    Everything,
    /// Each write as a whole, with this chance in percent.
    Writes(u64),
    /// Each sector of each write.
    Sectors(u64),
    /// Each write draws one of the above.
    Mixed,
}

impl CrashPoints {
    /// The possible crashes in the life of `disk` so far.
    ///
    /// # Panics
    /// When the disk keeps no log.
    pub fn of(disk: &SimDisk) -> CrashPoints {
        assert!(disk.config().log, "this disk keeps no log");
        let (initial, events) = disk.history();
        CrashPoints {
            events,
            position: 0,
            durable: initial.clone(),
            volatile: initial,
            applied: Vec::new(),
            waiting: Vec::new(),
            flushes: Vec::new(),
        }
    }

    /// How many positions there are: a crash at position `p` comes after the first `p`
    /// events, for `p` in `0..=events()`.
    pub fn events(&self) -> usize {
        self.events.len()
    }

    /// Writes that are not durable at this position.
    pub fn unflushed(&self) -> usize {
        self.applied.len() + self.waiting.len()
    }

    /// Goes forward to a position.
    ///
    /// # Panics
    /// When it lies behind, or beyond the log.
    pub fn advance(&mut self, position: usize) {
        assert!(self.position <= position && position <= self.events.len(), "positions only grow");
        while self.position < position {
            let event = self.events[self.position].clone();
            self.replay(event);
            self.position += 1;
        }
    }

    /// An image that the disk may hold after losing power here. Different seeds draw
    /// different ones.
    pub fn crash(&self, seed: u64) -> Image {
        let mut random = Random::new(seed);
        let keep = match random.below(10) {
            0 => Keep::Nothing,
            1 => Keep::Everything,
            2 => Keep::Writes(10),
            3 | 4 => Keep::Writes(50),
            5 => Keep::Writes(90),
            6 => Keep::Sectors(50),
            7 => Keep::Sectors(90),
            _ => Keep::Mixed,
        };
        let mut image = self.durable.clone();
        for write in &self.applied {
            keep.apply(&mut random, &write.parts, &write.settled, &mut image);
        }
        for write in &self.waiting {
            let parts = sectors(&write.change, &self.volatile);
            keep.apply(&mut random, &parts, &[], &mut image);
        }
        image
    }

    fn replay(&mut self, event: Event) {
        match event {
            Event::Submitted { id, change, fua } => {
                self.waiting.push(Waiting { id, change, submitted: self.position, fua });
            }
            Event::Applied(id) => {
                let Some(i) = self.waiting.iter().position(|w| w.id == id) else { return };
                let write = self.waiting.remove(i);
                let parts = sectors(&write.change, &self.volatile);
                write.change.apply(&mut self.volatile);
                let (submitted, fua) = (write.submitted, write.fua);
                let settled = Vec::new();
                self.applied.push(Unflushed { id, parts, submitted, completed: None, fua, settled });
            }
            Event::Completed(id) | Event::Failed(id) => {
                self.waiting.retain(|w| w.id != id);
                let position = self.position;
                let Some(i) = self.applied.iter().position(|w| w.id == id) else { return };
                self.applied[i].completed = Some(position);
                if self.applied[i].fua && matches!(event, Event::Completed(_)) {
                    self.settle(i);
                }
            }
            Event::FlushSubmitted(id) => self.flushes.push((id, self.position)),
            Event::Flushed(id) => {
                let Some(i) = self.flushes.iter().position(|f| f.0 == id) else { return };
                let (_, submitted) = self.flushes.remove(i);
                let durable = &mut self.durable;
                self.applied.retain(|write| {
                    let covered = write.completed.is_some_and(|c| c < submitted);
                    if covered {
                        Keep::Everything.apply(&mut Random::new(0), &write.parts, &write.settled, durable);
                    }
                    !covered
                });
            }
        }
    }

    /// A write with FUA has completed.
    fn settle(&mut self, i: usize) {
        let write = self.applied.remove(i);
        for part in &write.parts {
            part.0.apply(&mut self.durable);
        }
        for earlier in &mut self.applied {
            if earlier.completed.is_some_and(|c| c < write.submitted) {
                earlier.settled.extend(write.parts.iter().filter_map(Part::span));
            }
        }
    }
}

impl Keep {
    fn apply(self, random: &mut Random, parts: &[Part], settled: &[Span], image: &mut Image) {
        let keep = match self {
            Keep::Mixed => *random.pick(&[
                Keep::Nothing,
                Keep::Everything,
                Keep::Everything,
                Keep::Sectors(20),
                Keep::Sectors(50),
                Keep::Sectors(80),
            ]),
            Keep::Writes(percent) if random.percent(percent) => Keep::Everything,
            Keep::Writes(_) => Keep::Nothing,
            other => other,
        };
        match keep {
            Keep::Nothing => {}
            Keep::Everything if settled.is_empty() => {
                for part in parts {
                    part.0.apply(image);
                }
            }
            Keep::Everything | Keep::Sectors(_) | Keep::Writes(_) | Keep::Mixed => {
                let percent = if let Keep::Sectors(p) = keep { p } else { 100 };
                for part in parts {
                    part.apply_sectors(image, |sector| {
                        random.percent(percent) && !settled.iter().any(|s| s.overlaps(sector))
                    });
                }
            }
        }
    }
}

impl Part {
    fn span(&self) -> Option<Span> {
        match &self.0 {
            Change::Write(offset, data) => Some(Span::new(*offset, data.len() as u64)),
            Change::Zero(span) => Some(*span),
            Change::Resize(_) | Change::Nothing => None,
        }
    }

    fn apply_sectors(&self, image: &mut Image, mut keep: impl FnMut(Span) -> bool) {
        match &self.0 {
            Change::Write(offset, data) => {
                for sector in Span::new(*offset, data.len() as u64).blocks(SECTOR) {
                    if keep(sector) {
                        let start = (sector.offset() - offset) as usize;
                        image.write(sector.offset(), &data[start..start + sector.len() as usize]);
                    }
                }
            }
            Change::Zero(span) => {
                for sector in span.blocks(SECTOR) {
                    if keep(sector) {
                        image.zero(sector.offset(), sector.len());
                    }
                }
            }
            Change::Resize(size) => {
                // Of what is cut off, each sector may become zeroes or stay, and the
                // size may change or not.
                let cut = image.size().saturating_sub(*size);
                for sector in Span::new(*size, cut).blocks(SECTOR) {
                    if keep(sector) {
                        image.zero(sector.offset(), sector.len());
                    }
                }
                if keep(Span::new(*size, 0)) {
                    image.resize(*size);
                }
            }
            Change::Nothing => {}
        }
    }
}

/// The change as final values of whole sectors, on top of `before`.
fn sectors(change: &Change, before: &Image) -> Vec<Part> {
    let span = match change {
        Change::Write(offset, data) => Span::new(*offset, data.len() as u64),
        Change::Zero(span) => *span,
        Change::Resize(_) => return vec![Part(change.clone())],
        Change::Nothing => return Vec::new(),
    };
    if span.is_aligned(SECTOR) {
        return vec![Part(change.clone())];
    }
    // Up to the end of the last sector, but not past the end of the disk.
    let outer = span.align_out(SECTOR);
    let end = outer.end().min(before.size().max(span.end()));
    let mut after = before.clone();
    change.apply(&mut after);
    let mut bytes = vec![0; (end - outer.offset()) as usize];
    after.read(outer.offset(), &mut bytes);
    vec![Part(Change::Write(outer.offset(), bytes.into()))]
}
