//! Every bound on what a peer can make us read, keep or do.

/// Longest string of the protocol: export names, descriptions, queries, messages, in
/// bytes ("Conventions").
pub const MAX_STRING: usize = 4096;

/// Longest option data that a server looks at. Room for an export name and a dozen
/// metadata queries of full length.
pub const MAX_OPTION: usize = 64 * 1024;

/// Longest option data that a server skips, answering `ERR_TOO_BIG`, before it treats
/// the client as hostile and disconnects.
pub const MAX_SKIPPED_OPTION: u32 = 16 * 1024 * 1024;

/// Options in one negotiation. A client that lists and asks about every export needs a
/// few for each; a client that haggles for ever is cut off.
pub const MAX_OPTIONS: u32 = 8192;

/// Metadata queries in one option.
pub const MAX_QUERIES: u32 = 256;

/// Option replies that a client reads in one negotiation.
pub const MAX_OPTION_REPLIES: u32 = 65_536;

/// Exports that a client keeps of one listing.
pub const MAX_LISTED: usize = 16_384;

/// Most bytes that either handshake asks for at once: one option with its header, which
/// is larger than any option reply that a client accepts.
pub const MAX_HANDSHAKE_INPUT: usize = 16 + MAX_OPTION;

/// Longest option reply that a client looks at: a name, a description, a length.
pub const MAX_OPTION_REPLY: usize = 4 + 2 * MAX_STRING;

/// Largest payload of a read or a write, in bytes. This is what the specification says
/// that every peer may rely on ("Block size constraints"), and what a server here
/// advertises as its maximum.
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// Extents that a server puts into one reply to `BLOCK_STATUS`.
pub const MAX_EXTENTS_SENT: usize = 1024;

/// Payload of a block status chunk that a client accepts, in bytes; more than any
/// known server sends.
pub const MAX_STATUS_PAYLOAD: usize = 4 + 8 * 128 * 1024;

/// Payload of an error chunk that a client accepts: the fixed fields and a string.
pub const MAX_ERROR_PAYLOAD: usize = 4 + 2 + MAX_STRING + 8;

/// Separate pieces of one read that a client keeps track of while a server sends them
/// in any order. A server that scatters a read into more is cut off.
pub const MAX_FRAGMENTS: usize = 4096;

const _: () = {
    assert!(MAX_OPTION >= 4 + MAX_STRING + 4 + 4 + MAX_STRING);
    assert!(MAX_OPTION_REPLY <= MAX_OPTION);
    assert!(MAX_SKIPPED_OPTION as usize > MAX_OPTION);
};
