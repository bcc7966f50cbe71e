//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{dequantise, elementwise, flash, mmvq, quantise_act, rms_norm, rope, softmax};

/// The rows.
pub static KERNELS: &[&dyn AnyKernel] = &[
    &dequantise::Dequantise,
    &quantise_act::QuantiseAct,
    &mmvq::Mmvq,
    &rms_norm::RmsNorm,
    &softmax::Softmax,
    &rope::Rope,
    &elementwise::Elementwise,
    &flash::Flash,
    &flash::FlashSplit,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}
