//! Softmax of rows, with the scale, mask and slopes of attention: `y = softmax(x · scale + slope[head] · mask)`.
//!
//! * Shapes: `x`, `y` [n_heads, n_rows, n]; `mask` [n_rows, n] or absent, -inf where nothing is to be seen; `slopes`
//!   (ALiBi) `[n_heads]` or absent (1); `sinks` `[n_heads]` or absent: one more logit per head, which takes its share of the
//!   sum and has no output. f32, dense. `y` may be `x`. A row without anything to see becomes zero.
//! * Geometry: rows of up to 1024 take a warp each, 8 to a CTA, those of up to 8192 a CTA of 256 threads: n a multiple of 4
//!   and the arrays 16-byte aligned, thread t takes the float4s t, t + 32 or t + 256, …. All others take a CTA, thread t the
//!   elements t, t + 256, …. Grid [n_rows or an eighth, n_heads].
//! * Bytes: n_heads · n_rows · n · 8, and the mask once. FLOPs: 5 per element, an exponential counted as one.
//! * Tolerance: NMSE 1e-11: `ex2.approx` is good to 2^-22, its argument is rounded to f32.
//! * The order of the sum depends on n and the alignment alone.
//!
//! Done for speed: rows of whole float4s stay in registers, so that memory is read once and written once, and all loads
//! of a row are under way together.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
/// Float4s of a thread whose row stays in registers.
const VECTORS: usize = 8;

