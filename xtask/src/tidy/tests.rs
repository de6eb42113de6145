//! The rules hold, and each of them can fail: it is broken here in a small workspace, and in the real one.

use super::exceptions::parse;
use super::*;

fn modules(files: &[(&str, &str, &str)]) -> Vec<Module> {
    files.iter().map(|(k, f, t)| Module::parse(k, f, (*t).to_owned()).unwrap()).collect()
}

fn wrong(files: &[(&str, &str, &str)], exceptions: &str) -> Vec<String> {
    check(&modules(files), &parse(exceptions).unwrap())
}

#[test]
fn the_workspace_is_tidy() {
    let modules = source::workspace().unwrap();
    let wrong = check(&modules, &exceptions::today().unwrap());
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    let unused = unused::check().unwrap();
    assert!(unused.is_empty(), "\n{}", unused.join("\n"));
    // The rows are still recognized: else every name would be fine.
    let rows = names::rows(&modules);
    for name in
        ["qcow2", "null-co", "blkdebug", "copy-on-read", "blockdev-add", "block-stream", "query-block"]
    {
        assert!(rows.contains_key(name), "the row of '{name}' is not recognized: add its type to ROWS");
    }

    // Each exception is there for something: without it, its rule is broken.
    let today = exceptions::today().unwrap();
    let wrong = check(&modules, &Exceptions::default());
    for (file, name) in &today.names {
        assert!(wrong.iter().any(|w| w.starts_with(&format!("{file}:")) && w.contains(&format!("'{name}'"))));
    }
    for (file, function, _) in &today.long {
        assert!(wrong.iter().any(|w| w.starts_with(file.as_str()) && w.contains(function.as_str())));
    }
    let circles = wrong.iter().filter(|w| w.contains("in a circle")).count();
    assert!(today.circles.is_empty() || circles > 0);
}

#[test]
fn circles_are_found() {
    let through_the_root = [
        ("k", "src/lib.rs", "mod a; mod b; pub use b::B;"),
        ("k", "src/a.rs", "use crate::B; pub struct A(B);"),
        ("k", "src/b.rs", "pub struct B; fn f() { let _: Option<crate::a::A> = None; }"),
    ];
    let found = wrong(&through_the_root, "");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("a uses b (line 1), b uses a (line 1)"), "{found:?}");
    assert_eq!(wrong(&through_the_root, "[circles k] reason\nb -> a"), [""; 0]);
    // Passing names on is not using them; a test may use what it likes.
    let none = [
        ("k", "src/lib.rs", "mod a; mod b; pub use b::B; pub struct Root;"),
        ("k", "src/a.rs", "use crate::B; pub struct A(B);"),
        ("k", "src/b.rs", "use crate::Root; pub struct B(Root); #[cfg(test)] mod tests { use crate::a::A; }"),
    ];
    assert_eq!(wrong(&none, ""), [""; 0]);
    // In a macro, with `super`, and among children of a module.
    let in_a_macro = [
        ("k", "src/lib.rs", "mod m;"),
        ("k", "src/m/mod.rs", "mod x; mod y;"),
        ("k", "src/m/x.rs", "pub(crate) fn x() { println!(\"{}\", super::y::y()); }"),
        ("k", "src/m/y.rs", "use super::x::x; pub(crate) fn y() -> u8 { x(); 0 }"),
    ];
    assert!(wrong(&in_a_macro, "")[0].contains("m::x uses m::y (line 1), m::y uses m::x (line 1)"));
}

#[test]
fn an_exception_that_is_not_needed_is_an_error() {
    let files = [
        ("k", "src/lib.rs", "mod a; mod b;"),
        ("k", "src/a.rs", "use crate::b::B; pub struct A(B);"),
        ("k", "src/b.rs", "pub struct B;"),
    ];
    for exceptions in [
        "[circles k] reason\na -> b",
        "[circles k] reason\nb -> a",
        "[circles other] reason\na -> b",
        "[names] reason\nk/src/a.rs qcow2",
        "[long] reason\nk/src/a.rs 1000",
        "[long] reason\nk/src/a.rs f 100",
        "[unsafe] reason\nk/src/a.rs",
    ] {
        let found = wrong(&files, exceptions);
        assert!(found.len() == 1 && found[0].contains(VAIN), "{exceptions}: {found:?}");
    }
    assert!(parse("[unsafe]\nk/src/a.rs").unwrap_err().contains("gives no reason"));
}

#[test]
fn a_name_in_another_place_is_found() {
    let files = [
        ("k", "src/lib.rs", "mod q; mod other;"),
        ("k", "src/q.rs", "static Q: DriverKind = DriverKind { name: \"q2\", x: 1 }; fn f() { g(\"q2\"); }"),
        ("k", "src/other.rs", "fn f(x: &str) -> bool {\n x == \"q2\" || matches!(x, \"q2\") }"),
    ];
    let found = wrong(&files, "");
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("k/src/other.rs:2: 'q2' is the name of a row elsewhere"), "{found:?}");
    assert_eq!(wrong(&files, "[names] reason\nk/src/other.rs q2"), [""; 0]);
}

#[test]
fn what_is_too_long_is_found() {
    let line = "    f();\n";
    let function = format!("fn g() {{\n{}}}\n", line.repeat(FUNCTION_MAX - 2));
    assert_eq!(wrong(&[("k", "src/lib.rs", &function)], ""), [""; 0]);
    // Comments and empty lines are free.
    let commented = function.replacen(line, &format!("{line}    // why\n\n"), 1);
    assert_eq!(wrong(&[("k", "src/lib.rs", &commented)], ""), [""; 0]);
    let longer = function.replacen(line, &line.repeat(2), 1);
    let found = wrong(&[("k", "src/lib.rs", &longer)], "");
    assert!(found[0].contains("function g has 81 lines of code"), "{found:?}");
    // A test is code as well; an exception does not grow.
    assert_eq!(wrong(&[("k", "tests/it.rs", &longer)], "").len(), 1);
    assert_eq!(wrong(&[("k", "src/lib.rs", &longer)], "[long] reason\nk/src/lib.rs g 81"), [""; 0]);
    let grown = wrong(&[("k", "src/lib.rs", &longer)], "[long] reason\nk/src/lib.rs g 80");
    assert!(grown[0].contains("only shrinks"), "{grown:?}");
    let file = "// x\n".repeat(FILE_MAX + 1);
    assert!(wrong(&[("k", "src/lib.rs", &file)], "")[0].contains("901 lines"));
}

#[test]
fn unsafe_code_is_found() {
    let code = "fn f() { unsafe { g() } }";
    assert_eq!(wrong(&[("crates/graph", "tests/it.rs", code)], "").len(), 1);
    assert_eq!(wrong(&[("crates/rt", "src/lib.rs", code)], ""), [""; 0]);
    assert_eq!(wrong(&[("crates/graph", "src/lib.rs", "#![forbid(unsafe_code)] // unsafe")], ""), [""; 0]);
}
