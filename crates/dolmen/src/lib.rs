//! Dolmen: a block layer, storage daemon, image tool and library.
#![forbid(unsafe_code)]
