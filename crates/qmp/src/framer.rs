//! Cuts a byte stream into JSON texts.
//!
//! Clients send commands with nothing, blanks or newlines between them, several in
//! one packet or one in several packets. The framer copies one top-level value at a
//! time into a buffer of bounded size, without building anything: what comes out is
//! parsed by [`crate::json::parse`]. Text in single quotes, which people type by
//! hand and QEMU's daemon accepts, is turned into double quotes on the way.
//!
//! The invariant is that a bad byte costs at most the value it is in: after an
//! error the framer is between two values again, and the connection goes on. Where a
//! value has no end (brackets too deep, text that is never closed), byte 0xFF ends it.

use std::collections::VecDeque;
use std::fmt;

/// The longest command text. The largest sensible command is a `blockdev-add` with
/// a long chain spelled out, a few kilobytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// How deep objects and lists may nest. Later stages recurse over the value, so
/// this bounds their stack.
pub const MAX_NESTING_DEPTH: usize = 256;

/// A byte that no UTF-8 text contains. A client that has lost track of what it sent, or
/// found the connection in the middle of somebody else's command, sends it to start afresh.
const RESET: u8 = 0xff;

/// How many framed texts wait at most before [`Framer::feed`] stops taking bytes.
const MAX_QUEUED: usize = 64;

/// Why a text could not be framed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// A byte that starts no JSON value.
    Stray(char),
    /// A closing bracket that nothing opened, or the wrong one.
    Unbalanced,
    /// Longer than [`MAX_MESSAGE_BYTES`].
    TooLong,
    /// Deeper than [`MAX_NESTING_DEPTH`].
    TooDeep,
    /// Not UTF-8.
    NotUtf8,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Stray(c) => write!(f, "JSON parse error, stray '{c}'"),
            FrameError::Unbalanced => f.write_str("JSON parse error, expecting value"),
            FrameError::TooLong => f.write_str("JSON message size limit exceeded"),
            FrameError::TooDeep => f.write_str("JSON nesting depth limit exceeded"),
            FrameError::NotUtf8 => f.write_str("JSON parse error, invalid UTF-8 sequence"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values, or between the tokens of a container.
    Between,
    /// In text that began with this quote.
    Text(u8),
    /// After a backslash in such text.
    Escape(u8),
    /// In a top-level number or word.
    Word,
    /// After an error in a container: drop bytes until its brackets are closed.
    /// Text is still followed, so that a bracket in it does not count.
    Skip,
    SkipText(u8),
    SkipEscape(u8),
}

/// The framer of one connection.
pub struct Framer {
    state: State,
    /// Open brackets of the value at hand, as the bytes that close them.
    open: Vec<u8>,
    /// Brackets still to be closed while skipping.
    skip_depth: usize,
    text: Vec<u8>,
    ready: VecDeque<Result<String, FrameError>>,
}

impl Default for Framer {
    fn default() -> Framer {
        Framer::new()
    }
}

