//! Naming another backing file in the header of an image that is in use.
//!
//! The invariant: at every instant the header on disk is the old one or the new one. A
//! header of up to a sector is one atomic write; to stay within a sector, the table of
//! feature names is given up (it only serves messages). What does not fit even so, a very
//! long name, is written behind the first sector before the sector that points to it.

use dolmen_graph::BackingName;
use dolmen_types::{BlkEvent, Error, ErrorKind, Result};

use super::driver::Core;
use super::header::{EXT_FEATURE_NAMES, Header};
use super::image::Env;
use super::round::Patch;

const SECTOR: usize = 512;

impl Core {
    /// Writes out what is in memory, then the header with another backing file.
    pub(super) async fn set_backing(&self, env: Env<'_>, to: Option<BackingName<'_>>) -> Result<()> {
        if !self.writable() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the image was opened read-only, so its header stays",
            )
            .remedy("open it with read-only=off"));
        }
        self.meta().check_usable()?;
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
        let mut header = self.meta().header.clone();
        header.clear_unknown();
        header.set_backing(to.map(|t| t.name), to.and_then(|t| t.format))?;
        let mut bytes = used(&header);
        if bytes.as_ref().map_or(true, |b| b.len() > SECTOR) {
            header.extensions.retain(|e| e.id != EXT_FEATURE_NAMES);
            bytes = used(&header);
        }
        let mut bytes = bytes?;
        // Nobody else writes the header while the turn is held, so both parts agree.
        if bytes.len() > SECTOR {
            let rest = bytes.split_off(SECTOR);
            self.write_header(env, Patch { at: SECTOR as u64, bytes: rest, event: BlkEvent::None }).await?;
        }
        self.write_header(env, Patch { at: 0, bytes: bytes.clone(), event: BlkEvent::None }).await?;
        let mut m = self.meta();
        m.header.autoclear = header.autoclear;
        m.header.backing_file = header.backing_file;
        m.header.extensions = header.extensions;
        m.sector.copy_from_slice(&bytes);
        drop(m);
        drop(turn);
        Ok(())
    }
}

/// The header as bytes, whole sectors up to the last that is not empty.
fn used(header: &Header) -> Result<Vec<u8>> {
    let mut bytes = header.encode()?;
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    bytes.truncate(end.next_multiple_of(SECTOR));
    Ok(bytes)
}
