//! The backends.

pub mod cpu;
pub mod reference;
pub mod split;
#[cfg(feature = "gpu")]
pub mod cuda;
