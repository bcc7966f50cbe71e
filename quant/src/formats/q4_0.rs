//! Q4_0: 32 weights, 18 bytes, 4.5 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..18   qs   nibbles: low = weights 0..16, high = weights 16..32
//! ```
//! `w = d * (nibble - 8)`. Encoding takes the value of largest magnitude (sign kept) to nibble 0, so `d = value / -8`;
//! with an importance row the scale is searched instead. Relative RMS error 0.086 on normal weights (0.0861 measured
//! over the golden rows).

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, pack_nibbles, unpack_nibbles};
use crate::extent::extreme;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::{fit_symmetric, importance_weight, in_sequence, side_by_side, sum_of_squares};

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 18);

/// Blocks searched side by side: enough to fill 256-bit vectors.
const LANES: usize = 8;

/// Scale and codes (biased by `half`) of one block: `value / -half`, where value has the largest magnitude.
pub(super) fn encode_extreme(x: &[f32], half: u8) -> (f32, [u8; 32]) {
    let d = extreme(x) / -(half as f32);
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    let bias = half as f32 + 0.5;
    let codes = core::array::from_fn(|i| ((x[i] * id + bias) as i8).clamp(0, 2 * half as i8 - 1) as u8);
    (d, codes)
}

/// Scales and codes of a row's blocks, searched with an importance row.
pub(super) fn encode_searched(
    src: &[f32],
    importance: &[f32],
    half: u8,
    mut store: impl FnMut(usize, f32, &[u8; 32]),
) {
    let sigma2 = sum_of_squares(src) / src.len() as f32;
    let chunks = src.chunks(32 * LANES).zip(importance.chunks(32 * LANES));
    for (chunk, (x, importance)) in chunks.enumerate() {
        let x_lanes = side_by_side::<32, LANES>(x);
        let mut w = side_by_side::<32, LANES>(importance);
        for (w, x) in w.iter_mut().zip(&x_lanes) {
            for l in 0..LANES {
                w[l] = importance_weight(w[l], sigma2, x[l]);
            }
        }
        let fit = fit_symmetric(&x_lanes, &w, half);
        let mut codes = [[0u8; 32]; LANES];
        in_sequence(&fit.codes, codes.as_flattened_mut());
        for (l, codes) in codes.iter().enumerate().take(x.len() / 32) {
            store(chunk * LANES + l, fit.scale[l], codes);
        }
    }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q4_0;
    const ELEMS: usize = 32;
    const BIAS: i32 = 8;
    const CODE_MAX: u8 = 15;
    const SCALE_IS_F16: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        Group { codes: unpack_nibbles(&self.qs), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        let pack =
            |d: f32, codes: &[u8; 32]| Block { d: f32_to_f16(d).to_le_bytes(), qs: pack_nibbles(codes) };
        match importance {
            None => {
                for (x, block) in src.chunks_exact(32).zip(out) {
                    let (d, codes) = encode_extreme(x, 8);
                    *block = pack(d, &codes);
                }
            }
            Some(importance) => {
                encode_searched(src, importance, 8, |i, d, codes| out[i] = pack(d, codes));
            }
        }
    }
}
