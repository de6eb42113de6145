//! The NBD client against the servers that people use.

use dolmen_types::{Actions, ErrorKind, WriteFlags};

use crate::nbd_rig::{Rig, join, pattern, run};

const MIB: usize = 1 << 20;

fn file(rig: &Rig, name: &str, bytes: &[u8]) {
    std::fs::write(rig.path(name), bytes).unwrap();
}

/// Random writes, zero writes and discards, against a model; then the file is compared.
#[test]
fn qemu_nbd_ends_up_with_what_was_written() {
    run(async |rig| {
        let mut model = pattern(8 * MIB, 1);
        file(&rig, "raw", &model);
        let _server = rig.qemu_nbd("s", "raw", &[]).await;
        let disk = rig.rw(rig.options("s", "e")).await.unwrap();
        assert_eq!(disk.size(), model.len() as u64);
        let mut x = 0x1234_5678_9abc_def1u64;
        for i in 0..300 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let at = (x % (model.len() as u64 - 300_000)) as usize;
            let len = (x >> 32) as usize % if i % 10 == 0 { 300_000 } else { 9000 } + 1;
            let flags = if i % 5 == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
            match i % 4 {
                0 | 1 => {
                    let data = pattern(len, x);
                    disk.write(at as u64, &data, flags).await.unwrap();
                    model[at..at + len].copy_from_slice(&data);
                }
                2 => {
                    let unmap = if i % 8 == 2 { WriteFlags::MAY_UNMAP } else { WriteFlags::NONE };
                    disk.write_zeroes(at as u64, len as u64, flags | unmap).await.unwrap();
                    model[at..at + len].fill(0);
                }
                _ => assert!(disk.read(at as u64, len).await.unwrap() == model[at..at + len]),
            }
        }
        disk.flush().await.unwrap();
        assert!(disk.read(0, model.len()).await.unwrap() == model);
        disk.close().await;
        assert!(std::fs::read(rig.path("raw")).unwrap() == model);
    });
}

#[test]
fn holes_are_seen_and_made() {
    run(async |rig| {
        let f = std::fs::File::create(rig.path("raw")).unwrap();
        f.set_len(8 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&f, &pattern(MIB, 2), 2 << 20).unwrap();
        let _server = rig.qemu_nbd("s", "raw", &[]).await;
        let disk = rig.rw(rig.options("s", "e")).await.unwrap();
        assert_eq!(disk.status(0).await.unwrap(), (2 << 20, true, false));
        assert_eq!(disk.status(2 << 20).await.unwrap(), (1 << 20, false, true));
        assert_eq!(disk.status((2 << 20) + 4096).await.unwrap().0, (1 << 20) - 4096);
        disk.discard(2 << 20, 1 << 20).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(disk.status(0).await.unwrap(), (8 << 20, true, false));
        // A sparse read comes back as holes.
        assert!(disk.read(0, 8 * MIB).await.unwrap().iter().all(|b| *b == 0));
    });
}

#[test]
fn many_requests_share_the_connection() {
    run(async |rig| {
        let image = pattern(16 * MIB, 3);
        file(&rig, "raw", &image);
        let _server = rig.qemu_nbd("s", "raw", &[]).await;
        let disk = rig.rw(rig.options("s", "e")).await.unwrap();
        // More than fit the connection at one time.
        let reads: Vec<_> = (0..600).map(|i| disk.read(i * 4096, 4096 + (i as usize % 3) * 1000)).collect();
        for (i, got) in join(reads).await.into_iter().enumerate() {
            let got = got.unwrap();
            assert!(got == image[i * 4096..][..got.len()], "{i}");
        }
        let data = pattern(300 * 4096, 4);
        let writes: Vec<_> = (0..300)
            .map(|i| disk.write(i as u64 * 4096, &data[i * 4096..][..4096], WriteFlags::NONE))
            .collect();
        for w in join(writes).await {
            w.unwrap();
        }
        assert!(disk.read(0, data.len()).await.unwrap() == data);
    });
}

