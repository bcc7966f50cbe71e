//! A row's softmax state and how it is merged: shared by all that must agree bit for bit.

use crate::device::math;

/// Powers of two that bring a total and a part to their common maximum, and that maximum; all in units of log2.
#[inline(always)]
pub(super) fn weights(total: f32, part: f32) -> (f32, [f32; 2]) {
    let max = math::fmax(total, part);
    let to = finite(max);
    (max, [math::ex2(total - to), math::ex2(part - to)])
}

/// A maximum to subtract: where nothing was seen any number serves, all exponentials are zero.
#[inline(always)]
pub(super) fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// `total · weights[0] + part · weights[1]`; exactly the total where the part is empty.
#[inline(always)]
pub(super) fn merge(total: f32, part: f32, weights: [f32; 2]) -> f32 {
    math::fma(part, weights[1], math::mul(total, weights[0]))
}

/// What turns the sum of weighted values into the output. `sink` in units of log2.
#[inline(always)]
pub(super) fn normaliser(max: f32, sum: f32, sink: f32) -> f32 {
    let (_, [own, other]) = weights(max, sink);
    let total = math::fma(sum, own, other);
    if sum > 0.0 { own / total } else { 0.0 }
}
