//! IQ1_S: 256 weights in 8 sub-blocks of 32, 50 bytes, 1.5625 bits per weight.
//!
//! ```text
//! byte 0..2    d    f16 scale
//! byte 2..34   qs   per eight weights the low 8 bits of the codebook index
//! byte 34..50  qh   per sub-block 16 bits: four times the top 3 bits of the index, 3 bits of scale, the sign
//!                   of the shift
//! ```
//! `w = d * (2*scale + 1) * (level ± 1/8)`, `level` of -1, 0, 1 from the codebook. In the common form the code is
//! `8*level ± 1` and the scale an eighth; both are exact.
//!
//! Relative RMS error 0.523 on normal weights. Encoding needs an importance row, as in llama.cpp.

use bytemuck::{Pod, Zeroable};

use crate::bits::{f16_to_f32, f32_to_f16, word};
use crate::codebook::IQ1;
use crate::codebook::fit::{SUPER, closest, odd_multiple};
use crate::codebook::nearest::{Codebook, Iq1, Place, place};
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::{Book, Lookup};
use crate::search::{importance_weight, sum_of_squares};

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 2],
    qs: [u8; 32],
    qh: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 50);

/// What to subtract from the codes of [`codes`].
pub(super) const BIAS: i32 = 9;
/// Largest code of [`codes`].
pub(super) const CODE_MAX: u8 = 18;

/// Codes of eight weights, `minus` (0 or 1) saying that the shift is down.
#[inline(always)]
pub(super) fn codes<L: Lookup>(index: usize, minus: u32, lookup: L) -> [u32; 2] {
    let levels = lookup.word(IQ1, index);
    let shift = 0x0202_0202 * (1 - minus);
    [((levels << 3) & 0x1818_1818) + shift, ((levels >> 1) & 0x1818_1818) + shift]
}

impl BlockFormat for Block {
    const ID: FormatId = FormatId::IQ1_S;
    const ELEMS: usize = SUPER;
    const BIAS: i32 = BIAS;
    const CODE_MAX: u8 = CODE_MAX;
    const BOOK: Book = Book::Words(IQ1);
    const ENCODE: Encode = Encode::WithImportance;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group {
        let d = f16_to_f32(u16::from_le_bytes(self.d));
        let (low, high) =
            (word(&self.qs, g), u16::from_le_bytes([self.qh[2 * g], self.qh[2 * g + 1]]) as u32);
        let index = |l: usize| ((low >> (8 * l)) & 0xff | (high >> (3 * l) & 7) << 8) as usize;
        let all = core::array::from_fn(|i| codes(index(i / 2), high >> 15, lookup)[i % 2]);
        let scale = d * (2 * (high >> 12 & 7) + 1) as f32 * 0.125;
        Group { codes: all, scale: [scale; 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]) {
        let Some(importance) = importance else { return };
        for ((x, columns), block) in src.chunks_exact(SUPER).zip(importance.chunks_exact(SUPER)).zip(out) {
            *block = encode(x, columns);
        }
    }
}

/// The values of the three levels, in units of the scale, by direction of the shift: up, down.
pub(super) const VALUES: [[f32; 3]; 2] = [[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]];

/// Indices of `x` in ascending order of value, ties by index.
pub(super) fn ascending<const LEN: usize>(x: &[f32]) -> [u8; LEN] {
    let mut order: [u8; LEN] = core::array::from_fn(|i| i as u8);
    // Adding zero makes -0 and 0 equal; a total order keeps NaN harmless.
    let key = |i: u8| x[i as usize] + 0.0;
    order.sort_unstable_by(|&a, &b| key(a).total_cmp(&key(b)).then(a.cmp(&b)));
    order
}

/// Assigns levels by rank: below `split.0` the lowest, from `split.1` the highest; all mirrored if `mirror`.
pub(super) fn levels_by_rank<const LEN: usize>(
    order: &[u8; LEN],
    split: (usize, usize),
    mirror: bool,
) -> [u8; LEN] {
    let mut levels = [0; LEN];
    for (rank, &i) in order.iter().enumerate() {
        let level = (rank >= split.0) as u8 + (rank >= split.1) as u8;
        levels[i as usize] = if mirror { 2 - level } else { level };
    }
    levels
}

/// Eight weights on their way to an entry.
pub(super) struct Octet<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub values: &'static [f32; 3],
}

impl Octet<'_> {
    /// The entry for these levels, or the closest, and whether the levels had to be moved to get to it.
    pub fn snap(&self, levels: &[u8], scale: f32) -> (u16, bool) {
        match place::<Iq1>(levels) {
            Place::Entry(entry) => (entry as u16, false),
            Place::Between(candidates) => {
                let value = |level| self.values[level];
                (closest::<Iq1>(candidates, self.x, self.weight, scale, value) as u16, true)
            }
        }
    }

    /// Adds `sum(w*q*x)` and `sum(w*q*q)` of an entry to `sums`, `q` being the values times `factor`.
    pub fn add_sums(&self, sums: &mut (f32, f32), entry: u16, factor: f32) {
        let levels = Iq1::levels(entry as usize).to_le_bytes();
        for ((&x, &w), level) in self.x.iter().zip(self.weight).zip(levels) {
            let q = self.values[level as usize] * factor;
            sums.0 += w * q * x;
            sums.1 += w * q * q;
        }
    }
}

