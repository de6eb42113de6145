//! Access to memory that others may change at the same time: other cores, the kernel, a guest.
//!
//! Rust's ordinary reads and writes must not race. What is here may: each function accesses memory as if byte by byte with
//! relaxed atomics. So a race gives old bytes, new bytes or a mixture, and nothing worse; and that is the only way in which the
//! safe methods of [`Buf`](crate::Buf) reach its memory. The bytes of a [`Memory`](crate::Memory) can be borrowed, but only while
//! no `Buf` of it exists.
//!
//! A loop over atomic bytes is what this means and what Miri gets; the compiler can't turn it into anything fast. On x86-64
//! it is written in assembly, which the compiler does not look into: string instructions, which are as fast as the library's
//! copies (measured from 28 bytes to 1 MiB), and a loop for the look for zeroes.

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Copies borrowed bytes to shared memory.
///
/// # Safety
/// `to` is valid for writes of that many bytes and for atomic access, and nobody has a Rust reference to them.
pub(crate) unsafe fn copy_in(from: &[u8], to: *mut u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller's promise for `to`; `from` is borrowed, so they do not overlap.
    unsafe {
        move_bytes(from.as_ptr(), to, from.len());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for (i, byte) in from.iter().enumerate() {
        // SAFETY: inside the range; a byte has the size and alignment of its atomic.
        unsafe { AtomicU8::from_ptr(to.add(i)) }.store(*byte, Relaxed);
    }
}

/// Copies bytes out of shared memory.
///
/// # Safety
/// `from` is valid for reads and writes of that many bytes and for atomic access, and nobody has a Rust reference to
/// them.
pub(crate) unsafe fn copy_out(from: *mut u8, to: &mut [u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller's promise for `from`; `to` is borrowed, so they do not overlap.
    unsafe {
        move_bytes(from, to.as_mut_ptr(), to.len());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for (i, byte) in to.iter_mut().enumerate() {
        // SAFETY: inside the range; a byte has the size and alignment of its atomic.
        *byte = unsafe { AtomicU8::from_ptr(from.add(i)) }.load(Relaxed);
    }
}

/// Copies `len` bytes within shared memory; the ranges may overlap.
///
/// # Safety
/// Both ranges are valid for reads and writes and for atomic access, and nobody has a Rust reference to them.
pub(crate) unsafe fn copy(from: *mut u8, to: *mut u8, len: usize) {
    let (first, second) = (from as usize, to as usize);
    if first < second && second < first + len {
        // Forwards would overwrite what is still to be read. Rare: through a third place.
        let mut between = vec![0u8; len];
        // SAFETY: the caller's promise.
        unsafe {
            copy_out(from, &mut between);
            copy_in(&between, to);
        }
        return;
    }
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller's promise, and going forwards is right here.
    unsafe {
        move_bytes(from, to, len);
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for i in 0..len {
        // SAFETY: inside both ranges; a byte has the size and alignment of its atomic.
        let (from, to) = unsafe { (AtomicU8::from_ptr(from.add(i)), AtomicU8::from_ptr(to.add(i))) };
        to.store(from.load(Relaxed), Relaxed);
    }
}

/// Copies forwards, in a way that the compiler does not look into.
///
/// # Safety
/// Both ranges are valid, and no Rust reference is in the way of reading the one or writing the other.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn move_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: reads and writes the two ranges only, forwards, as the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Sets `len` bytes.
///
/// # Safety
/// The range is valid for writes and for atomic access, and nobody has a Rust reference to it.
pub(crate) unsafe fn fill(to: *mut u8, byte: u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: writes the range only, forwards, as the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") byte,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for i in 0..len {
        // SAFETY: inside the range; a byte has the size and alignment of its atomic.
        unsafe { AtomicU8::from_ptr(to.add(i)) }.store(byte, Relaxed);
    }
}

/// Whether `len` bytes are all zero.
///
/// # Safety
/// The range is valid for reads and writes and for atomic access, and nobody has a Rust reference to it.
pub(crate) unsafe fn is_zero(from: *mut u8, len: usize) -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        const STEP: usize = 64;
        let (steps, tail) = (len / STEP, len % STEP);
        let (mut at, mut left) = (from, steps);
        if steps > 0 {
            // Stops at the first step that is not all zero.
            // SAFETY: reads `steps` times 64 bytes of the range; SSE2 is part of the architecture.
            unsafe {
                std::arch::asm!(
                    "2:",
                    "movdqu {a}, [{at}]",
                    "movdqu {b}, [{at} + 16]",
                    "movdqu {c}, [{at} + 32]",
                    "movdqu {d}, [{at} + 48]",
                    "por {a}, {b}",
                    "por {c}, {d}",
                    "por {a}, {c}",
                    "pxor {b}, {b}",
                    "pcmpeqb {a}, {b}",
                    "pmovmskb {mask:e}, {a}",
                    "cmp {mask:e}, 0xffff",
                    "jne 3f",
                    "add {at}, 64",
                    "dec {left}",
                    "jnz 2b",
                    "3:",
                    at = inout(reg) at,
                    left = inout(reg) left,
                    mask = out(reg) _,
                    a = out(xmm_reg) _,
                    b = out(xmm_reg) _,
                    c = out(xmm_reg) _,
                    d = out(xmm_reg) _,
                    options(nostack, readonly),
                );
            }
        }
        if left > 0 {
            return false;
        }
        let mut last = [0u8; STEP];
        // SAFETY: the rest of the range.
        unsafe { copy_out(at, &mut last[..tail]) };
        last == [0; STEP]
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    (0..len).all(|i| {
        // SAFETY: inside the range; a byte has the size and alignment of its atomic.
        unsafe { AtomicU8::from_ptr(from.add(i)) }.load(Relaxed) == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment() {
        let lengths = (0..40).chain([63, 64, 65, 127, 128, 129, 200]);
        let lengths: Vec<usize> = if cfg!(miri) { vec![0, 1, 9, 65] } else { lengths.collect() };
        for (at, len) in (0..9).flat_map(|at| lengths.iter().map(move |len| (at, *len))) {
            let from: Vec<u8> = (0..256).map(|i| i as u8 | 1).collect();
            let mut shared = vec![0u8; 256];
            let p = shared.as_mut_ptr();
            let mut back = vec![0u8; len];
            // SAFETY: a private vector of 256 bytes, borrowed by nobody meanwhile.
            unsafe {
                copy_in(&from[at..at + len], p.add(at + 1));
                copy_out(p.add(at + 1), &mut back);
            }
            assert_eq!((&shared[at + 1..][..len], &back[..]), (&from[at..][..len], &from[at..][..len]));
            assert!(shared[..=at].iter().chain(&shared[at + 1 + len..]).all(|b| *b == 0));
            let p = shared.as_mut_ptr();
            // SAFETY: as above.
            unsafe { fill(p.add(at), 7, len) };
            assert!(shared[at..][..len].iter().all(|b| *b == 7));
            shared.fill(0);
            // Whatever lies around it does not count.
            if at > 0 {
                shared[at - 1] = 1;
            }
            shared[at + len] = 1;
            let p = shared.as_mut_ptr();
            // SAFETY: as above.
            assert!(unsafe { is_zero(p.add(at), len) }, "{at} {len}");
            for other in 0..len {
                shared[at + other] = 1;
                let p = shared.as_mut_ptr();
                // SAFETY: as above.
                assert!(!unsafe { is_zero(p.add(at), len) }, "{at} {len} {other}");
                shared[at + other] = 0;
            }
        }
    }

    #[test]
    fn overlapping_copies() {
        for shift in [0usize, 1, 3, 8, 50] {
            for up in [true, false] {
                let mut v: Vec<u8> = (0..200).map(|i| i as u8).collect();
                let (from, to) = if up { (10, 10 + shift) } else { (10 + shift, 10) };
                let expected = v[from..from + 100].to_vec();
                let p = v.as_mut_ptr();
                // SAFETY: inside one private vector.
                unsafe { copy(p.add(from), p.add(to), 100) };
                assert_eq!(v[to..to + 100], expected);
            }
        }
    }
}
