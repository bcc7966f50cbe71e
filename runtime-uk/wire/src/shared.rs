//! Memory that somebody else writes at the same time: the window, seen from either side.
//!
//! No reference to its bytes is ever made. Everything goes through relaxed atomic words, so what another process does
//! there can make values wrong, never the program. Order comes from [`Shared::load_acquire`] and
//! [`Shared::store_release`] of the counter, and from the doorbell.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::{SLOT_BYTES, Slot};

/// A piece of shared memory.
#[derive(Debug)]
pub struct Shared {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: all accesses are atomic.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Memory from `at` on.
    ///
    /// # Safety
    /// * `bytes` bytes from `at` are mapped for reading and writing as long as the value lives.
    /// * `at` is a multiple of 8.
    /// * This program makes no other access to them that is not atomic, meanwhile.
    pub unsafe fn new(at: *mut u8, bytes: usize) -> Shared {
        Shared { at, bytes }
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether a range lies in it.
    pub fn has(&self, at: u64, bytes: u64) -> bool {
        at.checked_add(bytes).is_some_and(|end| end <= self.bytes as u64)
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(self.has(at, 8) && at.is_multiple_of(8), "a word at {at:#x} of {:#x} bytes", self.bytes);
        // SAFETY: in range and aligned by the assertion and by `new`'s contract; only atomic accesses are made.
        unsafe { AtomicU64::from_ptr(self.at.add(at as usize).cast()) }
    }

    fn byte(&self, at: u64) -> &AtomicU8 {
        assert!(self.has(at, 1), "a byte at {at:#x} of {:#x}", self.bytes);
        // SAFETY: in range by the assertion; only atomic accesses are made.
        unsafe { AtomicU8::from_ptr(self.at.add(at as usize)) }
    }

    /// Reads the counter at `at`, and with it all that was written before it was stored.
    ///
    /// # Panics
    /// If it is not within the memory, or not aligned; so do all below.
    pub fn load_acquire(&self, at: u64) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Stores the counter, after all that was written before.
    pub fn store_release(&self, at: u64, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    /// Copies a slot out.
    pub fn slot(&self, at: u64) -> Slot {
        let mut slot = [0; SLOT_BYTES];
        self.read(at, &mut slot);
        slot
    }

    /// Copies bytes out.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        assert!(self.has(at, to.len() as u64), "{} bytes at {at:#x} of {:#x}", to.len(), self.bytes);
        let head = (at.next_multiple_of(8) - at).min(to.len() as u64);
        let (first, rest) = to.split_at_mut(head as usize);
        let (words, last) = rest.as_chunks_mut::<8>();
        let middle = at + head;
        let end = middle + 8 * words.len() as u64;
        first.iter_mut().zip(at..).for_each(|(byte, at)| *byte = self.byte(at).load(Ordering::Relaxed));
        for (word, at) in words.iter_mut().zip((middle..).step_by(8)) {
            *word = self.word(at).load(Ordering::Relaxed).to_le_bytes();
        }
        last.iter_mut().zip(end..).for_each(|(byte, at)| *byte = self.byte(at).load(Ordering::Relaxed));
    }

    /// Copies bytes in.
    pub fn write(&self, at: u64, from: &[u8]) {
        assert!(self.has(at, from.len() as u64), "{} bytes at {at:#x} of {:#x}", from.len(), self.bytes);
        let head = (at.next_multiple_of(8) - at).min(from.len() as u64);
        let (first, rest) = from.split_at(head as usize);
        let (words, last) = rest.as_chunks::<8>();
        let middle = at + head;
        let end = middle + 8 * words.len() as u64;
        first.iter().zip(at..).for_each(|(byte, at)| self.byte(at).store(*byte, Ordering::Relaxed));
        for (word, at) in words.iter().zip((middle..).step_by(8)) {
            self.word(at).store(u64::from_le_bytes(*word), Ordering::Relaxed);
        }
        last.iter().zip(end..).for_each(|(byte, at)| self.byte(at).store(*byte, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_at_any_alignment() {
        let mut memory = [0u64; 16];
        // SAFETY: the array outlives its use here, aligned, and is not touched otherwise meanwhile.
        let shared = unsafe { Shared::new(memory.as_mut_ptr().cast(), 128) };
        let data: std::vec::Vec<u8> = (1..=100).collect();
        for at in 0..20u64 {
            for len in [0usize, 1, 3, 7, 8, 9, 17, 64, 100] {
                shared.write(0, &[0; 128]);
                shared.write(at, &data[..len]);
                let mut all = [0; 128];
                shared.read(0, &mut all);
                let mut back = std::vec![0; len];
                shared.read(at, &mut back);
                assert_eq!(back, data[..len]);
                assert!(all[..at as usize].iter().all(|byte| *byte == 0));
                assert!(all[at as usize + len..].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    #[should_panic(expected = "bytes at")]
    fn out_of_range_is_a_panic() {
        let mut memory = [0u64; 2];
        // SAFETY: as above.
        unsafe { Shared::new(memory.as_mut_ptr().cast(), 16) }.read(9, &mut [0; 8]);
    }
}
