//! Naming another backing file in the header of an image that is in use.
//!
//! The invariant: at every instant the header on disk is the old one or the new one (see
//! the module `replace`).

use dolmen_graph::BackingName;
use dolmen_types::{BlkEvent, Error, ErrorKind, Result};

use super::driver::Core;
use super::header::Header;
use super::image::{Env, read_bytes};
use super::replace::Replacement;
use super::round::Patch;

impl Core {
    /// Writes out what is in memory, then the header with another backing file.
    pub(super) async fn set_backing(&self, env: Env<'_>, to: Option<BackingName<'_>>) -> Result<()> {
        // Before anything is written.
        self.header_naming(env, to).await?;
        let turn = loop {
            self.round(env).await?;
            let turn = self.turn().await;
            let m = self.meta();
            // Tables that have moved since must not be named before they are on disk.
            if !m.header_dirty && !m.reftable_moved {
                drop(m);
                break turn;
            }
            drop(m);
            drop(turn);
        };
        let (header, Replacement { ahead, sector }) = self.header_naming(env, to).await?;
        // Nobody else writes the header while the turn is held. Each write is flushed.
        if let Some((at, bytes)) = ahead {
            self.write_header(env, Patch { at, bytes, event: BlkEvent::None }).await?;
        }
        self.write_header(env, Patch { at: 0, bytes: sector.to_vec(), event: BlkEvent::None }).await?;
        let mut m = self.meta();
        m.header.autoclear = header.autoclear;
        m.header.backing_file = header.backing_file;
        m.header.extensions = header.extensions;
        m.sector = sector;
        drop(m);
        drop(turn);
        Ok(())
    }

    /// The header with another backing file, and how it takes the place of the one that is there, unless something can
    /// be said against it.
    pub(super) async fn header_naming(
        &self,
        env: Env<'_>,
        to: Option<BackingName<'_>>,
    ) -> Result<(Header, Replacement)> {
        if !self.writable() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the image was opened read-only, so its header stays",
            )
            .remedy("open it with read-only=off"));
        }
        let mut header = {
            let m = self.meta();
            m.check_usable()?;
            m.header.clone()
        };
        header.clear_unknown();
        header.set_backing(to.map(|t| t.name), to.and_then(|t| t.format))?;
        let mut old = vec![0; header.geometry().cluster_len()];
        read_bytes(env.file.read()?, 0, &mut old).await?;
        let replacement = header.replace(&old)?;
        Ok((header, replacement))
    }
}
