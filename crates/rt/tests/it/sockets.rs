use dolmen_rt::{Addr, Memory};
use dolmen_types::ErrorKind;

use crate::on_both;

#[test]
fn streams_over_unix_and_tcp() {
    on_both(async |rt, io| {
        let dir = tempfile::tempdir().unwrap();
        let unix = Addr::Unix(dir.path().join("s"));
        for addr in [unix, Addr::Inet { host: "127.0.0.1".into(), port: 0 }] {
            let listener = io.listen(&addr).await.unwrap();
            let addr = match (addr, listener.port()) {
                (Addr::Inet { host, .. }, Some(port)) => Addr::Inet { host, port },
                (addr, _) => addr,
            };
            // An echo server.
            rt.spawn(async move {
                let stream = listener.accept().await.unwrap();
                let buf = Memory::zeroed(70_000);
                loop {
                    let n = stream.recv(&buf.iovec()).await.unwrap();
                    if n == 0 {
                        break;
                    }
                    stream.send_all(&buf.iovec().slice(0, n)).await.unwrap();
                }
            });
            let client = io.connect(&addr).await.unwrap();
            // More than the socket buffers hold, so that both directions have to wait.
            let data: Vec<u8> = (0..4_000_000u32).map(|i| (i >> 3) as u8).collect();
            let sender = client.clone();
            let out = Memory::from_slice(&data);
            rt.spawn(async move {
                let mut parts = out.iovec().slice(0, 1_000);
                parts.push(out.share().slice(1_000, 3_999_000));
                sender.send_all(&parts).await.unwrap();
                sender.shutdown_write();
            });
            let back = Memory::zeroed(data.len());
            client.recv_exact(&back.iovec()).await.unwrap();
            assert_eq!(back.to_vec(), data);
            assert_eq!(client.recv(&back.iovec()).await.unwrap(), 0);
        }
    });
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_is_not() {
    on_both(async |_, io| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let addr = Addr::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let live = io.listen(&addr).await.unwrap();
        let e = io.listen(&addr).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Busy);
        drop(live);
        assert!(!path.exists(), "a listener removes its socket");

        std::fs::write(&path, b"a file").unwrap();
        let e = io.listen(&addr).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    });
}

#[test]
fn peers_that_are_not_there() {
    on_both(async |_, io| {
        let dir = tempfile::tempdir().unwrap();
        let e = io.connect(&Addr::Unix(dir.path().join("nobody"))).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound);
        let long = Addr::Unix(dir.path().join("x".repeat(200)));
        assert_eq!(io.connect(&long).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        // A port that was free a moment ago.
        let listener = io.listen(&Addr::Inet { host: "127.0.0.1".into(), port: 0 }).await.unwrap();
        let port = listener.port().unwrap();
        drop(listener);
        let e = io.connect(&Addr::Inet { host: "127.0.0.1".into(), port }).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Disconnected);
    });
}

/// Sending to a peer that has gone is an error and not a signal.
#[test]
fn a_vanished_peer() {
    on_both(async |_, io| {
        let dir = tempfile::tempdir().unwrap();
        let addr = Addr::Unix(dir.path().join("s"));
        let listener = io.listen(&addr).await.unwrap();
        let client = io.connect(&addr).await.unwrap();
        drop(listener.accept().await.unwrap());
        let data = Memory::zeroed(1 << 20);
        let e = client.send_all(&data.iovec()).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Disconnected);
    });
}

/// `shutdown` ends a `recv` that waits.
#[test]
fn shutdown_wakes_the_receiver() {
    on_both(async |rt, io| {
        let dir = tempfile::tempdir().unwrap();
        let addr = Addr::Unix(dir.path().join("s"));
        let listener = io.listen(&addr).await.unwrap();
        let client = io.connect(&addr).await.unwrap();
        let server = listener.accept().await.unwrap();
        let waiting = server.clone();
        let ended = std::rc::Rc::new(std::cell::Cell::new(false));
        let end = ended.clone();
        rt.spawn(async move {
            let buf = Memory::zeroed(1);
            assert_eq!(waiting.recv(&buf.iovec()).await.unwrap(), 0);
            end.set(true);
        });
        rt.yield_now().await;
        server.shutdown();
        while !ended.get() {
            rt.yield_now().await;
        }
        drop(client);
    });
}

/// The signals come to the task and do not end the process.
#[test]
fn signals() {
    on_both(async |rt, io| {
        let mut signals = io.signals().unwrap();
        let r = rt.clone();
        rt.spawn(async move {
            r.yield_now().await;
            // SAFETY: a plain call; it goes to this thread, which has the signal blocked.
            unsafe { libc::raise(libc::SIGHUP) };
        });
        assert_eq!(signals.next().await.unwrap(), dolmen_rt::Signal::Hangup);
    });
}
