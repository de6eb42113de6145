//! A flush round: what has to be written, in which phases, and what follows from how far it came.
//!
//! [`Meta::begin_round`] copies everything that the disk lacks, under the lock and in no time; the driver writes
//! the copies, phase by phase (see the module above); [`Meta::end_round`] draws the conclusion. Entries changed
//! meanwhile are dirty again and belong to the next round, and rounds never overlap, so no write of one overtakes
//! a write of another.

use dolmen_graph::Stamp;
use dolmen_types::BlkEvent;

use super::meta::{Freed, Meta};

/// Bytes on their way to the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Patch {
    /// Where in the file.
    pub at: u64,
    /// What.
    pub bytes: Vec<u8>,
    /// What a `blkdebug` below is told before.
    pub event: BlkEvent,
}

/// How far a round came: the last phase after which the file was flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reached {
    /// Not even phase A.
    Nothing,
    /// What nothing points to yet is durable.
    A,
    /// So are the refcount table and the header.
    B,
    /// So are the mappings.
    C,
}

/// The copies of one round.
#[derive(Debug)]
pub(super) struct Round {
    /// Counts rounds from 1.
    pub number: u64,
    /// Phase A.
    pub unreachable: Vec<Patch>,
    /// Phase B: refcount table entries.
    pub reftable: Vec<Patch>,
    /// Phase B, after another flush: the header, when a table has moved or the size has changed.
    pub header: Option<Patch>,
    /// Phase C.
    pub mappings: Vec<Patch>,
    refblocks: Vec<(usize, bool)>,
    l2: Vec<(usize, bool)>,
    l1: Vec<(usize, usize)>,
    reftable_ranges: Vec<(usize, usize)>,
    reftable_moved: bool,
    freed: Vec<Freed>,
}

impl Round {
    /// Whether the refcount table gets another place.
    pub(super) fn moves_reftable(&self) -> bool {
        self.reftable_moved
    }

    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.unreachable.is_empty()
            && self.reftable.is_empty()
            && self.header.is_none()
            && self.mappings.is_empty()
            && self.freed.is_empty()
    }
}

impl Meta {
    /// Copies what has to be written and counts it as written.
    pub(super) fn begin_round(&mut self) -> Round {
        debug_assert!(self.busy && self.rounds_begun == self.rounds_ended, "rounds never overlap");
        self.rounds_begun += 1;
        let mut r = Round {
            number: self.rounds_begun,
            unreachable: Vec::new(),
            reftable: Vec::new(),
            header: None,
            mappings: Vec::new(),
            refblocks: Vec::new(),
            l2: Vec::new(),
            l1: Vec::new(),
            reftable_ranges: Vec::new(),
            reftable_moved: false,
            freed: std::mem::take(&mut self.freed),
        };
        for slot in self.refblocks.slots_mut().filter(|s| s.fresh || s.dirty.any()) {
            let fresh = std::mem::take(&mut slot.fresh);
            let mut ranges = slot.dirty.take(slot.data.len());
            let mut event = BlkEvent::RefblockUpdatePart;
            if fresh {
                ranges = vec![(0, slot.data.len())];
                event = match self.reftable_moved {
                    true => BlkEvent::RefblockAllocWriteBlocks,
                    false => BlkEvent::RefblockAllocWrite,
                };
            }
            push_ranges(&mut r.unreachable, slot.host.0, &slot.data, &ranges, event);
            slot.writing = true;
            r.refblocks.push((slot.key, fresh));
        }
        for slot in self.l2.slots_mut().filter(|s| s.fresh || s.dirty.any()) {
            let fresh = std::mem::take(&mut slot.fresh);
            let ranges = slot.dirty.take(slot.data.len());
            if fresh {
                let all = [(0, slot.data.len())];
                push_ranges(&mut r.unreachable, slot.host.0, &slot.data, &all, BlkEvent::L2AllocWrite);
            } else {
                push_ranges(&mut r.mappings, slot.host.0, &slot.data, &ranges, BlkEvent::L2Update);
            }
            slot.writing = true;
            r.l2.push((slot.key, fresh));
        }
        r.l1 = self.l1_dirty.take(self.l1.len() * 8);
        push_entries(&mut r.mappings, self.header.l1_table.0, &self.l1, &r.l1, BlkEvent::L1Update);
        r.reftable_ranges = self.reftable_dirty.take(self.reftable.len() * 8);
        let event = if self.reftable_moved {
            BlkEvent::RefblockAllocWriteTable
        } else {
            BlkEvent::RefblockAllocHookup
        };
        push_entries(&mut r.reftable, self.header.reftable.0, &self.reftable, &r.reftable_ranges, event);
        r.reftable_moved = std::mem::take(&mut self.reftable_moved);
        if std::mem::take(&mut self.header_dirty) || r.reftable_moved {
            let event = match (r.reftable_moved, std::mem::take(&mut self.l1_moved)) {
                (true, _) => BlkEvent::RefblockAllocSwitchTable,
                (false, true) => BlkEvent::L1GrowActivateTable,
                (false, false) => BlkEvent::None,
            };
            r.header = Some(self.header_patch(event));
        }
        r
    }

    /// Draws the conclusion of a round. `stamp` is from after the last write.
    pub(super) fn end_round(&mut self, r: Round, reached: Reached, stamp: Stamp) {
        self.rounds_ended = r.number;
        for (key, fresh) in r.refblocks {
            let Some(slot) = self.refblocks.get(key) else { continue };
            slot.writing = false;
            if reached < Reached::A {
                let len = slot.data.len();
                slot.dirty.mark_all(len);
                slot.fresh |= fresh;
            }
        }
        for (key, fresh) in r.l2 {
            let Some(slot) = self.l2.get(key) else { continue };
            slot.writing = false;
            if fresh && reached < Reached::A {
                slot.fresh = true;
            } else if !fresh && reached < Reached::C {
                let len = slot.data.len();
                slot.dirty.mark_all(len);
            }
        }
        if reached < Reached::B {
            r.reftable_ranges.iter().for_each(|(a, b)| mark(&mut self.reftable_dirty, *a, *b));
            self.reftable_moved |= r.reftable_moved;
            self.header_dirty |= r.header.is_some();
        }
        if reached < Reached::C {
            r.l1.iter().for_each(|(a, b)| mark(&mut self.l1_dirty, *a, *b));
            self.freed.extend(r.freed);
            return;
        }
        self.rounds_done = r.number;
        if !r.freed.is_empty() {
            self.unmapped.push_back((stamp, r.freed));
        }
    }

    /// The first sector of the file with the header as it is now.
    pub(super) fn header_patch(&mut self, event: BlkEvent) -> Patch {
        self.header.clear_unknown();
        self.header.patch(&mut self.sector);
        Patch { at: 0, bytes: self.sector.to_vec(), event }
    }
}

fn mark(dirty: &mut super::table::Dirty, from: usize, to: usize) {
    for at in (from..to).step_by(8) {
        dirty.mark(at);
    }
}

fn push_ranges(out: &mut Vec<Patch>, base: u64, data: &[u8], ranges: &[(usize, usize)], event: BlkEvent) {
    for (a, b) in ranges {
        out.push(Patch { at: base + *a as u64, bytes: data[*a..*b].to_vec(), event });
    }
}

fn push_entries(out: &mut Vec<Patch>, base: u64, table: &[u64], ranges: &[(usize, usize)], event: BlkEvent) {
    for (a, b) in ranges {
        let bytes = table[a / 8..b / 8].iter().flat_map(|e| e.to_be_bytes()).collect();
        out.push(Patch { at: base + *a as u64, bytes, event });
    }
}
