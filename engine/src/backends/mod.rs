//! The backends.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod cuda;
pub mod reference;
pub mod split;
