//! Option schema: one table row per option of a driver, an export or an object.
//!
//! Parser, help text, completions and the QMP schema all derive from these rows.
//! [`Options`] is the "low args" side: untyped values that are taken out one by
//! one; what is left over at the end is an unknown option.

use crate::{Error, ErrorKind, Result, Value};

/// The type of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionType {
    /// `true`/`false` in JSON, `on`/`off` on a command line.
    Bool,
    /// Text.
    Str,
    /// An unsigned number.
    Int,
    /// A number of bytes; a command line may use the suffixes k, M, G, T, P, E.
    Size,
    /// One of these words.
    Enum(&'static [&'static str]),
    /// A reference to a node (its name) or an inline definition.
    Node,
    /// The same, or `null` (JSON) / the empty string: no such child.
    NodeOrNull,
    /// An object with these members.
    Object(&'static [OptionSpec]),
    /// A list of objects with these members.
    ObjectList(&'static [OptionSpec]),
    /// A list of words.
    EnumList(&'static [&'static str]),
    /// A socket address: `type` = inet (host, port), unix (path), fd (str).
    SocketAddress,
    /// What is to be made: the name of a driver that makes images, and its options for that.
    NewImage,
}

/// One option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// The name, as in QMP.
    pub name: &'static str,
    /// Its type.
    pub ty: OptionType,
    /// Whether it must be given.
    pub required: bool,
    /// One line for help and documentation, with units and the default.
    pub help: &'static str,
    /// What it is if it is not given, as a user would write it.
    pub default: Option<&'static str>,
    /// It asks for a way of doing things, never for a result, so that it may be accepted without an effect.
    pub hint: bool,
}

impl OptionSpec {
    /// An option that may be left out.
    pub const fn optional(name: &'static str, ty: OptionType, help: &'static str) -> OptionSpec {
        OptionSpec { name, ty, required: false, help, default: None, hint: false }
    }
    /// An option that has a value if it is left out.
    pub const fn with_default(
        name: &'static str,
        ty: OptionType,
        default: &'static str,
        help: &'static str,
    ) -> OptionSpec {
        OptionSpec { name, ty, required: false, help, default: Some(default), hint: false }
    }
    /// An option that is accepted and has no effect, as it asks for no result that could be missed. The help says why.
    pub const fn hint(name: &'static str, ty: OptionType, help: &'static str) -> OptionSpec {
        OptionSpec { name, ty, required: false, help, default: None, hint: true }
    }
    /// An option that must be given.
    pub const fn required(name: &'static str, ty: OptionType, help: &'static str) -> OptionSpec {
        OptionSpec { name, ty, required: true, help, default: None, hint: false }
    }
    /// The line for help, with the default.
    pub fn help_text(&self) -> String {
        match self.default {
            Some(default) => format!("{} (default {default})", self.help),
            None => self.help.to_owned(),
        }
    }
}

/// Named values on their way into a driver. Take them out with the typed methods,
/// then call [`Options::finish`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options(Vec<(String, Value)>);

impl Options {
    /// No options.
    pub fn new() -> Options {
        Options(Vec::new())
    }

    /// The members of an object.
    pub fn from_value(v: Value) -> Result<Options> {
        match v {
            Value::Map(m) => Ok(Options(m)),
            other => Err(invalid(format!("expected an object, not {}", other.kind()))),
        }
    }

    /// As a value again.
    pub fn into_value(self) -> Value {
        Value::Map(self.0)
    }

