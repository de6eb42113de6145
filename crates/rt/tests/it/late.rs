//! What a request held stays with its operation until the kernel is done, whoever still waits.

use std::future::Future;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dolmen_rt::{CoreIo, EngineKind, File, Guard, Hold, Memory, Rt, carry};

use crate::{on_both, temp_file};

/// Tells when it is let go.
struct Told(Option<Mutex<Sender<()>>>);

impl Told {
    fn new() -> (Told, Receiver<()>) {
        let (tx, rx) = channel();
        (Told(Some(Mutex::new(tx))), rx)
    }
}

impl Hold for Told {
    fn leave(&mut self) -> Guard {
        Arc::new(Told(self.0.take()))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(tx) = &self.0 {
            let _ = tx.lock().unwrap().send(());
        }
    }
}

/// A file that the kernel can't write to before somebody acts, and the action.
fn stuck(io: &CoreIo) -> (File, Box<dyn FnOnce()>) {
    match io.engine() {
        // A pipe that is full.
        EngineKind::IoUring => {
            let mut fds = [0; 2];
            // SAFETY: room for two descriptors.
            assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
            // SAFETY: fresh descriptors that nobody else owns.
            let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
            let mut write = std::fs::File::from(write);
            let mut read = std::fs::File::from(read);
            // SAFETY: a plain call; the answer is the size.
            let size = unsafe { libc::fcntl(fds[1], libc::F_GETPIPE_SZ) };
            std::io::Write::write_all(&mut write, &vec![0; size as usize]).unwrap();
            let drain = move || {
                std::io::Read::read_exact(&mut read, &mut vec![0; size as usize]).unwrap();
            };
            (write.into(), Box::new(drain))
        }
        // All threads of the file system's pool are busy.
        EngineKind::Threads => {
            let (tx, rx) = channel::<()>();
            let rx = Arc::new(Mutex::new(rx));
            let file = temp_file();
            for _ in 0..32 {
                let (io, rx, file) = (io.clone(), rx.clone(), file.clone());
                io.rt().spawn(async move {
                    // Ends when the other end is gone.
                    let _ = io.blocking(file.storage().waits_for(), move || rx.lock().unwrap().recv()).await;
                });
            }
            (file, Box::new(move || drop(tx)))
        }
    }
}

async fn give_up(rt: &Rt, request: impl Future<Output = ()>) {
    assert!(rt.timeout(Duration::from_millis(20), request).await.is_none());
}

async fn told(rt: &Rt, rx: &Receiver<()>) {
    while rx.try_recv().is_err() {
        rt.yield_now().await;
    }
}

/// The story: a write was "in flight" until its future was dropped, so a drain ended and a file was unlocked before the
/// write landed.
#[test]
fn a_write_that_was_given_up_keeps_what_its_request_held() {
    on_both(async |rt, io| {
        let (file, act) = stuck(&io);
        // The helpers reach the pool before the write.
        rt.yield_now().await;
        let (outer, outer_told) = Told::new();
        let (inner, inner_told) = Told::new();
        let data = Memory::from_slice(&[1; 100]);
        let iov = data.iovec();
        let write = carry(async { drop(io.write_at(&file, &iov, 0, false).await) }, inner);
        give_up(&rt, carry(write, outer)).await;
        assert!(outer_told.try_recv().is_err() && inner_told.try_recv().is_err());
        act();
        told(&rt, &outer_told).await;
        told(&rt, &inner_told).await;
    });
}

/// A task that a request has begun goes on without it, with what the request held.
#[test]
fn a_shielded_task_keeps_what_its_request_held() {
    on_both(async |rt, io| {
        let (file, act) = stuck(&io);
        rt.yield_now().await;
        let (held, is_told) = Told::new();
        let (io2, file2) = (io.clone(), file.clone());
        let task = async move {
            let data = Memory::from_slice(&[1; 100]);
            drop(io2.write_at(&file2, &data.iovec(), 0, false).await);
        };
        give_up(&rt, carry(rt.shielded(task), held)).await;
        assert!(is_told.try_recv().is_err());
        act();
        told(&rt, &is_told).await;
    });
}

/// Nobody sees what a read brings that was given up: nothing has to wait for it.
#[test]
fn a_read_that_was_given_up_keeps_nothing() {
    on_both(async |rt, io| {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: fresh descriptors that nobody else owns.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        let (held, is_told) = Told::new();
        // With threads it fails at once, as a pipe has no offsets.
        if io.engine() == EngineKind::IoUring {
            let file = File::from_fd(read);
            let to = Memory::zeroed(10);
            let iov = to.iovec();
            give_up(&rt, carry(async { drop(io.read_at(&file, &iov, 0).await) }, held)).await;
            assert!(is_told.try_recv().is_ok());
        }
        drop(write);
    });
}
