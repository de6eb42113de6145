//! The source files of the workspace, parsed.

use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// A module of a crate: one file.
pub(crate) struct Module {
    /// Path from the root of the workspace, with `/`.
    pub(crate) file: String,
    /// Directory of the crate, from the root of the workspace.
    pub(crate) krate: String,
    /// Names from the root of the crate; empty for `lib.rs` and `main.rs`.
    pub(crate) path: Vec<String>,
    /// A test, or only built for tests: what it names and imports is its own business.
    pub(crate) test: bool,
    pub(crate) text: String,
    pub(crate) syntax: syn::File,
}

/// Reads every crate of the workspace.
pub(crate) fn workspace() -> Result<Vec<Module>, String> {
    let root = crate::workspace::root();
    let mut crates: Vec<PathBuf> = list(&root.join("crates"))?;
    crates.push(root.join("xtask"));
    crates.push(root.join("fuzz"));
    let mut out = Vec::new();
    for krate in crates {
        let files = rust_files(&krate)?;
        let name = relative(&root, &krate);
        for file in files {
            let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            let inside = relative(&krate, &file);
            out.push(Module::parse(&name, &inside, text)?);
        }
    }
    mark_test_modules(&mut out);
    Ok(out)
}

impl Module {
    /// Parses a file `inside` the crate at `krate`.
    pub(crate) fn parse(krate: &str, inside: &str, text: String) -> Result<Module, String> {
        let file = format!("{krate}/{inside}");
        let syntax = syn::parse_file(&text).map_err(|e| format!("{file}: {e}"))?;
        let source = inside.strip_prefix("src/");
        let mut path: Vec<String> =
            source.unwrap_or(inside).trim_end_matches(".rs").split('/').map(str::to_owned).collect();
        if path.last().is_some_and(|l| l == "mod" || (path.len() == 1 && (l == "lib" || l == "main"))) {
            path.pop();
        }
        Ok(Module { file, krate: krate.to_owned(), path, test: source.is_none(), text, syntax })
    }
}

/// `#[cfg(test)] mod tests;` makes the file and everything below it a test.
fn mark_test_modules(modules: &mut [Module]) {
    let mut tests: Vec<(String, Vec<String>)> = Vec::new();
    for m in modules.iter() {
        for item in &m.syntax.items {
            if let syn::Item::Mod(child) = item
                && child.content.is_none()
                && is_test(&child.attrs)
            {
                let mut path = m.path.clone();
                path.push(child.ident.to_string());
                tests.push((m.krate.clone(), path));
            }
        }
    }
    for m in modules {
        m.test |= tests.iter().any(|(k, p)| *k == m.krate && m.path.starts_with(p));
    }
}

/// Has `#[cfg(test)]`, `#[cfg(all(test, ...))]`, or `#[test]`.
pub(crate) fn is_test(attrs: &[syn::Attribute]) -> bool {
    attrs.iter().any(|a| match &a.meta {
        syn::Meta::Path(p) => p.is_ident("test"),
        syn::Meta::List(l) if l.path.is_ident("cfg") => {
            l.tokens.clone().into_iter().next().is_some_and(|t| match t {
                proc_macro2::TokenTree::Ident(i) if i == "test" => true,
                proc_macro2::TokenTree::Ident(i) if i == "all" => l.tokens.to_string().contains("test"),
                _ => false,
            })
        }
        _ => false,
    })
}

/// Attributes of an item.
pub(crate) fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    use syn::Item as I;
    match item {
        I::Const(i) => &i.attrs,
        I::Enum(i) => &i.attrs,
        I::ExternCrate(i) => &i.attrs,
        I::Fn(i) => &i.attrs,
        I::ForeignMod(i) => &i.attrs,
        I::Impl(i) => &i.attrs,
        I::Macro(i) => &i.attrs,
        I::Mod(i) => &i.attrs,
        I::Static(i) => &i.attrs,
        I::Struct(i) => &i.attrs,
        I::Trait(i) => &i.attrs,
        I::TraitAlias(i) => &i.attrs,
        I::Type(i) => &i.attrs,
        I::Union(i) => &i.attrs,
        I::Use(i) => &i.attrs,
        _ => &[],
    }
}

/// A function with its lines of code: neither empty nor only a comment.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) lines: usize,
}

/// The functions of a file, also those of tests.
pub(crate) fn functions(m: &Module) -> Vec<Function> {
    struct Found<'a> {
        code: Vec<&'a str>,
        out: Vec<Function>,
    }
    impl Found<'_> {
        fn add(&mut self, name: &syn::Ident, body: &syn::Block) {
            let (from, to) =
                (body.brace_token.span.open().start().line, body.brace_token.span.close().end().line);
            let lines = self.code[from - 1..to].iter().filter(|l| is_code(l)).count();
            self.out.push(Function { name: name.to_string(), lines });
        }
    }
    impl<'ast> Visit<'ast> for Found<'_> {
        fn visit_item_fn(&mut self, f: &'ast syn::ItemFn) {
            self.add(&f.sig.ident, &f.block);
            visit::visit_item_fn(self, f);
        }
        fn visit_impl_item_fn(&mut self, f: &'ast syn::ImplItemFn) {
            self.add(&f.sig.ident, &f.block);
            visit::visit_impl_item_fn(self, f);
        }
        fn visit_trait_item_fn(&mut self, f: &'ast syn::TraitItemFn) {
            if let Some(body) = &f.default {
                self.add(&f.sig.ident, body);
            }
            visit::visit_trait_item_fn(self, f);
        }
    }
    let mut found = Found { code: m.text.lines().collect(), out: Vec::new() };
    found.visit_file(&m.syntax);
    found.out
}

fn is_code(line: &str) -> bool {
    let l = line.trim();
    !l.is_empty() && !l.starts_with("//")
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut out: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    out.sort();
    Ok(out)
}

fn rust_files(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut out = Vec::new();
    for path in list(dir)? {
        if path.is_dir() {
            if path.file_name().is_some_and(|n| n != "target") {
                out.extend(rust_files(&path)?);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
    Ok(out)
}

fn relative(base: &Path, path: &Path) -> String {
    path.strip_prefix(base).unwrap_or(path).to_string_lossy().into_owned()
}
