//! Q2_K: 256 weights in 16 sub-blocks of 16, 84 bytes, 2.625 bits per weight.
//!
//! ```text
//! byte 0..16   scales  per sub-block: low nibble = scale, high nibble = minimum
//! byte 16..80  qs      2-bit codes, see `bits::pack_2bit`
//! byte 80..82  d       f16 scale of the scales
//! byte 82..84  dmin    f16 scale of the minimums
//! ```
//! `w = d·scale·code − dmin·min`. Relative RMS error 0.30 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, nearest_int, pack_2bit, unpack_2bit};
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
    scales: [u8; 16],
    qs: [u8; 64],
    d: [u8; 2],
    dmin: [u8; 2],
}

const _: () = assert!(size_of::<Block>() == 84);

/// Largest 4-bit scale.
const SCALE_MAX: u8 = 15;

/// The search without importance: 16 ranges; absolute errors, since four codes leave every error large.
const PLAIN: AffineSearch =
    AffineSearch { code_max: 3, first: -0.5, step: 0.1, tries: 16, absolute_error: true, saturate: false };

/// Nibbles for `values` against their largest, and its step.
fn round_scales(values: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = values.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    if max > 0.0 {
        let inverse = SCALE_MAX as f32 / max;
        (max / SCALE_MAX as f32, values.map(|v| nearest_int(inverse * v) as u8))
    } else {
        (0.0, [0; 16])
    }
}

fn encode(x: &[f32], importance: Importance<'_>) -> Block {
    let x_lanes = side_by_side::<16, 16>(x);
    let (fit, d, dmin, scales, mins);
    match importance {
        None => {
            let weights = x_lanes.map(|x| x.map(f32::abs));
            fit = fit_affine(&x_lanes, &weights, PLAIN);
            (d, scales) = round_scales(&fit.scale);
            (dmin, mins) = round_scales(&fit.min);
        }
        Some(importance) => {
            let sigma2 = sum_of_squares(x) / 256.0;
            let mut weights = [0.0f32; 256];
            for ((w, &x), &importance) in weights.iter_mut().zip(x).zip(importance) {
                *w = importance_weight(importance, sigma2, x);
            }
            fit = fit_affine(&x_lanes, &side_by_side(&weights), AffineSearch::with_importance(3));
            let sub_weights: [f32; 16] = core::array::from_fn(|j| sum(&weights[16 * j..][..16]));
            let mut codes = [[0u8; 16]; 2];
            d = fit_positive(&fit.scale, &sub_weights, SCALE_MAX, &mut codes[0]);
            dmin = fit_positive(&fit.min, &sub_weights, SCALE_MAX, &mut codes[1]);
            [scales, mins] = codes;
        }
    }
    let (d, dmin) = (f32_to_f16(d), f32_to_f16(dmin));
    let packed: [u8; 16] = core::array::from_fn(|j| scales[j] | (mins[j] << 4));
    let mut codes = [0u8; 256];
    in_sequence(&fit.codes, &mut codes);
    for (j, (x, codes)) in x.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0).enumerate() {
        let scale = f16_to_f32(d) * (packed[j] & 0xf) as f32;
        let min = f16_to_f32(dmin) * (packed[j] >> 4) as f32;
        round_to_codes(x, scale, min, 0, 3, codes);
    }
    Block { scales: packed, qs: pack_2bit(&codes), d: d.to_le_bytes(), dmin: dmin.to_le_bytes() }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q2_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 0;
    const CODE_MAX: u8 = 3;
    const SCALE_ELEMS: usize = 16;
    const HAS_OFFSET: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let dmin = f16_to_f32(u16::from_le_bytes(self.dmin));
        let halves = [self.scales[2 * g], self.scales[2 * g + 1]];
        Group {
            codes: unpack_2bit(&self.qs, g),
            scale: halves.map(|s| d * (s & 0xf) as f32),
            offset: halves.map(|s| -(dmin * (s >> 4) as f32)),
        }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (b, (x, block)) in src.chunks_exact(256).zip(out).enumerate() {
            *block = encode(x, importance.map(|w| &w[256 * b..][..256]));
        }
    }
}
