//! Options from one declaration: the rows for help, QMP and completion, a struct with typed fields, and the parser
//! between them.
//!
//! ```
//! use dolmen_graph::option::{Size, Text, Word};
//! use dolmen_types::Options;
//!
//! dolmen_graph::words! {
//!     /// What becomes of discards.
//!     #[derive(Clone, Copy, Debug, PartialEq)]
//!     enum Discard { Ignore = "ignore", Unmap = "unmap" }
//! }
//!
//! dolmen_graph::options! {
//!     /// Options of a disk.
//!     #[derive(Debug)]
//!     struct DiskOptions {
//!         required "filename" filename: Text => "path of the file";
//!         default "size" size: Size = "1M" => "size in bytes";
//!         optional "discard" discard: Word<Discard> => "what becomes of discards (default: as the node's option)";
//!         hint "queue-depth" : Size => "no effect: the runtime chooses";
//!     }
//! }
//!
//! let mut given = Options::new().with("filename", "x").with("discard", "unmap").with("other", 1);
//! let disk = DiskOptions::take(&mut given)?;
//! assert_eq!((disk.filename.as_str(), disk.size, disk.discard), ("x", 1 << 20, Some(Discard::Unmap)));
//! assert_eq!(given, Options::new().with("other", 1));
//! assert_eq!(DiskOptions::ROWS[1].help_text(), "size in bytes (default 1M)");
//! # Ok::<(), dolmen_types::Error>(())
//! ```
//!
//! An option that no code reads is a field that is never read, which the compiler reports: what nothing implements
//! has no row. A `hint` needs no field; it is accepted because it asks for a way of doing things and never for a result.
//! One with a field is looked at, for a value that can't be accepted.

use std::marker::PhantomData;

use dolmen_types::{OptionType, Options, Result};

use crate::ChildDef;

/// How the text or value of an option becomes a field.
pub trait OptionKind {
    /// The type in rows.
    const TYPE: OptionType;
    /// The field's type.
    type Value;
    /// Takes the option out.
    ///
    /// # Errors
    /// When what is there is of another type.
    fn take(options: &mut Options, name: &str) -> Result<Option<Self::Value>>;
}

/// `true` or `false`; `on` or `off` on a command line.
#[derive(Debug)]
pub enum Flag {}

impl OptionKind for Flag {
    const TYPE: OptionType = OptionType::Bool;
    type Value = bool;
    fn take(options: &mut Options, name: &str) -> Result<Option<bool>> {
        options.take_bool(name)
    }
}

/// Text.
#[derive(Debug)]
pub enum Text {}

impl OptionKind for Text {
    const TYPE: OptionType = OptionType::Str;
    type Value = String;
    fn take(options: &mut Options, name: &str) -> Result<Option<String>> {
        options.take_str(name)
    }
}

/// An unsigned number.
#[derive(Debug)]
pub enum Number {}

impl OptionKind for Number {
    const TYPE: OptionType = OptionType::Int;
    type Value = u64;
    fn take(options: &mut Options, name: &str) -> Result<Option<u64>> {
        options.take_size(name)
    }
}

/// A number of bytes.
#[derive(Debug)]
pub enum Size {}

impl OptionKind for Size {
    const TYPE: OptionType = OptionType::Size;
    type Value = u64;
    fn take(options: &mut Options, name: &str) -> Result<Option<u64>> {
        options.take_size(name)
    }
}

/// A node, by its name or its options.
#[derive(Debug)]
pub enum Child {}

impl OptionKind for Child {
    const TYPE: OptionType = OptionType::Node;
    type Value = ChildDef;
    fn take(options: &mut Options, name: &str) -> Result<Option<ChildDef>> {
        options.take(name).map(|v| ChildDef::from_value(name, v, false)).transpose()
    }
}

/// A node, or none.
#[derive(Debug)]
pub enum ChildOrNull {}

impl OptionKind for ChildOrNull {
    const TYPE: OptionType = OptionType::NodeOrNull;
    type Value = ChildDef;
    fn take(options: &mut Options, name: &str) -> Result<Option<ChildDef>> {
        options.take(name).map(|v| ChildDef::from_value(name, v, true)).transpose()
    }
}

/// One of the words of an enum that [`words!`](crate::words) has declared.
#[derive(Debug)]
pub struct Word<W>(PhantomData<W>);

impl<W: Words> OptionKind for Word<W> {
    const TYPE: OptionType = OptionType::Enum(W::WORDS);
    type Value = W;
    fn take(options: &mut Options, name: &str) -> Result<Option<W>> {
        Ok(options.take_enum(name, W::WORDS)?.and_then(W::from_word))
    }
}

/// An enum whose values are words of an option: see [`words!`](crate::words).
pub trait Words: Sized + 'static {
    /// The words.
    const WORDS: &'static [&'static str];
    /// The value of a word.
    fn from_word(word: &str) -> Option<Self>;
}

/// The name under which an option was given: create options come with underscores from image tools and with hyphens
/// from QMP.
pub fn spelling(options: &Options, name: &'static str) -> String {
    let hyphened = name.replace('_', "-");
    if options.has(&hyphened) { hyphened } else { name.to_owned() }
}

/// Takes an option out. `default` is what its row says.
///
/// # Errors
/// When what is there is of another type.
pub fn take<K: OptionKind>(
    options: &mut Options,
    name: &'static str,
    default: Option<&'static str>,
) -> Result<Option<K::Value>> {
    let given = spelling(options, name);
    match (K::take(options, &given)?, default) {
        (Some(v), _) => Ok(Some(v)),
        (None, Some(text)) => K::take(&mut Options::new().with(name, text), name),
        (None, None) => Ok(None),
    }
}

