//! A client that keeps a disk busy over NBD and knows what has to be on it.
//!
//! Plain old-style negotiation and one request at a time on each connection: what is tested
//! is the daemon, so the client must be too simple to be wrong.

use std::collections::HashMap;
use std::io::{Error, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::daemon::PATIENCE;

/// What is read and written at a time, in bytes.
pub(crate) const BLOCK: u64 = 4096;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// One connection.
pub(crate) struct Client {
    stream: UnixStream,
    cookie: u64,
    /// Of the disk, as the server said.
    pub(crate) size: u64,
}

impl Client {
    pub(crate) fn connect(socket: &Path, export: &str) -> Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = 1u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let mut disk = [0; 8 + 2 + 124];
        stream.read_exact(&mut disk)?;
        let size = u64::from_be_bytes(disk[..8].try_into().expect("eight bytes"));
        Ok(Client { stream, cookie: 0, size })
    }

    fn request(&mut self, what: u16, at: u64, len: u32, data: &[u8], into: &mut [u8]) -> Result<()> {
        self.cookie += 1;
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend(0u16.to_be_bytes());
        out.extend(what.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(at.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[8..], self.cookie.to_be_bytes(), "a reply to another request");
        match u32::from_be_bytes(reply[4..8].try_into().expect("four bytes")) {
            0 => self.stream.read_exact(into),
            errno => Err(Error::from_raw_os_error(errno as i32)),
        }
    }

    pub(crate) fn read(&mut self, block: u64) -> Result<Vec<u8>> {
        let mut data = vec![0; BLOCK as usize];
        self.request(READ, block * BLOCK, BLOCK as u32, &[], &mut data)?;
        Ok(data)
    }

    pub(crate) fn write(&mut self, block: u64, value: u8) -> Result<()> {
        self.request(WRITE, block * BLOCK, BLOCK as u32, &[value; BLOCK as usize], &mut [])
    }

    pub(crate) fn zero(&mut self, block: u64) -> Result<()> {
        self.request(WRITE_ZEROES, block * BLOCK, BLOCK as u32, &[], &mut [])
    }

    pub(crate) fn discard(&mut self, first: u64, blocks: u64) -> Result<()> {
        self.request(TRIM, first * BLOCK, (blocks * BLOCK) as u32, &[], &mut [])
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        self.request(FLUSH, 0, 0, &[], &mut [])
    }
}

/// What each block that was written holds.
pub(crate) type Model = HashMap<u64, u8>;

/// A thread that reads and writes blocks of a range at random until it is told to stop, and
/// compares everything that it reads.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<(Model, Result<()>)>,
}

impl Load {
    /// Works on `blocks` of which it knows `model`; only reads if it is not to write.
    pub(crate) fn start(
        mut client: Client,
        blocks: std::ops::Range<u64>,
        seed: u64,
        mut model: Model,
        writes: bool,
    ) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (halt, count) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            let mut random = seed | 1;
            let mut next = move |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            while !halt.load(Ordering::Relaxed) {
                let block = blocks.start + next(blocks.end - blocks.start);
                let value = 1 + next(250) as u8;
                let result = match next(if writes { 12 } else { 5 }) {
                    0..5 => client.read(block).map(|data| {
                        if let Some(v) = model.get(&block) {
                            assert!(data.iter().all(|b| b == v), "block {block} is not {v}: {}", data[0]);
                        }
                    }),
                    5 => client.flush(),
                    6 => client.zero(block).map(|()| {
                        model.insert(block, 0);
                    }),
                    _ => client.write(block, value).map(|()| {
                        model.insert(block, value);
                    }),
                };
                if let Err(e) = result {
                    return (model, Err(e));
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            (model, Ok(()))
        });
        Load { stop, done, thread }
    }

    /// Requests that have succeeded.
    pub(crate) fn requests(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether it has met an error and ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Stops it; what it knows, and the error that it met.
    pub(crate) fn end(self) -> (Model, Result<()>) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the disk holds what was written")
    }
}

/// Compares an image's content, as `img convert` or a read of the whole shows it, with what was written; blocks
/// that were not hold `rest`.
pub(crate) fn assert_holds(content: &[u8], model: &Model, rest: u8) {
    for (block, data) in content.chunks(BLOCK as usize).enumerate() {
        let want = *model.get(&(block as u64)).unwrap_or(&rest);
        assert!(data.iter().all(|b| *b == want), "block {block} is not {want}: {}", data[0]);
    }
}

/// The same, of the blocks that were written only.
pub(crate) fn assert_part(content: &[u8], model: &Model) {
    for (block, want) in model {
        let data = &content[(block * BLOCK) as usize..((block + 1) * BLOCK) as usize];
        assert!(data.iter().all(|b| b == want), "block {block} is not {want}: {}", data[0]);
    }
}
