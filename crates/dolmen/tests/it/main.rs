//! Integration tests of the tools.

mod daemon;
mod serve;
