//! Sans-I/O codec of the Network Block Device protocol.
#![forbid(unsafe_code)]
