//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{dequantise, elementwise, mmvq, quantise_act, rms_norm, rope, softmax};
use crate::kernels::{mmf, mmvf, round_act};

/// The rows.
pub static KERNELS: &[&dyn AnyKernel] = &[
    &dequantise::Dequantise,
    &quantise_act::QuantiseAct,
    &mmvq::Mmvq,
    &round_act::RoundAct,
    &mmvf::Mmvf,
    &mmf::Mmf,
    &rms_norm::RmsNorm,
    &softmax::Softmax,
    &rope::Rope,
    &elementwise::Elementwise,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}
