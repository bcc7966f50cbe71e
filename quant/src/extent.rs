//! Extent of a block: largest magnitude and range.
//!
//! Written over eight running values, since a maximum of floats in sequence is a chain that cannot be vectorised. NaNs
//! are passed over, as by ggml's comparisons; where two values compare equal (±a, ±0) the first of the block counts,
//! which decides signs in the file.

use core::array::from_fn;

const LANES: usize = 8;

/// The running values of each lane after all of `x`; `start` where there were none.
#[inline(always)]
fn lanes(x: &[f32], start: f32, value: impl Fn(f32) -> f32, wins: impl Fn(f32, f32) -> bool) -> [f32; LANES] {
    let mut best = [start; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        best = from_fn(|l| if wins(value(chunk[l]), best[l]) { value(chunk[l]) } else { best[l] });
    }
    for (best, &v) in best.iter_mut().zip(rest) {
        *best = if wins(value(v), *best) { value(v) } else { *best };
    }
    best
}

/// Largest magnitude; 0 for an empty or all-NaN block.
#[inline(always)]
pub fn abs_max(x: &[f32]) -> f32 {
    let best = lanes(x, 0.0, f32::abs, |a, b| a > b);
    best.iter().fold(0.0, |m, &v| if v > m { v } else { m })
}

/// The first value of largest magnitude, with its sign; 0 for a block of zeros.
#[inline(always)]
pub fn extreme(x: &[f32]) -> f32 {
    let amax = abs_max(x);
    if amax == 0.0 {
        return 0.0;
    }
    x.iter().copied().find(|v| v.abs() == amax).unwrap_or(0.0)
}

/// Smallest and largest value; `(MAX, -MAX)` for an empty or all-NaN block.
#[inline(always)]
pub fn range(x: &[f32]) -> (f32, f32) {
    let min =
        lanes(x, f32::MAX, |v| v, |a, b| a < b).iter().fold(f32::MAX, |m, &v| if v < m { v } else { m });
    let max =
        lanes(x, -f32::MAX, |v| v, |a, b| a > b).iter().fold(-f32::MAX, |m, &v| if v > m { v } else { m });
    let first = |limit: f32| match limit {
        0.0 => x.iter().copied().find(|&v| v == 0.0).unwrap_or(limit),
        _ => limit,
    };
    (first(min), first(max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_of_equals_counts() {
        let mut x = [1.0f32; 32];
        x[3] = -7.0;
        x[11] = 7.0;
        x[20] = f32::NAN;
        assert_eq!(extreme(&x), -7.0);
        assert_eq!(range(&x), (-7.0, 7.0));
        x[3] = 7.0;
        x[11] = -7.0;
        assert_eq!(extreme(&x), 7.0);
        let mut zeros = [0.0f32; 32];
        zeros[0] = -0.0;
        assert!(range(&zeros).0.is_sign_negative());
        zeros.swap(0, 9);
        assert!(range(&zeros).0.is_sign_positive());
        assert_eq!(abs_max(&[f32::NAN; 5]), 0.0);
    }
}
