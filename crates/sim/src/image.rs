//! The bytes of a simulated disk: pages that clones share until they differ, so that
//! hundreds of crash images of one run cost little.

use std::sync::Arc;

const PAGE: usize = 4096;

type Page = [u8; PAGE];

/// The content of a disk. Cloning shares the pages.
#[derive(Clone, Default)]
pub struct Image {
    size: u64,
    /// One entry per page up to the last one that was ever written; `None` is zeroes.
    pages: Vec<Option<Arc<Page>>>,
}

impl Image {
    /// `size` bytes of zeroes.
    pub fn new(size: u64) -> Image {
        Image { size, pages: Vec::new() }
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Image {
        let mut image = Image::new(0);
        image.write(0, bytes);
        image
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Cuts or extends with zeroes.
    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
            self.pages.truncate(usize::try_from(size.div_ceil(PAGE as u64)).expect("fits memory"));
        }
        self.size = size;
    }

    /// Copies bytes out. What lies past the end reads as zeroes.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (at, part, range) in pieces(offset, out.len()) {
            match self.pages.get(at).and_then(Option::as_ref) {
                Some(page) => out[range].copy_from_slice(&page[part]),
                None => out[range].fill(0),
            }
        }
    }

    /// Copies bytes in, growing when they reach past the end.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (at, part, range) in pieces(offset, bytes.len()) {
            if self.pages.len() <= at {
                self.pages.resize(at + 1, None);
            }
            let page = self.pages[at].get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[part].copy_from_slice(&bytes[range]);
        }
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    /// Sets a range to zeroes, growing when it reaches past the end. Whole pages become
    /// holes.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let number = usize::try_from(at / PAGE as u64).expect("fits memory");
            if number >= self.pages.len() {
                break;
            }
            let start = (at % PAGE as u64) as usize;
            let n = (PAGE - start).min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let slot = &mut self.pages[number];
            if n == PAGE {
                *slot = None;
            } else if let Some(page) = slot {
                Arc::make_mut(page)[start..start + n].fill(0);
            }
            at += n as u64;
        }
        self.size = self.size.max(end);
    }

    /// Bytes of space that the content takes: pages that are no holes.
    pub fn space(&self) -> u64 {
        (self.pages.iter().flatten().count() * PAGE) as u64
    }

    /// How many bytes from `offset` on can be written with no more than `space` bytes of new space, up to `len`.
    pub fn fits(&self, offset: u64, len: u64, space: u64) -> u64 {
        let mut left = space / PAGE as u64;
        for (at, _, range) in pieces(offset, usize::try_from(len).expect("fits memory")) {
            if self.pages.get(at).is_none_or(Option::is_none) {
                if left == 0 {
                    return range.start as u64;
                }
                left -= 1;
            }
        }
        len
    }

    /// The same content with holes for all pages of zeroes, as a sparse copy has them.
    #[must_use]
    pub fn sparse(mut self) -> Image {
        for page in &mut self.pages {
            if page.as_ref().is_some_and(|p| p.iter().all(|b| *b == 0)) {
                *page = None;
            }
        }
        self
    }

    /// Whether the byte at `offset` lies in a hole, and for how many bytes up to `len`
    /// that holds.
    pub fn hole(&self, offset: u64, len: u64) -> (bool, u64) {
        let is_hole = |at: u64| {
            let number = usize::try_from(at / PAGE as u64).expect("fits memory");
            self.pages.get(number).is_none_or(Option::is_none)
        };
        let first = is_hole(offset);
        let mut end = offset;
        while end < offset + len && is_hole(end) == first {
            end = (end / PAGE as u64 + 1) * PAGE as u64;
        }
        (first, end.min(offset + len) - offset)
    }

    /// All bytes, for handing to a tool.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; usize::try_from(self.size).expect("fits memory")];
        self.read(0, &mut out);
        out
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({} bytes, {} pages)", self.size, self.pages.iter().flatten().count())
    }
}

/// Page number, range in the page, range in the caller's buffer.
fn pieces(
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (usize, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let start = (at % PAGE as u64) as usize;
        let n = (PAGE - start).min(len - done);
        let piece =
            (usize::try_from(at / PAGE as u64).expect("fits memory"), start..start + n, done..done + n);
        done += n;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    #[test]
    fn behaves_like_a_vector() {
        let mut random = Random::new(5);
        let mut image = Image::new(0);
        let mut model: Vec<u8> = Vec::new();
        for step in 0..2000u32 {
            let offset = random.below(20_000) as usize;
            let len = random.below(9000) as usize;
            match random.below(4) {
                0 | 1 => {
                    let byte = (step % 255) as u8 + 1;
                    image.write(offset as u64, &vec![byte; len]);
                    model.resize(model.len().max(offset + len), 0);
                    model[offset..offset + len].fill(byte);
                }
                2 => {
                    image.zero(offset as u64, len as u64);
                    model.resize(model.len().max(offset + len), 0);
                    model[offset..offset + len].fill(0);
                }
                _ => {
                    image.resize(offset as u64);
                    model.resize(offset, 0);
                }
            }
            assert_eq!(image.size(), model.len() as u64);
            let mut out = vec![1; len];
            image.read(offset as u64, &mut out);
            for (i, byte) in out.iter().enumerate() {
                assert_eq!(*byte, model.get(offset + i).copied().unwrap_or(0));
            }
            if !model.is_empty() {
                let (hole, n) = image.hole(0, model.len() as u64);
                assert!(n > 0 && (!hole || model[..n as usize].iter().all(|b| *b == 0)));
            }
        }
        assert_eq!(image.to_vec(), model);
    }

    #[test]
    fn clones_do_not_see_each_other() {
        let mut a = Image::from_bytes(&[7; 10_000]);
        let b = a.clone();
        a.write(4000, &[1; 300]);
        a.resize(5000);
        assert_eq!(b.to_vec(), vec![7; 10_000]);
    }
}
