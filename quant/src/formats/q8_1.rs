//! Q8_1: 32 activations, 36 bytes. ggml's activation format for Q4_1 and Q5_1; files do not normally carry it.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..4    s    f16 d · sum of the codes, for the minimum of the other factor
//! byte 4..36   qs   signed bytes
//! ```
//! `w = d * q`; `s` is redundant and not read. Relative RMS error 0.0054 on normal values.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, words};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::formats::q8_0::encode_bytes;
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    s: [u8; 2],
    qs: [u8; 32],
}

const _: () = assert!(size_of::<Block>() == 36);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q8_1;
    const ELEMS: usize = 32;
    const BIAS: i32 = 128;
    const CODE_MAX: u8 = 255;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        Group { codes: words(&self.qs).map(|w| w ^ 0x8080_8080), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(32).zip(out) {
            let (d, qs) = encode_bytes(x);
            let sum: i32 = qs.iter().map(|&q| q as i8 as i32).sum();
            *block =
                Block { d: f32_to_f16(d).to_le_bytes(), s: f32_to_f16(sum as f32 * d).to_le_bytes(), qs };
        }
    }
}
