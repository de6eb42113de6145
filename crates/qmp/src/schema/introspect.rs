//! `query-qmp-schema`: the schema in the form that clients key on.
//!
//! Names of types are numbers without meaning, given in the order in which they are
//! met; `[N]` is a list of `N`. Only builtin types, commands and events have names
//! that mean something.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::{Builtin, ObjectDef, Schema, TypeDef, TypeId};

/// Names types and remembers which have to be described.
#[derive(Default)]
struct Namer {
    names: HashMap<TypeId, String>,
    queue: Vec<TypeId>,
    /// Builtins met, by JSON name: `int` and sizes are one to a client.
    builtins: Vec<(&'static str, &'static str)>,
}

impl Schema {
    /// The reply of `query-qmp-schema`.
    pub fn introspection(&self) -> Json {
        let mut namer = Namer::default();
        let mut out = Vec::new();
        for c in &self.commands {
            let mut m = Map::new();
            m.insert("name".into(), json!(c.name));
            m.insert("ret-type".into(), json!(namer.name(self, c.returns)));
            m.insert("meta-type".into(), json!("command"));
            m.insert("arg-type".into(), json!(namer.name(self, c.arguments)));
            features(&mut m, c.features);
            out.push(Json::Object(m));
        }
        for (name, ty) in &self.events {
            out.push(json!({"name": name, "meta-type": "event", "arg-type": namer.name(self, *ty)}));
        }
        let mut next = 0;
        while let Some(ty) = namer.queue.get(next).copied() {
            next += 1;
            let name = namer.names[&ty].clone();
            out.push(self.describe(ty, &name, &mut namer));
        }
        for (name, json_type) in &namer.builtins {
            out.push(json!({"name": name, "json-type": json_type, "meta-type": "builtin"}));
        }
        Json::Array(out)
    }

    fn describe(&self, ty: TypeId, name: &str, namer: &mut Namer) -> Json {
        match self.def(ty) {
            // Builtins are described at the end.
            TypeDef::Builtin(_) => json!({}),
            TypeDef::Enum(words) => json!({
                "name": name,
                "members": words.iter().map(|w| json!({"name": w})).collect::<Vec<_>>(),
                "meta-type": "enum",
                "values": words,
            }),
            TypeDef::Array(of) => json!({
                "name": name,
                "element-type": namer.name(self, *of),
                "meta-type": "array",
            }),
            TypeDef::Alternate(_, of) => json!({
                "name": name,
                "members": of.iter().map(|t| json!({"type": namer.name(self, *t)})).collect::<Vec<_>>(),
                "meta-type": "alternate",
            }),
            TypeDef::Object(def) => self.describe_object(def, name, namer),
        }
    }

    fn describe_object(&self, def: &ObjectDef, name: &str, namer: &mut Namer) -> Json {
        let mut m = Map::new();
        m.insert("name".into(), json!(name));
        if let Some((tag, branches)) = &def.union {
            m.insert("tag".into(), json!(tag));
            let variants: Vec<_> = branches
                .iter()
                .map(|(case, ty)| json!({"case": case, "type": namer.name(self, *ty)}))
                .collect();
            m.insert("variants".into(), Json::Array(variants));
        }
        let members: Vec<_> = def
            .fields
            .iter()
            .map(|f| {
                let mut m = Map::new();
                m.insert("name".into(), json!(f.name));
                if f.optional {
                    m.insert("default".into(), Json::Null);
                }
                m.insert("type".into(), json!(namer.name(self, f.ty)));
                Json::Object(m)
            })
            .collect();
        m.insert("members".into(), Json::Array(members));
        m.insert("meta-type".into(), json!("object"));
        features(&mut m, &def.features);
        Json::Object(m)
    }
}

fn features(m: &mut Map<String, Json>, features: &[&'static str]) {
    if !features.is_empty() {
        m.insert("features".into(), json!(features));
    }
}

impl Namer {
    fn name(&mut self, schema: &Schema, ty: TypeId) -> String {
        if let TypeDef::Builtin(b) = schema.def(ty) {
            let pair = match b {
                Builtin::Str => ("str", "string"),
                Builtin::Int | Builtin::Size => ("int", "int"),
                Builtin::Number => ("number", "number"),
                Builtin::Bool => ("bool", "boolean"),
                Builtin::Null => ("null", "null"),
                Builtin::Any => ("any", "value"),
            };
            if !self.builtins.contains(&pair) {
                self.builtins.push(pair);
            }
            return pair.0.to_owned();
        }
        if let Some(n) = self.names.get(&ty) {
            return n.clone();
        }
        let name = match schema.def(ty) {
            TypeDef::Array(of) => format!("[{}]", self.name(schema, *of)),
            _ => self.names.values().filter(|n| !n.starts_with('[')).count().to_string(),
        };
        self.names.insert(ty, name.clone());
        self.queue.push(ty);
        name
    }
}
