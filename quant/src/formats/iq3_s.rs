//! IQ3_S: 256 weights in 8 sub-blocks of 32, 110 bytes, 3.4375 bits per weight.
//!
//! ```text
//! byte 0..2      d       f16 scale
//! byte 2..66     qs      per four weights the low 8 bits of the codebook index
//! byte 66..74    qh      per four weights bit 8 of the codebook index
//! byte 74..106   signs   a bit per weight
//! byte 106..110  scales  4 bits per sub-block, the even one low
//! ```
//! `w = ± d * (2*scale + 1) * IQ3_S[index]`.
//!
//! Relative RMS error 0.166 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::fit::{Resnap, SUPER, Search, Tries, largest, odd_multiple, split_signs};
use crate::codebook::nearest::Iq3S;
use crate::codebook::{IQ3_S, SIGNED_BIAS, signed_codes};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 64],
    qh: [u8; 8],
    signs: [u8; 32],
    scales: [u8; 4],
}

const _: () = assert!(size_of::<Block>() == 110);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ3_S;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = SIGNED_BIAS;
    const CODE_MAX: u8 = 64 + 15;
    const BOOK: Book = Book::Words(IQ3_S);
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let high = u32::from(self.qh[g]);
        let low = [0, 1].map(|half| lookup.bytes(word(&self.qs, 2 * g + half)));
        let index = |i: usize| (low[i / 4][i % 4] | (high << (8 - i)) & 0x100) as usize;
        let magnitudes = core::array::from_fn(|i| lookup.word(IQ3_S, index(i)));
        let scale = d * (1 + 2 * ((self.scales[g / 2] >> (4 * (g % 2))) & 0xf)) as f32;
        Group {
            codes: signed_codes(magnitudes, word(&self.signs, g), lookup),
            scale: [scale; 2],
            offset: [0.0; 2],
        }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (n, (x, block)) in src.chunks_exact(SUPER).zip(out).enumerate() {
            *block = encode(x, importance.map(|importance| &importance[SUPER * n..][..SUPER]));
        }
    }
}

fn encode(x: &[f32], columns: Option<&[f32]>) -> Block {
    let mut block = Block::zeroed();
    let sigma2 = 2.0 * sum_of_squares(x) / SUPER as f32;
    let mut scales = [0.0f32; 8];
    let mut max_scale = 0.0f32;
    for (ib, x) in x.chunks_exact(32).enumerate() {
        let weight: [f32; 32] = match columns {
            Some(columns) => core::array::from_fn(|i| importance_weight(columns[32 * ib + i], sigma2, x[i])),
            None => core::array::from_fn(|i| x[i] * x[i]),
        };
        let split = split_signs(x, &weight, false);
        let max = largest(&split.x);
        if max == 0.0 {
            continue;
        }
        let mut search = Search::new(&split.x, &weight, max / 15.0);
        search.run::<Iq3S>(max, Tries { count: 9, step: 0.2 }, Resnap::AllIfAny);
        let fit = search.finish::<Iq3S>(split.signs);
        for k in 0..8 {
            block.qs[8 * ib + k] = fit.entries[k] as u8;
            block.qh[ib] |= ((fit.entries[k] >> 8) as u8) << k;
        }
        block.signs[4 * ib..][..4].copy_from_slice(&fit.signs);
        scales[ib] = fit.scale;
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    if max_scale == 0.0 {
        return block;
    }
    let d = max_scale / 31.0;
    // The factor lowers the error a little on average (found by ggml's author by trial).
    block.d = f32_to_f16(d * 1.033).to_le_bytes();
    for (ib, &scale) in scales.iter().enumerate() {
        block.scales[ib / 2] |= odd_multiple(1.0 / d, scale, 15) << (4 * (ib % 2));
    }
    block
}
