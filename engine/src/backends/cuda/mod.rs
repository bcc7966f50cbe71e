//! The GPU.

#[cfg(feature = "cuda")]
pub mod hosted;
