//! What breaks a rule today: `xtask/tidy.txt`.

/// The exceptions of each rule.
#[derive(Debug, Default)]
pub(crate) struct Exceptions {
    /// Crate, user and used module: one edge of each circle.
    pub(crate) circles: Vec<(String, String, String)>,
    /// File and name.
    pub(crate) names: Vec<(String, String)>,
    /// File, function (empty: the file itself), and lines.
    pub(crate) long: Vec<(String, String, usize)>,
    /// File with `unsafe` code.
    pub(crate) unsafe_code: Vec<String>,
}

/// Today's.
pub(crate) fn today() -> Result<Exceptions, String> {
    let file = crate::workspace::root().join("xtask/tidy.txt");
    parse(&std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?)
}

/// Sections `[rule] reason`, with a line for each exception; `#` begins a comment.
pub(crate) fn parse(text: &str) -> Result<Exceptions, String> {
    let mut out = Exceptions::default();
    let mut section = "";
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let wrong = || format!("tidy.txt: '{line}' is not what section '{section}' holds");
        if let Some(head) = line.strip_prefix('[') {
            let (rule, reason) = head.split_once(']').ok_or_else(wrong)?;
            if reason.trim().is_empty() {
                return Err(format!("tidy.txt: the section '{line}' gives no reason"));
            }
            section = rule;
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match (section.split_whitespace().collect::<Vec<_>>()[..].as_ref(), &words[..]) {
            (["circles", krate], [from, "->", to]) => {
                out.circles.push(((*krate).to_owned(), (*from).to_owned(), (*to).to_owned()));
            }
            (["names"], [file, names @ ..]) if !names.is_empty() => {
                out.names.extend(names.iter().map(|n| ((*file).to_owned(), (*n).to_owned())));
            }
            (["long"], [file, lines]) => {
                out.long.push(((*file).to_owned(), String::new(), lines.parse().map_err(|_| wrong())?));
            }
            (["long"], [file, function, lines]) => {
                let lines = lines.parse().map_err(|_| wrong())?;
                out.long.push(((*file).to_owned(), (*function).to_owned(), lines));
            }
            (["unsafe"], [file]) => out.unsafe_code.push((*file).to_owned()),
            _ => return Err(wrong()),
        }
    }
    Ok(out)
}
