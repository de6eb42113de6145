//! Whether an image may become the overlay of a node: it must show the node's data and nothing else, now and when it
//! is opened again by what its header names.

use std::sync::Arc;

use dolmen_graph::{
    Class, Draft, FileId, Node, NodeOpener, RAW_FORMAT, content, first_allocated, has_protocol, id_of,
    is_use, join, own_file,
};
use dolmen_types::{Actions, Error, ErrorKind, NodeName, Options, Result, Value};

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// Checks that `overlay`, linked over `node`, shows what the node shows: it holds nothing of its own, is at least as
/// large, and its header names the node's image.
///
/// # Errors
/// `InvalidInput` with what is wrong; what reading metadata says.
pub(crate) async fn check(opener: &NodeOpener<'_>, draft: &Draft, node: &str, overlay: &str) -> Result<()> {
    let find = |name: &str| draft.find(name).ok();
    // What is missing or of the wrong kind is said by the snapshot itself.
    let (Some(node), Some(overlay)) = (find(node), find(overlay)) else { return Ok(()) };
    let (below, image) = (draft.built_node(&node)?, draft.built_node(&overlay)?);
    let takes_backing = image.driver.kind().options.iter().any(|o| o.name == "backing");
    if !takes_backing || image.backing().is_some() {
        return Ok(());
    }
    if image.size() < below.size() {
        return Err(invalid(format!(
            "overlay '{overlay}' has {} bytes, and node '{node}' has {}: the end of the disk would be cut off",
            image.size(),
            below.size()
        ))
        .remedy(format!("make the overlay as large first (block_resize), or create it with {} bytes", below.size())));
    }
    check_name(opener, &below, &image, &node).await?;
    // What a job is writing to it is part of the copy; its end is checked when the job ends.
    let written = draft.total(&overlay)?.needs.contains(Actions::V);
    if !written && let Some(at) = first_allocated(&image, opener.rt).await? {
        return Err(invalid(format!(
            "overlay '{overlay}' holds data of its own (at byte {at}), which would hide those of node '{node}'"
        ))
        .remedy("use a new image as the overlay"));
    }
    Ok(())
}

/// The header has to name the image that the overlay is put over.
async fn check_name(
    opener: &NodeOpener<'_>,
    below: &Arc<Node>,
    image: &Arc<Node>,
    node: &NodeName,
) -> Result<()> {
    let overlay = &image.name;
    let remedy = |e: Error| {
        e.remedy(format!(
            "create the overlay with the image of '{node}' as its backing file, or give it that name before it is \
             opened (img rebase -u -b)"
        ))
    };
    let Some((name, format)) = image.driver.describe(image).backing else {
        return Err(remedy(invalid(format!(
            "overlay '{overlay}' names no backing file: opened again, it would read as zeroes instead of the data \
             of node '{node}'"
        ))));
    };
    let full = join(&own_file(image), &name);
    let options = if has_protocol(&full) {
        (opener.names)(opener.registry, &full)?
    } else {
        Options::new().with("filename", full.as_str())
    };
    let named = Named::of(opener, options)?;
    let shown = content(below);
    let kind = shown.driver.kind();
    let expected = if kind.class == Class::Protocol { RAW_FORMAT } else { kind.name };
    let format = named.format.as_deref().or(format.as_deref());
    let right_format = format.is_none_or(|f| f == expected || f == kind.name);
    if !right_format || !named.is(opener, shown).await {
        return Err(remedy(invalid(format!(
            "overlay '{overlay}' names '{name}' as its backing file{}, which is not the image of node '{node}': opened \
             again, it would show other data",
            format.map(|f| format!(" (format {f})")).unwrap_or_default(),
        ))));
    }
    Ok(())
}

/// What a name in a header stands for.
struct Named {
    /// The image format, if the name says it.
    format: Option<String>,
    /// The options of its leaf.
    leaf: Vec<(String, Value)>,
}

impl Named {
    fn of(opener: &NodeOpener<'_>, options: Options) -> Result<Named> {
        let mut format = None;
        let mut at = options.into_value();
        loop {
            let Value::Map(options) = at else {
                return Err(invalid("the name of the backing file stands for a node, not for an image"));
            };
            let member = |key: &str| options.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
            if let Some(Value::Str(driver)) = member("driver") {
                let kind = opener.registry.find(&driver)?;
                if kind.class == Class::Format && kind.name != RAW_FORMAT {
                    format.get_or_insert(driver);
                }
            }
            match member("file").or_else(|| member("image")) {
                Some(next) => at = next,
                None => return Ok(Named { format, leaf: options }),
            }
        }
    }

    /// Whether it is the leaf of this image.
    async fn is(&self, opener: &NodeOpener<'_>, image: &Arc<Node>) -> bool {
        let mut node = image;
        while let Some(c) = node.child("file").or_else(|| node.child("image")) {
            node = &c.node;
        }
        let member = |key: &str| self.leaf.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        let file = node.driver.describe(node).file;
        if let (Some(Value::Str(name)), Some(id), Some(io)) = (member("filename"), file, opener.rt.io()) {
            let name = name.strip_prefix("file:").unwrap_or(name).to_owned();
            let path = std::path::PathBuf::from(dolmen_types::os_name(&name));
            let of = path.clone();
            return io.blocking_at(&path, move || file_id(&of)).await == Some(id);
        }
        let Value::Map(have) = &node.options else { return false };
        let has = |(k, v): &(String, Value)| is_use(k) || have.iter().any(|(l, w)| k == l && v == w);
        self.leaf.iter().all(has)
    }
}

/// Which file a name leads to, in the terms of [`FileId`].
fn file_id(name: &std::path::Path) -> Option<FileId> {
    std::fs::metadata(name).ok().as_ref().map(id_of)
}
