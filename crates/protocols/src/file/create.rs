//! Making a new file.

use std::path::PathBuf;

use dolmen_graph::{BackingName, CreateCx, Creation, Prealloc};
use dolmen_rt::sys::{self, OpenHow};
use dolmen_rt::{CoreIo, File, LocalFuture};
use dolmen_types::{Options, Result, ResultExt, os_name};

use super::driver::grow;
use super::shared::{no_files, plain};

/// A file to be made. One that is there already is opened and emptied like any other node instead, so that nobody who
/// uses it is robbed of its content.
struct NewFile {
    filename: String,
    size: u64,
    prealloc: Prealloc,
}

pub(super) fn create(mut options: Options) -> Result<Box<dyn Creation>> {
    let filename = plain(options.require_str("filename")?);
    let size = options.take_size("size")?.unwrap_or(0);
    let prealloc = match options.take_enum("preallocation", &["off", "falloc", "full"])? {
        None | Some("off") => Prealloc::Off,
        Some("falloc") => Prealloc::Falloc,
        Some(_) => Prealloc::Full,
    };
    options.finish("driver 'file'")?;
    Ok(Box::new(NewFile { filename, size, prealloc }))
}

impl Creation for NewFile {
    fn room(&self) -> u64 {
        self.size
    }

    fn space(&self) -> u64 {
        if self.prealloc == Prealloc::Off { 0 } else { self.size }
    }

    fn backing(&self) -> Option<BackingName<'_>> {
        None
    }

    fn make<'a>(&'a self, cx: CreateCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let io = cx.rt.io().ok_or_else(no_files)?;
            if cx.file.is_some() {
                return cx.resize()?.resize(self.size, self.prealloc).await;
            }
            self.make(io).await.context(|| format!("Could not create '{}'", self.filename))
        })
    }
}

impl NewFile {
    async fn make(&self, io: &CoreIo) -> Result<()> {
        let path = PathBuf::from(os_name(&self.filename));
        let name = path.clone();
        let open = move || {
            let how = OpenHow { write: true, direct: false, create: true };
            sys::open(&name, how).map(File::from_fd)
        };
        let file = io.blocking_at(&path, open).await?;
        let grown = grow(io, &file, 0, self.size, self.prealloc).await;
        if grown.is_err() {
            // A moment ago it was not there.
            io.blocking_at(&path.clone(), move || drop(std::fs::remove_file(path))).await;
        }
        grown
    }
}
