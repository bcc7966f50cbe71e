//! Running sums of each row: `y[i] = x[0] + … + x[i]`.
//!
//! * Shapes: `x`, `y` [n_rows, n] f32, dense. `y` may be `x`. `scratch` [n_rows, chunks] f32, of [`scratch_bytes`], where a
//!   row has several chunks; overlaps nothing.
//! * Geometry: a CTA of 1024 threads per row of up to 16384, 4096 elements at a time. Longer rows are cut into at most
//!   128 chunks, of 4096 elements or a multiple. A CTA of 256 threads adds up each chunk; in a second launch one of 1024
//!   threads starts from the sum of the chunks before its own.
//! * Four neighbours per access where addresses and n are multiples of four elements, else each by itself.
//! * Bytes: 8 per element must move; 12 do if a row has several chunks. FLOPs: 1 per element.
//! * Tolerance: NMSE 1e-11: f32 sums of 4096 neighbours, added up in order, and a tree over 128 chunks.
//! * The order of the sums depends on n alone.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 1024;
/// Neighbours that a thread takes.
const PER_THREAD: u32 = 4;
/// Elements of a CTA at a time.
const ROUND: u32 = THREADS * PER_THREAD;
/// Most chunks of a row: about as many as a GPU has SMs. No more than threads, so that each adds up one.
const MAX_CHUNKS: u32 = 128;
const _: () = assert!(MAX_CHUNKS <= THREADS);
/// Of a CTA that adds up a chunk: a round by four accesses of a thread, all under way at once.
const SUM_THREADS: u32 = ROUND / PER_THREAD / 4;

smem! {
    struct Shared {
        /// A sum per warp, for this round and the next in turn.
        sums: [f32; 2 * 32],
        /// A sum per warp of the chunks before.
        before: [f32; 32],
    }
}

