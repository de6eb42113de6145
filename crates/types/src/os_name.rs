//! File names of any bytes, as text.
//!
//! Options, headers and messages are text; the names of files need not be. Each byte that is not part of valid UTF-8
//! stands as one character of a private area, and those characters of a real name stand as their bytes: so
//! every name has its own text, and back. Text becomes a name again where a file is opened ([`os_name`]),
//! and bytes where it is printed ([`bytes`]). JSON can't carry such names ([`lossy`]).

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The character for byte 0.
const FIRST: u32 = 0x10_F700;

fn byte_of(c: char) -> Option<u8> {
    let n = (c as u32).checked_sub(FIRST)?;
    u8::try_from(n).ok().filter(|b| *b >= 0x80)
}

fn push(byte: u8, out: &mut String) {
    out.extend(char::from_u32(FIRST + u32::from(byte)));
}

/// The text of a name's bytes.
pub fn text_of(name: &[u8]) -> String {
    let mut out = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match byte_of(c) {
                None => out.push(c),
                Some(_) => c.encode_utf8(&mut [0; 4]).bytes().for_each(|b| push(b, &mut out)),
            }
        }
        chunk.invalid().iter().for_each(|b| push(*b, &mut out));
    }
    out
}

/// The same for a name of the system.
pub fn text_of_os(name: &OsStr) -> String {
    text_of(name.as_bytes())
}

/// The bytes of a text.
pub fn bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(|c| byte_of(c).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut out = Vec::with_capacity(text.len());
    for c in text.chars() {
        match byte_of(c) {
            Some(b) => out.push(b),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(out)
}

/// The name that a text stands for.
pub fn os_name(text: &str) -> OsString {
    OsString::from_vec(bytes(text).into_owned())
}

/// The text with U+FFFD for what is not UTF-8.
pub fn lossy(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| byte_of(c).is_some()) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(
        text.chars().map(|c| if byte_of(c).is_some() { char::REPLACEMENT_CHARACTER } else { c }).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_own_text() {
        let private = "a\u{10F7FF}b";
        for name in [&b"plain"[..], "gr\u{fc}n".as_bytes(), b"a\xff\xfeb", b"\xc3", b"", private.as_bytes()] {
            let text = text_of(name);
            assert_eq!(&*bytes(&text), name);
            assert_eq!(text == String::from_utf8_lossy(name), byte_free(name), "{name:?}");
        }
        assert_eq!(lossy(&text_of(b"a\xffb")), "a\u{fffd}b");
        assert_ne!(text_of(private.as_bytes()), text_of(b"a\xffb"));
    }

    fn byte_free(name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|t| t.chars().all(|c| byte_of(c).is_none()))
    }
}
