//! A client that sends exactly what a test wants, over a blocking socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use dolmen_nbd::reply::{self, Chunk};
use dolmen_nbd::{ClientHandshake, ClientStep, CommandFlags, Errno, Extent, Goal, ReplyHead, Request};

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    input: Vec<u8>,
}

/// A reply put together.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: Option<(Errno, String)>,
    /// Data by offset; holes are zeroes.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    pub(crate) holes: usize,
    pub(crate) extents: Vec<Extent>,
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let s = UnixStream::connect(socket).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    s
}

impl Client {
    pub(crate) fn negotiate(socket: &Path, export: &str, structured: bool) -> Client {
        let mut stream = connect(socket);
        let goal = Goal::Use { export: export.into(), structured, status: structured };
        let mut machine = ClientHandshake::new(goal);
        let (mut input, mut out) = (Vec::new(), Vec::new());
        loop {
            match machine.step(&input, &mut out) {
                ClientStep::Need(_) => {
                    let mut b = [0; 4096];
                    let n = stream.read(&mut b).unwrap();
                    assert!(n > 0, "the server hung up");
                    input.extend_from_slice(&b[..n]);
                }
                ClientStep::Taken(n) => {
                    input.drain(..n);
                    stream.write_all(&out).unwrap();
                    out.clear();
                }
                ClientStep::Ready { taken, .. } => {
                    input.drain(..taken);
                    return Client { stream, input };
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn send(&mut self, cmd: u16, flags: CommandFlags, cookie: u64, offset: u64, len: u32) {
        let r = Request { flags, cmd, cookie, offset, len };
        self.stream.write_all(&r.encode()).unwrap();
    }

    fn more(&mut self) {
        let mut b = vec![0; 1 << 16];
        let n = self.stream.read(&mut b).unwrap();
        assert!(n > 0, "the server hung up");
        self.input.extend_from_slice(&b[..n]);
    }

    fn payload(&mut self, len: u32) -> Vec<u8> {
        while self.input.len() < len as usize {
            self.more();
        }
        self.input.drain(..len as usize).collect()
    }

    /// The next reply. `read_len` is what a simple reply to a read carries.
    pub(crate) fn answer(&mut self, read_len: u32) -> Answer {
        let mut a = Answer::default();
        loop {
            let input = self.input.clone();
            match ReplyHead::decode(&input).unwrap() {
                ReplyHead::Need(_) => self.more(),
                ReplyHead::Simple { cookie, errno } => {
                    a.cookie = cookie;
                    self.input.drain(..reply::SIMPLE_SIZE);
                    match errno {
                        Some(e) => a.error = Some((e, String::new())),
                        None if read_len > 0 => {
                            let data = self.payload(read_len);
                            a.data.push((0, data));
                        }
                        None => {}
                    }
                    return a;
                }
                ReplyHead::Chunk { cookie, chunk, done, taken } => {
                    assert!(a.cookie == 0 || a.cookie == cookie, "chunks of replies are not mixed here");
                    a.cookie = cookie;
                    self.input.drain(..taken);
                    match chunk {
                        Chunk::None => {}
                        Chunk::Data { offset, len } => {
                            let data = self.payload(len);
                            a.data.push((offset, data));
                        }
                        Chunk::Hole { offset, len } => {
                            a.holes += 1;
                            a.data.push((offset, vec![0; len as usize]));
                        }
                        Chunk::Status { extents, .. } => a.extents = reply::extents(extents).collect(),
                        Chunk::Error { errno, message, .. } => a.error = Some((errno, message.into())),
                    }
                    if done {
                        return a;
                    }
                }
            }
        }
    }

    /// Whether the server has hung up; what it sent before is dropped.
    pub(crate) fn hung_up(&mut self) -> bool {
        let mut b = [0; 4096];
        loop {
            match self.stream.read(&mut b) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}
