//! Names of drivers, commands and export types, and where else they are written.
//!
//! A name belongs to its row. What the program does with a driver it asks the row, so that a new driver is a new row and
//! nothing else. A name in another place is how that ends: a comparison with "qcow2" that its successor does not pass.

use std::collections::BTreeMap;

use syn::visit::{self, Visit};

use super::source::{self, Module};

/// Types of rows. A value of one of these with a literal `name` makes a name, and so does a call of a function of
/// the same file whose first argument is a text, in a static item of such a type.
const ROWS: &[&str] = &["DriverKind", "CommandRow", "Command", "ExportKind", "JobKind"];

/// Crates that don't look at the rest from inside: testers, simulation, tools for developers.
const OUTSIDE: &[&str] = &["crates/storm", "crates/sim", "xtask", "fuzz"];

/// Names that mean something else as well, so that the word alone says nothing.
const AMBIGUOUS: &[(&str, &str)] = &[
    ("file", "the name of the child"),
    ("nbd", "the export type, the driver and the URL scheme"),
    ("gone", "an ordinary word"),
    ("type", "the name of an argument; a constant of a row makes it"),
];

/// A name and where it is at home: the directory, or the file, that its row is in.
pub(crate) fn rows(modules: &[Module]) -> BTreeMap<String, String> {
    #[derive(Default)]
    struct Rows {
        names: Vec<String>,
        /// Inside of a static item that holds rows.
        inside: bool,
    }
    impl<'ast> Visit<'ast> for Rows {
        fn visit_item_static(&mut self, i: &'ast syn::ItemStatic) {
            self.inside = is_row(&i.ty);
            visit::visit_item_static(self, i);
            self.inside = false;
        }
        fn visit_item_const(&mut self, i: &'ast syn::ItemConst) {
            self.inside = is_row(&i.ty);
            visit::visit_item_const(self, i);
            self.inside = false;
        }
        fn visit_expr_call(&mut self, c: &'ast syn::ExprCall) {
            if self.inside
                && let Some(syn::Expr::Lit(l)) = c.args.first()
                && let syn::Lit::Str(name) = &l.lit
                && let syn::Expr::Path(maker) = &*c.func
                && (maker.path.get_ident().is_some()
                    || ROWS.iter().any(|r| maker.path.segments[0].ident == r))
            {
                self.names.push(name.value());
            }
            visit::visit_expr_call(self, c);
        }
        fn visit_expr_struct(&mut self, s: &'ast syn::ExprStruct) {
            if s.path.segments.last().is_some_and(|l| ROWS.iter().any(|r| l.ident == r)) {
                for f in &s.fields {
                    if let (syn::Member::Named(n), syn::Expr::Lit(l)) = (&f.member, &f.expr)
                        && (n == "name" || n == "command")
                        && let syn::Lit::Str(name) = &l.lit
                    {
                        self.names.push(name.value());
                    }
                }
            }
            visit::visit_expr_struct(self, s);
        }
        fn visit_macro(&mut self, m: &'ast syn::Macro) {
            // Rows in a macro: `DriverKind { name: "x"`.
            if let Ok(e) = syn::parse2::<syn::Expr>(m.tokens.clone()) {
                self.visit_expr_owned(&e);
            }
        }
    }
    impl Rows {
        fn visit_expr_owned(&mut self, e: &syn::Expr) {
            let mut inner = Rows::default();
            inner.visit_expr(e);
            self.names.append(&mut inner.names);
        }
    }
    let mut out = BTreeMap::new();
    for m in ours(modules) {
        let mut rows = Rows::default();
        rows.visit_file(&m.syntax);
        for name in rows.names {
            out.entry(name).or_insert_with(|| home(&m.file));
        }
    }
    out.retain(|name, _| !AMBIGUOUS.iter().any(|(a, _)| a == name));
    out
}

/// One of the types of rows, or a list of them.
fn is_row(ty: &syn::Type) -> bool {
    match ty {
        syn::Type::Reference(r) => is_row(&r.elem),
        syn::Type::Slice(s) => is_row(&s.elem),
        syn::Type::Array(a) => is_row(&a.elem),
        syn::Type::Path(p) => p.path.segments.last().is_some_and(|l| ROWS.iter().any(|r| l.ident == r)),
        _ => false,
    }
}

fn ours(modules: &[Module]) -> impl Iterator<Item = &Module> {
    modules.iter().filter(|m| !m.test && !OUTSIDE.contains(&m.krate.as_str()))
}

/// The directory of a module that has one to itself, else its file.
fn home(file: &str) -> String {
    match file.rsplit_once('/') {
        Some((dir, _)) if !dir.ends_with("/src") => format!("{dir}/"),
        _ => file.to_owned(),
    }
}

/// Where a name is written that has its home elsewhere: file and name.
pub(crate) fn strays(modules: &[Module]) -> Vec<(String, String, usize)> {
    let rows = rows(modules);
    let mut out = Vec::new();
    for m in ours(modules) {
        let mut found = Literals::default();
        found.visit_file(&m.syntax);
        for (text, line) in found.0 {
            if let Some(home) = rows.get(&text)
                && !m.file.starts_with(home.as_str())
            {
                out.push((m.file.clone(), text, line));
            }
        }
    }
    out
}

/// Texts in the code of a file, but not of its tests.
#[derive(Default)]
struct Literals(Vec<(String, usize)>);

impl<'ast> Visit<'ast> for Literals {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !source::is_test(source::attributes(item)) {
            visit::visit_item(self, item);
        }
    }
    // Attributes hold documentation.
    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
    fn visit_lit_str(&mut self, s: &'ast syn::LitStr) {
        self.0.push((s.value(), s.span().start().line));
    }
    fn visit_macro(&mut self, m: &'ast syn::Macro) {
        self.tokens(m.tokens.clone());
    }
}

impl Literals {
    fn tokens(&mut self, tokens: proc_macro2::TokenStream) {
        for t in tokens {
            match t {
                proc_macro2::TokenTree::Literal(l) => {
                    let line = l.span().start().line;
                    if let syn::Lit::Str(s) = syn::Lit::new(l) {
                        self.0.push((s.value(), line));
                    }
                }
                proc_macro2::TokenTree::Group(g) => self.tokens(g.stream()),
                _ => {}
            }
        }
    }
}
