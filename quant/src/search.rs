//! Searches of the quantisers: the scale (and minimum) that lose least.
//!
//! A sub-block becomes integer codes `q` and one or two floats. Rounding against the range of the values is only a
//! first guess; a slightly wider or narrower range often has a smaller weighted error, because the weights that matter
//! (large, or important to the layer's output) then fall nearer to a code. Each search tries a fixed set of ranges,
//! rounds, solves the least-squares problem for the rounded codes, and keeps the best:
//!
//! * [`fit_affine`]    minimises `Σ w·(scale·q + min − x)²` (or `Σ w·|…|`) with `min ≤ 0`, `q` in `0..=code_max`;
//! * [`fit_symmetric`] maximises `(Σ w·x·q)² / Σ w·q²`, which is the same as minimising `Σ w·(scale·q − x)²` at the
//!   best scale, `q` in `−half..half`;
//! * [`fit_symmetric_descent`] the same with w = x², changing one code at a time;
//! * [`fit_positive`]  `Σ w·(scale·q − x)²` for `x ≥ 0`: the scales and minimums of a super-block.
//!
//! The set of tries, the order of each sum and each rounding are those of ggml's quantisers (`ggml-quants.c`), since
//! files must come out byte-equal; no operation here may be contracted to an fma.
//!
//! A sum in a fixed order cannot be vectorised, but the sub-blocks of a super-block are independent. So the searches
//! take `L` of them side by side, value `i` of sub-block `l` at `[i][l]`: every lane sums in the defined order, and the
//! compiler turns a step over the lanes into vector instructions.

use core::array::from_fn;

use crate::bits::nearest_int;

/// Below this largest magnitude a sub-block counts as zero (ggml's bound): far below the smallest f16 scale, and the sums
/// of squares would leave f32's range.
pub const ZERO_MAX: f32 = 1e-15;

/// `L` sub-blocks of `N` values, side by side.
pub type Lanes<const N: usize, const L: usize> = [[f32; L]; N];

/// Consecutive sub-blocks of `x`, side by side; lanes past its end are zero.
pub fn side_by_side<const N: usize, const L: usize>(x: &[f32]) -> Lanes<N, L> {
    from_fn(|i| from_fn(|l| x.get(N * l + i).copied().unwrap_or(0.0)))
}

/// Undoes [`side_by_side`]: the codes of lane after lane, as many as `out` takes.
pub fn in_sequence<const N: usize, const L: usize>(codes: &[[u8; L]; N], out: &mut [u8]) {
    for (l, out) in out.chunks_exact_mut(N).enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            *out = codes[i][l];
        }
    }
}

/// Importance-weighted error: `importance · √(σ² + x²)`.
///
/// The importance says how much an input column matters to the output; the root lets large weights count for more
/// without letting the small ones vanish (σ² is a mean square of the surroundings).
#[inline]
pub fn importance_weight(importance: f32, sigma2: f32, x: f32) -> f32 {
    importance * libm::sqrtf(sigma2 + x * x)
}

/// Σ x², in order.
#[inline]
pub fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, &v| sum + v * v)
}

/// Σ x, in order.
#[inline]
pub fn sum(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, &v| sum + v)
}

/// Rounds `(x + min) / scale` to codes `low..=high`, stored from 0: the last step after the scales themselves have been
/// rounded. Leaves `codes` as they are where the scale became zero.
#[inline]
pub fn round_to_codes<const N: usize>(
    x: &[f32; N],
    scale: f32,
    min: f32,
    low: i32,
    high: i32,
    codes: &mut [u8; N],
) {
    if scale == 0.0 {
        return;
    }
    let mut rounded = [0i32; N];
    for (q, &x) in rounded.iter_mut().zip(x) {
        *q = nearest_int((x + min) / scale).clamp(low, high) - low;
    }
    *codes = rounded.map(|q| q as u8);
}

