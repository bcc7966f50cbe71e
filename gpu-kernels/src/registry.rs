//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::argmax;
use crate::kernels::elementwise;
use crate::kernels::glu;
use crate::kernels::layer_norm;
use crate::kernels::moe_combine;
use crate::kernels::moe_route;
use crate::kernels::top_k;
use crate::kernels::{dequantise, mmvq, quantise_act, rms_norm, rope, softmax};
use crate::kernels::{mmvf, round_act};
use crate::kernels::{dequantise, elementwise, flash, mmvq, quantise_act, rms_norm, rope, softmax};
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
    &layer_norm::LayerNorm,
    &softmax::Softmax,
    &rope::Rope,
    &elementwise::Elementwise,
    &glu::Glu,
    &moe_route::MoeRoute,
    &moe_combine::MoeCombine,
    &argmax::Argmax,
    &top_k::TopK,
    &flash::Flash,
    &flash::FlashSplit,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}
