//! How an image is named: a text that opens the same image again.
//!
//! Such texts are shown to users, and written into the headers of overlays.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use dolmen_types::{ChildRole, Error, ErrorKind, Result, Value, os_name, text_of_os};

use crate::{Class, Description, DriverKind, Node, RAW_FORMAT, content, has_protocol, join};

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
    "aio",
    "locking",
    "pass-discard-request",
    "reconnect-delay",
    "open-timeout",
];

/// A text that opens the same image again: a file name where that says it all,
/// otherwise `json:` with every option that matters.
///
/// Filters that jobs have put in are left out: they are gone when somebody opens the text, and most of them
/// can't be opened at all.
pub fn node_filename(node: &Arc<Node>) -> String {
    Filenames::default().of(node)
}

/// [`node_filename`] for many nodes of one snapshot: a name depends on those of the images below, and each is made once.
#[derive(Default)]
pub struct Filenames<'g> {
    made: RefCell<HashMap<*const Node, String>>,
    namer: Namer<'g>,
}

impl<'g> Filenames<'g> {
    /// The text for one node.
    pub fn of(&self, node: &'g Arc<Node>) -> String {
        let node = self.namer.skip(node);
        if let Some(name) = self.made.borrow().get(&Arc::as_ptr(node)) {
            return name.clone();
        }
        let name = self.namer.plain_name(node).unwrap_or_else(|| self.namer.json(node));
        self.made.borrow_mut().insert(Arc::as_ptr(node), name.clone());
        name
    }
}

impl std::fmt::Debug for Filenames<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filenames({})", self.made.borrow().len())
    }
}

/// The name and the format under which the header of the image in `file` is to name `node` as its backing file.
///
/// A header outlives the graph, so it names images only. Filters are left out, whoever has put them in: they are gone, or
/// can't be opened, when somebody opens the image, and none of them changes what is read. A window of a raw image does:
/// it stays, as `json:`. A name that would lead elsewhere from the image's directory becomes absolute.
///
/// Name and format are of the same node, always: the file of one image in the format of another shows other bytes.
///
/// # Errors
/// `Unsupported` for a node that shows what no name leads to (a point in time).
pub fn header_name(node: &Arc<Node>, file: &str) -> Result<(String, &'static str)> {
    let (name, kind) = header_image(node, file)?;
    // What holds no format is a raw disk to whoever opens it.
    Ok((name, if kind.class == Class::Protocol { RAW_FORMAT } else { kind.name }))
}

/// The same for a job: with a name that its user gives instead, and what holds no format under its driver's name unless the
/// user wants it masked.
///
/// # Errors
/// `Unsupported` for a node that shows what no name leads to.
pub fn header_name_given(
    node: &Arc<Node>,
    file: &str,
    given: Option<&str>,
    mask_protocol: bool,
) -> Result<(String, &'static str)> {
    let (name, kind) = header_image(node, file)?;
    let raw = kind.class == Class::Protocol && mask_protocol;
    Ok((given.map_or(name, str::to_owned), if raw { RAW_FORMAT } else { kind.name }))
}

fn header_image(node: &Arc<Node>, file: &str) -> Result<(String, &'static DriverKind)> {
    let namer = Namer { style: Style::Header, ..Namer::default() };
    let image = namer.skip(node);
    if let Some(view) = view_in(image) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("node '{}' shows a point in time that is gone when its image is opened again", view.name),
        )
        .remedy("copy it into an image of its own, and name that one"));
    }
    let name = match namer.plain_name(image) {
        // Seen from the image, or from here: the same file.
        Some(name) if !has_protocol(&name) && join(file, &name) != name => absolute(&name),
        Some(name) => name,
        None => namer.json(image),
    };
    Ok((name, image.driver.kind()))
}

fn absolute(name: &str) -> String {
    std::path::absolute(os_name(name)).map_or_else(|_| name.to_owned(), |p| text_of_os(p.as_os_str()))
}

/// The node that shows what no name leads to: a filter that shows more than its image, or a leaf that was put there without
/// options and has no file.
fn view_in(node: &Arc<Node>) -> Option<&Arc<Node>> {
    let reads = |c: &&crate::ChildEdge| c.role == ChildRole::Data;
    let here = match node.driver.kind().class {
        Class::Filter => node.children.iter().any(|c| reads(&c)),
        Class::Protocol => node.options == Value::Null && describe(node).filename.is_none(),
        Class::Format => false,
    };
    if here {
        return Some(node);
    }
    node.children.iter().filter(|c| c.role != ChildRole::Target).find_map(|c| view_in(&c.node))
}

/// What a name is for.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Style {
    /// To be shown, or to open the node again as it is.
    #[default]
    Shown,
    /// To be written into an image.
    Header,
}

/// JSON text with everything that is not ASCII as `\uXXXX`: only strings have such characters.
fn ascii(text: &str) -> String {
    let escape = |c: char| match c {
        c if c.is_ascii() => c.to_string(),
        c => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    text.chars().map(escape).collect()
}

/// Makes names. Those of backing files are asked for at every step of a chain, so each is made once.
#[derive(Default)]
struct Namer<'g> {
    style: Style,
    plain: RefCell<HashMap<*const Node, Option<String>>>,
    same: RefCell<HashMap<*const Node, bool>>,
    /// What the addresses belong to.
    graph: std::marker::PhantomData<&'g Arc<Node>>,
}

