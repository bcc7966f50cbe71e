//! IQ2_XXS: 256 weights in 8 sub-blocks of 32, 66 bytes, 2.0625 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..66   qs   per sub-block 8 bytes: four codebook indices of 8 bits, then a word of four times 7 sign
//!                   bits and, in its top 4 bits, the sub-block's scale
//! ```
//! `w = ± d * (scale + 1/2) / 4 * IQ2_XXS[index]`; of eight weights an even number is negative, so 7 sign bits do.
//!
//! Relative RMS error 0.372 on normal weights. Encoding needs an importance row, as in llama.cpp.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::fit::{Resnap, SUPER, Search, Tries, largest, odd_multiple, split_signs};
use crate::codebook::nearest::Iq2Xxs;
use crate::codebook::{IQ2_XXS, SIGNED_BIAS, signed_codes, signs_of_28_bits};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{ZERO_MAX, fit_positive, importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 64],
}

const _: () = assert!(size_of::<Block>() == 66);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ2_XXS;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = SIGNED_BIAS;
    const CODE_MAX: u8 = 64 + 43;
    const BOOK: Book = Book::Octets(IQ2_XXS);
    const ENCODE: Encode = Encode::WithImportance;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let (indices, tail) = (word(&self.qs, 2 * g), word(&self.qs, 2 * g + 1));
        let entries = lookup.bytes(indices).map(|i| lookup.octet(IQ2_XXS, i as usize));
        let magnitudes = core::array::from_fn(|i| entries[i / 2][i % 2]);
        let scale = d * (0.5 + (tail >> 28) as f32) * 0.25;
        Group {
            codes: signed_codes(magnitudes, signs_of_28_bits(tail), lookup),
            scale: [scale; 2],
            offset: [0.0; 2],
        }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        let Some(importance) = importance else { return };
        for ((x, columns), block) in src.chunks_exact(SUPER).zip(importance.chunks_exact(SUPER)).zip(out) {
            *block = encode(x, columns);
        }
    }
}

/// The first guess of a scale has one level more than the codebook: ggml's choice, kept for equal bytes.
const GUESS_MAX: u8 = 4;
/// Levels of the codebook.
const LEVELS: f32 = 3.0;

fn encode(x: &[f32], columns: &[f32]) -> Block {
    let mut block = Block::zeroed();
    let sigma2 = sum_of_squares(x) / SUPER as f32;
    let mut words = [0u32; 16];
    let mut scales = [0.0f32; 8];
    let mut max_scale = 0.0f32;
    for (ib, (x, columns)) in x.chunks_exact(32).zip(columns.chunks_exact(32)).enumerate() {
        let weight: [f32; 32] = core::array::from_fn(|i| importance_weight(columns[i], sigma2, x[i]));
        let split = split_signs(x, &weight, true);
        if largest(&split.x) < ZERO_MAX {
            continue;
        }
        // The search spans the range of the guessed scale, not of the largest weight.
        let guess = fit_positive(&split.x, &weight, GUESS_MAX, &mut [0; 32]);
        let max = guess * LEVELS;
        if max <= 0.0 {
            continue;
        }
        let mut search = Search::new(&split.x, &weight, guess);
        search.run::<Iq2Xxs>(max, Tries { count: 6, step: 0.1 }, Resnap::All);
        let fit = search.finish::<Iq2Xxs>(split.signs);
        for k in 0..4 {
            words[2 * ib] |= (fit.entries[k] as u32) << (8 * k);
            words[2 * ib + 1] |= ((fit.signs[k] & 0x7f) as u32) << (7 * k);
        }
        scales[ib] = fit.scale;
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    if max_scale == 0.0 {
        return block;
    }
    let d = max_scale / 31.0;
    block.d = f32_to_f16(d).to_le_bytes();
    for (ib, &scale) in scales.iter().enumerate() {
        words[2 * ib + 1] |= (odd_multiple(1.0 / d, scale, 15) as u32) << 28;
    }
    for (bytes, word) in block.qs.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    block
}
