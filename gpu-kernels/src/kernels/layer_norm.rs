//! Layer norm: `y = (x − mean) / sqrt(var + eps) · weight + bias`, row by row.
//!
//! * Shapes: `x` [n_rows, n], `weight`, `bias` `[n]` or absent, f32; `y` [n_rows, n] in any `Output` type. Dense, 16-byte
//!   aligned, n a multiple of 4. `y` (f32) may be `x`; nothing else overlaps.
//! * Geometry: a CTA per row with a warp per 256 values, up to 32; lane l of a warp holds the float4s l and l + 32 of a span.
//! * Bytes: 4 per element and `y`'s own; weight and bias come from L2. FLOPs: 7 per element.
//! * Tolerance: NMSE 1e-12. The variance is that of differences from the mean, summed in a second pass over registers.
//!   Every output type is bit-equal to the f32 output converted by its own kernel.
//! * The order of the sums depends on n alone.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

smem! {
    struct Shared {
        /// A sum of values per warp.
        values: [f32; 32],
        /// A sum of squares per warp; apart from the values, so that no barrier is needed between the two reductions.
        squares: [f32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::Shared;
    use crate::device::{F32x4, Glb, Smem, U32x2, math, thread};
    use crate::kernels::output::SPAN4;
    use crate::kernels::output::gpu::{Output, Q8_0, Q8_1, each, read};
    use crate::kernels::reduce;

    /// Sum of `f` over a row, whose first span per warp is `held`.
    #[inline(always)]
    #[track_caller]
    fn sum_of_row(
        x: Glb<F32x4>,
        held: [[f32; 4]; 2],
        n4: u32,
        scratch: Smem<f32>,
        f: impl Fn(f32, f32) -> f32,
    ) -> f32 {
        let (mut v, mut span, step) = (held, thread::warp_id(), thread::block_dim_x() / 32);
        let mut sums = [0.0f32; 4];
        loop {
            // Past the end there is nothing, not a zero.
            each(span * SPAN4, n4, |h, _| {
                unroll!(J in 0..4 {
                    sums[J] = f(v[h][J], sums[J]);
                });
            });
            span += step;
            if span * SPAN4 >= n4 {
                break;
            }
            v = read(x, span, n4, 0.0);
        }
        reduce::cta_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch)
    }

    #[inline(always)]
    fn layer_norm<T: Output>(
        x: Glb<F32x4>,
        weight: Glb<F32x4>,
        bias: Glb<F32x4>,
        y: Glb<u32>,
        scales: Glb<U32x2>,
        n4: u32,
        eps: f32,
    ) {
        const { assert!(reduce::SCRATCH == 32) };
        let start = thread::block_idx_x() * n4;
        let x = x.offset(start as usize);
        let (mut span, step) = (thread::warp_id(), thread::block_dim_x() / 32);
        let mut v = read(x, span, n4, 0.0);

        let n = (4 * n4) as f32;
        let mean = sum_of_row(x, v, n4, Shared::values(), |v, sum| sum + v) / n;
        let squares = |v: f32, sum: f32| math::fma(v - mean, v - mean, sum);
        let variance = sum_of_row(x, v, n4, Shared::squares(), squares) / n;
        let scale = math::rsqrt(variance + eps);

        // Each thread writes what it alone has read, so `y` may be `x`.
        loop {
            let (w, b) = (read(weight, span, n4, 1.0), read(bias, span, n4, 0.0));
            unroll!(H in 0..2 {
                unroll!(J in 0..4 {
                    v[H][J] = math::fma(math::mul(v[H][J] - mean, scale), w[H][J], b[H][J]);
                });
            });
            T::store(v, 1.0, y, scales, start + span * SPAN4, start + n4);
            span += step;
            if span * SPAN4 >= n4 {
                break;
            }
            v = read(x, span, n4, 0.0);
        }
    }

    kernels! {
        in "layer_norm";
        pub(super) ENTRIES: threads(1024);
        fn (x: Glb<F32x4>, weight: Glb<F32x4>, bias: Glb<F32x4>, y: Glb<u32>, scales: Glb<U32x2>, n4: u32, eps: f32);
        "layer_norm_f32" => layer_norm::<f32>;
        "layer_norm_f16" => layer_norm::<f16>;
        "layer_norm_bf16" => layer_norm::<bf16>;
        "layer_norm_Q8_0" => layer_norm::<Q8_0>;
        "layer_norm_Q8_1" => layer_norm::<Q8_1>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{vec, vec::Vec};

    use super::Shared;
    use crate::case::{Buffer, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output::{self, Output, SPAN4};
    use crate::kernels::quantise_act::Kind;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row.
    pub fn reference(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let difference = |x: f32| f64::from(x) - mean;
        let variance = x.iter().map(|&x| difference(x) * difference(x)).sum::<f64>() / n;
        let scale = 1.0 / libm::sqrt(variance + f64::from(eps));
        let at =
            |values: Option<&[f32]>, i: usize, otherwise: f64| values.map_or(otherwise, |v| f64::from(v[i]));
        x.iter()
            .enumerate()
            .map(|(i, &x)| difference(x) * scale * at(weight, i, 1.0) + at(bias, i, 0.0))
            .collect()
    }

    /// Arguments; see the contract. Absent arrays, and `scales` of a float output, are [`DevicePtr::NULL`].
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub weight: DevicePtr,
        pub bias: DevicePtr,
        pub output: Output,
        pub y: DevicePtr,
        pub scales: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
        pub eps: f32,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(LayerNorm::NAME);
        let n4 = check.size("n", args.n)? / 4;
        let n_rows = check.size("n_rows", args.n_rows)?;
        check.size("n_rows * n", args.n_rows.saturating_mul(args.n))?;
        args.output.check(check, args.n, args.y, args.scales)?;
        let arrays = [("x", args.x), ("weight", args.weight), ("bias", args.bias)];
        for (what, at) in arrays {
            check.aligned(what, at, 16)?;
        }
        let params = arrays.iter().fold(Params::new(), |params, (_, at)| params.with(*at));
        let names =
            ["layer_norm_f32", "layer_norm_f16", "layer_norm_bf16", "layer_norm_Q8_0", "layer_norm_Q8_1"];
        Ok(Launch {
            entry: names[args.output.index()],
            grid: [n_rows, 1, 1],
            cta: 32 * n4.div_ceil(SPAN4).min(32),
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: params.with(args.y).with(args.scales).with(n4).with(args.eps),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct LayerNorm;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub weight: bool,
        pub bias: bool,
        pub output: Output,
    }

    const fn case(n_rows: usize, n: usize, weight: bool, bias: bool, output: Output) -> Case {
        Case { n_rows, n, weight, bias, output }
    }

    impl Kernel for LayerNorm {
        const NAME: &'static str = "layer_norm";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 4, false, false, Output::F32),
            case(3, 384, true, true, Output::F32),
            case(3, 384, true, true, Output::Act(Kind::Q8_0)),
            case(2, 1020, true, false, Output::F16),
            case(2, 1028, false, true, Output::Bf16),
            case(1, 2048, true, true, Output::Act(Kind::Q8_0)),
            case(1, 8196, true, true, Output::F32),
            case(1, 8224, true, true, Output::Act(Kind::Q8_1)),
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[case(4096, 1024, true, true, Output::F32)];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, output, .. } = *case;
            let eps = 1e-5;
            // Off centre, as the sum of a residual stream is.
            let x: Vec<f32> = random.values(n_rows * n).iter().map(|x| x + 0.75).collect();
            let weight = case.weight.then(|| random.values(n));
            let bias = case.bias.then(|| random.values(n));
            let expected =
                x.chunks(n).flat_map(|x| reference(x, weight.as_deref(), bias.as_deref(), eps)).collect();
            let mut buffers = vec![Buffer::Input(bytes_of(&x))];
            let mut optional = |values: Option<&[f32]>| {
                values.map(|values| {
                    buffers.push(Buffer::Input(bytes_of(values)));
                    buffers.len() - 1
                })
            };
            let given = [optional(weight.as_deref()), optional(bias.as_deref())];
            let problem =
                output::problem(output, [n_rows, n], buffers, expected, move |at, output, [y, scales]| {
                    let [weight, bias] = given.map(|i| i.map_or(DevicePtr::NULL, |i| at[i]));
                    launch(&Args { x: at[0], weight, bias, output, y, scales, n_rows, n, eps })
                });
            if random.is_timing() { output::last_launch(problem) } else { problem }
        }

        fn bytes(case: &Case) -> u64 {
            let (y, scales) = case.output.bytes(case.n_rows * case.n);
            let arrays = usize::from(case.weight) + usize::from(case.bias);
            (4 * case.n_rows * case.n + 4 * case.n * arrays + y + scales) as u64
        }

        fn flops(case: &Case) -> u64 {
            7 * (case.n_rows * case.n) as u64
        }
    }
}
