//! IQ4_XS: 256 weights in 8 sub-blocks of 32, 136 bytes, 4.25 bits per weight, values as in IQ4_NL.
//!
//! ```text
//! byte 0..2     d         f16 scale
//! byte 2..4     scales_h  top 2 bits of the sub-block scales, the first lowest
//! byte 4..8     scales_l  low 4 bits of the sub-block scales, the even one low
//! byte 8..136   qs        per sub-block 16 bytes: low nibbles = weights 0..16, high = weights 16..32
//! ```
//! `w = d * (scale - 32) * IQ4[nibble]`.
//!
//! Relative RMS error 0.077 on normal weights.

use bytemuck::{Pod, Zeroable};

use super::iq4_nl::{BIAS, CODE_MAX, codes, fit_scale, pack, weights};
use crate::bits::{f16_to_f32, f32_to_f16, nearest_int};
use crate::codebook::fit::SUPER;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::sum_of_squares;

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    scales_h: [u8; 2],
    scales_l: [u8; 4],
    qs: [u8; 128],
}

const _: () = assert!(size_of::<Block>() == 136);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ4_XS;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = BIAS;
    const CODE_MAX: u8 = CODE_MAX;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let low = (self.scales_l[g / 2] >> (4 * (g % 2))) & 0xf;
        let high = (u16::from_le_bytes(self.scales_h) >> (2 * g)) & 3;
        let scale = d * ((low as i32 | (high as i32) << 4) - 32) as f32;
        Group { codes: codes(&self.qs[16 * g..][..16], lookup), scale: [scale; 2], offset: [0.0; 2] }
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
    let mut extreme = 0.0f32;
    for (ib, x) in x.chunks_exact(32).enumerate() {
        let columns = columns.map(|columns| &columns[32 * ib..][..32]);
        scales[ib] = fit_scale(x, &weights(x, columns, sigma2));
        if scales[ib].abs() > extreme.abs() {
            extreme = scales[ib];
        }
    }
    // The extreme scale becomes -32, the end of the range that has one step more.
    let d = -extreme / 32.0;
    block.d = f32_to_f16(d).to_le_bytes();
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    let mut high = 0u16;
    for (ib, (x, qs)) in x.chunks_exact(32).zip(block.qs.chunks_exact_mut(16)).enumerate() {
        let scale = nearest_int(inverse * scales[ib]).clamp(-32, 31);
        pack(x, d * scale as f32, qs);
        let code = (scale + 32) as u16;
        block.scales_l[ib / 2] |= ((code & 0xf) as u8) << (4 * (ib % 2));
        high |= (code >> 4) << (2 * ib);
    }
    block.scales_h = high.to_le_bytes();
    block
}
