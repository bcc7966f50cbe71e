//! Every GPU kernel on a GPU: its cases against their references ([`conform`]), its shapes against the device's peaks and
//! ggml ([`mod@bench`]), how long its modules take to load ([`load`]), and a model's weights to get there ([`transfer`]); and
//! which cut of a product is fastest ([`tune`]).
//!
//! The crate has no cases of its own: kernels declare them. Three programs: `kernels` and `load` measure, `gpu-test` checks
//! and measures, can do what `load` does, tunes, and needs nothing but a driver; `cargo xtask gpu-test` makes a folder of it.
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
pub mod transfer;
pub mod tune;

pub use error::BenchError;
