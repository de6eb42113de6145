//! Buffers whose memory outlives the futures that use it.
//!
//! The kernel writes into a buffer until the operation completes, whether or not
//! somebody still waits for it. So memory is reference counted: a slot in the ring
//! holds a clone of the [`IoVec`], and dropping a future frees nothing early.
//!
//! [`Memory`] is the owner's view and can be borrowed as a slice while nobody else holds
//! it; [`Buf`] is a shared window of it that can only be copied from and to, because
//! another core, the kernel, a device or a guest may change the bytes at any time: the
//! copies are made as if by atomic accesses to single bytes (`shared_memory`), so that a
//! race gives any mixture of old and new bytes, but is no undefined behaviour. A `Buf` may also
//! stand for memory that Dolmen does not own (a guest's), kept alive by its owner.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::shared_memory;

/// Alignment of all buffers that Dolmen allocates: enough for O_DIRECT on any device.
pub(crate) const ALIGN: usize = 4096;

enum Owner {
    /// Allocated by us with [`ALIGN`].
    Ours(Layout),
    /// Somebody else's memory (a guest's); alive while this value is.
    #[expect(dead_code, reason = "held for its Drop")]
    Foreign(Box<dyn Any + Send + Sync>),
}

struct Region {
    ptr: NonNull<u8>,
    len: usize,
    owner: Owner,
}

// SAFETY: a Region is an address range that stays valid while the Region lives, and may be
// freed on any thread. Its bytes are reached either through `Memory` with exclusive
// ownership, or as by relaxed atomics (`shared_memory`).
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        if let Owner::Ours(layout) = self.owner {
            // SAFETY: allocated with exactly this layout in `Memory::zeroed`, freed once.
            unsafe { dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}

/// An owned, page-aligned, zero-initialised buffer.
pub struct Memory(Arc<Region>);

impl Memory {
    /// `len` zero bytes, aligned for direct I/O.
    pub fn zeroed(len: usize) -> Memory {
        let layout = Layout::from_size_align(len.max(1), ALIGN).expect("buffer length fits isize");
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Memory(Arc::new(Region { ptr, len, owner: Owner::Ours(layout) }))
    }

    /// A copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Memory {
        let mut m = Memory::zeroed(bytes.len());
        m.bytes_mut().expect("just made").copy_from_slice(bytes);
        m
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// A shared window of the whole memory.
    pub fn share(&self) -> Buf {
        Buf { ptr: self.0.ptr, len: self.0.len, region: self.0.clone() }
    }

    /// The whole memory as an [`IoVec`].
    pub fn iovec(&self) -> IoVec {
        IoVec::from(self.share())
    }

    /// The bytes, or `None` while an operation still holds a window (only after a
    /// future was dropped before it completed).
    pub fn bytes(&mut self) -> Option<&[u8]> {
        let region = Arc::get_mut(&mut self.0)?;
        // SAFETY: `get_mut` proves that no `Buf` and no ring slot refers to the region,
        // so nobody else reads or writes it while the borrow lasts; it is initialised.
        Some(unsafe { std::slice::from_raw_parts(region.ptr.as_ptr(), region.len) })
    }

    /// The bytes for writing; `None` as for [`Memory::bytes`].
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        let region = Arc::get_mut(&mut self.0)?;
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        Some(unsafe { std::slice::from_raw_parts_mut(region.ptr.as_ptr(), region.len) })
    }

    /// Copies the content into a vector, whoever else holds the memory.
    pub fn to_vec(&self) -> Vec<u8> {
        self.share().to_vec()
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes)", self.len())
    }
}

/// A window of reference-counted memory. Others may change the bytes at any time, so
/// they can be copied but not borrowed.
#[derive(Clone)]
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    region: Arc<Region>,
}

// SAFETY: see `Region`; the pointer lies inside the region that the Buf keeps alive.
unsafe impl Send for Buf {}
// SAFETY: as above; all that `&Buf` permits are accesses as by relaxed atomics.
unsafe impl Sync for Buf {}

