//! Option arguments of a command line: `driver=qcow2,file.driver=file,...`.
//!
//! Two notations, as QEMU's tools have them:
//!
//! - [`parse`]: `key.sub=value,list.0=x`, dots make objects, whole numbers make
//!   lists, `,,` stands for a comma in a value; a text that begins with `{` is JSON.
//!   Used by `--blockdev`, `--export`, `--nbd-server`, `--monitor`, `--image-opts`.
//! - [`parse_flat`]: `key=value,flag,noflag`, without structure. Used by `--chardev`
//!   and `-o`.
//!
//! All values of the first notation are text until a schema says otherwise
//! ([`crate::Schema::check`] with [`crate::Source::Keyval`]).

use dolmen_types::{Error, ErrorKind, Result, Value};
use serde_json::Value as Json;

use crate::Source;
use crate::json;

/// The longest part of a key between two dots.
pub const MAX_KEY_PART: usize = 127;

/// The longest argument.
pub const MAX_ARGUMENT: usize = 1 << 20;

/// How many parts a key may have.
pub const MAX_KEY_DEPTH: usize = crate::MAX_NESTING_DEPTH;

fn invalid(msg: String) -> Error {
    Error::new(ErrorKind::InvalidInput, msg)
}

/// An object under construction; a list is one with the keys 0, 1, 2, ...
enum Tree {
    Leaf(String),
    Inner(Vec<(String, Tree)>),
}

/// Parses an argument that is either JSON or `key=value,...`. The result goes to
/// [`crate::Schema::check`] together with the notation that was found.
///
/// `implied` is the key of the first value when it has none: `driver` in
/// `--blockdev qcow2,...`.
///
/// # Errors
/// In the words of QEMU's tools; all are `InvalidInput`.
pub fn parse(text: &str, implied: Option<&str>) -> Result<(Json, Source)> {
    if text.len() > MAX_ARGUMENT {
        return Err(invalid(format!("argument is longer than {MAX_ARGUMENT} bytes")));
    }
    if text.starts_with('{') {
        return json::parse_unframed(text).map(|v| (v, Source::Json));
    }
    parse_keys(text, implied).map(|v| (v, Source::Keyval))
}

/// The same as a [`Value`]: text leaves for `key=value`, typed ones for JSON.
///
/// # Errors
/// As [`parse`], and for JSON numbers that are not whole.
pub fn parse_value(text: &str, implied: Option<&str>) -> Result<Value> {
    parse(text, implied).and_then(|(v, _)| json::to_value(v, ""))
}

fn parse_keys(text: &str, implied: Option<&str>) -> Result<Json> {
    let mut root = Vec::new();
    let mut rest = text;
    let mut implied = implied;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, value);
        match (rest.as_bytes().get(end), implied) {
            (Some(b'='), _) => {
                key = &rest[..end];
                (value, rest) = take_value(&rest[end + 1..]);
            }
            // An implied value can't hold a comma: `a,,b` would hide a typing error.
            (_, Some(name)) => {
                key = name;
                value = rest[..end].to_owned();
                rest = rest.get(end + 1..).unwrap_or_default();
            }
            (Some(_), None) if end == 0 => return Err(invalid("Invalid parameter ''".into())),
            (_, None) => return Err(invalid(format!("Expected '=' after parameter '{}'", &rest[..end]))),
        }
        implied = None;
        insert(&mut root, key, value)?;
    }
    finish(Tree::Inner(root), "")
}

/// Takes the value up to a single comma; `,,` is a comma in the value.
fn take_value(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut rest = text;
    loop {
        match rest.find(',') {
            None => {
                out.push_str(rest);
                return (out, "");
            }
            Some(i) => {
                out.push_str(&rest[..i]);
                rest = &rest[i + 1..];
                match rest.strip_prefix(',') {
                    Some(r) => {
                        out.push(',');
                        rest = r;
                    }
                    None => return (out, rest),
                }
            }
        }
    }
}

