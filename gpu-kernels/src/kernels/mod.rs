//! The kernels, one file each: contract, f64 reference, device code, entries, launcher, cases.

pub mod dequantise;
pub mod elementwise;
pub mod epilogue;
mod int8_tile;
pub mod mmq;
pub mod mmvq;
pub mod moe_sort;
pub mod quantise_act;
pub mod rms_norm;
pub mod rope;
pub mod softmax;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod reduce;
