//! Q5_1: 32 weights, 24 bytes, 6 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..4    m    f16 minimum
//! byte 4..8    qh   fifth bits, weight i at bit i
//! byte 8..24   qs   nibbles: low = weights 0..16, high = weights 16..32
//! ```
//! `w = d * code + m`, code = nibble | fifth bit << 4. Encoded like Q4_1 with 32 codes. Relative RMS error 0.038 on
//! normal weights.

use bytemuck::{Pod, Zeroable};

use crate::act::ActKind;
use crate::bits::{f16_to_f32, f32_to_f16, gather_bit, pack_nibbles};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::formats::q4_1::{encode_range, encode_searched};
use crate::formats::q5_0::unpack_codes;
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    m: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 24);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q5_1;
    const ELEMS: usize = 32;
    const BIAS: i32 = 0;
    const CODE_MAX: u8 = 31;
    const SCALE_IS_F16: bool = true;
    const HAS_OFFSET: bool = true;
    const ACT: ActKind = ActKind::Q8_1;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let m = f16_to_f32(u16::from_le_bytes(self.m));
        Group { codes: unpack_codes(&self.qs, &self.qh), scale: [d; 2], offset: [m; 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        let pack = |d: f32, m: f32, codes: &[u8; 32]| Block {
            d: f32_to_f16(d).to_le_bytes(),
            m: f32_to_f16(m).to_le_bytes(),
            qh: gather_bit(codes, 4).to_le_bytes(),
            qs: pack_nibbles(codes),
        };
        match importance {
            None => {
                for (x, block) in src.chunks_exact(32).zip(out) {
                    let (d, m, codes) = encode_range(x, 31);
                    *block = pack(d, m, &codes);
                }
            }
            Some(importance) => {
                encode_searched(src, importance, 31, |i, d, m, codes| out[i] = pack(d, m, codes));
            }
        }
    }
}
