//! IQ1_M: 256 weights in 16 sub-blocks of 16, 56 bytes, 1.75 bits per weight.
//!
//! ```text
//! byte 0..32   qs      per eight weights the low 8 bits of the codebook index
//! byte 32..48  qh      per eight weights 4 bits: top 3 bits of the index, sign of the shift
//! byte 48..56  scales  four 16-bit words: four 3-bit sub-block scales, the first lowest, and in the top
//!                      4 bits a quarter of the f16 scale d, the lowest first
//! ```
//! `w = d * (2*scale + 1) * (level ± 1/8)`, as in IQ1_S but with a shift per eight weights.
//!
//! Relative RMS error 0.575 on normal weights.

use bytemuck::{Pod, Zeroable};

use super::iq1_s::{BIAS, CODE_MAX, Octet, VALUES, ascending, codes, levels_by_rank, snap_all};
use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::IQ1;
use crate::codebook::fit::{SUPER, odd_multiple};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    qs: [u8; 32],
    qh: [u8; 16],
    scales: [u8; 8],
}

const _: () = assert!(size_of::<Block>() == 56);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ1_M;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = BIAS;
    const CODE_MAX: u8 = CODE_MAX;
    const SCALE_ELEMS: usize = 16;
    const BOOK: Book = Book::Words(IQ1);
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let words = u64::from_le_bytes(self.scales);
        let d = (words >> 12) & 0xf | (words >> 24) & 0xf0 | (words >> 36) & 0xf00 | (words >> 48) & 0xf000;
        let d = f16_to_f32(d as u16);
        let low = word(&self.qs, g);
        let high = u16::from_le_bytes([self.qh[2 * g], self.qh[2 * g + 1]]) as u32;
        let all = core::array::from_fn(|i| {
            let l = i / 2;
            let top = high >> (4 * l);
            codes(((low >> (8 * l)) & 0xff | (top & 7) << 8) as usize, top >> 3 & 1, lookup)[i % 2]
        });
        let packed = (words >> (16 * (g / 2) + 6 * (g % 2))) as u32;
        let scale = [0, 3].map(|shift| d * (2 * (packed >> shift & 7) + 1) as f32 * 0.125);
        Group { codes: all, scale, offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        for (n, (x, block)) in src.chunks_exact(SUPER).zip(out).enumerate() {
            *block = encode(x, importance.map(|importance| &importance[SUPER * n..][..SUPER]));
        }
    }
}

/// The values of half `half` (0, 1) of a sub-block, where bit 1 of `shifts` says that the first half is shifted down
/// and bit 0 that the second is.
fn values(shifts: usize, half: usize) -> &'static [f32; 3] {
    &VALUES[(shifts >> (1 - half)) & 1]
}

/// What the search over the splits of a sub-block found.
struct Split {
    at: (usize, usize),
    scale: f32,
    shifts: usize,
}

/// As in IQ1_S, all pairs of cuts through the sorted weights. Neighbouring values differ by 1, so the sum over the
/// three parts is `total * v[2] - prefix(i) - prefix(j)`; it is kept for each half, because their shifts differ.
fn best_split(x: &[f32], weight: &[f32; 16], order: &[u8; 16]) -> Option<Split> {
    let mut sum_x = [[0.0f32; 17]; 2];
    let mut sum_w = [[0.0f32; 17]; 2];
    for (j, &i) in order.iter().enumerate() {
        let i = i as usize;
        for half in 0..2 {
            let mine = i / 8 == half;
            sum_x[half][j + 1] = if mine { sum_x[half][j] + weight[i] * x[i] } else { sum_x[half][j] };
            sum_w[half][j + 1] = if mine { sum_w[half][j] + weight[i] } else { sum_w[half][j] };
        }
    }
    let squares = VALUES.map(|v| (v[0] * v[0] - v[1] * v[1], v[1] * v[1] - v[2] * v[2]));
    let mut best_score = -f32::MAX;
    let mut best = None;
    for i in 0..=16 {
        for j in i..=16 {
            let mut qx = [[0.0f32; 2]; 2];
            let mut q2 = [[0.0f32; 2]; 2];
            for half in 0..2 {
                let (px, pw) = (&sum_x[half], &sum_w[half]);
                let both = px[i] + px[j];
                for direction in 0..2 {
                    let v = VALUES[direction][2];
                    qx[half][direction] = px[16] * v - both;
                    q2[half][direction] =
                        pw[16] * v * v + pw[i] * squares[direction].0 + pw[j] * squares[direction].1;
                }
            }
            for shifts in 0..4 {
                let qx = qx[0][shifts >> 1] + qx[1][shifts & 1];
                let q2 = q2[0][shifts >> 1] + q2[1][shifts & 1];
                if q2 > 0.0 && qx * qx > best_score * q2 {
                    let scale = qx / q2;
                    best_score = scale * qx;
                    best = Some(Split { at: (i, j), scale, shifts });
                }
            }
        }
    }
    best
}

