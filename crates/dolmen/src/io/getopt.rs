//! Options of the commands of `io`, in the notation of getopt: `"Cqv:P:"`.
//!
//! The commands are little languages of their own (`read -qP 0xab 0 64k`), typed by
//! scripts, so what is accepted has to be exactly what QEMU's tool accepts.

/// Arguments that have been taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Parsed {
    options: Vec<(char, Option<String>)>,
    /// What is not an option.
    pub(crate) rest: Vec<String>,
}

impl Parsed {
    /// Whether an option is there.
    pub(crate) fn has(&self, c: char) -> bool {
        self.options.iter().any(|(o, _)| *o == c)
    }

    /// The last value given for an option.
    pub(crate) fn value(&self, c: char) -> Option<&str> {
        self.options.iter().rev().find(|(o, _)| *o == c)?.1.as_deref()
    }
}

/// Takes the arguments of `command` apart; options may come after other arguments, `--`
/// ends them.
///
/// # Errors
/// The message of getopt.
pub(crate) fn parse(command: &str, spec: &str, args: &[String]) -> Result<Parsed, String> {
    let takes = |c: char| {
        let i = spec.find(c).filter(|_| c != ':')?;
        Some(spec[i + c.len_utf8()..].starts_with(':'))
    };
    let mut out = Parsed::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.rest.extend(args.by_ref().cloned());
            break;
        }
        let Some(flags) = arg.strip_prefix('-').filter(|f| !f.is_empty()) else {
            out.rest.push(arg.clone());
            continue;
        };
        let chars = flags.char_indices();
        for (i, c) in chars {
            match takes(c) {
                None => return Err(format!("{command}: invalid option -- '{c}'")),
                Some(false) => out.options.push((c, None)),
                Some(true) => {
                    let glued = &flags[i + c.len_utf8()..];
                    let value = if glued.is_empty() {
                        args.next()
                            .cloned()
                            .ok_or_else(|| format!("{command}: option requires an argument -- '{c}'"))?
                    } else {
                        glued.to_owned()
                    };
                    out.options.push((c, Some(value)));
                    break;
                }
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(s: &str) -> Vec<String> {
        s.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_and_the_rest() {
        let p = parse("read", "CqvP:s:", &words("0 -qP 0xab 4k -s8 -v")).unwrap();
        assert!(p.has('q') && p.has('v') && !p.has('C'));
        assert_eq!((p.value('P'), p.value('s')), (Some("0xab"), Some("8")));
        assert_eq!(p.rest, ["0", "4k"]);
        assert_eq!(parse("read", "q", &words("-- -q")).unwrap().rest, ["-q"]);
    }

    #[test]
    fn mistakes() {
        // As getopt says it.
        assert_eq!(parse("read", "q", &words("-1 4k")), Err("read: invalid option -- '1'".into()));
        assert_eq!(parse("read", "P:", &words("-P")), Err("read: option requires an argument -- 'P'".into()));
        assert_eq!(parse("read", "P:", &words("-:")), Err("read: invalid option -- ':'".into()));
    }
}
