//! What keeps the code cheap to extend, as a test: `cargo xtask tidy`, and part of the tests of this crate.
//!
//! - Modules of a crate do not use each other in a circle.
//! - A crate depends only on what it uses, and the table of directions permits only what there is.
//! - The name of a driver, command or export type is written only where its row is.
//! - Files and functions end.
//! - `unsafe` stays in the crates that are read for it.
//!
//! What breaks a rule today stands in [`exceptions`], with the reason. An exception that is no longer needed is an error
//! too, so the list only shrinks.

mod circles;
mod exceptions;
mod names;
mod source;
mod unused;

use std::collections::{BTreeMap, BTreeSet};

use exceptions::Exceptions;
use source::Module;

/// Lines of a file.
const FILE_MAX: usize = 900;
/// Lines of code of a function: empty lines and comments don't count.
const FUNCTION_MAX: usize = 80;
/// Crates that may have `unsafe` code.
const UNSAFE: &[&str] = &["crates/rt", "crates/exports"];

/// Prints what is wrong.
pub(crate) fn run() -> Result<(), String> {
    let wrong = check(&source::workspace()?, &exceptions::today()?);
    let wrong = [wrong, unused::check()?].concat();
    if wrong.is_empty() {
        println!("tidy");
        return Ok(());
    }
    Err(wrong.join("\n"))
}

fn check(modules: &[Module], exceptions: &Exceptions) -> Vec<String> {
    let mut wrong = circles(modules, exceptions);
    wrong.extend(strays(modules, exceptions));
    wrong.extend(sizes(modules, exceptions));
    wrong.extend(unsafe_code(modules, exceptions));
    wrong
}

/// What becomes of an exception once the code is better.
pub(crate) const VAIN: &str = "is an exception that is no longer needed: take it out of xtask/tidy.txt";

fn circles(modules: &[Module], exceptions: &Exceptions) -> Vec<String> {
    let mut wrong = Vec::new();
    let all = circles::edges(modules);
    for (krate, edges) in &all {
        let mine = exceptions.circles.iter().filter(|e| e.0 == *krate);
        let mine: BTreeSet<_> = mine.map(|(_, f, t)| (f.clone(), t.clone())).collect();
        for e in &mine {
            if !edges.contains_key(e) || !circles::reaches(edges, &mine, &e.1, &e.0) {
                wrong.push(format!("{krate}: '{} -> {}' {VAIN}", e.0, e.1));
            }
        }
        // Each circle once: taking out its last edge shows the next.
        let mut without = mine;
        while let Some(way) = circles::circle(edges, &without) {
            let steps: Vec<_> =
                way.iter().cloned().zip(way.iter().skip(1).chain(way.first()).cloned()).collect();
            let told: Vec<String> =
                steps.iter().map(|s| format!("{} uses {} (line {})", s.0, s.1, edges[s])).collect();
            wrong.push(format!("{krate}: modules use each other in a circle: {}", told.join(", ")));
            without.extend(steps.last().cloned());
        }
    }
    for (krate, f, t) in exceptions.circles.iter().filter(|e| !all.contains_key(&e.0)) {
        wrong.push(format!("{krate}: '{f} -> {t}' {VAIN}"));
    }
    wrong
}

fn strays(modules: &[Module], exceptions: &Exceptions) -> Vec<String> {
    let mut wrong = Vec::new();
    let found = names::strays(modules);
    for (file, name, line) in &found {
        if !exceptions.names.iter().any(|(f, n)| f == file && n == name) {
            wrong.push(format!("{file}:{line}: '{name}' is the name of a row elsewhere: ask the row"));
        }
    }
    for (file, name) in &exceptions.names {
        if !found.iter().any(|(f, n, _)| f == file && n == name) {
            wrong.push(format!("{file}: '{name}' {VAIN}"));
        }
    }
    wrong
}

fn sizes(modules: &[Module], exceptions: &Exceptions) -> Vec<String> {
    let mut found: BTreeMap<(String, String), usize> = BTreeMap::new();
    for m in modules {
        let lines = m.text.lines().count();
        if lines > FILE_MAX {
            found.insert((m.file.clone(), String::new()), lines);
        }
        for f in source::functions(m).into_iter().filter(|f| f.lines > FUNCTION_MAX) {
            let most = found.entry((m.file.clone(), f.name)).or_default();
            *most = (*most).max(f.lines);
        }
    }
    let mut wrong = Vec::new();
    for ((file, function), lines) in &found {
        match exceptions.long.iter().find(|e| e.0 == *file && e.1 == *function) {
            Some((_, _, most)) if lines <= most => {}
            Some((_, _, most)) => wrong.push(format!(
                "{file} {function}: {lines} lines, its exception permits {most} and only shrinks"
            )),
            None if function.is_empty() => {
                wrong.push(format!("{file}: {lines} lines, more than {FILE_MAX}: it is two things"));
            }
            None => wrong.push(format!(
                "{file}: function {function} has {lines} lines of code, more than {FUNCTION_MAX}"
            )),
        }
    }
    for (file, function, _) in &exceptions.long {
        if !found.contains_key(&(file.clone(), function.clone())) {
            wrong.push(format!("{file}: the length of '{function}' {VAIN}"));
        }
    }
    wrong
}

fn unsafe_code(modules: &[Module], exceptions: &Exceptions) -> Vec<String> {
    let found: Vec<&String> = modules
        .iter()
        .filter(|m| !UNSAFE.contains(&m.krate.as_str()))
        .filter(|m| has_unsafe(m.text.parse().unwrap_or_default()))
        .map(|m| &m.file)
        .collect();
    let excepted = &exceptions.unsafe_code;
    let mut wrong: Vec<String> = found
        .iter()
        .filter(|f| !excepted.contains(f))
        .map(|f| format!("{f}: 'unsafe' is for {} only", UNSAFE.join(" and ")))
        .collect();
    for file in excepted.iter().filter(|f| !found.contains(f)) {
        wrong.push(format!("{file}: 'unsafe' {VAIN}"));
    }
    wrong
}

fn has_unsafe(tokens: proc_macro2::TokenStream) -> bool {
    tokens.into_iter().any(|t| match t {
        proc_macro2::TokenTree::Ident(i) => i == "unsafe",
        proc_macro2::TokenTree::Group(g) => has_unsafe(g.stream()),
        _ => false,
    })
}

#[cfg(test)]
mod tests;
