//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{
    argmax, dequantise, elementwise, flash, get_rows, glu, layer_norm, mmf, mmq, mmvf, mmvq, moe_combine, moe_route, moe_sort,
    quantise_act, repack, rms_norm, rope, round_act, softmax, top_k,
};
use crate::kernels::argmax;
use crate::kernels::argsort;
use crate::kernels::copy;
use crate::kernels::cumsum;
use crate::kernels::elementwise;
use crate::kernels::glu;
use crate::kernels::layer_norm;
use crate::kernels::moe_combine;
use crate::kernels::moe_route;
use crate::kernels::sample;
use crate::kernels::set_rows;
use crate::kernels::top_k;
use crate::kernels::{dequantise, mmvq, quantise_act, rms_norm, rope, softmax};

/// The rows.
pub static KERNELS: &[&dyn AnyKernel] = &[
    &dequantise::Dequantise,
    &repack::Repack,
    &get_rows::GetRows,
    &quantise_act::QuantiseAct,
    &mmvq::Mmvq,
    &round_act::RoundAct,
    &mmvf::Mmvf,
    &mmf::Mmf,
    &mmq::Mmq,
    &moe_sort::MoeSort,
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
    &argsort::Argsort,
    &cumsum::Cumsum,
    &sample::Sample,
    &copy::StridedCopy,
    &set_rows::SetRows,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}
