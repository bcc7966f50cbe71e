//! Every GPU kernel on a GPU: its cases against their references ([`conform`]), its shapes against the device's peaks and
//! ggml ([`mod@bench`]), and how long its modules take to load ([`load`]).
//!
//! The crate has no cases of its own: kernels declare them. Two programs: `kernels` measures, `gpu-test` checks and
//! measures and needs nothing but a driver; `cargo xtask gpu-test` makes a folder of it.
#![forbid(unsafe_code)]

pub mod args;
pub mod bench;
pub mod conform;
pub mod error;
pub mod load;
pub mod options;
pub mod peaks;
pub mod peer;
pub mod row;
pub mod timing;

pub use error::BenchError;
