//! MXFP4: 32 weights, 17 bytes, 4.25 bits per weight (OCP Microscaling, E2M1 values under one E8M0 exponent).
//!
//! ```text
//! byte 0       e    exponent
//! byte 1..17   qs   E2M1 nibbles: low = weights 0..16, high = weights 16..32
//! ```
//! `w = 2^(e - 128) * v` with v = twice the E2M1 value, so that it is an integer. Codes are `v + 12`. Encoding takes the
//! exponent of the largest magnitude (6 = 1.5·2² is the largest E2M1 value, hence the 2) and the nearest value for each
//! weight; importance changes nothing. Relative RMS error 0.114 on normal weights.

use bytemuck::{Pod, Zeroable};

use crate::bits::{pack_nibbles, word};
use crate::extent::abs_max;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    e: u8,
    qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 17);

/// Twice the E2M1 value of each nibble. Negative zero reads as zero.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What to subtract from [`E2M1_CODES`].
pub(super) const E2M1_BIAS: i32 = 12;

/// The doubled value of each nibble, biased.
pub(super) const E2M1_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = (E2M1_DOUBLED[i] as i32 + E2M1_BIAS) as u8;
        i += 1;
    }
    codes
};

/// The nibble whose value times `d` is nearest to each of `x`; the smaller magnitude on ties.
#[inline]
pub(super) fn nearest<const N: usize>(x: &[f32], d: f32) -> [u8; N] {
    // The positive half decides the magnitude. In 32-bit numbers throughout, so that it vectorises.
    let magnitude: [f32; N] = core::array::from_fn(|i| x[i].abs());
    let mut nibbles = [0u32; N];
    let mut best = magnitude;
    for (nibble, &value) in E2M1_DOUBLED[..8].iter().enumerate().skip(1) {
        let value = value as f32 * d;
        for i in 0..N {
            let error = (value - magnitude[i]).abs();
            nibbles[i] = if error < best[i] { nibble as u32 } else { nibbles[i] };
            best[i] = if error < best[i] { error } else { best[i] };
        }
    }
    core::array::from_fn(
        |i| if nibbles[i] != 0 && x[i] < 0.0 { nibbles[i] as u8 | 8 } else { nibbles[i] as u8 },
    )
}

/// 2^(e - 128), also where that is subnormal.
#[inline(always)]
fn scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::MXFP4;
    const ELEMS: usize = 32;
    const BIAS: i32 = E2M1_BIAS;
    const CODE_MAX: u8 = 24;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, _g: usize, lookup: L) -> Group {
        let pairs: [[u32; 2]; 4] = core::array::from_fn(|i| lookup.nibbles(&E2M1_CODES, word(&self.qs, i)));
        let codes = core::array::from_fn(|i| pairs[i % 4][i / 4]);
        Group { codes, scale: [scale(self.e); 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(32).zip(out) {
            let amax = abs_max(x);
            // The logarithm is rounded to f32 before it is floored, as in ggml: just below a power of two it is whole.
            // Exponents below E8M0's range saturate at 0 (C leaves that conversion undefined).
            let e = if amax > 0.0 { libm::floorf(libm::log2(amax as f64) as f32) - 2.0 + 127.0 } else { 0.0 };
            let e = e as u8;
            let nibbles: [u8; 32] = nearest(x, scale(e));
            *block = Block { e, qs: pack_nibbles(&nibbles) };
        }
    }
}
