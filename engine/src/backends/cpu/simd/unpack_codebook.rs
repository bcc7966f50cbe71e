//! Vector unpackers of the formats with codebooks (IQ1, IQ2, IQ3), 16 rows at a time.
//!
//! Three steps over a whole block, because a lookup by narrow stores must be over before wide loads follow: indices
//! and signs are brought to columns, [`Simd::codewords`] looks all entries up, signs or shifts are applied.

use quant::FormatId;

use super::codebook::{Codebook, IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
use super::panel::{Ahead, CODE_BYTES, Panel, columns};
use super::unpack_blocks::{NIBBLES, scale, spread_bits, spread_pairs};
use super::vector::Simd;

/// Whether [`block`] knows the format.
pub(super) const fn knows(id: FormatId) -> bool {
    use FormatId::*;
    matches!(id, IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S)
}

/// Columns of a block: words of all 16 rows.
type Columns<const N: usize> = [[u8; 64]; N];

/// One block of each of 16 rows into `panel`, which points at the block's first group.
///
/// # Safety
/// * A block of a format that this module [`knows`] is readable at each `p + i·stride`.
/// * `panel` has room for the block's groups.
#[inline(always)]
pub(super) unsafe fn block<S: Simd>(
    s: S,
    id: FormatId,
    p: *const u8,
    stride: usize,
    panel: Panel,
    ahead: &mut Ahead,
) {
    // Four indices a word: their low bytes, and what is above them.
    let (mut low, mut high): (Columns<16>, Columns<16>) = ([[0; 64]; 16], [[0; 64]; 16]);
    // Per group: a sign bit per weight; for IQ1 the direction of the shift at bit 4l + 3 for each eight weights.
    let mut marks: Columns<8> = [[0; 64]; 8];
    // SAFETY: every offset below lies in the format's block (the layouts are in quant's files), every column is 64
    // bytes, and the high parts are masked to what the codebook has.
    unsafe {
        match id {
            FormatId::IQ3_XXS => {
                words(s, ahead, p.add(2), stride, &mut low);
                let d = s.gather_f16(p, stride);
                for part in 0..2 {
                    let tails = columns(s, ahead, p.add(66 + 16 * part), stride);
                    for (i, tail) in tails.into_iter().enumerate() {
                        let g = 4 * part + i;
                        let four_bits = s.i32_to_f32(s.shr::<28>(tail));
                        scale(s, panel, g, s.mul(s.mul(d, s.add(s.splat(0.5), four_bits)), s.splat(0.5)));
                        put(s, signs_of_28_bits(s, tail), &mut marks[g]);
                    }
                }
                look_up(s, &IQ3_XXS, &low, &high, 16, panel.codes);
                signs(s, &marks, panel.codes);
            }
            FormatId::IQ3_S => {
                words(s, ahead, p.add(2), stride, &mut low);
                words(s, ahead, p.add(74), stride, &mut marks);
                let d = s.gather_f16(p, stride);
                let [mut tops, mut more_tops, ..] = columns(s, ahead, p.add(66), stride);
                let mut four_bits = columns(s, ahead, p.add(94), stride)[3];
                for i in 0..8 {
                    put(s, spread_bits(s, tops), &mut high[i]);
                    put(s, spread_bits(s, more_tops), &mut high[8 + i]);
                    (tops, more_tops) = (s.shr::<4>(tops), s.shr::<4>(more_tops));
                    let n = s.i32_to_f32(s.and(four_bits, 0xf));
                    scale(s, panel, i, s.mul(d, s.add(s.add(n, n), s.splat(1.0))));
                    four_bits = s.shr::<4>(four_bits);
                }
                look_up(s, &IQ3_S, &low, &high, 16, panel.codes);
                signs(s, &marks, panel.codes);
            }
            FormatId::IQ2_XXS => {
                let d = s.gather_f16(p, stride);
                for part in 0..4 {
                    let pair = columns(s, ahead, p.add(2 + 16 * part), stride);
                    for i in 0..2 {
                        let (g, tail) = (2 * part + i, pair[2 * i + 1]);
                        put(s, pair[2 * i], &mut low[g]);
                        put(s, signs_of_28_bits(s, tail), &mut marks[g]);
                        let four_bits = s.i32_to_f32(s.shr::<28>(tail));
                        scale(s, panel, g, s.mul(s.mul(d, s.add(s.splat(0.5), four_bits)), s.splat(0.25)));
                    }
                }
                look_up(s, &IQ2_XXS, &low, &high, 8, panel.codes);
                signs(s, &marks, panel.codes);
            }
            FormatId::IQ2_XS => {
                let d = s.gather_f16(p, stride);
                for part in 0..4 {
                    let pair = columns(s, ahead, p.add(2 + 16 * part), stride);
                    for i in 0..2 {
                        let (g, a, b) = (2 * part + i, pair[2 * i], pair[2 * i + 1]);
                        // Two indices of nine bits a word, each followed by seven signs.
                        let first = s.or(s.and(a, 0xff), s.and(s.shr::<8>(a), 0xff00));
                        let last =
                            s.or(s.and(s.shl::<16>(b), 0x00ff_0000), s.and(s.shl::<8>(b), 0xff00_0000));
                        put(s, s.or(first, last), &mut low[g]);
                        let first = s.or(s.and(s.shr::<8>(a), 1), s.and(s.shr::<16>(a), 0x100));
                        let last = s.or(s.and(s.shl::<8>(b), 0x0001_0000), s.and(b, 0x0100_0000));
                        put(s, s.or(first, last), &mut high[g]);
                        let first = s.or(s.and(s.shr::<9>(a), 0x7f), s.and(s.shr::<17>(a), 0x7f00));
                        let last = s.or(s.and(s.shl::<7>(b), 0x007f_0000), s.and(s.shr::<1>(b), 0x7f00_0000));
                        put(s, with_parity(s, s.or(first, last)), &mut marks[g]);
                    }
                }
                let [.., a, b] = columns(s, ahead, p.add(58), stride);
                quarter_scales(s, panel, d, [a, b]);
                look_up(s, &IQ2_XS, &low, &high, 8, panel.codes);
                signs(s, &marks, panel.codes);
            }
            FormatId::IQ2_S => {
                words(s, ahead, p.add(2), stride, &mut low[..8]);
                words(s, ahead, p.add(34), stride, &mut marks);
                let [tops, more_tops, a, b] = columns(s, ahead, p.add(66), stride);
                quarter_scales(s, panel, s.gather_f16(p, stride), [a, b]);
                for (tops, high) in [tops, more_tops].into_iter().zip(high.chunks_exact_mut(4)) {
                    put(s, spread_pairs(s, tops), &mut high[0]);
                    put(s, spread_pairs(s, s.shr::<8>(tops)), &mut high[1]);
                    put(s, spread_pairs(s, s.shr::<16>(tops)), &mut high[2]);
                    put(s, spread_pairs(s, s.shr::<24>(tops)), &mut high[3]);
                }
                look_up(s, &IQ2_S, &low, &high, 8, panel.codes);
                signs(s, &marks, panel.codes);
            }
            FormatId::IQ1_S => {
                words(s, ahead, p.add(2), stride, &mut low[..8]);
                let d = s.gather_f16(p, stride);
                for (i, pair) in columns(s, ahead, p.add(34), stride).into_iter().enumerate() {
                    for (g, h) in [(2 * i, pair), (2 * i + 1, s.shr::<16>(pair))] {
                        let first = s.or(s.and(h, 7), s.and(s.shl::<5>(h), 0x700));
                        let last =
                            s.or(s.and(s.shl::<10>(h), 0x0007_0000), s.and(s.shl::<15>(h), 0x0700_0000));
                        put(s, s.or(first, last), &mut high[g]);
                        put(s, s.mul_i32(s.and(s.shr::<15>(h), 1), 0x8888), &mut marks[g]);
                        let step = odd(s, s.shr::<12>(h));
                        scale(s, panel, g, s.mul(s.mul(d, step), s.splat(0.125)));
                    }
                }
                shifted(s, &low, &high, &marks, panel.codes);
            }
            FormatId::IQ1_M => {
                words(s, ahead, p, stride, &mut low[..8]);
                for (i, pair) in columns(s, ahead, p.add(32), stride).into_iter().enumerate() {
                    for (g, h) in [(2 * i, pair), (2 * i + 1, s.shr::<16>(pair))] {
                        let first = s.or(s.and(h, 7), s.and(s.shl::<4>(h), 0x700));
                        let last =
                            s.or(s.and(s.shl::<8>(h), 0x0007_0000), s.and(s.shl::<12>(h), 0x0700_0000));
                        put(s, s.or(first, last), &mut high[g]);
                        put(s, h, &mut marks[g]);
                    }
                }
                // The half is spread over the top bits of four 16-bit words.
                let [.., a, b] = columns(s, ahead, p.add(40), stride);
                let d = s.or(
                    s.or(s.and(s.shr::<12>(a), 0xf), s.and(s.shr::<24>(a), 0xf0)),
                    s.or(s.and(s.shr::<4>(b), 0xf00), s.and(s.shr::<16>(b), 0xf000)),
                );
                let d = s.low_f16(d);
                for (w, mut bits) in [a, s.shr::<16>(a), b, s.shr::<16>(b)].into_iter().enumerate() {
                    for i in 0..4 {
                        scale(s, panel, 4 * w + i, s.mul(s.mul(d, odd(s, bits)), s.splat(0.125)));
                        bits = s.shr::<3>(bits);
                    }
                }
                shifted(s, &low, &high, &marks, panel.codes);
            }
            _ => unreachable!("no codebook of {id}"),
        }
    }
}

/// [`Simd::codewords`] of the first `n` columns of indices: their low bytes, and what is above them.
///
/// # Safety
/// * `4·64·n·WORDS` bytes are writable at `out`, and every byte of `high` is below `PAGES`.
#[inline(always)]
unsafe fn look_up<S: Simd, const PAGES: usize, const WORDS: usize>(
    s: S,
    book: &'static Codebook<PAGES, WORDS>,
    low: &Columns<16>,
    high: &Columns<16>,
    n: usize,
    out: *mut u8,
) {
    assert!(n <= 16, "{n} columns of 16");
    // SAFETY: by this function's contract; the first `n` columns are there, and `out` is no part of them.
    unsafe { s.codewords(book, low.as_flattened().as_ptr(), high.as_flattened().as_ptr(), n, out) }
}

/// Stores a column.
#[inline(always)]
fn put<S: Simd>(s: S, v: S::I, column: &mut [u8; 64]) {
    // SAFETY: a column is 64 bytes.
    unsafe { s.store_i32(v, column.as_mut_ptr()) }
}

/// Consecutive words of each row; a multiple of four.
///
/// # Safety
/// * `4·out.len()` bytes are readable at each `p + i·stride`.
#[inline(always)]
unsafe fn words<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize, out: &mut [[u8; 64]]) {
    for (part, out) in out.chunks_exact_mut(4).enumerate() {
        // SAFETY: by this function's contract.
        let words = unsafe { columns(s, ahead, p.add(16 * part), stride) };
        for (word, column) in words.into_iter().zip(out) {
            put(s, word, column);
        }
    }
}

