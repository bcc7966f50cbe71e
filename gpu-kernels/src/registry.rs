//! Every kernel, one row each.

use crate::case::AnyKernel;
use crate::kernels::{
    argmax, argsort, copy, cumsum, dequantise, elementwise, flash, get_rows, glu, hadamard, kv_store,
    layer_norm, mmd_hopper, mmf, mmf_hopper, mmf32, mmq, mmq_hopper, mmvf, mmvq, moe_combine, moe_route,
    moe_sort, peak, quantise_act, repack, rms_norm, rope, round_act, sample, set_rows, softmax, top_k,
};

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
    &mmf_hopper::MmfHopper,
    &mmf32::Mmf32,
    &mmd_hopper::MmdHopper,
    &mmq::Mmq,
    &mmq_hopper::MmqHopper,
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
    &flash::FlashHopper,
    &flash::FlashPlain,
    &kv_store::KvStore,
    &hadamard::Hadamard,
    &argsort::Argsort,
    &cumsum::Cumsum,
    &sample::Sample,
    &copy::StridedCopy,
    &set_rows::SetRows,
    &peak::Peak,
];

/// The kernel of this name.
pub fn find(name: &str) -> Option<&'static dyn AnyKernel> {
    KERNELS.iter().copied().find(|kernel| kernel.name() == name)
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kernel_has_shapes_to_time() {
        for kernel in KERNELS {
            assert!(kernel.n_bench() > 0, "{}: nothing to time", kernel.name());
            let labels: BTreeSet<_> =
                (0..kernel.n_bench()).map(|i| kernel.label(kernel.n_cases() + i)).collect();
            assert_eq!(labels.len(), kernel.n_bench(), "{}: a shape is timed twice", kernel.name());
        }
    }
}
