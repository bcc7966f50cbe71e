//! The heap: all free RAM, under talc, behind a spinning lock. Interrupt handlers never allocate, so holding the lock
//! cannot be interrupted by a taker.

use core::alloc::{GlobalAlloc, Layout};

use spinning_top::RawSpinlock;
use talc::TalcLock;
use talc::source::Manual;

use crate::memory::Range;

/// The allocator; the image makes it the global one.
pub struct Heap(TalcLock<RawSpinlock, Manual>);

impl Heap {
    /// A heap without memory.
    pub const fn new() -> Heap {
        Heap(TalcLock::new(Manual))
    }

    /// Gives the heap a range of RAM. Ranges too short to hold the allocator's own records are left unused.
    ///
    /// # Safety
    /// * The range is mapped, writable, and belongs to nobody else from now on.
    pub unsafe fn add(&self, range: Range) {
        let start = core::ptr::with_exposed_provenance_mut(range.start as usize);
        // SAFETY: the caller's promise is talc's condition.
        let _ = unsafe { self.0.lock().claim(start, range.len as usize) };
    }
}

impl Default for Heap {
    fn default() -> Heap {
        Heap::new()
    }
}

// SAFETY: calls go to talc's allocator unchanged.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is talc's.
        unsafe { self.0.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { self.0.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.realloc(ptr, layout, new_size) }
    }
}
