//! The NBD client against servers that do what no server should.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use dolmen_nbd::consts::TransmissionFlags;
use dolmen_nbd::{
    Catalog, Errno, ExportInfo, Request, RequestStep, ServerHandshake, ServerStep, Session, reply,
};
use dolmen_types::{ErrorKind, WriteFlags};

use crate::nbd_rig::{Rig, join, run};

struct One;
impl Catalog for One {
    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}
    fn find(&self, _: &str) -> Option<ExportInfo> {
        Some(ExportInfo {
            name: String::new(),
            description: String::new(),
            size: 1 << 30,
            flags: TransmissionFlags(0xf7d).without(TransmissionFlags::READ_ONLY),
            min_block: 1,
            preferred_block: 4096,
            max_block: 1 << 25,
        })
    }
    fn shutting_down(&self) -> bool {
        false
    }
}

struct Peer {
    stream: UnixStream,
    input: Vec<u8>,
    session: Session,
}

impl Peer {
    fn accept(listener: &UnixListener) -> Peer {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&ServerHandshake::greeting()).unwrap();
        let mut machine = ServerHandshake::new();
        let (mut input, mut out) = (Vec::new(), Vec::new());
        loop {
            let step = machine.step(&input, &One, &mut out);
            stream.write_all(&out).unwrap();
            out.clear();
            match step {
                ServerStep::Need(_) => {
                    let mut b = [0; 4096];
                    let n = stream.read(&mut b).unwrap();
                    assert!(n > 0, "the client hung up");
                    input.extend_from_slice(&b[..n]);
                }
                ServerStep::Taken(n) => drop(input.drain(..n)),
                ServerStep::Ready { taken, session } => {
                    input.drain(..taken);
                    return Peer { stream, input, session: *session };
                }
                ServerStep::Close(why) => panic!("{why}"),
            }
        }
    }

    /// The next request; `None` when the client is gone.
    fn request(&mut self) -> Option<Request> {
        loop {
            match Request::decode(&self.input) {
                RequestStep::Got(r, payload) if self.input.len() >= Request::SIZE + payload as usize => {
                    self.input.drain(..Request::SIZE + payload as usize);
                    return Some(r);
                }
                RequestStep::Close(why) => panic!("{why}"),
                RequestStep::Got(..) | RequestStep::Need(_) => {
                    let mut b = [0; 4096];
                    match self.stream.read(&mut b) {
                        Ok(n) if n > 0 => self.input.extend_from_slice(&b[..n]),
                        _ => return None,
                    }
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        // The client may have hung up for a good reason.
        let _ = self.stream.write_all(bytes);
    }
}

fn serve(rig: &Rig, script: impl FnOnce(UnixListener) + Send + 'static) -> JoinHandle<()> {
    let listener = UnixListener::bind(rig.path("s")).unwrap();
    std::thread::spawn(move || script(listener))
}

/// Waits for the server beside the runtime, which has to tell it goodbye.
async fn ended(rig: &Rig, server: JoinHandle<()>) {
    rig.rt.io().unwrap().blocking(move || server.join().unwrap()).await;
}

#[test]
fn wrong_replies_cost_the_connection_and_say_why() {
    type Lie = fn(&Request, &mut Vec<u8>);
    let lies: [(&str, Lie); 8] = [
        ("wrong reply magic", |_, out| out.extend([0xab; 32])),
        ("a request that nobody made", |r, out| reply::put_none(out, r.cookie + 1)),
        ("without sending all of it", |r, out| reply::put_none(out, r.cookie)),
        ("without structured reply", |r, out| reply::put_simple(out, r.cookie, None)),
        ("outside of the requested range", |r, out| {
            reply::put_hole(out, r.cookie, true, r.offset + 1, r.len);
        }),
        ("the same data twice", |r, out| {
            reply::put_hole(out, r.cookie, false, r.offset, 512);
            reply::put_hole(out, r.cookie, true, r.offset, 512);
        }),
        ("that nobody asked for", |r, out| {
            let e = [dolmen_nbd::Extent { len: 512, flags: 0 }];
            reply::put_status(out, r.cookie, 1, &e);
        }),
        ("the server closed it", |r, out| {
            reply::put_data_head(out, r.cookie, true, r.offset, r.len);
            out.extend([1; 100]);
        }),
    ];
    run(async move |rig| {
        for (words, lie) in lies {
            let _ = std::fs::remove_file(rig.path("s"));
            let server = serve(&rig, move |listener| {
                let mut peer = Peer::accept(&listener);
                assert!(peer.session.structured);
                let r = peer.request().unwrap();
                let mut out = Vec::new();
                lie(&r, &mut out);
                peer.send(&out);
                let _ = peer.stream.shutdown(std::net::Shutdown::Write);
                while peer.request().is_some() {}
            });
            let disk = rig.rw(rig.options("s", "")).await.unwrap();
            let e = disk.read(4096, 4096).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Disconnected);
            assert!(e.to_string().contains(words), "{e}");
            drop(disk);
            ended(&rig, server).await;
        }
    });
}

/// Errors with the server's words; the connection goes on.
#[test]
fn errors_are_the_requests_own() {
    run(async |rig| {
        let server = serve(&rig, |listener| {
            let mut peer = Peer::accept(&listener);
            for (errno, text) in [(Errno::NoSpc, "the pool is full"), (Errno::Io, ""), (Errno::Perm, "no")] {
                let r = peer.request().unwrap();
                let mut out = Vec::new();
                reply::put_error(&mut out, r.cookie, errno, text);
                peer.send(&out);
            }
            let r = peer.request().unwrap();
            let mut out = Vec::new();
            reply::put_simple(&mut out, r.cookie, None);
            peer.send(&out);
            while peer.request().is_some() {}
        });
        let disk = rig.rw(rig.options("s", "")).await.unwrap();
        let e = disk.write(0, &[1; 512], WriteFlags::NONE).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace);
        assert!(e.to_string().contains("the pool is full"), "{e}");
        assert_eq!(disk.read(0, 512).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::PermissionDenied);
        disk.flush().await.unwrap();
        drop(disk);
        ended(&rig, server).await;
    });
}