fn insert(root: &mut Vec<(String, Tree)>, key: &str, value: String) -> Result<()> {
    let parts: Vec<&str> = key.split('.').collect();
    if parts.len() > MAX_KEY_DEPTH {
        return Err(invalid(format!("Parameter '{}...' has too many parts", &parts[..4].join("."))));
    }
    for part in &parts {
        let good = part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
            // A number is an index and nothing else; leading zeroes would make it ambiguous.
            && (!part.starts_with(|c: char| c.is_ascii_digit()) || index(part).is_some());
        if !good {
            return Err(invalid(format!("Invalid parameter '{key}'")));
        }
        if part.len() > MAX_KEY_PART {
            return Err(invalid(format!("Parameter '{part}' is too long")));
        }
    }
    let mut at = root;
    for (i, part) in parts.iter().enumerate() {
        let last = i + 1 == parts.len();
        let inconsistent =
            || invalid(format!("Parameters '{}.*' used inconsistently", parts[..=i].join(".")));
        let found = at.iter().position(|(k, _)| k == part);
        if last {
            match found {
                None => at.push(((*part).to_owned(), Tree::Leaf(value))),
                Some(n) => match &mut at[n].1 {
                    Tree::Leaf(v) => *v = value,
                    Tree::Inner(_) => return Err(inconsistent()),
                },
            }
            return Ok(());
        }
        let n = found.unwrap_or_else(|| {
            at.push(((*part).to_owned(), Tree::Inner(Vec::new())));
            at.len() - 1
        });
        match &mut at[n].1 {
            Tree::Inner(m) => at = m,
            Tree::Leaf(_) => return Err(inconsistent()),
        }
    }
    Ok(())
}

/// A list index: decimal, no leading zeroes.
fn index(part: &str) -> Option<usize> {
    let canonical = part == "0" || !part.starts_with('0');
    (canonical && part.bytes().all(|b| b.is_ascii_digit())).then(|| part.parse().ok())?
}

/// Turns objects whose keys are all numbers into lists.
fn finish(tree: Tree, path: &str) -> Result<Json> {
    let members = match tree {
        Tree::Leaf(s) => return Ok(Json::String(s)),
        Tree::Inner(m) => m,
    };
    let inner = |k: &str| if path.is_empty() { k.to_owned() } else { format!("{path}.{k}") };
    let numbered = members.iter().filter(|(k, _)| index(k).is_some()).count();
    if numbered == 0 || path.is_empty() {
        if numbered > 0 {
            return Err(invalid(format!("Invalid parameter '{}'", members[0].0)));
        }
        let mut out = serde_json::Map::new();
        for (k, t) in members {
            let v = finish(t, &inner(&k))?;
            out.insert(k, v);
        }
        return Ok(Json::Object(out));
    }
    if numbered < members.len() {
        return Err(invalid(format!("Parameters '{path}.*' used inconsistently")));
    }
    // As many slots as members: an index beyond them leaves a hole, whatever its size.
    let mut slots: Vec<Option<Json>> = members.iter().map(|_| None).collect();
    for (k, t) in members {
        let v = finish(t, &inner(&k))?;
        if let Some(slot) = index(&k).and_then(|i| slots.get_mut(i)) {
            *slot = Some(v);
        }
    }
    slots
        .into_iter()
        .enumerate()
        .map(|(i, v)| v.ok_or_else(|| invalid(format!("Parameter '{path}.{i}' missing"))))
        .collect::<Result<Vec<_>>>()
        .map(Json::Array)
}

/// Reads a `json:{...}` name, as images and file name arguments hold them; `None` when
/// it is another kind of name. Keys may have dots in them (`file.driver`), which make
/// objects.
///
/// # Errors
/// When the rest is not one JSON object, or keys contradict each other.
pub fn json_name(name: &str) -> Option<Result<Value>> {
    let text = name.strip_prefix("json:")?;
    Some(match text.len() {
        n if n > MAX_ARGUMENT => Err(invalid(format!("name is longer than {MAX_ARGUMENT} bytes"))),
        _ => json::parse_unframed(text).and_then(|v| match v {
            Json::Object(_) => json::to_value(undot(v)?, ""),
            _ => Err(invalid("a json: name holds an object".into())),
        }),
    })
}

