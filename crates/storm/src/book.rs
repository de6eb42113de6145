//! What every disk may show: the judge.
//!
//! A *content* is what somebody sees of a disk, whatever nodes and files it comes from at the moment. It is
//! kept for each sector of 512 bytes as a list of entries: who wrote what, when it began, when it was
//! acknowledged. An entry is *out of date* when another one that began after it was done is itself done (for
//! a look at a running disk), or durable (for a look after a crash). A reader may find everything that began before
//! its look ended and is not out of date, and nothing else.
//!
//! Weak entries may show but take nothing out of date: discards, failed writes, data on their way to a
//! copy, writes to a layer below that may or may not be covered here. So the model never
//! knows too much; where it can't know anything the content is *unknown*.

use std::fmt::Write as _;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// What a sector holds: the number of its write; 0 for zeroes.
pub(crate) type Tag = u64;

/// A moment: the position in the order of all beginnings and ends.
pub(crate) type Moment = u64;

/// Fills whole sectors as the write `tag` does.
pub(crate) fn fill(tag: Tag, first: u64, out: &mut [u8]) {
    for (i, sector) in out.chunks_mut(SECTOR as usize).enumerate() {
        if tag == 0 {
            sector.fill(0);
            continue;
        }
        for (n, bytes) in sector.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(tag, first + i as u64, n as u64).to_le_bytes());
        }
    }
}

