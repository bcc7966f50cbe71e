//! Q4_K: 256 weights in 8 sub-blocks of 32, 144 bytes, 4.5 bits per weight.
//!
//! ```text
//! byte 0..2     d       f16 scale of the sub-block scales
//! byte 2..4     dmin    f16 scale of the sub-block minimums
//! byte 4..16    scales  8 × (6-bit scale, 6-bit minimum), packed (see `scale_min`)
//! byte 16..144  qs      per pair of sub-blocks 32 bytes: low nibbles = even, high nibbles = odd sub-block
//! ```
//! `w = d·scale·nibble − dmin·min`. Relative RMS error 0.071 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, nearest_int, word};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::{
    AffineSearch, fit_affine, fit_positive, importance_weight, in_sequence, round_to_codes, side_by_side,
    sum, sum_of_squares,
};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    qs: [u8; 128],
}

const _: () = assert!(size_of::<Block>() == 144);

/// 6-bit scale and minimum of sub-block `j`: the first four lie in the low six bits of bytes j and j+4; the others keep
/// their low nibbles in bytes 8..12 and their top two bits in the top bits of the first eight.
#[inline(always)]
pub(super) fn scale_min(j: usize, scales: &[u8; 12]) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        ((scales[j + 4] & 0xf) | ((scales[j - 4] >> 6) << 4), (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4))
    }
}

/// Inverse of [`scale_min`] for all sub-blocks.
fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0u8; 12];
    for j in 0..4 {
        packed[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        packed[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        packed[j + 8] = (scales[j + 4] & 0xf) | (mins[j + 4] << 4);
    }
    packed
}

/// The head that Q4_K and Q5_K share, and the codes still unpacked.
pub(super) struct SuperBlock {
    pub(super) d: u16,
    pub(super) dmin: u16,
    pub(super) scales: [u8; 12],
    pub(super) codes: [u8; 256],
}

/// Largest 6-bit scale.
const SCALE_MAX: u8 = 63;

/// Encode 256 values: find scale and minimum of each sub-block, round both to 6 bits, then round the values against
/// the rounded scales. `plain` is the search without importance.
pub(super) fn encode_super_block(x: &[f32], importance: Importance<'_>, plain: AffineSearch) -> SuperBlock {
    let x_lanes = side_by_side::<32, 8>(x);
    let mut weights = [0.0f32; 256];
    let fit;
    let mut scales = [0u8; 8];
    let mut mins = [0u8; 8];
    let (d, dmin);
    match importance {
        None => {
            for (w, x) in weights.chunks_exact_mut(32).zip(x.chunks_exact(32)) {
                // Magnitude, plus its mean so that small weights still count.
                let rms = libm::sqrtf(sum_of_squares(x) / 32.0);
                for (w, x) in w.iter_mut().zip(x) {
                    *w = rms + x.abs();
                }
            }
            fit = fit_affine(&x_lanes, &side_by_side(&weights), plain);
            let round = |values: &[f32; 8], codes: &mut [u8; 8]| {
                let max = values.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
                let inverse = if max > 0.0 { SCALE_MAX as f32 / max } else { 0.0 };
                for (code, &value) in codes.iter_mut().zip(values) {
                    *code = (nearest_int(inverse * value) as u8).min(SCALE_MAX);
                }
                max / SCALE_MAX as f32
            };
            d = round(&fit.scale, &mut scales);
            dmin = round(&fit.min, &mut mins);
        }
        Some(importance) => {
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            for ((w, &x), &importance) in weights.iter_mut().zip(x).zip(importance) {
                *w = importance_weight(importance, sigma2, x);
            }
            fit =
                fit_affine(&x_lanes, &side_by_side(&weights), AffineSearch::with_importance(plain.code_max));
            let sub_weights: [f32; 8] = core::array::from_fn(|j| sum(&weights[32 * j..][..32]));
            d = fit_positive(&fit.scale, &sub_weights, SCALE_MAX, &mut scales);
            dmin = fit_positive(&fit.min, &sub_weights, SCALE_MAX, &mut mins);
            for code in scales.iter_mut().chain(&mut mins) {
                *code = (*code).min(SCALE_MAX);
            }
        }
    }

    let mut block = SuperBlock {
        d: f32_to_f16(d),
        dmin: f32_to_f16(dmin),
        scales: pack_scales(&scales, &mins),
        codes: [0; 256],
    };
    in_sequence(&fit.codes, &mut block.codes);
    for (j, (x, codes)) in x.as_chunks::<32>().0.iter().zip(block.codes.as_chunks_mut::<32>().0).enumerate() {
        let scale = f16_to_f32(block.d) * scales[j] as f32;
        let min = f16_to_f32(block.dmin) * mins[j] as f32;
        round_to_codes(x, scale, min, 0, plain.code_max as i32, codes);
    }
    block
}

/// Low nibbles of 256 codes, a pair of sub-blocks per 32 bytes.
pub(super) fn pack_nibble_pairs(codes: &[u8; 256]) -> [u8; 128] {
    core::array::from_fn(|i| {
        let at = 64 * (i / 32) + i % 32;
        (codes[at] & 0xf) | (codes[at + 32] << 4)
    })
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q4_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 0;
    const CODE_MAX: u8 = 15;
    const HAS_OFFSET: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let dmin = f16_to_f32(u16::from_le_bytes(self.dmin));
        let (scale, min) = scale_min(g, &self.scales);
        let pair = &self.qs[32 * (g / 2)..][..32];
        let shift = 4 * (g % 2);
        let codes = core::array::from_fn(|i| (word(pair, i) >> shift) & 0x0f0f_0f0f);
        Group { codes, scale: [d * scale as f32; 2], offset: [-(dmin * min as f32); 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        // 21 ranges, from one code narrower to one code wider.
        let plain = AffineSearch {
            code_max: 15,
            first: -1.0,
            step: 0.1,
            tries: 21,
            absolute_error: false,
            saturate: false,
        };
        for (b, (x, block)) in src.chunks_exact(256).zip(out).enumerate() {
            let packed = encode_super_block(x, importance.map(|w| &w[256 * b..][..256]), plain);
            *block = Block {
                d: packed.d.to_le_bytes(),
                dmin: packed.dmin.to_le_bytes(),
                scales: packed.scales,
                qs: pack_nibble_pairs(&packed.codes),
            };
        }
    }
}