/// Replaces keys with dots by objects.
fn undot(json: Json) -> Result<Json> {
    let members = match json {
        Json::Object(m) => m,
        Json::Array(l) => return l.into_iter().map(undot).collect::<Result<Vec<_>>>().map(Json::Array),
        other => return Ok(other),
    };
    let mut out = serde_json::Map::new();
    for (key, value) in members {
        let mut at = &mut out;
        let mut rest = key.as_str();
        while let Some((first, more)) = rest.split_once('.') {
            let inner = at.entry(first).or_insert_with(|| Json::Object(Default::default()));
            at = inner
                .as_object_mut()
                .ok_or_else(|| invalid(format!("Parameters '{first}.*' used inconsistently")))?;
            rest = more;
        }
        let value = undot(value)?;
        match (at.get_mut(rest), value) {
            (Some(Json::Object(old)), Json::Object(new)) => old.extend(new),
            (Some(_), _) => return Err(invalid(format!("Parameters '{key}.*' used inconsistently"))),
            (None, value) => {
                at.insert(rest.to_owned(), value);
            }
        }
    }
    Ok(Json::Object(out))
}

/// Parses `key=value,flag,...` without structure: a key alone is `on`, and one that
/// begins with `no` is `off` (`server,nowait`).
///
/// # Errors
/// For an empty key and for an argument that is too long.
pub fn parse_flat(text: &str, implied: Option<&str>) -> Result<Vec<(String, String)>> {
    if text.len() > MAX_ARGUMENT {
        return Err(invalid(format!("argument is longer than {MAX_ARGUMENT} bytes")));
    }
    let mut out = Vec::new();
    let mut rest = text;
    let mut implied = implied;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let named = rest.as_bytes().get(end) == Some(&b'=');
        if named {
            if end == 0 {
                return Err(invalid("Invalid parameter ''".into()));
            }
            let key = rest[..end].to_owned();
            let value;
            (value, rest) = take_value(&rest[end + 1..]);
            out.push((key, value));
        } else {
            let (word, r) = take_value(rest);
            rest = r;
            out.push(match (implied, word.strip_prefix("no")) {
                (Some(name), _) => (name.to_owned(), word),
                (None, Some(key)) if !key.is_empty() && key != "de" => (key.to_owned(), "off".to_owned()),
                (None, _) => (word, "on".to_owned()),
            });
        }
        implied = None;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn keys(text: &str) -> Result<Json, String> {
        parse(text, Some("driver")).map(|(v, _)| v).map_err(|e| e.to_string())
    }

    #[test]
    fn structure() {
        assert_eq!(
            keys("qcow2,node-name=a,file.driver=file,file.filename=x,,y=z.img,file.cache.direct=on"),
            Ok(json!({"driver": "qcow2", "node-name": "a",
                "file": {"driver": "file", "filename": "x,y=z.img", "cache": {"direct": "on"}}}))
        );
        assert_eq!(
            keys("driver=blkdebug,inject-error.1.event=b,inject-error.0.event=a"),
            Ok(json!({"driver": "blkdebug", "inject-error": [{"event": "a"}, {"event": "b"}]}))
        );
        assert_eq!(keys("driver=x,l.0=a,l.1=b"), Ok(json!({"driver": "x", "l": ["a", "b"]})));
        assert_eq!(keys(""), Ok(json!({})));
        assert_eq!(keys("raw,"), Ok(json!({"driver": "raw"})));
        assert_eq!(keys("raw,a=,b=1"), Ok(json!({"driver": "raw", "a": "", "b": "1"})));
        assert_eq!(keys("raw,a=x,,"), Ok(json!({"driver": "raw", "a": "x,"})));
        assert_eq!(keys("raw,a=1,a=2"), Ok(json!({"driver": "raw", "a": "2"})));
    }

    /// The texts are those of QEMU's daemon for the same arguments.
    #[test]
    fn errors() {
        for (text, error) in [
            ("driver=null-co,null-co", "Expected '=' after parameter 'null-co'"),
            ("null-co,node-name", "Expected '=' after parameter 'node-name'"),
            ("null-co,=3", "Invalid parameter ''"),
            ("null-co,,x,node-name=a", "Invalid parameter ''"),
            ("null-co,.a=3", "Invalid parameter '.a'"),
            ("null-co,node-name.=3", "Invalid parameter 'node-name.'"),
            ("raw,file=nope,file.driver=null-co", "Parameters 'file.*' used inconsistently"),
            ("raw,file.driver=null-co,file=nope", "Parameters 'file.*' used inconsistently"),
            ("null-co,inject.1=3", "Parameter 'inject.0' missing"),
            ("x,a.0.e=1,a.2.e=1", "Parameter 'a.1' missing"),
            ("x,a.0.e=1,a.x.e=1", "Parameters 'a.*' used inconsistently"),
            ("x,a.4294967295=1", "Parameter 'a.0' missing"),
            ("{\"driver\":\"null-co\"", "JSON parse error, premature EOI"),
        ] {
            assert_eq!(keys(text), Err(error.to_owned()), "{text}");
        }
        let long = "a".repeat(128);
        assert_eq!(keys(&format!("x,{long}=1")), Err(format!("Parameter '{long}' is too long")));
        assert!(keys(&format!("x,{}=1", vec!["a"; 300].join("."))).is_err());
    }

    #[test]
    fn json_arguments_keep_their_types() {
        let (v, source) = parse("{'driver': 'null-co', 'size': 5}", Some("driver")).unwrap();
        assert_eq!(v, json!({"driver": "null-co", "size": 5}));
        assert_eq!(source, Source::Json);
    }

    #[test]
    fn json_names() {
        let read = |t| json_name(t).map(|r| r.map(|v| v.to_string()).map_err(|e| e.to_string()));
        assert_eq!(read("nbd://x"), None);
        assert_eq!(
            read(r#"json:{"driver":"qcow2","file.driver":"file","file":{"filename":"x"}}"#),
            Some(Ok(r#"{"driver": "qcow2", "file": {"driver": "file", "filename": "x"}}"#.into()))
        );
        assert_eq!(
            read(r#"json:{"file":"x","file.driver":"file"}"#),
            Some(Err("Parameters 'file.*' used inconsistently".into()))
        );
        assert!(read("json:[1]").is_some_and(|r| r.is_err()));
        assert!(read("json:{").is_some_and(|r| r.is_err()));
    }

    #[test]
    fn flat_flags() {
        let flat = |t| parse_flat(t, Some("backend")).unwrap();
        let pairs = |p: &[(&str, &str)]| -> Vec<(String, String)> {
            p.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
        };
        assert_eq!(
            flat("socket,id=m,path=/a,,b,server=on,wait=off"),
            pairs(&[("backend", "socket"), ("id", "m"), ("path", "/a,b"), ("server", "on"), ("wait", "off")])
        );
        assert_eq!(
            flat("socket,server,nowait,node"),
            pairs(&[("backend", "socket"), ("server", "on"), ("wait", "off"), ("node", "on")])
        );
    }

    proptest! {
        #[test]
        fn never_panics(text in "[a-c0-2.,=\\-{}']{0,40}") {
            let _ = parse(&text, Some("driver"));
            let _ = parse_flat(&text, None);
        }

        /// Any value can be written with doubled commas.
        #[test]
        fn values_survive(value in ".*") {
            let text = format!("driver=x,a.b={}", value.replace(',', ",,"));
            prop_assert_eq!(keys(&text), Ok(json!({"driver": "x", "a": {"b": value}})));
        }
    }
}
