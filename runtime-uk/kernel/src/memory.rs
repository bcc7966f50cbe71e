//! Physical memory: who may look at it, and ranges of it.

/// The smallest page.
pub const PAGE: u64 = 4096;

/// Access to physical memory.
///
/// *Implementor must*: return bytes that stay valid and unchanged as long as the result is used.
pub trait Physical {
    /// `len` bytes at `at`; `None` if they are not there.
    fn bytes(&self, at: u64, len: usize) -> Option<&[u8]>;
}

/// Memory where addresses are physical and mapped: below 4 GiB, as the entry code set it up.
#[derive(Clone, Copy, Debug)]
pub struct Identity(());

impl Identity {
    /// The token for it.
    ///
    /// # Safety
    /// * The first 4 GiB are mapped at their physical addresses.
    /// * While a result of [`Physical::bytes`] lives, nobody writes to its range.
    pub unsafe fn new() -> Identity {
        Identity(())
    }
}

impl Physical for Identity {
    fn bytes(&self, at: u64, len: usize) -> Option<&[u8]> {
        let end = at.checked_add(len as u64)?;
        if at == 0 || end > 1 << 32 {
            return None;
        }
        // SAFETY: not null, within the 4 GiB that `new`'s caller vouched for; nobody writes there.
        Some(unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(at as usize), len) })
    }
}

/// Bytes of physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl Range {
    /// The address after the last.
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// The whole pages that it touches.
    pub fn pages(self) -> Range {
        let start = self.start / PAGE * PAGE;
        Range { start, len: self.end().next_multiple_of(PAGE) - start }
    }
}
