//! An NBD client: one connection, one request at a time, plain old replies. What is tested is the daemon, so
//! the client must be too simple to be wrong.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

/// What a client may be answered at the latest, a stopped server behind the daemon included.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to an export.
pub(crate) struct Client {
    stream: UnixStream,
    cookie: u64,
    /// As the server said in the beginning.
    pub(crate) size: u64,
    flags: u16,
}

/// What a reply says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    /// With this error number.
    Failed(u32),
}

impl Client {
    pub(crate) fn connect(socket: &Path, export: &str) -> Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let mut disk = [0; 10];
        stream.read_exact(&mut disk)?;
        let size = u64::from_be_bytes(disk[..8].try_into().expect("eight bytes"));
        let flags = u16::from_be_bytes(disk[8..].try_into().expect("two bytes"));
        Ok(Client { stream, cookie: 0, size, flags })
    }

    pub(crate) fn can_trim(&self) -> bool {
        self.flags & 1 << 5 != 0
    }

    pub(crate) fn can_zero(&self) -> bool {
        self.flags & 1 << 6 != 0
    }

    fn request(
        &mut self,
        flags: u16,
        what: u16,
        at: u64,
        len: u32,
        data: &[u8],
        into: &mut [u8],
    ) -> Result<Answer> {
        self.cookie += 1;
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(what.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(at.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != 0x6744_6698u32.to_be_bytes() || reply[8..] != self.cookie.to_be_bytes() {
            return Err(Error::new(ErrorKind::InvalidData, "a reply to another request"));
        }
        match u32::from_be_bytes(reply[4..8].try_into().expect("four bytes")) {
            0 => self.stream.read_exact(into).map(|()| Answer::Done),
            e => Ok(Answer::Failed(e)),
        }
    }

    pub(crate) fn read(&mut self, at: u64, into: &mut [u8]) -> Result<Answer> {
        self.request(0, 0, at, into.len() as u32, &[], into)
    }

    pub(crate) fn write(&mut self, at: u64, data: &[u8], fua: bool) -> Result<Answer> {
        self.request(if fua { FUA } else { 0 }, WRITE, at, data.len() as u32, data, &mut [])
    }

    pub(crate) fn zero(&mut self, at: u64, len: u32, fua: bool, no_hole: bool) -> Result<Answer> {
        let flags = if fua { FUA } else { 0 } | if no_hole { NO_HOLE } else { 0 };
        self.request(flags, WRITE_ZEROES, at, len, &[], &mut [])
    }

    pub(crate) fn trim(&mut self, at: u64, len: u32) -> Result<Answer> {
        self.request(0, TRIM, at, len, &[], &mut [])
    }

    pub(crate) fn flush(&mut self) -> Result<Answer> {
        self.request(0, FLUSH, 0, 0, &[], &mut [])
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
