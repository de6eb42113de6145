//! Buffers of one connection, kept for the next request of about the same size.
//!
//! Allocating and zeroing an aligned buffer costs more than a small request, so buffers
//! go back here once their reply is sent. A buffer is taken back only while nobody else
//! holds it: an operation that was abandoned may still be writing into it. Contents are
//! never handed to another client, because a pool belongs to one connection, and a read
//! overwrites all of its buffer before a byte of it is sent.

use std::cell::{Cell, RefCell};

use dolmen_rt::Memory;

/// Smallest buffer, as a power of two.
const MIN_SHIFT: u32 = 12;
/// Largest buffer that is kept, as a power of two.
const MAX_SHIFT: u32 = 20;
/// Bytes kept per connection.
const MAX_KEPT: usize = 4 << 20;

/// A free list per power of two.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: RefCell<[Vec<Memory>; (MAX_SHIFT - MIN_SHIFT + 1) as usize]>,
    kept: Cell<usize>,
}

/// Index and size of the class that holds `len` bytes.
fn class(len: usize) -> Option<(usize, usize)> {
    let size = len.checked_next_power_of_two()?.max(1 << MIN_SHIFT);
    let shift = size.trailing_zeros();
    (shift <= MAX_SHIFT).then_some(((shift - MIN_SHIFT) as usize, size))
}

impl Pool {
    /// A buffer of at least `len` bytes with unspecified content.
    pub(crate) fn take(&self, len: usize) -> Memory {
        let Some((i, size)) = class(len) else { return Memory::zeroed(len) };
        match self.free.borrow_mut()[i].pop() {
            Some(m) => {
                self.kept.set(self.kept.get() - size);
                m
            }
            None => Memory::zeroed(size),
        }
    }

    /// Gives a buffer back.
    pub(crate) fn put(&self, mut memory: Memory) {
        let len = memory.len();
        let Some((i, _)) = class(len).filter(|(_, size)| *size == len) else { return };
        if self.kept.get() + len <= MAX_KEPT && memory.bytes_mut().is_some() {
            self.kept.set(self.kept.get() + len);
            self.free.borrow_mut()[i].push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_unless_somebody_holds_them() {
        let pool = Pool::default();
        let m = pool.take(5000);
        assert_eq!(m.len(), 8192);
        pool.put(m);
        assert_eq!(pool.kept.get(), 8192);
        let m = pool.take(4097);
        assert_eq!(pool.kept.get(), 0);
        let held = m.share();
        pool.put(m);
        assert_eq!(pool.kept.get(), 0);
        drop(held);
        pool.put(Memory::zeroed(3 << 20));
        assert_eq!(pool.kept.get(), 0);
        for _ in 0..10 {
            pool.put(Memory::zeroed(1 << 20));
        }
        assert_eq!(pool.kept.get(), MAX_KEPT);
    }
}
