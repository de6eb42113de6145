//! Making a new file.

use std::path::Path;
use std::sync::Arc;

use dolmen_graph::{CreateCx, Prealloc};
use dolmen_rt::sys::{self, FileKind, OpenHow};
use dolmen_rt::{File, Guard, Hold, LocalFuture, carry};
use dolmen_types::{Actions, Options, Result, ResultExt};

use super::driver::grow;
use super::lock::{Locks, Stance};
use super::options::{check_kind, no_files, plain};

/// Letting go of the locks lets others in.
struct Held(Arc<Locks>);

impl Hold for Held {
    fn leave(&mut self) -> Guard {
        self.0.clone()
    }
}

/// Makes the file, or empties an existing one. It is locked before it is truncated: an image that somebody uses stays
/// whole.
pub(super) fn create<'a>(cx: CreateCx<'a>, mut options: Options) -> LocalFuture<'a, Result<()>> {
    Box::pin(async move {
        let filename = plain(options.require_str("filename")?);
        let size = options.take_size("size")?.unwrap_or(0);
        let prealloc = match options.take_enum("preallocation", &["off", "falloc", "full"])? {
            None | Some("off") => Prealloc::Off,
            Some("falloc") => Prealloc::Falloc,
            Some(_) => Prealloc::Full,
        };
        options.finish("driver 'file'")?;
        let context = || format!("Could not create '{filename}'");
        let io = cx.rt.io().ok_or_else(no_files)?;
        let path = filename.clone();
        let (file, facts) = io
            .blocking(move || {
                let fd = sys::open(Path::new(&path), OpenHow { write: true, direct: false, create: true })?;
                let facts = sys::facts(&fd)?;
                check_kind(FileKind::Regular, facts.kind)?;
                Ok((File::from_fd(fd), facts))
            })
            .await
            .map_err(|e: dolmen_types::Error| e.context(context()))?;
        let can_lock = sys::byte_is_locked(&file, super::lock::FIRST_NEED).is_ok();
        let locks = Arc::new(Locks::new(file.clone(), facts.id, filename.clone(), can_lock));
        let stance = Stance { needs: Actions::V | Actions::S, denies: Actions::S };
        let held = locks.prepare(cx.rt, &filename, stance).await.context(context)?;
        held.commit();
        let write = async {
            io.truncate(&file, 0).await?;
            grow(io, &file, 0, size, prealloc).await
        };
        // Locked as long as the kernel works on it, also if nobody waits any more.
        carry(write, Held(locks)).await.context(context)
    })
}
