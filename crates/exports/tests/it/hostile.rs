//! Clients that break rules: they lose their own connection, nobody else's.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use dolmen_exports::{NbdServerConfig, Server as _};
use dolmen_graph::UserEdge;
use dolmen_nbd::consts::{OPTION_MAGIC, cmd, opt};
use dolmen_nbd::{CommandFlags, Errno, Request};

use crate::memory::{BAD_SECTOR, Memory};
use crate::rig::{Rig, pattern, run, run_with};
use crate::wire::{Answer, Client, connect};

const NONE: CommandFlags = CommandFlags(0);

#[test]
fn nonsense_ends_a_connection_and_no_other() {
    run(async |rig| {
        rig.export("d", 1 << 20, true).await;
        let socket = rig.socket();
        rig.beside(move || {
            let mut honest = Client::negotiate(&socket, "d", true);
            let flags = 3u32.to_be_bytes();
            let option = |length: u32| {
                let mut o = flags.to_vec();
                o.extend(OPTION_MAGIC.to_be_bytes());
                o.extend(opt::GO.to_be_bytes());
                o.extend(length.to_be_bytes());
                o
            };
            let handshakes =
                [vec![0xff; 4], [&flags[..], &[0x55; 16]].concat(), option(u32::MAX), pattern(4096, 5)];
            for bytes in handshakes {
                let mut s = connect(&socket);
                s.write_all(&bytes).unwrap();
                let mut rest = Vec::new();
                // Closing with unread input may reset the connection; both are an end.
                if let Err(e) = s.read_to_end(&mut rest) {
                    assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset);
                }
            }
            let too_long = Request { flags: NONE, cmd: cmd::WRITE, cookie: 1, offset: 0, len: u32::MAX };
            for bytes in [pattern(64, 6), too_long.encode().to_vec()] {
                let mut c = Client::negotiate(&socket, "d", true);
                c.stream.write_all(&bytes).unwrap();
                assert!(c.hung_up());
            }
            // Gone in the middle of a payload, and of a header.
            for cut in [28 + 100, 10] {
                let mut c = Client::negotiate(&socket, "d", false);
                let r = Request { flags: NONE, cmd: cmd::WRITE, cookie: 1, offset: 0, len: 4096 };
                let bytes = [&r.encode()[..], &[1; 4096]].concat();
                c.stream.write_all(&bytes[..cut]).unwrap();
            }
            honest.send(cmd::READ, NONE, 77, 0, 4096);
            let a = honest.answer(4096);
            assert_eq!((a.cookie, a.error), (77, None));
            assert_eq!(a.data, [(0, vec![0; 4096])]);
        })
        .await;
        rig.until(|| rig.clients("d") == 0).await;
    });
}

#[test]
fn a_silent_client_is_sent_away() {
    let config = NbdServerConfig { handshake_max: Duration::from_millis(100), ..Default::default() };
    run_with(config, async |rig| {
        rig.export("d", 1 << 20, true).await;
        let socket = rig.socket();
        rig.beside(move || {
            let start = Instant::now();
            let mut silent = connect(&socket);
            let mut patient = Client::negotiate(&socket, "d", true);
            let mut greeting = Vec::new();
            silent.read_to_end(&mut greeting).unwrap();
            assert_eq!(greeting.len(), 18);
            assert!(start.elapsed() >= Duration::from_millis(100));
            // The limit is for the negotiation only.
            std::thread::sleep(Duration::from_millis(50));
            patient.send(cmd::FLUSH, NONE, 1, 0, 0);
            assert_eq!(patient.answer(0).error, None);
        })
        .await;
    });
}

#[test]
fn refused_requests_are_answered_and_nothing_else_happens() {
    run(async |rig| {
        let edge = rig.export("faulty", 4 << 20, true).await;
        let ro = rig.disk("r", 1 << 20, true).await;
        rig.add("r", &ro, false);
        let socket = rig.socket();
        for structured in [false, true] {
            let socket = socket.clone();
            rig.beside(move || {
                let mut c = Client::negotiate(&socket, "faulty", structured);
                let size = 4 << 20;
                for (cmd, flags, offset, len, want) in [
                    (cmd::READ, NONE, size, 1, Errno::Inval),
                    (cmd::READ, NONE, u64::MAX, 4096, Errno::Inval),
                    (cmd::READ, NONE, BAD_SECTOR - 4096, 8192, Errno::Io),
                    (cmd::READ, CommandFlags::NO_HOLE, 0, 512, Errno::Inval),
                    (cmd::READ, NONE, 0, (32 << 20) + 1, Errno::Inval),
                    (cmd::WRITE_ZEROES, NONE, size - 512, 1024, Errno::NoSpc),
                    (cmd::TRIM, NONE, size, 512, Errno::Inval),
                    (cmd::CACHE, NONE, size, 512, Errno::Inval),
                    (cmd::CACHE, NONE, BAD_SECTOR, 512, Errno::Io),
                    (4711, NONE, 0, 512, Errno::Inval),
                    (cmd::BLOCK_STATUS, NONE, 0, 0, Errno::Inval),
                ] {
                    c.send(cmd, flags, 9, offset, len);
                    let a = c.answer(len);
                    let (errno, text) =
                        a.error.unwrap_or_else(|| panic!("{cmd} {offset}+{len} went through"));
                    assert_eq!((a.cookie, errno), (9, want), "{cmd} {offset}+{len}");
                    assert_eq!(!text.is_empty(), structured);
                }
                // The payload of a refused write is skipped.
                c.send(cmd::WRITE, NONE, 10, size - 512, 1024);
                c.stream.write_all(&[0xee; 1024]).unwrap();
                assert_eq!(c.answer(0).error.unwrap().0, Errno::NoSpc);
                c.send(cmd::READ, NONE, 11, size - 512, 512);
                let a = c.answer(512);
                assert_eq!(a.data[0].1, [0; 512]);
                c.send(cmd::READ, NONE, 12, 0, 0);
                assert_eq!(c.answer(0).error, None);

                let mut c = Client::negotiate(&socket, "r", structured);
                c.send(cmd::WRITE, NONE, 1, 0, 512);
                c.stream.write_all(&[1; 512]).unwrap();
                assert_eq!(c.answer(0).error.unwrap().0, Errno::Perm);
                c.send(cmd::WRITE_ZEROES, NONE, 2, 0, 512);
                assert_eq!(c.answer(0).error.unwrap().0, Errno::Perm);
            })
            .await;
        }
        assert_eq!(rig.peek(&ro, 0, 512).await, [0; 512]);
        drop(edge);
    });
}

