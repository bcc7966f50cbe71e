//! An allocator that counts the bytes each thread asks for, to hold the reader to its bound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use gguf::{Gguf, GgufError};

struct Counting;

thread_local! {
    static ASKED_BYTES: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    ASKED_BYTES.with(|asked| asked.set(asked.get() + bytes));
}

// SAFETY: every call goes unchanged to the system's allocator; counting touches a const-initialised thread-local
// without a destructor, which neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise is `System`'s.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        // SAFETY: `ptr` came from `System` with this layout; the caller vouches for `new_size`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Parses, and fails the test if that asked for more than twice the file's bytes in all, freed or not.
pub fn parse_bounded(bytes: &[u8]) -> Result<Gguf<'_>, GgufError> {
    let before = ASKED_BYTES.get();
    let result = Gguf::parse(bytes);
    let asked = ASKED_BYTES.get() - before;
    assert!(asked <= 2 * bytes.len(), "asked for {asked} bytes to parse {}: {result:?}", bytes.len());
    result
}

/// Parses what must be refused, and returns why.
pub fn refused(bytes: &[u8]) -> GgufError {
    parse_bounded(bytes).expect_err("a bad file was accepted")
}
