//! Walsh and Hadamard's rotation: sums and differences of elements 1, 2, 4, … apart, one distance after the other, then the
//! factor. Each is an operation on two elements, so the order of everything else changes no bit.

use super::elementwise::for_runs;
use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::executor::Executor;

/// Rotates every `width` neighbours.
struct Rotate<'a> {
    x: &'a mut [f32],
    width: usize,
}

impl Rotate<'_> {
    /// One distance, for lanes that the compiler makes vectors of.
    #[inline(always)]
    fn pairs<const DISTANCE: usize>(x: &mut [f32]) {
        for pairs in x.as_chunks_mut::<DISTANCE>().0.as_chunks_mut::<2>().0 {
            let [low, high] = pairs;
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

impl SimdOp for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let factor = 1.0 / libm::sqrtf(self.width as f32);
        for x in self.x.chunks_exact_mut(self.width) {
            if self.width > 1 {
                Self::pairs::<1>(x);
            }
            if self.width > 2 {
                Self::pairs::<2>(x);
            }
            if self.width > 4 {
                Self::pairs::<4>(x);
            }
            let mut distance = 8;
            while distance < self.width {
                for pairs in x.chunks_exact_mut(2 * distance) {
                    let (low, high) = pairs.split_at_mut(distance);
                    for (a, b) in low.as_chunks_mut::<8>().0.iter_mut().zip(high.as_chunks_mut::<8>().0) {
                        for (a, b) in a.iter_mut().zip(b) {
                            (*a, *b) = (*a + *b, *a - *b);
                        }
                    }
                }
                distance *= 2;
            }
            x.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// See [`crate::op::Op::Hadamard`]; `None` for `x` means that `out` holds it.
pub fn hadamard(
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    width: usize,
    out: &mut [f32],
) -> Result<(), KernelError> {
    const OP: &str = "hadamard";
    if !width.is_power_of_two() || !out.len().is_multiple_of(width) {
        return Err(KernelError::Length { op: OP, what: "out", expected: width, got: out.len() });
    }
    if let Some(x) = x {
        check_len(OP, "x", x.len(), out.len())?;
        out.copy_from_slice(x);
    }
    let target = Shared(out.as_mut_ptr());
    for_runs(exec, out.len() / width, width, 1, |first, n| {
        // SAFETY: runs are disjoint and within `out`.
        let x = unsafe { core::slice::from_raw_parts_mut(target.at(first * width), n * width) };
        isa.run(Rotate { x, width });
    });
    Ok(())
}
