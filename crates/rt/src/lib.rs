//! Runtime of Dolmen: executor, io_uring with a thread fallback, timers, buffers, sockets, system calls.

