//! Image formats of Dolmen: raw and qcow2.
#![forbid(unsafe_code)]
