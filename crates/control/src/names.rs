//! Names of images: what a text such as `nbd://host/export` stands for.

use dolmen_graph::Registry;
use dolmen_types::{Options, Result};

/// The options that a name found in an image (or given instead of a file name) stands
/// for: `json:{...}`, `nbd://...`, `nbd+unix://...`, `file:...`.
///
/// # Errors
/// `Unsupported` for other protocols; `InvalidInput` for broken JSON.
pub fn image_name(registry: Registry, name: &str) -> Result<Options> {
    match dolmen_qmp::keyval::json_name(name) {
        Some(value) => Options::from_value(value?),
        None => registry.protocol_name(name),
    }
}
