//! A group's 32 weights as f16, straight from their codes: two at a time by a byte permute, a subtraction and a product.
//! Callers: `flash`, `mmd_hopper`.

use crate::device::{U32x4, math};

/// `(code - bias) * scale`, or that plus an offset, rounded once. `codes` as [`quant::format::Group`] has them; scales and
/// offsets of the two halves, each twice in a word. Code and bias are below 1024.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
pub(crate) fn of_codes(
    codes: &[u32; 8],
    bias: u32,
    scales: [u32; 2],
    offsets: Option<[u32; 2]>,
) -> [U32x4; 4] {
    // 1024 + n, as f16, for n below 1024.
    const HIGH: u32 = 0x6464_6464;
    let bias = 0x6400_6400 + bias * 0x0001_0001;
    let mut out = [U32x4([0; 4]); 4];
    unroll!(Q in 0..4 { unroll!(I in 0..4 {
        let selector = if I.is_multiple_of(2) { 0x4140 } else { 0x4342 };
        let signed = math::sub_f16(math::prmt(codes[2 * Q + I / 2], HIGH, selector), bias);
        out[Q].0[I] = match offsets {
            Some(offsets) => math::fma_f16(signed, scales[Q / 2], offsets[Q / 2]),
            None => math::mul_f16(signed, scales[Q / 2]),
        };
    }); });
    out
}
