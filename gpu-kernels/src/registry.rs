//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{
    dequantise, elementwise, get_rows, mmq, mmvq, moe_sort, quantise_act, repack, rms_norm, rope, softmax,
};

/// The rows.
pub static KERNELS: &[&dyn AnyKernel] = &[
    &dequantise::Dequantise,
    &repack::Repack,
    &get_rows::GetRows,
    &quantise_act::QuantiseAct,
    &mmvq::Mmvq,
    &mmq::Mmq,
    &moe_sort::MoeSort,
    &rms_norm::RmsNorm,
    &softmax::Softmax,
    &rope::Rope,
    &elementwise::Elementwise,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}
