//! The tour's disk: content that can be made and checked anywhere without keeping it.

use dolmen::rt::Memory;
use dolmen::session::{self, Image, Session};
use dolmen::types::{Claim, Error, ErrorKind, Options, ReadFlags, Result, WriteFlags};

/// Blocks of this size are either all zero or all data.
const BLOCK: u64 = 64 << 10;
/// How much is read or written at once.
const CHUNK: u64 = 1 << 20;

/// What the disk has to hold: a base, and what was written over it, later last.
#[derive(Clone, Debug)]
pub(super) struct Content {
    size: u64,
    written: Vec<(u64, u64, u64)>,
}

/// Something to do with an image.
#[derive(Debug)]
pub(super) enum Job {
    /// Write the content.
    Fill(Content),
    /// Read ranges (offset, length) and compare.
    Verify(Content, Vec<(u64, u64)>),
    /// Write new data to ranges, number by number, then flush.
    Overwrite(Vec<(u64, u64)>),
}

impl Content {
    /// A disk of `size` bytes.
    pub(super) fn base(size: u64) -> Content {
        Content { size, written: Vec::new() }
    }

    /// How many of its bytes are in blocks with data.
    pub(super) fn data_bytes(&self) -> u64 {
        (0..self.size / BLOCK).filter(|b| is_data(*b)).count() as u64 * BLOCK
    }

    /// Counts on what [`Job::Overwrite`] writes as range number `version`.
    pub(super) fn overwrite(&mut self, offset: u64, len: u64, version: u64) {
        self.written.push((offset, len, version));
    }

    /// The bytes from `offset` on.
    fn bytes(&self, offset: u64, out: &mut [u8]) {
        let end = offset + out.len() as u64;
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let (from, to) = ((block * BLOCK).max(offset), ((block + 1) * BLOCK).min(end));
            let part = &mut out[(from - offset) as usize..(to - offset) as usize];
            if is_data(block) { mixed(from, 0, part) } else { part.fill(0) }
        }
        for (at, len, version) in &self.written {
            let (from, to) = ((*at).max(offset), (at + len).min(end));
            if from < to {
                mixed(from, version + 1, &mut out[(from - offset) as usize..(to - offset) as usize]);
            }
        }
    }
}

/// Two of three blocks hold data.
fn is_data(block: u64) -> bool {
    block % 3 != 1
}

/// Bytes that differ from their neighbours, from other places and from other versions.
fn mixed(from: u64, version: u64, out: &mut [u8]) {
    let word = |at: u64| (at / 8 + version * 0x9e37_79b9).wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    let mut bytes = word(from);
    for (at, byte) in (from..).zip(out) {
        if at % 8 == 0 {
            bytes = word(at);
        }
        *byte = bytes[(at % 8) as usize];
    }
}

/// Opens an image (or connects to an export), does the job and closes it again.
pub(super) fn run(options: Options, claim: Claim, job: Job) -> Result<()> {
    session::run(move |rt| async move {
        let mut session = Session::new(&rt, dolmen::registry(), session::beneath());
        let image = session.open(options, claim).await?;
        let done = match job {
            Job::Fill(content) => fill(&image, &content).await,
            Job::Verify(content, ranges) => verify(&image, &content, &ranges).await,
            Job::Overwrite(ranges) => overwrite(&image, &ranges).await,
        };
        drop(image);
        // The first failure is the one that explains the other.
        done.and(session.close().await)
    })
}

fn chunks(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(CHUNK)).map(move |i| (offset + i * CHUNK, CHUNK.min(len - i * CHUNK)))
}

async fn fill(image: &Image, content: &Content) -> Result<()> {
    for block in (0..content.size / BLOCK).filter(|b| is_data(*b)) {
        let mut memory = Memory::zeroed(BLOCK as usize);
        content.bytes(block * BLOCK, memory.bytes_mut().expect("not shared yet"));
        image.write(block * BLOCK, &memory.iovec(), WriteFlags::NONE).await?;
    }
    image.flush().await
}

async fn verify(image: &Image, content: &Content, ranges: &[(u64, u64)]) -> Result<()> {
    for (offset, len) in ranges.iter().flat_map(|(offset, len)| chunks(*offset, *len)) {
        let memory = Memory::zeroed(len as usize);
        image.read(offset, &memory.iovec(), ReadFlags::NONE).await?;
        let got = memory.to_vec();
        let mut want = vec![0; got.len()];
        content.bytes(offset, &mut want);
        if let Some(i) = got.iter().zip(&want).position(|(a, b)| a != b) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("byte {} is {:#04x} and has to be {:#04x}", offset + i as u64, got[i], want[i]),
            ));
        }
    }
    Ok(())
}

async fn overwrite(image: &Image, ranges: &[(u64, u64)]) -> Result<()> {
    for (version, (offset, len)) in ranges.iter().enumerate() {
        let mut content = Content::base(0);
        content.overwrite(*offset, *len, version as u64);
        for (offset, len) in chunks(*offset, *len) {
            let mut memory = Memory::zeroed(len as usize);
            content.bytes(offset, memory.bytes_mut().expect("not shared yet"));
            image.write(offset, &memory.iovec(), WriteFlags::NONE).await?;
        }
    }
    image.flush().await
}
