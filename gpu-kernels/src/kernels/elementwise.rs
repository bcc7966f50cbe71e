//! Sums, products and scaling, element by element, in f32.
//!
//! * `add`, `mul`: `y = a + b`, `y = a · b`; `b` has `period` elements and repeats (a row over all rows, or n for the
//!   same shape). `scale`: `y = a · scale + bias`, rounded once.
//! * Shapes: n elements, dense, 16-byte aligned; n and period multiples of 4, period divides n. `y` may be `a` or, where
//!   the period is n, `b`.
//! * Geometry: 256 threads per CTA, a float4 per thread.
//! * Bytes: 8n, and 4 · period for `b`. FLOPs: n (`scale`: 2n).
//! * Tolerance: exact; one rounding, the same as the reference's.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::{F32x4, Glb, math, thread};

    #[inline(always)]
    #[track_caller]
    fn binary(
        a: Glb<F32x4>,
        b: Glb<F32x4>,
        y: Glb<F32x4>,
        n4: u32,
        period4: u32,
        f: impl Fn(f32, f32) -> f32,
    ) {
        let i = thread::index_1d();
        if i < n4 {
            let (F32x4(mut v), F32x4(w)) = (a.ld(i), b.ld(i % period4));
            unroll!(J in 0..4 {
                v[J] = f(v[J], w[J]);
            });
            y.st(i, F32x4(v));
        }
    }

    #[inline(always)]
    fn add(a: Glb<F32x4>, b: Glb<F32x4>, y: Glb<F32x4>, n4: u32, period4: u32) {
        binary(a, b, y, n4, period4, |a, b| a + b);
    }

    #[inline(always)]
    fn mul(a: Glb<F32x4>, b: Glb<F32x4>, y: Glb<F32x4>, n4: u32, period4: u32) {
        binary(a, b, y, n4, period4, |a, b| a * b);
    }

    #[inline(always)]
    fn scale(a: Glb<F32x4>, y: Glb<F32x4>, n4: u32, scale: f32, bias: f32) {
        let i = thread::index_1d();
        if i < n4 {
            let F32x4(mut v) = a.ld(i);
            unroll!(J in 0..4 {
                v[J] = math::fma(v[J], scale, bias);
            });
            y.st(i, F32x4(v));
        }
    }

    kernels! {
        in "elementwise";
        pub(super) BINARY: threads(256);
        fn (a: Glb<F32x4>, b: Glb<F32x4>, y: Glb<F32x4>, n4: u32, period4: u32);
        "add_f32" => add;
        "mul_f32" => mul;
    }

    kernels! {
        in "elementwise";
        pub(super) SCALE: threads(256);
        fn (a: Glb<F32x4>, y: Glb<F32x4>, n4: u32, factor: f32, bias: f32);
        "scale_f32" => scale;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// What to do with each element.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Op {
        /// `a + b`.
        Add,
        /// `a · b`.
        Mul,
        /// `a · factor + bias`.
        Scale {
            /// Factor.
            factor: f32,
            /// Bias.
            bias: f32,
        },
    }

    /// The definition, in f32: one rounding. `b` is not read for [`Op::Scale`].
    pub fn reference(op: Op, a: &[f32], b: &[f32]) -> Vec<f32> {
        let b = |i: usize| b[i % b.len()];
        let element = |(i, &a): (usize, &f32)| match op {
            Op::Add => a + b(i),
            Op::Mul => a * b(i),
            Op::Scale { factor, bias } => libm::fmaf(a, factor, bias),
        };
        a.iter().enumerate().map(element).collect()
    }

    /// Arguments; see the contract. `b` and `period` are not used by [`Op::Scale`].
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub op: Op,
        pub a: DevicePtr,
        pub b: DevicePtr,
        pub y: DevicePtr,
        pub n: usize,
        pub period: usize,
    }

    /// One launch for all elements.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Elementwise::NAME);
        let n4 = check.size("n", args.n)? / 4;
        check.multiple("n", args.n, 4, "a multiple of 4")?;
        for (what, at) in [("a", args.a), ("b", args.b), ("y", args.y)] {
            check.aligned(what, at, 16)?;
        }
        let params = Params::new().with(args.a);
        let (entry, params) = match args.op {
            Op::Scale { factor, bias } => ("scale_f32", params.with(args.y).with(n4).with(factor).with(bias)),
            Op::Add | Op::Mul => {
                let period4 = check.size("period", args.period)? / 4;
                check.multiple("period", args.period, 4, "a multiple of 4")?;
                check.multiple("n", args.n, args.period, "a multiple of the period")?;
                let entry = if args.op == Op::Add { "add_f32" } else { "mul_f32" };
                (entry, params.with(args.b).with(args.y).with(n4).with(period4))
            }
        };
        Ok(Launch {
            entry,
            grid: [n4.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params,
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Elementwise;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub op: Op,
        pub n: usize,
        pub period: usize,
    }

    const SCALE: Op = Op::Scale { factor: 0.3, bias: -1.5 };

    impl Kernel for Elementwise {
        const NAME: &'static str = "elementwise";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { op: Op::Add, n: 4, period: 4 },
            Case { op: Op::Add, n: 1020, period: 1020 },
            Case { op: Op::Add, n: 3 * 1024, period: 1024 },
            Case { op: Op::Mul, n: 1028, period: 4 },
            Case { op: Op::Mul, n: 4096, period: 2048 },
            Case { op: SCALE, n: 1020, period: 4 },
            Case { op: SCALE, n: 1028, period: 4 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::BINARY, super::gpu::SCALE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { op, n, period } = *case;
            let (a, b) = (random.values(n), random.values(period));
            let expected = reference(op, &a, &b);
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&a)),
                    Buffer::Input(bytes_of(&b)),
                    Buffer::Output(Expected::Exact(bytes_of(&expected))),
                ],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args { op, a: at[0], b: at[1], y: at[2], n, period })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            let b = if case.op == SCALE { 0 } else { case.period };
            (8 * case.n + 4 * b) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n * if case.op == SCALE { 2 } else { 1 }) as u64
        }
    }
}
