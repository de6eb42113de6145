//! `img create`.

use clap::Parser;
use dolmen::Session;
use dolmen::graph::DriverKind;
use dolmen::qmp::keyval;
use dolmen::session::READ;
use dolmen::types::{OptionType, Options, Value};

use super::open::{self, Common, Source, Verb};
use crate::cli::{self, CacheMode, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "create",
    help: "make a new image",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Make a new image.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Create {
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Options of the format, separated by commas (`-o help` for a list)
    #[arg(short, long, value_name = "FMT_OPTS")]
    options: Vec<String>,
    /// Put the new image on top of this one
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Do not look at the backing image
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    common: Common,
    /// Image to make; a file of that name is replaced
    filename: Option<String>,
    /// Size in bytes, with an optional suffix bkKMGTPE
    #[arg(allow_negative_numbers = true)]
    size: Option<String>,
}

/// Runs it.
fn run(persona: Persona, a: Create) -> Outcome {
    let registry = dolmen::registry();
    let kind = registry.find(&a.format);
    let mut options = Options::new();
    for text in &a.options {
        for (key, value) in keyval::parse_flat(text, None)? {
            if matches!(key.as_str(), "help" | "?" | "list") && value == "on" {
                let kind =
                    kind.as_ref().map_err(|_| Failure::new(format!("Unknown file format '{}'", a.format)))?;
                list(kind, a.filename.is_some());
                return Ok(0);
            }
            options.set(&key, value);
        }
    }
    let Some(filename) = a.filename.clone() else {
        return Err(Failure::usage("Expecting image file name", "create"));
    };
    if let Some(size) = &a.size {
        if options.has("size") {
            return Err(Failure::new(format!("{filename}: The image size must be specified only once")));
        }
        options.set("size", size_argument(size)?);
    }
    let kind = kind.map_err(|_| Failure::new(format!("{filename}: Unknown file format '{}'", a.format)))?;
    if kind.create.is_none() {
        return Err(Failure::new(format!(
            "{filename}: Format driver '{}' does not support image creation",
            a.format
        )));
    }
    for (key, value) in [("backing_file", &a.backing), ("backing_fmt", &a.backing_format)] {
        let Some(v) = value else { continue };
        if !kind.create_options.iter().any(|o| o.name == key) {
            return Err(Failure::new(format!(
                "{filename}: Backing file not supported for file format '{}'",
                a.format
            )));
        }
        options.set(key, v.as_str());
    }
    normalize(kind, registry.host_file(), &filename, &mut options)?;

    open::block_on(move |rt| async move {
        let mut session = Session::new(&rt, registry, persona.policy(a.common.allow_backing));
        let size = backing_size(&mut session, persona, &a, &filename, &options).await?;
        if !options.has("size") {
            let Some(size) = size else {
                return Err(Failure::new(format!("{filename}: Image creation needs a size parameter")));
            };
            options.set("size", size);
        }
        if !a.quiet {
            out!("{}", formatting(&filename, kind, &options));
            cli::flush();
        }
        session.create(&filename, &a.format, options).await.map_err(|e| {
            let lock = e.lock_text();
            let f = Failure::from(e);
            Failure { message: format!("{filename}: {}", lock.as_deref().unwrap_or(&f.message)), ..f }
        })?;
        session.close().await?;
        Ok(0)
    })
}

fn size_argument(text: &str) -> Result<u64, Failure> {
    let range = "Invalid image size specified. Must be between 0 and 9223372036854775807.";
    match Value::parse_size(text) {
        Some(n) if n <= i64::MAX as u64 => Ok(n),
        Some(_) => Err(Failure::new(range)),
        None if text.strip_prefix('-').is_some_and(|t| Value::parse_size(t).is_some()) => {
            Err(Failure::new(range))
        }
        None => Err(Failure::new(format!("Invalid image size specified: '{text}'."))),
    }
}

/// Checks the names of the options and brings sizes and truth values into one form.
fn normalize(
    kind: &DriverKind,
    file: Option<&'static DriverKind>,
    filename: &str,
    options: &mut Options,
) -> Result<(), Failure> {
    let of_file = file.map_or(&[][..], |k| k.create_options);
    let names: Vec<String> = options.names().map(str::to_owned).collect();
    for n in names {
        let Some(spec) =
            kind.create_options.iter().chain(of_file).find(|o| o.name == n && o.name != "filename")
        else {
            return Err(Failure::new(format!("{filename}: Invalid parameter '{n}'")));
        };
        let Some(Value::Str(text)) = options.get(&n).cloned() else { continue };
        match spec.ty {
            OptionType::Size | OptionType::Int => {
                let v = Value::parse_size(&text).ok_or_else(|| {
                    Failure::new(format!(
                        "{filename}: Parameter '{n}' expects a non-negative number below 2^64"
                    ))
                })?;
                options.set(&n, v);
            }
            OptionType::Bool => {
                let v = match text.as_str() {
                    "on" | "true" | "yes" | "y" => true,
                    "off" | "false" | "no" | "n" => false,
                    _ => {
                        return Err(Failure::new(format!(
                            "{filename}: Parameter '{n}' expects 'on' or 'off'"
                        )));
                    }
                };
                options.set(&n, v);
            }
            OptionType::Str
            | OptionType::Enum(_)
            | OptionType::Node
            | OptionType::NodeOrNull
            | OptionType::Object(_)
            | OptionType::ObjectList(_)
            | OptionType::EnumList(_)
            | OptionType::SocketAddress
            | OptionType::NewImage => {}
        }
    }
    Ok(())
}

/// The size of the backing image. It has to open, unless `-u` was given.
async fn backing_size(
    session: &mut Session,
    persona: Persona,
    a: &Create,
    filename: &str,
    options: &Options,
) -> Result<Option<u64>, Failure> {
    let text = |name: &str| match options.get(name) {
        Some(Value::Str(s)) => Some(s.clone()),
        _ => None,
    };
    let backing = text("backing_file").filter(|b| !b.is_empty());
    let format = text("backing_fmt");
    let Some(backing) = backing else {
        if format.is_some() {
            return Err(Failure::new(format!(
                "{filename}: Backing format cannot be used without backing file"
            )));
        }
        return Ok(None);
    };
    let Some(format) = format else {
        return Err(Failure {
            hint: Some(
                "Name its format with -F: a guess would be unsafe each time the image is opened.".into(),
            ),
            ..Failure::new(format!("{filename}: Backing file specified without backing format"))
        });
    };
    session
        .registry()
        .find(&format)
        .map_err(|_| Failure::new(format!("{filename}: Unknown backing file format '{format}'")))?;
    if a.backing_unsafe {
        return Ok(None);
    }
    // A name in an image is relative to the image.
    let image = filename.strip_prefix("file:").unwrap_or(filename);
    let full = dolmen::graph::join(image, &backing);
    let source = Source {
        name: &full,
        format: Some(&format),
        image_opts: false,
        // Only its size is looked at, which may be done while a guest writes it.
        force_share: true,
        read_only: true,
        cache: CacheMode::default(),
    };
    let not_opened = |f: Failure| Failure {
        message: format!("{filename}: {}\nCould not open backing image.", f.message),
        ..f
    };
    let options = source.options(session, persona).map_err(not_opened)?;
    let opened = session.open(options, READ).await.map_err(|e| not_opened(e.into()))?;
    let size = opened.size();
    session.close_image(opened).await?;
    Ok(Some(size))
}

/// "Formatting 'x', fmt=...": scripts look for it.
fn formatting(filename: &str, kind: &DriverKind, options: &Options) -> String {
    let (format, order) = (kind.name, kind.create_report);
    let mut line = format!("Formatting '{filename}', fmt={format}");
    let mut add = |name: &str, v: &Value| {
        let text = match v {
            Value::Str(s) => s.clone(),
            Value::Bool(true) => "on".into(),
            Value::Bool(false) => "off".into(),
            other => other.to_string(),
        };
        line.push_str(&format!(" {name}={text}"));
    };
    for (name, default) in order {
        match (options.get(name), default) {
            (Some(v), _) => add(name, v),
            (None, Some(d)) => add(name, &Value::from(*d)),
            (None, None) => {}
        }
    }
    for name in options.names().filter(|n| !order.iter().any(|(o, _)| o == n)) {
        if let Some(v) = options.get(name) {
            add(name, v);
        }
    }
    line
}

/// `-o help`.
fn list(kind: &DriverKind, with_file: bool) {
    let file = dolmen::registry().host_file().filter(|_| with_file);
    if with_file {
        out!("Supported options:");
    } else {
        out!("Supported {} options:", kind.name);
    }
    let mut rows: Vec<_> = kind.create_options.iter().collect();
    for o in file.map_or(&[][..], |f| f.create_options) {
        if o.name != "filename" && !rows.iter().any(|r| r.name == o.name) {
            rows.push(o);
        }
    }
    rows.sort_by_key(|o| o.name);
    for o in rows {
        let ty = match o.ty {
            OptionType::Bool => "bool (on/off)",
            OptionType::Int => "num",
            OptionType::Size => "size",
            _ => "str",
        };
        out!("  {:22} - {}", format!("{}=<{ty}>", o.name), o.help_text());
    }
    if !with_file {
        out!(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options."
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str) -> &'static DriverKind {
        dolmen::registry().find(name).expect("a driver")
    }

    #[test]
    fn the_line_that_scripts_parse() {
        // Captured from qemu-img 10.0.2.
        let o = Options::new().with("size", 1_048_576u64);
        assert_eq!(
            formatting("a.qcow2", kind("qcow2"), &o),
            "Formatting 'a.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
             size=1048576 lazy_refcounts=off refcount_bits=16"
        );
        let o = Options::new()
            .with("compat", "0.10")
            .with("preallocation", "off")
            .with("lazy_refcounts", false)
            .with("backing_file", "base.qcow2")
            .with("backing_fmt", "qcow2")
            .with("size", 12_582_912u64);
        assert_eq!(
            formatting("ov.qcow2", kind("qcow2"), &o),
            "Formatting 'ov.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off preallocation=off \
             compression_type=zlib size=12582912 compat=0.10 backing_file=base.qcow2 backing_fmt=qcow2 \
             lazy_refcounts=off refcount_bits=16"
        );
        let o = Options::new().with("preallocation", "full").with("size", 1_048_576u64);
        assert_eq!(
            formatting("o.raw", kind("raw"), &o),
            "Formatting 'o.raw', fmt=raw size=1048576 preallocation=full"
        );
    }

    #[test]
    fn size_arguments() {
        assert_eq!(size_argument("1k").ok(), Some(1024));
        let message = |t: &str| size_argument(t).err().map(|f| f.message).unwrap_or_default();
        assert_eq!(message("abc"), "Invalid image size specified: 'abc'.");
        assert_eq!(message("6Z"), "Invalid image size specified: '6Z'.");
        for t in ["-5", "8E"] {
            assert_eq!(
                message(t),
                "Invalid image size specified. Must be between 0 and 9223372036854775807."
            );
        }
    }
}
