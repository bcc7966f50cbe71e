//! Block formats of GGUF tensors: byte layout, encode, decode, dot products.
//!
//! One file per format under [`formats`] and one row in [`table`]; nothing else in the workspace knows a layout.
//! The crate is `no_std` and holds no tensor, file or thread, so the same source serves the quantiser, the CPU kernels,
//! the GPU kernels (nvptx64) and the tests.
//!
//! Every block format presents its weights in one common form, a [`Group`] of 32:
//! `w[i] = scale[i/16] * (code[i] - BIAS) + offset[i/16]`, with `code` an unsigned byte. Kernels are written once against
//! that form; a format only says how its bytes unpack into it.
#![no_std]
// Only the device's compiler, which takes unstable features, sees this one.
#![cfg_attr(target_arch = "nvptx64", feature(f16))]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod act;
pub mod bits;
pub mod codebook;
pub mod extent;
pub mod format;
pub mod formats;
pub mod lookup;
pub mod row;
pub mod search;
pub mod table;

pub use act::{ActGroup, ActKind};
pub use format::{BlockFormat, FloatFormat, FormatId, Group, Importance, QuantError};
pub use lookup::Lookup;
pub use table::{FormatInfo, Visitor, info, with_format};
