//! Making a new file.

use std::path::PathBuf;

use dolmen_graph::option::{Size, Text, Word};
use dolmen_graph::{BackingName, CreateCx, Creation, Prealloc};
use dolmen_rt::sys::{self, OpenHow};
use dolmen_rt::{CoreIo, File, LocalFuture};
use dolmen_types::{OptionSpec, Options, Result, ResultExt, os_name};

use super::driver::grow;
use super::shared::{no_files, plain};

dolmen_graph::options! {
    struct NewFileOptions {
        required "filename" filename: Text => "path of the new file";
        default "size" size: Size = "0" => "virtual size in bytes";
        default "preallocation" preallocation: Word<Space> = "off" => "space for the file";
    }
}

/// The rows.
pub(super) const CREATE_OPTIONS: &[OptionSpec] = NewFileOptions::ROWS;

dolmen_graph::words! {
    enum Space { Off = "off", Falloc = "falloc", Full = "full" }
}

/// A file to be made. One that is there already is opened and emptied like any other node instead, so that nobody who
/// uses it is robbed of its content.
struct NewFile {
    filename: String,
    size: u64,
    prealloc: Prealloc,
}

pub(super) fn create(mut options: Options) -> Result<Box<dyn Creation>> {
    let NewFileOptions { filename, size, preallocation } = NewFileOptions::take(&mut options)?;
    let prealloc = match preallocation {
        Space::Off => Prealloc::Off,
        Space::Falloc => Prealloc::Falloc,
        Space::Full => Prealloc::Full,
    };
    options.finish("driver 'file'")?;
    Ok(Box::new(NewFile { filename: plain(filename), size, prealloc }))
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
