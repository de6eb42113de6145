//! The NBD load generator: one client, one thread, so many reads in flight.
//!
//! It knows neither side's runtime: a blocking Unix socket, one `write` for all new
//! requests and one `read` for whatever replies have come. Offsets are pseudo-random
//! and the same in each run. Data are received and thrown away.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use dolmen_nbd::client::{ClientHandshake, ClientStep, Goal};
use dolmen_nbd::consts::{CommandFlags, cmd};
use dolmen_nbd::reply::{Chunk, ReplyHead, SIMPLE_SIZE};
use dolmen_nbd::request::Request;

use super::Result;
use super::process::Line;

/// The hidden task under which the generator runs as a process of its own.
pub(super) const VERB: &str = "nbd-load";
const BLOCK: u64 = 4096;

/// What to send.
#[derive(Clone, Debug)]
pub(super) struct Load {
    pub(super) socket: String,
    pub(super) export: String,
    pub(super) requests: u64,
    pub(super) depth: u64,
}

impl Load {
    /// The command line that does the same in a process of its own.
    pub(super) fn line(&self) -> Result<Line> {
        let me = std::env::current_exe()?;
        let (requests, depth) = (self.requests.to_string(), self.depth.to_string());
        Ok(Line::new(me, ["bench", VERB, &self.socket, &self.export, &requests, &depth]))
    }

    /// Runs it and gives the time from the first request to the last reply. `around` is
    /// called when the connection stands and again when all replies are there.
    pub(super) fn run(&self, mut around: impl FnMut() -> Result<()>) -> Result<Duration> {
        let mut connection = Connection::open(Path::new(&self.socket), &self.export)?;
        around()?;
        let started = Instant::now();
        connection.reads(self.requests, self.depth)?;
        let took = started.elapsed();
        around()?;
        connection.close()?;
        Ok(took)
    }
}

/// The task itself: socket, export, requests, depth.
pub(super) fn main(args: &[String]) -> Result<bool> {
    let [socket, export, requests, depth] = args else {
        return Err(format!("{VERB} SOCKET EXPORT REQUESTS DEPTH").into());
    };
    let load = Load {
        socket: socket.clone(),
        export: export.clone(),
        requests: requests.parse()?,
        depth: depth.parse()?,
    };
    load.run(|| Ok(()))?;
    Ok(true)
}

struct Connection {
    stream: UnixStream,
    /// Received and not used yet: `input[at..]`.
    input: Vec<u8>,
    at: usize,
    blocks: u64,
    seed: u64,
}

impl Connection {
    fn open(socket: &Path, export: &str) -> Result<Connection> {
        let stream = UnixStream::connect(socket)?;
        let mut c = Connection { stream, input: Vec::new(), at: 0, blocks: 0, seed: 0x9e37_79b9_7f4a_7c15 };
        let goal = Goal::Use { export: export.to_owned(), structured: true, status: false };
        let mut handshake = ClientHandshake::new(goal);
        let mut out = Vec::new();
        loop {
            let step = handshake.step(&c.input[c.at..], &mut out);
            c.stream.write_all(&out)?;
            out.clear();
            match step {
                ClientStep::Need(n) => c.receive(n)?,
                ClientStep::Taken(n) => c.at += n,
                ClientStep::Ready { taken, session } => {
                    c.at += taken;
                    c.blocks = session.export.size / BLOCK;
                    if c.blocks == 0 {
                        return Err("the export is smaller than one block".into());
                    }
                    return Ok(c);
                }
                ClientStep::Listed(_) => return Err("the handshake went astray".into()),
                ClientStep::Failed(e) => return Err(e.into()),
            }
        }
    }

    /// Reads until at least `n` bytes wait.
    fn receive(&mut self, n: usize) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        self.input.drain(..self.at);
        self.at = 0;
        while self.input.len() < n {
            let have = self.input.len();
            self.input.resize(have + CHUNK, 0);
            let got = self.stream.read(&mut self.input[have..])?;
            self.input.truncate(have + got);
            if got == 0 {
                return Err("the server closed the connection".into());
            }
        }
        Ok(())
    }

    fn request(&mut self, cookie: u64, out: &mut Vec<u8>) {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let offset = self.seed % self.blocks * BLOCK;
        let request = Request { flags: CommandFlags(0), cmd: cmd::READ, cookie, offset, len: BLOCK as u32 };
        out.extend_from_slice(&request.encode());
    }

    fn reads(&mut self, requests: u64, depth: u64) -> Result<()> {
        let mut out = Vec::new();
        let mut sent = depth.min(requests);
        (0..sent).for_each(|i| self.request(i, &mut out));
        self.stream.write_all(&out)?;
        out.clear();
        let mut finished = 0;
        while finished < requests {
            let need = match ReplyHead::decode(&self.input[self.at..])? {
                ReplyHead::Need(n) => Err(n),
                ReplyHead::Simple { errno: None, .. } => Ok((SIMPLE_SIZE + BLOCK as usize, true)),
                ReplyHead::Simple { errno: Some(e), .. } => {
                    return Err(format!("a read failed: {e:?}").into());
                }
                ReplyHead::Chunk { chunk, done, taken, .. } => match chunk {
                    Chunk::Data { len, .. } => Ok((taken + len as usize, done)),
                    Chunk::Error { errno, .. } => return Err(format!("a read failed: {errno:?}").into()),
                    Chunk::None | Chunk::Hole { .. } | Chunk::Status { .. } => Ok((taken, done)),
                },
            };
            match need {
                Ok((whole, done)) if self.input.len() - self.at >= whole => {
                    self.at += whole;
                    if done {
                        finished += 1;
                        if sent < requests {
                            self.request(sent, &mut out);
                            sent += 1;
                        }
                    }
                }
                Ok((need, _)) | Err(need) => {
                    // Everything that has come is used: answer it in one go.
                    self.stream.write_all(&out)?;
                    out.clear();
                    self.receive(need)?;
                }
            }
        }
        Ok(())
    }

    fn close(mut self) -> Result<()> {
        let bye = Request { flags: CommandFlags(0), cmd: cmd::DISC, cookie: 0, offset: 0, len: 0 };
        self.stream.write_all(&bye.encode())?;
        Ok(())
    }
}
