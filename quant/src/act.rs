//! Activations as the integer kernels take them: 32 signed bytes and one scale, rounded as ggml rounds them.
//!
//! ggml quantises activations to one of three formats, by the weights' format ([`ActKind`]). A product's noise is that
//! rounding, so results agree with llama.cpp's closely only if it is the same one (perplexity of a 4-bit model moves by
//! 0.5 % otherwise).

use crate::bits::{f16_to_f32, f32_to_f16, round_half_away};
use crate::extent::abs_max;

/// Weights in one [`Group`](crate::Group).
pub const GROUP: usize = 32;
/// Values that share a scale in [`ActKind::Q8K`].
pub const SUPER_BLOCK: usize = 256;

/// How activations are rounded; named after ggml's format of that rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActKind {
    /// Per 32: `d = amax / 127`, kept as f16; half away from zero.
    Q8_0,
    /// As `Q8_0`, and what an offset multiplies, `d · Σq`, is rounded to f16 too.
    Q8_1,
    /// Per 256: `d = -max / 127` of the value of largest magnitude, f32; ties to even.
    Q8K,
}

/// 32 quantised activations: `x[i] ≈ d * q[i]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActGroup {
    /// Codes in -127..=127.
    pub q: [i8; GROUP],
    /// Scale.
    pub d: f32,
    /// Sums of `q[0..16]` and `q[16..32]`: what a format's bias multiplies.
    pub sums: [i32; 2],
    /// What a format's offset multiplies: the value of the two halves' sums, and of all.
    pub values: [f32; 3],
}

impl ActGroup {
    /// No activations: zeros.
    pub const ZERO: ActGroup = ActGroup { q: [0; GROUP], d: 0.0, sums: [0; 2], values: [0.0; 3] };

    /// Quantise `out.len()` groups. NaN becomes 0; an infinite value makes the scale infinite, as in ggml.
    ///
    /// # Panics
    /// If `x` is not `out.len()` groups, or not whole super-blocks for [`ActKind::Q8K`].
    pub fn quantise(kind: ActKind, x: &[f32], out: &mut [ActGroup]) {
        assert_eq!(x.len(), out.len() * GROUP, "activations");
        match kind {
            ActKind::Q8_0 | ActKind::Q8_1 => {
                let (x, _) = x.as_chunks::<GROUP>();
                for (x, out) in x.iter().zip(out) {
                    let d = abs_max(x) / 127.0;
                    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
                    // The bound matters only where `d` is so small that `1 / d` overflows.
                    let q = x.map(|x| round_half_away(x * id).clamp(-127, 127) as i8);
                    *out = ActGroup::new(q, f16_to_f32(f32_to_f16(d)));
                    if kind == ActKind::Q8_1 {
                        let sum = d * (out.sums[0] + out.sums[1]) as f32;
                        out.values[2] = f16_to_f32(f32_to_f16(sum));
                    }
                }
            }
            ActKind::Q8K => {
                assert!(x.len().is_multiple_of(SUPER_BLOCK), "{} activations in super-blocks", x.len());
                for (x, out) in x.chunks_exact(SUPER_BLOCK).zip(out.chunks_exact_mut(SUPER_BLOCK / GROUP)) {
                    // The first value of largest magnitude, with its sign.
                    let max = x.iter().fold(0.0f32, |max, x| if x.abs() > max.abs() { *x } else { max });
                    let inverse = if max != 0.0 { -127.0 / max } else { 0.0 };
                    let d = if max != 0.0 { 1.0 / inverse } else { 0.0 };
                    let (x, _) = x.as_chunks::<GROUP>();
                    for (x, out) in x.iter().zip(out) {
                        let q = x.map(|x| libm::rintf(inverse * x).clamp(-127.0, 127.0) as i8);
                        *out = ActGroup::new(q, d);
                    }
                }
            }
        }
    }

    fn new(q: [i8; GROUP], d: f32) -> ActGroup {
        let half = |h: usize| q[16 * h..16 * (h + 1)].iter().map(|q| *q as i32).sum::<i32>();
        let sums = [half(0), half(1)];
        let values = [d * sums[0] as f32, d * sums[1] as f32, d * (sums[0] + sums[1]) as f32];
        ActGroup { q, d, sums, values }
    }
}
