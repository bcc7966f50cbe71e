//! What the tasks of a parallel region write to.

/// A pointer that tasks share; each use says why the accesses are disjoint.
pub(super) struct Shared<T>(pub(super) *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: only an address; dereferencing is the user's `unsafe`.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer moved by `n` elements.
    ///
    /// # Safety
    /// * The result stays within the allocation.
    pub(super) unsafe fn at(self, n: usize) -> *mut T {
        // SAFETY: by this function's contract.
        unsafe { self.0.add(n) }
    }
}
