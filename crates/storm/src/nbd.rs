//! An NBD client: one connection, several requests in flight, plain old replies or structured ones. What is tested
//! is the daemon, so the client must be too simple to be wrong.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const ACK: u32 = 1;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;

/// What a client may be answered at the latest, a stopped server behind the daemon included.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than a reply to our requests can have.
const MOST: u32 = 8 << 20;

/// A connection to an export.
pub(crate) struct Client {
    stream: UnixStream,
    cookie: u64,
    /// As the server said in the beginning.
    pub(crate) size: u64,
    flags: u16,
    /// The number of the context `base:allocation`.
    status: Option<u32>,
    waiting: BTreeMap<u64, Waiting>,
}

/// A request in flight, and what has come for it: chunks of several requests may come mixed.
struct Waiting {
    at: u64,
    data: Vec<u8>,
    covered: usize,
    error: u32,
    extents: Vec<(u32, u32)>,
}

/// What a reply says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    /// With this error number.
    Failed(u32),
}

/// A reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) answer: Answer,
    /// What was read.
    pub(crate) data: Vec<u8>,
    /// Lengths and flags of a block status.
    pub(crate) extents: Vec<(u32, u32)>,
}

/// Kinds and contents of the replies to an option.
type Replies = Vec<(u32, Vec<u8>)>;

