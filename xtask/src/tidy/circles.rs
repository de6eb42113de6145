//! Which module of a crate uses which, and circles among them.
//!
//! A module is a file. It uses another if one of its paths ends there, after following what modules on the way
//! re-export: who imports `crate::Name` uses the module that defines `Name`, not the root. A module that only passes on
//! the names of others uses none of them. Paths inside macros count as well.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::source::{self, Module};

/// Used module, and the line of the first use, for each user.
pub(crate) type Edges = BTreeMap<(String, String), usize>;

/// The edges among the modules of each crate, by the directory of the crate.
pub(crate) fn edges(modules: &[Module]) -> BTreeMap<String, Edges> {
    let mut out: BTreeMap<String, Edges> = BTreeMap::new();
    let crates: BTreeSet<&str> = modules.iter().map(|m| m.krate.as_str()).collect();
    for krate in crates {
        let names = Names::of(modules.iter().filter(|m| m.krate == krate && m.file.contains("/src/")));
        let edges = out.entry(krate.to_owned()).or_default();
        for m in names.modules.values().filter(|m| !m.test) {
            let mut walk = Uses { names: &names, from: m, edges, used: used_names(m) };
            walk.visit_file(&m.syntax);
        }
    }
    out
}

/// A circle: its modules in order, each using the next and the last the first.
pub(crate) fn circle(edges: &Edges, without: &BTreeSet<(String, String)>) -> Option<Vec<String>> {
    let mut next: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in edges.keys().filter(|e| !without.contains(*e)) {
        next.entry(from).or_default().push(to);
    }
    // The shortest way back from each module: small graphs, and a short circle is the easiest to understand.
    let mut best: Option<Vec<String>> = None;
    for start in next.keys() {
        let mut came: HashMap<&str, &str> = HashMap::new();
        let mut queue = std::collections::VecDeque::from([*start]);
        'search: while let Some(at) = queue.pop_front() {
            for to in next.get(at).into_iter().flatten() {
                if to == start {
                    let mut way = vec![at.to_owned()];
                    let mut back = at;
                    while back != *start {
                        back = came[back];
                        way.push(back.to_owned());
                    }
                    way.reverse();
                    if best.as_ref().is_none_or(|b| way.len() < b.len()) {
                        best = Some(way);
                    }
                    break 'search;
                }
                if !came.contains_key(to) {
                    came.insert(to, at);
                    queue.push_back(to);
                }
            }
        }
    }
    best
}

/// Whether `from` uses `to` in any number of steps.
pub(crate) fn reaches(edges: &Edges, without: &BTreeSet<(String, String)>, from: &str, to: &str) -> bool {
    let mut seen = BTreeSet::from([from]);
    let mut todo = vec![from];
    while let Some(at) = todo.pop() {
        if at == to {
            return true;
        }
        let next = edges.keys().filter(|e| e.0 == at && !without.contains(*e)).map(|e| e.1.as_str());
        todo.extend(next.filter(|n| seen.insert(n)));
    }
    false
}

/// What the modules of a crate are called and what names they bind.
struct Names<'a> {
    modules: BTreeMap<Vec<String>, &'a Module>,
    /// For each module: a bound name and the path it stands for.
    imports: HashMap<Vec<String>, HashMap<String, Vec<String>>>,
    /// Names that the modules define themselves.
    defined: HashMap<Vec<String>, BTreeSet<String>>,
}

impl<'a> Names<'a> {
    fn of(modules: impl Iterator<Item = &'a Module>) -> Names<'a> {
        let mut names = Names { modules: BTreeMap::new(), imports: HashMap::new(), defined: HashMap::new() };
        for m in modules {
            // The root of a binary beside a library.
            let mut path = m.path.clone();
            if m.file.ends_with("src/main.rs") {
                path = vec!["main".to_owned()];
            }
            let imports = names.imports.entry(path.clone()).or_default();
            let defined = names.defined.entry(path.clone()).or_default();
            for item in &m.syntax.items {
                if source::is_test(source::attributes(item)) {
                    continue;
                }
                match item {
                    syn::Item::Use(u) => {
                        for leaf in leaves(&u.tree) {
                            imports.insert(leaf.name.clone(), leaf.path);
                        }
                    }
                    other => defined.extend(defines(other)),
                }
            }
            names.modules.insert(path, m);
        }
        names
    }

    /// The module in which a path ends that is written in `from`.
    fn resolve(&self, from: &[String], path: &[String], depth: usize) -> Option<Vec<String>> {
        let mut rest = path;
        let mut at: Vec<String> = match rest.first()?.as_str() {
            "crate" => Vec::new(),
            "self" => from.to_vec(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            child => {
                let inside = [from, &[child.to_owned()]].concat();
                let binary = vec![child.to_owned()];
                if self.modules.contains_key(&inside) {
                    inside
                } else if from == ["main"] && self.modules.contains_key(&binary) {
                    binary
                } else {
                    return None;
                }
            }
        };
        rest = &rest[1..];
        while let Some((name, after)) = rest.split_first() {
            if name == "super" {
                at.pop()?;
            } else if let inside = [&at[..], std::slice::from_ref(name)].concat()
                && self.modules.contains_key(&inside)
            {
                at = inside;
            } else {
                return Some(self.owner(at, name, depth));
            }
            rest = after;
        }
        Some(at)
    }

    /// The module that defines a name which `at` has.
    fn owner(&self, at: Vec<String>, name: &str, depth: usize) -> Vec<String> {
        let defines = |p: &Vec<String>| self.defined.get(p).is_some_and(|d| d.contains(name));
        let main = vec!["main".to_owned()];
        if at.is_empty() && !defines(&at) && defines(&main) {
            return main;
        }
        if depth < 8
            && let Some(path) = self.imports.get(&at).and_then(|i| i.get(name))
            && let Some(to) = self.resolve(&at, path, depth + 1)
        {
            return to;
        }
        at
    }
}

/// A name bound by a `use`.
struct Leaf {
    name: String,
    path: Vec<String>,
}

fn leaves(tree: &syn::UseTree) -> Vec<Leaf> {
    fn walk(tree: &syn::UseTree, before: &[String], out: &mut Vec<Leaf>) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(p) => walk(&p.tree, &with(&p.ident), out),
            syn::UseTree::Group(g) => g.items.iter().for_each(|t| walk(t, before, out)),
            syn::UseTree::Name(n) if n.ident == "self" => {
                out.push(Leaf { name: before.last().cloned().unwrap_or_default(), path: before.to_vec() })
            }
            syn::UseTree::Name(n) => out.push(Leaf { name: n.ident.to_string(), path: with(&n.ident) }),
            syn::UseTree::Rename(r) => {
                out.push(Leaf { name: r.rename.to_string(), path: with(&r.ident) });
            }
            syn::UseTree::Glob(_) => out.push(Leaf { name: "*".to_owned(), path: before.to_vec() }),
        }
    }
    let mut out = Vec::new();
    walk(tree, &[], &mut out);
    out
}

