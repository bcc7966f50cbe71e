//! Pairs of a mixture by expert: a stable counting sort, and the list of column tiles that `mmq` works through.
//!
//! * Shapes: `ids` `[n_pairs]` u32, the expert of each (token, slot) pair, all below n_expert; `order` `[n_pairs]` u32, the
//!   pairs by expert and, of one expert, in order; `tiles` [max_tiles] of (expert, first, number, 0): `number` columns (1 to
//!   `tile_cols`) from `order[first]` on are `expert`'s. Entries that no columns fill are zeros. Nothing overlaps.
//! * Geometry: a CTA of 256 threads per expert. Each counts all pairs, so that none waits for another; no result depends
//!   on which atomic comes first. Then it places its own pairs: each warp those of an eighth of the list.
//! * Bytes: n_expert · n_pairs · 12, nearly all from L2. FLOPs: none.
//! * Tolerance: exact.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{THREADS, WARPS};
    use crate::device::{Glb, Smem, U32x4, atomic, sync, thread, warp};

    #[inline(always)]
    fn moe_sort(
        ids: Glb<u32>,
        order: Glb<u32>,
        tiles: Glb<U32x4>,
        n_pairs: u32,
        n_expert: u32,
        tile_cols: u32,
        max_tiles: u32,
    ) {
        let counts: Smem<u32> = Smem::dynamic(0, n_expert);
        let of_warps: Smem<u32> = Smem::dynamic(4 * n_expert, WARPS);
        let (thread, lane, warp_id) = (thread::thread_idx_x(), thread::lane_id(), thread::warp_id());
        let expert = thread::block_idx_x();

        let mut e = thread;
        while e < n_expert {
            counts.st(e, 0);
            e += THREADS;
        }
        sync::sync_threads();

        // Pairs of each expert; and of this one, those in the warp's eighth of the list.
        let mut pair = thread;
        while pair < n_pairs {
            atomic::add_shared(counts, ids.ld_nc(pair), 1);
            pair += THREADS;
        }
        let eighth = n_pairs.div_ceil(THREADS) * 32;
        let (start, end) = (warp_id * eighth, (warp_id + 1) * eighth);
        let is_own = |pair: u32| pair < n_pairs && ids.ld_nc(pair) == expert;
        let mut own = 0;
        let mut first = start;
        while first < end {
            own += warp::ballot(is_own(first + lane)).count_ones();
            first += 32;
        }
        if lane == 0 {
            of_warps.st(warp_id, own);
        }
        sync::sync_threads();

        // Pairs and tiles of the experts before this one, and of all.
        let (mut pairs_before, mut tiles_before, mut tiles_in_all) = (0, 0, 0);
        let mut e = lane;
        while e < n_expert {
            let count = counts.ld(e);
            if e < expert {
                pairs_before += count;
                tiles_before += count.div_ceil(tile_cols);
            }
            tiles_in_all += count.div_ceil(tile_cols);
            e += 32;
        }
        let sum = |v: u32| warp::sum_i32(v as i32) as u32;
        let (pairs_before, tiles_before, tiles_in_all) =
            (sum(pairs_before), sum(tiles_before), sum(tiles_in_all));

        let n_own = counts.ld(expert);
        let mut tile = thread;
        while tile < n_own.div_ceil(tile_cols) {
            let done = tile * tile_cols;
            let number = if n_own - done < tile_cols { n_own - done } else { tile_cols };
            tiles.st(tiles_before + tile, U32x4([expert, pairs_before + done, number, 0]));
            tile += THREADS;
        }
        if expert == n_expert - 1 {
            let mut tile = tiles_in_all + thread;
            while tile < max_tiles {
                tiles.st(tile, U32x4([0; 4]));
                tile += THREADS;
            }
        }

        let mut place = pairs_before;
        let mut w = 0;
        while w < warp_id {
            place += of_warps.ld(w);
            w += 1;
        }
        let mut first = start;
        while first < end {
            let mine = is_own(first + lane);
            let all = warp::ballot(mine);
            if mine {
                order.st(place + (all & ((1 << lane) - 1)).count_ones(), first + lane);
            }
            place += all.count_ones();
            first += 32;
        }
    }

    kernels! {
        in "moe_sort";
        pub(super) ENTRIES: threads(256);
        fn (
            ids: Glb<u32>, order: Glb<u32>, tiles: Glb<U32x4>, n_pairs: u32, n_expert: u32, tile_cols: u32,
            max_tiles: u32,
        );
        "moe_sort" => moe_sort;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{THREADS, WARPS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Most experts: what the counters in shared memory take.
    const MAX_EXPERTS: usize = 4096;

    /// Entries of the list of tiles: as many as can be needed, whatever the experts chosen.
    pub fn max_tiles(n_pairs: usize, n_expert: usize, tile_cols: usize) -> usize {
        // Every tile but each expert's last one is full; no tile is empty.
        n_pairs.min(n_pairs / tile_cols + n_expert)
    }

    /// The definition: `order` and `tiles`.
    pub fn reference(ids: &[u32], n_expert: usize, tile_cols: usize) -> (Vec<u32>, Vec<[u32; 4]>) {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&pair| ids[pair as usize]);
        let mut tiles = vec![];
        let mut first = 0;
        for expert in 0..n_expert as u32 {
            let mut left = ids.iter().filter(|&&id| id == expert).count();
            while left > 0 {
                let number = left.min(tile_cols);
                tiles.push([expert, first, number as u32, 0]);
                first += number as u32;
                left -= number;
            }
        }
        tiles.resize(max_tiles(ids.len(), n_expert, tile_cols), [0; 4]);
        (order, tiles)
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub ids: DevicePtr,
        pub order: DevicePtr,
        pub tiles: DevicePtr,
        pub n_pairs: usize,
        pub n_expert: usize,
        pub tile_cols: usize,
    }

    /// One launch; `tiles` has [`max_tiles`] entries.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = MoeSort::NAME;
        let check = Check(kernel);
        let n_pairs = check.size("n_pairs", args.n_pairs)?;
        let n_expert = check.size("n_expert", args.n_expert)?;
        let tile_cols = check.size("tile_cols", args.tile_cols)?;
        if args.n_expert > MAX_EXPERTS {
            let got = args.n_expert as u64;
            return Err(LaunchError::Shape { kernel, what: "n_expert", expected: "at most 4096", got });
        }
        for (what, at, align) in [("ids", args.ids, 4), ("order", args.order, 4), ("tiles", args.tiles, 16)] {
            check.aligned(what, at, align)?;
        }
        let max_tiles = max_tiles(args.n_pairs, args.n_expert, args.tile_cols) as u32;
        let params = Params::new().with(args.ids).with(args.order).with(args.tiles);
        Ok(Launch {
            entry: "moe_sort",
            grid: [n_expert, 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 4 * (n_expert + WARPS),
            params: params.with(n_pairs).with(n_expert).with(tile_cols).with(max_tiles),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct MoeSort;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_pairs: usize,
        pub n_expert: usize,
        pub tile_cols: usize,
    }

    impl Kernel for MoeSort {
        const NAME: &'static str = "moe_sort";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_pairs: 1, n_expert: 1, tile_cols: 16 },
            Case { n_pairs: 2, n_expert: 40, tile_cols: 16 },
            Case { n_pairs: 255, n_expert: 3, tile_cols: 16 },
            Case { n_pairs: 256, n_expert: 8, tile_cols: 32 },
            Case { n_pairs: 257, n_expert: 2, tile_cols: 128 },
            Case { n_pairs: 1030, n_expert: 33, tile_cols: 32 },
        ];
        const BENCH: &'static [Case] = &[
            Case { n_pairs: 4096, n_expert: 128, tile_cols: 128 },
            Case { n_pairs: 4096, n_expert: 8, tile_cols: 128 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_pairs, n_expert, tile_cols } = *case;
            // The product of two makes small numbers likelier, so experts fill unevenly.
            let mut below = |n: usize| random.below(n as u64) as usize;
            let ids: Vec<u32> =
                (0..n_pairs).map(|_| (below(n_expert) * (below(n_expert) + 1) / n_expert) as u32).collect();
            let (order, tiles) = reference(&ids, n_expert, tile_cols);
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&ids)),
                    Buffer::Output(Expected::Exact(bytes_of(&order))),
                    Buffer::Output(Expected::Exact(bytes_of(&tiles))),
                ],
                launches: Box::new(move |at| {
                    let args = Args { ids: at[0], order: at[1], tiles: at[2], n_pairs, n_expert, tile_cols };
                    Ok(vec![launch(&args)?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (case.n_expert * case.n_pairs * 12) as u64
        }

        fn flops(_: &Case) -> u64 {
            0
        }
    }
}