fn wrong<T>(text: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidData, text))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Client {
    /// Connects; with structured replies and the status of blocks if the server has them.
    pub(crate) fn connect(socket: &Path, export: &str, structured: bool) -> Result<Client> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut c = Client { stream, cookie: 0, size: 0, flags: 0, status: None, waiting: BTreeMap::new() };
        c.take(18)?;
        c.stream.write_all(&3u32.to_be_bytes())?;
        let name = [&(export.len() as u32).to_be_bytes(), export.as_bytes()].concat();
        if structured && c.option(STRUCTURED_REPLY, &[])?.is_some() {
            let query = [&name[..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
            let contexts = c.option(SET_META_CONTEXT, &query)?.unwrap_or_default();
            c.status =
                contexts.iter().find(|(t, d)| *t == META_CONTEXT && d.len() >= 4).map(|c| u32_at(&c.1, 0));
            let infos = c.option(GO, &[&name[..], &[0, 0]].concat())?;
            let Some(infos) = infos else { return wrong("the server does not let us go") };
            let size = infos.iter().find(|(t, d)| *t == INFO && d.len() == 12 && d[..2] == [0, 0]);
            let Some((_, d)) = size else { return wrong("no size") };
            (c.size, c.flags) = (u64_at(d, 2), u16::from_be_bytes([d[10], d[11]]));
            return Ok(c);
        }
        c.send_option(EXPORT_NAME, export.as_bytes())?;
        let disk = c.take(10)?;
        (c.size, c.flags) = (u64_at(&disk, 0), u16::from_be_bytes([disk[8], disk[9]]));
        Ok(c)
    }

    fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; len];
        self.stream.read_exact(&mut out).map(|()| out)
    }

    fn send_option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let len = (data.len() as u32).to_be_bytes();
        self.stream.write_all(&[b"IHAVEOPT", &option.to_be_bytes()[..], &len, data].concat())
    }

    /// The replies to an option before its acknowledgement; `None` if it is refused.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<Option<Replies>> {
        self.send_option(option, data)?;
        let mut out = Vec::new();
        loop {
            let head = self.take(20)?;
            let (kind, len) = (u32_at(&head, 12), u32_at(&head, 16));
            if u64_at(&head, 0) != 0x0003_e889_0455_65a9 || u32_at(&head, 8) != option || len > MOST {
                return wrong("no reply to our option");
            }
            let data = self.take(len as usize)?;
            match kind {
                ACK => return Ok(Some(out)),
                k if k & 1 << 31 != 0 => return Ok(None),
                k => out.push((k, data)),
            }
        }
    }

    pub(crate) fn can_trim(&self) -> bool {
        self.flags & 1 << 5 != 0
    }

    pub(crate) fn can_zero(&self) -> bool {
        self.flags & 1 << 6 != 0
    }

    pub(crate) fn can_tell_status(&self) -> bool {
        self.status.is_some()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn request(&mut self, flags: u16, what: u16, at: u64, len: u32, data: &[u8]) -> Result<u64> {
        self.cookie += 1;
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(what.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(at.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(data);
        let room = if what == READ { len as usize } else { 0 };
        let waiting = Waiting { at, data: vec![0; room], covered: 0, error: 0, extents: Vec::new() };
        self.waiting.insert(self.cookie, waiting);
        self.stream.write_all(&out)?;
        Ok(self.cookie)
    }

    pub(crate) fn read(&mut self, at: u64, len: u32) -> Result<u64> {
        self.request(0, READ, at, len, &[])
    }

    pub(crate) fn write(&mut self, at: u64, data: &[u8], fua: bool) -> Result<u64> {
        self.request(if fua { FUA } else { 0 }, WRITE, at, data.len() as u32, data)
    }

    pub(crate) fn zero(&mut self, at: u64, len: u32, fua: bool, no_hole: bool) -> Result<u64> {
        let flags = if fua { FUA } else { 0 } | if no_hole { NO_HOLE } else { 0 };
        self.request(flags, WRITE_ZEROES, at, len, &[])
    }

    pub(crate) fn trim(&mut self, at: u64, len: u32) -> Result<u64> {
        self.request(0, TRIM, at, len, &[])
    }

    pub(crate) fn flush(&mut self) -> Result<u64> {
        self.request(0, FLUSH, 0, 0, &[])
    }

    pub(crate) fn block_status(&mut self, at: u64, len: u32) -> Result<u64> {
        self.request(0, BLOCK_STATUS, at, len, &[])
    }

    /// The next reply, whichever request it belongs to.
    pub(crate) fn receive(&mut self) -> Result<Reply> {
        loop {
            let magic = u32_at(&self.take(4)?, 0);
            let (cookie, mut w) = match magic {
                0x6744_6698 => {
                    let head = self.take(12)?;
                    let cookie = u64_at(&head, 4);
                    let Some(mut w) = self.waiting.remove(&cookie) else {
                        return wrong("a reply that nobody waits for");
                    };
                    w.error = u32_at(&head, 0);
                    if w.error == 0 {
                        self.stream.read_exact(&mut w.data)?;
                        w.covered = w.data.len();
                    }
                    (cookie, w)
                }
                0x668e_33ef => match self.chunk()? {
                    Some(cookie) => (cookie, self.waiting.remove(&cookie).expect("it was there")),
                    None => continue,
                },
                _ => return wrong("no reply"),
            };
            let answer = match w.error {
                0 if w.covered != w.data.len() => return wrong("a read of which a part is missing"),
                0 => Answer::Done,
                e => Answer::Failed(e),
            };
            if w.error != 0 {
                w.data.clear();
            }
            return Ok(Reply { cookie, answer, data: w.data, extents: w.extents });
        }
    }

    /// Takes a chunk; the cookie of its request if it was the last.
    fn chunk(&mut self) -> Result<Option<u64>> {
        let head = self.take(16)?;
        let (flags, kind) = (u16::from_be_bytes([head[0], head[1]]), u16::from_be_bytes([head[2], head[3]]));
        let (cookie, len) = (u64_at(&head, 4), u32_at(&head, 12));
        if len > MOST {
            return wrong("a chunk that is too long");
        }
        let chunk = self.take(len as usize)?;
        let Some(w) = self.waiting.get_mut(&cookie) else { return wrong("a chunk that nobody waits for") };
        // Where a chunk of data, or a hole, lies in what was asked for.
        let place = |len: usize, w: &Waiting| {
            let start = u64_at(&chunk, 0).checked_sub(w.at).map_or(usize::MAX, |s| s as usize);
            (start <= w.data.len() && len <= w.data.len() - start).then_some(start)
        };
        match kind {
            0 => {}
            1 if chunk.len() >= 8 => {
                let Some(start) = place(chunk.len() - 8, w) else { return wrong("data from elsewhere") };
                w.data[start..start + chunk.len() - 8].copy_from_slice(&chunk[8..]);
                w.covered += chunk.len() - 8;
            }
            2 if chunk.len() == 12 => {
                let len = u32_at(&chunk, 8) as usize;
                if place(len, w).is_none() {
                    return wrong("a hole elsewhere");
                }
                w.covered += len;
            }
            5 if chunk.len() >= 4 && Some(u32_at(&chunk, 0)) == self.status => {
                w.extents.extend(chunk[4..].chunks_exact(8).map(|e| (u32_at(e, 0), u32_at(e, 4))));
            }
            k if k & 1 << 15 != 0 && chunk.len() >= 4 => w.error = u32_at(&chunk, 0).max(1),
            _ => return wrong("a chunk of an unknown kind"),
        }
        Ok((flags & 1 != 0).then_some(cookie))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut bye = 0x2560_9513u32.to_be_bytes().to_vec();
        bye.extend([0, 0]);
        bye.extend(DISCONNECT.to_be_bytes());
        bye.extend([0; 20]);
        let _ = self.stream.write_all(&bye);
    }
}
