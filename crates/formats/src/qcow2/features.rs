//! Autoclear features: what must not be trusted any more once the image has changed and Dolmen has not kept it up.
//!
//! Dolmen keeps up none of them. Bitmaps describe the guest's data, so they stay valid as long as only the header
//! changes (another backing file); what other bits stand for is not known, so they go with the first write of the
//! header. The invariant: the bits are clear on disk before the first change of guest data reaches the file.

use std::sync::atomic::Ordering::SeqCst;

use dolmen_graph::Notice;
use dolmen_types::{BlkEvent, Result};

use super::driver::Core;
use super::header::{AUTOCLEAR_BITMAPS, EXT_BITMAPS, Header};
use super::image::Env;

impl Header {
    /// Clears the bits of features that Dolmen does not know: what every write of the header does.
    pub(super) fn clear_unknown(&mut self) {
        self.autoclear &= AUTOCLEAR_BITMAPS;
    }

    /// Whether it has bitmaps that are said to be valid.
    pub(super) fn has_bitmaps(&self) -> bool {
        self.autoclear & AUTOCLEAR_BITMAPS != 0 && self.extension(EXT_BITMAPS).is_some()
    }
}

impl Core {
    /// Clears all bits on disk, once, before guest data change; who looks after the graph hears of bitmaps that are
    /// lost by it.
    pub(super) async fn give_up_features(&self, env: Env<'_>) -> Result<()> {
        if self.write_ready.load(SeqCst) {
            return Ok(());
        }
        let _header = self.turn().await;
        if self.write_ready.load(SeqCst) {
            return Ok(());
        }
        let (old, patch, bitmaps) = {
            let mut m = self.meta();
            let (old, bitmaps) = (m.header.autoclear, m.header.has_bitmaps());
            m.header.autoclear = 0;
            (old, m.header_patch(BlkEvent::None), bitmaps)
        };
        if let Err(e) = self.write_header(env, patch).await {
            // What the disk has is not known, and the next change tries again.
            self.meta().header.autoclear = old;
            return Err(e);
        }
        self.write_ready.store(true, SeqCst);
        if bitmaps {
            let names = self.bitmap_names();
            env.state().notice(Notice::BitmapsInvalid { bitmaps: names });
        }
        Ok(())
    }
}
