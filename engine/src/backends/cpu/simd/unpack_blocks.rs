//! Vector unpackers of the formats without codebooks: the layouts of quant's files, seen 16 rows at a time.
//!
//! A load of 16 bytes from each row, transposed, gives packed words by column; masks and shifts make codes of them.
//! The tests hold every byte of the result against [`quant::BlockFormat::unpack_group`].

use quant::FormatId;

use super::panel::{Ahead, CODE_BYTES, Panel, columns};
use super::vector::Simd;

/// Whether [`scales`] and [`codes`] know the format.
pub(super) const fn knows(id: FormatId) -> bool {
    use FormatId::*;
    matches!(
        id,
        Q1_0 | Q2_0 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | MXFP4 | NVFP4 | IQ4_NL | IQ4_XS | TQ1_0 | TQ2_0
    ) || matches!(id, Q2_K | Q3_K | Q4_K | Q5_K | Q6_K)
}

/// What IQ4 codes are biased by.
const IQ4_BIAS: i32 = 128;
/// Codes of the IQ4 nibbles.
pub(super) const IQ4_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = (quant::codebook::IQ4[i] as i32 + IQ4_BIAS) as u8;
        i += 1;
    }
    codes
};

/// Codes of the E2M1 nibbles, as in quant's `mxfp4`: twice the value, biased by 12.
pub(super) const E2M1_CODES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// The low nibbles of a word's bytes.
pub(super) const NIBBLES: u32 = 0x0f0f_0f0f;

/// Scales and offsets of one block of each of 16 rows into `panel`, which points at the block's first group.
///
/// # Safety
/// * A block of a format that this module [`knows`] is readable at each `p + i·stride`.
/// * `panel` has room for the block's groups.
#[inline(always)]
pub(super) unsafe fn scales<S: Simd>(
    s: S,
    id: FormatId,
    p: *const u8,
    stride: usize,
    panel: Panel,
    ahead: &mut Ahead,
) {
    // SAFETY: every offset below lies in the format's block (the layouts are in quant's files).
    unsafe {
        match id {
            FormatId::Q4_0 | FormatId::Q5_0 | FormatId::Q8_0 | FormatId::IQ4_NL => {
                scale(s, panel, 0, s.gather_f16(p, stride));
            }
            FormatId::Q4_1 | FormatId::Q5_1 => {
                scale(s, panel, 0, s.gather_f16(p, stride));
                offset(s, panel, 0, s.gather_f16(p.add(2), stride));
            }
            FormatId::IQ4_XS => iq4_xs_scales(s, ahead, p, stride, panel),
            FormatId::Q4_K | FormatId::Q5_K => scales_and_mins(s, ahead, p, stride, panel),
            FormatId::Q6_K => q6_k_scales(s, ahead, p, stride, panel),
            FormatId::Q2_K => q2_k_scales(s, ahead, p, stride, panel),
            FormatId::Q3_K => q3_k_scales(s, ahead, p, stride, panel),
            FormatId::TQ2_0 => {
                let d = s.gather_f16(p.add(64), stride);
                for g in 0..8 {
                    scale(s, panel, g, d);
                }
            }
            FormatId::TQ1_0 => {
                let d = s.gather_f16(p.add(52), stride);
                for g in 0..8 {
                    scale(s, panel, g, d);
                }
            }
            FormatId::Q1_0 => {
                let d = s.gather_f16(p, stride);
                for g in 0..4 {
                    scale(s, panel, g, d);
                }
            }
            FormatId::Q2_0 => {
                let d = s.gather_f16(p, stride);
                scale(s, panel, 0, d);
                scale(s, panel, 1, d);
            }
            FormatId::MXFP4 => mxfp4_scales(s, ahead, p, stride, panel),
            FormatId::NVFP4 => nvfp4_scales(s, ahead, p, stride, panel),
            _ => unreachable!("no vector unpacker for {id}"),
        }
    }
}

