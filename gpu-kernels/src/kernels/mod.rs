//! The kernels, one file each: contract, f64 reference, device code, entries, launcher, cases.

pub mod dequantise;
pub mod elementwise;
pub mod get_rows;
pub mod mmvq;
pub mod product;
pub mod quantise_act;
pub mod repack;
pub mod rms_norm;
pub mod rope;
pub mod softmax;

pub(crate) mod lookup;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod reduce;
