//! Many requests at once, many clients at once, and orderly ends.

use std::io::Write;

use dolmen_exports::{NbdServerConfig, Server as _, StopMode};
use dolmen_nbd::consts::{STATE_HOLE, STATE_ZERO, cmd};
use dolmen_nbd::{CommandFlags, Extent, Request};
use dolmen_types::ErrorKind;

use crate::memory::{Memory, SLOW_SECTOR, SLOW_STATUS};
use crate::rig::{Rig, pattern, run, run_with};
use crate::wire::{Client, connect};

const NONE: CommandFlags = CommandFlags(0);

#[test]
fn a_pipeline_runs_concurrently() {
    run(async |rig| {
        let edge = rig.export("d", 1 << 20, true).await;
        let image = pattern(1 << 20, 8);
        rig.poke(&edge, 0, &image).await;
        let socket = rig.socket();
        rig.beside(move || {
            for structured in [false, true] {
                let mut c = Client::negotiate(&socket, "d", structured);
                // Far more than run at one time, and all in one write.
                let requests: Vec<u8> = (0..256)
                    .flat_map(|i| {
                        Request { flags: NONE, cmd: cmd::READ, cookie: i, offset: i * 4096, len: 4096 }
                            .encode()
                    })
                    .collect();
                c.stream.write_all(&requests).unwrap();
                let mut seen = [false; 256];
                for _ in 0..256 {
                    let a = c.answer(4096);
                    let i = a.cookie as usize;
                    assert!(!std::mem::replace(&mut seen[i], true), "{i} twice");
                    assert!(a.data[0].1 == image[i * 4096..][..4096], "{i}");
                }
            }
        })
        .await;
        let (.., most) = Memory::counters(&Rig::node(&edge));
        assert!((16..=128).contains(&most), "{most} at a time");
    });
}

/// Writes whose payload is larger than the receive buffer, cut at odd places.
#[test]
fn payloads_in_pieces() {
    run(async |rig| {
        let edge = rig.export("d", 4 << 20, true).await;
        let socket = rig.socket();
        let image = pattern(2 << 20, 9);
        let sent = image.clone();
        rig.beside(move || {
            let mut c = Client::negotiate(&socket, "d", true);
            let mut bytes = Vec::new();
            let mut at = 0;
            for (i, len) in [1, 511, 4096, 70_001, 300_000, 1_000_000].into_iter().enumerate() {
                let r = Request {
                    flags: NONE,
                    cmd: cmd::WRITE,
                    cookie: i as u64,
                    offset: at as u64,
                    len: len as u32,
                };
                bytes.extend(r.encode());
                bytes.extend(&sent[at..at + len]);
                at += len;
            }
            for piece in bytes.chunks(33_333) {
                c.stream.write_all(piece).unwrap();
            }
            for _ in 0..6 {
                assert_eq!(c.answer(0).error, None);
            }
        })
        .await;
        let total = 1 + 511 + 4096 + 70_001 + 300_000 + 1_000_000;
        assert!(rig.peek(&edge, 0, total).await == image[..total]);
    });
}

