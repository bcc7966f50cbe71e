//! Rotation of keys and values before they are cached in a block format, as in llama.cpp.
//!
//! A block has one scale, so a channel that is always large (keys have such) takes the others' precision. An orthonormal
//! matrix spreads it over its neighbours. Scores stay what they are because queries are rotated alike, and the result of
//! attention, a mean of values, is rotated back: the matrix, Walsh's and Hadamard's, is its own inverse. With Q4_0 keys and
//! values the divergence of SmolLM2-135M (Q4_1, 200 tokens, from llama.cpp with an f32 cache) falls from 0.210 to 0.066;
//! llama.cpp's is 0.066. With Q8_0 it falls from 0.0065 to 0.0051.

use quant::FormatId;

use crate::hparams::Hparams;
use crate::models::Build;
use crate::tensor::TensorId;

/// Neighbours that values are rotated by, and the fewest that keys are: of values, fewer leave less error. Heads that they do
/// not divide are cached as they are.
pub const WIDTH_V: usize = 64;
/// Most of them.
const MAX: usize = 512;

/// Neighbours that keys are rotated by: the most that divide a head.
fn width_k(hp: &Hparams) -> Option<usize> {
    [MAX, MAX / 2, MAX / 4, WIDTH_V].into_iter().find(|width| hp.head_dim_k.is_multiple_of(*width))
}

/// Neighbours that values are rotated by.
fn width_v(hp: &Hparams) -> Option<usize> {
    hp.head_dim_v.is_multiple_of(WIDTH_V).then_some(WIDTH_V)
}

/// Whether keys or values of a cache of this format are rotated.
pub fn pays(format: FormatId) -> bool {
    quant::info(format).elems > 1
}

/// `x` [n, heads · head_dim] of keys or queries, rotated if keys are.
pub fn rotated_k(b: &mut Build<'_>, x: TensorId) -> TensorId {
    let width = width_k(b.hp).filter(|_| b.shape.rotates_k);
    width.map_or(x, |width| b.g.hadamard(x, width))
}

/// `x` [n, heads · head_dim] of values, or of what attention made of rotated ones, if values are.
pub fn rotated_v(b: &mut Build<'_>, x: TensorId) -> TensorId {
    let width = width_v(b.hp).filter(|_| b.shape.rotates_v);
    width.map_or(x, |width| b.g.hadamard(x, width))
}