/// Codes of one block of each of 16 rows into `panel`, as [`scales`] does with scales and offsets.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
pub(super) unsafe fn codes<S: Simd>(
    s: S,
    id: FormatId,
    p: *const u8,
    stride: usize,
    panel: Panel,
    ahead: &mut Ahead,
) {
    // SAFETY: every offset below lies in the format's block (the layouts are in quant's files).
    unsafe {
        match id {
            FormatId::Q4_0 => nibbles(s, columns(s, ahead, p.add(2), stride), panel.codes, |v| v),
            FormatId::Q4_1 => nibbles(s, columns(s, ahead, p.add(4), stride), panel.codes, |v| v),
            FormatId::Q5_0 => {
                // The first 16 bytes hold the fifth bits at 2..6.
                let head = columns(s, ahead, p, stride);
                let fifth = s.or(s.shr::<16>(head[0]), s.shl::<16>(head[1]));
                nibbles_and_fifth(s, columns(s, ahead, p.add(6), stride), fifth, panel.codes);
            }
            FormatId::Q5_1 => {
                let head = columns(s, ahead, p, stride);
                nibbles_and_fifth(s, columns(s, ahead, p.add(8), stride), head[1], panel.codes);
            }
            FormatId::Q8_0 => {
                for half in 0..2 {
                    let words = columns(s, ahead, p.add(2 + 16 * half), stride);
                    for (c, word) in words.into_iter().enumerate() {
                        s.store_i32(s.xor(word, 0x8080_8080), panel.codes.add((4 * half + c) * 64));
                    }
                }
            }
            FormatId::IQ4_NL => {
                let look = |v| s.lookup(v, &IQ4_CODES);
                nibbles(s, columns(s, ahead, p.add(2), stride), panel.codes, look);
            }
            FormatId::IQ4_XS => {
                for g in 0..8 {
                    let look = |v| s.lookup(v, &IQ4_CODES);
                    let words = columns(s, ahead, p.add(8 + 16 * g), stride);
                    nibbles(s, words, panel.codes.add(g * CODE_BYTES), look);
                }
            }
            FormatId::Q4_K => q4_k_codes(s, ahead, p, stride, panel),
            FormatId::Q5_K => q5_k_codes(s, ahead, p, stride, panel),
            FormatId::Q6_K => q6_k_codes(s, ahead, p, stride, panel),
            FormatId::Q2_K => two_bits(s, ahead, p.add(16), stride, panel.codes),
            FormatId::Q3_K => q3_k_codes(s, ahead, p, stride, panel),
            FormatId::TQ2_0 => two_bits(s, ahead, p, stride, panel.codes),
            FormatId::TQ1_0 => tq1_0_codes(s, ahead, p, stride, panel),
            FormatId::Q1_0 => {
                for (g, mut bits) in columns(s, ahead, p.add(2), stride).into_iter().enumerate() {
                    for c in 0..8 {
                        let codes = s.shl::<1>(spread_bits(s, bits));
                        s.store_i32(codes, panel.codes.add(g * CODE_BYTES + c * 64));
                        bits = s.shr::<4>(bits);
                    }
                }
            }
            FormatId::Q2_0 => {
                for (w, mut word) in columns(s, ahead, p.add(2), stride).into_iter().enumerate() {
                    for i in 0..4 {
                        s.store_i32(spread_pairs(s, word), panel.codes.add((4 * w + i) * 64));
                        word = s.shr::<8>(word);
                    }
                }
            }
            FormatId::MXFP4 => {
                for (c, word) in columns(s, ahead, p.add(1), stride).into_iter().enumerate() {
                    let (low, high) = two_nibbles(s, word);
                    s.store_i32(s.lookup(low, &E2M1_CODES), panel.codes.add(c * 64));
                    s.store_i32(s.lookup(high, &E2M1_CODES), panel.codes.add((4 + c) * 64));
                }
            }
            FormatId::NVFP4 => nvfp4_codes(s, ahead, p, stride, panel),
            _ => unreachable!("no vector unpacker for {id}"),
        }
    }
}

