//! The kernels, one file each: contract, f64 reference, device code, entries, launcher, cases.

pub mod activation;
pub mod argmax;
pub mod argsort;
pub mod copy;
pub mod cumsum;
pub mod dequantise;
pub mod elementwise;
pub mod flash;
pub mod get_rows;
pub mod glu;
pub mod hadamard;
pub mod kv_store;
pub mod layer_norm;
pub mod mmd_hopper;
pub mod mmf;
pub mod mmf32;
pub mod mmf_hopper;
pub mod mmq;
pub mod mmq_hopper;
mod mmq_narrow;
mod mmq_wide;
pub mod mmvf;
pub mod mmvq;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod mmvq_column;
pub mod moe_combine;
pub mod moe_route;
pub mod moe_sort;
pub mod output;
pub mod peak;
pub mod product;
pub mod quantise_act;
pub mod repack;
pub mod rms_norm;
pub mod rope;
pub mod round_act;
pub mod sample;
pub mod set_rows;
pub mod softmax;
pub mod top_k;

#[cfg(not(target_arch = "nvptx64"))]
pub(crate) mod float_case;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod group_f16;
mod int8_tile;
pub(crate) mod lookup;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod order;
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) mod peer;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod reduce;
mod warpgroups;
