//! Image specifications: what a user types to name an image, as driver options.
//!
//! Three notations, as QEMU's tools have them: a file name (with an optional
//! protocol: `nbd://host/export`), a `json:{...}` pseudo name, and an option string
//! (`driver=qcow2,file.filename=...`, with `--image-opts`). All end as [`Options`];
//! nothing is opened here (a name is only asked whether it is a block device), so nothing
//! here needs to trust anybody.

use dolmen_graph::{Class, Registry, has_protocol};
use dolmen_qmp::keyval;
use dolmen_types::{Error, ErrorKind, Options, Result, Value};

/// The options that a name with a protocol or a `json:` pseudo name stands for.
///
/// This is also how names found inside images are read, once the policy permits them.
///
/// # Errors
/// `InvalidInput` when it can't be parsed, `Unsupported` for an unknown protocol.
pub fn protocol_options(registry: Registry, name: &str) -> Result<Options> {
    if let Some(value) = keyval::json_name(name) {
        let mut options = Options::from_value(value?)?;
        file_driver(registry, &mut options);
        return Ok(options);
    }
    registry.protocol_name(name)
}

/// The options that `name` stands for. `format` is what `-f` said. Without one, and
/// without a driver in the name, the result has no `driver`: the format has to be
/// probed, if the policy permits that.
///
/// # Errors
/// As [`protocol_options`]; `InvalidInput` when the format is given twice.
pub fn image(registry: Registry, name: &str, format: Option<&str>) -> Result<Options> {
    let file = file(registry, name)?;
    let driver = match file.get("driver") {
        Some(Value::Str(d)) => Some(d.clone()),
        _ => None,
    };
    // JSON may be of a whole image, with its format; any other name is of what holds it.
    let whole = name.starts_with("json:")
        && driver.as_ref().is_none_or(|d| registry.find(d).is_ok_and(|k| k.class != Class::Protocol));
    match (driver, format) {
        (Some(d), Some(f)) if d == f => Ok(file),
        (Some(d), Some(f)) if whole => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("Driver specified twice: '{f}' with -f, and '{d}' in '{name}'"),
        )),
        (Some(_), None) if whole => Ok(file),
        // Without a driver, the `file` of the JSON object is probed.
        (None, None) => Ok(file),
        (None, Some(f)) => Ok(file.with("driver", f)),
        (Some(_), None) => Ok(Options::new().with("file", file.into_value())),
        (Some(_), Some(f)) => Ok(Options::new().with("driver", f).with("file", file.into_value())),
    }
}

/// The options of what a name leads to, without a format: a file or device of this host, or what a protocol names.
///
/// # Errors
/// As [`protocol_options`].
pub fn file(registry: Registry, name: &str) -> Result<Options> {
    match name.strip_prefix("file:") {
        Some(path) => Ok(registry.path_options(path)),
        None if has_protocol(name) => protocol_options(registry, name),
        None => Ok(registry.path_options(name)),
    }
}

/// Options that lack a file, with the one of that name: the first node from the top down that takes a file name gets it.
///
/// # Errors
/// As [`protocol_options`]; `InvalidInput` when the options name a file already, or no node takes one.
pub fn with_filename(registry: Registry, mut options: Options, name: &str) -> Result<Options> {
    let driver = match options.get("driver") {
        Some(Value::Str(d)) => Some(registry.find(d)?),
        _ => None,
    };
    let given = |what: &str| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("'{name}' is given, but the options have '{what}' already"),
        )
        .remedy("leave one of them out")
    };
    match driver {
        Some(kind) if kind.class == Class::Protocol => {
            if !kind.options.iter().any(|o| o.name == "filename") {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("The '{}' block driver does not support a file name", kind.name),
                )
                .remedy("name the image by options alone"));
            }
            if options.has("filename") {
                return Err(given("filename"));
            }
            Ok(options.with("filename", name.strip_prefix("file:").unwrap_or(name)))
        }
        kind => {
            let child = match kind {
                Some(k) if k.options.iter().any(|o| o.name == "image") => "image",
                _ => "file",
            };
            let below = match options.get(child) {
                None => file(registry, name)?,
                Some(Value::Map(_)) => {
                    let inner = options.take_map(child)?.unwrap_or_default();
                    match inner.has("driver") || inner.has("file") || inner.has("image") {
                        true => with_filename(registry, inner, name)?,
                        false if inner.has("filename") => return Err(given(&format!("{child}.filename"))),
                        false => inner.names().map(str::to_owned).collect::<Vec<_>>().into_iter().fold(
                            file(registry, name)?,
                            |to, key| match inner.get(&key) {
                                Some(v) => to.with(&key, v.clone()),
                                None => to,
                            },
                        ),
                    }
                }
                Some(_) => return Err(given(child)),
            };
            Ok(options.with(child, below.into_value()))
        }
    }
}

