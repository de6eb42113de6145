//! JSON text to values and back, as QMP wants it.
//!
//! Reading is strict (a key may occur once); writing uses the layout of
//! QEMU's daemon (`{"return": {}}`, a blank after `:` and `,`, ASCII only),
//! because shell scripts look for such pieces of text.

use std::fmt;
use std::io;

use dolmen_types::{Error, ErrorKind, Result, Value};
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use serde_json::ser::Formatter;

/// Parses one JSON text. The caller has bounded its length and nesting depth
/// (see [`crate::Framer`]).
///
/// # Errors
/// The message as QEMU's daemon begins it: `JSON parse error, ...`.
pub fn parse(text: &str) -> Result<Json> {
    let mut de = serde_json::Deserializer::from_str(text);
    de.disable_recursion_limit();
    let v = Strict::deserialize(&mut de).and_then(|v| de.end().map(|()| v.0));
    v.map_err(|e| {
        let why = e.to_string();
        // serde_json knows the position, but a client sent one line.
        let why = why.split(" at line ").next().unwrap_or_default();
        let why = if e.is_eof() { "premature EOI" } else { why };
        Error::new(ErrorKind::InvalidInput, format!("JSON parse error, {why}"))
    })
}

/// Parses one JSON text that was not framed before: an argument of a command line.
///
/// # Errors
/// The same as [`parse`], and for text that is too long, too deep or not exactly one value.
pub fn parse_unframed(text: &str) -> Result<Json> {
    let mut framer = crate::Framer::new();
    let invalid = |m: String| Error::new(ErrorKind::InvalidInput, m);
    let n = framer.feed(text.as_bytes());
    // A newline ends a word at the top.
    framer.feed(b"\n");
    match framer.next_text() {
        Some(Ok(t)) => {
            if n < text.len() || framer.is_in_value() || framer.next_text().is_some() {
                return Err(invalid("JSON parse error, expecting exactly one value".into()));
            }
            parse(&t)
        }
        Some(Err(e)) => Err(invalid(e.to_string())),
        None => Err(invalid("JSON parse error, premature EOI".into())),
    }
}

/// Turns JSON into an option value.
///
/// # Errors
/// For a number that is not a whole one; `path` names it in the message.
pub fn to_value(json: Json, path: &str) -> Result<Value> {
    Ok(match json {
        Json::Null => Value::Null,
        Json::Bool(b) => Value::Bool(b),
        Json::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(n), _) => Value::Int(n.into()),
            (None, Some(n)) => Value::Int(n.into()),
            (None, None) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("Invalid parameter type for '{path}', expected: integer"),
                ));
            }
        },
        Json::String(s) => Value::Str(s),
        Json::Array(l) => Value::List(
            l.into_iter()
                .enumerate()
                .map(|(i, v)| to_value(v, &format!("{path}[{i}]")))
                .collect::<Result<_>>()?,
        ),
        Json::Object(m) => Value::Map(
            m.into_iter()
                .map(|(k, v)| {
                    let inner = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
                    to_value(v, &inner).map(|v| (k, v))
                })
                .collect::<Result<_>>()?,
        ),
    })
}

/// Turns an option value into JSON. Whole numbers beyond 64 bits become text.
pub fn from_value(value: &Value) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Bool(b) => Json::Bool(*b),
        Value::Int(n) => match (u64::try_from(*n), i64::try_from(*n)) {
            (Ok(n), _) => n.into(),
            (_, Ok(n)) => n.into(),
            _ => n.to_string().into(),
        },
        Value::Str(s) => s.as_str().into(),
        Value::List(l) => l.iter().map(from_value).collect(),
        Value::Map(m) => Json::Object(m.iter().map(|(k, v)| (k.clone(), from_value(v))).collect()),
    }
}

/// Writes a value in the layout of QEMU's daemon.
pub fn to_text<T: Serialize + ?Sized>(value: &T, pretty: bool) -> String {
    let mut out = Vec::new();
    let done = if pretty {
        let fmt = Ascii(serde_json::ser::PrettyFormatter::with_indent(b"    "));
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, fmt))
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Ascii(Spaced)))
    };
    // Writing to memory can't fail, and every value of this crate has text keys.
    debug_assert!(done.is_ok());
    String::from_utf8(out).unwrap_or_default()
}

