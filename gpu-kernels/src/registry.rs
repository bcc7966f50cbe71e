//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{dequantise, elementwise, mmq, mmvq, moe_sort, quantise_act, rms_norm, rope, softmax};

/// The rows.
pub static KERNELS: &[&dyn AnyKernel] = &[
    &dequantise::Dequantise,
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
