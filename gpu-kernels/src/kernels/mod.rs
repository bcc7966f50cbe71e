//! The kernels, one file each: contract, f64 reference, device code, entries, launcher, cases.

pub mod dequantise;
pub mod elementwise;
pub mod flash;
pub mod get_rows;
pub mod mmf;
pub mod mmf32;
pub mod mmvf;
pub mod mmvq;
pub mod product;
pub mod quantise_act;
pub mod repack;
pub mod rms_norm;
pub mod rope;
pub mod round_act;
pub mod softmax;

pub(crate) mod lookup;
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) mod float_case;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod reduce;
