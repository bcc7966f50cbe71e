//! Indices of each row in sorted order: largest first, or smallest; ties to the lower index, NaN last either way.
//!
//! * Shapes: `x` [n_rows, n] f32, dense; `ids` [n_rows, n] i32; `values` [n_rows, n] f32, `x` in that order, may be absent;
//!   `scratch` of [`scratch_bytes`], 8-byte aligned. Nothing overlaps.
//! * Geometry: rows up to 4096 go to [`top_k`](super::top_k). Longer ones are sorted by four digits of 8 bits, the lowest
//!   first, three launches each: a CTA of 256 threads per 4096 elements counts its digits, a CTA per row turns the counts
//!   into places, and the first CTAs move their elements there.
//! * Bytes: 4 + 4 per element must move; the passes move 76, most of them in L2. FLOPs: 1 per element, a comparison.
//! * Tolerance: exact. Elements keep their order within a digit: a warp takes 512 neighbours in 16 rounds of 32, ranks
//!   within a round come from a vote, those of rounds, warps and CTAs from counts in order.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
/// Rounds of a warp.
const ROUNDS: u32 = 16;
/// Elements of a CTA.
const CHUNK: u32 = THREADS * ROUNDS;
const DIGITS: u32 = 256;
const SCAN_THREADS: u32 = 1024;

smem! {
    struct Shared {
        /// Per warp and digit: how many so far; then where the first goes.
        counts: [u32; 8 * 256],
    }
}

