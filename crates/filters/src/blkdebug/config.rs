//! The configuration file of `blkdebug`:
//!
//! ```text
//! # Fail the second write.
//! [set-state]
//! event = "write_aio"
//! new_state = "2"
//!
//! [inject-error]
//! event = "write_aio"
//! state = "2"
//! errno = "28"
//! ```
//!
//! A section may carry a quoted name, which means nothing. What follows the closing quote
//! of a value is ignored.

use dolmen_types::{Error, ErrorKind, Options, Result, ResultExt};

use super::rules::Rules;

/// Adds the rules of the file to `rules`.
pub(super) fn parse(text: &str, rules: &mut Rules) -> Result<()> {
    // Section, line of its head, members so far.
    let mut open: Option<(String, usize, Options)> = None;
    let mut close = |open: Option<(String, usize, Options)>| match open {
        None => Ok(()),
        Some((section, line, members)) => {
            rules.add(&section, members).context(|| format!("section in line {line}"))
        }
    };
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[') {
            close(open.take())?;
            let section = head.find(']').map(|end| &head[..end]).and_then(|h| h.split_whitespace().next());
            let section = section.ok_or_else(|| wrong(number, "a section is [name]"))?;
            open = Some((section.to_owned(), number, Options::new()));
        } else {
            let (key, value) = member(line).ok_or_else(|| wrong(number, "an option is key = \"value\""))?;
            match &mut open {
                Some((_, _, members)) => members.set(key, value),
                None => return Err(wrong(number, "no group defined")),
            }
        }
    }
    close(open)
}

/// `key = "value"`.
fn member(line: &str) -> Option<(&str, &str)> {
    let (key, rest) = line.split_once('=')?;
    let (value, _) = rest.trim().strip_prefix('"')?.split_once('"')?;
    let key = key.trim();
    (!key.is_empty()).then_some((key, value))
}

fn wrong(line: usize, what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("line {line}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_become_rules() {
        let text = "# comment\n\n[inject-error \"x\"]\n  event = \"read_aio\"   # why\nonce=\"on\"\n\
                    [set-state]\nevent = \"write_aio\"\nnew_state = \"2\"\n";
        let mut found = Rules::default();
        parse(text, &mut found).unwrap();
        let mut expected = Rules::default();
        expected.add("inject-error", Options::new().with("event", "read_aio").with("once", true)).unwrap();
        expected.add("set-state", Options::new().with("event", "write_aio").with("new_state", 2)).unwrap();
        assert_eq!(found, expected);
        let mut none = Rules::default();
        parse("", &mut none).unwrap();
        assert_eq!(none, Rules::default());
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, says) in [
            ("garbage\n", "line 1: an option is"),
            ("event = \"x\"\n", "line 1: no group defined"),
            ("\n[inject-error\n", "line 2: a section is"),
            ("[]\n", "line 1: a section is"),
            ("[inject-error]\nevent = read_aio\n", "line 2: an option is"),
            ("\n[bogus]\nevent = \"read_aio\"\n", "section in line 2: There is no option group 'bogus'"),
            ("[inject-error]\nfoo = \"1\"\n", "section in line 1: Missing event name"),
        ] {
            let e = parse(text, &mut Rules::default()).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }
}
