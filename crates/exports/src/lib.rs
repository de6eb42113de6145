//! Exports of Dolmen: the NBD server.