smem! {
    struct SumShared {
        /// A sum per warp.
        sums: [f32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{PER_THREAD, ROUND, SUM_THREADS, Shared, SumShared};
    use crate::device::sync::sync_threads;
    use crate::device::{F32x4, Glb, thread, warp};
    use crate::kernels::reduce::cta_sum;

    /// The sum of this lane and those below.
    #[inline(always)]
    #[track_caller]
    fn running(mut sum: f32) -> f32 {
        unroll!(S in 0..8 {
            if S < 5 {
                let below = f32::from_bits(warp::shfl_up(sum.to_bits(), 1 << S));
                sum += if thread::lane_id() >= 1 << S { below } else { 0.0 };
            }
        });
        sum
    }

    /// Elements `i` to `i + 3`, zeros from `end` on; if `wide`, both are multiples of 4 and the row is aligned.
    #[inline(always)]
    #[track_caller]
    fn load(x: Glb<f32>, i: u32, end: u32, wide: u32) -> [f32; 4] {
        let mut four = [0.0; 4];
        if wide != 0 {
            if i < end {
                four = x.cast::<F32x4>().ld(i / 4).0;
            }
        } else {
            unroll!(K in 0..4 {
                if i + (K as u32) < end {
                    four[K] = x.ld(i + K as u32);
                }
            });
        }
        four
    }

    /// First element of this CTA's chunk, and the one after its last.
    #[inline(always)]
    fn bounds(n: u32, chunk: u32) -> (u32, u32) {
        let first = thread::block_idx_y() * chunk;
        (first, if n - first < chunk { n } else { first + chunk })
    }

    #[inline(always)]
    fn sums(x: Glb<f32>, scratch: Glb<f32>, n: u32, chunk: u32, wide: u32) {
        let row = thread::block_idx_x() as usize;
        let x = x.offset(row * n as usize);
        let (mut first, end) = bounds(n, chunk);
        let mut sum = 0.0;
        while first < end {
            let mut fours = [[0.0; 4]; 4];
            unroll!(J in 0..4 {
                let i = first + PER_THREAD * (thread::thread_idx_x() + SUM_THREADS * J as u32);
                fours[J] = load(x, i, end, wide);
            });
            unroll!(J in 0..4 {
                let [a, b, c, d] = fours[J];
                sum += (a + b) + (c + d);
            });
            first += ROUND;
        }
        let sum = cta_sum(sum, SumShared::sums());
        if thread::thread_idx_x() == 0 {
            scratch.offset(row * thread::grid_dim_y() as usize).st(thread::block_idx_y(), sum);
        }
    }

    #[inline(always)]
    fn cumsum(x: Glb<f32>, y: Glb<f32>, scratch: Glb<f32>, n: u32, chunk: u32, wide: u32) {
        let row = thread::block_idx_x() as usize;
        let (x, y) = (x.offset(row * n as usize), y.offset(row * n as usize));
        let (mut first, end) = bounds(n, chunk);
        let (t, lane, warp_id, sums) =
            (thread::thread_idx_x(), thread::lane_id(), thread::warp_id(), Shared::sums());
        let mut next = load(x, first + PER_THREAD * t, end, wide);

        let (mut carried, chunks_before) = (0.0, thread::block_idx_y());
        if chunks_before > 0 {
            let scratch = scratch.offset(row * thread::grid_dim_y() as usize);
            carried = cta_sum(if t < chunks_before { scratch.ld(t) } else { 0.0 }, Shared::before());
        }
        let mut half = 0;
        while first < end {
            let i = first + PER_THREAD * t;
            let [a, b, c, d] = next;
            // Under way while this round is added up.
            next = load(x, i + ROUND, end, wide);
            let b = a + b;
            let c = b + c;
            let d = c + d;
            let of_lanes = running(d);
            if lane == 31 {
                sums.st(half * 32 + warp_id, of_lanes);
            }
            sync_threads();
            // Every warp adds up all warps alike; lane w then has what warp w ends with.
            let of_warps = running(sums.ld(half * 32 + lane));
            let before_warp = f32::from_bits(warp::shfl(of_warps.to_bits(), (warp_id + 31) % 32));
            let before_lane = f32::from_bits(warp::shfl_up(of_lanes.to_bits(), 1));
            let before = carried
                + (if warp_id == 0 { 0.0 } else { before_warp } + if lane == 0 { 0.0 } else { before_lane });
            let four = [before + a, before + b, before + c, before + d];
            if wide != 0 {
                if i < end {
                    y.cast::<F32x4>().st(i / 4, F32x4(four));
                }
            } else {
                unroll!(K in 0..4 {
                    if i + (K as u32) < end {
                        y.st(i + K as u32, four[K]);
                    }
                });
            }
            carried += f32::from_bits(warp::shfl(of_warps.to_bits(), 31));
            first += ROUND;
            half ^= 1;
        }
    }

    kernels! {
        in "cumsum";
        pub(super) SUMS: threads(256);
        fn (x: Glb<f32>, scratch: Glb<f32>, n: u32, chunk: u32, wide: u32);
        "cumsum_chunks" => sums;
    }

    kernels! {
        in "cumsum";
        pub(super) ENTRIES: threads(1024);
        fn (x: Glb<f32>, y: Glb<f32>, scratch: Glb<f32>, n: u32, chunk: u32, wide: u32);
        "cumsum_f32" => cumsum;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{MAX_CHUNKS, PER_THREAD, ROUND, SUM_THREADS, Shared, SumShared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Longest row that is not cut: four rounds take about as long as a second launch.
    const MAX_WHOLE: usize = 4 * ROUND as usize;

    /// Elements of a row's chunk.
    fn chunk_elems(n: usize) -> usize {
        if n <= MAX_WHOLE { n } else { n.div_ceil((ROUND * MAX_CHUNKS) as usize) * ROUND as usize }
    }

    /// The definition: one row.
    pub fn reference(x: &[f32]) -> Vec<f64> {
        let mut sum = 0.0;
        x.iter()
            .map(|&x| {
                sum += f64::from(x);
                sum
            })
            .collect()
    }

    /// Bytes of `scratch`: none where rows are not cut.
    pub fn scratch_bytes(n_rows: usize, n: usize) -> usize {
        match n.div_ceil(chunk_elems(n).max(1)) {
            0 | 1 => 0,
            chunks => 4 * n_rows * chunks,
        }
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub y: DevicePtr,
        pub scratch: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
    }

    /// One launch for all rows, or two, by n.
    pub fn launch(args: &Args) -> Result<Vec<Launch>, LaunchError> {
        let Args { x, y, scratch, n_rows, n } = *args;
        let check = Check(Cumsum::NAME);
        let (rows, n32) = (check.size("n_rows", n_rows)?, check.size("n", n)?);
        for (what, at) in [("x", x), ("y", y), ("scratch", scratch)] {
            check.aligned(what, at, 4)?;
        }
        let chunk = chunk_elems(n) as u32;
        let chunks = n32.div_ceil(chunk);
        let fours = |at: DevicePtr| at.0.is_multiple_of(4 * u64::from(PER_THREAD));
        let wide = fours(x) && fours(y) && n32.is_multiple_of(PER_THREAD);
        let launch = |entry, cta, smem_bytes, params: Params| Launch {
            entry,
            grid: [rows, chunks, 1],
            cta,
            cluster: 1,
            smem_bytes,
            params: params.with(scratch).with(n32).with(chunk).with(u32::from(wide)),
        };
        let mut launches = Vec::new();
        if chunks > 1 {
            if scratch == DevicePtr::NULL {
                return Err(check.shape("scratch", "an address", 0));
            }
            launches.push(launch("cumsum_chunks", SUM_THREADS, SumShared::BYTES, Params::new().with(x)));
        }
        launches.push(launch("cumsum_f32", THREADS, Shared::BYTES, Params::new().with(x).with(y)));
        Ok(launches)
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Cumsum;

    /// One case; `skip` elements lie before `x`.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub in_place: bool,
        pub skip: usize,
    }

    const fn case(n_rows: usize, n: usize) -> Case {
        Case { n_rows, n, in_place: false, skip: 0 }
    }

    impl Kernel for Cumsum {
        const NAME: &'static str = "cumsum";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 1),
            case(3, 1023),
            case(2, 1024),
            case(2, 4095),
            case(2, 4100),
            case(1, 9001),
            Case { in_place: true, ..case(2, 8192) },
            Case { skip: 1, ..case(2, 4100) },
            // The longest that is not cut, and the first that are.
            case(1, 16_384),
            case(1, 16_385),
            case(3, 16_388),
            case(2, 20_483),
            Case { in_place: true, ..case(2, 20_480) },
            Case { skip: 3, in_place: true, ..case(1, 20_484) },
            // Chunks of two rounds, the last with a part of one.
            case(1, 128 * 4096 + 4),
        ];
        const NMSE_MAX: f64 = 1e-11;
        const BENCH: &'static [Case] = &[case(256, 16_384), case(16, 131_072), case(1, 131_072)];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::SUMS, super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, in_place, skip } = *case;
            let x = random.values(skip + n_rows * n);
            let mut expected: Vec<f64> = x[skip..].chunks(n).flat_map(reference).collect();
            let scratch = Buffer::Output(Expected::Unchecked(scratch_bytes(n_rows, n).max(4)));
            let buffers = if in_place {
                expected.splice(..0, x[..skip].iter().map(|&x| f64::from(x)));
                vec![scratch, Buffer::Changed(bytes_of(&x), Expected::F32(expected))]
            } else {
                vec![scratch, Buffer::Output(Expected::F32(expected)), Buffer::Input(bytes_of(&x))]
            };
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let skipped = |at: DevicePtr| at.offset(4 * skip as u64);
                    let (y, x) =
                        if in_place { (skipped(at[1]), skipped(at[1])) } else { (at[1], skipped(at[2])) };
                    launch(&Args { x, y, scratch: at[0], n_rows, n })
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Some(peer::rows("CUMSUM", case.n, case.n_rows))
        }

        fn bytes(case: &Case) -> u64 {
            8 * (case.n_rows * case.n) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n_rows * case.n) as u64
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn long_rows_need_scratch() {
            let at = DevicePtr(1 << 20);
            let args = |scratch, n| Args { x: at, y: at, scratch, n_rows: 2, n };
            assert_eq!(launch(&args(DevicePtr::NULL, MAX_WHOLE)).unwrap().len(), 1);
            assert_eq!(launch(&args(at, MAX_WHOLE + 1)).unwrap().len(), 2);
            assert!(launch(&args(DevicePtr::NULL, MAX_WHOLE + 1)).is_err());
        }
    }
}
