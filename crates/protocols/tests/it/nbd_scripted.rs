//! The NBD client against servers that do what no server should.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use dolmen_nbd::consts::{TransmissionFlags, cmd};
use dolmen_nbd::{
    Catalog, Errno, ExportInfo, Request, RequestStep, ServerHandshake, ServerStep, Session, reply,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{ErrorKind, WriteFlags};

use crate::nbd_rig::{Disk, Rig, join, run};

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
    rig.rt.io().unwrap().blocking(dolmen_rt::WaitsFor::Host, move || server.join().unwrap()).await;
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

/// A plain reply to each of the next requests; what they were.
fn answer(peer: &mut Peer, count: usize) -> Vec<Request> {
    (0..count)
        .map(|_| {
            let r = peer.request().expect("the client is there");
            let mut out = Vec::new();
            reply::put_none(&mut out, r.cookie);
            peer.send(&out);
            r
        })
        .collect()
}

/// The server died after it had acknowledged a write, with the write in its memory. The next server did not know
/// it, and the flush that it answered told the guest that its write was safe.
#[test]
fn a_flush_does_not_succeed_when_acknowledged_writes_went_down_with_a_connection() {
    type Change = fn(&Disk) -> LocalFuture<'_, dolmen_types::Result<()>>;
    let changes: [(&str, Change); 3] = [
        ("write", |d| Box::pin(d.write(0, &[1; 512], WriteFlags::NONE))),
        ("zero write", |d| Box::pin(d.write_zeroes(0, 512, WriteFlags::NONE))),
        ("discard", |d| Box::pin(d.discard(0, 512))),
    ];
    run(async move |rig| {
        for delay in ["0", "30"] {
            for (what, change) in changes {
                let _ = std::fs::remove_file(rig.path("s"));
                let server = serve(&rig, |listener| {
                    // Acknowledged, then gone.
                    answer(&mut Peer::accept(&listener), 1);
                    let mut peer = Peer::accept(&listener);
                    while peer.request().is_some_and(|r| {
                        let mut out = Vec::new();
                        match r.len {
                            0 => reply::put_none(&mut out, r.cookie),
                            len => reply::put_hole(&mut out, r.cookie, true, r.offset, len),
                        }
                        peer.send(&out);
                        true
                    }) {}
                });
                let disk = rig.rw(rig.options("s", "").with("reconnect-delay", delay)).await.unwrap();
                change(&disk).await.unwrap();
                // Until the new connection stands.
                while disk.read(0, 512).await.is_err() {}
                for _ in 0..2 {
                    let e = disk.flush().await.expect_err(what);
                    assert_eq!(e.kind(), ErrorKind::Io, "{what}: {e}");
                    assert!(e.to_string().contains("acknowledged writes were not flushed"), "{e}");
                }
                assert!(disk.read(0, 512).await.is_ok(), "reading goes on");
                drop(disk);
                ended(&rig, server).await;
            }
        }
    });
}

/// The story: a node that a daemon closed was not flushed unless a format above had something to write out, and nobody was
/// told when that would have failed.
#[test]
fn closing_flushes_and_says_what_is_lost() {
    run(async move |rig| {
        for fails in [false, true] {
            let _ = std::fs::remove_file(rig.path("s"));
            let server = serve(&rig, move |listener| {
                let mut peer = Peer::accept(&listener);
                assert_eq!(answer(&mut peer, 1)[0].cmd, cmd::WRITE);
                let flush = peer.request().expect("the client is there");
                assert_eq!(flush.cmd, cmd::FLUSH);
                if !fails {
                    let mut out = Vec::new();
                    reply::put_none(&mut out, flush.cookie);
                    peer.send(&out);
                    assert_eq!(peer.request().expect("it says goodbye").cmd, cmd::DISC);
                }
            });
            let disk = rig.rw(rig.options("s", "")).await.unwrap();
            disk.write(0, &[1; 512], WriteFlags::NONE).await.unwrap();
            assert_eq!(disk.try_close().await.is_err(), fails);
            ended(&rig, server).await;
        }
    });
}

/// What was flushed, or written with FUA, is not lost: flushes go on.
#[test]
fn a_flush_succeeds_when_nothing_was_in_the_hands_of_the_old_server() {
    run(async |rig| {
        let server = serve(&rig, |listener| {
            let asked = answer(&mut Peer::accept(&listener), 3);
            let cmds: Vec<u16> = asked.iter().map(|r| r.cmd).collect();
            assert_eq!(cmds, [cmd::WRITE, cmd::FLUSH, cmd::WRITE]);
            let mut peer = Peer::accept(&listener);
            assert_eq!(answer(&mut peer, 1)[0].cmd, cmd::FLUSH);
            while peer.request().is_some() {}
        });
        let disk = rig.rw(rig.options("s", "").with("reconnect-delay", "30")).await.unwrap();
        disk.write(0, &[1; 512], WriteFlags::NONE).await.unwrap();
        disk.flush().await.unwrap();
        disk.write(512, &[1; 512], WriteFlags::FUA).await.unwrap();
        disk.flush().await.unwrap();
        drop(disk);
        ended(&rig, server).await;
    });
}

/// A write was in flight when the connection broke, and was sent again. Then a newer write of the same bytes was
/// acknowledged, and the first server executed its copy of the old one.
#[test]
fn a_newer_write_does_not_follow_one_that_an_old_server_may_still_execute() {
    run(async |rig| {
        let server = serve(&rig, |listener| {
            let first = Peer::accept(&listener).request().expect("a write");
            assert_eq!((first.cmd, first.offset), (cmd::WRITE, 4096));
            let mut peer = Peer::accept(&listener);
            let again = answer(&mut peer, 1);
            assert_eq!((again[0].cmd, again[0].offset), (cmd::WRITE, 4096));
            let elsewhere = answer(&mut peer, 1);
            assert_eq!((elsewhere[0].cmd, elsewhere[0].offset), (cmd::WRITE, 8192));
            assert!(peer.request().is_none_or(|r| r.cmd == cmd::DISC), "nothing else is sent");
        });
        let disk = rig.rw(rig.options("s", "").with("reconnect-delay", "30")).await.unwrap();
        disk.write(4096, &[1; 4096], WriteFlags::NONE).await.expect("the same bytes may be written again");
        for e in [
            disk.write(4608, &[2; 512], WriteFlags::NONE).await,
            disk.write_zeroes(0, 8192, WriteFlags::NONE).await,
            disk.discard(4096, 512).await,
        ] {
            let e = e.expect_err("the old server may undo it");
            assert_eq!(e.kind(), ErrorKind::Io);
            assert!(e.to_string().contains("4096 bytes at offset 4096 was in flight"), "{e}");
        }
        disk.write(8192, &[3; 4096], WriteFlags::NONE).await.expect("nothing is in the way there");
        drop(disk);
        ended(&rig, server).await;
    });
}