/// `2·n + 1` of the low three bits.
#[inline(always)]
fn odd<S: Simd>(s: S, n: S::I) -> S::F {
    let n = s.i32_to_f32(s.and(n, 7));
    s.add(s.add(n, n), s.splat(1.0))
}

/// Two scales a group: `d · (nibble + 1/2) / 4`.
///
/// # Safety
/// * The panel has room for 16 scales.
#[inline(always)]
unsafe fn quarter_scales<S: Simd>(s: S, panel: Panel, d: S::F, words: [S::I; 2]) {
    for (w, mut word) in words.into_iter().enumerate() {
        for i in 0..8 {
            let nibble = s.i32_to_f32(s.and(word, 0xf));
            let step = s.mul(s.mul(d, s.add(s.splat(0.5), nibble)), s.splat(0.25));
            // SAFETY: by this function's contract.
            unsafe { scale(s, panel, 8 * w + i, step) };
            word = s.shr::<4>(word);
        }
    }
}

/// Four times 7 sign bits as 32, as quant's `signs_of_28_bits`.
#[inline(always)]
fn signs_of_28_bits<S: Simd>(s: S, packed: S::I) -> S::I {
    let first = s.or(s.and(packed, 0x7f), s.and(s.shl::<1>(packed), 0x7f00));
    let last = s.or(s.and(s.shl::<2>(packed), 0x007f_0000), s.and(s.shl::<3>(packed), 0x7f00_0000));
    with_parity(s, s.or(first, last))
}

