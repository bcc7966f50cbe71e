//! Activations of products with F16 and BF16 weights: f32 rounded to 16 bits, in the tiles that tensor cores read as B.
//!
//! * Shapes: `x` f32 [n_cols, k], 16-byte aligned, k a multiple of 4; `tiles` 16-bit
//!   [n_cols / 8, 2 · (k / 16), 8, 8], both quotients rounded up: tile (c8, k8) holds columns 8 c8… and k 8 k8…, a column
//!   after the other, 128 bytes together. Zeros beyond n_cols and k. [`tiles_bytes`] says how many bytes.
//! * Mixture: columns are pairs of token and slot sorted by expert (`moe_sort`), each tile of `tile_cols` columns (a multiple
//!   of 8) in its place whether it is full or not; nothing is written for tiles that no columns fill.
//! * Order of tiles: what `ldmatrix` takes without bank conflicts, what a lane of `mma.m16n8k16` finds at word `lane`, and
//!   what wgmma calls core matrices.
//! * Geometry: 256 threads per CTA, a thread per column and tile, so that 8 neighbours write 128 bytes and 4 tiles read
//!   128 bytes of each column. Grid: (k / 256, n_cols / 8).
//! * Bytes: 4 · n_cols · k + 2 · n_cols · k. FLOPs: none.
//! * Tolerance: exact; nearest, ties to even; f16 overflows to infinity.
//!
//! [`launch_scaled`] is for products with quantised weights (`mmd_hopper`): f16 of `x[c] / scales[c]`, with `scales` f32, one
//! for each place of a column in the tiles, a power of two such that the column's largest magnitude lies from 2^14 up to
//! 2^15; so f16 cannot overflow, and holds with all its bits what is above a 2^29th of that. (Of a column below 2^-112 the
//! scale is 2^-126.) Geometry: 512 threads for two columns, each thread 8 of k at a time, so that two neighbours read
//! whole sectors and write one; up to 14336 of k they stay in registers between finding the largest and rounding, the
//! rest is read twice. Grid: n_cols / 2.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
/// Of a CTA that scales, and the columns it takes.
const SCALE_THREADS: u32 = 512;
const SCALE_COLUMNS: u32 = 2;
/// What a column's largest magnitude becomes at least: 2 to this.
const TOP: u32 = 14;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::{SCALE_COLUMNS, SCALE_THREADS, THREADS, TOP};
    use crate::device::{F32x4, Float, Glb, Smem, U32x4, math, sync, thread, warp};

    /// Two values rounded, the first in the low half.
    #[inline(always)]
    pub(crate) fn pair<H: Float>(low: f32, high: f32) -> u32 {
        let bits = |v: f32| u32::from(bytemuck::cast::<H, u16>(H::from_f32(v)));
        bits(low) | bits(high) << 16
    }

    /// Row of the activations of the column in place `place` of the tiles, `None` if there is no column; nothing at all for
    /// tiles of a mixture that no columns fill.
    #[inline(always)]
    #[track_caller]
    fn column(
        place: u32,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        n_cols: u32,
        tile_cols: u32,
        pairs_per_x: u32,
    ) -> Option<Option<u32>> {
        if order.is_null() {
            return Some(if place < n_cols { Some(place) } else { None });
        }
        let U32x4([_, first, number, _]) = of_expert.ld_nc(place / tile_cols);
        if number == 0 {
            return None;
        }
        let there = place % tile_cols < number;
        Some(if there { Some(order.ld_nc(first + place % tile_cols) / pairs_per_x) } else { None })
    }

    /// Eight values of a column as f16, bf16.
    #[inline(always)]
    fn eight<H: Float>(low: [f32; 4], high: [f32; 4]) -> U32x4 {
        U32x4([
            pair::<H>(low[0], low[1]),
            pair::<H>(low[2], low[3]),
            pair::<H>(high[0], high[1]),
            pair::<H>(high[2], high[3]),
        ])
    }

    #[inline(always)]
    fn round<H: Float>(
        x: Glb<F32x4>,
        tiles: Glb<U32x4>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        n_cols: u32,
        k: u32,
        tile_cols: u32,
        pairs_per_x: u32,
    ) {
        let i = thread::thread_idx_x();
        let (tile8, c) = (thread::block_idx_x() * (THREADS / 8) + i / 8, i % 8);
        let place = 8 * thread::block_idx_y() + c;
        let n_tiles = 2 * k.div_ceil(16);
        if tile8 >= n_tiles {
            return;
        }
        let Some(column) = column(place, order, of_expert, n_cols, tile_cols, pairs_per_x) else { return };
        let x = x.offset(column.unwrap_or(0) as usize * (k / 4) as usize);
        let load = |k4: u32| if column.is_some() && k4 < k / 4 { x.ld_nc(k4).0 } else { [0.0; 4] };
        let words = eight::<H>(load(2 * tile8), load(2 * tile8 + 1));
        tiles.offset(8 * thread::block_idx_y() as usize * n_tiles as usize).st(8 * tile8 + c, words);
    }

    /// Threads of a column, and how often each of them holds 8 of k.
    const OF_COLUMN: u32 = SCALE_THREADS / SCALE_COLUMNS;
    const HELD: usize = 7;

    #[inline(always)]
    fn scale(
        x: Glb<F32x4>,
        tiles: Glb<U32x4>,
        scales: Glb<f32>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        n_cols: u32,
        k: u32,
        tile_cols: u32,
        pairs_per_x: u32,
    ) {
        let i = thread::thread_idx_x();
        let (c, first) = (i % SCALE_COLUMNS, i / SCALE_COLUMNS);
        let place = SCALE_COLUMNS * thread::block_idx_x() + c;
        // Both columns are of one tile of a mixture: all threads leave.
        let Some(column) = column(place, order, of_expert, n_cols, tile_cols, pairs_per_x) else { return };
        let n_tiles = 2 * k.div_ceil(16);
        let x = x.offset(column.unwrap_or(0) as usize * (k / 4) as usize);
        let load = |k4: u32| if column.is_some() && k4 < k / 4 { x.ld_nc(k4).0 } else { [0.0; 4] };
        let larger = |max: f32, v: [f32; 4]| {
            let [a, b, c, d] = v.map(math::fabs);
            math::fmax(max, math::fmax(math::fmax(a, b), math::fmax(c, d)))
        };

        // What is held first: all loads are under way before any is used.
        let mut held = [[[0.0f32; 4]; 2]; HELD];
        unroll!(R in 0..8 {
            if R < HELD {
                let tile8 = first + R as u32 * OF_COLUMN;
                unroll!(H in 0..2 { held[R % HELD][H] = load(2 * tile8 + H as u32); });
            }
        });
        let mut max = 0.0;
        unroll!(R in 0..8 {
            if R < HELD {
                unroll!(H in 0..2 { max = larger(max, held[R % HELD][H]); });
            }
        });
        let mut tile8 = first + HELD as u32 * OF_COLUMN;
        while tile8 < n_tiles {
            max = larger(larger(max, load(2 * tile8)), load(2 * tile8 + 1));
            tile8 += OF_COLUMN;
        }

        // Over the lanes of a column, then over the warps.
        unroll!(S in 0..4 {
            let other = warp::shfl_xor(max.to_bits(), 16 >> S);
            max = math::fmax(max, f32::from_bits(other));
        });
        let of_warps: Smem<f32> = Smem::dynamic(0, SCALE_THREADS / 32 * SCALE_COLUMNS);
        if thread::lane_id() < SCALE_COLUMNS {
            of_warps.st(thread::warp_id() * SCALE_COLUMNS + c, max);
        }
        sync::sync_threads();
        let mut w = 0;
        while w < SCALE_THREADS / 32 {
            max = math::fmax(max, of_warps.ld(w * SCALE_COLUMNS + c));
            w += 1;
        }

        // Exponents, biased by 127: both powers of two are normal numbers.
        let exponent = max.to_bits() >> 23;
        let exponent = if exponent > TOP { exponent } else { TOP + 1 };
        let down = f32::from_bits((254 + TOP - exponent) << 23);
        if first == 0 {
            scales.st(place, f32::from_bits((exponent - TOP) << 23));
        }
        let tiles = tiles.offset((place / 8) as usize * 8 * n_tiles as usize);
        let store = |tile8: u32, [low, high]: [[f32; 4]; 2]| {
            if tile8 < n_tiles {
                let words = eight::<f16>(low.map(|v| v * down), high.map(|v| v * down));
                tiles.st(8 * tile8 + place % 8, words);
            }
        };
        unroll!(R in 0..8 {
            if R < HELD {
                store(first + R as u32 * OF_COLUMN, held[R % HELD]);
            }
        });
        let mut tile8 = first + HELD as u32 * OF_COLUMN;
        while tile8 < n_tiles {
            store(tile8, [load(2 * tile8), load(2 * tile8 + 1)]);
            tile8 += OF_COLUMN;
        }
    }

    kernels! {
        in "round_act";
        pub(super) SCALED: threads(512, 1);
        fn (
            x: Glb<F32x4>, tiles: Glb<U32x4>, scales: Glb<f32>, order: Glb<u32>, of_expert: Glb<U32x4>, n_cols: u32,
            k: u32, tile_cols: u32, pairs_per_x: u32,
        );
        "round_act_scaled" => scale;
    }

    kernels! {
        in "round_act";
        pub(super) ENTRIES: threads(256);
        fn (
            x: Glb<F32x4>, tiles: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, n_cols: u32, k: u32,
            tile_cols: u32, pairs_per_x: u32,
        );
        "round_act_F16" => round::<f16>;
        "round_act_BF16" => round::<bf16>;
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use gpu::pair;

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use half::{bf16, f16};
    use quant::FormatId;

    use super::{SCALE_COLUMNS, SCALE_THREADS, THREADS, TOP};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Bytes of the tiles of a shape.
    pub const fn tiles_bytes(n_cols: usize, k: usize) -> usize {
        n_cols.div_ceil(8) * 2 * k.div_ceil(16) * 128
    }

    /// The definition: the tiles as 16-bit patterns.
    pub fn reference(format: FormatId, x: &[f32], k: usize) -> Vec<u16> {
        let n_cols = x.len() / k;
        let n_tiles = 2 * k.div_ceil(16);
        let mut tiles = vec![0; tiles_bytes(n_cols, k) / 2];
        for (column, values) in x.chunks(k).enumerate() {
            for (i, &v) in values.iter().enumerate() {
                let at = ((column / 8 * n_tiles + i / 8) * 8 + column % 8) * 8 + i % 8;
                tiles[at] = match format {
                    FormatId::F16 => f16::from_f32(v).to_bits(),
                    _ => bf16::from_f32(v).to_bits(),
                };
            }
        }
        tiles
    }

    /// Columns of a mixture, as `moe_sort` makes them.
    #[derive(Clone, Copy, Debug)]
    pub struct SortedPairs {
        /// Pairs by expert.
        pub order: DevicePtr,
        /// Tiles of columns: (expert, first, number, 0).
        pub tiles: DevicePtr,
        /// Entries of `tiles`; those that no columns fill have number 0.
        pub n_tiles: usize,
        /// Most columns of a tile.
        pub tile_cols: usize,
        /// Pairs that share a row of activations: the slots of a token, or 1.
        pub pairs_per_x: usize,
    }

    /// The columns of a product on tiles of `cols` of them, as its kernel takes them: how many tiles, how many columns, and
    /// a mixture's `order` and `tiles`, else null. Of a mixture `n_cols` is not used.
    pub(crate) fn columns_of(
        check: Check,
        n_cols: usize,
        mixture: Option<SortedPairs>,
        cols: u32,
    ) -> Result<(u32, u32, [DevicePtr; 2]), LaunchError> {
        let Some(SortedPairs { order, tiles, n_tiles, tile_cols, .. }) = mixture else {
            let n_cols = check.size("n_cols", n_cols)?;
            return Ok((n_cols.div_ceil(cols), n_cols, [DevicePtr::NULL; 2]));
        };
        if tile_cols != cols as usize {
            return Err(check.shape("tile_cols", "the cut's", tile_cols));
        }
        check.aligned("order", order, 4)?;
        check.aligned("tiles", tiles, 16)?;
        let n_tiles = check.size("n_tiles", n_tiles)?;
        Ok((n_tiles, check.size("columns", n_tiles as usize * tile_cols)?, [order, tiles]))
    }

    /// Arguments; see the contract. `format` is the weights': F16 or BF16. Of a mixture `n_cols` is not used.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub format: FormatId,
        pub x: DevicePtr,
        pub tiles: DevicePtr,
        pub n_cols: usize,
        pub k: usize,
        pub mixture: Option<SortedPairs>,
    }

    /// One launch for all columns.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = RoundAct::NAME;
        let entry = match args.format {
            FormatId::F16 => "round_act_F16",
            FormatId::BF16 => "round_act_BF16",
            format => return Err(LaunchError::Format { kernel, format }),
        };
        let (params, n_places) = with_columns(Params::new().with(args.x).with(args.tiles), args)?;
        let blocks = Check(kernel).grid("n_cols / 8", n_places.div_ceil(8))?;
        Ok(Launch {
            entry,
            grid: [(2 * args.k.div_ceil(16)).div_ceil(THREADS as usize / 8) as u32, blocks, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params,
        })
    }

    /// Scales of so many columns, those beyond the last in its tile included.
    pub const fn n_scales(n_cols: usize) -> usize {
        n_cols.next_multiple_of(8)
    }

    /// The same with a scale for each column: `format` is F16, `scales` has [`n_scales`] (of a mixture all places of its
    /// tiles).
    pub fn launch_scaled(args: &Args, scales: DevicePtr) -> Result<Launch, LaunchError> {
        let kernel = RoundAct::NAME;
        if args.format != FormatId::F16 {
            return Err(LaunchError::Format { kernel, format: args.format });
        }
        let check = Check(kernel);
        check.aligned("scales", scales, 4)?;
        let params = Params::new().with(args.x).with(args.tiles).with(scales);
        let (params, n_places) = with_columns(params, args)?;
        let ctas = check.size("n_cols", n_scales(n_places) / SCALE_COLUMNS as usize)?;
        let smem_bytes = 4 * SCALE_THREADS / 32 * SCALE_COLUMNS;
        Ok(Launch {
            entry: "round_act_scaled",
            grid: [ctas, 1, 1],
            cta: SCALE_THREADS,
            cluster: 1,
            smem_bytes,
            params,
        })
    }

    /// The arguments behind the arrays as checked, and the places of columns in the tiles.
    fn with_columns(params: Params, args: &Args) -> Result<(Params, usize), LaunchError> {
        let check = Check(RoundAct::NAME);
        check.multiple("k", args.k, 4, "a multiple of 4")?;
        check.aligned("x", args.x, 16)?;
        check.aligned("tiles", args.tiles, 16)?;
        let k = check.size("k", args.k)?;
        match args.mixture {
            None => {
                let n_cols = check.size("n_cols", args.n_cols)?;
                let params = params.with(DevicePtr::NULL).with(DevicePtr::NULL).with(n_cols).with(k);
                Ok((params.with(1u32).with(1u32), args.n_cols))
            }
            Some(SortedPairs { order, tiles, n_tiles, tile_cols, pairs_per_x }) => {
                check.aligned("order", order, 4)?;
                check.aligned("tiles", tiles, 16)?;
                check.multiple("tile_cols", tile_cols, 8, "a multiple of 8")?;
                let params = params.with(order).with(tiles).with(0u32).with(k);
                let params = params.with(check.size("tile_cols", tile_cols)?);
                Ok((params.with(check.size("pairs_per_x", pairs_per_x)?), n_tiles * tile_cols))
            }
        }
    }

    /// The definition of the scaled form: tiles and scales.
    pub fn reference_scaled(x: &[f32], k: usize) -> (Vec<u16>, Vec<f32>) {
        let n_cols = x.len() / k;
        let (mut scaled, mut scales) = (vec![], vec![]);
        for column in x.chunks(k) {
            let max = column.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            // The exponent of a number's leading bit, of 0 a very small one.
            let exponent = if max == 0.0 { -200 } else { libm::ilogb(f64::from(max)) };
            let scale = libm::ldexpf(1.0, (exponent - TOP as i32).max(-126));
            scaled.extend(column.iter().map(|v| (f64::from(*v) / f64::from(scale)) as f32));
            scales.push(scale);
        }
        scales.resize(n_scales(n_cols), libm::ldexpf(1.0, -126));
        (reference(FormatId::F16, &scaled, k), scales)
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct RoundAct;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub format: FormatId,
        pub n_cols: usize,
        pub k: usize,
        /// By [`launch_scaled`].
        pub scaled: bool,
    }

    const fn plain(format: FormatId, n_cols: usize, k: usize) -> Case {
        Case { format, n_cols, k, scaled: false }
    }

    const fn scaled(n_cols: usize, k: usize) -> Case {
        Case { scaled: true, ..plain(FormatId::F16, n_cols, k) }
    }

    impl Kernel for RoundAct {
        const NAME: &'static str = "round_act";
        type Case = Case;
        const CASES: &'static [Case] = &[
            plain(FormatId::F16, 1, 4),
            plain(FormatId::F16, 8, 256),
            plain(FormatId::BF16, 9, 268),
            plain(FormatId::BF16, 17, 576),
            scaled(1, 4),
            scaled(9, 268),
            scaled(3, 14336),
            scaled(2, 14336 + 2052),
        ];
        /// Beside the products of an 8B model.
        const BENCH: &'static [Case] =
            &[plain(FormatId::F16, 512, 4096), scaled(512, 4096), scaled(512, 14336), scaled(2048, 4096)];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES, super::gpu::SCALED];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, n_cols, k, scaled } = *case;
            let mut x = random.values(n_cols * k);
            if scaled {
                // Columns of all sizes: zeros, next to nothing, almost infinite.
                for (c, column) in x.chunks_mut(k).enumerate() {
                    let exponent = [0, -140, 122, 40, -60][c % 5];
                    column.iter_mut().for_each(|v| *v = libm::ldexpf(*v, exponent));
                }
                if n_cols > 5 {
                    x[5 * k..6 * k].fill(0.0);
                }
            } else {
                // Beyond f16's largest number, and exactly between two.
                x[0] = 7e4;
                x[1] = 1.0 + 1.0 / 2048.0;
            }
            let (tiles, scales) = if scaled {
                let (tiles, scales) = reference_scaled(&x, k);
                (tiles, Expected::Exact(bytes_of(&scales)))
            } else {
                (reference(format, &x, k), Expected::Unchecked(4))
            };
            let buffers = vec![
                Buffer::Input(bytes_of(&x)),
                Buffer::Output(Expected::Exact(bytes_of(&tiles))),
                Buffer::Output(scales),
            ];
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let args = Args { format, x: at[0], tiles: at[1], n_cols, k, mixture: None };
                    Ok(vec![if scaled { launch_scaled(&args, at[2])? } else { launch(&args)? }])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (6 * case.n_cols * case.k) as u64
        }

        fn flops(_: &Case) -> u64 {
            0
        }
    }
}