/// Scales of IQ4_XS: the low four bits of eight 6-bit scales in a word, their top bits beside the half.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn iq4_xs_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        let head = columns(s, ahead, p, stride);
        let d = s.low_f16(head[0]);
        let (mut high, mut low) = (s.shr::<16>(head[0]), head[1]);
        for g in 0..8 {
            let six = s.or(s.and(low, 0xf), s.shl::<4>(s.and(high, 3)));
            (high, low) = (s.shr::<2>(high), s.shr::<4>(low));
            scale(s, panel, g, s.mul(d, s.sub(s.i32_to_f32(six), s.splat(32.0))));
        }
    }
}

/// Scales `first` to `first + 3`: `d` times what the bytes of each word are more than `zero`.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn four_scales<S: Simd>(s: S, panel: Panel, first: usize, mut word: S::I, zero: f32, d: S::F) {
    for i in 0..4 {
        let value = s.sub(s.i32_to_f32(s.and(word, 0xff)), s.splat(zero));
        // SAFETY: by this function's contract.
        unsafe { scale(s, panel, first + i, s.mul(d, value)) };
        word = s.shr::<8>(word);
    }
}

/// Scales of Q6_K: sixteen signed bytes.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn q6_k_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        let d = s.gather_f16(p.add(208), stride);
        // Signed bytes as words: flipping the sign bit adds 128, which is taken off again exactly.
        for (w, word) in columns(s, ahead, p.add(192), stride).into_iter().enumerate() {
            four_scales(s, panel, 4 * w, s.xor(word, 0x8080_8080), 128.0, d);
        }
    }
}

/// Scales and offsets of Q2_K: a nibble each for every 16 weights.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn q2_k_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        let d = columns(s, ahead, p.add(68), stride)[3];
        let dmin = s.sub(s.splat(0.0), s.low_f16(s.shr::<16>(d)));
        let d = s.low_f16(d);
        for (w, mut word) in columns(s, ahead, p, stride).into_iter().enumerate() {
            for i in 0..4 {
                scale(s, panel, 4 * w + i, s.mul(d, s.i32_to_f32(s.and(word, 0xf))));
                let min = s.i32_to_f32(s.and(s.shr::<4>(word), 0xf));
                offset(s, panel, 4 * w + i, s.mul(dmin, min));
                word = s.shr::<8>(word);
            }
        }
    }
}

/// Scales of Q3_K: sixteen of six bits, packed in twelve bytes.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn q3_k_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        // Scales are at 96..108, the half after them: two bytes off a load that ends with the block.
        let tail = columns(s, ahead, p.add(94), stride);
        let a = s.or(s.shr::<16>(tail[0]), s.shl::<16>(tail[1]));
        let b = s.or(s.shr::<16>(tail[1]), s.shl::<16>(tail[2]));
        let mut high = s.or(s.shr::<16>(tail[2]), s.shl::<16>(tail[3]));
        let d = s.low_f16(s.shr::<16>(tail[3]));
        for (w, low) in [a, b, s.shr::<4>(a), s.shr::<4>(b)].into_iter().enumerate() {
            let six = s.or(s.and(low, NIBBLES), s.shl::<4>(s.and(high, 0x0303_0303)));
            high = s.shr::<2>(high);
            four_scales(s, panel, 4 * w, six, 32.0, d);
        }
    }
}

/// The scale of MXFP4: a power of two.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn mxfp4_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        // 2^(e - 128) as two factors, because the smallest are subnormal.
        let e = s.i32_to_f32(s.and(columns(s, ahead, p, stride)[0], 0xff));
        let e = s.sub(e, s.splat(128.0));
        let normal = s.max(e, s.splat(-126.0));
        scale(s, panel, 0, s.mul(s.pow2(normal), s.pow2(s.sub(e, normal))));
    }
}