/// `v` within `low..=high`; `low` for NaN. One instruction per side, unlike `f32::clamp`.
#[inline(always)]
fn clamp(v: f32, low: f32, high: f32) -> f32 {
    let v = if v > low { v } else { low };
    if v < high { v } else { high }
}

/// [`nearest_int`] as a float, for values known to be in its range: beside 1.5·2^23 an f32 has no fraction bits left.
#[inline(always)]
fn round_in_range(v: f32) -> f32 {
    (v + 12_582_912.0) - 12_582_912.0
}

/// What [`fit_affine`] tries, and how it compares.
#[derive(Clone, Copy, Debug)]
pub struct AffineSearch {
    /// Largest code.
    pub code_max: u8,
    /// Try `t` stretches the range of the values over `code_max + first + t·step` codes.
    pub first: f32,
    /// See `first`.
    pub step: f32,
    /// Number of tries.
    pub tries: u32,
    /// Compare `Σ w·|error|`, not `Σ w·error²`: for so few codes that one outlier would dominate the squares.
    pub absolute_error: bool,
    /// Clamp before rounding. Without it, values far out of range round as bits fall, which ggml's searches without
    /// importance do; it can decide the result for nearly constant negative sub-blocks.
    pub saturate: bool,
}

impl AffineSearch {
    /// The search used with an importance matrix: 37 ranges, from 0.9 codes narrower to 0.9 codes wider.
    pub const fn with_importance(code_max: u8) -> AffineSearch {
        AffineSearch { code_max, first: -0.9, step: 0.05, tries: 37, absolute_error: false, saturate: true }
    }
}

/// Result of [`fit_affine`]: `x ≈ scale·code − min`, with `min ≥ 0`.
#[derive(Clone, Copy, Debug)]
pub struct AffineFit<const N: usize, const L: usize> {
    /// Scales.
    pub scale: [f32; L],
    /// What to subtract.
    pub min: [f32; L],
    /// Codes of the best try.
    pub codes: [[u8; L]; N],
}

