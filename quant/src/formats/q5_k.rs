//! Q5_K: 256 weights in 8 sub-blocks of 32, 176 bytes, 5.5 bits per weight.
//!
//! ```text
//! byte 0..2     d       f16 scale of the sub-block scales
//! byte 2..4     dmin    f16 scale of the sub-block minimums
//! byte 4..16    scales  8 × (6-bit scale, 6-bit minimum), packed as in Q4_K
//! byte 16..48   qh      fifth bits: weight i of sub-block j at bit j of byte i
//! byte 48..176  qs      nibbles as in Q4_K
//! ```
//! `w = d·scale·code − dmin·min`. Relative RMS error 0.036 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, word};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::formats::q4_k::{encode_super_block, pack_nibble_pairs, scale_min};
use crate::lookup::Lookup;
use crate::search::AffineSearch;

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    qh: [u8; 32],
    qs: [u8; 128],
}

const _: () = assert!(size_of::<Block>() == 176);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q5_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 0;
    const CODE_MAX: u8 = 31;
    const HAS_OFFSET: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let dmin = f16_to_f32(u16::from_le_bytes(self.dmin));
        let (scale, min) = scale_min(g, &self.scales);
        let pair = &self.qs[32 * (g / 2)..][..32];
        let shift = 4 * (g % 2);
        let codes = core::array::from_fn(|i| {
            let low = (word(pair, i) >> shift) & 0x0f0f_0f0f;
            let high = (word(&self.qh, i) >> g) & 0x0101_0101;
            low | (high << 4)
        });
        Group { codes, scale: [d * scale as f32; 2], offset: [-(dmin * min as f32); 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        // 16 ranges, from half a code narrower to one code wider.
        let plain = AffineSearch {
            code_max: 31,
            first: -0.5,
            step: 0.1,
            tries: 16,
            absolute_error: false,
            saturate: false,
        };
        for (b, (x, block)) in src.chunks_exact(256).zip(out).enumerate() {
            let packed = encode_super_block(x, importance.map(|w| &w[256 * b..][..256]), plain);
            *block = Block {
                d: packed.d.to_le_bytes(),
                dmin: packed.dmin.to_le_bytes(),
                scales: packed.scales,
                qh: core::array::from_fn(|i| {
                    (0..8).fold(0, |byte, j| byte | ((packed.codes[32 * j + i] >> 4) << j))
                }),
                qs: pack_nibble_pairs(&packed.codes),
            };
        }
    }
}
