//! TQ1_0: 256 ternary weights, 54 bytes, 1.6875 bits per weight.
//!
//! ```text
//! byte 0..48    qs   five weights each
//! byte 48..52   qh   four weights each
//! byte 52..54   d    f16 scale
//! ```
//! `w = d * (trit - 1)`. A byte holds five trits t0..t4 as the fraction `0.t0t1t2t3t4` (base 3) of 256, rounded up: times
//! 3ⁿ modulo 256 the fraction starts at trit n, times 3 its whole part is the trit. Trit n of bytes 0..32 is weight
//! `32·n + byte`, of bytes 32..48 weight `160 + 16·n + byte - 32`, of qh weight `240 + 4·n + byte`.
//!
//! Made for models trained with ternary weights, where it is exact; on normal weights the relative RMS error is 0.80.
//! `d = amax`; importance changes nothing.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, words};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::formats::tq2_0::trits;
use crate::lookup::Lookup;

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    qs: [u8; 48],
    qh: [u8; 4],
    d: [u8; 2],
}

const _: () = assert!(size_of::<Block>() == 54);

const POW3: [u8; 5] = [1, 3, 9, 27, 81];

/// Trit `n` of a byte.
#[inline(always)]
fn trit(byte: u8, n: usize) -> u8 {
    ((byte.wrapping_mul(POW3[n]) as u16 * 3) >> 8) as u8
}

/// Five trits as one byte.
fn pack(trits: [u8; 5]) -> u8 {
    let value = trits.iter().fold(0u32, |value, &t| 3 * value + t as u32);
    (value * 256).div_ceil(243) as u8
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::TQ1_0;
    const ELEMS: usize = 256;
    const BIAS: i32 = 1;
    const CODE_MAX: u8 = 2;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let codes: [u8; 32] = match g {
            0..5 => core::array::from_fn(|i| trit(self.qs[i], g)),
            5 | 6 => core::array::from_fn(|i| trit(self.qs[32 + i % 16], 2 * (g - 5) + i / 16)),
            _ => core::array::from_fn(|i| match i {
                0..16 => trit(self.qs[32 + i], 4),
                _ => trit(self.qh[i % 4], (i - 16) / 4),
            }),
        };
        Group { codes: words(&codes), scale: [d; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(256).zip(out) {
            let (d, t) = trits(x);
            *block = Block {
                qs: core::array::from_fn(|i| {
                    let (at, step) = if i < 32 { (i, 32) } else { (128 + i, 16) };
                    pack(core::array::from_fn(|n| t[at + step * n]))
                }),
                qh: core::array::from_fn(|i| {
                    pack(core::array::from_fn(|n| if n < 4 { t[240 + 4 * n + i] } else { 0 }))
                }),
                d: f32_to_f16(d).to_le_bytes(),
            };
        }
    }
}