/// Bit 7 of each byte (clear before) becomes the parity of the others: the number of signs is even.
#[inline(always)]
fn with_parity<S: Simd>(s: S, seven: S::I) -> S::I {
    const PARITY: [u8; 16] = {
        let mut table = [0; 16];
        let mut i = 0u32;
        while i < 16 {
            table[i as usize] = (i.count_ones() % 2) as u8;
            i += 1;
        }
        table
    };
    // The parity of a byte is that of its halves' parities together.
    let halves = s.xor_i32(s.and(seven, NIBBLES), s.and(s.shr::<4>(seven), NIBBLES));
    s.or(seven, s.shl::<7>(s.lookup(halves, &PARITY)))
}

/// Magnitudes to biased codes by a sign bit per weight, as quant's `signed_codes`.
///
/// # Safety
/// * The codes of eight groups are readable and writable.
#[inline(always)]
unsafe fn signs<S: Simd>(s: S, marks: &Columns<8>, codes: *mut u8) {
    for (g, column) in marks.iter().enumerate() {
        // SAFETY: a column is 64 bytes; the codes by this function's contract.
        unsafe {
            let mut signs = s.load_i32(column.as_ptr());
            for c in 0..8 {
                let at = codes.add(g * CODE_BYTES + c * 64);
                let mask = s.mul_i32(spread_bits(s, signs), 0x7f);
                // `(v ^ 127) - 127` is `-v`; with the bias added no byte borrows from its neighbour.
                let flipped = s.xor_i32(s.load_i32(at), mask);
                s.store_i32(s.sub_i32(s.add_i32(flipped, s.all_i32(0x4040_4040)), mask), at);
                signs = s.shr::<4>(signs);
            }
        }
    }
}

