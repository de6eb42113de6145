//! `img info`.
//!
//! What an image says about itself is collected into a JSON value first, with the members
//! in QEMU's order; the human form is written from that value, so the two can't
//! say different things.

use std::sync::Arc;

use clap::Parser;
use dolmen::Session;
use dolmen::graph::{Class, Description, Node, join, own_file};
use dolmen::qmp::json::from_value;
use dolmen::session::READ;
use dolmen::types::{ChildRole, Options, Result, Value};
use serde_json::{Map, Value as Json, json};

use super::open::{self, Open, Verb, is_json};
use crate::cli::{Failure, Outcome, Persona, units};
use crate::{cli, out};

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "info",
    help: "show what an image says about itself",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Show what an image says about itself.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Info {
    #[command(flatten)]
    open: Open,
    /// Go on with the backing files
    #[arg(short, long)]
    backing_chain: bool,
    /// human or json
    #[arg(long, value_name = "FMT")]
    output: Option<String>,
    /// Image
    #[arg(value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// Runs it.
fn run(persona: Persona, a: Info) -> Outcome {
    let json = is_json(a.output.as_deref(), "info")?;
    let Ok([filename]) = <[String; 1]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting one image file name", "info"));
    };
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        let source = a.open.source(&filename);
        let options = source.options(&mut session, persona)?;
        let infos = if a.backing_chain {
            chain(&mut session, options).await
        } else {
            one(&mut session, options).await.map(|i| vec![i])
        };
        let mut infos = dolmen::session::opening(infos, &filename)?;
        session.close().await?;
        if json {
            let all = if a.backing_chain { Json::Array(infos) } else { infos.remove(0) };
            out!("{}", cli::json::pretty(&all));
        } else {
            let texts: Vec<String> = infos.iter().map(human).collect();
            cli::say(format_args!("{}", texts.join("\n")));
        }
        Ok(0)
    })
}

/// Opens one image without what it names, and describes it. A guess of the format is
/// harmless here: only the header is read, and nothing that it names is opened.
async fn one(session: &mut Session, mut options: Options) -> Result<Json> {
    if !options.has("driver") {
        let mut file = options.clone().take_map("file")?.unwrap_or_default();
        for inherited in ["read-only", "force-share"] {
            if let (Some(v), false) = (options.get(inherited), file.has(inherited)) {
                file.set(inherited, v.clone());
            }
        }
        let format = session.probe(file).await?;
        options.set("driver", format);
    }
    for child in ["backing", "data-file"] {
        dolmen::session::set_if_known(session.registry(), &mut options, child, Value::Null);
    }
    let image = session.open(options, READ).await?;
    let info = describe(&image.node());
    session.close_image(image).await?;
    Ok(info)
}

/// Opens an image with its backing files, as the policy says, and describes each.
async fn chain(session: &mut Session, options: Options) -> Result<Vec<Json>> {
    let image = session.open(options, READ).await?;
    let mut infos = Vec::new();
    let mut next = Some(image.node());
    while let Some(node) = next {
        infos.push(describe(&node));
        next = node.backing().cloned();
    }
    session.close_image(image).await?;
    Ok(infos)
}

/// Whether QEMU's tool would have details of the node ("dirty-flag"): formats and
/// plain files, and what lies over them.
fn has_details(node: &Node) -> bool {
    match node.driver.kind().details {
        true => true,
        false => {
            node.filtered().or_else(|| node.child("file").map(|c| &c.node)).is_some_and(|n| has_details(n))
        }
    }
}

/// Disk space of the node and its children, without backing files.
fn actual_size(node: &Node, d: &Description) -> Option<u64> {
    if let Some(n) = d.actual_size {
        return Some(n);
    }
    if node.children.is_empty() {
        return None;
    }
    node.children
        .iter()
        .filter(|c| c.role != ChildRole::Backing)
        .map(|c| actual_size(&c.node, &c.node.driver.describe(&c.node)))
        .sum()
}

/// The file name of a node: its file's, unless other options make it more than that file.
fn filename(node: &Node, d: &Description) -> String {
    if let Some(f) = &d.filename {
        return f.clone();
    }
    let plain = match node.driver.kind().class {
        Class::Format => match &node.options {
            Value::Map(m) => !m.iter().any(|(k, _)| matches!(k.as_str(), "offset" | "size")),
            _ => true,
        },
        Class::Protocol | Class::Filter => false,
    };
    let file = node.child("file").map(|c| filename(&c.node, &c.node.driver.describe(&c.node)));
    match file {
        Some(f) if plain && !f.starts_with("json:") => f,
        _ => format!("json:{}", bare(&node.options)),
    }
}

