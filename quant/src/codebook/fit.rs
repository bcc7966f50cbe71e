//! Fitting a sub-block to a codebook: the search the IQ2 and IQ3 encoders share.
//!
//! Wanted are a scale `s` and an entry per 8 (or 4) weights that minimise `sum(w * (x - s*q)^2)`, where
//! `q = 2*level + 1` stands in for the codebook's values. For given `q` the best scale is `sum(w*x*q) / sum(w*q*q)`, and what it
//! leaves of the error is smaller the larger `sum(w*x*q)^2 / sum(w*q*q)`. So: try a range of scales, round to levels,
//! snap to the codebook, keep the best. Every float operation and its order is ggml's (`ggml-quants.c`): encoded bytes
//! are equal to its.

use core::sync::atomic::Ordering;

use super::nearest::{Codebook, Place, entry, place};
use crate::bits::nearest_int;

/// Weights in a super-block.
pub(crate) const SUPER: usize = 256;

/// Largest value, by ggml's comparison (which differs from `f32::max` on NaN).
#[inline]
pub(crate) fn largest(x: &[f32]) -> f32 {
    x[1..].iter().fold(x[0], |max, &v| if max > v { max } else { v })
}

/// A sub-block split into magnitudes and signs.
pub(crate) struct Split<const LEN: usize> {
    /// Magnitudes; with even parity one per eight may be negative: the sign it had to give up.
    pub x: [f32; LEN],
    /// Sign bits, a byte per eight weights.
    pub signs: [u8; 4],
}

/// Takes the signs off. With `even`, where the number of minus signs in eight is odd, the sign of the weight that
/// matters least is dropped (the format has no bit for it).
pub(crate) fn split_signs<const LEN: usize>(x: &[f32], weight: &[f32; LEN], even: bool) -> Split<LEN> {
    let mut split = Split { x: [0.0; LEN], signs: [0; 4] };
    for (k, (x, weight)) in x.chunks_exact(8).zip(weight.chunks_exact(8)).enumerate() {
        let mut signs = 0u8;
        let out = &mut split.x[8 * k..8 * k + 8];
        for i in 0..8 {
            let keep = x[i] >= 0.0;
            out[i] = if keep { x[i] } else { -x[i] };
            signs |= (!keep as u8) << i;
        }
        if even && signs.count_ones() % 2 == 1 {
            let (mut least, mut min) = (0, weight[0] * x[0] * x[0]);
            for i in 1..8 {
                let harm = weight[i] * x[i] * x[i];
                if harm < min {
                    (least, min) = (i, harm);
                }
            }
            out[least] = -out[least];
            signs ^= 1 << least;
        }
        split.signs[k] = signs;
    }
    split
}

/// The entry of `candidates` with the least `sum(weight * (scale*value(level) - x)^2)`; the first of equals.
#[inline(always)]
pub(crate) fn closest<B: Codebook>(
    candidates: &[core::sync::atomic::AtomicU16],
    x: &[f32],
    weight: &[f32],
    scale: f32,
    value: impl Fn(usize) -> f32,
) -> usize {
    // Only LEVELS different terms per coordinate occur, so all are computed once and looked up.
    let mut terms = [[0.0f32; 8]; 8];
    for i in 0..B::DIM {
        for (level, term) in terms[i][..B::LEVELS].iter_mut().enumerate() {
            let diff = scale * value(level) - x[i];
            *term = weight[i] * diff * diff;
        }
    }
    let mut best = candidates[0].load(Ordering::Relaxed) as usize;
    let mut least = f32::MAX;
    for candidate in candidates {
        let candidate = candidate.load(Ordering::Relaxed) as usize;
        let levels = B::levels(candidate);
        let mut d2 = 0.0;
        for (i, terms) in terms[..B::DIM].iter().enumerate() {
            d2 += terms[(levels >> (8 * i)) as usize & 7];
        }
        if d2 < least {
            (best, least) = (candidate, d2);
        }
    }
    best
}

/// Rounds `DIM` values to levels at `inverse` scale and moves the point to an entry of the codebook. True if it was
/// one.
#[inline(always)]
fn snap<B: Codebook>(x: &[f32], root_weight: &[f32], inverse: f32, scale: f32, levels: &mut [u8]) -> bool {
    for (level, x) in levels.iter_mut().zip(x) {
        *level = nearest_int(0.5 * (inverse * x - 1.0)).clamp(0, B::LEVELS as i32 - 1) as u8;
    }
    match place::<B>(levels) {
        Place::Entry(_) => true,
        Place::Between(candidates) => {
            let entry = closest::<B>(candidates, x, root_weight, scale, |level| (2 * level + 1) as f32);
            levels.copy_from_slice(&B::levels(entry).to_le_bytes()[..B::DIM]);
            false
        }
    }
}