impl Framer {
    /// At the start of a connection.
    pub fn new() -> Framer {
        Framer {
            state: State::Between,
            open: Vec::new(),
            skip_depth: 0,
            text: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// Takes bytes in and says how many it took: fewer than given when enough
    /// texts wait to be taken out with [`Framer::next_text`].
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        for (i, &b) in bytes.iter().enumerate() {
            if self.ready.len() >= MAX_QUEUED {
                return i;
            }
            self.byte(b);
        }
        bytes.len()
    }

    /// The next complete JSON text, or why there is none in its place.
    pub fn next_text(&mut self) -> Option<Result<String, FrameError>> {
        self.ready.pop_front()
    }

    /// Whether a value has begun and not ended.
    pub fn is_in_value(&self) -> bool {
        self.state != State::Between || !self.open.is_empty()
    }

    fn byte(&mut self, b: u8) {
        if b == RESET {
            return self.reset();
        }
        if self.text.len() >= MAX_MESSAGE_BYTES {
            self.abandon(FrameError::TooLong);
        }
        match self.state {
            State::Between => self.between(b),
            State::Text(q) => self.in_text(b, q),
            State::Escape(q) => {
                // `\'` is not JSON; in single quotes it stands for the quote itself.
                if b == b'\'' {
                    self.text.pop();
                }
                self.text.push(b);
                self.state = State::Text(q);
            }
            State::Word => {
                if is_word(b) {
                    self.text.push(b);
                } else {
                    self.finish();
                    self.between(b);
                }
            }
            State::Skip => self.skip(b),
            State::SkipText(q) => match b {
                b'\\' => self.state = State::SkipEscape(q),
                b if b == q => self.state = State::Skip,
                _ => {}
            },
            State::SkipEscape(q) => self.state = State::SkipText(q),
        }
    }

    /// Gives up whatever has begun, and says so: the client looks for this error to know which
    /// replies belong to what it sent before.
    fn reset(&mut self) {
        self.state = State::Between;
        self.open.clear();
        self.skip_depth = 0;
        self.text = Vec::new();
        self.ready.push_back(Err(FrameError::Stray(char::REPLACEMENT_CHARACTER)));
    }

    fn between(&mut self, b: u8) {
        let top = self.open.is_empty();
        match b {
            b' ' | b'\t' | b'\r' | b'\n' if top => {}
            b'{' | b'[' => {
                if self.open.len() >= MAX_NESTING_DEPTH {
                    self.abandon(FrameError::TooDeep);
                    self.skip(b);
                    return;
                }
                self.open.push(if b == b'{' { b'}' } else { b']' });
                self.text.push(b);
            }
            b'}' | b']' => match self.open.pop() {
                Some(expected) if expected == b => {
                    self.text.push(b);
                    if self.open.is_empty() {
                        self.finish();
                    }
                }
                // QEMU's daemon, too, gives the whole message up at a wrong bracket.
                _ => {
                    self.open.clear();
                    self.text.clear();
                    self.ready.push_back(Err(FrameError::Unbalanced));
                }
            },
            b'"' | b'\'' => {
                self.text.push(b'"');
                self.state = State::Text(b);
            }
            b if top && is_word(b) => {
                self.text.push(b);
                self.state = State::Word;
            }
            b if top => self.ready.push_back(Err(FrameError::Stray(printable(b)))),
            b => self.text.push(b),
        }
    }

    fn in_text(&mut self, b: u8, quote: u8) {
        match b {
            b'\\' => {
                self.text.push(b);
                self.state = State::Escape(quote);
            }
            b if b == quote => {
                self.text.push(b'"');
                self.state = State::Between;
                if self.open.is_empty() {
                    self.finish();
                }
            }
            b'"' => self.text.extend_from_slice(b"\\\""),
            b => self.text.push(b),
        }
    }

    fn skip(&mut self, b: u8) {
        match b {
            b'{' | b'[' => self.skip_depth += 1,
            b'}' | b']' => {
                self.skip_depth = self.skip_depth.saturating_sub(1);
                if self.skip_depth == 0 {
                    self.state = State::Between;
                }
            }
            b'"' | b'\'' => self.state = State::SkipText(b),
            _ => {}
        }
    }

    /// Gives the value at hand up and skips what is left of it.
    fn abandon(&mut self, why: FrameError) {
        self.ready.push_back(Err(why));
        self.skip_depth = self.open.len();
        self.state = match self.state {
            State::Text(q) => State::SkipText(q),
            State::Escape(q) => State::SkipEscape(q),
            _ => State::Skip,
        };
        if self.skip_depth == 0 {
            // A bare word or text at the top: nothing to wait for.
            self.state = State::Between;
        }
        self.open.clear();
        self.text = Vec::new();
    }

    fn finish(&mut self) {
        self.state = State::Between;
        let text = std::mem::take(&mut self.text);
        self.ready.push_back(String::from_utf8(text).map_err(|_| FrameError::NotUtf8));
    }
}

const fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.')
}

