//! Integration tests of the tools.
