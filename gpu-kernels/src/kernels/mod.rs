//! The kernels, one file each: contract, f64 reference, device code, entries, launcher, cases.

pub mod dequantise;
pub mod elementwise;
pub mod get_rows;
mod int8_tile;
pub mod mmq;
mod mmq_narrow;
mod mmq_wide;
pub mod mmvq;
pub mod moe_sort;
pub mod product;
pub mod quantise_act;
pub mod repack;
pub mod rms_norm;
pub mod rope;
pub mod softmax;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod reduce;
