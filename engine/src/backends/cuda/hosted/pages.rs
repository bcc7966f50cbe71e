//! The host's memory in huge pages, for the driver to pin: it asks the kernel for every page, and of a huge one's 2 MiB it
//! asks once.

use std::ffi::c_void;
use std::ptr;

/// Bytes of a huge page.
pub(super) const HUGE: usize = 2 << 20;

/// Maps at least `bytes` bytes of zeros, in huge pages where the kernel has some: where they are, and how many they are.
pub(super) fn map(bytes: usize) -> Option<(*mut c_void, usize)> {
    let bytes = bytes.checked_next_multiple_of(HUGE)?;
    // A huge page more, so that a multiple of its size is in it.
    let with_room = bytes.checked_add(HUGE)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, at a place that the kernel chooses.
    let start = unsafe {
        libc::mmap(ptr::null_mut(), with_room, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return None;
    }
    let before = start.addr().next_multiple_of(HUGE) - start.addr();
    let at = start.wrapping_byte_add(before);
    // SAFETY: parts of the mapping that nobody has yet. What the kernel refuses leaves usable memory.
    unsafe {
        if before != 0 {
            libc::munmap(start, before);
        }
        libc::munmap(at.wrapping_byte_add(bytes), HUGE - before);
        libc::madvise(at, bytes, libc::MADV_HUGEPAGE);
    }
    Some((at, bytes))
}

/// Gives a mapping back.
///
/// # Safety
///
/// `at` and `bytes` are of a [`map`] that is neither pinned nor in use.
pub(super) unsafe fn unmap(at: *mut c_void, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { libc::munmap(at, bytes) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_is_aligned_zero_and_writable() {
        let (at, bytes) = map(HUGE + 1).unwrap();
        assert_eq!((at.addr() % HUGE, bytes), (0, 2 * HUGE));
        // SAFETY: mapped above, and this test's alone.
        let all = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), bytes) };
        assert!(all.iter().all(|byte| *byte == 0));
        all.fill(7);
        // SAFETY: nobody uses it from here on.
        unsafe { unmap(at, bytes) };
        assert!(map(usize::MAX).is_none());
    }
}
