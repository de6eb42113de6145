//! QMP wire types and the schema table of Dolmen.
#![forbid(unsafe_code)]
