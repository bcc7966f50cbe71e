//! IQ4_NL: 32 weights, 18 bytes, 4.5 bits per weight, values on a non-linear scale of 16.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..18   qs   nibbles: low = weights 0..16, high = weights 16..32
//! ```
//! `w = d * IQ4[nibble]`; the values lie closer together near zero, where most weights are.
//!
//! Relative RMS error 0.077 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::IQ4;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::{ZERO_MAX, importance_weight, sum_of_squares};

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 18);

/// What to subtract from the codes of [`codes`].
pub(super) const BIAS: i32 = 128;
/// Largest code of [`codes`].
pub(super) const CODE_MAX: u8 = 113 + 128;

/// The code of each nibble.
const CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = (IQ4[i] as i32 + BIAS) as u8;
        i += 1;
    }
    codes
};

/// Codes of 32 weights out of their 16 bytes.
#[inline(always)]
pub(super) fn codes<L: Lookup>(qs: &[u8], lookup: L) -> [u32; 8] {
    let words: [[u32; 2]; 4] = core::array::from_fn(|i| lookup.nibbles(&CODES, word(qs, i)));
    core::array::from_fn(|i| words[i % 4][i / 4])
}

/// Index of the value nearest to `x`, the upper one of two equally near; NaN goes to the last.
#[inline(always)]
fn nearest(x: f32) -> usize {
    let below = IQ4.windows(2).filter(|v| x < midpoint(v)).count();
    IQ4.len() - 1 - below
}

/// Between two neighbouring values; exact.
#[inline(always)]
fn midpoint(v: &[i8]) -> f32 {
    (v[0] as f32 + v[1] as f32) * 0.5
}

/// The value nearest to `x`, as [`nearest`] chooses it, by summing the steps up to it: no table look-up, so that the
/// compiler can do several at once.
#[inline(always)]
fn nearest_value(x: f32) -> f32 {
    IQ4.windows(2).fold(IQ4[0] as f32, |value, v| {
        value + if x < midpoint(v) { 0.0 } else { (v[1] as i32 - v[0] as i32) as f32 }
    })
}

/// Inverse scales tried to either side of the one that puts the largest weight on the largest value.
const TRIES: i32 = 7;

/// Importance of the weights of a sub-block of 32, `sigma2` being twice the mean square around it.
pub(super) fn weights(x: &[f32], columns: Option<&[f32]>, sigma2: f32) -> [f32; 32] {
    match columns {
        Some(columns) => core::array::from_fn(|i| importance_weight(columns[i], sigma2, x[i])),
        None => core::array::from_fn(|i| x[i] * x[i]),
    }
}

/// The largest weight by magnitude; zero for a sub-block of zeros.
fn extreme(x: &[f32]) -> f32 {
    let (mut amax, mut extreme) = (0.0f32, 0.0f32);
    for &v in x {
        if v.abs() > amax {
            (amax, extreme) = (v.abs(), v);
        }
    }
    if amax < ZERO_MAX { 0.0 } else { extreme }
}

/// Weighted sums Σ q·x and Σ q² with `x` rounded at an inverse scale: their ratio is the scale that then loses least.
fn sums(x: &[f32], weight: &[f32; 32], inverse: f32) -> (f32, f32) {
    let q: [f32; 32] = core::array::from_fn(|i| nearest_value(inverse * x[i]));
    let (mut sum_qx, mut sum_q2) = (0.0f32, 0.0f32);
    for i in 0..32 {
        sum_qx += weight[i] * q[i] * x[i];
        sum_q2 += weight[i] * q[i] * q[i];
    }
    (sum_qx, sum_q2)
}

/// The scale, of either sign, that loses least: the search of `codebook::fit` without a codebook. Zero for a
/// sub-block of zeros.
pub(super) fn fit_scale(x: &[f32], weight: &[f32; 32]) -> f32 {
    let extreme = extreme(x);
    if extreme == 0.0 {
        return 0.0;
    }
    let sums = |inverse| sums(x, weight, inverse);
    let first = IQ4[0] as f32;
    let (sum_qx, sum_q2) = sums(1.0 / (-extreme / first));
    let mut scale = if sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
    let mut best = scale * sum_qx;
    for i in -TRIES..=TRIES {
        let (sum_qx, sum_q2) = sums((i as f32 + first) / extreme);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            scale = sum_qx / sum_q2;
            best = scale * sum_qx;
        }
    }
    scale
}

/// Rounds 32 weights at a scale and packs them.
pub(super) fn pack(x: &[f32], scale: f32, qs: &mut [u8]) {
    let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
    for (i, byte) in qs.iter_mut().enumerate() {
        *byte = (nearest(inverse * x[i]) | nearest(inverse * x[16 + i]) << 4) as u8;
    }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ4_NL;
    const ELEMS: usize = 32;
    const BIAS: i32 = BIAS;
    const CODE_MAX: u8 = CODE_MAX;
    const SCALE_IS_F16: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        Group { codes: codes(&self.qs, lookup), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (n, (x, block)) in src.chunks_exact(32).zip(out).enumerate() {
            let columns = importance.map(|importance| &importance[32 * n..][..32]);
            let scale = fit_scale(x, &weights(x, columns, 2.0 * sum_of_squares(x) / 32.0));
            block.d = f32_to_f16(scale).to_le_bytes();
            pack(x, scale, &mut block.qs);
        }
    }

    /// As ggml's `quantize_row_iq4_nl_ref`: the largest weight gets the largest value, then the scale is fitted.
    fn encode_row_fast(src: &[f32], out: &mut [Self]) {
        for (x, block) in src.chunks_exact(32).zip(out) {
            let start = extreme(x) / IQ4[0] as f32;
            let inverse = if start == 0.0 { 0.0 } else { 1.0 / start };
            let (sum_qx, sum_q2) = sums(x, &weights(x, None, 0.0), inverse);
            let scale = if start != 0.0 && sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
            block.d = f32_to_f16(scale).to_le_bytes();
            pack(x, start, &mut block.qs);
        }
    }
}