/// A request to cache reads what is asked for, answers without data, and may be longer than a read.
#[test]
fn a_request_to_cache_is_a_read_without_data() {
    run(async |rig| {
        let edge = rig.export("d", 64 << 20, true).await;
        let ro = rig.export("r", 4 << 20, false).await;
        for structured in [false, true] {
            let socket = rig.socket();
            rig.beside(move || {
                let mut c = Client::negotiate(&socket, "d", structured);
                for (offset, len) in [(0, 4096), (512, 3 << 20), (1 << 20, 63 << 20)] {
                    c.send(cmd::CACHE, NONE, 5, offset, len);
                    assert_eq!(c.answer(0), Answer { cookie: 5, ..Answer::default() });
                }
                let mut c = Client::negotiate(&socket, "r", structured);
                c.send(cmd::CACHE, NONE, 6, 0, 0);
                assert_eq!(c.answer(0).error, None);
                c.send(cmd::CACHE, NONE, 6, 0, 4 << 20);
                assert_eq!(c.answer(0).error, None);
            })
            .await;
        }
        let read = |edge: &UserEdge| Rig::node(edge).state.counters.read().reads.bytes;
        // The longest one is cut short.
        assert_eq!(read(&edge), 2 * (4096 + (3 << 20) + (32 << 20)));
        assert_eq!(read(&ro), 2 * (4 << 20));
        assert_eq!(edge.counters().read().reads.requests, 0, "nobody was sent data");
    });
}

/// A client that asks and asks and never reads the answers: the server stops reading it,
/// keeps a bounded number of requests, and serves others.
#[test]
fn a_client_that_does_not_read_stops_itself() {
    run(async |rig| {
        let edge = rig.export("d", 8 << 20, true).await;
        let socket = rig.socket();
        let (stuck, sent) = rig
            .beside({
                let socket = socket.clone();
                move || {
                    let mut c = Client::negotiate(&socket, "d", false);
                    c.stream.set_nonblocking(true).unwrap();
                    let r = Request { flags: NONE, cmd: cmd::READ, cookie: 1, offset: 4 << 20, len: 1 << 20 };
                    let bytes = r.encode().repeat(1000);
                    let mut sent = 0;
                    let mut idle = 0;
                    while idle < 20 && sent < 100_000_000 {
                        match c.stream.write(&bytes) {
                            Ok(n) => (sent, idle) = (sent + n, 0),
                            Err(_) => {
                                idle += 1;
                                std::thread::sleep(Duration::from_millis(5));
                            }
                        }
                    }
                    (c, sent)
                }
            })
            .await;
        assert!(sent < 100_000_000, "the server reads on for ever");
        let (.., most) = Memory::counters(&Rig::node(&edge));
        assert!(most <= 64, "64 MiB are 64 reads of 1 MiB, not {most}");
        rig.beside(move || {
            let mut c = Client::negotiate(&socket, "d", true);
            c.send(cmd::READ, NONE, 5, 0, 4096);
            assert_eq!(c.answer(4096).cookie, 5);
        })
        .await;
        drop(stuck);
        rig.until(|| rig.clients("d") == 0).await;
    });
}

/// Clients that do not read their answers, of two exports, can't keep the server from its
/// end: it is patient with all of them at once.
#[test]
fn a_client_that_does_not_read_can_not_hold_up_the_end() {
    run(async |rig| {
        rig.export("a", 32 << 20, true).await;
        rig.export("b", 32 << 20, true).await;
        let socket = rig.socket();
        let stuck = rig
            .beside(move || {
                ["a", "b"].map(|export| {
                    let mut c = Client::negotiate(&socket, export, false);
                    for i in 0..4 {
                        c.send(cmd::READ, NONE, i, 0, 8 << 20);
                    }
                    c
                })
            })
            .await;
        let server = rig.server.borrow_mut().take().unwrap();
        rig.until(|| rig.clients("a") == 1 && rig.clients("b") == 1).await;
        let start = rig.rt.now();
        server.stop().await;
        assert!(rig.rt.now().since(start) < Duration::from_secs(9), "5 s for both together");
        drop(stuck);
    });
}
