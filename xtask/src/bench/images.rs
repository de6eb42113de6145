//! The images that are read: filled with data that nothing can take for zeroes, made by
//! the installed tools, the same files for both sides.

use std::cell::OnceCell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use super::Result;
use super::process::Line;

/// Images in a directory, made when first asked for and removed at the end.
pub(super) struct Images {
    dir: tempfile::TempDir,
    size: u64,
    raw: OnceCell<PathBuf>,
    qcow2: OnceCell<PathBuf>,
    overlay: OnceCell<PathBuf>,
}

impl Images {
    /// Images of `size` bytes (a multiple of 1 MiB) in a new directory below `parent`.
    pub(super) fn new(parent: PathBuf, size: u64) -> Result<Images> {
        fs::create_dir_all(&parent)?;
        let dir = tempfile::Builder::new().prefix("images-").tempdir_in(fs::canonicalize(parent)?)?;
        Ok(Images { dir, size, raw: OnceCell::new(), qcow2: OnceCell::new(), overlay: OnceCell::new() })
    }

    /// Size of each image in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// A place for sockets and the like.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw image, written in full.
    pub(super) fn raw(&self) -> Result<String> {
        once(&self.raw, || {
            let path = self.path("data.raw");
            let mut file = fs::File::create(&path)?;
            let mut x = 0x2545_f491_4f6c_dd1d_u64;
            let mut block = vec![0u8; 1 << 20];
            for _ in 0..self.size >> 20 {
                for word in block.chunks_exact_mut(8) {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    word.copy_from_slice(&x.to_le_bytes());
                }
                file.write_all(&block)?;
            }
            file.sync_all()?;
            Ok(path)
        })
    }

    /// The same data in a qcow2 image with default options.
    pub(super) fn qcow2(&self) -> Result<String> {
        let raw = self.raw()?;
        once(&self.qcow2, || {
            let path = self.path("data.qcow2");
            Line::new("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &raw, &path.to_string_lossy()])
                .run()?;
            fs::File::open(&path)?.sync_all()?;
            Ok(path)
        })
    }

    /// An empty overlay over a small qcow2 base.
    pub(super) fn overlay(&self) -> Result<String> {
        once(&self.overlay, || {
            let (base, path) = (self.path("base.qcow2"), self.path("overlay.qcow2"));
            let name = path.to_string_lossy();
            Line::new("qemu-img", ["create", "-q", "-f", "qcow2", &base.to_string_lossy(), "1G"]).run()?;
            let backing = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &name];
            Line::new("qemu-img", backing).run()?;
            Ok(path)
        })
    }

    /// Brings a file into the page cache.
    pub(super) fn warm(&self, path: &str) -> Result<()> {
        let mut file = fs::File::open(path)?;
        let mut block = vec![0u8; 1 << 20];
        while file.read(&mut block)? > 0 {}
        Ok(())
    }
}

fn once(cell: &OnceCell<PathBuf>, make: impl FnOnce() -> Result<PathBuf>) -> Result<String> {
    let path = match cell.get() {
        Some(path) => path,
        None => {
            let made = make()?;
            cell.get_or_init(|| made)
        }
    };
    Ok(path.to_string_lossy().into_owned())
}
