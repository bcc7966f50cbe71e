//! IQ2_S: 256 weights in 16 sub-blocks of 16, 82 bytes, 2.5625 bits per weight.
//!
//! ```text
//! byte 0..2    d       f16 scale
//! byte 2..34   qs      per eight weights the low 8 bits of the codebook index
//! byte 34..66  signs   per eight weights 8 sign bits
//! byte 66..74  qh      per eight weights the top 2 bits of the codebook index
//! byte 74..82  scales  4 bits per sub-block, the even one low
//! ```
//! `w = ± d * (scale + 1/2) / 4 * IQ2_S[index]`.
//!
//! Relative RMS error 0.267 on normal weights.

use bytemuck::{Pod, Zeroable};

use super::iq2_xs::scales;
use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::fit::{Resnap, SUPER, Search, Tries, largest, odd_multiple, split_signs};
use crate::codebook::nearest::Iq2S;
use crate::codebook::{IQ2_S, SIGNED_BIAS, signed_codes};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 32],
    signs: [u8; 32],
    qh: [u8; 8],
    scales: [u8; 8],
}

const _: () = assert!(size_of::<Block>() == 82);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ2_S;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = SIGNED_BIAS;
    const CODE_MAX: u8 = 64 + 43;
    const SCALE_ELEMS: usize = 16;
    const BOOK: Book = Book::Octets(IQ2_S);
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let (low, high) = (lookup.bytes(word(&self.qs, g)), u32::from(self.qh[g]));
        let index = |l: usize| (low[l] | (high << (8 - 2 * l)) & 0x300) as usize;
        let magnitudes = core::array::from_fn(|i| lookup.octet(IQ2_S, index(i / 2))[i % 2]);
        Group {
            codes: signed_codes(magnitudes, word(&self.signs, g), lookup),
            scale: scales(d, self.scales[g]),
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
    let mut scales = [0.0f32; 16];
    let mut max_scale = 0.0f32;
    for (ib, x) in x.chunks_exact(16).enumerate() {
        let weight: [f32; 16] = match columns {
            Some(columns) => core::array::from_fn(|i| importance_weight(columns[16 * ib + i], sigma2, x[i])),
            None => core::array::from_fn(|i| 0.25 * sigma2 + x[i] * x[i]),
        };
        let split = split_signs(x, &weight, false);
        let max = largest(&split.x);
        if max < 1e-8 {
            continue;
        }
        let mut search = Search::new(&split.x, &weight, max / 5.0);
        search.run::<Iq2S>(max, Tries { count: 9, step: 0.1 }, Resnap::OffGrid);
        let fit = search.finish::<Iq2S>(split.signs);
        for k in 0..2 {
            let at = 2 * ib + k;
            block.qs[at] = fit.entries[k] as u8;
            block.qh[at / 4] |= ((fit.entries[k] >> 8) as u8) << (2 * (at % 4));
            block.signs[at] = fit.signs[k];
        }
        scales[ib] = fit.scale;
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    if max_scale == 0.0 {
        return block;
    }
    let d = max_scale / 31.0;
    // The factor lowers the error a little on average (found by ggml's author by trial).
    block.d = f32_to_f16(d * 0.9875).to_le_bytes();
    for (ib, &scale) in scales.iter().enumerate() {
        block.scales[ib / 2] |= odd_multiple(1.0 / d, scale, 15) << (4 * (ib % 2));
    }
    block
}