impl<'g> Namer<'g> {
    /// The node itself, or the one that filters which are left out stand on.
    fn skip(&self, node: &'g Arc<Node>) -> &'g Arc<Node> {
        let mut at = node;
        loop {
            let left_out = match self.style {
                Style::Shown => at.anonymous && at.owner.is_some(),
                Style::Header => match at.driver.kind().class {
                    Class::Filter => true,
                    // A raw disk in an image shows that image, as a filter does; in a file it is what the file holds.
                    Class::Format => content(at).driver.kind().class != Class::Protocol,
                    Class::Protocol => false,
                },
            };
            match at.filtered().filter(|_| left_out) {
                Some(below) => at = below,
                None => return at,
            }
        }
    }

    fn json(&self, node: &'g Arc<Node>) -> String {
        format!("json:{}", ascii(&self.definition(node).to_string()))
    }

    /// The file name, if it is enough to find the image (and the driver, by looking at it).
    fn plain_name(&self, node: &'g Arc<Node>) -> Option<String> {
        if let Some(known) = self.plain.borrow().get(&Arc::as_ptr(node)) {
            return known.clone();
        }
        let name = self.make_plain_name(node);
        self.plain.borrow_mut().insert(Arc::as_ptr(node), name.clone());
        name
    }

    fn make_plain_name(&self, node: &'g Arc<Node>) -> Option<String> {
        let allowed: &[&str] = match node.driver.kind().class {
            Class::Protocol => return leaf_name(node),
            Class::Format => &["driver", "file"],
            // Most filters have no name but their options.
            Class::Filter => return describe(node).filename,
        };
        let Value::Map(options) = &node.options else { return None };
        let says_more = options.iter().any(|(k, _)| {
            !allowed.contains(&k.as_str()) && !is_use_of(node, k) && !self.says_the_same(node, k)
        });
        let file = self.skip(&node.child("file").filter(|_| !says_more)?.node);
        // Whoever opens the name of an image in an image finds the inner one.
        (file.driver.kind().class != Class::Format).then(|| self.plain_name(file))?
    }

    /// Whether an option names the backing file that the image names as well (or both say that there is none).
    fn says_the_same(&self, node: &'g Arc<Node>, option: &str) -> bool {
        if option != "backing" {
            return false;
        }
        if let Some(known) = self.same.borrow().get(&Arc::as_ptr(node)) {
            return *known;
        }
        let same = self.names_what_is_there(node);
        self.same.borrow_mut().insert(Arc::as_ptr(node), same);
        same
    }

    /// Whether the image names the backing file that is there.
    fn names_what_is_there(&self, node: &'g Arc<Node>) -> bool {
        let named = describe(node).backing.map(|(name, _)| join(&own_file(node), &name));
        let is = node.backing().map(|b| {
            let image = self.skip(b);
            self.plain_name(image).unwrap_or_else(|| self.json(image))
        });
        // By another spelling it is the same file.
        let file = |name: String| if has_protocol(&name) { name } else { absolute(&name) };
        named.map(file) == is.map(file)
    }

    /// The options that matter, with children spelled out; keys in alphabetical order, so
    /// that equal definitions are equal texts.
    fn definition(&self, node: &'g Arc<Node>) -> Value {
        let mut keys: Vec<(String, Value)> = vec![("driver".into(), node.driver.kind().name.into())];
        if let Value::Map(options) = &node.options {
            for (k, v) in options {
                let value = match (node.child(k), v) {
                    (Some(c), _) => {
                        let image = self.skip(&c.node);
                        let value = self.definition(image);
                        // What holds no format is a raw disk, and QEMU wants that said of a backing file.
                        let says =
                            c.role != ChildRole::Backing || image.driver.kind().class != Class::Protocol;
                        if says { value } else { raw_over(value) }
                    }
                    // In a header it means the same file for whoever opens it, wherever that is.
                    (None, Value::Str(name)) if k == "filename" && self.style == Style::Header => {
                        absolute(name.strip_prefix("file:").unwrap_or(name)).into()
                    }
                    (None, v) => v.clone(),
                };
                if k != "driver" && !is_use_of(node, k) && !self.says_the_same(node, k) {
                    keys.push((k.clone(), value));
                }
            }
        }
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        Value::Map(keys)
    }
}

/// The definition of a raw disk in what holds it.
fn raw_over(file: Value) -> Value {
    Value::Map(vec![("driver".into(), RAW_FORMAT.into()), ("file".into(), file)])
}

/// The name of a leaf. One whose first part has a colon must not be taken for a protocol's.
fn leaf_name(node: &Arc<Node>) -> Option<String> {
    let d = describe(node);
    d.filename.map(|name| match d.file.is_some() && has_protocol(&name) {
        true => format!("./{name}"),
        false => name,
    })
}

/// Whether an option says how a node is used rather than what it is: a name needs no such options.
pub fn is_use(name: &str) -> bool {
    USE_OPTIONS.contains(&name) || name.starts_with("x-")
}

/// The same for an option of this node: what has no effect on it says nothing, either.
fn is_use_of(node: &Arc<Node>, name: &str) -> bool {
    is_use(name) || node.driver.kind().options.iter().any(|o| o.name == name && o.hint)
}

/// What a node is, in options that open it again: equal for nodes that were defined alike.
pub(crate) fn definition(node: &Arc<Node>) -> Value {
    Namer { style: Style::Header, ..Namer::default() }.definition(node)
}
