//! Q8_0: 32 weights, 34 bytes, 8.5 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..34   qs   signed bytes
//! ```
//! `w = d * q`, `d = amax / 127`, rounding half away from zero; importance changes nothing. Relative RMS error 0.0054 on
//! normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, round_half_away, words};
use crate::extent::abs_max;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 32],
}

const _: () = assert!(size_of::<Block>() == 34);

/// Scale (before its own rounding) and signed codes of 32 values.
pub(super) fn encode_bytes(x: &[f32]) -> (f32, [u8; 32]) {
    let amax = abs_max(x);
    let d = amax / 127.0;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, core::array::from_fn(|i| round_half_away(x[i] * id) as i8 as u8))
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q8_0;
    const ELEMS: usize = 32;
    const BIAS: i32 = 128;
    const CODE_MAX: u8 = 255;
    const SCALE_IS_F16: bool = true;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        Group { codes: words(&self.qs).map(|w| w ^ 0x8080_8080), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(32).zip(out) {
            let (d, qs) = encode_bytes(x);
            *block = Block { d: f32_to_f16(d).to_le_bytes(), qs };
        }
    }
}