smem! {
    struct Shared {
        /// A maximum per warp.
        maxima: [f32; 32],
        /// A sum per warp; apart from the maxima, so that no barrier is needed between the two reductions.
        sums: [f32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{Shared, THREADS, VECTORS};
    use crate::device::{F32x4, Glb, math, thread, warp};
    use crate::kernels::reduce;

    /// Where a row's arrays start.
    #[derive(Clone, Copy)]
    struct Row {
        x: Glb<f32>,
        mask: Glb<f32>,
        y: Glb<f32>,
        slope: f32,
        /// In units of log 2.
        sink: f32,
        scale: f32,
    }

    impl Row {
        #[inline(always)]
        #[track_caller]
        fn of(arrays: [Glb<f32>; 5], row: u32, n_rows: u32, n: u32, scale: f32) -> Row {
            let [x, mask, slopes, sinks, y] = arrays;
            let head = thread::block_idx_y();
            let start = (head as usize * n_rows as usize + row as usize) * n as usize;
            Row {
                x: x.offset(start),
                mask: if mask.is_null() { mask } else { mask.offset(row as usize * n as usize) },
                y: y.offset(start),
                slope: if slopes.is_null() { 1.0 } else { slopes.ld_nc(head) },
                sink: if sinks.is_null() { f32::NEG_INFINITY } else { sinks.ld_nc(head) * math::LOG2_E },
                scale,
            }
        }

        /// A logit in units of log 2.
        #[inline(always)]
        fn logit(self, x: f32, mask: f32) -> f32 {
            let scaled = x * self.scale;
            (if self.mask.is_null() { scaled } else { math::fma(self.slope, mask, scaled) }) * math::LOG2_E
        }

        /// What exponentials are relative to, from the largest logit: where all is masked, any finite number serves,
        /// since every exponential is zero.
        #[inline(always)]
        fn base(self, max: f32) -> f32 {
            let max = math::fmax(max, self.sink);
            if max == f32::NEG_INFINITY { 0.0 } else { max }
        }

        /// What exponentials of this sum are multiplied by.
        #[inline(always)]
        fn factor(self, sum: f32, base: f32) -> f32 {
            let sum = sum + math::ex2(self.sink - base);
            // Not of NaN: it spreads over the row.
            if sum == 0.0 { 0.0 } else { 1.0 / sum }
        }

        /// The softmax of `n4` float4s, of which this thread takes `first`, `first + step`, …, at most [`VECTORS`].
        #[inline(always)]
        #[track_caller]
        fn in_registers(
            self,
            n4: u32,
            first: u32,
            step: u32,
            max_of: impl Fn(f32) -> f32,
            sum_of: impl Fn(f32) -> f32,
        ) {
            let (x, mask, y) = (self.x.cast::<F32x4>(), self.mask.cast::<F32x4>(), self.y.cast::<F32x4>());
            let mut v = [[f32::NEG_INFINITY; 4]; VECTORS];
            unroll!(V in 0..8 {
                let i = first + V as u32 * step;
                if i < n4 {
                    F32x4(v[V]) = x.ld(i);
                }
            });
            let mut max = f32::NEG_INFINITY;
            unroll!(V in 0..8 {
                let i = first + V as u32 * step;
                if i < n4 {
                    let F32x4(mask) = if self.mask.is_null() { F32x4([0.0; 4]) } else { mask.ld_nc(i) };
                    unroll!(J in 0..4 {
                        v[V][J] = self.logit(v[V][J], mask[J]);
                        max = math::fmax(max, v[V][J]);
                    });
                }
            });
            let base = self.base(max_of(max));
            let mut sum = 0.0;
            unroll!(V in 0..8 {
                unroll!(J in 0..4 {
                    v[V][J] = math::ex2(v[V][J] - base);
                    sum += v[V][J];
                });
            });
            let factor = self.factor(sum_of(sum), base);
            unroll!(V in 0..8 {
                let i = first + V as u32 * step;
                if i < n4 {
                    y.st(i, F32x4(v[V].map(|e| e * factor)));
                }
            });
        }
    }

    /// Who works on a row.
    trait Form {
        /// The row of this thread.
        fn row() -> u32;
        fn softmax(row: Row, n: u32);
    }

    /// A warp.
    struct Warp;
    /// A CTA.
    struct Cta;
    /// A CTA, on rows of any length, which stay in `y` between the passes.
    struct Any;

    impl Form for Warp {
        #[inline(always)]
        fn row() -> u32 {
            thread::block_idx_x() * (THREADS / thread::WARP) + thread::warp_id()
        }
        #[inline(always)]
        #[track_caller]
        fn softmax(row: Row, n: u32) {
            row.in_registers(n / 4, thread::lane_id(), thread::WARP, warp::max_f32, warp::sum_f32);
        }
    }

    impl Form for Cta {
        #[inline(always)]
        fn row() -> u32 {
            thread::block_idx_x()
        }
        #[inline(always)]
        #[track_caller]
        fn softmax(row: Row, n: u32) {
            row.in_registers(
                n / 4,
                thread::thread_idx_x(),
                THREADS,
                |max| reduce::cta_max(max, Shared::maxima()),
                |sum| reduce::cta_sum(sum, Shared::sums()),
            );
        }
    }

    impl Form for Any {
        #[inline(always)]
        fn row() -> u32 {
            thread::block_idx_x()
        }
        #[inline(always)]
        #[track_caller]
        fn softmax(row: Row, n: u32) {
            let mut max = f32::NEG_INFINITY;
            let mut i = thread::thread_idx_x();
            while i < n {
                let mask = if row.mask.is_null() { 0.0 } else { row.mask.ld_nc(i) };
                let v = row.logit(row.x.ld(i), mask);
                row.y.st(i, v);
                max = math::fmax(max, v);
                i += THREADS;
            }
            let base = row.base(reduce::cta_max(max, Shared::maxima()));
            let mut sum = 0.0;
            let mut i = thread::thread_idx_x();
            while i < n {
                let e = math::ex2(row.y.ld(i) - base);
                row.y.st(i, e);
                sum += e;
                i += THREADS;
            }
            let factor = row.factor(reduce::cta_sum(sum, Shared::sums()), base);
            let mut i = thread::thread_idx_x();
            while i < n {
                row.y.st(i, row.y.ld(i) * factor);
                i += THREADS;
            }
        }
    }

    #[inline(always)]
    fn softmax<F: Form>(
        x: Glb<f32>,
        mask: Glb<f32>,
        slopes: Glb<f32>,
        sinks: Glb<f32>,
        y: Glb<f32>,
        n_rows: u32,
        n: u32,
        scale: f32,
    ) {
        let row = F::row();
        // All that meet at barriers leave together.
        if row < n_rows {
            F::softmax(Row::of([x, mask, slopes, sinks, y], row, n_rows, n, scale), n);
        }
    }

    kernels! {
        in "softmax";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<f32>, mask: Glb<f32>, slopes: Glb<f32>, sinks: Glb<f32>, y: Glb<f32>, n_rows: u32, n: u32, scale: f32);
        "softmax_warp_f32" => softmax::<Warp>;
        "softmax_cta_f32" => softmax::<Cta>;
        "softmax_f32" => softmax::<Any>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{Shared, THREADS, VECTORS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row.
    pub fn reference(x: &[f32], mask: Option<&[f32]>, slope: f32, sink: Option<f32>, scale: f32) -> Vec<f64> {
        let mask = |i: usize| mask.map_or(0.0, |m| f64::from(slope) * f64::from(m[i]));
        let mut logits: Vec<f64> =
            x.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(scale) + mask(i)).collect();
        logits.extend(sink.map(f64::from));
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            return vec![0.0; x.len()];
        }
        let exponentials: Vec<f64> = logits.iter().map(|l| libm::exp(l - max)).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials[..x.len()].iter().map(|e| e / sum).collect()
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub mask: DevicePtr,
        pub slopes: DevicePtr,
        pub sinks: DevicePtr,
        pub y: DevicePtr,
        pub n_heads: usize,
        pub n_rows: usize,
        pub n: usize,
        pub scale: f32,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Softmax::NAME);
        let n = check.size("n", args.n)?;
        let arrays = [
            ("x", args.x),
            ("mask", args.mask),
            ("slopes", args.slopes),
            ("sinks", args.sinks),
            ("y", args.y),
        ];
        for (what, at) in arrays {
            check.aligned(what, at, 4)?;
        }
        let n_rows = check.size("n_rows", args.n_rows)?;
        let whole = n.is_multiple_of(4)
            && [args.x, args.mask, args.y].iter().all(|at| at.0.is_multiple_of(16))
            && args.n <= VECTORS * 4 * THREADS as usize;
        let (entry, rows_per_cta) = match (whole, args.n <= VECTORS * 4 * 32) {
            (true, true) => ("softmax_warp_f32", THREADS / 32),
            (true, false) => ("softmax_cta_f32", 1),
            (false, _) => ("softmax_f32", 1),
        };
        let params = arrays.iter().fold(Params::new(), |params, (_, at)| params.with(*at));
        Ok(Launch {
            entry,
            grid: [n_rows.div_ceil(rows_per_cta), check.grid("n_heads", args.n_heads)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: params.with(n_rows).with(n).with(args.scale),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Softmax;

    /// One case. The mask is causal, with its first row empty.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_heads: usize,
        pub n_rows: usize,
        pub n: usize,
        pub mask: bool,
        pub slopes: bool,
        pub sinks: bool,
        pub in_place: bool,
    }

    const fn case(n_heads: usize, n_rows: usize, n: usize, mask: bool, slopes: bool, sinks: bool) -> Case {
        Case { n_heads, n_rows, n, mask, slopes, sinks, in_place: false }
    }

    impl Kernel for Softmax {
        const NAME: &'static str = "softmax";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 1, 1, false, false, false),
            case(2, 2, 255, true, true, false),
            case(1, 2, 256, true, false, false),
            case(3, 1, 257, false, false, false),
            case(1, 1, 2049, false, false, false),
            case(2, 3, 130, true, false, true),
            // Rows of whole float4s: a warp's, with some left over, and a CTA's.
            case(2, 9, 132, true, true, true),
            case(1, 8, 1024, false, false, false),
            case(2, 2, 1028, true, true, true),
            case(1, 1, 8192, false, false, true),
            case(1, 1, 8196, false, false, false),
            Case { in_place: true, ..case(2, 3, 130, true, false, true) },
            Case { in_place: true, ..case(1, 9, 64, true, false, false) },
            Case { in_place: true, ..case(1, 2, 2052, false, false, true) },
        ];
        const NMSE_MAX: f64 = 1e-11;
        const BENCH: &'static [Case] = &[
            case(32, 512, 512, true, false, false),
            case(10, 1024, 1024, false, false, false),
            case(5, 4096, 4096, false, false, false),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_heads, n_rows, n, .. } = *case;
            let scale = 0.7;
            let x = random.values(n_heads * n_rows * n);
            let mask: Vec<f32> =
                (0..n_rows * n)
                    .map(|i| {
                        if i % n >= i / n * n.div_ceil(2) {
                            f32::NEG_INFINITY
                        } else {
                            -0.01 * (i % n) as f32
                        }
                    })
                    .collect();
            let slopes: Vec<f32> = (1..=n_heads).map(|h| libm::exp2f(-(h as f32))).collect();
            let sinks = random.values(n_heads);
            let row = |i: usize| {
                let mask = case.mask.then(|| &mask[i % n_rows * n..][..n]);
                let head = i / n_rows;
                let slope = if case.slopes { slopes[head] } else { 1.0 };
                reference(&x[i * n..][..n], mask, slope, case.sinks.then(|| sinks[head]), scale)
            };
            let in_place = case.in_place;
            let expected = if random.is_timing() {
                Expected::Unchecked(4 * x.len())
            } else {
                Expected::F32((0..n_heads * n_rows).flat_map(row).collect())
            };
            let Case { mask: has_mask, slopes: has_slopes, sinks: has_sinks, .. } = *case;
            Problem {
                buffers: [
                    Buffer::Input(bytes_of(&mask)),
                    Buffer::Input(bytes_of(&slopes)),
                    Buffer::Input(bytes_of(&sinks)),
                ]
                .into_iter()
                .chain(match in_place {
                    true => vec![Buffer::Changed(bytes_of(&x), expected)],
                    false => vec![Buffer::Input(bytes_of(&x)), Buffer::Output(expected)],
                })
                .collect(),
                launches: Box::new(move |at| {
                    let given = |yes: bool, at: DevicePtr| if yes { at } else { DevicePtr::NULL };
                    let (mask, slopes) = (given(has_mask, at[0]), given(has_slopes, at[1]));
                    let (sinks, x, y) = (given(has_sinks, at[2]), at[3], at[if in_place { 3 } else { 4 }]);
                    Ok(vec![launch(&Args { x, mask, slopes, sinks, y, n_heads, n_rows, n, scale })?])
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            let shape = alloc::format!("[{},{},{},1]", case.n, case.n_rows, case.n_heads);
            let plain = !(case.mask || case.slopes || case.sinks);
            plain.then(|| alloc::format!("SOFT_MAX(type=f32,ne={shape},mask=0,sinks=0,"))
        }

        fn bytes(case: &Case) -> u64 {
            let mask = if case.mask { case.n_rows * case.n } else { 0 };
            (8 * case.n_heads * case.n_rows * case.n + 4 * mask) as u64
        }

        fn flops(case: &Case) -> u64 {
            5 * (case.n_heads * case.n_rows * case.n) as u64
        }
    }
}