/// Replies in reverse order, pieces of a reply in reverse order, and a request that was
/// cancelled meanwhile: each gets its own.
#[test]
fn any_order_and_cancelled_requests() {
    run(async |rig| {
        let server = serve(&rig, |listener| {
            let mut peer = Peer::accept(&listener);
            let mut asked: Vec<Request> = (0..9).map(|_| peer.request().unwrap()).collect();
            // The client has cancelled the first by now; its answer comes all the same.
            for r in asked.drain(..).rev() {
                let mut out = Vec::new();
                let half = r.len / 2;
                reply::put_data_head(&mut out, r.cookie, false, r.offset + u64::from(half), half);
                out.extend(std::iter::repeat_n((r.offset >> 12) as u8 + 100, half as usize));
                reply::put_data_head(&mut out, r.cookie, true, r.offset, half);
                out.extend(std::iter::repeat_n((r.offset >> 12) as u8, half as usize));
                for piece in out.chunks(1000) {
                    peer.send(piece);
                }
            }
            while peer.request().is_some() {}
        });
        let disk = rig.rw(rig.options("s", "")).await.unwrap();
        {
            let cancelled = disk.read(100 << 12, 4096);
            assert!(rig.rt.timeout(std::time::Duration::from_millis(20), cancelled).await.is_none());
        }
        let reads: Vec<_> = (1..9u64).map(|i| disk.read(i << 12, 4096)).collect();
        for (i, got) in join(reads).await.into_iter().enumerate() {
            let (i, got) = (i as u8 + 1, got.unwrap());
            assert_eq!((got[0], got[2047], got[2048], got[4095]), (i, i, i + 100, i + 100));
        }
        drop(disk);
        ended(&rig, server).await;
    });
}
