//! The control task of Dolmen: owner of graph, operations and exports; command table; QMP server.
#![forbid(unsafe_code)]