/// A fitted sub-block.
#[derive(Clone, Copy, Default)]
struct SubBlock {
    entries: [u16; 2],
    shifts: usize,
    scale: f32,
}

/// Half `half` of a sub-block of 16, under these shifts.
fn octet<'a>(x: &'a [f32], weight: &'a [f32], shifts: usize, half: usize) -> Octet<'a> {
    let part = 8 * half..8 * half + 8;
    Octet { x: &x[part.clone()], weight: &weight[part], values: values(shifts, half) }
}

fn fit_sub_block(x: &[f32; 16], weight: &[f32; 16]) -> Option<SubBlock> {
    let order = ascending::<16>(x);
    let Split { at, scale, shifts } = best_split(x, weight, &order)?;
    // A negative scale is the same as mirrored levels and the opposite shifts.
    let mirror = scale < 0.0;
    let levels = levels_by_rank(&order, at, mirror);
    let shifts = if mirror { 3 - shifts } else { shifts };
    let (entries, scale) = snap_all(|half| octet(x, weight, shifts, half), &levels, scale.abs());
    Some(SubBlock { entries, shifts, scale })
}

fn encode(x: &[f32], columns: Option<&[f32]>) -> Block {
    let sigma2 = 2.0 * sum_of_squares(x) / SUPER as f32;
    let weights: [f32; SUPER] = match columns {
        Some(columns) => core::array::from_fn(|i| importance_weight(columns[i], sigma2, x[i])),
        None => core::array::from_fn(|i| x[i] * x[i]),
    };
    let parts = || x.as_chunks::<16>().0.iter().zip(weights.as_chunks::<16>().0);
    let mut fits = [SubBlock::default(); 16];
    let mut max_scale = 0.0f32;
    for (fit, (x, weight)) in fits.iter_mut().zip(parts()) {
        if x.iter().all(|v| v.abs() < 1e-7) {
            continue;
        }
        *fit = fit_sub_block(x, weight).unwrap_or_default();
        max_scale = if max_scale > fit.scale { max_scale } else { fit.scale };
    }
    let mut block = Block::zeroed();
    if max_scale == 0.0 {
        return block;
    }

    let mut d = max_scale / 15.0;
    let inverse = 1.0 / d;
    let mut words = [0u16; 4];
    let mut sums = (0.0, 0.0);
    for (ib, (fit, (x, weight))) in fits.iter().zip(parts()).enumerate() {
        let code = odd_multiple(inverse, fit.scale, 7);
        words[ib / 4] |= (code as u16) << (3 * (ib % 4));
        for (half, &entry) in fit.entries.iter().enumerate() {
            octet(x, weight, fit.shifts, half).add_sums(&mut sums, entry, (2 * code + 1) as f32);
            let minus = (fit.shifts >> (1 - half)) & 1;
            block.qs[2 * ib + half] = entry as u8;
            block.qh[ib] |= ((entry >> 8) as u8 | (minus << 3) as u8) << (4 * half);
        }
    }
    // With the codes of all scales known, the best common factor.
    if sums.1 > 0.0 {
        d = sums.0 / sums.1;
    }
    // The factor lowers the error a little on average (found by ggml's author by trial).
    let d = f32_to_f16(d * 1.1125);
    for (i, (bytes, word)) in block.scales.chunks_exact_mut(2).zip(words).enumerate() {
        bytes.copy_from_slice(&(word | ((d >> (4 * i)) & 0xf) << 12).to_le_bytes());
    }
    block
}
