//! Where model bytes come from on a hosted system.

mod mmap;

pub use mmap::Mapped;
