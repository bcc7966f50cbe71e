//! RMS and layer normalisation of rows. `None` for `x` means that `out` holds it.
//!
//! Sums are 16 partial sums by column mod 16 and the fixed tree, as in every float dot product here.

use super::elementwise::for_runs;
use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::executor::Executor;

/// Normalises `rows` rows.
///
/// *Maker must*: give `rows·cols` elements at `x` and `out` (which may be the same).
struct Norm<'a> {
    x: *const f32,
    out: *mut f32,
    rows: usize,
    cols: usize,
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    eps: f32,
    /// Subtract the mean first.
    centre: bool,
}

/// 16 elements at `p + i`, or the last few padded with zeros.
///
/// # Safety
/// * `i < n`, and `n` elements at `p` are readable.
#[inline(always)]
unsafe fn part<S: Simd>(s: S, p: *const f32, i: usize, n: usize) -> S::F {
    // SAFETY: within `n` by contract.
    unsafe {
        if i + 16 <= n {
            s.load_f32(p.add(i).cast())
        } else {
            let mut padded = [0.0; 16];
            core::ptr::copy_nonoverlapping(p.add(i), padded.as_mut_ptr(), n - i);
            s.load(&padded)
        }
    }
}

impl SimdOp for Norm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.cols;
        for row in 0..self.rows {
            // SAFETY: rows and columns by the maker's word; a row is read before it is written; weights have `cols`
            // elements (checked by the callers).
            unsafe {
                let x = self.x.add(row * n);
                let out = self.out.add(row * n);
                let mean = if self.centre {
                    let mut sum = s.splat(0.0);
                    for i in (0..n).step_by(16) {
                        sum = s.add(sum, part(s, x, i, n));
                    }
                    s.reduce_add(sum) / n as f32
                } else {
                    0.0
                };
                let mut squares = s.splat(0.0);
                for i in (0..n).step_by(16) {
                    let mut v = part(s, x, i, n);
                    if self.centre {
                        v = s.sub(v, s.splat(mean));
                        if i + 16 > n {
                            // The padding must not count.
                            let mut lanes = [0.0; 16];
                            s.store(v, &mut lanes);
                            lanes[n - i..].fill(0.0);
                            v = s.load(&lanes);
                        }
                    }
                    squares = s.fma(v, v, squares);
                }
                let inverse = s.splat(1.0 / libm::sqrtf(s.reduce_add(squares) / n as f32 + self.eps));
                for i in (0..n).step_by(16) {
                    let mut v = part(s, x, i, n);
                    if self.centre {
                        v = s.sub(v, s.splat(mean));
                    }
                    v = s.mul(v, inverse);
                    if let Some(w) = self.weight {
                        v = s.mul(v, part(s, w.as_ptr(), i, n));
                    }
                    if let Some(b) = self.bias {
                        v = s.add(v, part(s, b.as_ptr(), i, n));
                    }
                    if i + 16 <= n {
                        s.store(v, &mut *out.add(i).cast());
                    } else {
                        let mut lanes = [0.0; 16];
                        s.store(v, &mut lanes);
                        core::ptr::copy_nonoverlapping(lanes.as_ptr(), out.add(i), n - i);
                    }
                }
            }
        }
    }
}

fn norm(
    op: &'static str,
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    cols: usize,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    centre: bool,
    out: &mut [f32],
) -> Result<(), KernelError> {
    if cols == 0 || !out.len().is_multiple_of(cols) {
        return Err(KernelError::Length { op, what: "out", expected: cols, got: out.len() });
    }
    if let Some(x) = x {
        check_len(op, "x", x.len(), out.len())?;
    }
    for (what, v) in [("weight", weight), ("bias", bias)] {
        if let Some(v) = v {
            check_len(op, what, v.len(), cols)?;
        }
    }
    let n_rows = out.len() / cols;
    let target = Shared(out.as_mut_ptr());
    let source = Shared(x.map_or(target.0, |x| x.as_ptr().cast_mut()));
    for_runs(exec, n_rows, cols, 1, |first, rows| {
        // SAFETY: runs of rows are disjoint and within the buffers.
        let (x, out) = unsafe { (source.at(first * cols), target.at(first * cols)) };
        isa.run(Norm { x, out, rows, cols, weight, bias, eps, centre });
    });
    Ok(())
}

/// `x / sqrt(mean(x²) + eps) · weight` for each row of `cols`.
pub fn rms_norm(
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    cols: usize,
    weight: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    norm("rms_norm", isa, exec, x, cols, weight, None, eps, false, out)
}

/// `(x − mean) / sqrt(var + eps) · weight + bias` for each row of `cols`.
pub fn layer_norm(
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    cols: usize,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    norm("layer_norm", isa, exec, x, cols, weight, bias, eps, true, out)
}
