//! TQ2_0: 256 ternary weights, 66 bytes, 2.0625 bits per weight.
//!
//! ```text
//! byte 0..64    qs   2-bit codes, see `bits::pack_2bit`
//! byte 64..66   d    f16 scale
//! ```
//! `w = d * (code - 1)`; encoding makes codes 0, 1, 2 only, with `d = amax`. Made for models trained with ternary
//! weights, where it is exact; on normal weights the relative RMS error is 0.80. Importance changes nothing.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, pack_2bit, round_half_away, unpack_2bit};
use crate::extent::abs_max;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    qs: [u8; 64],
    d: [u8; 2],
}

const _: () = assert!(size_of::<Block>() == 66);

/// Scale and trits (0, 1, 2) of 256 values.
pub(super) fn trits(x: &[f32]) -> (f32, [u8; 256]) {
    let d = abs_max(x);
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, core::array::from_fn(|i| (round_half_away(x[i] * id).clamp(-1, 1) + 1) as u8))
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::TQ2_0;
    const ELEMS: usize = 256;
    const BIAS: i32 = 1;
    const CODE_MAX: u8 = 3;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        Group { codes: unpack_2bit(&self.qs, g), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(256).zip(out) {
            let (d, codes) = trits(x);
            *block = Block { qs: pack_2bit(&codes), d: f32_to_f16(d).to_le_bytes() };
        }
    }
}