/// Scales of NVFP4: four bytes of E4M3.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn nvfp4_scales<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        let mut scales = columns(s, ahead, p, stride)[0];
        for i in 0..4 {
            // E4M3 bits are those of a half whose exponent is biased by 8 more; halved, 2^7 remain. 0x7f is 0.
            let value = s.low_f16(s.shl::<7>(s.and(scales, 0x7f)));
            let byte = s.i32_to_f32(s.and(scales, 0xff));
            let from_nan = s.abs(s.sub(byte, s.splat(127.0)));
            let value = s.mul(value, s.splat(128.0));
            scale(s, panel, i, s.select_lt(from_nan, s.splat(0.5), s.splat(0.0), value));
            scales = s.shr::<8>(scales);
        }
    }
}

/// Codes of Q4_K: nibbles, low ones of one group and high ones of the next.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn q4_k_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        for pair in 0..4 {
            let codes = panel.codes.add(2 * pair * CODE_BYTES);
            for half in 0..2 {
                let words = columns(s, ahead, p.add(16 + 32 * pair + 16 * half), stride);
                for (c, word) in words.into_iter().enumerate() {
                    let at = codes.add((4 * half + c) * 64);
                    s.store_i32(s.and(word, NIBBLES), at);
                    s.store_i32(s.and(s.shr::<4>(word), NIBBLES), at.add(CODE_BYTES));
                }
            }
        }
    }
}

/// Codes of Q5_K: nibbles as in Q4_K, and a plane with the fifth bits of all groups.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn q5_k_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        for half in 0..2 {
            let mut fifth = columns(s, ahead, p.add(16 + 16 * half), stride);
            for pair in 0..4 {
                let codes = panel.codes.add(2 * pair * CODE_BYTES);
                let words = columns(s, ahead, p.add(48 + 32 * pair + 16 * half), stride);
                for c in 0..4 {
                    let at = codes.add((4 * half + c) * 64);
                    let even = s.shl::<4>(s.and(fifth[c], 0x0101_0101));
                    let odd = s.shl::<3>(s.and(fifth[c], 0x0202_0202));
                    s.store_i32(s.or(s.and(words[c], NIBBLES), even), at);
                    s.store_i32(s.or(s.and(s.shr::<4>(words[c]), NIBBLES), odd), at.add(CODE_BYTES));
                    fifth[c] = s.shr::<2>(fifth[c]);
                }
            }
        }
    }
}

/// Codes of Q6_K: nibbles of four groups, and a plane with two more bits for each.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn q6_k_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        for plane in 0..2 {
            for half in 0..2 {
                let high = columns(s, ahead, p.add(128 + 32 * plane + 16 * half), stride);
                for low in 0..2 {
                    let words = columns(s, ahead, p.add(64 * plane + 32 * low + 16 * half), stride);
                    for c in 0..4 {
                        let group = panel.codes.add((4 * plane + low) * CODE_BYTES);
                        let at = group.add((4 * half + c) * 64);
                        // Two bits each for groups low and low + 2.
                        let bits = if low == 0 { high[c] } else { s.shr::<2>(high[c]) };
                        let first = s.shl::<4>(s.and(bits, 0x0303_0303));
                        let third = s.and(bits, 0x3030_3030);
                        s.store_i32(s.or(s.and(words[c], NIBBLES), first), at);
                        let upper = s.and(s.shr::<4>(words[c]), NIBBLES);
                        s.store_i32(s.or(upper, third), at.add(2 * CODE_BYTES));
                    }
                }
            }
        }
    }
}

/// Codes of Q3_K: two bits as in Q2_K, and a plane with the third bits of all groups.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn q3_k_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        two_bits(s, ahead, p.add(32), stride, panel.codes);
        for half in 0..2 {
            for (c, mut thirds) in columns(s, ahead, p.add(16 * half), stride).into_iter().enumerate() {
                for g in 0..8 {
                    let at = panel.codes.add(g * CODE_BYTES + (4 * half + c) * 64);
                    let third = s.shl::<2>(s.and(thirds, 0x0101_0101));
                    s.store_i32(s.or(s.load_i32(at), third), at);
                    thirds = s.shr::<1>(thirds);
                }
            }
        }
    }
}

