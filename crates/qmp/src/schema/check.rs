//! Does a value fit a type? And if so, the same value with typed leaves.
//!
//! The same walk serves JSON (leaves have types) and command lines (leaves are
//! text that the type says how to read). The texts of the errors are those of
//! QEMU's daemon.

use std::fmt::Write as _;

use dolmen_types::{Error, ErrorKind, Value};
use serde_json::Value as Json;

use super::{Builtin, ObjectDef, Schema, TypeDef, TypeId};
use crate::wire::QmpError;

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// JSON: strict types.
    Json,
    /// `key=value`: every leaf is text.
    Keyval,
}

enum Part {
    Key(&'static str),
    Index(usize),
}

/// Walks one value.
struct Walk<'a> {
    schema: &'a Schema,
    source: Source,
    path: Vec<Part>,
}

type Checked<T> = Result<T, QmpError>;

impl Schema {
    /// Checks a command's name and arguments.
    ///
    /// # Errors
    /// `CommandNotFound`, or what does not fit.
    pub fn check_command(
        &self,
        name: &str,
        arguments: Json,
        source: Source,
    ) -> Checked<(&'static str, Value)> {
        let Some(c) = self.commands.iter().find(|c| c.name == name) else {
            return Err(QmpError::command_not_found(format!("The command {name} has not been found")));
        };
        self.check(c.arguments, arguments, source).map(|v| (c.name, v))
    }

    /// Checks a node definition (`blockdev-add`, `--blockdev`).
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_blockdev(&self, value: Json, source: Source) -> Checked<Value> {
        self.check(self.blockdev, value, source)
    }

    /// Checks an export definition (`block-export-add`, `--export`).
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_export(&self, value: Json, source: Source) -> Checked<Value> {
        self.check(self.export, value, source)
    }

    /// Checks the options of `--nbd-server`, whose address is flat, unlike that of
    /// `nbd-server-start`.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_nbd_server(&self, value: Json, source: Source) -> Checked<Value> {
        self.check(self.nbd_server, value, source)
    }

    /// Checks what a command returns; for tests of the types that replies are made of.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_return(&self, command: &str, value: Json) -> Checked<Value> {
        let Some(c) = self.commands.iter().find(|c| c.name == command) else {
            return Err(QmpError::command_not_found(format!("The command {command} has not been found")));
        };
        self.check(c.returns, value, Source::Json)
    }

    /// Checks the data of an event; for tests.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_event(&self, event: &str, data: Json) -> Checked<Value> {
        let Some((_, ty)) = self.events.iter().find(|(n, _)| *n == event) else {
            return Err(QmpError::generic(format!("The event {event} has not been found")));
        };
        self.check(*ty, data, Source::Json)
    }

    fn check(&self, ty: TypeId, value: Json, source: Source) -> Checked<Value> {
        Walk { schema: self, source, path: Vec::new() }.value(ty, value)
    }
}

