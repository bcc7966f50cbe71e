//! Rotary embedding: angles once a step, then the rotation of queries and keys.

use super::elementwise::for_runs;
use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::executor::Executor;
use crate::op::{RopeMode, RopeParams};

/// cos and sin of every pair: `out` is [n, n_dims] as (cos, sin) pairs. Angles are computed in f64.
///
/// YaRN as in its paper (Peng et al. 2023) and llama.cpp's `rope_yarn`: low frequencies are interpolated, high ones
/// kept, with a linear ramp between the dimensions that turn `beta_fast` and `beta_slow` times in the trained context.
pub fn rope_table(
    positions: &[i32],
    freq_factors: Option<&[f32]>,
    params: &RopeParams,
    out: &mut [f32],
) -> Result<(), KernelError> {
    const OP: &str = "rope_table";
    let n_dims = params.n_dims;
    check_len(OP, "out", out.len(), positions.len() * n_dims)?;
    if let Some(f) = freq_factors {
        check_len(OP, "frequency factors", f.len(), n_dims / 2)?;
    }
    if n_dims == 0 {
        return Ok(());
    }
    let (base, scale) = (params.freq_base as f64, params.freq_scale as f64);
    let ramp_end = |turns: f32| {
        let turn = params.n_ctx_orig as f64 / (turns as f64 * 2.0 * core::f64::consts::PI);
        n_dims as f64 * libm::log(turn) / (2.0 * libm::log(base))
    };
    let low = libm::floor(ramp_end(params.beta_fast)).max(0.0);
    let high = libm::ceil(ramp_end(params.beta_slow)).min(n_dims as f64 - 1.0);
    let magnitude = params.attn_factor as f64;
    // Frequencies are the same for all tokens, so they go through the first row once each, pair by pair.
    for i in 0..n_dims / 2 {
        let mut extrapolated = libm::pow(base, -2.0 * i as f64 / n_dims as f64);
        if let Some(f) = freq_factors {
            extrapolated /= f[i] as f64;
        }
        let mut frequency = extrapolated * scale;
        if params.ext_factor != 0.0 {
            let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            let mix = (1.0 - ramp) * params.ext_factor as f64;
            frequency = frequency * (1.0 - mix) + extrapolated * mix;
        }
        for (row, &pos) in out.chunks_exact_mut(n_dims).zip(positions) {
            let (sin, cos) = libm::sincos(pos as f64 * frequency);
            row[2 * i] = (cos * magnitude) as f32;
            row[2 * i + 1] = (sin * magnitude) as f32;
        }
    }
    Ok(())
}

/// Rotates `n` tokens of `heads` heads.
struct Rotate<'a> {
    x: &'a mut [f32],
    table: &'a [f32],
    heads: usize,
    head_dim: usize,
    n_dims: usize,
    mode: RopeMode,
}

impl SimdOp for Rotate<'_> {
    type Output = ();
    /// Plain loops: multiplications and additions in a fixed order, which the compiler makes vectors of.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.x.chunks_exact_mut(self.heads * self.head_dim);
        for (row, table) in rows.zip(self.table.chunks_exact(self.n_dims)) {
            for head in row.chunks_exact_mut(self.head_dim) {
                let (table, _) = table.as_chunks::<2>();
                match self.mode {
                    RopeMode::Norm => {
                        let (pairs, _) = head[..self.n_dims].as_chunks_mut::<2>();
                        for (x, [cos, sin]) in pairs.iter_mut().zip(table) {
                            *x = [x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos];
                        }
                    }
                    RopeMode::Neox => {
                        let (low, high) = head[..self.n_dims].split_at_mut(self.n_dims / 2);
                        for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(table) {
                            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                        }
                    }
                }
            }
        }
    }
}

/// Rotates the first `n_dims` elements of every head of `x` [n, heads, head_dim] in place, by `table` [n, n_dims].
pub fn rope(
    isa: Isa,
    exec: &dyn Executor,
    x: &mut [f32],
    table: &[f32],
    n: usize,
    heads: usize,
    head_dim: usize,
    n_dims: usize,
    mode: RopeMode,
) -> Result<(), KernelError> {
    const OP: &str = "rope";
    let cols = heads * head_dim;
    check_len(OP, "x", x.len(), n * cols)?;
    check_len(OP, "table", table.len(), n * n_dims)?;
    if !n_dims.is_multiple_of(2) || n_dims > head_dim {
        return Err(KernelError::Length { op: OP, what: "n_dims", expected: head_dim, got: n_dims });
    }
    if cols == 0 || n_dims == 0 {
        return Ok(());
    }
    let target = Shared(x.as_mut_ptr());
    for_runs(exec, n, cols, 1, |first, rows| {
        // SAFETY: runs of rows are disjoint and within `x`.
        let x = unsafe { core::slice::from_raw_parts_mut(target.at(first * cols), rows * cols) };
        isa.run(Rotate { x, table: &table[first * n_dims..], heads, head_dim, n_dims, mode });
    });
    Ok(())
}
