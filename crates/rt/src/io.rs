//! Files of one core. Sockets are in [`crate::net`], signals in [`crate::signal`].
//!
//! Every operation is a future that holds the file and the memory until the kernel is done, whatever happens to
//! the future. Lengths and offsets are bytes without any alignment, except on files opened with `O_DIRECT`.

use std::fmt;
use std::path::Path;
use std::rc::Rc;

use dolmen_types::{Error, ErrorKind};

use crate::core::{Core, Submit};
use crate::op::{Op, Vecs};
use crate::stats::bump;
use crate::sys::{Storage, Walk};
use crate::workers::WaitsFor;
use crate::{Counters, EngineKind, File, IoVec, Result, Rt};

/// Files and sockets of one core. Cheap to clone, not `Send`.
#[derive(Clone)]
pub struct CoreIo {
    core: Rc<Core>,
}

/// What [`CoreIo::fallocate`] does to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Reserves space; bytes that exist keep their value. The file grows when the range ends behind it.
    Allocate,
    /// The range reads as zeroes and stays allocated. The file does not grow.
    ZeroRange,
    /// The range reads as zeroes and its space is given back. The file does not grow.
    PunchHole,
}

/// What [`CoreIo::seek`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is data.
    Data,
    /// The next byte in a hole; the end of the file counts as one.
    Hole,
    /// The end of the file, the given offset behind it.
    End,
}

/// What came of asking the page cache for what a read wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// It had all of it, and the read is done.
    All,
    /// It did not; or was not asked, because that rarely pays for this file.
    No,
    /// It was not asked: enough was done at once, and others have a turn first.
    Later,
}

impl CoreIo {
    pub(crate) fn new(core: Rc<Core>) -> CoreIo {
        CoreIo { core }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.core
    }

    pub(crate) async fn submit(&self, op: Op) -> Result<u64> {
        check(Submit::new(&self.core, op).await)
    }

    /// Which engine runs.
    pub fn engine(&self) -> EngineKind {
        self.core.engine_kind()
    }

    /// The same with the reason, for users: "threads (io_uring is not available: Operation not permitted)".
    pub fn engine_note(&self) -> &str {
        self.core.engine_note()
    }

    /// What this core has done so far.
    pub fn counters(&self) -> Counters {
        self.core.stats.read()
    }

    /// Adds to [`Counters::bytes_copied`]: for drivers that bounce.
    pub fn note_copied(&self, bytes: usize) {
        let cell = &self.core.stats.bytes_copied;
        cell.set(cell.get() + bytes as u64);
    }

    /// This core, for other threads.
    pub fn handle(&self) -> crate::CoreHandle {
        crate::CoreHandle::new(self.core.shared.clone())
    }

    /// A runtime handle of this core.
    pub fn rt(&self) -> Rt {
        crate::executor::handle(&self.core)
    }