/// Servers that offer little: no structured replies, no zero writes, no FUA, no trim.
#[test]
fn bare_servers_are_enough() {
    run(async |rig| {
        for args in [
            &["--no-sr", "memory", "4M"][..],
            &["--filter=nozero", "--filter=fua", "memory", "4M", "zeromode=none"],
        ] {
            let socket = args[0];
            let _server = rig.nbdkit(socket, args).await;
            let disk = rig.rw(rig.options(socket, "")).await.unwrap();
            let mut model = pattern(4 * MIB, 5);
            disk.write(0, &model, WriteFlags::FUA).await.unwrap();
            disk.write_zeroes(5000, 1_500_000, WriteFlags::FUA | WriteFlags::MAY_UNMAP).await.unwrap();
            model[5000..1_505_000].fill(0);
            disk.discard(3 << 20, 65536).await.unwrap();
            disk.flush().await.unwrap();
            let got = disk.read(0, 4 * MIB).await.unwrap();
            assert!(got[..3 << 20] == model[..3 << 20], "{args:?}");
            assert!(got[(3 << 20) + 65536..] == model[(3 << 20) + 65536..]);
            let error = disk.write_zeroes(0, 4096, WriteFlags::NO_FALLBACK).await;
            if args[0] != "--no-sr" {
                assert_eq!(error.unwrap_err().kind(), ErrorKind::Unsupported);
            }
            disk.close().await;
        }
    });
}

/// A server that insists on blocks gets blocks; users need not know.
#[test]
fn unaligned_requests_are_widened() {
    run(async |rig| {
        let _server = rig
            .nbdkit(
                "s",
                &[
                    "--filter=blocksize-policy",
                    "memory",
                    "1M",
                    "blocksize-minimum=4096",
                    "blocksize-preferred=65536",
                    "blocksize-maximum=131072",
                    "blocksize-error-policy=error",
                ],
            )
            .await;
        let disk = rig.rw(rig.options("s", "")).await.unwrap();
        let mut model = pattern(MIB, 6);
        disk.write(0, &model, WriteFlags::NONE).await.unwrap();
        for (at, len) in [(1, 1), (4095, 2), (4096, 4096), (10_000, 300_000), (1_048_575, 1), (8192, 5)] {
            let data = pattern(len, at as u64);
            disk.write(at as u64, &data, WriteFlags::NONE).await.unwrap();
            model[at..at + len].copy_from_slice(&data);
            assert!(disk.read(at as u64, len).await.unwrap() == data);
        }
        // Neighbours in one block, at the same time.
        let data = pattern(64, 7);
        let writes: Vec<_> =
            (0..64).map(|i| disk.write(20_000 + i as u64, &data[i..i + 1], WriteFlags::NONE)).collect();
        for w in join(writes).await {
            w.unwrap();
        }
        model[20_000..20_064].copy_from_slice(&data);
        disk.write_zeroes(30_001, 10_000, WriteFlags::NONE).await.unwrap();
        model[30_001..40_001].fill(0);
        disk.discard(50_001, 100).await.unwrap();
        assert!(disk.read(0, MIB).await.unwrap() == model);
        assert!(disk.status(1).await.is_ok());
    });
}

#[test]
fn what_can_not_be_opened_says_why() {
    run(async |rig| {
        file(&rig, "raw", &[1; 65536]);
        let _server = rig.qemu_nbd("s", "raw", &["-r"]).await;
        let kind = |r: dolmen_types::Result<_>| r.err().map(|e| (e.kind(), e.to_string()));
        let (k, text) = kind(rig.rw(rig.options("s", "e")).await).unwrap();
        assert_eq!(k, ErrorKind::ReadOnly);
        assert!(text.contains("read-only"), "{text}");
        let (k, text) = kind(rig.rw(rig.options("s", "nope")).await).unwrap();
        assert_eq!(k, ErrorKind::NotFound);
        assert!(text.contains("'nope'"), "{text}");
        let (_, text) = kind(rig.rw(rig.options("nobody", "e")).await).unwrap();
        assert!(text.contains("nobody"), "{text}");

        let disk = rig.open(rig.options("s", "e").with("read-only", true), Actions::D).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        let disk = rig.open(rig.options("s", "e").with("auto-read-only", true), Actions::D).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        drop(disk);
        let refused = rig.rw(rig.options("s", "e").with("auto-read-only", true)).await;
        assert!(refused.is_err(), "nobody may write it");
    });
}

