//! The k largest elements of each row, sorted: largest first, ties to the lower index, NaN last.
//!
//! * Shapes: `x` [n_rows, n] f32, dense; `ids` [n_rows, k] i32, `values` [n_rows, k] f32, dense; `scratch` of
//!   [`scratch_bytes`], 8-byte aligned. k at most n, and at most 1024 where n is more than 4096. With `smallest`, the other
//!   end of the order, smallest first (ties to the lower index and NaN last still). `values` may be absent. Nothing overlaps.
//! * Geometry: each launch sorts tiles of up to 4096 elements, one to a CTA of up to 1024 threads, and keeps k of each;
//!   launches follow until one tile is left.
//! * Bytes: 4 per element, 8 per result. FLOPs: 1 per element, a comparison.
//! * Tolerance: exact. Elements are sorted as unique integers, key of the float above, complement of the index below, so
//!   the result depends on no order of execution.
//!
//! Done for speed: (1) steps of the bitonic sort within 64 neighbours need no barrier, (2) a row of 128k keeps 32 SMs busy.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Most elements that a CTA sorts: 32 KiB of shared memory.
const TILE: u32 = 4096;

smem! {
    struct Shared {
        /// Elements being sorted.
        elements: [u64; 4096],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{Shared, TILE};
    use crate::device::sync::sync_threads;
    use crate::device::{Glb, Smem, thread, warp};
    use crate::kernels::order;

    /// Sorts `tile` elements (a power of two, at least 64), largest first.
    #[inline(always)]
    #[track_caller]
    fn sort(elements: Smem<u64>, tile: u32) {
        let threads = thread::block_dim_x();
        let mut run = 2;
        while run <= tile {
            let mut stride = run / 2;
            // The elements of the step before lie with other warps, unless both steps stay within 64 neighbours.
            sync_threads();
            while stride > 0 {
                let mut pair = thread::thread_idx_x();
                while pair < tile / 2 {
                    let low = 2 * pair - pair % stride;
                    let (a, b) = (elements.ld(low), elements.ld(low + stride));
                    // Runs alternate in direction, so that two of them make one that rises and falls.
                    let descending = low & run == 0;
                    if (a < b) == descending {
                        elements.st(low, b);
                        elements.st(low + stride, a);
                    }
                    pair += threads;
                }
                if stride > 32 {
                    sync_threads();
                } else {
                    warp::sync_warp();
                }
                stride /= 2;
            }
            run *= 2;
        }
        sync_threads();
    }

    /// Sorts a tile and stores its first k elements: packed, for the next launch, or taken apart, for the caller.
    #[inline(always)]
    #[track_caller]
    fn keep(
        load: impl Fn(u32) -> u64,
        packed: Glb<u64>,
        ids: Glb<i32>,
        values: Glb<f32>,
        n: u32,
        tile: u32,
        k: u32,
        flip: u32,
    ) {
        let (chunk, row, threads) = (thread::block_idx_x(), thread::block_idx_y(), thread::block_dim_x());
        let elements = Shared::elements();
        let mut i = thread::thread_idx_x();
        while i < tile {
            // Nothing is below every element.
            let at = chunk * TILE + i;
            elements.st(i, if at < n { load(at) } else { 0 });
            i += threads;
        }
        sort(elements, tile);
        let first = (row * thread::grid_dim_x() + chunk) as usize * k as usize;
        let mut i = thread::thread_idx_x();
        while i < k {
            let element = elements.ld(i);
            if packed.is_null() {
                let key = (element >> 32) as u32;
                ids.offset(first).st(i, !(element as u32) as i32);
                if !values.is_null() {
                    values.offset(first).st(i, order::value_of_key(if key == 0 { 0 } else { key ^ flip }));
                }
            } else {
                packed.offset(first).st(i, element);
            }
            i += threads;
        }
    }

    #[inline(always)]
    fn of_floats(
        x: Glb<f32>,
        packed: Glb<u64>,
        ids: Glb<i32>,
        values: Glb<f32>,
        n: u32,
        tile: u32,
        k: u32,
        flip: u32,
    ) {
        let x = x.offset(thread::block_idx_y() as usize * n as usize);
        let load = |i: u32| {
            let key = order::key(x.ld_nc(i));
            let key = if key == 0 { 0 } else { key ^ flip };
            u64::from(key) << 32 | u64::from(!i)
        };
        keep(load, packed, ids, values, n, tile, k, flip);
    }

    #[inline(always)]
    fn of_packed(
        x: Glb<u64>,
        packed: Glb<u64>,
        ids: Glb<i32>,
        values: Glb<f32>,
        n: u32,
        tile: u32,
        k: u32,
        flip: u32,
    ) {
        let x = x.offset(thread::block_idx_y() as usize * n as usize);
        keep(|i| x.ld_nc(i), packed, ids, values, n, tile, k, flip);
    }

    kernels! {
        in "top_k";
        pub(super) FLOATS: threads(1024);
        fn (x: Glb<f32>, packed: Glb<u64>, ids: Glb<i32>, values: Glb<f32>, n: u32, tile: u32, k: u32, flip: u32);
        "top_k_f32" => of_floats;
    }

    kernels! {
        in "top_k";
        pub(super) PACKED: threads(1024);
        fn (x: Glb<u64>, packed: Glb<u64>, ids: Glb<i32>, values: Glb<f32>, n: u32, tile: u32, k: u32, flip: u32);
        "top_k_packed" => of_packed;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};
    use core::cmp::Ordering;

    use super::{Shared, TILE};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Most results of a row that is longer than a tile.
    pub const MAX_K: usize = 1024;
    /// Rows up to this length may ask for all their elements.
    pub const MAX_WHOLE: usize = TILE as usize;

    /// The order of indices into a row: what comes first is less.
    pub fn reference_order(x: &[f32], smallest: bool) -> impl Fn(&usize, &usize) -> Ordering {
        move |&a: &usize, &b: &usize| {
            let by_value = match x[a].partial_cmp(&x[b]) {
                Some(order) => {
                    if smallest {
                        order
                    } else {
                        order.reverse()
                    }
                }
                None => x[a].is_nan().cmp(&x[b].is_nan()),
            };
            by_value.then(a.cmp(&b))
        }
    }

    /// The definition: indices of one row.
    pub fn reference(x: &[f32], k: usize, smallest: bool) -> Vec<usize> {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(reference_order(x, smallest));
        order.truncate(k);
        order
    }

    /// Elements left after each launch: tiles times k, until one tile is left.
    fn levels(n: usize, k: usize) -> impl Iterator<Item = usize> {
        let next = move |&n: &usize| (n > TILE as usize).then(|| n.div_ceil(TILE as usize) * k);
        core::iter::successors(Some(n), next)
    }

    /// Bytes of `scratch`: what the first launch leaves, and the second, in turn.
    pub fn scratch_bytes(n_rows: usize, n: usize, k: usize) -> usize {
        8 * n_rows * levels(n, k).skip(1).take(2).sum::<usize>()
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
        pub k: usize,
        pub smallest: bool,
    }

    /// The launches, in order: how many follows from n and k.
    pub fn launch(args: &Args) -> Result<Vec<Launch>, LaunchError> {
        let check = Check(TopK::NAME);
        check.size("n", args.n)?;
        let n_rows = check.grid("n_rows", args.n_rows)?;
        let k = check.size("k", args.k)?;
        if args.k > args.n {
            return Err(check.shape("k", "at most n", args.k));
        }
        if args.n > MAX_WHOLE && args.k > MAX_K {
            return Err(check.shape("k", "at most 1024 of a row beyond 4096", args.k));
        }
        for (what, at, align) in
            [("x", args.x, 4), ("scratch", args.scratch, 8), ("ids", args.ids, 4), ("values", args.values, 4)]
        {
            check.aligned(what, at, align)?;
        }
        let levels: Vec<usize> = levels(args.n, args.k).collect();
        // Two places that the launches read and write in turn.
        let halves =
            [0, levels.get(1).map_or(0, |&n| 8 * (args.n_rows * n) as u64)].map(|b| args.scratch.offset(b));
        let launch = |(i, &n): (usize, &usize)| {
            let tile = if n > TILE as usize { TILE } else { (n as u32).next_power_of_two().max(64) };
            let from = if i == 0 { args.x } else { halves[(i + 1) % 2] };
            let to = if i + 1 == levels.len() { DevicePtr::NULL } else { halves[i % 2] };
            let params = Params::new().with(from).with(to).with(args.ids).with(args.values);
            Launch {
                entry: if i == 0 { "top_k_f32" } else { "top_k_packed" },
                grid: [(n as u32).div_ceil(TILE), n_rows, 1],
                cta: (tile / 2).min(1024),
                cluster: 1,
                smem_bytes: Shared::BYTES,
                params: params.with(n as u32).with(tile).with(k).with(if args.smallest {
                    u32::MAX
                } else {
                    0u32
                }),
            }
        };
        Ok(levels.iter().enumerate().map(launch).collect())
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct TopK;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
        pub k: usize,
        pub smallest: bool,
    }

    impl Kernel for TopK {
        const NAME: &'static str = "top_k";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_rows: 1, n: 1, k: 1, smallest: false },
            Case { n_rows: 3, n: 63, k: 63, smallest: false },
            Case { n_rows: 2, n: 65, k: 65, smallest: true },
            Case { n_rows: 1, n: 4096, k: 4096, smallest: false },
            Case { n_rows: 2, n: 4097, k: 40, smallest: false },
            Case { n_rows: 1, n: 20_001, k: 1024, smallest: false },
            Case { n_rows: 1, n: 50_000, k: 7, smallest: true },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            Case { n_rows: 1, n: 128_256, k: 40, smallest: false },
            Case { n_rows: 64, n: 128_256, k: 40, smallest: false },
            Case { n_rows: 1, n: 16_384, k: 16, smallest: false },
            Case { n_rows: 1, n: 200_000, k: 40, smallest: false },
            Case { n_rows: 16, n: 200_000, k: 40, smallest: false },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::FLOATS, super::gpu::PACKED];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n, k, smallest } = *case;
            // Few distinct values, so that ties abound; both zeros and NaN among them.
            let value = |random: &mut Random| match random.below(500) {
                0 => f32::NAN,
                1 => -0.0,
                2 => f32::NEG_INFINITY,
                v => (v as f32 - 250.0) * 0.25,
            };
            let x: Vec<f32> = (0..n_rows * n).map(|_| value(random)).collect();
            let rows = || x.chunks(n).map(|row| (row, reference(row, k, smallest)));
            let ids: Vec<i32> = rows().flat_map(|(_, ids)| ids.into_iter().map(|i| i as i32)).collect();
            // A negative zero comes out positive, and any NaN as the usual one.
            let of = |v: f32| if v.is_nan() { f32::NAN } else { v + 0.0 };
            let values: Vec<f32> =
                rows().flat_map(|(row, ids)| ids.into_iter().map(move |i| of(row[i]))).collect();
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Input(vec![0; scratch_bytes(n_rows, n, k).max(8)]),
                    Buffer::Output(Expected::Exact(bytes_of(&ids))),
                    Buffer::Output(Expected::Exact(bytes_of(&values))),
                ],
                launches: Box::new(move |at| {
                    let (x, scratch, ids, values) = (at[0], at[1], at[2], at[3]);
                    launch(&Args { x, scratch, ids, values, n_rows, n, k, smallest })
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Some(alloc::format!("{},k={},", peer::rows("TOP_K", case.n, case.n_rows), case.k))
        }

        fn bytes(case: &Case) -> u64 {
            (case.n_rows * (4 * case.n + 8 * case.k)) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n_rows * case.n) as u64
        }
    }
}