fn defines(item: &syn::Item) -> Option<String> {
    use syn::Item as I;
    let ident = match item {
        I::Const(i) => &i.ident,
        I::Enum(i) => &i.ident,
        I::Fn(i) => &i.sig.ident,
        I::Macro(i) => i.ident.as_ref()?,
        I::Static(i) => &i.ident,
        I::Struct(i) => &i.ident,
        I::Trait(i) => &i.ident,
        I::Type(i) => &i.ident,
        I::Union(i) => &i.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

/// First names of all paths outside of imports: with these a module uses what it also passes on.
fn used_names(m: &Module) -> BTreeSet<String> {
    #[derive(Default)]
    struct Found(BTreeSet<String>);
    impl<'ast> Visit<'ast> for Found {
        fn visit_item(&mut self, item: &'ast syn::Item) {
            if !source::is_test(source::attributes(item)) {
                visit::visit_item(self, item);
            }
        }
        fn visit_path(&mut self, p: &'ast syn::Path) {
            self.0.extend(p.segments.first().map(|s| s.ident.to_string()));
            visit::visit_path(self, p);
        }
        fn visit_macro(&mut self, m: &'ast syn::Macro) {
            words(m.tokens.clone(), &mut self.0);
            visit::visit_macro(self, m);
        }
    }
    fn words(tokens: TokenStream, out: &mut BTreeSet<String>) {
        for t in tokens {
            match t {
                TokenTree::Ident(i) => {
                    out.insert(i.to_string());
                }
                TokenTree::Group(g) => words(g.stream(), out),
                _ => {}
            }
        }
    }
    let mut found = Found::default();
    found.visit_file(&m.syntax);
    found.0
}

struct Uses<'a> {
    names: &'a Names<'a>,
    from: &'a Module,
    edges: &'a mut Edges,
    used: BTreeSet<String>,
}

impl Uses<'_> {
    fn here(&self) -> Vec<String> {
        if self.from.file.ends_with("src/main.rs") { vec!["main".to_owned()] } else { self.from.path.clone() }
    }

    fn add(&mut self, path: &[String], line: usize) {
        let here = self.here();
        if let Some(to) = self.names.resolve(&here, path, 0)
            && to != here
            && self.names.modules.get(&to).is_some_and(|m| !m.test)
        {
            self.edges.entry((text(&here), text(&to))).or_insert(line);
        }
    }

    /// Paths in a macro, which is not parsed: names joined by `::`.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        let mut line = 0;
        for t in tokens {
            match t {
                TokenTree::Punct(p) if p.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Ident(i) => {
                    if colons != 2 {
                        self.end(&mut path, line);
                    }
                    line = i.span().start().line;
                    path.push(i.to_string());
                }
                TokenTree::Group(g) => {
                    self.end(&mut path, line);
                    self.tokens(g.stream());
                }
                _ => self.end(&mut path, line),
            }
            colons = 0;
        }
        self.end(&mut path, line);
    }

    fn end(&mut self, path: &mut Vec<String>, line: usize) {
        if path.len() > 1 {
            self.add(path, line);
        }
        path.clear();
    }
}

/// A module in words: `a::b`, or `crate` for the root.
fn text(path: &[String]) -> String {
    if path.is_empty() { "crate".to_owned() } else { path.join("::") }
}

impl<'ast> Visit<'ast> for Uses<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !source::is_test(source::attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, u: &'ast syn::ItemUse) {
        let passes_on = !matches!(u.vis, syn::Visibility::Inherited);
        let line = u.use_token.span.start().line;
        for leaf in leaves(&u.tree) {
            if !passes_on || self.used.contains(&leaf.name) {
                self.add(&leaf.path, line);
            }
        }
    }

    fn visit_path(&mut self, p: &'ast syn::Path) {
        if p.segments.len() > 1 {
            let path: Vec<String> = p.segments.iter().map(|s| s.ident.to_string()).collect();
            self.add(&path, p.segments[0].ident.span().start().line);
        }
        visit::visit_path(self, p);
    }

    fn visit_macro(&mut self, m: &'ast syn::Macro) {
        self.tokens(m.tokens.clone());
        visit::visit_macro(self, m);
    }
}
