//! Q6_K: 256 weights in 16 sub-blocks of 16, 210 bytes, 6.5625 bits per weight.
//!
//! ```text
//! byte 0..128    ql      low nibbles: per half of 128, byte i of 64 = weights i (low) and i + 64 (high)
//! byte 128..192  qh      high two bits, see `bits::pack_2bit`
//! byte 192..208  scales  16 signed bytes
//! byte 208..210  d       f16 scale of the scales
//! ```
//! `w = d·scale·(code − 32)`. Importance, if any, weights the squared error as it is. Relative RMS error 0.018 on normal
//! weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, nearest_int, pack_2bit, unpack_2bit, word};
use crate::extent::extreme;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;
use crate::search::{ZERO_MAX, fit_symmetric, in_sequence, round_to_codes, side_by_side};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    ql: [u8; 128],
    qh: [u8; 64],
    scales: [u8; 16],
    d: [u8; 2],
}

const _: () = assert!(size_of::<Block>() == 210);

fn encode(x: &[f32], importance: Importance<'_>) -> Block {
    let x_lanes = side_by_side::<16, 16>(x);
    let weights = match importance {
        None => x_lanes.map(|x| x.map(|v| v * v)),
        Some(importance) => side_by_side(importance),
    };
    let fit = fit_symmetric(&x_lanes, &weights, 32);
    let extreme = extreme(&fit.scale);
    if extreme.abs() < ZERO_MAX {
        return Block::zeroed();
    }
    // The scale of largest magnitude becomes -128: signed bytes reach one further on that side.
    let inverse = -128.0 / extreme;
    let d = f32_to_f16(1.0 / inverse);
    let scales = fit.scale.map(|s| nearest_int(inverse * s).min(127) as i8);
    let mut codes = [0u8; 256];
    in_sequence(&fit.codes, &mut codes);
    for (j, (x, codes)) in x.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0).enumerate() {
        round_to_codes(x, f16_to_f32(d) * scales[j] as f32, 0.0, -32, 31, codes);
    }
    Block {
        ql: core::array::from_fn(|i| {
            let at = 128 * (i / 64) + i % 64;
            (codes[at] & 0xf) | (codes[at + 64] << 4)
        }),
        qh: pack_2bit(&codes.map(|code| code >> 4)),
        scales: scales.map(|s| s as u8),
        d: d.to_le_bytes(),
    }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q6_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 32;
    const CODE_MAX: u8 = 63;
    const SCALE_ELEMS: usize = 16;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let low = &self.ql[64 * (g / 4) + 32 * (g % 2)..][..32];
        let shift = 4 * (g % 4 / 2);
        let high = unpack_2bit(&self.qh, g);
        Group {
            codes: core::array::from_fn(|i| ((word(low, i) >> shift) & 0x0f0f_0f0f) | (high[i] << 4)),
            scale: [self.scales[2 * g], self.scales[2 * g + 1]].map(|s| d * (s as i8) as f32),
            offset: [0.0; 2],
        }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (b, (x, block)) in src.chunks_exact(256).zip(out).enumerate() {
            *block = encode(x, importance.map(|w| &w[256 * b..][..256]));
        }
    }
}