impl Buf {
    /// Memory that somebody else owns, for example a guest's.
    ///
    /// # Safety
    /// `ptr .. ptr + len` must be valid for reads and writes until `keep_alive` is
    /// dropped, and nobody may hold Rust references to it, or access it otherwise than
    /// with atomics, the kernel's calls, or from outside of this program.
    pub unsafe fn foreign(ptr: NonNull<u8>, len: usize, keep_alive: Box<dyn Any + Send + Sync>) -> Buf {
        let region = Arc::new(Region { ptr, len, owner: Owner::Foreign(keep_alive) });
        Buf { ptr, len, region }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The window `offset .. offset + len` of this window.
    ///
    /// # Panics
    /// When it is not inside.
    #[track_caller]
    pub fn slice(&self, offset: usize, len: usize) -> Buf {
        assert!(offset <= self.len && len <= self.len - offset, "slice outside of the buffer");
        // SAFETY: the offset lies inside the region (checked above).
        let ptr = unsafe { self.ptr.add(offset) };
        Buf { ptr, len, region: self.region.clone() }
    }

    /// Copies bytes out, starting `offset` bytes into the window.
    ///
    /// # Panics
    /// When the range is not inside.
    #[track_caller]
    pub fn copy_to_slice(&self, offset: usize, out: &mut [u8]) {
        assert!(offset <= self.len && out.len() <= self.len - offset, "read outside of the buffer");
        // SAFETY: the source is inside the live region (checked), which nobody borrows while a
        // Buf exists (see `Memory::bytes`); the destination is an exclusive borrow, so they
        // do not overlap.
        unsafe {
            shared_memory::copy_out(self.ptr.as_ptr().add(offset), out);
        }
    }

    /// Copies bytes in, starting `offset` bytes into the window.
    ///
    /// # Panics
    /// When the range is not inside.
    #[track_caller]
    pub fn copy_from_slice(&self, offset: usize, from: &[u8]) {
        assert!(offset <= self.len && from.len() <= self.len - offset, "write outside of the buffer");
        // SAFETY: the destination is inside the live region (checked), which nobody borrows while
        // a Buf exists (see `Memory::bytes`); the source is borrowed, so they do not overlap.
        unsafe {
            shared_memory::copy_in(from, self.ptr.as_ptr().add(offset));
        }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the whole window is inside the live region, which nobody borrows.
        unsafe { shared_memory::fill(self.ptr.as_ptr(), byte, self.len) }
    }

    /// Whether address and length are multiples of `align`, as direct I/O wants them.
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.ptr.as_ptr() as usize).is_multiple_of(align) && self.len.is_multiple_of(align)
    }

    /// Whether every byte is zero at the time of the look.
    pub fn is_zero(&self) -> bool {
        // SAFETY: the whole window is inside the live region, which nobody borrows.
        unsafe { shared_memory::is_zero(self.ptr.as_ptr(), self.len) }
    }

    /// Copies the content into a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; self.len];
        self.copy_to_slice(0, &mut v);
        v
    }

    /// The address, for handing to the kernel together with a clone of the window.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} of {} bytes)", self.len, self.region.len)
    }
}

/// A sequence of buffers that is read or written as one. Cloning copies no bytes.
#[derive(Debug, Default)]
pub struct IoVec {
    segments: SmallVec<[Buf; 1]>,
    len: usize,
}

impl Clone for IoVec {
    fn clone(&self) -> IoVec {
        // Once per request, and mostly one buffer: shorter than the general way.
        let segments = match &self.segments[..] {
            [one] => SmallVec::from_buf([one.clone()]),
            many => many.iter().cloned().collect(),
        };
        IoVec { segments, len: self.len }
    }
}

impl IoVec {
    /// An empty sequence.
    pub fn new() -> IoVec {
        IoVec::default()
    }