/// The server dies: what is under way fails and says so. A new server is found.
#[test]
fn a_lost_server_is_reported_and_found_again() {
    run(async |rig| {
        let image = pattern(MIB, 8);
        file(&rig, "raw", &image);
        let server = rig.qemu_nbd("s", "raw", &[]).await;
        let disk = rig.rw(rig.options("s", "e")).await.unwrap();
        let patient = rig.rw(rig.options("s", "e").with("reconnect-delay", "30")).await.unwrap();
        assert!(disk.read(0, 4096).await.unwrap() == image[..4096]);
        drop(server);
        let e = disk.read(0, 4096).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Disconnected);
        assert!(e.to_string().contains("the connection to the NBD server is lost"), "{e}");
        // Many that find it lost at the same time fail together.
        for e in join((0..100).map(|i| disk.read(i * 512, 512)).collect()).await {
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Disconnected);
        }
        // This one waits.
        let waiting = patient.read(4096, 4096);
        let revived = async {
            rig.rt.sleep(std::time::Duration::from_millis(300)).await;
            let _ = std::fs::remove_file(rig.path("s"));
            Ok(Vec::from([rig.qemu_nbd("s", "raw", &[]).await]))
        };
        let (got, server) = {
            let mut waiting = std::pin::pin!(waiting);
            let mut revived = std::pin::pin!(revived);
            let (mut got, mut server) = (None, None);
            std::future::poll_fn(|cx| {
                use std::task::Poll;
                if got.is_none()
                    && let Poll::Ready(r) = waiting.as_mut().poll(cx)
                {
                    got = Some(r);
                }
                if server.is_none()
                    && let Poll::Ready(r) = revived.as_mut().poll(cx)
                {
                    let r: dolmen_types::Result<_> = r;
                    server = Some(r);
                }
                if got.is_some() && server.is_some() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            (got.unwrap(), server.unwrap())
        };
        assert!(got.unwrap() == image[4096..8192]);
        assert!(disk.read(8192, 4096).await.unwrap() == image[8192..12288]);
        drop(server);
    });
}

/// `open-timeout` gave up up to 250 ms before its end, when a server might just have come.
#[test]
fn open_timeout_is_not_early() {
    run(async |rig| {
        let began = rig.rt.now();
        let refused = rig.rw(rig.options("nobody", "e").with("open-timeout", "1")).await;
        assert!(refused.is_err());
        let waited = rig.rt.now().since(began);
        assert!(waited >= std::time::Duration::from_secs(1), "{waited:?}");
    });
}

/// An export whose size is no multiple of a sector, or of its server's blocks: the rest of the last sector reads as
/// zeroes and holds nothing else, and looking at the last part of a block asks the server for nothing that it refuses.
#[test]
fn the_end_of_an_export_lies_within_a_sector() {
    run(async |rig| {
        for (socket, args) in [
            ("plain", &["memory", "1000100"][..]),
            (
                "blocks",
                &[
                    "--filter=blocksize-policy",
                    "memory",
                    "1000100",
                    "blocksize-minimum=512",
                    "blocksize-preferred=4096",
                    "blocksize-maximum=1M",
                    "blocksize-error-policy=error",
                ],
            ),
        ] {
            let _server = rig.nbdkit(socket, args).await;
            let disk = rig.rw(rig.options(socket, "")).await.unwrap();
            assert_eq!(disk.size(), 1_000_448);
            let mut at = 0;
            while at < disk.size() {
                let (len, ..) = disk.status(at).await.unwrap();
                assert!(len > 0);
                at += len;
            }
            assert_eq!(disk.status(1_000_100).await.unwrap(), (348, true, false));
            let beyond = disk.write(999_936, &[7; 512], WriteFlags::NONE).await.unwrap_err();
            assert_eq!(beyond.kind(), ErrorKind::NoSpace);
            if socket == "plain" {
                let mut data = vec![7; 512];
                data[164..].fill(0);
                disk.write(999_936, &data, WriteFlags::NONE).await.unwrap();
                assert!(disk.read(999_936, 512).await.unwrap() == data);
                disk.write_zeroes(999_936, 512, WriteFlags::NONE).await.unwrap();
                disk.discard(999_936, 512).await.unwrap();
                assert_eq!(disk.read(999_936, 512).await.unwrap(), [0; 512]);
            }
        }
    });
}
