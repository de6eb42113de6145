//! Buffers for copies, used again and again: a fresh megabyte costs more to be mapped and zeroed
//! than to be read.

use std::sync::Mutex;

use crate::{IoVec, Memory};

/// A pool of buffers of one size, aligned for direct I/O.
#[derive(Debug)]
pub struct Buffers {
    /// Size of each buffer in bytes.
    size: usize,
    /// How many are kept for later.
    keep: usize,
    /// What was used last is used first: it is still in the processor's cache. Never held across an
    /// await.
    free: Mutex<Vec<Memory>>,
}

impl Buffers {
    /// Buffers of `size` bytes; at most `keep` of them stay allocated while nobody uses them.
    pub fn new(size: usize, keep: usize) -> Buffers {
        Buffers { size, keep, free: Mutex::new(Vec::new()) }
    }

    /// A buffer with unspecified content; goes back to the pool when it is dropped.
    pub fn get(&self) -> Buffer<'_> {
        let memory = self.free.lock().expect("buffers").pop();
        Buffer { pool: self, memory: Some(memory.unwrap_or_else(|| Memory::zeroed(self.size))) }
    }

    /// Size of each buffer in bytes.
    pub fn size(&self) -> usize {
        self.size
    }
}

/// A buffer of a pool.
#[derive(Debug)]
pub struct Buffer<'a> {
    pool: &'a Buffers,
    memory: Option<Memory>,
}

impl Buffer<'_> {
    /// The first `len` bytes.
    ///
    /// # Panics
    /// When the buffer is smaller.
    #[track_caller]
    pub fn iovec(&self, len: usize) -> IoVec {
        IoVec::from(self.memory.as_ref().expect("there until it is dropped").share().slice(0, len))
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let Some(mut memory) = self.memory.take() else { return };
        // A request that was dropped before its end may still use it; then it is freed
        // when the kernel is done, and nobody gets it again.
        if memory.bytes_mut().is_none() {
            return;
        }
        let mut free = self.pool.free.lock().expect("buffers");
        if free.len() < self.pool.keep {
            free.push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_in_use_is_not_handed_out_again() {
        let pool = Buffers::new(4096, 1);
        let buffer = pool.get();
        buffer.iovec(3).copy_from_slice(0, b"abc");
        drop(buffer);
        let again = pool.get();
        assert_eq!(again.iovec(3).to_vec(), b"abc", "the same memory");
        let orphan = again.iovec(4096);
        drop(again);
        assert!(pool.get().iovec(4096).is_zero(), "the kernel may still use the old one");
        assert_eq!(orphan.slice(0, 3).to_vec(), b"abc");
    }
}