/// The tag of a sector; `None` if it is torn, or not of this place.
pub(crate) fn tag_of(number: u64, sector: &[u8]) -> Option<Tag> {
    let word_at = |i: usize| u64::from_le_bytes(sector[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    let tag = word_at(0);
    let whole = match tag {
        0 => sector.iter().all(|b| *b == 0),
        _ => (1..sector.len() / 8).all(|i| word_at(i) == word(tag, number, i as u64)),
    };
    whole.then_some(tag)
}

const fn word(tag: Tag, sector: u64, i: u64) -> u64 {
    if i == 0 { tag } else { (tag << 32) ^ (sector << 8) ^ i ^ 0xd01e_0000_0000_0000 }
}

/// Says whose data a sector holds.
pub(crate) fn describe(number: u64, sector: &[u8]) -> String {
    match tag_of(number, sector) {
        Some(0) => "zeroes".to_owned(),
        Some(t) => format!("write {t}"),
        None => {
            let tag = u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
            let elsewhere = (0..1 << 16).find(|n| tag_of(*n, sector).is_some());
            match elsewhere {
                Some(n) => format!("write {tag} of sector {n}"),
                None => format!("no whole sector of any write ({:02x?}...)", &sector[..12]),
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    tag: Tag,
    began: Moment,
    done: Option<Moment>,
    /// Takes what was there out of date, once it is done.
    strong: bool,
    /// Survives a crash once it is done, without a flush.
    durable: bool,
}

/// Names a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ContentId(pub(crate) usize);

#[derive(Clone, Debug, Default)]
struct Content {
    sectors: Vec<Vec<Entry>>,
    /// When the last flush that succeeded began.
    flushed: Moment,
    /// When flushes that succeeded began and ended.
    flushes: Vec<(Moment, Moment)>,
    /// Contents that may show what is written here.
    followers: Vec<ContentId>,
    /// Why nobody can know what it holds.
    unknown: Option<String>,
    /// For messages.
    name: String,
}

/// How a look is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// At a running disk, from this moment on.
    Live(Moment),
    /// At what is left after a crash.
    Crash,
    /// The same, of somebody who may have had no part in what was made durable from this moment on.
    CrashFrom(Moment),
}

/// Everything that is known.
#[derive(Debug, Default)]
pub(crate) struct Book {
    now: Moment,
    tags: Tag,
    contents: Vec<Content>,
}

impl Book {
    /// A moment of its own.
    pub(crate) fn moment(&mut self) -> Moment {
        self.now += 1;
        // 0 and 1 belong to what was there in the beginning.
        self.now + 1
    }

    /// A tag that nobody has used.
    pub(crate) fn fresh_tag(&mut self) -> Tag {
        self.tags += 1;
        self.tags
    }

    /// A content whose sectors hold these tags for certain.
    pub(crate) fn known(&mut self, name: &str, tags: &[Tag]) -> ContentId {
        let entry =
            |tag: &Tag| vec![Entry { tag: *tag, began: 0, done: Some(1), strong: true, durable: true }];
        let content = Content {
            sectors: tags.iter().map(entry).collect(),
            name: name.to_owned(),
            ..Content::default()
        };
        self.contents.push(content);
        ContentId(self.contents.len() - 1)
    }

    /// A content that nobody knows.
    pub(crate) fn unknown(&mut self, name: &str, why: &str) -> ContentId {
        let content = Content { name: name.to_owned(), unknown: Some(why.to_owned()), ..Content::default() };
        self.contents.push(content);
        ContentId(self.contents.len() - 1)
    }

    pub(crate) fn is_known(&self, c: ContentId) -> bool {
        self.contents[c.0].unknown.is_none()
    }

    pub(crate) fn name(&self, c: ContentId) -> &str {
        &self.contents[c.0].name
    }

    /// Gives up on a content and on what follows it.
    pub(crate) fn forget(&mut self, c: ContentId, why: &str) {
        for c in self.with_followers(c) {
            self.contents[c.0].unknown.get_or_insert_with(|| why.to_owned());
        }
    }

    /// From now on `follower` may show what is written to `c`.
    pub(crate) fn follow(&mut self, c: ContentId, follower: ContentId) {
        if c != follower && !self.contents[c.0].followers.contains(&follower) {
            self.contents[c.0].followers.push(follower);
        }
    }

    /// From now on `other` may show whatever is written to what lies below `c`.
    pub(crate) fn lie_over_the_same(&mut self, other: ContentId, c: ContentId) {
        for below in (0..self.contents.len()).map(ContentId).filter(|b| *b != c && *b != other) {
            if self.contents[below.0].followers.contains(&c) {
                self.follow(below, other);
            }
        }
    }

    /// `c` and everything that may show what is written to it.
    fn with_followers(&self, c: ContentId) -> Vec<ContentId> {
        let mut all = vec![c];
        let mut at = 0;
        while let Some(c) = all.get(at).copied() {
            for f in &self.contents[c.0].followers {
                if !all.contains(f) {
                    all.push(*f);
                }
            }
            at += 1;
        }
        all
    }

    fn add(&mut self, c: ContentId, sectors: std::ops::Range<u64>, entry: Entry) {
        for (i, c) in self.with_followers(c).into_iter().enumerate() {
            let content = &mut self.contents[c.0];
            let entry = if i == 0 { entry } else { Entry { strong: false, ..entry } };
            for s in sectors.clone() {
                if content.sectors.len() as u64 <= s {
                    if i != 0 {
                        break;
                    }
                    content.sectors.resize(s as usize + 1, Vec::new());
                }
                content.sectors[s as usize].push(entry);
            }
        }
    }

    /// A write begins. `strong` is false for a discard.
    pub(crate) fn begin(
        &mut self,
        c: ContentId,
        sectors: std::ops::Range<u64>,
        tag: Tag,
        strong: bool,
        durable: bool,
    ) -> Moment {
        let began = self.moment();
        self.add(c, sectors, Entry { tag, began, done: None, strong, durable });
        began
    }

    /// A write that began then has been answered. One that failed may have been done or not.
    pub(crate) fn end(
        &mut self,
        c: ContentId,
        sectors: std::ops::Range<u64>,
        began: Moment,
        succeeded: bool,
    ) {
        let now = self.moment();
        for c in self.with_followers(c) {
            let content = &mut self.contents[c.0];
            for s in sectors.clone() {
                let Some(entries) = content.sectors.get_mut(s as usize) else { break };
                for e in entries.iter_mut().rev().filter(|e| e.began == began) {
                    e.done = Some(now);
                    e.strong &= succeeded;
                }
            }
        }
    }

    /// A flush that began then has succeeded.
    pub(crate) fn flushed(&mut self, c: ContentId, began: Moment) {
        let now = self.moment();
        let content = &mut self.contents[c.0];
        content.flushed = content.flushed.max(began);
        content.flushes.push((began, now));
    }

    /// The tags that a sector may show to a look that ends at `until`.
    fn allowed(&self, c: ContentId, sector: u64, look: Look, until: Moment) -> Vec<Tag> {
        let content = &self.contents[c.0];
        let entries = content.sectors.get(sector as usize).map_or(&[][..], Vec::as_slice);
        let flushed = match look {
            Look::CrashFrom(from) => {
                content.flushes.iter().filter(|f| f.1 < from).map(|f| f.0).max().unwrap_or_default()
            }
            Look::Live(_) | Look::Crash => content.flushed,
        };
        let counts = |e: &Entry| {
            e.strong
                && e.done.is_some_and(|d| match look {
                    Look::Live(from) => d < from,
                    Look::Crash => e.durable || d < flushed,
                    Look::CrashFrom(from) => d < from && e.durable || d < flushed,
                })
        };
        let latest = entries.iter().filter(|e| counts(e)).map(|e| e.began).max();
        let mut out = Vec::new();
        for e in entries {
            let current = latest.is_none_or(|l| e.done.is_none_or(|d| d > l));
            if e.began < until && current && !out.contains(&e.tag) {
                out.push(e.tag);
            }
        }
        if entries.is_empty() {
            out.push(0);
        }
        out
    }

    /// The last that is known of a sector, for messages.
    fn history(&self, c: ContentId, sector: u64, look: Look, until: Moment) -> String {
        let entries = self.contents[c.0].sectors.get(sector as usize).map_or(&[][..], Vec::as_slice);
        let mut out = format!("seen {look:?} until {until}; flushed {}", self.contents[c.0].flushed);
        for e in &entries[entries.len().saturating_sub(12)..] {
            let done = e.done.map_or("in flight".to_owned(), |d| d.to_string());
            let _ = write!(out, ", {}{} {}-{done}", if e.strong { "" } else { "maybe " }, e.tag, e.began);
        }
        out
    }

    fn in_flight(&self, c: ContentId, sector: u64, look: Look) -> bool {
        let Look::Live(from) = look else { return false };
        let entries = self.contents[c.0].sectors.get(sector as usize);
        entries.is_some_and(|l| l.iter().any(|e| e.done.is_none_or(|d| d >= from)))
    }

    /// Judges what was read from sector `first` on.
    ///
    /// # Errors
    /// The first sectors that can't be right.
    pub(crate) fn judge(&mut self, c: ContentId, first: u64, data: &[u8], look: Look) -> Result<(), String> {
        let until = self.moment();
        if self.contents[c.0].unknown.is_some() {
            return Ok(());
        }
        let mut wrong = String::new();
        let mut count = 0;
        for (i, sector) in data.chunks_exact(SECTOR as usize).enumerate() {
            let number = first + i as u64;
            let allowed = self.allowed(c, number, look, until);
            match tag_of(number, sector) {
                Some(t) if allowed.contains(&t) => continue,
                // A read beside a write may find half of it.
                None if self.in_flight(c, number, look) => continue,
                _ => {}
            }
            count += 1;
            if count <= 3 {
                let list: Vec<String> =
                    allowed.iter().map(|t| if *t == 0 { "zeroes".into() } else { t.to_string() }).collect();
                let _ = write!(
                    wrong,
                    "sector {number} holds {}, not {}; ",
                    describe(number, sector),
                    list.join(" or ")
                );
                if count == 1 {
                    let _ = write!(wrong, "({})", self.history(c, number, look, until));
                }
            }
        }
        match count {
            0 => Ok(()),
            _ => Err(format!(
                "'{}': {count} sectors are wrong: {}",
                self.name(c),
                wrong.trim_end_matches("; ")
            )),
        }
    }

    /// A content that holds what `of` held at some moment from `from` until now; `sectors` of it, and zeroes beyond.
    pub(crate) fn copy(
        &mut self,
        name: &str,
        of: ContentId,
        from: Moment,
        sectors: std::ops::Range<u64>,
    ) -> ContentId {
        let id = self.unknown(name, "");
        self.contents[id.0].unknown = None;
        self.copy_into(id, of, from, sectors);
        id
    }

    /// Everything that `into` held is replaced by what `of` held at some moment from `from` until now.
    pub(crate) fn copy_into(
        &mut self,
        into: ContentId,
        of: ContentId,
        from: Moment,
        sectors: std::ops::Range<u64>,
    ) {
        if let Some(why) = self.contents[of.0].unknown.clone() {
            let over = self.with_followers(of);
            for f in self.with_followers(into).into_iter().filter(|f| *f == into || !over.contains(f)) {
                self.contents[f.0].unknown.get_or_insert_with(|| why.clone());
            }
            return;
        }
        let until = self.moment();
        let mut out = Vec::new();
        let end = sectors.end as usize;
        for s in sectors {
            let mut entries = Vec::new();
            // What a crash may bring back, until somebody has flushed the copy.
            for tag in self.allowed(of, s, Look::CrashFrom(from), until) {
                entries.push(Entry { tag, began: 0, done: Some(1), strong: true, durable: true });
            }
            for tag in self.allowed(of, s, Look::Live(from), until) {
                entries.push(Entry {
                    tag,
                    began: from.max(2),
                    done: Some(until),
                    strong: true,
                    durable: false,
                });
            }
            out.push(entries);
        }
        // A longer target keeps its end.
        out.extend(self.contents[into.0].sectors.drain(..).skip(end));
        self.contents[into.0].sectors = out;
        self.contents[into.0].unknown = None;
        // What stands over the source is kept right by whoever makes the copy.
        let over = self.with_followers(of);
        let now = self.moment();
        for f in self.with_followers(into).into_iter().skip(1).filter(|f| !over.contains(f)) {
            self.feed_one(into, f, now);
        }
    }

    /// How many sectors a content has.
    pub(crate) fn sectors(&self, c: ContentId) -> u64 {
        self.contents[c.0].sectors.len() as u64
    }

    /// `into`, and what shows it but is not among `kept`, may show in any place whatever `of` has shown since `from`
    /// or may show after a crash.
    pub(crate) fn feed(&mut self, of: ContentId, into: ContentId, from: Moment, kept: &[ContentId]) {
        for f in self.with_followers(into).into_iter().filter(|f| *f == into || !kept.contains(f)) {
            self.feed_one(of, f, from);
        }
    }

    fn feed_one(&mut self, of: ContentId, into: ContentId, from: Moment) {
        if let Some(why) = self.contents[of.0].unknown.clone() {
            self.contents[into.0].unknown.get_or_insert(why);
            return;
        }
        let now = self.moment();
        {
            let count = self.contents[into.0].sectors.len().min(self.contents[of.0].sectors.len());
            for s in 0..count {
                let mut tags = self.allowed(of, s as u64, Look::Crash, now + 1);
                tags.extend(self.allowed(of, s as u64, Look::Live(from), now + 1));
                let entries = &mut self.contents[into.0].sectors[s];
                for tag in tags {
                    // Not done: it may arrive at any time.
                    if !entries.iter().any(|e| e.tag == tag && e.done.is_none()) {
                        entries.push(Entry { tag, began: now, done: None, strong: false, durable: false });
                    }
                }
            }
        }
    }

    /// Zeroes may show anywhere.
    pub(crate) fn feed_zeroes(&mut self, c: ContentId) {
        let end = self.contents[c.0].sectors.len() as u64;
        self.begin(c, 0..end, 0, false, false);
    }

    /// What `c` has not got, as it ends before, is what `of` has there.
    pub(crate) fn take_tail(&mut self, c: ContentId, of: ContentId) {
        let have = self.contents[c.0].sectors.len();
        let tail: Vec<_> = self.contents[of.0].sectors.iter().skip(have).cloned().collect();
        self.contents[c.0].sectors.extend(tail);
    }

    /// The disk has this size from now on; what is new is zero.
    pub(crate) fn resize(&mut self, c: ContentId, sectors: u64) {
        let zero = Entry { tag: 0, began: 0, done: Some(1), strong: true, durable: true };
        self.contents[c.0].sectors.resize(sectors as usize, vec![zero]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(tag: Tag) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        fill(tag, 0, &mut bytes);
        bytes
    }

    fn live(b: &mut Book, c: ContentId, tag: Tag) -> bool {
        let m = b.moment();
        b.judge(c, 0, &sector(tag), Look::Live(m)).is_ok()
    }

    fn crash(b: &mut Book, c: ContentId, tag: Tag) -> bool {
        b.judge(c, 0, &sector(tag), Look::Crash).is_ok()
    }

    fn write(b: &mut Book, c: ContentId, tag: Tag) {
        let at = b.begin(c, 0..1, tag, true, false);
        b.end(c, 0..1, at, true);
    }

    #[test]
    fn torn_and_misplaced_sectors_belong_to_nobody() {
        let mut s = sector(7);
        assert_eq!(tag_of(0, &s), Some(7));
        assert_eq!(tag_of(1, &s), None);
        assert_eq!(describe(1, &s), "write 7 of sector 0");
        s[100] ^= 1;
        assert_eq!(tag_of(0, &s), None);
    }

    #[test]
    fn acknowledged_is_seen_and_flushed_survives() {
        let mut b = Book::default();
        let c = b.known("c", &[1]);
        let at = b.begin(c, 0..1, 2, true, false);
        assert!(live(&mut b, c, 1) && live(&mut b, c, 2), "in flight: old or new");
        b.end(c, 0..1, at, true);
        assert!(!live(&mut b, c, 1) && live(&mut b, c, 2));
        assert!(crash(&mut b, c, 1) && crash(&mut b, c, 2));
        let flush = b.moment();
        b.flushed(c, flush);
        assert!(!crash(&mut b, c, 1) && crash(&mut b, c, 2) && !crash(&mut b, c, 0));
        let at = b.begin(c, 0..1, 3, true, false);
        b.end(c, 0..1, at, false);
        assert!(live(&mut b, c, 2) && live(&mut b, c, 3), "failed: done or not");
    }

    #[test]
    fn a_copy_holds_what_was_there_while_it_was_made() {
        let mut b = Book::default();
        let c = b.known("c", &[1]);
        let from = b.moment();
        write(&mut b, c, 2);
        let copy = b.copy("copy", c, from, 0..1);
        write(&mut b, c, 3);
        assert!(live(&mut b, copy, 1) && live(&mut b, copy, 2) && !live(&mut b, copy, 3));
        write(&mut b, copy, 4);
        assert!(!live(&mut b, copy, 2) && live(&mut b, copy, 4));
    }

    #[test]
    fn followers_may_show_it() {
        let mut b = Book::default();
        let (base, top) = (b.known("base", &[1]), b.known("top", &[1]));
        b.follow(base, top);
        write(&mut b, base, 2);
        assert!(!live(&mut b, base, 1) && live(&mut b, base, 2));
        assert!(live(&mut b, top, 1) && live(&mut b, top, 2));
        write(&mut b, top, 3);
        assert!(!live(&mut b, top, 2), "what was overwritten here is covered");
        let other = b.known("other", &[9]);
        let now = b.moment();
        b.feed(other, base, now, &[]);
        assert!(live(&mut b, base, 9) && live(&mut b, top, 9) && !live(&mut b, top, 1));
        b.copy_into(base, other, 0, 0..1);
        assert!(live(&mut b, base, 9) && !live(&mut b, base, 2));
    }
}
