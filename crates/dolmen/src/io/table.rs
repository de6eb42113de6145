//! The commands of `io`: one row each. Argument checks and help derive from the rows; a
//! test sees to it that what a row's usage shows is what it accepts.

/// A command's row.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its name.
    pub(crate) name: &'static str,
    /// Another name.
    pub(crate) alias: Option<&'static str>,
    /// Which command it is.
    pub(crate) verb: Verb,
    /// Fewest arguments, options counted.
    pub(crate) min: usize,
    /// Most arguments; `None` for any number.
    pub(crate) max: Option<usize>,
    /// It works without an open image.
    pub(crate) closed: bool,
    /// Options, in the notation of getopt.
    pub(crate) options: &'static str,
    /// Arguments, for help.
    pub(crate) usage: &'static str,
    /// What it does, for help.
    pub(crate) what: &'static str,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Read, one buffer.
    Read,
    /// Read, several buffers.
    Readv,
    /// Read in the background.
    AioRead,
    /// Write, one buffer.
    Write,
    /// Write, several buffers.
    Writev,
    /// Write in the background.
    AioWrite,
    /// Wait for what runs in the background.
    AioFlush,
    /// Flush.
    Flush,
    /// Discard.
    Discard,
    /// Change the size.
    Truncate,
    /// Show the size.
    Length,
    /// Show what the image says about itself.
    Info,
    /// How much of a range is allocated.
    Alloc,
    /// What is allocated.
    Map,
    /// Open an image.
    Open,
    /// Open the image again with other options.
    Reopen,
    /// Close the image.
    Close,
    /// Wait.
    Sleep,
    /// End as a crash does.
    Abort,
    /// Send a signal to the program itself.
    Sigraise,
    /// Help.
    Help,
    /// End.
    Quit,
}

macro_rules! rows {
    ($($name:literal $(| $alias:literal)?, $verb:ident, $min:literal ..= $max:expr, $closed:literal, $options:literal, $usage:literal, $what:literal;)*) => {
        &[$(Row {
            name: $name,
            alias: { #[allow(unused_mut, unused_assignments)] { let mut a: Option<&'static str> = None; $(a = Some($alias);)? a } },
            verb: Verb::$verb,
            min: $min,
            max: $max,
            closed: $closed,
            options: $options,
            usage: $usage,
            what: $what,
        }),*]
    };
}

/// All commands, by name.
pub(crate) const ROWS: &[Row] = rows! {
    "abort", Abort, 0 ..= Some(0), true, "", "", "ends the program as a crash does: nothing is flushed";
    "aio_flush", AioFlush, 0 ..= Some(0), false, "", "", "waits for the requests in the background";
    "aio_read", AioRead, 2 ..= None, false, "Ciqrs:vP:", "[-Ciqrv] [-P pattern] off len [len..]", "reads in the background";
    "aio_write", AioWrite, 2 ..= None, false, "CfiqrucP:z", "[-Cfiqruz] [-P pattern] off len [len..]", "writes in the background";
    "alloc" | "a", Alloc, 1 ..= Some(2), false, "", "offset [count]", "tells how many bytes from an offset on are allocated";
    "close" | "c", Close, 0 ..= Some(0), false, "", "", "closes the image";
    "discard" | "d", Discard, 2 ..= None, false, "Cq", "[-Cq] off len", "gives the space of a range back";
    "flush" | "f", Flush, 0 ..= Some(0), false, "", "", "makes everything written so far durable";
    "help" | "?", Help, 0 ..= Some(1), true, "", "[command]", "explains one command or all";
    "info" | "i", Info, 0 ..= Some(0), false, "", "", "shows what the image says about itself";
    "length" | "l", Length, 0 ..= Some(0), false, "", "", "shows the size";
    "map", Map, 0 ..= Some(0), false, "", "", "shows what is allocated";
    "open" | "o", Open, 1 ..= None, true, "rsCnkUt:d:o:i:", "[-rCnkU] [-t cache] [-d discard] [-o options] [path]", "opens an image";
    "quit" | "q", Quit, 0 ..= Some(0), true, "", "", "ends the program";
    "read" | "r", Read, 2 ..= None, false, "bCl:pP:qrs:v", "[-bCpqrv] [-P pattern [-s off] [-l len]] off len", "reads a range";
    "readv" | "rv", Readv, 2 ..= None, false, "CP:qrv", "[-Cqrv] [-P pattern] off len [len..]", "reads a range into several buffers";
    "reopen", Reopen, 0 ..= None, false, "rwc:o:", "[(-r|-w)] [-c cache]", "opens the image again with other options";
    "sigraise", Sigraise, 1 ..= Some(1), true, "", "signal", "sends the program a signal, by its number";
    "sleep", Sleep, 1 ..= Some(1), true, "", "milliseconds", "waits";
    "truncate" | "t", Truncate, 1 ..= Some(3), false, "m:", "[-m prealloc_mode] off", "changes the size";
    "write" | "w", Write, 2 ..= None, false, "bcCfnpP:qrs:uz", "[-bcCfnpqruz] [-P pattern | -s source_file] off len", "writes a range";
    "writev" | "wv", Writev, 2 ..= None, false, "CfqrP:", "[-Cfqr] [-P pattern] off len [len..]", "writes a range from several buffers";
};

/// The row of a command.
pub(crate) fn find(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|r| r.name == name || r.alias == Some(name))
}

impl Row {
    /// One line of help.
    pub(crate) fn line(&self) -> String {
        let blank = if self.usage.is_empty() { "" } else { " " };
        format!("{}{blank}{} -- {}", self.name, self.usage, self.what)
    }

    /// Checks the number of arguments.
    ///
    /// # Errors
    /// QEMU's message.
    pub(crate) fn check(&self, n: usize) -> Result<(), String> {
        if n >= self.min && self.max.is_none_or(|m| n <= m) {
            return Ok(());
        }
        let expected = match self.max {
            None => format!("at least {} arguments", self.min),
            Some(m) if m == self.min => format!("{m} arguments"),
            Some(m) => format!("between {} and {m} arguments", self.min),
        };
        Err(format!("bad argument count {n} to {}, expected {expected}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_shows_only_what_is_accepted() {
        for row in ROWS {
            let flags = row.usage.split(['[', ']', '(', ')', '|', ' ']).filter_map(|w| w.strip_prefix('-'));
            for c in flags.flat_map(str::chars) {
                assert!(row.options.contains(c), "{}: -{c}", row.name);
            }
        }
        assert!(ROWS.is_sorted_by_key(|r| r.name));
    }

    #[test]
    fn argument_counts() {
        // Captured from qemu-io 10.0.2.
        let message = |name: &str, n| find(name).and_then(|r| r.check(n).err());
        assert_eq!(
            message("read", 1).as_deref(),
            Some("bad argument count 1 to read, expected at least 2 arguments")
        );
        assert_eq!(
            message("truncate", 0).as_deref(),
            Some("bad argument count 0 to truncate, expected between 1 and 3 arguments")
        );
        assert_eq!(
            message("sleep", 0).as_deref(),
            Some("bad argument count 0 to sleep, expected 1 arguments")
        );
        assert_eq!(message("read", 3), None);
        assert_eq!(find("aio_read").map(|r| r.name), Some("aio_read"));
        assert!(find("foo").is_none());
    }
}
