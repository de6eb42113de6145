//! What all parts of the driver need.

use dolmen_types::{Error, ErrorKind};

pub(super) const EINVAL: i32 = 22;

/// `file:` before a path says only that it is one.
pub(super) fn plain(filename: String) -> String {
    filename.strip_prefix("file:").map_or(filename.clone(), str::to_owned)
}

pub(super) fn no_files() -> Error {
    Error::new(ErrorKind::Unsupported, "there are no files in a simulation")
}