smem! {
    struct ScanShared {
        /// A sum per warp, for this round and the next in turn.
        sums: [u32; 2 * 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{CHUNK, DIGITS, ROUNDS, SCAN_THREADS, ScanShared, Shared, THREADS};
    use crate::device::sync::sync_threads;
    use crate::device::{Glb, Smem, thread, warp};
    use crate::kernels::order;

    const WARPS: u32 = THREADS / 32;
    const _: () = assert!(DIGITS == THREADS && WARPS == 8 && ROUNDS == 16);

    /// The key in sorting order, smallest first; `flip` is all ones for the largest.
    #[inline(always)]
    fn sorting_key(x: f32, flip: u32) -> u32 {
        let key = order::key(x);
        if key == 0 { u32::MAX } else { key ^ flip }
    }

    /// The lanes that are inside and have the same digit.
    #[inline(always)]
    #[track_caller]
    fn peers(digit: u32, inside: bool) -> u32 {
        let mut mask = warp::ballot(inside);
        unroll!(B in 0..8 {
            let set = digit >> B & 1 == 1;
            let votes = warp::ballot(set);
            mask &= if set { votes } else { !votes };
        });
        mask
    }

    /// Index in the row of this lane's element of a round.
    #[inline(always)]
    fn index_of(round: u32) -> u32 {
        thread::block_idx_x() * CHUNK + (thread::warp_id() * ROUNDS + round) * 32 + thread::lane_id()
    }

    #[inline(always)]
    #[track_caller]
    fn clear(counts: Smem<u32>) {
        unroll!(W in 0..8 {
            counts.st(W as u32 * DIGITS + thread::thread_idx_x(), 0);
        });
        sync_threads();
    }

    /// Counts a round's digits in the warp's counters; returns the rank of this lane's element among the warp's.
    #[inline(always)]
    #[track_caller]
    fn count(counts: Smem<u32>, digit: u32, inside: bool) -> u32 {
        let (lane, peers) = (thread::lane_id(), peers(digit, inside));
        let before = (peers & ((1u32 << lane) - 1)).count_ones();
        let place = thread::warp_id() * DIGITS + digit;
        let so_far = counts.ld(place);
        // The lanes that read this counter are all before the one that writes it.
        warp::sync_warp();
        if inside && before == 0 {
            counts.st(place, so_far + peers.count_ones());
        }
        warp::sync_warp();
        so_far + before
    }

    /// Keys of a row, wherever they are: in the first pass, made of the floats.
    #[inline(always)]
    #[track_caller]
    fn load(x: Glb<f32>, keys: Glb<u32>, i: u32, flip: u32) -> u32 {
        if keys.is_null() { sorting_key(x.ld_nc(i), flip) } else { keys.ld_nc(i) }
    }

    /// The row's part of an array that may be absent.
    #[inline(always)]
    fn of_row<T>(array: Glb<T>, n: u32) -> Glb<T> {
        if array.is_null() { array } else { array.offset(thread::block_idx_y() as usize * n as usize) }
    }

    #[inline(always)]
    fn histogram(x: Glb<f32>, keys: Glb<u32>, totals: Glb<u32>, n: u32, shift: u32, flip: u32) {
        let (x, keys) = (of_row(x, n), of_row(keys, n));
        let counts = Shared::counts();
        clear(counts);
        let mut round = 0;
        while round < ROUNDS {
            let i = index_of(round);
            let key = if i < n { load(x, keys, i, flip) } else { 0 };
            count(counts, key >> shift & 0xff, i < n);
            round += 1;
        }
        sync_threads();
        let digit = thread::thread_idx_x();
        let mut sum = 0;
        unroll!(W in 0..8 {
            sum += counts.ld(W as u32 * DIGITS + digit);
        });
        let chunks = thread::grid_dim_x();
        totals.st((thread::block_idx_y() * DIGITS + digit) * chunks + thread::block_idx_x(), sum);
    }

    /// The sums of all counts before each, in place.
    #[inline(always)]
    fn scan(totals: Glb<u32>, n: u32) {
        let totals = totals.offset(thread::block_idx_x() as usize * n as usize);
        let (lane, warp_id, sums) = (thread::lane_id(), thread::warp_id(), ScanShared::sums());
        let (mut start, mut first, mut half) = (0, 0, 0);
        while first < n {
            let i = first + thread::thread_idx_x();
            let mine = if i < n { totals.ld(i) } else { 0 };
            let mut sum = mine;
            unroll!(S in 0..8 {
                if S < 5 {
                    let below = warp::shfl_up(sum, 1 << S);
                    sum += if lane >= 1 << S { below } else { 0 };
                }
            });
            if lane == 31 {
                sums.st(half * 32 + warp_id, sum);
            }
            sync_threads();
            // Each warp adds up the warps before it, and all.
            let of_warp = sums.ld(half * 32 + lane);
            let before = warp::sum_i32(if lane < warp_id { of_warp as i32 } else { 0 }) as u32;
            if i < n {
                totals.st(i, start + before + sum - mine);
            }
            start += warp::sum_i32(of_warp as i32) as u32;
            first += SCAN_THREADS;
            half ^= 1;
        }
    }

    #[inline(always)]
    fn scatter(
        x: Glb<f32>,
        keys: Glb<u32>,
        ids: Glb<u32>,
        totals: Glb<u32>,
        keys_out: Glb<u32>,
        ids_out: Glb<u32>,
        values: Glb<f32>,
        n: u32,
        shift: u32,
        flip: u32,
    ) {
        let (x, keys, ids) = (of_row(x, n), of_row(keys, n), of_row(ids, n));
        let (keys_out, ids_out, values) = (of_row(keys_out, n), of_row(ids_out, n), of_row(values, n));
        let counts = Shared::counts();
        clear(counts);
        let mut elements = [0u32; ROUNDS as usize];
        let mut ranks = [0u32; ROUNDS as usize];
        unroll!(R in 0..16 {
            let i = index_of(R as u32);
            elements[R] = if i < n { load(x, keys, i, flip) } else { 0 };
        });
        unroll!(R in 0..16 {
            ranks[R] = count(counts, elements[R] >> shift & 0xff, index_of(R as u32) < n);
        });
        sync_threads();

        // A digit per thread: counts become the place of the warp's first.
        let (digit, chunks) = (thread::thread_idx_x(), thread::grid_dim_x());
        let mut place =
            totals.ld_nc((thread::block_idx_y() * DIGITS + digit) * chunks + thread::block_idx_x());
        let mut warp = 0;
        while warp < WARPS {
            let at = warp * DIGITS + digit;
            let of_warp = counts.ld(at);
            counts.st(at, place);
            place += of_warp;
            warp += 1;
        }
        sync_threads();

        unroll!(R in 0..16 {
            let i = index_of(R as u32);
            if i < n {
                let key = elements[R];
                let to = counts.ld(thread::warp_id() * DIGITS + (key >> shift & 0xff)) + ranks[R];
                ids_out.st(to, if ids.is_null() { i } else { ids.ld_nc(i) });
                if !keys_out.is_null() {
                    keys_out.st(to, key);
                }
                if !values.is_null() {
                    values.st(to, order::value_of_key(if key == u32::MAX { 0 } else { key ^ flip }));
                }
            }
        });
    }

    kernels! {
        in "argsort";
        pub(super) HISTOGRAM: threads(256);
        fn (x: Glb<f32>, keys: Glb<u32>, totals: Glb<u32>, n: u32, shift: u32, flip: u32);
        "argsort_histogram" => histogram;
    }

    kernels! {
        in "argsort";
        pub(super) SCAN: threads(1024);
        fn (totals: Glb<u32>, n: u32);
        "argsort_scan" => scan;
    }

    kernels! {
        in "argsort";
        pub(super) SCATTER: threads(256);
        fn (x: Glb<f32>, keys: Glb<u32>, ids: Glb<u32>, totals: Glb<u32>, keys_out: Glb<u32>, ids_out: Glb<u32>,
            values: Glb<f32>, n: u32, shift: u32, flip: u32);
        "argsort_scatter" => scatter;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{CHUNK, DIGITS, SCAN_THREADS, ScanShared, Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::{peer, top_k};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Bytes of `scratch`: keys and indices twice, and a count per digit and chunk.
    pub fn scratch_bytes(n_rows: usize, n: usize) -> usize {
        if n <= top_k::MAX_WHOLE {
            return 0;
        }
        4 * n_rows * (4 * n + DIGITS as usize * n.div_ceil(CHUNK as usize))
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub scratch: DevicePtr,
        pub ids: DevicePtr,
        pub values: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
        pub smallest: bool,
    }

    /// The launches, in order: how many follows from n.
    pub fn launch(args: &Args) -> Result<Vec<Launch>, LaunchError> {
        let Args { x, scratch, ids, values, n_rows, n, smallest } = *args;
        if n <= top_k::MAX_WHOLE {
            return top_k::launch(&top_k::Args { x, scratch, ids, values, n_rows, n, k: n, smallest });
        }
        let check = Check(Argsort::NAME);
        let (n32, rows) = (check.size("n", n)?, check.grid("n_rows", n_rows)?);
        for (what, at, align) in
            [("x", x, 4), ("scratch", scratch, 8), ("ids", ids, 4), ("values", values, 4)]
        {
            check.aligned(what, at, align)?;
        }
        let chunks = n32.div_ceil(CHUNK);
        let n_totals = check.size("n_rows * chunks * 256", n_rows * (DIGITS * chunks) as usize)?;
        let array = |i: u64| scratch.offset(4 * i * (n_rows * n) as u64);
        // Keys and indices of one pass and of the next.
        let pairs = [[array(0), array(1)], [array(2), array(3)]];
        let totals = array(4);
        let none = [DevicePtr::NULL; 2];
        let flip = if smallest { 0 } else { u32::MAX };
        let mut launches = Vec::new();
        for pass in 0..4 {
            let shift = 8 * pass as u32;
            let [keys, from] = if pass == 0 { none } else { pairs[pass % 2] };
            let [keys_out, to] = if pass == 3 { [DevicePtr::NULL, ids] } else { pairs[(pass + 1) % 2] };
            let values = if pass == 3 { values } else { DevicePtr::NULL };
            let moved = |entry, params: Params| Launch {
                entry,
                grid: [chunks, rows, 1],
                cta: THREADS,
                cluster: 1,
                smem_bytes: Shared::BYTES,
                params: params.with(n32).with(shift).with(flip),
            };
            launches.push(moved("argsort_histogram", Params::new().with(x).with(keys).with(totals)));
            launches.push(Launch {
                entry: "argsort_scan",
                grid: [rows, 1, 1],
                cta: SCAN_THREADS,
                cluster: 1,
                smem_bytes: ScanShared::BYTES,
                params: Params::new().with(totals).with(n_totals / rows),
            });
            let params = Params::new().with(x).with(keys).with(from).with(totals);
            launches.push(moved("argsort_scatter", params.with(keys_out).with(to).with(values)));
        }
        Ok(launches)
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Argsort;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub smallest: bool,
    }

    impl Kernel for Argsort {
        const NAME: &'static str = "argsort";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_rows: 2, n: 1000, smallest: true },
            Case { n_rows: 1, n: 4097, smallest: false },
            Case { n_rows: 2, n: 8192, smallest: true },
            Case { n_rows: 1, n: 30_011, smallest: false },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            Case { n_rows: 1, n: 200_000, smallest: false },
            Case { n_rows: 16, n: 200_000, smallest: false },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] =
            &[super::gpu::HISTOGRAM, super::gpu::SCAN, super::gpu::SCATTER];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, smallest } = *case;
            // Values with few bits, so that ties abound; both zeros and NaN among them.
            let value = |random: &mut Random| match random.below(100) {
                0 => f32::NAN,
                1 => -0.0,
                2 => f32::INFINITY,
                _ => (random.value() * 64.0) as i32 as f32 * 0.1,
            };
            let x: Vec<f32> = (0..n_rows * n).map(|_| value(random)).collect();
            let rows = || x.chunks(n).map(|row| (row, top_k::reference(row, n, smallest)));
            let ids: Vec<i32> = rows().flat_map(|(_, ids)| ids.into_iter().map(|i| i as i32)).collect();
            // A negative zero comes out positive, and any NaN as the usual one.
            let of = |v: f32| if v.is_nan() { f32::NAN } else { v + 0.0 };
            let values: Vec<f32> =
                rows().flat_map(|(row, ids)| ids.into_iter().map(move |i| of(row[i]))).collect();
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Input(vec![0; scratch_bytes(n_rows, n).max(8)]),
                    Buffer::Output(Expected::Exact(bytes_of(&ids))),
                    Buffer::Output(Expected::Exact(bytes_of(&values))),
                ],
                launches: Box::new(move |at| {
                    let (x, scratch, ids, values) = (at[0], at[1], at[2], at[3]);
                    launch(&Args { x, scratch, ids, values, n_rows, n, smallest })
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Some(peer::rows("ARGSORT", case.n, case.n_rows))
        }

        fn bytes(case: &Case) -> u64 {
            8 * (case.n_rows * case.n) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n_rows * case.n) as u64
        }
    }
}
