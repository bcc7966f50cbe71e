//! Q2_0: 64 weights, 18 bytes, 2.25 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..18   qs   2-bit codes, four consecutive weights per byte, lowest bits first
//! ```
//! `w = d * (code - 1)`, so -d, 0, d, 2d; encoding takes `d = amax` and so never makes 2d. Importance changes nothing.
//! Relative RMS error 0.72 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, round_half_away, spread_pairs};
use crate::extent::abs_max;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 18);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q2_0;
    const ELEMS: usize = 64;
    const BIAS: i32 = 1;
    const CODE_MAX: u8 = 3;
    const SCALE_IS_F16: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let codes = core::array::from_fn(|i| spread_pairs(self.qs[8 * g + i] as u32));
        Group { codes, scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(64).zip(out) {
            let d = abs_max(x);
            let id = if d > 0.0 { 1.0 / d } else { 0.0 };
            block.d = f32_to_f16(d).to_le_bytes();
            for (byte, x) in block.qs.iter_mut().zip(x.chunks_exact(4)) {
                *byte = x.iter().enumerate().fold(0, |bits, (i, &v)| {
                    let code = round_half_away(v * id).clamp(-1, 2) + 1;
                    bits | ((code as u8) << (2 * i))
                });
            }
        }
    }
}
