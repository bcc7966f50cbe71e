//! IQ2_XS: 256 weights in 16 sub-blocks of 16, 74 bytes, 2.3125 bits per weight.
//!
//! ```text
//! byte 0..2    d       f16 scale
//! byte 2..66   qs      per eight weights 16 bits: 9-bit codebook index, then 7 sign bits
//! byte 66..74  scales  4 bits per sub-block, the even one low
//! ```
//! `w = ± d * (scale + 1/2) / 4 * IQ2_XS[index]`; of eight weights an even number is negative, so 7 sign bits do.
//!
//! Relative RMS error 0.327 on normal weights. Encoding needs an importance row, as in llama.cpp.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::fit::{Resnap, SUPER, Search, Tries, largest, odd_multiple, split_signs};
use crate::codebook::nearest::Iq2Xs;
use crate::codebook::{IQ2_XS, SIGNED_BIAS, signed_codes, with_parity};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{ZERO_MAX, importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 64],
    scales: [u8; 8],
}

const _: () = assert!(size_of::<Block>() == 74);

/// The two scales of a group, from the nibbles of a byte.
#[inline(always)]
pub(super) fn scales(d: f32, nibbles: u8) -> [f32; 2] {
    [d * (0.5 + (nibbles & 0xf) as f32) * 0.25, d * (0.5 + (nibbles >> 4) as f32) * 0.25]
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ2_XS;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = SIGNED_BIAS;
    const CODE_MAX: u8 = 64 + 43;
    const SCALE_ELEMS: usize = 16;
    const BOOK: Book = Book::Octets(IQ2_XS);
    const ENCODE: Encode = Encode::WithImportance;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let (a, b) = (word(&self.qs, 2 * g), word(&self.qs, 2 * g + 1));
        let index = |l: usize| (if l < 2 { a } else { b } >> (16 * (l % 2))) as usize & 0x1ff;
        let magnitudes = core::array::from_fn(|i| lookup.octet(IQ2_XS, index(i / 2))[i % 2]);
        // Sign bits of the four: bits 9..16 and 25..32 of each word.
        let signs = (a >> 9) & 0x7f | (a >> 17) & 0x7f00 | (b << 7) & 0x007f_0000 | (b >> 1) & 0x7f00_0000;
        Group {
            codes: signed_codes(magnitudes, with_parity(signs), lookup),
            scale: scales(d, self.scales[g]),
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

fn encode(x: &[f32], columns: &[f32]) -> Block {
    let mut block = Block::zeroed();
    let sigma2 = sum_of_squares(x) / SUPER as f32;
    let mut scales = [0.0f32; 16];
    let mut max_scale = 0.0f32;
    for (ib, (x, columns)) in x.chunks_exact(16).zip(columns.chunks_exact(16)).enumerate() {
        let weight: [f32; 16] = core::array::from_fn(|i| importance_weight(columns[i], sigma2, x[i]));
        let split = split_signs(x, &weight, true);
        let max = largest(&split.x);
        if max < ZERO_MAX {
            continue;
        }
        let mut search = Search::new(&split.x, &weight, max / 5.0);
        search.run::<Iq2Xs>(max, Tries { count: 9, step: 0.1 }, Resnap::OffGrid);
        let fit = search.finish::<Iq2Xs>(split.signs);
        for k in 0..2 {
            let packed = fit.entries[k] | ((fit.signs[k] & 0x7f) as u16) << 9;
            block.qs[4 * ib + 2 * k..][..2].copy_from_slice(&packed.to_le_bytes());
        }
        scales[ib] = fit.scale;
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    if max_scale == 0.0 {
        return Block::zeroed();
    }
    let d = max_scale / 31.0;
    block.d = f32_to_f16(d).to_le_bytes();
    for (ib, &scale) in scales.iter().enumerate() {
        block.scales[ib / 2] |= odd_multiple(1.0 / d, scale, 15) << (4 * (ib % 2));
    }
    block
}