/// Codes of TQ1_0: five trits a byte, the last four bytes with four.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn tq1_0_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        for part in 0..2 {
            for (c, word) in columns(s, ahead, p.add(16 * part), stride).into_iter().enumerate() {
                trits::<S, 5>(s, word, panel.codes.add((4 * part + c) * 64), CODE_BYTES);
            }
        }
        for (c, word) in columns(s, ahead, p.add(32), stride).into_iter().enumerate() {
            trits::<S, 5>(s, word, panel.codes.add(5 * CODE_BYTES + c * 64), CODE_BYTES / 2);
        }
        // Bytes 48..52: two bytes off a load that ends with the block.
        let last = columns(s, ahead, p.add(38), stride);
        let last = s.or(s.shr::<16>(last[2]), s.shl::<16>(last[3]));
        trits::<S, 4>(s, last, panel.codes.add(7 * CODE_BYTES + CODE_BYTES / 2), 64);
    }
}

/// Codes of NVFP4: E2M1 nibbles in blocks of 16.
///
/// # Safety
/// * As [`codes`].
#[inline(always)]
unsafe fn nvfp4_codes<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract; every offset lies in the format's block.
    unsafe {
        for g in 0..2 {
            for (w, word) in columns(s, ahead, p.add(4 + 16 * g), stride).into_iter().enumerate() {
                let at = panel.codes.add(g * CODE_BYTES + (w / 2 * 4 + w % 2) * 64);
                let (low, high) = two_nibbles(s, word);
                s.store_i32(s.lookup(low, &E2M1_CODES), at);
                s.store_i32(s.lookup(high, &E2M1_CODES), at.add(128));
            }
        }
    }
}

/// Scale `i` of the block.
///
/// # Safety
/// * The panel has room for it.
#[inline(always)]
pub(super) unsafe fn scale<S: Simd>(s: S, panel: Panel, i: usize, v: S::F) {
    // SAFETY: by this function's contract.
    s.store(v, unsafe { &mut *panel.scale.add(i) });
}

/// Offset `i` of the block.
///
/// # Safety
/// * The panel has room for it.
#[inline(always)]
unsafe fn offset<S: Simd>(s: S, panel: Panel, i: usize, v: S::F) {
    // SAFETY: by this function's contract.
    s.store(v, unsafe { &mut *panel.offset.add(i) });
}

/// 16 bytes of nibbles: low ones are weights 0..16, high ones 16..32.
///
/// # Safety
/// * A group's codes are writable.
#[inline(always)]
unsafe fn nibbles<S: Simd>(s: S, words: [S::I; 4], codes: *mut u8, map: impl Fn(S::I) -> S::I) {
    for (c, word) in words.into_iter().enumerate() {
        // SAFETY: words 0..8 of the group's codes.
        unsafe {
            s.store_i32(map(s.and(word, NIBBLES)), codes.add(c * 64));
            s.store_i32(map(s.and(s.shr::<4>(word), NIBBLES)), codes.add((4 + c) * 64));
        }
    }
}

/// The same with a fifth bit per weight, weight `i` at bit `i`.
///
/// # Safety
/// * A group's codes are writable.
#[inline(always)]
unsafe fn nibbles_and_fifth<S: Simd>(s: S, words: [S::I; 4], mut fifth: S::I, codes: *mut u8) {
    // SAFETY: words 0..8 of the group's codes.
    unsafe {
        nibbles(s, words, codes, |v| v);
        for c in 0..8 {
            let spread = spread_bits(s, fifth);
            let at = codes.add(c * 64);
            s.store_i32(s.or(s.load_i32(at), s.shl::<4>(spread)), at);
            fifth = s.shr::<4>(fifth);
        }
    }
}

