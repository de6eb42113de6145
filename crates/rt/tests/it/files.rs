use std::path::Path;

use dolmen_rt::{Cached, Config, Fallocate, IoVec, Memory, Seek, WaitsFor, block_on_with};
use dolmen_types::ErrorKind;

use crate::{engines, on_both, temp_file};

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

#[test]
fn what_was_written_is_read() {
    on_both(async |_, io| {
        let file = temp_file();
        let data = pattern(100_000);
        io.write_all_at(&file, &Memory::from_slice(&data).iovec(), 77, false).await.unwrap();
        io.write_all_at(&file, &Memory::from_slice(b"synced").iovec(), 0, true).await.unwrap();
        io.sync_data(&file).await.unwrap();
        io.sync_all(&file).await.unwrap();

        let mut back = Memory::zeroed(data.len());
        io.read_exact_at(&file, &back.iovec(), 77).await.unwrap();
        assert_eq!(back.bytes().expect("the operation has let go of its memory"), data);
        let mut head = Memory::zeroed(6);
        io.read_exact_at(&file, &head.iovec(), 0).await.unwrap();
        assert_eq!(head.bytes().unwrap(), b"synced");
    });
}

#[test]
fn vectors_of_many_parts() {
    on_both(async |_, io| {
        let file = temp_file();
        // More parts than one system call takes, and a long tail.
        let data = pattern(1500 * 3 + 5000);
        let whole = Memory::from_slice(&data);
        let mut parts = IoVec::new();
        for i in 0..1500 {
            parts.push(whole.share().slice(i * 3, 3));
        }
        parts.push(whole.share().slice(4500, 5000));
        io.write_all_at(&file, &parts, 1, false).await.unwrap();

        let back = Memory::zeroed(data.len());
        let mut into = IoVec::new();
        for i in 0..1500 {
            into.push(back.share().slice(i * 3, 3));
        }
        into.push(back.share().slice(4500, 5000));
        assert_eq!(io.read_full_at(&file, &into, 1).await.unwrap(), data.len());
        assert_eq!(back.to_vec(), data);
    });
}

#[test]
fn the_end_of_a_file() {
    on_both(async |_, io| {
        let file = temp_file();
        io.truncate(&file, 1000).await.unwrap();
        let buf = Memory::zeroed(600);
        assert_eq!(io.read_full_at(&file, &buf.iovec(), 700).await.unwrap(), 300);
        assert_eq!(io.read_full_at(&file, &buf.iovec(), 5000).await.unwrap(), 0);
        let e = io.read_exact_at(&file, &buf.iovec(), 700).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::OutOfBounds);
        assert_eq!(io.read_at(&file, &IoVec::new(), 0).await.unwrap(), 0);
        assert_eq!(io.write_at(&file, &IoVec::new(), 0, false).await.unwrap(), 0);
    });
}

#[test]
fn holes() {
    on_both(async |_, io| {
        let file = temp_file();
        const MIB: u64 = 1 << 20;
        io.write_all_at(&file, &Memory::from_slice(&vec![9; 3 << 20]).iovec(), 0, false).await.unwrap();
        io.fallocate(&file, Fallocate::PunchHole, MIB, MIB).await.unwrap();
        assert_eq!(io.seek(&file, Seek::Hole, 0).await.unwrap(), Some(MIB));
        assert_eq!(io.seek(&file, Seek::Data, MIB).await.unwrap(), Some(2 * MIB));
        assert_eq!(io.seek(&file, Seek::Hole, 2 * MIB).await.unwrap(), Some(3 * MIB));
        assert_eq!(io.seek(&file, Seek::Data, 3 * MIB).await.unwrap(), None);
        let buf = Memory::zeroed(4096);
        buf.share().fill(1);
        io.read_exact_at(&file, &buf.iovec(), MIB + 4096).await.unwrap();
        assert!(buf.iovec().is_zero());

        io.fallocate(&file, Fallocate::Allocate, 3 * MIB, MIB).await.unwrap();
        io.read_exact_at(&file, &buf.iovec(), 4 * MIB - 4096).await.unwrap();
        // Not every file system has this one.
        match io.fallocate(&file, Fallocate::ZeroRange, 0, MIB).await {
            Ok(()) => {
                buf.share().fill(1);
                io.read_exact_at(&file, &buf.iovec(), 0).await.unwrap();
                assert!(buf.iovec().is_zero());
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported),
        }
    });
}

#[test]
fn errors_keep_their_number() {
    on_both(async |_, io| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").unwrap();
        let file = dolmen_rt::File::from(std::fs::File::open(&path).unwrap());
        let e = io.write_all_at(&file, &Memory::from_slice(b"y").iovec(), 0, false).await.unwrap_err();
        assert_eq!(e.errno(), libc::EBADF);
        let e = io.fallocate(&file, Fallocate::PunchHole, 0, 1).await.unwrap_err();
        assert_eq!(e.errno(), libc::EBADF);
    });
}

