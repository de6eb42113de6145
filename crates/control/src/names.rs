//! Names of images: what a text such as `nbd://host/export` stands for.

use dolmen_types::{Options, Result};

/// The options that a name found in an image (or given instead of a file name) stands
/// for: `json:{...}`, `nbd://...`, `nbd+unix://...`, `file:...`.
///
/// # Errors
/// `Unsupported` for other protocols; `InvalidInput` for broken JSON.
pub fn image_name(name: &str) -> Result<Options> {
    match dolmen_qmp::keyval::json_name(name) {
        Some(value) => Options::from_value(value?),
        None => dolmen_graph::protocol_name(name),
    }
}