/// The options of an option string (`--image-opts`).
///
/// # Errors
/// What the parser says.
pub fn image_opts(registry: Registry, text: &str) -> Result<Options> {
    Options::from_value(keyval::parse_value(text, None)?).map(|o| with_file_drivers(registry, o))
}

/// Adds the `driver` of children that have a `filename` and say no driver.
#[must_use]
pub fn with_file_drivers(registry: Registry, mut options: Options) -> Options {
    file_driver(registry, &mut options);
    options
}

/// Users write `file.filename=x` and leave `file.driver` out: only the file driver has a
/// file name.
fn file_driver(registry: Registry, options: &mut Options) {
    if options.has("filename")
        && !options.has("driver")
        && let Some(kind) = registry.host_file()
    {
        options.set("driver", kind.name);
    }
    for child in ["file", "backing", "image", "data-file"] {
        if let Some(Value::Map(_)) = options.get(child)
            && let Ok(Some(mut inner)) = options.take_map(child)
        {
            file_driver(registry, &mut inner);
            options.set(child, inner.into_value());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(o: Result<Options>) -> String {
        match o {
            Ok(o) => o.into_value().to_string(),
            Err(e) => format!("error: {e}"),
        }
    }

    #[test]
    fn formats() {
        let image = |name: &str, format: Option<&str>| text(image(crate::registry(), name, format));
        let json = r#"json:{"driver":"raw","file.filename":"x"}"#;
        let whole = r#"{"driver": "raw", "file": {"filename": "x", "driver": "file"}}"#;
        assert_eq!(image(json, None), whole);
        assert_eq!(image(json, Some("raw")), whole);
        assert!(image(json, Some("qcow2")).starts_with("error: Driver specified twice"));
        let json = r#"json:{"driver":"file","filename":"x"}"#;
        assert_eq!(image(json, None), r#"{"file": {"driver": "file", "filename": "x"}}"#);
        assert_eq!(
            image(json, Some("raw")),
            r#"{"driver": "raw", "file": {"driver": "file", "filename": "x"}}"#
        );
        assert_eq!(
            image("blkdebug::x", Some("raw")),
            r#"{"driver": "raw", "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "x"}}}"#
        );
        assert_eq!(image("x", None), r#"{"file": {"driver": "file", "filename": "x"}}"#);
    }

    #[test]
    fn json_names_may_be_flat() {
        assert_eq!(
            text(protocol_options(
                crate::registry(),
                r#"json:{"driver":"qcow2","file.filename":"x","file":{"driver":"file"}}"#
            )),
            r#"{"driver": "qcow2", "file": {"filename": "x", "driver": "file"}}"#
        );
        assert!(protocol_options(crate::registry(), r#"json:{"a":1"#).is_err());
    }

    #[test]
    fn option_strings_know_the_file_driver() {
        assert_eq!(
            text(image_opts(
                crate::registry(),
                "driver=qcow2,file.filename=a.qcow2,backing.driver=raw,backing.file.filename=b"
            )),
            r#"{"driver": "qcow2", "file": {"filename": "a.qcow2", "driver": "file"}, "backing": {"driver": "raw", "file": {"filename": "b", "driver": "file"}}}"#
        );
    }
}
