//! NVFP4: 64 weights in 4 sub-blocks of 16, 36 bytes, 4.5 bits per weight (E2M1 values under UE4M3 scales).
//!
//! ```text
//! byte 0..4    d    unsigned E4M3 scale of each sub-block
//! byte 4..36   qs   E2M1 nibbles, 8 bytes per sub-block: low = weights 0..8, high = weights 8..16
//! ```
//! `w = d/2 * v` with v = twice the E2M1 value. Codes are `v + 12`. Encoding takes the largest magnitude to 6, the largest
//! E2M1 value; importance changes nothing. The format's second, per-tensor scale is a tensor of its own and not applied
//! here. Relative RMS error 0.095 on normal weights; magnitudes beyond 448·6 are lost.

use bytemuck::{Pod, Zeroable};

use crate::bits::word;
use crate::extent::abs_max;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::formats::mxfp4::{E2M1_BIAS, E2M1_CODES, nearest};
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 4],
    qs: [u8; 32],
}

const _: () = assert!(size_of::<Block>() == 36);

/// Half the value of an unsigned E4M3 number (exponent bias 7, subnormals, no infinity; 0x7f, the NaN, reads as 0). The
/// top bit is not part of the format.
#[inline(always)]
fn half_ue4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = ((bits >> 3) as u32 & 0xf, bits as u32 & 7);
    // All three at once: on a GPU a choice between values is cheaper than a branch.
    let subnormal = mantissa as f32 * (1.0 / 1024.0);
    let normal = f32::from_bits(((exponent + 127 - 8) << 23) | (mantissa << 20));
    let value = if exponent == 0 { subnormal } else { normal };
    if bits == 0x7f { 0.0 } else { value }
}

/// Nearest unsigned E4M3 number, halves up; what is not positive becomes 0. From 256 on, where the last exponent would
/// begin, ggml always takes the largest number, 448.
fn ue4m3(x: f32) -> u8 {
    const LARGEST: u8 = 0x7e;
    /// Below it are the subnormals, steps of 2^-9.
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    const LAST_EXPONENT: f32 = 256.0;
    if x.is_nan() || x <= 0.0 {
        0
    } else if x < SMALLEST_NORMAL {
        ((x * 512.0 + 0.5) as u8).min(7)
    } else if x < LAST_EXPONENT {
        // Exponent and three mantissa bits, rounded by the bit below; a carry runs into the exponent by itself.
        let rounded = (((x.to_bits() + (1 << 19)) >> 20) - ((127 - 7) << 3)) as u8;
        if rounded < 15 << 3 { rounded } else { LARGEST }
    } else {
        LARGEST
    }
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::NVFP4;
    const ELEMS: usize = 64;
    const BIAS: i32 = E2M1_BIAS;
    const CODE_MAX: u8 = 24;
    const SCALE_ELEMS: usize = 16;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let qs = &self.qs[16 * g..][..16];
        // Words of bytes 0..4, 4..8 of either half: low nibbles are its weights 0..8, high ones 8..16.
        let pairs: [[u32; 2]; 4] = core::array::from_fn(|i| lookup.nibbles(&E2M1_CODES, word(qs, i)));
        let codes = core::array::from_fn(|i| pairs[2 * (i / 4) + i % 2][i / 2 % 2]);
        Group { codes, scale: [half_ue4m3(self.d[2 * g]), half_ue4m3(self.d[2 * g + 1])], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(64).zip(out) {
            let subs = x.chunks_exact(16).zip(&mut block.d).zip(block.qs.chunks_exact_mut(8));
            for ((x, d), qs) in subs {
                let amax = abs_max(x);
                *d = ue4m3(amax / 6.0);
                let nibbles: [u8; 16] = nearest(x, half_ue4m3(*d));
                for (i, byte) in qs.iter_mut().enumerate() {
                    *byte = nibbles[i] | (nibbles[8 + i] << 4);
                }
            }
        }
    }
}
