//! JSON laid out as QEMU's image tools lay it out: four blanks of indentation, and
//! an empty list or object still takes two lines.

use serde_json::Value;

/// The text, without a newline at the end.
pub(crate) fn pretty(v: &Value) -> String {
    let mut out = String::new();
    write(v, 0, &mut out);
    out
}

fn write(v: &Value, depth: usize, out: &mut String) {
    let indent = |out: &mut String, n: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', 4 * n));
    };
    match v {
        Value::Array(l) => {
            out.push('[');
            for (i, v) in l.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                indent(out, depth + 1);
                write(v, depth + 1, out);
            }
            indent(out, depth);
            out.push(']');
        }
        Value::Object(m) => {
            out.push('{');
            for (i, (k, v)) in m.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                indent(out, depth + 1);
                out.push_str(&dolmen_qmp::json::to_text(k, false));
                out.push_str(": ");
                write(v, depth + 1, out);
            }
            indent(out, depth);
            out.push('}');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            out.push_str(&dolmen_qmp::json::to_text(v, false));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn layout() {
        assert_eq!(
            pretty(&json!({"children": [], "a": {"b": 1, "c": "x"}, "l": [true]})),
            "{\n    \"children\": [\n    ],\n    \"a\": {\n        \"b\": 1,\n        \"c\": \"x\"\n    },\n    \"l\": [\n        true\n    ]\n}"
        );
    }
}
