//! Number conversions and packed-byte arithmetic that several formats share.

/// IEEE half bits to f32, exact; NaN stays NaN.
///
/// Without branches, so that it vectorises and costs little per group where the machine's own conversion cannot be
/// assumed: exponent and mantissa move into place, and one multiplication corrects the exponent's bias, which is also
/// right for subnormals. Infinity and NaN get the largest exponent back.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const BIAS_CORRECTION: f32 = f32::from_bits((127 + 112) << 23); // 2^(127 - 15)
    let magnitude = (bits as u32 & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * BIAS_CORRECTION).to_bits();
    let special = if magnitude >= 0x1f << 23 { 0xff << 23 } else { 0 };
    f32::from_bits(scaled | special | ((bits as u32 & 0x8000) << 16))
}

/// IEEE half bits to f32, exact: the GPU has the instruction.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits) as f32
}

/// f32 to IEEE half bits, nearest even.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    #[cfg(target_arch = "nvptx64")]
    return (value as f16).to_bits();
    #[cfg(not(target_arch = "nvptx64"))]
    half::f16::from_f32(value).to_bits()
}

/// bfloat16 bits to f32, exact.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// f32 to bfloat16 bits, nearest even; NaN stays NaN (quiet), as in ggml.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let u = value.to_bits();
    if u & 0x7fff_ffff > 0x7f80_0000 {
        return ((u >> 16) | 64) as u16;
    }
    ((u + (0x7fff + ((u >> 16) & 1))) >> 16) as u16
}

/// Nearest integer, ties to even, for |x| < 2^22: the rounding of ggml's quantisers (the 1.5·2^23 trick).
#[inline(always)]
pub fn nearest_int(x: f32) -> i32 {
    let biased = (x + 12_582_912.0).to_bits() as i32;
    (biased & 0x007f_ffff) - 0x0040_0000
}

/// Four little-endian bytes as a word.
#[inline(always)]
pub fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

/// Nearest integer, ties away from zero (C's `roundf`), without a library call: truncation after adding the largest
/// f32 below one half. NaN becomes 0, values out of range saturate.
#[inline(always)]
pub fn round_half_away(x: f32) -> i32 {
    (x + f32::copysign(0.5 - f32::EPSILON / 4.0, x)) as i32
}

/// Eight little-endian words out of 32 bytes.
#[inline(always)]
pub fn words(bytes: &[u8; 32]) -> [u32; 8] {
    core::array::from_fn(|i| word(bytes, i))
}

/// The low four bits of `nibble`, one per byte.
#[inline(always)]
pub fn spread_bits(nibble: u32) -> u32 {
    ((nibble & 0xf) * 0x0020_4081) & 0x0101_0101
}

/// The four 2-bit fields of the low byte of `byte`, one per byte.
#[inline(always)]
pub fn spread_pairs(byte: u32) -> u32 {
    let nibbles = ((byte & 0xff) | (byte << 12)) & 0x000f_000f;
    (nibbles | (nibbles << 6)) & 0x0303_0303
}

/// Codes of group `g` of a super-block stored by [`pack_2bit`].
#[inline(always)]
pub fn unpack_2bit(qs: &[u8; 64], g: usize) -> [u32; 8] {
    let plane = &qs[32 * (g / 4)..][..32];
    core::array::from_fn(|i| (word(plane, i) >> (2 * (g % 4))) & 0x0303_0303)
}

/// 256 codes of two bits: per half of 128, byte `i` of 32 holds codes `i`, `i + 32`, `i + 64`, `i + 96`, lowest first.
#[inline]
pub fn pack_2bit(codes: &[u8; 256]) -> [u8; 64] {
    core::array::from_fn(|i| {
        let at = 128 * (i / 32) + i % 32;
        (0..4).fold(0, |byte, k| byte | ((codes[at + 32 * k] & 3) << (2 * k)))
    })
}

/// Codes of a block of 32 in nibbles: low = codes 0..16, high = codes 16..32.
#[inline(always)]
pub fn unpack_nibbles(qs: &[u8; 16]) -> [u32; 8] {
    core::array::from_fn(|i| (word(qs, i % 4) >> (4 * (i / 4))) & 0x0f0f_0f0f)
}

/// Inverse of [`unpack_nibbles`]; higher bits of a code are dropped.
#[inline(always)]
pub fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    core::array::from_fn(|i| (codes[i] & 0xf) | (codes[16 + i] << 4))
}

/// Bit `bit` of each of 32 codes, code `i` at bit `i`.
#[inline(always)]
pub fn gather_bit(codes: &[u8; 32], bit: u32) -> u32 {
    codes.iter().enumerate().fold(0, |bits, (i, &code)| bits | (((code as u32 >> bit) & 1) << i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_to_f32_is_exact() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let got = f16_to_f32(bits);
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                "{bits:#06x}: {got}"
            );
        }
    }

    #[test]
    fn rounds_like_c() {
        let near = |x: f32| [x.next_down(), x, x.next_up()];
        for i in -300..300 {
            for x in near(i as f32 / 2.0).into_iter().chain(near(i as f32 / 7.0)) {
                assert_eq!(round_half_away(x), libm::roundf(x) as i32, "{x}");
                assert_eq!(nearest_int(x), libm::rintf(x) as i32, "{x}");
            }
        }
        assert_eq!(round_half_away(f32::NAN), 0);
        assert_eq!(round_half_away(f32::NEG_INFINITY), i32::MIN);
    }

    #[test]
    fn spreads_fields_into_bytes() {
        for byte in 0..=255u32 {
            let pairs = spread_pairs(byte).to_le_bytes();
            let bits = spread_bits(byte).to_le_bytes();
            for i in 0..4 {
                assert_eq!(pairs[i] as u32, (byte >> (2 * i)) & 3);
                assert_eq!(bits[i] as u32, (byte >> i) & 1);
            }
        }
    }

    #[test]
    fn packing_inverts_unpacking() {
        let codes: [u8; 256] = core::array::from_fn(|i| (i * 7 % 11 % 4) as u8);
        let packed = pack_2bit(&codes);
        for g in 0..8 {
            assert_eq!(unpack_2bit(&packed, g), words(codes[32 * g..][..32].try_into().unwrap()));
        }
        let codes: [u8; 32] = core::array::from_fn(|i| (i * 5 % 16) as u8);
        assert_eq!(unpack_nibbles(&pack_nibbles(&codes)), words(&codes));
        assert_eq!(gather_bit(&codes, 2) >> 3 & 1, (codes[3] >> 2 & 1) as u32);
    }
}
