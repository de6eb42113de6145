//! What checking an image comes to.

use crate::{Io, Resize, Write};

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairWhat {
    /// Only clusters that are counted but not used.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a repair needs besides reading.
#[derive(Clone, Copy)]
pub struct Repairing<'a> {
    /// Write access to the image's file.
    pub write: Io<'a, Write>,
    /// Access for setting its size.
    pub resize: Io<'a, Resize>,
    /// How far to go.
    pub what: RepairWhat,
}

/// The result of a check, with the fields that users of image tools know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Errors in the metadata that were found and are still there.
    pub corruptions: u64,
    /// Clusters that are counted but not used, and still are.
    pub leaks: u64,
    /// Parts that could not be checked.
    pub check_errors: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Entries whose data a repair could not find: they read as zeroes now, or are gone.
    pub lost: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
    /// Guest clusters.
    pub total_clusters: u64,
    /// Guest clusters with data.
    pub allocated_clusters: u64,
    /// Guest clusters whose data do not follow those of the one before.
    pub fragmented_clusters: u64,
    /// Guest clusters with compressed data.
    pub compressed_clusters: u64,
    /// The problems, in words; at most a few hundred.
    pub messages: Vec<String>,
}

impl CheckResult {
    /// Problems that are described one by one; the rest is only counted.
    pub const MAX_MESSAGES: usize = 200;

    /// Counts an error in the metadata.
    pub fn corruption(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        if self.messages.len() < CheckResult::MAX_MESSAGES {
            self.messages.push(format!("ERROR {}", message()));
        }
    }

    /// Adds a message, unless there are many already.
    pub fn say(&mut self, message: String) {
        if self.messages.len() < CheckResult::MAX_MESSAGES {
            self.messages.push(message);
        }
    }
}
