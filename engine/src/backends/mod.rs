//! The backends.

pub mod cpu;
pub mod reference;
