//! Numbers of the protocol ("Values" in the specification).

use std::fmt;

use dolmen_types::ErrorKind;

/// First word of a server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle server, and the magic of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle server.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Magic of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags that a server sends.
pub mod handshake {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The server can leave out the 124 zero bytes after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
    /// The client's flag for fixed newstyle.
    pub const C_FIXED_NEWSTYLE: u32 = 1;
    /// The client's flag for leaving out the zeroes.
    pub const C_NO_ZEROES: u32 = 1 << 1;
}

/// Options of the negotiation.
#[allow(missing_docs, reason = "the names are those of the specification")]
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of option replies.
#[allow(missing_docs, reason = "the names are those of the specification")]
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_POLICY: u32 = ERROR + 2;
    pub const ERR_INVALID: u32 = ERROR + 3;
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;

    /// The name of an error reply, for messages.
    pub fn name(rep: u32) -> &'static str {
        match rep {
            ACK => "ACK",
            SERVER => "SERVER",
            INFO => "INFO",
            META_CONTEXT => "META_CONTEXT",
            ERR_UNSUP => "ERR_UNSUP (the server does not know the option)",
            ERR_POLICY => "ERR_POLICY (the server's policy forbids it)",
            ERR_INVALID => "ERR_INVALID (the server finds the option malformed)",
            ERR_PLATFORM => "ERR_PLATFORM (not possible on the server's platform)",
            ERR_TLS_REQD => "ERR_TLS_REQD (the server requires TLS)",
            ERR_UNKNOWN => "ERR_UNKNOWN (no such export)",
            ERR_SHUTDOWN => "ERR_SHUTDOWN (the server is shutting down)",
            ERR_BLOCK_SIZE_REQD => "ERR_BLOCK_SIZE_REQD (the server requires block size negotiation)",
            ERR_TOO_BIG => "ERR_TOO_BIG (the request is too large for the server)",
            ERR_EXT_HEADER_REQD => "ERR_EXT_HEADER_REQD (the server requires extended headers)",
            _ => "a reply that the specification does not know",
        }
    }
}

/// Kinds of information in `REP_INFO`.
#[allow(missing_docs, reason = "the names are those of the specification")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
#[allow(missing_docs, reason = "the names are those of the specification")]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Types of structured reply chunks.
#[allow(missing_docs, reason = "the names are those of the specification")]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error chunk.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
    /// The only reply flag: the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
}

/// The metadata context that the specification defines.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// In `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1;
/// In `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u16);
        impl $name {
            $($(#[$fdoc])* pub const $flag: $name = $name(1 << $bit);)*
            const NAMES: &'static [(&'static str, u16)] = &[$((stringify!($flag), 1 << $bit),)*];

            /// Whether every flag of `other` is set.
            pub const fn has(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }
            /// Union.
            #[must_use]
            pub const fn with(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }
            /// Union when `on`.
            #[must_use]
            pub const fn with_if(self, on: bool, other: $name) -> $name {
                if on { self.with(other) } else { self }
            }
            /// Difference.
            #[must_use]
            pub const fn without(self, other: $name) -> $name {
                $name(self.0 & !other.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut left = self.0;
                let mut first = true;
                for (name, bit) in $name::NAMES {
                    if left & bit != 0 {
                        left &= !bit;
                        write!(f, "{}{name}", if first { "" } else { "|" })?;
                        first = false;
                    }
                }
                if left != 0 || first {
                    write!(f, "{}{left:#x}", if first { "" } else { "|" })?;
                }
                Ok(())
            }
        }
    };
}

