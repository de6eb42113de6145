//! Who may depend on whom: the table of ARCHITECTURE.md, checked against `cargo metadata`.
//!
//! The table is an allow list. A new crate, or a new edge between crates, fails here until
//! somebody has thought about its direction.

use serde_json::Value;

/// A crate, and the crates of the workspace that it may depend on.
const MAY: &[(&str, &[&str])] = &[
    ("dolmen-types", &[]),
    ("dolmen-rt", &["types"]),
    ("dolmen-graph", &["types", "rt"]),
    ("dolmen-nbd", &["types"]),
    ("dolmen-qmp", &["types"]),
    ("dolmen-copy", &["types", "rt", "graph"]),
    ("dolmen-formats", &["types", "rt", "graph"]),
    ("dolmen-protocols", &["types", "rt", "graph", "nbd"]),
    ("dolmen-filters", &["types", "rt", "graph"]),
    ("dolmen-jobs", &["types", "rt", "graph", "copy"]),
    ("dolmen-exports", &["types", "rt", "graph", "nbd"]),
    ("dolmen-control", &["types", "rt", "graph", "qmp", "jobs", "exports"]),
    ("dolmen-sim", &["types", "rt", "graph"]),
    (
        "dolmen",
        &[
            "types",
            "rt",
            "graph",
            "copy",
            "nbd",
            "qmp",
            "formats",
            "protocols",
            "filters",
            "exports",
            "control",
        ],
    ),
    // It sees the program from outside only.
    ("dolmen-storm", &[]),
    ("xtask", &["nbd"]),
];

/// Crates whose tests may use the simulation, and with it whole chains of real drivers.
const TESTED_WITH_SIM: &[&str] =
    &["dolmen-graph", "dolmen-formats", "dolmen-filters", "dolmen-copy", "dolmen-jobs", "dolmen-control"];

/// Prints what is wrong.
pub(crate) fn run() -> Result<(), String> {
    let wrong = check(&metadata()?);
    if wrong.is_empty() {
        println!("every dependency goes the right way");
        return Ok(());
    }
    Err(wrong.join("\n"))
}

/// The packages of the workspace as cargo sees them.
pub(crate) fn metadata() -> Result<Value, String> {
    let out = crate::workspace::cargo()
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    serde_json::from_slice(&out.stdout).map_err(|e| format!("cargo metadata: {e}"))
}

/// The edges that must not be.
fn check(metadata: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let text = |v: &Value, k: &str| v[k].as_str().unwrap_or_default().to_owned();
    let names: Vec<String> = packages.iter().map(|p| text(p, "name")).collect();
    for p in &packages {
        let name = text(p, "name");
        let Some((_, may)) = MAY.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!("crate {name} is not in the table: where is its place?"));
            continue;
        };
        for d in p["dependencies"].as_array().into_iter().flatten() {
            let on = text(d, "name");
            let dev = d["kind"] == "dev";
            if !names.contains(&on) {
                continue;
            }
            let short = on.strip_prefix("dolmen-").unwrap_or(&on);
            // Tests of these may put whole chains of real drivers on the simulated disk.
            let in_tests = dev
                && (on == name
                    || ["dolmen", "dolmen-sim"].contains(&name.as_str())
                    || TESTED_WITH_SIM.contains(&name.as_str()));
            if !may.contains(&short) && !in_tests {
                wrong.push(format!("{name} must not depend on {on}"));
            }
        }
    }
    for (name, _) in MAY {
        if !names.iter().any(|n| n == name) {
            wrong.push(format!("crate {name} of the table does not exist"));
        }
    }
    wrong
}

/// What the table permits and no manifest asks for: the next edge should be thought about as well.
pub(crate) fn permitted_in_vain(metadata: &Value) -> Vec<String> {
    let mut vain = Vec::new();
    for (name, may) in MAY {
        let package = metadata["packages"].as_array().into_iter().flatten().find(|p| p["name"] == *name);
        let Some(package) = package else { continue };
        let asked: Vec<&str> = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|d| d["kind"] != "dev")
            .filter_map(|d| d["name"].as_str())
            .map(|d| d.strip_prefix("dolmen-").unwrap_or(d))
            .collect();
        for on in may.iter().filter(|m| !asked.contains(m)) {
            vain.push(format!("{name} may depend on {on} and does not: take it from the table"));
        }
    }
    vain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dependency_goes_the_right_way() {
        let wrong = check(&metadata().unwrap());
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn a_wrong_edge_is_found() {
        let mut m = metadata().unwrap();
        let types =
            m["packages"].as_array_mut().unwrap().iter_mut().find(|p| p["name"] == "dolmen-types").unwrap();
        types["dependencies"] = serde_json::json!([{"name": "dolmen-graph", "kind": null}]);
        let wrong = check(&m);
        assert!(wrong.iter().any(|w| w == "dolmen-types must not depend on dolmen-graph"), "{wrong:?}");
    }

    #[test]
    fn what_is_permitted_in_vain_is_found() {
        let mut m = metadata().unwrap();
        assert_eq!(permitted_in_vain(&m), [""; 0]);
        let nbd =
            m["packages"].as_array_mut().unwrap().iter_mut().find(|p| p["name"] == "dolmen-nbd").unwrap();
        nbd["dependencies"] = serde_json::json!([{"name": "dolmen-types", "kind": "dev"}]);
        assert_eq!(
            permitted_in_vain(&m),
            ["dolmen-nbd may depend on types and does not: take it from the table"]
        );
    }
}