/// Declares an enum whose values are words of an option. Several words may stand for one value.
#[macro_export]
macro_rules! words {
    ($(#[$meta:meta])* $vis:vis enum $name:ident {
        $($(#[$value_meta:meta])* $value:ident = $word:literal $(| $other:literal)*),+ $(,)?
    }) => {
        $(#[$meta])* $vis enum $name { $($(#[$value_meta])* $value),+ }

        impl $crate::option::Words for $name {
            const WORDS: &'static [&'static str] = &[$($word $(, $other)*),+];
            fn from_word(word: &str) -> Option<$name> {
                match word {
                    $($word $(| $other)* => Some($name::$value),)+
                    _ => None,
                }
            }
        }
    };
}

/// Declares options: see [`option`](crate::option).
#[macro_export]
macro_rules! options {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($how:ident $text:literal $($field:ident)? : $kind:ty $(= $default:literal)? => $help:expr;)*
    }) => {
        $crate::options!(@struct [$(#[$meta])* $vis struct $name] {}
            $($how $text [$($field)?] $kind [$($default)?];)*);

        impl $name {
            /// The rows, in the order in which they were declared.
            $vis const ROWS: &'static [$crate::types::OptionSpec] = &[
                $($crate::options!(@row $how $text, $kind, [$($default)?], $help)),*
            ];

            /// Takes the options out that are declared here, and leaves the others.
            ///
            /// # Errors
            /// When one is missing, or is not of its type.
            $vis fn take(options: &mut $crate::types::Options) -> $crate::types::Result<$name> {
                $crate::options!(@take options $name {}
                    $($how $text [$($field)?] $kind [$($default)?];)*)
            }
        }
    };

    (@struct [$($head:tt)*] {$($done:tt)*}) => { $($head)* { $($done)* } };
    (@struct $head:tt $done:tt hint $text:literal [] $kind:ty []; $($rest:tt)*) => {
        $crate::options!(@struct $head $done $($rest)*);
    };
    (@struct $head:tt {$($done:tt)*} optional $text:literal [$field:ident] $kind:ty []; $($rest:tt)*) => {
        $crate::options!(@struct $head
            {$($done)* $field: Option<<$kind as $crate::option::OptionKind>::Value>,} $($rest)*);
    };
    (@struct $head:tt {$($done:tt)*} hint $text:literal [$field:ident] $kind:ty []; $($rest:tt)*) => {
        $crate::options!(@struct $head
            {$($done)* $field: Option<<$kind as $crate::option::OptionKind>::Value>,} $($rest)*);
    };
    (@struct $head:tt {$($done:tt)*} $how:ident $text:literal [$field:ident] $kind:ty [$($d:literal)?]; $($rest:tt)*) => {
        $crate::options!(@struct $head
            {$($done)* $field: <$kind as $crate::option::OptionKind>::Value,} $($rest)*);
    };

    (@take $options:ident $name:ident {$($done:tt)*}) => { Ok($name { $($done)* }) };
    (@take $options:ident $name:ident $done:tt hint $text:literal [] $kind:ty []; $($rest:tt)*) => {{
        $crate::option::take::<$kind>($options, $text, None)?;
        $crate::options!(@take $options $name $done $($rest)*)
    }};
    (@take $options:ident $name:ident {$($done:tt)*} optional $text:literal [$field:ident] $kind:ty []; $($rest:tt)*) => {{
        let $field = $crate::option::take::<$kind>($options, $text, None)?;
        $crate::options!(@take $options $name {$($done)* $field,} $($rest)*)
    }};
    (@take $options:ident $name:ident {$($done:tt)*} hint $text:literal [$field:ident] $kind:ty []; $($rest:tt)*) => {{
        let $field = $crate::option::take::<$kind>($options, $text, None)?;
        $crate::options!(@take $options $name {$($done)* $field,} $($rest)*)
    }};
    (@take $options:ident $name:ident {$($done:tt)*} required $text:literal [$field:ident] $kind:ty []; $($rest:tt)*) => {{
        let $field = $crate::option::take::<$kind>($options, $text, None)?
            .ok_or_else(|| $crate::option::missing($text))?;
        $crate::options!(@take $options $name {$($done)* $field,} $($rest)*)
    }};
    (@take $options:ident $name:ident {$($done:tt)*} default $text:literal [$field:ident] $kind:ty [$default:literal]; $($rest:tt)*) => {{
        let $field = $crate::option::take::<$kind>($options, $text, Some($default))?
            .ok_or_else(|| $crate::option::missing($text))?;
        $crate::options!(@take $options $name {$($done)* $field,} $($rest)*)
    }};

    (@row required $text:literal, $kind:ty, [], $help:expr) => {
        $crate::types::OptionSpec::required($text, <$kind as $crate::option::OptionKind>::TYPE, $help)
    };
    (@row optional $text:literal, $kind:ty, [], $help:expr) => {
        $crate::types::OptionSpec::optional($text, <$kind as $crate::option::OptionKind>::TYPE, $help)
    };
    (@row hint $text:literal, $kind:ty, [], $help:expr) => {
        $crate::types::OptionSpec::hint($text, <$kind as $crate::option::OptionKind>::TYPE, $help)
    };
    (@row default $text:literal, $kind:ty, [$default:literal], $help:expr) => {
        $crate::types::OptionSpec::with_default($text, <$kind as $crate::option::OptionKind>::TYPE, $default, $help)
    };
}

/// The error for an option that has to be given.
pub fn missing(name: &str) -> dolmen_types::Error {
    dolmen_types::Error::new(dolmen_types::ErrorKind::InvalidInput, format!("Parameter '{name}' is missing"))
}