flag_set! {
    /// What an export can do ("Transmission flags").
    TransmissionFlags {
        /// Always set.
        HAS_FLAGS = 0;
        /// Writes are refused.
        READ_ONLY = 1;
        /// `FLUSH` is understood.
        SEND_FLUSH = 2;
        /// The flag `FUA` is understood.
        SEND_FUA = 3;
        /// The medium rotates.
        ROTATIONAL = 4;
        /// `TRIM` is understood.
        SEND_TRIM = 5;
        /// `WRITE_ZEROES` is understood.
        SEND_WRITE_ZEROES = 6;
        /// The flag `DF` is understood; only with structured replies.
        SEND_DF = 7;
        /// A flush on one connection covers writes acknowledged on any.
        CAN_MULTI_CONN = 8;
        /// `RESIZE` is understood (an extension).
        SEND_RESIZE = 9;
        /// `CACHE` is understood.
        SEND_CACHE = 10;
        /// The flag `FAST_ZERO` is understood.
        SEND_FAST_ZERO = 11;
        /// `BLOCK_STATUS` takes a payload (an extension).
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

flag_set! {
    /// Flags of a request ("Command flags").
    CommandFlags {
        /// Durable before the reply.
        FUA = 0;
        /// `WRITE_ZEROES` keeps the range allocated.
        NO_HOLE = 1;
        /// A read is answered with at most one content chunk.
        DF = 2;
        /// One extent is enough.
        REQ_ONE = 3;
        /// `WRITE_ZEROES` fails with `ENOTSUP` where it would not be faster than a write.
        FAST_ZERO = 4;
        /// The length is that of a payload (an extension).
        PAYLOAD_LEN = 5;
    }
}

/// An error value of the protocol ("Error values"). Other numbers never go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are those of the specification")]
pub enum Errno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl Errno {
    /// The value that goes over the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// A received value; numbers that the specification does not know become `EINVAL`,
    /// as it asks for nothing else and clients need some error.
    pub const fn from_code(code: u32) -> Errno {
        match code {
            1 => Errno::Perm,
            5 => Errno::Io,
            12 => Errno::NoMem,
            28 => Errno::NoSpc,
            75 => Errno::Overflow,
            95 => Errno::NotSup,
            108 => Errno::Shutdown,
            _ => Errno::Inval,
        }
    }

    /// The value that an operating system's or Dolmen's errno belongs to. `EDQUOT` and
    /// `EFBIG` are `ENOSPC`, access errors are `EPERM`; what has no counterpart is `EIO`,
    /// so that no client takes a failure of the disk for a mistake of its own.
    pub const fn from_errno(errno: i32) -> Errno {
        match errno {
            1 | 13 | 30 => Errno::Perm,
            12 => Errno::NoMem,
            22 => Errno::Inval,
            27 | 28 | 122 => Errno::NoSpc,
            75 => Errno::Overflow,
            95 => Errno::NotSup,
            108 => Errno::Shutdown,
            _ => Errno::Io,
        }
    }

    /// The kind of error that a client reports.
    pub const fn kind(self) -> ErrorKind {
        match self {
            Errno::Perm => ErrorKind::PermissionDenied,
            Errno::Io | Errno::NoMem => ErrorKind::Io,
            Errno::Inval | Errno::Overflow => ErrorKind::InvalidInput,
            Errno::NoSpc => ErrorKind::NoSpace,
            Errno::NotSup => ErrorKind::Unsupported,
            Errno::Shutdown => ErrorKind::Disconnected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_readable() {
        let f = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH);
        assert_eq!(format!("{f:?}"), "HAS_FLAGS|SEND_FLUSH");
        assert_eq!(format!("{:?}", CommandFlags(0)), "0x0");
        assert_eq!(format!("{:?}", CommandFlags(0x41)), "FUA|0x40");
    }

    #[test]
    fn error_values() {
        for e in [
            Errno::Perm,
            Errno::Io,
            Errno::NoMem,
            Errno::Inval,
            Errno::NoSpc,
            Errno::Overflow,
            Errno::NotSup,
            Errno::Shutdown,
        ] {
            assert_eq!(Errno::from_code(e.code()), e);
        }
        assert_eq!(Errno::from_errno(122), Errno::NoSpc);
        assert_eq!(Errno::from_errno(104), Errno::Io);
    }
}
