//! Kinds of requests and their flags, and the events that `blkdebug` can act on.

use std::ops::BitOr;

/// What a request does. Matches over it are exhaustive on purpose: a new kind must
/// break the build wherever somebody has to think.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// Read data.
    Read,
    /// Write data.
    Write,
    /// Make a range read as zeroes.
    WriteZeroes,
    /// Give space back; what the range reads as afterwards is unspecified.
    Discard,
    /// Make everything acknowledged so far durable.
    Flush,
    /// Change the size.
    Resize,
}

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(u8);
        impl $name {
            /// No flag.
            pub const NONE: $name = $name(0);
            $($(#[$fdoc])* pub const $flag: $name = $name($bit);)*

            /// Whether every flag of `other` is set.
            pub const fn has(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }
            /// Union, usable in constants.
            pub const fn with(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }
            /// Difference.
            pub const fn without(self, other: $name) -> $name {
                $name(self.0 & !other.0)
            }
        }
        impl BitOr for $name {
            type Output = $name;
            fn bitor(self, o: $name) -> $name {
                self.with(o)
            }
        }
    };
}

flags! {
    /// Flags of a read.
    ReadFlags {
        /// What the node that owns the allocation does not have yet is copied into it
        /// (copy-on-read). Travels unchanged through filters; needs M.
        POPULATE = 1;
        /// The data are not wanted: the buffer may be left as it is. With `POPULATE`
        /// the range is copied; alone it is a hint to warm caches.
        PREFETCH = 2;
    }
}

flags! {
    /// Flags of a write, zero write or discard.
    WriteFlags {
        /// Durable when acknowledged (force unit access).
        FUA = 1;
        /// The data that readers see do not change (copy-on-read): needs only M, is
        /// ignored by copy-before-write and marks no bitmap.
        UNCHANGED = 2;
        /// A zero write may give the space back instead of keeping it allocated.
        MAY_UNMAP = 4;
        /// A zero write fails with `Unsupported` rather than fall back to writing
        /// a buffer of zeroes.
        NO_FALLBACK = 8;
        /// The data are to be stored compressed where the format can.
        COMPRESSED = 16;
    }
}

macro_rules! events {
    ($($name:ident = $text:literal,)*) => {
        /// A point in a driver at which `blkdebug` can inject an error or change its
        /// state. Drivers raise events towards the child they are about to use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are the documentation, see as_str")]
        pub enum BlkEvent { $($name,)* }

        impl BlkEvent {
            /// Every event that can be named; not every driver comes to each.
            pub const ALL: &'static [BlkEvent] = &[$(BlkEvent::$name,)*];

            /// The name used in `blkdebug` options and configuration files.
            pub const fn as_str(self) -> &'static str {
                match self { $(BlkEvent::$name => $text,)* }
            }

            /// The event of that name.
            pub fn parse(name: &str) -> Option<BlkEvent> {
                match name { $($text => Some(BlkEvent::$name),)* _ => None }
            }
        }
    };
}

events! {
    L1Update = "l1_update",
    L1GrowAllocTable = "l1_grow_alloc_table",
    L1GrowWriteTable = "l1_grow_write_table",
    L1GrowActivateTable = "l1_grow_activate_table",
    L2Load = "l2_load",
    L2Update = "l2_update",
    L2UpdateCompressed = "l2_update_compressed",
    L2AllocCowRead = "l2_alloc_cow_read",
    L2AllocWrite = "l2_alloc_write",
    ReadAio = "read_aio",
    ReadBackingAio = "read_backing_aio",
    ReadCompressed = "read_compressed",
    WriteAio = "write_aio",
    WriteCompressed = "write_compressed",
    VmstateLoad = "vmstate_load",
    VmstateSave = "vmstate_save",
    CowRead = "cow_read",
    CowWrite = "cow_write",
    ReftableLoad = "reftable_load",
    ReftableGrow = "reftable_grow",
    ReftableUpdate = "reftable_update",
    RefblockLoad = "refblock_load",
    RefblockUpdate = "refblock_update",
    RefblockUpdatePart = "refblock_update_part",
    RefblockAlloc = "refblock_alloc",
    RefblockAllocHookup = "refblock_alloc_hookup",
    RefblockAllocWrite = "refblock_alloc_write",
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    ClusterAlloc = "cluster_alloc",
    ClusterAllocBytes = "cluster_alloc_bytes",
    ClusterFree = "cluster_free",
    FlushToOs = "flush_to_os",
    FlushToDisk = "flush_to_disk",
    PwritevRmwHead = "pwritev_rmw_head",
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    PwritevRmwTail = "pwritev_rmw_tail",
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    Pwritev = "pwritev",
    PwritevZero = "pwritev_zero",
    PwritevDone = "pwritev_done",
    EmptyImagePrepare = "empty_image_prepare",
    L1ShrinkWriteTable = "l1_shrink_write_table",
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    CorWrite = "cor_write",
    ClusterAllocSpace = "cluster_alloc_space",
    None = "none",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_names_round_trip() {
        for e in BlkEvent::ALL {
            assert_eq!(BlkEvent::parse(e.as_str()), Some(*e));
        }
        assert_eq!(BlkEvent::parse("nonsense"), None);
    }
}