fn printable(b: u8) -> char {
    if b.is_ascii_graphic() { char::from(b) } else { char::REPLACEMENT_CHARACTER }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames(input: &[u8]) -> Vec<Result<String, FrameError>> {
        let mut f = Framer::new();
        let mut out = Vec::new();
        let mut rest = input;
        loop {
            let n = f.feed(rest);
            rest = &rest[n..];
            while let Some(t) = f.next_text() {
                out.push(t);
            }
            if rest.is_empty() {
                return out;
            }
        }
    }

    fn texts(input: &str) -> Vec<String> {
        frames(input.as_bytes()).into_iter().map(|r| r.unwrap_or_else(|e| format!("!{e}"))).collect()
    }

    #[test]
    fn values_may_touch() {
        assert_eq!(
            texts("{}{\"a\":[1,2]}\r\n[] 5 \"x\"{}"),
            ["{}", "{\"a\":[1,2]}", "[]", "5", "\"x\"", "{}"]
        );
    }

    #[test]
    fn brackets_in_text_do_not_count() {
        assert_eq!(texts(r#"{"a":"}\"]"}{}"#), [r#"{"a":"}\"]"}"#, "{}"]);
    }

    #[test]
    fn single_quotes_become_double() {
        assert_eq!(texts(r#"{'a':'x"y\'z'}"#), [r#"{"a":"x\"y'z"}"#]);
    }

    #[test]
    fn recovers_after_errors() {
        assert_eq!(texts("}{}"), ["!JSON parse error, expecting value", "{}"]);
        assert_eq!(texts("{]{}"), ["!JSON parse error, expecting value", "{}"]);
        assert_eq!(texts("@{}"), ["!JSON parse error, stray '@'", "{}"]);
        let deep = format!("{}{}{{}}", "[".repeat(300), "]".repeat(300));
        assert_eq!(texts(&deep), ["!JSON nesting depth limit exceeded", "{}"]);
    }

    /// Somebody died in the middle of a command, or nested without end. Everything that came later on
    /// that connection was taken for the rest of it, `quit` included. Byte 0xFF was just one more byte of text.
    #[test]
    fn byte_ff_starts_afresh() {
        let stray = Err(FrameError::Stray('\u{fffd}'));
        let ok = || Ok("{}".to_owned());
        for begun in ["", "{", "{\"a\":[1,", "{\"a\":\"te", "{\"a\":\"te\\", "12", "'te"] {
            let input = [begun.as_bytes(), b"\xff{}"].concat();
            assert_eq!(frames(&input), [stray.clone(), ok()], "{begun}");
        }
        let deep = [&b"[".repeat(300)[..], b"\"", b"\xff{}"].concat();
        assert_eq!(frames(&deep), [Err(FrameError::TooDeep), stray.clone(), ok()]);
        assert_eq!(frames(b"\xff\xff{}"), [stray.clone(), stray, ok()]);
    }

    #[test]
    fn size_is_bounded() {
        let mut f = Framer::new();
        assert_eq!(f.feed(b"{\"a\":\""), 6);
        for _ in 0..(MAX_MESSAGE_BYTES / 4096 + 2) {
            f.feed(&[b'x'; 4096]);
            assert!(f.text.len() <= MAX_MESSAGE_BYTES);
        }
        f.feed(b"\"}{}");
        assert_eq!(f.next_text(), Some(Err(FrameError::TooLong)));
        assert_eq!(f.next_text(), Some(Ok("{}".into())));
    }

    #[test]
    fn queue_is_bounded() {
        let mut f = Framer::new();
        let many = "{}".repeat(1000);
        let n = f.feed(many.as_bytes());
        assert_eq!(n, 2 * MAX_QUEUED);
        assert_eq!(f.next_text(), Some(Ok("{}".into())));
        assert_eq!(f.feed(&many.as_bytes()[n..]), 2);
    }

    proptest! {
        /// How the bytes are cut into packets makes no difference.
        #[test]
        fn packets_do_not_matter(input in "[\\[\\]{}'\"a1,: \\\\@\n]{0,60}", cuts in prop::collection::vec(0usize..60, 0..6)) {
            let whole = frames(input.as_bytes());
            let mut f = Framer::new();
            let mut out = Vec::new();
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(input.len())).collect();
            cuts.push(0);
            cuts.push(input.len());
            cuts.sort_unstable();
            for w in cuts.windows(2) {
                let mut piece = &input.as_bytes()[w[0]..w[1]];
                while !piece.is_empty() {
                    let n = f.feed(piece);
                    piece = &piece[n..];
                    while let Some(t) = f.next_text() {
                        out.push(t);
                    }
                }
            }
            prop_assert_eq!(whole, out);
        }

        /// Every JSON value survives, and the next one is found behind it.
        #[test]
        fn json_values_pass(keys in prop::collection::vec(".*", 0..5)) {
            let v = serde_json::json!({ "k": keys });
            let text = format!("{v}{v}");
            let out = frames(text.as_bytes());
            prop_assert_eq!(out, vec![Ok(v.to_string()), Ok(v.to_string())]);
        }
    }
}
