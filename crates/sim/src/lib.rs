//! Deterministic simulation for Dolmen: virtual clock, seeded scheduling, a disk that crashes.
#![forbid(unsafe_code)]
