//! RMS norm with what usually stands beside it: `h = x + residual`, then
//! `y = h / sqrt(mean(h²) + eps) · weight + add`, row by row.
//!
//! * Shapes: `x`, `residual`, `h`, `add`, `y` [n_rows, n]; `weight` `[n]`. f32, dense, 16-byte aligned, n a multiple of 4.
//!   `residual` with `h`, `weight` and `add` may be absent; without `residual`, h is `x`. `y` in any `Output` type.
//!   `h` may be `x` or `residual`, `y` (f32) may be any of them; nothing else overlaps.
//! * Geometry: rows of up to 256 (heads) take a warp each, 8 to a CTA. Longer ones take a CTA with a warp per 256 values, up
//!   to 32; lane l of a warp holds the float4s l and l + 32 of a span of 256.
//! * Bytes: per element 4 each for `x`, `residual`, `h`, `add`, and `y`'s own; the weights come from L2. FLOPs: 4 per element.
//! * Tolerance: NMSE 1e-12. The sum of squares is f32 in partial sums of lanes, `rsqrt.approx` is good to 2^-22. Every
//!   output type is bit-equal to the f32 output converted by its own kernel.
//! * The order of the sum depends on n alone.
//!
//! Done for speed: (1) 16-byte loads, (2) one barrier per row, none for heads, (3) rows up to 8192 are read once and stay
//! in registers, (4) the product that follows finds its activations quantised, (5) the weights are on their way before
//! the kernel waits for the launch before it.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