/// A range of scales to try: with `top = 2*LEVELS - 1` the largest `q`, the inverse scales are `(top + i*step) / max`
/// for `-count <= i <= count`.
#[derive(Clone, Copy)]
pub(crate) struct Tries {
    /// How many to either side.
    pub count: i32,
    /// Their distance.
    pub step: f32,
}

/// Which parts of eight (four) are snapped again at the scale finally found.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Resnap {
    /// Those that were not on the codebook, if any.
    OffGrid,
    /// All, if any was not on the codebook.
    AllIfAny,
    /// All.
    All,
}

/// The search over one sub-block of magnitudes.
pub(crate) struct Search<'a, const LEN: usize> {
    x: &'a [f32; LEN],
    weight: &'a [f32; LEN],
    root_weight: [f32; LEN],
    /// The best scale so far.
    pub scale: f32,
    /// Its levels, on the codebook.
    pub levels: [u8; LEN],
    on_grid: [bool; 8],
}

impl<'a, const LEN: usize> Search<'a, LEN> {
    /// Starts at `scale`, which stands if no try does better.
    pub fn new(x: &'a [f32; LEN], weight: &'a [f32; LEN], scale: f32) -> Self {
        let root_weight = weight.map(libm::sqrtf);
        Search { x, weight, root_weight, scale, levels: [0; LEN], on_grid: [true; 8] }
    }

    /// `sum(w*x*q)` and `sum(w*q*q)` at `levels`.
    #[inline(always)]
    fn sums(&self, levels: &[u8; LEN]) -> (f32, f32) {
        let (mut sum_qx, mut sum_q2) = (0.0, 0.0);
        for ((&w, &x), &level) in self.weight.iter().zip(self.x).zip(levels) {
            let q = (2 * level + 1) as f32;
            sum_qx += w * x * q;
            sum_q2 += w * q * q;
        }
        (sum_qx, sum_q2)
    }

    /// Tries the scales around `max / (2*LEVELS - 1)`, then refines the best.
    #[inline(always)]
    pub fn run<B: Codebook>(&mut self, max: f32, tries: Tries, resnap: Resnap) {
        let top = (2 * B::LEVELS - 1) as f32;
        let mut best = 0.0;
        if resnap == Resnap::AllIfAny {
            self.on_grid = [false; 8];
        }
        for i in -tries.count..=tries.count {
            let inverse = (top + i as f32 * tries.step) / max;
            let scale = 1.0 / inverse;
            let mut levels = [0u8; LEN];
            let mut on_grid = [true; 8];
            for (k, levels) in levels.chunks_exact_mut(B::DIM).enumerate() {
                let at = B::DIM * k..B::DIM * (k + 1);
                on_grid[k] = snap::<B>(&self.x[at.clone()], &self.root_weight[at], inverse, scale, levels);
            }
            let (sum_qx, sum_q2) = self.sums(&levels);
            if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
                self.scale = sum_qx / sum_q2;
                best = self.scale * sum_qx;
                self.levels = levels;
                self.on_grid = on_grid;
            }
        }
        let any_off = self.on_grid[..LEN / B::DIM].contains(&false);
        if self.scale > 0.0 && (any_off || resnap == Resnap::All) {
            let inverse = 1.0 / self.scale;
            let mut levels = self.levels;
            for (k, levels) in levels.chunks_exact_mut(B::DIM).enumerate() {
                if resnap == Resnap::OffGrid && self.on_grid[k] {
                    continue;
                }
                let at = B::DIM * k..B::DIM * (k + 1);
                snap::<B>(&self.x[at.clone()], &self.root_weight[at], inverse, self.scale, levels);
            }
            self.levels = levels;
            let (sum_qx, sum_q2) = self.sums(&self.levels);
            if sum_q2 > 0.0 {
                self.scale = sum_qx / sum_q2;
            }
        }
    }

    /// The result, given the signs that were split off.
    pub fn finish<B: Codebook>(&self, signs: [u8; 4]) -> Fit {
        let mut entries = [0; 8];
        for (out, levels) in entries.iter_mut().zip(self.levels.chunks_exact(B::DIM)) {
            *out = entry::<B>(levels) as u16;
        }
        if self.scale < 0.0 {
            // Only where dropped signs outweigh the rest. The formats have no sign of the scale, but one of each
            // weight.
            return Fit { scale: -self.scale, entries, signs: signs.map(|s| !s) };
        }
        Fit { scale: self.scale, entries, signs }
    }
}

/// A fitted sub-block.
pub(crate) struct Fit {
    /// Not negative.
    pub scale: f32,
    /// Entry numbers of its parts.
    pub entries: [u16; 8],
    /// Sign bits, a byte per eight weights.
    pub signs: [u8; 4],
}

/// Number `l` in `0..=max` for which `d * (2*l + 1)` is nearest to `scale`, given `1/d`.
#[inline]
pub(crate) fn odd_multiple(inverse_d: f32, scale: f32, max: i32) -> u8 {
    nearest_int(0.5 * (inverse_d * scale - 1.0)).clamp(0, max) as u8
}
