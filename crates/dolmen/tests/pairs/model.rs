//! What disks may read as.
//!
//! A disk is told in units of 4 KiB, each filled with a tag. A view keeps for each unit the tags
//! that a reader may find, in the order of time: usually one. There are more while data
//! are on their way (from a source to a target), or when somebody has written to a layer
//! below and nobody knows whether a copy was made before. Who has seen a tag must not see an
//! earlier one later: looking at a unit forgets what came before what was seen.

/// Bytes of a unit.
pub(crate) const UNIT: usize = 4096;
/// Bytes of a cluster of the images.
pub(crate) const CLUSTER: usize = 64 << 10;
/// Size of every disk in bytes.
pub(crate) const SIZE: usize = 2 << 20;
/// Units of a disk.
pub(crate) const UNITS: usize = SIZE / UNIT;
/// Units of a cluster.
pub(crate) const PER_CLUSTER: usize = CLUSTER / UNIT;

/// What a unit holds; 0 for zeroes.
pub(crate) type Tag = u32;

/// Fills a unit.
pub(crate) fn fill(unit: &mut [u8], tag: Tag) {
    unit.fill(tag as u8);
    if tag != 0 {
        unit[..4].copy_from_slice(&tag.to_le_bytes());
    }
}

/// The tag of a unit; `None` if it is torn or holds something else.
pub(crate) fn tag_of(unit: &[u8]) -> Option<Tag> {
    let tag = Tag::from_le_bytes(unit[..4].try_into().expect("four bytes"));
    // All the rest is one byte, many times: compare it with itself, shifted by one.
    let same = unit[4] == tag as u8 && unit[4..UNIT - 1] == unit[5..UNIT];
    same.then_some(tag)
}

/// Which unit of which disk it is the first content of.
pub(crate) fn first_tag(layer: u32, unit: usize) -> Tag {
    layer << 24 | (unit as u32 + 1) << 8 | (0x51 + layer)
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    units: Vec<Vec<Tag>>,
}

impl View {
    pub(crate) fn new(tags: impl Iterator<Item = Tag>) -> View {
        View { units: tags.map(|t| vec![t]).collect() }
    }

    pub(crate) fn zeroes() -> View {
        View::new(std::iter::repeat_n(0, UNITS))
    }

    /// The newest content.
    pub(crate) fn newest(&self, unit: usize) -> Tag {
        *self.units[unit].last().expect("never empty")
    }

    /// A write that everybody sees at once.
    pub(crate) fn set(&mut self, unit: usize, tag: Tag) {
        self.units[unit] = vec![tag];
    }

    /// Something that readers see now or later.
    pub(crate) fn may_become(&mut self, unit: usize, tag: Tag) {
        let of = &mut self.units[unit];
        if of.last() != Some(&tag) {
            of.push(tag);
        }
    }

    /// Everything of another disk may be seen here.
    pub(crate) fn may_become_all(&mut self, other: &View) {
        for unit in 0..UNITS {
            for &tag in &other.units[unit] {
                self.may_become(unit, tag);
            }
        }
    }

    /// Compares with what was read; from then on nothing earlier may be seen.
    ///
    /// # Errors
    /// The first difference.
    pub(crate) fn observe(&mut self, data: &[u8]) -> Result<(), String> {
        if data.len() < SIZE {
            return Err(format!("the disk ends at {} of {SIZE} bytes", data.len()));
        }
        for (unit, (of, bytes)) in self.units.iter_mut().zip(data.chunks_exact(UNIT)).enumerate() {
            let tag = tag_of(bytes);
            match tag.and_then(|t| of.iter().position(|x| *x == t)) {
                Some(i) => drop(of.drain(..i)),
                None => {
                    let found = tag.map_or("torn data".to_owned(), |t| format!("{t:#x}"));
                    let wanted: Vec<String> = of.iter().map(|t| format!("{t:#x}")).collect();
                    return Err(format!("unit {unit} reads {found}, not {}", wanted.join(" or ")));
                }
            }
        }
        Ok(())
    }

    /// What a reader finds if it finds the newest of everything.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; SIZE];
        for (unit, bytes) in out.chunks_exact_mut(UNIT).enumerate() {
            fill(bytes, self.newest(unit));
        }
        out
    }
}

#[test]
fn time_does_not_run_backwards() {
    let mut v = View::zeroes();
    v.set(0, 7);
    v.may_become(0, 8);
    let (mut old, mut new) = (View::zeroes(), View::zeroes());
    old.set(0, 7);
    new.set(0, 8);
    v.observe(&old.bytes()).expect("the old one is still possible");
    v.observe(&new.bytes()).expect("and so is the new one");
    v.observe(&old.bytes()).expect_err("but not the old one after the new one");
    let mut torn = new.bytes();
    torn[UNIT / 2] ^= 1;
    v.observe(&torn).expect_err("half of one is neither");
}