/// Best scale and minimum for each lane; see the module's comment.
///
/// The minimum is not allowed above zero: formats store it unsigned, to be subtracted.
#[inline(always)]
pub fn fit_affine<const N: usize, const L: usize>(
    x: &Lanes<N, L>,
    w: &Lanes<N, L>,
    search: AffineSearch,
) -> AffineFit<N, L> {
    let code_max = search.code_max as f32;
    let round = |v: f32| clamp(nearest_int(v) as f32, 0.0, code_max);
    let round_saturating = |v: f32| round_in_range(clamp(v, 0.0, code_max));
    let error = |diff: f32| if search.absolute_error { diff.abs() } else { diff * diff };

    let mut min = x[0];
    let mut max = x[0];
    let mut sum_w = w[0];
    let mut sum_x: [f32; L] = from_fn(|l| w[0][l] * x[0][l]);
    for (x, w) in x.iter().zip(w).skip(1) {
        for l in 0..L {
            min[l] = if x[l] < min[l] { x[l] } else { min[l] };
            max[l] = if x[l] > max[l] { x[l] } else { max[l] };
            sum_w[l] += w[l];
            sum_x[l] += w[l] * x[l];
        }
    }
    for min in &mut min {
        *min = if *min > 0.0 { 0.0 } else { *min };
    }
    let flat: [bool; L] = from_fn(|l| max[l] <= min[l]);
    let flat_min = min;

    let inverse: [f32; L] = from_fn(|l| code_max / (max[l] - min[l]));
    let mut scale: [f32; L] = from_fn(|l| 1.0 / inverse[l]);
    let mut best_error = [0.0f32; L];
    let mut codes = [[0.0f32; L]; N];
    for i in 0..N {
        for l in 0..L {
            let code = round(inverse[l] * (x[i][l] - min[l]));
            codes[i][l] = code;
            best_error[l] += w[i][l] * error(scale[l] * code + min[l] - x[i][l]);
        }
    }

    let mut tried = [[0.0f32; L]; N];
    for t in 0..search.tries {
        // `min` is the best so far, not the smallest value: each try starts from the fit before it.
        let inverse: [f32; L] =
            from_fn(|l| (search.first + search.step * t as f32 + code_max) / (max[l] - min[l]));
        let mut sum_q = [0.0f32; L];
        let mut sum_q2 = [0.0f32; L];
        let mut sum_xq = [0.0f32; L];
        for i in 0..N {
            for l in 0..L {
                let v = inverse[l] * (x[i][l] - min[l]);
                let code = if search.saturate { round_saturating(v) } else { round(v) };
                tried[i][l] = code;
                let wq = w[i][l] * code;
                sum_q[l] += wq;
                sum_q2[l] += wq * code;
                sum_xq[l] += wq * x[i][l];
            }
        }
        // Normal equations of the weighted least-squares line through (code, x).
        let mut this_scale = [0.0f32; L];
        let mut this_min = [0.0f32; L];
        let mut solvable = [false; L];
        for l in 0..L {
            let det = sum_w[l] * sum_q2[l] - sum_q[l] * sum_q[l];
            solvable[l] = det > 0.0;
            this_scale[l] = (sum_w[l] * sum_xq[l] - sum_x[l] * sum_q[l]) / det;
            this_min[l] = (sum_q2[l] * sum_x[l] - sum_q[l] * sum_xq[l]) / det;
            if this_min[l] > 0.0 {
                this_min[l] = 0.0;
                this_scale[l] = sum_xq[l] / sum_q2[l];
            }
        }
        let mut this_error = [0.0f32; L];
        for i in 0..N {
            for l in 0..L {
                this_error[l] += w[i][l] * error(this_scale[l] * tried[i][l] + this_min[l] - x[i][l]);
            }
        }
        let better: [bool; L] = from_fn(|l| solvable[l] && this_error[l] < best_error[l]);
        if !better.contains(&true) {
            continue;
        }
        for l in 0..L {
            if better[l] {
                best_error[l] = this_error[l];
                scale[l] = this_scale[l];
                min[l] = this_min[l];
            }
        }
        for i in 0..N {
            for l in 0..L {
                codes[i][l] = if better[l] { tried[i][l] } else { codes[i][l] };
            }
        }
    }

    AffineFit {
        scale: from_fn(|l| if flat[l] { 0.0 } else { scale[l] }),
        min: from_fn(|l| if flat[l] { -flat_min[l] } else { -min[l] }),
        codes: from_fn(|i| from_fn(|l| if flat[l] { 0 } else { codes[i][l] as u8 })),
    }
}

/// Result of the symmetric searches: `x ≈ scale·(code − half)`. The scale may be negative.
#[derive(Clone, Copy, Debug)]
pub struct SymmetricFit<const N: usize, const L: usize> {
    /// Scales.
    pub scale: [f32; L],
    /// Codes, biased by `half`; all 0 in a lane of zeros.
    pub codes: [[u8; L]; N],
}

/// Largest magnitude of each lane and the (first) value that has it.
#[inline]
fn extremes<const N: usize, const L: usize>(x: &Lanes<N, L>) -> ([f32; L], [f32; L]) {
    let mut amax = [0.0f32; L];
    let mut extreme = [0.0f32; L];
    for x in x {
        for l in 0..L {
            let larger = x[l].abs() > amax[l];
            amax[l] = if larger { x[l].abs() } else { amax[l] };
            extreme[l] = if larger { x[l] } else { extreme[l] };
        }
    }
    (amax, extreme)
}

