//! Dependencies that nothing uses, in the manifests and in the table of directions.

use serde_json::Value;

/// Dependencies that are used without being named in the code, with the reason.
const UNNAMED: &[(&str, &str, &str)] = &[];

/// The dependencies that are not used.
pub(crate) fn check() -> Result<Vec<String>, String> {
    let metadata = crate::deps::metadata()?;
    let mut wrong = find(&metadata, &|dir| read(std::path::Path::new(dir)));
    wrong.extend(crate::deps::permitted_in_vain(&metadata));
    Ok(wrong)
}

/// `texts` gives the code below a directory.
fn find(metadata: &Value, texts: &dyn Fn(&str) -> String) -> Vec<String> {
    let mut wrong = Vec::new();
    for p in metadata["packages"].as_array().into_iter().flatten() {
        let name = p["name"].as_str().unwrap_or_default();
        let manifest = p["manifest_path"].as_str().unwrap_or_default();
        let dir = manifest.trim_end_matches("/Cargo.toml");
        let product = texts(&format!("{dir}/src"));
        let tests: String = ["tests", "examples", "benches"].map(|d| texts(&format!("{dir}/{d}"))).concat();
        for d in p["dependencies"].as_array().into_iter().flatten() {
            let on = d["rename"].as_str().or(d["name"].as_str()).unwrap_or_default();
            let word = on.replace('-', "_");
            let used = mentions(&product, &word) || (d["kind"] == "dev" && mentions(&tests, &word));
            if !used && !UNNAMED.iter().any(|(n, o, _)| *n == name && *o == on) {
                wrong.push(format!("{name} depends on {on} and does not use it"));
            }
        }
    }
    wrong
}

/// Has `word` as a word, outside of comments.
fn mentions(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.lines().filter(|l| !l.trim_start().starts_with("//")).any(|l| {
        l.match_indices(word).any(|(at, _)| {
            !l[..at].chars().next_back().is_some_and(part)
                && !l[at + word.len()..].chars().next().is_some_and(part)
        })
    })
}

fn read(dir: &std::path::Path) -> String {
    let mut out = String::new();
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        if path.is_dir() {
            out += &read(&path);
        } else if path.extension().is_some_and(|x| x == "rs") {
            out += &std::fs::read_to_string(path).unwrap_or_default();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unused_dependency_is_found() {
        let metadata = serde_json::json!({"packages": [{
            "name": "a", "manifest_path": "/a/Cargo.toml",
            "dependencies": [{"name": "used-one", "kind": null}, {"name": "used", "kind": null},
                {"name": "tested", "kind": "dev"}, {"name": "tested-too", "kind": null}],
        }]});
        let texts = |dir: &str| match dir {
            "/a/src" => "use used_one::X; // used\n// used".to_owned(),
            "/a/tests" => "tested::f(); tested_too::g();".to_owned(),
            _ => String::new(),
        };
        // A trailing comment is not looked for: `used` counts as used by it.
        assert_eq!(find(&metadata, &texts), ["a depends on tested-too and does not use it"]);
        let texts = |dir: &str| if dir == "/a/src" { "use used_one::X;".to_owned() } else { String::new() };
        assert_eq!(find(&metadata, &texts).len(), 3);
    }
}
