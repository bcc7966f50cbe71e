//! Codebooks of the IQ formats: what an index stored in a block stands for.
//!
//! The tables are expanded at compile time from the bit sets in `points.rs` into the form that unpacking wants: a word
//! per four weights, one byte each. Those of IQ2 and IQ3 hold magnitudes, and the signs are stored apart in the block;
//! `signed_codes` joins the two without branches, 32 weights at a time. All tables together are 27 KiB, each small
//! enough for the L1 cache of a CPU and the constant cache or shared memory of a GPU.
//!
//! The tables are constants, not statics: code that inlines an unpacking gets its table in its own object, so the PTX
//! of a kernel crate is complete.
//!
//! Encoding needs the reverse, the nearest entry to a point: `nearest.rs` and `fit.rs`.

use crate::lookup::Lookup;

pub(crate) mod fit;
pub(crate) mod nearest;
mod points;

/// Levels of the IQ2 magnitudes.
const IQ2_LEVELS: [u8; 3] = [8, 25, 43];
/// Levels of the IQ3_XXS magnitudes.
const IQ3_XXS_LEVELS: [u8; 8] = [4, 12, 20, 28, 36, 44, 52, 62];
/// Levels of the IQ3_S magnitudes.
const IQ3_S_LEVELS: [u8; 8] = [1, 3, 5, 7, 9, 11, 13, 15];

/// IQ2_XXS: eight magnitudes per entry, byte `i` is weight `i`.
pub const IQ2_XXS: &[u64; 256] = &octets(&points::IQ2_XXS, IQ2_LEVELS);
/// IQ2_XS, as [`IQ2_XXS`].
pub const IQ2_XS: &[u64; 512] = &octets(&points::IQ2_XS, IQ2_LEVELS);
/// IQ2_S, as [`IQ2_XXS`].
pub const IQ2_S: &[u64; 1024] = &octets(&points::IQ2_S, IQ2_LEVELS);
/// IQ3_XXS: four magnitudes per entry, byte `i` is weight `i`.
pub const IQ3_XXS: &[u32; 256] = &quads(&points::IQ3_XXS, IQ3_XXS_LEVELS);
/// IQ3_S, as [`IQ3_XXS`].
pub const IQ3_S: &[u32; 512] = &quads(&points::IQ3_S, IQ3_S_LEVELS);
/// IQ1_S and IQ1_M: eight levels 0, 1, 2 (for -1, 0, 1) per entry. The low nibble of byte `i` is weight `i`, the high
/// one weight `4 + i`, so that two masks give two words of bytes.
pub const IQ1: &[u32; 2048] = &nibbles(&points::IQ1);
/// IQ4_NL and IQ4_XS: the value of each nibble (`kvalues` in gguf's quants.py).
pub const IQ4: &[i8; 16] = &[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Bias of the codes made from signed magnitudes. Magnitudes are at most 62, so codes lie in 2..=126.
pub const SIGNED_BIAS: i32 = 64;

/// The coordinates of point `p` on the lattice of 3 levels, a byte each.
const fn ternary(mut p: usize) -> [u8; 8] {
    let mut levels = [0; 8];
    let mut i = 0;
    while i < 8 {
        levels[i] = (p % 3) as u8;
        p /= 3;
        i += 1;
    }
    levels
}

/// Numbers of the points in a bit set, ascending.
const fn members<const N: usize>(set: &[u64]) -> [u16; N] {
    let mut points = [0; N];
    let (mut n, mut w) = (0, 0);
    while w < set.len() {
        let mut word = set[w];
        while word != 0 {
            points[n] = (64 * w) as u16 + word.trailing_zeros() as u16;
            word &= word - 1;
            n += 1;
        }
        w += 1;
    }
    assert!(n == N, "a codebook has as many entries as its set has points");
    points
}

const fn octets<const N: usize>(set: &[u64; 103], values: [u8; 3]) -> [u64; N] {
    let points: [u16; N] = members(set);
    let mut table = [0; N];
    let mut n = 0;
    while n < N {
        let mut bytes = ternary(points[n] as usize);
        let mut i = 0;
        while i < 8 {
            bytes[i] = values[bytes[i] as usize];
            i += 1;
        }
        table[n] = u64::from_le_bytes(bytes);
        n += 1;
    }
    table
}

const fn quads<const N: usize>(set: &[u64; 64], values: [u8; 8]) -> [u32; N] {
    let points: [u16; N] = members(set);
    let mut table = [0; N];
    let mut n = 0;
    while n < N {
        let p = points[n] as usize;
        table[n] = u32::from_le_bytes([
            values[p & 7],
            values[(p >> 3) & 7],
            values[(p >> 6) & 7],
            values[(p >> 9) & 7],
        ]);
        n += 1;
    }
    table
}

const fn nibbles<const N: usize>(set: &[u64; 103]) -> [u32; N] {
    let points: [u16; N] = members(set);
    let mut table = [0; N];
    let mut n = 0;
    while n < N {
        let l = ternary(points[n] as usize);
        table[n] =
            u32::from_le_bytes([l[0] | l[4] << 4, l[1] | l[5] << 4, l[2] | l[6] << 4, l[3] | l[7] << 4]);
        n += 1;
    }
    table
}

/// The two words of an entry of eight.
#[inline(always)]
pub(crate) fn halves(entry: u64) -> [u32; 2] {
    [entry as u32, (entry >> 32) as u32]
}

/// Four sign bytes out of four bytes of which seven bits count: bit 7 becomes the parity of the others, since these
/// formats only store even numbers of minus signs per eight weights.
#[inline(always)]
pub(crate) fn with_parity(seven_bits: u32) -> u32 {
    let b = seven_bits & 0x7f7f_7f7f;
    let mut p = (b ^ (b >> 4)) & 0x0f0f_0f0f;
    p ^= p >> 2;
    p ^= p >> 1;
    b | ((p & 0x0101_0101) << 7)
}

/// 28 bits, seven per eight weights, as one sign bit per weight.
#[inline(always)]
pub(crate) fn signs_of_28_bits(packed: u32) -> u32 {
    with_parity(
        packed & 0x7f | (packed << 1) & 0x7f00 | (packed << 2) & 0x007f_0000 | (packed << 3) & 0x7f00_0000,
    )
}

/// Codes biased by [`SIGNED_BIAS`] out of magnitudes (bytes up to 63) and one sign bit per weight.
///
/// With u = 1 for a minus, else 0: `(v ^ 64 ^ 127 u) + u` is `v ^ 64 = 64 + v`, or `(v ^ 63) + 1 = 64 - v`; no byte carries
/// into its neighbour. Products where others would do: GPUs have another pipe for them than for the rest of these steps.
#[inline(always)]
pub(crate) fn signed_codes<L: Lookup>(magnitudes: [u32; 8], signs: u32, lookup: L) -> [u32; 8] {
    let nibbles = [signs, signs >> 4].map(|signs| lookup.bytes(signs & 0x0f0f_0f0f));
    core::array::from_fn(|i| {
        // As `spread_bits`, of four bits alone.
        let minus = (nibbles[i % 2][i / 2] * 0x0020_4081) & 0x0101_0101;
        (magnitudes[i] ^ 0x4040_4040 ^ (minus * 0x7f)) + minus
    })
}