/// Best scale of each lane for codes `−half..half`; see the module's comment.
///
/// The value of largest magnitude goes to code `−half`, the side with one code more; the tries put it up to 0.9 codes
/// further out or in.
#[inline]
pub fn fit_symmetric<const N: usize, const L: usize>(
    x: &Lanes<N, L>,
    w: &Lanes<N, L>,
    half: u8,
) -> SymmetricFit<N, L> {
    let low = -(half as f32);
    let high = half as f32 - 1.0;
    let round = |v: f32| round_in_range(clamp(v, low, high));
    let sums = |inverse: &[f32; L]| {
        let mut sum_xq = [0.0f32; L];
        let mut sum_q2 = [0.0f32; L];
        for i in 0..N {
            for l in 0..L {
                let q = round(inverse[l] * x[i][l]);
                sum_xq[l] += w[i][l] * x[i][l] * q;
                sum_q2[l] += w[i][l] * q * q;
            }
        }
        (sum_xq, sum_q2)
    };

    let (amax, extreme) = extremes(x);
    let mut best_inverse: [f32; L] = from_fn(|l| low / extreme[l]);
    let (sum_xq, sum_q2) = sums(&best_inverse);
    let mut scale: [f32; L] = from_fn(|l| if sum_q2[l] != 0.0 { sum_xq[l] / sum_q2[l] } else { 0.0 });
    let mut best: [f32; L] = from_fn(|l| scale[l] * sum_xq[l]);
    for t in (-9..=9).filter(|&t| t != 0) {
        let inverse: [f32; L] = from_fn(|l| -(half as f32 + 0.1 * t as f32) / extreme[l]);
        let (sum_xq, sum_q2) = sums(&inverse);
        for l in 0..L {
            if sum_q2[l] > 0.0 && sum_xq[l] * sum_xq[l] > best[l] * sum_q2[l] {
                scale[l] = sum_xq[l] / sum_q2[l];
                best[l] = scale[l] * sum_xq[l];
                best_inverse[l] = inverse[l];
            }
        }
    }

    let zero: [bool; L] = from_fn(|l| amax[l] < ZERO_MAX);
    SymmetricFit {
        scale: from_fn(|l| if zero[l] { 0.0 } else { scale[l] }),
        codes: from_fn(|i| {
            from_fn(|l| if zero[l] { 0 } else { (round(best_inverse[l] * x[i][l]) - low) as u8 })
        }),
    }
}

/// Best scale of each lane for codes `−half..half` with weights x², by coordinate descent: re-round one code against
/// the scale that the others imply, keep it if the fit improves, up to five rounds.
#[inline]
pub fn fit_symmetric_descent<const N: usize, const L: usize>(
    x: &Lanes<N, L>,
    half: u8,
) -> SymmetricFit<N, L> {
    let low = -(half as f32);
    let high = half as f32 - 1.0;
    let round = |v: f32| clamp(nearest_int(v) as f32, low, high);
    let (amax, extreme) = extremes(x);
    let inverse: [f32; L] = from_fn(|l| low / extreme[l]);
    let mut q = [[0.0f32; L]; N];
    let mut sum_xq = [0.0f32; L];
    let mut sum_q2 = [0.0f32; L];
    for i in 0..N {
        for l in 0..L {
            q[i][l] = round(inverse[l] * x[i][l]);
            let w = x[i][l] * x[i][l];
            sum_xq[l] += w * x[i][l] * q[i][l];
            sum_q2[l] += w * q[i][l] * q[i][l];
        }
    }
    for _ in 0..5 {
        let before = q;
        for (x, q) in x.iter().zip(&mut q) {
            let mut code = [0.0f32; L];
            let mut new_xq = [0.0f32; L];
            let mut new_q2 = [0.0f32; L];
            let mut take = [0u32; L];
            for l in 0..L {
                let (x, old) = (x[l], q[l]);
                let w = x * x;
                // The sums without this value; their quotient is the scale the others ask for.
                let rest_xq = sum_xq[l] - w * x * old;
                let rest_q2 = sum_q2[l] - w * old * old;
                code[l] = round(x * rest_q2 / rest_xq);
                new_xq[l] = rest_xq + w * x * code[l];
                new_q2[l] = rest_q2 + w * code[l] * code[l];
                let better = new_xq[l] * new_xq[l] * sum_q2[l] > sum_xq[l] * sum_xq[l] * new_q2[l];
                take[l] = (rest_xq > 0.0) as u32
                    & (code[l] != old) as u32
                    & (new_q2[l] > 0.0) as u32
                    & better as u32;
            }
            for l in 0..L {
                q[l] = if take[l] != 0 { code[l] } else { q[l] };
                sum_xq[l] = if take[l] != 0 { new_xq[l] } else { sum_xq[l] };
                sum_q2[l] = if take[l] != 0 { new_q2[l] } else { sum_q2[l] };
            }
        }
        if q == before {
            break;
        }
    }
    let zero: [bool; L] = from_fn(|l| amax[l] < ZERO_MAX);
    SymmetricFit {
        scale: from_fn(|l| if zero[l] || sum_q2[l] <= 0.0 { 0.0 } else { sum_xq[l] / sum_q2[l] }),
        codes: from_fn(|i| from_fn(|l| if zero[l] { 0 } else { (q[i][l] - low) as u8 })),
    }
}

