//! RMS norm with its usual followers: `y = x / sqrt(mean(x²) + eps) · weight + add`, row by row.
//!
//! * Shapes: `x`, `y` [n_rows, n]; `weight` `[n]` or absent; `add` `[n_rows, n]` or absent. f32, dense, 16-byte aligned,
//!   n a multiple of 4. `y` may be `x`; nothing else overlaps.
//! * Geometry: one CTA of 256 threads per row, thread t takes the float4s t, t + 256, … in both passes.
//! * Bytes: n_rows · n · 4 · (2, or 3 with `add`) + n · 4; the second pass finds its row in L1/L2. FLOPs: 4 per element.
//! * Tolerance: NMSE 1e-12. The sum of squares is f32 in 256 partial sums, `rsqrt.approx` is good to 2^-22.
//! * The order of the sum depends on n alone.
//!
//! Done for speed: (1) 16-byte loads, (2) one barrier per row.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

smem! {
    struct Shared {
        /// A sum per warp.
        partial: [f32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{Shared, THREADS};
    use crate::device::{F32x4, Glb, math, thread};
    use crate::kernels::reduce;

    #[inline(always)]
    fn rms_norm(x: Glb<F32x4>, weight: Glb<F32x4>, add: Glb<F32x4>, y: Glb<F32x4>, n4: u32, eps: f32) {
        const { assert!(reduce::SCRATCH == 32) };
        let row = thread::block_idx_x() as usize * n4 as usize;
        let (x, y) = (x.offset(row), y.offset(row));

        // Sum of squares: a partial sum per component and thread.
        let mut squares = [0.0f32; 4];
        let mut i = thread::thread_idx_x();
        while i < n4 {
            let F32x4(v) = x.ld(i);
            unroll!(J in 0..4 {
                squares[J] = math::fma(v[J], v[J], squares[J]);
            });
            i += THREADS;
        }
        let sum = reduce::cta_sum((squares[0] + squares[1]) + (squares[2] + squares[3]), Shared::partial());
        let scale = math::rsqrt(sum / (4 * n4) as f32 + eps);

        // Each thread writes what it alone has read, so `y` may be `x`.
        let mut i = thread::thread_idx_x();
        while i < n4 {
            let F32x4(mut v) = x.ld(i);
            unroll!(J in 0..4 {
                v[J] *= scale;
            });
            if !weight.is_null() {
                let F32x4(w) = weight.ld_nc(i);
                unroll!(J in 0..4 {
                    v[J] *= w[J];
                });
            }
            if !add.is_null() {
                let F32x4(a) = add.offset(row).ld_nc(i);
                unroll!(J in 0..4 {
                    v[J] += a[J];
                });
            }
            y.st(i, F32x4(v));
            i += THREADS;
        }
    }

    kernels! {
        in "rms_norm";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<F32x4>, weight: Glb<F32x4>, add: Glb<F32x4>, y: Glb<F32x4>, n4: u32, eps: f32);
        "rms_norm_f32" => rms_norm;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row.
    pub fn reference(x: &[f32], weight: Option<&[f32]>, add: Option<&[f32]>, eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / libm::sqrt(mean + f64::from(eps));
        let weight = |i: usize| weight.map_or(1.0, |w| f64::from(w[i]));
        let add = |i: usize| add.map_or(0.0, |a| f64::from(a[i]));
        x.iter().enumerate().map(|(i, &x)| f64::from(x) * scale * weight(i) + add(i)).collect()
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub weight: DevicePtr,
        pub add: DevicePtr,
        pub y: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
        pub eps: f32,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(RmsNorm::NAME);
        let n = check.size("n", args.n)?;
        check.multiple("n", args.n, 4, "a multiple of 4")?;
        for (what, at) in [("x", args.x), ("weight", args.weight), ("add", args.add), ("y", args.y)] {
            check.aligned(what, at, 16)?;
        }
        let params = Params::new().with(args.x).with(args.weight).with(args.add).with(args.y);
        Ok(Launch {
            entry: "rms_norm_f32",
            grid: [check.size("n_rows", args.n_rows)?, 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: params.with(n / 4).with(args.eps),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct RmsNorm;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub weight: bool,
        pub add: bool,
    }

    impl Kernel for RmsNorm {
        const NAME: &'static str = "rms_norm";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_rows: 1, n: 4, weight: false, add: false },
            Case { n_rows: 3, n: 576, weight: true, add: false },
            Case { n_rows: 2, n: 1020, weight: true, add: true },
            Case { n_rows: 2, n: 1024, weight: false, add: true },
            Case { n_rows: 1, n: 1028, weight: true, add: true },
            Case { n_rows: 1, n: 4096, weight: true, add: false },
        ];
        const NMSE_MAX: f64 = 1e-12;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, .. } = *case;
            let eps = 1e-5;
            let x = random.values(n_rows * n);
            let weight = case.weight.then(|| random.values(n));
            let add = case.add.then(|| random.values(n_rows * n));
            let row = |r: usize| {
                reference(&x[r * n..][..n], weight.as_deref(), add.as_deref().map(|a| &a[r * n..][..n]), eps)
            };
            let expected = (0..n_rows).flat_map(row).collect();
            let mut buffers = vec![Buffer::Input(bytes_of(&x)), Buffer::Output(Expected::F32(expected))];
            let mut optional = |values: Option<&[f32]>| {
                values.map(|values| {
                    buffers.push(Buffer::Input(bytes_of(values)));
                    buffers.len() - 1
                })
            };
            let (weight, add) = (optional(weight.as_deref()), optional(add.as_deref()));
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let given = |i: Option<usize>| i.map_or(DevicePtr::NULL, |i| at[i]);
                    let args =
                        Args { x: at[0], weight: given(weight), add: given(add), y: at[1], n_rows, n, eps };
                    Ok(vec![launch(&args)?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (case.n_rows * case.n * 4 * (2 + usize::from(case.add)) + case.n * 4 * usize::from(case.weight))
                as u64
        }

        fn flops(case: &Case) -> u64 {
            4 * (case.n_rows * case.n) as u64
        }
    }
}
