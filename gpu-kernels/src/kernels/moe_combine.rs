//! The experts' outputs of each token, weighted and added: `y[t] = Σⱼ weights[t, j] · x[t, j] + add[t]`.
//!
//! * Shapes: `x` [n, n_used, cols], `weights` [n, n_used], `add` [n, cols] or absent, `y` [n, cols]; f32, dense, 16-byte
//!   aligned, cols a multiple of 4. `y` may be `add`.
//! * Geometry: 128 threads per CTA, a float4 of a token per thread.
//! * Bytes: 4 · (n_used + 1) per output, 4 more with `add`. FLOPs: 2 · n_used per output.
//! * Tolerance: NMSE 1e-12, f32 sums in order of j, `add` last.
//!
//! Done for speed: eight experts' loads in flight per thread.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 128;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::{F32x4, Glb, math, thread};

    #[inline(always)]
    fn combine(
        x: Glb<F32x4>,
        weights: Glb<f32>,
        add: Glb<F32x4>,
        y: Glb<F32x4>,
        n: u32,
        n_used: u32,
        cols4: u32,
    ) {
        let i = thread::index_1d();
        let (token, column) = (i / cols4, i % cols4);
        if token >= n {
            return;
        }
        let x = x.offset(token as usize * n_used as usize * cols4 as usize);
        let weights = weights.offset(token as usize * n_used as usize);
        let mut sum = [0.0f32; 4];
        let mut first = 0;
        while first < n_used {
            let mut terms = [([0.0f32; 4], 0.0f32); 8];
            unroll!(J in 0..8 {
                let j = first + J as u32;
                if j < n_used {
                    terms[J] = (x.ld_nc(j * cols4 + column).0, weights.ld_nc(j));
                }
            });
            unroll!(J in 0..8 {
                let (values, weight) = terms[J];
                if first + (J as u32) < n_used {
                    unroll!(I in 0..4 {
                        sum[I] = math::fma(weight, values[I], sum[I]);
                    });
                }
            });
            first += 8;
        }
        if !add.is_null() {
            let F32x4(add) = add.ld(i);
            unroll!(I in 0..4 {
                sum[I] += add[I];
            });
        }
        y.st(i, F32x4(sum));
    }

    kernels! {
        in "moe_combine";
        pub(super) ENTRIES: threads(128);
        fn (x: Glb<F32x4>, weights: Glb<f32>, add: Glb<F32x4>, y: Glb<F32x4>, n: u32, n_used: u32, cols4: u32);
        "moe_combine_f32" => combine;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one token.
    pub fn reference(x: &[f32], weights: &[f32], add: Option<&[f32]>) -> Vec<f64> {
        let cols = x.len() / weights.len();
        let add = |c: usize| add.map_or(0.0, |add| f64::from(add[c]));
        let term = |(j, &w): (usize, &f32), c: usize| f64::from(w) * f64::from(x[j * cols + c]);
        (0..cols).map(|c| weights.iter().enumerate().map(|jw| term(jw, c)).sum::<f64>() + add(c)).collect()
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub weights: DevicePtr,
        pub add: DevicePtr,
        pub y: DevicePtr,
        pub n: usize,
        pub n_used: usize,
        pub cols: usize,
    }

    /// One launch for all tokens.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(MoeCombine::NAME);
        let (n, n_used) = (check.size("n", args.n)?, check.size("n_used", args.n_used)?);
        let cols4 = check.size("cols", args.cols)? / 4;
        check.multiple("cols", args.cols, 4, "a multiple of 4")?;
        check.size("n_used * cols", args.n_used.saturating_mul(args.cols))?;
        let vectors = check.size("n * cols", args.n.saturating_mul(args.cols))? / 4;
        for (what, at, align) in
            [("x", args.x, 16), ("weights", args.weights, 4), ("add", args.add, 16), ("y", args.y, 16)]
        {
            check.aligned(what, at, align)?;
        }
        let params = Params::new().with(args.x).with(args.weights).with(args.add).with(args.y);
        Ok(Launch {
            entry: "moe_combine_f32",
            grid: [vectors.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(n).with(n_used).with(cols4),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct MoeCombine;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n: usize,
        pub n_used: usize,
        pub cols: usize,
        pub add: bool,
    }

    impl Kernel for MoeCombine {
        const NAME: &'static str = "moe_combine";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n: 1, n_used: 1, cols: 4, add: false },
            Case { n: 3, n_used: 8, cols: 516, add: false },
            Case { n: 2, n_used: 9, cols: 260, add: true },
            Case { n: 5, n_used: 4, cols: 128, add: true },
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[
            Case { n: 1, n_used: 8, cols: 2048, add: true },
            Case { n: 512, n_used: 8, cols: 2048, add: true },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n, n_used, cols, .. } = *case;
            let (x, weights) = (random.values(n * n_used * cols), random.values(n * n_used));
            let add = case.add.then(|| random.values(n * cols));
            let token = |t: usize| {
                let add = add.as_ref().map(|add| &add[t * cols..][..cols]);
                reference(&x[t * n_used * cols..][..n_used * cols], &weights[t * n_used..][..n_used], add)
            };
            let mut buffers = vec![
                Buffer::Input(bytes_of(&x)),
                Buffer::Input(bytes_of(&weights)),
                Buffer::Output(Expected::F32((0..n).flat_map(token).collect())),
            ];
            buffers.extend(add.as_ref().map(|add| Buffer::Input(bytes_of(add))));
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let add = at.get(3).copied().unwrap_or(DevicePtr::NULL);
                    Ok(vec![launch(&Args { x: at[0], weights: at[1], add, y: at[2], n, n_used, cols })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (4 * case.n * case.cols * (case.n_used + 1 + usize::from(case.add))) as u64
        }

        fn flops(case: &Case) -> u64 {
            2 * (case.n * case.n_used * case.cols) as u64
        }
    }
}
