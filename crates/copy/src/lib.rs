//! The block-copy engine of Dolmen.
#![forbid(unsafe_code)]