/// `Σ w·(x − q/inverse)²` with `q = round(inverse·x)`.
#[inline]
fn squared_error(x: &[f32], w: &[f32], inverse: f32, round: impl Fn(f32) -> i32) -> f32 {
    let scale = 1.0 / inverse;
    x.iter().zip(w).fold(0.0, |sum, (&x, &w)| {
        let diff = x - scale * round(inverse * x) as f32;
        sum + w * diff * diff
    })
}

/// Best scale for non-negative `x` in codes `0..=code_max`: eight ranges around the largest value, then coordinate
/// descent as in [`fit_symmetric_descent`]. Fills `codes`, returns the scale.
///
/// `x`, `w` and `codes` have the same length. A negative value rounds to a negative code that is stored modulo 256, as
/// ggml does.
pub fn fit_positive(x: &[f32], w: &[f32], code_max: u8, codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    if max < ZERO_MAX {
        codes.fill(0);
        return 0.0;
    }
    let cap = code_max as i32;
    let mut inverse = code_max as f32 / max;
    let mut best = squared_error(x, w, inverse, |v| nearest_int(v) as u8 as i32);
    for t in (-4..=4).filter(|&t| t != 0) {
        let this = (0.1 * t as f32 + code_max as f32) / max;
        let error = squared_error(x, w, this, |v| nearest_int(v).min(cap));
        if error < best {
            best = error;
            inverse = this;
        }
    }
    let mut sum_xq = 0.0f32;
    let mut sum_q2 = 0.0f32;
    for ((code, &x), &w) in codes.iter_mut().zip(x).zip(w) {
        let q = nearest_int(inverse * x).min(cap);
        *code = q as u8;
        sum_xq += w * x * q as f32;
        sum_q2 += w * q as f32 * q as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((code, &x), &w) in codes.iter_mut().zip(x).zip(w) {
            let old = *code as f32;
            let rest_xq = sum_xq - w * x * old;
            let rest_q2 = sum_q2 - w * old * old;
            if !(rest_xq > 0.0 && rest_q2 > 0.0) {
                continue;
            }
            let q = nearest_int(x * rest_q2 / rest_xq).min(cap);
            if q == *code as i32 {
                continue;
            }
            let new_xq = rest_xq + w * x * q as f32;
            let new_q2 = rest_q2 + w * q as f32 * q as f32;
            if new_xq * new_xq * sum_q2 > sum_xq * sum_xq * new_q2 {
                *code = q as u8;
                sum_xq = new_xq;
                sum_q2 = new_q2;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if sum_q2 > 0.0 { sum_xq / sum_q2 } else { 0.0 }
}