/// Scales and offsets of Q4_K and Q5_K: the block's first 16 bytes are d, dmin and the packed 6-bit pairs.
///
/// # Safety
/// * As [`scales`].
#[inline(always)]
unsafe fn scales_and_mins<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, panel: Panel) {
    // SAFETY: by this function's contract.
    unsafe {
        let [head, a, b, c] = columns(s, ahead, p, stride);
        let d = s.low_f16(head);
        let dmin = s.sub(s.splat(0.0), s.low_f16(s.shr::<16>(head)));
        // Four sub-blocks a word: the first four plain, the others' top bits above them.
        let scales = [s.and(a, 0x3f3f_3f3f), s.or(s.and(c, NIBBLES), s.and(s.shr::<2>(a), 0x3030_3030))];
        let mins =
            [s.and(b, 0x3f3f_3f3f), s.or(s.and(s.shr::<4>(c), NIBBLES), s.and(s.shr::<2>(b), 0x3030_3030))];
        for part in 0..2 {
            let (mut six, mut min) = (scales[part], mins[part]);
            for i in 0..4 {
                scale(s, panel, 4 * part + i, s.mul(d, s.i32_to_f32(s.and(six, 0xff))));
                offset(s, panel, 4 * part + i, s.mul(dmin, s.i32_to_f32(s.and(min, 0xff))));
                (six, min) = (s.shr::<8>(six), s.shr::<8>(min));
            }
        }
    }
}

/// The low and the high nibble of each byte.
#[inline(always)]
fn two_nibbles<S: Simd>(s: S, word: S::I) -> (S::I, S::I) {
    (s.and(word, NIBBLES), s.and(s.shr::<4>(word), NIBBLES))
}

/// Eight groups of 2-bit codes: quant's `bits::unpack_2bit`.
///
/// # Safety
/// * 64 bytes are readable at each `p + i·stride`; the codes of eight groups are writable.
#[inline(always)]
unsafe fn two_bits<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, codes: *mut u8) {
    for part in 0..4 {
        // SAFETY: by this function's contract.
        unsafe {
            for (c, mut word) in columns(s, ahead, p.add(16 * part), stride).into_iter().enumerate() {
                for g in 0..4 {
                    let at = codes.add((part / 2 * 4 + g) * CODE_BYTES + (part % 2 * 4 + c) * 64);
                    s.store_i32(s.and(word, 0x0303_0303), at);
                    word = s.shr::<2>(word);
                }
            }
        }
    }
}

/// `N` trits of each byte, the codes of trit `n` at `codes + n·step`.
///
/// # Safety
/// * 64 bytes are writable at each.
#[inline(always)]
unsafe fn trits<S: Simd, const N: usize>(s: S, word: S::I, codes: *mut u8, step: usize) {
    // Bytes as 16-bit numbers, which their threefold fits into.
    const BYTES: u32 = 0x00ff_00ff;
    let mut parts = [s.and(word, BYTES), s.and(s.shr::<8>(word), BYTES)];
    for n in 0..N {
        let mut trits = parts;
        for i in 0..2 {
            let times3 = s.add_i32(parts[i], s.add_i32(parts[i], parts[i]));
            // The whole part of the threefold is the trit, its fraction the byte of the next.
            trits[i] = s.and(s.shr::<8>(times3), BYTES);
            parts[i] = s.and(times3, BYTES);
        }
        // SAFETY: by this function's contract.
        unsafe { s.store_i32(s.or(trits[0], s.shl::<8>(trits[1])), codes.add(n * step)) };
    }
}

/// The low four bits of each lane, one per byte, as quant's `bits::spread_bits`: the product puts bit `i` at
/// `7i + i`, and no two terms meet.
#[inline(always)]
pub(super) fn spread_bits<S: Simd>(s: S, bits: S::I) -> S::I {
    s.and(s.mul_i32(s.and(bits, 0xf), 0x0020_4081), 0x0101_0101)
}

/// The four 2-bit fields of each lane's low byte, one per byte, as quant's `bits::spread_pairs`.
#[inline(always)]
pub(super) fn spread_pairs<S: Simd>(s: S, pairs: S::I) -> S::I {
    let nibbles = s.and(s.or(s.and(pairs, 0xff), s.shl::<12>(pairs)), 0x000f_000f);
    s.and(s.or(nibbles, s.shl::<6>(nibbles)), 0x0303_0303)
}
