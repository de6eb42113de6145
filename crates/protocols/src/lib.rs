//! Protocol (leaf) drivers of Dolmen: file, null, NBD client.
#![forbid(unsafe_code)]
