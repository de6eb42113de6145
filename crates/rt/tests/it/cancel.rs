//! Futures that are dropped while the kernel works for them.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

use dolmen_rt::{Addr, Memory};

use crate::{on_both, temp_file};

/// Polls a future once.
async fn once<T>(f: impl Future<Output = T>) -> Option<T> {
    let mut f = pin!(f);
    std::future::poll_fn(|cx| {
        Poll::Ready(match f.as_mut().poll(cx) {
            Poll::Ready(v) => Some(v),
            Poll::Pending => None,
        })
    })
    .await
}

/// A write in flight whose future is gone still has its memory, and lands.
#[test]
fn a_dropped_write_keeps_its_memory() {
    on_both(async |rt, io| {
        let file = temp_file();
        let mut data = Memory::from_slice(&[0xa5; 8192]);
        let dropped = once(io.write_at(&file, &data.iovec(), 0, false)).await;
        assert!(dropped.is_none(), "a write does not complete at once");
        while data.bytes().is_none() {
            rt.yield_now().await;
        }
        let mut back = Memory::zeroed(8192);
        io.read_exact_at(&file, &back.iovec(), 0).await.unwrap();
        assert_eq!(back.bytes().unwrap(), [0xa5; 8192]);
    });
}

/// Memory that somebody else owns, which tells when it is let go.
struct Told(
    std::sync::mpsc::Sender<()>,
    #[expect(dead_code, reason = "the memory lives as long as this")] Box<[u8]>,
);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

/// The owner lets go as well: the memory lives until the kernel is done, then it is freed.
#[test]
fn memory_is_freed_by_the_completion() {
    on_both(async |rt, io| {
        let dir = tempfile::tempdir().unwrap();
        let addr = Addr::Unix(dir.path().join("s"));
        let listener = io.listen(&addr).await.unwrap();
        let client = io.connect(&addr).await.unwrap();
        let server = listener.accept().await.unwrap();

        let mut bytes = vec![0u8; 64].into_boxed_slice();
        let ptr = std::ptr::NonNull::new(bytes.as_mut_ptr()).unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        // SAFETY: `Told` keeps the bytes, and nobody borrows them.
        let foreign = unsafe { dolmen_rt::Buf::foreign(ptr, 64, Box::new(Told(tx, bytes))) };
        assert!(once(server.recv_buf(&foreign)).await.is_none());
        drop(foreign);
        assert!(rx.try_recv().is_err(), "the operation holds the memory");
        // Cancelled: the kernel gives the memory back without any data having come.
        while rx.try_recv().is_err() {
            rt.yield_now().await;
        }
        client.send_bytes(b"after").await.unwrap();
        let buf = Memory::zeroed(5);
        server.recv_exact(&buf.iovec()).await.unwrap();
        assert_eq!(buf.to_vec(), b"after");
    });
}

/// A cancelled accept loses no connection.
#[test]
fn a_dropped_accept_loses_nothing() {
    on_both(async |rt, io| {
        let dir = tempfile::tempdir().unwrap();
        let addr = Addr::Unix(dir.path().join("s"));
        let listener = io.listen(&addr).await.unwrap();
        assert!(once(listener.accept()).await.is_none());
        rt.yield_now().await;
        let client = io.connect(&addr).await.unwrap();
        let second = rt.timeout(std::time::Duration::from_secs(5), listener.accept()).await;
        match second {
            Some(server) => {
                client.send_bytes(b"hi").await.unwrap();
                let buf = Memory::zeroed(2);
                server.unwrap().recv_exact(&buf.iovec()).await.unwrap();
            }
            None => panic!("the connection went to an accept that nobody waits for"),
        }
    });
}

/// The runtime ends while operations are in flight: it waits for them.
#[test]
fn the_end_waits_for_the_kernel() {
    on_both(async |rt, io| {
        let file = temp_file();
        for i in 0..50 {
            let (io, file) = (io.clone(), file.clone());
            rt.spawn(async move {
                let m = Memory::from_slice(&[7; 65536]);
                io.write_all_at(&file, &m.iovec(), i * 65536, true).await.unwrap();
            });
        }
        let dir = tempfile::tempdir().unwrap();
        let listener = io.listen(&Addr::Unix(dir.path().join("s"))).await.unwrap();
        rt.spawn(async move {
            let _ = listener.accept().await;
        });
        rt.yield_now().await;
    });
}