    /// Runs something that may block on a thread for such calls and waits for its result. A panic there comes out here. Dropping the
    /// future does not stop it. It holds up only what waits for the same.
    pub async fn blocking<T: Send + 'static>(
        &self,
        what: WaitsFor,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let slot = std::sync::Arc::new(std::sync::Mutex::new(None));
        let out = slot.clone();
        let call = move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            *out.lock().unwrap_or_else(|e| e.into_inner()) = Some(result);
            0
        };
        Submit::new(&self.core, Op::Call(what, Box::new(call))).await;
        let result = slot.lock().unwrap_or_else(|e| e.into_inner()).take();
        match result {
            Some(Ok(value)) => value,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => unreachable!("the call has been made"),
        }
    }

    /// Runs work for the processor on a thread for such work, of which there are as many as processors. A panic there
    /// comes out here. A tool does one thing only, and does it at once.
    pub(crate) async fn compute<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        if self.core.is_tool() {
            return f();
        }
        self.blocking(WaitsFor::Processor, f).await
    }

    /// [`CoreIo::blocking`] for what a file system of this host knows about an open file without asking anybody (its status, its
    /// locks): done at once there.
    pub async fn blocking_on<T: Send + 'static>(
        &self,
        storage: Storage,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if !storage.is_remote() {
            return f();
        }
        self.blocking(storage.waits_for(), f).await
    }

    /// The same for something about the file that a name leads to, over whatever links. A file system that does not answer
    /// on the way there holds up nobody who does not go that way.
    pub async fn blocking_at<T: Send + 'static>(
        &self,
        name: &Path,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if self.core.is_tool() {
            return f();
        }
        let name = name.to_owned();
        let (mut walk, mut f) = (self.blocking(WaitsFor::Host, move || Walk::new(&name)).await, f);
        loop {
            let at = WaitsFor::Device(walk.device());
            let go_on = move || if walk.go_on() { Ok(f()) } else { Err((walk, f)) };
            (walk, f) = match self.blocking(at, go_on).await {
                Ok(value) => return value,
                Err(further) => further,
            };
        }
    }

    /// Reads at an offset. Returns how many bytes there were; fewer than asked for at the end of the file, and for other
    /// reasons of the kernel's: see [`CoreIo::read_full_at`].
    ///
    /// # Errors
    /// The system's.
    pub async fn read_at(&self, file: &File, iov: &IoVec, offset: u64) -> Result<usize> {
        self.read_after(self.read_cached(file, iov, offset), file, iov, offset).await
    }

    async fn read_after(&self, cached: Cached, file: &File, iov: &IoVec, offset: u64) -> Result<usize> {
        let done = match cached {
            Cached::All => true,
            Cached::No => false,
            Cached::Later => {
                self.turn_of_others().await;
                self.ask_cache(file, iov, offset)
            }
        };
        if done {
            return Ok(iov.len());
        }
        let op = Op::Read { file: file.clone(), iov: iov.clone(), offset };
        Ok(self.submit(op).await? as usize)
    }

    /// Reads what the page cache has, if it has all of it. Never waits.
    pub fn read_cached(&self, file: &File, iov: &IoVec, offset: u64) -> Cached {
        if iov.is_empty() {
            return Cached::All;
        }
        if !file.try_cache() {
            return Cached::No;
        }
        if !self.core.take_inline() {
            return Cached::Later;
        }
        if self.ask_cache(file, iov, offset) { Cached::All } else { Cached::No }
    }

    async fn turn_of_others(&self) {
        crate::executor::yield_now().await;
        self.core.take_inline();
    }

    fn ask_cache(&self, file: &File, iov: &IoVec, offset: u64) -> bool {
        let stats = &self.core.stats;
        let call = |v: *const libc::iovec, n: i32| {
            // SAFETY: the iovecs point into memory that `iov` keeps alive during the call.
            crate::op::retry(|| unsafe {
                libc::preadv2(file.raw(), v, n, offset as i64, libc::RWF_NOWAIT) as i64
            })
        };
        let n = match iov.segments() {
            [one] => {
                let v = libc::iovec { iov_base: one.as_ptr().cast(), iov_len: one.len() };
                call(&raw const v, 1)
            }
            _ => {
                let v = Vecs::new(iov);
                call(v.as_ptr(), v.count())
            }
        };
        if n == iov.len() as i64 {
            bump(&stats.inline_reads);
            file.cache_hit();
            return true;
        }
        bump(&stats.inline_misses);
        if n == -i64::from(libc::EOPNOTSUPP) || n == -i64::from(libc::EINVAL) {
            file.cache_never();
        } else {
            file.cache_miss();
        }
        // A part that the cache had is read again: rare, and simpler than two operations.
        false
    }

    /// Reads until the buffers are full or the file ends. Returns how many bytes there were.
    ///
    /// # Errors
    /// The system's.
    pub async fn read_full_at(&self, file: &File, iov: &IoVec, offset: u64) -> Result<usize> {
        self.read_full_after(self.read_cached(file, iov, offset), file, iov, offset).await
    }

    /// The same after [`CoreIo::read_cached`] has said `cached` for it.
    ///
    /// # Errors
    /// The system's.
    pub async fn read_full_after(
        &self,
        cached: Cached,
        file: &File,
        iov: &IoVec,
        offset: u64,
    ) -> Result<usize> {
        let mut done = self.read_after(cached, file, iov, offset).await?;
        if done == 0 {
            return Ok(0);
        }
        while done < iov.len() {
            match self.read_at(file, &iov.slice(done, iov.len() - done), offset + done as u64).await? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// Reads until the buffers are full.
    ///
    /// # Errors
    /// `OutOfBounds` when the file ends before; else the system's.
    pub async fn read_exact_at(&self, file: &File, iov: &IoVec, offset: u64) -> Result<()> {
        let n = self.read_full_at(file, iov, offset).await?;
        if n < iov.len() {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "the file ends at {}, but {} bytes at {offset} were asked for",
                    offset + n as u64,
                    iov.len()
                ),
            ));
        }
        Ok(())
    }

    /// Writes at an offset. Returns how many bytes were written: see [`CoreIo::write_all_at`]. With `dsync` they are durable
    /// (as after [`CoreIo::sync_data`]) when the future completes.
    ///
    /// # Errors
    /// The system's.
    pub async fn write_at(&self, file: &File, iov: &IoVec, offset: u64, dsync: bool) -> Result<usize> {
        if iov.is_empty() {
            return Ok(0);
        }
        let op = Op::Write { file: file.clone(), iov: iov.clone(), offset, dsync };
        Ok(self.submit(op).await? as usize)
    }

    /// Writes all bytes. After an error, or when the future was dropped, an unknown part of them is written.
    ///
    /// # Errors
    /// The system's.
    pub async fn write_all_at(&self, file: &File, iov: &IoVec, offset: u64, dsync: bool) -> Result<()> {
        let mut done = self.write_at(file, iov, offset, dsync).await?;
        while done < iov.len() {
            let n =
                self.write_at(file, &iov.slice(done, iov.len() - done), offset + done as u64, dsync).await?;
            if n == 0 {
                return Err(Error::new(ErrorKind::NoSpace, "the file accepts no more bytes"));
            }
            done += n;
        }
        Ok(())
    }

    /// Makes all data durable that were written and acknowledged before, and the metadata needed to read them
    /// (fdatasync).
    ///
    /// # Errors
    /// The system's. After an error, what was written before is in an unknown state.
    pub async fn sync_data(&self, file: &File) -> Result<()> {
        self.submit(Op::Sync { file: file.clone(), data_only: true }).await.map(drop)
    }

    /// The same with all metadata (fsync).
    ///
    /// # Errors
    /// As for [`CoreIo::sync_data`].
    pub async fn sync_all(&self, file: &File) -> Result<()> {
        self.submit(Op::Sync { file: file.clone(), data_only: false }).await.map(drop)
    }

    /// Allocates, zeroes or frees a range.
    ///
    /// # Errors
    /// `Unsupported` when the file system can't; else the system's.
    pub async fn fallocate(&self, file: &File, what: Fallocate, offset: u64, len: u64) -> Result<()> {
        let mode = match what {
            Fallocate::Allocate => 0,
            Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        };
        if len == 0 {
            return Ok(());
        }
        self.submit(Op::Fallocate { file: file.clone(), mode, offset, len }).await.map(drop)
    }

    /// Sets the length; new bytes read as zeroes.
    ///
    /// # Errors
    /// The system's.
    pub async fn truncate(&self, file: &File, len: u64) -> Result<()> {
        self.submit(Op::Truncate { file: file.clone(), len }).await.map(drop)
    }

    /// The first position at or after `offset` that is data or in a hole; `None` when there is none before the end. Except
    /// in tools it runs on the thread pool: it costs a thread switch, so remember what it says.
    ///
    /// # Errors
    /// `Unsupported` when the file system can't tell; else the system's.
    pub async fn seek(&self, file: &File, what: Seek, offset: u64) -> Result<Option<u64>> {
        let whence = match what {
            Seek::Data => libc::SEEK_DATA,
            Seek::Hole => libc::SEEK_HOLE,
            Seek::End => libc::SEEK_END,
        };
        let f = file.clone();
        let call = move || {
            // SAFETY: a plain call. The file position that it sets is used by nobody.
            crate::op::retry(|| unsafe { libc::lseek(f.raw(), offset as i64, whence) })
        };
        let n = if self.core.is_tool() && !file.storage().is_remote() {
            if !self.core.take_inline() {
                self.turn_of_others().await;
            }
            call()
        } else {
            Submit::new(&self.core, Op::Call(file.storage().waits_for(), Box::new(call))).await
        };
        if n == -i64::from(libc::ENXIO) {
            return Ok(None);
        }
        if n == -i64::from(libc::EINVAL) {
            return Err(Error::from_errno(libc::EOPNOTSUPP, "the file system does not tell data from holes"));
        }
        check(n).map(Some)
    }
}

fn check(result: i64) -> Result<u64> {
    u64::try_from(result).map_err(|_| Error::from(std::io::Error::from_raw_os_error(-result as i32)))
}

impl fmt::Debug for CoreIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CoreIo({})", self.engine())
    }
}