    /// Sets an option; a later setting replaces an earlier one.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        let name = name.into();
        let value = value.into();
        match self.0.iter_mut().find(|(k, _)| *k == name) {
            Some((_, v)) => *v = value,
            None => self.0.push((name, value)),
        }
    }

    /// The same, chained.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Options {
        self.set(name, value);
        self
    }

    /// Looks at an option without taking it.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v)
    }

    /// Whether the option is there.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The names that are there, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(k, _)| k.as_str())
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes an option of any type out.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        let i = self.0.iter().position(|(k, _)| k == name)?;
        Some(self.0.remove(i).1)
    }

    /// Takes text out.
    pub fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(v) => Err(wrong_type(name, "string", &v)),
        }
    }

    /// Takes text out that must be there.
    pub fn require_str(&mut self, name: &str) -> Result<String> {
        self.take_str(name)?.ok_or_else(|| missing(name))
    }

    /// Takes a truth value out; text `on`/`off`/`true`/`false`/`yes`/`no` is accepted, as command
    /// lines have no other.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(Value::Str(s)) => match s.as_str() {
                "on" | "true" | "yes" | "y" => Ok(Some(true)),
                "off" | "false" | "no" | "n" => Ok(Some(false)),
                _ => Err(invalid(format!("Parameter '{name}' expects 'on' or 'off', not '{s}'"))),
            },
            Some(v) => Err(wrong_type(name, "boolean", &v)),
        }
    }

    /// Takes an unsigned number or a size out; text may have the suffixes k, M, G, T,
    /// P, E (powers of 1024).
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Int(n)) => u64::try_from(n).map(Some).map_err(|_| {
                invalid(format!("Parameter '{name}' expects an unsigned 64-bit number, not {n}"))
            }),
            Some(Value::Str(s)) => match parse_size(&s) {
                Some(n) => Ok(Some(n)),
                None => Err(invalid(format!(
                    "Parameter '{name}' expects a number with an optional suffix k, M, G, T, P or E, not '{s}'"
                ))),
            },
            Some(v) => Err(wrong_type(name, "integer", &v)),
        }
    }

    /// Takes a word out that must be one of `words`.
    pub fn take_enum(&mut self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>> {
        let Some(s) = self.take_str(name)? else { return Ok(None) };
        match words.iter().find(|w| **w == s) {
            Some(w) => Ok(Some(w)),
            None => Err(invalid(format!("Parameter '{name}' does not accept value '{s}'"))
                .remedy(format!("use one of: {}", words.join(", ")))),
        }
    }

    /// Takes an object out.
    pub fn take_map(&mut self, name: &str) -> Result<Option<Options>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Map(m)) => Ok(Some(Options(m))),
            Some(v) => Err(wrong_type(name, "object", &v)),
        }
    }

    /// Takes a list out.
    pub fn take_list(&mut self, name: &str) -> Result<Option<Vec<Value>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::List(l)) => Ok(Some(l)),
            Some(v) => Err(wrong_type(name, "array", &v)),
        }
    }

    /// Fails when an option is left that nobody took.
    pub fn finish(self, whose: &str) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some((k, _)) => Err(invalid(format!("{whose} has no option '{k}'"))),
        }
    }
}

/// A size with an optional suffix: `64k`, `1G`, `1.5M`; `b` or nothing for bytes.
pub(crate) fn parse_size(s: &str) -> Option<u64> {
    if let Some(hex) = s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let split = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, suffix) = s.split_at(split);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(1 << shift),
        Some((whole, fraction)) => {
            let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
            if fraction.is_empty() || fraction.len() > 18 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            let part = fraction.parse::<u128>().ok()? * (1u128 << shift) / 10u128.pow(fraction.len() as u32);
            whole.checked_add(u64::try_from(part).ok()?)
        }
    }
}

impl Value {
    /// Reads a size as command lines write it: digits with an optional suffix k, M,
    /// G, T, P, E (powers of 1024), a fraction, or `0x` hexadecimal.
    pub fn parse_size(s: &str) -> Option<u64> {
        parse_size(s)
    }
}

fn invalid(msg: String) -> Error {
    Error::new(ErrorKind::InvalidInput, msg)
}

fn missing(name: &str) -> Error {
    invalid(format!("Parameter '{name}' is missing"))
}

fn wrong_type(name: &str, expected: &str, got: &Value) -> Error {
    invalid(format!("Invalid parameter type for '{name}', expected: {expected}, got: {}", got.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, n) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("64k", Some(65536)),
            ("1.5M", Some(1_572_864)),
            ("1G", Some(1 << 30)),
            ("8E", Some(8 << 60)),
            ("16E", None),
            ("0x200", Some(512)),
            ("", None),
            ("x", None),
            ("1kk", None),
            ("-1", None),
        ] {
            assert_eq!(parse_size(text), n, "{text}");
        }
    }

    #[test]
    fn leftovers_are_unknown_options() {
        let mut o = Options::new().with("a", "1").with("b", true);
        assert_eq!(o.take_size("a").unwrap(), Some(1));
        assert_eq!(o.clone().finish("driver 'x'").unwrap_err().to_string(), "driver 'x' has no option 'b'");
        assert_eq!(o.take_bool("b").unwrap(), Some(true));
        o.finish("driver 'x'").unwrap();
    }
}
