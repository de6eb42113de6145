//! Block jobs of Dolmen.
#![forbid(unsafe_code)]
