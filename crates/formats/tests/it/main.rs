//! Formats from outside: random work against a model, and images exchanged with the installed tools.

mod interop;
mod support;
mod work;