/// One blank after `:` and `,`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// Everything that is not ASCII as `\uXXXX`, whatever the layout.
struct Ascii<F>(F);

impl<F: Formatter> Formatter for Ascii<F> {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, w: &mut W, s: &str) -> io::Result<()> {
        if s.is_ascii() {
            return w.write_all(s.as_bytes());
        }
        // JSON can't carry the bytes of a file name that are no UTF-8.
        for c in dolmen_types::lossy(s).chars() {
            if c.is_ascii() {
                w.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(w, "\\u{unit:04X}")?;
                }
            }
        }
        Ok(())
    }
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_array(w)
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array(w)
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }
    fn end_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array_value(w)
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object(w)
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object(w)
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object_value(w)
    }
    fn end_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)
    }
}

/// Any JSON value in which no object has a key twice.
struct Strict(Json);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Strict, D::Error> {
        d.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> std::result::Result<Json, E> {
        Ok(Json::Null)
    }
    fn visit_bool<E>(self, b: bool) -> std::result::Result<Json, E> {
        Ok(b.into())
    }
    fn visit_u64<E>(self, n: u64) -> std::result::Result<Json, E> {
        Ok(n.into())
    }
    fn visit_i64<E>(self, n: i64) -> std::result::Result<Json, E> {
        Ok(n.into())
    }
    fn visit_f64<E>(self, n: f64) -> std::result::Result<Json, E> {
        Ok(n.into())
    }
    fn visit_str<E>(self, s: &str) -> std::result::Result<Json, E> {
        Ok(s.into())
    }
    fn visit_string<E>(self, s: String) -> std::result::Result<Json, E> {
        Ok(s.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut a: A) -> std::result::Result<Json, A::Error> {
        let mut out = Vec::new();
        while let Some(Strict(v)) = a.next_element()? {
            out.push(v);
        }
        Ok(out.into())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut a: A) -> std::result::Result<Json, A::Error> {
        let mut out = serde_json::Map::new();
        while let Some(k) = a.next_key::<String>()? {
            let Strict(v) = a.next_value()?;
            if out.insert(k, v).is_some() {
                return Err(serde::de::Error::custom("duplicate key"));
            }
        }
        Ok(out.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn layout() {
        let v = json!({"return": {}, "id": [1, "é\u{1f600}\n"]});
        assert_eq!(to_text(&v, false), r#"{"return": {}, "id": [1, "\u00E9\uD83D\uDE00\n"]}"#);
        assert_eq!(to_text(&json!({"a": 1}), true), "{\n    \"a\": 1\n}");
    }

    #[test]
    fn strictness() {
        assert_eq!(parse(r#"{"a":1,"a":2}"#).unwrap_err().to_string(), "JSON parse error, duplicate key");
        assert!(parse("{\"a\":}").unwrap_err().to_string().starts_with("JSON parse error, "));
        assert_eq!(parse_unframed("{\"a\":5").unwrap_err().to_string(), "JSON parse error, premature EOI");
        assert!(parse_unframed("{}{}").is_err());
        assert_eq!(parse_unframed(" {'a': 5} ").unwrap(), json!({"a": 5}));
    }

    #[test]
    fn fractions_are_refused_at_the_border() {
        let e = to_value(json!({"a": [1.5]}), "").unwrap_err();
        assert_eq!(e.to_string(), "Invalid parameter type for 'a[0]', expected: integer");
    }

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            ".*".prop_map(Json::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                prop::collection::hash_map(".*", inner, 0..4)
                    .prop_map(|m| Json::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn written_text_reads_back(v in any_json(), pretty: bool) {
            let text = to_text(&v, pretty);
            prop_assert!(text.is_ascii());
            // Bytes of file names that are no UTF-8 have code points of their own, which JSON can't carry.
            let carried: Json = serde_json::from_str(&dolmen_types::lossy(&v.to_string())).unwrap();
            prop_assert_eq!(parse_unframed(&text).unwrap(), carried);
        }

        #[test]
        fn values_convert_both_ways(v in any_json()) {
            prop_assert_eq!(from_value(&to_value(v.clone(), "").unwrap()), v);
        }
    }
}
