//! Q3_K: 256 weights in 16 sub-blocks of 16, 110 bytes, 3.4375 bits per weight.
//!
//! ```text
//! byte 0..32    hmask   third bits: weight i of group g (32 weights) at bit g of byte i
//! byte 32..96   qs      low two bits, see `bits::pack_2bit`
//! byte 96..108  scales  16 × 6 bits, biased by 32, packed (see `scale`)
//! byte 108..110 d       f16 scale of the scales
//! ```
//! `w = d·(scale − 32)·(code − 4)`. Relative RMS error 0.15 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, nearest_int, pack_2bit, unpack_2bit, word};
use crate::extent::extreme;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::{
    fit_symmetric, fit_symmetric_descent, importance_weight, in_sequence, round_to_codes, side_by_side, sum,
    sum_of_squares,
};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    hmask: [u8; 32],
    qs: [u8; 64],
    scales: [u8; 12],
    d: [u8; 2],
}

const _: () = assert!(size_of::<Block>() == 110);

/// Signed scale of sub-block `j`: low nibbles in bytes 0..8 (first eight sub-blocks low, last eight high), top two bits
/// in bytes 8..12, four sub-blocks per bit pair.
#[inline(always)]
fn scale(j: usize, scales: &[u8; 12]) -> i32 {
    let low = (scales[j % 8] >> (4 * (j / 8))) & 0xf;
    let high = (scales[8 + j % 4] >> (2 * (j / 4))) & 3;
    (low | (high << 4)) as i32 - 32
}

/// Inverse of [`scale`] for all sub-blocks; `codes` are biased by 32.
fn pack_scales(codes: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0u8; 12];
    for (j, &code) in codes.iter().enumerate() {
        packed[j % 8] |= (code & 0xf) << (4 * (j / 8));
        packed[8 + j % 4] |= (code >> 4) << (2 * (j / 4));
    }
    packed
}

fn encode(x: &[f32], importance: Importance<'_>) -> Block {
    let x_lanes = side_by_side::<16, 16>(x);
    let (fit, d, scales);
    match importance {
        None => {
            fit = fit_symmetric_descent(&x_lanes, 4);
            let extreme = extreme(&fit.scale);
            if extreme != 0.0 {
                let inverse = -32.0 / extreme;
                d = 1.0 / inverse;
                scales = fit.scale.map(|s| (nearest_int(inverse * s).clamp(-32, 31) + 32) as u8);
            } else {
                d = 0.0;
                scales = [0; 16];
            }
        }
        Some(importance) => {
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut weights = [0.0f32; 256];
            for ((w, &x), &importance) in weights.iter_mut().zip(x).zip(importance) {
                *w = importance_weight(importance, sigma2, x);
            }
            fit = fit_symmetric(&x_lanes, &side_by_side(&weights), 4);
            let sub_weights: [[f32; 1]; 16] = core::array::from_fn(|j| [sum(&weights[16 * j..][..16])]);
            let scale_fit = fit_symmetric(&fit.scale.map(|s| [s]), &sub_weights, 32);
            d = scale_fit.scale[0];
            scales = scale_fit.codes.map(|[code]| code);
        }
    }
    let d = f32_to_f16(d);
    let scales = pack_scales(&scales);
    let mut codes = [0u8; 256];
    in_sequence(&fit.codes, &mut codes);
    for (j, (x, codes)) in x.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0).enumerate() {
        round_to_codes(x, f16_to_f32(d) * scale(j, &scales) as f32, 0.0, -4, 3, codes);
    }
    Block {
        hmask: core::array::from_fn(|i| (0..8).fold(0, |byte, g| byte | ((codes[32 * g + i] >> 2) << g))),
        qs: pack_2bit(&codes),
        scales,
        d: d.to_le_bytes(),
    }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q3_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 4;
    const CODE_MAX: u8 = 7;
    const SCALE_ELEMS: usize = 16;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let low = unpack_2bit(&self.qs, g);
        Group {
            codes: core::array::from_fn(|i| low[i] | (((word(&self.hmask, i) >> g) & 0x0101_0101) << 2)),
            scale: [d * scale(2 * g, &self.scales) as f32, d * scale(2 * g + 1, &self.scales) as f32],
            offset: [0.0; 2],
        }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (b, (x, block)) in src.chunks_exact(256).zip(out).enumerate() {
            *block = encode(x, importance.map(|w| &w[256 * b..][..256]));
        }
    }
}