/// Options without those that only say how it was opened, the driver first.
fn bare(v: &Value) -> Value {
    match v {
        Value::Map(m) => Value::Map(
            m.iter()
                .filter(|(k, _)| k == "driver")
                .chain(m.iter().filter(|(k, _)| k != "driver"))
                .filter(|(k, v)| {
                    !matches!(
                        k.as_str(),
                        "read-only" | "force-share" | "cache" | "discard" | "auto-read-only" | "node-name"
                    ) && *v != Value::Null
                })
                .map(|(k, v)| (k.clone(), bare(v)))
                .collect(),
        ),
        other => other.clone(),
    }
}

/// Everything about a node, in QEMU's order of members.
pub(crate) fn describe(node: &Arc<Node>) -> Json {
    let d = node.driver.describe(node);
    let mut m = Map::new();
    let children: Vec<Json> = node
        .children
        .iter()
        .filter(|c| c.role != ChildRole::Backing)
        .map(|c| json!({"name": c.name, "info": describe(&c.node)}))
        .collect();
    m.insert("children".into(), children.into());
    if let Some((_, Some(format))) = &d.backing {
        m.insert("backing-filename-format".into(), format.as_str().into());
    }
    if !d.snapshots.is_empty() {
        let list: Vec<Json> = d
            .snapshots
            .iter()
            .map(|s| {
                let mut o = Map::new();
                if let Some(n) = s.icount {
                    o.insert("icount".into(), n.into());
                }
                o.insert("vm-clock-nsec".into(), (s.vm_clock_nsec % 1_000_000_000).into());
                o.insert("name".into(), s.name.as_str().into());
                o.insert("date-sec".into(), s.date_sec.into());
                o.insert("date-nsec".into(), s.date_nsec.into());
                o.insert("vm-clock-sec".into(), (s.vm_clock_nsec / 1_000_000_000).into());
                o.insert("id".into(), s.id.as_str().into());
                o.insert("vm-state-size".into(), s.vm_state_size.into());
                Json::Object(o)
            })
            .collect();
        m.insert("snapshots".into(), list.into());
    }
    let name = filename(node, &d);
    m.insert("virtual-size".into(), node.size().into());
    m.insert("filename".into(), name.as_str().into());
    if let Some(n) = d.cluster_size.filter(|n| *n > 0) {
        m.insert("cluster-size".into(), n.into());
    }
    if d.compressed {
        m.insert("compressed".into(), true.into());
    }
    m.insert("format".into(), node.driver.kind().name.into());
    if let Some(n) = actual_size(node, &d) {
        m.insert("actual-size".into(), n.into());
    }
    if let Some(v) = &d.format_specific {
        m.insert("format-specific".into(), from_value(v));
    }
    if let Some((backing, _)) = &d.backing {
        // Beside the file, whatever filters are in between.
        let full = join(&own_file(node), backing);
        m.insert("full-backing-filename".into(), full.into());
        m.insert("backing-filename".into(), backing.as_str().into());
    }
    if d.encrypted {
        m.insert("encrypted".into(), true.into());
    }
    if has_details(node) {
        m.insert("dirty-flag".into(), d.dirty.into());
    }
    Json::Object(m)
}

/// The `data` of a `format-specific` object for people, with its heading.
pub(crate) fn specific_text(v: &Value) -> String {
    let mut o = String::new();
    if let Some(Json::Object(data)) = from_value(v).get("data")
        && !data.is_empty()
    {
        o.push_str("Format specific information:\n");
        object(data, "    ", &mut o);
    }
    o
}

/// The form for people.
fn human(info: &Json) -> String {
    let mut o = String::new();
    image_text(info, "", None, &mut o);
    o
}

fn image_text(info: &Json, indent: &str, path: Option<&str>, o: &mut String) {
    let text = |k: &str| info.get(k).and_then(Json::as_str).unwrap_or_default();
    let number = |k: &str| info.get(k).and_then(Json::as_u64);
    let mut line = |s: String| {
        o.push_str(indent);
        o.push_str(&s);
        o.push('\n');
    };
    let size = number("virtual-size").unwrap_or(0);
    let size = format!("{} ({size} bytes)", units::size(size));
    // A child without children of its own is a file, or whatever holds the bytes; others are images.
    if path.is_some() && info.get("children").and_then(Json::as_array).is_none_or(Vec::is_empty) {
        line(format!("filename: {}", text("filename")));
        line(format!("protocol type: {}", text("format")));
        line(format!("file length: {size}"));
    } else {
        line(format!("image: {}", text("filename")));
        line(format!("file format: {}", text("format")));
        line(format!("virtual size: {size}"));
    }
    line(format!("disk size: {}", number("actual-size").map_or("unavailable".into(), units::size)));
    if info.get("encrypted").is_some() {
        line("encrypted: yes".into());
    }
    if let Some(n) = number("cluster-size") {
        line(format!("cluster_size: {n}"));
    }
    if info.get("dirty-flag") == Some(&Json::Bool(true)) {
        line("cleanly shut down: no".into());
    }
    if info.get("backing-filename").is_some() {
        let (backing, full) = (text("backing-filename"), text("full-backing-filename"));
        if backing == full {
            line(format!("backing file: {backing}"));
        } else {
            line(format!("backing file: {backing} (actual path: {full})"));
        }
        if info.get("backing-filename-format").is_some() {
            line(format!("backing file format: {}", text("backing-filename-format")));
        }
    }
    if let Some(Json::Array(list)) = info.get("snapshots") {
        line("Snapshot list:".into());
        line("ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT".into());
        for s in list {
            line(snapshot_row(s));
        }
    }
    if let Some(Json::Object(data)) = info.pointer("/format-specific/data")
        && !data.is_empty()
    {
        line("Format specific information:".into());
        let mut inner = String::new();
        object(data, &format!("{indent}    "), &mut inner);
        o.push_str(&inner);
    }
    if let Some(Json::Array(children)) = info.get("children") {
        for c in children {
            let name = c.get("name").and_then(Json::as_str).unwrap_or_default();
            let path = format!("{}/{name}", path.unwrap_or_default());
            o.push_str(&format!("{indent}Child node '{path}':\n"));
            image_text(&c["info"], &format!("{indent}    "), Some(&path), o);
        }
    }
}

