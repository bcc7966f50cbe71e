//! Elementwise functions. `None` for the first input means that `out` holds it: that is the in-place form.

use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::math;
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::executor::Executor;
use crate::op::{Glu, Unary};

/// Elements that one thread handles faster than it could share them.
const ALONE_ELEMS: usize = 16 * 1024;

/// Calls `f(first, n)` for disjoint runs that cover `n_items` items of `item_elems` elements, in parallel if that pays.
pub(super) fn for_runs(
    exec: &dyn Executor,
    n_items: usize,
    item_elems: usize,
    unit: usize,
    f: impl Fn(usize, usize) + Sync,
) {
    let shares = (n_items * item_elems / ALONE_ELEMS).min(exec.n_threads());
    if shares <= 1 {
        return f(0, n_items);
    }
    let items = n_items.div_ceil(shares).next_multiple_of(unit);
    exec.run(n_items.div_ceil(items), &|i| f(i * items, items.min(n_items - i * items)));
}

/// A function of one element of each input.
trait Map: Copy + Sync {
    fn map<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F;
}

/// `out[i] = f(a[i], b[i])`.
///
/// *Maker must*: give `n` readable elements at `a` and `b`, and `n` writable ones at `out`, which may be `a` itself.
struct Apply<M> {
    f: M,
    a: *const f32,
    b: *const f32,
    out: *mut f32,
    n: usize,
}

impl<M: Map> SimdOp for Apply<M> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.n / 16 * 16;
        // SAFETY: `n` elements by the maker's word; each is read before it is written.
        unsafe {
            for i in (0..whole).step_by(16) {
                let (a, b) = (s.load_f32(self.a.add(i).cast()), s.load_f32(self.b.add(i).cast()));
                s.store(self.f.map(s, a, b), &mut *self.out.add(i).cast());
            }
            let rest = self.n - whole;
            if rest > 0 {
                let (mut a, mut b, mut out) = ([0.0; 16], [0.0; 16], [0.0; 16]);
                core::ptr::copy_nonoverlapping(self.a.add(whole), a.as_mut_ptr(), rest);
                core::ptr::copy_nonoverlapping(self.b.add(whole), b.as_mut_ptr(), rest);
                s.store(self.f.map(s, s.load(&a), s.load(&b)), &mut out);
                core::ptr::copy_nonoverlapping(out.as_ptr(), self.out.add(whole), rest);
            }
        }
    }
}

/// Maps over `out`, `a` (`None`: `out`) and `b` (`None`: `a`; a shorter one is repeated).
fn apply(
    op: &'static str,
    isa: Isa,
    exec: &dyn Executor,
    f: impl Map,
    a: Option<&[f32]>,
    b: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let n = out.len();
    if let Some(a) = a {
        check_len(op, "a", a.len(), n)?;
    }
    let target = Shared(out.as_mut_ptr());
    let a = Shared(a.map_or(target.0, |a| a.as_ptr().cast_mut()));
    match b {
        Some(b) if b.len() != n => {
            if b.is_empty() || !n.is_multiple_of(b.len()) {
                return Err(KernelError::Length { op, what: "b", expected: n, got: b.len() });
            }
            let cols = b.len();
            for_runs(exec, n / cols, cols, 1, |first, rows| {
                for row in first..first + rows {
                    // SAFETY: rows tile `out` and `a`; runs are disjoint.
                    let (a, out) = unsafe { (a.at(row * cols), target.at(row * cols)) };
                    isa.run(Apply { f, a, b: b.as_ptr(), out, n: cols });
                }
            });
        }
        _ => {
            let b = Shared(b.map_or(a.0, |b| b.as_ptr().cast_mut()));
            for_runs(exec, n, 1, 16, |first, n| {
                // SAFETY: runs are disjoint and within the three equally long buffers.
                let (a, b, out) = unsafe { (a.at(first), b.at(first), target.at(first)) };
                isa.run(Apply { f, a, b, out, n });
            });
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Add;
impl Map for Add {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F {
        s.add(a, b)
    }
}

#[derive(Clone, Copy)]
struct Mul;
impl Map for Mul {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, a: S::F, b: S::F) -> S::F {
        s.mul(a, b)
    }
}

#[derive(Clone, Copy)]
struct Scale(f32);
impl Map for Scale {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, a: S::F, _: S::F) -> S::F {
        s.mul(a, s.splat(self.0))
    }
}

#[derive(Clone, Copy)]
struct Softcap(f32);
impl Map for Softcap {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, a: S::F, _: S::F) -> S::F {
        let cap = s.splat(self.0);
        s.mul(cap, math::tanh(s, s.div(a, cap)))
    }
}

#[derive(Clone, Copy)]
struct One(Unary);
impl Map for One {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, a: S::F, _: S::F) -> S::F {
        let zero = s.splat(0.0);
        match self.0 {
            Unary::Silu => math::gate(s, a, a),
            Unary::Gelu => math::gelu(s, a),
            Unary::GeluErf => math::gelu_erf(s, a),
            Unary::Relu => s.max(zero, a),
            Unary::ReluSqr => {
                let r = s.max(zero, a);
                s.mul(r, r)
            }
            Unary::Tanh => math::tanh(s, a),
            Unary::Sigmoid => math::sigmoid(s, a),
        }
    }
}

#[derive(Clone, Copy)]
struct Gated(Unary);
impl Map for Gated {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        s.mul(One(self.0).map(s, gate, up), up)
    }
}

#[derive(Clone, Copy)]
struct SwigluOai {
    alpha: f32,
    limit: f32,
}
impl Map for SwigluOai {
    #[inline(always)]
    fn map<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        let limit = s.splat(self.limit);
        let gate = s.min(limit, gate);
        let up = s.max(s.splat(-self.limit), s.min(limit, up));
        let gated = math::gate(s, gate, s.mul(gate, s.splat(self.alpha)));
        s.mul(gated, s.add(up, s.splat(1.0)))
    }
}

/// `out = a + b`; a shorter `b` is one row, repeated.
pub fn add(
    isa: Isa,
    exec: &dyn Executor,
    a: Option<&[f32]>,
    b: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    apply("add", isa, exec, Add, a, Some(b), out)
}

/// `out = a · b`; a shorter `b` is one row, repeated.
pub fn mul(
    isa: Isa,
    exec: &dyn Executor,
    a: Option<&[f32]>,
    b: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    apply("mul", isa, exec, Mul, a, Some(b), out)
}

/// `out = factor · x`
pub fn scale(
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    factor: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    apply("scale", isa, exec, Scale(factor), x, None, out)
}

/// `out = cap · tanh(x / cap)`
pub fn softcap(
    isa: Isa,
    exec: &dyn Executor,
    x: Option<&[f32]>,
    cap: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    apply("softcap", isa, exec, Softcap(cap), x, None, out)
}

/// `out = kind(x)`
pub fn unary(
    isa: Isa,
    exec: &dyn Executor,
    kind: Unary,
    x: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    apply("unary", isa, exec, One(kind), x, None, out)
}

/// `out = kind(gate) · up`
pub fn glu(
    isa: Isa,
    exec: &dyn Executor,
    kind: Glu,
    gate: Option<&[f32]>,
    up: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    check_len("glu", "up", up.len(), out.len())?;
    match kind {
        Glu::Plain(f) => apply("glu", isa, exec, Gated(f), gate, Some(up), out),
        Glu::SwigluOai { alpha, limit } => {
            apply("glu", isa, exec, SwigluOai { alpha, limit }, gate, Some(up), out)
        }
    }
}
