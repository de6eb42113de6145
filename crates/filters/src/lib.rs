//! Filter drivers of Dolmen: copy-on-read, blkdebug.
#![forbid(unsafe_code)]
