//! RMS norm with what usually stands before it: `h = x + residual`, then `y = h / sqrt(mean(h²) + eps) · weight`, row by row.
//!
//! * Shapes: `x`, `residual`, `h`, `y` [n_rows, n]; `weight` `[n]`. f32, dense, 16-byte aligned, n a multiple of 4.
//!   `residual` with `h`, and `weight` may be absent; without `residual`, h is `x`. `y` in any `Output` type.
//!   `h` may be `x` or `residual`, `y` (f32) may be any of them; nothing else overlaps.
//! * Geometry: rows of up to 256 (heads) take a warp each, 8 to a CTA. Longer ones take a CTA with a warp per 256 values, up
//!   to 32; lane l of a warp holds the float4s l and l + 32 of a span of 256.
//! * Bytes: per element 4 each for `x`, `residual`, `h`, and `y`'s own; the weights come from L2. FLOPs: 4 per element.
//! * Tolerance: NMSE 1e-12. The sum of squares is f32 in partial sums, `rsqrt.approx` is good to 2^-22.
//! * `y` is `h · weight` times the row's factor. So quantised codes do not depend on the factor: a product that ends a
//!   group of 32 values of `h` quantises them, writes the group's sum of squares, and the product that follows multiplies
//!   scales by the factor (`mmvq`'s `After::Norm` and `Before::Factor`), to the bits of this kernel.
//! * The order of the sum depends on n alone: each group of 32 values by a tree of neighbours; lane l of a warp adds the
//!   groups l, l + 32, … in order; the lanes by a butterfly.
//!
//! Done for speed: (1) 16-byte loads, (2) one barrier per row, none for heads, (3) rows up to 8192 are read once and stay
//! in registers, (4) the product that follows finds its activations quantised, (5) the weights are on their way before
//! the kernel waits for the launch before it.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use half::{bf16, f16};

    use crate::device::{F32x4, Glb, Smem, U32x2, grid, math, sync, thread, warp};
    use crate::kernels::output::SPAN4;
    use crate::kernels::output::gpu::{Output, Q8_0, Q8_1, each, read, read_early};

    /// Groups of 32 values in a span.
    const SPAN_GROUPS: u32 = SPAN4 / 8;

    /// One row's arrays.
    #[derive(Clone, Copy)]
    struct Row {
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        n4: u32,
    }

    impl Row {
        /// The arrays' row `row`.
        #[inline(always)]
        fn of(x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, n4: u32, row: u32) -> Row {
            let start = row as usize * n4 as usize;
            let of_row = |array: Glb<F32x4>| if array.is_null() { array } else { array.offset(start) };
            Row { x: of_row(x), residual: of_row(residual), h: of_row(h), n4 }
        }

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

    /// `v · weight`.
    #[inline(always)]
    pub(crate) fn weighted(v: [[f32; 4]; 2], weight: [[f32; 4]; 2]) -> [[f32; 4]; 2] {
        let mut y = v;
        unroll!(H in 0..2 {
            unroll!(J in 0..4 {
                y[H][J] = math::mul(v[H][J], weight[H][J]);
            });
        });
        y
    }

    /// `sum` with those of the lanes whose numbers differ from this one's in the bits `from`, … up to `to`.
    #[inline(always)]
    #[track_caller]
    fn with_neighbours(mut sum: f32, from: u32, to: u32) -> f32 {
        let mut lanes = from;
        while lanes <= to {
            sum += f32::from_bits(warp::shfl_xor(sum.to_bits(), lanes));
            lanes *= 2;
        }
        sum
    }

    /// Sum of squares of the warp's group, of which each lane has a value.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn squares_of_group(v: f32) -> f32 {
        with_neighbours(math::mul(v, v), 1, 16)
    }

    /// Sums of squares of this lane's two groups of a span: those of eight neighbouring lanes.
    #[inline(always)]
    #[track_caller]
    fn squares_of_span(v: [[f32; 4]; 2]) -> [f32; 2] {
        v.map(|v| {
            let [a, b, c, d] = v.map(|v| math::mul(v, v));
            with_neighbours((a + b) + (c + d), 1, 4)
        })
    }

    /// Writes the sums of squares of the groups of a span that there are.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn put_squares(squares: Smem<f32>, span: u32, n_groups: u32, v: [[f32; 4]; 2]) {
        let sums = squares_of_span(v);
        let lane = thread::lane_id();
        unroll!(H in 0..2 {
            let group = span * SPAN_GROUPS + 4 * H as u32 + lane / 8;
            if lane.is_multiple_of(8) && group < n_groups {
                squares.st(group, sums[H]);
            }
        });
    }

    /// What a row of `n4` float4s is multiplied by, from its sum of squares.
    #[inline(always)]
    fn factor_of(sum: f32, n4: u32, eps: f32) -> f32 {
        math::rsqrt(sum / (4 * n4) as f32 + eps)
    }

    /// The same from its groups' sums, by each warp.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn factor_of_groups(of: impl Fn(u32) -> f32, n4: u32, eps: f32) -> f32 {
        let n_groups = n4.div_ceil(8);
        let (mut sum, mut start) = (0.0, 0);
        while start < n_groups {
            // Four loads are under way before the first is waited for.
            let mut of_groups = [0.0; 4];
            unroll!(I in 0..4 {
                let group = start + 32 * I as u32 + thread::lane_id();
                if group < n_groups {
                    of_groups[I] = of(group);
                }
            });
            unroll!(I in 0..4 {
                sum += of_groups[I];
            });
            start += 128;
        }
        factor_of(warp::sum_f32(sum), n4, eps)
    }

    #[inline(always)]
    fn row_per_cta<T: Output>(
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        weight: Glb<F32x4>,
        y: Glb<u32>,
        scales: Glb<U32x2>,
        _n_rows: u32,
        n4: u32,
        eps: f32,
    ) {
        let row = Row::of(x, residual, h, n4, thread::block_idx_x());
        let (first, step, spans) = (thread::warp_id(), thread::block_dim_x() / 32, n4.div_ceil(SPAN4));
        let n_groups = n4.div_ceil(8);
        let squares: Smem<f32> = Smem::dynamic(0, n_groups);

        // Sums of squares. Each warp keeps its first span; more than one it has only in rows beyond 8192.
        // All loads before the store of h, which waits for the first of them; the weights before all else.
        let w = read_early(weight, first, n4, 1.0);
        grid::wait_for_earlier();
        let v = row.sum(first);
        put_squares(squares, first, n_groups, v);
        let mut span = first + step;
        while span < spans {
            put_squares(squares, span, n_groups, row.sum(span));
            span += step;
        }
        sync::sync_threads();
        let factor = factor_of_groups(|group| squares.ld(group), n4, eps);

        // Each thread writes what it alone has read, so `y` may be `x`.
        let start = thread::block_idx_x() * n4;
        let end = start + n4;
        T::store(weighted(v, w), factor, y, scales, start + first * SPAN4, end);
        let mut span = first + step;
        while span < spans {
            let w = read(weight, span, n4, 1.0);
            T::store(weighted(row.sum_again(span), w), factor, y, scales, start + span * SPAN4, end);
            span += step;
        }
    }

    #[inline(always)]
    fn row_per_warp<T: Output>(
        x: Glb<F32x4>,
        residual: Glb<F32x4>,
        h: Glb<F32x4>,
        weight: Glb<F32x4>,
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
        let v = Row::of(x, residual, h, n4, index).sum(0);
        // Eight groups at most: the butterfly of `factor_of_groups` over lanes that have one each, less its zeros.
        let [low, high] = squares_of_span(v);
        let sum = low + high;
        let sum = sum + f32::from_bits(warp::shfl_xor(sum.to_bits(), 16));
        let sum = sum + f32::from_bits(warp::shfl_xor(sum.to_bits(), 8));
        let (start, factor) = (index * n4, factor_of(sum, n4, eps));
        T::store(weighted(v, w), factor, y, scales, start, start + n4);
    }

    kernels! {
        in "rms_norm";
        pub(super) CTA: threads(1024), early;
        fn (x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, weight: Glb<F32x4>, y: Glb<u32>, scales: Glb<U32x2>,
            n_rows: u32, n4: u32, eps: f32);
        "rms_norm_f32" => row_per_cta::<f32>;
        "rms_norm_f16" => row_per_cta::<f16>;
        "rms_norm_bf16" => row_per_cta::<bf16>;
        "rms_norm_Q8_0" => row_per_cta::<Q8_0>;
        "rms_norm_Q8_1" => row_per_cta::<Q8_1>;
    }

    kernels! {
        in "rms_norm";
        pub(super) WARP: threads(256), early;
        fn (x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, weight: Glb<F32x4>, y: Glb<u32>, scales: Glb<U32x2>,
            n_rows: u32, n4: u32, eps: f32);
        "rms_norm_head_f32" => row_per_warp::<f32>;
        "rms_norm_head_f16" => row_per_warp::<f16>;
        "rms_norm_head_bf16" => row_per_warp::<bf16>;
        "rms_norm_head_Q8_0" => row_per_warp::<Q8_0>;
        "rms_norm_head_Q8_1" => row_per_warp::<Q8_1>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{vec, vec::Vec};

    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output::{self, Output, SPAN4};
    use crate::kernels::quantise_act::Kind;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row, the residual already in `x`.
    pub fn reference(x: &[f32], weight: Option<&[f32]>, eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / libm::sqrt(mean + f64::from(eps));
        let weight = |i: usize| weight.map_or(1.0, |w| f64::from(w[i]));
        x.iter().enumerate().map(|(i, &x)| f64::from(x) * scale * weight(i)).collect()
    }

    /// A row's sum of squares as the kernel computes it, bit for bit.
    pub fn sum_of_squares(x: &[f32]) -> f32 {
        // A tree over a power of two of values, neighbours first; those missing are zeros.
        fn tree(of: &dyn Fn(usize) -> f32, n: usize) -> f32 {
            if n == 1 { of(0) } else { tree(&|i| of(2 * i) + of(2 * i + 1), n / 2) }
        }
        let square = |i: usize| x.get(i).map_or(0.0, |x| x * x);
        let group = |g: usize| tree(&|i| square(32 * g + i), 32);
        let n_groups = x.len().div_ceil(32);
        let lane = |l: usize| (l..n_groups).step_by(32).fold(0.0, |sum, g| sum + group(g));
        // The butterfly adds far lanes first: lane numbers with their bits reversed are neighbours.
        tree(&|i| lane((i as u32).reverse_bits() as usize >> 27), 32)
    }

    /// Arguments; see the contract. Absent arrays, and `scales` of a float output, are [`DevicePtr::NULL`].
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub residual: DevicePtr,
        pub h: DevicePtr,
        pub weight: DevicePtr,
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
    /// Shared memory that every GPU gives without being asked.
    const SMEM_BYTES: u32 = 48 << 10;

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(RmsNorm::NAME);
        let n4 = check.size("n", args.n)? / 4;
        let n_rows = check.size("n_rows", args.n_rows)?;
        check.size("n_rows * n", args.n_rows.saturating_mul(args.n))?;
        args.output.check(check, args.n, args.y, args.scales)?;
        let arrays = [("x", args.x), ("residual", args.residual), ("h", args.h), ("weight", args.weight)];
        for (what, at) in arrays {
            check.aligned(what, at, 16)?;
        }
        if (args.residual == DevicePtr::NULL) != (args.h == DevicePtr::NULL) {
            return Err(check.shape("h", "an address if residual is one", 0));
        }
        let params = arrays.iter().fold(Params::new(), |params, (_, at)| params.with(*at));
        let (entries, grid, cta, smem_bytes) = if args.n <= WARP_N {
            let names = [
                "rms_norm_head_f32",
                "rms_norm_head_f16",
                "rms_norm_head_bf16",
                "rms_norm_head_Q8_0",
                "rms_norm_head_Q8_1",
            ];
            (names, n_rows.div_ceil(WARP_THREADS / 32), WARP_THREADS, 0)
        } else {
            let names = ["rms_norm_f32", "rms_norm_f16", "rms_norm_bf16", "rms_norm_Q8_0", "rms_norm_Q8_1"];
            // A sum per group of 32.
            let bytes = 4 * n4.div_ceil(8);
            if bytes > SMEM_BYTES {
                return Err(check.shape("n", "at most 393216", args.n));
            }
            (names, n_rows, 32 * n4.div_ceil(SPAN4).min(32), bytes)
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
        pub output: Output,
    }

    const fn case(n_rows: usize, n: usize, [residual, weight]: [bool; 2], output: Output) -> Case {
        Case { n_rows, n, residual, weight, output }
    }
    const PLAIN: [bool; 2] = [false, false];
    const WEIGHT: [bool; 2] = [false, true];
    const RESIDUAL: [bool; 2] = [true, true];

    impl Kernel for RmsNorm {
        const NAME: &'static str = "rms_norm";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 4, PLAIN, Output::F32),
            case(9, 64, WEIGHT, Output::F32),
            case(17, 128, RESIDUAL, Output::F16),
            case(3, 256, WEIGHT, Output::Act(Kind::Q8_0)),
            case(2, 224, RESIDUAL, Output::Act(Kind::Q8_0)),
            case(1, 252, RESIDUAL, Output::Bf16),
            case(3, 576, WEIGHT, Output::F32),
            case(3, 576, RESIDUAL, Output::Act(Kind::Q8_1)),
            case(2, 1020, WEIGHT, Output::F32),
            case(2, 1024, PLAIN, Output::F16),
            case(1, 1028, RESIDUAL, Output::Bf16),
            case(2, 2048, RESIDUAL, Output::Act(Kind::Q8_0)),
            case(1, 4096, WEIGHT, Output::Act(Kind::Q8_0)),
            case(1, 8192, RESIDUAL, Output::F32),
            case(1, 8196, RESIDUAL, Output::F32),
            case(1, 8448, RESIDUAL, Output::Act(Kind::Q8_0)),
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[
            case(1, 4096, RESIDUAL, Output::Act(Kind::Q8_0)),
            case(1024, 4096, WEIGHT, Output::F32),
            case(1024, 4096, RESIDUAL, Output::Act(Kind::Q8_0)),
            case(32_768, 128, WEIGHT, Output::F32),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::CTA, super::gpu::WARP];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, output, .. } = *case;
            let mut x = random.values(n_rows * n);
            let mut residual = case.residual.then(|| random.values(n_rows * n));
            let weight = case.weight.then(|| random.values(n));
            let mut eps = 1e-5;
            if matches!(output, Output::Act(_)) {
                // A factor of a half leaves codes and scales of the f32 output what they are, so both can be compared: all
                // rows have the squares of the first, and `eps` makes the mean 4.
                for row in 1..n_rows {
                    let sign = if row % 2 == 1 { -1.0 } else { 1.0 };
                    for array in [Some(&mut x), residual.as_mut()].into_iter().flatten() {
                        let (first, rest) = array.split_at_mut(row * n);
                        rest.iter_mut().zip(&first[..n]).for_each(|(to, from)| *to = sign * from);
                    }
                }
                let first = |i: usize| x[i] + residual.as_ref().map_or(0.0, |r| r[i]);
                eps = 4.0 - sum_of_squares(&(0..n).map(first).collect::<Vec<_>>()) / n as f32;
            }
            let h: Vec<f32> = match &residual {
                Some(residual) => x.iter().zip(residual).map(|(x, r)| x + r).collect(),
                None => x.clone(),
            };
            let row = |r: usize| reference(&h[r * n..][..n], weight.as_deref(), eps);
            let expected = (0..n_rows).flat_map(row).collect();
            let mut buffers = vec![Buffer::Input(bytes_of(&x))];
            let mut optional = |values: Option<&[f32]>| {
                values.map(|values| {
                    buffers.push(Buffer::Input(bytes_of(values)));
                    buffers.len() - 1
                })
            };
            let given = [optional(residual.as_deref()), optional(weight.as_deref())];
            let h_at = residual.is_some().then(|| {
                buffers.push(Buffer::Output(Expected::Exact(bytes_of(&h))));
                buffers.len() - 1
            });
            let problem =
                output::problem(output, [n_rows, n], buffers, expected, move |at, output, [y, scales]| {
                    let [residual, weight] = given.map(|i| i.map_or(DevicePtr::NULL, |i| at[i]));
                    let h = h_at.map_or(DevicePtr::NULL, |i| at[i]);
                    launch(&Args { x: at[0], residual, h, weight, output, y, scales, n_rows, n, eps })
                });
            if random.is_timing() { output::last_launch(problem) } else { problem }
        }

        fn bytes(case: &Case) -> u64 {
            let (y, scales) = case.output.bytes(case.n_rows * case.n);
            let arrays = 1 + 2 * usize::from(case.residual);
            let weight = 4 * case.n * usize::from(case.weight);
            (case.n_rows * case.n * 4 * arrays + weight + y + scales) as u64
        }

        fn flops(case: &Case) -> u64 {
            4 * (case.n_rows * case.n) as u64
        }
    }
}