smem! {
    struct Shared {
        /// A sum per warp.
        partial: [f32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use half::{bf16, f16};

    use super::Shared;
    use crate::device::{F32x4, Glb, Smem, U32x2, atomic, grid, math, sync, thread, warp};
    use crate::kernels::output::SPAN4;
    use crate::kernels::output::gpu::{Output, Q8_0, Q8_1, Q8K, each, read, read_early};
    use crate::kernels::reduce;

    /// One row's arrays.
    #[derive(Clone, Copy)]
    struct Row {
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        add: Glb<F32x4>,
        n4: u32,
    }

    impl Row {
        /// The sum with the residual, written to `h` if there is one.
        #[inline(always)]
        #[track_caller]
        fn sum(self, span: u32) -> [[f32; 4]; 2] {
            let mut v = read(self.x, span, self.n4, 0.0);
            if !self.residual.is_null() {
                let residual = read(self.residual, span, self.n4, 0.0);
                each(span * SPAN4, self.n4, |h, i| {
                    unroll!(J in 0..4 {
                        v[h][J] += residual[h][J];
                    });
                    self.h.st(i, F32x4(v[h]));
                });
            }
            v
        }

        /// The same values again: what this thread has written, or `x`.
        #[inline(always)]
        #[track_caller]
        fn sum_again(self, span: u32) -> [[f32; 4]; 2] {
            read(if self.residual.is_null() { self.x } else { self.h }, span, self.n4, 0.0)
        }
    }

    /// `v · scale · weight + add`.
    #[inline(always)]
    pub(crate) fn normalise(
        v: [[f32; 4]; 2],
        weight: [[f32; 4]; 2],
        add: [[f32; 4]; 2],
        scale: f32,
    ) -> [[f32; 4]; 2] {
        let mut y = v;
        unroll!(H in 0..2 {
            unroll!(J in 0..4 {
                y[H][J] = math::fma(math::mul(v[H][J], scale), weight[H][J], add[H][J]);
            });
        });
        y
    }

    /// Adds the squares to a partial sum per component.
    #[inline(always)]
    fn add_squares(squares: &mut [f32; 4], v: [[f32; 4]; 2]) {
        unroll!(H in 0..2 {
            unroll!(J in 0..4 {
                squares[J] = math::fma(v[H][J], v[H][J], squares[J]);
            });
        });
    }

    #[inline(always)]
    fn total(squares: [f32; 4]) -> f32 {
        (squares[0] + squares[1]) + (squares[2] + squares[3])
    }

    /// This lane's part of the sum of squares of a span. A row's sum is that over its spans' sums as
    /// `reduce::cta_sum` adds those of warps, as long as there are no more than 32.
    #[inline(always)]
    fn squares(v: [[f32; 4]; 2]) -> f32 {
        let mut squares = [0.0; 4];
        add_squares(&mut squares, v);
        total(squares)
    }

    /// What a row of `n_spans`, at most 32, is multiplied by, from the squares that the warps of a CTA, however many, add:
    /// span by span, of which each warp has its first one in `v`. The CTA calls together; `span_squares` [32] is free before
    /// and after the next barrier again.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn row_scale(
        x: Glb<F32x4>,
        mut v: [[f32; 4]; 2],
        n_spans: u32,
        n4: u32,
        eps: f32,
        span_squares: Smem<f32>,
    ) -> f32 {
        let (lane, n_warps) = (thread::lane_id(), thread::block_dim_x() / thread::WARP);
        let mut span = thread::warp_id();
        while span < n_spans {
            let next = read(x, span + n_warps, n4, 0.0);
            let sum = warp::sum_f32(squares(v));
            if lane == 0 {
                span_squares.st(span, sum);
            }
            (v, span) = (next, span + n_warps);
        }
        sync::sync_threads();
        let of_lane = if lane < n_spans { span_squares.ld(lane) } else { 0.0 };
        scale_of(warp::sum_f32(of_lane), n4, eps)
    }

    /// The norm of one row that other CTAs have a part in: by the CTA that comes last. As the launcher of a kernel that
    /// ends so takes it.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(crate) struct After {
        weight: Glb<F32x4>,
        /// Floats, if given.
        y: Glb<u32>,
        /// Codes and scales, if `kind` is not 0: 1 for Q8_0, 2 for Q8_1, 3 for Q8K.
        q: Glb<u32>,
        scales: Glb<U32x2>,
        counter: Glb<u32>,
        eps: f32,
        kind: u32,
    }

    impl After {
        /// Asks L2 for the weight of a row of `n4` float4s: once per grid, before the wait for earlier launches.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn prefetch(self, n4: u32) {
            if !self.weight.is_null() && thread::index_1d() == 0 {
                self.weight.cast::<u8>().prefetch(16 * n4);
            }
        }

        /// Counts this CTA, whose first warp has stored its part of `x`, a row of at most 32 spans; the last of `n_ctas`
        /// norms the row. The CTA calls together; of `scratch` nobody reads or writes anything any more.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn end(self, x: Glb<F32x4>, n4: u32, n_ctas: u32, scratch: AfterScratch) {
            let AfterScratch { span_squares, is_last } = scratch;
            if thread::warp_id() == 0 {
                // The warp's stores come before the arrival of its first lane.
                warp::sync_warp();
                if thread::lane_id() == 0 {
                    is_last.st(0, atomic::arrive_global(self.counter, 0, n_ctas).into());
                }
            }
            sync::sync_threads();
            if is_last.ld(0) == 0 {
                return;
            }
            let (first, n_warps) = (thread::warp_id(), thread::block_dim_x() / thread::WARP);
            let n_spans = n4.div_ceil(SPAN4);
            let mut w = read(self.weight, first, n4, 1.0);
            let mut v = read(x, first, n4, 0.0);
            let scale = row_scale(x, v, n_spans, n4, self.eps, span_squares);
            let mut span = first;
            while span < n_spans {
                let next = span + n_warps;
                let (next_w, next_v) = (read(self.weight, next, n4, 1.0), read(x, next, n4, 0.0));
                let normed = normalise(v, w, [[0.0; 4]; 2], scale);
                if !self.y.is_null() {
                    f32::store(normed, self.y, self.scales, span * SPAN4, n4);
                }
                match self.kind {
                    1 => Q8_0::store(normed, self.q, self.scales, span * SPAN4, n4),
                    2 => Q8_1::store(normed, self.q, self.scales, span * SPAN4, n4),
                    3 => Q8K::store(normed, self.q, self.scales, span * SPAN4, n4),
                    _ => {}
                }
                (v, w, span) = (next_v, next_w, next);
            }
        }
    }

    /// Shared memory of [`After::end`].
    #[derive(Clone, Copy)]
    pub(crate) struct AfterScratch {
        /// [32]
        pub(crate) span_squares: Smem<f32>,
        /// `[1]`
        pub(crate) is_last: Smem<u32>,
    }

    /// What the row is multiplied by, from its sum of squares.
    #[inline(always)]
    fn scale_of(sum: f32, n4: u32, eps: f32) -> f32 {
        math::rsqrt(sum / (4 * n4) as f32 + eps)
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // the entry's
    fn row_per_cta<T: Output>(
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        weight: Glb<F32x4>,
        add: Glb<F32x4>,
        y: Glb<u32>,
        scales: Glb<U32x2>,
        _n_rows: u32,
        n4: u32,
        eps: f32,
    ) {
        const { assert!(reduce::SCRATCH == 32) };
        let start = thread::block_idx_x() * n4;
        let of_row = |array: Glb<F32x4>| if array.is_null() { array } else { array.offset(start as usize) };
        let row = Row { x: of_row(x), residual: of_row(residual), h: of_row(h), add: of_row(add), n4 };
        let (first, step, spans) = (thread::warp_id(), thread::block_dim_x() / 32, n4.div_ceil(SPAN4));

        // Sum of squares. Each warp keeps its first span; more than one it has only in rows beyond 8192.
        // All loads before the store of h, which waits for the first of them; the weights before all else.
        let w = read_early(weight, first, n4, 1.0);
        grid::wait_for_earlier();
        let a = read(row.add, first, n4, 0.0);
        let v = row.sum(first);
        let mut squares = [0.0f32; 4];
        add_squares(&mut squares, v);
        let mut span = first + step;
        while span < spans {
            add_squares(&mut squares, row.sum(span));
            span += step;
        }
        let sum = reduce::cta_sum(total(squares), Shared::partial());
        let scale = scale_of(sum, n4, eps);

        // Each thread writes what it alone has read, so `y` may be `x`.
        let end = start + n4;
        T::store(normalise(v, w, a, scale), y, scales, start + first * SPAN4, end);
        let mut span = first + step;
        while span < spans {
            let (w, a) = (read(weight, span, n4, 1.0), read(row.add, span, n4, 0.0));
            let v = row.sum_again(span);
            T::store(normalise(v, w, a, scale), y, scales, start + span * SPAN4, end);
            span += step;
        }
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // the entry's
    fn row_per_warp<T: Output>(
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        weight: Glb<F32x4>,
        add: Glb<F32x4>,
        y: Glb<u32>,
        scales: Glb<U32x2>,
        n_rows: u32,
        n4: u32,
        eps: f32,
    ) {
        let index = thread::index_1d() / 32;
        let w = read_early(weight, 0, n4, 1.0);
        grid::wait_for_earlier();
        // A whole warp leaves.
        if index >= n_rows {
            return;
        }
        let start = index * n4;
        let of_row = |array: Glb<F32x4>| if array.is_null() { array } else { array.offset(start as usize) };
        let row = Row { x: of_row(x), residual: of_row(residual), h: of_row(h), add: of_row(add), n4 };
        let a = read(row.add, 0, n4, 0.0);
        let v = row.sum(0);
        let sum = warp::sum_f32(squares(v));
        T::store(normalise(v, w, a, scale_of(sum, n4, eps)), y, scales, start, start + n4);
    }

    kernels! {
        in "rms_norm";
        pub(super) CTA: threads(1024), early;
        fn (x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, weight: Glb<F32x4>, add: Glb<F32x4>, y: Glb<u32>,
            scales: Glb<U32x2>, n_rows: u32, n4: u32, eps: f32);
        "rms_norm_f32" => row_per_cta::<f32>;
        "rms_norm_f16" => row_per_cta::<f16>;
        "rms_norm_bf16" => row_per_cta::<bf16>;
        "rms_norm_Q8_0" => row_per_cta::<Q8_0>;
        "rms_norm_Q8_1" => row_per_cta::<Q8_1>;
        "rms_norm_Q8K" => row_per_cta::<Q8K>;
    }

    kernels! {
        in "rms_norm";
        pub(super) WARP: threads(256), early;
        fn (x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, weight: Glb<F32x4>, add: Glb<F32x4>, y: Glb<u32>,
            scales: Glb<U32x2>, n_rows: u32, n4: u32, eps: f32);
        "rms_norm_head_f32" => row_per_warp::<f32>;
        "rms_norm_head_f16" => row_per_warp::<f16>;
        "rms_norm_head_bf16" => row_per_warp::<bf16>;
        "rms_norm_head_Q8_0" => row_per_warp::<Q8_0>;
        "rms_norm_head_Q8_1" => row_per_warp::<Q8_1>;
        "rms_norm_head_Q8K" => row_per_warp::<Q8K>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{vec, vec::Vec};

    use quant::act::ActKind;

    use super::Shared;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output::{self, Output, SPAN4};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row, the residual already in `x`.
    pub fn reference(x: &[f32], weight: Option<&[f32]>, add: Option<&[f32]>, eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / libm::sqrt(mean + f64::from(eps));
        let weight = |i: usize| weight.map_or(1.0, |w| f64::from(w[i]));
        let add = |i: usize| add.map_or(0.0, |a| f64::from(a[i]));
        x.iter().enumerate().map(|(i, &x)| f64::from(x) * scale * weight(i) + add(i)).collect()
    }

    /// Arguments; see the contract. Absent arrays, and `scales` of a float output, are [`DevicePtr::NULL`].
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub residual: DevicePtr,
        pub h: DevicePtr,
        pub weight: DevicePtr,
        pub add: DevicePtr,
        pub output: Output,
        pub y: DevicePtr,
        pub scales: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
        pub eps: f32,
    }

    /// Longest row that a warp takes.
    const WARP_N: usize = 4 * SPAN4 as usize;
    const WARP_THREADS: u32 = 256;

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(RmsNorm::NAME);
        let n4 = check.size("n", args.n)? / 4;
        let n_rows = check.size("n_rows", args.n_rows)?;
        check.size("n_rows * n", args.n_rows.saturating_mul(args.n))?;
        args.output.check(check, args.n, args.y, args.scales)?;
        let arrays = [
            ("x", args.x),
            ("residual", args.residual),
            ("h", args.h),
            ("weight", args.weight),
            ("add", args.add),
        ];
        for (what, at) in arrays {
            check.aligned(what, at, 16)?;
        }
        let params = arrays.iter().fold(Params::new(), |params, (_, at)| params.with(*at));
        let (entries, grid, cta, smem_bytes) = if args.n <= WARP_N {
            let names = [
                "rms_norm_head_f32",
                "rms_norm_head_f16",
                "rms_norm_head_bf16",
                "rms_norm_head_Q8_0",
                "rms_norm_head_Q8_1",
                "rms_norm_head_Q8K",
            ];
            (names, n_rows.div_ceil(WARP_THREADS / 32), WARP_THREADS, 0)
        } else {
            let names = [
                "rms_norm_f32",
                "rms_norm_f16",
                "rms_norm_bf16",
                "rms_norm_Q8_0",
                "rms_norm_Q8_1",
                "rms_norm_Q8K",
            ];
            (names, n_rows, 32 * n4.div_ceil(SPAN4).min(32), Shared::BYTES)
        };
        Ok(Launch {
            entry: entries[args.output.index()],
            grid: [grid, 1, 1],
            cta,
            cluster: 1,
            smem_bytes,
            params: params.with(args.y).with(args.scales).with(n_rows).with(n4).with(args.eps),
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
        pub residual: bool,
        pub weight: bool,
        pub add: bool,
        pub output: Output,
    }

    const fn case(n_rows: usize, n: usize, [residual, weight, add]: [bool; 3], output: Output) -> Case {
        Case { n_rows, n, residual, weight, add, output }
    }
    const PLAIN: [bool; 3] = [false, false, false];
    const WEIGHT: [bool; 3] = [false, true, false];
    const ADD: [bool; 3] = [false, false, true];
    const WEIGHT_ADD: [bool; 3] = [false, true, true];
    const RESIDUAL: [bool; 3] = [true, true, false];
    const ALL: [bool; 3] = [true, true, true];

    impl Kernel for RmsNorm {
        const NAME: &'static str = "rms_norm";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 4, PLAIN, Output::F32),
            case(9, 64, WEIGHT, Output::F32),
            case(17, 128, RESIDUAL, Output::F16),
            case(3, 256, WEIGHT, Output::Act(ActKind::Q8K)),
            case(2, 224, ALL, Output::Act(ActKind::Q8_0)),
            case(1, 252, ALL, Output::Bf16),
            case(3, 576, WEIGHT, Output::F32),
            case(3, 576, RESIDUAL, Output::Act(ActKind::Q8_1)),
            case(2, 1020, WEIGHT_ADD, Output::F32),
            case(2, 1024, ADD, Output::F16),
            case(1, 1028, ALL, Output::Bf16),
            case(2, 2048, RESIDUAL, Output::Act(ActKind::Q8_0)),
            case(1, 4096, WEIGHT, Output::Act(ActKind::Q8K)),
            case(1, 8192, RESIDUAL, Output::F32),
            case(1, 8196, ALL, Output::F32),
            case(1, 8448, RESIDUAL, Output::Act(ActKind::Q8K)),
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[
            case(1, 4096, RESIDUAL, Output::Act(ActKind::Q8K)),
            case(1024, 4096, WEIGHT, Output::F32),
            case(1024, 4096, RESIDUAL, Output::Act(ActKind::Q8K)),
            case(1024, 4096, RESIDUAL, Output::Act(ActKind::Q8_0)),
            case(32_768, 128, WEIGHT, Output::F32),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::CTA, super::gpu::WARP];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, output, .. } = *case;
            let eps = 1e-5;
            let x = random.values(n_rows * n);
            let residual = case.residual.then(|| random.values(n_rows * n));
            let weight = case.weight.then(|| random.values(n));
            let add = case.add.then(|| random.values(n_rows * n));
            let h: Vec<f32> = match &residual {
                Some(residual) => x.iter().zip(residual).map(|(x, r)| x + r).collect(),
                None => x.clone(),
            };
            let row = |r: usize| {
                reference(&h[r * n..][..n], weight.as_deref(), add.as_deref().map(|a| &a[r * n..][..n]), eps)
            };
            let expected = (0..n_rows).flat_map(row).collect();
            let mut buffers = vec![Buffer::Input(bytes_of(&x))];
            let mut optional = |values: Option<&[f32]>| {
                values.map(|values| {
                    buffers.push(Buffer::Input(bytes_of(values)));
                    buffers.len() - 1
                })
            };
            let given =
                [optional(residual.as_deref()), optional(weight.as_deref()), optional(add.as_deref())];
            let h_at = residual.is_some().then(|| {
                buffers.push(Buffer::Output(Expected::Exact(bytes_of(&h))));
                buffers.len() - 1
            });
            let problem =
                output::problem(output, [n_rows, n], buffers, expected, move |at, output, [y, scales]| {
                    let [residual, weight, add] = given.map(|i| i.map_or(DevicePtr::NULL, |i| at[i]));
                    let h = h_at.map_or(DevicePtr::NULL, |i| at[i]);
                    launch(&Args { x: at[0], residual, h, weight, add, output, y, scales, n_rows, n, eps })
                });
            if random.is_timing() { output::last_launch(problem) } else { problem }
        }

        fn bytes(case: &Case) -> u64 {
            let (y, scales) = case.output.bytes(case.n_rows * case.n);
            let arrays = 1 + 2 * usize::from(case.residual) + usize::from(case.add);
            let weight = 4 * case.n * usize::from(case.weight);
            (case.n_rows * case.n * 4 * arrays + weight + y + scales) as u64
        }

        fn flops(case: &Case) -> u64 {
            4 * (case.n_rows * case.n) as u64
        }
    }
}
