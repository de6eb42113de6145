//! qcow2: the copy-on-write image format.
//!
//! ```text
//!   row      options, opening, abilities                               (row, create, check)
//!      |
//!   driver   futures: loads tables, reserves space for new ones,       (driver, rw, zero, space, flush, resize)
//!      |     moves data, runs flush rounds
//!   meta     decisions from memory: where is it, what to allocate,     (meta, alloc, table, round)
//!      |     what to write in which order
//!   codec    bytes <-> values, every limit                             (header, entry, snapshot, bitmap)
//! ```
//!
//! The order of writes is the point of this driver. Metadata change in memory only; a *round* (a flush, or too
//! much that is dirty) writes copies of them in phases with a flush of the file after each:
//!
//! - A: everything that nothing on disk points to yet. Guest data (written by the requests themselves), refcount
//!   blocks, new L2 tables.
//! - B: refcount table entries and the header's pointer to the table (only when they changed).
//! - C: L2 entries in tables that the disk can reach, L1 entries.
//! - D: what C unmapped may be given back once no request can still be using it.
//!
//! So at any crash point, with any subset of unflushed writes: what a mapping points to is on disk and counted;
//! what is not counted is not mapped; clusters may be counted without being mapped (a leak, the worst outcome).
//!
//! Rejected: ordered write-through per request (two flushes per allocation), a journal (not in the format), lazy
//! refcounts (needs a repair after each crash; images that have the feature are read, the dirty bit is never set).
//!
//! Specification: "Qcow2 Image File Format"; section names in comments are its sections.

mod alloc;
mod backing;
mod bitmap;
mod check;
mod compress;
mod create;
mod cut_off;
mod driver;
mod entry;
mod features;
mod flush;
mod header;
mod image;
mod layout;
mod meta;
mod replace;
mod resize;
mod round;
mod row;
mod rw;
mod snapshot;
mod space;
mod table;
mod zero;

pub use bitmap::BitmapEntry;
pub use check::{check, check_and_repair};
pub use create::change_backing;
pub use entry::{BadEntry, L1Entry, L2Entry};
pub use header::{BitmapsExtension, CompressionType, Extension, Header, first_cluster_len, looks_like_qcow2};
pub use layout::{ClusterIndex, Geometry, GuestOffset, HostOffset};
pub use row::QCOW2;
pub use snapshot::Snapshot;

/// The codecs, for fuzzing.
pub mod codec {
    pub use super::bitmap::decode_directory;
    pub use super::entry::{refcount_get, refcount_set};
    pub use super::snapshot::{Step, decode_entry, encode_entry};
}
