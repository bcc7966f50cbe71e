//! Softmax of rows, with the scale, mask and slopes of attention: `y = softmax(x · scale + slope[head] · mask)`.
//!
//! * Shapes: `x`, `y` [n_heads, n_rows, n]; `mask` [n_rows, n] or absent, -inf where nothing is to be seen; `slopes`
//!   (ALiBi) `[n_heads]` or absent (1); `sinks` `[n_heads]` or absent: one more logit per head, which takes its share of the
//!   sum and has no output. f32, dense. `y` may be `x`. A row without anything to see becomes zero.
//! * Geometry: one CTA of 256 threads per row, thread t takes the elements t, t + 256, …; grid [n_rows, n_heads].
//! * Bytes: n_heads · n_rows · n · 8, and the mask once. FLOPs: 5 per element, an exponential counted as one.
//! * Tolerance: NMSE 1e-11: `ex2.approx` is good to 2^-22, its argument is rounded to f32.
//! * The order of the sum depends on n alone.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

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
    use super::{Shared, THREADS};
    use crate::device::{Glb, math, thread};
    use crate::kernels::reduce;

    #[inline(always)]
    fn softmax(
        x: Glb<f32>,
        mask: Glb<f32>,
        slopes: Glb<f32>,
        sinks: Glb<f32>,
        y: Glb<f32>,
        n: u32,
        scale: f32,
    ) {
        let (row, head) = (thread::block_idx_x(), thread::block_idx_y());
        let start = (head as usize * thread::grid_dim_x() as usize + row as usize) * n as usize;
        let (x, y, mask_row) = (x.offset(start), y.offset(start), mask.offset(row as usize * n as usize));
        let slope = if slopes.is_null() { 1.0 } else { slopes.ld_nc(head) };

        // Scaled and masked, in units of log 2; kept in `y` between the passes.
        let mut max = f32::NEG_INFINITY;
        let mut i = thread::thread_idx_x();
        while i < n {
            let mut v = x.ld(i) * scale;
            if !mask.is_null() {
                v = math::fma(slope, mask_row.ld_nc(i), v);
            }
            v *= math::LOG2_E;
            y.st(i, v);
            max = math::fmax(max, v);
            i += THREADS;
        }
        let max = reduce::cta_max(max, Shared::maxima());
        // In units of log 2, like the rest.
        let sink = if sinks.is_null() { f32::NEG_INFINITY } else { sinks.ld_nc(head) * math::LOG2_E };
        let max = math::fmax(max, sink);
        // Where all is masked, any finite number serves: every exponential is zero.
        let max = if max == f32::NEG_INFINITY { 0.0 } else { max };

        let mut sum = 0.0;
        let mut i = thread::thread_idx_x();
        while i < n {
            let e = math::ex2(y.ld(i) - max);
            y.st(i, e);
            sum += e;
            i += THREADS;
        }
        let sum = reduce::cta_sum(sum, Shared::sums()) + math::ex2(sink - max);
        let inverse = if sum > 0.0 { 1.0 / sum } else { 0.0 };

        let mut i = thread::thread_idx_x();
        while i < n {
            y.st(i, y.ld(i) * inverse);
            i += THREADS;
        }
    }

    kernels! {
        in "softmax";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<f32>, mask: Glb<f32>, slopes: Glb<f32>, sinks: Glb<f32>, y: Glb<f32>, n: u32, scale: f32);
        "softmax_f32" => softmax;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{Shared, THREADS};
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
        let params = arrays.iter().fold(Params::new(), |params, (_, at)| params.with(*at));
        Ok(Launch {
            entry: "softmax_f32",
            grid: [check.size("n_rows", args.n_rows)?, check.grid("n_heads", args.n_heads)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: params.with(n).with(args.scale),
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
    }

    impl Kernel for Softmax {
        const NAME: &'static str = "softmax";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_heads: 1, n_rows: 1, n: 1, mask: false, slopes: false, sinks: false },
            Case { n_heads: 2, n_rows: 2, n: 255, mask: true, slopes: true, sinks: false },
            Case { n_heads: 1, n_rows: 2, n: 256, mask: true, slopes: false, sinks: false },
            Case { n_heads: 3, n_rows: 1, n: 257, mask: false, slopes: false, sinks: false },
            Case { n_heads: 1, n_rows: 1, n: 2049, mask: false, slopes: false, sinks: false },
            Case { n_heads: 2, n_rows: 3, n: 130, mask: true, slopes: false, sinks: true },
        ];
        const NMSE_MAX: f64 = 1e-11;
        const BENCH: &'static [Case] = &[
            Case { n_heads: 32, n_rows: 512, n: 512, mask: true, slopes: false, sinks: false },
            Case { n_heads: 10, n_rows: 1024, n: 1024, mask: false, slopes: false, sinks: false },
            Case { n_heads: 5, n_rows: 4096, n: 4096, mask: false, slopes: false, sinks: false },
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
            let expected = if random.is_timing() {
                Expected::Unchecked(4 * x.len())
            } else {
                Expected::F32((0..n_heads * n_rows).flat_map(row).collect())
            };
            let Case { mask: has_mask, slopes: has_slopes, sinks: has_sinks, .. } = *case;
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Input(bytes_of(&mask)),
                    Buffer::Input(bytes_of(&slopes)),
                    Buffer::Input(bytes_of(&sinks)),
                    Buffer::Output(expected),
                ],
                launches: Box::new(move |at| {
                    let given = |yes: bool, at: DevicePtr| if yes { at } else { DevicePtr::NULL };
                    let (mask, slopes) = (given(has_mask, at[1]), given(has_slopes, at[2]));
                    let (sinks, y) = (given(has_sinks, at[3]), at[4]);
                    Ok(vec![launch(&Args { x: at[0], mask, slopes, sinks, y, n_heads, n_rows, n, scale })?])
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