    /// Appends a buffer.
    pub fn push(&mut self, buf: Buf) {
        self.len += buf.len();
        if !buf.is_empty() {
            self.segments.push(buf);
        }
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the total length is zero.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers, none of them empty.
    pub fn segments(&self) -> &[Buf] {
        &self.segments
    }

    /// The part `offset .. offset + len`.
    ///
    /// # Panics
    /// When it is not inside.
    #[track_caller]
    pub fn slice(&self, offset: usize, len: usize) -> IoVec {
        assert!(offset <= self.len && len <= self.len - offset, "slice outside of the vector");
        let mut out = IoVec::new();
        let (mut skip, mut rest) = (offset, len);
        for s in &self.segments {
            if rest == 0 {
                break;
            }
            if skip >= s.len() {
                skip -= s.len();
                continue;
            }
            let n = rest.min(s.len() - skip);
            out.push(s.slice(skip, n));
            rest -= n;
            skip = 0;
        }
        out
    }

    /// Copies bytes out, starting at `offset`.
    ///
    /// # Panics
    /// When the range is not inside.
    #[track_caller]
    pub fn copy_to_slice(&self, offset: usize, out: &mut [u8]) {
        let mut done = 0;
        for s in self.slice(offset, out.len()).segments() {
            s.copy_to_slice(0, &mut out[done..done + s.len()]);
            done += s.len();
        }
    }

    /// Copies bytes in, starting at `offset`.
    ///
    /// # Panics
    /// When the range is not inside.
    #[track_caller]
    pub fn copy_from_slice(&self, offset: usize, from: &[u8]) {
        let mut done = 0;
        for s in self.slice(offset, from.len()).segments() {
            s.copy_from_slice(0, &from[done..done + s.len()]);
            done += s.len();
        }
    }

    /// Copies the content of another vector of the same length into this one.
    ///
    /// # Panics
    /// When the lengths differ.
    #[track_caller]
    pub fn copy_from(&self, from: &IoVec) {
        assert_eq!(self.len, from.len, "vectors of different lengths");
        let mut at = 0;
        for s in from.segments() {
            let mut done = 0;
            for d in self.slice(at, s.len()).segments() {
                // SAFETY: both windows have d.len() bytes from these addresses, which nobody
                // borrows; `copy` allows them to overlap.
                unsafe { shared_memory::copy(s.as_ptr().add(done), d.as_ptr(), d.len()) }
                done += d.len();
            }
            at += s.len();
        }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        self.segments.iter().for_each(|s| s.fill(byte));
    }

    /// Whether every byte is zero at the time of the look.
    pub fn is_zero(&self) -> bool {
        self.segments.iter().all(Buf::is_zero)
    }

    /// Copies the content into a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; self.len];
        self.copy_to_slice(0, &mut v);
        v
    }
}

impl From<Buf> for IoVec {
    fn from(buf: Buf) -> IoVec {
        let mut v = IoVec::new();
        v.push(buf);
        v
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_copies() {
        let a = Memory::from_slice(b"hello ");
        let b = Memory::from_slice(b"world");
        let mut v = a.iovec();
        v.push(b.share());
        assert_eq!(v.to_vec(), b"hello world");
        assert_eq!(v.slice(4, 4).to_vec(), b"o wo");
        v.copy_from_slice(5, b"-W");
        assert_eq!(v.to_vec(), b"hello-World");
        let c = Memory::zeroed(11);
        assert!(c.iovec().is_zero());
        c.iovec().copy_from(&v);
        assert_eq!(c.to_vec(), b"hello-World");
        assert!(!c.iovec().is_zero());
        assert_eq!(a.share().as_ptr() as usize % ALIGN, 0);
    }

    /// The story: safe code could write through shared windows on two threads at once with plain stores. Miri says so.
    #[test]
    fn windows_may_race() {
        let m = Memory::zeroed(1000);
        let (a, b, c) = (m.share(), m.iovec(), m.share());
        std::thread::scope(|s| {
            s.spawn(move || a.fill(1));
            s.spawn(move || b.copy_from_slice(0, &[2; 1000]));
            s.spawn(move || (c.is_zero(), c.to_vec()));
        });
        let mut m = m;
        assert!(m.bytes().expect("nobody else has it").iter().all(|b| matches!(b, 1 | 2)));
    }

    #[test]
    fn a_shared_memory_cannot_be_borrowed() {
        let mut m = Memory::zeroed(16);
        let held = m.share();
        assert!(m.bytes().is_none());
        drop(held);
        assert!(m.bytes_mut().is_some());
    }
}