#[test]
fn large_reads_have_holes_and_status_is_exact() {
    run(async |rig| {
        let edge = rig.export("d", 8 << 20, true).await;
        let data = pattern(100_000, 10);
        rig.poke(&edge, 1 << 20, &data).await;
        let socket = rig.socket();
        rig.beside(move || {
            let mut want = vec![0; 2 << 20];
            want[1 << 20..][..100_000].copy_from_slice(&data);
            let mut c = Client::negotiate(&socket, "d", true);
            for (flags, holes) in [(NONE, 2), (CommandFlags::DF, 0)] {
                c.send(cmd::READ, flags, 3, 0, 2 << 20);
                let a = c.answer(0);
                assert_eq!(a.holes, holes);
                let mut got = vec![0xaa; 2 << 20];
                for (offset, bytes) in &a.data {
                    got[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
                }
                assert!(got == want);
            }
            let hole = |len| Extent { len, flags: STATE_HOLE | STATE_ZERO };
            let blocks = 100_000u32.next_multiple_of(4096);
            c.send(cmd::BLOCK_STATUS, NONE, 4, 4096, (8 << 20) - 4096);
            let rest = (7 << 20) - blocks;
            assert_eq!(
                c.answer(0).extents,
                [hole((1 << 20) - 4096), Extent { len: blocks, flags: 0 }, hole(rest)]
            );
            c.send(cmd::BLOCK_STATUS, CommandFlags::REQ_ONE, 5, 4096, 8192);
            assert_eq!(c.answer(0).extents, [hole(8192)]);
            c.send(cmd::BLOCK_STATUS, CommandFlags::REQ_ONE, 5, 0, 8 << 20);
            assert_eq!(c.answer(0).extents, [hole(1 << 20)]);
        })
        .await;
    });
}

/// The story: one question about 4 GiB of a fragmented disk walked all of it, however long that took, and no change of
/// the graph could be made meanwhile.
#[test]
fn a_block_status_that_takes_long_is_answered_in_parts() {
    run(async |rig| {
        const BLOCKS: u64 = 128;
        let edge = rig.export("faulty", 8 << 20, true).await;
        for i in 0..BLOCKS / 2 {
            rig.poke(&edge, SLOW_STATUS + i * 8192, &pattern(4096, 1)).await;
        }
        let socket = rig.socket();
        rig.beside(move || {
            let mut c = Client::negotiate(&socket, "faulty", true);
            let (mut at, end, mut seen, mut answers) = (SLOW_STATUS, SLOW_STATUS + BLOCKS * 4096, 0, 0);
            while at < end {
                c.send(cmd::BLOCK_STATUS, NONE, 4, at, (end - at) as u32);
                for e in c.answer(0).extents {
                    assert_eq!((e.len, e.flags == 0), (4096, seen % 2 == 0));
                    seen += 1;
                    at += u64::from(e.len);
                }
                answers += 1;
            }
            assert_eq!(seen, BLOCKS);
            // 128 answers of 5 ms each, at most 100 ms for one reply.
            assert!(answers >= 6, "{answers} replies");
        })
        .await;
    });
}

#[test]
fn the_number_of_connections_is_limited() {
    let config = NbdServerConfig { max_connections: 1, ..Default::default() };
    run_with(config, async |rig| {
        rig.export("d", 1 << 20, true).await;
        let socket = rig.socket();
        rig.beside(move || {
            let first = Client::negotiate(&socket, "d", true);
            // The kernel accepts it; the server does not greet it.
            let second = connect(&socket);
            second.set_nonblocking(true).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            let peeked = std::io::Read::read(&mut &second, &mut [0; 18]);
            assert_eq!(peeked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
            drop(first);
            second.set_nonblocking(false).unwrap();
            let mut greeting = [0; 18];
            std::io::Read::read_exact(&mut &second, &mut greeting).unwrap();
            assert!(greeting.starts_with(b"NBDMAGICIHAVEOPT"));
        })
        .await;
    });
}

/// Removing an export: refused while it is used, unless by force; a request under way
/// is answered even then.
#[test]
fn removing_an_export() {
    run(async |rig| {
        let faulty = rig.export("faulty", 4 << 20, true).await;
        rig.export("other", 1 << 20, true).await;
        let (socket, edge) = (rig.socket(), rig.disk("again", 4096, true).await);
        let client = rig.beside(move || {
            let mut other = Client::negotiate(&socket, "other", true);
            let mut c = Client::negotiate(&socket, "faulty", true);
            c.send(cmd::READ, NONE, 6, SLOW_SECTOR, 4096);
            let a = c.answer(4096);
            assert_eq!((a.cookie, a.error), (6, None));
            assert!(c.hung_up());
            other.send(cmd::FLUSH, NONE, 1, 0, 0);
            assert_eq!(other.answer(0).error, None);
        });
        let removal = async {
            rig.until(|| faulty.in_flight() == 1).await;
            let export = rig.exports.borrow()["faulty"].clone();
            assert_eq!(export.stop(StopMode::Safe).err().unwrap().kind(), ErrorKind::Busy);
            let drained = export.stop(StopMode::Hard).unwrap();
            // The old one is not offered any more, and its name is not free yet.
            assert_eq!(rig.try_add("faulty", &edge, true).unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(faulty.in_flight(), 1);
            drained.await;
            assert_eq!((export.clients(), faulty.in_flight()), (0, 0));
            export.stop(StopMode::Safe).unwrap().await;
            assert_eq!(rig.try_add("other", &edge, true).unwrap_err().kind(), ErrorKind::AlreadyExists);
            rig.add("faulty", &edge, true);
        };
        both(client, removal).await;
        assert_eq!(rig.ok("nbdinfo", &["--size", &rig.uri("faulty")]).await.trim(), "4096");
    });
}

#[test]
fn shutting_down_answers_what_is_under_way() {
    run(async |rig| {
        let edge = rig.export("faulty", 4 << 20, true).await;
        let socket = rig.socket();
        let client = rig.beside({
            let socket = socket.clone();
            move || {
                let mut idle = Client::negotiate(&socket, "faulty", true);
                let half = connect(&socket);
                let mut c = Client::negotiate(&socket, "faulty", true);
                c.send(cmd::READ, NONE, 6, SLOW_SECTOR, 4096);
                assert_eq!(c.answer(4096).error, None);
                assert!(c.hung_up());
                assert!(idle.hung_up());
                drop(half);
            }
        });
        let end = async {
            rig.until(|| edge.in_flight() == 1).await;
            let server = rig.server.borrow_mut().take().unwrap();
            server.stop().await;
            assert_eq!(edge.in_flight(), 0);
        };
        both(client, end).await;
        assert!(!socket.exists());
    });
}

/// Runs two futures to their ends.
async fn both(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    use std::task::Poll;
    let (mut a, mut b) = (std::pin::pin!(a), std::pin::pin!(b));
    let (mut a_done, mut b_done) = (false, false);
    std::future::poll_fn(|cx| {
        a_done = a_done || a.as_mut().poll(cx).is_ready();
        b_done = b_done || b.as_mut().poll(cx).is_ready();
        if a_done && b_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