fn snapshot_row(s: &Json) -> String {
    let n = |k: &str| s.get(k).and_then(Json::as_u64).unwrap_or(0);
    let t = |k: &str| s.get(k).and_then(Json::as_str).unwrap_or_default().to_owned();
    let clock = n("vm-clock-sec");
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        clock / 3600,
        clock / 60 % 60,
        clock % 60,
        n("vm-clock-nsec") / 1_000_000
    );
    let icount = s.get("icount").and_then(Json::as_u64).map(|n| n.to_string()).unwrap_or_default();
    format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        t("id"),
        t("name"),
        units::size(n("vm-state-size")),
        local_date(n("date-sec")),
        clock,
        icount
    )
}

/// Date and time of day. In UTC: the local time zone is not ours to parse.
fn local_date(secs: u64) -> String {
    // Days since 1970 to a civil date (proleptic Gregorian calendar).
    let days = (secs / 86_400) as i64 + 719_468;
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let y = yoe + era * 400 + i64::from(m <= 2);
    let s = secs % 86_400;
    format!("{y:04}-{m:02}-{d:02} {:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

fn object(m: &Map<String, Json>, indent: &str, o: &mut String) {
    for (k, v) in m {
        value(&k.replace('-', " "), v, indent, o);
    }
}

fn value(key: &str, v: &Json, indent: &str, o: &mut String) {
    let deeper = format!("{indent}    ");
    match v {
        Json::Object(m) => {
            o.push_str(&format!("{indent}{key}:\n"));
            object(m, &deeper, o);
        }
        Json::Array(l) => {
            o.push_str(&format!("{indent}{key}:\n"));
            for (i, v) in l.iter().enumerate() {
                value(&format!("[{i}]"), v, &deeper, o);
            }
        }
        Json::String(s) => o.push_str(&format!("{indent}{key}: {s}\n")),
        Json::Null | Json::Bool(_) | Json::Number(_) => o.push_str(&format!("{indent}{key}: {v}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        // Captured from qemu-img 10.0.2.
        let info = json!({
            "children": [{"name": "file", "info": {"children": [], "virtual-size": 1_638_912,
                "filename": "s.qcow2", "format": "file", "actual-size": 1_339_392,
                "format-specific": {"type": "file", "data": {}}, "dirty-flag": false}}],
            "snapshots": [{"icount": 0, "vm-clock-nsec": 0, "name": "snap two", "date-sec": 1_795_226_932u64,
                "date-nsec": 5, "vm-clock-sec": 0, "id": "2", "vm-state-size": 0}],
            "virtual-size": 10_485_760, "filename": "s.qcow2", "cluster-size": 65536, "format": "qcow2",
            "actual-size": 1_339_392,
            "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "lazy-refcounts": false,
                "bitmaps": [{"flags": ["auto"], "name": "b0", "granularity": 65536}]}},
            "full-backing-filename": "sub/../b", "backing-filename": "../b", "dirty-flag": true
        });
        let expected = "\
image: s.qcow2
file format: qcow2
virtual size: 10 MiB (10485760 bytes)
disk size: 1.28 MiB
cluster_size: 65536
cleanly shut down: no
backing file: ../b (actual path: sub/../b)
Snapshot list:
ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
2       snap two              0 B 2026-11-21 02:08:52  0000:00:00.000          0
Format specific information:
    compat: 1.1
    lazy refcounts: false
    bitmaps:
        [0]:
            flags:
                [0]: auto
            name: b0
            granularity: 65536
Child node '/file':
    filename: s.qcow2
    protocol type: file
    file length: 1.56 MiB (1638912 bytes)
    disk size: 1.28 MiB
";
        assert_eq!(human(&info), expected);
    }

    #[test]
    fn dates() {
        assert_eq!(local_date(0), "1970-01-01 00:00:00");
        assert_eq!(local_date(951_827_696), "2000-02-29 12:34:56");
    }
}
