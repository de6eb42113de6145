//! Files and sockets of one core.

/// Files and sockets of one core.
#[derive(Debug)]
pub struct CoreIo {
    _private: (),
}
