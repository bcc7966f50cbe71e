//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{
    dequantise, elementwise, get_rows, mmvq, quantise_act, repack, rms_norm, rope, softmax,
};
use crate::kernels::{mmf, mmf32, mmvf, round_act};
use crate::kernels::flash;

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
    &mmf32::Mmf32,
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
