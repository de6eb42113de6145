//! A file system that can die: a few files in memory, served through `/dev/fuse` until [`Mount::die`].
//!
//! From then on nothing is answered, as by a network file system whose server is gone. Whoever asks for anything there
//! hangs in the kernel; nothing of it may hold up who has to do with other storage.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// Operations of the protocol that are answered; see linux/fuse.h.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
/// These want no answer.
const SILENT: [u32; 3] = [2, 36, 42];

const ROOT: u64 = 1;

struct Files {
    /// Their numbers come after the root's.
    files: Mutex<Vec<(String, Vec<u8>)>>,
    dead: AtomicBool,
}

/// It is mounted while this lives.
pub(crate) struct Mount {
    pub(crate) at: PathBuf,
    files: Arc<Files>,
    /// Ends when this is gone.
    _alive: Sender<()>,
    _server: JoinHandle<()>,
    _dir: TempDir,
}

impl Mount {
    /// `None` where that is not permitted.
    pub(crate) fn new(files: &[(&str, Vec<u8>)]) -> Option<Mount> {
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).expect("a mount point");
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let mounted = device.and_then(|f| {
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", f.as_raw_fd());
            let options = std::ffi::CString::new(options).expect("no NUL");
            mount("dolmen-test", &at, "fuse", MountFlags::empty(), Some(options.as_c_str()))?;
            Ok(f)
        });
        let device = match mounted {
            Ok(f) => f,
            Err(e) => {
                eprintln!("FUSE may not be mounted here ({e}): not tested");
                return None;
            }
        };
        let files = Arc::new(Files {
            files: Mutex::new(files.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect()),
            dead: AtomicBool::new(false),
        });
        let serving = files.clone();
        let (alive, end) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            serving.serve(&device);
            // The device stays open: closing it would answer everybody.
            let _ = end.recv();
        });
        let mount = Mount { at, files, _alive: alive, _server: server, _dir: dir };
        // From its first close on the kernel knows that nothing is to be told then. Otherwise a process that ends would wait in
        // the kernel until it was, with a signal pending or not.
        if let Some(first) = mount.files.first() {
            drop(File::open(mount.path(&first)).expect("opened"));
        }
        Some(mount)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Nothing is answered from here on. Requests are not even taken, as by a server that was stopped: those that were
    /// taken can't be given up, and whoever waits for them can't be killed.
    pub(crate) fn die(&self) {
        self.files.dead.store(true, SeqCst);
        // The last one that is answered: it wakes the server.
        let _ = std::fs::metadata(self.path("nothing"));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // By force: whoever still hangs there gets an error.
        let gone = unmount(&self.at, UnmountFlags::FORCE | UnmountFlags::DETACH);
        assert!(gone.is_ok(), "{} is still mounted", self.at.display());
    }
}

fn word(b: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn long(b: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

impl Files {
    fn first(&self) -> Option<String> {
        self.files.lock().expect("not poisoned").first().map(|f| f.0.clone())
    }

    fn serve(&self, mut device: &File) {
        let mut buffer = vec![0; 1 << 18];
        while !self.dead.load(SeqCst) {
            // It fails when the file system is unmounted.
            let Ok(n) = device.read(&mut buffer) else { return };
            let request = &buffer[..n];
            let (opcode, unique, node) = (word(request, 4), long(request, 8), long(request, 16));
            if SILENT.contains(&opcode) {
                continue;
            }
            let (error, body) = match self.answer(opcode, node, &request[40..]) {
                Ok(body) => (0, body),
                Err(errno) => (-errno, Vec::new()),
            };
            let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
            reply.extend(error.to_ne_bytes());
            reply.extend(unique.to_ne_bytes());
            reply.extend(body);
            // The request may have been given up.
            let _ = device.write(&reply);
        }
    }

    fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut files = self.files.lock().expect("not poisoned");
        let index = (node.wrapping_sub(ROOT + 1)) as usize;
        match opcode {
            INIT => {
                let mut out = vec![0; 64];
                out[..4].copy_from_slice(&7u32.to_ne_bytes());
                out[4..8].copy_from_slice(&31u32.to_ne_bytes());
                out[20..24].copy_from_slice(&(1u32 << 17).to_ne_bytes());
                Ok(out)
            }
            LOOKUP => {
                let name = String::from_utf8_lossy(&body[..body.len() - 1]).into_owned();
                let i = files.iter().position(|f| f.0 == name).ok_or(ENOENT)?;
                let node = ROOT + 1 + i as u64;
                // Nothing is valid for any time, so that everything is asked again.
                let mut out = node.to_ne_bytes().to_vec();
                out.resize(40, 0);
                out.extend(attributes(node, files[i].1.len() as u64));
                Ok(out)
            }
            GETATTR | SETATTR => {
                if opcode == SETATTR && word(body, 0) & 8 != 0 {
                    files.get_mut(index).ok_or(ENOENT)?.1.resize(long(body, 16) as usize, 0);
                }
                let size = files.get(index).map_or(0, |f| f.1.len() as u64);
                Ok([vec![0; 16], attributes(node, size)].concat())
            }
            OPEN | OPENDIR => Ok(vec![0; 16]),
            RELEASE | RELEASEDIR | FSYNC => Ok(Vec::new()),
            STATFS => Ok(vec![0; 80]),
            READ => {
                let content = &files.get(index).ok_or(ENOENT)?.1;
                let from = (long(body, 8) as usize).min(content.len());
                let to = (from + word(body, 16) as usize).min(content.len());
                Ok(content[from..to].to_vec())
            }
            WRITE => {
                let (from, len) = (long(body, 8) as usize, word(body, 16) as usize);
                let content = &mut files.get_mut(index).ok_or(ENOENT)?.1;
                content.resize(content.len().max(from + len), 0);
                content[from..from + len].copy_from_slice(&body[40..40 + len]);
                Ok([(len as u32).to_ne_bytes(), [0; 4]].concat())
            }
            _ => Err(ENOSYS),
        }
    }
}

fn attributes(node: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for n in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend(n.to_ne_bytes());
    }
    let mode = if node == ROOT { 0o040_755 } else { 0o100_644u32 };
    for n in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(n.to_ne_bytes());
    }
    out
}
