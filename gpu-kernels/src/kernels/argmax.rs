//! The index of each row's largest element: the greedy token.
//!
//! * Shapes: `x` [n_rows, n] f32, dense; `ids` `[n_rows]` i32; `scratch` [n_rows, chunks] pairs, 8-byte aligned. Ties go to
//!   the lower index, NaN is below all; a row of NaN gives 0. Nothing overlaps.
//! * Geometry: a CTA of 256 threads per chunk of 4096 elements, then a warp per row over its chunks. Four neighbours per
//!   access where `x` is 16-byte aligned and n a multiple of 4, else each by itself.
//! * Bytes: 4 per element. FLOPs: 1 per element, a comparison.
//! * Tolerance: exact.
//!
//! Done for speed: 64 bytes in flight per thread; a row of 128k keeps 32 SMs busy; within a thread indices ascend, so one
//! comparison of keys decides.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
const PER_THREAD: u32 = 16;
const CHUNK: u32 = THREADS * PER_THREAD;
const ROW_THREADS: u32 = 32;

smem! {
    struct Shared {
        /// Key and index of each warp's best.
        best: [u64; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{CHUNK, PER_THREAD, Shared, THREADS};
    use crate::device::{F32x4, Glb, U32x2, thread};
    use crate::kernels::order;

    /// The best so far, and an element of a higher index.
    #[inline(always)]
    fn later(best: order::Element, x: f32, i: u32) -> order::Element {
        let key = order::key(x);
        if key > best.0 { (key, i) } else { best }
    }

    #[inline(always)]
    fn chunk(x: Glb<f32>, scratch: Glb<U32x2>, n: u32, wide: u32) {
        let (chunk, row) = (thread::block_idx_x(), thread::block_idx_y());
        let x = x.offset(row as usize * n as usize);
        let t = thread::thread_idx_x();
        // Where there is nothing NaN stands, which is above nothing: so the first index stays if all is NaN.
        let first = chunk * CHUNK + if wide != 0 { 4 * t } else { t };
        let mut best = if first < n { (0, first) } else { order::NOTHING };
        if wide != 0 {
            let mut fours = [[f32::NAN; 4]; PER_THREAD as usize / 4];
            unroll!(J in 0..4 {
                let i = first + 4 * THREADS * J as u32;
                if i < n {
                    fours[J] = x.cast::<F32x4>().ld_nc(i / 4).0;
                }
            });
            unroll!(J in 0..4 {
                unroll!(K in 0..4 {
                    best = later(best, fours[J][K], first + 4 * THREADS * J as u32 + K as u32);
                });
            });
        } else {
            let mut values = [f32::NAN; PER_THREAD as usize];
            unroll!(J in 0..16 {
                let i = first + THREADS * J as u32;
                if i < n {
                    values[J] = x.ld_nc(i);
                }
            });
            unroll!(J in 0..16 {
                best = later(best, values[J], first + THREADS * J as u32);
            });
        }
        let (key, index) = order::cta_best(best, Shared::best().cast());
        if thread::thread_idx_x() == 0 {
            scratch.st(row * thread::grid_dim_x() + chunk, U32x2([key, index]));
        }
    }

    #[inline(always)]
    fn row(scratch: Glb<U32x2>, ids: Glb<i32>, chunks: u32) {
        let row = thread::block_idx_x();
        let mut best = order::NOTHING;
        let mut i = thread::lane_id();
        while i < chunks {
            let U32x2([key, index]) = scratch.ld_nc(row * chunks + i);
            best = order::best(best, (key, index));
            i += 32;
        }
        let (_, index) = order::warp_best(best);
        if thread::lane_id() == 0 {
            ids.st(row, index as i32);
        }
    }

    kernels! {
        in "argmax";
        pub(super) CHUNKS: threads(256);
        fn (x: Glb<f32>, scratch: Glb<U32x2>, n: u32, wide: u32);
        "argmax_chunk" => chunk;
    }

    kernels! {
        in "argmax";
        pub(super) ROWS: threads(32);
        fn (scratch: Glb<U32x2>, ids: Glb<i32>, chunks: u32);
        "argmax_row" => row;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{CHUNK, ROW_THREADS, Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row.
    pub fn reference(x: &[f32]) -> usize {
        let mut best = 0;
        for (i, &x_i) in x.iter().enumerate() {
            if x_i > x[best] || (x[best].is_nan() && !x_i.is_nan()) {
                best = i;
            }
        }
        best
    }

    /// Bytes of `scratch`.
    pub fn scratch_bytes(n_rows: usize, n: usize) -> usize {
        n_rows * n.div_ceil(CHUNK as usize) * 8
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub scratch: DevicePtr,
        pub ids: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
    }

    /// The two launches, in order.
    pub fn launch(args: &Args) -> Result<[Launch; 2], LaunchError> {
        let check = Check(Argmax::NAME);
        let n = check.size("n", args.n)?;
        let n_rows = check.grid("n_rows", args.n_rows)?;
        for (what, at, align) in [("x", args.x, 4), ("scratch", args.scratch, 8), ("ids", args.ids, 4)] {
            check.aligned(what, at, align)?;
        }
        let chunks = n.div_ceil(CHUNK);
        let wide = args.x.0.is_multiple_of(16) && n.is_multiple_of(4);
        Ok([
            Launch {
                entry: "argmax_chunk",
                grid: [chunks, n_rows, 1],
                cta: THREADS,
                cluster: 1,
                smem_bytes: Shared::BYTES,
                params: Params::new().with(args.x).with(args.scratch).with(n).with(u32::from(wide)),
            },
            Launch {
                entry: "argmax_row",
                grid: [n_rows, 1, 1],
                cta: ROW_THREADS,
                cluster: 1,
                smem_bytes: 0,
                params: Params::new().with(args.scratch).with(args.ids).with(chunks),
            },
        ])
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Argmax;

    /// One case; `skip` elements lie before `x`.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub skip: usize,
    }

    const fn case(n_rows: usize, n: usize) -> Case {
        Case { n_rows, n, skip: 0 }
    }

    impl Kernel for Argmax {
        const NAME: &'static str = "argmax";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 1),
            case(4, 31),
            case(4, 4096),
            case(3, 4097),
            case(4, 4),
            case(5, 8196),
            Case { skip: 1, ..case(4, 4100) },
            case(2, 150_001),
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[case(1, 128_256), case(64, 128_256), case(512, 32_000)];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::CHUNKS, super::gpu::ROWS];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, skip } = *case;
            let mut x = random.values(skip + n_rows * n);
            for (r, row) in x[skip..].chunks_mut(n).enumerate() {
                let (a, b) = (random.below(n as u64) as usize, random.below(n as u64) as usize);
                match r % 4 {
                    // The largest twice, and a NaN.
                    0 => {
                        (row[0], row[a], row[b]) = (f32::NAN, 99.0, 99.0);
                    }
                    // Both zeros.
                    1 => {
                        row.fill(-1.0);
                        (row[a], row[b]) = (0.0, -0.0);
                    }
                    // No number at all.
                    2 => row.fill(f32::NAN),
                    _ => {
                        row.fill(f32::NEG_INFINITY);
                        row[0] = f32::NAN;
                    }
                }
            }
            let ids: Vec<i32> = x[skip..].chunks(n).map(|row| reference(row) as i32).collect();
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Input(vec![0; scratch_bytes(n_rows, n)]),
                    Buffer::Output(Expected::Exact(bytes_of(&ids))),
                ],
                launches: Box::new(move |at| {
                    let x = at[0].offset(4 * skip as u64);
                    Ok(launch(&Args { x, scratch: at[1], ids: at[2], n_rows, n })?.to_vec())
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Some(peer::rows("ARGMAX", case.n, case.n_rows))
        }

        fn bytes(case: &Case) -> u64 {
            4 * (case.n_rows * case.n + case.n_rows) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n_rows * case.n) as u64
        }
    }
}
