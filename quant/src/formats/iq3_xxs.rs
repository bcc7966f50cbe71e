//! IQ3_XXS: 256 weights in 8 sub-blocks of 32, 98 bytes, 3.0625 bits per weight.
//!
//! ```text
//! byte 0..2    d      f16 scale
//! byte 2..66   qs     per four weights an 8-bit codebook index
//! byte 66..98  tails  per sub-block a word: four times 7 sign bits and, in its top 4 bits, the scale
//! ```
//! `w = ± d * (scale + 1/2) / 2 * IQ3_XXS[index]`; of eight weights an even number is negative, so 7 sign bits do.
//!
//! Relative RMS error 0.216 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::fit::{Resnap, SUPER, Search, Tries, largest, odd_multiple, split_signs};
use crate::codebook::nearest::Iq3Xxs;
use crate::codebook::{IQ3_XXS, SIGNED_BIAS, signed_codes, signs_of_28_bits};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 64],
    tails: [u8; 32],
}

const _: () = assert!(size_of::<Block>() == 98);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ3_XXS;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = SIGNED_BIAS;
    const CODE_MAX: u8 = 64 + 62;
    const BOOK: Book = Book::Words(IQ3_XXS);
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let tail = word(&self.tails, g);
        let indices = [0, 1].map(|half| lookup.bytes(word(&self.qs, 2 * g + half)));
        let magnitudes = core::array::from_fn(|i| lookup.word(IQ3_XXS, indices[i / 4][i % 4] as usize));
        let scale = d * (0.5 + (tail >> 28) as f32) * 0.5;
        Group {
            codes: signed_codes(magnitudes, signs_of_28_bits(tail), lookup),
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
    let mut tails = [0u32; 8];
    let mut scales = [0.0f32; 8];
    let mut max_scale = 0.0f32;
    for (ib, x) in x.chunks_exact(32).enumerate() {
        let weight: [f32; 32] = match columns {
            Some(columns) => core::array::from_fn(|i| importance_weight(columns[32 * ib + i], sigma2, x[i])),
            None => core::array::from_fn(|i| x[i] * x[i]),
        };
        let split = split_signs(x, &weight, true);
        let max = largest(&split.x);
        if max < 1e-8 {
            continue;
        }
        let mut search = Search::new(&split.x, &weight, max / 15.0);
        search.run::<Iq3Xxs>(max, Tries { count: 15, step: 0.2 }, Resnap::OffGrid);
        let fit = search.finish::<Iq3Xxs>(split.signs);
        for k in 0..8 {
            block.qs[8 * ib + k] = fit.entries[k] as u8;
        }
        for k in 0..4 {
            tails[ib] |= ((fit.signs[k] & 0x7f) as u32) << (7 * k);
        }
        scales[ib] = fit.scale;
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    if max_scale == 0.0 {
        return Block::zeroed();
    }
    let d = max_scale / 31.0;
    // The factor lowers the error a little on average (found by ggml's author by trial).
    block.d = f32_to_f16(d * 1.0125).to_le_bytes();
    for ((bytes, tail), &scale) in block.tails.chunks_exact_mut(4).zip(tails).zip(&scales) {
        let tail = tail | (odd_multiple(1.0 / d, scale, 15) as u32) << 28;
        bytes.copy_from_slice(&tail.to_le_bytes());
    }
    block
}