#[test]
fn cached_reads_need_no_ring_and_starve_nobody() {
    on_both(async |rt, io| {
        let file = temp_file();
        io.write_all_at(&file, &Memory::from_slice(&pattern(65536)).iovec(), 0, false).await.unwrap();
        let before = io.counters();
        let ticks = std::rc::Rc::new(std::cell::Cell::new(0));
        let (t, r) = (ticks.clone(), rt.clone());
        rt.spawn(async move {
            loop {
                t.set(t.get() + 1);
                r.yield_now().await;
            }
        });
        let buf = Memory::zeroed(512);
        for i in 0..2000 {
            io.read_exact_at(&file, &buf.iovec(), i % 128 * 512).await.unwrap();
        }
        let did = io.counters() - before;
        // Not every file system answers such questions.
        if asks_the_cache(&file) {
            assert!(did.inline_reads > 1000, "{did:?}");
        }
        assert!(ticks.get() > 10, "the other task ran {} times", ticks.get());
    });
}

fn asks_the_cache(file: &dolmen_rt::File) -> bool {
    use std::os::fd::AsRawFd;
    let mut byte = 0u8;
    let v = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one byte at `byte`.
    unsafe { libc::preadv2(file.as_raw_fd(), &raw const v, 1, 0, libc::RWF_NOWAIT) == 1 }
}

#[test]
fn blocking_calls() {
    on_both(async |_, io| {
        let here = std::thread::current().id();
        let there = io.blocking(WaitsFor::Host, || std::thread::current().id()).await;
        assert_ne!(here, there);
    });
}

#[test]
fn work_for_the_processor_is_done_elsewhere() {
    on_both(async |rt, _| {
        let here = std::thread::current().id();
        assert_ne!(rt.compute(|| std::thread::current().id()).await, here);
        assert_eq!(rt.compute(|| 6 * 7).await, 42);
    });
}

/// The story: a tool that showed what an image says about itself started four threads for it, although nobody else was
/// there who could have been held up.
#[test]
fn a_tool_asks_at_once() {
    for engine in engines().into_iter().map(Some).chain([None]) {
        let config = engine.map_or(Config::default(), |e| Config::default().with_engine(e)).for_tool();
        block_on_with(&config, |rt| async move {
            let io = rt.io().expect("production");
            let here = std::thread::current().id();
            let at = io.blocking_at(Path::new("/"), || std::thread::current().id()).await;
            assert_eq!(at, here);
            let file = temp_file();
            assert_eq!(io.blocking_on(file.storage(), || std::thread::current().id()).await, here);
            assert_eq!(io.seek(&file, Seek::Data, 0).await.unwrap(), None);
            assert_eq!(io.counters().pool_jobs, 0, "a thread was started");
            // What waits for somebody still has a thread, and an engine that is set up when it is needed.
            assert_ne!(io.blocking(WaitsFor::Host, || std::thread::current().id()).await, here);
            io.write_all_at(&file, &Memory::from_slice(b"abc").iovec(), 0, false).await.unwrap();
            let memory = Memory::zeroed(3);
            io.read_exact_at(&file, &memory.iovec(), 0).await.unwrap();
            assert_eq!(memory.to_vec(), b"abc");
            assert!(engine.is_none_or(|e| e == io.engine()), "{}", io.engine_note());
            assert!(io.counters().submissions + io.counters().pool_jobs > 1);
        })
        .expect("the engine was there a moment ago");
    }
}

/// What the page cache has is read before there is a future; when enough was done at once, and where it has nothing, the
/// future does it.
#[test]
fn what_is_in_memory_is_there_at_once() {
    on_both(async |_, io| {
        let file = temp_file();
        io.write_all_at(&file, &Memory::from_slice(&[7; 100]).iovec(), 0, false).await.unwrap();
        let memory = Memory::zeroed(60);
        let to = memory.iovec();
        if !asks_the_cache(&file) {
            return;
        }
        // Never more in one turn than others can bear.
        let mut asked = 0;
        while io.read_cached(&file, &to, 0) != Cached::Later {
            assert_eq!(to.to_vec(), [7; 60]);
            to.fill(0);
            asked += 1;
            assert!(asked < 1000, "the others never had a turn");
        }
        assert!(asked > 0);
        assert_eq!(io.read_full_after(Cached::Later, &file, &to, 0).await.unwrap(), 60);
        assert_eq!(to.to_vec(), [7; 60]);
        // Beyond the end there is nothing that it could have.
        assert_eq!(io.read_cached(&file, &to, 50), Cached::No);
        assert_eq!(io.read_full_after(Cached::No, &file, &to, 50).await.unwrap(), 50);
    });
}

/// Everything at once, more than the submission queue holds.
#[test]
fn many_operations_in_flight() {
    on_both(async |rt, io| {
        const COUNT: u64 = 3000;
        let file = temp_file();
        let left = std::rc::Rc::new(std::cell::Cell::new(COUNT));
        for i in 0..COUNT {
            let (io, file, left) = (io.clone(), file.clone(), left.clone());
            rt.spawn(async move {
                let m = Memory::from_slice(&i.to_le_bytes());
                io.write_all_at(&file, &m.iovec(), i * 8, false).await.unwrap();
                left.set(left.get() - 1);
            });
        }
        while left.get() > 0 {
            rt.yield_now().await;
        }
        let all = Memory::zeroed(COUNT as usize * 8);
        io.read_exact_at(&file, &all.iovec(), 0).await.unwrap();
        for (i, word) in all.to_vec().chunks(8).enumerate() {
            assert_eq!(word, (i as u64).to_le_bytes());
        }
    });
}
