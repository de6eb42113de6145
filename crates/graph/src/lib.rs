//! The node graph of Dolmen: snapshots, the access-control solver, transactions, tokens and the request path.
#![forbid(unsafe_code)]
