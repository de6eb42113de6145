//! How an image is named: a text that opens the same image again.
//!
//! Such texts are shown to users, and written into the headers of overlays.

use std::sync::Arc;

use dolmen_types::Value;

use crate::{Class, Description, Node, join};

fn describe(node: &Arc<Node>) -> Description {
    node.driver.describe(node)
}

/// The file that a format keeps its metadata in, as its leaf names it.
pub fn own_file(node: &Arc<Node>) -> String {
    let mut at = node;
    while let Some(c) = at.child("file").or_else(|| at.children.first()) {
        at = &c.node;
    }
    describe(at).filename.unwrap_or_default()
}

/// Options that say how a node is used rather than what it is.
const USE_OPTIONS: &[&str] = &[
    "node-name",
    "read-only",
    "auto-read-only",
    "force-share",
    "discard",
    "detect-zeroes",
    "cache",
    "cache.direct",
    "cache.no-flush",
    "active",
];

/// A text that opens the same image again: a file name where that says it all,
/// otherwise `json:` with every option that matters.
///
/// Filters that jobs have put in are left out: they are gone when somebody opens the text, and most of them
/// can't be opened at all.
pub fn node_filename(node: &Arc<Node>) -> String {
    let node = without_jobs(node);
    match plain_name(node) {
        Some(name) => name,
        None => format!("json:{}", ascii(&definition(node).to_string())),
    }
}

/// The node itself, or the one that the nameless filters of jobs stand on.
fn without_jobs(node: &Arc<Node>) -> &Arc<Node> {
    let mut at = node;
    while at.anonymous
        && at.owner.is_some()
        && let Some(below) = at.filtered()
    {
        at = below;
    }
    at
}

/// JSON text with everything that is not ASCII as `\uXXXX`: only strings have such characters.
fn ascii(text: &str) -> String {
    let escape = |c: char| match c {
        c if c.is_ascii() => c.to_string(),
        c => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    text.chars().map(escape).collect()
}

/// The file name, if it is enough to find the image (and the driver, by looking at it).
fn plain_name(node: &Arc<Node>) -> Option<String> {
    let allowed: &[&str] = match node.driver.kind().class {
        Class::Protocol => return describe(node).filename,
        Class::Format => &["driver", "file"],
        // Most filters have no name but their options.
        Class::Filter => return describe(node).filename,
    };
    let Value::Map(options) = &node.options else { return None };
    let says_more =
        options.iter().any(|(k, _)| !allowed.contains(&k.as_str()) && !is_use(k) && !says_the_same(node, k));
    match node.child("file") {
        Some(file) if !says_more => plain_name(without_jobs(&file.node)),
        _ => None,
    }
}

/// Whether an option names the backing file that the image names as well (or both say that there is none).
fn says_the_same(node: &Arc<Node>, option: &str) -> bool {
    let named = describe(node).backing.map(|(name, _)| join(&own_file(node), &name));
    option == "backing" && named == node.backing().map(node_filename)
}

/// Whether an option says how a node is used rather than what it is: a name needs no such options.
pub fn is_use(name: &str) -> bool {
    USE_OPTIONS.contains(&name) || name.starts_with("x-")
}

/// The options that matter, with children spelled out; keys in alphabetical order, so
/// that equal definitions are equal texts.
fn definition(node: &Arc<Node>) -> Value {
    let mut keys: Vec<(String, Value)> = vec![("driver".into(), node.driver.kind().name.into())];
    if let Value::Map(options) = &node.options {
        for (k, v) in options {
            let value = match node.child(k) {
                Some(c) => definition(without_jobs(&c.node)),
                None => v.clone(),
            };
            if k != "driver" && !is_use(k) && !says_the_same(node, k) {
                keys.push((k.clone(), value));
            }
        }
    }
    keys.sort_by(|a, b| a.0.cmp(&b.0));
    Value::Map(keys)
}
