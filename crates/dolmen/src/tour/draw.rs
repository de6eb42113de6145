//! Draws the block graph as a tree, with needs and allows on the edges.

use std::collections::HashSet;

use crate::out;
use dolmen::types::{Error, ErrorKind, Result};
use serde_json::Value as Json;

struct Edge {
    parent: u64,
    child: u64,
    name: String,
    needs: String,
    allows: String,
}

/// Draws the answer to `x-debug-query-block-graph`.
/// Nodes have their drivers from that to `query-named-block-nodes`.
pub(super) fn graph(reply: &Json, named: &Json) -> Result<()> {
    let bad = || Error::new(ErrorKind::Corrupt, format!("not a block graph: {reply}"));
    let nodes = reply["nodes"].as_array().ok_or_else(bad)?;
    let edges: Vec<Edge> = reply["edges"]
        .as_array()
        .ok_or_else(bad)?
        .iter()
        .map(|e| {
            Some(Edge {
                parent: e["parent"].as_u64()?,
                child: e["child"].as_u64()?,
                name: e["name"].as_str()?.to_owned(),
                needs: letters(&e["perm"])?,
                allows: letters(&e["shared-perm"])?,
            })
        })
        .collect::<Option<_>>()
        .ok_or_else(bad)?;
    let name = |id: u64| {
        let node = nodes.iter().find(|n| n["id"].as_u64() == Some(id));
        node.map_or(String::from("?"), |n| {
            let name = n["name"].as_str().unwrap_or("-");
            let info = named.as_array().into_iter().flatten().find(|i| i["node-name"] == name);
            let kind = info.map_or(&n["type"], |i| &i["drv"]);
            format!("{name} ({})", kind.as_str().unwrap_or("-"))
        })
    };
    out!(
        "  r CONSISTENT_READ, w WRITE, u WRITE_UNCHANGED, s RESIZE; on each edge: what it needs / what it shares"
    );
    let children: HashSet<u64> = edges.iter().map(|e| e.child).collect();
    for root in nodes.iter().filter_map(|n| n["id"].as_u64()).filter(|id| !children.contains(id)) {
        out!("  {}", name(root));
        below(root, "  ", &edges, &name);
    }
    Ok(())
}

fn below(parent: u64, indent: &str, edges: &[Edge], name: &dyn Fn(u64) -> String) {
    let mine: Vec<&Edge> = edges.iter().filter(|e| e.parent == parent).collect();
    for (i, e) in mine.iter().enumerate() {
        let last = i + 1 == mine.len();
        let (branch, more) = if last { ("└─", "   ") } else { ("├─", "│  ") };
        out!("{indent}{branch} {} [{} / {}] -> {}", e.name, e.needs, e.allows, name(e.child));
        below(e.child, &format!("{indent}{more}"), edges, name);
    }
}

/// Permission words as letters.
fn letters(words: &Json) -> Option<String> {
    let words: Vec<&str> = words.as_array()?.iter().filter_map(Json::as_str).collect();
    let text: String = [("consistent-read", 'r'), ("write", 'w'), ("write-unchanged", 'u'), ("resize", 's')]
        .into_iter()
        .filter(|(w, _)| words.contains(w))
        .map(|(_, c)| c)
        .collect();
    Some(if text.is_empty() { "-".into() } else { text })
}