/// IQ1's codes: `8 · level`, plus two where the shift is up.
///
/// # Safety
/// * The codes of eight groups are writable; high parts are below 8.
#[inline(always)]
unsafe fn shifted<S: Simd>(s: S, low: &Columns<16>, high: &Columns<16>, marks: &Columns<8>, codes: *mut u8) {
    let mut levels: Columns<32> = [[0; 64]; 32];
    // SAFETY: columns are 64 bytes; eight of indices give 32 of levels; the codes by this function's contract.
    unsafe {
        let out = levels.as_flattened_mut().as_mut_ptr();
        look_up(s, &IQ1, low, high, 8, out);
        for (g, column) in marks.iter().enumerate() {
            let mut marks = s.load_i32(column.as_ptr());
            for l in 0..4 {
                let at = codes.add(g * CODE_BYTES + 2 * l * 64);
                let levels = s.load_i32(levels[4 * g + l].as_ptr());
                let shift = s.xor(s.mul_i32(s.and(s.shr::<3>(marks), 1), 0x0202_0202), 0x0202_0202);
                s.store_i32(s.or(s.and(s.shl::<3>(levels), 0x1818_1818), shift), at);
                s.store_i32(s.or(s.and(s.shr::<1>(levels), 0x1818_1818), shift), at.add(64));
                marks = s.shr::<4>(marks);
            }
        }
    }
}