/// Entries for the parts of a sub-block, and the scale, fitted again if any part had to be moved.
pub(super) fn snap_all<'a, const PARTS: usize>(
    octet: impl Fn(usize) -> Octet<'a>,
    levels: &[u8],
    scale: f32,
) -> ([u16; PARTS], f32) {
    let mut moved = false;
    let entries = core::array::from_fn(|k| {
        let (entry, off) = octet(k).snap(&levels[8 * k..8 * k + 8], scale);
        moved |= off;
        entry
    });
    let mut sums = (0.0, 0.0);
    if moved {
        for (k, &entry) in entries.iter().enumerate() {
            octet(k).add_sums(&mut sums, entry, 1.0);
        }
    }
    (entries, if sums.0 > 0.0 && sums.1 > 0.0 { sums.0 / sums.1 } else { scale })
}

/// What the search over the splits of a sub-block found.
struct Split {
    at: (usize, usize),
    scale: f32,
    direction: usize,
}

/// With three levels the best assignment keeps the order of the weights, so two cuts through the sorted weights
/// describe it, and all 561 pairs of cuts are tried, for both directions of the shift, with prefix sums.
fn best_split(x: &[f32], weight: &[f32; 32], order: &[u8; 32]) -> Option<Split> {
    let mut sum_x = [0.0f32; 33];
    let mut sum_w = [0.0f32; 33];
    for (j, &i) in order.iter().enumerate() {
        let i = i as usize;
        sum_x[j + 1] = sum_x[j] + weight[i] * x[i];
        sum_w[j + 1] = sum_w[j] + weight[i];
    }
    let mut best_score = -f32::MAX;
    let mut best = None;
    for i in 0..=32 {
        for j in i..=32 {
            let part_x = [sum_x[i] - sum_x[0], sum_x[j] - sum_x[i], sum_x[32] - sum_x[j]];
            let part_w = [sum_w[i] - sum_w[0], sum_w[j] - sum_w[i], sum_w[32] - sum_w[j]];
            for (direction, v) in VALUES.iter().enumerate() {
                let qx = part_x[0] * v[0] + part_x[1] * v[1] + part_x[2] * v[2];
                let q2 = part_w[0] * v[0] * v[0] + part_w[1] * v[1] * v[1] + part_w[2] * v[2] * v[2];
                if q2 > 0.0 && qx * qx > best_score * q2 {
                    let scale = qx / q2;
                    best_score = scale * qx;
                    best = Some(Split { at: (i, j), scale, direction });
                }
            }
        }
    }
    best
}

/// A fitted sub-block.
struct SubBlock {
    entries: [u16; 4],
    direction: usize,
    scale: f32,
}

fn fit_sub_block(x: &[f32], weight: &[f32; 32]) -> Option<SubBlock> {
    let order = ascending::<32>(x);
    let Split { at, scale, direction } = best_split(x, weight, &order)?;
    // A negative scale is the same as mirrored levels and the opposite shift.
    let mirror = scale < 0.0;
    let levels = levels_by_rank(&order, at, mirror);
    let direction = if mirror { 1 - direction } else { direction };
    let octet = |k: usize| {
        let part = 8 * k..8 * k + 8;
        Octet { x: &x[part.clone()], weight: &weight[part], values: &VALUES[direction] }
    };
    let (entries, scale) = snap_all(octet, &levels, scale.abs());
    Some(SubBlock { entries, direction, scale })
}

fn encode(x: &[f32], columns: &[f32]) -> Block {
    let mut block = Block::zeroed();
    let sigma2 = 2.0 * sum_of_squares(x) / SUPER as f32;
    let mut scales = [0.0f32; 8];
    let mut heads = [0u16; 8];
    let mut max_scale = 0.0f32;
    for (ib, (x, columns)) in x.chunks_exact(32).zip(columns.chunks_exact(32)).enumerate() {
        if x.iter().all(|v| v.abs() < 1e-12) {
            continue;
        }
        let weight = core::array::from_fn(|i| importance_weight(columns[i], sigma2, x[i]));
        let Some(SubBlock { entries, direction, scale }) = fit_sub_block(x, &weight) else { continue };
        heads[ib] = (direction as u16) << 15;
        for (k, entry) in entries.iter().enumerate() {
            block.qs[4 * ib + k] = *entry as u8;
            heads[ib] |= (entry >> 8) << (3 * k);
        }
        scales[ib] = scale;
        max_scale = if max_scale > scale { max_scale } else { scale };
    }
    if max_scale == 0.0 {
        return Block::zeroed();
    }
    let d = max_scale / 15.0;
    // The factor lowers the error a little on average (found by ggml's author by trial).
    block.d = f32_to_f16(d * 1.125).to_le_bytes();
    for ((bytes, head), &scale) in block.qh.chunks_exact_mut(2).zip(heads).zip(&scales) {
        let head = head | (odd_multiple(1.0 / d, scale, 7) as u16) << 12;
        bytes.copy_from_slice(&head.to_le_bytes());
    }
    block
}
