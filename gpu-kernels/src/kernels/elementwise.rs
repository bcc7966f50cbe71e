//! Arithmetic element by element, in f32.
//!
//! * `binary`: `y = op(a, b)`; element i of `a` meets element `i / inner % period` of `b`: the same shape (inner 1,
//!   period n), one row for all rows (inner 1, period of a row), or one value per row (inner of a row, period the number
//!   of rows). With `ids` i32 [n / inner] a row's value is `b[ids[row]]` of the period's. `unary`: `y = f(a)`, f a
//!   `Function` with its parameters.
//! * Shapes: n elements, dense, 16-byte aligned. Where inner or period is not 1 or n, all of n, inner (if not 1) and period
//!   (if inner is 1) are multiples of 4. `y` may be `a` or, where the shapes agree, `b`. Ids need an inner that is not 1.
//! * Geometry: 256 threads per CTA, a float4 per thread; the last thread takes what is left of n.
//! * Bytes: 8n, 4 · period for `b`, 4 per id. FLOPs: n.
//! * Tolerance: `binary` is exact but for `MulSigmoid`, one rounding, the same as the reference's. `unary` and
//!   `MulSigmoid`: NMSE 1e-12, from `ex2.approx` and `rcp.approx`.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

/// What to do with two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BinaryOp {
    /// `a + b`
    Add,
    /// `a − b`
    Sub,
    /// `a · b`
    Mul,
    /// `a / b`
    Div,
    /// `a · sigmoid(b)`: a gate.
    MulSigmoid,
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::BinaryOp;
    use crate::device::{F32x4, Glb, math, thread};
    use crate::kernels::activation::apply;

    #[inline(always)]
    fn combine(op: u32, a: f32, b: f32) -> f32 {
        if op == BinaryOp::Add as u32 {
            a + b
        } else if op == BinaryOp::Sub as u32 {
            a - b
        } else if op == BinaryOp::Mul as u32 {
            a * b
        } else if op == BinaryOp::Div as u32 {
            a / b
        } else {
            a * math::sigmoid(b)
        }
    }

    /// The elements that belong to no float4 of n: one thread's work.
    #[inline(always)]
    #[track_caller]
    fn rest(i: u32, n: u32, f: impl Fn(u32)) {
        if i == n / 4 {
            let mut j = 4 * i;
            while j < n {
                f(j);
                j += 1;
            }
        }
    }

    #[inline(always)]
    fn same(
        a: Glb<F32x4>,
        b: Glb<F32x4>,
        _ids: Glb<u32>,
        y: Glb<F32x4>,
        n: u32,
        period: u32,
        _inner4: u32,
        op: u32,
    ) {
        let i = thread::index_1d();
        if i < n / 4 {
            // A period that is no multiple of 4 is n: nothing repeats.
            let j = if period == n { i } else { i % (period / 4) };
            let (F32x4(mut v), F32x4(w)) = (a.ld(i), b.ld(j));
            unroll!(J in 0..4 {
                v[J] = combine(op, v[J], w[J]);
            });
            y.st(i, F32x4(v));
        }
        rest(i, n, |j| {
            let (a, b) = (a.cast::<f32>().ld(j), b.cast::<f32>().ld(j));
            y.cast().st(j, combine(op, a, b));
        });
    }

    #[inline(always)]
    fn inner(
        a: Glb<F32x4>,
        b: Glb<F32x4>,
        ids: Glb<u32>,
        y: Glb<F32x4>,
        n: u32,
        period: u32,
        inner4: u32,
        op: u32,
    ) {
        let i = thread::index_1d();
        if i < n / 4 {
            let row = i / inner4;
            let at = if ids.is_null() { row % period } else { ids.ld_nc(row) };
            let (F32x4(mut v), w) = (a.ld(i), b.cast::<f32>().ld(at));
            unroll!(J in 0..4 {
                v[J] = combine(op, v[J], w);
            });
            y.st(i, F32x4(v));
        }
    }

    #[inline(always)]
    fn unary(x: Glb<F32x4>, y: Glb<F32x4>, n: u32, function: u32, a: f32, b: f32) {
        let i = thread::index_1d();
        if i < n / 4 {
            let [v] = apply(function, [x.ld(i).0], a, b);
            y.st(i, F32x4(v));
        }
        rest(i, n, |j| {
            let [[v, ..]] = apply(function, [[x.cast::<f32>().ld(j); 4]], a, b);
            y.cast().st(j, v);
        });
    }

    kernels! {
        in "elementwise";
        pub(super) BINARY: threads(256);
        fn (a: Glb<F32x4>, b: Glb<F32x4>, ids: Glb<u32>, y: Glb<F32x4>, n: u32, period: u32, inner4: u32, op: u32);
        "binary_f32" => same;
        "binary_inner_f32" => inner;
    }

    kernels! {
        in "elementwise";
        pub(super) UNARY: threads(256);
        fn (x: Glb<F32x4>, y: Glb<F32x4>, n: u32, function: u32, a: f32, b: f32);
        "unary_f32" => unary;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{BinaryOp, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::activation::Function;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    impl BinaryOp {
        /// The definition, in f32: one rounding, but for [`BinaryOp::MulSigmoid`].
        pub fn reference(self, a: f32, b: f32) -> f32 {
            match self {
                BinaryOp::Add => a + b,
                BinaryOp::Sub => a - b,
                BinaryOp::Mul => a * b,
                BinaryOp::Div => a / b,
                BinaryOp::MulSigmoid => (f64::from(a) / (1.0 + libm::exp(-f64::from(b)))) as f32,
            }
        }
    }

    /// Arguments of two-argument operations; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct BinaryArgs {
        pub op: BinaryOp,
        pub a: DevicePtr,
        pub b: DevicePtr,
        pub ids: DevicePtr,
        pub y: DevicePtr,
        pub n: usize,
        pub inner: usize,
        pub period: usize,
    }

    /// One launch for all elements.
    pub fn launch_binary(args: &BinaryArgs) -> Result<Launch, LaunchError> {
        let check = Check(Elementwise::NAME);
        let n = check.size("n", args.n)?;
        let (period, inner) = (check.size("period", args.period)?, check.size("inner", args.inner)?);
        if args.ids == DevicePtr::NULL {
            let all = args.inner.saturating_mul(args.period);
            check.multiple("n", args.n, all, "a multiple of inner * period")?;
        } else {
            check.multiple("n", args.n, args.inner, "a multiple of inner")?;
            check.multiple("inner", args.inner, 4, "a multiple of 4, with ids")?;
        }
        let entry = if args.inner == 1 {
            if args.period != args.n {
                check.multiple("period", args.period, 4, "a multiple of 4, or n")?;
            }
            "binary_f32"
        } else {
            check.multiple("inner", args.inner, 4, "1 or a multiple of 4")?;
            "binary_inner_f32"
        };
        for (what, at) in [("a", args.a), ("b", args.b), ("y", args.y)] {
            check.aligned(what, at, 16)?;
        }
        check.aligned("ids", args.ids, 4)?;
        let params = Params::new().with(args.a).with(args.b).with(args.ids).with(args.y);
        Ok(flat(entry, n, params.with(n).with(period).with(inner / 4).with(args.op as u32)))
    }

    /// Arguments of one-argument functions; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct UnaryArgs {
        pub function: Function,
        pub x: DevicePtr,
        pub y: DevicePtr,
        pub n: usize,
        pub a: f32,
        pub b: f32,
    }

    /// One launch for all elements.
    pub fn launch_unary(args: &UnaryArgs) -> Result<Launch, LaunchError> {
        let check = Check(Elementwise::NAME);
        let n = check.size("n", args.n)?;
        for (what, at) in [("x", args.x), ("y", args.y)] {
            check.aligned(what, at, 16)?;
        }
        let params = Params::new().with(args.x).with(args.y).with(n);
        Ok(flat("unary_f32", n, params.with(args.function as u32).with(args.a).with(args.b)))
    }

    fn flat(entry: &'static str, n: u32, params: Params) -> Launch {
        let grid = [n.div_ceil(4 * THREADS), 1, 1];
        Launch { entry, grid, cta: THREADS, cluster: 1, smem_bytes: 0, params }
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Elementwise;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub enum Case {
        Binary { op: BinaryOp, n: usize, inner: usize, period: usize, chosen: bool },
        Unary { function: Function, n: usize, a: f32, b: f32 },
    }

    const fn binary(op: BinaryOp, n: usize, inner: usize, period: usize) -> Case {
        Case::Binary { op, n, inner, period, chosen: false }
    }
    const fn chosen(op: BinaryOp, n: usize, inner: usize, period: usize) -> Case {
        Case::Binary { op, n, inner, period, chosen: true }
    }
    const fn unary(function: Function, n: usize) -> Case {
        Case::Unary { function, n, a: 0.0, b: 0.0 }
    }

    impl Kernel for Elementwise {
        const NAME: &'static str = "elementwise";
        type Case = Case;
        const CASES: &'static [Case] = &[
            binary(BinaryOp::Add, 4, 1, 4),
            binary(BinaryOp::Add, 1023, 1, 1023),
            binary(BinaryOp::Add, 3 * 1024, 1, 1024),
            binary(BinaryOp::Sub, 1, 1, 1),
            binary(BinaryOp::Mul, 1028, 1, 4),
            binary(BinaryOp::Mul, 4096, 1, 2048),
            binary(BinaryOp::Div, 1025, 1, 1025),
            binary(BinaryOp::Mul, 3 * 260, 260, 3),
            binary(BinaryOp::MulSigmoid, 5 * 1024, 1024, 5),
            binary(BinaryOp::Sub, 2 * 3 * 8, 8, 3),
            chosen(BinaryOp::Mul, 7 * 260, 260, 3),
            chosen(BinaryOp::Mul, 2 * 4, 4, 9),
            unary(Function::Silu, 1023),
            unary(Function::Gelu, 1025),
            unary(Function::GeluErf, 1024),
            unary(Function::GeluQuick, 7),
            unary(Function::Relu, 100),
            unary(Function::ReluSqr, 101),
            Case::Unary { function: Function::LeakyRelu, n: 102, a: 0.1, b: 0.0 },
            unary(Function::Tanh, 2051),
            unary(Function::Sigmoid, 300),
            unary(Function::HardSigmoid, 301),
            unary(Function::HardSwish, 302),
            unary(Function::Exp, 1022),
            unary(Function::Neg, 3),
            unary(Function::Abs, 5),
            unary(Function::Sqr, 64),
            unary(Function::Sqrt, 65),
            unary(Function::Sign, 66),
            unary(Function::Step, 67),
            unary(Function::Round, 68),
            Case::Unary { function: Function::Scale, n: 1028, a: 0.3, b: -1.5 },
            Case::Unary { function: Function::Clamp, n: 69, a: -0.25, b: 0.5 },
            Case::Unary { function: Function::Softcap, n: 70, a: 2.0, b: 0.0 },
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[
            binary(BinaryOp::Add, 1 << 23, 1, 1 << 23),
            binary(BinaryOp::Add, 512 * 4096, 1, 4096),
            binary(BinaryOp::Mul, 1 << 23, 1, 4096),
            unary(Function::Silu, 1 << 23),
            unary(Function::GeluErf, 1 << 23),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::BINARY, super::gpu::UNARY];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            match *case {
                Case::Binary { op, n, inner, period, chosen } => {
                    let (a, b) = (random.values(n), random.values(period));
                    let ids: Option<Vec<u32>> =
                        chosen.then(|| (0..n / inner).map(|_| random.below(period as u64) as u32).collect());
                    let at = |row: usize| ids.as_ref().map_or(row % period, |ids| ids[row] as usize);
                    let y: Vec<f32> =
                        a.iter().enumerate().map(|(i, &a)| op.reference(a, b[at(i / inner)])).collect();
                    let expected = match op {
                        BinaryOp::MulSigmoid => Expected::F32(y.into_iter().map(f64::from).collect()),
                        _ => Expected::Exact(bytes_of(&y)),
                    };
                    let mut buffers = vec![
                        Buffer::Input(bytes_of(&a)),
                        Buffer::Input(bytes_of(&b)),
                        Buffer::Output(expected),
                    ];
                    buffers.extend(ids.map(|ids| Buffer::Input(bytes_of(&ids))));
                    Problem {
                        buffers,
                        launches: Box::new(move |at| {
                            let (a, b, y) = (at[0], at[1], at[2]);
                            let ids = at.get(3).copied().unwrap_or(DevicePtr::NULL);
                            Ok(vec![launch_binary(&BinaryArgs { op, a, b, ids, y, n, inner, period })?])
                        }),
                    }
                }
                Case::Unary { function, n, a, b } => {
                    let mut x = random.values(n);
                    if function == Function::Sqrt {
                        x.iter_mut().for_each(|x| *x = x.abs());
                    }
                    let y = x.iter().map(|&x| function.reference(x.into(), a.into(), b.into())).collect();
                    Problem {
                        buffers: vec![Buffer::Input(bytes_of(&x)), Buffer::Output(Expected::F32(y))],
                        launches: Box::new(move |at| {
                            Ok(vec![launch_unary(&UnaryArgs { function, x: at[0], y: at[1], n, a, b })?])
                        }),
                    }
                }
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            match *case {
                Case::Binary { op: BinaryOp::Add, n, inner: 1, period, chosen: false } if n > period => {
                    let n_rows = n / period;
                    Some(alloc::format!("ADD(type=f32,ne=[{period},1,1,1],nr=[1,{n_rows},1,1],nf=1,"))
                }
                _ => None,
            }
        }

        fn bytes(case: &Case) -> u64 {
            match *case {
                Case::Binary { n, inner, period, chosen, .. } => {
                    (8 * n + 4 * period + if chosen { 4 * n / inner } else { 0 }) as u64
                }
                Case::Unary { n, .. } => 8 * n as u64,
            }
        }

        fn flops(case: &Case) -> u64 {
            let (Case::Binary { n, .. } | Case::Unary { n, .. }) = *case;
            n as u64
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_function_has_a_case() {
            let has = |wanted| {
                Elementwise::CASES
                    .iter()
                    .any(|case| matches!(case, Case::Unary { function, .. } if *function == wanted))
            };
            for function in Function::ALL {
                assert!(has(*function), "{function:?}");
            }
        }
    }
}
