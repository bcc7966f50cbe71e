//! From the kernel crate's source to PTX, without NVIDIA's toolkit.
//!
//! [`Compiler::find`] looks for a rustc that can make device code, [`Kernels::build`] compiles `gpu-kernels` once per
//! kernel file and [`Tier`] and finishes the text ([`module`]), [`ptxas`] assembles it for tests and reports. Callers:
//! the build script of `gpu-kernels` (embeds the text) and xtask (checks it).
//!
//! No `core` for the device is ever code-generated: kernels take only generic and inline code from other crates, and
//! for that metadata with every function's MIR is enough. It is made once per compiler, below the target folder.
#![forbid(unsafe_code)]

mod cache;
mod compiler;
mod elf;
mod error;
mod kernels;
pub mod module;
pub mod ptxas;
mod tier;

pub use compiler::{Compiler, DEBIAN_PACKAGES, INSTALL_COMMAND};
pub use error::PtxError;
pub use kernels::{CHECKS, Kernels, in_parallel};
pub use module::{Entry, Module};
pub use tier::{TIERS, Tier};

/// The target of all device code.
pub const TARGET: &str = "nvptx64-nvidia-cuda";
