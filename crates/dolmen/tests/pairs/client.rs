//! An NBD client for tests: one connection, one request at a time, blocking.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use dolmen::nbd::client::{ClientHandshake, ClientStep, Goal};
use dolmen::nbd::consts::{CommandFlags, cmd};
use dolmen::nbd::reply::{Chunk, ReplyHead, SIMPLE_SIZE};
use dolmen::nbd::request::Request;

/// A request that takes longer has been forgotten.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type Outcome<T> = Result<T, String>;

/// A connection to an export.
pub(crate) struct Client {
    stream: UnixStream,
    /// Received and not used yet: `input[at..]`.
    input: Vec<u8>,
    at: usize,
    /// Size of the export in bytes, as it was when the connection was made.
    pub(crate) size: u64,
}

/// A piece of a reply: what follows its head.
enum Piece {
    Nothing,
    /// All that was asked for.
    Rest,
    /// So many bytes for this offset.
    Data(u64, usize),
    Zeroes(u64, usize),
    Failed(String),
}

impl Client {
    pub(crate) fn connect(socket: &Path, export: &str) -> Outcome<Client> {
        let stream = UnixStream::connect(socket).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        let mut c = Client { stream, input: Vec::new(), at: 0, size: 0 };
        let goal = Goal::Use { export: export.to_owned(), structured: true, status: false };
        let mut handshake = ClientHandshake::new(goal);
        let mut out = Vec::new();
        loop {
            let step = handshake.step(&c.input[c.at..], &mut out);
            c.send(&out)?;
            out.clear();
            match step {
                ClientStep::Need(n) => c.receive(n)?,
                ClientStep::Taken(n) => c.at += n,
                ClientStep::Ready { taken, session } => {
                    c.at += taken;
                    c.size = session.export.size;
                    return Ok(c);
                }
                ClientStep::Listed(_) => return Err("the handshake went astray".into()),
                ClientStep::Failed(e) => return Err(e.to_string()),
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Outcome<()> {
        self.stream.write_all(bytes).map_err(|e| format!("sending: {e}"))
    }

    /// Reads until at least `n` bytes wait.
    fn receive(&mut self, n: usize) -> Outcome<()> {
        self.input.drain(..self.at);
        self.at = 0;
        while self.input.len() < n {
            let mut some = [0; 4096];
            let got = self.stream.read(&mut some).map_err(|e| format!("receiving: {e}"))?;
            self.input.extend_from_slice(&some[..got]);
            if got == 0 {
                return Err("the server closed the connection".into());
            }
        }
        Ok(())
    }

    fn request(&mut self, cmd: u16, offset: u64, len: u32, payload: &[u8]) -> Outcome<()> {
        let head = Request { flags: CommandFlags(0), cmd, cookie: 1, offset, len };
        self.send(&head.encode())?;
        self.send(payload)
    }

    /// Takes the reply; data go to `into`, whose first byte is at `offset`.
    fn reply(&mut self, offset: u64, into: &mut [u8]) -> Outcome<()> {
        loop {
            let (piece, done) = match self.piece()? {
                Ok((piece, taken, done)) => {
                    self.at += taken;
                    (piece, done)
                }
                Err(need) => {
                    self.receive(need)?;
                    continue;
                }
            };
            match piece {
                Piece::Nothing => {}
                Piece::Rest => return self.take(into),
                Piece::Data(at, len) => {
                    let from = (at - offset) as usize;
                    self.take(&mut into[from..from + len])?;
                }
                Piece::Zeroes(at, len) => {
                    let from = (at - offset) as usize;
                    into[from..from + len].fill(0);
                }
                Piece::Failed(text) => return Err(text),
            }
            if done {
                return Ok(());
            }
        }
    }

    /// The next piece of a reply, its bytes, and whether it is the last; or how many bytes
    /// have to be there.
    fn piece(&self) -> Outcome<Result<(Piece, usize, bool), usize>> {
        let head = ReplyHead::decode(&self.input[self.at..]).map_err(|e| e.to_string())?;
        Ok(match head {
            ReplyHead::Need(n) => Err(n),
            ReplyHead::Simple { errno: Some(e), .. } => {
                Ok((Piece::Failed(format!("{e:?}")), SIMPLE_SIZE, true))
            }
            ReplyHead::Simple { errno: None, .. } => Ok((Piece::Rest, SIMPLE_SIZE, true)),
            ReplyHead::Chunk { chunk, done, taken, .. } => {
                let piece = match chunk {
                    Chunk::Data { offset, len } => Piece::Data(offset, len as usize),
                    Chunk::Hole { offset, len } => Piece::Zeroes(offset, len as usize),
                    Chunk::Error { errno, message, .. } => Piece::Failed(format!("{errno:?} {message}")),
                    Chunk::None | Chunk::Status { .. } => Piece::Nothing,
                };
                Ok((piece, taken, done))
            }
        })
    }

    /// Payload goes where it belongs at once: these tests are not optimised.
    fn take(&mut self, into: &mut [u8]) -> Outcome<()> {
        let have = (self.input.len() - self.at).min(into.len());
        let (here, rest) = into.split_at_mut(have);
        here.copy_from_slice(&self.input[self.at..self.at + have]);
        self.at += have;
        self.stream.read_exact(rest).map_err(|e| format!("receiving data: {e}"))
    }

    pub(crate) fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome<()> {
        self.request(cmd::READ, offset, into.len() as u32, &[])?;
        self.reply(offset, into).map_err(|e| format!("read of {} bytes at {offset}: {e}", into.len()))
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Outcome<()> {
        self.request(cmd::WRITE, offset, data.len() as u32, data)?;
        self.reply(offset, &mut []).map_err(|e| format!("write of {} bytes at {offset}: {e}", data.len()))
    }

    pub(crate) fn flush(&mut self) -> Outcome<()> {
        self.request(cmd::FLUSH, 0, 0, &[])?;
        self.reply(0, &mut []).map_err(|e| format!("flush: {e}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A polite goodbye; the server may be gone.
        let _ = self.request(cmd::DISC, 0, 0, &[]);
    }
}