impl Walk<'_> {
    fn value(&mut self, ty: TypeId, value: Json) -> Checked<Value> {
        let schema = self.schema;
        match schema.def(ty) {
            TypeDef::Builtin(b) => self.builtin(*b, value),
            TypeDef::Enum(words) => {
                let Json::String(s) = value else { return Err(self.wrong_type("string")) };
                if words.iter().any(|w| *w == s) {
                    return Ok(Value::Str(s));
                }
                let text = format!("Parameter '{}' does not accept value '{s}'", self.last());
                let accepted = format!("use one of: {}", words.join(", "));
                Err(Error::new(ErrorKind::InvalidInput, text).remedy(accepted).into())
            }
            TypeDef::Array(of) => {
                let Json::Array(items) = value else { return Err(self.wrong_type("array")) };
                let mut out = Vec::with_capacity(items.len());
                for (i, item) in items.into_iter().enumerate() {
                    self.path.push(Part::Index(i));
                    out.push(self.value(*of, item)?);
                    self.path.pop();
                }
                Ok(Value::List(out))
            }
            TypeDef::Object(def) => {
                let Json::Object(members) = value else { return Err(self.wrong_type("object")) };
                self.object(def, members)
            }
            TypeDef::Alternate(name, of) => self.alternate(name, of, value),
        }
    }

    fn object(&mut self, def: &ObjectDef, mut members: serde_json::Map<String, Json>) -> Checked<Value> {
        let mut out = Vec::new();
        self.fields(def, &mut members, &mut out)?;
        if let Some((tag, branches)) = &def.union {
            let chosen = out.iter().find_map(|(k, v)| match v {
                Value::Str(s) if k == tag => branches.iter().find(|(name, _)| name == s),
                _ => None,
            });
            if let Some((_, branch)) = chosen
                && let TypeDef::Object(more) = self.schema.def(*branch)
            {
                self.fields(more, &mut members, &mut out)?;
            }
        }
        match members.into_iter().next() {
            None => Ok(Value::Map(out)),
            Some((key, value)) => {
                let mut name = self.render(self.path.len());
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(&key);
                Err(QmpError::generic(match (self.source, value) {
                    (Source::Keyval, Json::Object(_) | Json::Array(_)) => {
                        format!("Parameters '{name}.*' are unexpected")
                    }
                    _ => format!("Parameter '{name}' is unexpected"),
                }))
            }
        }
    }

    fn fields(
        &mut self,
        def: &ObjectDef,
        members: &mut serde_json::Map<String, Json>,
        out: &mut Vec<(String, Value)>,
    ) -> Checked<()> {
        for f in &def.fields {
            self.path.push(Part::Key(f.name));
            match members.shift_remove(f.name) {
                Some(v) => out.push((f.name.to_owned(), self.value(f.ty, v)?)),
                None if f.optional => {}
                None => {
                    return Err(QmpError::generic(format!(
                        "Parameter '{}' is missing",
                        self.render(self.path.len())
                    )));
                }
            }
            self.path.pop();
        }
        Ok(())
    }

    fn alternate(&mut self, name: &'static str, of: &[TypeId], value: Json) -> Checked<Value> {
        let schema = self.schema;
        let takes_null = of.iter().any(|t| matches!(schema.def(*t), TypeDef::Builtin(Builtin::Null)));
        if self.source == Source::Keyval && takes_null && value.as_str() == Some("") {
            return Ok(Value::Null);
        }
        let fits = |t: &&TypeId| {
            matches!(
                (schema.def(**t), &value),
                (TypeDef::Builtin(Builtin::Str) | TypeDef::Enum(_), Json::String(_))
                    | (TypeDef::Builtin(Builtin::Null), Json::Null)
                    | (TypeDef::Builtin(Builtin::Bool), Json::Bool(_))
                    | (TypeDef::Builtin(Builtin::Int | Builtin::Size), Json::Number(_))
                    | (TypeDef::Array(_), Json::Array(_))
                    | (TypeDef::Object(_), Json::Object(_))
            )
        };
        match of.iter().find(fits) {
            Some(t) => self.value(*t, value),
            None => Err(self.wrong_type(name)),
        }
    }

    fn builtin(&self, b: Builtin, value: Json) -> Checked<Value> {
        let generic = |text: String| Err(QmpError::generic(text));
        let path = || self.render(self.path.len());
        match (b, value, self.source) {
            (Builtin::Str, Json::String(s), _) => Ok(Value::Str(s)),
            (Builtin::Str, _, _) => Err(self.wrong_type("string")),
            (Builtin::Bool, Json::Bool(v), Source::Json) => Ok(Value::Bool(v)),
            (Builtin::Bool, Json::String(s), Source::Keyval) => match s.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
                "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
                _ => generic(format!("Parameter '{}' expects 'on' or 'off'", path())),
            },
            (Builtin::Bool, _, _) => Err(self.wrong_type("boolean")),
            (Builtin::Int | Builtin::Size, Json::Number(n), Source::Json) => match (n.as_u64(), n.as_i64()) {
                (Some(n), _) => Ok(Value::Int(n.into())),
                (None, Some(_)) => {
                    generic(format!("Parameter '{}' expects a number that is not negative", path()))
                }
                (None, None) => Err(self.wrong_type("integer")),
            },
            (Builtin::Int, Json::String(s), Source::Keyval) => match parse_int(&s) {
                Some(n) => Ok(Value::Int(n.into())),
                None => generic(format!("Parameter '{}' expects integer", path())),
            },
            (Builtin::Size, Json::String(s), Source::Keyval) => match Value::parse_size(&s) {
                Some(n) => Ok(Value::Int(n.into())),
                None => generic(format!(
                    "Parameter '{}' expects a number with an optional suffix k, M, G, T, P or E",
                    path()
                )),
            },
            (Builtin::Int | Builtin::Size, _, _) => Err(self.wrong_type("integer")),
            (Builtin::Null, Json::Null, _) => Ok(Value::Null),
            (Builtin::Null, _, _) => Err(self.wrong_type("null")),
            (Builtin::Number, v @ Json::Number(_), Source::Json) => Ok(crate::json::to_value(v, &path())?),
            (Builtin::Number, _, _) => Err(self.wrong_type("number")),
            (Builtin::Any, v, _) => Ok(crate::json::to_value(v, &path())?),
        }
    }

    fn wrong_type(&self, expected: &str) -> QmpError {
        QmpError::generic(format!(
            "Invalid parameter type for '{}', expected: {expected}",
            self.render(self.path.len())
        ))
    }

    /// The name of the innermost member; with its list where it is an item.
    fn last(&self) -> String {
        match self.path.last() {
            Some(Part::Key(k)) => (*k).to_owned(),
            _ => self.render(self.path.len()),
        }
    }

    fn render(&self, upto: usize) -> String {
        let mut out = String::new();
        for p in &self.path[..upto] {
            // Writing to a String can't fail.
            let _ = match (p, self.source) {
                (Part::Key(k), _) if out.is_empty() => write!(out, "{k}"),
                (Part::Key(k), _) => write!(out, ".{k}"),
                (Part::Index(i), Source::Json) => write!(out, "[{i}]"),
                (Part::Index(i), Source::Keyval) => write!(out, ".{i}"),
            };
        }
        out
    }
}

fn parse_int(s: &str) -> Option<u64> {
    match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => s.parse().ok(),
    }
}
